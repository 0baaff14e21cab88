"""jaxreg match: points in every frame, tables, weights and mistakes."""

import csv

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.cli import main
from jaxreg.errors import UserError
from jaxreg.models import sam
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load
from jaxreg.weights.pytorch import sam as sam_lib

SHIFT = np.array([6.0, -3.0, 10.0])
POINTS_RAS = np.array([[8.0, 20.0, 25.0], [14.0, 15.0, 30.0]])
CONFIG = {"channels": (2, 2, 3, 3), "embedding": 4, "form": "native"}
RULE = {
    **sam_lib.TABLE.preprocessing({}),
    "spacing_mm": 1.5,
    "mri_quantiles": [0.0, 0.99],
}
COMMON = ("--fixed-modality", "mri", "--moving-modality", "mri")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scans of one content, the second moved in the world, and weights."""
    folder = tmp_path_factory.mktemp("match")
    noise = np.random.default_rng(0).normal(size=(22, 30, 26))
    array = ndimage.gaussian_filter(noise, 1.5).astype(np.float32)
    affine = np.diag([1.0, 1.2, 1.5, 1.0])
    nib.save(nib.Nifti1Image(array, affine), folder / "a.nii.gz")
    affine[:3, 3] = SHIFT
    nib.save(nib.Nifti1Image(array, affine), folder / "b.nii.gz")
    config = sam.SamConfig(**CONFIG)
    variables = sam.init(config, jax.random.key(0))
    bundle = bundle_lib.Bundle(
        jax.tree.map(np.asarray, variables), "sam", CONFIG,
        RULE, "a test", "none",
    )  # fmt: skip
    bundle_lib.save_bundle(folder / "sam", bundle)
    (folder / "points.csv").write_text(
        "x,y,z,name\n"
        + "".join(f"{x},{y},{z},p{i}\n" for i, (x, y, z) in enumerate(POINTS_RAS)),
        encoding="utf-8-sig",  # as a spreadsheet saves it
    )
    (folder / "no_points.csv").write_text("a,b\n1,2\n")
    return folder


def match(folder, *options, model="mind"):
    scans = ["--fixed", f"{folder}/a.nii.gz", "--moving", f"{folder}/b.nii.gz"]
    return main.main(["match", *scans, *COMMON, "--model", model, *options])


def printed(out):
    names, *rows = (line.split("  ") for line in out.strip().splitlines())
    names = [name.strip() for name in names if name.strip()]
    return [
        dict(zip(names, (float(c) for c in row if c.strip()), strict=True))
        for row in rows
    ]


FINE = ("--spacing", "1")


@pytest.mark.parametrize("frame", ["lps", "ras", "voxel"])
def test_a_point_in_every_frame(folder, capsys, frame):
    first = POINTS_RAS[0]
    given, expected, limit = {
        "ras": (first, first + SHIFT, 1.2),
        "lps": (first * [-1, -1, 1], (first + SHIFT) * [-1, -1, 1], 1.2),
        "voxel": (first / [1, 1.2, 1.5], first / [1, 1.2, 1.5], 1.2),
    }[frame]
    point = ["--point", *(str(x) for x in given)]
    assert match(folder, *FINE, *point, "--points-frame", frame, "--cycle") == 0
    (row,) = printed(capsys.readouterr().out)
    found = [row[f"found {axis}"] for axis in "xyz"]
    np.testing.assert_allclose(found, expected, atol=limit)
    assert 0.9 < row["similarity"] <= 1 and row["cycle_mm"] < 2


def test_a_table_keeps_its_other_columns(folder, tmp_path, capsys):
    out = tmp_path / "found.csv"
    options = ["--points", f"{folder}/points.csv", "--points-frame", "ras"]
    assert match(folder, *FINE, *options, "--points-out", str(out), "--cycle") == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["x", "y", "z", "name", "similarity", "cycle_mm"]
    assert [row["name"] for row in rows] == ["p0", "p1"]
    found = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    np.testing.assert_allclose(found, POINTS_RAS + SHIFT, atol=1.2)


def test_dicom_folders_are_scans(tmp_path, capsys, dicom_series):
    noise = np.random.default_rng(0).normal(size=(14, 16, 18))
    array = (3000 * ndimage.gaussian_filter(noise, 1.5)).astype(np.int16)
    dicom_series(tmp_path, array)
    point = ["--point", "2", "21", "41"]
    scans = ["--fixed", str(tmp_path), "--moving", str(tmp_path)]
    argv = ["match", *scans, *COMMON, "--model", "mind", *FINE, *point]
    assert main.main(argv) == 0
    (row,) = printed(capsys.readouterr().out)
    np.testing.assert_allclose([row[f"found {a}"] for a in "xyz"], [2, 21, 41], atol=1)


def test_weights_of_sam_are_taken(folder, tmp_path, capsys):
    out = tmp_path / "found.csv"
    point = ["--point", "8", "20", "25", "--points-frame", "ras"]
    options = [*point, "--points-out", str(out)]
    assert match(folder, *options, model=f"{folder}/sam") == 0
    capsys.readouterr()
    with open(out, newline="") as file:
        (row,) = csv.DictReader(file)
    found = [float(row[axis]) for axis in "xyz"]
    # The same voxels, so the same embeddings: the place but for the fine grid's step.
    np.testing.assert_allclose(found, POINTS_RAS[0] + SHIFT, atol=3.0)
    assert float(row["similarity"]) > 0.9


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("mind", [], "give either --point X Y Z or --points"),
        ("mind", ["--point", "1", "2", "3", "--points", "p.csv"], "give either"),
        ("mind", ["--point", "900", "2", "3"], "lie outside the scan"),
        ("mind", ["--point", "1", "2", "3", "--spacing", "0"], "--spacing is 0"),
        ("mind", ["--point", "1", "2", "3", "--ct-window", "0", "9"], "no effect"),
        ("mind", ["--points", "{}/absent.csv"], "absent.csv"),
        ("mind", ["--points", "{}/no_points.csv"], "expected x, y and z"),
        ("mind", ["--points", "{}/points.csv", "--points-out", "o.txt"], "rename it"),
        ("{}/sam", ["--point", "1", "2", "3", "--spacing", "1"], "no effect"),
        ("{}/nowhere", ["--point", "1", "2", "3"], "there are no SAM weights at"),
        ("unigradicon", ["--point", "1", "2", "3"], "there are no SAM weights at"),
        ("{}/points.csv", ["--point", "1", "2", "3"], "another kind"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, model, options, sentence):
    filled = [text.format(folder) for text in options]
    assert match(folder, *filled, model=model.format(folder)) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize("model", ["SAM", "sam", "{}/sam"])
def test_sam_registers_nothing(folder, tmp_path, capsys, model):
    scans = ["--fixed", f"{folder}/a.nii.gz", "--moving", f"{folder}/b.nii.gz"]
    out = ["--transform-out", str(tmp_path / "t.h5")]
    given = ["--model", model.format(folder)]
    assert main.main(["register", *scans, *COMMON, *given, *out]) == 2
    said = capsys.readouterr().err
    assert "registers nothing" in said and "jaxreg match" in said
    assert said.count("\n") == 1


def test_weights_are_converted_both_ways(folder, tmp_path):
    pytest.importorskip("torch")
    file, back = tmp_path / "sam.pth", tmp_path / "back"
    assert main.main(["convert", "--from", f"{folder}/sam", "--to", str(file)]) == 0
    assert main.main(["convert", "--from", str(file), "--to", str(back)]) == 0
    one, other = (load.load_sam(path) for path in (folder / "sam", back))
    # A file of tensors does not say the spacing: it is the released code's.
    assert (one.spacing_mm, other.spacing_mm) == (1.5, 2.0)
    assert other.config.channels == one.config.channels
    a, b = (jax.tree.leaves(m.variables) for m in (one, other))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(UserError, match="registers nothing"):
        load.load(file)
