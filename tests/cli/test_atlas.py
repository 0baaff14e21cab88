"""``jaxreg atlas`` of shifted blobs, whose unbiased mean is known."""

import types

import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.registration import atlas, pair
from jaxreg.space import affine, sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Displacement, Transform

SHAPE = (14, 15, 16)
SHIFTS = ((0.0, 0.0, 0.0), (2.0, -1.0, 1.5), (-0.5, 2.5, 90.0))  # mm; one far away
MEAN = np.mean(SHIFTS, 0)


def grid_at(origin=(0.0, 0.0, 0.0)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1]
    affine[:3, 3] = origin
    return Grid(SHAPE, affine)


def blob(grid: Grid, shift) -> Volume:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    place = index @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    distance = ((place - np.asarray(shift) - (7.5, 7.0, 6.5)) ** 2).sum(-1)
    return Volume((100 * np.exp(-distance / 6)).astype(np.float32), grid)


@pytest.fixture(autouse=True)
def by_centres(monkeypatch):
    """Registers by centres of mass at once; a page's example registers in earnest."""

    def register(moving, fixed, model, options):
        here, there = (
            affine.centre_of_mass_mm(v.array, v.grid) for v in (fixed, moving)
        )
        matrix = np.eye(4)
        matrix[:3, 3] = there - here
        return types.SimpleNamespace(transform=Transform((Affine(matrix),)))

    monkeypatch.setattr(pair, "register", register)


@pytest.fixture
def scans(tmp_path) -> str:
    """Three blobs; the header of the last has it 90 mm away."""
    paths = []
    for number, shift in enumerate(SHIFTS):
        away = (0.0, 0.0, 90.0 if number == 2 else 0.0)
        path = tmp_path / f"scan{number}.nii.gz"
        volumes.write_volume(path, blob(grid_at(away), shift))
        paths.append(str(path))
    return ",".join(paths)


def run(scans, out, *more) -> int:
    return main.main(
        [
            "atlas", "--scans", scans, "--out-dir", str(out), "--model", "none",
            "--prealign", "centre", "--io-iterations", "None", "--rounds", "2", *more,
        ]
    )  # fmt: skip


def middle_of(volume: Volume) -> np.ndarray:
    mass = volume.array.clip(0.02, None) - 0.02  # without the far tails
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    voxel = (index * mass[..., None]).sum((0, 1, 2)) / mass.sum()
    return (volume.grid.affine_mm @ [*voxel, 1.0])[:3]


def test_the_mean_of_shifts_lies_at_their_mean(scans, tmp_path, capsys):
    out = tmp_path / "atlas"
    assert run(scans, out) == 0
    mean = volumes.read_volume(out / "mean.nii.gz")
    expected = np.array((7.5, 7.0, 6.5)) + MEAN
    np.testing.assert_allclose(middle_of(mean), expected, atol=0.1)
    places = np.random.default_rng(0).uniform(-2, 2, (1, 9, 3)) + expected
    maps = [
        transforms.read_transform(out / f"{n + 1:03d}_scan{n}_transform.h5")
        for n in range(3)
    ]
    ends = np.stack([m.map_points(places) for m in maps])
    # Each leads to its scan, and all together nowhere.
    for end, shift in zip(ends, SHIFTS, strict=True):
        np.testing.assert_allclose(end, places + shift - MEAN, atol=0.1)
    np.testing.assert_allclose(ends.mean(0), places, atol=1e-4)
    said = capsys.readouterr().err
    assert "round 2: the mean moves by 0.0" in said


def test_it_goes_on_where_it_was(scans, tmp_path, monkeypatch, capsys):
    """Interrupted twice it gives the bits of one run, and registers none again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(scans, whole) == 0
    register, seen = pair.register, []

    def stopping(*args, **more):
        seen.append(args)
        if len(seen) in (2, 6):
            raise UserError("stopped")
        return register(*args, **more)

    monkeypatch.setattr(pair, "register", stopping)
    assert [run(scans, parts), run(scans, parts), run(scans, parts)] == [2, 2, 0]
    assert len(seen) == 6 + 2
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in parts.iterdir())
    a, b = (volumes.read_volume(f / "mean.nii.gz").array for f in (whole, parts))
    np.testing.assert_array_equal(a, b)
    assert run(scans, parts, "--prealign", "affine") == 2
    assert "another --prealign (centre)" in capsys.readouterr().err


def test_the_centre_of_opposite_bends_is_the_start():
    """Two maps that add and take off the same displacement: the mean stays."""
    grid = grid_at()
    points = np.asarray(sampling.identity(SHAPE))
    bend = (0.05 * np.sin(np.pi * points) * points[..., [1, 2, 0]]).astype(np.float32)
    there, back = (
        transform_lib.in_world(Transform((Displacement(sign * bend),)), grid, grid)
        for sign in (1, -1)
    )
    found = atlas.centre_of([there, back], grid)
    assert found.shift_mm < 1e-5
    assert found.bend_mm < 1e-5
    # Of one map alone the mean is where it leads: its transform becomes the identity.
    found = atlas.centre_of([there], grid)
    inner = (grid.affine_mm[:3, :3] @ [[5, 9], [6, 7], [8, 4]]).T[None]
    again = found.back.then(there).map_points(inner)
    np.testing.assert_allclose(again, inner, atol=5e-3)  # read between its voxels
    assert found.bend_mm > 0.05


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--rounds", "0"), "--rounds is 0"),
        (("--scans", "one.nii.gz"), "give two or more"),
        (("--scans", "none.nii.gz,other.nii.gz"), "--scans none.nii.gz"),
        (("--modality", "xray"), "--modality is 'xray'"),
    ],
)
def test_mistake_is_one_sentence_and_leaves_nothing(
    more, expected, scans, tmp_path, capsys
):
    assert run(scans, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(scans, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert run(scans, tmp_path / "full") == 2
    assert "has other files in it" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
