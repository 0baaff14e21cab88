"""SAM's losses against loops that state them anew, and where the value is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import contrastive

# Nothing is left to chance: all that may be chosen is taken.
ALL = 10**6
CERTAIN = contrastive.ContrastiveConfig(
    candidates=ALL, positives=ALL, hard=9, negatives=9,
    coarse_hard=7, coarse_negatives=7, coarse_global=ALL,
)  # fmt: skip
IMAGE, FINE, COARSE = (4, 6, 8), (2, 3, 4), (1, 2, 3)
PAIRS = 3


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batch_of(seed=0, apart_mm=0.0):
    """Random embeddings at places without any order; `apart_mm` between the views."""
    rng = np.random.default_rng(seed)
    n = 2 * PAIRS
    fine = unit(rng.normal(size=(n, *FINE, 5)))
    coarse = unit(rng.normal(size=(n, *COARSE, 4)))
    places = rng.uniform(0, 40, size=(n, *IMAGE, 3))
    places[1::2] += apart_mm
    valid = (rng.uniform(size=(n, *IMAGE, 1)) > 0.2) * 1.0
    return [np.asarray(a, np.float32) for a in (fine, coarse, places, valid)]


# --- the losses once more, voxel by voxel -------------------------------------------


def trilinear(image, shape):
    """Half-pixel resize of D H W C by its definition."""
    out = np.zeros((*shape, image.shape[-1]))
    for target in np.ndindex(*shape):
        total = 0.0
        at = [
            min(max((t + 0.5) * n / m - 0.5, 0), n - 1)
            for t, n, m in zip(target, image.shape[:3], shape, strict=True)
        ]
        for corner in np.ndindex(2, 2, 2):
            voxel, weight = [], 1.0
            for a, c, n in zip(at, corner, image.shape[:3], strict=True):
                low = int(math.floor(a))
                weight *= a - low if c else 1 - (a - low)
                voxel.append(min(low + c, n - 1))
            total = total + weight * image[tuple(voxel)]
        out[target] = total
    return out.reshape(-1, image.shape[-1])


def nearest(image, shape):
    index = [
        [i * n // m for i in range(m)]
        for n, m in zip(image.shape[:3], shape, strict=True)
    ]
    return image[np.ix_(*index)].reshape(-1)


def cross_entropy(positive, negatives, temperature):
    logits = np.array([positive, *negatives]) / temperature
    return np.log(np.exp(logits).sum()) - logits[0]


def top(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def fine_of_pair(fine, coarse, places, valid, c):
    """Two views of flat voxels; returns the mean over both views' queries."""
    shown = [p[v > 0] for p, v in zip(places, valid, strict=True)]
    low = np.maximum(shown[0].min(0), shown[1].min(0))
    high = np.minimum(shown[0].max(0), shown[1].max(0))
    losses = []
    if (low > high).any():
        for q in range(len(fine[0])):
            scores = fine[0] @ fine[0][q]
            distance = np.linalg.norm(places[0] - places[0][q], axis=1)
            scores = scores * (distance >= c.fine_ignore_mm)
            negatives = [scores[i] for i in top(scores, c.negatives)]
            losses.append(
                cross_entropy(fine[0][q] @ fine[0][q], negatives, c.temperature)
            )
        return np.mean(losses)
    found = []
    for view in (0, 1):
        inside = [
            i
            for i, p in enumerate(places[view])
            if valid[view][i] > 0 and (p >= low).all() and (p <= high).all()
        ]
        distances = {
            i: np.linalg.norm(places[1 - view] - places[view][i], axis=1)
            for i in inside
        }
        found.append(distances)
    limit = c.fine_positive_mm
    least = min(d.min() for d in found[0].values())
    if least >= limit:
        limit = least + 0.5
    everywhere, similar = np.concatenate(places), np.concatenate(fine)
    rough = np.concatenate(coarse)
    for view in (0, 1):
        for q, distances in found[view].items():
            if distances.min() >= limit:
                continue
            keep = np.linalg.norm(everywhere - places[view][q], axis=1)
            keep = keep >= c.fine_ignore_mm
            alike = similar @ fine[view][q]
            scores = (alike + rough @ coarse[view][q]) * keep
            negatives = [alike[i] for i in top(scores, c.hard)]
            positive = fine[view][q] @ fine[1 - view][distances.argmin()]
            losses.append(cross_entropy(positive, negatives, c.temperature))
    return np.mean(losses)


def coarse_of_pair(coarse, places, others, c):
    everywhere, features = np.concatenate(places), np.concatenate(coarse)
    losses = []
    for view in (0, 1):
        for q, feature in enumerate(coarse[view]):
            distances = np.linalg.norm(places[1 - view] - places[view][q], axis=1)
            k = distances.argmin()
            along = abs(places[view][q][0] - places[1 - view][k][0])
            if distances[k] >= c.coarse_positive_mm or along >= (8, 6)[view]:
                continue
            away = np.linalg.norm(everywhere - places[view][q], axis=1)
            scores = features @ feature * (away >= c.coarse_ignore_mm)
            negatives = [scores[i] for i in top(scores, c.coarse_hard)]
            negatives += list(others @ feature)
            losses.append(
                cross_entropy(feature @ coarse[1 - view][k], negatives, c.temperature)
            )
    if losses:
        return np.mean(losses)
    for feature in features:
        scores = np.sort(features @ feature)[::-1][: c.coarse_negatives + 1]
        negatives = [*scores[1:], *(others @ feature)]
        losses.append(cross_entropy(scores[0], negatives, c.temperature))
    return np.mean(losses)


def restated(fine, coarse, places, valid, c):
    arrays = [a.astype(np.float64) for a in (fine, coarse, places, valid)]
    fine, coarse, places, valid = arrays
    flat = [f.reshape(-1, f.shape[-1]) for f in fine]
    rough = [unit(trilinear(f, FINE)) for f in coarse]
    at = [trilinear(p, FINE) for p in places]
    seen = [nearest(v, FINE) for v in valid]
    of_fine = [
        fine_of_pair(*(a[i : i + 2] for a in (flat, rough, at, seen)), c)
        for i in range(0, len(fine), 2)
    ]
    low = [f.reshape(-1, f.shape[-1]) for f in coarse]
    at = [trilinear(p, COARSE) for p in places]
    of_coarse = [
        coarse_of_pair(
            low[i : i + 2],
            at[i : i + 2],
            np.concatenate(low[:i] + low[i + 2 :]),
            c,
        )
        for i in range(0, len(coarse), 2)
    ]
    return np.mean(of_fine), np.mean(of_coarse)


@pytest.fixture(scope="module")
def run():
    return jax.jit(contrastive.contrastive, static_argnames="config")


@pytest.mark.parametrize(
    ("apart_mm", "change"),
    [
        (0.0, {}),
        (0.0, {"fine_positive_mm": 1e-3, "fine_ignore_mm": 12.0}),
        (4.0, {"coarse_ignore_mm": 14.0}),
        (1000.0, {}),
    ],
    ids=["shared", "nothing_near", "shifted", "apart"],
)
def test_losses_are_those_of_the_loops(run, apart_mm, change):
    config = dataclasses.replace(CERTAIN, **change)
    batch = batch_of(apart_mm=apart_mm)
    total, parts = run(*batch, jax.random.key(0), config=config)
    fine, coarse = restated(*batch, config)
    assert parts["fine"] == pytest.approx(fine, rel=1e-5)
    assert parts["coarse"] == pytest.approx(coarse, rel=1e-5)
    assert total == pytest.approx(fine + coarse, rel=1e-5)


# --- where the value is known, or its order -----------------------------------------


def test_embeddings_of_places_are_better_than_random_ones(run):
    fine, coarse, places, valid = batch_of()
    rng = np.random.default_rng(1)
    waves = rng.normal(size=(3, 64)) / 8

    def embedded(shape):
        at = np.stack([trilinear(p, shape).reshape(*shape, 3) for p in places])
        # Each volume is another body: its waves have other phases.
        phase = np.repeat(rng.uniform(0, 6, size=(PAIRS, 1, 1, 1, 64)), 2, axis=0)
        return unit(np.cos(at @ waves + phase)).astype(np.float32)

    good = run(
        embedded(FINE), embedded(COARSE), places, valid, jax.random.key(0),
        config=CERTAIN,
    )[1]  # fmt: skip
    wide = [unit(rng.normal(size=(2 * PAIRS, *s, 64))) for s in (FINE, COARSE)]
    poor = run(
        *(a.astype(np.float32) for a in wide), places, valid, jax.random.key(0),
        config=CERTAIN,
    )[1]  # fmt: skip
    for name in ("fine", "coarse"):
        assert good[name] < poor[name] - 0.1, name


def test_ignored_places_stay_with_similarity_zero():
    """One direction per volume, and everything of one's own ignored."""
    features = np.zeros((4, *COARSE, 2), np.float32)
    features[:2, ..., 0] = features[2:, ..., 1] = 1
    places = np.random.default_rng(0).uniform(0, 4, (4, *COARSE, 3)).astype("f4")
    config = dataclasses.replace(CERTAIN, coarse_ignore_mm=1e3)
    found = contrastive.coarse_loss(features, places, jax.random.key(0), config)
    zeros = 7 + 2 * math.prod(COARSE)
    assert found == pytest.approx(math.log(1 + zeros * math.exp(-2)), rel=1e-5)


def test_views_apart_are_their_own_positives():
    features = np.full((2, *FINE, 1), 1.0, np.float32)
    places = np.random.default_rng(0).uniform(0, 9, (2, *FINE, 3)).astype("f4")
    places[1] += 100
    valid = np.ones((2, *FINE, 1), np.float32)
    config = dataclasses.replace(CERTAIN, fine_ignore_mm=0.0)
    found = contrastive.fine_loss(
        features, features, places, valid, jax.random.key(0), config
    )
    assert found == pytest.approx(math.log(10), rel=1e-5)


def test_voxels_that_show_nothing_are_no_place(run):
    """Where one view is invalid as a whole, it does not matter where it is."""
    fine, coarse, places, valid = batch_of()
    valid[1::2] = 0
    apart = places.copy()
    apart[1::2] += 1000
    found, expected = (
        float(run(fine, coarse, p, valid, jax.random.key(0), config=CERTAIN)[1]["fine"])
        for p in (places, apart)
    )
    assert np.isfinite(found) and found == pytest.approx(expected, rel=1e-6)


def test_gradient_is_finite_and_reaches_both(run):
    batch = batch_of()
    config = contrastive.ContrastiveConfig(
        candidates=20, positives=5, hard=12, negatives=4,
        coarse_hard=6, coarse_negatives=3, coarse_global=5,
    )  # fmt: skip

    def loss(fine, coarse, key):
        return contrastive.contrastive(fine, coarse, *batch[2:], key, config)[0]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = step(*batch[:2], jax.random.key(0))
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.any(gradient)
    again, _ = step(*batch[:2], jax.random.key(0))
    other, _ = step(*batch[:2], jax.random.key(1))
    assert value == again and value != other


def test_some_takes_each_set_of_a_mask():
    mask = jnp.array([True, False, True, True, False])
    seen = set()
    for seed in range(60):
        index, taken = contrastive._some(jax.random.key(seed), mask, 2)
        assert taken.all() and mask[index].all()
        seen.add(tuple(sorted(index.tolist())))
    assert seen == {(0, 2), (0, 3), (2, 3)}
    index, taken = contrastive._some(jax.random.key(0), mask, 4)
    assert sorted(index[taken].tolist()) == [0, 2, 3]


def test_columns_are_chosen_row_by_row():
    values = jnp.arange(600).reshape(100, 6)
    found = np.asarray(contrastive._some_columns(jax.random.key(0), values, 3))
    assert found.shape == (100, 3) and (found // 6 == np.arange(100)[:, None]).all()
    assert all(len(set(row)) == 3 for row in found.tolist())
    assert len({tuple(sorted(row % 6)) for row in found}) > 10
    whole = contrastive._some_columns(jax.random.key(0), values, 9)
    np.testing.assert_array_equal(np.sort(whole, 1), values)


@pytest.mark.parametrize("views", [2, 5])
def test_batches_that_are_refused(views):
    batch = [a[:views] for a in batch_of()]
    with pytest.raises(ValueError, match="two of each of at least two volumes"):
        contrastive.contrastive(*batch, jax.random.key(0))
