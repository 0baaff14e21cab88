"""The demo: its data, the rough masks, and a run on a small pair of the same form."""

import importlib.util

import numpy as np
import pytest

from jaxreg import demo
from jaxreg.cli import main
from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.warping import warp_volume

SHAPE = (24, 28, 26)


def make_grid(shift=0.0) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = 7.0 * np.eye(3)[:, ::-1]
    affine[:3, 3] = shift
    return Grid(SHAPE, affine)


def head(shift=0.0) -> Volume:
    """A brain of three shells, darker inwards, in a dark skull and a thin skin."""
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    radius = np.linalg.norm(7.0 * (index - np.array([12, 14, 13])), axis=-1)
    edges = [radius < r for r in (15, 32, 50, 65, 75)]
    array = np.select(edges, [180, 240, 300, 60, 320], 2).astype(np.float32)
    return Volume(array, make_grid(shift), "head.nii.gz")


def ball(radius_mm: float) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return np.linalg.norm(7.0 * (index - np.array([12, 14, 13])), axis=-1) < radius_mm


def small_pair() -> demo.DemoPair:
    fixed, moving = head(), head(shift=15.0)
    brain = fixed.array * ball(50)
    labels = np.select([ball(15), ball(32), ball(50)], [0, 1, 2]).astype(np.uint8)
    return demo.DemoPair(
        moving=moving,
        fixed=Volume(brain, fixed.grid, "brain.nii.gz"),
        moving_mask=Volume(ball(50).astype(np.uint8), moving.grid, "mask"),
        fixed_mask=Volume(ball(50).astype(np.uint8), fixed.grid, "mask"),
        tissues=Volume(labels, fixed.grid, "tissues"),
    )


def test_brain_mask_leaves_skin_and_skull_out():
    mask = demo.brain_mask(head(), radius_mm=16.0).array > 0
    brain = ball(50)
    assert (mask & brain).sum() / brain.sum() > 0.85
    assert (mask & ~ball(65)).sum() == 0


def test_brain_mask_of_nothing_thick():
    array = np.zeros(SHAPE, np.float32)
    array[::4] = 100.0
    with pytest.raises(UserError, match="head"):
        demo.brain_mask(Volume(array, make_grid(), "stripes"), radius_mm=30.0)


def test_three_means_separates_three_heaps():
    generator = np.random.default_rng(0)
    values = np.concatenate(
        [generator.normal(m, 2.0, 1000) for m in (10.0, 40.0, 100.0)]
    )
    low, high = demo.three_means(values)
    assert low == pytest.approx(25.0, abs=1.0)
    assert high == pytest.approx(70.0, abs=1.0)


def test_tissue_overlap_of_itself_is_one():
    pair = small_pair()
    scores = demo.tissue_overlap(pair.fixed, pair, (210.0, 270.0))
    assert scores == {"grey matter": 1.0, "white matter": 1.0}


def test_missing_package_is_a_sentence(monkeypatch, tmp_path):
    found = importlib.util.find_spec

    def without(name, *rest):
        return None if name == "pydeface" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match=r"pydeface.*jaxreg\[demo\]"):
        demo.paths()


def test_packaged_data_has_the_expected_form():
    pytest.importorskip("nilearn")
    if importlib.util.find_spec("pydeface") is None:
        pytest.skip("pydeface is not installed")
    moving, fixed = (volumes.read_grid(path) for path in demo.paths())
    assert moving.shape == (256, 256, 176)
    assert fixed.shape == (189, 233, 197)


def test_run_writes_everything_and_improves(tmp_path, capsys):
    out = tmp_path / "new" / "folder"

    numbers, written = demo.run(
        out, shape=(8, 8, 8), iterations=20, command="jaxreg demo", pair=small_pair()
    )

    assert {p.name for p in out.iterdir()} == {p.name for p in written}
    assert {p.name for p in written} == {
        "transform.h5", "displacement.nii.gz", "warped.nii.gz", "before_after.png",
        "report.html",
    }  # fmt: skip
    white = numbers["white matter overlap (Dice, from brightness)"]
    before, after = (float(part.split()[0]) for part in white.split(", "))
    assert after > before
    flat, composite = (
        transforms.read_transform(out / name)
        for name in ("displacement.nii.gz", "transform.h5")
    )
    points = np.array([[[85.0, 95.0, 90.0]]])
    np.testing.assert_allclose(
        flat.map_points(points), composite.map_points(points), atol=0.2
    )
    assert "jaxreg demo" in (out / "report.html").read_text()
    again = warp_volume(small_pair().moving, composite, small_pair().fixed.grid)
    warped = volumes.read_volume(out / "warped.nii.gz", kind="stored")
    np.testing.assert_array_equal(warped.array, np.rint(again.array))


@pytest.mark.slow
def test_the_demo_itself(tmp_path, capsys):
    status = main.main(
        ["demo", "--out", str(tmp_path), "--shape", "32,36,32", "--io-iterations", "30"]
    )
    assert status == 0
    out = capsys.readouterr().out
    assert "grey matter overlap" in out
    assert (tmp_path / "before_after.png").stat().st_size > 10_000
