"""Transform files of ITK: single transforms and composites in HDF5, text and MATLAB.

SimpleITK's ReadTransform and WriteTransform (2.5.7) are not used. Of a text file that
ends early or lacks a line ReadTransform returns the identity without a word; of several
transforms it takes the first; it refuses centred affine and Euler transforms, and needs
three times a field's memory. WriteTransform leaves half a text file on a full disk in
silence. The tests compare these codecs with it.
"""

import dataclasses
import pathlib
import warnings

import h5py
import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import (
    displacements,
    files,
    hdf5,
    itk_fields,
    itk_images,
    itk_linear,
    matlab,
)
from jaxreg.space.grid import unit_to_voxel
from jaxreg.space.transform import (
    Affine,
    Step,
    Transform,
    is_linear,
    linear_matrix,
)

HDF5 = (".h5", ".hdf5")
TEXT = (".tfm", ".txt")
MATLAB = (".mat",)
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
      order: of a B-spline.
    """

    kind: str
    parameters: np.ndarray
    fixed: np.ndarray
    order: int = 3


def write(path: files.PathLike, transform: Transform) -> None:
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


def write_linear(path: files.PathLike, transform: Transform) -> None:
    """Writes an affine transform as ANTs does, for tools that read matrices alone.

    Args:
      path: .mat.
      transform: fixed mm to moving mm.

    Raises:
      UserError: the path cannot be written, or the transform has a displacement field,
        which no .mat holds.
    """
    if not is_linear(transform):
        raise UserError(
            f"{path} is a .mat file, which cannot hold a displacement field; use .h5"
        )
    matrix = itk_images.LPS @ linear_matrix(transform) @ itk_images.LPS
    record = _affine_record(matrix, np.zeros(3))
    name = record.kind + _TYPE_ENDING
    with files.atomic_path(path) as temporary:
        matlab.write_matrices(
            temporary, {name: record.parameters, "fixed": record.fixed}
        )


def read(path: pathlib.Path) -> Transform:
    """Reads an ITK transform, single or composite.

    Args:
      path: .h5, .hdf5, .tfm, .txt or .mat, written by ITK, ANTs, Slicer, elastix,
        unigradicon or `write`.

    Returns:
      Fixed mm to moving mm (RAS+); fields have outside="half_voxel", as in ITK. A
      B-spline becomes a displacement field, see `itk_fields.spline`.

    Raises:
      UserError: the file is damaged, or holds a kind of transform that is
        neither one of `itk_linear.KINDS` nor a displacement field nor a B-spline.
    """
    suffix = files.full_suffix(path).lower()
    if suffix in HDF5:
        records = _read_hdf5(path)
    elif suffix in MATLAB:
        records = _read_matlab(path)
    else:
        records = _read_text(path)
    return _from_records(_members(records, path), path)


def as_written(path: files.PathLike, transform: Transform) -> Transform:
    """Returns what `read` finds in the file that `write` made, without reading it."""
    return _from_records(_to_records(transform), pathlib.Path(path))


def _to_records(transform: Transform) -> list[_Record]:
    """Returns ITK's records in the order in which a point meets them."""
    records: list[_Record] = []
    pending = itk_images.LPS
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
        to_voxel_xyz = itk_fields.REVERSE @ unit_to_voxel((d, h, w))
        records.append(_affine_record(to_voxel_xyz @ pending, centre))
        records.append(_field_record(np.asarray(step.field[0])))
        pending = np.linalg.inv(to_voxel_xyz)
    return [*records, _affine_record(itk_images.LPS @ pending, centre)]


def _affine_record(matrix: np.ndarray, centre: np.ndarray) -> _Record:
    """ITK's ``M (p - c) + c + t``: parameters M row by row, t; fixed c.

    The original writes a CenteredAffineTransform, the same map with the centre among
    its parameters, which some readers (nitransforms) refuse.
    """
    linear = matrix[:3, :3]
    translation = matrix[:3, 3] + linear @ centre - centre
    return _Record(
        "AffineTransform", np.concatenate([linear.ravel(), translation]), centre
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
    pending = itk_images.LPS
    for record in records:
        kind, parameters, fixed = record.kind, record.parameters, record.fixed
        try:
            if kind in itk_linear.KINDS:
                pending = itk_linear.matrix(kind, parameters, fixed) @ pending
                continue
            vectors, unit_to_file = _vectors(record, path)
        except ValueError as error:
            raise _damaged(path, f"{kind}: {error}") from error
        to_unit = np.linalg.inv(unit_to_file)
        matrix = to_unit @ pending
        if not np.isfinite(matrix).all():
            raise _damaged(path, "its matrices multiply to infinity")
        steps.append(Affine(matrix))
        steps.append(displacements.unit_step(vectors, to_unit[:3, :3], path))
        pending = unit_to_file
    if not np.isfinite(pending).all():
        raise _damaged(path, "its matrices multiply to infinity")
    return Transform((*steps, Affine(itk_images.LPS @ pending)))


def _vectors(record: _Record, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns a field's vectors D H W 3 and its matrix from unit to file frame."""
    if itk_fields.is_field(record.kind):
        return itk_fields.displacement(record.parameters, record.fixed)
    if itk_fields.is_spline(record.kind):
        vectors, matrix, error = itk_fields.spline(
            record.parameters, record.fixed, record.order
        )
        if error > itk_fields.TOLERANCE_MM:
            warnings.warn(
                f"{path}: its B-spline bends so much that the displacement field read "
                f"in its place may be up to {error:.2g} mm off",
                stacklevel=2,
            )
        return vectors, matrix
    if record.kind == _COMPOSITE:
        raise UserError(
            f"{path} holds a composite within another; flatten it first "
            "(FlattenTransform of SimpleITK)"
        )
    known = ", ".join([*itk_linear.KINDS, _FIELD, "BSplineTransform"])
    raise UserError(
        f"{path} holds a {record.kind}, expected one of {known}; flatten it to a "
        "displacement field first"
    )


def _damaged(path: pathlib.Path, detail: object) -> UserError:
    return UserError(
        f"{path} is no readable ITK transform file ({detail}); write or fetch it again"
    )


def _record(
    name: str, parameters: np.ndarray, fixed: np.ndarray, path: pathlib.Path
) -> _Record:
    kind, _, rest = name.partition("_")
    order = 3
    if itk_fields.is_spline(kind) and rest.endswith(("_3_3_1", "_3_3_2", "_3_3_3")):
        rest, order = rest[:-2], int(rest[-1])
    if not rest.endswith("3_3"):
        raise UserError(
            f"{path} holds a {name}, expected a transform of 3D points (_3_3), of a "
            "B-spline of order 1 to 3; give such a one"
        )
    return _Record(kind, parameters, fixed, order)


def _write_hdf5(path: pathlib.Path, records: list[_Record]) -> None:
    text = h5py.string_dtype("ascii")
    with h5py.File(path, "w") as file:
        # ITK's readers look for these four and ignore their values.
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
        found = hdf5.read_transforms(path)
    except hdf5.Damaged as error:
        raise _damaged(path, error) from error
    return [_record(*each, path) for each in found]


def _read_matlab(path: pathlib.Path) -> list[_Record]:
    """Pairs of matrices: one named as the transform, one named fixed."""
    try:
        matrices = matlab.read_matrices(path)
    except ValueError as error:
        raise UserError(
            f"{path} is no .mat of ITK or ANTs ({error}); if it is a text matrix of "
            "FSL, convert it with c3d_affine_tool, otherwise write it again"
        ) from error
    records = []
    while matrices:
        (name, parameters), fixed = matrices.pop(0), np.zeros(0)
        if matrices and matrices[0][0].lower() == "fixed":
            fixed = matrices.pop(0)[1]
        records.append(_record(name, parameters, fixed, path))
    return records


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
