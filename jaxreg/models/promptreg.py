"""PromptReg: RDP with a prompt bank at its bottleneck.

References:
  Xie et al., PromptReg: Universal medical image registration via task prompt learning
  and domain knowledge transfer, MICCAI 2025; its released code decides the defaults.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.models import rdp
from jaxreg.models.base import Prediction
from jaxreg.nn.conv import api
from jaxreg.nn.prompts import (
    Bank,
    Orthogonality,
    PromptConfig,
    PromptGenerator,
    Readout,
)
from jaxreg.space import sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables


@dataclasses.dataclass(frozen=True)
class PromptRegConfig:
    """Sizes and forms; the defaults are those of the released code.

    Attributes:
      channels: see `rdp.RdpConfig`, as the next three.
      image_channels: of each image.
      slope: of the leaky ReLU after normalised convolutions.
      form: convolution form, see `jaxreg.nn.conv.api`.
      tasks: static prompts, see `prompts.PromptConfig`, as all that follow. Training
        puts the number of its tasks here.
      temperature: of the softmax over the bank.
      readout: what of the prompt reaches the decoder.
      static_block: whether the weighted sum of prompts passes a block of its own.
      task_loss_on: what the task similarity compares.
      orthogonality: of normalised or raw prompts.
    """

    channels: int = 16
    image_channels: int = 1
    slope: float = 0.01
    form: api.Form = "auto"
    tasks: int = 5
    temperature: float = 0.5
    readout: Readout = "pooled_attention"
    static_block: bool = True
    task_loss_on: Literal["processed", "weighted"] = "processed"
    orthogonality: Orthogonality = "cosine"

    def __post_init__(self):
        """Checks the prompts' choices; see `prompts.PromptConfig`."""
        _ = self.prompts

    @property
    def pyramid(self) -> rdp.RdpConfig:
        """The pyramid's part."""
        return rdp.RdpConfig(self.channels, self.image_channels, self.slope, self.form)

    @property
    def prompts(self) -> PromptConfig:
        """The prompt generator's part."""
        return PromptConfig(
            self.tasks,
            self.temperature,
            self.readout,
            self.static_block,
            self.task_loss_on,
            self.orthogonality,
        )


AS_PAPER = PromptRegConfig(
    temperature=0.1,
    readout="spatial",
    static_block=False,
    task_loss_on="weighted",
    orthogonality="raw",
)
"""The paper's forms, where the released code differs; for training new networks."""


class PromptBottleneck(nn.Module):
    """Features with the prompt made for them: N D H W C to N D H W C."""

    config: PromptRegConfig
    grid: tuple[int, int, int]

    @nn.compact
    def __call__(self, features: Image, task: Int[Array, " N"] | None = None):
        """Returns (features, auxiliaries of `PromptGenerator`)."""
        pyramid, c = self.config.pyramid, features.shape[-1]
        generator = PromptGenerator(
            self.config.prompts, self.grid, pyramid.form, name="generator"
        )
        prompt, aux = generator(features, task)
        fuse = rdp.ConvBlocks(2 * c, c, pyramid.slope, pyramid.form, name="fuse")
        return fuse((features, prompt)), aux


@dataclasses.dataclass(frozen=True)
class PromptReg:
    """PromptReg as a `jaxreg.models.base.RegistrationModel`."""

    config: PromptRegConfig = PromptRegConfig()

    def _network(self, grid: tuple[int, int, int]) -> rdp.RdpNetwork:
        return rdp.RdpNetwork(self.config.pyramid, PromptBottleneck(self.config, grid))

    def init(self, key: Key, shape: Shape = (32, 32, 32)) -> Variables:
        """Returns fresh variables.

        The bank lies on an eighth of the network grid `shape`. A fresh network's field
        is about 0.01 voxel.

        Raises:
          UserError: see `rdp.check_shape`.
        """
        rdp.check_shape(shape)
        d, h, w = (n // rdp.DIVISOR for n in shape)
        image = jax.ShapeDtypeStruct(
            (1, *shape, self.config.image_channels), jnp.float32
        )
        return self._network((d, h, w)).lazy_init(key, image, image)

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

        The bank is resized where the images lie on another grid than it was made for.

        Args:
          variables: as from `init`.
          moving: N D H W C, [0, 1].
          fixed: N D H W C, [0, 1].
          task: each pair's row in the bank; for the task similarity alone.
          smoothness: makes no difference.
          train: makes no difference.
          batching: makes no difference: nothing is shared by a batch.

        Returns:
          The prediction's aux is that of `PromptGenerator`.

        Raises:
          UserError: see `rdp.check_shape`.
        """
        rdp.check_shape(moving.shape[1:4])
        d, h, w = (n // rdp.DIVISOR for n in moving.shape[1:4])
        params = {"params": resize_bank(variables, (d, h, w))["params"]}
        # Some of the prompts may have been chosen.
        config = dataclasses.replace(self.config, tasks=len(bank_of(variables)))
        network = PromptReg(config)._network((d, h, w))
        field, aux = network.apply(params, moving, fixed, task=task)
        return Prediction(rdp.as_transform(field), aux), variables


def bank_of(variables: Variables) -> Bank:
    """Returns the static prompts, Z D H W C."""
    return variables["params"]["bottleneck"]["generator"]["bank"]


def _with_prompts(variables: Variables, **changed: Any) -> Variables:
    params = variables["params"]
    generator = {**params["bottleneck"]["generator"], **changed}
    bottleneck = {**params["bottleneck"], "generator": generator}
    return {**variables, "params": {**params, "bottleneck": bottleneck}}


def resize_bank(variables: Variables, grid: tuple[int, int, int]) -> Variables:
    """Returns the variables with static prompts and template on another grid.

    Trilinear, half-pixel. Released weights are tied to their grid; this is how they
    serve another one.

    Args:
      variables: of `PromptReg`.
      grid: D H W, an eighth of the network grid.
    """
    if bank_of(variables).shape[1:4] == grid:
        return variables
    generator = variables["params"]["bottleneck"]["generator"]
    resized = {
        name: sampling.resize_half_pixel(jnp.asarray(generator[name]), grid)
        for name in ("bank", "template")
    }
    return _with_prompts(variables, **resized)


def choose_rows(variables: Variables, rows: Sequence[int]) -> Variables:
    """Returns the variables with some static prompts alone, in the order of `rows`.

    A bank that was extended answers as before when the rows from before are chosen.
    """
    return _with_prompts(variables, bank=bank_of(variables)[np.asarray(rows)])


def take_rows(
    variables: Variables, old: Variables, rows: Mapping[int, int]
) -> Variables:
    """Returns old variables with a bank of another size.

    Args:
      variables: fresh ones, whose static prompts stay where no old one takes its place.
      old: of any number of static prompts on the same grid.
      rows: new row to old row.
    """
    bank = np.array(bank_of(variables))
    for new, before in rows.items():
        bank[new] = bank_of(old)[before]
    return _with_prompts(old, bank=bank)
