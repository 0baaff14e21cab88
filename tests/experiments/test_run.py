"""Whole runs: killed and resumed, in two stages, learning, warm starts, what is kept.

The resumed runs are processes of their own, killed with SIGKILL; the run that they are
compared with never stops. All are of `training/programs/two_stages.py`.
"""

import csv
import dataclasses
import gzip
import json
import math
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import jax
import nibabel as nib
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxreg.cli import main
from jaxreg.data import batches, pair_source, pairs, sampler, synthetic
from jaxreg.data.loading import Loading
from jaxreg.data.manifest.records import Manifest, Record
from jaxreg.errors import UserError
from jaxreg.experiments import config as config_lib
from jaxreg.experiments import datasets, overrides, validation, warm_start
from jaxreg.experiments import files as files_lib
from jaxreg.experiments import folder as folder_lib
from jaxreg.experiments import held_out as held_out_lib
from jaxreg.experiments import run as run_lib
from jaxreg.experiments import stage as stage_lib
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.training import checkpoints, parallel, utilisation
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig
from jaxreg.training.parallel import Layout
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo
from jaxreg.xla import fingerprint

ROOT = pathlib.Path(__file__).parents[2]
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
    status = main.main(["train", *arguments(out, *options)])
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
    with checkpoints.RunCheckpoints(folder, read_only=True) as kept:
        return kept.restore(like, step=step).state


def weights_of(out):
    variables = bundle_lib.load_bundle(out / "weights").variables
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
    files = {"experiment.json", "orientation.txt"}
    assert names == {*files, "stage_1", "stage_2", "weights"}
    kept = bundle_lib.load_bundle(reference / "weights").preprocessing
    assert kept["orientation"] == synthetic.ORIENTATION
    for stage, steps in STEPS.items():
        assert saved(reference, stage) == list(range(1, steps + 1))
        assert not writing(reference, stage)
        assert any((reference / stage).glob("events.out.tfevents*"))
        assert not (reference / stage / "profile").exists()
        state = state_of(reference, stage)
        assert state["step"] == steps
        assert any(name.startswith("ema/") for name in state)
        assert any(name.startswith("opt_state/") for name in state)
        norm = state["variables/batch_stats/step_1/norm_0/count"]
        # Two calls a step, and the second stage goes on from the first.
        assert norm == 2 * (steps if stage == "stage_1" else steps + 6)


def test_a_profile_is_of_the_steps_asked_for_and_changes_nothing(
    tmp_path, cache, reference
):
    out = tmp_path / "run"
    said = finished(cache, out, "--profile", "2")
    assert f"a profile of 2 steps to {out / 'stage_1' / 'profile'}" in said
    # The second stage has four steps, of which three are not traced.
    assert "no profile of stage_2: --profile is 2" in said
    assert not (out / "stage_2" / "profile").exists()
    (session,) = (out / "stage_1" / "profile" / "plugins" / "profile").iterdir()
    (planes,) = session.glob("*.xplane.pb")
    assert planes.stat().st_size > 1000
    (path,) = session.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(map(int, steps)) == [4, 5]
    assert_same_run(out, reference)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_resumed_on_another_number_of_devices(
    tmp_path, cache, reference, reference_of_eight
):
    # Equal to rounding, not to the bit: sums over the batch have another order.
    fewer, more = tmp_path / "fewer", tmp_path / "more"
    cut(reference_of_eight, fewer, "stage_2", 2)
    finished(cache, fewer, "--resume")
    cut(reference, more, "stage_2", 2)
    finished(cache, more, "--resume", devices=8)
    assert_near(reference_of_eight, fewer)
    assert_near(reference, more)


def assert_near(whole, out):
    """Checks that two runs end alike but for rounding."""
    one, two = state_of(whole, "stage_2"), state_of(out, "stage_2")
    assert distance(one, two) < 1e-5
    assert two["step"] == 4
    rows = zip(log_of(whole, "stage_2"), log_of(out, "stage_2"), strict=True)
    for a, b in rows:
        for name, value in a.items():
            close = pytest.approx(float(value or 0), rel=1e-4, abs=1e-6)
            assert float(b[name] or 0) == close, name


@pytest.mark.slow
def test_a_split_optimizer_is_resumed_on_another_number_of_devices(
    tmp_path, cache, reference_of_eight
):
    out = tmp_path / "run"
    split = ("--train.parallel", "mesh", "--train.shard_optimizer", "True")
    finished(cache, out, *split, devices=8)
    assert_near(reference_of_eight, out)
    cut(out, tmp_path / "cut", "stage_2", 2)
    finished(cache, tmp_path / "cut", *split, "--resume", devices=2)
    assert_near(out, tmp_path / "cut")


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
        "model": GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0),
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


def flops_of(experiment, out):
    (stage,) = run_lib._plan(experiment, out, print, begun=False).stages
    return stage().job.flops()


def test_utilisation_is_that_of_the_arithmetic_of_the_step(tmp_path, monkeypatch):
    """Twice the batch is twice the arithmetic; computing again to save memory none."""
    chosen = tiny()
    flops = flops_of(chosen, tmp_path / "run")
    more = dataclasses.replace(chosen.data, pairs_per_epoch=4)
    four = tiny(train=TrainConfig(batch=4, accumulate=2), data=more)
    assert flops_of(four, tmp_path / "run") == 2 * flops
    saving = dataclasses.replace(chosen.model, remat="networks")
    assert flops_of(tiny(model=saving), tmp_path / "run") == flops

    monkeypatch.setattr(utilisation, "peak_flops", lambda kind: 1e8)
    run_lib.run(chosen, tmp_path / "run", report=lambda _: None)
    with open(tmp_path / "run" / "one" / "log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    devices = jax.device_count()
    expected = float(row["pairs_per_s"]) / 2 * flops / (1e8 * devices)
    assert float(row["model_flops_utilisation"]) == pytest.approx(expected, rel=1e-6)
    assert expected > 0


def without_leaf(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def test_stage_two_starts_from_stage_one_and_a_fresh_refinement(reference):
    chosen = files_lib.load(CONFIG)
    changed = config_lib.stages(chosen)[1][1]
    model = GradIcon(changed.model)
    # Validated last at step 6 of stage 1, which is the best or shares its place.
    with checkpoints.RunCheckpoints(
        reference / "stage_1" / "checkpoints", metric="dice", read_only=True
    ) as kept:
        best = kept.best_step()
    before = state_of(reference, "stage_1", best)
    # What the first stage hands on is the moving average of its best state.
    source = nested(
        {
            name.removeprefix("ema/"): leaf
            for name, leaf in before.items()
            if name.startswith("ema/")
        }
    )
    said = []
    start = warm_start.initial_variables(changed, model, source, said.append)
    assert said == [
        "started from the previous stage: 11 arrays loaded, 11 fresh, 0 not used"
    ]
    weights_key = jax.random.split(jax.random.key(changed.train.seed))[0]
    fresh = without_leaf(model.init(weights_key))
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


# --- stages of their own, damage and interrupts at the end ----------------------------


DICE = {"one": (0.0, 0.1, 0.2, 0.3), "two": (0.0, 0.5, 0.9, 0.1)}


def scoring(*dice):
    """In place of `validation._means`: one score after the other; None interrupts."""
    left = list(dice)

    def means(found):
        assert list(found) == ["inter_mono"]
        score = left.pop(0)
        if score is None:
            raise KeyboardInterrupt
        return {"dice": score, "loss": 1.0}

    return means


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """Two stages of three steps, each scored as in DICE: (experiment, folder)."""
    chosen = tiny(
        data=DataConfig(
            synthetic=("inter_mono",),
            synthetic_labels=2,
            pairs_per_epoch=2,
            validation_pairs=2,
        ),
        loop=LoopConfig(validate_every=1, keep_latest=9),
        stages=(Stage("one", 3), Stage("two", 3)),
    )
    out = tmp_path_factory.mktemp("brief") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_means", scoring(*DICE["one"], *DICE["two"]))
        run_lib.run(chosen, out, report=lambda _: None)
    return chosen, out


def test_each_stage_draws_numbers_of_its_own(brief):
    chosen, out = brief
    keys = [state_of(out, stage)["key"] for stage in ("one", "two")]
    of_seed = jax.random.key(chosen.train.seed)
    weights = jax.random.key_data(jax.random.split(of_seed)[0])
    # Nor are the weights drawn from what the steps draw from.
    several = [*keys, np.asarray(weights), np.asarray(jax.random.key_data(of_seed))]
    assert len({tuple(key.tolist()) for key in several}) == 4
    first, again, second, other_run = (
        datasets.make_sources(
            overrides.override(chosen, [("train.seed", seed)]), number=number
        )
        for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    np.testing.assert_array_equal(first.train[0]["fixed"], again.train[0]["fixed"])
    assert np.any(first.train[0]["fixed"] != second.train[0]["fixed"])
    assert np.any(second.train[0]["fixed"] != other_run.train[0]["fixed"])
    # Scores of all stages are of the same pairs.
    np.testing.assert_array_equal(
        first.validation[0]["fixed"], second.validation[0]["fixed"]
    )


def test_scans_are_paired_anew_in_each_stage(overfit):
    _, path, _ = overfit
    chosen = tiny(data=DataConfig(manifests=(str(path),), pairs_per_epoch=20))
    plans = [
        [datasets.make_sources(chosen, number=number).train.plan(i) for i in range(20)]
        for number in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_a_damaged_best_checkpoint_gives_way_to_the_next(brief, tmp_path):
    chosen, whole = brief
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    best = out / "two" / "checkpoints" / "2"
    files = [path for path in (best / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    said = []
    run_lib.run(chosen, out, resume=True, report=said.append)
    assert any(str(best) in text and "skipped" in text for text in said)
    assert "the weights are those of step 1 of 3" in said
    assert_weights_of(out, state_of(out, "two", 1))


def test_weights_to_start_from_are_read_once(brief, tmp_path, monkeypatch):
    chosen, whole = brief
    start = str(whole / "weights")
    chosen = dataclasses.replace(
        chosen,
        train=dataclasses.replace(chosen.train, start=start),
        stages=(Stage("one", 1), Stage("two", 1)),
    )
    original, read = load.load, []
    monkeypatch.setattr(load, "load", lambda name: read.append(name) or original(name))
    said = []
    run_lib.run(chosen, tmp_path / "run", report=said.append)
    assert read == [start]
    # It is reported once, when the first stage begins.
    assert said[0] == "stage one: 1 epochs"
    assert said[1].startswith(f"started from train.start {start}: ")
    assert said[2] == "stage two: 1 epochs"


def assert_weights_of(out, state):
    weights = {
        name.removeprefix("variables/"): leaf
        for name, leaf in state.items()
        if name.startswith("variables/")
    }
    bundle = bundle_lib.load_bundle(out / "weights")
    assert_identical(weights, without_leaf(bundle.variables))


def test_an_interrupted_last_validation_is_made_up_for(brief, tmp_path, monkeypatch):
    chosen, whole = brief
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("two", "weights"))
    # The second stage runs to its end, but for its last score.
    monkeypatch.setattr(validation, "_means", scoring(*DICE["two"][:-1], None))
    with pytest.raises(KeyboardInterrupt):
        run_lib.run(chosen, out, resume=True, report=lambda _: None)
    assert saved(out, "two") == [1, 2, 3]
    monkeypatch.setattr(validation, "_means", scoring(0.95))
    outcome = run_lib.run(chosen, out, resume=True, report=lambda _: None)
    assert outcome.scores["dice"] == 0.95
    assert log_of(out, "two")[-1]["validation_dice"] == "0.95"
    # It is the best by now.
    assert_weights_of(out, state_of(whole, "two", 3))
    # Nothing is scored a second time.
    monkeypatch.setattr(validation, "_means", scoring())
    run_lib.run(chosen, out, resume=True, report=lambda _: None)


# --- validation -----------------------------------------------------------------------


class HalfLabelled(synthetic.SyntheticPairs):
    """The moving scan of every second pair has no labels."""

    def __getitem__(self, index):
        pair = super().__getitem__(index)
        if index % 2:
            pair["moving_labels"] = np.zeros_like(pair["moving_labels"])
        return pair


def test_one_reader_serves_all_pairs_and_dice_is_of_those_with_labels(monkeypatch):
    chosen = tiny(loading=Loading(shape=(8, 8, 8), workers=1))
    config = dataclasses.replace(
        synthetic.TASKS["inter_mono"], shape=(8, 8, 8), labels=2
    )
    source = HalfLabelled([config], seed=3)
    readers = []

    class Counted(batches.Batches):
        def __init__(self, *args, **options):
            readers.append(options)
            # As many processes would do nothing but take time.
            loading = dataclasses.replace(args[1], workers=0)
            super().__init__(args[0], loading, **options)

    monkeypatch.setattr(validation.batches_lib, "Batches", Counted)
    model = GradIcon(chosen.model)
    variables = model.init(jax.random.key(0))
    scores = []
    for count in (1, 2, 3):
        sources = datasets.Sources(source, source, count, (0,), (1, 2))
        validate = validation.make_validation(chosen, sources, model, Layout("single"))
        assert validate is not None
        scores.append(validate(variables).scores)
    assert len(readers) == 3
    assert 0 < scores[0]["dice"] == scores[1]["dice"] != scores[2]["dice"]
    assert scores[0]["loss"] != scores[1]["loss"]


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_a_pair_without_a_finite_loss_is_no_success(spoilt):
    rows = [{"loss": 0.5, "dice": 0.9}, {"loss": spoilt}, {"loss": 0.5}]
    found = validation._of_datasets([("all", row) for row in rows], ["all"])
    means = validation._means(found)
    assert means["loss"] == math.inf
    assert means["dice"] == 0.9  # of the one pair with labels
    assert "dice_loss" not in means


def test_a_diverged_network_is_never_the_best_and_its_pairs_are_named():
    chosen = tiny(loading=Loading(shape=(8, 8, 8), prefetch=0))
    source = synthetic.SyntheticPairs(
        [synthetic.SyntheticConfig("shapes", shape=(8, 8, 8), labels=2)], 0, 4
    )
    sources = datasets.Sources(source, source, 2, (0,), (1, 2))
    model = GradIcon(chosen.model)
    validate = validation.make_validation(chosen, sources, model, Layout("single"))
    assert validate is not None
    diverged = jax.tree.map(lambda a: a * np.nan, model.init(jax.random.key(0)))
    with pytest.warns(UserWarning, match="pair 0 gives .*loss nan") as caught:
        scores = validate(diverged).scores
    assert any("pair 1" in str(warning.message) for warning in caught)
    assert not np.isfinite(scores["loss"]) and not np.isfinite(scores["dice"])


def test_validation_pairs_are_of_all_modalities_of_a_task():
    records = tuple(
        Record(pathlib.Path(f"{s}.nii"), s, "body", modality, split="val")
        for s, modality in (("a", "ct"), ("b", "mr"))
    )
    plans, _ = held_out_lib.validation_plans(
        Manifest(records, "here"), (pairs.Task("body"),),
        overrides.override(tiny(), [("data.validation_pairs", 9)]),
    )  # fmt: skip
    assert [(p.fixed.record, p.moving.record) for p in plans] == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [
        ((215, 500, 6), 16, [6, 5, 5]),
        ((215, 500, 2), 16, [7, 7, 2]),  # what one lacks the others have
        ((9, 9, 9), 2, [1, 1, 1]),  # one at least
        ((3, 1), 16, [3, 1]),
        ((7,), 5, [5]),
        ((), 5, []),
        ((9, 9), 0, [0, 0]),
    ],
)
def test_datasets_have_equal_shares(counts, total, expected):
    assert sampler.equal_shares(counts, total) == expected


def held_out(**subjects):
    """Records of the validation split: so many subjects of each dataset."""
    return tuple(
        Record(pathlib.Path(dataset, f"{i}.nii"), f"{i}", dataset, split="val")
        for dataset, count in subjects.items()
        for i in range(count)
    )


def test_small_datasets_validate_beside_large_ones():
    records = held_out(large=215, larger=500, small=6)
    tasks = tuple(pairs.Task(name) for name in ("larger", "small", "large"))
    chosen = tiny(data=DataConfig(manifests=("here",), tasks=tasks))
    plans, _ = held_out_lib.validation_plans(Manifest(records, "here"), tasks, chosen)
    count = [tasks[plan.task].dataset for plan in plans].count
    assert chosen.data.validation_pairs == 16
    assert [count(name) for name in ("large", "larger", "small")] == [6, 5, 5]
    # Spread over each, and no pair twice.
    for name, subjects in (("larger", 500), ("small", 6)):
        fixed = [
            int(records[plan.fixed.record].subject)
            for plan in plans
            if tasks[plan.task].dataset == name
        ]
        assert min(fixed) == 0 and max(fixed) >= 0.6 * subjects
    assert len({(p.fixed, p.moving) for p in plans}) == 16


def test_a_dataset_without_a_validation_pair_is_named():
    records = held_out(large=9, single=1)
    tasks = (pairs.Task("large"), pairs.Task("single"), pairs.Task("trains_whole"))
    with pytest.warns(UserWarning, match="dataset single has 1 held-out scans") as said:
        chosen = tiny(data=DataConfig(manifests=("here",), tasks=tasks))
        held_out_lib.validation_plans(Manifest(records, "here"), tasks, chosen)
    assert len(said) == 1


def test_a_score_is_the_mean_over_datasets_and_told_of_each():
    rows = [("large", {"dice": d, "loss": 1.0}) for d in (0.2, 0.4, 0.6)]
    rows += [("small", {"dice": 0.8, "loss": 3.0}), ("bare", {"loss": 5.0})]
    found = validation._of_datasets(rows, ["large", "absent", "small", "bare"])
    assert list(found) == ["large", "small", "bare"]
    assert found["large"]["dice"] == pytest.approx(0.4)
    assert found["bare"] == {"loss": 5.0}
    means = validation._means(found)
    assert means["dice"] == pytest.approx((0.4 + 0.8) / 2)  # over pairs it is 0.5
    assert means["loss"] == pytest.approx((1 + 3 + 5) / 3)


def test_every_kind_of_synthetic_pair_validates():
    chosen = tiny(data=DataConfig(synthetic=("inter_mono", "intra_mono", "inter_multi"),
                                  validation_pairs=2))  # fmt: skip
    found = datasets.make_sources(chosen)
    assert found.validation is not None and found.validation_count == 3
    names = datasets.dataset_names(found)
    numbers = range(found.validation_count)
    tasks = [names[int(found.validation[i]["task"])] for i in numbers]
    assert tasks == ["inter_mono", "intra_mono", "inter_multi"]
    chosen = overrides.override(chosen, [("data.validation_pairs", 0)])
    assert datasets.make_sources(chosen).validation is None


@pytest.fixture
def listed(tmp_path):
    """A manifest of two datasets, of which one has labels; two subjects validate."""
    path = tmp_path / "scans.csv"
    rows = ["image,subject,dataset,session,label,split"]
    for dataset in ("bare", "labelled"):
        for i in range(6):
            for visit in (1, 2):
                name = f"{dataset}/{i}_{visit}.nii"
                label = f"{dataset}/{i}_labels.nii" if dataset == "labelled" else ""
                split = "val" if i < 2 else "test" if i == 2 else "train"
                rows.append(f"{name},{i},{dataset},{visit},{label},{split}")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_dataset_without_labels_has_no_say_and_is_named(listed):
    chosen = tiny(data=DataConfig(manifests=(str(listed),)))
    found = datasets.make_sources(chosen)
    with pytest.warns(UserWarning, match="in which bare has no say"):
        assert stage_lib.metric_of(chosen, found) == "dice"
    chosen = tiny(data=chosen.data, loop=LoopConfig(metric="loss"))
    assert stage_lib.metric_of(chosen, found) == "loss"


def test_steps_of_listed_scans_can_be_kept(listed, monkeypatch):
    """What a program is kept under: files of scans and readers could not be told."""
    seen = []
    monkeypatch.setattr(parallel.lowered_cache, "kept", lambda f: seen.append(f) or f)
    chosen = tiny(
        data=DataConfig(manifests=(str(listed),)), train=TrainConfig(parallel="single")
    )
    for _ in range(2):
        found = datasets.make_sources(chosen)
        per_epoch, layout, shares = stage_lib.batch_layout(chosen)
        rule = stage_lib.make_optimizer(chosen, 10, per_epoch)
        stage_lib.make_step(chosen, found, rule, layout, shares)
        model = chosen.model.build()
        validation.make_validation(chosen, found, model, layout)
        validation.make_find_bad_pairs(chosen, found, model, layout)
    digests = [fingerprint.fingerprint(function) for function in seen]
    assert digests[:3] == digests[3:]
    assert len(set(digests)) == 3


def test_scans_that_choose_weights_are_all_of_their_subjects(listed):
    data = DataConfig(manifests=(str(listed),), validation_pairs=2)
    found = datasets.make_sources(tiny(data=data))
    assert found.validation_count == 2
    chosen = {
        metric: run_lib.validation_scans([types.SimpleNamespace(sources=found,
                                                                metric=metric)])
        for metric in ("dice", None)
    }  # fmt: skip
    # Both visits of the two subjects, of which each pair shows one; no others.
    expected = [f"{d}/{i}_{visit}.nii" for d in ("bare", "labelled")
                for i in (0, 1) for visit in (1, 2)]  # fmt: skip
    assert chosen == {"dice": expected, None: []}


@pytest.mark.parametrize("masked", [False, True])
def test_weights_say_how_their_scans_were_scaled(masked):
    loading = Loading((8, 8, 8), ct_window=(0.0, 80.0), quantile_range=(0.1, 0.9),
                      mask_inputs=masked)  # fmt: skip
    data = DataConfig(manifests=("scans.csv",))
    stored = run_lib.bundle_of(tiny(loading=loading, data=data), {})
    model = zoo.LoadedModel("known", GradIcon(), {}, stored)
    assert model.ct_window == (0.0, 80.0)
    assert model.quantile_range == (0.1, 0.9)
    assert model.mask_inputs == masked


def scans_stored_as(folder, *codes) -> datasets.Sources:
    """Sources of one scan in each orientation."""
    records = []
    for number, code in enumerate(codes):
        image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
        change = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(np.eye(4)),
            nib.orientations.axcodes2ornt(code),
        )
        path = folder / f"{number}.nii.gz"
        nib.save(image.as_reoriented(change), path)
        records.append(Record(path, str(number), "set"))
    source = pair_source.PairSource(tuple(records), held_out_lib.FixedPlans((), ()), {})
    return datasets.Sources(source, None, 0, (), ())


@pytest.mark.parametrize(
    ("codes", "start", "changes", "seen", "turned"),
    [
        (["LPS", "LPS"], None, {}, "LPS", None),
        (["LPS", "LPS"], "any", {}, "LPS", None),
        (["LPS", "LPS"], "RAS", {}, "RAS", "RAS"),
        (["RAS", "PIR", "RAS"], None, {}, "RAS", "RAS"),
        (["LPS", "PIR"], None, {"orientation": "PIR"}, "PIR", "PIR"),
        (["RAS"], None, {"canonical": True}, "RAS", None),
        (["LPS", "PIR"], None, {"axes": "spl"}, None, None),
    ],
)
def test_training_shows_scans_in_one_orientation_and_keeps_it(
    tmp_path, codes, start, changes, seen, turned
):
    data, train = DataConfig(manifests=("scans.csv",)), TrainConfig(start="weights")
    chosen = tiny(data=data, loading=Loading(shape=(8, 8, 8), **changes), train=train)
    bundle = bundle_lib.Bundle({}, "gradicon", {}, {"orientation": start}, "", "")
    bundle = bundle if start else dataclasses.replace(bundle, preprocessing={})
    known = zoo.LoadedModel("weights", GradIcon(), {}, bundle)
    stage = types.SimpleNamespace(
        sources=scans_stored_as(tmp_path, *codes), experiment=chosen
    )
    said = []
    found = run_lib._orientation(chosen, [stage], None, said.append, lambda _: known)
    assert found == seen
    assert stage.experiment.loading.orientation == (
        turned or changes.get("orientation")
    )
    assert bool(said) == (turned is not None and "orientation" not in changes)
    stored = run_lib.bundle_of(chosen, {}, stage.sources).preprocessing
    assert stored.get("orientation") == seen
    # A run that goes on keeps to what it saw, whatever is there to start from now.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "orientation.txt").write_text(f"{seen or ''}\n")
    again = run_lib._orientation(chosen, [stage], tmp_path / "out", print, None)
    assert again == seen


def test_validation_pairs_are_those_of_the_task():
    records = tuple(
        Record(pathlib.Path(f"{subject}{scan}.nii"), subject, "lungs", split="val",
               session=str(scan))
        for subject in "ab"
        for scan in (1, 2)
    )  # fmt: skip
    chosen = tiny()
    chosen = overrides.override(chosen, [("data.validation_pairs", 9)])
    found = {}
    for pairing in (None, "inter", "intra"):
        task = pairs.Task("lungs", pairing=pairing)
        plans, held_out = held_out_lib.validation_plans(
            Manifest(records, "here"), (task,), chosen
        )
        found[pairing] = {
            (held_out[p.fixed.record].image.stem, held_out[p.moving.record].image.stem)
            for p in plans
        }
    assert found[None] == found["inter"]
    assert found["inter"] == {("a1", "b1"), ("b1", "a1"), ("a2", "b2"), ("b2", "a2")}
    assert found["intra"] == {("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1")}


# --- warm starts ----------------------------------------------------------------------


def test_training_starts_from_given_weights(reference):
    chosen = tiny(train=TrainConfig(batch=2, start=str(reference / "weights")))
    chosen = overrides.override(chosen, [("model.fullres_steps", "1")])
    said = []
    model = GradIcon(chosen.model)
    start = warm_start.initial_variables(chosen, model, None, said.append)
    assert "22 arrays loaded, 0 fresh" in said[0] and "train.start" in said[0]
    loaded = bundle_lib.load_bundle(reference / "weights").variables
    assert_identical(without_leaf(start), without_leaf(loaded))


def test_weights_of_other_sizes_are_refused_by_name(reference, tmp_path):
    chosen = tiny(
        model=GradIconConfig((2, 6), (4,), downsampled_steps=0, fullres_steps=0),
        train=TrainConfig(batch=2, start=str(reference / "weights")),
    )
    with pytest.raises(UserError, match=r"down_0/bias.*channels_down") as caught:
        run_lib.run(chosen, tmp_path / "out")
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
        model=GradIconConfig((2, 8, 8), (8, 8), downsampled_steps=0, fullres_steps=0),
        data=DataConfig(manifests=(str(path),), pairs_per_epoch=10, validation_pairs=2),
        loading=Loading(shape=(12, 12, 12)),
        augment=None,
        objective=Objective(similarity="mse", inverse_consistency_weight=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        loop=LoopConfig(log_every=5, validate_every=4, image_every=4),
        stages=(Stage("one", 12),),
    )
    out = folder / "run"
    return out, path, run_lib.run(chosen, out)


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
    assert_weights_of(out, state_of(out, "one", best))
    bundle = bundle_lib.load_bundle(out / "weights")
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
    assert main.main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "t.h5").is_file()


@pytest.mark.torch
def test_what_was_trained_becomes_a_pytorch_file_and_comes_back(overfit, tmp_path):
    pytest.importorskip("torch")
    out, _, _ = overfit
    target, again = tmp_path / "x.trch", tmp_path / "again"
    assert (
        main.main(["convert", "--from", str(out / "weights"), "--to", str(target)]) == 0
    )
    assert main.main(["convert", "--from", str(target), "--to", str(again)]) == 0
    assert_identical(
        without_leaf(bundle_lib.load_bundle(again).variables),
        without_leaf(bundle_lib.load_bundle(out / "weights").variables),
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
    outcome = run_lib.run(chosen, out)
    assert "dice" not in outcome.scores and "loss" in outcome.scores
    with checkpoints.RunCheckpoints(
        out / "one" / "checkpoints", metric="loss", read_only=True
    ) as kept:
        assert kept.best_step() == 1


def test_processes_go_by_what_the_first_of_them_found(tmp_path, monkeypatch):
    def opened(*_, **__):
        raise UserError("opened")

    planned = []

    def plan_of(*rest, begun):
        planned.append((begun, run_lib._plan(*rest, begun=begun)))
        return planned[-1][1]

    # A process that is late sees what the first has just begun to write.
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "start_tasks.txt").write_text("nobody\n")
    monkeypatch.setattr(folder_lib, "open_folder", opened)
    for found in ("", "a run"):
        monkeypatch.setattr(
            folder_lib.parallel, "from_first_process", lambda _, found=found: found
        )
        with pytest.raises(UserError, match="opened"):
            run_lib.train(
                files_lib.load(CONFIG), tmp_path, plan_of, resume=True, report=print
            )
    (new, first), (old, second) = planned
    assert not new and first.records["start_tasks.txt"] == []
    assert old and second.records["start_tasks.txt"] == ["nobody"]
