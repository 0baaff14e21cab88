"""Results of an evaluation: rows, CSV files and Markdown tables.

One row is one way of registering one pair. `compare` says whether two methods differ
by more than chance.
"""

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxreg import metrics
from jaxreg.errors import UserError
from jaxreg.io import files

INITIAL = "initial"
"""The method of scans where their headers place them."""
RESIZED = "initial, resized"
"""The method of scans whose extents coincide."""


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """A row: one pair registered by one method; NaN where a number is missing.

    Attributes:
      method: how the transform was found.
      task: which table the pair counts in.
      pair: its name, see `pair_names`.
      dice: overlap per label, 0 to 1; NaN where neither scan has the label.
      hd95_mm: 95th percentile Hausdorff distance per label; NaN where the warped or the
        fixed map lacks the label.
      tre_mm: target registration error, mean over the landmarks.
      folding_percent: share of the fixed scan's voxels with a negative determinant.
      sdlogj: standard deviation of the determinant's logarithm on the fixed grid.
      seconds: wall time from the scans in memory to the transform.
      first: whether it was the method's first pair in a process, or among those that
        were registered at once, so that its seconds hold compilation.
    """

    method: str
    task: str
    pair: str
    dice: Mapping[int, float] = dataclasses.field(default_factory=dict)
    hd95_mm: Mapping[int, float] = dataclasses.field(default_factory=dict)
    tre_mm: float = math.nan
    folding_percent: float = math.nan
    sdlogj: float = math.nan
    seconds: float = math.nan
    first: bool = False

    @property
    def mean_dice(self) -> float:
        """Mean over the labels with a score, 0 to 1."""
        return metrics.mean_score(self.dice)

    @property
    def mean_hd95_mm(self) -> float:
        """Mean over the labels with a distance."""
        return metrics.mean_score(self.hd95_mm)

    @property
    def failed(self) -> bool:
        """Whether there is no number at all, because registering the pair failed."""
        numbers = (self.mean_dice, self.mean_hd95_mm)
        numbers += tuple(getattr(self, name) for name in _NUMBERS)
        return all(math.isnan(number) for number in numbers)


@dataclasses.dataclass(frozen=True)
class Result:
    """All rows, ordered by method, then pair."""

    rows: tuple[EvalRecord, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names in the order of their first row."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names in the order of their first row."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    @property
    def labels(self) -> tuple[int, ...]:
        """All labels of all rows, ascending."""
        return tuple(sorted({label for row in self.rows for label in row.dice}))

    @property
    def failed(self) -> tuple[EvalRecord, ...]:
        """The rows without a number."""
        return tuple(row for row in self.rows if row.failed)

    def select(
        self, *, method: str | None = None, task: str | None = None
    ) -> tuple[EvalRecord, ...]:
        """Returns the rows of one method, one task, or both."""
        return tuple(
            row
            for row in self.rows
            if method in (None, row.method) and task in (None, row.task)
        )


# --- CSV -----------------------------------------------------------------------------

_NUMBERS = ("tre_mm", "folding_percent", "sdlogj", "seconds")
_HEAD = ("method", "task", "pair", "dice", "hd95_mm", *_NUMBERS, "first")


def write_csv(path: files.PathLike, result: Result) -> None:
    """Writes all rows, numbers to full precision.

    The columns dice and hd95_mm are the means over labels, dice_1 and hd95_mm_1 those
    of label 1. A cell is empty where there is nothing to measure (no landmarks, a label
    of another task), "nan" where a label of the task has no score in this pair.

    Raises:
      UserError: the path cannot be written.
    """
    labels = result.labels
    columns = [f"{name}_{n}" for name in ("dice", "hd95_mm") for n in labels]
    with files.atomic_path(path) as unfinished:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_HEAD, *columns])
            for row in result.rows:
                cells = [row.mean_dice, row.mean_hd95_mm]
                cells += [getattr(row, name) for name in _NUMBERS]
                scores = [
                    repr(float(scores[n])) if n in scores else ""
                    for scores in (row.dice, row.hd95_mm)
                    for n in labels
                ]
                writer.writerow(
                    [row.method, row.task, row.pair, *map(_cell, cells)]
                    + [int(row.first), *scores]
                )


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def read_csv(path: files.PathLike) -> Result:
    """Reads what `write_csv` wrote.

    Raises:
      UserError: the file is missing or no such table; names the row.
    """
    path = files.check_readable(path, "result file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"result file {path} is no CSV text ({error})") from error
    header = lines[0] if lines else []
    missing = [
        name for name in ("method", "task", "pair", *_NUMBERS) if name not in header
    ]
    if missing:
        raise UserError(
            f"result file {path} lacks the columns {', '.join(missing)}; give a file "
            "that jaxreg evaluate wrote"
        )
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(
                f"result file {path}, row {number} has {len(cells)} cells, the header "
                f"{len(header)}; write it again"
            )
        try:
            rows.append(_row(dict(zip(header, cells, strict=True))))
        except ValueError as error:
            raise UserError(
                f"result file {path}, row {number} is damaged ({error}); write it again"
            ) from error
    if not rows:
        raise UserError(f"result file {path} has no rows; write it again")
    return Result(tuple(rows))


def _row(cells: Mapping[str, str]) -> EvalRecord:
    def number(text: str) -> float:
        return float(text) if text.strip() else math.nan

    def per_label(name: str) -> dict[int, float]:
        prefix = f"{name}_"
        return {
            int(column.removeprefix(prefix)): float(cell)
            for column, cell in cells.items()
            if column.startswith(prefix)
            and column.removeprefix(prefix).isdecimal()
            and cell.strip()
        }

    return EvalRecord(
        method=cells["method"],
        task=cells["task"],
        pair=cells["pair"],
        dice=per_label("dice"),
        hd95_mm=per_label("hd95_mm"),
        first=cells.get("first", "0").strip() == "1",
        **{name: number(cells[name]) for name in _NUMBERS},
    )


# --- the table -----------------------------------------------------------------------

_MOST_LABELS = 8  # as columns; more of them make a table of their own


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of the table: its title, its value in a row, decimals, the spread."""

    title: str
    value: Callable[[EvalRecord], float]
    decimals: int
    spread: bool = False


def _dice_columns(labels: Sequence[int], names: Mapping[int, str]) -> list[_Column]:
    def of_label(n: int) -> _Column:
        return _Column(
            f"{_label(n, names)} %", lambda row: 100 * row.dice.get(n, math.nan), 1
        )

    return [of_label(n) for n in labels]


def _hd95_columns(labels: Sequence[int], names: Mapping[int, str]) -> list[_Column]:
    def of_label(n: int) -> _Column:
        return _Column(_label(n, names), lambda row: row.hd95_mm.get(n, math.nan), 2)

    return [of_label(n) for n in labels]


def _label(n: int, names: Mapping[int, str]) -> str:
    return _escaped(names.get(n, f"label {n}"))


def _columns(labels: Sequence[int], names: Mapping[int, str]) -> list[_Column]:
    return [
        _Column("Dice %", lambda row: 100 * row.mean_dice, 1, spread=True),
        *_dice_columns(labels, names),
        _Column("HD95 mm", lambda row: row.mean_hd95_mm, 2, spread=True),
        _Column("TRE mm", lambda row: row.tre_mm, 2, spread=True),
        _Column(r"%\|J\|<0", lambda row: row.folding_percent, 3),
        _Column("SDlogJ", lambda row: row.sdlogj, 3),
        _Column("seconds", lambda row: row.seconds, 2),
    ]


def markdown(
    result: Result, *, label_names: Mapping[str, Mapping[int, str]] | None = None
) -> str:
    """Returns tables as the papers have them: methods by measures, one per task.

    Each number is the mean over a task's pairs (for Dice and HD95, of the means over a
    pair's labels), with the sample standard deviation over the pairs after ±. HD95 of
    each label is a table below, and so is Dice where labels are many. Seconds leave out
    a method's first pair, which compiles, where there are others. Measures that no row
    has get no column. With more than one task, a last table counts all pairs alike.

    Args:
      result: from `evaluate` or `read_csv`.
      label_names: task to label to its name.
    """
    names = label_names or {}
    parts = [_table(result, task, names.get(task, {})) for task in result.tasks]
    if len(result.tasks) > 1:
        parts.append(_table(result, None, {}))
    return "\n\n".join([*parts, _footer(result)]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _table(result: Result, task: str | None, names: Mapping[int, str]) -> str:
    of_task = Result(result.select(task=task))
    labels = [
        n
        for n in (of_task.labels if task is not None else ())
        if any(not math.isnan(row.dice.get(n, math.nan)) for row in of_task.rows)
    ]
    wide = len(labels) > _MOST_LABELS
    columns = [
        column
        for column in _columns([] if wide else labels, names)
        if any(not math.isnan(column.value(row)) for row in of_task.rows)
    ]
    count = len({(row.task, row.pair) for row in of_task.rows})
    title = "overall" if task is None else _escaped(task)
    lines = [f"### {title} ({count_of_pairs(count)})", ""]
    lines += _grid(
        ["method", *(column.title for column in columns)],
        [
            [_escaped(method)]
            + [_entry(column, of_task.select(method=method)) for column in columns]
            for method in of_task.methods
        ],
    )
    if wide:
        lines += ["", *_label_table(of_task, "Dice", _dice_columns(labels, names))]
    far = [
        column
        for column in _hd95_columns(labels, names)
        if any(not math.isnan(column.value(row)) for row in of_task.rows)
    ]
    if len(far) > 1:  # of one label, the mean says it
        lines += ["", *_label_table(of_task, "HD95 mm", far)]
    return "\n".join(lines)


def count_of_pairs(count: int) -> str:
    """Returns "1 pair" or "5 pairs"."""
    return f"{count} pair{'s' * (count != 1)}"


def _label_table(of_task: Result, title: str, columns: Sequence[_Column]) -> list[str]:
    """Returns a measure of each label by itself: labels by methods."""
    return _grid(
        [title, *map(_escaped, of_task.methods)],
        [
            [c.title, *(_entry(c, of_task.select(method=m)) for m in of_task.methods)]
            for c in columns
        ],
    )


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _entry(column: _Column, rows: Sequence[EvalRecord]) -> str:
    if column.title == "seconds":
        rows = _warm(rows)
    mean, spread = mean_and_deviation([column.value(row) for row in rows])
    if math.isnan(mean):
        return "-"
    text = f"{mean:.{column.decimals}f}"
    if column.spread and not math.isnan(spread):
        text += f" ± {spread:.{column.decimals}f}"
    return text


def _warm(rows: Sequence[EvalRecord]) -> Sequence[EvalRecord]:
    """Leaves out the first pair where there are others: it compiles."""
    return [row for row in rows if not row.first] or rows


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation (n - 1), without the NaNs.

    NaN where there are too few numbers: none for the mean, one for the deviation.
    """
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def first_pair_extra(result: Result) -> dict[str, float]:
    """Returns by how many seconds a method's first pair exceeds its others' mean.

    Mostly compilation. Methods without a first pair, or with it alone, are left out.
    """
    extra = {}
    for method in result.methods:
        rows = result.select(method=method)
        first = [row.seconds for row in rows if row.first]
        others = [row.seconds for row in rows if not row.first]
        if first and others:
            extra[method] = first[0] - statistics.fmean(others)
    return extra


def _footer(result: Result) -> str:
    """Returns what the numbers are, and what they leave out."""
    lines = [
        "Mean ± standard deviation over pairs. Dice and HD95: of the mean over a "
        "pair's labels. Folding and SDlogJ: of the fixed scan's voxels. Seconds: from "
        "the scans in memory to the transform, per pair."
    ]
    extra = first_pair_extra(result)
    if extra:
        spent = ", ".join(f"{_escaped(m)} {s:.1f} s" for m, s in extra.items())
        lines.append(f"The first pair compiles and is left out of seconds: + {spent}.")
    alone = _counted(result, _labels_alone)
    if alone:
        lines.append(f"Labels of one map alone (Dice 0, not in HD95): {alone}.")
    failed = _counted(result, lambda row: row.failed)
    if failed:
        lines.append(f"Pairs that failed and are in no mean: {failed}.")
    return " ".join(lines)


def _labels_alone(row: EvalRecord) -> int:
    """Returns how many labels overlap with nothing, so that no distance is defined."""
    return sum(
        math.isnan(distance) and not math.isnan(row.dice.get(label, math.nan))
        for label, distance in row.hd95_mm.items()
    )


def _counted(result: Result, count: Callable[[EvalRecord], int]) -> str:
    """Returns how many there are by method, those without any left out."""
    sums = {m: sum(map(count, result.select(method=m))) for m in result.methods}
    return ", ".join(f"{_escaped(m)} {n}" for m, n in sums.items() if n)


def summary(result: Result) -> dict[str, str]:
    """Returns one line per method over all pairs, name to numbers with their units."""
    lines = {}
    for method in result.methods:
        rows = result.select(method=method)
        parts = [
            f"{column.title.replace(chr(92), '')} {_entry(column, rows)}"
            for column in _columns([], {})
            if _entry(column, rows) != "-"
        ]
        lines[method] = ", ".join(parts)
    return lines
