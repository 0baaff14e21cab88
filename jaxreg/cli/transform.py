"""Verbs of transform files: ``jaxreg transform compose|invert|info|export``."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import typer

from jaxreg.cli.options import app, print_numbers, print_written, warn
from jaxreg.cli.parser import verb
from jaxreg.cli.progress import Bar
from jaxreg.cli.warp import warn_beyond
from jaxreg.errors import UserError, near_match

if TYPE_CHECKING:
    from jaxreg.space.grid import Grid
    from jaxreg.space.transform import Transform

Path = pathlib.Path
_INVERSE = "--inverse"

transform_app = typer.Typer(
    help="Compose, invert, describe and convert transform files."
)
app.add_typer(transform_app, name="transform")


@dataclasses.dataclass(frozen=True)
class Composed:
    """A chain of transforms.

    Attributes:
      steps: Transform files from the fixed scan to the moving one, --inverse before
        each that is to be taken the other way round; formats as --transform of warp.
      out: Composite: .h5 .hdf5 .tfm .txt (every field keeps its own grid), .nii.gz .nii
        (one displacement field; needs --fixed), or .mat (matrices alone).
      fixed: Scan on whose grid a displacement field lies.
    """

    steps: tuple[str, ...]
    out: Path
    fixed: Path | None = None


@verb(
    transform_app,
    "compose",
    positional=("steps",),
    context_settings={"ignore_unknown_options": True},
)
def compose_verb(composed: Composed) -> None:
    """Chain transforms into one file: the first listed acts first on a point.

    `compose a.h5 b.tfm` takes a point x of a's fixed scan to b(a(x)), in b's moving
    scan: b's moving scan is pulled onto a's fixed scan. That is the order of ANTs' -t;
    ITK's CompositeTransform lists the same maps the other way round. `--inverse c.h5`
    puts the inverse of c at its place in the list.
    """
    chain = _chain(composed.steps)
    check_out(composed.out, [*(path for path, _ in chain), composed.fixed])

    from jaxreg.space import transform as transform_lib

    whole = transform_lib.Transform(())
    for path, invert in chain:
        whole = whole.then(_inverse_of(path) if invert else _read(path))
    _write(composed.out, whole, composed.fixed)
    words = [f"the inverse of {path}" if inv else str(path) for path, inv in chain]
    print_numbers({"a point x goes through": ", then ".join(words)})
    print_written([composed.out])


def _chain(words: Sequence[str]) -> list[tuple[Path, bool]]:
    """Returns (file, whether inverted) of the words of a command line, in order."""
    chain: list[tuple[Path, bool]] = []
    invert = False
    for word in words:
        name, equals, value = word.partition("=")
        if name == _INVERSE and not invert:
            invert, word = True, value
            if not equals:
                continue
        if word.startswith("-") or not word:
            raise UserError(
                f'"{word}" is no option of compose{near_match(word, [_INVERSE])}'
                if word != _INVERSE and word
                else "--inverse needs a transform file after it"
            )
        chain.append((Path(word), invert))
        invert = False
    if invert:
        raise UserError("--inverse needs a transform file after it")
    return chain


@dataclasses.dataclass(frozen=True)
class Inverted:
    """A transform, and where its inverse goes.

    Attributes:
      transform: Transform, fixed to moving points; formats as --transform of warp.
      out: Its inverse, moving to fixed points; formats as --out of compose.
      fixed: Scan on whose grid the inverse lies as a displacement field: the one that
        was the moving scan.
    """

    transform: Path
    out: Path
    fixed: Path | None = None


@verb(transform_app, "invert", positional=("transform",))
def invert_verb(inverted: Inverted) -> None:
    """Write the inverse of a transform, and print how exact it is.

    Matrices are inverted exactly, fields numerically on their own grids. A field that
    folds has no inverse there; the printed residual shows it.
    """
    check_out(inverted.out, [inverted.transform, inverted.fixed])
    _write(inverted.out, _inverse_of(inverted.transform), inverted.fixed)
    print_written([inverted.out])


@dataclasses.dataclass(frozen=True)
class Described:
    """A transform to be described.

    Attributes:
      transform: Transform; formats as --transform of warp.
      fixed: Scan at whose voxels it is measured. Default: those of its first field.
    """

    transform: Path
    fixed: Path | None = None


@verb(transform_app, "info", positional=("transform",))
def info_verb(described: Described) -> None:
    """Say what a transform file holds: steps, grids, displacement, folds.

    In mm and RAS+, as NIfTI counts; ITK's files count x and y the other way.
    """
    from jaxreg import metrics
    from jaxreg.io import transforms, volumes
    from jaxreg.space import transform as transform_lib
    from jaxreg.space import warping

    mapping = transforms.read_transform(described.transform)
    grid = transform_lib.first_grid(mapping)
    if described.fixed is not None:
        grid = volumes.read_grid(described.fixed)
        warn_beyond(mapping, described.transform, grid, described.fixed)
    rows = {"steps": ", then ".join(_steps(mapping))}
    if transform_lib.is_linear(mapping):
        rows |= _matrix_rows(transform_lib.linear_matrix(mapping))
    if grid is not None:
        import numpy as np

        lengths = np.linalg.norm(warping.displacement_mm(mapping, grid), axis=-1)
        percent, deviation = metrics.regularity(mapping, grid)
        rows["displacement"] = (
            f"{lengths.mean(dtype=np.float64):.4f} mm mean, {lengths.max():.4f} mm at "
            "most"
        )
        rows["folded voxels"] = f"{percent:.4f} %"
        rows["SDlogJ"] = f"{deviation:.4f}"
    print_numbers(rows)


def _steps(mapping: "Transform") -> list[str]:
    """Says what a transform consists of; neighbouring matrices are one."""
    from jaxreg.space import transform as transform_lib

    said: list[str] = []
    for step in mapping.steps:
        if isinstance(step, transform_lib.Affine):
            if said[-1:] != ["a matrix"]:
                said.append("a matrix")
            continue
        voxels = " x ".join(map(str, step.field.shape[3:0:-1]))
        first = transform_lib.first_grid(mapping)
        spacing = ""
        if first is not None and not any("field" in text for text in said):
            # Of a later one nobody knows which part of the matrix before is its grid.
            spacing = " x ".join(f"{mm:.4g}" for mm in first.spacing_mm[::-1])
            spacing = f" of {spacing} mm"
        said.append(f"a field of {voxels} voxels{spacing}")
    return said or ["none: the identity"]


def _matrix_rows(matrix) -> dict[str, str]:
    """Describes a 4x4 map in mm."""
    import numpy as np

    left, stretch, right = np.linalg.svd(matrix[:3, :3])
    turn = left @ right
    cosine = (np.sign(np.linalg.det(turn)) * np.trace(turn) - 1) / 2
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    names = ("matrix", "", " ")
    rows = {
        name: " ".join(f"{value:12.6f}" for value in row)
        for name, row in zip(names, matrix[:3], strict=True)
    }
    mirrored = ", mirrored" if np.linalg.det(matrix[:3, :3]) < 0 else ""
    return rows | {
        "rotation": f"{angle:.3f} degrees{mirrored}",
        "scaling": " ".join(f"{value:.4f}" for value in stretch),
        "volume": f"{np.linalg.det(matrix[:3, :3]):.4f}",
    }


@dataclasses.dataclass(frozen=True)
class Exported:
    """A transform for another tool.

    Attributes:
      transform: Transform; formats as --transform of warp.
      for_: Who reads it. ants: .mat (matrices alone), .h5 .tfm .txt, or .nii.gz .nii
        for a warp. fsl: .mat of FLIRT (matrices alone), or .nii.gz .nii for a relative
        warp, as FNIRT's and convertwarp's. scipy: .npy, or .npz with the grids, the
        voxels for scipy.ndimage.map_coordinates.
      out: File to be written.
      fixed: Fixed scan; needed for a warp, for fsl and for scipy.
      moving: Moving scan; needed for fsl and for scipy.
    """

    transform: Path
    for_: Literal["ants", "fsl", "scipy"]
    out: Path
    fixed: Path | None = None
    moving: Path | None = None


@verb(transform_app, "export", positional=("transform",))
def export_verb(exported: Exported) -> None:
    """Write a transform as ANTs, FSL or SciPy read it.

    FSL's files and SciPy's arrays count from an image's own corner: they hold between
    the two given scans alone, and FSL's for scans in NIfTI. Apply them with
    `antsApplyTransforms -t`, `flirt -applyxfm -init`, `applywarp --rel --warp`, or
    `scipy.ndimage.map_coordinates(moving, coordinates)` with arrays as nibabel loads
    them.
    """
    tool, fixed, moving = exported.for_, exported.fixed, exported.moving
    inputs = [exported.transform, fixed, moving]
    if tool == "ants":
        check_out(exported.out, inputs)
        _write(exported.out, _read(exported.transform), fixed)
        print_written([exported.out])
        return

    from jaxreg.io import files, fsl, volumes, voxel_maps
    from jaxreg.space import transform as transform_lib

    known = voxel_maps.EXTENSIONS if tool == "scipy" else (".mat", *volumes.NIFTI)
    if files.full_suffix(exported.out).lower() not in known:
        raise UserError(
            f"--out {exported.out} is no file for {tool}, expected one of "
            f"{', '.join(known)}; rename it"
        )
    files.check_writable(exported.out, "--out")
    taken = {path.resolve(): "an input" for path in inputs if path is not None}
    files.claim(exported.out, "--out", taken)
    here, there = (
        _grid_for(tool, name, path)
        for name, path in (("--fixed", fixed), ("--moving", moving))
    )
    mapping = _read(exported.transform)
    assert fixed is not None  # _grid_for
    warn_beyond(mapping, exported.transform, here, fixed)
    write = voxel_maps.write if tool == "scipy" else fsl.write_warp
    if exported.out.suffix.lower() == ".mat":
        if not transform_lib.is_linear(mapping):
            raise UserError(
                f"{exported.transform} has a displacement field, which FLIRT's .mat "
                "cannot hold; write a warp with --out .nii.gz"
            )
        write = fsl.write_matrix
    write(exported.out, mapping, here, there)
    print_written([exported.out])


def _grid_for(tool: str, name: str, path: Path | None) -> "Grid":
    from jaxreg.io import files, volumes

    if path is None:
        raise UserError(
            f"--for {tool} needs {name}, from whose corner {tool} counts; give --fixed "
            "and --moving"
        )
    volumes.check_source(path, name)
    if tool == "fsl" and files.full_suffix(path).lower() not in volumes.NIFTI:
        raise UserError(
            f"{name} {path} is no NIfTI, which FSL needs; convert it first, and give "
            "the scan that FSL is to read"
        )
    return volumes.read_grid(path)


def check_out(out: Path, inputs: Sequence[Path | None]) -> None:
    """Checks a transform file to be, before anything is read."""
    from jaxreg.io import files, transforms

    transforms.check_transform_path(out, "--out", linear=True)
    taken = {path.resolve(): "an input" for path in inputs if path is not None}
    files.claim(out, "--out", taken)


def _read(path: Path) -> "Transform":
    from jaxreg.io import transforms

    return transforms.read_transform(path)


def _inverse_of(path: Path) -> "Transform":
    """Returns the inverse of a file; prints what is left of a round trip."""
    from jaxreg.registration import inverse
    from jaxreg.space import transform as transform_lib
    from jaxreg.space import warping

    mapping = _read(path)
    with Bar("invert", waiting=f"inverting the displacement field of {path}"):
        found = inverse.inverted(mapping)
        first, last = (
            transform_lib.first_grid(mapping),
            transform_lib.last_grid(mapping),
        )
        if first is None or last is None:
            return found
        mean, largest = warping.round_trip_mm(mapping, found, first, last)
    print_numbers(
        {"inverse residual": f"{mean:.4f} mm mean, {largest:.3f} mm at most ({path})"}
    )
    if largest > first.spacing_mm.min():
        warn(
            f"the inverse of {path} is more than a voxel off in places; it folds there "
            "or nearly does: jaxreg transform info shows it"
        )
    return found


def _write(out: Path, mapping: "Transform", fixed: Path | None) -> None:
    from jaxreg.io import transforms, volumes

    grid = None
    if fixed is not None:
        grid = volumes.read_grid(fixed)
        warn_beyond(mapping, out, grid, fixed)
    transforms.write_transform(out, mapping, grid)
