"""The verb ``jaxreg match``: points of one scan found in another.

The work is done by `matching.points`; here options become arguments and results become
text.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from jaxreg.cli.options import PANELS, SCANS, LandmarksFrame, app
from jaxreg.cli.parser import REQUIRED, verb
from jaxreg.errors import UserError
from jaxreg.registration import options as options_lib
from jaxreg.registration.options import Options

if TYPE_CHECKING:
    from jaxreg.io.tables import Table
    from jaxreg.matching.points import DescribedScan
    from jaxreg.space.grid import Volume

_MIND = "mind"


@dataclasses.dataclass(frozen=True)
class Scans:
    """The two scans.

    Attributes:
      fixed: Scan in which the points are.
      moving: Scan in which to find them.
    """

    PANEL: ClassVar = SCANS

    fixed: pathlib.Path
    moving: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Points:
    """Which points are found, and how they are told.

    Attributes:
      point: One place in the fixed scan.
      points: Places in the fixed scan: .csv with columns x, y, z (by name or the first
        three), or .fcsv or .mrk.json of 3D Slicer. Other columns are kept.
      points_out: The same points in the moving scan, with their similarity: .csv .fcsv
        .mrk.json. Default: a table is printed.
      points_frame: What the numbers are, given and found: mm as in ITK (lps) or NIfTI
        (ras), or NIfTI's voxel indices of the scan that the point is in. 3D Slicer's
        files say it themselves.
      cycle: Adds how far from the point, in mm, its match's own match lies: small where
        the two agree.
    """

    PANEL: ClassVar = "Points"

    point: tuple[float, float, float] | None = None
    points: pathlib.Path | None = None
    points_out: pathlib.Path | None = None
    points_frame: LandmarksFrame = "lps"
    cycle: bool = False


@dataclasses.dataclass(frozen=True)
class Descriptors:
    """What describes a place.

    Attributes:
      model: Weights of SAM (a checkpoint folder, or the released code's .pth), or mind,
        which needs none and looks at a few voxels around.
      spacing: Of the voxels that MIND sees, mm. Default: 2. Weights have their own.
    """

    PANEL: ClassVar = "Descriptors"

    model: str
    spacing: float | None = None


@verb(
    app,
    "match",
    only=("fixed_modality", "moving_modality", "ct_window", "quantile_range"),
    panels=PANELS,
    defaults={"fixed_modality": REQUIRED, "moving_modality": REQUIRED},
)
def match_verb(
    given: Scans, wanted: Points, descriptors: Descriptors, options: Options
) -> None:
    """Find points of one scan in another by what their surroundings look like.

    No registration: every point for itself, anywhere in the other scan. Similarity is
    at most 1. Points of one scan that is symmetric, or empty there, have no good match;
    --cycle tells.
    """
    fixed, moving = given.fixed, given.moving
    points, points_out = wanted.points, wanted.points_out
    model, spacing = descriptors.model, descriptors.spacing
    _check(wanted, [fixed, moving], model, spacing)
    from jaxreg.data import modality as modality_lib
    from jaxreg.io import tables, volumes

    rule = options.ct_window, options.quantile_range
    options_lib.check_modalities(options)

    for name, path in (("--fixed", fixed), ("--moving", moving)):
        volumes.check_source(path, name)
    table = _table(wanted)
    describe = _by_mind(spacing) if model.lower() == _MIND else _by_sam(model)

    from jaxreg.matching import points as matching_points
    from jaxreg.registration import preparation

    scans = [volumes.read_volume(path) for path in (fixed, moving)]
    options = preparation.with_modalities(options, *scans)
    modalities = [
        modality_lib.kind(name)
        for name in (options.fixed_modality, options.moving_modality)
    ]
    frame, grid = wanted.points_frame, scans[0].grid
    outside = tables.outside(
        table, frame, lambda places: tables.count_outside(places, grid), grid=grid,
        points="--point" if points is None else str(points),
        scan=f"the scan {fixed}", option="--points-frame",
    )  # fmt: skip
    if outside is not None:
        raise UserError(outside)
    here = tables.points_mm(table, frame, grid)
    described = [
        describe(scan, modality, *rule)
        for scan, modality in zip(scans, modalities, strict=True)
    ]
    found = matching_points.find(here, *described)
    columns = {"similarity": [f"{value:.4f}" for value in found.similarity]}
    if wanted.cycle:
        returned = matching_points.cycle_mm(here, found, *described)
        columns["cycle_mm"] = [f"{value:.3f}" for value in returned]
    if points_out is None:
        shown = table.frame or frame
        there = tables.from_mm(found.points_mm, shown, scans[1].grid)
        _print(table.places, there, columns)
        return
    tables.write(
        points_out, table, found.points_mm, columns, frame=frame, grid=scans[1].grid
    )
    print(f"wrote {points_out}")


def _table(wanted: Points) -> "Table":
    """Returns the points of a file, or the one of the command line."""
    import numpy as np

    from jaxreg.io import tables

    if wanted.points is not None:
        return tables.read(wanted.points, "--points")
    cells = [f"{x:g}" for x in wanted.point or ()]
    return tables.Table(["x", "y", "z"], [0, 1, 2], [cells], np.array([wanted.point]))


_Describe = Callable[..., "DescribedScan"]


def _check(wanted: Points, scans, model: str, spacing: float | None) -> None:
    """Checks the options before anything is read."""
    from jaxreg.io import tables

    points, points_out = wanted.points, wanted.points_out
    if (wanted.point is None) == (points is None):
        raise UserError("give either --point X Y Z or --points FILE.csv, to say where")
    if spacing is not None and model.lower() != _MIND:
        raise UserError(
            f"--spacing has no effect with --model {model}, whose weights have their "
            "own; leave it out, or give --model mind"
        )
    if spacing is not None and not 0.1 <= spacing <= 100:
        raise UserError(
            f"--spacing is {spacing:g}, expected mm from 0.1 to 100, such as 2"
        )
    if points_out is None:
        return
    tables.check_target(points_out, "--points-out")
    if points_out.resolve() in [p.resolve() for p in (*scans, points) if p]:
        raise UserError(
            f"--points-out {points_out} is also an input; name another file"
        )


def _by_mind(spacing: float | None) -> _Describe:
    from jaxreg.data.preprocess import IntensityRule
    from jaxreg.matching import points as matching_points
    from jaxreg.models.sam import SPACING_MM

    def describe(scan: "Volume", modality: Any, ct_window, quantile_range):
        window = ct_window or IntensityRule.ct_window
        rule = IntensityRule(modality, window, quantile_range)
        return matching_points.by_mind(scan, rule, spacing_mm=spacing or SPACING_MM)

    return describe


def _by_sam(model: str) -> _Describe:
    from jaxreg.data.preprocess import IntensityRule
    from jaxreg.matching import points as matching_points
    from jaxreg.weights import load

    loaded = load.load_sam(model)

    def describe(scan: "Volume", modality: Any, ct_window, quantile_range):
        rule = IntensityRule(
            modality,
            ct_window or loaded.ct_window,
            quantile_range or loaded.quantile_range,
        )
        try:
            matching_points.check_known(loaded, rule, scan.source)
        except UserError as error:
            raise UserError(f"{error}; give --model mind") from error
        return matching_points.by_sam(scan, rule, loaded)

    return describe


def _print(given: Any, there: Any, columns: dict[str, list[str]]) -> None:
    names = ("x", "y", "z", "found x", "found y", "found z", *columns)
    rows = [
        [*(f"{x:.2f}" for x in (*before, *after)), *(c[i] for c in columns.values())]
        for i, (before, after) in enumerate(zip(given, there, strict=True))
    ]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = (f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True))
        print("  ".join(cells))
    sys.stdout.flush()
