"""Affine maps and coarse fields from matched points."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.errors import UserError
from jaxreg.matching.nearest import Matches
from jaxreg.space import affine, sampling
from jaxreg.space.grid import Shape, unit_scale
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.typing import Field

_FEWEST = 4
_PADDED_TO = 256  # points: programs are compiled for few numbers of them


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
