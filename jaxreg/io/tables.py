"""Tables of points: CSV files with a row for each point, and the frames they are in."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.space.grid import Grid

Frame = Literal["lps", "ras", "voxel"]
"""Of points: mm as in ITK, mm as in NIfTI, or NIfTI's voxel indices i, j, k."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The points of a CSV file, with everything else in it.

    Attributes:
      header: names of the columns, None where the file has none.
      columns: which of them are x, y and z.
      rows: cells of each point.
      places: P 3, float64, as in the file.
    """

    header: list[str] | None
    columns: list[int]
    rows: list[list[str]]
    places: np.ndarray


def read(source: files.PathLike, what: str) -> Table:
    """Reads a CSV with columns x, y, z, by name in a header or the first three.

    Args:
      source: the file.
      what: what to call it in a message, such as "landmarks".

    Raises:
      UserError: the file is missing, is no CSV text, or has no points, or a row without
        three finite numbers.
    """
    path = files.check_readable(source, what)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(c.strip() for c in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{what} {path} is no CSV text ({error})") from error
    header, columns = None, [0, 1, 2]
    if rows and not _is_number(rows[0][0]):
        header, *rows = rows
        names = [name.strip().lower() for name in header]
        if not {"x", "y", "z"} <= set(names):
            raise UserError(
                f"{what} {path} has the columns {', '.join(names)}, expected x, y and z"
            )
        columns = [names.index(name) for name in "xyz"]
    places = []
    for number, row in enumerate(rows, start=1 if header is None else 2):
        cells = [row[c] if c < len(row) else "" for c in columns]
        if not all(_is_number(cell) and math.isfinite(float(cell)) for cell in cells):
            raise UserError(
                f"{what} {path}, row {number}: {', '.join(cells)} are not three finite "
                "numbers x, y, z; correct it"
            )
        places.append([float(cell) for cell in cells])
    if not places:
        raise UserError(f"{what} {path} holds no points; add some or leave it out")
    return Table(header, columns, rows, np.array(places))


def write(
    target: pathlib.Path,
    table: Table,
    places: np.ndarray,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Writes the table with other places, its other columns kept.

    Args:
      target: the file.
      table: what was read.
      places: P 3, as the file is to have them.
      more: further columns by name, a cell for each point.

    Raises:
      UserError: the file cannot be written.
    """
    more = more or {}
    with files.atomic_path(target) as unfinished:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if table.header is not None:
                writer.writerow([*table.header, *more])
            for number, (row, place) in enumerate(zip(table.rows, places, strict=True)):
                cells = list(row)
                for column, value in zip(table.columns, place, strict=True):
                    cells[column] = f"{value:.6f}"
                writer.writerow([*cells, *(column[number] for column in more.values())])


def to_mm(places: np.ndarray, frame: Frame, grid: Grid | None = None) -> np.ndarray:
    """Returns points of a frame in RAS+ mm, P 3.

    Args:
      places: P 3.
      frame: what they are.
      grid: the scan's, for "voxel".

    Raises:
      ValueError: "voxel" without a grid.
    """
    if frame == "voxel":
        matrix = _voxel_to_mm(grid)
        # Columns are NIfTI's i, j, k; arrays have them reversed.
        return places[:, ::-1] @ matrix[:3, :3].T + matrix[:3, 3]
    return places * _signs(frame)


def from_mm(
    points_mm: np.ndarray, frame: Frame, grid: Grid | None = None
) -> np.ndarray:
    """Returns points in RAS+ mm, P 3, in a frame: the reverse of `to_mm`."""
    if frame == "voxel":
        inverse = np.linalg.inv(_voxel_to_mm(grid))
        return (points_mm @ inverse[:3, :3].T + inverse[:3, 3])[:, ::-1]
    return points_mm * _signs(frame)


def _voxel_to_mm(grid: Grid | None) -> np.ndarray:
    if grid is None:
        raise ValueError('frame "voxel" needs the scan\'s grid')
    return grid.affine_mm


def _signs(frame: Frame) -> np.ndarray:
    return np.array([-1.0, -1.0, 1.0]) if frame == "lps" else np.ones(3)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
