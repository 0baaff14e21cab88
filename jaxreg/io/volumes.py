"""Scans and label maps on disk: NIfTI, NRRD and MHA to `Volume` and back.

NIfTI's world is RAS+ mm, as jaxreg's. NRRD and MHA come through SimpleITK, whose world
is LPS mm: the first two world axes change sign here.
"""

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel import nifti1

from jaxreg.errors import UserError
from jaxreg.io import dicom, files, itk_images, nifti
from jaxreg.space.grid import Grid, Shape, Volume

Kind = Literal["image", "labels", "mask", "stored"]
"""What a file is read as.

image: intensities as float32; a constant one is refused.
labels: whole numbers from 0 on in the stored integer type, int32 where floats were
  stored. Negative ones are refused: background in one program, labels in another.
mask: whole numbers as stored, above 0 is inside; fractions become uint8
  ``value > 0.5`` (the original truncates: 0.7 is outside there). Empty is refused.
stored: intensities in the stored type (float32 where the file scales them), for
  resampling back into that type.
"""

NIFTI = (".nii", ".nii.gz")
ITK_READ = (".nrrd", ".nhdr", ".mha", ".mhd")

MAX_VOXELS = 2**31
"""Refused before reading: a damaged header may claim more than any memory."""

_SIDES_MM = (1e-7, 1e5)
"""The sides of a voxel, from an atom's size to 100 m: others are a damaged header."""

_FARTHEST = 1e9
"""How many voxels away from the origin float64 still places to a millionth of one."""

_no_overflow = np.errstate(over="ignore", invalid="ignore")
"""For the numbers of damaged headers: what is not finite is refused in a sentence."""

_VECTOR_INTENTS = range(1004, 1012)
"""NIfTI's codes for several numbers per voxel, from matrix to quaternion."""


_EXACT_FLOAT32 = 2**24
"""Whole numbers up to this one are all different in float32."""

_ROUNDING = 2.0**-22
"""What float32 leaves of a whole number's fraction, for its size: four half units."""


def read_volume(path: files.PathLike, *, kind: Kind = "image") -> Volume:
    """Reads a scan, a label map or a mask.

    Args:
      path: .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd.
      kind: see `Kind`.

    Returns:
      A volume, D H W, whose source is the path. NIfTI's affine is the sform if its code
      is set, else the qform; a warning is given when both are set and differ.

    Raises:
      UserError: the file is missing, damaged, of another type, not one real 3D volume,
        without a usable place in space, or its values do not suit `kind`.
    """
    path = check_source(path, _noun(kind))
    values, grid = _open(path)
    return Volume(_checked_values(values(kind), kind, path), grid, str(path))


def read_grid(path: files.PathLike) -> Grid:
    """Reads where a scan lies, without its voxels.

    Raises:
      UserError: as `read_volume`, as far as the header shows it.
    """
    return _open(check_source(path, "image"))[1]


def check_source(path: files.PathLike, what: str = "image") -> pathlib.Path:
    """Checks that a scan is there: a file, or the folder of a DICOM series.

    Args:
      path: see `read_volume`.
      what: its role in the sentence: "image", "--fixed", ...

    Raises:
      UserError: as `files.check_readable`, but for folders.
    """
    path = pathlib.Path(path)
    if os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK):
        return path
    return files.check_readable(path, what)


def check_volume_path(path: files.PathLike, option: str = "output") -> pathlib.Path:
    """Checks that `write_volume` can write there, before any work.

    Raises:
      UserError: the extension cannot be written, or `files.check_writable` refuses.
    """
    path = pathlib.Path(path)
    suffix = files.full_suffix(path).lower()
    known = [name for name, format_ in FORMATS.items() if format_.write]
    if suffix not in known:
        raise UserError(
            f"{option} {path} has the extension {suffix or '(none)'}, expected one of "
            f"{', '.join(known)}; rename it"
        )
    return files.check_writable(path, option)


def write_volume(path: files.PathLike, volume: Volume) -> None:
    """Writes a volume in its array's type, whole or not at all.

    NIfTI gets qform and sform with the same code and no intensity scaling; a sheared
    grid, which a qform cannot hold, gets the sform alone.

    Args:
      path: .nii, .nii.gz, .nrrd or .mha.
      volume: what to write; booleans become uint8, float16 float32.

    Raises:
      UserError: the path cannot be written, or the format cannot hold a sheared grid.
    """
    path = check_volume_path(path)
    array = np.asarray(volume.array)
    storable = {"bool": np.uint8, "float16": np.float32}
    array = array.astype(storable.get(str(array.dtype), array.dtype), copy=False)
    write = FORMATS[files.full_suffix(path).lower()].write
    assert write is not None
    write(path, array, volume.grid)


def check_labels(array: np.ndarray, source: object) -> None:
    """Checks that a label map has no negative numbers.

    They stand for voxels without a label in some sets, and where labels above 127 were
    stored as int8 they are labels.

    Args:
      array: whole numbers.
      source: what to call the label map.

    Raises:
      UserError: there are some.
    """
    low = array.min()
    if low < 0:
        raise UserError(
            f"label map {source} has negative labels (down to {low}), expected 0 for "
            "background and positive labels; renumber it (voxels without a label to "
            "0; labels above 127 do not fit into int8)"
        )


def check_storable(value: float, volume: Volume) -> None:
    """Checks that a volume's pixel type can hold a fill value.

    Raises:
      UserError: it does not have it.
    """
    dtype = volume.array.dtype
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        # What is not finite is not within the limits.
        if not (limits.min <= value <= limits.max and value == round(value)):
            raise UserError(
                f"`fill` is {value:g}, but {volume.source} holds {dtype} numbers; pass "
                f"a whole number from {limits.min} to {limits.max}"
            )
    elif math.isfinite(value) and abs(value) > np.finfo(dtype).max:
        raise UserError(
            f"`fill` is {value:g}, but {volume.source} holds {dtype} numbers; pass one "
            f"of at most {np.finfo(dtype).max:g}"
        )


@_no_overflow
def read_nifti_vectors(path: files.PathLike) -> tuple[np.ndarray, Grid, str]:
    """Reads a NIfTI of three numbers per voxel, shape (X, Y, Z, 1, 3).

    Returns:
      (vectors, grid, intent): D H W 3 as stored, and the intent's name, e.g. "vector".

    Raises:
      UserError: the file is missing, damaged or of another shape.
    """
    path = files.check_readable(path, "displacement field")
    _known_suffix(path, NIFTI)
    file = nifti.open_nifti(path)
    shape = file.shape
    if len(shape) != 5 or shape[3:] != (1, 3) or file.dtype.kind not in "iuf":
        raise UserError(
            f"{path} has shape {' x '.join(map(str, shape))}, a NIfTI displacement "
            "field has X x Y x Z x 1 x 3 real numbers (4D would be a time series); "
            "write it as ITK and ANTs do, in LPS mm"
        )
    space = _spatial_shape(shape[:3], path)
    grid = Grid(space, _reversed_columns(nifti.affine_mm(file)))
    check_grid(grid, path)
    unit, scale = nifti.unit_mm(file)
    if scale != 1:
        warnings.warn(
            f"{path} counts lengths in {unit} by its header (xyzt_units); its grid is "
            "taken so, its vectors in mm, as ITK takes them",
            stacklevel=2,
        )
    array = nifti.read_voxels(file)  # 3 1 D H W
    vectors = np.moveaxis(array[:, 0], 0, -1).astype(np.float32)
    if file.scale is not None:
        slope, inter = file.scale
        vectors = (vectors.astype(np.float64) * slope + inter).astype(np.float32)
    return vectors, grid, _intent(file)


def nifti_image(array: np.ndarray, grid: Grid) -> nifti1.Nifti1Image:
    """Returns a NIfTI image of an array D H W (or D H W 1 C, for vectors) on a grid."""
    affine = _reversed_columns(grid.affine_mm)
    stored = array.transpose(2, 1, 0, *range(3, array.ndim))
    image = nifti1.Nifti1Image(stored, affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    # A qform is rotation and spacing: with shear it would be another place.
    image.set_qform(affine, code="unknown" if _is_sheared(affine) else "scanner")
    return image


@_no_overflow
def check_grid(grid: Grid, path: files.PathLike) -> None:
    """Checks that a grid is a place that a scan may have.

    Args:
      grid: the grid.
      path: whose it is, for the sentence.

    Raises:
      UserError: it is not finite, or flat, or of sizes that no voxel has.
    """
    affine = grid.affine_mm
    if not np.isfinite(affine[:3, 3]).all():
        raise UserError(
            f"{path} has its first voxel at {affine[:3, 3].tolist()} mm, expected "
            "finite numbers; repair its header"
        )
    lengths = grid.spacing_mm
    shortest, longest = _SIDES_MM
    # Written so that NaN is refused.
    if not ((shortest <= lengths) & (lengths <= longest)).all():
        sides = ", ".join(f"{length:.6g}" for length in lengths[::-1])
        raise UserError(
            f"{path} has voxel spacing [{sides}] mm, expected positive numbers from "
            f"{shortest:g} to {longest:g}; repair its header"
        )
    away = np.abs(affine[:3, 3]).max()
    if away > _FARTHEST * lengths.min():
        raise UserError(
            f"{path} has its first voxel {away:.6g} mm from the origin of space, where "
            f"voxels of {lengths.min():.6g} mm cannot be told apart; repair its header"
        )
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise UserError(
            f"{path} has a singular affine (its axes lie in one plane), expected three "
            "independent directions; repair its header"
        )


def _noun(kind: Kind) -> str:
    return {"labels": "label map", "mask": "mask"}.get(kind, "image")


def _known_suffix(path: pathlib.Path, known: tuple[str, ...]) -> str:
    suffix = files.full_suffix(path).lower()
    if suffix not in known:
        raise UserError(
            f"{path} has the extension {suffix or '(none)'}, expected one of "
            f"{', '.join(known)}; convert it"
        )
    return suffix


def _reversed_columns(affine: np.ndarray) -> np.ndarray:
    """Array order (d, h, w) to file order (i, j, k) and back."""
    return affine[:, [2, 1, 0, 3]]


def _is_sheared(affine: np.ndarray) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4)


def _spatial_shape(shape: tuple[int, ...], path: pathlib.Path) -> Shape:
    """Returns (D, H, W) of a header's shape (X, Y, Z), or says what is wrong."""
    full = " x ".join(map(str, shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise UserError(
            f"{path} is a {len(shape)}D image of {full}, expected one 3D volume; "
            "extract a single volume (time point or component) first"
        )
    if len(shape) < 3 or min(shape) == 1:
        raise UserError(
            f"{path} is a 2D image of {full}, expected a 3D volume of at least 2 "
            "voxels along each axis; give a volume"
        )
    if min(shape) < 1:
        raise UserError(f"{path} has no voxels ({full}); give another image")
    if np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise UserError(
            f"{path} claims {full} voxels, at most {MAX_VOXELS} are read; the header "
            "may be damaged, otherwise resample the image"
        )
    return shape[2], shape[1], shape[0]


@_no_overflow
def _open(path: pathlib.Path) -> tuple[Callable[[Kind], np.ndarray], Grid]:
    """Reads a header; returns what reads the voxels, D H W, and the grid."""
    format_ = _DICOM if dicom.is_dicom(path) else FORMATS[_known_suffix(path, READ)]
    file = format_.open(path)
    shape = _spatial_shape(file.shape, path)
    grid = Grid(shape, _reversed_columns(format_.affine_mm(file)))
    check_grid(grid, path)
    return lambda kind: format_.values(file, kind).reshape(shape), grid


def _open_nifti(path: pathlib.Path) -> nifti.Nifti:
    file = nifti.open_nifti(path)
    _check_one_number(file)
    return file


def _check_one_number(file: nifti.Nifti) -> None:
    """Refuses what has not one real number per voxel, and names what it is."""
    path, shape = file.path, file.shape
    full = " x ".join(map(str, shape))
    if file.dtype.fields is not None:
        raise UserError(
            f"{path} is an RGB or vector image ({len(file.dtype.fields)} colours per "
            "voxel), expected one number per voxel; convert it to grey"
        )
    if file.dtype.kind == "c":
        raise UserError(
            f"{path} holds complex numbers, expected real ones; save the magnitude"
        )
    many = math.prod(shape[3:]) > 1
    if many and int(file.header["intent_code"]) in _VECTOR_INTENTS:
        raise UserError(
            f"{path} is an RGB or vector image of {full} (intent: {_intent(file)}), "
            "expected one number per voxel; extract one component"
        )
    if len(shape) >= 5 and shape[3] == 1 and many:
        kind = "displacement field" if shape[4] == 3 else "vector image"
        raise UserError(
            f"{path} is a {len(shape)}D image of {full}, {math.prod(shape[4:])} "
            f"numbers per voxel as in a {kind}, expected one; extract one component, "
            "or give the file as the transform if it is one"
        )


def _intent(file: nifti.Nifti) -> str:
    code = int(file.header["intent_code"])
    known = code in nifti1.intent_codes.code
    return str(nifti1.intent_codes.label[code] if known else code)


def _nifti_values(file: nifti.Nifti, kind: Kind) -> np.ndarray:
    """Returns a file's values, D H W: as stored, or scaled by slope and intercept."""
    array = nifti.read_voxels(file)
    array = array.reshape(array.shape[-3:])
    if array.dtype.itemsize > 8:  # long double, which no later stage takes
        array = array.astype(np.float64)
    if file.scale is None:
        return array
    return _scaled(array, *file.scale, whole=kind != "image")


@_no_overflow
def _scaled(
    array: np.ndarray, slope: float, inter: float, *, whole: bool
) -> np.ndarray:
    """Returns ``slope * array + inter`` as float32, or as float64 what needs it.

    Args:
      array: as stored, D H W.
      slope: not 0.
      inter: finite.
      whole: make whole numbers of what they may have been before they were stored, see
        `_is_whole`; those beyond float32's exact ones become float64.
    """
    whole = whole and _is_whole(array, slope, inter)
    most = max(abs(float(end) * slope + inter) for end in (array.min(), array.max()))
    wide = whole and most > _EXACT_FLOAT32
    out = np.empty(array.shape, np.float64 if wide else np.float32)
    for stored, scaled in zip(array, out, strict=True):  # float64 of one slice at once
        values = stored.astype(np.float64) * slope + inter
        scaled[:] = np.rint(values) if whole else values
    return out


@_no_overflow
def _is_whole(array: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> bool:
    """Whether ``slope * array + inter`` are whole numbers but for their storage.

    A writer that scales rounds (value - inter) / slope to an integer, half a slope at
    most, and slope, intercept and product to float32. Half a slope counts where the
    slope is at most 1/2: only then has every whole number an integer of its own, and
    no single step of the scale passes for a whole number.
    """
    integers = not np.issubdtype(array.dtype, np.floating)
    step = abs(slope) / 2 if integers and abs(slope) <= 0.5 else 0.0
    for stored in array:
        product = stored.astype(np.float64) * slope
        gap = np.abs(product + inter - np.rint(product + inter))
        allowed = step + _ROUNDING * (np.abs(product) + abs(inter))
        if not (gap <= np.minimum(allowed, 0.25)).all():  # NaN is not
            return False
    return True


def _write_nifti(path: pathlib.Path, array: np.ndarray, grid: Grid) -> None:
    with files.atomic_path(path) as temporary:
        nib.save(nifti_image(array, grid), temporary)


def _write_itk(path: pathlib.Path, array: np.ndarray, grid: Grid) -> None:
    image = _itk_image(array, grid, path)
    with files.atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise UserError(
                f"{path} cannot be written: {files.last_line(error)}"
            ) from error


def _itk_image(array: np.ndarray, grid: Grid, path: pathlib.Path) -> sitk.Image:
    affine = itk_images.LPS @ _reversed_columns(grid.affine_mm)
    if _is_sheared(affine):
        raise UserError(
            f"{path} cannot hold a sheared voxel grid, its format knows rotation and "
            "spacing only; write .nii.gz"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


def _checked_values(array: np.ndarray, kind: Kind, path: pathlib.Path) -> np.ndarray:
    if kind == "image":
        with np.errstate(over="ignore"):  # reported below, as what it became
            array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise UserError(
                f"{path} has {bad} voxels that are NaN or infinite, expected finite "
                "numbers; replace them first"
            )
    if kind == "image" and array.min() == array.max():
        raise UserError(
            f"{path} is constant ({array.flat[0]:g} everywhere), there is nothing to "
            "register; check that it is the right file"
        )
    if kind == "labels":
        array = _whole_numbers(array, path)
        check_labels(array, path)
    if kind == "mask":
        if np.issubdtype(array.dtype, np.floating):
            whole = _is_whole(array)
            array = (
                _whole_numbers(array, path) if whole else np.uint8(1) * (array > 0.5)
            )
        if not (array > 0).any():
            raise UserError(
                f"mask {path} is empty (no voxel above 0); give a mask that covers "
                "what counts, or leave it out"
            )
    return array


def _whole_numbers(array: np.ndarray, path: pathlib.Path) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if not _is_whole(array):
        fractions = array[np.abs(array - np.rint(array)) > _ROUNDING * np.abs(array)]
        raise UserError(
            f"label map {path} has {fractions.size} voxels with fractional values "
            f"(e.g. {fractions.flat[0]:g}), expected whole numbers; was it resampled "
            "with linear interpolation? resample it with nearest neighbour"
        )
    most = max(abs(float(array.min())), abs(float(array.max())))
    if most > np.iinfo(np.int32).max:
        raise UserError(
            f"label map {path} has values beyond 32-bit integers stored as floats, "
            "which may have lost digits; renumber its labels"
        )
    if array.dtype == np.float32 and most > _EXACT_FLOAT32:
        warnings.warn(
            f"label map {path} has labels up to {most:.0f} in 32-bit floats, which "
            f"tell whole numbers apart up to {_EXACT_FLOAT32} only; renumber them",
            stacklevel=2,
        )
    labels = np.empty(array.shape, np.int32)
    for stored, whole in zip(array, labels, strict=True):
        whole[:] = np.rint(stored)
    return labels


@dataclasses.dataclass(frozen=True)
class _Format:
    """One file format of scans.

    Attributes:
      open: reads the header of a path, refuses all but one real number per voxel, and
        has the `shape` (X, Y, Z, ...).
      affine_mm: of what `open` returned: 4x4, (i, j, k, 1) to RAS+ mm.
      values: of what `open` returned and the kind: the voxels, last axes Z, Y, X.
      write: to a path an array D H W on a grid; None if the format is only read.
    """

    open: Callable[[pathlib.Path], Any]
    affine_mm: Callable[[Any], np.ndarray]
    values: Callable[[Any, Kind], np.ndarray]
    write: Callable[[pathlib.Path, np.ndarray, Grid], None] | None = None


_NIFTI = _Format(_open_nifti, nifti.affine_mm, _nifti_values, _write_nifti)
_ITK = _Format(
    itk_images.open_itk,
    lambda file: file.affine_mm,
    lambda file, _: itk_images.read_itk(file),
    _write_itk,
)
_DICOM = _Format(
    dicom.open_series,
    lambda file: file.affine_mm,
    lambda file, _: dicom.read_voxels(file),
)
FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        **dict.fromkeys(NIFTI, _NIFTI),
        **dict.fromkeys(ITK_READ, dataclasses.replace(_ITK, write=None)),
        **dict.fromkeys((".nrrd", ".mha"), _ITK),
    }
)
"""By extension in small letters; DICOM goes by content."""
READ = tuple(FORMATS)
"""What is read."""
