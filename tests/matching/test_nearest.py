"""Matching against arrays of the released code, and where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.matching import nearest
from jaxreg.models.sam import Embeddings, normalise

NAME = "sam_match_small"


def embeddings_of(g, side):
    return Embeddings(
        *(jnp.asarray(np.moveaxis(g[f"{side}_{kind}"], 1, -1))
          for kind in ("fine", "coarse"))
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(golden):
    """Start points, plain matches, stable ones and those that are kept."""
    g = golden(NAME)
    query, key = (
        nearest.descriptors(embeddings_of(g, side), aligned=True)
        for side in ("source", "target")
    )
    points = nearest.start_points(g["source_mask"].shape, mask=g["source_mask"])
    stable = nearest.stable_match(points, query, key)
    kept = nearest.keep(
        stable,
        float(g["threshold"]),
        query_mask=g["source_mask"],
        key_mask=g["target_mask"],
    )
    return points, nearest.match(points, query, key), stable, kept


@pytest.mark.golden
def test_start_points(golden, found):
    np.testing.assert_array_equal(found[0], golden(NAME)["grid_points_xyz"][:, ::-1])


@pytest.mark.golden
def test_plain_matches(golden, found):
    g, matches = golden(NAME), found[1]
    # The file holds the voxel of the fine grid that was asked about.
    np.testing.assert_array_equal(matches.query // 2 * 2, g["match_query_zyx"])
    np.testing.assert_array_equal(matches.key, g["match_key_zyx"])
    np.testing.assert_allclose(matches.score, g["match_score"], rtol=1e-5)


@pytest.mark.golden
def test_stable_matches(golden, found):
    g, matches = golden(NAME), found[2]
    np.testing.assert_array_equal(matches.query, g["stable_query_zyx"])
    np.testing.assert_array_equal(matches.key, g["stable_key_zyx"])
    np.testing.assert_allclose(matches.score, g["stable_score"], rtol=1e-5)


@pytest.mark.golden
def test_kept_matches(golden, found):
    g, matches = golden(NAME), found[3]
    assert len(matches) < len(found[2])
    np.testing.assert_array_equal(matches.query, g["kept_query_zyx"])
    np.testing.assert_array_equal(matches.key, g["kept_key_zyx"])


@pytest.mark.golden
def test_all_at_once(golden, found):
    g = golden(NAME)
    matches = nearest.correspond(
        embeddings_of(g, "source"),
        embeddings_of(g, "target"),
        g["source_mask"].shape,
        threshold=float(g["threshold"]),
        query_mask=g["source_mask"],
        key_mask=g["target_mask"],
    )
    np.testing.assert_array_equal(matches.query, found[3].query)
    np.testing.assert_array_equal(matches.key, found[3].key)


# --- where the answer is known ------------------------------------------------------


def random_features(shape, channels=8, seed=0):
    rng = np.random.default_rng(seed)
    return normalise(jnp.asarray(rng.normal(size=(1, *shape, channels)), jnp.float32))


def test_a_shifted_volume_is_found_shifted():
    features = random_features((6, 5, 7))
    shifted = jnp.roll(features, (1, -1, 2), axis=(1, 2, 3))
    pair = [jnp.concatenate([f, f], -1) for f in (features, shifted)]
    points = np.array([[2, 4, 6], [3, 5, 7]])
    found = nearest.match(points, *pair)
    np.testing.assert_array_equal(found.key, [[4, 2, 10], [4, 2, 10]])
    np.testing.assert_allclose(found.score, 1.0, rtol=1e-5)
    stable = nearest.stable_match(points, *pair)
    np.testing.assert_array_equal(stable.query, [[2, 4, 6]])
    np.testing.assert_array_equal(stable.key, [[4, 2, 10]])


@pytest.mark.parametrize("at_once", [1, 100, 500, 10**6])
def test_chunks_make_no_difference(monkeypatch, at_once):
    monkeypatch.setattr(nearest, "_SIMILARITIES", at_once)
    rng = np.random.default_rng(1)
    queries, keys = (rng.normal(size=(n, 4)).astype("f4") for n in (7, 50))
    index, product = nearest.best.__wrapped__(queries, keys)
    whole = queries @ keys.T
    np.testing.assert_array_equal(index, whole.argmax(1))
    np.testing.assert_allclose(product, whole.max(1), rtol=1e-5)


def test_all_similarities_never_exist_at_once():
    queries, keys = (jax.ShapeDtypeStruct((n, 4), jnp.float32) for n in (2000, 10**6))
    program = jax.jit(nearest.best).lower(queries, keys).as_text()
    assert "67x1000000" in program and "2000x1000000" not in program


def test_first_of_equal_voxels_is_taken():
    features = jnp.ones((1, 2, 2, 2, 1))
    found = nearest.match(np.array([[3, 3, 3]]), features, features)
    np.testing.assert_array_equal(found.key, [[0, 0, 0]])


def test_corners_of_the_coarse_grid_are_placed_in_two_ways():
    coarse = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 1, 2, 2)
    fine = random_features((1, 1, 4), 3)
    aligned, half = (
        np.asarray(nearest.descriptors(Embeddings(fine, coarse), aligned=a))[0, 0, 0]
        for a in (True, False)
    )
    np.testing.assert_array_equal(aligned[:, 2:], fine[0, 0, 0])
    for found, weight in ((aligned, 1 / 3), (half, 1 / 4)):
        mixed = np.array([1 - weight, weight])
        mixed /= np.linalg.norm(mixed)
        np.testing.assert_allclose(found[1, :2], mixed, rtol=1e-6)
        np.testing.assert_allclose(found[0, :2], [1, 0], atol=1e-6)


def test_places_beyond_the_fine_grid_are_those_of_its_last_voxel():
    features = random_features((2, 3, 3))  # of an image 5 x 6 x 6, D rounded down
    found = nearest.match(np.array([[4, 0, 0]]), features, features)
    np.testing.assert_array_equal(found.key, [[2, 0, 0]])


def test_start_points_of_odd_sizes_and_strides():
    points = nearest.start_points((3, 9, 11), stride=5)
    assert sorted(set(points[:, 0])) == [1]
    assert sorted(set(points[:, 1])) == [1, 6]
    assert sorted(set(points[:, 2])) == [1, 6]
    mask = np.zeros((3, 9, 11))
    mask[1, 6, 1] = 1
    np.testing.assert_array_equal(
        nearest.start_points((3, 9, 11), stride=5, mask=mask), [[1, 6, 1]]
    )


def test_no_points_give_no_matches():
    features = random_features((2, 2, 2))
    for function in (nearest.match, nearest.stable_match):
        found = function(np.zeros((0, 3)), features, features)
        assert len(found) == 0 and found.key.shape == (0, 3)


def test_batches_are_refused():
    features = jnp.ones((2, 2, 2, 2, 1))
    with pytest.raises(ValueError, match="expected 1 D H W C"):
        nearest.match(np.zeros((1, 3)), features, features)


def test_an_axis_shorter_than_half_a_stride_has_one_place():
    shape = (2, 32, 32)
    points = nearest.start_points(shape, mask=np.ones(shape))
    assert set(points[:, 0]) == {1}
    assert sorted(set(points[:, 1])) == [3, 11, 19, 27]
