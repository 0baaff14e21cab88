"""Samplers by windows against `map_coordinates`, values and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy import ndimage

from jaxreg.space import sampling

FORMS = ("window", "packed")
OUTSIDE = ("edge", "zeros", "half_voxel")
SHAPE = (3, 5, 4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def indices(shape, *lead, seed=1):
    """Voxel indices in the array, around it and far outside; some are whole."""
    rng = np.random.default_rng(seed)
    sizes = np.array(shape)
    index = rng.uniform(-2.5, sizes + 1.5, (*lead, 3))
    kind = rng.integers(0, 10, lead)[..., None]
    index = np.where(kind == 0, np.rint(index), index)
    index = np.where(kind == 1, rng.choice([-1e9, 1e9, 0.5], (*lead, 3)), index)
    return index.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("outside", "form"))
def sampled(values, index, weight, *, outside, form):
    """Samples, and the gradients of their weighted sum."""

    def f(values, index):
        return sampling.sample_voxels(
            values, index, outside=outside, fill=-2.0, form=form
        )

    y, pull = jax.vjp(f, values, index)
    return y, *pull(weight.astype(y.dtype))


def check(values, index, outside, form, tolerance=2e-5):
    batch = max(len(values), len(index))
    weight = random(batch, *index.shape[1:-1], values.shape[-1], seed=2)
    ours = sampled(values, index, weight, outside=outside, form=form)
    theirs = sampled(values, index, weight, outside=outside, form="map_coordinates")
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a.astype("f4"), b.astype("f4"), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize(
    ("shape", "channels"),
    [((5, 6, 7), 3), ((1, 4, 9), 1), ((4, 1, 1), 2), ((1, 1, 1), 1)],
)
def test_equals_map_coordinates(shape, channels, outside, form):
    values = jnp.asarray(random(1, *shape, channels))
    check(values, jnp.asarray(indices(shape, 1, 6, 11)), outside, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("of_values", "of_points"), [(2, 2), (1, 2), (2, 1)])
def test_a_batch_shares_what_there_is_one_of(of_values, of_points, form):
    values = jnp.asarray(random(of_values, *SHAPE, 2))
    index = jnp.asarray(indices(SHAPE, of_points, 2, 3, 4))
    check(values, index, "edge", form)
    check(values, index, "zeros", form)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_values(form):
    values = jnp.asarray(random(1, *SHAPE, 3), jnp.bfloat16)
    index = jnp.asarray(indices(SHAPE, 1, 50))
    check(values, index, "edge", form, tolerance=2e-2)
    weight = random(1, 50, 3)
    read, by_values, _ = sampled(values, index, weight, outside="edge", form=form)
    assert read.dtype == by_values.dtype == jnp.bfloat16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=12, max_size=12))
def test_any_points(numbers):
    index = np.array(numbers, np.float32).reshape(1, 4, 3)
    # Half of them near the array, where an index matters.
    index[:, ::2] = np.mod(index[:, ::2], 9.0) - 2.0
    # On a kink, not within rounding of it, where each form takes a side of its own.
    index = np.where(np.abs(index - np.rint(index)) < 1e-5, np.rint(index), index)
    values = jnp.asarray(random(1, *SHAPE, 2))
    for form in FORMS:
        check(values, jnp.asarray(index), "edge", form)
        check(values, jnp.asarray(index), "zeros", form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("outside", "mode"), [("edge", "nearest"), ("zeros", "constant")]
)
def test_gradients_are_those_of_map_coordinates_differentiated(outside, mode, form):
    values = jnp.asarray(random(1, *SHAPE, 1))
    index = np.random.default_rng(1).uniform(-0.9, np.array(SHAPE) - 0.1, (40, 3))
    # Away from kinks: automatic differentiation has other rules there.
    index = index[(np.abs(index - np.rint(index)) > 0.01).all(-1)].astype("f4")
    weight = random(1, len(index), 1, seed=2)

    def reference(values, index):
        read = ndimage.map_coordinates(values[0, ..., 0], list(index.T), 1, mode)
        return jnp.sum(read * weight[0, :, 0])

    theirs = jax.grad(reference, (0, 1))(values, jnp.asarray(index))
    given = values, jnp.asarray(index)[None], weight
    _, by_values, by_index = sampled(*given, outside=outside, form=form)
    np.testing.assert_allclose(by_values, theirs[0], atol=1e-5)
    np.testing.assert_allclose(by_index[0], theirs[1], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_number_is_read_without_harm(form):
    values = jnp.asarray(random(1, *SHAPE, 1))
    index = jnp.asarray([[[np.nan, 1, 1], [1, np.inf, -np.inf], [1, 1, 1]]])
    read = sampling.sample_voxels(values, index, form=form)
    np.testing.assert_allclose(read[0, 1:, 0], values[0, 1, [4, 1], [0, 1], 0])


@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_are_rounded(form):
    labels = np.arange(60, dtype=np.int32).reshape(1, 3, 5, 4, 1)
    index = jnp.asarray([[[1, 2, 0.75], [0, 0, 0.25]]])
    read = sampling.sample_voxels(labels, index, form=form)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read[0, :, 0], [29, 0])


@pytest.mark.parametrize("outside", OUTSIDE)
def test_packed_rows_of_many_points_are_read_in_parts(outside):
    count = 2**16 + 70  # one part and a little
    values = jnp.asarray(random(2, *SHAPE, 2))
    index = jnp.asarray(indices(SHAPE, 2, count))
    # The values' gradients add up thousands of numbers, in another order.
    weight = random(2, count, 2, seed=2) / count
    ours = sampled(values, index, weight, outside=outside, form="packed")
    theirs = sampled(values, index, weight, outside=outside, form="map_coordinates")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
