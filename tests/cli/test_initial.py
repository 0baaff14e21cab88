"""``jaxreg register --initial``: what arrives, and what is refused."""

import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.cli import main
from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.registration import pair
from jaxreg.space.grid import Grid, Volume


@pytest.fixture
def words(tmp_path):
    """A good command line; its files are in the folder."""
    grid = Grid((9, 10, 11), np.eye(4)[[2, 1, 0, 3]])
    array = np.random.default_rng(0).random(grid.shape).astype(np.float32)
    for name in ("fixed", "moving"):
        volumes.write_volume(tmp_path / f"{name}.nii.gz", Volume(array, grid))
    sitk.WriteTransform(sitk.TranslationTransform(3), str(tmp_path / "start.tfm"))
    return [
        "register", "--fixed", str(tmp_path / "fixed.nii.gz"), "--moving",
        str(tmp_path / "moving.nii.gz"), "--fixed-modality", "mri",
        "--moving-modality", "mri", "--io-target", "displacement", "--initial",
        str(tmp_path / "start.tfm"), "--transform-out", str(tmp_path / "out.h5"),
    ]  # fmt: skip


def test_the_file_arrives(words, tmp_path, monkeypatch, capsys):
    seen = []

    def stop(*_, initial, **more):
        seen.append(initial)
        raise UserError("stopped")

    monkeypatch.setattr(pair, "register", stop)
    assert main.main(words) == 2
    assert capsys.readouterr().err.strip() == "jaxreg: stopped"
    assert seen == [tmp_path / "start.tfm"]


MISTAKES = {
    "both": (("--prealign", "affine"), "--initial says where to start, and --prealign"),
    "absent": (("--initial", "{folder}/none.tfm"), "--initial {folder}/none.tfm"),
    "over it": (("--transform-out", "{folder}/start.tfm"), "is also an input"),
    "many": (("--pairs", "{folder}/pairs.csv"), "is for one pair"),
    "damaged": (("--initial", "{folder}/bad.tfm"), "bad.tfm is no readable ITK"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_sentence(case, words, tmp_path, capsys):
    (tmp_path / "bad.tfm").write_text("no transform")
    before = set(tmp_path.iterdir())
    more, expected = MISTAKES[case]
    words += [word.format(folder=tmp_path) for word in more]
    assert main.main(words) == 2
    said = capsys.readouterr().err
    assert expected.format(folder=tmp_path) in said
    assert said.count("\n") == 1
    assert set(tmp_path.iterdir()) == before
