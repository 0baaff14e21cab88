"""Tables of points in files, as the verbs of the command line take them."""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreg.errors import UserError


@dataclasses.dataclass(frozen=True)
class Table:
    """The points of a CSV file, with everything else in it.

    Attributes:
      header: names of the columns, None where the file has none.
      columns: which of them are x, y and z.
      rows: cells of each point.
      places: P 3, NumPy float64, as in the file.
    """

    header: list[str] | None
    columns: list[int]
    rows: list[list[str]]
    places: Any


def read(source: pathlib.Path) -> Table:
    """Reads a CSV with columns x, y, z, by name in a header or the first three.

    Raises:
      UserError: the table has no three columns of numbers.
    """
    import numpy as np

    from jaxreg.io import files

    try:
        with open(files.check_readable(source, "--points"), newline="") as file:
            rows = [
                row for row in csv.reader(file) if any(cell.strip() for cell in row)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--points {source} is no CSV text ({error})") from error
    header = rows[0] if rows and not _is_number(rows[0][0]) else None
    columns, body = [0, 1, 2], rows
    if header is not None:
        names = [name.strip().lower() for name in header]
        body = rows[1:]
        if not {"x", "y", "z"} <= set(names):
            raise UserError(
                f"--points {source} has the columns {', '.join(names)}, expected x, y "
                "and z"
            )
        columns = [names.index(name) for name in "xyz"]
    try:
        places = np.array([[float(row[c]) for c in columns] for row in body])
    except (ValueError, IndexError):
        raise UserError(
            f"--points {source} has a row without three numbers x, y, z; correct it"
        ) from None
    if not len(places) or not np.isfinite(places).all():
        raise UserError(f"--points {source} holds no points, or some not finite")
    return Table(header, columns, body, places)


def write(
    target: pathlib.Path,
    table: Table,
    places: Any,
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
    from jaxreg.io import files

    more = more or {}
    with files.atomic_path(target) as unfinished:
        with open(unfinished, "w", newline="") as file:
            writer = csv.writer(file)
            if table.header is not None:
                writer.writerow([*table.header, *more])
            for number, (row, place) in enumerate(zip(table.rows, places, strict=True)):
                cells = list(row)
                for column, value in zip(table.columns, place, strict=True):
                    cells[column] = f"{value:.6f}"
                writer.writerow([*cells, *(column[number] for column in more.values())])


def signs(frame: str) -> Any:
    """Returns what turns points of "lps" or "ras" into RAS+ and back, (3,)."""
    import numpy as np

    return np.array([-1.0, -1.0, 1.0]) if frame == "lps" else np.ones(3)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
