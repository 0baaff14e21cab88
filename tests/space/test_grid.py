"""The three frames of a grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.space import grid as grid_lib
from jaxreg.space.grid import Grid, Volume

OBLIQUE = np.array(
    [[0.3, -1.5, 0.2, 10], [0.1, 0.4, 2.0, -30], [-0.9, -0.6, 0.3, 5], [0, 0, 0, 1.0]]
)
sizes = st.tuples(*[st.integers(1, 9)] * 3)


def apply(matrix, points):
    return np.asarray(points) @ matrix[:3, :3].T + matrix[:3, 3]


def test_unit_is_zero_and_one_at_the_corner_centres():
    matrix = grid_lib.unit_to_voxel((5, 6, 7))
    np.testing.assert_array_equal(
        apply(matrix, [[0, 0, 0], [1, 1, 1]]), [[0] * 3, [4, 5, 6]]
    )


def test_axis_of_one_voxel_keeps_voxel_coordinates():
    np.testing.assert_array_equal(grid_lib.unit_scale((1, 2, 7)), [1, 1, 6])
    grid = Grid((1, 4, 5), OBLIQUE)
    np.testing.assert_array_equal(
        apply(grid.unit_to_mm, [0.25, 0, 0]), apply(grid.voxel_to_mm, [0.25, 0, 0])
    )
    assert np.linalg.det(grid.unit_to_mm) != 0


def test_spacing_is_per_array_axis():
    grid = Grid((2, 2, 2), np.diag([2.0, 3.0, 4.0, 1.0])[[2, 1, 0, 3]])
    np.testing.assert_array_equal(grid.spacing_mm, [2, 3, 4])


@settings(max_examples=30, deadline=None)
@given(source=sizes, target=sizes)
def test_resize_keeps_centre_and_extent(source, target):
    grid = Grid(source, OBLIQUE)
    resized = grid.resized(target)
    assert resized.shape == target
    for g in (grid, resized):
        last = np.asarray(g.shape) - 0.5
        corners = apply(g.voxel_to_mm, [[-0.5] * 3, last, [last[0], -0.5, last[2]]])
        if g is grid:
            expected = corners
    np.testing.assert_allclose(corners, expected, atol=1e-9)
    np.testing.assert_allclose(
        resized.spacing_mm * target, grid.spacing_mm * source, rtol=1e-12
    )


def test_resize_agrees_with_the_formula():
    matrix = grid_lib.resize_to_source((10, 7, 4), (5, 7, 8))
    q = np.array([3.0, 2.0, 1.0])
    np.testing.assert_allclose(
        apply(matrix, q), [(3.5) * 2 - 0.5, 2, 1.5 * 0.5 - 0.5], rtol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(
    shape=sizes,
    point=st.tuples(*[st.floats(-20, 20)] * 3),
    scale=st.floats(0.1, 10),
)
def test_voxel_mm_voxel(shape, point, scale):
    grid = Grid(shape, OBLIQUE @ np.diag([scale, 1, 1, 1]))
    mm = apply(grid.voxel_to_mm, point)
    np.testing.assert_allclose(
        apply(np.linalg.inv(grid.voxel_to_mm), mm), point, atol=1e-9
    )
    unit = apply(np.linalg.inv(grid.unit_to_mm), mm)
    np.testing.assert_allclose(unit * grid_lib.unit_scale(shape), point, atol=1e-9)


def test_matches_counts_shape_and_corners():
    grid = Grid((50, 6, 7), OBLIQUE)
    assert grid.matches(Grid((50, 6, 7), OBLIQUE + 1e-5))
    assert not grid.matches(Grid((50, 7, 6), OBLIQUE))
    nudged = OBLIQUE.copy()
    nudged[0, 3] += 0.02
    assert not grid.matches(Grid((50, 6, 7), nudged))
    assert grid.matches(Grid((50, 6, 7), nudged), tolerance_mm=0.03)
    # A change of spacing that only the far corner shows.
    stretched = OBLIQUE.copy()
    stretched[0, 0] += 0.001
    assert not grid.matches(Grid((50, 6, 7), stretched))


def test_volume_needs_an_array_of_its_grid():
    with pytest.raises(ValueError, match="array has shape"):
        Volume(np.zeros((2, 3, 4)), Grid((4, 3, 2), OBLIQUE))


def box_around(scan: Grid, shape, spacing_mm=2.0) -> Grid:
    return scan.centred(shape, spacing_mm)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    box=st.tuples(*[st.integers(2, 12)] * 3),
    spacing=st.floats(0.3, 3.0),
)
def test_padding_covers_the_other_grid_and_no_more(shape, box, spacing):
    scan = Grid(shape, OBLIQUE)
    network = box_around(scan, box, spacing)
    padding = network.padding(scan)
    whole = network.padded(padding)
    to_index = np.linalg.inv(whole.affine_mm) @ scan.affine_mm
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.asarray(shape) - 1)
    index = apply(to_index, corners)
    assert (index > -0.5).all()
    assert (index < np.asarray(whole.shape) - 0.5).all()
    # The lattice stays, and a voxel less on either side would be too few.
    np.testing.assert_allclose(
        apply(whole.affine_mm, padding[:, 0]), network.affine_mm[:3, 3], atol=1e-9
    )
    faces = apply(to_index, np.array([np.full(3, -0.5), np.asarray(shape) - 0.5]))
    low, high = faces.min(0), np.asarray(whole.shape) - 1 - faces.max(0)
    for lacking, added in ((low, padding[:, 0]), (high, padding[:, 1])):
        assert (lacking[added > 0] < 0.5 + 1e-9).all()


@given(shape=sizes, target=sizes)
def test_grids_of_the_same_extent_need_no_padding(shape, target):
    scan = Grid(shape, OBLIQUE)
    assert not scan.resized(target).padding(scan).any()
    if min(shape) > 1 and min(target) > 1:
        assert not scan.resized_aligned(target).padding(scan).any()


def test_the_part_within_a_box_has_the_voxels_between_its_outer_centres():
    scan = Grid((20, 5, 20), OBLIQUE)
    spacing = scan.spacing_mm
    matrix = scan.affine_mm.copy()
    matrix[:3, 3] = apply(scan.affine_mm, [4.5, 0, 6])
    box = Grid((3, 1, 4), matrix @ np.diag([2, 1, 3, 1]))  # 4.5 to 8.5 and 6 to 15
    part = scan.within(box)
    assert part.shape == (4, 5, 10)  # one voxel's width is no box
    np.testing.assert_allclose(
        part.affine_mm[:3, 3], apply(scan.affine_mm, [5, 0, 6]), atol=1e-9
    )
    np.testing.assert_allclose(part.spacing_mm, spacing)
    assert scan.within(scan.resized_aligned((7, 7, 7))).shape == scan.shape
