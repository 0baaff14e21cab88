"""What a result offers in Python: the warped scan, pictures, files, one line."""

import base64
import dataclasses
import gzip
import pickle
import re
import sys
import types

import matplotlib.figure
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import jaxreg
from jaxreg.cli import main
from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import pair as pair_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo

GRID = (10, 9, 8)
OPTIONS = jaxreg.Options(
    fixed_modality="mri", moving_modality="ct", shape=GRID, io_iterations=None
)
CALLS = (
    "--model",
    "unigradicon",
    "--fixed-modality",
    "mri",
    "--moving-modality",
    "ct",
    "--shape",
    "10,9,8",
)


@dataclasses.dataclass(frozen=True)
class Bending(RegistrationModel):
    """A stand-in for a network: a displacement that depends on both images."""

    def apply(self, variables, moving, fixed, **_):
        return Prediction(
            Transform((Displacement(0.2 * (moving - fixed).repeat(3, -1)),))
        ), {}


def loaded() -> zoo.LoadedModel:
    rule = {"shape": list(GRID), "orientation": "any"}
    bundle = bundle_lib.Bundle({}, "gradicon", {}, rule, "a test", "none")
    return zoo.LoadedModel("bending", Bending(), {}, bundle)


def volume(shape, spacing, dtype, low, high) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * spacing
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    away = ((index / np.asarray(shape) - 0.45) ** 2).sum(-1)
    array = low + (high - low) * np.exp(-8 * away)
    return Volume(np.rint(array).astype(dtype), Grid(shape, affine))


@pytest.fixture
def paths(tmp_path):
    """A fixed MR, and a moving CT of int16 on another grid."""
    moving = volume((14, 12, 13), (1.5, 1.2, 1.0), np.int16, -1000, 400)
    volumes.write_volume(tmp_path / "moving.nii.gz", moving)
    fixed = volume((11, 15, 12), (1.7, 1.0, 1.1), np.int16, 0, 900)
    volumes.write_volume(tmp_path / "fixed.nii.gz", fixed)
    return tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz"


@pytest.fixture
def result(paths):
    return pair_lib.register(*paths, loaded(), OPTIONS)


def test_warped_is_the_file_of_the_command_line(paths, result, tmp_path, monkeypatch):
    """To the bit and in the moving scan's type, however the scan was given."""
    monkeypatch.setattr(load, "load", lambda *_, **__: loaded())
    out = tmp_path / "warped.nii.gz"
    argv = ["register", "--moving", str(paths[0]), "--fixed", str(paths[1]), *CALLS]
    more = ["--io-iterations", "None", "--warped-moving-out", str(out)]
    assert main.main([*argv, *more]) == 0
    expected = volumes.read_volume(out, kind="stored")
    assert expected.array.dtype == np.int16
    assert len(np.unique(expected.array)) > 20
    kinds = (
        nib.load(paths[0]),
        sitk.ReadImage(str(paths[0])),
        volumes.read_volume(paths[0], kind="stored"),
    )
    others = [pair_lib.register(kind, paths[1], loaded(), OPTIONS) for kind in kinds]
    for found in (result, *others):
        assert found.warped.array.dtype == np.int16
        np.testing.assert_array_equal(found.warped.array, expected.array)
        assert found.warped.grid.matches(expected.grid)
    assert result.warped is result.warped
    still = dataclasses.replace(result, transform=Transform(()))
    assert not np.array_equal(still.warped.array, expected.array)


def test_niivue_has_both_scans_where_it_is_installed(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)  # an import that fails
    with pytest.raises(UserError, match="pip install ipyniivue"):
        result.niivue()
    shown = []

    class NiiVue:
        def load_volumes(self, volumes):
            shown.extend(volumes)

    monkeypatch.setitem(sys.modules, "ipyniivue", types.SimpleNamespace(NiiVue=NiiVue))
    assert isinstance(result.niivue(), NiiVue)
    fixed, warped = (
        nib.Nifti1Image.from_bytes(gzip.decompress(each["data"])) for each in shown
    )
    np.testing.assert_allclose(fixed.affine, warped.affine)
    assert all(each["name"].endswith(".nii.gz") for each in shown)
    # NIfTI's first axis is the volume's last.
    np.testing.assert_array_equal(
        np.asarray(warped.dataobj), result.warped.array.transpose()
    )


def test_saved_files_are_those_of_the_command_line(
    paths, result, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "load", lambda *_, **__: loaded())
    names = {
        "transform": "t.nii.gz",
        "warped": "w.nii.gz",
        "inverse": "i.h5",
        "report": "r.html",
    }
    options = ("--transform-out", "--warped-moving-out", "--inverse-out", "--report")
    for folder in ("line", "python"):
        (tmp_path / folder).mkdir()
    argv = ["register", "--moving", str(paths[0]), "--fixed", str(paths[1]), *CALLS]
    for option, name in zip(options, names.values(), strict=True):
        argv += [option, str(tmp_path / "line" / name)]
    assert main.main([*argv, "--io-iterations", "None"]) == 0
    saved = result.save(
        **{key: tmp_path / "python" / name for key, name in names.items()}
    )
    assert {p.name for p in (tmp_path / "python").iterdir()} == set(names.values())
    for name in ("t.nii.gz", "w.nii.gz"):
        one, other = (nib.load(tmp_path / f / name) for f in ("line", "python"))
        np.testing.assert_array_equal(one.dataobj, other.dataobj)
        assert one.get_data_dtype() == other.get_data_dtype()
    points = np.array([[[1.0, 2.0, 3.0], [9.0, 5.0, 6.0]]])
    one, other = (
        transforms.read_transform(tmp_path / f / "i.h5") for f in ("line", "python")
    )
    np.testing.assert_array_equal(one.map_points(points), other.map_points(points))
    images = [
        re.findall('base64,[^"]*', (tmp_path / f / "r.html").read_text())
        for f in ("line", "python")
    ]
    assert images[0] == images[1]
    # What was written is measured: a field is another map between its voxels.
    assert saved.inverse_residual_mm != result.inverse_residual_mm


def test_what_cannot_be_saved_leaves_nothing(paths, result, tmp_path):
    before = set(tmp_path.iterdir())
    for files, sentence in (
        ({}, "nothing to save; give transform, warped, inverse, report"),
        ({"transform": "t.png"}, "^transform .*t.png has the extension .png"),
        ({"transform": "t.h5", "warped": "w.jpg"}, "^warped .*w.jpg has the extension"),
        ({"transform": "t.h5", "report": "r.pdf"}, "expected .html; rename it"),
        ({"transform": "t.h5", "inverse": "t.h5"}, "is also transform; name another"),
        ({"warped": "moving.nii.gz"}, "is also an input"),
        ({"warped": "no/such/w.nii.gz"}, "no/such"),
    ):
        with pytest.raises(UserError, match=sentence):
            result.save(**{key: tmp_path / name for key, name in files.items()})
    with pytest.raises(UserError, match=r"no inverse to save; .*inverse=True"):
        dataclasses.replace(result, inverse=None).save(inverse=tmp_path / "i.h5")
    with pytest.raises(UserError, match="no scans"):
        dataclasses.replace(result, scans=None).save(transform=tmp_path / "t.h5")
    assert set(tmp_path.iterdir()) == before


def test_a_moving_scan_that_is_gone_is_a_sentence(paths, result):
    paths[0].unlink()
    with pytest.raises(UserError, match=re.escape(str(paths[0]))):
        _ = result.warped


def test_a_notebook_shows_a_small_picture_and_escaped_numbers(result):
    scans = result.scans
    named = dataclasses.replace(scans.moving, source="<script>&.nii")
    page = dataclasses.replace(
        result, scans=dataclasses.replace(scans, moving=named)
    )._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;&amp;.nii" in page
    for name, value in jaxreg.summary(result).items():
        assert f"<td>{name}</td><td>{value}</td>" in page
    (picture,) = re.findall('base64,([^"]*)', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    # The most that a picture can hold: noise.
    noise = np.random.default_rng(0).random((3, 96, 96, 96), dtype=np.float32)
    large = dataclasses.replace(
        result, fixed_grid=Grid((96, 96, 96), np.eye(4)),
        fixed_image=noise[0], warped_before=noise[1], warped_after=noise[2],
    )  # fmt: skip
    assert 10_000 < len(large._repr_html_()) < 300_000


def test_plot_is_a_figure_that_is_not_shown(result, tmp_path):
    figure = result.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert len([axes for axes in figure.axes if axes.get_images()]) >= 18
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_results_are_one_line_and_pickled(result):
    assert "\n" not in repr(result)
    assert len(repr(result)) < 300
    assert "moving.nii.gz" in repr(result)
    assert "array(" not in repr(result)
    again = pickle.loads(pickle.dumps(result))
    assert jaxreg.summary(again) == jaxreg.summary(result)
    np.testing.assert_array_equal(again.warped.array, result.warped.array)


def test_a_result_refers_to_what_it_was_given(paths):
    moving, fixed = (volumes.read_volume(path) for path in paths)
    found = pair_lib.register(moving, fixed, loaded(), OPTIONS)
    assert found.scans.moving is moving
    assert found.scans.fixed is fixed
    assert found.scans.stored is moving
