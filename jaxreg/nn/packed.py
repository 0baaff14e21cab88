"""The U-Net's finest level: its decoder's last doubling, and the layer to a field.

What lies between the two is as large as the image with 16 channels, and each platform
wants it in another order: plain for CPU and GPU, folded for TPU (`nn.conv.folded`).
Packed, N D H W 8C, is either: the same numbers of twice the grid's resolution, which
only the functions of this module read.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxreg.nn.conv import api, folded
from jaxreg.nn.conv.api import Form, Forms
from jaxreg.nn.layers import Scaled, convolved, kernel_and_bias, leaky, value
from jaxreg.typing import Field, Image
from jaxreg.xla import splitting


def fit(x: Image, channels: int) -> Image:
    """Keeps the first channels, or puts the missing ones, all zero, in front."""
    missing = channels - x.shape[-1]
    if missing > 0:
        return jnp.pad(x, ((0, 0),) * 4 + ((missing, 0),))
    return x[..., :channels]


# --- doubling -------------------------------------------------------------------------


class Doubling(nn.Module):
    """Transposed convolution of an activated image, plus the image itself, doubled.

    Attributes:
      shape: of the kernel, 4 4 4 I O.
      form: see `jaxreg.nn.conv.api`.
      packed: whether the result is; see the module.
    """

    shape: tuple[int, ...]
    form: Form = "auto"
    packed: bool = False

    @nn.compact
    def __call__(self, parts: tuple[Image | Scaled, ...]) -> Image:
        """Maps parts of N D H W I along channels to N 2D 2H 2W O.

        The image is doubled trilinearly: its first O channels, with zeros in front of
        those of an image that has fewer.
        """
        kernel, bias = kernel_and_bias(self, self.shape, api.conv4_transpose2)
        forms = _PACKED if self.packed else _PLAIN
        return api.chosen(forms, self.form, parts, kernel, bias)


def _doubled(parts: Any, kernel: jax.Array, bias: jax.Array, *, form: Form) -> Image:
    y = convolved(
        parts, kernel, bias, function=api.conv4_transpose2, activated=True, form=form,
        dtype=None,
    )  # fmt: skip
    return y + api.upsample2(fit(_whole(parts, y.shape[-1]), y.shape[-1]))


def _whole(parts: Any, channels: int) -> Image:
    """Returns the image with at least that many channels, if it has them."""
    # The first part has them, but for the smallest networks.
    first = value(parts[0])
    if first.shape[-1] >= channels:
        return first
    return jnp.concatenate([first, *map(value, parts[1:])], axis=-1)


def _doubled_packed(parts: Any, kernel: jax.Array, bias: jax.Array, *, form: Form):
    y = _doubled(parts, kernel, bias, form=form)
    n, d, h, w, c = y.shape
    y = splitting.evened(y, 2)
    return y.reshape(n, -1, h // 2, w // 2, 8 * c)[:, : d // 2]


def _summed(parts: Any, kernel: jax.Array, of_kernel, convolve) -> jax.Array:
    """Transposed convolution of the activated image, and the image doubled, in one.

    Args:
      parts: of the image.
      kernel: 4 4 4 I O.
      of_kernel: maps such a kernel to that of `convolve`.
      convolve: ``f(image with a margin of one voxel, kernel, precision=)``.
    """
    x = jnp.concatenate([value(part) for part in parts], -1)
    residual = fit(x, kernel.shape[-1])
    kernel = kernel.astype(x.dtype)
    doubling = folded.doubling_kernel(kernel.shape[-1], x.dtype)
    around = ((0, 0), *((1, 1),) * 3, (0, 0))
    x, along = jnp.pad(leaky(x), around), splitting.edged(residual, 1, 1)
    residual = jnp.pad(along, (*((0, 0),) * 2, *around[2:]), mode="edge")
    if x.dtype == jnp.bfloat16:  # which holds the weights of doubling exactly
        both = jnp.concatenate([x, residual], -1)
        kernels = jnp.concatenate([kernel, doubling], 3)
        return convolve(both, of_kernel(kernels), precision=None)
    return convolve(x, of_kernel(kernel), precision=None) + convolve(
        residual, of_kernel(doubling), precision=jax.lax.Precision.HIGHEST
    )


def _doubled_on_tpu(parts: Any, kernel: jax.Array, bias: jax.Array) -> Image:
    if splitting.devices() > 1:  # the gradient of a dilated kernel exchanges all of x
        return _doubled(parts, kernel, bias, form="native")

    def convolve(x, kernel, **options):
        return api.dilated(x, kernel, 0, **options)

    def of_kernel(kernel):
        return jnp.flip(kernel, (0, 1, 2))

    y = _summed(parts, kernel, of_kernel, convolve)
    return y + bias.astype(y.dtype)[None, None, None, None]


def _doubled_folded(parts: Any, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    def convolve(x, kernel, **options):
        return folded.convolved(x, kernel, ((0, 0),) * 3, **options)

    y = _summed(parts, kernel, folded.up_kernel, convolve)
    return y + jnp.tile(bias.astype(y.dtype), 8)[None, None, None, None]


def _forms(function: Callable, on_tpu: Callable) -> Forms:
    """Returns the forms of a function whose layers do what differs but on TPU."""
    slab, native = (functools.partial(function, form=f) for f in ("slab", "native"))
    return Forms(slab, native, on_tpu)


_PLAIN = _forms(_doubled, _doubled_on_tpu)
_PACKED = _forms(_doubled_packed, _doubled_folded)


# --- statistics -----------------------------------------------------------------------


def mean(grouped: jax.Array, form: Form) -> jax.Array:
    """Returns the mean per group and channel, G 1 1 1 1 C, of packed G N D H W 8C."""
    return api.chosen(Forms(_mean, _mean, _mean_folded), form, grouped)


def variance(grouped: jax.Array, mean: jax.Array, form: Form) -> jax.Array:
    """Returns the mean squared distance from a mean, G 1 1 1 1 C."""
    forms = Forms(_variance, _variance, _variance_folded)
    return api.chosen(forms, form, grouped, mean)


_AXES = (1, 2, 3, 4)


def _plain(grouped: jax.Array) -> jax.Array:
    g, n, d, h, w, c = grouped.shape
    grouped = splitting.evened(grouped.reshape(g * n, d, h, w, c))
    return grouped.reshape(g, n, -1, 2 * h, 2 * w, c // 8)[:, :, : 2 * d]


def _mean(grouped):
    return _plain(grouped).mean(_AXES, keepdims=True)


def _variance(grouped, mean):
    return jnp.square(_plain(grouped) - mean).mean(_AXES, keepdims=True)


def _over_places(x):
    """G 1 1 1 1 8C to the mean of each channel's eight places, G 1 1 1 1 C."""
    return x.reshape(*x.shape[:-1], 8, -1).mean(-2)


def _mean_folded(grouped):
    return _over_places(grouped.mean(_AXES, keepdims=True))


def _variance_folded(grouped, mean):
    apart = grouped - jnp.tile(mean, 8)
    return _over_places(jnp.square(apart).mean(_AXES, keepdims=True))


# --- the last layer -------------------------------------------------------------------


class LastLayer(nn.Module):
    """3x3x3 convolution of a packed image and the input to a field, in float32.

    Attributes:
      inputs: channels of both together.
      form: see `jaxreg.nn.conv.api`.
    """

    inputs: int
    form: Form = "auto"

    @nn.compact
    def __call__(self, normal: Scaled, skip: Image) -> Field:
        """Maps a packed image, and one of D H W voxels, to N D H W 3.

        Args:
          normal: packed, at least D H W voxels; the factor and shift are those of C
            channels.
          skip: N D H W C.
        """
        shape = (3, 3, 3, self.inputs, 3)
        kernel, bias = kernel_and_bias(
            self, shape, api.conv3, kernel_init=nn.initializers.zeros
        )
        args = normal.image, normal.factor, normal.shift, skip, kernel, bias
        return api.chosen(_LAST, self.form, *args)


def _last(y, factor, shift, skip, kernel, bias, *, form: Form) -> Field:
    y = splitting.evened(y)
    n, d, h, w, c = y.shape
    y = y.reshape(n, 2 * d, 2 * h, 2 * w, c // 8)
    parts = (Scaled(y, factor, shift, skip.shape[1:4]), skip)
    return convolved(
        parts, kernel, bias, function=api.conv3, activated=False, form=form,
        dtype="float32",
    )  # fmt: skip


def _last_folded(y, factor, shift, skip, kernel, bias) -> Field:
    shape = skip.shape[1:4]
    factor, shift = (jnp.tile(a, 8).astype(y.dtype) for a in (factor, shift))
    z = folded.within(y * factor + shift, shape)
    kernels = jnp.split(kernel, [y.shape[-1] // 8], axis=3)
    # Two products: together their channels would be more than one tile of 128.
    parts = zip((z, folded.fold(skip)), map(folded.same_kernel, kernels), strict=True)
    sums = [_in_float32(x, kernel) for x, kernel in parts]
    return folded.unfold(sums[0] + sums[1], shape) + bias[None, None, None, None]


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


_ONE = ((1, 1),) * 3


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

_LAST = _forms(_last, _last_folded)
