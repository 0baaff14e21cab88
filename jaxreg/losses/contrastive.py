"""Contrastive losses of SAM's self-supervised training.

Two views of a volume know of each voxel where in the body it lies, in mm. A voxel's
embedding is to be more like that of the same place in the other view than like those
of other places: of the most similar ones nearby (hard negatives), and for the coarse
embedding of other volumes as well (diverse ones).

Everything has a fixed size: "up to K of the voxels that ..." are K rows with a mask.
Choices are made with numbers drawn from a key and carry no gradient.

References:
  Yan et al., SAM: Self-supervised learning of pixel-wise anatomical embeddings in
  radiological images, IEEE TMI 2022; its released code decides what the paper leaves
  open.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxreg.models.sam import normalise
from jaxreg.space import sampling
from jaxreg.typing import Image, Key, Labels

Rows = Float[Array, "V C"]
_SLACK_MM = 0.5
_AT_ONCE = 64  # queries whose distances to a whole view exist at a time


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Numbers of voxels and distances; the defaults train on several data sets.

    On the NIH lymph node data alone the released code has fine_positive_mm 2,
    fine_ignore_mm 20 and coarse_global 1000.

    Attributes:
      candidates: voxels per view among which fine positives are sought.
      positives: of them at most so many that have one.
      hard: most similar voxels of both views per fine query.
      negatives: of them so many are taken.
      fine_positive_mm: the same place is nearer than this.
      fine_ignore_mm: places nearer than this are no negatives.
      coarse_positive_mm: see `fine_positive_mm`.
      coarse_positive_d_mm: along D for queries of the first and of the second view;
        the released code has two numbers here.
      coarse_ignore_mm: see `fine_ignore_mm`.
      coarse_hard: see `hard`.
      coarse_negatives: see `negatives`.
      coarse_global: voxels of other volumes, common to the queries of a view.
      temperature: of the softmax over similarities.
    """

    candidates: int = 2000
    positives: int = 100
    hard: int = 2000
    negatives: int = 500
    fine_positive_mm: float = 5.0
    fine_ignore_mm: float = 3.0
    coarse_positive_mm: float = 25.0
    coarse_positive_d_mm: tuple[float, float] = (8.0, 6.0)
    coarse_ignore_mm: float = 5.0
    coarse_hard: int = 250
    coarse_negatives: int = 200
    coarse_global: int = 300
    temperature: float = 0.5


def contrastive(
    fine: Image,
    coarse: Image,
    places_mm: Image,
    valid: Labels,
    key: Key,
    config: ContrastiveConfig = ContrastiveConfig(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns fine plus coarse loss, and both by name.

    Args:
      fine: N D H W C, of length 1 over channels; two views of a volume follow each
        other.
      coarse: N D' H' W' C, likewise.
      places_mm: N D" H" W" 3, where the views' voxels lie; component 0 is along D.
      valid: N D" H" W" 1, zero where a voxel is outside the volume.
      key: for all choices.
      config: see `ContrastiveConfig`.

    Raises:
      ValueError: there are not two views of at least two volumes.
    """
    n = fine.shape[0]
    if n % 2 or n < 4 or any(a.shape[0] != n for a in (coarse, places_mm, valid)):
        raise ValueError(
            f"the batch has {[a.shape[0] for a in (fine, coarse, places_mm, valid)]} "
            "views, expected two of each of at least two volumes in every array"
        )
    fine_key, coarse_key = jax.random.split(key)
    parts = {
        "fine": fine_loss(fine, coarse, places_mm, valid, fine_key, config),
        "coarse": coarse_loss(coarse, places_mm, coarse_key, config),
    }
    return parts["fine"] + parts["coarse"], parts


def fine_loss(
    fine: Image,
    coarse: Image,
    places_mm: Image,
    valid: Labels,
    key: Key,
    config: ContrastiveConfig = ContrastiveConfig(),
) -> jax.Array:
    """Returns the mean over volumes of the fine embeddings' loss.

    Queries are voxels of the views' common box that lie near a voxel of the other view.
    The hard negatives are those with the largest sum of fine and coarse similarity;
    ignored places have a sum of 0, which is more than that of dissimilar voxels (a
    quirk of the released code). Views that share no place are compared each with
    itself: a voxel's positive is the voxel.

    Args and errors as `contrastive`; one volume is enough.
    """
    shape = fine.shape[1:4]
    coarse = jax.lax.stop_gradient(sampling.resize_half_pixel(coarse, shape))
    views = (
        _pairs(fine),
        _pairs(normalise(coarse)),
        _pairs(sampling.resize_half_pixel(places_mm, shape)),
        _pairs(sampling.resize_nearest_floor(valid, shape))[..., 0] != 0,
        jax.random.split(key, fine.shape[0] // 2),
    )
    # One after the other: the similarities of a pair take hundreds of megabytes.
    return jnp.mean(jax.lax.map(functools.partial(_fine_of_pair, config), views))


def coarse_loss(
    coarse: Image,
    places_mm: Image,
    key: Key,
    config: ContrastiveConfig = ContrastiveConfig(),
) -> jax.Array:
    """Returns the mean over volumes of the coarse embeddings' loss.

    Queries are the voxels near a voxel of the other view. Ignored places stay among
    the negatives with a similarity of 0 (a quirk of the released code). Without any
    such voxel every one is a query and its own positive.

    Args and errors as `contrastive`.
    """
    features = _pairs(coarse)
    places = _pairs(sampling.resize_half_pixel(places_mm, coarse.shape[1:4]))
    pairs, _, voxels, channels = features.shape
    if pairs < 2:
        raise ValueError("the coarse loss needs two volumes at least, the batch has 1")

    def of_pair(row):
        index, own, place, key = row
        keys = jax.random.split(key)
        # The volumes after this one, round the batch.
        others = jnp.roll(features, -index - 1, axis=0)[:-1].reshape(-1, channels)
        count = min(config.coarse_global, (pairs - 1) * 2 * voxels)
        distant = jnp.stack(
            [others[_some(k, jnp.ones(len(others), bool), count)[0]] for k in keys]
        )
        return _coarse_of_pair(own, distant, place, keys, config)

    rows = (jnp.arange(pairs), features, places, jax.random.split(key, pairs))
    return jnp.mean(jax.lax.map(of_pair, rows))


# --- one volume: views 2 V C ----------------------------------------------------------


def _fine_of_pair(config: ContrastiveConfig, views) -> jax.Array:
    features, coarse, places, valid, key = views
    low, high = (
        pick(jnp.stack([edge(v, p) for v, p in zip(valid, places, strict=True)]), 0)
        for edge, pick in ((_lowest, jnp.max), (_highest, jnp.min))
    )
    inside = valid & jnp.all((places >= low) & (places <= high), -1)
    shared = jnp.all(inside.any(1))
    return jax.lax.cond(
        shared,
        lambda: _fine_shared(features, coarse, places, inside, key, config),
        lambda: _fine_alone(features[0], places[0], key, config),
    )


def _fine_shared(features, coarse, places, inside, key, config: ContrastiveConfig):
    """The loss where the views share places; `inside` marks these, 2 V."""
    keys = jax.random.split(key, (2, 3))
    count = min(config.candidates, features.shape[1])
    candidates, is_candidate, nearest, distances = [], [], [], []
    for view in (0, 1):
        index, taken = _some(keys[view, 0], inside[view], count)
        near, distance = _nearest(places[view][index], places[1 - view])
        candidates.append(index)
        is_candidate.append(taken)
        nearest.append(near)
        distances.append(jnp.where(taken, distance, jnp.inf))
    least = jnp.min(distances[0])
    limit = jnp.where(
        least < config.fine_positive_mm, config.fine_positive_mm, least + _SLACK_MM
    )
    both, both_places = (jnp.concatenate(list(a)) for a in (features, places))
    both_coarse = jnp.concatenate(list(coarse))
    losses, weights = [], []
    for view in (0, 1):
        positive = is_candidate[view] & (distances[view] < limit)
        row, is_query = _some(keys[view, 1], positive, min(config.positives, count))
        query = candidates[view][row]
        queries, key_features = features[view][query], features[1 - view]
        similar = _products(queries, both)
        ignored = _near(places[view][query], both_places, config.fine_ignore_mm)
        # Scores choose, and carry no gradient.
        score = jax.lax.stop_gradient(similar)
        score += _products(coarse[view][query], both_coarse)
        pool = jax.lax.top_k(
            jnp.where(ignored, 0.0, score), min(config.hard, len(both))
        )[1]
        chosen = _some_columns(keys[view, 2], pool, config.negatives)
        negatives = jnp.take_along_axis(similar, chosen, 1)
        positives = jnp.sum(queries * key_features[nearest[view][row]], -1)
        losses.append(_cross_entropy(positives, negatives, config.temperature))
        weights.append(is_query)
    return _weighted_mean(losses, weights)


def _fine_alone(features, places, key, config: ContrastiveConfig):
    """The loss of one view V C against itself."""
    voxels = len(features)
    everywhere = jnp.ones(voxels, bool)
    query, _ = _some(key, everywhere, min(config.positives, voxels))
    queries = features[query]
    ignored = _near(places[query], places, config.fine_ignore_mm)
    similar = jnp.where(ignored, 0.0, _products(queries, features))
    negatives = jax.lax.top_k(similar, min(config.negatives, voxels))[0]
    positives = jnp.sum(queries**2, -1)
    return jnp.mean(_cross_entropy(positives, negatives, config.temperature))


def _coarse_of_pair(features, distant, places, keys, config: ContrastiveConfig):
    """The loss with `distant`, 2 G C, from other volumes, for each view's queries."""
    both, both_places = (jnp.concatenate(list(a)) for a in (features, places))
    nearest, is_query = [], []
    for view, most_d in enumerate(config.coarse_positive_d_mm):
        near, distance = _nearest(places[view], places[1 - view])
        along_d = jnp.abs(places[view] - places[1 - view][near])[:, 0]
        nearest.append(near)
        is_query.append((distance < config.coarse_positive_mm) & (along_d < most_d))
    found = jnp.any(jnp.stack(is_query))
    pool_size = min(config.coarse_hard, len(both))
    top_size = min(config.coarse_negatives + 1, len(both))
    losses, weights = [], []
    for view in (0, 1):
        similar = _products(features[view], both)
        distant_products = _products(features[view], distant[view])
        ignored = _near(places[view], both_places, config.coarse_ignore_mm)
        pool, index = jax.lax.top_k(jnp.where(ignored, 0.0, similar), pool_size)
        columns = jnp.broadcast_to(jnp.arange(pool_size), index.shape)
        chosen = _some_columns(
            jax.random.fold_in(keys[view], 1), columns, config.coarse_negatives
        )
        negatives = jnp.take_along_axis(pool, chosen, 1)
        positives = jnp.sum(features[view] * features[1 - view][nearest[view]], -1)
        top = jax.lax.top_k(similar, top_size)[0]
        with_key, with_self = (
            _cross_entropy(
                p, jnp.concatenate([n, distant_products], 1), config.temperature
            )
            for p, n in ((positives, negatives), (top[:, 0], top[:, 1:]))
        )
        losses.append(jnp.where(found, with_key, with_self))
        weights.append(jnp.where(found, is_query[view], True))
    return _weighted_mean(losses, weights)


# --- parts ----------------------------------------------------------------------------


def _pairs(image: jax.Array) -> jax.Array:
    """N D H W C to pairs of views of flat voxels, N/2 2 V C."""
    return image.reshape(image.shape[0] // 2, 2, -1, image.shape[-1])


def _lowest(valid: jax.Array, places: Rows) -> jax.Array:
    return jnp.min(jnp.where(valid[:, None], places, jnp.inf), 0)


def _highest(valid: jax.Array, places: Rows) -> jax.Array:
    return jnp.max(jnp.where(valid[:, None], places, -jnp.inf), 0)


def _some(key: Key, mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Up to `count` of a mask's true entries, all sets alike probable.

    Args:
      key: to draw with.
      mask: V.
      count: at most V.

    Returns:
      (index, taken), each `count`; where not taken, the index means nothing.
    """
    number = jnp.where(mask, jax.random.uniform(key, mask.shape), -1.0)
    number, index = jax.lax.top_k(number, count)
    return index, number >= 0


def _some_columns(key: Key, values: jax.Array, count: int) -> jax.Array:
    """Random `count` of each row's entries, or all where there are fewer: Q K to Q k.

    The rows' choices are independent.
    """
    count = min(count, values.shape[1])
    index = jax.lax.top_k(jax.random.uniform(key, values.shape), count)[1]
    return jnp.take_along_axis(values, index, 1)


def _square_mm(places: Rows, others: Rows) -> jax.Array:
    """Squared distances Q V; by differences, since mm are large and distances small."""
    axes = ((places[:, axis, None] - others[None, :, axis]) ** 2 for axis in range(3))
    return sum(axes, start=jnp.zeros((), places.dtype))


def _nearest(places: Rows, others: Rows) -> tuple[jax.Array, jax.Array]:
    """Returns the index of each place's nearest other one and its distance in mm, Q."""

    def of_one(place):
        square = _square_mm(place[None], others)[0]
        index = jnp.argmin(square)
        return index, square[index]

    index, square = jax.lax.map(of_one, places, batch_size=_AT_ONCE)
    return index, jnp.sqrt(square)


def _near(places: Rows, others: Rows, limit_mm: float) -> jax.Array:
    """Whether places Q and V are nearer than a limit, Q V."""
    return _square_mm(places, others) < limit_mm**2


def _products(queries: Rows, others: Rows) -> jax.Array:
    return jnp.matmul(queries, others.T, precision=jax.lax.Precision.HIGHEST)


def _cross_entropy(positives, negatives, temperature: float) -> jax.Array:
    """-log of the positive's share in a softmax: Q and Q K to Q."""
    logits = jnp.concatenate([positives[:, None], negatives], 1) / temperature
    return jax.nn.logsumexp(logits, 1) - logits[:, 0]


def _weighted_mean(losses, weights) -> jax.Array:
    """The mean over the queries of both views, 0 without any."""
    loss, weight = jnp.concatenate(losses), jnp.concatenate(weights)
    total = jnp.sum(jnp.where(weight, loss, 0.0))
    return total / jnp.maximum(jnp.sum(weight), 1)
