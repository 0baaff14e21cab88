"""Tensor table: how an architecture's weights stand in PyTorch's files.

A table knows the sizes that all shapes follow from, and names every tensor for them;
reading, writing and checking are the same for all.
"""

import abc
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from jaxreg.errors import UserError
from jaxreg.models import registry
from jaxreg.models.base import Architecture
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.state import Entry, State

Sizes = TypeVar("Sizes")
_NONE: Mapping[str, Any] = MappingProxyType({})


class TensorTable(abc.ABC, Generic[Sizes]):
    """How networks of one architecture stand in PyTorch's files, and in variables.

    Attributes:
      network: what the architecture is called in errors.
      wrapper: the entry of a file that holds the tensors, if they are not all of it.
      beside: further entries of such a file.
      ordered: whether the released code knows regions by their places.
    """

    network: ClassVar[str]
    wrapper: ClassVar[str | None] = None
    beside: ClassVar[Mapping[str, Any]] = _NONE
    ordered: ClassVar[bool] = False

    @abc.abstractmethod
    def owns(self, state: Mapping[str, Any]) -> bool:
        """Whether the names in a PyTorch file are those of this architecture."""

    @abc.abstractmethod
    def sizes_of(self, state: Mapping[str, np.ndarray], *, source: str) -> Sizes:
        """Reads the sizes off PyTorch's tensors, see `plain`.

        Raises:
          UserError: the tensors are not those of such a network.
        """

    @abc.abstractmethod
    def variable_sizes(
        self, variables: Variables, config: Mapping[str, Any], *, source: str
    ) -> Sizes:
        """Reads the sizes off variables, or off the fields of their configuration.

        Raises:
          UserError: they are not those of such a network.
        """

    @abc.abstractmethod
    def entries(self, sizes: Sizes) -> Iterable[Entry]:
        """Returns every tensor of a network, in the order of its PyTorch file."""

    @abc.abstractmethod
    def config_fields(self, sizes: Sizes) -> dict[str, Any]:
        """Returns the fields of the configuration that the sizes tell."""

    def preprocessing(self, variables: Variables) -> Mapping[str, Any]:
        """Returns what the input of weights looks like that do not say their own."""
        return {}

    # What some files have beside the tensors of the table.

    def plain(self, state: Mapping[str, np.ndarray], *, source: str) -> State:
        """Returns PyTorch's tensors by the network's own names, and no others."""
        return dict(state)

    def check_exportable(self, config: Mapping[str, Any], *, source: str) -> None:
        """Checks that the released code can compute what a network does.

        Raises:
          UserError: it cannot.
        """

    def completed(self, variables: Variables, entries: Sequence[Entry]) -> Variables:
        """Returns variables with what a file must hold and a network need not have."""
        return variables

    def held(
        self, entries: Sequence[Entry], variables: Variables, config: Mapping[str, Any]
    ) -> Sequence[Entry]:
        """Returns those entries that the variables of a configuration must hold."""
        return entries

    def buffers(self, sizes: Sizes) -> State:
        """Returns tensors of a file that are no weights and follow from the sizes."""
        return {}

    def in_order(
        self,
        config: Any,
        variables: Variables,
        names: Sequence[str],
        *,
        source: str,
    ) -> tuple[Variables, tuple[str, ...]]:
        """Returns weights and the names of their prompts or regions in a file's order.

        Args:
          config: of the network.
          variables: its weights.
          names: in the order of the weights.
          source: what the weights came from, for the error.

        Raises:
          UserError: there are other names than prompts, or the released code cannot
            hold them.
        """
        count = config.names_in(variables)
        if len(names) != count or len(set(names)) < count:
            raise UserError(
                f"{source} names the prompts {', '.join(names)}, but its weights hold "
                f"{count}; give a name of its own to each"
            )
        return variables, tuple(names)

    # The same for all.

    def read_config(
        self, state: Mapping[str, np.ndarray], *, source: str = "the state dict"
    ) -> dict[str, Any]:
        """Reads the fields of the configuration off PyTorch's tensors.

        What changes no tensor, as forms and precisions, is not among them.

        Args:
          state: PyTorch's names to arrays, as `read_state_dict` returns them.
          source: what the arrays came from, for the error.

        Raises:
          UserError: the tensors are not those of such a network.
        """
        state = self.plain(state, source=source)
        return self.config_fields(self.sizes_of(state, source=source))

    def to_variables(
        self, state: Mapping[str, np.ndarray], *, source: str = "the state dict"
    ) -> Variables:
        """Converts PyTorch's tensors to variables.

        Args:
          state: PyTorch's names to arrays, as `read_state_dict` returns them.
          source: what the arrays came from, for the error.

        Returns:
          Collections of host arrays, float32 and (counters) int32.

        Raises:
          UserError: tensors are unknown, missing, misshapen, of the wrong type or not
            finite; they are named.
        """
        state = self.plain(state, source=source)
        entries = tuple(self.entries(self.sizes_of(state, source=source)))
        return state_lib.tree_of(state, entries, source=source, network=self.network)

    def from_variables(
        self,
        variables: Variables,
        config: Mapping[str, Any] = _NONE,
        *,
        source: str = "the checkpoint",
    ) -> State:
        """Converts variables to PyTorch's tensors.

        Args:
          variables: collections of host or device arrays.
          config: fields of the network's configuration.
          source: what the variables came from, for the error.

        Returns:
          PyTorch's names, in the order in which PyTorch stores them, to float32 and
          (counters) int64 host arrays.

        Raises:
          UserError: the released code cannot compute what the network does, or leaves
            are unknown, missing, misshapen or of the wrong type.
        """
        self.check_exportable(config, source=source)
        sizes = self.variable_sizes(variables, config, source=source)
        entries = tuple(self.entries(sizes))
        state = state_lib.state_of(
            self.completed(variables, entries),
            entries,
            source=source,
            network=self.network,
        )
        return state | self.buffers(sizes)

    def check_variables(
        self,
        variables: Variables,
        config: Mapping[str, Any] = _NONE,
        *,
        source: str = "the checkpoint",
    ) -> None:
        """Checks that variables are exactly those of a network.

        Args:
          variables: collections of arrays.
          config: fields of the network's configuration.
          source: what the variables came from, for the error.

        Raises:
          UserError: leaves are unknown, missing, misshapen, of the wrong type or not
            finite; they are named as collection/module/leaf.
        """
        sizes = self.variable_sizes(variables, config, source=source)
        entries = self.held(tuple(self.entries(sizes)), variables, config)
        state_lib.check_tree(variables, entries, source=source, network=self.network)


def table_of(kind: type[Architecture], *, source: str) -> TensorTable:
    """Returns the table of an architecture's PyTorch files.

    Raises:
      UserError: there are no such files.
    """
    if not kind.tensor_table:
        raise UserError(
            f"{source}: there is no PyTorch file of the network {kind.kind}, whose "
            "weights were not released; keep it as a checkpoint folder"
        )
    module, _, name = kind.tensor_table.partition(":")
    return getattr(importlib.import_module(module), name)


def kind_of_file(state: Mapping[str, Any]) -> str:
    """Returns whose network the names of a PyTorch file are; GradICON's if no one's."""
    for kind in registry.kinds().values():
        if kind.tensor_table and table_of(kind, source="").owns(state):
            return kind.kind
    return "gradicon"
