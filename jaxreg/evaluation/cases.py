"""Labelled pairs in memory: scans, label maps and landmarks, and their checks."""

import dataclasses
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np

from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.io import files, tables, transforms, volumes
from jaxreg.io.tables import Frame
from jaxreg.registration import options as options_lib
from jaxreg.registration import rows as rows_lib
from jaxreg.registration import scan_pair
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space.grid import Grid, Volume


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A labelled pair in memory; landmarks are P 3, RAS+ mm."""

    spec: PairSpec
    name: str
    scans: ScanPair
    labels: tuple[Volume, Volume] | None  # fixed, moving
    landmarks: tuple[np.ndarray, np.ndarray] | None  # fixed, moving


def check_pairs(
    pairs: Sequence[PairSpec],
    names: Sequence[str],
    options: options_lib.Options,
    frame: Frame,
) -> None:
    """Checks all pairs by their headers, before the first registration.

    Raises:
      UserError: files or options do not go together; names the pair.
    """
    grids: dict[pathlib.Path, Grid] = {}
    for pair, name in zip(pairs, names, strict=True):
        try:
            _check_pair(pair, options, frame, grids)
        except UserError as error:
            raise UserError(f"pair {name}: {error}") from error
    rows_lib.warn_of_idle_masks(pairs, options, stacklevel=4)
    if any(p.inverse_out for p in pairs):
        warnings.warn(
            "the column inverse_out has no effect here; jaxreg register --pairs writes "
            "inverse transforms",
            stacklevel=3,
        )


def _check_pair(pair: PairSpec, options: options_lib.Options, frame, grids):
    options_lib.check_options(rows_lib.options_of(pair, options))
    given = {name: None for name in vars(options_lib.Regions())}
    if rows_lib.uses_masks(options):
        given |= {"fixed_mask": pair.fixed_mask, "moving_mask": pair.moving_mask}
    options_lib.check_regions(options, given)
    for side in ("fixed", "moving"):
        rows_lib.check_grids(pair, side, grids)
    if (pair.fixed_label is None) != (pair.moving_label is None):
        raise UserError("it has one label map; give both or neither")
    _landmarks(pair, frame, grids[pair.fixed], grids[pair.moving])
    if pair.transform_out is not None:
        transforms.check_transform_path(pair.transform_out, "transform_out")
    if pair.warped_out is not None:
        volumes.check_volume_path(pair.warped_out, "warped_out")


def read(pair: PairSpec, name: str, options: options_lib.Options, frame: Frame) -> Case:
    """Reads a pair with its label maps and landmarks.

    Args:
      pair: the files.
      name: what the pair is called in the tables.
      options: of all pairs.
      frame: what the numbers of landmark files are.

    Raises:
      UserError: a file cannot be read, or files do not go together.
    """
    masked = rows_lib.uses_masks(options)
    names = ("fixed_mask", "moving_mask") if masked else ()
    scans = scan_pair.read(
        pair.moving,
        pair.fixed,
        options_lib.Regions(**{name: getattr(pair, name) for name in names}),
        modality=rows_lib.options_of(pair, options).moving_modality,
        to_warp=pair.warped_out is not None,
    )
    labels = None
    if pair.fixed_label is not None and pair.moving_label is not None:
        labels = (
            volumes.read_volume(pair.fixed_label, kind="labels"),
            volumes.read_volume(pair.moving_label, kind="labels"),
        )
    grids = scans.fixed.grid, scans.moving.grid
    return Case(pair, name, scans, labels, _landmarks(pair, frame, *grids))


def labels_of(case: Case, labels: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the labels to score: before warping, which may lose a small one."""
    if case.labels is None:
        return ()
    if labels is not None:
        return tuple(int(label) for label in labels)
    found = np.union1d(*(np.unique(volume.array) for volume in case.labels))
    return tuple(int(label) for label in found if label > 0)


def read_landmarks(
    path: files.PathLike, *, frame: Frame = "lps", grid: Grid | None = None
) -> np.ndarray:
    """Reads the landmarks of a scan.

    Args:
      path: CSV with columns x, y, z, by name in a header or the first three; or
        .fcsv or .mrk.json of 3D Slicer, which say their frame.
      frame: what the numbers of a CSV are.
      grid: the scan's grid, for "voxel".

    Returns:
      P 3, RAS+ mm, float64.

    Raises:
      UserError: the file is missing or has a row without three finite numbers.
    """
    return tables.points_mm(tables.read(path, "landmarks"), frame, grid)


def _landmarks(pair: PairSpec, frame: Frame, fixed: Grid, moving: Grid):
    """Returns the landmarks of both scans, P 3, RAS+ mm, or None."""
    if pair.fixed_landmarks is None and pair.moving_landmarks is None:
        return None
    if pair.fixed_landmarks is None or pair.moving_landmarks is None:
        raise UserError("it has one file of landmarks; give both or neither")
    table = tables.read(pair.fixed_landmarks, "landmarks")
    here = tables.points_mm(table, frame, fixed)
    there = read_landmarks(pair.moving_landmarks, frame=frame, grid=moving)
    if len(here) != len(there):
        raise UserError(
            f"{pair.fixed_landmarks} has {len(here)} landmarks, "
            f"{pair.moving_landmarks} {len(there)}; give the same points in one order"
        )
    outside = tables.outside(
        table, frame, lambda points: tables.count_outside(points, fixed), grid=fixed,
        points=str(pair.fixed_landmarks), scan=f"the scan {pair.fixed}",
        option="`landmarks_frame`",
    )  # fmt: skip
    if outside is not None:
        raise UserError(outside)
    return here, there
