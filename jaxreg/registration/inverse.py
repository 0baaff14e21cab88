"""The inverse of a transform, on the moving scan's grid."""

import jax
import jax.numpy as jnp
import numpy as np

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
