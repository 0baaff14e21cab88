"""Transforms: order, frames, resampling, Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from jaxreg.space import background, sampling, transform, warping
from jaxreg.space.background import Background
from jaxreg.space.grid import Grid, Volume, unit_scale
from jaxreg.space.transform import Affine, Displacement, Transform


def rotation(x, y, z):
    (cx, cy, cz), (sx, sy, sz) = np.cos([x, y, z]), np.sin([x, y, z])
    return (
        np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    )


def matrix(linear=None, shift=(0, 0, 0)):
    m = np.eye(4)
    m[:3, :3] = np.eye(3) if linear is None else linear
    m[:3, 3] = shift
    return m


def grid(shape, angles=(0.3, -0.2, 0.5), spacing=(1.8, 1.0, 1.25), origin=(10, -30, 5)):
    return Grid(shape, matrix(rotation(*angles) * np.array(spacing), origin))


FIXED = grid((9, 11, 10))
MOVING = grid((10, 8, 12), (0.25, -0.1, 0.45), (1.6, 1.5, 1.0), (11, -31, 6))
NETWORK = (6, 7, 5)


def smooth(shape, channels, size=1.0, seed=0):
    coarse = np.random.default_rng(seed).normal(0, size, (1, 4, 4, 4, channels))
    return np.asarray(sampling.resize_half_pixel(jnp.asarray(coarse, "f4"), shape))


def field(size=0.05, seed=1, shape=NETWORK):
    return smooth(shape, 3, size, seed)


def points(count=20, low=0.0, high=1.0, seed=2):
    return np.random.default_rng(seed).uniform(low, high, (1, count, 3))


def mm(where, unit):
    return unit @ where.unit_to_mm[:3, :3].T + where.unit_to_mm[:3, 3]


def world(*steps):
    return transform.in_world(
        Transform(steps), FIXED.resized(NETWORK), MOVING.resized(NETWORK)
    )


def test_affine_maps_points_in_float64():
    m = matrix(rotation(0.1, 0.2, 0.3), (1e3, -1e3, 1e-9))
    got = Affine(m)(points())
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, points() @ m[:3, :3].T + m[:3, 3], rtol=1e-15)


def test_affine_under_jit():
    m = matrix(rotation(0.1, 0.2, 0.3), (1, 2, 3))
    got = jax.jit(lambda t, p: t.map_points(p))(
        Transform((Affine(m),)), jnp.asarray(points(), "f4")
    )
    np.testing.assert_allclose(got, Affine(m)(points()), rtol=1e-5)


def test_steps_act_in_their_order():
    scale, shift = Affine(matrix(2 * np.eye(3))), Affine(matrix(shift=(1, 0, 0)))
    got = Transform((scale, shift)).map_points(np.ones((1, 1, 3)))
    np.testing.assert_array_equal(got, [[[3, 2, 2]]])
    got = Transform((shift,)).then(Transform((scale,))).map_points(np.ones((1, 1, 3)))
    np.testing.assert_array_equal(got, [[[4, 2, 2]]])


def test_displacement_keeps_the_affines_around_it_in_float64():
    zero = Displacement(np.zeros((1, *NETWORK, 3), np.float32), outside="half_voxel")
    far = np.array([[[1e5 + 1e-6, 0.25, 0.5]]])
    np.testing.assert_array_equal(Transform((zero,)).map_points(far), far)


def test_displacement_outside_rules():
    shift = np.full((1, *NETWORK, 3), 0.1, np.float32)
    half = 0.5 / (unit_scale(NETWORK)[0])
    at = np.array([[[-0.9 * half, 0.5, 0.5], [-1.1 * half, 0.5, 0.5]]])
    edge = Displacement(shift)(at) - at
    np.testing.assert_allclose(edge, 0.1, rtol=1e-6)
    file = Displacement(shift, outside="half_voxel")(at) - at
    np.testing.assert_allclose(file[0], [[0.1] * 3, [0] * 3], atol=1e-7)


def test_in_world_maps_corner_to_corner():
    got = world().map_points(mm(FIXED, points(low=-0.2, high=1.2)))
    # Extents coincide, not corner centres: a unit of the network grid is shorter.
    network = [FIXED.resized(NETWORK), MOVING.resized(NETWORK)]
    unit = mm(FIXED, points(low=-0.2, high=1.2))
    unit = (unit - network[0].unit_to_mm[:3, 3]) @ np.linalg.inv(
        network[0].unit_to_mm[:3, :3]
    ).T
    np.testing.assert_allclose(got, mm(network[1], unit), atol=1e-9)
    for where, corners in ((FIXED, -0.5), (MOVING, -0.5)):
        corner = where.voxel_to_mm @ [corners, corners, corners, 1]
        same = where.resized(NETWORK).voxel_to_mm @ [corners, corners, corners, 1]
        np.testing.assert_allclose(corner, same, atol=1e-9)


def test_in_world_reads_the_field_between_the_two_affines():
    shift = np.broadcast_to(np.float32([0.1, -0.05, 0.2]), (1, *NETWORK, 3))
    got = world(Displacement(shift)).map_points(mm(FIXED, points()))
    moved = MOVING.resized(NETWORK).unit_to_mm[:3, :3] @ [0.1, -0.05, 0.2]
    np.testing.assert_allclose(
        got, world().map_points(mm(FIXED, points())) + moved, atol=1e-5
    )


def test_in_world_switches_fields_to_the_files_rule():
    assert [s.outside for s in world(Displacement(field())).steps[1:-1]] == [
        "half_voxel"
    ]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_affine_there_and_back(seed):
    rng = np.random.default_rng(seed)
    m = matrix(
        rotation(*rng.normal(0, 0.5, 3)) * rng.uniform(0.5, 2, 3), rng.normal(size=3)
    )
    there, back = Transform((Affine(m),)), Transform((Affine(np.linalg.inv(m)),))
    np.testing.assert_allclose(
        there.then(back).map_points(points()), points(), atol=1e-10
    )


def test_flatten_gives_the_same_map_on_its_grid():
    steps = (
        Affine(matrix(rotation(0.05, 0, 0.05), (0.02, 0, 0))),
        Displacement(field()),
        Displacement(field(seed=4, shape=(4, 5, 6))),
    )
    unit = Transform(steps)
    flat = transform.flatten(unit, NETWORK)
    assert len(flat.steps) == 1
    x = sampling.identity(NETWORK)
    np.testing.assert_allclose(flat.map_points(x), unit.map_points(x), atol=1e-6)


def test_transform_is_a_pytree():
    t = Transform((Affine(jnp.eye(4)), Displacement(jnp.zeros((1, *NETWORK, 3)))))
    leaves = jax.tree.leaves(t)
    assert [leaf.shape for leaf in leaves] == [(4, 4), (1, *NETWORK, 3)]
    gradient = jax.grad(lambda t: t.map_points(jnp.full((1, 2, 3), 0.3)).sum())(t)
    assert gradient.steps[1].field.sum() == pytest.approx(6, rel=1e-5)


# Resampling.


def image(dtype=np.float32, where=MOVING, seed=0):
    array = smooth(where.shape, 1, 40, seed)[0, ..., 0]
    return Volume(array.astype(dtype), where, "moving.nii")


def test_warp_with_the_identity_on_the_own_grid():
    still = Transform((Affine(np.eye(4)),))
    for dtype in (np.float32, np.float64, np.int16, np.uint16):
        moving = Volume(np.abs(image().array).astype(dtype), MOVING)
        for order in (0, 1):
            got = warping.warp_volume(moving, still, MOVING, order=order)
            assert got.array.dtype == dtype
            assert got.grid is MOVING
            np.testing.assert_allclose(got.array, moving.array, rtol=1e-4, atol=1e-3)


def test_warp_of_a_linear_ramp_is_exact():
    # A ramp in world coordinates, read by linear interpolation, is the ramp itself.
    slope = np.array([0.3, -0.7, 1.1])
    index = np.stack(np.meshgrid(*map(np.arange, MOVING.shape), indexing="ij"), -1)
    at = index @ MOVING.voxel_to_mm[:3, :3].T + MOVING.voxel_to_mm[:3, 3]
    moving = Volume((at @ slope).astype(np.float32), MOVING)
    turn = Affine(matrix(rotation(0.1, 0.05, -0.1), (0.5, 1, -0.5)))
    warped = warping.warp_volume(moving, Transform((turn,)), FIXED, fill=np.nan)
    index = np.stack(np.meshgrid(*map(np.arange, FIXED.shape), indexing="ij"), -1)
    at = turn(index @ FIXED.voxel_to_mm[:3, :3].T + FIXED.voxel_to_mm[:3, 3])
    voxel = (at - MOVING.voxel_to_mm[:3, 3]) @ np.linalg.inv(
        MOVING.voxel_to_mm[:3, :3]
    ).T
    last = np.array(MOVING.shape) - 1
    within = ((voxel >= 0) & (voxel <= last)).all(-1)
    outside = ((voxel < -0.51) | (voxel > last + 0.51)).any(-1)
    assert within.sum() > 50
    assert outside.sum() > 50
    np.testing.assert_allclose(warped.array[within], (at @ slope)[within], atol=1e-3)
    assert np.isnan(warped.array[outside]).all()
    assert np.isfinite(warped.array[~outside & within]).all()


def test_integers_are_rounded_and_clipped():
    array = np.zeros((2, 2, 2), np.uint8)
    array[1] = [[3, 3], [255, 255]]
    moving = Volume(array, Grid((2, 2, 2), np.eye(4)))
    half = Transform((Affine(matrix(shift=(0.5, 0, 0))),))
    got = warping.warp_volume(moving, half, moving.grid).array
    np.testing.assert_array_equal(got[0], [[2, 2], [128, 128]])  # 1.5, 127.5 to even
    far = Transform((Affine(matrix(shift=(9, 0, 0))),))
    got = warping.warp_volume(moving, far, moving.grid, fill=300).array
    np.testing.assert_array_equal(got, 255)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32])
def test_large_labels_survive(dtype):
    high = np.iinfo(dtype).max - 1
    array = np.array([0, high, high - 1, 7], dtype).reshape(2, 2, 1).repeat(2, -1)
    moving = Volume(array, Grid((2, 2, 2), np.eye(4)))
    still = Transform((Affine(np.eye(4)),))
    got = warping.warp_volume(moving, still, moving.grid, order=0).array
    np.testing.assert_array_equal(got, array)
    far = Transform((Affine(matrix(shift=(9, 0, 0))),))
    got = warping.warp_volume(moving, far, moving.grid, order=0, fill=5).array
    np.testing.assert_array_equal(got, np.full_like(array, 5))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_integers_at_the_limit_of_their_type_do_not_wrap_around(dtype):
    where = grid((4, 5, 6))
    moving = Volume(np.full((4, 5, 6), np.iinfo(dtype).max, dtype), where)
    warped = warping.warp_volume(moving, Transform(()), where)
    # float32 in between: the top of the range, but for its last digits.
    assert warped.array.dtype == dtype
    assert np.all(warped.array >= np.iinfo(dtype).max * 0.999)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64, np.int32])
def test_nearest_values_are_exact_in_any_type(dtype):
    """More distinct ones than float32 has whole numbers, or larger than it tells apart.

    Read at few points of a large label map.
    """
    shape = (257, 257, 257)
    step = 2**29 + 1 if np.dtype(dtype).itemsize == 8 else 1
    moving = Volume(np.arange(257**3, dtype=dtype).reshape(shape) * dtype(step), GRID_1)
    corner = Transform((Affine(matrix(shift=(253, 252, 251))),))
    got = warping.warp_volume(moving, corner, Grid((4, 4, 4), np.eye(4)), order=0)
    assert got.array.dtype == dtype
    np.testing.assert_array_equal(got.array, moving.array[253:, 252:256, 251:255])


GRID_1 = Grid((257, 257, 257), np.eye(4))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_integers_too_large_for_float32_are_interpolated_in_float64(dtype):
    generator = np.random.default_rng(0)
    top = 2**50 if dtype == np.int64 else 2**30
    moving = Volume(generator.integers(0, top, MOVING.shape).astype(dtype), MOVING)
    still = warping.warp_volume(moving, Transform(()), MOVING)
    # Float32 places are off by up to 1e-5 of a voxel.
    np.testing.assert_allclose(still.array, moving.array, atol=1e-5 * top)
    half = Transform((Affine(matrix(shift=(0, 0, 0.5))),))
    where = Grid((4, 4, 4), np.eye(4))
    moving = Volume(moving.array[:4, :4, :4], where)
    got = warping.warp_volume(moving, half, where).array[..., :3]
    real = moving.array.astype(np.float64)
    expected = np.rint((real[..., :3] + real[..., 1:]) / 2).astype(dtype)
    np.testing.assert_array_equal(got, expected)
    if dtype == np.int32:  # what float32 in between would have made of it
        small = real.astype(np.float32)
        assert np.any(np.rint((small[..., :3] + small[..., 1:]) / 2) != expected)


def circle(value, dtype=np.int16, where=MOVING):
    """A noisy CT with padding of a value outside a circle of its slices."""
    rest = np.stack(np.meshgrid(*map(np.arange, where.shape[1:]), indexing="ij"), -1)
    away = (rest - (np.array(where.shape[1:]) - 1) / 2) / np.array(where.shape[1:])
    array = smooth(where.shape, 1, 900, 3)[0, ..., 0].clip(-1000, 1000)
    array[:, (away**2).sum(-1) > 0.2] = value
    return Volume(array.astype(dtype), where, "ct.nii")


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_padding_does_not_bleed_into_what_is_interpolated(dtype):
    moving = circle(-3024, dtype)
    turn = Affine(matrix(rotation(0.1, 0.05, -0.1), (0.5, 1, -0.5)))
    got = warping.warp_volume(moving, Transform((turn,)), FIXED).array
    assert background.find(moving) == Background(-1000, -3024)

    index = np.stack(np.meshgrid(*map(np.arange, FIXED.shape), indexing="ij"), -1)
    at = turn(index @ FIXED.voxel_to_mm[:3, :3].T + FIXED.voxel_to_mm[:3, 3])
    back = np.linalg.inv(MOVING.voxel_to_mm)
    voxel = np.moveaxis(at @ back[:3, :3].T + back[:3, 3], -1, 0)
    weight = (moving.array > -3024).astype(np.float64)
    last = np.array(MOVING.shape)[:, None, None, None] - 1
    clipped = voxel.clip(0, last)
    sums = [
        ndimage.map_coordinates(a, clipped, order=1, mode="nearest")
        for a in (moving.array * weight, weight)
    ]
    inside = ((voxel > -0.499) & (voxel < last + 0.499)).all(0) & (sums[1] > 0.501)
    outside = ((voxel < -0.501) | (voxel > last + 0.501)).any(0) | (sums[1] < 0.499)
    bled = ndimage.map_coordinates(moving.array.astype(float), clipped, order=1)
    assert (inside & (bled < -1100)).sum() > 10  # what it would have been
    rounding = 0.51 if dtype == np.int16 else 0.05
    np.testing.assert_allclose(
        got[inside], (sums[0][inside] / sums[1][inside]), atol=rounding
    )
    assert np.all(got[outside] == -1000)
    assert got.min() >= -1000


def test_a_scan_with_padding_stays_itself_but_for_the_padding():
    moving = circle(-2048)
    for order in (0, 1):
        got = warping.warp_volume(moving, Transform(()), MOVING, order=order)
        expected = np.where(moving.array == -2048, -1000, moving.array)
        np.testing.assert_array_equal(got.array, expected)
    # A plain number knows of no padding: ITK's resampling.
    got = warping.warp_volume(moving, Transform(()), MOVING, fill=0.0)
    np.testing.assert_array_equal(got.array, moving.array)


def test_slabs_join_without_a_seam():
    steps = world(Displacement(field())).steps
    whole = warping._by_slabs(steps, FIXED.shape, lambda p: p)
    voxels = FIXED.shape[1] * FIXED.shape[2]
    for per_slab in (1, 2 * voxels, 4 * voxels + 1):
        parts = warping._by_slabs(steps, FIXED.shape, lambda p: p, per_slab)
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_warp_far_from_the_world_origin():
    # Float32 in mm would lose 1e-2 of a voxel here.
    away = matrix(shift=(1e5, -2e5, 3e5))
    fixed, moving = (Grid(g.shape, away @ g.affine_mm) for g in (FIXED, MOVING))
    shifted = transform.in_world(
        Transform((Displacement(field()),)),
        fixed.resized(NETWORK),
        moving.resized(NETWORK),
    )
    near = warping.warp_volume(image(), world(Displacement(field())), FIXED)
    far = warping.warp_volume(Volume(image().array, moving), shifted, fixed)
    np.testing.assert_allclose(far.array, near.array, atol=1e-3)
    np.testing.assert_allclose(
        warping.displacement_mm(shifted, fixed),
        warping.displacement_mm(world(Displacement(field())), FIXED),
        atol=1e-3,
    )


# Displacement and Jacobian.


def test_displacement_is_target_minus_place():
    t = world(Displacement(field()))
    got = warping.displacement_mm(t, FIXED)
    assert got.shape == (*FIXED.shape, 3)
    assert got.dtype == np.float32
    index = np.stack(np.meshgrid(*map(np.arange, FIXED.shape), indexing="ij"), -1)
    at = (index @ FIXED.voxel_to_mm[:3, :3].T + FIXED.voxel_to_mm[:3, 3])[None]
    np.testing.assert_allclose(got, (t.map_points(at) - at)[0], atol=1e-4)


@pytest.mark.parametrize("flip", [1, -1])
def test_jacobian_counts_the_direction(flip):
    # The case in which the original reports 0.891: scaling by 1.1 on a flipped grid.
    where = Grid((5, 6, 7), np.diag([-2.0, flip * -3.0, 1.0, 1.0])[:, [2, 1, 0, 3]])
    scaled = Transform((Affine(np.diag([1.1, 1.1, 1.1, 1.0])),))
    got = warping.jacobian_map(scaled, where)
    np.testing.assert_allclose(got, 1.331, rtol=1e-4)  # corners too
    sheared = matrix([[1.1, 0.2, 0], [-0.1, 0.9, 0.3], [0, 0.1, 1.2]], (1, 2, 3))
    for grid_ in (where, FIXED, MOVING):
        got = warping.jacobian_map(Transform((Affine(sheared),)), grid_)
        np.testing.assert_allclose(got, np.linalg.det(sheared[:3, :3]), rtol=1e-3)


def test_jacobian_of_a_fold_is_negative():
    mirror = Transform((Affine(np.diag([1.0, -1.0, 1.0, 1.0])),))
    np.testing.assert_allclose(warping.jacobian_map(mirror, FIXED), -1, rtol=1e-4)


def test_jacobian_on_a_grid_of_one_slice():
    where = grid((1, 6, 7))
    shift = Transform((Affine(matrix(shift=(1, 2, 3))),))
    got = warping.jacobian_map(shift, where)
    assert got.shape == where.shape
    np.testing.assert_allclose(got, 1, atol=1e-5)


def test_jacobian_slabs_join_without_a_seam(monkeypatch):
    t = world(Displacement(field()))
    whole = warping.jacobian_map(t, FIXED)
    # By another road: the full 3x3 matrices.
    displacement = warping.displacement_mm(t, FIXED).astype(np.float64)
    gradient = np.stack([np.gradient(displacement, axis=a) for a in range(3)], -1)
    matrices = np.eye(3) + gradient @ np.linalg.inv(FIXED.voxel_to_mm[:3, :3])
    np.testing.assert_allclose(whole, np.linalg.det(matrices), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(warping, "_JACOBIAN_SLAB", 2 * FIXED.shape[1] * FIXED.shape[2])
    np.testing.assert_allclose(warping.jacobian_map(t, FIXED), whole, atol=1e-6)


# --- a network's box that is smaller than the scan ------------------------------------


def boxed(scan, shape=(12, 14, 11), spacing_mm=1.5):
    """The box's grid and what it lacks of the scan."""
    box = scan.centred(shape, spacing_mm)
    return box, box.padding(scan)


def placed(unit, box, padding):
    """A map of a scan onto itself, over all of it."""
    whole = transform.padded(unit, box.shape, padding)
    return transform.in_world(whole, box.padded(padding), box.padded(padding))


@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(*[st.integers(6, 40)] * 3),
    box=st.tuples(*[st.integers(4, 12)] * 3),
    far=st.floats(-500, 500),
)
def test_a_shift_goes_on_beyond_the_box(shape, box, far):
    scan = grid(shape, origin=(far, 20, -far))
    where, padding = boxed(scan, box)
    shift = np.float32([0.11, -0.23, 0.31])  # unit
    field = np.broadcast_to(shift, (1, *box, 3))
    world = placed(Transform((Displacement(field),)), where, padding)
    expected = where.unit_to_mm[:3, :3] @ shift
    got = warping.displacement_mm(world, scan)
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=1e-3)
    determinant = warping.jacobian_map(world, scan).astype(np.float64)
    assert np.std(np.log(determinant)) < 1e-6
    np.testing.assert_allclose(determinant, 1, atol=2e-6)


@pytest.mark.parametrize("shape", [(12, 14, 11), (10, 9, 12)])
def test_beyond_the_box_the_edge_goes_on(shape):
    """Against NumPy: the field read at the nearest place of the box."""
    scan = grid((30, 28, 40))
    box, padding = boxed(scan, shape)
    assert padding.all()
    unit = Transform((Displacement(field(shape=shape)),))
    world = placed(unit, box, padding)
    rng = np.random.default_rng(3)
    at = mm(scan, rng.uniform(0, 1, (1, 200, 3)))
    inside = at @ np.linalg.inv(box.unit_to_mm)[:3, :3].T
    inside = inside + np.linalg.inv(box.unit_to_mm)[:3, 3]
    assert ((inside < 0) | (inside > 1)).any(-1).mean() > 0.5
    nearest = np.clip(inside, 0, 1).astype(np.float32)
    moved = np.asarray(sampling.sample(jnp.asarray(unit.steps[0].field), nearest))
    expected = at + moved @ box.unit_to_mm[:3, :3].T
    np.testing.assert_allclose(world.map_points(at), expected, atol=1e-4)


def test_a_bend_behind_the_field_is_not_cut_off_at_the_box():
    scan = grid((30, 28, 40))
    box, padding = boxed(scan)
    bend = Displacement(field(seed=5, shape=(4, 4, 4)))
    wide = np.linalg.inv(scan.unit_to_mm) @ box.unit_to_mm
    steps = (Displacement(field(shape=box.shape)), Affine(wide), bend)
    unit = Transform((*steps, Affine(np.linalg.inv(wide))))
    world = placed(unit, box, padding)
    voxels = np.array([[[1.0, 2, 3], [28, 2, 38], [15, 14, 20], [2, 26, 20]]])
    at = voxels @ scan.affine_mm[:3, :3].T + scan.affine_mm[:3, 3]
    enter = np.linalg.inv(box.unit_to_mm)
    there = unit.map_points(at @ enter[:3, :3].T + enter[:3, 3])
    # Read between the voxels of the box, so nearly.
    np.testing.assert_allclose(world.map_points(at), mm(box, there), atol=0.3)


def test_a_stretch_has_one_determinant_within_the_box():
    scan = grid((30, 28, 40))
    box, padding = boxed(scan)
    stretch = np.float32([0.2, -0.1, 0.05])
    unit = np.asarray(sampling.identity(box.shape)) * stretch
    world = placed(Transform((Displacement(unit),)), box, padding)
    part = scan.within(box)
    assert 8 <= min(part.shape) and part.shape < scan.shape
    determinant = warping.jacobian_map(world, part).astype(np.float64)
    np.testing.assert_allclose(determinant, np.prod(1 + stretch), rtol=3e-6)
    assert np.std(np.log(determinant)) < 1e-6
    # Beyond it the map goes on without a jump: along the edge as it was there.
    beyond = warping.jacobian_map(world, scan)
    assert beyond.min() > 0.8
    assert beyond.max() < 1.3


def test_no_padding_leaves_a_field_as_it_is():
    unit = Transform((Displacement(field()),))
    none = np.zeros((3, 2), int)
    assert transform.padded(unit, NETWORK, none) is unit


def test_round_trip_of_a_map_and_what_is_not_quite_its_inverse():
    linear = rotation(0.1, 0.0, -0.05)
    there = Transform((Affine(matrix(linear, (1, -2, 0.5))),))
    exact = np.linalg.inv(matrix(linear, (1, -2, 0.5)))
    off = Transform((Affine(matrix(shift=(0.3, 0, -0.4)) @ exact),))
    mean, largest = warping.round_trip_mm(there, off, FIXED, MOVING)
    np.testing.assert_allclose([mean, largest], 0.5, atol=1e-4)
    far = Transform((Affine(matrix(shift=(500, 0, 0))),))
    assert np.isnan(warping.round_trip_mm(there, far, FIXED, MOVING)).all()
