"""A U-Net's two finest levels on blocks of 4 x 4 x 4 voxels: their form for TPU.

What lies at an image's own resolution has a few channels, and at half of it not many
more, so that a TPU would move mostly padding, see `jaxreg.nn.conv.folded`. Here a block
of the image is one place with all its voxels as channels: 2 x 2 x 2 blocks of 2 x 2 x 2
voxels, folded twice. A block of the level below is one of 2 x 2 x 2 voxels of that. So
both levels lie on the grid of the third, where each layer is a convolution of stride 1
between channels that fill the lanes, by kernels that are made of the same weights.

Images of n voxels along an axis have ``n_1 = ceil(n / 2)`` at the second and
``n_2 = ceil(n_1 / 2)`` at the third level: N D_2 H_2 W_2 C there, 8C and 64C here. What
is beyond the voxels that count is zero in all that these functions return, but for what
awaits batch norm.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.nn.conv import api, folded
from jaxreg.nn.layers import Scaled, leaky, value
from jaxreg.typing import Field, Image

LEVELS = 2
"""How many levels of a U-Net these are."""
_ONE = ((1, 1),) * 3


def below(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the voxels of the next coarser level."""
    d, h, w = (-(-n // 2) for n in shape)
    return d, h, w


@dataclasses.dataclass(frozen=True)
class _Of:
    """A function of arrays, with the voxels that count; equal ones are traced once."""

    function: Callable
    shape: tuple[int, int, int]

    def __call__(self, *args: Any) -> jax.Array:
        return self.function(*args, shape=self.shape)


def _layer(
    function: Callable, shape: tuple[int, int, int], images: Any, *parameters: jax.Array
):
    """Applies a layer; its gradient keeps the arguments, as all layers' do."""
    layer = _Of(function, shape)
    return api.chosen(api.Forms(layer, layer), "native", images, *parameters)


# --- encoder --------------------------------------------------------------------------


def fold(x: Image) -> Image:
    """N D H W C to N D_2 H_2 W_2 64C."""
    return folded.fold(folded.fold(x))


def down_0(
    x: Image, kernel: jax.Array, bias: jax.Array, shape: tuple[int, int, int]
) -> Image:
    """Strided convolution and pooling of the image: N D_2 H_2 W_2 8O.

    Args:
      x: N D_2 H_2 W_2 64I.
      kernel: 3 3 3 I O.
      bias: O.
      shape: voxels of the image.
    """
    return _layer(_down_0, shape, x, kernel, bias)


def _down_0(x, kernel, bias, *, shape):
    down = folded.down_kernel(kernel.astype(x.dtype))
    # Of stride 1 between folded images: its third tap is zero.
    down = folded.same_kernel(jnp.pad(down, ((0, 1),) * 3 + ((0, 0),) * 2))
    y = folded.convolved(leaky(x), down, _ONE)
    y = y + _pooled(x, kernel.shape[-2:], shape, 1)
    return folded.within(_with_bias(y, bias), below(shape))


def down_1(
    x: Image, kernel: jax.Array, bias: jax.Array, shape: tuple[int, int, int]
) -> Image:
    """Strided convolution and pooling of the second level: N D_2 H_2 W_2 O.

    Args:
      x: N D_2 H_2 W_2 8I.
      kernel: 3 3 3 I O.
      bias: O.
      shape: voxels of the second level.
    """
    return _layer(_down_1, shape, x, kernel, bias)


def _down_1(x, kernel, bias, *, shape):
    down = folded.down_kernel(kernel.astype(x.dtype))
    y = folded.convolved(leaky(x), down, ((1, 0),) * 3)
    return _with_bias(y + _pooled(x, kernel.shape[-2:], shape, 0), bias)


def _pooled(
    x: Image, channels: tuple[int, ...], shape: tuple[int, int, int], folds: int
) -> Image:
    """Averages of 2 x 2 x 2 voxels, see `api.average_pool2`; as many channels as asked.

    Args:
      x: image of I channels, folded once more often than the result.
      channels: I and O.
      shape: voxels of x that count.
      folds: of the result.
    """
    inputs, outputs = channels
    mean = np.tile(_fitting(inputs, outputs) / 8, (8, 1))
    mean = np.kron(np.eye(8**folds), mean)
    kernel = jnp.asarray(mean, x.dtype)[None, None, None]
    y = folded.convolved(x, kernel, ((0, 0),) * 3, precision=folded.exact(x))
    for axis, n in enumerate(shape):
        if n % 2:  # of the last pair one voxel is a zero
            twice = np.where(np.arange(-(-n // 2)) == n // 2, 2.0, 1.0)
            y = y * jnp.asarray(folded.along(twice, axis, folds, outputs), y.dtype)
    return y


# --- decoder --------------------------------------------------------------------------


def up_1(
    parts: tuple[Image | Scaled, ...],
    kernel: jax.Array,
    bias: jax.Array,
    shape: tuple[int, int, int],
) -> Image:
    """The third level doubled, see `jaxreg.nn.doubling.Doubling`: N D_2 H_2 W_2 8O.

    Args:
      parts: of N D_2 H_2 W_2 I along channels.
      kernel: 4 4 4 I O.
      bias: O.
      shape: voxels of the third level.
    """
    return _layer(_up_1, shape, parts, kernel, bias)


def _up_1(parts, kernel, bias, *, shape):
    parts = tuple(map(value, parts))
    kernels = _up_kernels([x.shape[-1] for x in parts], kernel, parts[0].dtype)
    own, double = (
        jnp.concatenate(list(map(folded.up_kernel, of)), 3) for of in kernels
    )
    x = jnp.concatenate(parts, -1)
    y = folded.convolved(leaky(x), own, _ONE)
    again = _trilinear(x, double, _ONE, _edges(shape, 1, bias.size))
    return _with_bias(y + again, bias).astype(x.dtype)


def up_0(
    normal: Scaled,
    skip: Image,
    kernel: jax.Array,
    bias: jax.Array,
    shape: tuple[int, int, int],
) -> Image:
    """The second level doubled, see `jaxreg.nn.doubling.Doubling`: N D_2 H_2 W_2 64O.

    Args:
      normal: its first channels, N D_2 H_2 W_2 8I'; factor and shift are those of I'.
      skip: the others.
      kernel: 4 4 4 I O.
      bias: O.
      shape: voxels of the second level.
    """
    return _layer(_up_0, shape, (normal, skip), kernel, bias)


def _up_0(images, kernel, bias, *, shape):
    normal, skip = images
    parts = (folded.within(_scaled(normal, 8), shape), skip)
    dtype, outputs = skip.dtype, bias.size
    kernels = _up_kernels([x.shape[-1] // 8 for x in parts], kernel, dtype)
    own, double = (
        jnp.concatenate([folded.same_kernel(folded.up_kernel(k)) for k in of], 3)
        for of in kernels
    )
    x = jnp.concatenate(parts, -1)
    active, edges = leaky(x), _edges(shape, 2, outputs)
    found = []
    # Each half of a block reads two blocks of three along an axis.
    for place, halves in enumerate(np.ndindex(2, 2, 2)):
        taps = tuple(slice(half, half + 2) for half in halves)
        margins = tuple((1 - half, half) for half in halves)
        lanes = slice(8 * outputs * place, 8 * outputs * (place + 1))
        y = folded.convolved(active, own[*taps, :, lanes], margins)
        again = _trilinear(
            x, double[*taps, :, lanes], margins, [e[..., lanes] for e in edges]
        )
        found.append(_with_bias(y + again, bias).astype(dtype))
    return folded.within(jnp.concatenate(found, -1), shape)


def _up_kernels(channels: list[int], kernel: jax.Array, dtype: Any):
    """Returns the kernels 4 4 4 I O of each part, and those that double the image.

    Those of the image's first channels, or with zeros in front; no kernels for parts
    behind these.
    """
    edges = np.cumsum(channels)[:-1]
    own = jnp.split(kernel.astype(dtype), edges, 3)
    parts = np.split(_fitting(sum(channels), kernel.shape[-1]), edges, 0)
    return own, [folded.doubling_kernel(part, dtype) for part in parts if part.any()]


def _fitting(inputs: int, outputs: int) -> np.ndarray:
    """Returns I O of ones and zeros: `jaxreg.nn.doubling.fit` as a product."""
    return np.eye(inputs, outputs, max(outputs - inputs, 0))


def _trilinear(
    x: Image, kernel: jax.Array, margins: Any, edges: Sequence[np.ndarray]
) -> jax.Array:
    """Doubles the channels of x that a kernel has taps for; float32.

    With zeros around, in place of the voxels at the ends once more: these are divided
    by what is missing of their weights.

    Args:
      x: N D H W I.
      kernel: kD kH kW I' O.
      margins: zeros before and behind, per axis.
      edges: factors of the result along each axis, see `_edges`.
    """
    x = x[..., : kernel.shape[3]]
    y = folded.convolved(x, kernel, margins, precision=folded.exact(x))
    for factor in edges:  # apart, for their product is as large as the image
        y = y * jnp.asarray(factor)
    return y


def _edges(shape: tuple[int, int, int], folds: int, channels: int) -> list[np.ndarray]:
    """Returns 1 / the sum of weights of doubling with zeros around, for each axis.

    Args:
      shape: voxels that are doubled.
      folds: of the result.
      channels: of a voxel.
    """
    ends = [np.isin(np.arange(2 * n), (0, 2 * n - 1)) for n in shape]
    return [
        folded.along(np.where(end, np.float32(4 / 3), 1), axis, folds, channels)
        for axis, end in enumerate(ends)
    ]


def _with_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    tiled = jnp.tile(bias.astype(y.dtype), y.shape[-1] // bias.size)
    return y + tiled[None, None, None, None]


def _scaled(normal: Scaled, places: int) -> Image:
    """Returns a folded image times its factor plus its shift."""
    factor, shift = (
        jnp.tile(a, places).astype(normal.image.dtype)
        for a in (normal.factor, normal.shift)
    )
    return normal.image * factor + shift


def last(
    normal: Scaled,
    image: Image,
    kernel: jax.Array,
    bias: jax.Array,
    shape: tuple[int, int, int],
) -> Field:
    """3x3x3 convolution of the decoder's image and the input to a field, N D H W 3.

    Args:
      normal: N D_2 H_2 W_2 64C; factor and shift are those of C channels.
      image: N D_2 H_2 W_2 64I.
      kernel: 3 3 3 C+I 3.
      bias: 3.
      shape: voxels of the image, D H W.
    """
    return _layer(_last, shape, (normal, image), kernel, bias)


def _last(images, kernel, bias, *, shape):
    normal, image = images
    parts = (folded.within(_scaled(normal, 64), shape, folds=2), image)
    kernels = jnp.split(kernel, [normal.image.shape[-1] // 64], 3)
    sums = [
        _in_float32(x, folded.same_kernel(folded.same_kernel(k)))
        for x, k in zip(parts, kernels, strict=True)
    ]
    field = folded.unfold(sums[0] + sums[1], below(shape))
    return folded.unfold(field, shape) + bias[None, None, None, None]


@jax.custom_vjp
def _in_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3x3 convolution with a result in float32, of an image that need not be.

    In bfloat16, which the matrix unit rounds to in any case, for half the bytes.

    Args:
      x: N D H W I.
      kernel: 3 3 3 I O, float32.
    """
    return folded.convolved(
        x, kernel.astype(x.dtype), _ONE, preferred_element_type=jnp.float32
    )


def _in_float32_forward(x, kernel):
    return _in_float32(x, kernel), (x, kernel)


def _in_float32_backward(saved, dy):
    x, kernel = saved
    dy = dy.astype(x.dtype)
    flipped = jnp.swapaxes(jnp.flip(kernel, (0, 1, 2)), 3, 4).astype(x.dtype)
    # The taps' sums over voxels: channels are the batch, and the batch channels.
    gradient = jax.lax.conv_general_dilated(
        x, dy, (1, 1, 1), _ONE, dimension_numbers=("CDHWN", "IDHWO", "DHWNC"),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return folded.convolved(dy, flipped, _ONE), gradient


_in_float32.defvjp(_in_float32_forward, _in_float32_backward)


# --- statistics -----------------------------------------------------------------------


def mean(grouped: jax.Array, folds: int, shape: tuple[int, int, int]) -> jax.Array:
    """Returns the mean per group and channel, G 1 1 1 1 C.

    Args:
      grouped: G N D_2 H_2 W_2 C', folded, zero beyond the voxels that count.
      folds: how often.
      shape: voxels that count.
    """
    places = 8**folds
    blocks = grouped.shape[2:5]
    counted = math.prod(shape) / (math.prod(blocks) * places)
    each = grouped.mean((1, 2, 3, 4), keepdims=True)
    return each.reshape(*each.shape[:-1], places, -1).mean(-2) / counted


def variance(
    grouped: jax.Array, mean_of: jax.Array, folds: int, shape: tuple[int, int, int]
) -> jax.Array:
    """Returns the mean squared distance from a mean, G 1 1 1 1 C; see `mean`."""
    apart = jnp.square(grouped - jnp.tile(mean_of, 8**folds))
    g, n, *rest = apart.shape
    apart = folded.within(apart.reshape(g * n, *rest), shape, folds)
    return mean(apart.reshape(g, n, *rest), folds, shape)
