"""uniGradICON and multiGradICON: one network, two sets of weights.

The released network has four U-Nets: at a quarter, half and full resolution, and once
more at full resolution: ``Phi(x) = u1(u2(u3(u4(x))))``.

References:
  Tian et al., uniGradICON: A foundation model for medical image registration, MICCAI
  2024; Demir et al., multiGradICON, WBIR 2024.
"""

import dataclasses
from typing import ClassVar, cast

from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.models import multires
from jaxreg.models.base import (
    ActivationConfig,
    NetworkConfig,
    Prediction,
    RegistrationModel,
    fresh_variables,
)
from jaxreg.models.former_names import former_names
from jaxreg.nn.conv import api
from jaxreg.nn.remat import part
from jaxreg.nn.unet import TallUNet2, UNetConfig
from jaxreg.space.grid import Shape
from jaxreg.space.transform import Transform
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables


@former_names(halvings="downsampled_steps", refinements="fullres_steps")
@dataclasses.dataclass(frozen=True)
class GradIconConfig(ActivationConfig, NetworkConfig):
    """Structure and sizes; read from the tensors when weights are loaded.

    Attributes:
      channels_down: of each U-Net, see `UNetConfig`.
      channels_up: of each U-Net, finest first.
      downsampled_steps: U-Nets at reduced resolutions, each twice as fine as the one
        before; 2 starts at a quarter.
      fullres_steps: further U-Nets at full resolution; 0 in training stage 1.
      form: convolution form, see `jaxreg.nn.conv.api`.
    """

    kind: ClassVar = "gradicon"
    title: ClassVar = "GradICON"
    tensor_table: ClassVar = "jaxreg.weights.pytorch.gradicon:TABLE"

    channels_down: tuple[int, ...] = (2, 16, 32, 64, 256, 512)
    channels_up: tuple[int, ...] = (16, 32, 64, 128, 256)
    downsampled_steps: int = 2
    fullres_steps: int = 1
    form: api.Form = "auto"

    def build(self) -> "GradIcon":
        """Returns the network."""
        return GradIcon(self)

    @property
    def unet(self) -> UNetConfig:
        """The sizes of each U-Net."""
        return UNetConfig(
            self.channels_down, self.channels_up, self.form, self.precision
        )


class GradIconNetwork(nn.Module):
    """The composed U-Nets; submodules step_1, step_2, ... in order of execution."""

    config: GradIconConfig = GradIconConfig()

    @nn.compact
    def __call__(
        self,
        moving: Image,
        fixed: Image,
        *,
        train: bool = False,
        batching: Batching = ONE_CALL,
    ) -> Transform:
        """Maps a pair, each N D H W C, to the transform of fixed to moving points."""
        config = self.config

        def step(index):
            unet = TallUNet2(config.unet, name=f"step_{index}")

            def run(unet, a, b):
                return unet(a, b, train=train, batching=batching)

            run = part(run, config.remat)
            return multires.field_step(lambda a, b: run(unet, a, b))

        network = step(1)
        for index in range(config.downsampled_steps):
            network = multires.two_step(multires.downsample(network), step(2 + index))
        for index in range(config.fullres_steps):
            index += config.downsampled_steps
            network = multires.two_step(network, step(2 + index))
        return network(moving, fixed)


@dataclasses.dataclass(frozen=True)
class GradIcon(RegistrationModel):
    """The GradICON family as a `jaxreg.models.base.RegistrationModel`."""

    config: GradIconConfig = GradIconConfig()

    def init(self, key: Key, shape: Shape = (32, 32, 32)) -> Variables:
        """Returns fresh variables; they do not depend on the grid's shape.

        The last layer of each U-Net is zero: a fresh network is the identity.
        """
        channels = self.config.channels_down[0] // 2
        return fresh_variables(GradIconNetwork(self.config), key, shape, channels)

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
        """Returns the prediction for moving onto fixed, and the variables after it.

        Args:
          variables: {"params", "batch_stats"}.
          moving: N D H W C, [0, 1].
          fixed: N D H W C, [0, 1].
          task: makes no difference.
          smoothness: makes no difference.
          train: use batch statistics, and move the running ones once per call.
          batching: see `jaxreg.models.base.RegistrationModel.apply`.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
          ValueError: the wrong number of channels.
        """
        self.config.check_grid(moving.shape[1:4])
        network = GradIconNetwork(self.config)
        if not train:
            transform = cast(Transform, network.apply(variables, moving, fixed))
            return Prediction(transform), variables
        transform, updates = network.apply(
            variables,
            moving,
            fixed,
            train=True,
            batching=batching,
            mutable=["batch_stats"],
        )
        return Prediction(transform), {**variables, **updates}
