"""Scans passed in Python: paths, images of nibabel and SimpleITK, volumes.

An image is written to a temporary file and read from there, so that the rules and
checks of `volumes` for headers hold for it as for any file.
"""

import dataclasses
import os
import pathlib
import tempfile
import warnings

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel import filebasedimages, spatialimages

from jaxreg.errors import UserError
from jaxreg.io import files, volumes
from jaxreg.space.grid import Volume

_IMAGE_ERRORS = (
    *(RuntimeError, TypeError, filebasedimages.ImageFileError),
    *(spatialimages.HeaderDataError, spatialimages.HeaderTypeError),
)

Scan = Volume | os.PathLike[str] | str | spatialimages.SpatialImage | sitk.Image


def volume(scan: Scan, name: str = "scan", *, kind: volumes.Kind = "image") -> Volume:
    """Returns the volume that a scan is.

    Args:
      scan: a `Volume`; the path of a file; or an image of nibabel or SimpleITK.
      name: what to call it in sentences, and as the volume's source.
      kind: see `volumes.read_volume`.

    Raises:
      UserError: it is something else, as an array, which does not say where its voxels
        are; a volume's place or numbers are not finite; or see `volumes.read_volume`.
    """
    if isinstance(scan, Volume):
        _check(scan)
        return scan
    if isinstance(scan, str | os.PathLike):
        return volumes.read_volume(scan, kind=kind)
    if not isinstance(scan, spatialimages.SpatialImage | sitk.Image):
        what = f"{type(scan).__module__}.{type(scan).__qualname__}"
        raise UserError(
            f"the {name} is a {what}, which does not say where its voxels are; "
            "give a path, an image of nibabel or SimpleITK, or a "
            "jaxreg.space.grid.Volume, which has an array and its grid"
        )
    source = f"the {name}"
    with tempfile.TemporaryDirectory() as folder:
        path = _written(scan, pathlib.Path(folder, name), source)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = volumes.read_volume(path, kind=kind)
            except UserError as error:
                raise UserError(str(error).replace(str(path), source)) from error
    for one in caught:
        sentence = str(one.message).replace(str(path), source)
        warnings.warn(sentence, one.category, stacklevel=2)
    return dataclasses.replace(found, source=source)


def _written(
    scan: spatialimages.SpatialImage | sitk.Image, path: pathlib.Path, source: str
) -> pathlib.Path:
    """Writes an image; its voxels may still be in a file, which may be damaged."""
    try:
        if isinstance(scan, sitk.Image):
            path = path.with_suffix(".nrrd")
            sitk.WriteImage(scan, os.fspath(path))
        else:
            path = path.with_suffix(".nii")
            nib.save(scan, path)  # pyright: ignore[reportPrivateImportUsage]
    except (*files.READ_ERRORS, *_IMAGE_ERRORS) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{source} is an image that cannot be read or written as a file "
            f"({reason}); give its file's path, or another image"
        ) from error
    return path


def _check(volume: Volume) -> None:
    array = np.asarray(volume.array)
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise UserError(
            f"{volume.source} has {array.ndim} axes of {array.dtype} numbers, expected "
            "real ones along the three axes D, H and W; give such an array"
        )
    volumes.check_grid(volume.grid, volume.source)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise UserError(
            f"{volume.source} has {bad} voxels that are NaN or infinite, expected "
            "finite numbers; replace them first"
        )
