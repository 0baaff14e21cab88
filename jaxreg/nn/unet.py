"""tallUNet2: the U-Net of the GradICON family.

References:
  Tian et al., GradICON, CVPR 2023; Tian et al., uniGradICON, MICCAI 2024. The layers,
  constants and quirks follow icon_registration 1.1.9, whose weights load unchanged.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxreg.nn import packed
from jaxreg.nn.conv import api
from jaxreg.nn.layers import Convolution, Precision, Scaled
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
@functools.partial(jax.checkpoint, static_argnums=(1, 2))
def _moments(
    grouped: jax.Array, batching: Batching, packed_form: api.Form | None
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of G N D H W C per group and channel."""
    axes = (1, 2, 3, 4)
    grouped = grouped.astype(jnp.float32)
    if packed_form is None:
        mean = batching.mean_over_sharers(grouped.mean(axes, keepdims=True))
        variance = jnp.square(grouped - mean).mean(axes, keepdims=True)
    else:
        mean = batching.mean_over_sharers(packed.mean(grouped, packed_form))
        variance = packed.variance(grouped, mean, packed_form)
    return mean, batching.mean_over_sharers(variance)


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch's: the running variance is the unbiased one.

    Attributes:
      batching: what the statistics are taken over.
      packed_form: the form of `jaxreg.nn.packed` that x is in, None if it is plain.
    """

    batching: Batching = ONE_CALL
    packed_form: api.Form | None = None

    @nn.compact
    def __call__(self, x: Image, *, train: bool) -> Scaled:
        """Normalises N D H W C; in training moves the running statistics.

        Of a packed image, N D H W 8C, the factor and the shift are those of C channels.
        """
        batching = self.batching
        c = x.shape[-1] // (1 if self.packed_form is None else 8)
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
        now_mean, now_var = _moments(grouped, batching, self.packed_form)
        if not self.is_initializing():
            voxels = grouped[0].size // c * batching.sharers()
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
            x = y + packed.fit(api.average_pool2(x), down[level + 1])
        parts: tuple[Any, ...] = (x,)
        channels = down[levels]
        for level in reversed(range(levels)):
            finest = level == 0
            shape = (4, 4, 4, channels, up[level])
            double = packed.Doubling(shape, form, packed=finest, name=f"up_{level}")
            # The residual keeps the first channels: the decoder's, as up shrinks.
            x = double(parts)
            normalise = BatchNorm(
                batching, form if finest else None, name=f"norm_{level}"
            )
            normal, skip = normalise(x, train=train), skips[level]
            parts = (dataclasses.replace(normal, shape=skip.shape[1:4]), skip)
            channels = up[level] + skip.shape[-1]
        # In float32: displacements need more digits than bfloat16 has.
        return packed.LastLayer(channels, form, name="last")(*parts) / 10.0
