"""Displacement fields: compose, invert, measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.space import fields, sampling

SHAPE = (7, 8, 6)


def smooth(shape=SHAPE, size=0.03, seed=0, batch=1):
    coarse = np.random.default_rng(seed).normal(0, size, (batch, 4, 4, 4, 3))
    return sampling.resize_half_pixel(jnp.asarray(coarse, "f4"), shape)


def fading(shape=(16, 15, 17), size=0.04, seed=0):
    """Waves that are zero on the border, so that they map the cube onto itself."""
    rng = np.random.default_rng(seed)
    x = sampling.identity(shape)
    waves = jnp.asarray(rng.uniform(-1.5, 1.5, (3, 3)), "f4")
    phase = jnp.asarray(rng.uniform(0, 6, 3), "f4")
    bump = jnp.prod(jnp.sin(jnp.pi * x), axis=-1, keepdims=True)
    waves = waves[None, None, None, None]
    angle = jnp.pi * (x[..., None] * waves).sum(-2) + phase[None, None, None, None]
    return size * bump * jnp.sin(angle)


def affine_field(matrix, shift, shape=SHAPE):
    x = sampling.identity(shape)
    return (
        x @ jnp.asarray(np.asarray(matrix, "f4") - np.eye(3, dtype="f4")).T
        + (jnp.asarray(shift, "f4")[None, None, None, None])
    )


def test_evaluate_adds_the_sampled_field():
    field = smooth()
    at = jnp.asarray(np.random.default_rng(1).uniform(-0.2, 1.2, (1, 9, 3)), "f4")
    np.testing.assert_allclose(
        fields.evaluate(field, at), at + sampling.sample(field, at), atol=1e-7
    )


def test_evaluate_at_the_own_grid_adds_the_field():
    field = smooth()
    x = sampling.identity(SHAPE)
    np.testing.assert_allclose(fields.evaluate(field, x), x + field, atol=1e-6)


def test_warp_reads_the_moving_image_at_the_points():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SHAPE, 1)), "f4")
    one_voxel = jnp.array([1 / 6, 0, 0], "f4")  # pulls: fixed voxel d shows d + 1
    warped = fields.warp(
        image, sampling.identity(SHAPE) + one_voxel[None, None, None, None]
    )
    np.testing.assert_allclose(warped[:, :-1], image[:, 1:], atol=1e-5)
    np.testing.assert_allclose(warped[:, -1], image[:, -1], atol=1e-5)


def test_inside_reaches_to_the_faces_of_the_outer_voxels():
    index = np.array([[-0.5, 0, 0], [-0.6, 0, 0], [4.4, 3.5, 0], [4.4, 3.6, 0]])
    found = fields.inside(jnp.asarray(index / [4, 3, 1]), (5, 4, 2))
    assert found[..., 0].tolist() == [True, False, True, False]


def test_compose_with_identity_returns_the_other():
    field, zero = smooth(), jnp.zeros((1, *SHAPE, 3))
    np.testing.assert_allclose(fields.compose(zero, field), field, atol=1e-7)
    np.testing.assert_allclose(fields.compose(field, zero), field, atol=1e-6)


def test_compose_applies_the_inner_first():
    # Inner shifts to the point where outer, not constant, is read.
    a = affine_field(np.diag([1.1, 1.0, 1.0]), [0, 0, 0])
    b = affine_field(np.eye(3), [0.05, 0, 0])
    x = sampling.identity(SHAPE)[..., 0]
    inside = np.asarray(x) <= 0.94
    outer_a = (x + fields.compose(a, b)[..., 0])[inside]
    np.testing.assert_allclose(outer_a, (1.1 * (x + 0.05))[inside], atol=1e-5)
    outer_b = (x + fields.compose(b, a)[..., 0])[inside]
    np.testing.assert_allclose(outer_b, (1.1 * x + 0.05)[inside], atol=1e-5)


def test_compose_takes_resolution_from_the_inner_and_broadcasts():
    outer, inner = smooth((5, 6, 7)), smooth(batch=3)
    got = fields.compose(outer, inner)
    assert got.shape == (3, *SHAPE, 3)
    np.testing.assert_allclose(got[1:2], fields.compose(outer, inner[1:2]), atol=1e-6)
    with pytest.raises(ValueError, match="outer has batch size 2, inner 3"):
        fields.compose(smooth(batch=2), inner)


@jax.jit
def inverse_of(field):
    return fields.invert(lambda p: fields.evaluate(field, p), field.shape[1:4])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(0, 0.05))
def test_inverse_undoes_the_map(seed, size):
    field = fading(size=size, seed=seed)
    inverse, residual = inverse_of(field)
    assert residual.shape == field.shape[:-1]
    assert residual.max() < 1e-5
    x = sampling.identity(field.shape[1:4])
    np.testing.assert_allclose(fields.evaluate(field, x + inverse), x, atol=1e-5)
    # The other way round the inverse is interpolated: good to a part of a voxel.
    np.testing.assert_allclose(fields.compose(inverse, field), 0, atol=0.01)


def test_inverse_of_a_shift_and_of_an_affine():
    shift = affine_field(np.eye(3), [0.1, -0.05, 0.2])
    inverse, _ = fields.invert(lambda p: fields.evaluate(shift, p), SHAPE)
    np.testing.assert_allclose(inverse, -shift, atol=1e-6)
    matrix = jnp.asarray(np.diag([1.2, 0.9, 1.1]), "f4")
    inverse, residual = fields.invert(lambda p: p @ matrix, SHAPE, iterations=40)
    x = sampling.identity(SHAPE)
    np.testing.assert_allclose(x + inverse, x / jnp.diag(matrix), atol=1e-5)
    assert residual.max() < 1e-5


def test_inverse_starts_at_the_guess_and_reports_the_residual():
    shift = affine_field(np.eye(3), [0.1, -0.05, 0.2])

    def forward(p):
        return fields.evaluate(shift, p)

    _, far = fields.invert(forward, SHAPE, iterations=0)
    np.testing.assert_allclose(far, np.linalg.norm([0.1, -0.05, 0.2]), rtol=1e-5)
    inverse, near = fields.invert(forward, SHAPE, initial=-shift, iterations=0)
    assert near.max() < 1e-6
    np.testing.assert_allclose(inverse, -shift)


def test_inverse_of_a_divergent_map_keeps_the_best():
    # Slope -2 in the first axis: the iteration runs away, the first guess is best.
    def forward(p):
        return p * jnp.array([-2.0, 1.0, 1.0])[None, None, None, None]

    inverse, residual = fields.invert(forward, SHAPE, iterations=20)
    assert np.isfinite(inverse).all()
    start = jnp.linalg.norm(
        forward(sampling.identity(SHAPE)) - sampling.identity(SHAPE), axis=-1
    )
    assert (residual <= start + 1e-6).all()


def test_jacobian_of_the_identity_is_one():
    got = fields.jacobian_determinant(sampling.identity(SHAPE))
    assert got.shape == (1, *(n - 1 for n in SHAPE))
    np.testing.assert_allclose(got, 1, rtol=1e-5)


def test_jacobian_of_affine_maps():
    matrix = np.array([[1.1, 0.2, 0], [-0.1, 0.9, 0.3], [0, 0.1, 1.2]])
    points = sampling.identity(SHAPE) + affine_field(matrix, [0.1, 0, 0])
    got = fields.jacobian_determinant(points)
    np.testing.assert_allclose(got, np.linalg.det(matrix), rtol=1e-4)
    flip = sampling.identity(SHAPE) * jnp.array([1.0, -1.0, 1.0])
    np.testing.assert_allclose(fields.jacobian_determinant(flip), -1, rtol=1e-5)


def test_jacobian_in_given_spacing_and_at_its_voxel():
    points = sampling.identity(SHAPE)
    got = fields.jacobian_determinant(points, spacing=(1.0, 1.0, 1.0))
    np.testing.assert_allclose(got, 1 / (6 * 7 * 5), rtol=1e-5)
    # Backward differences: voxel (2, 3, 4) moves cell (1, 2, 3) and its upper cells.
    folded = points.at[0, 2, 3, 4, 0].add(1.0)
    changed = np.argwhere(np.abs(fields.jacobian_determinant(folded)[0] - 1) > 0.1)
    assert [1, 2, 3] in changed.tolist()
    assert changed.min(0).tolist() == [1, 2, 3]


def test_jacobian_with_an_axis_of_one_voxel_has_no_cell():
    assert fields.jacobian_determinant(sampling.identity((1, 4, 5))).size == 0
