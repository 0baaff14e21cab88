"""RDP: a recursive pyramid of displacement fields.

Two encoders look at one image each. From the coarsest level upwards, each level warps
the moving features by the field so far, predicts a velocity, integrates it, composes
it with the field, and may do so more than once with the same weights.

Fields are in voxels of their level's grid and zero outside it. Constants and quirks are
those of the released PromptReg, whose weights load unchanged; `RdpConfig.slope` is 0.1
in RDP as published.

References:
  Wang et al., Recursive deformable pyramid network for unsupervised medical image
  registration, IEEE TMI 2024; Xie et al., PromptReg, MICCAI 2025, section 2.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.models.base import (
    ActivationConfig,
    NetworkConfig,
    Prediction,
    RegistrationModel,
    fresh_variables,
)
from jaxreg.nn.conv import api
from jaxreg.nn.layers import (
    ConvBlock,
    Convolution,
    convolution,
    instance_norm_leaky,
    normal,
)
from jaxreg.nn.remat import part
from jaxreg.space import fields
from jaxreg.space.grid import Shape, unit_scale
from jaxreg.space.transform import Displacement, Transform
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables

LEVELS = 4
DIVISOR = 2 ** (LEVELS - 1)
_PASSES = {4: 2, 3: 2, 2: 3, 1: 1}
_RESIDUAL_SLOPE = 0.1
_SQUARINGS = 7
_HEAD_DEVIATION = 1e-5


@dataclasses.dataclass(frozen=True)
class RdpConfig(ActivationConfig, NetworkConfig):
    """Sizes of the pyramid; read from the tensors when weights are loaded.

    Attributes:
      channels: c, of the finest level; the coarser ones have 2c, 4c and 8c.
      image_channels: of each image.
      slope: of the leaky ReLU after normalised convolutions.
      form: convolution form, see `jaxreg.nn.conv.api`.
    """

    kind: ClassVar = "rdp"
    title: ClassVar = "RDP"
    multiple: ClassVar = DIVISOR
    least: ClassVar = 2 * DIVISOR
    forms: ClassVar = ("slope",)
    tensor_table: ClassVar = "jaxreg.weights.pytorch.promptreg:RDP"

    channels: int = 16
    image_channels: int = 1
    slope: float = 0.01
    form: api.Form = "auto"

    def build(self) -> "Rdp":
        """Returns the network."""
        return Rdp(self)


class ConvBlocks(nn.Module):
    """Two blocks, one after the other."""

    inputs: int
    outputs: int
    slope: float = 0.01
    form: api.Form = "auto"

    @nn.compact
    def __call__(self, x) -> Image:
        """Maps N D H W inputs, or parts of it, to N D H W outputs."""
        x = ConvBlock(self.inputs, self.outputs, self.slope, self.form, name="0")(x)
        return ConvBlock(self.outputs, self.outputs, self.slope, self.form, name="1")(x)


class Encoder(nn.Module):
    """One image to features at four resolutions, finest first."""

    config: RdpConfig

    @nn.compact
    def __call__(self, image: Image) -> tuple[Image, ...]:
        """Returns N D/2^l H/2^l W/2^l 2^l c for l = 0 .. 3."""
        image = image.astype(self.config.precision)
        c, form = self.config.channels, self.config.form
        first = ConvBlock(
            self.config.image_channels, c, self.config.slope, form, name="block_1"
        )
        features = [first(image)]
        for level in range(2, LEVELS + 1):
            down = convolution(api.conv3_stride2, c, 2 * c, f"down_{level}", form)
            c *= 2
            x = down(features[-1])
            y = convolution(api.conv3, c, c, f"residual_{level}", form)(
                instance_norm_leaky(x, _RESIDUAL_SLOPE)
            )
            features.append(instance_norm_leaky(x + y, _RESIDUAL_SLOPE))
        return tuple(features)


class RdpNetwork(nn.Module):
    """The pyramid, with whatever happens at its bottleneck.

    Attributes:
      config: see `RdpConfig`.
      bottleneck: called on the bottleneck's features N D/8 H/8 W/8 8c, returns
        (features of the same shape, auxiliary values); nothing happens if None.
    """

    config: RdpConfig = RdpConfig()
    bottleneck: nn.Module | None = None

    @nn.compact
    def __call__(self, moving: Image, fixed: Image, **options):
        """Returns the field, N D H W 3 in voxels, and the bottleneck's auxiliaries.

        Args:
          moving: N D H W C.
          fixed: N D H W C.
          **options: for the bottleneck.
        """
        c, form, slope = (self.config.channels, self.config.form, self.config.slope)
        as_part = functools.partial(part, remat=self.config.remat)
        encode = as_part(lambda encoder, image: encoder(image))
        moving_features = encode(Encoder(self.config, name="encoder_moving"), moving)
        fixed_features = encode(Encoder(self.config, name="encoder_fixed"), fixed)
        f, m = fixed_features[-1], moving_features[-1]
        x = ConvBlocks(16 * c, 8 * c, slope, form, name="join_4")((f, m))
        aux = {}
        if self.bottleneck is not None:
            x, aux = self.bottleneck(x, **options)

        head = _head(8 * c, 4, form)
        refine = ConvBlocks(24 * c, 8 * c, slope, form, name="refine_4")
        field = fields.integrate(head(x), _SQUARINGS)
        x = refine((f, fields.warp_voxels(m, field), x))
        step = fields.integrate(head(x), _SQUARINGS)
        inputs = 8 * c
        for level in (3, 2, 1):
            width = c * 2 ** (level - 1)
            up = ConvBlock(
                inputs,
                width,
                _RESIDUAL_SLOPE,
                form,
                api.conv4_transpose2,
                name=f"up_{level}",
            )
            inputs = 3 * width
            join = ConvBlocks(inputs, inputs, slope, form, name=f"join_{level}")
            head = _head(inputs, level, form)
            refine = ConvBlock(inputs, width, slope, form, name=f"refine_{level}")
            decoded = as_part(lambda up, x: up(x))(up, x)
            field = fields.upsample_displacement(fields.compose_voxels(field, step))
            f, m = fixed_features[level - 1], moving_features[level - 1]
            for index in range(_PASSES[level]):
                if index:
                    field = fields.compose_voxels(field, step)
                    decoded = refine(x)
                x, step = as_part(_pass)(join, head, f, m, decoded, field)
        return fields.compose_voxels(field, step), aux


def _head(inputs: int, level: int, form: api.Form) -> Convolution:
    """Returns a level's last layer: features to a velocity, which is float32."""
    return convolution(
        api.conv3,
        inputs,
        3,
        f"head_{level}",
        form,
        kernel_init=normal(_HEAD_DEVIATION),
        dtype="float32",
    )


def _pass(join, head, fixed, moving, decoded, field) -> tuple[Image, jax.Array]:
    """Returns a level's features, and the displacement that it adds to the field."""
    x = join((fixed, fields.warp_voxels(moving, field), decoded))
    return x, fields.integrate(head(x), _SQUARINGS)


def as_transform(field: jax.Array) -> Transform:
    """Returns a field in voxels of its own grid as a transform in unit coordinates."""
    scale = jnp.asarray(unit_scale(field.shape[1:4]), field.dtype)
    return Transform(
        (Displacement(field.astype(jnp.float32) / scale[None, None, None, None]),)
    )


@dataclasses.dataclass(frozen=True)
class Rdp(RegistrationModel):
    """The pyramid alone as a `jaxreg.models.base.RegistrationModel`."""

    config: RdpConfig = RdpConfig()

    def init(self, key: Key, shape: Shape = (32, 32, 32)) -> Variables:
        """Returns fresh variables; they do not depend on the grid's shape.

        A fresh network's field is about 0.01 voxel.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
        """
        config = self.config
        config.check_grid(shape)
        return fresh_variables(RdpNetwork(config), key, shape, config.image_channels)

    def apply(
        self,
        variables: Variables,
        moving: Image,
        fixed: Image,
        *,
        task: Int[Array, " N"] | None = None,
        smoothness: Float[Array, " N"] | None = None,
        train: bool = False,
        batching: Batching = ONE_CALL,
    ) -> tuple[Prediction, Variables]:
        """Returns the prediction for moving onto fixed, and the same variables.

        Args:
          variables: as from `init`.
          moving: N D H W C, [0, 1].
          fixed: N D H W C, [0, 1].
          task: makes no difference.
          smoothness: makes no difference.
          train: makes no difference.
          batching: makes no difference: nothing is shared by a batch.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
        """
        self.config.check_grid(moving.shape[1:4])
        field, _ = RdpNetwork(self.config).apply(variables, moving, fixed)
        return Prediction(as_transform(field)), variables
