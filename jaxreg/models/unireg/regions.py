"""Conditioning on a body region and a pairing, which both UniRegs have."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxreg.models.base import Conditioning, NetworkConfig, Window
from jaxreg.nn import heads
from jaxreg.nn.heads import Pairing, RegionPairings, SmoothnessRange
from jaxreg.typing import Variables


class RegionConfig(NetworkConfig):
    """A network whose heads, if they are dynamic, are made for a region and a pairing.

    Attributes:
      pairings: the first one is [1, 0] in the condition.
      pairing_first: whether the condition has the pairing before the regions.
      head: "dynamic" heads are made for the task; others know of none.
      regions: body regions that a head can be made for.
      tasks: region and pairing of each task number.
      smoothness_range: weights of the smoothness term that a dynamic head is
        conditional on; None for a network of one weight per task.
    """

    pairings: ClassVar[tuple[Pairing, Pairing]]
    pairing_first: ClassVar[bool]
    head: Any
    regions: int
    tasks: RegionPairings
    smoothness_range: SmoothnessRange | None

    @property
    def conditioning(self) -> Conditioning | None:
        """Regions, for dynamic heads."""
        return "regions" if self.head == "dynamic" else None

    @property
    def smoothness_condition(self) -> SmoothnessRange | None:
        """The weights that a dynamic head is conditional on."""
        return self.smoothness_range if self.head == "dynamic" else None

    @property
    def conditioning_size(self) -> int:
        """How many numbers condition the head on a task."""
        asked = self.smoothness_range
        return self.regions + len(self.pairings) + (asked.knots if asked else 0)

    def condition(
        self, task: Int[Array, " N"] | None, smoothness: Float[Array, " N"] | None
    ) -> Float[Array, "N K"] | None:
        """Returns region, pairing and smoothness of each pair as the heads take them.

        Args:
          task: each pair's number in `tasks`.
          smoothness: its weight; the middle of `smoothness_range` if None.

        Raises:
          UserError: see `heads.look_up`.
        """
        if self.head != "dynamic":
            return None
        rows = heads.one_hot_region_pairings(self.tasks, self.regions, self.pairings)
        table = np.concatenate(rows[::-1] if self.pairing_first else rows, -1)
        known = heads.look_up(table, task, self.tasks)
        return heads.with_smoothness(known, smoothness, self.smoothness_range)

    def names_in(self, variables: Variables) -> int:
        """Returns how many regions a dynamic head can be made for."""
        return self.regions if self.head == "dynamic" else 0

    def with_names(self, names: Sequence[str], tasks: RegionPairings) -> Self:
        """Returns the configuration for a region of each name, and these tasks."""
        return dataclasses.replace(self, regions=len(names), tasks=tuple(tasks))

    def with_region_pairings(
        self, tasks: RegionPairings, window: Window | None
    ) -> Self:
        """Returns the configuration for another table of regions and pairings."""
        return dataclasses.replace(self, tasks=tasks)

    def fitted(
        self,
        variables: Variables,
        shape: tuple[int, int, int],
        fresh: Variables,
        rows: Mapping[int, int],
        known: int,
    ) -> Variables:
        """Returns weights whose controllers' rows follow their regions.

        See `NetworkConfig.fitted`.
        """
        behind = self.conditioning_size - self.regions
        if self.pairing_first:
            behind -= len(self.pairings)

        def taken(path, old):
            names = [part.key for part in path]
            if names[-2:] != ["controller", "kernel"]:
                return old
            new: Any = fresh["params"]
            for name in names:
                new = new.get(name, {})
            if np.ndim(new) != np.ndim(old) or new.shape[-1] != old.shape[-1]:
                return old
            first = new.shape[-2] - behind - self.regions
            return heads.take_regions(new, old, rows, first, (self.regions, known))

        params = jax.tree_util.tree_map_with_path(taken, variables["params"])
        return {**variables, "params": params}
