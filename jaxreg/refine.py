"""Instance optimisation of a map that is there already, without any network's weights.

Two ways, as SAME's code has them: a displacement before the map, by the features of the
images that it brings together; or the map itself, by intensities. Each repeats one
jitted step; as in `optimize`, the last iteration's update is dropped.

Displacements are optimised in canonical units, in which an axis has length 2: the
published rates and weights belong to these.

References:
  Tian et al., SAME++, 2023; Siebert et al., Fast 3D registration with accurate
  optimisation and little learning, MICCAI 2021 (the smoothed displacement).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import points
from jaxreg.data.preprocess import Preprocessing
from jaxreg.losses import similarity
from jaxreg.models import sam, unireg_features
from jaxreg.models.unireg_features import COARSE, Features
from jaxreg.nn.correlation import normalised
from jaxreg.optimize import Optimized, Progress, Report, repeat
from jaxreg.space import fields, filters, sampling
from jaxreg.space.transform import Displacement, Transform
from jaxreg.typing import Field, Image, Pair

Extract = Callable[[Image], Features]
"""Images N D H W 1, [0, 1], to their features."""
UNTOUCHED = Optimized(Transform(()), Transform(()))
"""What the optimisation starts from without a network: the identity."""
_EPSILON = 1e-4  # of Adam


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How features are matched; the defaults are SAME's.

    Attributes:
      smoothness: weight of the smoothed displacement's squared differences.
      smoothings: mean filters of 3^3 voxels, one after the other.
      coarse: whether the coarse features count beside the fine ones.
    """

    smoothness: float = 1000.0
    smoothings: int = 3
    coarse: bool = True


def mind_features(image: Image) -> Features:
    """Returns descriptors on any grid: `unireg_features.mind_features`.

    The image is resized first, with aligned corners, to the next grid that they divide.

    Args:
      image: N D H W 1, [0, 1].
    """
    sizes = zip(image.shape[1:4], COARSE, strict=True)
    d, h, w = (-(-n // m) * m for n, m in sizes)
    return _mind(sampling.resize_aligned(image, (d, h, w)))


_mind = jax.jit(unireg_features.mind_features)


def sam_features(
    network: sam.TrainedSam, image: Image, window: tuple[float, float]
) -> Features:
    """Returns SAM's embeddings of a CT image.

    Args:
      network: the trained one.
      image: N D H W 1, [0, 1].
      window: the Hounsfield units of 0 and 1; SAM sees none beyond its own window.
    """
    shown = points.as_sam_sees(image, Preprocessing("ct", window))
    ends = points.as_sam_sees(
        np.array([0.0, 1.0], np.float32), Preprocessing("ct", network.ct_window)
    )
    return points.embed(network, shown.clip(*ends))


def optimize_features(
    pair: Pair,
    start: Optimized,
    extract: Extract,
    *,
    steps: int = 50,
    learning_rate: float = 0.05,
    config: FeatureConfig = FeatureConfig(),
    progress: Progress | None = None,
) -> Optimized:
    """Returns a map with a displacement before it that makes features agree.

    The displacement lives on the grid of the fine features. What is compared, and kept
    smooth, is three times filtered by a mean; so is the result, at full resolution.

    Args:
      pair: one pair on the network grid, 1 D H W C.
      start: what a network says of it; the moving image is warped by it first.
      extract: images to features.
      steps: number of updates, at least 1.
      learning_rate: of Adam, canonical units per step.
      config: see `FeatureConfig`.
      progress: called after each step.

    Raises:
      ValueError: steps below 1, or more than one pair.
    """
    _check(pair, steps)
    shape = pair.fixed.shape[1:4]
    warped = _warped(pair.moving, start.forward.on_grid(shape))
    source, target = (
        _side_by_side(extract(image), coarse=config.coarse)
        for image in (warped, pair.fixed)
    )
    start_at = jnp.zeros((*source[0].shape[:4], 3))

    def step(state, index):
        return _feature_step(state, source, target, learning_rate, config=config)

    found, history = _descend(step, start_at, steps, progress)
    found = sampling.resize_aligned(found, shape)
    found = 0.5 * filters.mean_filter(found, config.smoothings)
    return Optimized(
        Transform((Displacement(found), *start.forward.steps)),
        Transform((*start.backward.steps, Displacement(-found))),
        history,
        start.start,
        start.similarity,
    )


def _check(pair: Pair, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    if pair.fixed.shape[0] != 1:
        raise ValueError(f"one pair at a time, got a batch of {pair.fixed.shape[0]}")


@jax.jit
def _warped(image: Image, points: jax.Array) -> Image:
    """The image at points, its least value beyond it."""
    low = jnp.min(image)
    return fields.warp(image - low, points, outside="zeros") + low


@functools.partial(jax.jit, static_argnames="coarse")
def _side_by_side(features: Features, *, coarse: bool) -> tuple[Image, ...]:
    """Fine features and, resized to their grid, coarse ones."""
    if not coarse:
        return (features.fine,)
    d, h, w = features.fine.shape[1:4]
    return features.fine, normalised(
        sampling.resize_aligned(features.coarse, (d, h, w))
    )


def feature_loss(
    displacement: Field,
    source: tuple[Image, ...],
    target: tuple[Image, ...],
    config: FeatureConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, parts) of a displacement in canonical units.

    Args:
      displacement: 1 D H W 3, before it is smoothed.
      source: features of the warped moving image, each 1 D H W C.
      target: those of the fixed image.
      config: see `FeatureConfig`.
    """
    smooth = filters.mean_filter(displacement, config.smoothings)
    points = sampling.identity(displacement.shape[1:4]) + 0.5 * smooth
    parts = {
        name: -jnp.mean(_cosine(sampling.sample(there, points), here))
        for name, there, here in zip(("fine", "coarse"), source, target, strict=False)
    }
    rough = jnp.stack([jnp.mean(jnp.diff(smooth, axis=a) ** 2) for a in (1, 2, 3)])
    rough = jnp.sum(rough)
    loss = jnp.sum(jnp.stack(list(parts.values()))) + config.smoothness * rough
    return loss, {**parts, "smoothness": rough, "loss": loss}


def _cosine(a: Image, b: Image) -> jax.Array:
    """Of the angle between features, N D H W; 0 where either is zero."""
    return jnp.sum(sam.normalise(a) * sam.normalise(b), -1)


@functools.partial(jax.jit, static_argnames="config")
def _feature_step(state, source, target, learning_rate, *, config):
    def gradient_of(displacement):
        return jax.grad(feature_loss, has_aux=True)(
            displacement, source, target, config
        )

    return _adam_step(gradient_of, state, learning_rate)


def _descend(step, start: Field, steps: int, progress: Progress | None):
    """Repeats a step; returns the last value that was scored, and the history."""
    report = None if progress is None else Report(progress, steps)
    return repeat(step, _adam_start(start), steps, report)


@jax.jit
def _adam_start(value):
    return value, optax.adam(0.0, eps=_EPSILON).init(value)  # whatever the rate


def _adam_step(gradient_of, state: tuple[Field, Any], learning_rate):
    """Adam; returns (next state, parts of the loss, the value that they belong to)."""
    value, adam = state
    gradient, parts = gradient_of(value)
    optimizer = optax.adam(learning_rate, eps=_EPSILON)
    updates, adam = optimizer.update(gradient, adam)
    moved = jnp.asarray(optax.apply_updates(value, updates))
    return (moved, adam), parts, value


# --- the map itself -------------------------------------------------------------------

_LEAST_DETERMINANT = 0.1
"""What the determinant at a cell's corners stays above; the identity has 1."""
_HALVINGS = 3  # of a step, before it is left out where it would fold


def optimize_map(
    pair: Pair,
    start: Optimized,
    *,
    loss: str = "ncc",
    steps: int = 100,
    learning_rate: float = 0.008,
    folding: float = 10.0,
    progress: Progress | None = None,
) -> Optimized:
    """Returns a map whose every voxel was moved to make intensities agree.

    It does not fold: where a step would take a determinant at a corner of a cell of
    the network grid to 0.1 or below, the step is shortened at that cell's voxels, to
    nothing if need be. Where the start folds already, it is smoothed first, as little
    as will do. SAME's code has the penalty alone, which folds of 1 to 4 % of the voxels
    outbid.

    Args:
      pair: one pair on the network grid, 1 D H W C.
      start: what a network says of it.
      loss: a key of `similarity.SIMILARITIES`; SAME has "ncc".
      steps: number of updates, at least 1.
      learning_rate: of Adam, canonical units per step.
      folding: weight of the mean of what determinants lack to 0.1, the identity's
        being 1.
      progress: called after each step.

    Raises:
      ValueError: steps below 1, or more than one pair.
    """
    _check(pair, steps)
    shape = pair.fixed.shape[1:4]
    begin = unfolded(start.forward.on_grid(shape) - sampling.identity(shape))

    def step(state, index):
        return _map_step(state, pair, learning_rate, folding, loss=loss)

    found, history = _descend(step, 2.0 * begin, steps, progress)
    # Once more, between the voxels: too costly for every step.
    field = unfolded(0.5 * found, between=True)
    return dataclasses.replace(
        start, forward=Transform((Displacement(field),)), history=history
    )


@functools.partial(jax.jit, static_argnames="loss")
def _map_step(state, pair, learning_rate, folding, *, loss):
    measure = similarity.SIMILARITIES[loss]

    def value(displacement):
        points = sampling.identity(pair.fixed.shape[1:4]) + 0.5 * displacement
        warped = _warped(pair.moving, points)
        unlike = measure(warped, pair.fixed, mask=pair.fixed_mask)
        lacking = _LEAST_DETERMINANT - fields.jacobian_determinant(points)
        folds = jnp.mean(jax.nn.relu(lacking))
        total = unlike + folding * folds
        return total, {"similarity": unlike, "folding": folds, "loss": total}

    (moved, adam), parts, here = _adam_step(
        jax.grad(value, has_aux=True), state, learning_rate
    )
    moved = 2.0 * _without_folds(0.5 * here, 0.5 * moved)
    return (moved, adam), parts, here


def unfolded(field: Field, *, between: bool = False) -> Field:
    """Returns a displacement without folds, 1 D H W 3, unit: the same if it has none.

    Where it folds it is mixed with the least smoothed version of itself that does not.

    Args:
      field: 1 D H W 3, unit.
      between: see `fields.least_determinant`: determinants are above 0 everywhere, else
        above 0.1 at the corners of all cells.
    """
    if not bool(_folds(field, between=between)):
        return field
    sigma, longest = 1, max(field.shape[1:4])
    smooth = field
    while sigma < longest and bool(_folds(smooth, between=between)):
        smooth = _smoothed(field, sigma)
        sigma *= 2
    if bool(_folds(smooth, between=between)):  # a shift never does
        mean = jnp.mean(field, (1, 2, 3), keepdims=True)
        smooth = jnp.broadcast_to(mean, field.shape)
    return _without_folds(smooth, field, between=between)


@functools.partial(jax.jit, static_argnames="sigma")
def _smoothed(field: Field, sigma: int) -> Field:
    """Gaussian means of the voxels that there are."""
    weight = similarity.gaussian_blur(jnp.ones_like(field[..., :1]), sigma)
    return similarity.gaussian_blur(field, sigma) / weight


def _folded_cells(field: Field, *, between: bool) -> jax.Array:
    points = sampling.identity(field.shape[1:4]) + field
    least = fields.least_determinant(points, between=between)
    return ~(least > (0.0 if between else _LEAST_DETERMINANT))  # NaN folds as well


@functools.partial(jax.jit, static_argnames="between")
def _folds(field: Field, *, between: bool) -> jax.Array:
    return jnp.any(_folded_cells(field, between=between))


@functools.partial(jax.jit, static_argnames="between")
def _without_folds(here: Field, there: Field, *, between: bool = False) -> Field:
    """Goes from a displacement without folds to another as far as none appear.

    Every voxel has its own share of the way. It is halved, and at last set to 0, at the
    corners of cells that fold. A cell with shares of 0 is as it was, so the loop ends.
    """

    def place(share):
        # At a share of 0 exactly the first, also where the second is not finite.
        return here + jnp.where(share > 0, share * (there - here), 0.0)

    def at_corners(cells):  # N D-1 H-1 W-1 to N D H W
        padded = jnp.pad(cells, ((0, 0), (1, 1), (1, 1), (1, 1)))
        return jax.lax.reduce_window(
            padded, False, jnp.logical_or, (1, 2, 2, 2), (1, 1, 1, 1), "valid"
        )

    def shorten(carry):
        share, bad, count = carry
        factor = jnp.where(count < _HALVINGS, 0.5, 0.0)
        share = jnp.where(bad, factor * share, share)
        return share, to_shorten(share), count + 1

    def to_shorten(share):
        bad = at_corners(_folded_cells(place(share), between=between))[..., None]
        return bad & (share > 0)

    share = jnp.ones_like(here[..., :1])
    start = (share, to_shorten(share), 0)
    share, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), shorten, start)
    return place(share)
