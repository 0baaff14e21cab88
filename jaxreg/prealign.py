"""Pre-alignment that has to be searched for: an affine map or a coarse field.

From matched points (SAME's affine and coarse steps), or from intensities alone. Each
result is a `Transform` in unit coordinates, fixed to moving points. Every search is one
jitted loop.

References:
  Liu et al., SAME: Deformable image registration based on self-supervised anatomical
  embeddings, MICCAI 2021.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.errors import UserError
from jaxreg.losses import similarity
from jaxreg.matching import Matches
from jaxreg.space import affine, sampling
from jaxreg.space.grid import Grid, Shape, unit_scale
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.typing import Field, Image

_FEWEST = 4
_PADDED_TO = 256  # points: programs are compiled for few numbers of them
OVERLAP = 0.3
"""Share of the fixed image that a map by intensities must leave in the moving one."""


@dataclasses.dataclass(frozen=True)
class CoarseConfig:
    """How a coarse field is found; the defaults are SAME's.

    Attributes:
      stride: voxels of the fixed image per control point.
      iterations: of Adam.
      learning_rate: in coordinates that go from -1 to 1.
      smoothness: weight of the squared differences of neighbours.
    """

    stride: int = 16
    iterations: int = 100
    learning_rate: float = 0.05
    smoothness: float = 0.04


def matched_affine(matches: Matches, moving: Shape, fixed: Shape) -> Transform:
    """Returns the affine transform that matches ask for; see `affine.from_points`.

    Args:
      matches: queries in the moving, keys in the fixed image.
      moving: shape of the moving image.
      fixed: shape of the fixed image.

    Raises:
      UserError: the matches are fewer than four or lie in a plane.
    """
    start, end, weight = _points(matches, moving, fixed)
    return affine.from_points(end, start, weight)


def matched_field(
    matches: Matches,
    moving: Shape,
    fixed: Shape,
    config: CoarseConfig = CoarseConfig(),
) -> Transform:
    """Returns the affine transform that matches ask for, with a coarse field before it.

    Args:
      matches: queries in the moving, keys in the fixed image.
      moving: shape of the moving image.
      fixed: shape of the fixed image.
      config: of the search.

    Returns:
      One step, a displacement on the control points.

    Raises:
      UserError: the matches are fewer than four or lie in a plane, or the fixed image
        is too small for two control points along each axis.
    """
    shape = tuple(int(n / config.stride) for n in fixed)
    if min(shape) < 2:
        raise UserError(
            f"the fixed image has {' x '.join(map(str, fixed))} voxels, a coarse field "
            f"needs two control points {config.stride} voxels apart along each axis; "
            "give a larger image or align by an affine map"
        )
    start, end, weight = _points(matches, moving, fixed)
    (step,) = affine.from_points(end, start, weight).steps
    assert isinstance(step, Affine)
    field = _coarse(step.matrix, end, start, weight, shape=shape, config=config)
    return Transform((Displacement(field),))


def _points(matches: Matches, moving: Shape, fixed: Shape):
    """Matches as unit points of moving and fixed, with weights of 1 and padded by 0."""
    start = matches.query / unit_scale(moving)
    end = matches.key / unit_scale(fixed)
    spread = min(
        np.linalg.matrix_rank(points - points.mean(0)) if len(points) else 0
        for points in (start, end)
    )
    if len(matches) < _FEWEST or spread < 3:
        raise UserError(
            f"{len(matches)} matched points along {spread} directions were found, an "
            f"affine map needs {_FEWEST} that lie in no plane; lower the threshold, or "
            "check that both scans show the same part of the body"
        )
    rest = -len(matches) % _PADDED_TO
    return (
        *(np.pad(p, ((0, rest), (0, 0))).astype(np.float32) for p in (start, end)),
        np.pad(np.ones(len(matches), np.float32), (0, rest)),
    )


@functools.partial(jax.jit, static_argnames=("shape", "config"))
def _coarse(matrix, fixed, moving, weight, *, shape: Shape, config: CoarseConfig):
    """The field that leads fixed points P 3 to moving ones, 1 D H W 3, unit.

    Free displacements d at the control points move them before the affine map, whose
    own displacement is read off the control points and is zero outside of them.
    """
    linear = affine.displacement(matrix, shape)
    here = sampling.identity(shape)
    weight = weight / jnp.sum(weight)

    def field(d):
        return d + sampling.sample(linear, here + d, outside="zeros")

    def loss(d):
        found = fixed + sampling.sample(field(d), fixed[None])[0]
        error = jnp.sum(weight * jnp.sum((found - moving) ** 2, -1))
        return error + config.smoothness * _roughness(d)

    # From coordinates of -1 to 1 to those of 0 to 1: half a step, a quarter of the
    # loss, and so half of its gradient.
    optimizer = optax.adam(config.learning_rate / 2, eps=1e-8 / 2)

    def iterate(carry, _):
        d, state = carry
        update, state = optimizer.update(jax.grad(loss)(d), state)
        return (d + update, state), None

    start = jnp.zeros_like(linear)
    (d, _), _ = jax.lax.scan(
        iterate, (start, optimizer.init(start)), length=config.iterations
    )
    return field(d)


def _roughness(d: Field) -> jax.Array:
    """Mean squared forward difference over the voxels that have all three."""
    here = d[:, :-1, :-1, :-1]
    ahead = (d[:, 1:, :-1, :-1], d[:, :-1, 1:, :-1], d[:, :-1, :-1, 1:])
    return jnp.mean(jnp.stack([jnp.mean((there - here) ** 2) for there in ahead]))


# --- from intensities ----------------------------------------------------------------

_LOSSES: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {"ncc": similarity.ncc, "mind": similarity.mind_ssc}
)


@dataclasses.dataclass(frozen=True)
class IntensityConfig:
    """How an affine map is found from intensities.

    Attributes:
      loss: "ncc" where equal tissue has proportional intensities, "mind" across
        modalities.
      levels: resolutions, each half of the next along the finer axes.
      iterations: of Adam, per level.
      step: first learning rate of a level, in its voxels; it falls to 0.
      most_voxels: of the finest level; finer images are halved to that.
      fewest: voxels per axis below which an axis is not halved.
    """

    loss: Literal["ncc", "mind"] = "ncc"
    levels: int = 3
    iterations: int = 100
    step: float = 0.5
    most_voxels: int = 2**18
    fewest: int = 8

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: the loss is unknown, or a number is not positive.
        """
        numbers = (self.levels, self.iterations, self.step, self.most_voxels)
        if self.loss not in _LOSSES or min(*numbers, self.fewest) <= 0:
            raise UserError(
                f"the search for an affine map is {self}, expected a loss of "
                f"{', '.join(_LOSSES)} and positive numbers"
            )


def intensity_affine(
    fixed_image: Image,
    moving_image: Image,
    fixed: Grid,
    moving: Grid,
    *,
    start: Transform | None = None,
    fixed_mask: Image | None = None,
    config: IntensityConfig = IntensityConfig(),
) -> Transform:
    """Returns the affine transform under which two images are most alike.

    From coarse to fine, by gradient, over twelve numbers in mm: a shift, and what the
    map's linear part adds at the rim of the fixed image. Only fixed voxels that come to
    lie in the moving image count. A level that leaves less than `OVERLAP` of them, and
    less than half of what its start had, is not believed; where the search made things
    worse, the start stays.

    Args:
      fixed_image: 1 D H W 1, any smooth scale of intensity.
      moving_image: 1 D' H' W' 1.
      fixed: the grid of the first.
      moving: the grid of the second.
      start: affine, in unit coordinates of the grids; their middles onto each other
        if None.
      fixed_mask: 1 D H W 1; where the images are compared.
      config: of the search.

    Raises:
      UserError: an image is not 1 D H W 1 on its grid.
    """
    for name, image, grid in (
        ("fixed", fixed_image, fixed),
        ("moving", moving_image, moving),
    ):
        if image.shape != (1, *grid.shape, 1):
            raise UserError(
                f"the {name} image has shape {image.shape}, its grid {grid.shape}; "
                "give 1 D H W 1 on its own grid"
            )
    begin = affine.to_mm(start or affine.centres(fixed, moving), fixed, moving)
    fixed_grids, moving_grids = (_levels(g, config) for g in (fixed, moving))
    # Coordinates in mm about the fixed middle: small numbers for float32.
    middle = np.eye(4)
    middle[:3, 3] = fixed.unit_to_mm[:3] @ [0.5, 0.5, 0.5, 1.0]
    enter = [np.linalg.inv(middle) @ g.unit_to_mm for g in fixed_grids]
    leave = [np.linalg.inv(g.unit_to_mm) @ begin @ middle for g in moving_grids]
    radius = float(np.linalg.norm(fixed.unit_to_mm[:3, :3] @ [0.5, 0.5, 0.5]))
    mask = jnp.ones_like(fixed_image) if fixed_mask is None else fixed_mask
    numbers = _search(
        fixed_image,
        moving_image,
        mask,
        tuple(m.astype(np.float32) for m in enter),
        tuple(m.astype(np.float32) for m in leave),
        np.asarray([g.spacing_mm.mean() for g in fixed_grids], np.float32),
        radius,
        shapes=tuple(g.shape for g in fixed_grids),
        moving_shapes=tuple(g.shape for g in moving_grids),
        config=config,
    )
    change = np.asarray(_matrix(np.asarray(numbers, np.float64), radius, np))
    return affine.from_mm(
        begin @ middle @ change @ np.linalg.inv(middle), fixed, moving
    )


def _levels(grid: Grid, config: IntensityConfig) -> tuple[Grid, ...]:
    """Returns the grids of the levels, coarsest first."""
    grids = [grid]
    while np.prod(grids[-1].shape) > config.most_voxels:
        if (smaller := _halved(grids[-1], config.fewest)) == grids[-1].shape:
            break
        grids[-1] = grids[-1].resized(smaller)
    for _ in range(config.levels - 1):
        grids.append(grids[-1].resized(_halved(grids[-1], config.fewest)))
    return tuple(grids[::-1])


def _halved(grid: Grid, fewest: int) -> Shape:
    """Half the voxels along the axes that are not much coarser than the finest one."""
    long = [n >= 2 * fewest for n in grid.shape]
    if not any(long):
        return grid.shape
    finest = grid.spacing_mm[long].min()
    return tuple(
        -(-n // 2) if can and spacing < 1.5 * finest else n
        for n, can, spacing in zip(grid.shape, long, grid.spacing_mm, strict=True)
    )


def _matrix(numbers, radius, xp=jnp):
    """Twelve numbers in mm as a 4x4 map of mm about the middle."""
    top = xp.concatenate([numbers[:, :3] / radius, numbers[:, 3:]], 1)
    return xp.concatenate([top, xp.zeros((1, 4), top.dtype)]) + xp.eye(4)


def _pyramid(image: Image, shapes: tuple[Shape, ...]) -> list[Image]:
    """Returns an image on grids that were halved one after the other, coarsest first.

    Halving an axis averages pairs of voxels.
    """
    images = []
    for shape in shapes[::-1]:
        while image.shape[1:4] != shape:
            # Several halvings in one step would skip voxels.
            half = tuple(
                max(n, -(-m // 2)) for n, m in zip(shape, image.shape[1:4], strict=True)
            )
            image = sampling.resize_half_pixel(image, half)
        images.append(image)
    return images[::-1]


@functools.partial(jax.jit, static_argnames=("shapes", "moving_shapes", "config"))
def _search(
    fixed,
    moving,
    mask,
    enter,
    leave,
    spacing,
    radius,
    *,
    shapes: tuple[Shape, ...],
    moving_shapes: tuple[Shape, ...],
    config: IntensityConfig,
):
    """Returns the twelve numbers, 3 4 in mm."""
    levels = zip(
        _pyramid(fixed.astype(jnp.float32), shapes),
        _pyramid(moving.astype(jnp.float32), moving_shapes),
        _pyramid((mask != 0).astype(jnp.float32), shapes),
        enter,
        leave,
        spacing,
        strict=True,
    )
    numbers = start = jnp.zeros((3, 4))
    objective = None
    for level in levels:
        objective = functools.partial(_unlikeness, level, radius, config.loss)

        def loss(numbers, objective=objective):
            return objective(numbers)[0]

        found = _descend(loss, numbers, config.step * level[-1], config)
        (_, had), (_, left) = objective(numbers), objective(found)
        numbers = jnp.where(left >= jnp.minimum(OVERLAP, had / 2), found, numbers)
    assert objective is not None
    before, after = (unlikeness(*objective(n)) for n in (start, numbers))
    return jnp.where(after < before, numbers, start)


def unlikeness(loss: jax.Array, share: jax.Array) -> jax.Array:
    """A loss of images that overlap by a share; infinite where they do not.

    Of no voxels the losses are 0 or anything.
    """
    return jnp.where(share > 0, loss, jnp.inf)


def _unlikeness(level, radius, loss: str, numbers) -> tuple[jax.Array, jax.Array]:
    """The loss of one level's images under twelve numbers, and the share of overlap."""
    fixed, moving, mask, enter, leave, _ = level
    inner = Affine(jnp.asarray(enter))(sampling.identity(fixed.shape[1:4]))
    points = jnp.asarray(Affine(leave)(Affine(_matrix(numbers, radius))(inner)))
    inside = jnp.all((points >= 0) & (points <= 1), -1, keepdims=True)
    warped = sampling.sample(moving, points)
    counted = inside & (mask > 0.5)
    share = jnp.sum(counted) / jnp.maximum(jnp.sum(mask > 0.5), 1)
    return _LOSSES[loss](warped, fixed, mask=counted), share


def _descend(objective, numbers, rate, config: IntensityConfig):
    """Adam with a rate that falls along a cosine."""
    schedule: Any = optax.cosine_decay_schedule(1.0, config.iterations)
    optimizer = optax.scale_by_adam()

    def iterate(carry, index):
        numbers, state = carry
        update, state = optimizer.update(jax.grad(objective)(numbers), state)
        return (numbers - rate * schedule(index) * update, state), None

    steps = jnp.arange(config.iterations)
    (numbers, _), _ = jax.lax.scan(iterate, (numbers, optimizer.init(numbers)), steps)
    return numbers
