"""Instance optimisation of a displacement by features of both scans.

Two ways, as SAME's code has them: a displacement before the map, by the features of the
images that it brings together; or the map itself, by intensities. Each repeats one
jitted step; as in `optimization.network`, the last iteration's update is dropped.

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

from jaxreg.data.preprocess import IntensityRule
from jaxreg.matching import points as points_lib
from jaxreg.models import sam
from jaxreg.models.unireg import features as features_lib
from jaxreg.models.unireg.features import COARSE, Features
from jaxreg.nn.correlation import normalised
from jaxreg.registration.optimization.loop import Optimized, Progress, Report, repeat
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
    """Returns descriptors on any grid: `models.unireg.features.mind_features`.

    The image is resized first, with aligned corners, to the next grid that they divide.

    Args:
      image: N D H W 1, [0, 1].
    """
    sizes = zip(image.shape[1:4], COARSE, strict=True)
    d, h, w = (-(-n // m) * m for n, m in sizes)
    return _mind(sampling.resize_aligned(image, (d, h, w)))


_mind = jax.jit(features_lib.mind_features)


def sam_features(
    network: sam.TrainedSam, image: Image, window: tuple[float, float]
) -> Features:
    """Returns SAM's embeddings of a CT image.

    Args:
      network: the trained one.
      image: N D H W 1, [0, 1].
      window: the Hounsfield units of 0 and 1; SAM sees none beyond its own window.
    """
    shown = points_lib.in_sam_range(image, IntensityRule("ct", window))
    ends = points_lib.in_sam_range(
        np.array([0.0, 1.0], np.float32), IntensityRule("ct", network.ct_window)
    )
    return points_lib.embed(network, shown.clip(*ends))


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
    check_single_pair(pair, steps)
    shape = pair.fixed.shape[1:4]
    warped = warp_features(pair.moving, start.forward.on_grid(shape))
    source, target = (
        _side_by_side(extract(image), coarse=config.coarse)
        for image in (warped, pair.fixed)
    )
    start_at = jnp.zeros((*source[0].shape[:4], 3))

    def step(state, index):
        return _feature_step(state, source, target, learning_rate, config=config)

    found, history = descend(step, start_at, steps, progress)
    found = sampling.resize_aligned(found, shape)
    found = 0.5 * filters.mean_filter(found, config.smoothings)
    return Optimized(
        Transform((Displacement(found), *start.forward.steps)),
        Transform((*start.backward.steps, Displacement(-found))),
        history,
        start.start,
        start.similarity,
    )


def check_single_pair(pair: Pair, steps: int) -> None:
    """Raises ValueError for a batch of pairs, or no steps."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    if pair.fixed.shape[0] != 1:
        raise ValueError(f"one pair at a time, got a batch of {pair.fixed.shape[0]}")


@jax.jit
def warp_features(image: Image, points: jax.Array) -> Image:
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
    """Cosine similarity of features, N D H W; 0 where either is zero."""
    return jnp.sum(sam.normalise(a) * sam.normalise(b), -1)


@functools.partial(jax.jit, static_argnames="config")
def _feature_step(state, source, target, learning_rate, *, config):
    def gradient_of(displacement):
        return jax.grad(feature_loss, has_aux=True)(
            displacement, source, target, config
        )

    return adam_step(gradient_of, state, learning_rate)


def descend(step, start: Field, steps: int, progress: Progress | None):
    """Repeats a step; returns the last value that was scored, and the history."""
    report = None if progress is None else Report(progress, steps)
    return repeat(step, _adam_start(start), steps, report)


@jax.jit
def _adam_start(value):
    return value, optax.adam(0.0, eps=_EPSILON).init(value)  # whatever the rate


def adam_step(gradient_of, state: tuple[Field, Any], learning_rate):
    """One step of Adam: (next state, parts of the loss, the value they belong to)."""
    value, adam = state
    gradient, parts = gradient_of(value)
    optimizer = optax.adam(learning_rate, eps=_EPSILON)
    updates, adam = optimizer.update(gradient, adam)
    moved = jnp.asarray(optax.apply_updates(value, updates))
    return (moved, adam), parts, value
