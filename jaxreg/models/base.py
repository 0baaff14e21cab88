"""Interfaces of a network: its configuration, and the registration model itself.

A network is one module: a frozen configuration (`NetworkConfig`), which answers what
other rooms ask of the architecture, and a `RegistrationModel`, which predicts.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.errors import UserError
from jaxreg.nn.heads import Pairing, RegionPairings, SmoothnessRange
from jaxreg.nn.layers import Precision, init_lazily
from jaxreg.nn.remat import Remat
from jaxreg.space.grid import Shape
from jaxreg.space.transform import Transform
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables

Window = tuple[float, float]
"""Hounsfield units that are 0 and 1."""
Conditioning = Literal["prompts", "regions"]
T = TypeVar("T")


# --- configurations -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The configuration of any network whose weights are kept.

    Attributes:
      kind: name of the architecture, as weights carry it.
      tensor_table: the `jaxreg.weights.pytorch.table.TensorTable` of its PyTorch files,
        as "module:NAME", which is imported when it is needed; "" if there are no files.
      frozen: collections of its variables that hold another network's, each called as
        that network's kind; training neither changes nor stores them.
    """

    kind: ClassVar[str]
    tensor_table: ClassVar[str] = ""
    frozen: ClassVar[tuple[str, ...]] = ()

    @property
    def conditioning(self) -> Conditioning | None:
        """What it is conditioned on, and its weights name: prompts of a bank, regions.

        Regions are told for each pair, with the pairing (between or within subjects); a
        bank of prompts finds the ones that fit, and needs to be told of none.
        """
        return None

    @property
    def names_entry(self) -> str | None:
        """Under which entry of their preprocessing weights name prompts or regions.

        Prompts are called as the tasks that they were trained for.
        """
        entries = {"prompts": "tasks", "regions": "regions"}
        return self.conditioning and entries[self.conditioning]


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Architecture):
    """The configuration of a network that registers; what it does not say holds.

    Attributes:
      title: what the network is called in sentences.
      multiple: every axis of a network grid must be a multiple of it.
      least: the fewest voxels along an axis.
      forms: fields that give the same weights another meaning.
    """

    title: ClassVar[str] = "the network"
    multiple: ClassVar[int] = 1
    least: ClassVar[int] = 2
    forms: ClassVar[tuple[str, ...]] = ()

    def build(self) -> "RegistrationModel":
        """Returns the network."""
        raise NotImplementedError

    @property
    def least_grid(self) -> Shape:
        """The smallest network grid, D H W."""
        voxels = -(-self.least // self.multiple) * self.multiple
        return voxels, voxels, voxels

    def check_grid(self, shape: Shape) -> None:
        """Checks a network grid, D H W.

        Raises:
          UserError: an axis is too short or not the multiple that the network needs.
        """
        if any(n < self.least or n % self.multiple for n in shape):
            needs = []
            if self.multiple > 1:
                needs.append(f"a multiple of {self.multiple}")
            if self.least > self.multiple:
                needs.append(f"at least {self.least}")
            raise UserError(
                f"the network grid is {' x '.join(map(str, shape))}, {self.title} "
                f"needs {' and '.join(needs)} voxels along each axis; round the shape "
                "to that"
            )

    # What the network is told beside the images.

    @property
    def smoothness_condition(self) -> SmoothnessRange | None:
        """The weights of the smoothness term that it is conditional on."""
        return None

    def names_in(self, variables: Variables) -> int:
        """Returns how many prompts or regions weights have; 0 without conditioning."""
        return 0

    def with_names(self, names: Sequence[str], tasks: RegionPairings) -> Self:
        """Returns the configuration for as many prompts or regions as there are names.

        Args:
          names: of the bank's rows or of the regions.
          tasks: region and pairing of each task, for networks that are told regions.
        """
        return self

    def with_region_pairings(
        self, tasks: RegionPairings, window: Window | None
    ) -> Self:
        """Returns the configuration for another table of regions and pairings.

        Args:
          tasks: region and pairing of each.
          window: Hounsfield units that the network is shown; None for its own.
        """
        raise NotImplementedError(f"{self.title} is told no regions")

    def with_prompts(self, variables: Variables, rows: Sequence[int]) -> Variables:
        """Returns weights with some prompts of their bank alone, in this order."""
        raise NotImplementedError(f"{self.title} has no bank of prompts")

    def prompt_mask(self, params: Any, *, rows: Sequence[int]) -> Any:
        """Returns 1 for some prompts of a bank and 0 for all other parameters."""
        raise NotImplementedError(f"{self.title} has no bank of prompts")

    def fitted(
        self,
        variables: Variables,
        shape: Shape,
        fresh: Variables,
        rows: Mapping[int, int],
        known: int,
    ) -> Variables:
        """Returns weights from elsewhere as the network takes them.

        Weights of another kind or of other widths stay as they are.

        Args:
          variables: its own, or of another kind.
          shape: the network grid, D H W.
          fresh: variables of the network, for prompts or regions that are new.
          rows: of the network's prompts or regions to those of `variables`; the rest is
            new.
          known: how many prompts or regions `variables` have.
        """
        return variables

    # Intensities.

    @property
    def hounsfield_window(self) -> Window | None:
        """The Hounsfield units that a CT scan's 0 and 1 must be.

        None where any scaling will do that is the same in training and in use.
        """
        return None

    @property
    def network_window(self) -> Window | None:
        """The Hounsfield units that it sees where a task has none.

        None for networks that take their images for no units, and see all of them.
        """
        return None

    def task_window(self, task: tuple[int, Pairing]) -> Window | None:
        """Returns the Hounsfield units that it is shown of a region and pairing."""
        return self.network_window

    def with_network_windows(self, windows: Sequence[Window | None]) -> Self:
        """Returns the configuration with the window of each task; None: its own."""
        return self

    # Other networks, and repetition.

    @property
    def needs_sam(self) -> bool:
        """Whether it needs a SAM network among its variables."""
        return False

    def with_sam_window(self, window: Window) -> Self:
        """Returns the configuration for a SAM network that knows a window."""
        return self

    @property
    def level_iterations(self) -> int | None:
        """How often its levels are repeated at most; None if it has no such levels."""
        return None

    def with_level_iterations(self, count: int) -> Self:
        """Returns the configuration for levels repeated so often at most."""
        raise NotImplementedError(f"{self.title} has no levels to repeat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """How a network computes its activations; neither changes what its weights mean.

    Attributes:
      precision: of activations and products; parameters, statistics and displacements
        are float32 whatever it is.
      remat: what the backward pass computes again instead of keeping it: "layers", the
        padding and activation of each layer; or "networks", also the inside of the
        networks that it is made of, for a third more arithmetic.
    """

    precision: Precision = "float32"
    remat: Remat = "layers"


# --- predictions ----------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["transform", "aux"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says about one ordered pair.

    Attributes:
      transform: unit coordinates of the fixed network grid to those of the moving one.
      aux: auxiliary losses and diagnostics by name: a scalar, or one entry per pair.
    """

    transform: Transform
    aux: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class RegistrationModel:
    """A network by its configuration; variables are passed in and out.

    Attributes:
      config: what the architecture is, and its sizes.
    """

    config: NetworkConfig = NetworkConfig()

    def init(self, key: Key, shape: Shape) -> Variables:
        """Returns fresh variables for a network grid of `shape`."""
        raise NotImplementedError

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

        In training mode the running statistics in the returned variables have moved;
        otherwise the variables come back as they were.

        Args:
          variables: as from `init`.
          moving: N D H W C.
          fixed: N D H W C.
          task: number of each pair's task, for networks that are conditioned on it.
          smoothness: weight of the smoothness term that each pair is scored with, for
            networks that are conditional on it.
          train: training mode.
          batching: what the batch is made of: how many calls end to end (what a call
            shares is kept apart, so the result equals separate calls in order), and
            over what batch statistics are taken.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
        """
        raise NotImplementedError

    def cache_features(
        self, variables: Variables, moving: Image, fixed: Image
    ) -> Variables:
        """Returns variables with what depends on the images alone, if anything does.

        For many calls on one pair whose other variables change.
        """
        return variables


def fresh_variables(
    network: nn.Module, key: Key, shape: Shape, channels: int, *others: Any
) -> Variables:
    """Returns fresh variables of a Flax module that is called with two images.

    Args:
      network: the module.
      key: of the weights.
      shape: of the images, D H W.
      channels: of each image.
      *others: shapes of what it is called with after the images.
    """
    image = jax.ShapeDtypeStruct((1, *shape, channels), jnp.float32)
    return init_lazily(network, key, image, image, *others)
