"""What benchmarks/compiled.py reads off compiled programs, and what it says of them."""

import json
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import compiled
import compiled_records
import compiled_text
import devices
import programs
from compiled_records import Spec

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
# Of XLA:TPU for v5e, jax 0.10.2, shortened: seven steps of tanh(x @ w[i]), and three
# collectives over four chips. Of the loop no trip count is said.
TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%slice.1 (p.0: bf16[7,256,256], p.1: s32[]) -> bf16[256,256] {
  %p.0 = bf16[7,256,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %c.1 = s32[]{:T(128)} constant(0)
  %ds.1 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %c.1, %c.1)
  ROOT %b.1 = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%ds.1)
}

%body (t.0: (s32[], bf16[256,256], bf16[7,256,256])) -> (s32[], bf16[256,256]) {
  %one = s32[]{:T(128)} constant(1)
  %t.0 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)}) parameter(0)
  %g.0 = s32[]{:T(128)} get-tuple-element(%t.0), index=0
  %g.1 = bf16[256,256]{1,0:T(8,128)(2,1)} get-tuple-element(%t.0), index=1
  %g.2 = bf16[7,256,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t.0), index=2
  %add.9 = s32[]{:T(128)S(6)} add(%g.0, %one)
  %fusion.12 = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%g.2, %g.0), kind=kOutput, \
calls=%slice.1, metadata={op_name="jit(f)/while/body/dot_general" stack_frame_id=12}, \
backend_config={"window_config":{"estimated_cycles":"2530"}}
  ROOT %t.1 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)(2,1)}, \
/*index=2*/bf16[7,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%add.9, %fusion.12, %g.2)
}

%condition (t.2: (s32[], bf16[256,256], bf16[7,256,256])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %t.2 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)}) parameter(0)
  %g.3 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  ROOT %lt.5 = pred[]{:T(512)} compare(%g.3, %seven), direction=LT
}

ENTRY %main.9_spmd (p.6: bf16[7,256,256], p.7: bf16[256,256]) -> bf16[256,256] {
  %zero = s32[]{:T(128)} constant(0)
  %p.6 = bf16[7,256,256]{2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %p.7 = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(1), sharding={devices=[4,1]<=[4]}
  %copy.34 = s32[]{:T(128)S(6)} copy(%zero)
  %t.45 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)}) tuple(%copy.34, %p.7, %p.6)
  %while.20 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)}) while(%t.45), \
condition=%condition, body=%body, metadata={op_name="jit(f)/while" stack_frame_id=9}
  %g.64 = bf16[256,256]{1,0:T(8,128)(2,1)} get-tuple-element(%while.20), index=1
  %copy.7 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} copy(%g.64), \
metadata={op_name="jit(f)/cond"}, backend_config={"w":{"estimated_cycles":"2433"}}
  %cp-start = (bf16[256,256]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0:T(8,128)(2,1)\
S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%copy.7), \
source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(f)/ppermute"}
  %psum.7 = bf16[256,256]{1,0:T(8,128)(2,1)} all-reduce(%copy.7), \
replica_groups={{0,1,2,3}}, to_apply=%sum, metadata={op_name="jit(f)/psum"}
  %cp-done = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%cp-start)
  %ag.5 = bf16[1024,256]{0,1:T(8,128)(2,1)S(1)} all-gather(%copy.7), \
dimensions={0}, metadata={op_name="jit(f)/all_gather"}
  ROOT %bitcast.18 = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%psum.7)
}
"""
SQUARE = 256 * 256 * 2

# Of XLA:GPU, shortened: no estimates; a loop that says how often it runs.
GPU = """\
HloModule jit_g, is_scheduled=true

%gathered (p.0: f32[1000,4], p.1: s32[10,1]) -> f32[10,4] {
  %p.0 = f32[1000,4]{1,0} parameter(0)
  %p.1 = s32[10,1]{1,0} parameter(1)
  ROOT %gather.1 = f32[10,4]{1,0} gather(%p.0, %p.1), offset_dims={1}
}

%step (t.0: (s32[], f32[10,4])) -> (s32[], f32[10,4]) {
  %t.0 = (s32[], f32[10,4]{1,0}) parameter(0)
  %g.0 = s32[] get-tuple-element(%t.0), index=0
  %x = f32[1000,4]{1,0} get-tuple-element(%t.0), index=1
  %i = s32[10,1]{1,0} get-tuple-element(%t.0), index=2
  %f.1 = f32[10,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%gathered
  ROOT %t.1 = (s32[], f32[10,4]{1,0}) tuple(%g.0, %f.1)
}

%until (t.2: (s32[], f32[10,4])) -> pred[] {
  %t.2 = (s32[], f32[10,4]{1,0}) parameter(0)
  %b = f32[10,4]{1,0} get-tuple-element(%t.2), index=1
  ROOT %r = pred[] custom-call(%b), custom_call_target="settled"
}

ENTRY %main (x: f32[1000,4]) -> f32[10,4] {
  %x.1 = f32[1000,4]{1,0} parameter(0)
  %w.1 = (s32[], f32[10,4]{1,0}) while(%x.1), condition=%until, body=%step, \
backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = (s32[], f32[10,4]{1,0}) while(%w.1), condition=%until, body=%step
  %s.1 = f32[1000,4]{1,0} scatter(%x.1, %x.1, %x.1), to_apply=%add
  ROOT %g.9 = f32[10,4]{1,0} get-tuple-element(%w.2), index=1
}
"""


def test_cycles_of_a_loop_count_as_often_as_it_runs():
    cost = compiled_text.cost_of(TPU)
    assert cost.cycles == 7 * 2530 + 2433
    moved = 7 * (2 * SQUARE + 4)  # a slice of the stack, its index and the result
    assert cost.operations[0] == ("while/body/dot_general", 7 * 2530, moved)
    assert cost.unknown_loops == 0
    # Fusion and addition in the loop, two copies, three collectives.
    assert cost.kernels == 7 * 2 + 2 + 3
    assert cost.without_estimate == 7 + 1 + 3


def test_the_start_of_a_loop_counts():
    later = TPU.replace(
        "%zero = s32[]{:T(128)} constant(0)", "%zero = s32[] constant(2)"
    )
    assert compiled_text.cost_of(later).cycles == 5 * 2530 + 2433


def test_collectives_and_what_they_carry():
    found = {c.kind: c for c in compiled_text.cost_of(TPU).collectives}
    assert {kind: c.source for kind, c in found.items()} == {
        "all-gather": "all_gather",
        "all-reduce": "psum",
        "collective-permute": "ppermute",
    }
    assert found["all-gather"].bytes == 4 * SQUARE
    assert found["all-reduce"].bytes == SQUARE
    # Two numbers that go along are in its shape.
    assert found["collective-permute"].bytes == SQUARE + 8


def test_without_estimates_bytes_decide():
    cost = compiled_text.cost_of(GPU)
    assert cost.cycles is None
    assert cost.without_estimate == cost.kernels == 5 + 1 + 1
    assert (cost.gathers, cost.scatters, cost.unknown_loops) == (6, 1, 1)
    row, index, table = 10 * 4 * 4, 10 * 4, 1000 * 4 * 4
    # A gather reads rows of its table, not all of it.
    assert dict((name, moved) for name, _, moved in cost.operations) == {
        "(scatter)": 4 * table,
        "(fusion)": 6 * (2 * row + index),
    }


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3,5]{1,0}", 15),
        ("bf16[1,89,16]{2,1,0:T(8,128)(2,1)}", 96 * 128 * 2),
        ("f32[175,175,3]{0,1,2:T(8,128)}", 256 * 176 * 3 * 4),
        ("f32[100]{0:T(1024)}", 4096),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
        ("(f32[2]{0}, /*index=1*/s4[8]{0}, token[])", 8 + 4),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert compiled_text.bytes_of(shape) == size


UPDATED = """\
HloModule jit_h

%put (p.0: f32[100,8], p.1: f32[100,8], p.2: s32[]) -> f32[100,8] {
  %p.0 = f32[100,8]{1,0} parameter(0)
  %p.1 = f32[100,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %z = s32[] constant(0)
  %s.1 = f32[1,8]{1,0} dynamic-slice(%p.1, %p.2, %z), dynamic_slice_sizes={1,8}
  ROOT %d.1 = f32[100,8]{1,0} dynamic-update-slice(%p.0, %s.1, %p.2, %z)
}

ENTRY %main (x: f32[100,8], y: f32[100,8], i: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %y = f32[100,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f.1 = f32[100,8]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%put
}
"""


def test_of_an_array_updated_in_place_the_new_part_counts():
    row = 8 * 4
    assert compiled_text.cost_of(UPDATED).moved == 2 * row + 4


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        compiled_text.cost_of("HloModule empty")


@pytest.mark.parametrize(("base", "each", "most"), [(3, 2, 6), (14, 1, 1), (16, 1, 0)])
def test_the_largest_batch_is_found(base, each, most):
    tried = []

    def needed(batch):
        tried.append(batch)
        size = base + each * batch
        return size if size <= 15.75 else None

    assert compiled.largest_batch(needed, 15.75) == most
    assert len(tried) == len(set(tried)) <= 5


def test_the_search_ends():
    assert compiled.largest_batch(lambda _: 1.0, 15.75, most=20) == 20


# --- the command line -----------------------------------------------------------------


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        compiled.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_wrong_is_said_in_a_sentence(capsys, tmp_path):
    assert "--size is 0, expected a positive" in refused(capsys, "--size", "0")
    assert "3x4, expected data=4,space=4" in refused(capsys, "--mesh", "3x4")
    assert "has no records" in refused(capsys, "--table", str(tmp_path))


def test_networks_are_those_of_the_programs():
    assert set(programs.MODELS) == set(compiled.NETWORKS)


def fake(monkeypatch, tmp_path, body):
    """Puts a program in the place of the one that compiles."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"import json, os, pathlib, sys\n{body}\n")
    monkeypatch.setattr(compiled, "_WORKER", worker)
    for variable in ("JAXREG_TPU_PYTHON", "JAXREG_CUDA_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    # A file: what the process says goes there, not through pytest's own stand-in.
    monkeypatch.setattr(sys, "stderr", (tmp_path / "said").open("w"))


def test_a_failed_check_is_one_sentence(monkeypatch, tmp_path, capsys):
    check = "F1130 15:00:00.1 7 emitter.cc:12] Check failed: a == b (1 vs. 2)"
    fake(monkeypatch, tmp_path, f"print({check!r}, file=sys.stderr)\nos.abort()")
    assert compiled.main(["--size", "16"]) == 1
    said = capsys.readouterr().out
    assert "was ended by SIGABRT: Check failed: a == b (1 vs. 2)" in said
    assert "Traceback" not in said


def test_what_is_compiled_already_is_not_compiled_again(monkeypatch, tmp_path, capsys):
    fake(
        monkeypatch,
        tmp_path,
        "said = json.loads(sys.argv[1])\n"
        "said |= {'status': 'too large', 'asked': 27.4e9, 'memory': 16e9}\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps(said))",
    )
    argv = ["--device", "v5e", "v6e", "--records", str(tmp_path / "kept"), "--markdown"]
    assert compiled.main(argv) == 0
    first = capsys.readouterr().out
    assert first.count("does not fit: 27.4 GB asked of 16 GB") == 2
    fake(monkeypatch, tmp_path, "os.abort()")
    assert compiled.main(argv) == 0
    assert capsys.readouterr().out == first
    assert compiled.main(["--table", str(tmp_path / "kept")]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(first.splitlines())


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(devices.NotThere, match=r"TPU compiler .*pip install .*tpu-co"):
        devices.described("v5e")
    monkeypatch.setitem(sys.modules, "jax_plugins.xla_cuda12", None)
    with pytest.raises(devices.NotThere, match=r"--no-deps jax-cuda12-plugin==\d"):
        devices.described("t4")


def record(**given):
    kept = {
        "status": "fits", "grid": [175, 175, 175], "pairs": 1, "needed": 8e9,
        "memory": 16e9, "bound": 0.05, "memory_seconds": 0.2, "seconds": 0.5,
    }  # fmt: skip
    return {**vars(Spec("gradicon", device="v5e")), **kept, **given}


def test_a_recipe_is_the_fastest_that_fits():
    said = compiled_records.recipes(
        [
            record(),
            record(batch=2, pairs=2, seconds=0.8, remat="networks", needed=15e9),
            record(batch=4, pairs=4, status="too large", asked=30e9),
            record(mesh=[2, 4], pairs=2, seconds=0.3),  # half a pair for each chip
            record(task="io", seconds=0.1),
            record(device="t4", status="too large", asked=30e9),
        ]
    ).splitlines()
    fits = "8 of 16" not in said[3] and "15 of 16" in said[3]
    assert fits and "| networks | - |" in said[3] and "| v5e | 2 |" in said[3]
    assert said[3].endswith("| 40 | 10 | 2.5 |")
    assert "does not fit: 30 GB asked of 16 GB" in said[2] and "| t4 |" in said[2]
    assert len(said) == 4


def test_help_needs_no_jax():
    code = (
        "import sys; sys.modules['jax'] = None; import compiled; compiled.main(['-h'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--mesh" in done.stdout


def test_a_record_of_this_machine(tmp_path):
    """The smallest program, compiled by the CPU's compiler in a process of its own."""
    path = tmp_path / "record.json"
    argv = "--network sam --task forward --size 16 --device cpu --json".split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "compiled.py"), *argv, str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["status"] == "fits" and found["grid"] == [16, 16, 16]
    assert found["cycles"] is None and found["bound"] is None
    assert found["temporaries"] > 0 and found["moved"] > found["arguments"] / 2
    assert "most expensive:" in done.stdout and "Traceback" not in done.stderr
