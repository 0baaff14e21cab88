"""How large UniReg is: parameters, and multiplications with additions of one pass."""

import dataclasses
import math

import jax
import numpy as np

from jaxreg.models.unireg import EMBEDDING, UniReg, UniRegConfig
from jaxreg.models.unireg_features import FINE, MIND_CHANNELS
from jaxreg.space.grid import Shape

PAPER_SHAPE = (192, 192, 160)
PAPER = (360_000, 477_000_000_000)
"""Parameters and multiply-adds that the paper states, rounded as it does."""
_HALVINGS = {
    "halve": 1,
    **{f"encoder_{level}": level for level in (1, 2, 3)},
    **{f"decoder_{index}": 4 - index for index in range(4)},
}
"""Of the grid on which a layer's output lies; 0 for the others."""
_OFFSETS = 27


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a network without the one that makes its embeddings.

    Attributes:
      parameters: trained numbers.
      convolutions: multiply-adds of a pass, those of the generated layers included.
      correlation: of the three products (of both maps, and their two lengths) at each
        offset and fine voxel; 0 where nothing is correlated.
    """

    parameters: int
    convolutions: int
    correlation: int


def size_of(config: UniRegConfig, shape: Shape = PAPER_SHAPE) -> Size:
    """Counts by the shapes of the parameters; biases and activations are left out.

    Args:
      config: of the network.
      shape: the network grid.
    """
    shapes = jax.eval_shape(UniReg(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(shapes["params"])[0]
    convolutions = 0
    for path, leaf in leaves:
        *names, kind = (part.key for part in path)
        if kind != "kernel":
            continue
        count = leaf.size
        if names[-1] == "controller":  # the layers that it makes run at every voxel
            count = EMBEDDING * (2 * EMBEDDING + 3)
        halvings = next((_HALVINGS[name] for name in names if name in _HALVINGS), 0)
        convolutions += count * math.prod(shape) // 8**halvings
    return Size(
        parameters=sum(int(np.prod(leaf.shape)) for _, leaf in leaves),
        convolutions=convolutions,
        correlation=_correlation(config, shape),
    )


def _correlation(config: UniRegConfig, shape: Shape) -> int:
    if config.features == "none" or config.matching != "correlation":
        return 0
    mind = config.features == "mind"
    channels = MIND_CHANNELS if mind else config.feature_channels
    voxels = math.prod(n // f for n, f in zip(shape, FINE, strict=True))
    return 3 * _OFFSETS * channels * voxels
