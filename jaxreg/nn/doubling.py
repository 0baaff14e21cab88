"""Doubling of an image in a U-Net's decoder, with the image itself added."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxreg.nn.conv import api, folded
from jaxreg.nn.conv.api import Form, Forms
from jaxreg.nn.layers import Scaled, convolved, kernel_and_bias, leaky, value
from jaxreg.typing import Image
from jaxreg.xla import splitting


def fit(x: jax.Array, channels: int) -> jax.Array:
    """Keeps the first channels, or puts the missing ones, all zero, in front.

    Args:
      x: of any shape, channels last.
      channels: how many there shall be.
    """
    missing = channels - x.shape[-1]
    if missing > 0:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((missing, 0),))
    return x[..., :channels]


class Doubling(nn.Module):
    """Transposed convolution of an activated image, plus the image itself, doubled.

    Attributes:
      shape: of the kernel, 4 4 4 I O.
      form: see `jaxreg.nn.conv.api`.
    """

    shape: tuple[int, ...]
    form: Form = "auto"

    @nn.compact
    def __call__(self, parts: tuple[Image | Scaled, ...]) -> Image:
        """Maps parts of N D H W I along channels to N 2D 2H 2W O.

        The image is doubled trilinearly: its first O channels, with zeros in front of
        those of an image that has fewer.
        """
        kernel, bias = kernel_and_bias(self, self.shape, api.conv4_transpose2)
        return api.chosen(_FORMS, self.form, parts, kernel, bias)


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


def _doubled_on_tpu(parts: Any, kernel: jax.Array, bias: jax.Array) -> Image:
    if splitting.devices() > 1:  # the gradient of a dilated kernel exchanges all of x
        return _doubled(parts, kernel, bias, form="native")
    x = jnp.concatenate([value(part) for part in parts], -1)
    residual = fit(x, kernel.shape[-1])
    kernel = jnp.flip(kernel.astype(x.dtype), (0, 1, 2))
    doubling = folded.doubling_kernel(np.eye(kernel.shape[-1]), x.dtype)
    around = ((0, 0), *((1, 1),) * 3, (0, 0))
    x, residual = jnp.pad(leaky(x), around), jnp.pad(residual, around, mode="edge")
    if x.dtype == jnp.bfloat16:  # which holds the weights of doubling exactly
        both = jnp.concatenate([x, residual], -1)
        y = api.dilated(both, jnp.concatenate([kernel, doubling], 3), 0)
    else:
        highest = jax.lax.Precision.HIGHEST
        y = api.dilated(residual, doubling, 0, precision=highest)
        y = y + api.dilated(x, kernel, 0)
    return y + bias.astype(y.dtype)[None, None, None, None]


_FORMS = Forms(
    functools.partial(_doubled, form="slab"),
    functools.partial(_doubled, form="native"),
    _doubled_on_tpu,
)
