"""SAM trained from nothing but scans: runs, resumed runs, held-out loss, weights."""

import csv
import json
import pathlib

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.cli import main
from jaxreg.errors import UserError
from jaxreg.experiments import files, sam_config
from jaxreg.experiments import sam as sam_lib
from jaxreg.models import sam
from jaxreg.training import optimizer
from jaxreg.weights import bundle, load

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "hippocampus_sam.py"
SMALL = {
    "model.channels": "2,2,3,3",
    "model.embedding": "4",
    "model.form": "native",
    "views.shape": "8,16,32",
    "contrast.candidates": "40",
    "contrast.positives": "10",
    "contrast.hard": "40",
    "contrast.negatives": "20",
    "train.batch": "2",
    "train.steps": "4",
    "train.steps_per_epoch": "2",
    "data.validation_volumes": "2",
    "loop.log_every": "1",
    "loop.checkpoint_every": "1",
    "loop.keep_latest": "9",
    "optimizer.warm_up": "1",
    "loading.prefetch": "0",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for number in range(10):
        noise = np.random.default_rng(number).normal(size=(36, 30, 20))
        array = ndimage.gaussian_filter(noise, 1.5).astype(np.float32)
        nib.save(
            nib.Nifti1Image(array, np.eye(4)), folder / "images" / f"s{number}.nii.gz"
        )
    return folder


def small(data, **changes):
    values = {**SMALL, "data.manifests": str(data)}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return sam_config.override(files.load_any(CONFIG), values.items())


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    said = []
    outcome = sam_lib.run(small(data), out, report=said.append)
    return out, outcome


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_weights_that_load(trained):
    out, outcome = trained
    assert outcome.weights == out / "weights" and outcome.steps == 4
    loaded = load.load_sam(outcome.weights)
    assert loaded.config == sam.SamConfig((2, 2, 3, 3), 4, form="native")
    assert loaded.spacing_mm == 1.0
    assert loaded.ct_window == sam.HU_RANGE and loaded.quantile_range == (0.0, 0.99)
    stored = bundle.load_bundle(outcome.weights)
    assert stored.licence.startswith("CC-BY-SA 4.0")
    # Batch statistics moved.
    count = loaded.variables["batch_stats"]["backbone"]["stem"]["norm"]["count"]
    assert int(count) in (2, 4)


def test_the_held_out_loss_is_reported(trained):
    out, outcome = trained
    assert set(outcome.scores) == {"loss", "fine", "coarse"}
    assert outcome.scores["loss"] == pytest.approx(
        outcome.scores["fine"] + outcome.scores["coarse"], rel=1e-5
    )
    told = [row for row in rows(out) if row.get("validation_loss")]
    assert [int(row["step"]) for row in told] == [0, 2, 4]
    steps = [row for row in rows(out) if row.get("loss")]
    assert [int(row["step"]) for row in steps] == [1, 2, 3, 4]


def test_a_stopped_run_goes_on_as_if_it_had_not(trained, data, tmp_path, monkeypatch):
    out, _ = trained
    whole = small(data)

    class Stop(Exception):
        pass

    made = sam_lib.parallel.compile_step

    def compile_step(step, layout, **options):
        compiled = made(step, layout, **options)
        if options.get("donate") is False:
            return compiled
        calls = []

        def stopping(state, batch):
            if len(calls) == 3:
                raise Stop
            calls.append(1)
            return compiled(state, batch)

        return stopping

    with monkeypatch.context() as patched:
        patched.setattr(sam_lib.parallel, "compile_step", compile_step)
        with pytest.raises(Stop):
            sam_lib.run(whole, tmp_path / "run", report=lambda _: None)
    said = []
    sam_lib.run(whole, tmp_path / "run", resume=True, report=said.append)
    assert any(text.startswith("resumed at step") for text in said)
    a, b = (load.load_sam(o / "weights").variables for o in (out, tmp_path / "run"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_is_not_written_over_nor_resumed_with_other_settings(trained, data):
    out, _ = trained
    with pytest.raises(UserError, match="holds a run already"):
        sam_lib.run(small(data), out)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate 0\.05 -> 0\.1"):
        sam_lib.run(small(data, optimizer__learning_rate="0.1"), out, resume=True)


def test_training_starts_from_weights(trained, data):
    out, _ = trained
    fresh = sam.init(small(data).model, jax.random.key(0))
    found, said = sam_lib._started(
        small(data, train__start=str(out / "weights")), fresh
    )
    assert "arrays loaded" in " ".join(said)
    expected = load.load_sam(out / "weights").variables
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    wide = small(data, train__start=str(out / "weights"), model__channels="2,2,3,4")
    with pytest.raises(UserError, match="does not fit the network"):
        sam_lib._started(wide, sam.init(wide.model, jax.random.key(0)))


def test_a_run_stopped_before_its_first_checkpoint_still_starts_from_weights(
    trained, data, tmp_path
):
    out, _ = trained
    (tmp_path / "experiment.json").write_text("{}")
    chosen = small(data, train__start=str(out / "weights"))
    stage = sam_lib._plan(chosen, tmp_path, print, begun=True).stages[0]()
    found, _ = stage.initial(None)
    expected = load.load_sam(out / "weights").variables
    jax.tree.map(np.testing.assert_array_equal, found, dict(expected))


def test_the_arithmetic_of_a_step_grows_with_its_volumes(data, tmp_path):
    def flops(batch):
        chosen = small(data, train__batch=str(batch), data__validation_volumes="0")
        return sam_lib._plan(chosen, tmp_path, print, begun=False).stages[0]().job.flops

    assert flops(4)() == 2 * flops(2)() > 0


def test_the_released_configuration_has_its_numbers():
    chosen = files.load_any(ROOT / "configs" / "sam.py")
    assert chosen.train.steps == 20_000 and chosen.train.batch == 3
    assert chosen.views.shape == (32, 96, 96) and chosen.views.scale == (0.8, 1.2)
    assert chosen.views.blur_mm == 0 and chosen.views.spacing_mm == 2
    assert chosen.contrast.temperature == 0.5 and chosen.contrast.negatives == 500
    rule = chosen.optimizer
    assert (rule.name, rule.momentum, rule.weight_decay) == ("sgd", 0.9, 1e-4)
    rate = optimizer.make_schedule(rule, chosen.train.steps)
    np.testing.assert_allclose(rate(0), 0.02 * 0.001, rtol=1e-4)
    np.testing.assert_allclose(rate(250), 0.02 * (1 + 0.001) / 2, rtol=1e-5)
    for step in (500, 19_999):
        np.testing.assert_allclose(rate(step), 0.02, rtol=1e-5)


def options(**changes):
    values = {**SMALL, **{n.replace("__", "."): v for n, v in changes.items()}}
    return [text for name, value in values.items() for text in (f"--{name}", value)]


def test_a_dry_run_compiles_and_looks_at_the_data(data, capsys):
    given = options(data__manifests=str(data))
    status = main.main(["train", "--config", str(CONFIG), "--dry-run", *given])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "8 train, 2 val" in said.out and "parameters" in said.out
    assert "2 of 8 x 16 x 32 of each of 2 volumes" in said.out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "there are no scans to train on; give --data.manifests"),
        ({"train.batch": "1"}, "train.batch is 1, expected at least 2"),
        ({"train.batch": "9"}, "8 scans train, fewer than train.batch 9"),
        ({"data.validation_volumes": "1"}, "1 scans validate, fewer than"),
        ({"views.shape": "4,16,16"}, "fewer than two voxels of 4 x 16 x 16"),
        ({"loop.metric": "dice"}, "SAM aligns no label maps"),
        ({"contrast.temprature": "1"}, "did you mean temperature"),
        ({"train.start": "nowhere"}, "there are no SAM weights at nowhere"),
    ],
)
def test_mistakes_are_one_sentence(data, tmp_path, capsys, changes, sentence):
    values = {**SMALL, **changes}
    if changes:
        values["data.manifests"] = str(data)
    given = [text for name, value in values.items() for text in (f"--{name}", value)]
    out = tmp_path / "run"
    arguments = ["train", "--config", str(CONFIG), "--out", str(out), *given]
    assert main.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not out.exists()


def test_settings_are_recorded(trained):
    out, _ = trained
    kept = json.loads((out / "experiment.json").read_text())
    assert kept["views"]["shape"] == [8, 16, 32]
    lines = (out / "scans.txt").read_text().splitlines()
    assert sum(line.startswith("train:") for line in lines) == 8
    assert sum(line.startswith("val:") for line in lines) == 2


def test_volumes_that_validate_are_of_every_dataset(tmp_path):
    paths = []
    for dataset, count in (("large", 40), ("small", 2), ("middle", 9)):
        paths.append(tmp_path / f"{dataset}.csv")
        rows = [f"{dataset}{i}.nii,{i},ct,val" for i in range(count)]
        rows += [f"{dataset}{i}.nii,{i},ct,train" for i in range(count, count + 3)]
        paths[-1].write_text("\n".join(["image,subject,modality,split", *rows]) + "\n")
    chosen = small(",".join(map(str, paths)), train__batch="3",
                   data__validation_volumes="12")  # fmt: skip
    _, held = sam_config.records_of(chosen)
    datasets = [record.dataset for record in held]
    assert [datasets.count(n) for n in ("large", "small", "middle")] == [5, 2, 5]
