"""Rematerialisation: what a backward pass computes again instead of keeping it.

References:
  Chen et al., Training deep nets with sublinear memory cost, 2016.
"""

from collections.abc import Callable
from typing import Literal

from flax import linen as nn

Remat = Literal["layers", "networks"]
"""layers: what a layer does to its input first, as padding and activation.
networks: also the inside of each network that the whole is made of (a U-Net, an
encoder, a level's decoder with its warp): what they are given is kept alone."""


def part(function: Callable, remat: Remat) -> Callable:
    """Returns one of the networks that a network is made of, as `remat` has it.

    Args:
      function: of a bound module, further ones perhaps, and arrays; what else it needs
        is no array.
      remat: with "networks" the gradient keeps these arrays alone.
    """
    return nn.remat(function) if remat == "networks" else function
