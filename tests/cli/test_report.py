"""The verb ``jaxreg report``: pages of transforms that other tools made."""

import pathlib

import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.cli import main
from jaxreg.io import volumes
from jaxreg.space.grid import Grid, Volume

SHAPE = (12, 14, 16)


def place(shape=SHAPE) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * 2.0
    return Grid(shape, affine)


def blob(shift: int) -> np.ndarray:
    d, h, w = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    away = (d - 6) ** 2 + (h - 7) ** 2 + (w - 7 - shift) ** 2
    return (1000 * np.exp(-away / 12.0)).astype(np.int16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Scans 4 mm apart along x, their labels, and transforms made by SimpleITK."""
    folder = tmp_path_factory.mktemp("inputs")
    files = {}
    for name, array in (
        ("fixed", blob(0)),
        ("moving", blob(2)),
        ("fixed_labels", (blob(0) > 300).astype(np.uint8)),
        ("moving_labels", (blob(2) > 300).astype(np.uint8)),
    ):
        files[name] = str(folder / f"{name}.nii.gz")
        volumes.write_volume(files[name], Volume(array, place()))
    shift = sitk.TranslationTransform(3, (-4.0, 0.0, 0.0))  # LPS: 4 mm to the right
    for name, transform in (
        ("good.tfm", shift),
        ("good.h5", sitk.CompositeTransform([sitk.AffineTransform(3), shift])),
        ("back.tfm", shift.GetInverse()),
        ("mirrored.tfm", sitk.ScaleTransform(3, (-1.0, 1.0, 1.0))),
    ):
        files[name] = str(folder / name)
        sitk.WriteTransform(transform, files[name])
    image = sitk.ReadImage(files["fixed"])
    field = sitk.TransformToDisplacementField(
        shift, sitk.sitkVectorFloat64, image.GetSize(), image.GetOrigin(),
        image.GetSpacing(), image.GetDirection(),
    )  # fmt: skip
    files["good.nrrd"] = str(folder / "good.nrrd")
    sitk.WriteImage(field, files["good.nrrd"])
    files["missing"] = str(folder / "missing.h5")
    return files


def line(inputs, transform, out, *more) -> list[str]:
    scans = ["--fixed", inputs["fixed"], "--moving", inputs["moving"]]
    return ["report", inputs[transform], *scans, "--report", str(out), *more]


def number(said: str, name: str) -> float:
    (row,) = (row for row in said.splitlines() if row.startswith(f"{name}  "))
    return float(row.removeprefix(name).split()[0])


@pytest.mark.parametrize("transform", ["good.tfm", "good.h5", "good.nrrd"])
def test_a_good_transform_of_any_format(transform, inputs, tmp_path, capsys):
    out = tmp_path / "r.html"
    labels = ("--fixed-segmentation", inputs["fixed_labels"])
    labels += ("--moving-segmentation", inputs["moving_labels"])
    assert main.main(line(inputs, transform, out, *labels)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert number(captured.out, "displacement") == pytest.approx(4.0, abs=0.01)
    assert number(captured.out, "folded voxels") == 0
    before, after = (
        number(captured.out, f"mutual information loss {when}")
        for when in ("before", "after")
    )
    assert after < before - 0.02
    assert "1.0000 after" in captured.out
    page = out.read_text()
    for words in (
        inputs[transform],
        "jaxreg report",
        '"labels_fixed":"',
        "No warnings",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("transform", "words"),
    [("back.tfm", "start is better than the end"), ("mirrored.tfm", "mirrors")],
)
def test_doubts_are_printed_and_on_the_page(transform, words, inputs, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main.main(line(inputs, transform, out)) == 0
    said = capsys.readouterr().err
    assert all(row.startswith("jaxreg: warning: ") for row in said.splitlines())
    assert words in said
    assert words in out.read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transform": "missing"}, "missing.h5"),
        ({"transform": "fixed"}, "fixed.nii.gz"),
        ({"--fixed": "missing"}, "missing.h5"),
        ({"--report": "r.pdf"}, "--report"),
        ({"--report": None}, "--report"),
        ({"--moving": None}, "--moving"),
        ({"--fixed-segmentation": "fixed_labels"}, "--moving-segmentation"),
        ({"--moving-modality": "xray"}, "--moving-modality"),
        ({"--fill": "air"}, "--fill"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    changes, named, inputs, tmp_path, capsys
):
    options = {"transform": "good.tfm", "--fixed": "fixed", "--moving": "moving"}
    options |= {"--report": "r.html", **changes}
    argv = ["report"]
    for name, value in options.items():
        if value is None:
            continue
        if name == "--report":
            value = str(tmp_path / value)
        value = inputs.get(value, value)
        argv += [value] if name == "transform" else [name, value]
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("jaxreg: ")
    assert named in sentence
    assert captured.out == ""
    assert not list(pathlib.Path(tmp_path).iterdir())
