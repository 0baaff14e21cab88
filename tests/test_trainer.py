"""Whole runs: killed and resumed, in two stages, learning, warm starts, what is kept.

The resumed runs are processes of their own, killed with SIGKILL; the run that they are
compared with never stops. All are of `training/programs/two_stages.py`.
"""

import csv
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxreg import cli, experiment, trainer
from jaxreg.data import synthetic
from jaxreg.data.pipeline import Loading
from jaxreg.errors import UserError
from jaxreg.experiment import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.io import checkpoints, runs
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "training" / "programs" / "two_stages.py"
STEPS = {"stage_1": 6, "stage_2": 4}
TIMING = ("pairs_per_s", "data_wait_share", "device_memory")
UNFINISHED = ".orbax-checkpoint-tmp"


# --- running --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the runs of this file leave their compiled programs for each other."""
    return tmp_path_factory.mktemp("compiled")


def arguments(out, *options):
    return ["--config", str(CONFIG), "--out", str(out), *options]


def process(cache, out, *options, devices=1):
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments(out, *options)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(cache, out, *options, devices=1):
    """Trains to the end in a process; returns what it said."""
    running = process(cache, out, *options, devices=devices)
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 0, said
    return said


def killed(cache, out, ready, *options, devices=1, delay=0.0):
    """Trains until `ready`, waits for so many seconds, and kills the process."""
    running = process(cache, out, *options, devices=devices)
    until = time.monotonic() + 600
    while not ready() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.0005)
    time.sleep(delay)
    running.kill()
    said, _ = running.communicate()
    assert running.returncode == -signal.SIGKILL, said
    return said


def trained_here(capsys, out, *options):
    """Trains to the end in this process; returns what was said."""
    status = cli.main(["train", *arguments(out, *options)])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


def saved(out, stage):
    """The steps of the complete checkpoints."""
    folder = out / stage / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def writing(out, stage):
    """The names of the unfinished ones."""
    folder = out / stage / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if UNFINISHED in name]


def cut(run, out, stage, step):
    """Copies a run as it was when it had saved `step`."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "weights")
    names = list(STEPS)
    for later in names[names.index(stage) + 1 :]:
        shutil.rmtree(out / later)
    for other in saved(out, stage):
        if other > step:
            shutil.rmtree(out / stage / "checkpoints" / str(other))


# --- comparing ------------------------------------------------------------------------


def state_of(out, stage, step=None):
    """The arrays of a checkpoint by name: parameters, optimiser, averages, step."""
    folder = out / stage / "checkpoints"
    step = saved(out, stage)[-1] if step is None else step
    text = (folder / str(step) / "record" / "metadata").read_text()
    like = {
        name: jax.ShapeDtypeStruct(tuple(shape), kind)
        for name, (kind, shape) in json.loads(text)["leaves"].items()
    }
    with runs.RunCheckpoints(folder, read_only=True) as kept:
        return kept.restore(like, step=step).state


def weights_of(out):
    variables = checkpoints.load_bundle(out / "weights").variables
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def log_of(out, stage):
    with open(out / stage / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: row[name] for name in sorted(row) if not name.startswith(TIMING)}
        for row in rows
    ]


def assert_identical(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def assert_same_run(one, two):
    """Every bit that a run leaves, but for the clock's."""
    for stage in STEPS:
        assert saved(one, stage)[-1] == saved(two, stage)[-1] == STEPS[stage]
        assert_identical(state_of(one, stage), state_of(two, stage))
        assert log_of(one, stage) == log_of(two, stage)
    assert_identical(weights_of(one), weights_of(two))


def distance(one, two):
    """Relative L2 distance of the parameters and running variances of two states.

    Without the biases that batch norm takes away, and the running means that follow
    them: their gradients are rounding errors, which Adam makes as large as any other.
    """
    assert one.keys() == two.keys()
    names = [
        name
        for name in one
        if name.startswith("variables/")
        and not name.endswith(("/mean", "/count"))
        and not ("/up_" in name and name.endswith("/bias"))
    ]
    assert len(names) > 10
    flat = [
        np.concatenate([np.ravel(a[n]).astype("f8") for n in names]) for a in (one, two)
    ]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])


# --- resume ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """A run on one device that was never interrupted."""
    out = tmp_path_factory.mktemp("reference") / "run"
    finished(cache, out)
    return out


@pytest.fixture(scope="module")
def reference_of_eight(tmp_path_factory, cache):
    """The same on eight simulated devices, one pair each."""
    out = tmp_path_factory.mktemp("reference_of_eight") / "run"
    finished(cache, out, devices=8)
    return out


def test_a_run_leaves_settings_logs_checkpoints_and_weights(reference):
    names = {path.name for path in reference.iterdir()}
    assert names == {"experiment.json", "stage_1", "stage_2", "weights"}
    for stage, steps in STEPS.items():
        assert saved(reference, stage) == list(range(1, steps + 1))
        assert not writing(reference, stage)
        assert any((reference / stage).glob("events.out.tfevents*"))
        state = state_of(reference, stage)
        assert state["step"] == steps
        assert any(name.startswith("ema/") for name in state)
        assert any(name.startswith("opt_state/") for name in state)
        norm = state["variables/batch_stats/step_1/norm_0/count"]
        # Two calls a step, and the second stage goes on from the first.
        assert norm == 2 * (steps if stage == "stage_1" else steps + 6)


def test_killed_at_random_and_resumed_on_one_device(tmp_path, cache, reference):
    out, draw = tmp_path / "run", random.Random(3)
    killed(
        cache,
        out,
        lambda: saved(out, "stage_1")[1:],
        delay=draw.uniform(0, 0.3),
    )
    first = saved(out, "stage_1")[-1]
    # While a checkpoint is being written: it is lost, and nothing but it.
    killed(
        cache,
        out,
        lambda: saved(out, "stage_1")[first:] and writing(out, "stage_1"),
        "--resume",
    )
    before = saved(out, "stage_1")
    said = killed(
        cache,
        out,
        lambda: saved(out, "stage_2"),
        "--resume",
        delay=draw.uniform(0, 0.3),
    )
    assert f"resumed at step {before[-1]} of 6" in said
    said = finished(cache, out, "--resume")
    assert "resumed at step 6 of 6" in said
    assert not writing(out, "stage_1") and not writing(out, "stage_2")
    assert_same_run(reference, out)


def test_killed_and_resumed_on_eight_devices(tmp_path, cache, reference_of_eight):
    out, draw = tmp_path / "run", random.Random(5)
    killed(
        cache,
        out,
        lambda: saved(out, "stage_1")[2:],
        devices=8,
        delay=draw.uniform(0, 0.3),
    )
    killed(
        cache,
        out,
        lambda: saved(out, "stage_2") and writing(out, "stage_2"),
        "--resume",
        devices=8,
    )
    said = finished(cache, out, "--resume", devices=8)
    assert "resumed at step" in said
    assert_same_run(reference_of_eight, out)


def test_resumed_on_another_number_of_devices(
    tmp_path, cache, reference, reference_of_eight
):
    # Equal to rounding, not to the bit: sums over the batch have another order.
    fewer, more = tmp_path / "fewer", tmp_path / "more"
    cut(reference_of_eight, fewer, "stage_2", 2)
    finished(cache, fewer, "--resume")
    cut(reference, more, "stage_2", 2)
    finished(cache, more, "--resume", devices=8)
    for whole, out in ((reference_of_eight, fewer), (reference, more)):
        one, two = state_of(whole, "stage_2"), state_of(out, "stage_2")
        assert distance(one, two) < 1e-5
        assert two["step"] == 4
        rows = zip(log_of(whole, "stage_2"), log_of(out, "stage_2"), strict=True)
        for a, b in rows:
            for name, value in a.items():
                close = pytest.approx(float(value or 0), rel=1e-4, abs=1e-6)
                assert float(b[name] or 0) == close, name


def test_a_truncated_checkpoint_is_passed_over_and_said(tmp_path, cache, reference):
    out = tmp_path / "run"
    cut(reference, out, "stage_1", 4)
    state = out / "stage_1" / "checkpoints" / "4" / "state"
    largest = max(
        (p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    said = finished(cache, out, "--resume")
    assert "checkpoints/4 is unfinished or damaged" in said
    assert "resumed at step 3 of 6" in said
    assert_same_run(reference, out)


def test_resume_of_a_finished_run_changes_nothing(tmp_path, reference, capsys):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    said = trained_here(capsys, out, "--resume")
    assert "resumed at step 4 of 4" in said
    assert_same_run(reference, out)


# --- stages and warm starts -----------------------------------------------------------


def tiny(**changes) -> Experiment:
    """One pair a batch of a network with hardly any weights, for a few steps."""
    settings = {
        "name": "tiny",
        "model": GradIconConfig((2, 4), (4,), halvings=0, refinements=0),
        "data": DataConfig(
            synthetic=("inter_mono",),
            synthetic_labels=2,
            pairs_per_epoch=2,
            validation_pairs=0,
        ),
        "loading": Loading(shape=(8, 8, 8)),
        "objective": Objective(similarity="mse"),
        "train": TrainConfig(batch=2),
        "stages": (Stage("one", 1),),
    }
    return Experiment(**(settings | changes))


def without_leaf(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def test_stage_two_starts_from_stage_one_and_a_fresh_refinement(reference):
    chosen = experiment.load(CONFIG)
    changed = experiment.stages(chosen)[1][1]
    model = trainer.GradIcon(changed.model)
    # Validated last at step 6 of stage 1, which is the best or shares its place.
    with runs.RunCheckpoints(
        reference / "stage_1" / "checkpoints", metric="dice", read_only=True
    ) as kept:
        best = kept.best_step()
    before = state_of(reference, "stage_1", best)
    ema = {
        name.removeprefix("ema/"): leaf
        for name, leaf in before.items()
        if name.startswith("ema/")
    }
    # The tree of the first stage's best, in which the moving average is the parameters.
    source = {"params": nested(ema)}
    stats = {
        name.removeprefix("variables/batch_stats/"): leaf
        for name, leaf in before.items()
        if name.startswith("variables/batch_stats/")
    }
    source["batch_stats"] = nested(stats)
    said = []
    start = trainer.initial_variables(changed, model, source, said.append)
    assert said == [
        "started from the previous stage: 11 arrays loaded, 11 fresh, 0 not used"
    ]
    fresh = without_leaf(model.init(jax.random.key(changed.train.seed)))
    got = without_leaf(start)
    wanted = without_leaf(source)
    for name, leaf in got.items():
        from_stage_one = "step_1/" in name
        expected = wanted[name] if from_stage_one else fresh[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    # And so did the run: its first validation is the last one of the stage before.
    first, last = log_of(reference, "stage_2")[0], log_of(reference, "stage_1")
    scored = [row for row in last if row["step"] == str(best)][0]
    assert first["step"] == "0"
    for name in ("validation_loss", "validation_similarity", "validation_dice"):
        assert float(first[name]) == pytest.approx(float(scored[name]), rel=1e-5)


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = leaf
    return tree


def test_training_starts_from_given_weights(reference):
    chosen = tiny(train=TrainConfig(batch=2, start=str(reference / "weights")))
    chosen = experiment.override(chosen, [("model.refinements", "1")])
    said = []
    model = trainer.GradIcon(chosen.model)
    start = trainer.initial_variables(chosen, model, None, said.append)
    assert "22 arrays loaded, 0 fresh" in said[0] and "train.start" in said[0]
    loaded = checkpoints.load_bundle(reference / "weights").variables
    assert_identical(without_leaf(start), without_leaf(loaded))


def test_weights_of_other_sizes_are_refused_by_name(reference, tmp_path):
    chosen = tiny(
        model=GradIconConfig((2, 6), (4,), halvings=0, refinements=0),
        train=TrainConfig(batch=2, start=str(reference / "weights")),
    )
    with pytest.raises(UserError, match=r"down_0/bias.*channels_down") as caught:
        trainer.run(chosen, tmp_path / "out")
    assert str(reference / "weights") in str(caught.value)
    # Nothing stands in the way of the same folder with better settings.
    assert not (tmp_path / "out").exists()


# --- learning -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    """Sixty steps on two pairs of anatomies that are also the validation pairs."""
    folder = tmp_path_factory.mktemp("overfit")
    config = dataclasses.replace(
        synthetic.TASKS["inter_mono"], shape=(12, 12, 12), labels=2,
        deformation_voxel=2.0,
    )  # fmt: skip
    path = synthetic.write_dataset(folder / "data", config, subjects=3, seed=2)
    rows = list(csv.reader(open(path, newline="")))
    split = rows[0].index("split")
    # The same two subjects twice: to learn from, and under another dataset to score.
    lines = [rows[0]]
    for name in ("train", "val"):
        for row in rows[1:3]:
            lines.append([*row[:split], name, *row[split + 1 :]])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    chosen = tiny(
        model=GradIconConfig((2, 8, 8), (8, 8), halvings=0, refinements=0),
        data=DataConfig(manifests=(str(path),), pairs_per_epoch=10, validation_pairs=2),
        loading=Loading(shape=(12, 12, 12)),
        augment=None,
        objective=Objective(similarity="mse", inverse_consistency_weight=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        loop=LoopConfig(log_every=5, validate_every=4, image_every=4),
        stages=(Stage("one", 12),),
    )
    out = folder / "run"
    return out, path, trainer.run(chosen, out)


def test_training_learns(overfit):
    out, _, outcome = overfit
    rows = log_of(out, "one")
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < 0.6 * losses[0]
    dice = {int(r["step"]): float(r["validation_dice"]) for r in rows
            if r["validation_dice"]}  # fmt: skip
    assert list(dice) == [0, 20, 40, 60]
    assert dice[60] > dice[0] + 0.05
    assert outcome.scores["dice"] == dice[60]
    assert outcome.steps == 60


def test_the_best_checkpoint_by_dice_becomes_the_weights(overfit):
    out, _, _ = overfit
    scores = {
        int(row["step"]): float(row["validation_dice"])
        for row in log_of(out, "one")
        if row["validation_dice"] and row["step"] != "0"
    }
    best = max(scores, key=lambda step: (scores[step], step))
    state = state_of(out, "one", best)
    weights = {
        name.removeprefix("variables/"): leaf
        for name, leaf in state.items()
        if name.startswith("variables/")
    }
    assert_identical(
        weights, without_leaf(checkpoints.load_bundle(out / "weights").variables)
    )
    bundle = checkpoints.load_bundle(out / "weights")
    assert tuple(bundle.preprocessing["shape"]) == (12, 12, 12)
    assert bundle.config["channels_down"] == [2, 8, 8]


def test_pictures_of_the_first_pair_are_kept(overfit):
    out, _, _ = overfit
    (file,) = (out / "one").glob("events.out.tfevents*")
    found = {}
    for event in events_of(file.read_bytes()):
        for value in event.summary.value:
            if value.HasField("image"):
                found.setdefault(event.step, set()).add(value.tag)
    assert sorted(found) == [0, 20, 40, 60]
    assert all(tags == {"fixed", "moving", "warped"} for tags in found.values())


def events_of(octets):
    """Reads TensorBoard's records: length, its checksum, the event, its checksum."""
    place = 0
    while place < len(octets):
        (length,) = struct.unpack_from("<Q", octets, place)
        yield event_pb2.Event.FromString(octets[place + 12 : place + 12 + length])
        place += 16 + length


def test_what_was_trained_registers_from_the_command_line(overfit, tmp_path, capsys):
    out, manifest, _ = overfit
    images = sorted((manifest.parent / "images").glob("*.nii*"))
    argv = [
        "register", "--fixed", str(images[0]), "--moving", str(images[1]),
        "--fixed-modality", "mri", "--moving-modality", "mri",
        "--network-weights", str(out / "weights"), "--io-iterations", "None",
        "--transform-out", str(tmp_path / "t.h5"),
    ]  # fmt: skip
    # The grid is that of the weights.
    assert cli.main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "t.h5").is_file()


@pytest.mark.torch
def test_what_was_trained_becomes_a_pytorch_file_and_comes_back(overfit, tmp_path):
    pytest.importorskip("torch")
    out, _, _ = overfit
    target, again = tmp_path / "x.trch", tmp_path / "again"
    assert (
        cli.main(["convert", "--from", str(out / "weights"), "--to", str(target)]) == 0
    )
    assert cli.main(["convert", "--from", str(target), "--to", str(again)]) == 0
    assert_identical(
        without_leaf(checkpoints.load_bundle(again).variables),
        without_leaf(checkpoints.load_bundle(out / "weights").variables),
    )


def test_without_labels_the_best_is_that_of_the_least_loss(overfit, tmp_path):
    _, manifest, _ = overfit
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))
    bare = manifest.with_name("bare.csv")
    with open(bare, "w", newline="") as file:
        names = ["image", "subject", "dataset", "split"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    chosen = tiny(
        data=DataConfig(manifests=(str(bare),), pairs_per_epoch=2, validation_pairs=1),
        loop=LoopConfig(validate_every=1),
    )
    out = tmp_path / "run"
    outcome = trainer.run(chosen, out)
    assert "dice" not in outcome.scores and "loss" in outcome.scores
    with runs.RunCheckpoints(
        out / "one" / "checkpoints", metric="loss", read_only=True
    ) as kept:
        assert kept.best_step() == 1
