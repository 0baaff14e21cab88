"""Pictures: upright for any orientation, honest about shape, self-contained pages."""

import io
import itertools

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from jaxreg.registration import report
from jaxreg.registration.report import figures, planes
from jaxreg.space.grid import Grid, Volume

SHAPE = (5, 6, 7)
PNG = b"\x89PNG\r\n\x1a\n"


def ras_grid(shape=SHAPE, spacing=(1.0, 2.0, 3.0)) -> Grid:
    """array[d, h, w] with w towards right, h anterior, d superior."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * np.asarray(spacing)
    return Grid(shape, affine)


def stored_otherwise(array, grid, axes, flips):
    """The same volume with its axes permuted and some of them reversed."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[:, axes]
    for new, axis in enumerate(axes):
        if flips[new]:
            matrix[:3, new] *= -1
            matrix[axis, 3] = array.shape[axis] - 1
    moved = np.transpose(array, axes)
    moved = moved[tuple(slice(None, None, -1 if f else None) for f in flips)]
    return moved, Grid(moved.shape, grid.affine_mm @ matrix)


@pytest.mark.parametrize(
    ("axes", "flips"),
    list(
        itertools.product(
            itertools.permutations(range(3)),
            [(False,) * 3, (True, False, True), (False, True, False)],
        )
    ),
)
def test_upright_undoes_any_order_of_axes(axes, flips):
    array = np.random.default_rng(0).random(SHAPE)
    grid = ras_grid()
    expected = planes.upright(array, grid)
    assert expected.shape == SHAPE[::-1]
    moved, place = stored_otherwise(array, grid, list(axes), flips)
    # The helper keeps every voxel in its place in world space.
    corner = place.affine_mm @ [0, 0, 0, 1]
    index = np.rint(np.linalg.inv(grid.affine_mm) @ corner)[:3].astype(int)
    assert moved[0, 0, 0] == array[tuple(index)]

    np.testing.assert_array_equal(planes.upright(moved, place), expected)
    upright = planes.upright_grid(place)
    assert upright.shape == SHAPE[::-1]
    np.testing.assert_allclose(
        upright.affine_mm, np.diag([3.0, 2.0, 1.0, 1.0]), atol=1e-12
    )


def test_upright_of_an_oblique_grid_takes_the_nearest_axes():
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    array = np.random.default_rng(0).random(SHAPE)
    grid = ras_grid()
    np.testing.assert_array_equal(
        planes.upright(array, Grid(SHAPE, turn @ grid.affine_mm)),
        planes.upright(array, grid),
    )


def test_slices_are_radiological():
    """A mark at the patient's right, front and top lies where the letters say."""
    array = np.zeros((5, 6, 7))  # x, y, z towards right, anterior, superior
    array[-1, -1, -1] = 1.0
    for plane, across in (("axial", 6), ("coronal", 5), ("sagittal", 4)):
        picture = planes.slice_of(array, plane, across)
        assert picture[0, 0] == 1.0
        assert picture.sum() == 1.0
    assert planes.slice_of(array, "axial", 0).shape == (6, 5)
    assert planes.slice_of(array, "coronal", 0).shape == (7, 5)
    assert planes.slice_of(array, "sagittal", 0).shape == (7, 6)
    letters = {name: plane.edges for name, plane in planes.VIEWS.items()}
    assert letters["axial"] == ("R", "L", "A", "P")
    assert letters["coronal"] == ("R", "L", "S", "I")
    assert letters["sagittal"] == ("A", "P", "S", "I")


def test_overlay_is_grey_where_both_agree():
    same = np.full((2, 3), 0.4)
    np.testing.assert_array_equal(figures.overlay(same, same), np.full((2, 3, 3), 0.4))


def volumes(shape=SHAPE):
    generator = np.random.default_rng(1)
    grid = ras_grid(shape)
    return [Volume(generator.random(shape).astype("f4"), grid) for _ in range(3)]


@pytest.mark.parametrize("deformation", ["none", "both", "determinant", "folded"])
def test_before_and_after_are_drawn(deformation):
    extra = {}
    if deformation == "both":
        extra["displacement_mm"] = np.ones((*SHAPE, 3), np.float32)
    if deformation != "none":
        value = -1.0 if deformation == "folded" else 1.2
        extra["determinant"] = np.full(SHAPE, value, np.float32)

    data = report.before_after_figure(*volumes(), title="a $b_c$ <d>", **extra)

    picture = matplotlib.image.imread(io.BytesIO(data))
    assert picture.ndim == 3
    assert picture.std() > 0


def test_a_row_for_each_plane():
    heights = [
        len(matplotlib.image.imread(io.BytesIO(data)))
        for planes in (["axial"], planes.PLANES)
        for data in [report.before_after_figure(*volumes(), planes=planes)]
    ]
    assert heights == [330, 902]


def test_same_numbers_same_bytes():
    first, second = (report.before_after_figure(*volumes()) for _ in range(2))
    assert first == second


def test_padding_of_a_ct_takes_no_part_of_the_grey_scale():
    fixed, before, after = volumes()
    padded, air = [], []
    for volume in (fixed, before, after):
        array = np.asarray(volume.array, np.float32) * 100 - 1000
        array[:, :3] = -1000
        air.append(Volume(array, volume.grid))
        array = array.copy()
        array[:, :2] = -3024
        padded.append(Volume(array, volume.grid))
    figures = [report.before_after_figure(*each) for each in (padded, air)]
    assert figures[0] == figures[1]


def test_flat_and_thin_volumes_do_not_fail():
    flat = Volume(np.zeros(SHAPE, np.int16), ras_grid())
    assert report.before_after_figure(flat, flat, flat).startswith(PNG)
    thin = volumes((1, 6, 7))
    shape = (1, 6, 7, 3)
    assert report.before_after_figure(
        *thin, displacement_mm=np.zeros(shape, np.float32)
    ).startswith(PNG)


def test_another_grid_is_refused():
    fixed, before, _ = volumes()
    with pytest.raises(ValueError, match="shape"):
        report.before_after_figure(fixed, before, volumes((6, 6, 7))[0])


def test_matplotlib_keeps_its_state():
    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    report.before_after_figure(*volumes())
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before


def test_aspect_follows_the_spacing():
    """A voxel three times as tall as wide makes its picture three times as tall."""
    heights = []
    for tall in (1.0, 3.0):
        grid = ras_grid((8, 8, 8), (tall, 1.0, 1.0))
        volume = Volume(np.full((8, 8, 8), 1.0, np.float32), grid)
        data = report.before_after_figure(volume, volume, volume)
        picture = matplotlib.image.imread(io.BytesIO(data))[..., :3]
        rows = np.flatnonzero((picture[:, :, 0] < 0.1).mean(axis=1) > 0.2)
        heights.append(len(rows))
    assert heights[0] != heights[1]


def test_history_figure_takes_any_history():
    for history in ({}, {"loss": np.ones(1)}, {"loss": np.arange(4.0), "dice": [1, 2]}):
        assert report.history_figure(history).startswith(PNG)
