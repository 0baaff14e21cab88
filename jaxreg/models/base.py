"""What every registration model offers, and the result it gives."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from jaxreg.space.grid import Shape
from jaxreg.space.transform import Transform
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables


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


class RegistrationModel(Protocol):
    """A model: a frozen configuration, with variables passed in and out."""

    def init(self, key: Key, shape: Shape) -> Variables:
        """Returns fresh variables for a network grid of `shape`."""
        ...

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
          task: number of each pair's task, for networks that train with it.
          smoothness: weight of the smoothness term that each pair is scored with, for
            networks that are conditioned on it.
          train: training mode.
          batching: what the batch is made of: how many calls end to end (what a call
            shares is kept apart, so the result equals separate calls in order), and
            over what batch statistics are taken.
        """
        ...
