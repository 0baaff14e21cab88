"""Lists of pairs to register or evaluate, from CSV or JSON.

`jaxreg evaluate` scores such a list, `jaxreg register --pairs` registers it.
"""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxreg import errors
from jaxreg.data import modality
from jaxreg.data.manifest import records
from jaxreg.errors import UserError
from jaxreg.io import files, volumes

Pairing = records.Pairing


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """Two scans and what belongs to them; the fields are the columns of a pairs file.

    Attributes:
      fixed: the scan that stays.
      moving: the scan to be warped onto it.
      fixed_label: label map on the fixed scan's grid; both label maps or neither.
      moving_label: the same for the moving scan.
      fixed_mask: region of the fixed scan, used where the options ask for masks.
      moving_mask: the same for the moving scan.
      fixed_landmarks: CSV of points in the fixed scan; both or neither.
      moving_landmarks: the same points in the moving scan, in the same order.
      fixed_modality: a key of `modality.CONTRASTS`; the options' own if None.
      moving_modality: the same for the moving scan.
      task: which table the pair counts in ("all" if None), and the task that a network
        with task heads is conditioned on unless the options name one.
      region: part of the body; conditions such a network where it was trained on it.
      pairing: "inter" or "intra" subject, conditions such a network; that of the task
        in its training if None.
      transform_out: where to write the transform of the last method.
      warped_out: where to write the moving scan warped by it.
      inverse_out: where `jaxreg register` writes the inverse transform.
    """

    fixed: pathlib.Path
    moving: pathlib.Path
    fixed_label: pathlib.Path | None = None
    moving_label: pathlib.Path | None = None
    fixed_mask: pathlib.Path | None = None
    moving_mask: pathlib.Path | None = None
    fixed_landmarks: pathlib.Path | None = None
    moving_landmarks: pathlib.Path | None = None
    fixed_modality: str | None = None
    moving_modality: str | None = None
    task: str | None = None
    region: str | None = None
    pairing: Pairing | None = None
    transform_out: pathlib.Path | None = None
    warped_out: pathlib.Path | None = None
    inverse_out: pathlib.Path | None = None

    @property
    def table(self) -> str:
        """The name of the table that the pair counts in."""
        return self.task or "all"


_COLUMNS = tuple(field.name for field in dataclasses.fields(PairSpec))
_WORDS = ("fixed_modality", "moving_modality", "task", "region", "pairing")
_IMAGES = (
    "fixed",
    "moving",
    "fixed_label",
    "moving_label",
    "fixed_mask",
    "moving_mask",
)
_LANDMARKS = ("fixed_landmarks", "moving_landmarks")


def read_pairs(path: files.PathLike) -> tuple[PairSpec, ...]:
    """Reads a list of pairs; see `read_rows`."""
    return tuple(read_rows(path).values())


def read_rows(path: files.PathLike) -> dict[str, PairSpec]:
    """Reads a list of pairs, with what to call each row in a message.

    Args:
      path: .csv with the columns of `PairSpec`, of which fixed and moving must be
        there; or .json, a list of objects with these keys, or {"pairs": list}. Paths
        are relative to the file's folder; empty cells are absent.

    Returns:
      The pairs in their order, by "row 2" of a CSV, whose header is row 1, or "pair 1".

    Raises:
      UserError: the file is missing or damaged, a column is unknown, or a row is
        incomplete, contradicts itself or repeats another; names the row.
    """
    path = files.check_readable(path, "list of pairs")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise UserError(
            f"list of pairs {path} has the extension {suffix or '(none)'}, expected "
            ".csv or .json; rename or convert it"
        )
    rows = _csv_rows(path) if suffix == ".csv" else _json_rows(path)
    if not rows:
        raise UserError(f"{path} lists no pairs; add at least one")
    pairs: dict[str, PairSpec] = {}
    seen: dict[tuple[str, pathlib.Path, pathlib.Path], str] = {}
    for where, row in rows:
        pair = _pair(row, where, path.parent)
        key = (pair.table, pair.fixed, pair.moving)
        if key in seen:
            raise UserError(f"{where} repeats the pair of {seen[key]}; remove one")
        seen[key] = where
        pairs[where.removeprefix(f"{path}, ")] = pair
    return pairs


def _csv_rows(path: pathlib.Path) -> list[tuple[str, dict[str, str]]]:
    """Returns (where, cells by column) of each row; the header is row 1."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV text ({error}); write it again") from error
    header = [name.strip() for name in lines[0]] if lines else []
    _check_names(header, f"{path} has the column", needed=("fixed", "moving"))
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        where = f"{path}, row {number}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where} has {len(cells)} cells, the header {len(header)}; correct it"
            )
        rows.append((where, dict(zip(header, cells, strict=True))))
    return rows


def _json_rows(path: pathlib.Path) -> list[tuple[str, dict[str, str]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of Unicode as well
        raise UserError(f"{path} is no JSON text ({error}); write it again") from error
    if isinstance(content, dict):
        content = content.get("pairs")
    if not isinstance(content, list):
        raise UserError(
            f'{path} holds no list of pairs, expected [{{"fixed": ..., "moving": ...}},'
            ' ...] or {"pairs": [...]}'
        )
    rows = []
    for number, entry in enumerate(content, start=1):
        where = f"{path}, pair {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry!r}, expected an object with keys")
        _check_names(entry, f"{where} has the key", needed=("fixed", "moving"))
        for key, value in entry.items():
            if not isinstance(value, str | None):
                raise UserError(f"{where}: {key} is {value!r}, expected a text")
        rows.append((where, {key: value or "" for key, value in entry.items()}))
    return rows


def _check_names(names: Iterable[str], having: str, *, needed: Sequence[str]) -> None:
    names = list(names)
    for name in names:
        if name not in _COLUMNS:
            near = errors.near_match(name, _COLUMNS)
            raise UserError(
                f'{having} "{name}", which is unknown{near}; expected '
                f"{', '.join(_COLUMNS)}"
            )
        if names.count(name) > 1:
            raise UserError(f'{having} "{name}" twice; remove one')
    for name in needed:
        if name not in names:
            raise UserError(
                f'{having.split(" has the ")[0]} lacks "{name}", expected at least '
                f"{' and '.join(needed)}"
            )


def _pair(row: Mapping[str, str], where: str, folder: pathlib.Path) -> PairSpec:
    cells = {name: cell.strip() for name, cell in row.items() if cell.strip()}
    for name in ("fixed", "moving"):
        if name not in cells:
            raise UserError(f"{where} names no {name} scan; give its path")
    for kind in ("label", "landmarks"):
        given = [n for n in (f"fixed_{kind}", f"moving_{kind}") if n in cells]
        if len(given) == 1:
            raise UserError(
                f"{where} has {given[0]} alone; give both of fixed_{kind} and "
                f"moving_{kind}, or neither"
            )
    if cells.get("pairing", "inter") not in ("inter", "intra"):
        raise UserError(
            f"{where}: pairing is {cells['pairing']}, expected inter, intra"
        )
    fields: dict[str, Any] = {}
    for name, cell in cells.items():
        if name.endswith("_modality"):
            fields[name] = modality.canonical(cell)
        else:
            fields[name] = cell if name in _WORDS else folder / cell
    pair = PairSpec(**fields)
    checks = {name: volumes.check_source for name in _IMAGES}
    checks |= {name: files.check_readable for name in _LANDMARKS}
    for name, check in checks.items():
        value = getattr(pair, name)
        if value is not None:
            check(value, f"{where}: {name}")
    return pair


def pair_names(pairs: Sequence[PairSpec]) -> tuple[str, ...]:
    """Returns what to call each pair: "moving to fixed", by file name.

    Where two scans have one file name, all are called by their path below the common
    folder, so that the names do not depend on where the data lie.
    """
    paths = {scan for pair in pairs for scan in (pair.fixed, pair.moving)}
    called = {path: pathlib.Path(path.name) for path in paths}
    if len(set(called.values())) < len(paths):
        whole = {path: pathlib.Path(os.path.abspath(path)) for path in paths}
        common = os.path.commonpath([path.parent for path in whole.values()])
        called = {path: whole[path].relative_to(common) for path in paths}

    def name(path: pathlib.Path) -> str:
        # A folder's name, as of a DICOM series, may have points that part nothing.
        suffix = "" if path.is_dir() else files.full_suffix(path)
        return called[path].as_posix().removesuffix(suffix)

    return tuple(f"{name(pair.moving)} to {name(pair.fixed)}" for pair in pairs)
