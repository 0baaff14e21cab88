"""Layers of a network's finest level on the grid of half its resolution, for TPU.

The images stay folded from one layer to the next, see `jaxreg.nn.conv.folded`: N D H W
C of even sizes is N D/2 H/2 W/2 8C here. An image of half the resolution, of which each
voxel would be repeated 2 x 2 x 2 times, is convolved as it is: the taps that meet the
same voxel are added up.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.nn.conv import api, folded
from jaxreg.typing import Image


def fold(x: Image) -> Image:
    """N D H W C to N D/2 H/2 W/2 8C."""
    return folded.fold(x)


def unfold(x: Image) -> Image:
    """N D/2 H/2 W/2 8C to N D H W C."""
    d, h, w = (2 * n for n in x.shape[1:4])
    return folded.unfold(x, (d, h, w))


def convolved(
    x: Image | tuple[Image, ...],
    kernel: jax.Array,
    bias: jax.Array,
    *,
    stride: Literal[1, 2] = 1,
) -> Image:
    """3x3x3 convolution of a folded image, zero padding 1.

    Its gradient keeps the arguments, no kernel between folded images.

    Args:
      x: folded, or parts along channels: without a stride those before the last one may
        be of half the resolution, which are repeated.
      kernel: 3 3 3 I O.
      bias: O.
      stride: 2 for half the resolution.

    Returns:
      N D/2 H/2 W/2 8O, folded; with a stride O channels, not folded.
    """
    parts = x if isinstance(x, tuple) else (x,)
    layer = _same if stride == 1 else _strided
    kernel, bias = (a.astype(parts[-1].dtype) for a in (kernel, bias))
    return api.chosen(api.Forms(layer, layer), "native", parts, kernel, bias)


def _same(parts, kernel, bias):
    *coarse, fine = parts
    repeated = sum(x.shape[-1] for x in coarse)
    around = ((1, 1),) * 3
    own = folded.same_kernel(kernel[..., repeated:, :])
    y = folded.convolved(fine, own, around)
    if coarse:
        taps = folded.same_kernel(kernel[..., :repeated, :])
        taps = taps.reshape(3, 3, 3, 8, repeated, -1).sum(3)
        y = y + folded.convolved(jnp.concatenate(coarse, -1), taps, around)
    return y + jnp.tile(bias, 8)[None, None, None, None]


def _strided(parts, kernel, bias):
    (x,) = parts
    y = folded.convolved(x, folded.down_kernel(kernel), ((1, 0),) * 3)
    return y + bias[None, None, None, None]


def max_pool2(x: Image) -> Image:
    """2x2x2 maximum of a folded image: N D/2 H/2 W/2 C."""
    places = jnp.split(x, 8, -1)  # a reshape of lanes would move single numbers
    while len(places) > 1:
        places = list(map(jnp.maximum, places[::2], places[1::2]))
    return places[0]
