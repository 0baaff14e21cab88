"""train, evaluate, compare and data check from the command line, mistakes above all.

Every mistake must be one sentence and exit status 2, and must leave earlier checkpoints
as they were. Runs are in this process, of a network of a few hundred numbers.
"""

import csv
import json
import pathlib
import resource
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.cli import train as train_lib
from jaxreg.data import preprocess, synthetic
from jaxreg.errors import UserError
from jaxreg.evaluation import baselines, statistics
from jaxreg.experiments import config as config_lib
from jaxreg.experiments import datasets, overrides
from jaxreg.experiments import files as files_lib
from jaxreg.experiments import run as run_lib
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.registration import pair
from jaxreg.training import checkpoints
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load

TINY = """
from jaxreg.experiments.config import *
from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config():
    return Experiment(
        name="tiny",
        model=GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0),
        data=DataConfig(pairs_per_epoch=12, validation_pairs=0),
        loading=Loading(shape=(8, 8, 8), prefetch=0),
        objective=Objective(similarity="mse"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(batch=2),
        loop=LoopConfig(log_every=1, checkpoint_every=1, image_every=0, keep_latest=9),
        stages=(Stage("one", 1),),
    )
"""
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Eight labelled subjects of 10 x 11 x 12 voxels, the fifth for validation."""
    task = synthetic.SyntheticConfig("shapes", shape=(10, 11, 12), labels=2)
    folder = tmp_path_factory.mktemp("original")
    return synthetic.write_dataset(folder, task, subjects=8)


@pytest.fixture
def scans(tmp_path, original):
    """A copy of them, to be spoiled."""
    shutil.copytree(original.parent, tmp_path / "scans")
    return tmp_path / "scans" / original.name


@pytest.fixture
def train(config, tmp_path, capsys):
    """Runs ``jaxreg train`` on a folder; returns (status, stdout, stderr)."""

    def run(*options, out="run"):
        place = [] if out is None else ["--out", str(tmp_path / out)]
        status = main.main(
            ["train", "--config", str(config), *place, *map(str, options)]
        )
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def is_mistake(result, *words):
    """Checks that a run ended in one sentence that has these words; returns it."""
    status, _, error = result
    assert status == 2, error
    lines = [line for line in error.splitlines() if line.startswith("jaxreg: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def saved(out):
    with checkpoints.RunCheckpoints(
        out / "one" / "checkpoints", read_only=True
    ) as kept:
        return kept.steps()


def rows_of(manifest):
    with open(manifest, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(manifest, rows):
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def change(path, edit):
    """Rewrites a NIfTI file with other values, or on another grid."""
    image = nib.load(path)
    array = edit(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(array, image.affine), path)


def first_use(config, manifest):
    """The image that is used last of all for the first time: (its path, the step)."""
    chosen = overrides.override(
        files_lib.load(config), [("data.manifests", str(manifest))]
    )
    source = datasets.make_sources(chosen).train
    first = {}
    for index in range(2 * STEPS):
        plan = source.plan(index)
        for view in (plan.moving, plan.fixed):
            first.setdefault(source.records[view.record].image, index // 2 + 1)
    path = max(first, key=lambda p: first[p])
    assert first[path] >= 3
    return path, first[path]


# --- settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.manifests", "nowhere.csv"], ["nowhere.csv"]),
        ([], ["names no data", "--data.manifests"]),
        (["--optimizer.lerning_rate", "1"], ["did you mean learning_rate"]),
        (["--optimiser.name", "adam"], ["did you mean optimizer"]),
        (["--train.batch"], ["--train.batch has no value"]),
        (["--train.batch", "two"], ["--train.batch is 'two'", "whole number"]),
        (["somewhere.csv"], ["somewhere.csv is not understood"]),
        (["--data.synthetic", "knees"], ["knees", "inter_mono"]),
        (["--data.synthetic", "inter_mono", "--train.replicas", "3"],
         ["replicas is 3"]),
        (["--train.batch", "3", "--train.accumulate", "2", "--data.synthetic",
          "inter_mono"], ["batch is 3", "multiple of 2"]),
        (["--train.space", "2", "--data.synthetic", "inter_mono"], ["space is 2"]),
        (["--train.batch", "13", "--data.synthetic", "inter_mono"],
         ["pairs_per_epoch is 12", "train.batch 13"]),
        (["--objective.dice_weight", "-1"], ["dice_weight is -1"]),
        (["--coordinator", "localhost:1"], ["--processes", "belong together"]),
        (["--processes", "2", "--process", "1"], ["--coordinator", "belong together"]),
        (["--process", "0"], ["--coordinator", "belong together"]),
        (["--data.synthetic", "inter_mono", "--train.seed", "-1"],
         ["train.seed is -1", "at least 0"]),
        (["--data.synthetic", "inter_mono", "--data.schedule", "weighted"],
         ["data.schedule weighted", "data.synthetic"]),
        (["--data.synthetic", "inter_mono", "--loop.metric", "dice"],
         ["loop.metric is dice", "no pair validates"]),
        (["--objective.similarity_options", "sigma=2"],
         ["mse takes no option sigma", "--objective.similarity_options None"]),
        (["--data.synthetic", "inter_mono", "--profile", "0"],
         ["--profile is 0", "1 or more"]),
        (["--profile", "many"], ["profile is 'many'", "whole number"]),
        (["--data.synthetic", "inter_mono", "--profile", "10"],
         ["--profile is 10", "6 steps", "at most 3"]),
        (["--data.synthetic", "inter_mono", "--train.batch", "4", "--profile", "1"],
         ["--profile is 1", "only 3 steps"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_said_and_leave_no_folder(train, tmp_path, options, words):
    is_mistake(train(*options), *words)
    assert not (tmp_path / "run").exists()
    # The next try with better settings is not in its own way.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.replicas", "3"], ["replicas is 3"]),
        (["--train.batch", "3", "--train.accumulate", "2"], ["batch is 3"]),
        (["--train.space", "2"], ["space is 2"]),
        (["--train.batch", "13"], ["pairs_per_epoch is 12", "train.batch 13"]),
        (["--stages.one.train.batch", "13"], ["train.batch 13"]),
        (["--data.synthetic", "inter_mono", "--loading.shape", "4,4,4"],
         ["synthetic task inter_mono", "(4, 4, 4)"]),
        (["--data.synthetic", "inter_mono", "--loop.metric", "loss"],
         ["loop.metric is loss", "no pair validates"]),
        (["--profile", "2"], ["--dry-run", "--profile"]),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_training_refuses(train, options, words):
    is_mistake(train("--dry-run", *options, out=None), *words)


def test_a_dry_run_looks_into_the_data_of_every_stage(train, config, scans, original):
    two = config.with_name("two_stages.py")
    stages = (
        f"stages=(Stage('one', 1, (('data.manifests', ({str(original)!r},)),)), "
        f"Stage('two', 1, (('data.manifests', ({str(scans)!r},)),))),"
    )
    two.write_text(TINY.replace('stages=(Stage("one", 1),),', stages))
    # Of the second stage's manifest nothing trains.
    write_rows(scans, [row | {"split": "test"} for row in rows_of(scans)])
    options = ["--config", two, "--dry-run"]
    is_mistake(train(*options, out=None), "shapes", "no records")
    # A manifest that is not there yet hides nothing of the other stage.
    options = [*options, "--stages.one.data.manifests", "nowhere.csv"]
    is_mistake(train(*options, out=None), "shapes", "no records")


def test_masked_inputs_need_masks(train, scans):
    options = ["--data.manifests", scans, "--loading.mask_inputs", "true"]
    for more in ([], ["--dry-run"]):
        is_mistake(train(*options, *more), "loading.mask_inputs", "the column mask")


def test_the_best_by_dice_needs_labels_of_both_images(train, scans, tmp_path):
    options = ["--data.manifests", scans, "--data.validation_pairs", "4"]
    options += ["--loop.metric", "dice"]
    # Two subjects validate, and one of them has no labels.
    rows = rows_of(scans)
    for row in rows[:2]:
        row["split"] = "val"
    for row in rows[2:]:
        row["split"] = "train"
    rows[0]["label"] = ""
    write_rows(scans, rows)
    is_mistake(train(*options), "loop.metric is dice", "label maps of both images")
    assert not (tmp_path / "run").exists()


def test_a_manifest_without_a_split_trains_whole(scans, config):
    rows = [{k: v for k, v in row.items() if k != "split"} for row in rows_of(scans)]
    write_rows(scans, rows)
    for holdout, counts in (("None", (8, 0)), ("5", (7, 1))):
        chosen = overrides.override(
            files_lib.load(config),
            [("data.manifests", str(scans)), ("data.holdout", holdout),
             ("data.validation_pairs", "4")],
        )  # fmt: skip
        found = datasets.read_manifests(chosen)
        assert tuple(len(found.of_split(s)) for s in ("train", "val")) == counts
        sources = datasets.make_sources(chosen)
        assert len(sources.train.records) == counts[0]
        # One subject has nobody to be registered with.
        assert sources.validation is None


def test_scoring_what_chose_the_weights_is_warned_about(train, scans, tmp_path, capsys):
    rows = rows_of(scans)
    for i, row in enumerate(rows):
        row["split"] = "val" if i < 2 else "test" if i < 4 else "train"
    write_rows(scans, rows)
    options = ["--data.manifests", scans, "--data.validation_pairs", "2"]
    status, _, error = train(*options)
    assert status == 0, error
    weights = tmp_path / "run" / "weights"
    named = {f"images/{pathlib.Path(row['image']).name}" for row in rows[:2]}
    assert load.load(str(weights)).validation_scans == named
    # Weights trained from these were chosen on the same scans, and on no others.
    status, _, error = train(
        "--data.manifests", scans, "--train.start", weights, out="again"
    )
    assert status == 0, error
    again = tmp_path / "again" / "weights"
    assert load.load(str(again)).validation_scans == named
    warned = {}
    for split in ("val", "test"):
        status = main.main(
            ["evaluate", "--manifest", str(scans), "--model", str(again), "--split",
             split, "--neighbours", "1", "--out", str(tmp_path / f"{split}.csv")]
        )  # fmt: skip
        assert status == 0
        warned[split] = "weights of" in capsys.readouterr().err
    assert warned == {"val": True, "test": False}


def test_the_folder_must_be_named(train):
    is_mistake(train(out=None), "--out is missing", "--dry-run")


def test_the_configuration_must_exist(tmp_path, capsys, config):
    near = config.parent / "tinny.py"
    status = main.main(["train", "--config", str(near), "--out", str(tmp_path / "a")])
    assert status == 2
    assert "did you mean tiny.py" in capsys.readouterr().err


def test_a_wrong_column_is_said_with_the_right_one(train, tmp_path, scans):
    text = scans.read_text()
    scans.write_text(text.replace("label", "lable", 1))
    is_mistake(train("--data.manifests", scans), str(scans), "lable", "label")
    assert not (tmp_path / "run").exists()


def test_a_dice_weight_needs_labels_and_their_list(train, scans):
    options = ["--data.manifests", scans, "--objective.dice_weight", "1"]
    is_mistake(train(*options), "shapes", "--data.classes")
    rows = [{k: v for k, v in row.items() if k != "label"} for row in rows_of(scans)]
    write_rows(scans, rows)
    is_mistake(train(*options), "dataset shapes has no label", "Dice")


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        (["--a.b", "1", "--c.d=2"], [("a.b", "1"), ("c.d", "2")]),
        (["--a.b=x=y"], [("a.b", "x=y")]),
        (["--a.b", "-1"], [("a.b", "-1")]),
        ([], []),
    ],
)
def test_settings_are_read_with_and_without_an_equals_sign(arguments, pairs):
    assert train_lib.setting_pairs(arguments) == pairs


@pytest.mark.parametrize("arguments", [["a.b", "1"], ["--"], ["-x", "1"], ["--a.b"]])
def test_other_arguments_are_refused(arguments):
    with pytest.raises(UserError, match="no value|not understood"):
        train_lib.setting_pairs(arguments)


# --- the folder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(config, original, tmp_path_factory):
    """A run of six steps to its end; the others compare with it and copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    status = main.main(
        ["train", "--config", str(config), "--out", str(out),
         "--data.manifests", str(original)]
    )  # fmt: skip
    assert status == 0
    return out


def test_a_run_is_not_overwritten(train, original, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    is_mistake(train("--data.manifests", original), "holds a run already", "--resume")
    assert saved(tmp_path / "run") == (1, 2, 3, 4, 5, 6)


def test_another_folder_is_not_taken_for_a_run(train, original, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for options in ([], ["--resume"]):
        result = train("--data.manifests", original, *options)
        is_mistake(result, "exists and holds no run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_said(train, original, tmp_path):
    (tmp_path / "file").write_text("")
    is_mistake(train("--data.manifests", original, out="file/run"), "file/run")


def test_resume_with_other_settings_names_them(train, original, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    result = train(
        "--data.manifests", original, "--resume", "--optimizer.learning_rate", "0.5"
    )
    is_mistake(result, "optimizer.learning_rate 0.001 -> 0.5")
    assert saved(tmp_path / "run") == (1, 2, 3, 4, 5, 6)


def test_resume_with_another_manifest_names_the_first_difference(
    train, config, scans, tmp_path
):
    path, step = first_use(config, scans)
    aside = path.with_suffix(".aside")
    path.rename(aside)  # so that the run stops half-way
    is_mistake(train("--data.manifests", scans), str(path))
    aside.rename(path)
    rows = rows_of(scans)
    write_rows(scans, rows[1:])
    error = is_mistake(
        train("--data.manifests", scans, "--resume"), "other scans", "-> one: image"
    )
    assert rows[0]["image"] in error and rows[1]["image"] in error
    write_rows(scans, rows)
    status, said, _ = train("--data.manifests", scans, "--resume")
    assert status == 0
    assert f"resumed at step {step - 1} of 6" in said


def test_resume_where_nothing_is_starts_anew_and_says_so(train, original, finished):
    status, said, _ = train("--data.manifests", original, "--resume")
    assert status == 0
    assert "no run in" in said and "starts anew" in said
    assert "6 steps of the last stage" in said


def test_damaged_settings_of_a_run_are_said(train, original, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "experiment.json").write_text('{"name": ')
    result = train("--data.manifests", original, "--resume")
    is_mistake(result, "experiment.json")


# --- data that go wrong on the way ----------------------------------------------------


def test_an_image_that_goes_missing_in_an_epoch(train, config, scans, tmp_path):
    # Nothing looks at an image before its first pair, so this is as good as later.
    path, step = first_use(config, scans)
    aside = path.with_suffix(".aside")
    path.rename(aside)
    error = is_mistake(train("--data.manifests", scans), str(path), "[pair ")
    assert "moving" in error and "fixed" in error
    assert saved(tmp_path / "run") == tuple(range(1, step))
    assert not (tmp_path / "run" / "weights").exists()
    # Put back, the run goes on where it was.
    aside.rename(path)
    status, said, _ = train("--data.manifests", scans, "--resume")
    assert status == 0
    assert f"resumed at step {step - 1} of 6" in said
    assert (tmp_path / "run" / "weights").is_dir()


def test_an_image_with_nan_is_named(train, config, scans, tmp_path):
    path, step = first_use(config, scans)

    def spoil(array):
        array = array.astype(np.float32)
        array[2, 3, 4] = np.nan
        return array

    change(path, spoil)
    is_mistake(train("--data.manifests", scans), str(path))
    assert saved(tmp_path / "run") == tuple(range(1, step))


def test_nan_that_reaches_the_loss_names_the_pair(
    train, scans, config, monkeypatch, tmp_path
):
    # As from a fault that reading does not see, such as a damaged cache.
    path, step = first_use(config, scans)
    original = preprocess.network_image

    def spoilt(volume, *args, **options):
        image = original(volume, *args, **options).copy()
        if volume.source == str(path):
            image[0, 1, 2, 3] = np.nan
        return image

    monkeypatch.setattr(preprocess, "network_image", spoilt)
    error = is_mistake(
        train("--data.manifests", scans),
        f"at step {step} the loss is nan",
        str(path),
        f"checkpoint of step {step - 1} is good",
    )
    # One pair, not both of the batch.
    assert error.count("moving ") == 1 and "none of them alone" not in error
    assert saved(tmp_path / "run") == tuple(range(1, step))
    for leaf in leaves(tmp_path / "run", step - 1).values():
        assert np.isfinite(leaf).all()


def leaves(out, step):
    folder = out / "one" / "checkpoints"
    text = (folder / str(step) / "record" / "metadata").read_text()
    like = {
        name: jax.ShapeDtypeStruct(tuple(shape), kind)
        for name, (kind, shape) in json.loads(text)["leaves"].items()
    }
    with checkpoints.RunCheckpoints(folder, read_only=True) as kept:
        return kept.restore(like, step=step).state


def test_a_learning_rate_that_is_far_too_large(train, original, tmp_path):
    result = train("--data.manifests", original, "--optimizer.learning_rate", "1e25")
    is_mistake(result, "at step", "lower optimizer.learning_rate", "is good")
    steps = saved(tmp_path / "run")
    assert steps and steps[-1] < STEPS
    for leaf in leaves(tmp_path / "run", steps[-1]).values():
        assert np.isfinite(leaf).all()


def with_labels(scans, values):
    """The same manifest as JSON, which lists the labels."""
    data = [
        {k: row[k] for k in ("image", "label", "subject", "dataset", "split")}
        for row in rows_of(scans)
    ]
    names = {"shapes": {str(v): f"structure {v}" for v in values}}
    path = scans.with_suffix(".json")
    path.write_text(json.dumps({"data": data, "labels": names}))
    return path


def test_labels_outside_the_list(train, scans, tmp_path):
    label = scans.parent / rows_of(scans)[0]["label"]

    def spoil(array):
        array[array == 2] = 7
        return array

    change(label, spoil)
    result = train(
        "--data.manifests", with_labels(scans, [1, 2]), "--objective.dice_weight", "1"
    )
    is_mistake(result, str(label), "has labels 7", "1, 2")
    assert not (tmp_path / "run" / "weights").exists()


def test_a_label_map_on_another_grid(train, scans):
    label = scans.parent / rows_of(scans)[0]["label"]
    change(label, lambda array: array[:-1])
    result = train(
        "--data.manifests", with_labels(scans, [1, 2]), "--objective.dice_weight", "1"
    )
    is_mistake(result, str(label), "grid")


def test_images_of_different_shapes_just_work(train, scans):
    for i, row in enumerate(rows_of(scans)[:6]):
        for name in ("image", "label"):
            path = scans.parent / row[name]
            change(path, lambda array, i=i: array[: 10 - i % 3, :, i % 2 :])
    status, said, error = train("--data.manifests", scans)
    assert status == 0, error
    assert "6 steps of the last stage" in said


# --- a full disk ----------------------------------------------------------------------


def test_a_full_disk_keeps_the_checkpoints_before(
    train, original, finished, tmp_path, monkeypatch
):
    save = checkpoints.RunCheckpoints.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_from_step_4(self, step, *args, **options):
        if step == 4:
            self.wait()
            # No file may grow beyond this, as on a disk with hardly any room left.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        save(self, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.RunCheckpoints, "save", full_from_step_4)
        try:
            result = train("--data.manifests", original)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    is_mistake(result, "cannot be written", "room", "resume")
    folder = tmp_path / "run" / "one" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "3"]
    # With room again, it ends as one that never stopped.
    status, said, error = train("--data.manifests", original, "--resume")
    assert status == 0, error
    assert "resumed at step 3 of 6" in said
    one, two = leaves(tmp_path / "run", STEPS), leaves(finished, STEPS)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


# --- the other verbs ------------------------------------------------------------------


def test_data_check_counts_what_is_there(original, capsys):
    assert main.main(["data", "check", str(original)]) == 0
    said = capsys.readouterr().out
    assert "8 images: 7 train, 1 val, 0 test" in said


def test_data_check_reports_every_problem(scans, capsys):
    rows = rows_of(scans)
    (scans.parent / rows[0]["image"]).unlink()
    change(scans.parent / rows[1]["label"], lambda array: array[:-1])
    assert main.main(["data", "check", str(scans)]) == 2
    said = capsys.readouterr()
    assert rows[0]["image"] in said.out and rows[1]["label"] in said.out
    assert "2 problems" in said.err


def test_data_check_of_nothing(tmp_path, capsys):
    assert main.main(["data", "check", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scored(original, tmp_path_factory):
    """Rows of the validation pairs for two sets of weights, by the command line."""
    folder = tmp_path_factory.mktemp("scored")
    rows = rows_of(original)
    for row in rows:
        for name in ("image", "label"):
            row[name] = str(original.parent / row[name])
        row["split"] = "val" if int(row["subject"][-1]) < 4 else "train"
    write_rows(folder / "manifest.csv", rows)
    model = GradIcon(GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0))
    rng = np.random.default_rng(0)
    for name, size in (("identity", 0), ("random", 0.02)):
        variables = jax.tree_util.tree_map_with_path(
            lambda path, a, size=size: (
                np.asarray(rng.uniform(-size, size, a.shape), np.float32)
                if path[-2].key == "last"
                else np.asarray(a)
            ),
            model.init(jax.random.key(0)),
        )
        bundle = run_lib.bundle_of(
            overrides.override(
                config_lib.Experiment(name="x", stages=(config_lib.Stage("one", 1),)),
                [("model.channels_down", "2,4"), ("model.channels_up", "4"),
                 ("model.downsampled_steps", "0"), ("model.fullres_steps", "0"),
                 ("loading.shape", "8,8,8")],
            ),
            variables,
        )  # fmt: skip
        bundle_lib.save_bundle(folder / name, bundle)
        status = main.main(
            ["evaluate", "--manifest", str(folder / "manifest.csv"), "--model",
             str(folder / name), "--neighbours", "1", "--name", name, "--out",
             str(folder / f"{name}.csv")]
        )  # fmt: skip
        assert status == 0
    return folder


def test_evaluate_writes_rows_and_a_table(scored):
    rows = rows_of(scored / "identity.csv")
    methods = ("initial", "initial, resized", "identity")
    dice = {m: [float(r["dice"]) for r in rows if r["method"] == m] for m in methods}
    # Three subjects, each the fixed image for the next.
    assert len(rows) == 9 and [len(values) for values in dice.values()] == [3, 3, 3]
    # What a fresh network does is to lay one image's box on the other's.
    np.testing.assert_allclose(dice["identity"], dice["initial, resized"], atol=1e-6)
    table = (scored / "identity.md").read_text()
    assert "identity" in table and "Dice" in table


def test_compare_tests_two_results(scored, capsys):
    files = [str(scored / "identity.csv"), str(scored / "random.csv")]
    options = ["--method-a", "identity", "--method-b", "random"]
    assert main.main(["compare", *files, *options]) == 0
    said = capsys.readouterr().out
    assert "3 pairs" in said and "p" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "r.csv"], "--pairs or --manifest"),
        (["--out", "r.csv", "--manifest", "a.csv"], "--model"),
        (["--manifest", "a.csv", "--model", "x"], "--out"),
        (["--out", "r.csv", "--manifest", "a.csv", "--model", "unigradicom"], "a.csv"),
        (["--out", "r.csv", "--manifest", "a.csv", "--others", "elastix"], "elastix"),
    ],
)
def test_evaluate_says_what_is_missing(arguments, words, capsys):
    assert main.main(["evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_evaluate_of_an_unknown_model_or_split(scored, tmp_path, capsys):
    table = str(scored / "manifest.csv")
    base = ["evaluate", "--manifest", table, "--out", str(tmp_path / "r.csv")]
    assert main.main([*base, "--model", "unigradicom"]) == 2
    assert "unigradicon" in capsys.readouterr().err
    assert main.main([*base, "--model", str(scored / "random"), "--split", "vall"]) == 2
    assert "vall" in capsys.readouterr().err


@pytest.fixture
def evaluated(scored, tmp_path, capsys, monkeypatch):
    """Runs ``jaxreg evaluate`` on one pair; returns (status, stdout, stderr, options).

    The options are those of the last registration. `columns` are of the pairs file.
    """
    asked = []
    original = pair.register

    def noting(moving, fixed, model, options, **rest):
        asked.append(options)
        return original(moving, fixed, model, options, **rest)

    monkeypatch.setattr(pair, "register", noting)
    scans = [row["image"] for row in rows_of(scored / "manifest.csv")]

    def run(*arguments, **columns):
        cells = {"fixed": scans[0], "moving": scans[1], **columns}
        write_rows(tmp_path / "pairs.csv", [cells])
        status = main.main(
            ["evaluate", "--pairs", str(tmp_path / "pairs.csv"), "--out",
             str(tmp_path / "r.csv"), "--model", str(scored / "random"), *arguments]
        )  # fmt: skip
        said = capsys.readouterr()
        return status, said.out, said.err, asked[-1] if asked else None

    return run


@pytest.mark.parametrize(("text", "steps"), [("None", None), ("none", None), ("1", 1)])
def test_evaluate_takes_iterations_as_register_does(evaluated, text, steps):
    status, _, error, options = evaluated("--io-iterations", text, "--shape", "8")
    assert status == 0, error
    assert options.io_iterations == steps
    assert options.shape == (8, 8, 8)


def test_evaluate_takes_the_options_of_register(evaluated, scored):
    mask = rows_of(scored / "manifest.csv")[0]["label"]
    status, _, error, options = evaluated(
        "--fixed-modality", "CT", "--moving-modality", "mri", "--input-masking",
        "--io-target", "displacement", "--io-iterations", "1", "--seed", "3",
        "--ct-window", "0", "900", fixed_mask=mask,
    )  # fmt: skip
    assert status == 0, error
    assert (options.fixed_modality, options.moving_modality) == ("ct", "mri")
    assert (options.io_target, options.seed) == ("displacement", 3)
    assert options.ct_window == (0, 900)
    assert options.input_masking and not options.loss_function_masking
    assert "modality" not in error


def test_evaluate_warns_of_pairs_without_a_modality(evaluated):
    status, _, error, options = evaluated("--fixed-modality", "ct")
    assert status == 0
    assert (options.fixed_modality, options.moving_modality) == ("ct", "auto")
    assert "1 of 1 pairs name no modality" in error
    _, _, error, options = evaluated(fixed_modality="ct", moving_modality="ct")
    assert options.moving_modality == "ct"
    assert "no modality" not in error


@pytest.mark.parametrize("labels", ["1,x", "0", "", "1;2", "-1"])
def test_evaluate_says_which_labels_it_wants(evaluated, labels):
    result = evaluated(f"--labels={labels}")
    is_mistake(result[:3], f"--labels is {labels}, expected positive whole numbers")


def test_evaluate_reads_landmarks_in_the_frame_that_is_asked_for(evaluated, tmp_path):
    for side in ("fixed", "moving"):
        (tmp_path / f"{side}.csv").write_text("x,y,z\n11,9,8\n")
    points = {
        f"{side}_landmarks": str(tmp_path / f"{side}.csv")
        for side in ("fixed", "moving")
    }
    known = ["--fixed-modality", "mri", "--moving-modality", "mri"]
    result = evaluated(*known, **points)
    is_mistake(
        result[:3], "1 of 1 points", "fixed.csv", "read as lps", "--landmarks-frame"
    )
    status, _, error, _ = evaluated("--landmarks-frame", "voxel", *known, **points)
    assert status == 0, error
    initial = rows_of(tmp_path / "r.csv")[0]
    assert float(initial["tre_mm"]) < 20


def test_evaluate_goes_on_after_a_pair_that_fails_and_says_so(
    evaluated, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "load", lambda name: None)

    def fail(moving, fixed):
        raise UserError("the tool is tired")

    monkeypatch.setattr(baselines, "TOOLS", {"SyN": fail})
    monkeypatch.setattr(baselines, "check_installed", lambda tools: None)
    status, said, error, _ = evaluated("--others", "SyN")
    assert status == 2
    assert "SyN failed: the tool is tired" in error
    assert "1 of 3 rows failed" in error.splitlines()[-1]
    assert "| initial |" in said
    assert [row["method"] for row in rows_of(tmp_path / "r.csv")][-1] == "SyN"


def test_the_metrics_that_compare_names_are_those_that_it_takes(capsys):
    assert main.main(["compare", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in statistics.MEASURES:
        assert name in said


def test_compare_of_a_file_that_is_not_there(scored, capsys):
    status = main.main(["compare", str(scored / "identity.csv"), "nothing.csv"])
    assert status == 2
    assert "nothing.csv" in capsys.readouterr().err


def test_jaxreg_says_what_it_does(capsys):
    assert main.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--config", "--out", "--resume", "--dry-run", "--distributed"):
        assert option in said
    assert pathlib.Path(train_lib.__file__).exists()
