"""Local correlation (cost volume) of two feature maps.

References:
  Sun et al., PWC-Net, CVPR 2018, section 3; Tian et al., SAME++, 2023, with whose code
  the order of channels, the border and the floors agree.
"""

import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreg.typing import Image

Kernel = Literal["cosine", "ssd"]

_NORM_FLOOR = 1e-4


def normalised(features: Image, floor: float = 1e-12) -> Image:
    """Returns features of length 1 along their channels; N D H W C.

    Args:
      features: N D H W C.
      floor: lengths below it count as it, so that zeros stay zeros.
    """
    return features / jnp.maximum(_length(features), floor)[..., None]


def _length(features: jax.Array) -> jax.Array:
    """Euclidean norms over channels, in float32 with gradient 0 at 0: N D H W."""
    squares = jnp.sum(jnp.square(features.astype(jnp.float32)), -1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _over_channels(x: jax.Array) -> jax.Array:
    """Sums over the last axis, as a product: XLA sums along it slowly on CPU."""
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.matmul(x, ones, precision=lax.Precision.HIGHEST)


def correlation(
    source: Image, target: Image, *, radius: int = 1, kernel: Kernel = "cosine"
) -> Image:
    """Returns each target voxel's likeness to the source's voxels around it.

    Channel ``k`` belongs to the offset (a, b, c) with each component in -r .. r, the
    last one fastest: it is the likeness of ``source[p + (a, b, c)]`` and ``target[p]``.
    Beyond the source lie copies of its edge. The offsets are taken one by one: a
    shifted product is summed over channels before the next is made.

    Args:
      source: N D H W C, the moving image's features.
      target: N D H W C, the fixed image's.
      radius: r, voxels; (2 r + 1)^3 channels.
      kernel: "cosine" of the angle between both, their lengths being at least 1e-4
        each; or "ssd": ``1 - |source - target|^2 / 2``, the same for lengths of 1.

    Returns:
      N D H W (2 r + 1)^3, float32, in [-1, 1] for lengths of 1; the centre's channel
      is the middle one.

    Raises:
      ValueError: the shapes differ.
    """
    if source.shape != target.shape:
        raise ValueError(
            f"source has shape {source.shape}, target {target.shape}; both must be "
            "N D H W C on one grid"
        )
    pad = ((0, 0), *((radius, radius),) * 3)
    shape = target.shape
    around = jnp.pad(source, (*pad, (0, 0)), mode="edge")
    lengths = [jnp.maximum(_length(x), _NORM_FLOOR) for x in (source, target)]
    lengths[0] = jnp.pad(lengths[0], pad, mode="edge")
    steps = range(2 * radius + 1)
    offsets = np.asarray(list(itertools.product(steps, steps, steps)), np.int32)

    @jax.checkpoint  # the shifted features are cut out again in the backward pass
    def one(offset):
        start = (0, *offset)
        moved = lax.dynamic_slice(around, (*start, 0), shape).astype(jnp.float32)
        if kernel == "ssd":
            return 1.0 - 0.5 * _over_channels(jnp.square(moved - target))
        length = lax.dynamic_slice(lengths[0], start, shape[:4]) * lengths[1]
        return _over_channels(moved * target) / length

    # K N D H W to N D H W K, an offset each
    return jnp.moveaxis(lax.map(one, jnp.asarray(offsets)), 0, -1)
