"""Dynamic head (hypernetwork): a controller makes its weights for each pair.

    condition = [pooled features | what is known of the task]
    controller: condition -> W1 W2 W3 b1 b2 b3
    displacement = W3 f(W2 f(W1 features + b1) + b2) + b3, per voxel

References:
  Zhang et al., DoDNet, CVPR 2021 (dynamic head); Li et al., UniReg, 2025.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxreg.errors import UserError
from jaxreg.nn.layers import host_initializer, kaiming_bound, leaky
from jaxreg.typing import Image

Pairing = Literal["inter", "intra"]
"""Two subjects, or one."""
RegionPairings = tuple[tuple[int, Pairing], ...]
"""For each task its region's number and its type."""

SLOPE = 0.2
LAST_DEVIATION = 1e-5
_NORM_EPSILON = 1e-5
_NORM_GROUPS = (8, 4, 2, 1)


# --- what is known of a task ----------------------------------------------------------


def check_region_pairings(tasks: RegionPairings, regions: int) -> None:
    """Checks a table of tasks.

    Raises:
      UserError: a region is not in 0 .. regions - 1, or a type is unknown.
    """
    for region, pairing in tasks:
        if not 0 <= region < regions or pairing not in ("inter", "intra"):
            raise UserError(
                f"a task is ({region}, {pairing!r}), expected a region from 0 to "
                f"{regions - 1} and inter or intra; mend tasks or regions"
            )


def one_hot_region_pairings(
    tasks: RegionPairings, regions: int, types: tuple[Pairing, Pairing]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns region and type of each task as rows: tasks x regions, tasks x 2.

    Args:
      tasks: see `RegionPairings`.
      regions: how many there are.
      types: the first one is [1, 0].
    """
    region = np.eye(regions, dtype=np.float32)[[r for r, _ in tasks]]
    pairing = np.eye(2, dtype=np.float32)[[types.index(p) for _, p in tasks]]
    return region, pairing


def look_up(
    table: np.ndarray, task: Int[Array, " N"] | None, tasks: RegionPairings
) -> Float[Array, "N K"]:
    """Returns each pair's row of a table of tasks; NaN for a number beyond it.

    Raises:
      UserError: no task is given, or one that is known to be beyond the table.
    """
    listed = ", ".join(f"{i}: region {r} {p}" for i, (r, p) in enumerate(tasks))
    if task is None:
        raise UserError(
            "UniReg makes its head for a task and was given none; give each pair's "
            f"task number ({listed})"
        )
    if not isinstance(task, Tracer):
        numbers = np.asarray(task)
        if numbers.size and not (0 <= numbers.min() <= numbers.max() < len(tasks)):
            raise UserError(
                f"the task numbers are {numbers.tolist()}, UniReg knows {listed}; give "
                "one of these for each pair"
            )
    return jnp.take(jnp.asarray(table), task, axis=0, mode="fill", fill_value=jnp.nan)


@dataclasses.dataclass(frozen=True)
class SmoothnessRange:
    """The weights of the smoothness term that a head can be asked for.

    A weight becomes `knots` numbers: the tents of linear interpolation in its
    logarithm. The controller being linear, the head's own weights then are a piecewise
    linear function of that logarithm, as those of a hypernetwork are another one.

    Attributes:
      low: smallest weight, above 0.
      high: largest weight.
      knots: at least 2.

    References:
      Hoopes et al., HyperMorph, IPMI 2021; Mok and Chung, Conditional deformable image
      registration with convolutional neural network, MICCAI 2021.
    """

    low: float
    high: float
    knots: int = 5

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: they are no range, or there are fewer than two knots.
        """
        if not 0 < self.low < self.high < math.inf or self.knots < 2:
            raise UserError(
                f"the range of smoothness is {self.low} to {self.high} with "
                f"{self.knots} knots, expected 0 < low < high and 2 knots or more"
            )

    @property
    def middle(self) -> float:
        """The weight that is taken where none is asked for."""
        return math.sqrt(self.low * self.high)

    def position(self, weight: jax.Array) -> jax.Array:
        """Returns where weights lie in the range: 0 to 1, by their logarithm."""
        low, high = math.log(self.low), math.log(self.high)
        return jnp.clip((jnp.log(weight) - low) / (high - low), 0.0, 1.0)

    def encode(self, weight: Float[Array, " N"]) -> Float[Array, "N K"]:
        """Returns each weight as `knots` numbers, which sum to 1."""
        last = self.knots - 1
        distance = jnp.arange(self.knots) - last * self.position(weight)[:, None]
        return jnp.maximum(1.0 - jnp.abs(distance), 0.0)


def with_smoothness(
    conditioning: Float[Array, "N K"],
    weight: Float[Array, " N"] | None,
    smoothness_range: SmoothnessRange | None,
) -> Float[Array, "N K"]:
    """Returns what is known of a task, followed by the smoothness asked for, if any."""
    if smoothness_range is None:
        return conditioning
    if weight is None:
        weight = jnp.full(len(conditioning), smoothness_range.middle)
    return jnp.concatenate([conditioning, smoothness_range.encode(weight)], -1)


def take_regions(
    fresh: jax.Array,
    old: jax.Array,
    rows: Mapping[int, int],
    first: int,
    regions: tuple[int, int],
) -> np.ndarray:
    """Returns an old controller's kernel for other regions.

    What comes after the regions is taken over as far as both have it.

    Args:
      fresh: kernel of the new controller, ... K P; its rows stay where none is old.
      old: kernel of the old one, ... K' P.
      rows: new region to old region.
      first: the row of both that belongs to region 0.
      regions: how many there are, in the new controller and in the old one.
    """
    now, before = (first + count for count in regions)
    common = min(fresh.shape[-2] - now, old.shape[-2] - before)
    taken = np.array(fresh)
    taken[..., :first, :] = old[..., :first, :]
    taken[..., now : now + common, :] = old[..., before : before + common, :]
    for new, there in rows.items():
        taken[..., first + new, :] = old[..., first + there, :]
    return taken


# --- condition to weights -------------------------------------------------------------


def widths(inputs: int, hidden: int = 8, outputs: int = 3) -> tuple[int, ...]:
    """Returns the channels before, between and after the head's three layers."""
    return (inputs, hidden, hidden, outputs)


def parameter_count(channels: Sequence[int]) -> int:
    """Returns how many numbers a head takes: 171 for 8, 8, 8 and 3 channels."""
    return sum((i + 1) * o for i, o in itertools.pairwise(channels))


def split(
    parameters: Float[Array, "N P"], channels: Sequence[int]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns a head's kernels, N O I each, and biases, N O each.

    All kernels come first, rows (outputs) one after the other, then all biases.

    Raises:
      ValueError: it is another number of parameters.
    """
    n, count = parameters.shape
    if count != parameter_count(channels):
        raise ValueError(
            f"got {count} parameters, a head of {tuple(channels)} channels takes "
            f"{parameter_count(channels)}"
        )
    pairs = list(itertools.pairwise(channels))
    sizes = [i * o for i, o in pairs] + [o for _, o in pairs]
    parts = jnp.split(parameters, np.cumsum(sizes)[:-1], axis=-1)
    layers = len(pairs)
    kernels = [
        part.reshape(n, o, i)  # N O I, a matrix for each pair
        for part, (i, o) in zip(parts[:layers], pairs, strict=True)
    ]
    return kernels, parts[layers:]


def apply_head(
    features: Image, parameters: Float[Array, "N P"], channels: Sequence[int]
) -> Image:
    """Returns three 1x1x1 layers of each pair's own weights: N D H W O.

    Leaky ReLU of slope 0.2 after the first two.

    Args:
      features: N D H W I.
      parameters: one row per pair, see `split`.
      channels: see `widths`.
    """
    x = features
    layers = list(zip(*split(parameters, channels), strict=True))
    for index, (kernel, bias) in enumerate(layers):
        x = jnp.einsum(
            "ndhwi,noi->ndhwo", x, kernel, precision=jax.lax.Precision.HIGHEST
        )
        x = x + bias[:, None, None, None]
        if index + 1 < len(layers):
            x = leaky(x, SLOPE)
    return x


def base_head(channels: Sequence[int]):
    """Returns the initialiser of a controller's biases: one small head for all tasks.

    Kaiming-uniform layers before a last one near zero. With zeros throughout, nothing
    but the last bias would ever receive a gradient.
    """

    def draw(generator, shape):
        del shape
        *first, last = [(o, i) for i, o in itertools.pairwise(channels)]
        kernels = [
            generator.uniform(-1.0, 1.0, o * i) * kaiming_bound(i, SLOPE)
            for o, i in first
        ]
        kernels.append(generator.normal(0.0, LAST_DEVIATION, math.prod(last)))
        return np.concatenate([*kernels, np.zeros(sum(channels[1:]))])

    return host_initializer(draw)


# Not nn.GroupNorm, which scales before it shifts, and whose last bits differ.
class GroupNorm(nn.Module):
    """Group normalisation with as many of 8, 4, 2 or 1 groups as divide the channels.

    References:
      Wu and He, Group normalization, ECCV 2018.
    """

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Normalises N D H W C per sample and group, in float32."""
        c = x.shape[-1]
        groups = next(g for g in _NORM_GROUPS if c % g == 0)
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        grouped = x.reshape(*x.shape[:-1], groups, c // groups)  # N D H W G C/G
        axes = (1, 2, 3, 5)
        mean = grouped.mean(axes, keepdims=True)
        variance = jnp.square(grouped - mean).mean(axes, keepdims=True)
        grouped = (grouped - mean) * jax.lax.rsqrt(variance + _NORM_EPSILON)
        normal = grouped.reshape(x.shape)  # N D H W C
        return normal * scale[None, None, None, None] + bias[None, None, None, None]


# Not nn.Dense: stored weights have the kernel of a 1x1x1 convolution.
class Controller(nn.Module):
    """One linear layer from a pair's condition to the weights of its head.

    Attributes:
      channels: of the head, see `widths`.
    """

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, condition: Float[Array, "N K"]) -> Float[Array, "N P"]:
        """Returns a row of `parameter_count` numbers per pair."""
        shape = (1, 1, 1, condition.shape[-1], parameter_count(self.channels))
        # A kernel of zeros: every task starts from the base head.
        kernel = self.param("kernel", nn.initializers.zeros, shape)
        bias = self.param("bias", base_head(self.channels), shape[-1:])
        product = jnp.matmul(  # N P
            condition, kernel[0, 0, 0], precision=jax.lax.Precision.HIGHEST
        )
        return product + bias[None]


class DynamicHead(nn.Module):
    """Features and what is known of the task to one displacement per voxel, float32.

    Attributes:
      inputs: channels of the features.
      hidden: channels between the layers.
      outputs: channels of the result.
      pool_norm: whether the features pass group normalisation and a ReLU before they
        are pooled; the head itself receives them as they are.
    """

    inputs: int
    hidden: int = 8
    outputs: int = 3
    pool_norm: bool = False

    @nn.compact
    def __call__(self, features: Image, conditioning: Float[Array, "N K"]) -> Image:
        """Maps N D H W inputs, and what is known of the task, to N D H W outputs."""
        features = features.astype(jnp.float32)
        pooled = features
        if self.pool_norm:
            pooled = jax.nn.relu(GroupNorm(name="norm")(features))
        condition = jnp.concatenate([pooled.mean((1, 2, 3)), conditioning], -1)
        channels = widths(self.inputs, self.hidden, self.outputs)
        parameters = Controller(channels, name="controller")(condition)
        return apply_head(features, parameters, channels)
