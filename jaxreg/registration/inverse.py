"""The inverse of a transform: on the moving scan's grid, or field by field."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.errors import UserError
from jaxreg.space import fields, sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, unit_scale


@jax.jit
def _gap(forward, field):
    grid = sampling.identity(field.shape[1:4])
    return forward.map_points(grid + field) - grid


@jax.jit
def solve_inverse(forward, start):
    """Returns the inverse displacement on the grid of `start`."""
    return fields.invert(forward.map_points, start.shape[1:4], initial=start)[0]


def inverse_of(forward, backward, grids, scan: Grid, over: Grid | None):
    """Returns the inverse in mm.

    The fixed point iteration starts from the backward prediction, which is nearly the
    inverse already.

    Args:
      forward: in unit coordinates of the network grids, also beyond them.
      backward: a first guess of its inverse.
      grids: the network grids of the fixed and of the moving scan.
      scan: the moving scan's grid, which the inverse covers besides.
      over: the fixed scan's grid in the moving scan's space, if the network grid lies
        over that one: where it is larger, it is covered, and what the map makes of it.
    """
    shape, padding = grids[1].shape, grids[1].padding(scan)
    if over is not None:
        lacking = grids[1].padding(over)
        if lacking.any():
            moved = np.abs(_gap(forward, jnp.zeros((1, *shape, 3)))).max((0, 1, 2, 3))
            farthest = np.ceil(moved * unit_scale(shape)).astype(int)
            lacking = lacking + farthest[:, None]
        # A grid with the scan's extent keeps its size, and one program serves all.
        padding = np.minimum(padding, lacking)
    if padding.any():
        forward = forward.seen_from(transform_lib.padded_to_unit(shape, padding))
    fixed, moving = (grid.padded(padding) for grid in grids)
    (start,) = transform_lib.padded(backward, shape, padding).steps
    assert isinstance(start, transform_lib.Displacement)
    field = solve_inverse(forward, start.field)
    unit = transform_lib.Transform((transform_lib.Displacement(field),))
    return transform_lib.in_world(unit, moving, fixed)


def inverted(transform: transform_lib.Transform) -> transform_lib.Transform:
    """Returns the inverse of a transform, step by step, the last one first.

    A matrix is inverted exactly. A displacement field is inverted on its own grid,
    which grows by as many voxels as its longest displacements lead beyond it; there it
    goes on as its edge, as where `register` inverts. So no scan is needed, and every
    field of a composite keeps its resolution.

    Args:
      transform: fixed mm to moving mm, as files hold it: its fields of batch 1.

    Returns:
      Moving mm to fixed mm, fields with outside="half_voxel".

    Raises:
      UserError: a matrix is singular.

    References:
      Chen et al., A simple fixed-point approach to invert a deformation field, 2008.
    """
    steps: list[transform_lib.Step] = []
    for step in reversed(transform.steps):
        if isinstance(step, transform_lib.Displacement):
            steps.extend(_inverted_field(step).steps)
            continue
        try:
            back = np.linalg.inv(np.asarray(step.matrix, np.float64))
        except np.linalg.LinAlgError:
            back = np.full((4, 4), np.inf)
        if not np.isfinite(back).all():
            raise UserError(
                "the transform has a singular matrix, which flattens space and has no "
                "inverse; write it again"
            )
        steps.append(transform_lib.Affine(back))
    return transform_lib.Transform(tuple(steps))


def _inverted_field(step: transform_lib.Displacement) -> transform_lib.Transform:
    """Returns the inverse of ``x + u(x)`` in unit coordinates of the field's grid."""
    field = np.asarray(step.field)
    shape = tuple(field.shape[1:4])
    reach = field.reshape(-1, 3) * unit_scale(shape)
    # How far it leads beyond either end; not farther than the grid is long.
    padding = np.stack([-reach.min(0), reach.max(0)], -1)
    padding = np.ceil(np.clip(padding, 0, np.asarray(shape)[:, None])).astype(int)
    leave = transform_lib.padded_to_unit(shape, padding)
    forward = transform_lib.Transform((transform_lib.Displacement(field),))
    guess = transform_lib.Transform((transform_lib.Displacement(-field),))
    (start,) = transform_lib.padded(guess, shape, padding).steps
    assert isinstance(start, transform_lib.Displacement)
    back = solve_inverse(forward.seen_from(leave), start.field)
    found = transform_lib.Displacement(back, outside="half_voxel")
    return transform_lib.Transform((found,)).seen_from(np.linalg.inv(leave))
