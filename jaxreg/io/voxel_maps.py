"""Transforms as arrays of voxel indices, for what knows arrays alone, as SciPy."""

import numpy as np

from jaxreg.io import files
from jaxreg.space import warping
from jaxreg.space.grid import Grid
from jaxreg.space.transform import Transform

EXTENSIONS = (".npy", ".npz")


def write(
    path: files.PathLike, transform: Transform, fixed: Grid, moving: Grid
) -> None:
    """Writes where each fixed voxel lies in the moving array.

    ``scipy.ndimage.map_coordinates(moving, np.load(path), order=1)`` is the warped
    scan, of arrays indexed x, y, z as nibabel and pynrrd load them. For D, H, W arrays,
    as SimpleITK's, it is ``coordinates[::-1].transpose(0, 3, 2, 1)``.

    Args:
      path: .npy for the coordinates alone, 3 X Y Z, float32; .npz for these by the name
        coordinates, with fixed_affine and moving_affine, 4x4 from voxel x, y, z to
        RAS+ mm, and moving_shape.
      transform: fixed mm to moving mm.
      fixed: the grid of the array to be.
      moving: the grid of the array that is read.

    Raises:
      UserError: the path cannot be written.
    """
    to_index = np.linalg.inv(moving.voxel_to_mm)
    moved = warping.displacement_mm(transform, fixed) @ to_index[:3, :3].T
    unmoved = to_index @ fixed.voxel_to_mm
    for d, plane in enumerate(moved):
        index = np.moveaxis(np.indices(plane.shape[:2], np.float64), 0, -1)
        plane += index @ unmoved[:3, 1:3].T + unmoved[:3, 0] * d + unmoved[:3, 3]
    # D H W (d h w) to (x y z) X Y Z
    coordinates = np.ascontiguousarray(
        np.asarray(moved, np.float32).transpose(3, 2, 1, 0)[::-1]
    )
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        if files.full_suffix(path).lower() == ".npy":
            np.save(file, coordinates)
            return
        fixed_xyz, moving_xyz = (
            grid.affine_mm[:, [2, 1, 0, 3]] for grid in (fixed, moving)
        )
        np.savez(
            file,
            coordinates=coordinates,
            fixed_affine=fixed_xyz,
            moving_affine=moving_xyz,
            moving_shape=np.asarray(moving.shape[::-1]),
        )
