"""A discrete search for large displacements, the start of a descent by gradients.

A descent follows slopes, and finds what moved further than the structures' own size
only by luck. Here every displacement of a window is tried at every point of a coarse
grid, by descriptors that mean the same in all modalities; a convex term, tied more and
more closely to the data by its weight, makes of the best ones a smooth field.

References:
  Heinrich, Papiez, Schnabel and Handels, Non-parametric discrete registration with
  convex optimisation, WBIR 2014; Siebert, Hansen and Heinrich, Fast 3D registration
  with accurate optimisation and little learning for Learn2Reg 2021; Siebert et al.,
  ConvexAdam: self-configuring dual-optimisation-based 3D multitask medical image
  registration, IEEE TMI 2024.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.losses import similarity
from jaxreg.space import fields, filters, sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import Field, Image

_FEWEST = 4  # points of the grid along an axis, however thin the image is
_LONGEST = 4.0  # edge, in cubes of the same volume: a slice has no volume


@dataclasses.dataclass(frozen=True)
class DiscreteConfig:
    """How large displacements are searched for.

    Attributes:
      points: of the grid, per axis, were the image a cube.
      voxels: between neighbouring points, on the grid of the descriptors.
      reach: the window: so many points to either side along each axis.
      radius: of the descriptors' boxes, in their voxels.
      dilation: of the descriptors' neighbours, in their voxels.
      couplings: weights of the distance to the smoothed field, one after the other.
      inversions: steps that make both directions each other's inverse.
      kept_mib: costs are kept up to this size, and computed again where they are more.
    """

    points: int = 20
    voxels: int = 2
    reach: int = 5
    radius: int = 1
    dilation: int = 2
    couplings: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    inversions: int = 15
    kept_mib: float = 128.0


def grid_shape(shape: Shape, extent: Sequence[float], config: DiscreteConfig) -> Shape:
    """Returns the shape of the grid: points equally far apart along all axes.

    Args:
      shape: of the image. Points are `config.voxels` of its voxels apart, or more.
      extent: edges of its cube in space, in any unit.
      config: how many points there are at most.
    """
    edges = np.asarray(extent, np.float64)
    relative = np.clip(edges / np.prod(edges) ** (1 / 3), 1 / _LONGEST, _LONGEST)
    points = min(config.points, np.prod(shape) ** (1 / 3) / config.voxels)
    return tuple(int(max(_FEWEST, round(points * e))) for e in relative)


@functools.partial(jax.jit, static_argnames=("shape", "config"))
def search(
    fixed: Image, moving: Image, *, shape: Shape, config: DiscreteConfig
) -> tuple[Field, Field]:
    """Returns displacements of both directions, N d h w 3 each, unit.

    Costs are squared differences of MIND-SSC descriptors, averaged by two boxes of 3^3
    points; images and grid have their corners in common. The published code's rules,
    but that displacements at the border are averaged over its own points, where
    that counts zeros beyond it, and that of equal costs the shorter displacement wins.
    The same result each time.

    Memory, of one pair at a time: 12 numbers for each voxel of the descriptors, a few
    times over, and costs of `config.kept_mib` at most: (2 reach + 1)^3 numbers a point.

    Args:
      fixed: N D H W 1.
      moving: N D H W 1, on the same grid.
      shape: of the grid, see `grid_shape`.
      config: what is tried.
    """

    def one(images):
        here, there = (_descriptors(i[None], shape, config) for i in images)
        both = _displacements(here, there, config), _displacements(there, here, config)
        scale = jnp.asarray(np.asarray(shape, np.float32) - 1.0)
        return tuple(f / scale for f in consistent(*both, config.inversions))

    forward, backward = jax.lax.map(one, (fixed, moving))
    return forward[:, 0], backward[:, 0]


def _descriptors(image: Image, shape: Shape, config: DiscreteConfig) -> jax.Array:
    """Returns MIND-SSC about the points of the grid, 12 d h w; corners aligned."""
    fine = tuple(config.voxels * (n - 1) + 1 for n in shape)
    ratio = max(n / m for n, m in zip(image.shape[1:4], fine, strict=True))
    if ratio >= 2:
        image = similarity.gaussian_blur(image, round(ratio / 2))
    resized = sampling.resize_aligned(image, fine)
    channels = filters.mind_channels(resized, config.radius, config.dilation)
    every = (slice(None, None, config.voxels),)
    means = [filters.box_matrix(n, config.voxels // 2)[every] for n in fine]
    return filters.along_axes(channels[:, 0], means)


def window(reach: int) -> np.ndarray:
    """Returns the displacements that are tried, K 3, the shorter ones first."""
    steps = np.arange(-reach, reach + 1)
    tried = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    return tried[np.argsort(np.sum(tried**2, 1), kind="stable")]


def _displacements(here: jax.Array, there: jax.Array, config: DiscreteConfig):
    """Returns where descriptors, C d h w, lie in others, 1 d h w 3, grid's points."""
    tried, shape = window(config.reach), here.shape[1:]
    pad = ((0, 0), *((config.reach, config.reach),) * 3)
    padded = jnp.pad(there, pad, mode="edge")
    offsets = jnp.asarray(tried)

    def computed(index):  # d h w
        corner = (0, *(config.reach + offsets[index]))
        shifted = jax.lax.dynamic_slice(padded, corner, here.shape)
        apart = jnp.sum((here - shifted) ** 2, 0)
        return filters.mean_filter(apart[None, ..., None], 2)[0, ..., 0]

    cost = computed
    if 4 * len(tried) * np.prod(shape) <= config.kept_mib * 2**20:
        costs = jax.lax.map(computed, jnp.arange(len(tried)))  # K d h w
        cost = costs.__getitem__
    return coupled(cost, offsets.astype(jnp.float32), shape, config.couplings)


def coupled(
    cost: Callable[[jax.Array], jax.Array],
    tried: jax.Array,
    shape: Shape,
    couplings: Sequence[float],
) -> jax.Array:
    """Returns a smooth field of displacements that cost little, 1 d h w 3.

    In turn the best displacement for each point alone, which may leave the smooth
    field at a price, and the means of these: the price rises from step to step.

    Args:
      cost: index of a displacement to its costs, d h w.
      tried: the displacements, K 3; of equal ones the first wins.
      shape: of the grid.
      couplings: price of a squared distance of 1, one after the other.
    """
    means = [filters.box_matrix(n, 1) for n in shape]

    def smooth(best):
        return filters.along_axes(jnp.moveaxis(tried[best], -1, 0), means)  # 3 d h w

    def best_near(price, field):
        def better(carry, index):
            least, best = carry
            leap = tried[index][:, None, None, None] - field
            total = cost(index) + price * jnp.sum(leap**2, 0)
            less = total < least
            return (jnp.where(less, total, least), jnp.where(less, index, best)), None

        start = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)
        (_, best), _ = jax.lax.scan(better, start, jnp.arange(len(tried)))
        return smooth(best)

    def step(field, price):
        return best_near(price, field), None

    prices = jnp.asarray((0.0, *couplings), jnp.float32)
    field, _ = jax.lax.scan(step, jnp.zeros((3, *shape)), prices)
    return jnp.moveaxis(field, 0, -1)[None]


def consistent(
    forward: jax.Array, backward: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Returns two displacements as each other's inverse, as far as both can be.

    Args:
      forward: N d h w 3, points of the grid.
      backward: the same.
      steps: how often each is replaced by its mean with the other's inverse.

    References:
      Heinrich et al., IEEE TMI 2013 (deeds): symmetric transforms.
    """

    def step(_, both):
        one, other = both
        return (
            0.5 * (one - fields.warp_voxels(other, one, outside="edge")),
            0.5 * (other - fields.warp_voxels(one, other, outside="edge")),
        )

    return jax.lax.fori_loop(0, steps, step, (forward, backward))
