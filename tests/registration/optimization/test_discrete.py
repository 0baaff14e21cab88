"""The discrete search, against NumPy and SciPy; and what it does for a descent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.losses.objective import Objective
from jaxreg.registration.optimization import discrete, displacement
from jaxreg.registration.optimization.discrete import DiscreteConfig
from jaxreg.space import fields, filters, sampling
from jaxreg.typing import Pair

SHAPE = (4, 5, 6)
TINY = DiscreteConfig(reach=1, voxels=3, couplings=(0.1, 1.0))


def reference(here, there, config):
    """The search one displacement and one point at a time, d h w 3."""
    tried = discrete.window(config.reach)
    last = np.asarray(here.shape[1:]) - 1
    costs = []
    for step in tried:
        cost = np.zeros(here.shape[1:])
        for point in np.ndindex(*here.shape[1:]):
            other = tuple(np.clip(np.add(point, step), 0, last))
            cost[point] = np.sum((here[:, *point] - there[:, *other]) ** 2)
        for _ in range(2):
            cost = ndimage.uniform_filter(cost, 3, mode="constant")
        costs.append(cost)

    def smooth(best):
        each = np.moveaxis(tried[best].astype(float), -1, 0)
        return np.stack([ndimage.uniform_filter(c, 3, mode="nearest") for c in each])

    field = smooth(np.argmin(costs, 0))
    for price in config.couplings:
        leaps = np.sum((tried[..., None, None, None] - field) ** 2, 1)
        field = smooth(np.argmin(costs + price * leaps, 0))
    return np.moveaxis(field, 0, -1)


@pytest.mark.parametrize("kept", [0.0, 1.0], ids=["computed again", "kept"])
def test_displacements_equal_a_search_by_numpy(kept):
    rng = np.random.default_rng(0)
    here, there = rng.random((2, 3, *SHAPE))
    config = dataclasses.replace(TINY, kept_mib=kept)
    got = jax.jit(discrete._displacements, static_argnums=2)(here, there, config)
    wanted = reference(here, there, config)
    assert len(np.unique(wanted)) > 20
    np.testing.assert_allclose(got[0], wanted, atol=1e-5)


def test_of_equal_costs_the_shortest_displacement_wins():
    flat = jnp.ones((3, *SHAPE))
    np.testing.assert_array_equal(discrete._displacements(flat, flat, TINY), 0.0)
    tried = discrete.window(2)
    assert tried.shape == (125, 3)
    assert len(np.unique(tried, axis=0)) == 125
    assert np.all(np.diff(np.sum(tried**2, 1)) >= 0)


def test_descriptors_are_means_about_the_points():
    image = jnp.asarray(np.random.default_rng(1).random((1, 10, 13, 16, 1)), "f4")
    got = discrete._descriptors(image, SHAPE, TINY)  # every third voxel
    each = filters.mind_channels(image, TINY.radius, TINY.dilation)[:, 0]
    wanted = [ndimage.uniform_filter(c, 3, mode="nearest") for c in np.asarray(each)]
    np.testing.assert_allclose(got, np.stack(wanted)[:, ::3, ::3, ::3], atol=1e-5)


def test_consistent_displacements_equal_scipy():
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=(2, 1, *SHAPE, 3))
    got = jax.jit(discrete.consistent, static_argnums=2)(
        jnp.asarray(one), jnp.asarray(other), 3
    )

    def at_ends(field, step):
        index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) + step
        return np.stack(
            [
                ndimage.map_coordinates(c, np.moveaxis(index, -1, 0), order=1,
                                        mode="nearest")
                for c in np.moveaxis(field, -1, 0)
            ],
            -1,
        )  # fmt: skip

    wanted = one[0], other[0]
    for _ in range(3):
        a, b = wanted
        wanted = (a - at_ends(b, a)) / 2, (b - at_ends(a, b)) / 2
    for mine, others in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine[0], others, atol=1e-5)


def test_points_are_equally_far_apart_and_no_more_than_the_image_has():
    config = DiscreteConfig(points=20, voxels=3)
    assert discrete.grid_shape((64, 64, 64), (1, 1, 1), config) == (20, 20, 20)
    assert discrete.grid_shape((24, 24, 24), (1, 1, 1), config) == (8, 8, 8)
    assert discrete.grid_shape((64, 64, 64), (0.5, 1, 2), config) == (10, 20, 40)
    assert discrete.grid_shape((1, 64, 64), (1e-6, 1, 1), config)[0] == 4


# --- before a descent ----------------------------------------------------------------

CUBE = (24, 24, 24)
SHIFT = np.asarray([0.28, -0.2, 0.12])  # unit; up to 6.4 voxels
PLAIN = displacement.DisplacementConfig(factors=(1,))
BOTH = dataclasses.replace(PLAIN, discrete=DiscreteConfig())


def texture(points):
    """Many small blobs within the cube, which look alike to a descent."""
    rng = np.random.default_rng(3)
    value = np.zeros(np.shape(points)[:-1])
    for _ in range(60):
        centre, width = rng.uniform(0.1, 0.9, 3), rng.uniform(0.03, 0.06)
        distance = ((np.asarray(points) - centre) ** 2).sum(-1)
        value = value + rng.uniform(0.3, 1) * np.exp(-distance / (2 * width**2))
    return value[..., None]


def shifted_pair(shift):
    grid = np.asarray(sampling.identity(CUBE))
    images = texture(grid - shift), texture(grid)  # moving, fixed
    return Pair(*(jnp.asarray(image, jnp.float32) for image in images))


def found(pair, config):
    objective = Objective(similarity="mse", stride=4)
    return displacement.optimize_displacement(
        pair, objective, steps=20, key=jax.random.key(0), affine=False, config=config
    )


def error_voxels(result, shift):
    """Mean distance from the true shift, of points whose partners both images show."""
    grid = np.asarray(sampling.identity(CUBE))
    there = grid + shift
    inside = np.all((there > 0.1) & (there < 0.9) & (grid > 0.1) & (grid < 0.9), -1)
    wrong = (np.asarray(result.forward.on_grid(CUBE)) - there) * 23
    return np.linalg.norm(wrong[inside], axis=-1).mean()


def test_a_shift_too_large_for_a_descent_is_recovered():
    pair = shifted_pair(SHIFT)
    assert error_voxels(found(pair, PLAIN), SHIFT) > 4
    result = found(pair, BOTH)
    assert error_voxels(result, SHIFT) < 1  # of 8.4
    for transform in (result.forward, result.backward):
        points = transform.on_grid(CUBE)
        assert fields.jacobian_determinant(points).min() > 0


def test_a_start_that_is_no_better_is_left(monkeypatch):
    pair = shifted_pair(SHIFT / 20)
    far = jnp.broadcast_to(jnp.asarray(SHIFT, jnp.float32), (1, 8, 8, 8, 3))
    monkeypatch.setattr(discrete, "search", lambda *_, **__: (far, -far))
    result, plain = (found(pair, config) for config in (BOTH, PLAIN))
    for mine, others in zip(result.forward.steps, plain.forward.steps, strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, others)


def test_each_pair_of_a_batch_is_searched_alone():
    pairs = [shifted_pair(SHIFT), shifted_pair(-SHIFT / 2)]
    settings = {"shape": (8, 8, 8), "config": DiscreteConfig(reach=2)}
    both = discrete.search(
        *(jnp.concatenate([getattr(p, n) for p in pairs]) for n in ("fixed", "moving")),
        **settings,
    )
    for index, pair in enumerate(pairs):
        alone = discrete.search(pair.fixed, pair.moving, **settings)
        for mine, others in zip(both, alone, strict=True):
            np.testing.assert_allclose(mine[index], others[0], atol=1e-6)
