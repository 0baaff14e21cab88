"""A network from outside the package: all that a new architecture brings.

See `test_toy_network.py`, which trains it, registers with it, converts and scores it.
"""

import dataclasses
from typing import ClassVar

from flax import linen as nn

from jaxreg.models import registry
from jaxreg.models.base import (
    NetworkConfig,
    Prediction,
    RegistrationModel,
    fresh_variables,
)
from jaxreg.models.rdp import as_transform
from jaxreg.nn.conv import api
from jaxreg.nn.layers import convolution, leaky, normal
from jaxreg.typing import ONE_CALL
from jaxreg.weights.pytorch.state import FROM_OI, Entry
from jaxreg.weights.pytorch.table import TensorTable


@dataclasses.dataclass(frozen=True)
class ToyConfig(NetworkConfig):
    """Sizes of the network.

    Attributes:
      channels: between the two layers.
    """

    kind: ClassVar = "toy"
    title: ClassVar = "Toy"
    multiple: ClassVar = 2
    tensor_table: ClassVar = "toy_network:TABLE"

    channels: int = 4

    def build(self) -> "Toy":
        """Returns the network."""
        return Toy(self)


class ToyNetwork(nn.Module):
    """Two convolutions."""

    config: ToyConfig

    @nn.compact
    def __call__(self, moving, fixed):
        """Maps N D H W 1, twice, to N D H W 3 in voxels."""
        c = self.config.channels
        x = leaky(convolution(api.conv3, 2, c, "inner", "auto")((moving, fixed)))
        return convolution(api.conv3, c, 3, "outer", "auto", kernel_init=normal(0.1))(x)


@dataclasses.dataclass(frozen=True)
class Toy(RegistrationModel):
    """The network as a `RegistrationModel`."""

    config: ToyConfig = ToyConfig()

    def init(self, key, shape=(8, 8, 8)):
        """Returns fresh variables."""
        self.config.check_grid(shape)
        return fresh_variables(ToyNetwork(self.config), key, shape, 1)

    def apply(
        self, variables, moving, fixed, *, task=None, smoothness=None, train=False,
        batching=ONE_CALL,
    ):  # fmt: skip
        """Returns the prediction, and the same variables."""
        self.config.check_grid(moving.shape[1:4])
        field = ToyNetwork(self.config).apply(variables, moving, fixed)
        return Prediction(as_transform(field)), variables


class _Table(TensorTable[int]):
    """Its file: ``{"inner.weight", "inner.bias", "outer.weight", "outer.bias"}``."""

    network = "Toy"

    def owns(self, state):
        return "inner.weight" in state

    def sizes_of(self, state, *, source):
        return len(state["inner.weight"])

    def variable_sizes(self, variables, config, *, source):
        return len(variables["params"]["inner"]["bias"])

    def config_fields(self, sizes):
        return {"channels": sizes}

    def entries(self, sizes):
        for layer, inputs, outputs in (("inner", 2, sizes), ("outer", sizes, 3)):
            shape, path = (outputs, inputs, 3, 3, 3), ("params", layer)
            yield Entry(f"{layer}.weight", (*path, "kernel"), shape, FROM_OI)
            yield Entry(f"{layer}.bias", (*path, "bias"), (outputs,))

    def preprocessing(self, variables):
        return {"shape": [8, 10, 12], "ct_window": [-500.0, 500.0]}


TABLE = _Table()
registry.register_kind(ToyConfig)
