"""Scans as users of Python have them: paths, images of nibabel and SimpleITK, volumes.

An image is written to a temporary file and read from there, so that the rules and
checks of `volumes` for headers hold for it as for any file.
"""

import dataclasses
import os
import pathlib
import tempfile

import nibabel as nib
import SimpleITK as sitk
from nibabel import spatialimages

from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.space.grid import Volume

Scan = Volume | os.PathLike[str] | str | spatialimages.SpatialImage | sitk.Image


def volume(scan: Scan, name: str = "scan") -> Volume:
    """Returns the volume that a scan is.

    Args:
      scan: a `Volume`; the path of a file; or an image of nibabel or SimpleITK.
      name: which scan, for the sentence and as the volume's source.

    Raises:
      UserError: it is something else, as an array, which does not say where its voxels
        are; or see `volumes.read_volume`.
    """
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | os.PathLike):
        return volumes.read_volume(scan)
    if not isinstance(scan, spatialimages.SpatialImage | sitk.Image):
        kind = f"{type(scan).__module__}.{type(scan).__qualname__}"
        raise UserError(
            f"the {name} scan is a {kind}, which does not say where its voxels are; "
            "give a path, an image of nibabel or SimpleITK, or a "
            "jaxreg.space.grid.Volume, which has an array and its grid"
        )
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(scan, sitk.Image):
            path = pathlib.Path(folder, f"{name}.nrrd")
            sitk.WriteImage(scan, os.fspath(path))
        else:
            path = pathlib.Path(folder, f"{name}.nii")
            nib.save(scan, path)  # pyright: ignore[reportPrivateImportUsage]
        found = volumes.read_volume(path)
    return dataclasses.replace(found, source=f"the {name} scan")
