"""Sampling and resizing in closed form, against SciPy and against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.space import sampling

SHAPE = (5, 6, 7)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def points(*shape, low=-0.4, high=1.4, seed=1):
    return np.random.default_rng(seed).uniform(low, high, (*shape, 3)).astype("f4")


def test_identity_is_zero_and_one_at_the_corners():
    grid = np.asarray(sampling.identity(SHAPE))
    assert grid.shape == (1, *SHAPE, 3)
    np.testing.assert_array_equal(grid[0, 0, 0, 0], [0, 0, 0])
    np.testing.assert_array_equal(grid[0, -1, -1, -1], [1, 1, 1])
    np.testing.assert_allclose(grid[0, 1, 2, 3], [1 / 4, 2 / 5, 3 / 6], rtol=1e-6)


def test_identity_of_one_voxel_is_its_voxel_coordinate():
    grid = np.asarray(sampling.identity((1, 2, 3)))
    np.testing.assert_array_equal(grid[0, 0, 1, 2], [0, 1, 1])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("outside", ["edge", "zeros", "half_voxel"])
def test_sampling_at_the_identity_returns_the_array(order, outside):
    values = random(2, *SHAPE, 3)
    got = sampling.sample(
        values, sampling.identity(SHAPE), order=order, outside=outside
    )
    np.testing.assert_allclose(got, values, atol=2e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_whole_numbers_are_read_at_more_points_than_a_chunk_has(batch):
    rng, shape = np.random.default_rng(0), (34, 33, 32)
    assert np.prod(shape) > sampling._CHUNK
    labels = rng.integers(0, 9, (batch, *shape, 1), np.int32)
    at = np.stack([rng.integers(0, n, (batch, *shape)) for n in shape], -1)
    got = sampling.sample_voxels(labels, jnp.asarray(at, jnp.float32), order=0)
    assert got.dtype == np.int32
    for n in range(batch):
        np.testing.assert_array_equal(
            got[n], labels[n][tuple(np.moveaxis(at[n], -1, 0))]
        )


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("outside", "mode"), [("edge", "nearest"), ("zeros", "constant")]
)
def test_agrees_with_scipy(order, outside, mode):
    values, at = random(1, *SHAPE, 2), points(1, 40)
    got = sampling.sample(values, at, order=order, outside=outside)
    index = (at[0] * (np.array(SHAPE) - 1)).T
    if outside == "zeros":  # SciPy's "constant" cuts, this one fades over a voxel
        padded = np.pad(values, [(0, 0), (2, 2), (2, 2), (2, 2), (0, 0)])
        values, index = padded, index + 2
    expected = np.stack(
        [
            scipy.ndimage.map_coordinates(
                values[0, ..., c], index, order=order, mode=mode
            )
            for c in range(2)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_rules_outside_along_one_axis():
    ramp = np.arange(1.0, 6.0, dtype=np.float32).reshape(1, 5, 1, 1, 1)
    ramp = np.tile(ramp, (1, 1, 2, 2, 1))
    voxels = np.array([-1.5, -0.6, -0.5, -0.25, 0, 4, 4.25, 4.5, 4.6, 5.5])
    at = np.stack([voxels / 4, 0 * voxels, 0 * voxels], -1)[None].astype("f4")
    for outside, expected in {
        "edge": [1, 1, 1, 1, 1, 5, 5, 5, 5, 5],
        "zeros": [0, 0.4, 0.5, 0.75, 1, 5, 3.75, 2.5, 2, 0],
        "half_voxel": [-9, -9, 1, 1, 1, 5, 5, 5, -9, -9],
    }.items():
        got = sampling.sample(ramp, at, outside=outside, fill=-9)[0, :, 0]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_zeros_over_the_edges_of_two_axes():
    ones = np.ones((1, 3, 3, 3, 1), np.float32)
    at = np.array([[[-0.25, -0.125, 0.5], [1.125, 1.25, 1.25]]], np.float32)
    got = sampling.sample(ones, at, outside="zeros")[0, :, 0]
    np.testing.assert_allclose(got, [0.5 * 0.75, 0.75 * 0.5 * 0.5], atol=1e-6)


@pytest.mark.parametrize("outside", ["edge", "half_voxel"])
def test_axis_of_one_voxel(outside):
    values = random(1, 1, 4, 5, 1)
    at = sampling.identity((1, 4, 5)) + jnp.array([[[[[0.4, 0, 0]]]]])
    got = sampling.sample(values, at, outside=outside)
    np.testing.assert_allclose(got, values, atol=1e-6)
    zeros = sampling.sample(values, at, outside="zeros")
    np.testing.assert_allclose(zeros, 0.6 * values, atol=1e-6)


@pytest.mark.parametrize("order", [0, 1])
def test_batches_broadcast_either_way(order):
    values, at = random(3, *SHAPE, 2), points(3, 4, 5)
    sample = functools.partial(sampling.sample, order=order)
    both = sample(values, at)
    assert both.shape == (3, 4, 5, 2)
    for i in range(3):
        one = slice(i, i + 1)
        np.testing.assert_allclose(both[one], sample(values[one], at[one]), atol=1e-6)
    np.testing.assert_allclose(
        sample(values[:1], at), sample(np.repeat(values[:1], 3, 0), at), atol=1e-6
    )
    np.testing.assert_allclose(
        sample(values, at[:1]), sample(values, np.repeat(at[:1], 3, 0)), atol=1e-6
    )


def test_gradient_to_points_is_zero_at_and_beyond_the_edge():
    values = jnp.asarray(random(1, *SHAPE, 1))
    at = np.array([[[0, 0.5, 0.3], [1, 0.5, 0.3], [-0.2, 0.55, 1.2]]], np.float32)
    got = jax.grad(lambda p: sampling.sample(values, p).sum())(jnp.asarray(at))[0]
    np.testing.assert_array_equal(got[[0, 1], 0], [0, 0])
    np.testing.assert_array_equal(got[2, [0, 2]], [0, 0])
    assert (np.abs(got[:2, 1:]) > 0).all()


def test_gradient_to_points_is_the_slope():
    values = jnp.asarray(random(1, *SHAPE, 2))
    at = points(1, 30, low=0.05, high=0.95)
    index = at * (np.array(SHAPE) - 1)
    # Away from the kinks at voxel centres.
    at = at[np.abs(index - np.rint(index)).min(-1) > 0.05][None]
    weight = random(*at.shape[:-1], 2, seed=3)

    def f(p):
        return (sampling.sample(values, p) * weight).sum()

    got = jax.grad(f)(jnp.asarray(at))
    step = 2e-3
    for axis in range(3):
        delta = step * np.eye(3, dtype="f4")[axis]
        upper, lower = (sampling.sample(values, at + s * delta) for s in (1, -1))
        slope = ((upper - lower) * weight).sum(-1) / (2 * step)
        np.testing.assert_allclose(got[..., axis], slope, atol=5e-3)


def test_gradient_to_values_is_the_transpose():
    values, at = random(1, *SHAPE, 2), points(1, 30)
    weight = random(1, 30, 2, seed=3)
    for outside in ("edge", "zeros", "half_voxel"):
        gradient = jax.grad(
            lambda v, o=outside: (sampling.sample(v, at, outside=o) * weight).sum()
        )(jnp.asarray(values))
        # Linear in the values, so <gradient, v> is the function itself.
        np.testing.assert_allclose(
            (gradient * values).sum(),
            (sampling.sample(values, at, outside=outside) * weight).sum(),
            rtol=1e-4,
            atol=1e-4,
        )


def torch_sample(torch, values, at, **options):
    """grid_sample with points that need a gradient."""
    image = torch.from_numpy(np.moveaxis(values, -1, 1).copy())
    p = torch.from_numpy(at.copy()).requires_grad_()
    got = torch.nn.functional.grid_sample(
        image, torch.flip(p, (-1,)) * 2 - 1, align_corners=True, **options
    )
    return got, p


@pytest.mark.torch
@pytest.mark.parametrize(
    ("outside", "padding"), [("edge", "border"), ("zeros", "zeros")]
)
def test_agrees_with_torch(outside, padding):
    torch = pytest.importorskip("torch")
    values, at = random(2, *SHAPE, 3), points(2, 4, 5, 6)
    # On the border and at corners, where the gradient rules differ.
    at[0, 0, 0] = np.linspace(0, 1, 6, dtype="f4")[:, None] * [1, 0, 1]
    theirs, p = torch_sample(torch, values, at, padding_mode=padding)
    ours = sampling.sample(values, at, outside=outside)
    np.testing.assert_allclose(
        ours, np.moveaxis(theirs.detach().numpy(), 1, -1), atol=1e-5
    )
    theirs.square().sum().backward()
    gradient = jax.grad(
        lambda q: (sampling.sample(values, q, outside=outside) ** 2).sum()
    )(jnp.asarray(at))
    # At a voxel centre the slope of either side is right; border clamps are not.
    index = at * (np.array(SHAPE) - 1)
    border = (index <= 0) | (index >= np.array(SHAPE) - 1)
    kink = (np.abs(index - np.rint(index)) < 1e-5).any(-1)[..., None]
    if outside == "edge":
        np.testing.assert_array_equal(np.asarray(gradient)[border], 0)
        np.testing.assert_array_equal(p.grad.numpy()[border], 0)
    np.testing.assert_allclose(
        np.where(kink, 0, gradient), np.where(kink, 0, p.grad.numpy()), atol=2e-3
    )


@pytest.mark.torch
@settings(max_examples=8, deadline=None)
@given(
    source=st.tuples(*[st.integers(1, 7)] * 3),
    target=st.tuples(*[st.integers(1, 7)] * 3),
)
def test_resizes_agree_with_torch(source, target):
    torch = pytest.importorskip("torch")
    image = random(2, *source, 3)
    tensor = torch.from_numpy(np.moveaxis(image, -1, 1).copy())
    for ours, options in (
        (sampling.resize_half_pixel, {"mode": "trilinear", "align_corners": False}),
        (sampling.resize_aligned, {"mode": "trilinear", "align_corners": True}),
        (sampling.resize_nearest_floor, {"mode": "nearest"}),
    ):
        theirs = torch.nn.functional.interpolate(tensor, target, **options)
        np.testing.assert_allclose(
            ours(jnp.asarray(image), target),
            np.moveaxis(theirs.numpy(), 1, -1),
            atol=2e-6,
        )


@pytest.mark.torch
def test_nearest_floor_agrees_with_torch_for_every_size():
    torch = pytest.importorskip("torch")
    for source in (5, 89, 233):
        line = np.arange(source, dtype=np.float32).reshape(1, source, 1, 1, 1)
        for target in (*range(1, 60, 14), 88, 96, 175, 256):
            theirs = torch.nn.functional.interpolate(
                torch.from_numpy(line.reshape(1, 1, source)), target, mode="nearest"
            )
            ours = sampling.resize_nearest_floor(jnp.asarray(line), (target, 1, 1))
            np.testing.assert_array_equal(np.ravel(ours), theirs.numpy().ravel())


def test_resize_aligned_is_sampling_at_the_identity():
    image = random(2, *SHAPE, 2)
    for shape in ((4, 9, 3), (1, 6, 2)):
        np.testing.assert_allclose(
            sampling.resize_aligned(jnp.asarray(image), shape),
            sampling.sample(image, sampling.identity(shape)),
            atol=1e-5,
        )


def test_resize_to_the_same_shape_changes_nothing():
    image = random(1, *SHAPE, 2)
    for resize in (
        sampling.resize_half_pixel,
        sampling.resize_aligned,
        sampling.resize_nearest_floor,
    ):
        np.testing.assert_allclose(resize(jnp.asarray(image), SHAPE), image, atol=1e-7)


def test_labels_keep_their_type():
    labels = np.arange(24, dtype=np.int32).reshape(1, 2, 3, 4, 1)
    got = sampling.resize_nearest_floor(jnp.asarray(labels), (3, 3, 3))
    assert got.dtype == np.int32
    assert set(np.unique(got)) <= set(range(24))
