"""Transforms on disk: ITK's composite files and NIfTI displacement fields.

In memory a transform maps fixed to moving points in RAS+ mm. ITK and ANTs count LPS mm,
the first two axes with the other sign, and list components as x, y, z where arrays have
d, h, w. Both turns happen here and nowhere else.
"""

import dataclasses
import math
import pathlib
import warnings

import h5py
import numpy as np
from nibabel import nifti1

from jaxreg.errors import UserError
from jaxreg.io import files, volumes
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Shape, unit_to_voxel
from jaxreg.space.transform import Affine, Displacement, Step, Transform

HDF5 = (".h5", ".hdf5")
TEXT = (".tfm", ".txt")
EXTENSIONS = (*HDF5, *TEXT, *volumes.NIFTI)

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
_REVERSE = np.eye(4)[[2, 1, 0, 3]]  # d, h, w to x, y, z and back
_COMPOSITE = "CompositeTransform"
_FIELD = "DisplacementFieldTransform"
_TYPE_ENDING = "_double_3_3"


@dataclasses.dataclass(frozen=True)
class _Record:
    """One transform of an ITK file.

    Attributes:
      kind: ITK's class name without precision and dimensions.
      parameters: float64, what ITK calls transform parameters.
      fixed: float64, fixed parameters.
    """

    kind: str
    parameters: np.ndarray
    fixed: np.ndarray


def check_transform_path(
    path: files.PathLike, option: str = "--transform-out"
) -> pathlib.Path:
    """Checks that `write_transform` can write there, before any work.

    Raises:
      UserError: the extension is none of `EXTENSIONS`, or `files.check_writable`
        refuses.
    """
    path = pathlib.Path(path)
    _check_extension(path, option)
    return files.check_writable(path, option)


def write_transform(path: files.PathLike, transform: Transform, fixed: Grid) -> None:
    """Writes a transform in the format of the extension, whole or not at all.

    Args:
      path: .h5, .hdf5, .tfm or .txt for ITK's composite, .nii or .nii.gz for a
        displacement field.
      transform: fixed mm to moving mm, e.g. from `space.transform.in_world`.
      fixed: the grid of a displacement field; ITK's composite keeps its own.

    Raises:
      UserError: the path cannot be written.
      ValueError: see `write_itk_composite`.
    """
    path = check_transform_path(path)
    if files.full_suffix(path).lower() in volumes.NIFTI:
        write_displacement_nifti(path, transform, fixed)
    else:
        write_itk_composite(path, transform)


def read_transform(path: files.PathLike) -> Transform:
    """Reads a transform file of any format in `EXTENSIONS`.

    Returns:
      Fixed mm to moving mm.

    Raises:
      UserError: see `read_itk` and `read_displacement_nifti`.
    """
    path = files.check_readable(path, "transform")
    _check_extension(path, "transform")
    if files.full_suffix(path).lower() in volumes.NIFTI:
        return read_displacement_nifti(path)
    return read_itk(path)


def write_itk_composite(path: files.PathLike, transform: Transform) -> None:
    """Writes ITK's composite: affine, displacement, affine, in double precision.

    Steps are kept, not resampled: affine matrices between two fields are multiplied
    into one, every field stays on its own grid in voxel units.

    Args:
      path: .h5, .hdf5, .tfm or .txt.
      transform: fixed mm to moving mm; fields with outside="half_voxel" and batch 1.

    Raises:
      UserError: the path cannot be written.
      ValueError: a field has a batch, or another rule outside its grid than ITK's.

    References:
      ITK, itkHDF5TransformIO and itkTxtTransformIO; the same parts in the same order
      as icon_registration 1.1.9, itk_wrapper.py.
    """
    path = pathlib.Path(path)
    write = _write_hdf5 if files.full_suffix(path).lower() in HDF5 else _write_text
    # A composite lists what acts last first.
    records = _to_records(transform)[::-1]
    with files.atomic_path(path) as temporary:
        write(temporary, records)


def read_itk(path: files.PathLike) -> Transform:
    """Reads an ITK transform, single or composite.

    Args:
      path: .h5, .hdf5, .tfm or .txt, written by ITK, ANTs, Slicer, unigradicon or
        `write_itk_composite`.

    Returns:
      Fixed mm to moving mm (RAS+); fields have outside="half_voxel", as in ITK.

    Raises:
      UserError: the file is missing, damaged, or holds a kind of transform that is
        neither affine nor a displacement field.
    """
    path = files.check_readable(path, "transform")
    _check_extension(path, "transform", known=(*HDF5, *TEXT))
    suffix = files.full_suffix(path).lower()
    records = _read_hdf5(path) if suffix in HDF5 else _read_text(path)
    return _from_records(_members(records, path), path)


def write_displacement_nifti(
    path: files.PathLike, transform: Transform, fixed: Grid
) -> None:
    """Writes ``T(x) - x`` on the fixed grid, as ITK and ANTs apply it.

    A NIfTI of shape (X, Y, Z, 1, 3), intent "vector", components in LPS mm, float32.
    Outside its grid such a file says nothing: readers take the identity there.

    Raises:
      UserError: the path cannot be written.
    """
    displacement = transform_lib.displacement_mm(transform, fixed) @ _FLIP[:3, :3]
    image = volumes.nifti_image(displacement.astype(np.float32)[..., None, :], fixed)
    image.header.set_intent("vector")
    with files.atomic_path(path) as temporary:
        nifti1.save(image, temporary)


def read_displacement_nifti(path: files.PathLike) -> Transform:
    """Reads a NIfTI displacement field.

    Args:
      path: shape (X, Y, Z, 1, 3), mm. Components count in LPS with the intent
        "vector", as ANTs writes it, and in RAS with NIfTI's intent "displacement
        vector", as ITK has it.

    Returns:
      Fixed mm to moving mm (RAS+), the identity beyond half a voxel outside the grid.

    Raises:
      UserError: the file is missing, damaged or no such field.
    """
    path = files.check_readable(path, "transform")
    field, grid, intent = volumes.read_nifti_vectors(path)
    to_unit = np.linalg.inv(grid.unit_to_mm)
    turn = np.eye(4) if intent == "displacement vector" else _FLIP
    step = _displacement(field, (to_unit @ turn)[:3, :3], path)
    return Transform((Affine(to_unit), step, Affine(grid.unit_to_mm)))


def _check_extension(
    path: pathlib.Path, option: str, known: tuple[str, ...] = EXTENSIONS
) -> None:
    suffix = files.full_suffix(path).lower()
    if suffix == ".mat":
        raise UserError(
            f"{option} {path} is a .mat file, which cannot hold a displacement field; "
            "use .h5"
        )
    if suffix not in known:
        raise UserError(
            f"{option} {path} has the extension {suffix or '(none)'}, expected one of "
            f"{', '.join(known)}; rename or convert it"
        )


def _displacement(
    field: np.ndarray, to_unit: np.ndarray, path: pathlib.Path
) -> Displacement:
    """Returns vectors D H W 3, turned into unit ones by a 3x3 matrix, as a step."""
    bad = field.size - int(np.isfinite(field).sum())
    if bad:
        raise UserError(
            f"displacement field {path} has {bad} numbers that are NaN or infinite, "
            "expected finite ones; write it again"
        )
    # Plane by plane: a field of a whole scan in float64 would take gigabytes.
    unit = np.stack([(plane @ to_unit.T).astype(np.float32) for plane in field])
    return Displacement(unit[None], outside="half_voxel")


def _to_records(transform: Transform) -> list[_Record]:
    """Returns ITK's records in the order in which a point meets them."""
    records: list[_Record] = []
    pending = _FLIP
    centre = np.zeros(3)
    for step in transform.steps:
        if isinstance(step, Affine):
            pending = np.asarray(step.matrix, np.float64) @ pending
            continue
        if step.field.shape[0] != 1:
            raise ValueError(f"one field per file, got batch {step.field.shape[0]}")
        if step.outside != "half_voxel":
            raise ValueError(
                f'outside="{step.outside}" is not ITK\'s rule; use in_world first'
            )
        d, h, w = step.field.shape[1:4]
        centre = (np.array([w, h, d]) - 1) / 2
        to_voxel_xyz = _REVERSE @ unit_to_voxel((d, h, w))
        records.append(_affine_record(to_voxel_xyz @ pending, centre))
        records.append(_field_record(np.asarray(step.field[0])))
        pending = np.linalg.inv(to_voxel_xyz)
    return [*records, _affine_record(_FLIP @ pending, centre)]


def _affine_record(matrix: np.ndarray, centre: np.ndarray) -> _Record:
    """ITK's ``M (p - c) + c + t``: parameters M row by row, c, t; fixed c."""
    linear = matrix[:3, :3]
    translation = matrix[:3, 3] + linear @ centre - centre
    return _Record(
        "CenteredAffineTransform",
        np.concatenate([linear.ravel(), centre, translation]),
        centre,
    )


def _field_record(field: np.ndarray) -> _Record:
    """A field D H W 3 in unit coordinates, as voxels of its own grid in x, y, z."""
    d, h, w = field.shape[:3]
    scale = np.diag(unit_to_voxel((d, h, w)))[:3]
    voxels = (field.astype(np.float64) * scale)[..., ::-1]
    fixed = np.concatenate([(w, h, d), np.zeros(3), np.ones(3), np.eye(3).ravel()])
    return _Record(_FIELD, voxels.ravel(), fixed)


def _members(records: list[_Record], path: pathlib.Path) -> list[_Record]:
    """Returns the transforms in the order in which a point meets them."""
    if records and records[0].kind == _COMPOSITE:
        records = records[:0:-1]
    elif len(records) > 1:
        raise UserError(
            f"{path} lists {len(records)} transforms without a composite that says "
            "how they combine, expected one; write them as a CompositeTransform"
        )
    if not records:
        raise UserError(f"{path} holds no transform; write it again")
    return records


def _from_records(records: list[_Record], path: pathlib.Path) -> Transform:
    steps: list[Step] = []
    pending = _FLIP
    for record in records:
        if record.kind != _FIELD:
            pending = _matrix(record, path) @ pending
            continue
        shape, unit_to_file = _field_geometry(record, path)
        to_unit = np.linalg.inv(unit_to_file)
        vectors = record.parameters.reshape(*shape, 3)
        steps.append(Affine(to_unit @ pending))
        steps.append(_displacement(vectors, to_unit[:3, :3], path))
        pending = unit_to_file
    return Transform((*steps, Affine(_FLIP @ pending)))


def _field_geometry(record: _Record, path: pathlib.Path) -> tuple[Shape, np.ndarray]:
    """Returns the field's shape (D, H, W) and its matrix from unit to file frame."""
    fixed = record.fixed
    if fixed.size != 18 or not (fixed[:3] >= 1).all():
        raise _damaged(path, f"{_FIELD} has {fixed.size} fixed parameters, not 18")
    w, h, d = (int(n) for n in fixed[:3])
    if record.parameters.size != 3 * math.prod((d, h, w)):
        raise _damaged(
            path, f"{record.parameters.size} parameters for {w} x {h} x {d} vectors"
        )
    matrix = np.eye(4)
    matrix[:3, :3] = fixed[9:].reshape(3, 3) * fixed[6:9]
    matrix[:3, 3] = fixed[3:6]
    matrix = matrix @ _REVERSE @ unit_to_voxel((d, h, w))
    if not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix) < 4:
        raise _damaged(path, "singular grid of the displacement field")
    return (d, h, w), matrix


def _matrix(record: _Record, path: pathlib.Path) -> np.ndarray:
    """Returns the 4x4 matrix of an affine record in its own frame."""
    kind, p = record.kind, record.parameters
    if kind not in _AFFINES:
        known = ", ".join([*_AFFINES, _FIELD])
        raise UserError(
            f"{path} holds a {kind}, expected one of {known}; flatten it to a "
            "displacement field first"
        )
    count = _AFFINES[kind]
    if p.size != count or not np.isfinite(p).all():
        raise _damaged(path, f"{kind} needs {count} finite parameters, has {p.size}")
    centre = np.zeros(3)
    linear, translation = np.eye(3), np.zeros(3)
    if kind == "TranslationTransform":
        translation = p
    elif kind == "Euler3DTransform":
        linear, translation = _euler(p[:3], record.fixed), p[3:]
    elif kind != "IdentityTransform":
        linear, translation = p[:9].reshape(3, 3), p[-3:]
    if kind == "CenteredAffineTransform":
        centre = p[9:12]
    elif record.fixed.size >= 3:
        centre = record.fixed[:3]
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = centre + translation - linear @ centre
    return matrix


_AFFINES = {
    "AffineTransform": 12,
    "MatrixOffsetTransformBase": 12,
    "CenteredAffineTransform": 15,
    "Euler3DTransform": 6,
    "TranslationTransform": 3,
    "IdentityTransform": 0,
}
"""The kinds that are one matrix, and how many parameters each has."""


def _euler(angles: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Returns ITK's rotation: Rz Rx Ry, or Rz Ry Rx where the fourth flag says so."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx if fixed.size > 3 and fixed[3] else rz @ rx @ ry


def _damaged(path: pathlib.Path, detail: object) -> UserError:
    return UserError(
        f"{path} is no readable ITK transform file ({detail}); write or fetch it again"
    )


def _record(
    name: str, parameters: np.ndarray, fixed: np.ndarray, path: pathlib.Path
) -> _Record:
    kind, _, rest = name.partition("_")
    if not rest.endswith("3_3"):
        raise UserError(
            f"{path} holds a {name}, expected a transform of 3D points (_3_3); "
            "give a 3D transform"
        )
    return _Record(kind, parameters, fixed)


def _write_hdf5(path: pathlib.Path, records: list[_Record]) -> None:
    text = h5py.string_dtype("ascii")
    with h5py.File(path, "w") as file:
        # ITK's readers look for these four and do not judge what they say.
        for name, value in {
            "HDFVersion": f"HDF5 library version: {h5py.version.hdf5_version}",
            "ITKVersion": "5.4.0",
            "OSName": "jaxreg",
            "OSVersion": "1",
        }.items():
            file.create_dataset(name, data=[value], dtype=text)
        root = file.create_group("TransformGroup")
        head = root.create_group("0")
        head.create_dataset(
            "TransformType", data=[_COMPOSITE + _TYPE_ENDING], dtype=text
        )
        for number, record in enumerate(records, start=1):
            group = root.create_group(str(number))
            group.create_dataset(
                "TransformType", data=[record.kind + _TYPE_ENDING], dtype=text
            )
            group.create_dataset("TransformFixedParameters", data=record.fixed)
            group.create_dataset("TransformParameters", data=record.parameters)


def _read_hdf5(path: pathlib.Path) -> list[_Record]:
    try:
        with h5py.File(path, "r") as file:
            root = file["TransformGroup"]
            if not isinstance(root, h5py.Group):
                raise KeyError("TransformGroup is not a group")
            # As numbers: "10" comes after "9".
            return [_read_group(root[name], path) for name in sorted(root, key=int)]
    except (OSError, KeyError, ValueError) as error:
        raise _damaged(path, str(error).strip("'\"").splitlines()[0]) from error


def _read_group(group, path: pathlib.Path) -> _Record:
    name = np.ravel(group["TransformType"][()])[0]
    name = name.decode() if isinstance(name, bytes) else str(name)

    def numbers(*spellings):
        for key in spellings:
            if key in group:
                return np.ravel(np.asarray(group[key][()], np.float64))
        return np.zeros(0)

    # Files of older ITK versions misspell both.
    return _record(
        name,
        numbers("TransformParameters", "TranformParameters"),
        numbers("TransformFixedParameters", "TranformFixedParameters"),
        path,
    )


def _write_text(path: pathlib.Path, records: list[_Record]) -> None:
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write("#Insight Transform File V1.0\n#Transform 0\n")
        file.write(f"Transform: {_COMPOSITE}{_TYPE_ENDING}\n")
        for number, record in enumerate(records, start=1):
            file.write(f"#Transform {number}\n")
            file.write(f"Transform: {record.kind}{_TYPE_ENDING}\nParameters:")
            for start in range(0, record.parameters.size, 2**16):
                chunk = record.parameters[start : start + 2**16].tolist()
                file.write(" " + " ".join(map(repr, chunk)))
            fixed = " ".join(map(repr, record.fixed.tolist()))
            file.write(f"\nFixedParameters: {fixed}\n")


def _read_text(path: pathlib.Path) -> list[_Record]:
    records: list[_Record] = []
    found: dict[str, str] = {}

    def finish():
        if "Transform" in found:
            parameters, fixed = (
                _numbers(found.get(key, ""), path)
                for key in ("Parameters", "FixedParameters")
            )
            records.append(_record(found["Transform"], parameters, fixed, path))
            found.clear()

    try:
        with open(path, encoding="ascii") as file:
            if not file.readline().startswith("#Insight Transform File"):
                raise _damaged(path, "its first line is not #Insight Transform File")
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "Transform":
                    finish()
                if not line.startswith("#"):
                    found[key.strip()] = value.strip()
            finish()
    except UnicodeDecodeError as error:
        raise _damaged(path, "not a text file") from error
    return records


def _numbers(text: str, path: pathlib.Path) -> np.ndarray:
    if not text:
        return np.zeros(0)
    with warnings.catch_warnings():
        # NumPy announces that unreadable text will become an error; it is one here.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text, np.float64, sep=" ")
        except (DeprecationWarning, ValueError) as error:
            raise _damaged(path, "something among its numbers is none") from error
