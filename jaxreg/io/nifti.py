"""NIfTI files: header, place in space, and voxels.

nibabel names the fields; the reading is here, so that a damaged header is refused in a
sentence before memory is taken for what it claims, a gzip's checksum is compared, and
the voxels are in memory once.

References:
  nifti1.h and nifti1_io.c, nifti_quatern_to_mat44 (NIfTI-1 Data Format Working Group);
  RFC 1952 (gzip).
"""

import dataclasses
import math
import pathlib
import warnings

import numpy as np
from nibabel import nifti1, nifti2, spatialimages

from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.space.grid import Grid

Header = nifti1.Nifti1Header

UNITS_MM = {1: ("metre", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}
"""XYZT_UNITS' codes of lengths, and how many mm each is; any other is unknown: mm."""

_FIRST = 560  # bytes that hold a header of either version
_KNOWN_CODES = range(
    1, 6
)  # of qform and sform: scanner, aligned, Talairach, MNI, other
_QUATERNION_ROUNDING = 0.02  # of its squared length, by components of two decimals
_PLAUSIBLE_MM = (1e-4, 100.0)  # the sides of a voxel


@dataclasses.dataclass(frozen=True)
class Nifti:
    """One file's header, checked, before its voxels are read.

    Attributes:
      path: the file.
      header: nibabel's, of either version and byte order.
      shape: as stored, (X, Y, Z, ...).
      dtype: as stored, in the file's byte order; fields for RGB.
      scale: (slope, intercept) of the stored values, None if they are the values.
    """

    path: pathlib.Path
    header: Header
    shape: tuple[int, ...]
    dtype: np.dtype
    scale: tuple[float, float] | None

    def field(self, name: str) -> float:
        """Returns a number of the header."""
        return float(self.header.structarr[name])


def open_nifti(path: pathlib.Path) -> Nifti:
    """Reads and checks a header.

    Args:
      path: a NIfTI-1 or NIfTI-2 file with its voxels in it, compressed by gzip or not.

    Raises:
      UserError: it is no such file, or a field cannot be.
    """
    try:
        block = _first_bytes(path)
    except files.READ_ERRORS as error:
        raise files.damaged(path, error) from error
    header = _header(block, path)
    fields = header.structarr
    count = int(fields["dim"][0])
    try:
        dtype = header.get_data_dtype()
    except (spatialimages.HeaderDataError, KeyError):
        dtype = np.dtype(np.void)
    if dtype.kind not in "iufc" and dtype.fields is None:
        raise UserError(
            f"{path} has the data type {int(fields['datatype'])}, which NIfTI does not "
            "know; the header may be damaged, write or fetch the file again"
        )
    shape = tuple(int(n) for n in fields["dim"][1 : count + 1])
    if min(shape) < 1:
        raise UserError(
            f"{path} has no voxels ({' x '.join(map(str, shape))}); give another image"
        )
    offset = float(fields["vox_offset"])
    if offset and not (_header_size(header) <= offset < 2**62 and offset.is_integer()):
        raise UserError(
            f"{path} says that its voxels start at byte {offset:g}, inside the header; "
            "the header may be damaged, write or fetch the file again"
        )
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    scaled = math.isfinite(slope) and slope != 0 and (slope, inter) != (1.0, 0.0)
    if scaled and not math.isfinite(inter):
        raise UserError(
            f"{path} has the intercept {inter:g} beside the slope {slope:g}, expected "
            "a finite number; repair scl_inter in its header"
        )
    return Nifti(path, header, shape, dtype, (slope, inter) if scaled else None)


def read_voxels(file: Nifti) -> np.ndarray:
    """Reads the stored numbers, without slope and intercept.

    Returns:
      The shape reversed, (..., Z, Y, X), in the machine's byte order, contiguous.

    Raises:
      UserError: the file ends early, its gzip checksum does not fit, or there is
        not enough memory.
    """
    path, dtype = file.path, file.dtype
    start = int(file.header["vox_offset"]) or _data_offset(file.header)
    size = math.prod(file.shape) * dtype.itemsize
    packed = _is_packed(path)
    flat = files.read_bytes(path, size, skip=start, wrapper="gzip" if packed else None)
    return native(flat.view(dtype)).reshape(file.shape[::-1])


def native(array: np.ndarray) -> np.ndarray:
    """Returns an array in the machine's byte order, swapped in place if need be."""
    if array.dtype.isnative:
        return array
    return array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))


def affine_mm(file: Nifti) -> np.ndarray:
    """Returns where a file's voxels lie: 4x4, (i, j, k, 1) to RAS+ mm.

    The sform if its code is set, else the qform, else the voxel sizes around the
    centre, in mm by the header's unit of length. An sform that is no place (of zeros,
    flat or not finite) gives way to a qform that is one. What is doubtful is warned
    about.

    Raises:
      UserError: sform and qform are both set and neither is a place.
    """
    path = file.path
    for form in ("sform", "qform"):
        code = int(file.header[f"{form}_code"])
        if code > 0 and code not in _KNOWN_CODES:
            _warn(f"{path}: {form}_code is {code}, which has no meaning; taken as set")
    unit, scale = unit_mm(file)
    affine = np.diag([scale, scale, scale, 1.0]) @ _chosen_form(file)
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = _PLAUSIBLE_MM
    if scale != 1 and not (low <= sides.min() and sides.max() <= high):
        _warn(
            f"{path}: its lengths are in {unit} by its header (xyzt_units), so that a "
            f"voxel has {' x '.join(f'{side:g}' for side in sides)} mm; check that"
        )
    return affine


def _chosen_form(file: Nifti) -> np.ndarray:
    """Returns sform, qform or a guess, in the header's unit; see `affine_mm`."""
    path = file.path
    has_qform = int(file.header["qform_code"]) > 0
    sform = _sform(file) if int(file.header["sform_code"]) > 0 else None
    qform = _qform(file) if has_qform else None
    if sform is not None and is_place(sform):
        if has_qform and not _agree(file, sform, qform):
            _warn(
                f"{path}: qform and sform differ; the sform is used here, "
                "other programs (ITK) may use the qform"
            )
        return sform
    if qform is not None and is_place(qform):
        if sform is not None:
            _warn(f"{path}: its sform is no place in space; its qform is used")
        return qform
    if sform is not None and has_qform:
        raise UserError(
            f"{path} has an sform and a qform, and neither is a place in space (three "
            "independent directions of finite length); repair its header"
        )
    if has_qform and qform is None:
        raise UserError(
            f"{path} has a qform that is no rotation (quatern_b, c, d of "
            f"{', '.join(f'{n:g}' for n in _quaternion(file))}); repair its header"
        )
    for form in (sform, qform):
        if form is not None:
            return form  # the check of the grid says what is wrong with it
    _warn(
        f"{path}: neither qform nor sform is set; its place in space is a guess "
        "from the voxel sizes, other programs may guess otherwise"
    )
    return _guess(file)


def is_place(affine: np.ndarray) -> bool:
    """Whether a 4x4 affine is finite and its axes three independent directions."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (lengths > 0).all():
        return False
    return abs(np.linalg.det(affine[:3, :3] / lengths)) >= 1e-6


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _first_bytes(path: pathlib.Path) -> bytes:
    with path.open("rb") as opened:
        if not _is_packed(path):
            return opened.read(_FIRST)
        found = b""
        for part in files.inflated(opened, path):
            found += part
            if len(found) >= _FIRST:
                break
        return found[:_FIRST]


def _is_packed(path: pathlib.Path) -> bool:
    try:
        with path.open("rb") as opened:
            return opened.read(2) == files.GZIP
    except OSError as error:
        raise files.damaged(path, error) from error


def _header(block: bytes, path: pathlib.Path) -> Header:
    """Returns the header of either version, whose magic and dim[0] tell it."""
    versions = (
        (nifti1.Nifti1Header, block[344:348], (b"n+1\0",), 40, 2),
        (nifti2.Nifti2Header, block[4:8], (b"n+2\0",), 16, 8),
    )
    for kind, magic, known, at, size in versions:
        if magic not in known or len(block) < kind.template_dtype.itemsize:
            continue
        for order in ("<", ">"):
            field = block[at : at + size]
            count = int.from_bytes(field, "little" if order == "<" else "big")
            if 1 <= count <= 7:
                raw = block[: kind.template_dtype.itemsize]
                return kind(raw, endianness=order, check=False)
        raise UserError(
            f"{path} has a damaged header (dim[0] is no number from 1 to 7); write or "
            "fetch the file again"
        )
    if block[344:348] == b"ni1\0" or block[4:8] == b"ni2\0":
        raise UserError(
            f"{path} is the header of a pair of files (.hdr and .img), expected one "
            "file; convert the pair to .nii.gz"
        )
    reason = ValueError("it has no NIfTI magic")
    raise files.damaged(path, reason) from reason


def _header_size(header: Header) -> int:
    return type(header).template_dtype.itemsize


def _data_offset(header: Header) -> int:
    return _header_size(header) + 4


def _sform(file: Nifti) -> np.ndarray:
    affine = np.eye(4)
    affine[:3] = [file.header[f"srow_{axis}"] for axis in "xyz"]
    return affine


def _quaternion(file: Nifti) -> list[float]:
    return [file.field(f"quatern_{name}") for name in "bcd"]


def _qform(file: Nifti) -> np.ndarray | None:
    """Returns the qform as nifti_quatern_to_mat44 has it; None if it is no rotation.

    A first component below rounding is 0, and the others get the length 1. Voxel sizes
    that are 0 or not finite make no place.
    """
    b, c, d = _quaternion(file)
    length = b * b + c * c + d * d
    if not length <= 1 + _QUATERNION_ROUNDING:  # NaN too
        return None
    rest = 1.0 - length
    if rest < 1e-7:
        a, scale = 0.0, 1 / math.sqrt(length)
        b, c, d = b * scale, c * scale, d * scale
    else:
        a = math.sqrt(rest)
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    sizes = np.abs(np.asarray(file.header["pixdim"][:4], np.float64))
    left_handed = float(file.header["pixdim"][0]) < 0
    affine = np.eye(4)
    affine[:3, :3] = turn * sizes[1:] * [1, 1, -1 if left_handed else 1]
    affine[:3, 3] = [file.field(f"qoffset_{axis}") for axis in "xyz"]
    return affine


def _guess(file: Nifti) -> np.ndarray:
    """Returns nibabel's affine of a header without a place, its sizes not negative."""
    header = file.header.copy()
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    return header.get_base_affine()


def _agree(file: Nifti, sform: np.ndarray, qform: np.ndarray | None) -> bool:
    if qform is None or not is_place(qform):
        return False
    shape = file.shape[:3]
    return Grid(shape, sform).matches(Grid(shape, qform))


def unit_mm(file: Nifti) -> tuple[str, float]:
    """Returns the header's unit of length and how many mm it is; unknown is mm."""
    code = int(file.header["xyzt_units"]) & 7
    return UNITS_MM.get(code, ("unknown", 1.0))
