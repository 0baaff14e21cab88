"""Scans and label maps on disk: NIfTI, NRRD and MHA to `Volume` and back.

NIfTI's world is RAS+ mm, as jaxreg's. NRRD and MHA come through SimpleITK, whose world
is LPS mm: the first two world axes change sign here.
"""

import gzip
import pathlib
import warnings
import zlib
from typing import Any, Literal

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel import filebasedimages, nifti1, spatialimages

from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.space.grid import Grid, Shape, Volume

Kind = Literal["image", "labels", "mask", "stored"]
"""What a file is read as.

image: intensities as float32; a constant one is refused.
labels: whole numbers in the stored integer type, int32 where floats were stored.
mask: whole numbers as stored, above 0 is inside; fractions become uint8
  ``value > 0.5`` (the original truncates: 0.7 is outside there). Empty is refused.
stored: intensities in the stored type (float32 where the file scales them), for
  resampling back into that type.
"""

NIFTI = (".nii", ".nii.gz")
ITK_READ = (".nrrd", ".nhdr", ".mha", ".mhd")
ITK_WRITE = (".nrrd", ".mha")

MAX_VOXELS = 2**31
"""Refused before reading: a damaged header easily asks for more than any memory."""

_VECTOR_INTENTS = range(1004, 1012)
"""NIfTI's codes for several numbers per voxel, from matrix to quaternion."""

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    gzip.BadGzipFile,
    filebasedimages.ImageFileError,
    spatialimages.HeaderDataError,
)


def read_volume(path: files.PathLike, *, kind: Kind = "image") -> Volume:
    """Reads a scan, a label map or a mask.

    Args:
      path: .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd.
      kind: see `Kind`.

    Returns:
      A volume, D H W, whose source is the path. NIfTI's affine is the sform if its code
      is set, else the qform; a warning says when both are set and differ.

    Raises:
      UserError: the file is missing, damaged, of another type, not one real 3D volume,
        without a usable place in space, or its values do not suit `kind`.
    """
    path = files.check_readable(path, _noun(kind))
    suffix = _known_suffix(path, (*NIFTI, *ITK_READ))
    array, grid = _read_nifti(path) if suffix in NIFTI else _read_itk(path)
    _check_grid(grid, path)
    return Volume(_checked_values(array, kind, path), grid, str(path))


def read_grid(path: files.PathLike) -> Grid:
    """Reads where a scan lies, without its voxels.

    Raises:
      UserError: as `read_volume`, as far as the header shows it.
    """
    path = files.check_readable(path, "image")
    suffix = _known_suffix(path, (*NIFTI, *ITK_READ))
    grid = _open_nifti(path)[1] if suffix in NIFTI else _open_itk(path)[1]
    _check_grid(grid, path)
    return grid


def check_volume_path(path: files.PathLike, option: str = "output") -> pathlib.Path:
    """Checks that `write_volume` can write there, before any work.

    Raises:
      UserError: the extension cannot be written, or `files.check_writable` refuses.
    """
    path = pathlib.Path(path)
    suffix = files.full_suffix(path).lower()
    if suffix not in (*NIFTI, *ITK_WRITE):
        raise UserError(
            f"{option} {path} has the extension {suffix or '(none)'}, expected one of "
            f"{', '.join((*NIFTI, *ITK_WRITE))}; rename it"
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
    if files.full_suffix(path).lower() in NIFTI:
        with files.atomic_path(path) as temporary:
            nib.save(nifti_image(array, volume.grid), temporary)
        return
    image = _itk_image(array, volume.grid, path)
    with files.atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be written: {_last_line(error)}") from error


def check_storable(value: float, volume: Volume) -> None:
    """Checks that a volume's pixel type can hold a fill value.

    Raises:
      UserError: it is a type of integers that does not have it.
    """
    dtype = volume.array.dtype
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        if value != round(value) or not limits.min <= value <= limits.max:
            raise UserError(
                f"--fill is {value:g}, but {volume.source} holds {dtype} numbers; pass "
                f"a whole number from {limits.min} to {limits.max}"
            )


def read_nifti_vectors(path: files.PathLike) -> tuple[np.ndarray, Grid, str]:
    """Reads a NIfTI of three numbers per voxel, shape (X, Y, Z, 1, 3).

    Returns:
      (vectors, grid, intent): D H W 3 as stored, and the intent's name, e.g. "vector".

    Raises:
      UserError: the file is missing, damaged or of another shape.
    """
    path = files.check_readable(path, "displacement field")
    _known_suffix(path, NIFTI)
    image = _load_nifti(path)
    shape, dtype = image.shape, image.get_data_dtype()
    real = dtype.fields is None and not np.issubdtype(dtype, np.complexfloating)
    if len(shape) != 5 or shape[3:] != (1, 3) or not real:
        raise UserError(
            f"{path} has shape {' x '.join(map(str, shape))}, a NIfTI displacement "
            "field has X x Y x Z x 1 x 3 real numbers (4D would be a time series); "
            "write it as ITK and ANTs do, in LPS mm"
        )
    grid = _nifti_grid(image, shape[:3], path)
    _check_grid(grid, path)
    try:
        array = np.asanyarray(image.dataobj, dtype=np.float32)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    vectors = array[:, :, :, 0].transpose(2, 1, 0, 3)
    return vectors, grid, image.header.get_intent()[0]


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


def _damaged(path: pathlib.Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read, it may be truncated or of another format "
        f"({_last_line(error)}); write or fetch it again"
    )


def _last_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[-1].strip().rstrip(".") if text else type(error).__name__


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


def _check_grid(grid: Grid, path: pathlib.Path) -> None:
    affine = grid.affine_mm
    lengths = grid.spacing_mm
    if not np.isfinite(affine).all() or (lengths <= 0).any():
        raise UserError(
            f"{path} has voxel spacing {np.round(lengths[::-1], 6).tolist()} mm, "
            "expected positive numbers; repair its header"
        )
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise UserError(
            f"{path} has a singular affine (its axes lie in one plane), expected three "
            "independent directions; repair its header"
        )


def _load_nifti(path: pathlib.Path) -> Any:
    """Returns nibabel's lazy image."""
    try:
        return nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error


def _nifti_grid(image: Any, shape: tuple[int, ...], path: pathlib.Path) -> Grid:
    _warn_about_orientation(image.header, path)
    affine = np.asarray(image.affine, np.float64)
    return Grid(_spatial_shape(shape, path), _reversed_columns(affine))


def _open_nifti(path: pathlib.Path) -> tuple[Any, Grid]:
    """Returns nibabel's lazy image and the grid."""
    image = _load_nifti(path)
    dtype = image.get_data_dtype()
    intent = image.header.get("intent_code", 0)
    vector = len(image.shape) > 3 and int(intent) in _VECTOR_INTENTS
    if dtype.fields is not None or vector:
        raise UserError(
            f"{path} is an RGB or vector image, expected one number per voxel; "
            "extract one component or convert it to grey"
        )
    if np.issubdtype(dtype, np.complexfloating):
        raise UserError(
            f"{path} holds complex numbers, expected real ones; save the magnitude"
        )
    return image, _nifti_grid(image, image.shape, path)


def _read_nifti(path: pathlib.Path) -> tuple[np.ndarray, Grid]:
    image, grid = _open_nifti(path)
    stored = image.get_data_dtype()
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
    try:
        # Scaled values of integers need more digits than float32 until they are made.
        array = np.asanyarray(image.dataobj, dtype=np.float64 if scaled else stored)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    array = array.reshape(array.shape[:3])
    if scaled:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array.T).astype(array.dtype.newbyteorder("=")), grid


def _warn_about_orientation(header: Any, path: pathlib.Path) -> None:
    if not isinstance(header, nifti1.Nifti1Header):
        return
    try:
        qform, _ = header.get_qform(coded=True)
    except spatialimages.HeaderDataError as error:
        raise _damaged(path, error) from error
    sform, _ = header.get_sform(coded=True)
    if qform is not None and sform is not None:
        i, j, k = (int(n) for n in header.get_data_shape()[:3])
        if not Grid((i, j, k), qform).matches(Grid((i, j, k), sform)):
            warnings.warn(
                f"{path}: qform and sform differ; the sform is used here, "
                "other programs (ITK) may use the qform",
                stacklevel=5,
            )
    elif qform is None and sform is None:
        warnings.warn(
            f"{path}: neither qform nor sform is set; its place in space is a guess "
            "from the voxel sizes, other programs may guess otherwise",
            stacklevel=5,
        )


def _open_itk(path: pathlib.Path) -> tuple[sitk.ImageFileReader, Grid]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(path, error) from error
    pixel = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in pixel:
        raise UserError(
            f"{path} holds complex numbers, expected real ones; save the magnitude"
        )
    if reader.GetNumberOfComponents() != 1 or "vector" in pixel:
        raise UserError(
            f"{path} is an RGB or vector image, expected one number per voxel; "
            "extract one component or convert it to grey"
        )
    shape = _spatial_shape(reader.GetSize(), path)
    n = reader.GetDimension()
    affine = np.eye(4)
    direction = np.reshape(reader.GetDirection(), (n, n))[:3, :3]
    affine[:3, :3] = direction * np.asarray(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    return reader, Grid(shape, _reversed_columns(_LPS @ affine))


def _read_itk(path: pathlib.Path) -> tuple[np.ndarray, Grid]:
    reader, grid = _open_itk(path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _damaged(path, error) from error
    return sitk.GetArrayFromImage(image).reshape(grid.shape), grid


def _itk_image(array: np.ndarray, grid: Grid, path: pathlib.Path) -> sitk.Image:
    affine = _LPS @ _reversed_columns(grid.affine_mm)
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
        return _whole_numbers(array, path)
    if kind == "mask":
        if np.issubdtype(array.dtype, np.floating):
            whole = bool((array == np.rint(array)).all())
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
    fractions = array[array != np.rint(array)]
    if fractions.size:
        raise UserError(
            f"label map {path} has {fractions.size} voxels with fractional values "
            f"(e.g. {fractions.flat[0]:g}), expected whole numbers; was it resampled "
            "with linear interpolation? resample it with nearest neighbour"
        )
    if np.abs(array).max(initial=0) > np.iinfo(np.int32).max:
        raise UserError(
            f"label map {path} has values beyond 32-bit integers stored as floats, "
            "which may have lost digits; renumber its labels"
        )
    return array.astype(np.int32)
