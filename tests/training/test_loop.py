"""The host's side of training: what is written when, and what stops a run.

The step is a Python function that adds one to a number, so nothing is compiled.
"""

import dataclasses
import math
import os
import signal
import threading
import types

import jax
import numpy as np
import optax
import pytest

from jaxreg.errors import UserError
from jaxreg.training import loop
from jaxreg.training import state as state_lib
from jaxreg.training.checkpoints import RunCheckpoints
from jaxreg.training.logging import DeviceMemory
from jaxreg.training.loop import Job, LoopConfig, Validation
from jaxreg.training.parallel import Layout


class Batches:
    """Pairs 2 b and 2 b + 1 in batch b; keeps count."""

    def __init__(self, first=0, *, stop_at=None, how=None):
        self.waited_s = 0.0
        self.index, self.stop_at, self.how = first, stop_at, how

    def __next__(self):
        if self.index == self.stop_at:
            self.how()
        self.index += 1
        return {"index": np.arange(2) + 2 * (self.index - 1)}

    def state(self):
        return {"read": self.index}

    def named(self, index):
        return f"moving m{index}.nii, fixed f{index}.nii"


class Log:
    """Remembers what it is told."""

    def __init__(self):
        self.rows, self.notes, self.shown, self.lines = {}, [], [], []

    def scalars(self, step, values):
        self.rows.setdefault(step, {}).update(values)

    def images(self, step, volumes):
        self.shown.append((step, sorted(volumes)))

    def progress(self, step, total, values):
        self.lines.append((step, total, values["loss"]))

    def note(self, text):
        self.notes.append(text)


def fresh():
    variables = {"params": {"w": np.zeros(3, "f4")}, "batch_stats": {}}
    return state_lib.start(variables, optax.sgd(1.0), jax.random.key(0))


def counting(state, batch):
    """Loss of step i is i squared; the number grows by one a step."""
    del batch
    step = int(state.step) + 1
    params = jax.tree.map(lambda a: a + 1, state.variables["params"])
    state = dataclasses.replace(
        state, step=np.int32(step), variables={**state.variables, "params": params}
    )
    return state, {"loss": step**2, "gradient_norm": 1.0 / step, "finite": True}


def breaking_at(bad):
    """As `counting`, with a loss that is not a number at one step."""

    def step(state, batch):
        after, parts = counting(state, batch)
        if after.step == bad:
            kept = dataclasses.replace(after, variables=state.variables)
            return kept, {**parts, "loss": math.nan, "finite": False}
        return after, parts

    return step


def job(log=None, *, batches=None, checkpoints=None, resumed=None, **changes):
    """What `trained` needs, by name."""
    settings = {
        "step": counting,
        "layout": Layout("single"),
        "batch_size": 2,
        "steps": 9,
        "steps_per_epoch": 3,
        "learning_rate": lambda step: 0.5**step,
        "validate": None,
        "find_bad_pairs": lambda variables, batch: [],
        "record": {"stage": "one"},
    }
    return {
        "job": Job(**(settings | changes)),
        "batches": Batches() if batches is None else batches,
        "log": Log() if log is None else log,
        "checkpoints": checkpoints,
        "resumed": resumed or {},
    }


def trained(state, work, config):
    return loop.run(state, config=config, **work)


def scored(variables):
    """More is better up to 5 steps, then less."""
    w = float(variables["params"]["w"][0])
    return Validation({"dice": 1 - abs(w - 5) / 10, "loss": w}, {"fixed": np.zeros(1)})


@pytest.mark.parametrize(
    ("name", "value"),
    [("log_every", 0), ("keep_latest", 0), ("keep_best", -1), ("validate_every", -1),
     ("image_every", -2), ("checkpoint_every", -1), ("metric", "hd95")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"loop.{name} is .{{0,2}}{value}"):
        LoopConfig(**{name: value})


def test_a_row_is_the_mean_of_its_steps():
    log = Log()
    state = trained(fresh(), job(log), LoopConfig(log_every=4))
    assert state.step == 9
    np.testing.assert_array_equal(state.variables["params"]["w"], 9)
    # The last step has a row even if it is not its turn.
    assert list(log.rows) == [4, 8, 9]
    assert log.rows[4]["loss"] == (1 + 4 + 9 + 16) / 4
    assert log.rows[8]["loss"] == (25 + 36 + 49 + 64) / 4
    assert log.rows[9]["loss"] == 81
    assert log.rows[4]["gradient_norm"] == pytest.approx(
        (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    )
    # The rate of the update that led to the step, and epochs done by then.
    assert log.rows[4]["learning_rate"] == 0.5**3
    assert log.rows[4]["epoch"] == pytest.approx(4 / 3)
    assert "finite" not in log.rows[4]
    assert [line[:2] for line in log.lines] == [(4, 9), (8, 9), (9, 9)]


def test_data_wait_and_rate_are_those_between_rows(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(
        loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0])
    )

    class Slow(Batches):
        def __next__(self):
            clock[0] += 2.0
            self.waited_s += 0.5
            return super().__next__()

    log = Log()
    trained(fresh(), job(log, batches=Slow(), steps=12), LoopConfig(log_every=4))
    row = log.rows[8]
    assert row["data_wait_share"] == pytest.approx(0.25)
    assert row["pairs_per_s"] == pytest.approx(1.0)


def test_validation_between_rows_takes_neither_their_steps_nor_their_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0])
    )

    class Slow(Batches):
        def __next__(self):
            clock[0] += 2.0
            self.waited_s += 0.5
            return super().__next__()

    def slowly_scored(variables):
        clock[0] += 100.0
        return scored(variables)

    log = Log()
    work = job(log, batches=Slow(), validate=slowly_scored)
    trained(fresh(), work, LoopConfig(log_every=4, validate_every=1))
    assert "validation_dice" in log.rows[3] and "validation_dice" in log.rows[6]
    assert log.rows[4]["loss"] == (1 + 4 + 9 + 16) / 4
    assert log.rows[8]["loss"] == (25 + 36 + 49 + 64) / 4
    assert log.rows[8]["pairs_per_s"] == pytest.approx(1.0)
    assert log.rows[8]["data_wait_share"] == pytest.approx(0.25)


@pytest.mark.parametrize("told", [True, False])
def test_device_memory_is_told_where_the_backend_tells_it(monkeypatch, told):
    memory = DeviceMemory(in_use=2_500_000_000, peak=7 * 10**9) if told else None
    monkeypatch.setattr(loop, "device_memory", lambda: memory)
    log = Log()
    trained(fresh(), job(log), LoopConfig(log_every=4))
    for row in log.rows.values():
        assert row.get("device_memory_gb") == (2.5 if told else None)
        assert row.get("device_memory_peak_gb") == (7.0 if told else None)


@pytest.mark.parametrize("known", [True, False])
def test_utilisation_is_told_where_the_peak_is_known(monkeypatch, known):
    """Of 300 operations a step, in 2 s of which 0.5 would do on a device of 600 a s."""
    clock = [0.0]
    monkeypatch.setattr(
        loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0])
    )
    asked = []

    def peak_flops(kind):
        asked.append(kind)
        return 600.0 if known else None

    monkeypatch.setattr(loop.utilisation, "peak_flops", peak_flops)

    class Slow(Batches):
        def __next__(self):
            clock[0] += 2.0
            return super().__next__()

    def flops():
        assert known  # it takes a while to be counted
        clock[0] += 10.0
        return 300.0

    log = Log()
    work = job(log, batches=Slow(), flops=flops, steps=12)
    trained(fresh(), work, LoopConfig(log_every=4))
    assert asked == [jax.devices()[0].device_kind]
    found = [row.get("model_flops_utilisation") for row in log.rows.values()]
    # The first row's time has a fifth step's batch, and not what counting took.
    assert found == ([pytest.approx(x) for x in (0.2, 0.25, 1 / 3)] if known
                     else [None] * 3)  # fmt: skip


def test_validation_comes_before_between_and_after():
    log = Log()
    config = LoopConfig(log_every=100, validate_every=2, image_every=4)
    work = job(log, validate=scored, steps_per_epoch=2)
    trained(fresh(), work, config)
    found = [s for s, row in log.rows.items() if "validation_dice" in row]
    assert found == [0, 4, 8, 9]
    assert log.rows[4]["validation_dice"] == pytest.approx(0.9)
    assert log.shown == [(0, ["fixed"]), (8, ["fixed"]), (9, ["fixed"])]
    assert "step 4 validation: dice 0.9000, loss 4.0000" in log.notes


def test_each_dataset_is_logged_and_shown():
    def scored_apart(variables):
        found = {"a": {"dice": 0.5, "loss": 2.0}, "b": {"loss": 4.0, "folds": 1.0}}
        return loop.Validation({"dice": 0.5, "loss": 3.0}, {}, found)

    log = Log()
    trained(fresh(), job(log, validate=scored_apart), LoopConfig(validate_every=0))
    own = {k: v for k, v in log.rows[9].items() if k.startswith("val/")}
    assert own == {"val/a/dice": 0.5, "val/a/loss": 2.0, "val/b/loss": 4.0}
    assert (
        "step 9 validation: dice 0.5000, loss 3.0000, a dice 0.5000, b loss 4.0000"
        in log.notes
    )


def test_without_periods_there_is_only_the_beginning_and_the_end():
    log = Log()
    config = LoopConfig(validate_every=0, image_every=0)
    trained(fresh(), job(log, validate=scored), config)
    assert [s for s, row in log.rows.items() if "validation_dice" in row] == [0, 9]
    assert log.shown == []


@pytest.mark.parametrize(("every", "steps"), [(0, [3, 6, 9]), (4, [4, 8, 9])])
def test_checkpoints_come_every_epoch_or_every_few_steps(tmp_path, every, steps):
    with RunCheckpoints(tmp_path, keep_latest=9) as kept:
        trained(fresh(), job(checkpoints=kept), LoopConfig(checkpoint_every=every))
        assert list(kept.steps()) == steps
        like = state_lib.to_tree(fresh())
        found = kept.restore(like, step=steps[0])
    assert found.state["step"] == steps[0]
    np.testing.assert_array_equal(found.state["variables"]["params"]["w"], steps[0])
    assert found.record["stage"] == "one"
    assert found.record["data"] == {"read": steps[0], "batches": steps[0]}


def test_the_best_checkpoint_stays_beside_the_latest(tmp_path):
    config = LoopConfig(validate_every=1, keep_latest=1)
    with RunCheckpoints(tmp_path, keep_latest=1, keep_best=1, metric="dice") as kept:
        work = job(checkpoints=kept, validate=scored, metric="dice", steps=12)
        trained(fresh(), work, config)
        assert kept.best_step() == 6  # |6 - 5| is less than |3 - 5|
        assert list(kept.steps()) == [6, 12]


def test_a_resumed_run_writes_the_rows_of_one_that_was_not(tmp_path):
    # Checkpoints every 3 steps, rows every 4: row 4 has a step from before the kill.
    whole, config = Log(), LoopConfig(log_every=4)
    trained(fresh(), job(whole), config)
    with RunCheckpoints(tmp_path, keep_latest=9) as kept:
        trained(fresh(), job(checkpoints=kept), config)
        for step in (3, 6):
            found = kept.restore(state_lib.to_tree(fresh()), step=step)
            again = Log()
            work = job(again, batches=Batches(step), resumed=found.record)
            trained(state_lib.from_tree(found.state), work, config)
            timing = {"pairs_per_s", "data_wait_share"}
            for row, numbers in again.rows.items():
                for name in numbers.keys() - timing:
                    assert numbers[name] == whole.rows[row][name], (row, name)
            assert set(again.rows) == {row for row in whole.rows if row > step}


def test_what_was_done_before_a_kill_does_not_count_in_the_rate(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0])
    )

    class Slow(Batches):
        def __next__(self):
            clock[0] += 2.0
            return super().__next__()

    log, state = Log(), fresh()
    state = dataclasses.replace(state, step=np.int32(3))
    resumed = {"unlogged": {"steps": 3, "sums": {"loss": 14.0}}}
    work = job(log, batches=Slow(3), steps=4, resumed=resumed)
    trained(state, work, LoopConfig(log_every=4))
    assert log.rows[4]["loss"] == (14 + 16) / 4
    assert log.rows[4]["pairs_per_s"] == pytest.approx(1.0)


def test_a_bad_pair_is_named_and_the_last_good_checkpoint_kept(tmp_path):
    seen = []

    def blame(variables, batch):
        seen.append(float(variables["params"]["w"][0]))
        return [1]

    log = Log()
    with RunCheckpoints(tmp_path, keep_latest=9) as kept:
        work = job(log, step=breaking_at(5), find_bad_pairs=blame, checkpoints=kept)
        with pytest.raises(UserError) as caught:
            trained(fresh(), work, LoopConfig(checkpoint_every=2, log_every=1))
        assert list(kept.steps()) == [2, 4]
    message = str(caught.value)
    assert "at step 5 the loss is nan" in message
    # The second of batch 5 (from 1), and only that one.
    assert "m9.nii" in message and "m8.nii" not in message
    assert "checkpoint of step 4 is good" in message
    assert max(log.rows) == 4
    assert len(seen) == 1


def test_a_batch_without_a_culprit_names_all_of_it():
    work = job(step=breaking_at(2))
    with pytest.raises(UserError) as caught:
        trained(fresh(), work, LoopConfig())
    message = str(caught.value)
    assert "m2.nii" in message and "m3.nii" in message
    assert "none of them alone" in message and "optimizer.clip" in message
    assert "No checkpoint had been written" in message


def test_no_checkpoint_is_written_of_a_step_that_went_wrong(tmp_path):
    # The bad step is also the one after which a checkpoint is due.
    with RunCheckpoints(tmp_path, keep_latest=9) as kept:
        work = job(step=breaking_at(6), checkpoints=kept)
        with pytest.raises(UserError, match="step 3 is good"):
            trained(fresh(), work, LoopConfig())
        assert list(kept.steps()) == [3]


def interrupted():
    raise KeyboardInterrupt


def unreadable():
    raise UserError("m10.nii is missing")


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (interrupted, KeyboardInterrupt),
        (terminated, KeyboardInterrupt),
        (unreadable, UserError),
    ],
)
def test_what_stops_a_run_keeps_the_last_complete_step(tmp_path, how, what):
    before = signal.getsignal(signal.SIGTERM)
    config = LoopConfig(checkpoint_every=100, log_every=4)
    with RunCheckpoints(tmp_path) as kept:
        work = job(batches=Batches(stop_at=5, how=how), checkpoints=kept)
        with pytest.raises(what) as caught:
            trained(fresh(), work, config)
        assert list(kept.steps()) == [5]
        found = kept.restore(state_lib.to_tree(fresh()))
        whole, again = Log(), Log()
        work = job(again, batches=Batches(5), resumed=found.record)
        state = trained(state_lib.from_tree(found.state), work, config)
    if what is UserError:
        assert "m10.nii is missing. The checkpoint of step 5 is good" in str(
            caught.value
        )
    assert signal.getsignal(signal.SIGTERM) == before
    trained(fresh(), job(whole), config)
    assert state.step == 9
    assert again.rows[8]["loss"] == whole.rows[8]["loss"]


def test_data_that_stay_unreadable_after_a_resume_are_no_second_save(tmp_path):
    config = LoopConfig(checkpoint_every=100)
    with RunCheckpoints(tmp_path) as kept:
        stopped = Batches(stop_at=5, how=unreadable)
        for first in (0, 5):
            start, resumed = fresh(), {}
            if first:
                found = kept.restore(state_lib.to_tree(start))
                start, resumed = state_lib.from_tree(found.state), found.record
            work = job(batches=stopped, checkpoints=kept, resumed=resumed)
            with pytest.raises(UserError, match="step 5 is good"):
                trained(start, work, config)
        assert list(kept.steps()) == [5]


def test_data_that_are_unreadable_from_the_start_are_told_as_they_are(tmp_path):
    with RunCheckpoints(tmp_path) as kept:
        work = job(batches=Batches(stop_at=0, how=unreadable), checkpoints=kept)
        with pytest.raises(UserError, match=r"^m10.nii is missing$"):
            trained(fresh(), work, LoopConfig())
        assert not kept.steps()


def test_outside_the_main_thread_signals_are_left_alone():
    results = []
    thread = threading.Thread(
        target=lambda: results.append(trained(fresh(), job(), LoopConfig()).step)
    )
    thread.start()
    thread.join()
    assert results == [9]


@pytest.mark.parametrize("at", [6, 9])
def test_an_interrupted_validation_is_made_up_for_after_a_resume(tmp_path, at):
    def scored_until(variables):
        if variables["params"]["w"][0] == at:
            raise KeyboardInterrupt
        return scored(variables)

    # Validation after 3, 6 and 9 steps, of which 6 is the best; rows every 4.
    config = LoopConfig(log_every=4, validate_every=1)
    whole, again = Log(), Log()
    common = {"metric": "dice", "validate": scored}
    with RunCheckpoints(tmp_path / "whole", metric="dice", keep_latest=9) as kept:
        trained(fresh(), job(whole, checkpoints=kept, **common), config)
    with RunCheckpoints(tmp_path / "run", metric="dice", keep_latest=9) as kept:
        work = job(checkpoints=kept, **(common | {"validate": scored_until}))
        with pytest.raises(KeyboardInterrupt):
            trained(fresh(), work, config)
        assert kept.latest_step() == at
        assert kept.best_step() == at - 3
    with RunCheckpoints(tmp_path / "run", metric="dice", keep_latest=9) as kept:
        found = kept.restore(state_lib.to_tree(fresh()))
        work = job(
            again, batches=Batches(at), checkpoints=kept, resumed=found.record, **common
        )
        trained(state_lib.from_tree(found.state), work, config)
        assert kept.best_step() == 6
        made_up = kept.restore(state_lib.to_tree(fresh()), step=at)
    assert made_up.record["scores"] == scored(made_up.state["variables"]).scores
    timing = {"pairs_per_s", "data_wait_share"}
    for row, numbers in again.rows.items():
        assert row >= at
        for name in numbers.keys() - timing:
            assert numbers[name] == whole.rows[row][name], (row, name)


def test_an_interrupt_within_a_save_is_no_second_save(tmp_path, monkeypatch):
    with RunCheckpoints(tmp_path, keep_latest=9) as kept:
        save = kept.save

        def interrupted(step, *args, **options):
            save(step, *args, **options)
            if step == 6:
                raise KeyboardInterrupt

        monkeypatch.setattr(kept, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(fresh(), job(checkpoints=kept), LoopConfig())
        kept.wait()
        assert list(kept.steps()) == [3, 6]
