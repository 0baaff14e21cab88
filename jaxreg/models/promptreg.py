"""PromptReg: RDP with a prompt bank at its bottleneck.

References:
  Xie et al., PromptReg: Universal medical image registration via task prompt learning
  and domain knowledge transfer, MICCAI 2025; its released code decides the defaults.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.models import rdp
from jaxreg.models.base import (
    Conditioning,
    Prediction,
    RegistrationModel,
    fresh_variables,
)
from jaxreg.nn.heads import RegionPairings
from jaxreg.nn.prompts import Bank, PromptConfig, PromptGenerator
from jaxreg.space import sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables


@dataclasses.dataclass(frozen=True)
class PromptRegConfig(PromptConfig, rdp.RdpConfig):
    """Sizes and forms; the defaults are those of the released code.

    The fields are those of the pyramid and of the prompt generator. Training puts the
    number of its prompts into `tasks`.
    """

    kind: ClassVar = "promptreg"
    title: ClassVar = "PromptReg"
    forms: ClassVar = ("slope", "temperature", "readout", "static_block")
    tensor_table: ClassVar = "jaxreg.weights.pytorch.promptreg:PROMPTREG"

    def build(self) -> "PromptReg":
        """Returns the network."""
        return PromptReg(self)

    @property
    def conditioning(self) -> Conditioning:
        """A bank of prompts."""
        return "prompts"

    def names_in(self, variables: Variables) -> int:
        """Returns how many static prompts weights hold; 0 for those without a bank."""
        bottleneck = variables["params"].get("bottleneck", {})
        return len(bank_of(variables)) if "generator" in bottleneck else 0

    def with_names(self, names: Sequence[str], tasks: RegionPairings) -> Self:
        """Returns the configuration for a prompt of each name."""
        return dataclasses.replace(self, tasks=len(names))

    def with_prompts(self, variables: Variables, rows: Sequence[int]) -> Variables:
        """Returns the variables with some static prompts alone, in the order of `rows`.

        A bank that was extended answers as before when the rows from before are chosen.
        """
        return _with_generator(variables, bank=bank_of(variables)[np.asarray(rows)])

    def prompt_mask(self, params: Any, *, rows: Sequence[int]) -> Any:
        """Returns 1 for some static prompts and 0 for all other parameters."""

        def mask(path, leaf):
            names = [getattr(part, "key", None) for part in path]
            if names != ["bottleneck", "generator", "bank"]:
                return jnp.zeros((1,) * leaf.ndim, leaf.dtype)
            chosen = jnp.isin(jnp.arange(len(leaf)), jnp.asarray(rows))
            return chosen.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))

        return jax.tree_util.tree_map_with_path(mask, params)

    def fitted(
        self,
        variables: Variables,
        shape: Shape,
        fresh: Variables,
        rows: Mapping[int, int],
        known: int,
    ) -> Variables:
        """Returns weights with their bank on the network grid, and its rows moved.

        See `NetworkConfig.fitted`.
        """
        if not self.names_in(variables):
            return variables
        if bank_of(variables).shape[-1] != bank_of(fresh).shape[-1]:
            return variables
        d, h, w = (n // rdp.DIVISOR for n in shape)
        return take_rows(fresh, resize_bank(variables, (d, h, w)), rows)


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
        config, c = self.config, features.shape[-1]
        generator = PromptGenerator(config, self.grid, config.form, name="generator")
        prompt, aux = generator(features, task)
        fuse = rdp.ConvBlocks(2 * c, c, config.slope, config.form, name="fuse")
        return fuse((features, prompt)), aux


@dataclasses.dataclass(frozen=True)
class PromptReg(RegistrationModel):
    """PromptReg as a `jaxreg.models.base.RegistrationModel`."""

    config: PromptRegConfig = PromptRegConfig()

    def _network(self, grid: tuple[int, int, int]) -> rdp.RdpNetwork:
        return rdp.RdpNetwork(self.config, PromptBottleneck(self.config, grid))

    def init(self, key: Key, shape: Shape = (32, 32, 32)) -> Variables:
        """Returns fresh variables.

        The bank lies on an eighth of the network grid `shape`. A fresh network's field
        is about 0.01 voxel.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
        """
        self.config.check_grid(shape)
        d, h, w = (n // rdp.DIVISOR for n in shape)
        channels = self.config.image_channels
        return fresh_variables(self._network((d, h, w)), key, shape, channels)

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
          UserError: see `NetworkConfig.check_grid`.
        """
        self.config.check_grid(moving.shape[1:4])
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


def _with_generator(variables: Variables, **changed: Any) -> Variables:
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
    return _with_generator(variables, **resized)


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
    return _with_generator(old, bank=bank)
