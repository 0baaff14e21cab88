"""NRRD and MetaImage through SimpleITK: the place in space and the voxels.

What ITK 5.4 does not report is checked here: units of length other than mm,
the end and the checksum of compressed data (of a damaged MetaImage it returns whatever
was in memory), and sizes that the file cannot hold.

References:
  http://teem.sourceforge.net/nrrd/format.html; MetaIO's documentation, "MetaImage".
"""

import dataclasses
import math
import os
import pathlib
import re
import warnings
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk

from jaxreg.errors import UserError
from jaxreg.io import files, nifti, text_headers

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's frame to RAS+ mm, and back."""

_MICRO = {"um": 1e-3, "\N{MICRO SIGN}m": 1e-3, "\N{GREEK SMALL LETTER MU}m": 1e-3}
_NRRD_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "nm": 1e-6} | _MICRO
_NRRD_SPACES = (
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las", "lpst", "rast", "last"),
)
_META_MM = {"cm": 10.0, "mm": 1.0, "um": 1e-3}
_WORDS_MM = {
    **{"meter": 1e3, "metre": 1e3, "centimeter": 10.0, "centimetre": 10.0},
    **{"millimeter": 1.0, "millimetre": 1.0, "micron": 1e-3, "micrometer": 1e-3},
    **{"micrometre": 1e-3, "nanometer": 1e-6, "nanometre": 1e-6},
}
_DTYPES = {
    **{sitk.sitkUInt8: "u1", sitk.sitkInt8: "i1", sitk.sitkUInt16: "u2"},
    **{sitk.sitkInt16: "i2", sitk.sitkUInt32: "u4", sitk.sitkInt32: "i4"},
    **{sitk.sitkUInt64: "u8", sitk.sitkInt64: "i8"},
    **{sitk.sitkFloat32: "f4", sitk.sitkFloat64: "f8"},
    **{sitk.sitkVectorUInt8: "u1", sitk.sitkVectorInt8: "i1"},
    **{sitk.sitkVectorUInt16: "u2", sitk.sitkVectorInt16: "i2"},
    **{sitk.sitkVectorUInt32: "u4", sitk.sitkVectorInt32: "i4"},
    **{sitk.sitkVectorUInt64: "u8", sitk.sitkVectorInt64: "i8"},
    **{sitk.sitkVectorFloat32: "f4", sitk.sitkVectorFloat64: "f8"},
}


@dataclasses.dataclass(frozen=True)
class ItkImage:
    """One image's header, before its voxels are read.

    Attributes:
      path: the file.
      shape: as stored, (X, Y, Z, ...).
      affine_mm: 4x4, (i, j, k, 1) to RAS+ mm.
      reader: SimpleITK's, ready to execute.
      dtype: of the voxels.
      fields: of the text header, by name.
      header_bytes: how long that header is.
    """

    path: pathlib.Path
    shape: tuple[int, ...]
    affine_mm: np.ndarray
    reader: Any
    dtype: np.dtype
    fields: dict[str, str]
    header_bytes: int


def open_itk(path: pathlib.Path) -> ItkImage:
    """Reads the header of an NRRD or MetaImage file.

    Raises:
      UserError: it is damaged, or holds several numbers or complex ones per voxel.
    """
    fields, header_bytes = text_headers.check(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    _read_header(reader, path)
    pixel = reader.GetPixelID()
    name = sitk.GetPixelIDValueAsString(pixel)
    shape = tuple(reader.GetSize())
    if "complex" in name:
        raise UserError(
            f"{path} holds complex numbers, expected real ones; save the magnitude"
        )
    count = reader.GetNumberOfComponents()
    if count != 1:  # an axis of one component is none
        raise UserError(
            f"{path} is an RGB or vector image ({count} numbers per voxel), expected "
            "one number per voxel; extract one component or convert it to grey"
        )
    if reader.GetDimension() >= 3:
        _warn_of_guesses(fields, path)
    affine = affine_mm(reader, unit_mm(fields, path))
    dtype = np.dtype(_DTYPES.get(pixel, "V"))
    return ItkImage(path, shape, affine, reader, dtype, fields, header_bytes)


def affine_mm(reader: sitk.ImageFileReader, scale: float) -> np.ndarray:
    """Returns where voxels lie: 4x4, (i, j, k, 1) to RAS+ mm; the identity in 2D.

    Args:
      reader: that has read a header.
      scale: how many mm the header's unit of length is, see `unit_mm`.
    """
    n = reader.GetDimension()
    affine = np.eye(4)
    if n >= 3:
        direction = np.reshape(reader.GetDirection(), (n, n))[:3, :3]
        affine[:3, :3] = scale * direction * np.asarray(reader.GetSpacing()[:3])
        affine[:3, 3] = scale * np.asarray(reader.GetOrigin()[:3])
    return LPS @ affine


def _warn_of_guesses(fields: dict[str, str], path: pathlib.Path) -> None:
    """Warns of what a header leaves open, for which ITK takes the simplest."""
    size, offset, turn = (
        (text_headers.META_SIZE, text_headers.META_OFFSET, text_headers.META_TURN)
        if "NDims" in fields
        else (("space directions", "spacings"), ("space origin", "axis mins"), ())
    )
    guessed = []
    # In NRRD a number that is not known is written as NaN.
    if not any("nan" not in fields.get(name, "nan").lower() for name in size):
        guessed.append("the size of its voxels (taken as 1 mm)")
    if not any(name in fields for name in offset):
        guessed.append("where its first voxel is (taken as 0, 0, 0)")
    space = fields.get("space", "").lower()
    known = space.removesuffix("-time") in _NRRD_SPACES
    if not (any(name in fields for name in turn) if turn else known):
        named = f"; its space is {space}" if space else ""
        guessed.append(f"which way its axes run (taken as LPS{named})")
    if guessed:
        warnings.warn(
            f"{path}: its header does not say {' nor '.join(guessed)}; other programs "
            "may guess otherwise",
            stacklevel=2,
        )


def read_itk(image: ItkImage) -> np.ndarray:
    """Reads the voxels.

    Returns:
      The shape reversed, (..., Z, Y, X).

    Raises:
      UserError: they are damaged, end early, or there is not enough memory.
    """
    path = image.path
    size = math.prod(image.shape) * image.dtype.itemsize
    packed = _compressed(image)
    if packed is not None:
        source, start, wrapper, order = packed
        flat = files.read_bytes(source, size, start=start, wrapper=wrapper)
        stored = flat.view(image.dtype.newbyteorder(order))
        return nifti.native(stored).reshape(image.shape[::-1])
    if not path.is_dir():  # a series, each file of which GDCM looks after
        _check_size(image)
    files.check_memory(path, size)
    try:
        array = sitk.GetArrayFromImage(image.reader.Execute())
    except MemoryError as error:
        raise files.too_large(path, size) from error
    except RuntimeError as error:
        raise files.damaged(path, error) from error
    return array.reshape(image.shape[::-1])


def _read_header(reader: sitk.ImageFileReader, path: pathlib.Path) -> None:
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise files.damaged(path, error) from error


def unit_mm(fields: dict[str, str], path: pathlib.Path) -> float:
    """Returns how many mm the header's unit of length is; mm if it names none."""
    units = fields.get("space units")
    if units is None and "space" not in fields and "NDims" not in fields:
        units = fields.get("units")  # of each axis
    if units is not None:
        named = re.findall(r'"([^"]*)"', units)
        known: dict[str, float] = _NRRD_MM | _WORDS_MM
    elif "DistanceUnits" in fields:
        named, known = [fields["DistanceUnits"]], _META_MM
    else:
        return 1.0
    found = {name.strip() for name in named} - {"", "?", "???", "none"}
    scales = {known.get(unit, known.get(unit.lower().rstrip("s"))) for unit in found}
    if len(scales) > 1:
        raise UserError(
            f"{path} has axes in different units ({', '.join(sorted(found))}), "
            "expected one for all; repair its header"
        )
    scale = scales.pop() if scales else 1.0
    if scale is None:
        warnings.warn(
            f'{path}: its unit of length, "{found.pop()}", is unknown here and taken '
            "as mm",
            stacklevel=2,
        )
    return scale or 1.0


def _compressed(
    image: ItkImage,
) -> tuple[pathlib.Path, int, files.Wrapper, Literal["<", ">"]] | None:
    """Returns where compressed voxels are: file, first byte, wrapper and byte order.

    None where they are not compressed, or stored in a layout that is left to ITK.
    """
    fields, path = image.fields, image.path
    wrapper: files.Wrapper
    if fields.get("encoding", "").lower() in ("gzip", "gz"):
        if any(name.replace(" ", "") in ("lineskip", "byteskip") for name in fields):
            return None
        wrapper, big = "gzip", fields.get("endian", "little").lower() == "big"
        named = fields.get("data file", fields.get("datafile"))
    elif _is_true(fields, "CompressedData"):
        big = _is_true(fields, "BinaryDataByteOrderMSB")
        big |= _is_true(fields, "ElementByteOrderMSB")
        wrapper = "zlib"
        named = fields.get("ElementDataFile")
        named = None if named and named.upper() == "LOCAL" else named
    else:
        return None
    order: Literal["<", ">"] = ">" if big else "<"
    if named is None:
        return path, image.header_bytes, wrapper, order
    source = path.parent / named
    if not os.path.isfile(source):  # Path.is_file raises on a name that is too long
        if wrapper == "gzip":  # a list of files or a pattern, whose checksums ITK sees
            return None
        raise UserError(
            f"{path} names the compressed voxels {named}, which is not one file beside "
            "it; fetch it as well, or convert the image to .nii.gz"
        )
    skip = fields.get("HeaderSize", "0")
    return source, int(skip) if skip.isdigit() else 0, wrapper, order


def _is_true(fields: dict[str, str], name: str) -> bool:
    return fields.get(name, "")[:1] in ("t", "T", "1")  # as MetaIO reads it


def _check_size(image: ItkImage) -> None:
    """Checks that uncompressed voxels can be in the file, before memory is taken."""
    fields, path = image.fields, image.path
    named = fields.get("data file", fields.get("datafile"))
    named = fields.get("ElementDataFile", named)
    source, start = path, image.header_bytes
    if named and named.upper() != "LOCAL":
        source, start = path.parent / named, 0
        if not os.path.isfile(source):
            return  # a list or a pattern
    voxels = math.prod(image.shape)
    encoding = fields.get("encoding", "raw").lower()
    text = encoding in ("ascii", "text", "txt")
    text |= "BinaryData" in fields and not _is_true(fields, "BinaryData")
    if text:
        size = 2 * voxels - 1
    else:
        size = voxels * image.dtype.itemsize * (2 if encoding == "hex" else 1)
    if encoding in ("gzip", "gz", "bzip2", "bz2"):
        return  # several files, or what this ITK does not read
    there = source.stat().st_size - start
    if size > there:
        short = f"its header claims {size} bytes of voxels, {source.name} has {there}"
        raise files.damaged(path, EOFError(short))
