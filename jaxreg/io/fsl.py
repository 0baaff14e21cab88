"""Transforms as FSL's tools read them: FLIRT's matrices and FNIRT's warps.

FSL counts mm from the first voxel of an image along its own axes, and along x from the
last one where the image is stored right-handed (the determinant of its affine is
positive). So a file means something between its two images alone, which must be given.

References:
  Jenkinson et al., FSL, NeuroImage 2012; FSL's wiki, FLIRT FAQ and FNIRT user guide.
"""

import numpy as np
from nibabel import nifti1

from jaxreg.io import files, itk_fields, volumes
from jaxreg.space import warping
from jaxreg.space.grid import Grid
from jaxreg.space.transform import Transform, linear_matrix

_FNIRT_FIELD = 2006  # the intent by which FSL knows a warp of displacements


def write_matrix(
    path: files.PathLike, transform: Transform, fixed: Grid, moving: Grid
) -> None:
    """Writes a matrix for ``flirt -applyxfm -init``: moving to fixed, as FSL has it.

    Args:
      path: the text file, which FSL calls .mat.
      transform: fixed mm to moving mm, affine steps alone.
      fixed: the grid of FLIRT's ``-ref``.
      moving: the grid of FLIRT's ``-in``.

    Raises:
      UserError: the path cannot be written.
      ValueError: the transform has a displacement field.
    """
    to_moving = linear_matrix(transform)
    matrix = _mm_to_fsl(fixed) @ np.linalg.inv(_mm_to_fsl(moving) @ to_moving)
    with files.atomic_path(path) as temporary:
        np.savetxt(temporary, matrix, fmt="%.12g")


def write_warp(
    path: files.PathLike, transform: Transform, fixed: Grid, moving: Grid
) -> None:
    """Writes a warp for ``applywarp --warp --rel``, as FNIRT and convertwarp do.

    A NIfTI of shape (X, Y, Z, 3) on the fixed grid, float32: the place in the moving
    image less that in the fixed one, each in its image's FSL mm.

    Args:
      path: .nii or .nii.gz.
      transform: fixed mm to moving mm.
      fixed: the grid of applywarp's ``--ref``.
      moving: the grid of applywarp's ``--in``.

    Raises:
      UserError: the path cannot be written.
    """
    to_moving = _mm_to_fsl(moving)
    # T(x) = x + u(x): what u adds, and what two images say of x, exactly.
    added = warping.displacement_mm(transform, fixed) @ to_moving[:3, :3].T
    apart = to_moving @ fixed.voxel_to_mm - _mm_to_fsl(fixed) @ fixed.voxel_to_mm
    warp = np.empty((*fixed.shape, 3), np.float32)
    for d, plane in enumerate(added):
        index = np.moveaxis(np.indices(plane.shape[:2], np.float64), 0, -1)
        between = index @ apart[:3, 1:3].T + apart[:3, 0] * d + apart[:3, 3]
        warp[d] = plane + between
    image = volumes.nifti_image(warp, fixed)
    image.header.set_intent(_FNIRT_FIELD, allow_unknown=True)
    with files.atomic_path(path) as temporary:
        nifti1.save(image, temporary)


def _mm_to_fsl(grid: Grid) -> np.ndarray:
    """Returns the 4x4 matrix from RAS+ mm to an image's FSL mm, x, y, z."""
    to_fsl = np.diag([*grid.spacing_mm[::-1], 1.0])
    if np.linalg.det((grid.affine_mm @ itk_fields.REVERSE)[:3, :3]) > 0:
        to_fsl[0, 3] = to_fsl[0, 0] * (grid.shape[2] - 1)
        to_fsl[0, 0] *= -1
    return to_fsl @ itk_fields.REVERSE @ np.linalg.inv(grid.affine_mm)
