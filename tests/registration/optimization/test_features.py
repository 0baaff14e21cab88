"""Optimisation of a map that is there already: by features, and by intensities."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.errors import UserError
from jaxreg.models.sam import Embeddings
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration.optimization import features, map
from jaxreg.registration.optimization.loop import Optimized
from jaxreg.space import fields, filters, sampling
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Displacement, Transform
from jaxreg.typing import Pair

SHAPE = (32, 32, 32)
FINE = (16, 16, 16)
# The published weight belongs to a grid of 96 voxels, where a field changes less from
# one to the next.
LOOSE = features.FeatureConfig(smoothness=20.0)
MIDDLE = (0, slice(6, -6), slice(6, -6), slice(6, -6))


def test_mean_filter_counts_the_zeros_beyond():
    image = np.random.default_rng(0).normal(size=(2, 5, 4, 6, 3)).astype(np.float32)
    expected = image
    for times in (1, 2, 3):
        expected = ndimage.uniform_filter(
            expected, (1, 3, 3, 3, 1), mode="constant", cval=0.0
        )
        found = filters.mean_filter(jnp.asarray(image), times)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    ones = np.asarray(filters.mean_filter(jnp.ones((1, 4, 4, 4, 1))))[0, ..., 0]
    assert ones[0, 0, 0] == pytest.approx(8 / 27)
    assert ones[1, 0, 2] == pytest.approx(18 / 27)
    assert ones[1, 2, 2] == pytest.approx(1)


def pattern(shape, points, channels, seed):
    """Smooth embeddings at unit points, of length 1: 1 D H W C."""
    rng = np.random.default_rng(seed)
    waves, phases = rng.normal(size=(3, channels)) * 5, rng.uniform(0, 6, channels)
    found = np.sin(np.asarray(points) @ waves + phases).reshape(1, *shape, channels)
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


SHIFT = np.array([0.03, -0.04, 0.05])
"""Unit: about one voxel."""


def embeddings(shift):
    """Of an image whose anatomy lies `shift` further along."""

    def at(shape, seed):
        return pattern(shape, np.asarray(sampling.identity(shape)) - shift, 8, seed)

    return Embeddings(at(FINE, 1), at((8, 4, 4), 2))


def test_loss_of_a_displacement_by_hand():
    rng = np.random.default_rng(0)
    d = rng.normal(size=(1, *FINE, 3)).astype(np.float32) * 0.02
    source, target = (pattern(FINE, rng.uniform(size=(1, *FINE, 3)), 4, 3),) * 2
    config = features.FeatureConfig(smoothings=1, coarse=False)
    loss, parts = features.feature_loss(
        jnp.asarray(d), (jnp.asarray(source),), (jnp.asarray(target),), config
    )
    smooth = ndimage.uniform_filter(d, (1, 3, 3, 3, 1), mode="constant")
    rough = sum((np.diff(smooth, axis=a) ** 2).mean() for a in (1, 2, 3))
    axes = [np.arange(n) for n in FINE]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    # Canonical units: from -1 to 1.
    index = index + smooth[0] * (np.array(FINE) - 1) / 2
    read = np.stack(
        [
            ndimage.map_coordinates(
                source[0, ..., c], np.moveaxis(index, -1, 0), order=1, mode="nearest"
            )
            for c in range(4)
        ],
        -1,
    )
    read /= np.linalg.norm(read, axis=-1, keepdims=True)
    fine = -(read * target[0]).sum(-1).mean()
    assert float(parts["fine"]) == pytest.approx(fine, rel=1e-4)
    assert float(parts["smoothness"]) == pytest.approx(rough, rel=1e-4)
    assert float(loss) == pytest.approx(fine + 1000 * rough, rel=1e-4)
    assert "coarse" not in parts


def test_a_known_shift_of_embeddings_is_recovered():
    image = jnp.zeros((1, *SHAPE, 1))
    pair = Pair(image, image + 1)

    def extract(image):
        return embeddings(SHIFT if float(image.max()) == 0 else np.zeros(3))

    seen = []
    found = features.optimize_features(
        pair,
        features.UNTOUCHED,
        extract,
        config=LOOSE,
        progress=lambda step, total, parts: seen.append((step, total)),
    )
    assert seen == [(i, 50) for i in range(1, 51)]
    assert set(found.history) == {"fine", "coarse", "smoothness", "loss"}
    assert len(found.history["loss"]) == 51
    for name in ("fine", "coarse"):
        gained = found.history[name][0] - found.history[name][-1]
        assert gained > 0.5 * (1 + found.history[name][0]), name
    (step,) = found.forward.steps
    assert step.field.shape == (1, *SHAPE, 3)
    moved = np.asarray(step.field)[MIDDLE].mean((0, 1, 2))
    np.testing.assert_allclose(moved, SHIFT, atol=0.012)
    # In the corners most of what the filters count is zero.
    assert np.all(np.abs(step.field[0, 0, 0, 0]) < 0.5 * np.abs(moved))
    (back,) = found.backward.steps
    np.testing.assert_array_equal(back.field, -step.field)


# --- from where a network left it, with descriptors of images ------------------------


def blobs(points):
    """Brightness at unit points ... 3, [0, 1]."""
    rng = np.random.default_rng(1)
    centres, sizes = rng.uniform(0.15, 0.85, (14, 3)), rng.uniform(0.05, 0.12, 14)
    squares = ((np.asarray(points)[..., None, :] - centres) ** 2).sum(-1)
    return np.exp(-squares / (2 * sizes**2)).sum(-1)


FIRST = np.array([0.1, 0.0, -0.05])
REST = np.array([0.02, -0.03, 0.02])


@pytest.fixture(scope="module")
def started():
    """moving(x + FIRST + REST) is fixed(x), and a network that found FIRST alone."""
    here = np.asarray(sampling.identity(SHAPE))
    images = [
        jnp.asarray(blobs(here - shift), jnp.float32)[..., None]
        for shift in (FIRST + REST, np.zeros(3))
    ]
    field = jnp.broadcast_to(jnp.asarray(FIRST, jnp.float32), (1, *SHAPE, 3))
    start = Optimized(
        Transform((Displacement(field),)), Transform((Displacement(-field),))
    )
    return Pair(*images), start


def unlikeness(pair, transform):
    points = transform.map_points(sampling.identity(SHAPE))
    warped = np.asarray(fields.warp(pair.moving, jnp.asarray(points)))
    return np.abs(warped - pair.fixed)[MIDDLE].mean()


def test_descriptors_find_what_the_network_left(started):
    pair, start = started
    found = features.optimize_features(
        pair, start, features.mind_features, steps=40, config=LOOSE
    )
    assert len(found.forward.steps) == 2
    assert found.forward.steps[1] is start.forward.steps[0]
    assert unlikeness(pair, found.forward) < 0.6 * unlikeness(pair, start.forward)
    moved = np.asarray(found.forward.steps[0].field)[MIDDLE].mean((0, 1, 2))
    assert np.linalg.norm(moved - REST) < 0.5 * np.linalg.norm(REST)
    points = jnp.asarray(np.full((1, 1, 3), 0.5, np.float32))
    there = found.backward.map_points(found.forward.map_points(points))
    np.testing.assert_allclose(there, points, atol=0.01)


def test_the_map_itself_is_moved(started):
    pair, start = started
    found = map.optimize_map(pair, start, steps=30)
    assert set(found.history) == {"similarity", "folding", "loss"}
    assert found.history["loss"][-1] < 0.5 * found.history["loss"][0]
    assert unlikeness(pair, found.forward) < 0.6 * unlikeness(pair, start.forward)
    np.testing.assert_allclose(
        found.history["loss"],
        found.history["similarity"] + 10 * found.history["folding"],
        rtol=1e-4,
    )


def noise_pair(shape, seed=0):
    """Two images that have nothing in common, so that a free map tears them apart."""
    rng = np.random.default_rng(seed)
    images = [ndimage.gaussian_filter(rng.normal(size=shape), 2) for _ in range(2)]
    images = [(i - i.min()) / (i.max() - i.min()) for i in images]
    return Pair(*(jnp.asarray(i, jnp.float32)[None, ..., None] for i in images))


def folded_at(field, factor):
    """Share of negative determinants between the voxels, as SimpleITK has them."""
    sitk = pytest.importorskip("SimpleITK")
    shape = np.asarray(field.shape[1:4])
    axes = [np.linspace(0, 1, factor * (n - 1) + 1) for n in shape]
    finer = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    moved = sampling.sample(field, jnp.asarray(finer, jnp.float32)[None])[0]
    # Displacements along x, y, z in voxels of the finer grid.
    moved = np.asarray(moved, np.float64) * (shape - 1) * factor
    image = sitk.GetImageFromArray(moved[..., ::-1], isVector=True)
    determinant = sitk.GetArrayFromImage(
        sitk.DisplacementFieldJacobianDeterminant(image)
    )
    return (determinant[1:-1, 1:-1, 1:-1] <= 0).mean()


def test_a_map_that_is_moved_does_not_fold():
    pair = noise_pair((16, 18, 14))
    found = map.optimize_map(pair, features.UNTOUCHED, steps=40)
    assert found.history["loss"][-1] < 0.7 * found.history["loss"][0]
    (step,) = found.forward.steps
    assert [folded_at(step.field, factor) for factor in (1, 3)] == [0, 0]


def test_a_start_that_folds_is_unfolded_where_it_does():
    rng = np.random.default_rng(0)
    field = np.full((1, 16, 18, 14, 3), 0.1, np.float32)
    field[0, 3:7, 4:8, 5:9] += rng.normal(size=(4, 4, 4, 3)) * 0.1
    field = jnp.asarray(field)
    assert folded_at(field, 1) > 0
    found = map.unfolded(field, between=True)
    assert [folded_at(found, factor) for factor in (1, 3)] == [0, 0]
    np.testing.assert_array_equal(found[:, 10:], field[:, 10:])
    np.testing.assert_array_equal(map.unfolded(found, between=True), found)
    # And nothing is repeated for ever where there is no number to be had.
    assert np.isnan(map.unfolded(field * jnp.nan)).all()


def test_descriptors_of_any_grid():
    image = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 9, 20, 33, 1)), "f4")
    found = features.mind_features(image)
    assert found.fine.shape[1:4] == (6, 16, 24)
    assert found.coarse.shape[1:4] == (3, 2, 3)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(started, steps):
    with pytest.raises(ValueError, match="at least 1"):
        map.optimize_map(*started, steps=steps)
    with pytest.raises(ValueError, match="at least 1"):
        features.optimize_features(*started, features.mind_features, steps=steps)


# --- as registering does it -----------------------------------------------------------


def scan(shift_mm, name):
    grid = Grid((24, 26, 22), np.diag([2.0, 2.0, 2.0, 1.0])[:, [2, 1, 0, 3]])
    axes = [np.arange(n) for n in grid.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    mm = index @ grid.affine_mm[:3, :3].T - shift_mm
    return Volume((1000 * blobs(mm / 46)).astype(np.float32), grid, name)


# On a coarse grid the published smoothness of features leaves little to move.
@pytest.mark.parametrize(("target", "left"), [("features", 0.95), ("map", 0.7)])
def test_without_a_network_it_starts_where_the_scans_are(target, left):
    moving, fixed = scan(np.array([1.5, -2.0, 1.0]), "moving"), scan(0.0, "fixed")
    options = options_lib.Options(
        shape=(20, 24, 22), io_target=target, io_iterations=20, io_sim="ncc"
    )
    result = pair_lib.register(moving, fixed, None, options)
    assert result.similarity_after < left * result.similarity_before
    assert result.inverse_residual_mm[0] < 0.1
    assert len(result.history["loss"]) == 21


def test_without_a_network_extents_are_not_stretched():
    """One thing in two fields of view, and headers that agree."""
    fixed = scan(0.0, "fixed")
    wide = Grid((40, 42, 38), fixed.grid.affine_mm.copy())
    wide.affine_mm[:3, 3] = -16.0
    array = np.zeros(wide.shape, np.float32)
    array[8:32, 8:34, 8:30] = fixed.array
    options = options_lib.Options(
        shape=(16, 16, 16), io_target="map", io_iterations=1, io_lr=1e-6, io_sim="ncc"
    )
    result = pair_lib.register(Volume(array, wide, "wide"), fixed, None, options)
    points = np.random.default_rng(0).uniform(10, 30, (1, 5, 3))
    np.testing.assert_allclose(result.transform.map_points(points), points, atol=0.1)
    assert result.started_from == "headers"


def test_what_it_does_not_know_is_refused():
    options = options_lib.Options(io_target="features", dice_loss_weight=1.0)
    with pytest.raises(UserError, match="knows neither `dice_loss_weight`"):
        options_lib.check_options(options)
    options = options_lib.Options(io_target="map", io_iterations=None)
    with pytest.raises(UserError, match="`io_target` map needs instance"):
        options_lib.check_options(options)
