"""Linear sampling that gathers and scatters the eight voxels around a point at once.

One batch element's values D H W C are read at voxel indices P 3. Around a point lies a
window of 2 x 2 x 2 voxels, of which each is weighted by ``1 - |distance|`` along each
axis: a window at the edge needs no other rule, nor does a point outside of the array.
How a window is fetched depends on the device:

* "window": a gather of slices, straight from the values. XLA's GPU backend computes it
  inside of whatever reads it. On TPU it would be a loop over points.
* "packed": a gather of rows from an array that holds each voxel's window as its row,
  for TPUs. There a row takes the memory of 128 numbers: points are read part by part.

Gradients with respect to the values scatter the same windows.
"""

import functools
import math
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Fetch = Literal["window", "packed"]

_PART = 2**16  # points whose rows are fetched at once: 32 MB of a TPU's VMEM
_TILE = 8 * 128  # numbers of a vector register: parts of whole ones need no moving


def read(values: jax.Array, index: jax.Array, *, zeros: bool, fetch: Fetch):
    """Returns the values at voxel indices, P C.

    Args:
      values: D H W C.
      index: P 3, voxels.
      zeros: whether what lies outside is 0; else it is as the nearest voxel.
      fetch: see the module's docstring.
    """
    shape = values.shape
    source = values if fetch == "window" else _packed(values)

    def of(index):
        low, distances = _around(index, shape, zeros=zeros)
        weights = _product(map(_hat, distances))
        taps = _gathered(source, shape, low, fetch)
        return jnp.sum(taps * weights[..., None], 1).astype(values.dtype)

    return _by_parts(of, fetch, index)


def index_gradient(
    values: jax.Array, index: jax.Array, dy: jax.Array, *, zeros: bool, fetch: Fetch
):
    """Returns the gradient of `read` with respect to the indices, P 3.

    At a voxel's centre the slope is that of the next cell. If not `zeros` it is 0 where
    an index lies at or outside the corner voxel's centre, as in PyTorch.

    Args:
      values: as `read`.
      index: as `read`.
      dy: gradient of the result, P C.
      zeros: as `read`.
      fetch: as `read`.
    """
    values, index, dy = _again(values, index, dy)
    shape = values.shape
    source = values if fetch == "window" else _packed(values)

    def of(index, dy):
        low, distances = _around(index, shape, zeros=zeros)
        taps = _gathered(source, shape, low, fetch)
        along = jnp.sum(taps * dy[:, None], -1)  # P K
        hats = [_hat(distance) for distance in distances]
        slopes = [
            _product([_slope(distances[axis]), *hats[:axis], *hats[axis + 1 :]])
            for axis in range(3)
        ]
        sums = [jnp.sum(along * slope, 1) for slope in slopes]
        return jnp.stack(sums, -1).astype(index.dtype)

    gradient = _by_parts(of, fetch, index, dy)
    if zeros:
        return gradient
    last = jnp.asarray(np.asarray(shape[:3]) - 1, index.dtype)
    return jnp.where((index > 0) & (index < last[None]), gradient, 0.0)


def values_gradient(
    values: jax.Array, index: jax.Array, dy: jax.Array, *, zeros: bool, fetch: Fetch
):
    """Returns the gradient of `read` with respect to the values, D H W C.

    Args:
      values: as `read`; their shape alone matters.
      index: as `read`.
      dy: gradient of the result, P C.
      zeros: as `read`.
      fetch: as `read`.
    """
    values, index, dy = _again(values, index, dy)
    shape = values.shape

    def added(total, points):
        index, dy = points
        low, distances = _around(index, shape, zeros=zeros)
        weights = _product(map(_hat, distances))
        taps = weights[..., None] * dy[:, None]  # P K C
        return _scattered(total, shape, low, taps, fetch), None

    if fetch == "window":
        return added(jnp.zeros(shape, dy.dtype), (index, dy))[0]
    width = math.prod(_sizes(shape)) * shape[3]
    table = jnp.zeros((math.prod(shape[:3]), width), dy.dtype)
    if len(index) <= _PART:
        table, _ = added(table, (index, dy))
    else:
        table, _ = lax.scan(added, table, in_parts(_even_size(len(index)), index, dy))
    return _unpacked(table, shape)


def _again(*arrays: jax.Array):
    """Keeps a compiler from keeping for the gradient what `read` has computed.

    The windows of all points are eight times what is read.
    """
    return lax.optimization_barrier(arrays)


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Of a window: an axis of one voxel has no second one."""
    d, h, w = (min(2, n) for n in shape[:3])
    return d, h, w


def _offsets(shape: tuple[int, ...]) -> np.ndarray:
    """The K voxels of a window, K 3."""
    return np.array(list(np.ndindex(_sizes(shape))), np.int32)


def _around(index: jax.Array, shape: tuple[int, ...], *, zeros: bool):
    """Returns where windows begin, P 3, and how far behind their voxels points lie.

    The distances are P K for each axis, voxels.
    """
    last = np.asarray(shape[:3]) - 1
    at = index if zeros else jnp.clip(index, 0.0, jnp.asarray(last, index.dtype)[None])
    # Clipped as integers, which are in bounds even if an index is no number.
    low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, np.maximum(last - 1, 0)[None])
    above = at - low.astype(at.dtype)
    distances = [
        above[:, axis, None] - jnp.asarray(offset, at.dtype)[None]
        for axis, offset in enumerate(_offsets(shape).T)
    ]
    return low, distances


def _hat(distance: jax.Array) -> jax.Array:
    return jnp.maximum(1.0 - jnp.abs(distance), 0.0)


def _slope(distance: jax.Array) -> jax.Array:
    """The derivative of `_hat`, at a kink the one above it."""
    within = (distance >= -1.0) & (distance < 1.0)
    return jnp.where(within, jnp.where(distance < 0.0, 1.0, -1.0), 0.0)


def _product(factors: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.multiply, factors)


# --- points in parts -----------------------------------------------------------------


def in_parts(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns P K arrays as parts of so many points, zero padded: parts size K."""
    count = len(arrays[0])
    parts = -(-count // size)
    return tuple(
        jnp.pad(a, ((0, parts * size - count), (0, 0))).reshape(parts, size, -1)
        for a in arrays
    )


def _even_size(count: int) -> int:
    """Returns the points of a part: about equal parts, of whole registers each."""
    parts = -(-count // _PART)
    return -(-count // (parts * _TILE)) * _TILE


def _by_parts(function, fetch: Fetch, *arrays: jax.Array) -> jax.Array:
    """Applies a function of P K arrays that gives P C, to parts of the points."""
    count = len(arrays[0])
    if fetch == "window" or count <= _PART:
        return function(*arrays)
    parts = in_parts(_even_size(count), *arrays)
    result = lax.map(lambda part: function(*part), parts)
    return result.reshape(-1, result.shape[-1])[:count]


# --- fetching windows, and adding to them --------------------------------------------


def _gathered(source, shape, low: jax.Array, fetch: Fetch) -> jax.Array:
    """Returns the windows that begin at voxels P 3, P K C.

    Args:
      source: values D H W C, or if "packed" these as `_packed` has them.
      shape: of the values.
      low: P 3, voxels.
      fetch: see the module's docstring.
    """
    if fetch == "window":
        sizes = *_sizes(shape), shape[3]
        dimensions = lax.GatherDimensionNumbers((1, 2, 3, 4), (), (0, 1, 2))
        taps = lax.gather(source, low, dimensions, sizes, mode="promise_in_bounds")
        return taps.reshape(len(low), -1, shape[3])
    rows = lax.GatherDimensionNumbers((1,), (0,), (0,))
    at = _flat(low, shape)[:, None]
    row = lax.gather(source, at, rows, (1, source.shape[1]), mode="promise_in_bounds")
    return jnp.swapaxes(row.reshape(len(low), shape[3], -1), 1, 2)


def _scattered(total, shape, low: jax.Array, taps: jax.Array, fetch: Fetch):
    """Returns `total`, as `_gathered` has its source, and windows P K C at P 3."""
    if fetch == "window":
        dimensions = lax.ScatterDimensionNumbers((1, 2, 3, 4), (), (0, 1, 2))
        taps = taps.reshape(len(low), *_sizes(shape), shape[3])
        return lax.scatter_add(total, low, taps, dimensions, mode="promise_in_bounds")
    row = jnp.swapaxes(taps, 1, 2).reshape(len(low), -1)
    rows = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    at = _flat(low, shape)[:, None]
    return lax.scatter_add(total, at, row, rows, mode="promise_in_bounds")


def _flat(low: jax.Array, shape) -> jax.Array:
    return (low[:, 0] * shape[1] + low[:, 1]) * shape[2] + low[:, 2]


def _shifts(shape) -> list[int]:
    """How far the K voxels of a window lie behind its first one in storage."""
    return [int(s) for s in _offsets(shape) @ (shape[1] * shape[2], shape[2], 1)]


# Voxels in storage order are minor all along: they fill the lanes of a TPU.


def _packed(values: jax.Array) -> jax.Array:
    """Returns each voxel's window as a row, D*H*W C*K.

    Rows of windows that would reach beyond the array hold anything.
    """
    shifts = _shifts(values.shape)
    flat = values.reshape(-1, values.shape[3]).T  # C D*H*W
    count = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, shifts[-1])))
    table = jnp.stack([flat[:, s : s + count] for s in shifts], 1)  # C K D*H*W
    return table.reshape(-1, count).T


def _unpacked(table: jax.Array, shape) -> jax.Array:
    """Returns the transpose of `_packed`, D H W C."""
    shifts = _shifts(shape)
    stacked = table.T.reshape(shape[3], len(shifts), -1)  # C K D*H*W
    zero = jnp.zeros((), table.dtype)
    # What is shifted beyond the end is zero: no window begins there.
    parts = [
        lax.pad(stacked[:, k], zero, ((0, 0, 0), (s, -s, 0)))
        for k, s in enumerate(shifts)
    ]
    return functools.reduce(jnp.add, parts).T.reshape(shape)
