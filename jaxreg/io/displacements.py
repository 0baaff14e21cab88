"""Displacement fields in image files: NIfTI, NRRD and MetaImage.

ITK and ANTs count LPS mm, the first two axes with the other sign than RAS+, and list
components as x, y, z where arrays have d, h, w.
"""

import pathlib
import warnings

import numpy as np
import SimpleITK as sitk
from nibabel import nifti1

from jaxreg.errors import UserError
from jaxreg.io import files, itk_fields, itk_images, nifti, text_headers, volumes
from jaxreg.space import warping
from jaxreg.space.grid import Grid
from jaxreg.space.transform import Affine, Displacement, Transform


def write_nifti(path: files.PathLike, transform: Transform, fixed: Grid) -> None:
    """Writes ``T(x) - x`` on the fixed grid, as ITK and ANTs apply it.

    A NIfTI of shape (X, Y, Z, 1, 3), intent "vector", components in LPS mm, float32.
    Outside its grid such a file defines nothing: readers take the identity there.

    Raises:
      UserError: the path cannot be written.
    """
    displacement = warping.displacement_mm(transform, fixed) @ itk_images.LPS[:3, :3]
    image = volumes.nifti_image(displacement.astype(np.float32)[..., None, :], fixed)
    image.header.set_intent("vector")
    with files.atomic_path(path) as temporary:
        nifti1.save(image, temporary)


def read_nifti(path: pathlib.Path) -> Transform:
    """Reads a NIfTI displacement field.

    Args:
      path: shape (X, Y, Z, 1, 3), mm. Components count in LPS with the intent
        "vector", as ANTs writes it, and in RAS with NIfTI's intent "displacement
        vector", as ITK has it; in LPS with any other, which is warned about.

    Returns:
      Fixed mm to moving mm (RAS+), the identity half a voxel and more outside the grid.

    Raises:
      UserError: the file is damaged or no such field.
    """
    field, grid, intent = volumes.read_nifti_vectors(path)
    if intent not in ("vector", "displacement vector"):
        warnings.warn(
            f"{path} has the intent {intent}, which does not say that it is a "
            "displacement field; its vectors are taken in LPS mm, as ITK and ANTs do "
            'with the intent "vector" (1007)',
            stacklevel=2,
        )
    to_ras = np.eye(4) if intent == "displacement vector" else itk_images.LPS
    return _on_grid(field, grid, to_ras, path)


def read_itk(path: pathlib.Path) -> Transform:
    """Reads a displacement field of NRRD or MetaImage: Slicer's, elastix' or ITK's.

    Args:
      path: .nrrd, .nhdr, .mha or .mhd with three numbers per voxel, LPS whatever frame
        the header has, as ITK and Slicer take them. Lengths, of the grid and of the
        vectors, are in the header's unit, mm if it names none.

    Returns:
      Fixed mm to moving mm (RAS+), the identity half a voxel and more outside the grid.

    Raises:
      UserError: the file is damaged or no such field.
    """
    fields, _ = text_headers.check(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        if reader.GetDimension() != 3 or components != 3:
            raise UserError(
                f"{path} has {' x '.join(map(str, size))} voxels of {components} "
                "numbers, a displacement field is a 3D image of 3 numbers each (in "
                "NRRD a first axis of kind vector); write it so"
            )
        _check_claim(path, size)
        reader.SetOutputPixelType(sitk.sitkVectorFloat32)
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(
            f"{path} cannot be read as a displacement field "
            f"({files.last_line(error)}); write or fetch it again"
        ) from error
    if _says_other_frame(path):
        warnings.warn(
            f"{path} has a header in another frame than LPS; its vectors are taken in "
            "LPS mm all the same, as ITK and 3D Slicer do",
            stacklevel=2,
        )
    scale = itk_images.unit_mm(fields, path)
    grid = Grid(size[::-1], itk_images.affine_mm(reader, scale) @ itk_fields.REVERSE)
    if not nifti.is_place(grid.affine_mm):
        raise UserError(
            f"{path} has a singular grid; repair its header or write it again"
        )
    to_ras = itk_images.LPS @ np.diag([scale, scale, scale, 1.0])
    return _on_grid(sitk.GetArrayFromImage(image), grid, to_ras, path)


def _check_claim(path: pathlib.Path, size: tuple[int, ...]) -> None:
    """Refuses a header that claims more voxels than any compression can hold."""
    detached = path.suffix.lower() in (".nhdr", ".mhd")
    claimed = 3 * np.prod([float(n) for n in size])
    stored = path.stat().st_size
    if claimed > (3 * volumes.MAX_VOXELS if detached else files.MOST_PACKED * stored):
        raise UserError(
            f"{path} claims {' x '.join(map(str, size))} vectors in {stored} bytes; "
            "write or fetch it again"
        )


def _says_other_frame(path: pathlib.Path) -> bool:
    """Whether a NRRD header gives its axes in another space than ITK's."""
    if path.suffix.lower() not in (".nrrd", ".nhdr"):
        return False
    space = text_headers.read(path)[0].get("space", "").lower()
    return space not in ("", "left-posterior-superior", "lps")


def _on_grid(
    vectors: np.ndarray, grid: Grid, to_ras: np.ndarray, path: pathlib.Path
) -> Transform:
    """Returns a field D H W 3 on its grid; `to_ras` takes its components to RAS+."""
    to_unit = np.linalg.inv(grid.unit_to_mm)
    step = unit_step(vectors, (to_unit @ to_ras)[:3, :3], path)
    return Transform((Affine(to_unit), step, Affine(grid.unit_to_mm)))


def unit_step(
    field: np.ndarray, to_unit: np.ndarray, path: pathlib.Path
) -> Displacement:
    """Returns vectors D H W 3, turned into unit ones by a 3x3 matrix, as a step.

    Raises:
      UserError: they are not finite.
    """
    bad = field.size - int(np.isfinite(field).sum())
    if bad:
        raise UserError(
            f"displacement field {path} has {bad} numbers that are NaN or infinite, "
            "expected finite ones; write it again"
        )
    # Plane by plane: a field of a whole scan in float64 would take gigabytes.
    unit = np.stack([(plane @ to_unit.T).astype(np.float32) for plane in field])
    if not np.isfinite(unit).all():
        raise UserError(
            f"displacement field {path} has vectors of more than 1e38 times its grid, "
            "expected shorter ones; write it again"
        )
    return Displacement(unit[None], outside="half_voxel")
