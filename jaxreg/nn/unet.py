"""tallUNet2: the U-Net of the GradICON family.

References:
  Tian et al., GradICON, CVPR 2023; Tian et al., uniGradICON, MICCAI 2024. The layers,
  constants and quirks follow icon_registration 1.1.9, whose weights load unchanged.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxreg.nn.conv import api
from jaxreg.nn.layers import Convolution, Scaled, value
from jaxreg.typing import ONE_CALL, Batching, Field, Image

_NORM_EPSILON = 1e-5
Precision = Literal["float32", "bfloat16"]
_NORM_MOMENTUM = 0.9  # of the old value; PyTorch counts it the other way: 0.1


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of one U-Net.

    Attributes:
      channels_down: channels before each strided convolution and after the last; the
        first is that of the two images together.
      channels_up: channels after each upsampling, finest first.
      form: convolution form, see `jaxreg.nn.conv.api`.
      precision: of activations and products; parameters, batch statistics and the
        displacement stay float32.
    """

    channels_down: tuple[int, ...] = (2, 16, 32, 64, 256, 512)
    channels_up: tuple[int, ...] = (16, 32, 64, 128, 256)
    form: api.Form = "auto"
    precision: Precision = "float32"


def _fit(x: Image, channels: int) -> Image:
    """Keeps the first channels, or puts the missing ones, all zero, in front."""
    missing = channels - x.shape[-1]
    if missing > 0:
        return jnp.pad(x, ((0, 0),) * 4 + ((missing, 0),))
    return x[..., :channels]


@functools.partial(jax.checkpoint, static_argnums=1)  # keeps the array, no deviations
def _moments(grouped: jax.Array, batching: Batching) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of G N D H W C per group and channel."""
    axes = (1, 2, 3, 4)
    grouped = grouped.astype(jnp.float32)
    mean = batching.mean_over_sharers(grouped.mean(axes, keepdims=True))
    variance = jnp.square(grouped - mean).mean(axes, keepdims=True)
    return mean, batching.mean_over_sharers(variance)


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch's: the running variance is the unbiased one.

    Attributes:
      batching: what the statistics are taken over.
    """

    batching: Batching = ONE_CALL

    @nn.compact
    def __call__(self, x: Image, *, train: bool) -> Scaled:
        """Normalises N D H W C; in training moves the running statistics."""
        batching = self.batching
        c = x.shape[-1]
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
        now_mean, now_var = _moments(grouped, batching)
        if not self.is_initializing():
            voxels = math.prod(grouped.shape[1:5]) * batching.sharers()
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
        down, up, form = (
            self.config.channels_down,
            self.config.channels_up,
            self.config.form,
        )
        levels = len(up)
        x = jnp.concatenate([moving, fixed], axis=-1)
        if x.shape[-1] != down[0]:
            raise ValueError(
                f"moving and fixed have {x.shape[-1]} channels together, "
                f"the U-Net expects {down[0]}"
            )
        x = x.astype(self.config.precision)
        skips = []
        for level in range(levels):
            skips.append(x)
            name, shape = f"down_{level}", (3, 3, 3, down[level], down[level + 1])
            layer = Convolution(
                api.conv3_stride2, shape, activated=True, form=form, name=name
            )
            y = layer(x)
            x = y + _fit(api.average_pool2(x), down[level + 1])
        parts, channels = (x,), down[levels]
        for level in reversed(range(levels)):
            name, shape = f"up_{level}", (4, 4, 4, channels, up[level])
            layer = Convolution(
                api.conv4_transpose2, shape, activated=True, form=form, name=name
            )
            y = layer(parts)
            # The residual keeps the first channels: the decoder's, as up shrinks.
            whole = value(parts[0])
            if whole.shape[-1] < min(up[level], channels):
                whole = jnp.concatenate([whole, *parts[1:]], axis=-1)
            x = y + api.upsample2(_fit(whole, up[level]))
            normal = BatchNorm(batching, name=f"norm_{level}")(x, train=train)
            skip = skips[level]
            parts = (dataclasses.replace(normal, shape=skip.shape[1:4]), skip)
            channels = up[level] + skip.shape[-1]
        last = Convolution(
            api.conv3,
            (3, 3, 3, channels, 3),
            kernel_init=nn.initializers.zeros,
            form=form,
            dtype="float32",  # displacements need more digits than bfloat16 has
            name="last",
        )
        return last(parts) / 10.0
