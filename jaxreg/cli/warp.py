"""Verbs that use a transform: ``jaxreg warp`` and ``jaxreg jacobian``."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from jaxreg.cli.options import (
    OUT,
    SCANS,
    Fill,
    app,
    check_outputs,
    print_numbers,
    print_written,
    warn,
)
from jaxreg.cli.parser import verb
from jaxreg.errors import UserError
from jaxreg.registration.options import MODALITIES

if TYPE_CHECKING:
    from jaxreg.space.grid import Grid, Volume
    from jaxreg.space.transform import Transform

Path = pathlib.Path
Frame = Literal["lps", "ras"]


@dataclasses.dataclass(frozen=True)
class Sources:
    """What is warped, and by what.

    Attributes:
      fixed: Scan whose grid is the result's.
      moving: Scan or label map to be warped.
      transform: Transform, fixed to moving points: .h5 .hdf5 .tfm .txt .mat of ITK,
        ANTs or 3D Slicer, or a displacement field .nii.gz .nii .nrrd .nhdr .mha .mhd.
        Default: none, the moving scan is resampled on the fixed grid where the two
        headers place it.
      moving_modality: Kind of the moving scan, as given to register, for --fill auto.
        Default: CT if its values go down to -500, by its values what else it is.
      points: Points in the fixed scan, mm: .csv with columns x, y, z (by name or the
        first three), or .fcsv or .mrk.json of 3D Slicer. Other columns are kept.
      points_frame: Sign convention of the points: lps as in ITK and ANTs, ras as in
        NIfTI. 3D Slicer's files say it themselves.
    """

    PANEL: ClassVar = SCANS

    fixed: Path | None = None
    moving: Path | None = None
    transform: Path | None = None
    moving_modality: Annotated[str | None, MODALITIES] = None
    points: Path | None = None
    points_frame: Frame = "lps"


@dataclasses.dataclass(frozen=True)
class Results:
    """What is written, and how it is interpolated.

    Attributes:
      warped_moving_out: Moving scan on the fixed grid in its own pixel type: .nii.gz
        .nii .nrrd .mha.
      linear: Interpolate linearly: for scans.
      nearest_neighbor: Take the nearest voxel: for label maps.
      points_out: The same points in the moving scan, mm: .csv .fcsv .mrk.json.
    """

    PANEL: ClassVar = OUT

    warped_moving_out: Path | None = None
    linear: bool = False
    nearest_neighbor: bool = False
    points_out: Path | None = None


@verb(app, "warp")
def warp_verb(sources: Sources, results: Results, outside: Fill) -> None:
    """Apply a transform to a scan, a label map or points.

    Images are pulled from moving onto the fixed grid; points go the other way, from
    the fixed scan to the moving one. For points of the moving scan, or to bring the
    fixed scan onto the moving one, take what --inverse-out of register wrote. Label
    maps need --nearest-neighbor. Beyond a displacement field nothing is displaced, and
    beyond the moving scan there is --fill.
    """
    fixed, moving, points = sources.fixed, sources.moving, sources.points
    transform, points_out = sources.transform, results.points_out
    warped_moving_out = results.warped_moving_out
    outputs = {"--warped-moving-out": warped_moving_out, "--points-out": points_out}
    check_outputs(outputs, [fixed, moving, transform, points])
    if (points is None) != (points_out is None):
        missing = "--points-out" if points_out is None else "--points"
        raise UserError(f"--points and --points-out go together; pass {missing}")
    if warped_moving_out is not None:
        _check_warp_options(
            fixed, moving, linear=results.linear, nearest=results.nearest_neighbor
        )
    elif moving is not None:
        raise UserError("--moving needs --warped-moving-out, where to write the result")

    from jaxreg.io import transforms, volumes
    from jaxreg.space import transform as transform_lib

    _check_sources({"--fixed": fixed, "--moving": moving}, points)
    mapping = transform_lib.Transform(())
    if transform is not None:
        mapping = transforms.read_transform(transform)
    if points is not None and points_out is not None:
        if transform is None:
            warn("without --transform the points are those of the moving scan as well")
        map_points(points, points_out, mapping, frame=sources.points_frame, fixed=fixed)
    if warped_moving_out is not None and fixed is not None and moving is not None:
        grid = volumes.read_grid(fixed)
        warn_beyond(mapping, transform, grid, fixed)
        stored = volumes.read_volume(moving, kind="stored")
        _warn_about_warp(transform, moving, stored, linear=results.linear)
        warped = _warped(
            stored, mapping, grid,
            nearest=results.nearest_neighbor, modality=sources.moving_modality,
            fill=outside.fill,
        )  # fmt: skip
        volumes.write_volume(warped_moving_out, warped)
    print_written(outputs.values())


def _warn_about_warp(transform, moving, stored: "Volume", *, linear: bool) -> None:
    from jaxreg.space import background

    if transform is None:
        warn("without --transform the scan is brought onto the fixed grid, unmoved")
    if linear and background.looks_like_labels(stored.array):
        warn(
            f"{moving} looks like a label map (patches of equal whole numbers), of "
            "which --linear makes other labels along every border; pass "
            "--nearest-neighbor for one"
        )


def warn_beyond(
    mapping: "Transform", transform: Path | None, grid: "Grid", fixed: Path
) -> None:
    """Warns where a displacement field does not cover the fixed scan.

    Args:
      mapping: fixed mm to moving mm.
      transform: its file.
      grid: of the fixed scan.
      fixed: its file.
    """
    from jaxreg.space import transform as transform_lib

    percent = transform_lib.beyond_percent(mapping, grid)
    if percent > 0:
        warn(
            f"{percent:.2g} % of the voxels of {fixed} lie beyond the displacement "
            f"field of {transform}, which displaces nothing there; expect a jump at "
            "its edge, or use a field that covers the scan"
        )


def _check_sources(scans: Mapping[str, pathlib.Path | None], points) -> None:
    from jaxreg.io import files, volumes

    for name, path in scans.items():
        if path is not None:
            volumes.check_source(path, name)
    if points is not None:
        files.check_readable(points, "--points")


def _warped(
    moving: "Volume",
    mapping: "Transform",
    fixed: "Grid",
    *,
    nearest: bool,
    modality: str | None,
    fill: float | None,
) -> "Volume":
    """Resamples a scan or label map as stored; what is doubtful is warned about."""
    from jaxreg.data import modality as modality_lib
    from jaxreg.io import volumes
    from jaxreg.space import warping

    outside = modality_lib.background_of(modality, moving, fill, nearest=nearest)
    volumes.check_storable(outside.fill, moving)
    warped = warping.warp_volume(
        moving, mapping, fixed, order=0 if nearest else 1, fill=outside
    )
    empty, blank = ((v.array == outside.fill).all() for v in (warped, moving))
    if empty and not blank:
        warn(
            f"all of the result is the fill, {outside.fill:g}: on the fixed grid there "
            f"is nothing of {moving.source}; check that the files belong together"
        )
    return warped


def _check_warp_options(fixed, moving, *, linear: bool, nearest: bool) -> None:
    for name, path in (("--fixed", fixed), ("--moving", moving)):
        if path is None:
            raise UserError(f"--warped-moving-out needs {name}")
    if linear == nearest:
        given = "both were given" if linear else "neither was given"
        raise UserError(
            "pass --linear for a scan or --nearest-neighbor for a label map; " + given
        )


def map_points(
    source: pathlib.Path,
    target: pathlib.Path,
    mapping: "Transform",
    *,
    frame: Frame,
    fixed: pathlib.Path | None = None,
) -> None:
    """Maps the points of a file and writes them with everything else in it.

    Warns where points lie outside the fixed scan, or without one outside the domain
    of the transform's field.

    Args:
      source: the points, see `io.tables.read`.
      target: the same table with the mapped points.
      mapping: fixed to moving mm, RAS+.
      frame: of both files, where they do not say it.
      fixed: the scan in which the points are.

    Raises:
      UserError: the table has no three columns of numbers.
    """
    import numpy as np

    from jaxreg.io import tables, volumes
    from jaxreg.space import transform as transform_lib

    table = tables.read(source, "--points")
    grid = None if fixed is None else volumes.read_grid(fixed)
    outside = tables.outside(
        table,
        frame,
        lambda places: (
            transform_lib.count_beyond(mapping, places)
            if grid is None
            else tables.count_outside(places, grid)
        ),
        points=str(source),
        scan="the domain of the transform's field (beyond it nothing is displaced)"
        if fixed is None
        else f"the scan {fixed}",
        option="--points-frame",
    )
    if outside is not None:
        warn(outside)
    given = tables.points_mm(table, frame)
    mapped = np.asarray(mapping.map_points(given[None]))[0]
    tables.write(target, table, mapped, frame=frame)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured, and the maps of it.

    Attributes:
      fixed: Scan on whose grid the transform is measured.
      transform: Transform; formats as --transform of warp.
      jacob: Determinant map to write: .nii.gz .nii .nrrd .mha.
      log_jacob: Map of its natural logarithm; determinants below 1e-6, folded voxels
        among them, count as 1e-6.
    """

    fixed: Path
    transform: Path
    jacob: Path | None = None
    log_jacob: Path | None = None


@verb(app, "jacobian")
def jacobian_verb(measured: Measured) -> None:
    """Measure local volume change: determinant map, its range, folded voxels.

    The determinant is that of the map in mm: 1 keeps volume, 2 means that a voxel of
    the fixed scan covers twice its volume in the moving scan, below 0 is a fold. It is
    taken by central differences at the fixed scan's voxels; the share of folded voxels
    is the one that register and evaluate print. Where a scan is larger than the box
    of a network with a fixed spacing (UniReg), those two count within the box alone.
    """
    fixed, transform = measured.fixed, measured.transform
    jacob, log_jacob = measured.jacob, measured.log_jacob
    outputs = {"--jacob": jacob, "--log-jacob": log_jacob}
    check_outputs(outputs, [fixed, transform], needed=False)

    import numpy as np

    from jaxreg import metrics
    from jaxreg.io import transforms, volumes
    from jaxreg.space import warping
    from jaxreg.space.grid import Volume

    grid = volumes.read_grid(fixed)
    mapping = transforms.read_transform(transform)
    warn_beyond(mapping, transform, grid, fixed)
    determinant = warping.jacobian_map(mapping, grid)
    if jacob is not None:
        volumes.write_volume(jacob, Volume(determinant, grid))
    if log_jacob is not None:
        logarithm = np.log(np.maximum(determinant, 1e-6))
        volumes.write_volume(log_jacob, Volume(logarithm.astype(np.float32), grid))
    folded = int((determinant < 0).sum())
    percent = metrics.folding_percent(determinant)
    print_numbers(
        {
            "minimum": f"{determinant.min():.4f}",
            "mean": f"{determinant.mean(dtype=np.float64):.4f}",
            "maximum": f"{determinant.max():.4f}",
            "folded voxels": f"{percent:.4f} % ({folded})",
        }
    )
    print_written(outputs.values())
