"""One step on one device, on several, and in several processes: the same numbers.

The number of devices is fixed when JAX starts, so what needs several runs in processes
of its own, `programs/`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.training import parallel
from jaxreg.training.parallel import Layout
from jaxreg.weights import bundle

PROGRAMS = pathlib.Path(__file__).parent / "programs"
REPOSITORY = pathlib.Path(__file__).parents[2]
PATIENCE = 900  # seconds, for a very busy machine


def environment(devices=None):
    """Of a process; it compiles as fast as the tests do, for so many CPU devices."""
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
    )
    if devices is not None:
        flags += f" --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path
    }  # fmt: skip


def printed(program, *arguments):
    """Runs a program and returns the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / program, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- gradients -----------------------------------------------------------------------


def check(found, *, tolerance):
    """The gradient by value: a wrong factor hides behind Adam, and in the loss."""
    assert found["gradient"] < tolerance
    assert found["statistics"] < 1e-6
    for name, (one, several) in found["numbers"].items():
        assert several == pytest.approx(one, rel=tolerance, abs=1e-7), name


@pytest.fixture(scope="module")
def layouts():
    return printed("same_gradient.py", "layouts")


@pytest.mark.parametrize("layout", ["mesh 1", "mesh 2", "pmap 1"])
def test_gradient_is_the_same_under_every_layout(layouts, layout):
    check(layouts[f"{layout} weight 0.0"], tolerance=1e-5)
    # Inverse consistency divides float32's rounding, 6e-8, by a step of 1e-3.
    check(layouts[f"{layout} weight 1.5"], tolerance=2e-4)


@pytest.mark.slow
def test_gradient_with_statistics_per_replica():
    found = printed("same_gradient.py", "parts")
    assert sorted(found) == ["mesh 1 pairs of devices", "mesh 1 parts"]
    for each in found.values():
        check(each, tolerance=1e-5)


@pytest.mark.slow
def test_gradient_of_several_objectives():
    (found,) = printed("same_gradient.py", "tasks").values()
    check(found, tolerance=1e-5)


# --- volumes over devices ------------------------------------------------------------


def test_split_volume_has_the_same_map_and_split_convolutions():
    found = printed("split_volume.py")
    whole = found["1"]
    assert whole["moved"] > 0.05 and not whole["exchanges"]
    for space in (2, 4):
        split = found[str(space)]
        assert split["difference"] < 1e-5
        # Each device convolves its own part; one plane more where kernels overlap.
        assert len(split["depths"]) == len(whole["depths"]) > 0
        for mine, all_of_it in zip(split["depths"], whole["depths"], strict=True):
            assert mine <= -(-all_of_it // space) + 1
        assert split["exchanges"] > 0


@pytest.fixture(scope="module")
def split_arrays():
    return printed("split_arrays.py")


def test_split_arrays_have_the_same_results_and_gradients(split_arrays):
    assert len(split_arrays["distances"]) > 10
    for name, difference in split_arrays["distances"].items():
        assert difference < 1e-6, name


def test_split_gradients_of_bfloat16_are_summed_in_float32(split_arrays):
    assert split_arrays["types"] == ["f32", "f32"]  # of a kernel's two parts


def test_split_volumes_are_not_folded(split_arrays):
    """A kernel between folded images is 16 times as large, and summed over devices."""
    assert split_arrays["folded"] == [True, False]


@pytest.fixture(scope="module")
def split_step():
    return printed("split_step.py")


LAYOUTS = pytest.mark.parametrize("optimizer", ["whole", "split"])


@pytest.mark.slow
@LAYOUTS
def test_split_step_is_that_of_one_device(split_step, optimizer):
    found = split_step[optimizer]
    # Inverse consistency divides float32's rounding, 6e-8, by a step of 1e-3.
    assert found["gradient"] < 1e-4 and found["ema"] < 1e-6
    for name, (one, several) in found["numbers"].items():
        assert several == pytest.approx(one, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_split_optimizer_state_has_the_same_numbers(split_step):
    assert split_step["apart"] < 1e-6
    assert set(split_step["whole"]["kept"]) == {1.0}
    assert set(split_step["split"]["kept"]) == {0.5}


@pytest.mark.slow
@LAYOUTS
def test_no_whole_volume_of_features_is_exchanged(split_step, optimizer):
    field = 4 * 3 * split_step["voxels"] * 32 / 31  # of equal shares, float32
    exchanged = split_step[optimizer]["collectives"]
    assert {each["kind"] for each in exchanged} >= {"all-gather", "collective-permute"}
    for each in exchanged:
        assert each["bytes"] < field, each
        if each["kind"] not in ("all-gather", "collective-permute"):
            continue  # an image's channels are not last, a kernel's are
        if not each["inside"]:
            continue  # of weights
        for _, shape in each["arrays"]:
            if shape[-1] > 3 and len(shape) == 5:
                # Planes at the ends of a share, which has 8, or 4 at half resolution.
                assert each["kind"] == "collective-permute" and shape[1] <= 3, each


@pytest.mark.slow
@LAYOUTS
def test_gradients_are_reduced_once_in_the_bytes_of_the_weights(split_step, optimizer):
    weights = split_step["weights"]
    over_data = [
        each
        for each in split_step[optimizer]["collectives"]
        if each["kind"] in ("all-reduce", "reduce-scatter")
        and each["groups"].startswith("{{0,4}")
    ]
    outside = [each for each in over_data if not each["inside"]]
    assert weights <= sum(each["bytes"] for each in outside) < weights + 1024
    assert max(each["bytes"] for each in outside) > 0.9 * weights
    assert all(kind == "f32" for each in outside for kind, _ in each["arrays"])
    # Within a part only batch statistics and the loss's means: numbers by channel.
    for each in over_data:
        if each["inside"]:
            assert each["bytes"] < 2048, each


def test_split_volumes_are_scored_and_blamed_as_whole_ones():
    found = printed("split_validation.py")
    whole, split = found["1"], found["2"]
    assert whole["blamed"] == split["blamed"] == [1]
    assert whole["scores"].keys() == split["scores"].keys() >= {"dice", "loss"}
    for name, score in whole["scores"].items():
        assert split["scores"][name] == pytest.approx(score, rel=1e-4), name
    # Two pairs scored, one blamed: the other is not finite before it is tried.
    assert whole["exchanges"] == [0, 0, 0]
    assert len(split["exchanges"]) == 3 and all(split["exchanges"])


# --- processes -----------------------------------------------------------------------


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(out, cache, *arguments, devices):
    """Starts a training process."""
    command = [
        sys.executable, REPOSITORY / "train.py", "--config", PROGRAMS / "one_stage.py",
        "--out", out, *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(word) for word in command],
        env={
            **environment(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def close(a, b, tolerance=1e-4):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


def start_two(out, cache, *, both=(), second=()):
    """Starts two processes of two devices; `second` is for the second alone."""
    joined = ["--coordinator", f"localhost:{free_port()}", "--processes", "2"]
    return [
        start(out, cache, *joined, "--process", index, *both, *more, devices=2)
        for index, more in enumerate([(), second])
    ]


def end(processes):
    """Waits for processes; returns their exit codes and what they printed."""
    try:
        texts = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path, cache):
    codes, texts = end([start(tmp_path / "one", cache, devices=1)])
    assert codes == [0], texts
    codes, texts = end(start_two(tmp_path / "two", cache))
    assert codes == [0, 0], texts
    assert "step 4 of 4" in texts[0] and "step" not in texts[1]

    one, two = (
        bundle.load_bundle(tmp_path / name / "weights").variables
        for name in ("one", "two")
    )
    # Fresh last layers are zero: all that is in them was learned.
    assert np.linalg.norm(one["params"]["step_1"]["last"]["kernel"]) > 1e-3
    jax.tree.map(close, one, two)
    logs = [
        (tmp_path / name / "stage_1" / "log.csv").read_text().splitlines()
        for name in ("one", "two")
    ]
    # Written once: as many rows as one process writes.
    assert len(logs[0]) == len(logs[1]) > 2
    kept = tmp_path / "two" / "stage_1" / "checkpoints"
    assert {"2", "4"} <= {path.name for path in kept.iterdir()}
    assert len(list((tmp_path / "two" / "stage_1").glob("events*"))) == 1


@pytest.mark.slow
def test_a_run_that_lost_a_process_goes_on_with_one(tmp_path, cache):
    """Killed in the middle; the checkpoint that is left leads to the same weights."""
    # Which step is best by Dice is a matter of rounding.
    more = (
        "--stages.stage_1.epochs", "10", "--loop.checkpoint_every", "1",
        "--loop.metric", "last",
    )  # fmt: skip
    codes, texts = end([start(tmp_path / "whole", cache, *more, devices=1)])
    assert codes == [0], texts
    out = tmp_path / "lost"
    pair = start_two(out, cache, both=(*more, "--patience", "5"))
    kept = out / "stage_1" / "checkpoints"
    until = time.monotonic() + PATIENCE
    while not (kept / "6").is_dir() and time.monotonic() < until:
        assert pair[0].poll() is None, pair[0].communicate()[0]
        time.sleep(0.05)
    pair[1].kill()
    began = time.monotonic()
    codes, texts = end(pair)
    assert codes == [2, -signal.SIGKILL], texts
    assert time.monotonic() - began < 60
    (line,) = [t for t in texts[0].splitlines() if "has not answered" in t]
    assert line.startswith("jaxreg: process 1 of 2 (from 0)") and "--resume" in line
    assert "Traceback" not in texts[0]
    assert not (out / "weights").exists()

    codes, texts = end([start(out, cache, *more, "--resume", devices=1)])
    assert codes == [0], texts
    resumed = re.search(r"resumed at step (\d+) of 20", texts[0])
    assert resumed is not None and 6 <= int(resumed[1]) < 20
    one, two = (
        bundle.load_bundle(tmp_path / name / "weights").variables
        for name in ("whole", "lost")
    )
    # 20 steps of rounding came to 2.4e-4; a batch left out would be a twentieth.
    jax.tree.map(functools.partial(close, tolerance=1e-3), one, two)


def test_optimizer_state_is_split_over_processes_and_put_together():
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAMS / "split_state.py", address, str(index)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    codes, texts = end(processes)
    assert codes == [0, 0], texts
    for text in texts:
        found = json.loads(text[text.rindex("{") :].splitlines()[0])
        assert found == {"held": 0.5, "same": True}


def test_processes_with_different_settings_all_end_with_an_error(tmp_path, cache):
    second = ("--data.pairs_per_epoch", "4")
    codes, texts = end(start_two(tmp_path / "two", cache, second=second))
    assert 0 not in codes
    for text in texts:
        assert "the processes were started with different settings" in text
    assert not (tmp_path / "two").exists()


# --- what does not fit ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def devices(count, process=0):
    return [Device(i, process) for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "space", "count", "said"),
    [
        ("single", 2, 4, 'space is 2, but parallel is "single"'),
        ("auto", 2, 1, 'space is 2, but parallel is "single"'),
        ("mesh", 3, 4, "space is 3, but each process has 4 devices; take a divisor"),
        ("auto", 8, 4, "space is 8, but each process has 4 devices; take a divisor"),
        ("mesh", 0, 4, "space is 0, but"),
        ("pmap", 2, 4, "pmap splits batches only"),
    ],
)
def test_layouts_that_cannot_be(kind, space, count, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parallel.make_layout(kind, space=space, devices=devices(count))


def test_pmap_splits_no_state():
    with pytest.raises(UserError, match="take parallel .mesh. for shard_optimizer"):
        parallel.make_layout("pmap", shard_optimizer=True, devices=devices(4))


def test_single_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes take part"):
        parallel.make_layout("single", devices=devices(1))


def test_volumes_are_split_within_a_process():
    both = devices(2) + devices(2, process=1)
    with pytest.raises(UserError, match="space is 4, but each process has 2 devices"):
        parallel.make_layout("mesh", space=4, devices=both)


@pytest.mark.parametrize(
    ("kind", "space", "shape"),
    [
        ("auto", 1, (4, 1)),
        ("mesh", 2, (2, 2)),
        ("mesh", 4, (1, 4)),
        ("pmap", 1, (4, 1)),
    ],
)
def test_layouts_that_can(kind, space, shape):
    four = devices(4)
    layout = parallel.make_layout(kind, space=space, devices=four)
    assert layout.kind == ("mesh" if kind == "auto" else kind)
    assert (layout.data, layout.space) == shape
    assert layout.mesh is not None and layout.axis == "data"
    assert layout.mesh.axis_names == ("data", "space")
    assert list(layout.mesh.devices.ravel()) == four
    assert layout.mesh.devices.shape == shape


def test_one_device_needs_no_mesh():
    layout = parallel.make_layout(devices=devices(1))
    assert layout == Layout("single") and layout.axis is None


@pytest.mark.parametrize(
    ("batch", "accumulate", "replicas", "said"),
    [
        (6, 1, 0, "batch is 6, which 4 devices .* take a multiple of 4$"),
        (4, 2, 0, "batch is 4, which 4 devices .* take a multiple of 8$"),
        (2, 1, 0, "batch is 2, which 4 devices"),
        (12, 1, 3, "replicas is 3, expected a multiple or a divisor of the 4 devices"),
        (8, 1, 16, "replicas is 16, .* divides the 8 pairs worked off at once"),
        (16, 2, 16, "replicas is 16, .* divides the 8 pairs worked off at once"),
        (16, 1, 12, "replicas is 12, .* divides the 16 pairs"),
    ],
)
def test_batches_that_cannot_be_shared(batch, accumulate, replicas, said):
    layout = Layout("pmap", data=4)
    with pytest.raises(UserError, match=said):
        parallel.check_batch(batch, layout, accumulate=accumulate, replicas=replicas)


@pytest.mark.parametrize(
    ("batch", "accumulate", "replicas", "local"),
    [
        (4, 1, 0, (0, 1)),
        (8, 2, 0, (0, 1)),
        (8, 1, 4, (1, 1)),
        (8, 1, 8, (2, 1)),
        (16, 2, 4, (1, 1)),
        (8, 1, 2, (1, 2)),
        (8, 1, 1, (1, 4)),
    ],
)
def test_replicas_per_device(batch, accumulate, replicas, local):
    layout = Layout("pmap", data=4)
    found = parallel.check_batch(
        batch, layout, accumulate=accumulate, replicas=replicas
    )
    assert found == local


def test_processes_that_cannot_be_joined():
    with pytest.raises(UserError, match="cannot be joined .* give `coordinator`"):
        parallel.start_processes()
