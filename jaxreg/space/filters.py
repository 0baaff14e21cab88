"""Separable filters and a self-similarity descriptor, on the host's matrices.

Blurs and box means are banded matrices, one product per axis: XLA's depthwise
convolutions are slow on CPU, and the products run at full float32 on every platform.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.typing import Image
from jaxreg.xla import splitting

MIND_VARIANCE_RANGE = (1e-3, 1e3)
# Below it an image is constant up to float32 rounding of [0, 1] intensities.
_FLAT_MIND_VARIANCE = 1e-15

# Pairs of the six neighbours that are sqrt(2) voxels apart, offsets along D H W.
# The order is that of the reference implementation's descriptor channels.
_MIND_PAIRS = (
    ((+1, 0, 0), (0, -1, 0)),
    ((0, +1, 0), (-1, 0, 0)),
    ((0, -1, 0), (-1, 0, 0)),
    ((0, +1, 0), (+1, 0, 0)),
    ((0, -1, 0), (0, 0, -1)),
    ((0, +1, 0), (0, 0, +1)),
    ((0, 0, -1), (-1, 0, 0)),
    ((+1, 0, 0), (0, 0, +1)),
    ((0, +1, 0), (0, 0, -1)),
    ((0, 0, +1), (0, -1, 0)),
    ((+1, 0, 0), (0, 0, -1)),
    ((0, 0, +1), (-1, 0, 0)),
)


def box_matrix(n: int, radius: int) -> np.ndarray:
    """Returns n x n weights of a mean over 2 radius + 1 voxels, edges replicated."""
    matrix = np.zeros((n, n))
    rows = np.arange(n)
    for offset in range(-radius, radius + 1):
        np.add.at(matrix, (rows, np.clip(rows + offset, 0, n - 1)), 1.0)
    return matrix / (2 * radius + 1)


def window_matrix(n: int, size: int) -> np.ndarray:
    """Returns n x n weights of a sum over an odd number of voxels, zeros outside."""
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    return (np.abs(distance) <= size // 2).astype(np.float64)


def mean_filter(image: Image, times: int = 1) -> Image:
    """Returns means over 3^3 voxels, zeros outside the image counted; N D H W C.

    Args:
      image: N D H W C.
      times: how often the filter is applied, its result cut to the grid each time.
    """
    matrices = [
        np.linalg.matrix_power(window_matrix(n, 3) / 3, times) for n in image.shape[1:4]
    ]
    return jnp.moveaxis(along_axes(jnp.moveaxis(image, -1, 1), matrices), 1, -1)


def along_axes(volumes: jax.Array, matrices: Sequence[np.ndarray]) -> jax.Array:
    """Multiplies ... D H W by one matrix per spatial axis."""
    for axis, matrix in zip((-1, -2, -3), reversed(matrices), strict=True):
        # The contracted axis is last and its result goes to the front of the three, so
        # that each is a plain matrix product; three turns restore the order.
        if axis == -3:  # volumes may be split along D
            volumes = splitting.turned(volumes, -1, -3)
        volumes = jnp.einsum(
            "aw,...dhw->...adh",
            jnp.asarray(matrix, volumes.dtype),
            volumes,
            precision=jax.lax.Precision.HIGHEST,
        )
    return splitting.turned(volumes, -2, -3)


def _neighbour(volumes: jax.Array, offset: tuple[int, ...]) -> jax.Array:
    """Returns ``v -> volumes[v + offset]`` along D H W, edges replicated."""
    for axis, step in zip((-3, -2, -1), offset, strict=True):
        if step:
            # Slices, not a gather: the gradient of a gather is a slow scatter.
            n = volumes.shape[axis]
            pad = [(0, 0)] * volumes.ndim
            pad[axis] = (max(-step, 0), max(step, 0))
            padded = jnp.pad(volumes, pad, mode="edge")
            volumes = jax.lax.slice_in_dim(
                padded, max(step, 0), max(step, 0) + n, axis=axis % volumes.ndim
            )
    return volumes


def mind_channels(
    image: Image, radius: int = 2, dilation: int = 2, axis: str | None = None
) -> jax.Array:
    """Returns `mind_descriptor` with its channels first, 12 N D H W.

    Args:
      image: N D H W 1.
      radius: see `mind_descriptor`.
      dilation: see `mind_descriptor`.
      axis: name of the mapped axis over which the batch is split, if it is.

    Raises:
      ValueError: the image has more than one channel.
    """
    if image.shape[-1] != 1:
        raise ValueError(f"MIND takes 1 channel, the image has {image.shape[-1]}")
    volumes = image[..., 0]
    shifted = {
        offset: _neighbour(volumes, tuple(dilation * o for o in offset))
        for pair in _MIND_PAIRS
        for offset in pair
    }
    squares = jnp.stack([(shifted[a] - shifted[b]) ** 2 for a, b in _MIND_PAIRS])
    distance = along_axes(squares, [box_matrix(n, radius) for n in squares.shape[-3:]])
    excess = distance - jnp.min(distance, 0, keepdims=True)
    variance = jnp.mean(excess, 0, keepdims=True)
    # One number for the whole batch and volume, constant in the gradient.
    mean_variance = jax.lax.stop_gradient(jnp.mean(variance))
    if axis is not None:
        mean_variance = jax.lax.pmean(mean_variance, axis)
    low, high = MIND_VARIANCE_RANGE
    variance = jnp.clip(variance, low * mean_variance, high * mean_variance)
    variance = jnp.where(mean_variance > _FLAT_MIND_VARIANCE, variance, 1.0)
    return jnp.exp(-excess / variance)


def mind_descriptor(image: Image, *, radius: int = 2, dilation: int = 2) -> Image:
    """Returns the self-similarity descriptor of an image, N D H W 12, in (0, 1].

    A channel compares two of a voxel's six neighbours: the squared difference of the
    image shifted to either, averaged over a box. The minimum over channels is taken
    off, the mean over channels V divides, and ``exp(-.)`` gives the descriptor. V is
    clamped to 0.001 .. 1000 times its mean over batch and volume, so a batch of two
    differs slightly from two batches of one, as in the original. A constant image gives
    ones (the original gives NaN).

    Args:
      image: N D H W 1.
      radius: the box has 2 radius + 1 voxels per axis.
      dilation: distance of the neighbours in voxels.

    Raises:
      ValueError: the image has more than one channel.

    References:
      Heinrich et al., Towards realtime multimodal fusion for image-guided
      interventions using self-similarities, MICCAI 2013; icon_registration 1.1.9,
      losses.py: MINDSSC.
    """
    return jnp.moveaxis(mind_channels(image, radius, dilation), 0, -1)
