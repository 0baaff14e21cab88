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
import numpy as np
from flax import linen as nn

from jaxreg.nn import conv
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
      form: convolution form, see `jaxreg.nn.conv`.
      precision: of activations and products; parameters, batch statistics and the
        displacement stay float32.
    """

    channels_down: tuple[int, ...] = (2, 16, 32, 64, 256, 512)
    channels_up: tuple[int, ...] = (16, 32, 64, 128, 256)
    form: conv.Form = "auto"
    precision: Precision = "float32"


def _leaky(x):
    return jnp.where(x > 0, x, 0.01 * x)


def _fit(x: Image, channels: int) -> Image:
    """Keeps the first channels, or puts the missing ones, all zero, in front."""
    missing = channels - x.shape[-1]
    if missing > 0:
        return jnp.pad(x, ((0, 0),) * 4 + ((missing, 0),))
    return x[..., :channels]


def _uniform(fan_in: int):
    """PyTorch's default for convolution weights and biases: +-1/sqrt(fan_in).

    Drawn on the host (Philox, seeded by the key): compiling a generator for each of
    the network's shapes would take most of a minute.
    """
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        def draw(seed):
            generator = np.random.Generator(np.random.Philox(np.asarray(seed).tolist()))
            return generator.uniform(-bound, bound, shape).astype(dtype)

        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(draw, result, jax.random.key_data(key))

    return init


class Convolution(nn.Module):
    """Kernel and bias of one layer of `jaxreg.nn.conv`, created and applied.

    Attributes:
      function: the layer, ``(x, kernel, bias, form=)``.
      shape: of the kernel, kD kH kW I O.
      activated: whether the input passes a leaky ReLU first.
      zero: whether both start at zero, otherwise as PyTorch starts them.
      form: see `jaxreg.nn.conv`.
    """

    function: object
    shape: tuple[int, ...]
    activated: bool = True
    zero: bool = False
    form: conv.Form = "auto"

    @nn.compact
    def __call__(self, x):
        """Applies the layer to N D H W I, or to parts of it along channels."""
        kd, kh, kw, i, o = self.shape
        # PyTorch takes a transposed convolution's fan from the output channels.
        fan = kd * kh * kw * (o if self.function is conv.conv4_transpose2 else i)
        init = nn.initializers.zeros if self.zero else _uniform(fan)
        kernel = self.param("kernel", init, self.shape)
        bias = self.param("bias", init, (o,))

        # The backward pass pads and activates once more instead of keeping both.
        @jax.checkpoint
        def apply(x, kernel, bias):
            dtype = jax.tree.leaves(x)[0].dtype
            kernel, bias = kernel.astype(dtype), bias.astype(dtype)
            x = jax.tree.map(_leaky, x) if self.activated else x
            return self.function(x, kernel, bias, form=self.form)  # pyright: ignore

        return apply(x, kernel, bias)


@functools.partial(jax.checkpoint, static_argnums=1)  # keeps the array, no deviations
def _moments(grouped: jax.Array, batching: Batching) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of G N D H W C per group and channel."""
    axes = (1, 2, 3, 4)
    grouped = grouped.astype(jnp.float32)
    mean = grouped.mean(axes, keepdims=True)
    if not batching.replicas:
        mean = batching.mean_over_devices(mean)
    variance = jnp.square(grouped - mean).mean(axes, keepdims=True)
    if not batching.replicas:
        variance = batching.mean_over_devices(variance)
    return mean, variance


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch's: the running variance is the unbiased one.

    Attributes:
      batching: what the statistics are taken over.
    """

    batching: Batching = ONE_CALL

    @nn.compact
    def __call__(self, x: Image, *, train: bool) -> Image:
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
            return x * factor.astype(x.dtype) + shift.astype(x.dtype)
        groups = batching.calls * max(batching.replicas, 1)
        grouped = x.reshape(groups, -1, *x.shape[1:])
        now_mean, now_var = _moments(grouped, batching)
        if not self.is_initializing():
            voxels = math.prod(grouped.shape[1:5])
            if batching.axis is not None and not batching.replicas:
                voxels = voxels * jax.lax.axis_size(batching.axis)
            unbiased = now_var * (voxels / max(voxels - 1, 1))
            calls = [
                batching.mean_over_devices(a.reshape(batching.calls, -1, c).mean(1))
                for a in (now_mean, unbiased)
            ]
            keep = _NORM_MOMENTUM
            for call_mean, call_var in zip(*calls, strict=True):
                mean.value = keep * mean.value + (1 - keep) * call_mean
                var.value = keep * var.value + (1 - keep) * call_var
            count.value = count.value + batching.calls
        factor = scale * jax.lax.rsqrt(now_var + _NORM_EPSILON)
        shift = bias - now_mean * factor
        out = grouped * factor.astype(x.dtype) + shift.astype(x.dtype)
        return out.reshape(x.shape)


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
            layer = Convolution(conv.conv3_stride2, shape, form=form, name=name)
            y = layer(x)
            x = y + _fit(conv.average_pool2(x), down[level + 1])
        parts = (x,)
        for level in reversed(range(levels)):
            channels = sum(part.shape[-1] for part in parts)
            name, shape = f"up_{level}", (4, 4, 4, channels, up[level])
            layer = Convolution(conv.conv4_transpose2, shape, form=form, name=name)
            y = layer(parts)
            # The residual keeps the first channels: the decoder's, as up shrinks.
            whole = parts[0]
            if whole.shape[-1] < min(up[level], channels):
                whole = jnp.concatenate(parts, axis=-1)
            x = y + conv.upsample2(_fit(whole, up[level]))
            x = BatchNorm(batching, name=f"norm_{level}")(x, train=train)
            skip = skips[level]
            d, h, w = skip.shape[1:4]
            parts = (x[:, :d, :h, :w], skip)
        channels = sum(part.shape[-1] for part in parts)
        last = Convolution(
            conv.conv3,
            (3, 3, 3, channels, 3),
            activated=False,
            zero=True,
            form=form,
            name="last",
        )
        return last(parts).astype(jnp.float32) / 10.0
