"""A training checkpoint is whole or absent, comes back exactly, and is never wrong."""

import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.errors import UserError
from jaxreg.training import checkpoint_files
from jaxreg.training.checkpoints import RunCheckpoints


def small(step):
    """A state that tells its step in every leaf."""
    return {
        "params": {"a": np.full((2, 3), step, np.float32)},
        "more": [np.full(30 + i, step, np.float32) for i in range(6)],
        "n": np.int32(step),
    }


def training_state():
    """What a training step holds, with the types that are easily lost."""
    params = {
        "step_1": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)},
        "step_2": {"kernel": jnp.full((2, 2), 0.1, jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return {
        "params": params,
        "batch_stats": {"count": jnp.array(7, jnp.int32), "unused": jnp.zeros((0, 3))},
        "optimizer": optimizer.init(params),
        "average": [params["step_1"], None],
        "key": jax.random.key_data(jax.random.key(5)),
        "step": 3,
        "flag": np.array([True, False]),
    }


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(a) is np.ndarray
        assert a.dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, np.asarray(b))


def save_all(folder, steps, **options):
    with RunCheckpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"step": step})


@pytest.fixture(scope="module", autouse=True)
def fresh_heap():
    """Leaves what earlier files hold out of the collections after a failed read."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("two") / "run"
    save_all(folder, [1, 2])
    return folder


@pytest.fixture
def run(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run")


# --- what goes in comes out -----------------------------------------------------------


def test_round_trip(tmp_path):
    record = {"iterator": {"next": 2**40}, "loss": 0.1, "shape": (4, 5), "stage": "one"}
    state = training_state()
    with RunCheckpoints(tmp_path / "deep" / "run") as checkpoints:
        checkpoints.save(3, state, record, metrics={"dice": 0.5})
        checkpoints.wait()
        restored = checkpoints.restore(state)
    assert restored.step == 3
    assert restored.record == record | {"shape": [4, 5]}
    assert restored.skipped == ()
    assert_same(restored.state, state)
    assert os.listdir(tmp_path / "deep" / "run") == ["3"]


def test_round_trip_by_shapes_alone_in_another_process(run):
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, small(0)))
    with RunCheckpoints(run) as checkpoints:
        assert_same(checkpoints.restore(like).state, small(2))
        assert_same(checkpoints.restore(like, step=1).state, small(1))


def test_save_returns_before_the_files_are_there(tmp_path, monkeypatch):
    gate = threading.Event()
    dumps = json.dumps

    def late(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            gate.wait(20)
        return dumps(*args, **kwargs)

    monkeypatch.setattr(json, "dumps", late)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        assert checkpoints.steps() == ()
        gate.set()
        checkpoints.wait()
        assert checkpoints.steps() == (1,)


def test_what_is_saved_may_be_donated_or_changed(tmp_path):
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    device = jnp.arange(50_000.0)
    host = np.arange(50_000)
    record = {"items": [1]}
    like = {"device": device, "host": host}
    expected = jax.tree.map(np.array, like)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, like, record)
        jax.block_until_ready(step(device))
        host[:] = -1
        record["items"].append(2)
        restored = checkpoints.restore(expected)
    assert_same(restored.state, expected)
    assert restored.record == {"items": [1]}


def test_saved_from_four_devices_restored_on_this_one(tmp_path):
    program = f"""
        import jax, jax.numpy as jnp, numpy as np
        from jaxreg.training.checkpoints import RunCheckpoints
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
        def put(value, *axes):
            spec = jax.sharding.PartitionSpec(*axes)
            return jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
        state = {{"split": put(jnp.arange(8.0), "x"), "copied": put(jnp.ones(3))}}
        assert len(state["split"].sharding.device_set) == 4
        with RunCheckpoints({str(tmp_path)!r}) as checkpoints:
            checkpoints.save(1, state, {{}})
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run_python(program, flags)
    expected = {"split": np.arange(8, dtype=np.float32), "copied": np.ones(3, "f4")}
    with RunCheckpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(expected).state, expected)


def run_python(program, environment=()):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | dict(environment),
    )


def test_what_json_cannot_hold_is_found_before_writing(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(1, small(1), {"model": object()})
    assert os.listdir(tmp_path) == []


def test_leaves_of_one_name_are_refused(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="same name"):
            checkpoints.save(1, {"a/b": np.ones(1), "a": {"b": np.ones(1)}}, {})


# --- which checkpoints stay -----------------------------------------------------------


def save_metrics(folder, values, **options):
    with RunCheckpoints(folder, metric="dice", **options) as checkpoints:
        for step, value in enumerate(values, start=1):
            metrics = None if value is None else {"dice": value}
            checkpoints.save(step, small(step), {}, metrics=metrics)
        checkpoints.wait()
        best = checkpoints.best_step()
    with RunCheckpoints(folder, metric="dice", **options) as checkpoints:
        assert checkpoints.best_step() == best
        return checkpoints.steps(), best


@pytest.mark.parametrize(
    ("values", "options", "steps", "best"),
    [
        ([0.1, 0.9, 0.2, 0.3, 0.4], {"keep_latest": 2}, (2, 4, 5), 2),
        (
            [0.9, 0.1, 0.5, 0.6],
            {"keep_latest": 1, "larger_is_better": False},
            (2, 4),
            2,
        ),
        ([0.8, 0.9, 0.7, 0.1], {"keep_latest": 1, "keep_best": 2}, (1, 2, 4), 2),
        ([0.5, float("nan"), None, float("inf")], {"keep_latest": 1}, (1, 4), 1),
        ([0.5, 0.5, 0.1], {"keep_latest": 1}, (2, 3), 2),
        ([0.5, 0.4, 0.3], {"keep_latest": 2, "keep_best": 0}, (2, 3), 2),
        ([None, None], {"keep_latest": 3}, (1, 2), None),
    ],
)
def test_latest_and_best_stay(tmp_path, values, options, steps, best):
    assert save_metrics(tmp_path, values, **options) == (steps, best)


def test_best_survives_a_restart(tmp_path):
    save_metrics(tmp_path, [0.9, 0.1], keep_latest=1)
    with RunCheckpoints(tmp_path, metric="dice", keep_latest=1) as checkpoints:
        checkpoints.restore(small(0))
        for step in (3, 4):
            checkpoints.save(step, small(step), {}, metrics={"dice": 0.5})
    assert sorted(os.listdir(tmp_path)) == ["1", "4"]


def test_without_a_metric_none_is_best(run):
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.best_step() is None
        assert checkpoints.latest_step() == 2
        assert checkpoints.steps() == (1, 2)


def test_steps_grow(run):
    with RunCheckpoints(run) as checkpoints:
        checkpoints.restore(small(0))
        with pytest.raises(ValueError, match="must grow"):
            checkpoints.save(2, small(2), {})


def test_going_back_abandons_what_came_later(run):
    with RunCheckpoints(run, keep_latest=4) as checkpoints:
        checkpoints.restore(small(0))
        checkpoints.save(3, small(3), {})
        checkpoints.save(4, small(4), {})
        checkpoints.restore(small(0), step=2)
        checkpoints.save(3, small(30), {})
        checkpoints.wait()
        assert checkpoints.steps() == (1, 2, 3)
        assert_same(checkpoints.restore(small(0)).state, small(30))


def test_damaged_checkpoints_do_not_push_out_sound_ones(run):
    (run / "2" / "record" / "metadata").unlink()
    (run / "3").mkdir()
    with RunCheckpoints(run, keep_latest=2) as checkpoints:
        assert checkpoints.restore(small(0)).step == 1
        checkpoints.save(5, small(5), {})
        checkpoints.wait()
        assert checkpoints.steps() == (1, 5)


def test_another_run_is_not_written_over(run):
    with RunCheckpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"up to step 2.*resume"):
            checkpoints.save(1, small(9), {})
        with pytest.raises(UserError, match=r"up to step 2.*resume"):
            checkpoints.save(3, small(9), {})
    with RunCheckpoints(run) as checkpoints:
        assert_same(checkpoints.restore(small(0), step=1).state, small(1))
        assert checkpoints.steps() == (1, 2)


@pytest.mark.parametrize("options", [{"keep_latest": 0}, {"keep_best": -1}])
def test_senseless_numbers_are_refused(tmp_path, options):
    with pytest.raises(UserError, match="expected at least"):
        RunCheckpoints(tmp_path, **options)


# --- damage ---------------------------------------------------------------------------


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def half(octets):
    return octets[: len(octets) // 2]


def flip(where):
    def change(octets):
        at = min(int(len(octets) * where), len(octets) - 1)
        return octets[:at] + bytes([octets[at] ^ 1]) + octets[at + 1 :]

    return change


def is_safe(checkpoints):
    """Restores 2 exactly, or 1 exactly and says why; returns whether it was 2."""
    restored = checkpoints.restore(small(0))
    assert_same(restored.state, small(restored.step))
    assert restored.record == {"step": restored.step}
    if restored.step == 1:
        (sentence,) = restored.skipped
        assert str(checkpoints.folder / "2") in sentence
        assert "unfinished or damaged" in sentence
    return restored.step == 2


@pytest.mark.parametrize(
    "change",
    [half, lambda octets: b"", *(flip(where) for where in (0.03, 0.5, 0.8, 1.0))],
    ids=["half", "empty", "flip 3 %", "flip 50 %", "flip 80 %", "flip last"],
)
def test_any_changed_file_is_harmless(run, capfd, change):
    told = []
    with RunCheckpoints(run) as checkpoints:
        for file in files_of(run / "2"):
            octets = file.read_bytes()
            file.write_bytes(change(octets))
            if not is_safe(checkpoints):
                told.append(file.relative_to(run / "2").parts[0])
            file.write_bytes(octets)
        assert is_safe(checkpoints)
    # Both parts were looked at; Orbax's own marks hold nothing that we need.
    assert {"record", "state"} <= set(told)
    assert capfd.readouterr().err == ""


def test_any_missing_file_is_harmless(run, capfd):
    with RunCheckpoints(run) as checkpoints:
        for file in files_of(run / "2"):
            octets = file.read_bytes()
            file.unlink()
            is_safe(checkpoints)
            file.write_bytes(octets)
        assert is_safe(checkpoints)
    assert capfd.readouterr().err == ""


def test_every_byte_of_the_record_counts(run):
    """A changed digit of the record would resume elsewhere."""
    file = run / "2" / "record" / "metadata"
    octets = file.read_bytes()
    like = small(0)
    with RunCheckpoints(run) as checkpoints:
        at = octets.index(b'"record": {"step": 2') + len(b'"record": {"step": ')
        assert octets[at : at + 1] == b"2"
        file.write_bytes(octets[:at] + b"3" + octets[at + 1 :])
        assert checkpoints.restore(like).step == 1


def test_arrays_of_another_step_are_noticed(run):
    shutil.rmtree(run / "2" / "state")
    shutil.copytree(run / "1" / "state", run / "2" / "state")
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.restore(small(0)).step == 1


def test_a_renamed_checkpoint_is_noticed(run):
    (run / "2").rename(run / "7")
    with RunCheckpoints(run) as checkpoints:
        restored = checkpoints.restore(small(0))
    assert restored.step == 1
    assert "saved at step 2" in restored.skipped[0]


def test_empty_folders_are_skipped_and_replaced(run):
    for name in ("3", "4"):
        (run / name).mkdir()
    with RunCheckpoints(run) as checkpoints:
        restored = checkpoints.restore(small(0))
        assert restored.step == 2
        for name, sentence in zip("43", restored.skipped, strict=True):
            assert str(run / name) in sentence
        checkpoints.save(3, small(3), {"step": 3})
        checkpoints.wait()
        assert checkpoints.steps() == (1, 2, 3)
        assert checkpoints.restore(small(0)).step == 3


def test_a_damaged_step_that_is_asked_for_is_an_error(run):
    (run / "2" / "record" / "metadata").unlink()
    with RunCheckpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"damaged \(record/metadata is missing\)"):
            checkpoints.restore(small(0), step=2)
        with pytest.raises(UserError, match=r"no checkpoint of step 5 .*steps 1, 2"):
            checkpoints.restore(small(0), step=5)


def break_arrays(folder):
    """Cuts the largest file of a checkpoint's arrays."""
    file = max(
        (p for p in (folder / "state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    os.truncate(file, file.stat().st_size // 2)


def drop_record(folder):
    (folder / "record" / "metadata").unlink()


@pytest.mark.parametrize("harm", [break_arrays, drop_record])
def test_a_damaged_best_gives_way_to_the_next_best_and_is_named(tmp_path, harm):
    save_metrics(tmp_path, [0.5, 0.7, 0.9, 0.1], keep_latest=4)
    with RunCheckpoints(tmp_path, metric="dice") as checkpoints:
        assert checkpoints.restore(small(0), best=True).step == 3
    harm(tmp_path / "3")
    with RunCheckpoints(tmp_path, metric="dice") as checkpoints:
        found = checkpoints.restore(small(0), best=True)
    assert found.step == 2
    assert_same(found.state, small(2))
    (sentence,) = found.skipped
    assert str(tmp_path / "3") in sentence and "skipped" in sentence


def test_without_a_sound_best_the_latest_is_taken(tmp_path):
    save_metrics(tmp_path, [0.5, None, None], keep_latest=4)
    break_arrays(tmp_path / "1")
    with RunCheckpoints(tmp_path, metric="dice") as checkpoints:
        found = checkpoints.restore(small(0), best=True)
    assert found.step == 3 and len(found.skipped) == 1


def test_what_stands_beside_the_arrays_can_be_replaced(tmp_path):
    save_metrics(tmp_path, [0.5, None], keep_latest=1)
    options = {"metric": "dice", "keep_latest": 1}
    with RunCheckpoints(tmp_path, **options) as checkpoints:
        checkpoints.restore(small(0))
        assert checkpoints.best_step() == 1
        checkpoints.amend(2, {"scores": (1, 2)}, metrics={"dice": 0.9})
        assert checkpoints.best_step() == 2
        # The first is neither the latest nor the best any more.
        checkpoints.save(3, small(3), {}, metrics={"dice": 0.1})
    with RunCheckpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.steps() == (2, 3)
        found = checkpoints.restore(small(0), step=2)
        assert found.record == {"scores": [1, 2]}
        assert_same(found.state, small(2))
        with pytest.raises(UserError, match="record/metadata is missing"):
            checkpoints.amend(5, {})


def test_nothing_usable_is_an_error(run, tmp_path):
    for step in "12":
        shutil.rmtree(run / step / "state")
    with RunCheckpoints(run) as checkpoints:
        with pytest.raises(UserError, match="no usable checkpoint") as caught:
            checkpoints.restore(small(0))
    assert str(run / "1") in str(caught.value)
    with RunCheckpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(UserError, match="no usable checkpoint"):
            checkpoints.restore(small(0))


def test_a_newer_format_is_not_taken_for_damage(run):
    file = run / "2" / "record" / "metadata"
    content = json.loads(file.read_text()) | {"version": 99}
    del content["checksum"]
    content["checksum"] = checkpoint_files._text_checksum(content)
    file.write_text(json.dumps(content))
    with RunCheckpoints(run) as checkpoints:
        with pytest.raises(UserError, match="version 99.*newer jaxreg"):
            checkpoints.restore(small(0))


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        (
            small(0) | {"n": np.zeros(2, np.int32)},
            r"n is int32 \(\) there, int32 \(2,\) here",
        ),
        (
            small(0) | {"params": {"a": np.zeros((2, 3), np.float16)}},
            r"params/a is float32 \(2, 3\) there, float16 \(2, 3\) here",
        ),
        (
            small(0) | {"ema": np.zeros(1, np.float32)},
            r"ema is missing there, float32 \(1,\) here",
        ),
        (
            {name: small(0)[name] for name in ("n", "more")},
            r"params/a is float32 \(2, 3\) there, missing here",
        ),
        (
            {str(i): np.ones(1) for i in range(9)},
            r"0 is missing.*1 is missing.*2 is missing.*and 14 more",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_named(run, like, sentence):
    with RunCheckpoints(run) as checkpoints:
        with pytest.raises(UserError, match=sentence):
            checkpoints.restore(like)


# --- interrupted and refused writes ---------------------------------------------------


def test_leftovers_are_removed_and_told(run):
    names = ["3.orbax-checkpoint-tmp", "10.orbax-checkpoint-tmp-1234"]
    for name in names:
        (run / name / "state").mkdir(parents=True)
    others = ["log.csv", "x.orbax-checkpoint-tmp", "03", "best"]
    for name in others:
        (run / name).mkdir()
    with RunCheckpoints(run, read_only=True) as checkpoints:
        assert checkpoints.steps() == (1, 2)
    assert set(names) < set(os.listdir(run))
    with RunCheckpoints(run) as checkpoints:
        restored = checkpoints.restore(small(0))
    assert restored.step == 2
    assert [s.split(" was not")[0] for s in restored.skipped] == [
        f"the checkpoint {run / '10'}",
        f"the checkpoint {run / '3'}",
    ]
    assert sorted(os.listdir(run)) == sorted(["1", "2", *others])


def test_read_only_writes_nothing(run, tmp_path):
    with RunCheckpoints(run, read_only=True) as checkpoints:
        assert checkpoints.restore(small(0)).step == 2
        with pytest.raises(ValueError, match="read_only"):
            checkpoints.save(3, small(3), {})
    with pytest.raises(UserError, match="no folder of checkpoints"):
        RunCheckpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


SAVE_FOR_EVER = """
    import sys
    import numpy as np
    from jaxreg.training.checkpoints import RunCheckpoints

    def state(step):
        random = np.random.default_rng(step)
        return {f"leaf_{i}": random.random((40, 1000 + i)) for i in range(20)}

    with RunCheckpoints(sys.argv[1], metric="m") as checkpoints:
        step = 0
        if checkpoints.latest_step() is not None:
            step = checkpoints.restore(state(0)).step
        start = step
        while True:
            step += 1
            checkpoints.save(step, state(step), {"step": step}, metrics={"m": -step})
            if step == start + 1:
                checkpoints.wait()
                print("started", flush=True)
"""


def expected_state(step):
    random = np.random.default_rng(step)
    return {f"leaf_{i}": random.random((40, 1000 + i)) for i in range(20)}


def test_a_kill_while_saving_loses_at_most_that_checkpoint(tmp_path):
    delays = random.Random(7)
    last = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_FOR_EVER), str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout.readline() == b"started\n"
        time.sleep(delays.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunCheckpoints(tmp_path, read_only=True, metric="m") as checkpoints:
            steps = checkpoints.steps()
            restored = checkpoints.restore(expected_state(0))
            # Only the newest can be unfinished, and that is not under its name.
            assert restored.step == steps[-1] > last
            assert restored.skipped == ()
            assert restored.record == {"step": restored.step}
            assert_same(restored.state, expected_state(restored.step))
            last = restored.step


def test_a_disk_that_takes_no_more(tmp_path):
    """A limit on the size of files stands for the full disk."""
    program = f"""
        import resource
        import numpy as np
        from jaxreg.errors import UserError
        from jaxreg.training.checkpoints import RunCheckpoints
        small, large = {{"a": np.ones(10)}}, {{"a": np.ones(100_000)}}
        with RunCheckpoints({str(tmp_path)!r}, keep_latest=1) as checkpoints:
            checkpoints.save(1, small, {{}})
            checkpoints.wait()
            ever = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, ever))
            checkpoints.save(2, large, {{}})
            try:
                checkpoints.save(3, small, {{}})
            except UserError as error:
                print(error)
            print(checkpoints.steps(), checkpoints.restore(small).step)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ever, ever))
            checkpoints.save(4, small, {{}})
            checkpoints.wait()
            print(checkpoints.steps(), checkpoints.restore(small).step)
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = run_python(program)
    error, before, after = done.stdout.splitlines()
    assert "checkpoint of step 2 cannot be written" in error
    assert str(tmp_path) in error
    assert "File too large" in error
    assert "steps 1 are there" in error
    assert (before, after) == ("(1,) 1", "(4,) 4")
    assert done.stderr == ""
    assert os.listdir(tmp_path) == ["4"]


def break_writing(monkeypatch):
    """Lets the background fail as a disk does that fails while it is written to."""
    dumps = json.dumps

    def fail(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(5, "Input/output error")
        return dumps(*args, **kwargs)

    monkeypatch.setattr(json, "dumps", fail)


def logging_state():
    names = (None, "absl", "asyncio")
    return [list(logging.getLogger(n).filters) for n in names], sys.unraisablehook


def test_a_failure_is_told_by_save_wait_and_close(run, monkeypatch, capfd):
    before = logging_state()
    checkpoints = RunCheckpoints(run)
    checkpoints.restore(small(0))
    with monkeypatch.context() as patch:
        break_writing(patch)
        checkpoints.save(3, small(3), {})
        with pytest.raises(UserError, match=r"step 3 cannot .*\(Input/output error\)"):
            checkpoints.save(4, small(4), {})
        checkpoints.save(5, small(5), {})
        with pytest.raises(UserError, match="step 5 cannot .*steps 1, 2 are there"):
            checkpoints.wait()
        checkpoints.save(6, small(6), {})
        with pytest.raises(UserError, match="step 6 cannot be written"):
            checkpoints.close()
    checkpoints.close()
    assert sorted(os.listdir(run)) == ["1", "2"]
    assert capfd.readouterr().err == ""
    assert logging_state() == before
    with RunCheckpoints(run) as checkpoints:
        assert_same(checkpoints.restore(small(0)).state, small(2))


def test_an_error_under_way_is_not_hidden(run, monkeypatch):
    break_writing(monkeypatch)
    with pytest.raises(KeyError, match="the first") as caught:
        with RunCheckpoints(run) as checkpoints:
            checkpoints.restore(small(0))
            checkpoints.save(3, small(3), {})
            raise KeyError("the first")
    assert "step 3 cannot be written" in caught.value.__notes__[0]


def test_a_folder_that_vanishes(run, tmp_path, capfd):
    with RunCheckpoints(run) as checkpoints:
        checkpoints.restore(small(0))
        run.rename(tmp_path / "away")
        run.write_text("in the way")
        with pytest.raises(UserError, match=r"step 3 cannot .*Not a directory"):
            checkpoints.save(3, small(3), {})
        run.unlink()
        (tmp_path / "away").rename(run)
        assert checkpoints.steps() == (1, 2)
        checkpoints.save(4, small(4), {})
    assert capfd.readouterr().err == ""
    assert sorted(os.listdir(run)) == ["1", "2", "4"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*Not a directory"):
        RunCheckpoints(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written.*Permission denied"):
        RunCheckpoints(tmp_path / "run")


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(1, {"key": jax.random.key(0)}, {})
        assert checkpoints.steps() == ()


def test_importing_changes_no_logging():
    program = """
        import logging, sys
        import orbax.checkpoint
        def state():
            loggers = [logging.getLogger(n) for n in (None, "absl", "asyncio")]
            settings = [(x.level, x.handlers[:], x.filters[:]) for x in loggers]
            return settings, sys.unraisablehook
        before = state()
        import jaxreg.training.checkpoints
        print(state() == before)
    """
    assert run_python(program).stdout.strip() == "True"
