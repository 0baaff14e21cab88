"""The correlation layer against arrays of SAME++'s code, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.models.unireg import features
from jaxreg.nn import correlation

NAME = "correlation_small"


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def check(value, reference, tolerance=1e-5):
    reference = channels_last(reference)
    assert value.shape == reference.shape and value.dtype == np.float32
    assert np.abs(value - reference).max() <= tolerance * np.abs(reference).max()


@pytest.fixture
def g(golden):
    return golden(NAME)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["fine", "coarse", "raw"])
def test_cosine_matches_reference(g, name):
    source, target = (channels_last(g[f"{name}_{side}"]) for side in SIDES)
    check(jax.jit(correlation.correlation)(source, target), g[f"corr_{name}"])


SIDES = ("source", "target")


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("corr_fine_ssd_kernel", {"kernel": "ssd"}),
        ("corr_fine_radius2", {"radius": 2}),
    ],
)
def test_options_match_reference(g, name, options):
    source, target = (channels_last(g[f"fine_{side}"]) for side in SIDES)
    check(correlation.correlation(source, target, **options), g[name])


@pytest.mark.golden
def test_fine_and_coarse_together_match_reference(g):
    source, target = (
        features.Features(*(channels_last(g[f"{level}_{side}"]) for level in LEVELS))
        for side in SIDES
    )
    check(jax.jit(features.correlated)(source, target), g["corr_combined"])
    together = jax.jit(features.concatenated)(source, target)
    c = source.fine.shape[-1]
    check(together[..., c : 2 * c], g["coarse_source_resized_normalised"])
    np.testing.assert_array_equal(together[..., :c], source.fine)
    np.testing.assert_array_equal(together[..., 2 * c : 3 * c], target.fine)


LEVELS = ("fine", "coarse")


def random_pair(shape=(2, 3, 4, 5, 6)):
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, *shape)).astype(np.float32)


def test_channels_count_offsets_with_the_last_axis_fastest():
    source, target = random_pair()
    found = np.asarray(correlation.correlation(source, target))
    at, k = (1, 1, 2, 3), 9 * 2 + 3 * 0 + 1  # offset (1, -1, 0)
    a, b = source[1, 2, 1, 3], target[at]
    expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    np.testing.assert_allclose(found[(*at, k)], expected, rtol=1e-5)
    # In the corner the offset leads outside: the edge is repeated.
    a, b = source[0, 0, 0, 1], target[0, 0, 0, 1]
    expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    np.testing.assert_allclose(found[0, 0, 0, 1, [13, 4, 10, 1]], expected, rtol=1e-5)


def test_zeros_have_no_direction_and_no_nan():
    source, target = random_pair()
    source[0, 1], target[0, 1] = 0.0, 0.0

    def total(s, t):
        return jnp.sum(correlation.correlation(s, t) ** 2)

    found = jax.grad(total, (0, 1))(source, target)
    assert all(np.isfinite(x).all() and np.any(x) for x in found)
    assert not np.any(correlation.normalised(np.zeros((1, 1, 1, 1, 3), np.float32)))


def test_gradient_is_that_of_a_difference_quotient():
    source, target = random_pair((1, 2, 2, 3, 4))
    direction = np.random.default_rng(1).standard_normal(source.shape).astype("f4")

    def total(step):
        return jnp.sum(correlation.correlation(source + step * direction, target) ** 3)

    slope = float(jax.grad(total)(0.0))
    quotient = float(total(1e-2) - total(-1e-2)) / 2e-2
    assert slope == pytest.approx(quotient, rel=1e-2)


def test_other_shapes_are_refused():
    source, target = random_pair()
    with pytest.raises(ValueError, match="on one grid"):
        correlation.correlation(source, target[:, 1:])
