"""tallUNet2: the U-Net of the GradICON family.

References:
  Tian et al., GradICON, CVPR 2023; Tian et al., uniGradICON, MICCAI 2024. The layers,
  constants and quirks follow icon_registration 1.1.9, whose weights load unchanged.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxreg.nn import blocks
from jaxreg.nn.conv import api
from jaxreg.nn.doubling import Doubling, fit
from jaxreg.nn.layers import Convolution, Precision, Scaled, Weights
from jaxreg.typing import ONE_CALL, Batching, Field, Image

_NORM_EPSILON = 1e-5
_NORM_MOMENTUM = 0.9  # of the old value; PyTorch counts it the other way: 0.1


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of one U-Net.

    Attributes:
      channels_down: channels before each strided convolution and after the last; the
        first is that of the two images together.
      channels_up: channels after each upsampling, finest first.
      form: convolution form, see `jaxreg.nn.conv.api`.
      precision: see `jaxreg.nn.layers.Precision`.
    """

    channels_down: tuple[int, ...] = (2, 16, 32, 64, 256, 512)
    channels_up: tuple[int, ...] = (16, 32, 64, 128, 256)
    form: api.Form = "auto"
    precision: Precision = "float32"


# Keeps the array, no deviations.
@functools.partial(jax.checkpoint, static_argnums=(1, 2, 3))
def _moments(
    grouped: jax.Array,
    batching: Batching,
    folds: int,
    shape: tuple[int, int, int] | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of G N D H W C per group and channel."""
    axes = (1, 2, 3, 4)
    grouped = grouped.astype(jnp.float32)
    if shape is None:
        mean = batching.mean_over_sharers(grouped.mean(axes, keepdims=True))
        variance = jnp.square(grouped - mean).mean(axes, keepdims=True)
    else:
        mean = batching.mean_over_sharers(blocks.mean(grouped, folds, shape))
        variance = blocks.variance(grouped, mean, folds, shape)
    return mean, batching.mean_over_sharers(variance)


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch's: the running variance is the unbiased one.

    Attributes:
      batching: what the statistics are taken over.
      folds: how often x is folded, see `jaxreg.nn.blocks`.
      shape: the voxels of a folded x that count.
    """

    batching: Batching = ONE_CALL
    folds: int = 0
    shape: tuple[int, int, int] | None = None

    @nn.compact
    def __call__(self, x: Image, *, train: bool) -> Scaled:
        """Normalises N D H W C; in training moves the running statistics.

        Of a folded image the factor and the shift are those of a voxel's C channels.
        """
        batching = self.batching
        c = x.shape[-1] // 8**self.folds
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        var = self.variable("batch_stats", "var", jnp.ones, (c,))
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if not train:
            factor = scale * jax.lax.rsqrt(var.value + _NORM_EPSILON)
            shift = bias - mean.value * factor
            return Scaled(
                x, factor[None, None, None, None], shift[None, None, None, None]
            )
        groups = batching.calls * max(batching.replicas, 1)
        grouped = x.reshape(groups, -1, *x.shape[1:])  # G N/G D H W C
        now_mean, now_var = _moments(grouped, batching, self.folds, self.shape)
        if not self.is_initializing():
            counted = math.prod(self.shape or x.shape[1:4])
            voxels = grouped.shape[1] * counted * batching.sharers()
            unbiased = now_var * (voxels / max(voxels - 1, 1))
            calls = [
                # calls C
                batching.mean_over_devices(a.reshape(batching.calls, -1, c).mean(1))
                for a in (now_mean, unbiased)
            ]
            keep = _NORM_MOMENTUM
            for call_mean, call_var in zip(*calls, strict=True):
                mean.value = keep * mean.value + (1 - keep) * call_mean
                var.value = keep * var.value + (1 - keep) * call_var
            count.value = count.value + batching.calls
        scale, bias = (a.reshape(1, 1, 1, 1, 1, c) for a in (scale, bias))
        factor = scale * jax.lax.rsqrt(now_var + _NORM_EPSILON)  # G 1 1 1 1 C
        shift = bias - now_mean * factor
        samples = x.shape[0] // groups
        # G 1 1 1 1 C to N 1 1 1 C
        factor, shift = (jnp.repeat(a[:, 0], samples, 0) for a in (factor, shift))
        return Scaled(x, factor, shift)


class TallUNet2(nn.Module):
    """Two images to a displacement field, unit coordinates of their own grid."""

    config: UNetConfig = UNetConfig()

    @nn.compact
    def __call__(
        self,
        moving: Image,
        fixed: Image,
        *,
        train: bool = False,
        batching: Batching = ONE_CALL,
    ) -> Field:
        """Maps moving and fixed, each N D H W C, to N D H W 3; any size of at least 2.

        In training mode batch norm uses and updates batch statistics, see `Batching`.
        """
        config = self.config
        down, up, form = config.channels_down, config.channels_up, config.form
        x = jnp.concatenate([moving, fixed], axis=-1)
        if x.shape[-1] != down[0]:
            raise ValueError(
                f"moving and fixed have {x.shape[-1]} channels together, "
                f"the U-Net expects {down[0]}"
            )
        x = x.astype(config.precision)
        levels, coarsened = len(up), None
        if levels >= blocks.LEVELS and api.is_folded(form, x.shape[1:4]):
            coarsened = self._encoded(x)
            x = coarsened[-1]
        finer = blocks.LEVELS if coarsened else 0
        skips = {}
        for level in range(finer, levels):
            skips[level] = x
            name, shape = f"down_{level}", (3, 3, 3, down[level], down[level + 1])
            layer = Convolution(
                api.conv3_stride2, shape, activated=True, form=form, name=name
            )
            y = layer(x)
            x = y + fit(api.average_pool2(x), down[level + 1])
        parts: tuple[Any, ...] = (x,)
        channels = down[levels]
        for level in reversed(range(finer, levels)):
            shape = (4, 4, 4, channels, up[level])
            # The residual keeps the first channels: the decoder's, as up shrinks.
            x = Doubling(shape, form, name=f"up_{level}")(parts)
            normal = BatchNorm(batching, name=f"norm_{level}")(x, train=train)
            skip = skips[level]
            parts = (dataclasses.replace(normal, shape=skip.shape[1:4]), skip)
            channels = up[level] + skip.shape[-1]
        # In float32: displacements need more digits than bfloat16 has.
        if coarsened is not None:
            d, h, w = moving.shape[1:4]
            field = self._decoded(
                parts, channels, coarsened, (d, h, w), batching, train=train
            )
        else:
            last = Convolution(
                api.conv3, (3, 3, 3, channels, 3), form=form, dtype="float32",
                kernel_init=nn.initializers.zeros, name="last",
            )  # fmt: skip
            field = last(parts)
        return field / 10.0

    def _encoded(self, x: Image) -> tuple[Image, Image, Image]:
        """Returns the images of the first three levels, folded twice, once and not."""
        down = self.config.channels_down
        d, h, w = x.shape[1:4]
        shape = d, h, w
        x = blocks.fold(x)
        weights = Weights((3, 3, 3, down[0], down[1]), name="down_0")()
        second = blocks.down_0(x, *weights, shape)
        weights = Weights((3, 3, 3, down[1], down[2]), name="down_1")()
        return x, second, blocks.down_1(second, *weights, blocks.below(shape))

    def _decoded(
        self,
        parts: tuple[Image | Scaled, ...],
        channels: int,
        images: tuple[Image, Image, Image],
        shape: tuple[int, int, int],
        batching: Batching,
        *,
        train: bool,
    ) -> Field:
        """Returns the field of the third level's parts and the images above it."""
        (first, second, _), down = images, self.config.channels_down
        up = self.config.channels_up
        middle = blocks.below(shape)
        coarse = blocks.below(middle)
        up4 = api.conv4_transpose2

        def normalised(level, x, doubled, folds):
            d, h, w = (2 * n for n in doubled)
            name = f"norm_{level}"
            return BatchNorm(batching, folds, (d, h, w), name=name)(x, train=train)

        weights = Weights((4, 4, 4, channels, up[1]), up4, name="up_1")()
        x = blocks.up_1(parts, *weights, coarse)
        normal = normalised(1, x, coarse, 1)
        weights = Weights((4, 4, 4, up[1] + down[1], up[0]), up4, name="up_0")()
        x = blocks.up_0(normal, second, *weights, middle)
        normal = normalised(0, x, middle, 2)
        shape_of = (3, 3, 3, up[0] + down[0], 3)
        weights = Weights(shape_of, kernel_init=nn.initializers.zeros, name="last")()
        return blocks.last(normal, first, *weights, shape)
