"""DICOM series: a folder of slices, their place in space and their voxels.

GDCM, by which SimpleITK reads DICOM, takes memory for whatever length a damaged file
claims; so it reads in a worker process, which may take little more memory than the
files have. What it does not report is checked here: files that it cannot read, and
slices that are not evenly spaced.

References:
  DICOM PS3.3, C.7.6.2 (Image Plane Module); PS3.10, 7.1 (File Meta Information).
"""

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import files, itk_images, workers

SUFFIXES = (".dcm", ".ima")

_UNEVEN = 0.05  # of the mean step between slices
_MEND = "convert it with dcm2niix and give the .nii.gz"
_WORKER = workers.Worker(pathlib.Path(__file__).with_name("dicom_worker.py"))
_SPARE = 2**27  # bytes that reading takes besides what is read
_COPIES = 4  # of a file in memory: as stored, as decoded, as an image, as an array
_MOST_PACKED = 1000  # an image of one value, by the best of DICOM's compressions


@dataclasses.dataclass(frozen=True)
class Series:
    """One series' headers, before its voxels are read.

    Attributes:
      path: the folder.
      shape: (X, Y, Z).
      affine_mm: 4x4, (i, j, k, 1) to RAS+ mm.
      dtype: of the voxels, scaled.
      names: the files of its slices, in the order of k.
    """

    path: pathlib.Path
    shape: tuple[int, ...]
    affine_mm: np.ndarray
    dtype: np.dtype
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Slice:
    name: str
    size: tuple[int, int]
    spacing: tuple[float, float]  # along a row, along a column
    axes: np.ndarray  # 2 x 3, LPS: the directions of a row and of a column
    position: np.ndarray  # LPS mm, of the first voxel
    rescale: tuple[str, str]
    dtype: np.dtype


def is_dicom(path: pathlib.Path) -> bool:
    """Whether a path is a folder or a DICOM file, by its extension or content."""
    if os.path.isdir(path) or path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():  # "IM0001", "1.2.840.10008"
        return False
    return _start(path)[128:132] == b"DICM"


def open_series(path: pathlib.Path) -> Series:
    """Reads the headers of a folder that holds one DICOM series of slices.

    The affine's third axis is the step from slice to slice: that of a tilted gantry is
    not at right angles to the others, and ITK takes it for one that is.

    Raises:
      UserError: there is no series or more than one, or its slices are not one evenly
        spaced 3D scan of one number per voxel.
    """
    if not os.path.isdir(path):
        raise UserError(
            f"{path} is one DICOM file, expected a folder with one series of slices; "
            f"give the folder {path.parent}, or {_MEND}"
        )
    slices = [_slice(name, header) for name, header in _only_series(path)]
    first = slices[0]
    for one in slices:
        same = (one.size, one.spacing) == (first.size, first.spacing)
        if not same or not np.allclose(one.axes, first.axes, atol=1e-4):
            raise UserError(
                f"{path} holds slices of different sizes or directions "
                f"({pathlib.Path(first.name).name} and {pathlib.Path(one.name).name}), "
                f"expected one 3D series; {_MEND}"
            )
        if (one.rescale, one.dtype) != (first.rescale, first.dtype):
            raise UserError(
                f"{path} holds slices of different rescale slopes or intercepts, "
                f"which one array of numbers cannot keep; {_MEND}"
            )
    normal = np.cross(*first.axes)
    slices.sort(key=lambda one: float(one.position @ normal))
    affine = np.eye(4)
    affine[:3, :2] = first.axes.T * first.spacing
    affine[:3, 2] = _step([one.position for one in slices], normal, path)
    affine[:3, 3] = slices[0].position
    shape = (*first.size, len(slices))
    names = tuple(one.name for one in slices)
    return Series(path, shape, itk_images.LPS @ affine, first.dtype, names)


def read_voxels(series: Series) -> np.ndarray:
    """Reads the voxels, scaled by the slices' slope and intercept.

    Returns:
      (Z, Y, X).

    Raises:
      UserError: they are damaged, or there is not enough memory.
    """
    path, shape, dtype = series.path, series.shape[::-1], series.dtype
    claimed = math.prod(shape) * dtype.itemsize
    stored = sum(os.path.getsize(name) for name in series.names)
    if claimed > _MOST_PACKED * stored:
        reason = f"its headers claim {claimed} bytes of voxels, its files have {stored}"
        raise files.damaged(path, EOFError(reason))
    files.check_memory(path, 2 * claimed)  # there and here
    request = {
        "voxels": [os.path.abspath(name) for name in series.names],
        "bytes": _COPIES * (claimed + stored) + _SPARE,
    }

    def receive(reply: dict[str, Any], stream: IO[bytes]) -> np.ndarray | str:
        if "error" in reply:
            return reply["error"]
        found = np.dtype(reply["dtype"])
        flat = workers.receive_array(stream, found, math.prod(reply["shape"]))
        return flat.reshape(reply["shape"])

    try:
        found = _WORKER.ask(request, receive, size=claimed + stored)
    except workers.Ended as error:
        raise files.damaged(path, ValueError("GDCM gave up on it")) from error
    except MemoryError as error:
        raise files.too_large(path, claimed) from error
    if isinstance(found, str) or found.shape != shape:
        reason = found if isinstance(found, str) else "its slices changed meanwhile"
        raise files.damaged(path, ValueError(reason))
    return found


def _start(path: pathlib.Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError:
        return b""


def _may_be_dicom(path: pathlib.Path) -> bool:
    """Whether a file is worth a try: some have no preamble, as those of ACR-NEMA."""
    start = _start(path)
    return (
        b"DICM" in (start[128:], start[:4])
        or start[:2] in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08")
        or path.suffix.lower() in SUFFIXES
    )


def _header(path: pathlib.Path) -> dict[str, Any]:
    size = path.stat().st_size
    request = {
        "header": str(path.absolute()),
        "bytes": _COPIES * size + _SPARE,
    }
    try:
        return _WORKER.ask(request, lambda reply, _: reply, size=size)
    except workers.Ended:
        return {"error": "GDCM gave up on it"}


def _only_series(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the files of a folder's only series and their headers, by name.

    Warns of DICOM files that are no images or cannot be read.
    """
    entries = sorted(entry for entry in path.iterdir() if entry.name != "DICOMDIR")
    tried = [entry for entry in entries if entry.is_file() and _may_be_dicom(entry)]
    headers = {str(entry): _header(entry) for entry in tried}
    bad = [name for name, header in headers.items() if "error" in header]
    if bad:
        shown = ", ".join(pathlib.Path(name).name for name in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        warnings.warn(
            f"{path}: {shown}{more} cannot be read as DICOM images and are left out; "
            "check that no slice is missing",
            stacklevel=2,
        )
    series: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, header in headers.items():
        if "error" not in header:
            series.setdefault(header["series"], []).append((name, header))
    if not series:
        raise UserError(
            f"{path} is a folder, expected a file or a folder with one DICOM series; "
            "it holds no DICOM image that can be read, name another"
        )
    if len(series) > 1:
        listed = [_described(found) for found in series.values()]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise UserError(
            f"{path} holds {len(series)} DICOM series ({', '.join(listed[:8])}{more}), "
            f"expected one; put one into a folder of its own, or {_MEND}"
        )
    return next(iter(series.values()))


def _described(found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    name, header = found[0]
    what = header["described"] or header["number"] or pathlib.Path(name).name
    return f"{what}: {len(found)} file{'s' if len(found) > 1 else ''}"


def _numbers(text: str, count: int) -> np.ndarray | None:
    try:
        values = [float(part) for part in text.split("\\")]
    except ValueError:
        return None
    whole = len(values) == count and np.isfinite(values).all()
    return np.asarray(values) if whole else None


def _slice(name: str, header: dict[str, Any]) -> _Slice:
    size, spacing = header["size"], header["spacing"]
    if header["components"] != 1 or not header["dtype"]:
        raise UserError(
            f"{name} is a colour image, expected one number per voxel; leave its "
            "series out, or convert it to grey"
        )
    if math.prod(size[2:]) != 1:
        raise UserError(
            f"{name} is a DICOM file of {size[2]} frames, expected slices of one frame "
            f"each; {_MEND}"
        )
    position = _numbers(header["position"], 3)
    axes = _numbers(header["orientation"], 6)
    if position is None or axes is None:
        raise UserError(
            f"{name} does not say where its slice lies (ImagePositionPatient, "
            f"ImageOrientationPatient); {_MEND}"
        )
    return _Slice(
        name=name,
        size=(size[0], size[1]),
        spacing=(spacing[0], spacing[1]),
        axes=axes.reshape(2, 3),
        position=position,
        rescale=(header["slope"], header["intercept"]),
        dtype=np.dtype(header["dtype"]),
    )


def _step(
    positions: Sequence[np.ndarray], normal: np.ndarray, path: pathlib.Path
) -> np.ndarray:
    """Returns the vector from slice to slice, LPS mm, if all steps are that one."""
    if len(positions) < 2:
        raise UserError(
            f"{path} holds one DICOM slice, expected a 3D series; give all its slices"
        )
    steps = np.diff(positions, axis=0)
    mean = steps.mean(axis=0)
    length = float(np.linalg.norm(mean))
    along = steps @ normal
    if np.abs(along).min() <= 1e-3 * np.abs(along).max():
        raise UserError(
            f"{path} holds several images of one place (a time series or several "
            f"echoes), expected one 3D scan; {_MEND}, one volume of it"
        )
    if np.linalg.norm(steps - mean, axis=1).max() > _UNEVEN * length:
        apart = np.abs(along)
        raise UserError(
            f"{path} holds slices from {apart.min():.4g} to {apart.max():.4g} mm "
            "apart, expected even steps (is one missing?); complete the series, or "
            f"{_MEND}, which interpolates"
        )
    return mean
