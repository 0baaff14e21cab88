"""``jaxreg labels`` on shifted shapes: given transforms, registrations, mistakes."""

import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.cli import main, progress
from jaxreg.io import volumes
from jaxreg.space.grid import Grid, Volume

SHAPE = (14, 16, 18)
GRID = Grid(SHAPE, np.eye(4)[[2, 1, 0, 3]])


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    monkeypatch.setattr(progress.Bar, "step", None)


def shapes(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """A scan of two balls, and its labels, moved along x."""
    d, h, w = np.indices(SHAPE)
    first = np.sqrt((d - 6) ** 2 + (h - 6) ** 2 + (w - 6 - shift) ** 2)
    second = np.sqrt((d - 7) ** 2 + (h - 11) ** 2 + (w - 11 - shift) ** 2)
    image = 100 * np.exp(-(first**2) / 12) + 60 * np.exp(-(second**2) / 8)
    labels = np.where(first < 3.2, 4, np.where(second < 2.6, 9, 0))
    return image.astype(np.float32), labels.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    for name, shift in (("fixed", 0), ("a", 2), ("b", -1)):
        image, labels = shapes(shift)
        volumes.write_volume(folder / f"{name}.nii.gz", Volume(image, GRID))
        volumes.write_volume(folder / f"{name}_labels.nii.gz", Volume(labels, GRID))
        # Fixed to moving points: x of the array is x of RAS, -x of LPS.
        there = sitk.TranslationTransform(3, (-float(shift), 0.0, 0.0))
        sitk.WriteTransform(there, str(folder / f"{name}.tfm"))
    other = Grid(SHAPE, np.diag([2.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]])
    volumes.write_volume(folder / "other.nii.gz", Volume(shapes(0)[1], other))
    return folder


def run(folder, out, moving="a", *more) -> int:
    names = moving.split(",")
    return main.main(
        [
            "labels", "--fixed", f"{folder}/fixed.nii.gz", "--moving",
            ",".join(f"{folder}/{n}.nii.gz" for n in names), "--moving-segmentation",
            ",".join(f"{folder}/{n}_labels.nii.gz" for n in names),
            "--fixed-modality", "mri", "--moving-modality", "mri",
            "--segmentation-out", str(out), *(w.format(folder=folder) for w in more),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("names", ["a", "a,b"])
def test_given_transforms_bring_the_labels_exactly(names, folder, tmp_path, capsys):
    out = tmp_path / "out.nii.gz"
    given = ",".join(f"{folder}/{name}.tfm" for name in names.split(","))
    truth = "{folder}/fixed_labels.nii.gz"
    assert run(folder, out, names, "--transform", given, "--truth", truth) == 0
    found = volumes.read_volume(out, kind="labels")
    np.testing.assert_array_equal(found.array, shapes(0)[1])
    assert found.array.dtype == np.uint8
    said = capsys.readouterr().out
    for row in ("Dice of label 4  1.0000", "Dice of label 9  1.0000", "mean Dice"):
        assert row in said


def test_scans_are_registered_where_no_transform_is_given(folder, tmp_path, capsys):
    out = tmp_path / "out.nii.gz"
    assert run(
        folder, out, "a", "--model", "none", "--prealign", "centre",
        "--io-iterations", "None", "--truth", "{folder}/fixed_labels.nii.gz",
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    mean = float(said.split("mean Dice")[1].split()[0])
    assert mean > 0.85  # unmoved: 0.47


MISTAKES = {
    "counts": (("--transform", "{folder}/a.tfm,{folder}/b.tfm"), "names 2 files for 1"),
    "model as well": (
        ("--transform", "{folder}/a.tfm", "--model", "none"), "leave one of the two",
    ),
    "truth elsewhere": (
        ("--transform", "{folder}/a.tfm", "--truth", "{folder}/other.nii.gz"),
        "truth {folder}/other.nii.gz",
    ),
    "labels elsewhere": (
        ("--transform", "{folder}/a.tfm", "--moving-segmentation",
         "{folder}/other.nii.gz"),
        "segmentation {folder}/other.nii.gz",
    ),
    "over an input": (
        ("--segmentation-out", "{folder}/a_labels.nii.gz"), "is also an input",
    ),
    "no such file": (("--moving", "{folder}/c.nii.gz"), "c.nii.gz"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_sentence_and_leaves_nothing(case, folder, tmp_path, capsys):
    more, expected = MISTAKES[case]
    assert run(folder, tmp_path / "out.nii.gz", "a", *more) == 2
    said = capsys.readouterr().err
    assert expected.format(folder=folder) in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
