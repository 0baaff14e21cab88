"""Tables of points, one row a point, and their frames.

CSV, whose frame is the caller's to know, and 3D Slicer's .fcsv and .mrk.json, which say
theirs.
"""

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import files, markups
from jaxreg.space.grid import Grid

EXTENSIONS = (".csv", ".fcsv", ".mrk.json")
"""What is written; other names are read as CSV."""

Frame = Literal["lps", "ras", "voxel"]
"""Of points: mm as in ITK, mm as in NIfTI, or NIfTI's voxel indices i, j, k."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The points of a file, with everything else in it.

    Attributes:
      header: names of the columns, None where the file has none.
      columns: which of them are x, y and z.
      rows: cells of each point.
      places: P 3, float64, as in the file; of .mrk.json in LPS mm.
      frame: as the file states it; None in CSV.
      kept: what else there is in a file of Slicer: the comments of .fcsv, the document
        of .mrk.json.
    """

    header: list[str] | None
    columns: list[int]
    rows: list[list[str]]
    places: np.ndarray
    frame: Frame | None = None
    kept: Any = None

    def column(self, *names: str) -> list[str]:
        """Returns the cells of the first column of these names, "" if there is none."""
        header = [name.strip().lower() for name in self.header or []]
        at = next((header.index(name) for name in names if name in header), None)
        if at is None:
            return [""] * len(self.rows)
        return [row[at] if at < len(row) else "" for row in self.rows]


def extension(path: files.PathLike) -> str:
    """Returns the extension in small letters, ".mrk.json" whole."""
    path = pathlib.Path(path)
    return ".mrk.json" if path.suffix.lower() == ".json" else path.suffix.lower()


def check_target(path: files.PathLike, option: str) -> pathlib.Path:
    """Checks that `write` can write there, before any work.

    Raises:
      UserError: the extension is none of `EXTENSIONS`, or see `files.check_writable`.
    """
    path = pathlib.Path(path)
    if extension(path) not in EXTENSIONS:
        raise UserError(
            f"{option} {path} has the extension {path.suffix or '(none)'}, expected "
            f"one of {', '.join(EXTENSIONS)}; rename it"
        )
    return files.check_writable(path, option)


def read(source: files.PathLike, what: str) -> Table:
    """Reads points: x, y, z by name in a header or the first three columns.

    Args:
      source: .fcsv or .mrk.json of 3D Slicer, or a CSV.
      what: what to call it in a message, such as "landmarks".

    Raises:
      UserError: the file is missing, is no such text, or has no points, or a row
        without three finite numbers.
    """
    path = files.check_readable(source, what)
    frame, kept, header = None, None, None
    try:
        text = path.read_text(encoding="utf-8-sig")
        if extension(path) == ".mrk.json":
            return _of_markups(*markups.read_json(text), path, what)
        if extension(path) == ".fcsv":
            header, rows, frame, kept = markups.read_fcsv(text)
        else:
            rows = list(csv.reader(io.StringIO(text, newline="")))
            rows = [row for row in rows if any(c.strip() for c in row)]
    except (ValueError, csv.Error, RecursionError) as error:
        kind = {".fcsv": ".fcsv", ".mrk.json": ".mrk.json"}.get(extension(path), "CSV")
        raise UserError(f"{what} {path} is no {kind} text ({error})") from error
    columns = [0, 1, 2]
    first = 1 if kept is None else 1 + len(kept)
    if header is None and rows and _number(rows[0][0]) is None:
        header, *rows = rows
        first = 2
    if header is not None:
        names = [name.strip().lower() for name in header]
        if not {"x", "y", "z"} <= set(names):
            raise UserError(
                f"{what} {path} has the columns {', '.join(names)}, expected x, y and z"
            )
        columns = [names.index(name) for name in "xyz"]
    places = []
    for number, row in enumerate(rows, start=first):
        cells = [row[c] if c < len(row) else "" for c in columns]
        place = [x for cell in cells if (x := _number(cell)) is not None]
        if len(place) < 3 or not all(map(math.isfinite, place)):
            raise UserError(
                f"{what} {path}, row {number}: {', '.join(cells)} are not three finite "
                "numbers x, y, z; correct it"
            )
        places.append(place)
    _check_any(places, path, what)
    return Table(header, columns, rows, np.array(places), _frame(frame), kept)


def _frame(name: str | None) -> Frame | None:
    return "lps" if name == "lps" else "ras" if name == "ras" else None


def _check_any(places: Sequence[Any], path: pathlib.Path, what: str) -> None:
    if not places:
        raise UserError(f"{what} {path} holds no points; add some or leave it out")


def _of_markups(
    document: Any,
    points: list[tuple[str, str, list[float]]],
    path: pathlib.Path,
    what: str,
) -> Table:
    _check_any(points, path, what)
    rows = [[label, *map(repr, place), note] for label, note, place in points]
    header = ["label", "x", "y", "z", "description"]
    places = np.array([place for *_, place in points])
    return Table(header, [1, 2, 3], rows, places, "lps", document)


def write(
    target: pathlib.Path,
    table: Table,
    points_mm: np.ndarray,
    more: Mapping[str, Sequence[str]] | None = None,
    *,
    frame: Frame,
    grid: Grid | None = None,
) -> None:
    """Writes the table with other places, everything else in it kept.

    A file of Slicer's stays in its own frame, or is made in that of `frame` (LPS for
    voxels). Where the format changes, labels and descriptions go along.

    Args:
      target: the file, see `EXTENSIONS`.
      table: what was read.
      points_mm: P 3, RAS+ mm.
      more: further columns by name, a cell for each point; part of the description in
        Slicer's formats.
      frame: of the numbers in CSV.
      grid: the scan's, for "voxel".

    Raises:
      UserError: the file cannot be written.
    """
    more = more or {}
    kind = extension(target)
    if kind == ".mrk.json":
        text = _json_text(table, points_mm, more)
    elif kind == ".fcsv":
        text = _fcsv_text(table, points_mm, more, frame)
    else:
        text = _csv_text(table, from_mm(points_mm, frame, grid), more)
    with files.atomic_path(target) as unfinished:
        unfinished.write_bytes(text.encode("utf-8"))


def _csv_text(table: Table, places: np.ndarray, more: Mapping) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    if table.header is not None:
        writer.writerow([*table.header, *more])
    for number, row in enumerate(_replaced(table, places)):
        writer.writerow([*row, *(column[number] for column in more.values())])
    return text.getvalue()


def _replaced(table: Table, places: np.ndarray) -> list[list[str]]:
    """Returns the rows with other places."""
    rows = [list(row) for row in table.rows]
    for row, place in zip(rows, places, strict=True):
        for column, value in zip(table.columns, place, strict=True):
            row[column] = f"{value:.6f}"
    return rows


def _labels(table: Table) -> list[str]:
    given = table.column("label", "name", "id")
    return [label or f"F-{n}" for n, label in enumerate(given, start=1)]


def _notes(table: Table, more: Mapping[str, Sequence[str]]) -> list[str]:
    given = table.column("description", "desc")
    added = [
        ", ".join(f"{name} {column[n]}" for name, column in more.items())
        for n in range(len(given))
    ]
    return ["; ".join(filter(None, parts)) for parts in zip(given, added, strict=True)]


def _json_text(table: Table, points_mm: np.ndarray, more: Mapping) -> str:
    document = table.kept if isinstance(table.kept, dict) else None
    places = from_mm(points_mm, "lps").tolist()
    return markups.json_text(document, places, _labels(table), _notes(table, more))


def _fcsv_text(table: Table, points_mm: np.ndarray, more: Mapping, frame: Frame) -> str:
    own = isinstance(table.kept, list)
    frame = table.frame if own and table.frame else "ras" if frame == "ras" else "lps"
    places = from_mm(points_mm, frame)
    if own and not more and table.header is not None:
        rows = _replaced(table, places)
        return markups.fcsv_text(table.header, rows, frame, table.kept)
    entries = zip(places, _labels(table), _notes(table, more), strict=True)
    rows = [
        [
            *(str(n), *(f"{x:.6f}" for x in place), "0", "0", "0", "1", "1", "1", "0"),
            *(label, note, ""),
        ]
        for n, (place, label, note) in enumerate(entries, start=1)
    ]
    return markups.fcsv_text(markups.FCSV_COLUMNS, rows, frame, None)


def points_mm(table: Table, frame: Frame, grid: Grid | None = None) -> np.ndarray:
    """Returns a table's points in RAS+ mm, P 3, by its file's frame if stated.

    Args:
      table: what was read.
      frame: of the numbers where the file states none.
      grid: the scan's, for "voxel".
    """
    return to_mm(table.places, table.frame or frame, grid)


def count_outside(points_mm: np.ndarray, grid: Grid) -> int:
    """Returns how many points, P 3 RAS+ mm, are a voxel or more off the grid."""
    inverse = np.linalg.inv(grid.affine_mm)
    voxels = points_mm @ inverse[:3, :3].T + inverse[:3, 3]
    inside = (voxels > -1) & (voxels < np.asarray(grid.shape))
    return int((~inside.all(-1)).sum())


def outside(
    table: Table,
    frame: Frame,
    count: Callable[[np.ndarray], int],
    *,
    points: str,
    scan: str,
    option: str,
    grid: Grid | None = None,
) -> str | None:
    """Returns a sentence if points lie outside a scan, and which frame would fit.

    Args:
      table: the points.
      frame: what the caller takes them for.
      count: of points P 3 in RAS+ mm, how many are outside.
      points: what to call the points.
      scan: what to call what they are outside of.
      option: the option that says the frame.
      grid: the scan's, where voxels are a frame too.
    """
    outlying = count(points_mm(table, frame, grid))
    if not outlying:
        return None
    said = f"{outlying} of {len(table.places)} points of {points} lie outside {scan}"
    if table.frame is not None:
        return f"{said}, in the frame {table.frame} that the file says; check the file"
    known: list[Frame] = ["lps", "ras", *(["voxel"] if grid is not None else [])]
    fitting = [
        other
        for other in known
        if other != frame and not count(to_mm(table.places, other, grid))
    ]
    mend = (
        f"pass {option} {' or '.join(fitting)}, where all are inside"
        if fitting
        else f"no other {option} puts all inside, check the file"
    )
    return f"{said}, read as {frame}; {mend}"


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


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
