"""Layers at twice a grid's resolution, computed on that grid: XLA's form for TPU.

A TPU stores the two minor axes in tiles of 8 x 128 numbers: at full resolution, with
16 channels, seven eighths of what is moved is padding, and a convolution to the three
channels of a displacement uses three of 128 columns. Folded, each voxel of the grid
holds its block of 2 x 2 x 2 finer ones as channels (space-to-depth): 16 channels are
128, and convolutions of the finer voxels are convolutions of the blocks, by kernels
made of the same weights. The zeros in these cost nothing where most of the matrix unit
would have been idle.

The voxels of a row are folded and unfolded by a product with a selection of them, for a
transpose that splits the minor axis moves numbers one by one; along D and H it only
renumbers rows. Products with ones and zeros are exact.

Arrays are N D H W C and kernels kD kH kW I O, as in `api`; folded ones N D' H' W' 8C
with ``D' = ceil(D / 2)``, channels ordered (2, 2, 2, C), zeros behind odd ends.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreg.typing import Image
from jaxreg.xla import splitting

DIMENSIONS = ("NDHWC", "DHWIO", "NDHWC")


def exact(x: jax.Array) -> lax.Precision | None:
    """Returns the precision at which a product with ones and zeros keeps x."""
    return None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST


def _selection(n: int) -> np.ndarray:
    """Returns 2 ceil(n/2) n: one where voxel n is first, second of a pair."""
    first, second = (np.eye(n + n % 2, n)[k::2] for k in (0, 1))
    return np.stack([first, second])


def fold(x: Image) -> Image:
    """N D H W C to N ceil(D/2) ceil(H/2) ceil(W/2) 8C, zeros behind odd ends."""
    n, d, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, d % 2), (0, h % 2), (0, 0), (0, 0)))
    x = splitting.evened(x, 2)
    x = x.reshape(n, -1, 2, -(-h // 2), 2, w, c)
    selection = jnp.asarray(_selection(w), x.dtype)
    x = jnp.einsum("ndahbvc,rwv->ndhwabrc", x, selection, precision=exact(x))
    return x.reshape(*x.shape[:4], 8 * c)[:, : -(-d // 2)]


def unfold(x: Image, shape: tuple[int, ...]) -> Image:
    """N D' H' W' 8C to the voxels of `shape`, N D H W C: the inverse of `fold`."""
    d, h, w = shape
    x = splitting.evened(x)
    n, *blocks, c = x.shape
    x = x.reshape(n, *blocks, 2, 2, 2, c // 8)
    selection = jnp.asarray(_selection(w), x.dtype)
    # The voxels of a row come last: three channels would fill three of 128 lanes.
    x = jnp.einsum("ndhwabrc,rwv->ncdahbv", x, selection, precision=exact(x))
    x = x.reshape(n, c // 8, 2 * blocks[0], 2 * blocks[1], w)[:, :, :d, :h]
    return jnp.moveaxis(x, 1, -1)


def along(values: np.ndarray, axis: int, folds: int, channels: int) -> np.ndarray:
    """Returns numbers along an axis of voxels as a factor of a folded image.

    Args:
      values: of each voxel; zeros are added for those that complete a block.
      axis: 0 to 2.
      folds: how often the image is folded.
      channels: of a voxel.

    Returns:
      1 D H W 8^folds C, of one place along the other axes.
    """
    count = -(-len(values) // 2**folds)
    values = np.pad(values, (0, count * 2**folds - len(values)))
    # Of its blocks, and its places among the channels; the same for the others.
    shape = [1] * (5 + 3 * folds)
    for place in (axis + 1, *range(axis + 4, 4 + 3 * folds, 3)):
        shape[place] = 2
    shape[axis + 1] = count
    whole = [*shape[:4], *(2,) * (3 * folds), channels]
    return np.broadcast_to(values.reshape(shape), whole).reshape(*whole[:4], -1)


def within(x: Image, shape: tuple[int, ...], folds: int = 1) -> Image:
    """Sets what is folded of voxels beyond `shape` to zero."""
    for axis, n in enumerate(shape):
        places = x.shape[axis + 1] * 2**folds
        if places != n:
            inside = along(np.arange(places) < n, axis, folds, x.shape[-1] // 8**folds)
            x = jnp.where(jnp.asarray(inside), x, jnp.zeros((), x.dtype))
    return x


# --- kernels --------------------------------------------------------------------------


def same_kernel(kernel: jax.Array) -> jax.Array:
    """Returns 3 3 3 8I 8O: a kernel 3 3 3 I O between folded images."""
    i, o = kernel.shape[3:]
    # Of block t - 1 its voxel r, for voxel s: tap 2 t + r - s - 1.
    places = [
        jnp.pad(kernel, (*((1 + s, 2 - s) for s in place), (0, 0), (0, 0)))
        for place in np.ndindex(2, 2, 2)
    ]
    w = jnp.stack(places, 4).reshape(3, 2, 3, 2, 3, 2, i, 8 * o)
    return w.transpose(0, 2, 4, 1, 3, 5, 6, 7).reshape(3, 3, 3, 8 * i, 8 * o)


def down_kernel(kernel: jax.Array) -> jax.Array:
    """Returns 2 2 2 8I O: a kernel 3 3 3 I O of stride 2 on a folded image.

    Its first tap is the block before.
    """
    i, o = kernel.shape[3:]
    # Of block t - 1 its voxel r: tap 2 t + r - 1.
    w = jnp.pad(kernel, ((1, 0),) * 3 + ((0, 0),) * 2).reshape(2, 2, 2, 2, 2, 2, i, o)
    return w.transpose(0, 2, 4, 1, 3, 5, 6, 7).reshape(2, 2, 2, 8 * i, o)


def up_kernel(kernel: jax.Array) -> jax.Array:
    """Returns 3 3 3 I 8O: a transposed kernel 4 4 4 I O, its result folded.

    See `api.conv4_transpose2` for the order of its taps.
    """
    # Of voxel t - 1, for voxel s: tap s + 3 - 2 t.
    flipped = jnp.flip(kernel, (0, 1, 2))
    places = [
        jnp.pad(flipped, (*((s, 2 - s) for s in place), (0, 0), (0, 0)))[::2, ::2, ::2]
        for place in np.ndindex(2, 2, 2)
    ]
    w = jnp.stack(places, 4)  # 3 3 3 I 8 O
    return w.reshape(*w.shape[:4], -1)


def doubling_kernel(channels: np.ndarray, dtype) -> jax.Array:
    """Returns 4 4 4 I O: trilinear doubling as a transposed convolution, stride 2.

    See `api.upsample2`; its clamped ends are one more voxel on either side.

    Args:
      channels: I O: what of an input is in which output.
      dtype: of the result.
    """
    taps = np.array([0.25, 0.75, 0.75, 0.25])
    kernel = np.einsum("a,b,c,io->abcio", taps, taps, taps, channels)
    return jnp.asarray(kernel, dtype)


# --- layers ---------------------------------------------------------------------------


def convolved(
    x: Image, kernel: jax.Array, margins: Sequence[tuple[int, int]], **options
) -> Image:
    """Returns the convolution of stride 1 with zeros around, by XLA's own.

    Args:
      x: N D H W I.
      kernel: kD kH kW I O.
      margins: zeros before and behind, per axis.
      **options: of `jax.lax.conv_general_dilated`.
    """
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), margins, dimension_numbers=DIMENSIONS, **options
    )


def down3(x: Image, kernel: jax.Array) -> Image:
    """3x3x3 convolution, stride 2, zero padding 1: N ceil(D/2) ceil(H/2) ceil(W/2) O.

    Args:
      x: N D H W I, not folded.
      kernel: 3 3 3 I O.
    """
    return convolved(fold(x), down_kernel(kernel), ((1, 0),) * 3)


def conv3(x: Image, kernel: jax.Array) -> Image:
    """3x3x3 convolution, stride 1, zero padding 1: N D H W O.

    Args:
      x: N D H W I, not folded.
      kernel: 3 3 3 I O.
    """
    y = convolved(fold(x), same_kernel(kernel), ((1, 1),) * 3)
    return unfold(y, x.shape[1:4])


def average_pool2(x: Image) -> Image:
    """2x2x2 average pooling of few channels, see `api.average_pool2`.

    A product, for what reads one window after the other wants the channels of a voxel
    apart, each in a tile of its own.

    Args:
      x: N D H W C, not folded.
    """
    *spatial, c = x.shape[1:]
    mean = jnp.asarray(np.tile(np.eye(c), (8, 1)) / 8, x.dtype)  # 8C C
    kernel = mean[None, None, None]
    y = convolved(fold(x), kernel, ((0, 0),) * 3, precision=exact(x))
    for axis, n in enumerate(spatial, start=1):
        if n % 2:  # of the last pair one voxel is a zero
            twice = np.where(np.arange(y.shape[axis]) == n // 2, 2.0, 1.0)
            others = tuple(other for other in range(5) if other != axis)
            y = y * jnp.asarray(np.expand_dims(twice, others), y.dtype)
    return y
