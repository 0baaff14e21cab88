"""Sampling at points (aligned corners) and resizing (half-pixel centres).

`sample` reads an array at unit coordinates: 0 and 1 are the *centres* of the corner
voxels. The resizers keep the *extent* instead: voxel edges coincide. Both come from the
original programs, whose weights learned the difference.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

from jaxreg.space import grid as grid_lib
from jaxreg.typing import Image, Labels, Points

Outside = Literal["edge", "zeros", "half_voxel"]
"""What lies outside the array.

edge: the nearest voxel of the array (PyTorch's "border").
zeros: 0 beyond the last voxel, reached linearly within one voxel.
half_voxel: the nearest voxel up to half a voxel outside, `fill` beyond (ITK's rule).
"""


def identity(shape: grid_lib.Shape, dtype=jnp.float32) -> jax.Array:
    """Returns the unit coordinates of an array's voxels, 1 D H W 3."""
    scale = grid_lib.unit_scale(shape)
    axes = [
        jnp.arange(n, dtype=dtype) / jnp.asarray(s, dtype)
        for n, s in zip(shape, scale, strict=True)
    ]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)[None]


def _clamp(index: jax.Array, last: jax.Array) -> jax.Array:
    # Not jnp.clip: its gradient at a tie is 0.5, PyTorch's border sampling has 0.
    return jnp.where(index <= 0, 0.0, jnp.where(index >= last, last, index))


def sample(
    values: Image,
    points: Points,
    *,
    order: Literal[0, 1] = 1,
    outside: Outside = "edge",
    fill: float = 0.0,
) -> jax.Array:
    """Returns the values at unit coordinates, N ... C.

    Args:
      values: N D H W C, or 1 D H W C to be read at every batch element's points.
      points: N ... 3 in unit coordinates of `values`, or 1 ... 3 for all of the batch.
      order: 1 linear, 0 nearest.
      outside: see `Outside`.
      fill: the value beyond half a voxel, for "half_voxel" only.

    The gradient with respect to `points` is zero where a clamped coordinate lies at or
    beyond the corner voxel's centre, as in PyTorch's border sampling.
    """
    shape = values.shape[1:4]
    scale = jnp.asarray(grid_lib.unit_scale(shape), points.dtype)
    index = points * scale
    last = jnp.asarray(np.asarray(shape) - 1, points.dtype)
    if outside == "zeros":
        mode = "constant"
    else:
        inside = jnp.all((index >= -0.5) & (index <= last + 0.5), -1, keepdims=True)
        index, mode = _clamp(index, last), "nearest"

    def one_channel(volume, at):
        return ndimage.map_coordinates(
            volume, [at[..., i] for i in range(3)], order=order, mode=mode
        )

    def one_sample(volume, at):
        return jax.vmap(one_channel, in_axes=(-1, None), out_axes=-1)(volume, at)

    batch = max(values.shape[0], index.shape[0])
    if batch == 1:
        result = one_sample(values[0], index[0])[None]
    else:
        axes = tuple(0 if a.shape[0] == batch else None for a in (values, index))
        single = tuple(
            a if x == 0 else a[0] for a, x in zip((values, index), axes, strict=True)
        )
        result = jax.vmap(one_sample, in_axes=axes)(*single)
    if outside == "half_voxel":
        result = jnp.where(inside, result, jnp.asarray(fill, result.dtype))
    return result


def _linear_matrix(n: int, position: np.ndarray) -> np.ndarray:
    """Returns (len(position), n) weights of linear sampling at clamped positions."""
    position = np.clip(position, 0.0, n - 1.0)
    low = np.clip(np.floor(position).astype(int), 0, max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    weight = position - low
    matrix = np.zeros((len(position), n))
    rows = np.arange(len(position))
    np.add.at(matrix, (rows, low), 1.0 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def _apply_matrices(image: Image, matrices: list[np.ndarray]) -> Image:
    for matrix, spec in zip(
        matrices, ("ad,ndhwc->nahwc", "ah,ndhwc->ndawc", "aw,ndhwc->ndhac"), strict=True
    ):
        image = jnp.einsum(
            spec,
            jnp.asarray(matrix, image.dtype),
            image,
            precision=jax.lax.Precision.HIGHEST,
        )
    return image


def resize_half_pixel(image: Image, shape: grid_lib.Shape) -> Image:
    """Trilinear resize to `shape` with half-pixel centres and no antialiasing.

    Equals ``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)``.
    """
    matrices = [
        _linear_matrix(n, (np.arange(m) + 0.5) * n / m - 0.5)
        for n, m in zip(image.shape[1:4], shape, strict=True)
    ]
    return _apply_matrices(image, matrices)


def resize_aligned(image: Image, shape: grid_lib.Shape) -> Image:
    """Trilinear resize to `shape` with aligned corner centres.

    Equals ``sample(image, identity(shape))``; separable, so cheap to differentiate.
    """
    matrices = [
        _linear_matrix(n, np.linspace(0.0, n - 1.0, m))
        for n, m in zip(image.shape[1:4], shape, strict=True)
    ]
    return _apply_matrices(image, matrices)


def resize_nearest_floor(labels: Labels, shape: grid_lib.Shape) -> Labels:
    """Nearest resize with source index ``floor(i * n_in / n_out)``.

    Equals ``torch.nn.functional.interpolate(mode="nearest")``: up to half a voxel off
    `resize_half_pixel`, as the original program's masks and segmentations are.
    """
    for axis, (n, m) in enumerate(zip(labels.shape[1:4], shape, strict=True)):
        # float32, as PyTorch computes it: floor(i * scale) differs in rare last bits.
        source = np.floor(np.arange(m, dtype=np.float32) * np.float32(n / m))
        index = np.minimum(source.astype(np.int64), n - 1)
        labels = jnp.take(labels, jnp.asarray(index), axis=axis + 1)
    return labels
