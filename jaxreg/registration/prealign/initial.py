"""A transform that is given, in the place of a pre-alignment that is found."""

import math
import warnings

import jax.numpy as jnp
import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import files, transforms
from jaxreg.registration.options import AUTO, Options
from jaxreg.registration.prealign import select
from jaxreg.space import affine, warping
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Transform

_MOST_VOXELS = 2**24  # of a field on the fixed scan's grid: 200 MB in float32
_FEW_POINTS = 16  # along each axis
START = "the given transform"


def check(options: Options) -> None:
    """Checks that a given transform has nothing else in its place.

    Raises:
      UserError: a pre-alignment is asked for as well, or scans as they are stored.
    """
    if options.prealign not in (AUTO, "none"):
        raise UserError(
            f"`initial` says where to start, and `prealign` {options.prealign} looks "
            "for it; leave one of the two away"
        )
    if options.stored_orientation:
        raise UserError(
            "`stored_orientation` shows the network the moving scan as it is stored, "
            "`initial` over the fixed scan; leave one of the two away"
        )


def prealignment(
    initial: Transform | files.PathLike, fixed: Volume, moving: Volume
) -> select.Prealignment:
    """Returns a given transform as registrations start from one.

    Displacement fields are divided into the affine map that is nearest to them on the
    fixed scan and a residual field before it, which together are the transform at the
    fixed scan's voxels.

    Args:
      initial: fixed mm to moving mm (RAS+), or a file of it.
      fixed: the scan that stays.
      moving: the scan that is warped.

    Raises:
      UserError: the file cannot be read, or the transform is singular or leads from
        the fixed scan to nothing of the moving one.
    """
    name = "the initial transform"
    if not isinstance(initial, Transform):
        name = f"the initial transform {initial}"
        initial = transforms.read_transform(initial)
    points = _points(fixed.grid)
    ends = np.asarray(initial.map_points(points[None]), np.float64)[0]
    if not _meet(ends, moving.grid):
        raise UserError(
            f"{name} takes no point of {fixed.source} into {moving.source}; it maps "
            "fixed to moving points, so check that it belongs to these scans, or give "
            "its inverse"
        )
    if transform_lib.is_linear(initial):
        matrix = transform_lib.linear_matrix(initial)
        _check_regular(matrix, name)
        return select.Prealignment(matrix, start=START)
    beyond = transform_lib.beyond_percent(initial, fixed.grid)
    if beyond > 0:
        warnings.warn(
            f"{beyond:.2g} % of the voxels of {fixed.source} lie beyond the "
            f"displacement field of {name}, which displaces nothing there",
            stacklevel=4,
        )
    matrix = np.asarray(affine.fit(points, ends), np.float64)
    _check_regular(matrix, name)
    grid = _field_grid(fixed.grid)
    back = np.linalg.inv(matrix)
    # A^-1 T: what comes before the affine map A to make T of it.
    residual = warping.displacement_mm(Transform((*initial.steps, Affine(back))), grid)
    to_unit = np.linalg.inv(grid.unit_to_mm)[:3, :3]
    field = jnp.asarray((residual @ to_unit.T).astype(np.float32)[None])
    return select.Prealignment(matrix, field, grid, START)


def _points(grid: Grid) -> np.ndarray:
    """Returns points of a scan, evenly, P 3 in mm."""
    axes = [np.linspace(0, n - 1, min(n, _FEW_POINTS)) for n in grid.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(Affine(grid.voxel_to_mm)(index))


def _meet(points: np.ndarray, grid: Grid) -> bool:
    """Whether any of P 3 points in mm lies in a scan."""
    voxel = Affine(np.linalg.inv(grid.voxel_to_mm))(points)
    return bool(
        ((voxel >= -0.5) & (voxel <= np.asarray(grid.shape) - 0.5)).all(-1).any()
    )


def _check_regular(matrix: np.ndarray, name: str) -> None:
    if not np.linalg.cond(matrix[:3, :3]) < 1e6:
        raise UserError(
            f"{name} flattens space, its matrix is singular; write it again"
        )


def _field_grid(fixed: Grid) -> Grid:
    """Returns the fixed scan's grid, or a coarser one of its extent if it is large."""
    total = math.prod(fixed.shape)
    if total <= _MOST_VOXELS:
        return fixed
    scale = (_MOST_VOXELS / total) ** (1 / 3)
    return fixed.resized(tuple(max(1, int(n * scale)) for n in fixed.shape))
