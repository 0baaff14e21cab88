"""RDP: what its pieces promise, on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.models import rdp
from jaxreg.nn import layers
from jaxreg.space import fields


def smooth(rng, shape, channels, scale):
    noise = rng.normal(size=(*shape, channels))
    blurred = ndimage.gaussian_filter(noise, (1.5, 1.5, 1.5, 0))
    return (scale * blurred / np.abs(blurred).max()).astype("f4")[None]


def test_warp_in_voxels_is_scipys_grid_constant():
    rng = np.random.default_rng(0)
    shape = (7, 9, 8)
    image, moved = smooth(rng, shape, 2, 1.0), smooth(rng, shape, 3, 3.0)
    found = fields.warp_voxels(image, moved)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    at = np.moveaxis(grid + moved[0].astype(np.float64), -1, 0)
    for channel in range(2):
        expected = ndimage.map_coordinates(
            image[0, ..., channel].astype(np.float64), at, order=1,
            mode="grid-constant",
        )  # fmt: skip
        np.testing.assert_allclose(found[0, ..., channel], expected, atol=2e-6)


def test_fields_in_voxels_repeat_their_edge_where_told():
    rng = np.random.default_rng(2)
    outer, inner = (smooth(rng, (8, 7, 6), 3, 4.0) for _ in range(2))
    grid = np.stack(np.meshgrid(*map(np.arange, (8, 7, 6)), indexing="ij"), -1)
    at = np.moveaxis(grid + inner[0].astype(np.float64), -1, 0)
    read = [
        ndimage.map_coordinates(outer[0, ..., c], at, order=1, mode="nearest")
        for c in range(3)
    ]
    found = fields.compose_voxels(outer, inner, outside="edge")
    np.testing.assert_allclose(found[0], inner[0] + np.stack(read, -1), atol=1e-5)


def test_composition_is_one_warp_after_the_other():
    rng = np.random.default_rng(1)
    outer, inner = (smooth(rng, (8, 8, 8), 3, 1.0) for _ in range(2))
    expected = inner + np.asarray(fields.warp_voxels(outer, inner))
    np.testing.assert_array_equal(fields.compose_voxels(outer, inner), expected)


def test_a_linear_velocity_integrates_to_the_matrix_exponential():
    # v(x) = a (x - c) moves x to c + e^a (x - c), exactly where nothing comes from
    # outside the grid; the first step of Euler's rule is the only error.
    a, n = -0.4, 17
    axes = np.arange(n, dtype="f4") - (n - 1) / 2
    velocity = a * np.stack(np.meshgrid(axes, axes, axes, indexing="ij"), -1)[None]
    found = np.asarray(fields.integrate(jnp.asarray(velocity, jnp.float32), 7))
    euler = (1 + a / 2**7) ** (2**7) - 1
    np.testing.assert_allclose(found, velocity / a * euler, atol=2e-5)
    assert abs(euler - (np.exp(a) - 1)) < 1e-3


def test_more_squarings_come_nearer():
    velocity = smooth(np.random.default_rng(2), (12, 12, 12), 3, 2.0)
    exact = np.asarray(fields.integrate(velocity, 12))
    gaps = [np.abs(fields.integrate(velocity, k) - exact).max() for k in (3, 5, 7)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_instance_norm_has_mean_zero_and_variance_one_per_sample_and_channel():
    rng = np.random.default_rng(3)
    x = rng.normal(3.0, 5.0, (2, 4, 5, 6, 3)).astype("f4")
    found = np.asarray(layers.instance_norm_leaky(jnp.asarray(x), 1.0), np.float64)
    np.testing.assert_allclose(found.mean((1, 2, 3)), 0.0, atol=1e-6)
    np.testing.assert_allclose(found.var((1, 2, 3)), 1.0, rtol=1e-5)
    leaky = np.asarray(layers.instance_norm_leaky(jnp.asarray(x), 0.1))
    np.testing.assert_allclose(leaky, np.where(found > 0, found, 0.1 * found), 1e-5)


def test_doubling_keeps_corners_and_doubles_voxels():
    field = np.arange(2.0, dtype="f4").reshape(1, 2, 1, 1, 1) * np.ones((1, 2, 2, 2, 3))
    found = np.asarray(fields.upsample_displacement(jnp.asarray(field, jnp.float32)))
    assert found.shape == (1, 4, 4, 4, 3)
    np.testing.assert_allclose(found[0, :, 0, 0, 0], [0, 2 / 3, 4 / 3, 2], atol=1e-6)


@pytest.mark.parametrize("slope", [0.01, 0.1])
def test_pyramid_alone_on_a_grid_with_unequal_sides(slope):
    model = rdp.Rdp(rdp.RdpConfig(channels=2, slope=slope))
    shape = (16, 16, 24)
    variables = model.init(jax.random.key(0), shape)
    assert set(variables) == {"params"} and "bottleneck" not in variables["params"]
    images = np.random.default_rng(0).uniform(size=(2, 1, *shape, 1)).astype("f4")
    found = jax.jit(lambda v, m, f: model.apply(v, m, f)[0])(variables, *images)
    field = found.transform.steps[0].field
    assert field.shape == (1, *shape, 3) and np.isfinite(field).all()
    assert not found.aux
