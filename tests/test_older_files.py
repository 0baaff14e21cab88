"""What the version before left on disk is read, and gives the numbers that it gave.

`golden/older/` holds checkpoints of every network, an unfinished run, tables and a
transform, written by `golden/generate_older.py`; and every folder of `weights/`.
"""

import csv
import pathlib
import shutil
import zipfile

import jax
import nibabel as nib
import numpy as np
import pytest

from jaxreg.cli import main as cli
from jaxreg.weights import bundle

REPOSITORY = pathlib.Path(__file__).parents[1]
WEIGHTS = REPOSITORY / "weights"
# Rounding of float32, in another order of sums, over an extent of 30 mm.
WITHIN_MM = 1e-6 * 30
MRI = "--fixed-modality mri --moving-modality mri"
CT = "--fixed-modality ct --moving-modality ct"
TASK = "--task chest --pairing inter"
# What `generate_older.py` wrote as "run", with which options.
RUN = (
    "--train.batch 1 --data.pairs_per_epoch 2 --loading.shape 16,16,16 "
    "--loading.prefetch 0 --loop.image_every 0 --loop.log_every 1 "
    "--loop.checkpoint_every 1 --data.validation_pairs 0 "
    "--model.channels_down 2,4 --model.channels_up 4 --model.halvings 0 "
    "--model.refinements 1 --data.synthetic inter_mono --data.synthetic_labels 2 "
    "--optimizer.name sgd --optimizer.learning_rate 1e-3 --stages.stage_1.epochs 3"
)


@pytest.fixture
def folder(golden_path, tmp_path, monkeypatch):
    """A copy of these files, archives unpacked, as the working directory."""
    older = golden_path / "older"
    if not older.is_dir():
        pytest.skip(f"no folder older in {golden_path}")
    for path in older.iterdir():
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(tmp_path / path.stem)
        else:
            shutil.copy(path, tmp_path)
    (tmp_path / "weights").symlink_to(WEIGHTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jaxreg(line):
    assert cli.main(line.split()) == 0


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_close(path, expected, *, ignoring=("seconds",)):
    """Compares two tables, numbers but for rounding."""
    got, wanted = rows(path), rows(expected)
    assert len(got) == len(wanted) and list(got[0]) == list(wanted[0])
    for one, other in zip(got, wanted, strict=True):
        for name in one:
            if any(word in name for word in ignoring):
                continue
            try:
                a, b = float(one[name]), float(other[name])
            except ValueError:
                assert one[name] == other[name], name
            else:
                assert a == pytest.approx(b, rel=1e-3, abs=2e-3, nan_ok=True), name


PREDICTIONS = {
    "gradicon": f"--model gradicon {MRI}",
    "promptreg": f"--model promptreg {MRI}",
    "rdp": f"--model rdp {MRI}",
    # With the smoothness that `tune-lambda --write` stored.
    "unireg_rpn": f"--model unireg_rpn {MRI} {TASK}",
    "unireg": f"--model unireg {CT} {TASK}",
    "hippocampus_gradicon": f"--model weights/hippocampus_gradicon --shape 16 {MRI}",
    "hippocampus_gradicon_dice": (
        f"--model weights/hippocampus_gradicon_dice --shape 16 {MRI}"
    ),
    "hippocampus_promptreg": f"--model weights/hippocampus_promptreg --shape 16 {MRI}",
}


@pytest.mark.golden
@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_checkpoint_predicts_what_it_did(name, folder):
    jaxreg(
        "register --fixed fixed.nii.gz --moving moving.nii.gz --io-iterations None "
        f"--transform-out now.nii.gz {PREDICTIONS[name]}"
    )
    with np.load(folder / "predictions.npz") as stored:
        before = stored[name]
    now = np.asarray(nib.load(folder / "now.nii.gz").dataobj)[::2, ::2, ::2]
    assert np.abs(before).max() > 0.01
    np.testing.assert_allclose(now, before, rtol=0, atol=WITHIN_MM)


@pytest.mark.golden
@pytest.mark.parametrize("model", ["sam", "weights/hippocampus_sam"])
def test_sam_finds_the_points_that_it_did(model, folder):
    jaxreg(
        f"match --fixed fixed.nii.gz --moving moving.nii.gz {MRI} --model {model} "
        "--points points.csv --points-out now.csv"
    )
    assert_close("now.csv", f"{pathlib.Path(model).name}.csv")


def test_every_folder_of_weights_is_among_them():
    tested = {name for name in PREDICTIONS if name.startswith("hippocampus")}
    tested.add("hippocampus_sam")
    assert {path.name for path in WEIGHTS.iterdir() if path.is_dir()} == tested


@pytest.mark.golden
def test_an_unfinished_run_goes_on(folder, capsys):
    config = REPOSITORY / "configs" / "demo.py"
    jaxreg(f"train --config {config} --out run --resume {RUN}")
    assert "resumed at step 5 of 6" in capsys.readouterr().out
    variables = bundle.load_bundle(folder / "run" / "weights").variables
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    now = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    with np.load(folder / "run_end.npz") as stored:
        assert set(now) == set(stored.files)
        for name in stored.files:
            np.testing.assert_allclose(now[name], stored[name], rtol=1e-4, atol=1e-6)


@pytest.mark.golden
def test_a_list_with_options_of_its_own(folder):
    """Modalities, region and pairing are columns of it."""
    jaxreg(
        "register --pairs pairs.csv --model unireg_rpn --io-iterations None "
        "--summary now.csv"
    )
    assert_close("now.csv", "summary.csv", ignoring=("second", "transform"))
    with np.load(folder / "predictions.npz") as stored:
        before = stored["unireg_rpn"]
    now = np.asarray(nib.load(folder / "listed.nii.gz").dataobj)[::2, ::2, ::2]
    np.testing.assert_allclose(now, before, rtol=0, atol=WITHIN_MM)


@pytest.mark.golden
def test_an_evaluation_gives_the_table_that_it_gave(folder):
    jaxreg("evaluate --pairs pairs.csv --model unireg_rpn --out now.csv")
    assert_close("now.csv", "results.csv")


@pytest.mark.golden
def test_tables_of_an_evaluation_and_of_tuning_are_compared(folder, capsys):
    jaxreg("compare results.csv other.csv --method-a unireg_rpn --method-b gradicon")
    assert "gradicon" in capsys.readouterr().out
    tried = sorted({row["method"] for row in rows("lambda.csv")} - {"initial"})
    argv = ["compare", "lambda.csv", "lambda.csv", "--method-a", tried[-2],
            "--method-b", tried[-1]]  # fmt: skip
    assert cli.main(argv) == 0
    assert tried[-1] in capsys.readouterr().out


@pytest.mark.golden
def test_a_transform_maps_points_as_it_did(folder):
    jaxreg("warp --transform transform.h5 --points points.csv --points-out now.csv")
    assert_close("now.csv", "mapped.csv")


@pytest.mark.golden
def test_a_manifest_is_found_whole(folder, capsys):
    for name in ("fixed", "moving"):
        assert (folder / f"{name}_labels.nii.gz").exists()
    cli.main(["data", "check", "manifest.csv"])
    assert "4 images: 2 train, 2 val, 0 test" in capsys.readouterr().out
