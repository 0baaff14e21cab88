"""Transform files, by extension.

In memory a transform maps fixed to moving points in RAS+ mm. ITK, ANTs and 3D Slicer
count LPS mm; the modules of the formats turn one into the other.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import displacements, files, itk_transforms, volumes
from jaxreg.space.grid import Grid
from jaxreg.space.transform import Transform, is_linear


@dataclasses.dataclass(frozen=True)
class _Format:
    """One file format of transforms.

    Attributes:
      read: of a path.
      write: to a path a transform and the fixed grid; None if it is only read.
      as_written: see `as_written`; None to read the file.
    """

    read: Callable[[pathlib.Path], Transform]
    write: Callable[[pathlib.Path, Transform, Grid | None], None] | None = None
    as_written: Callable[[pathlib.Path, Transform], Transform] | None = None


_ITK = _Format(
    itk_transforms.read,
    lambda path, transform, _: itk_transforms.write(path, transform),
    itk_transforms.as_written,
)


def _write_nifti(path: pathlib.Path, transform: Transform, fixed: Grid | None) -> None:
    if fixed is None:
        raise UserError(
            f"{path} is to be a displacement field, which lies on a scan's grid; give "
            "`fixed`, or use .h5"
        )
    displacements.write_nifti(path, transform, fixed)


_NIFTI = _Format(displacements.read_nifti, _write_nifti)
_MATLAB = _Format(
    itk_transforms.read,
    lambda path, transform, _: itk_transforms.write_linear(path, transform),
)

FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        **dict.fromkeys((*itk_transforms.HDF5, *itk_transforms.TEXT), _ITK),
        **dict.fromkeys(volumes.NIFTI, _NIFTI),
        **dict.fromkeys(itk_transforms.MATLAB, _MATLAB),
        **dict.fromkeys(volumes.ITK_READ, _Format(displacements.read_itk)),
    }
)
"""By extension in small letters."""
LINEAR_EXTENSIONS = tuple(suffix for suffix, known in FORMATS.items() if known.write)
"""What is written of an affine transform."""
EXTENSIONS = tuple(s for s in LINEAR_EXTENSIONS if s not in itk_transforms.MATLAB)
"""What is written of any transform."""


def check_transform_path(
    path: files.PathLike, option: str = "`transform_out`", *, linear: bool = False
) -> pathlib.Path:
    """Checks that `write_transform` can write there, before any work.

    Args:
      path: the file to be.
      option: what to call it in the sentence.
      linear: whether the transform may be affine, which .mat holds as well.

    Raises:
      UserError: the extension is none of `EXTENSIONS`, or `files.check_writable`
        refuses.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() in itk_transforms.MATLAB and not linear:
        raise UserError(
            f"{option} {path} is a .mat file, which cannot hold a displacement field; "
            "use .h5"
        )
    _format_of(path, option, LINEAR_EXTENSIONS if linear else EXTENSIONS)
    return files.check_writable(path, option)


def write_transform(
    path: files.PathLike, transform: Transform, fixed: Grid | None = None
) -> None:
    """Writes a transform in the format of the extension, whole or not at all.

    Args:
      path: .h5, .hdf5, .tfm or .txt for ITK's composite, .nii or .nii.gz for a
        displacement field, .mat for a matrix.
      transform: fixed mm to moving mm, e.g. from `space.transform.in_world`.
      fixed: the grid of a displacement field; ITK's composite keeps its own.

    Raises:
      UserError: the path cannot be written, a displacement field lacks its grid, or a
        matrix is asked for of what has a displacement field.
      ValueError: see `itk_transforms.write`.
    """
    path = check_transform_path(path, linear=is_linear(transform))
    write = _format_of(path, "transform", LINEAR_EXTENSIONS).write
    assert write is not None
    write(path, transform, fixed)


def as_written(path: files.PathLike, transform: Transform) -> Transform:
    """Returns what a reader finds in the file that `write_transform` made.

    Equal to `read_transform`, without reading an ITK composite once more. Rounding
    apart it is the transform itself, for a displacement field on its grid alone. A scan
    warped by it is the one that the file gives later, voxel for voxel.

    Args:
      path: where it was written.
      transform: what was written.
    """
    path = pathlib.Path(path)
    known = _format_of(path, "transform", LINEAR_EXTENSIONS)
    return known.as_written(path, transform) if known.as_written else known.read(path)


@np.errstate(over="ignore", invalid="ignore")  # refused below, as what it became
def read_transform(path: files.PathLike) -> Transform:
    """Reads a transform file of any format in `FORMATS`.

    Returns:
      Fixed mm to moving mm.

    Raises:
      UserError: the file is missing, damaged or holds no transform that can be read;
        see `itk_transforms.read`, `displacements.read_nifti` and
        `displacements.read_itk`.
    """
    path = files.check_readable(path, "transform")
    return _format_of(path, "transform", tuple(FORMATS)).read(path)


def _format_of(path: pathlib.Path, option: str, known: tuple[str, ...]) -> _Format:
    suffix = files.full_suffix(path).lower()
    if suffix not in known:
        raise UserError(
            f"{option} {path} has the extension {suffix or '(none)'}, expected one of "
            f"{', '.join(known)}; rename or convert it"
        )
    return FORMATS[suffix]
