"""What an evaluation found: rows, a CSV file, tables as the papers have them, a test.

One row is one way of registering one pair. `compare` says whether two methods differ
by more than chance.
"""

import csv
import dataclasses
import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxreg import metrics
from jaxreg.errors import UserError
from jaxreg.io import files

INITIAL = "initial"
"""The method of scans where their headers place them."""
RESIZED = "initial, resized"
"""The method of scans whose extents coincide."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of registering one pair; NaN is a number that there is not.

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
      first: whether it was the method's first pair, whose seconds hold compilation.
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

    rows: tuple[Row, ...]

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
    def failed(self) -> tuple[Row, ...]:
        """The rows without a number."""
        return tuple(row for row in self.rows if row.failed)

    def select(
        self, *, method: str | None = None, task: str | None = None
    ) -> tuple[Row, ...]:
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


def _row(cells: Mapping[str, str]) -> Row:
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

    return Row(
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
    value: Callable[[Row], float]
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
    lines = [f"### {title} ({_pairs(count)})", ""]
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


def _pairs(count: int) -> str:
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


def _entry(column: _Column, rows: Sequence[Row]) -> str:
    if column.title == "seconds":
        rows = _warm(rows)
    mean, spread = mean_and_deviation([column.value(row) for row in rows])
    if math.isnan(mean):
        return "-"
    text = f"{mean:.{column.decimals}f}"
    if column.spread and not math.isnan(spread):
        text += f" ± {spread:.{column.decimals}f}"
    return text


def _warm(rows: Sequence[Row]) -> Sequence[Row]:
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


def _labels_alone(row: Row) -> int:
    """Returns how many labels overlap with nothing, so that no distance is defined."""
    return sum(
        math.isnan(distance) and not math.isnan(row.dice.get(label, math.nan))
        for label, distance in row.hd95_mm.items()
    )


def _counted(result: Result, count: Callable[[Row], int]) -> str:
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


# --- is the difference more than chance? ---------------------------------------------

MEASURES: Mapping[str, Callable[[Row], float]] = {
    "dice": lambda row: row.mean_dice,
    "hd95_mm": lambda row: row.mean_hd95_mm,
    "tre_mm": lambda row: row.tre_mm,
    "folding_percent": lambda row: row.folding_percent,
    "sdlogj": lambda row: row.sdlogj,
    "seconds": lambda row: row.seconds,
}
"""What `compare` can compare, by the name of its column."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods on the same pairs; differences are b - a.

    Attributes:
      metric: a name of `MEASURES`.
      method_a: what a is.
      method_b: what b is.
      n: pairs that have the measure in both.
      left_out: pairs that lack it in one or both.
      mean_a: mean of a over the n pairs.
      mean_b: mean of b.
      mean_difference: their difference.
      interval: 95 % bootstrap percentile interval of the mean difference.
      p: two-sided, Wilcoxon's signed-rank test; 1 if all differences are 0. With
        fewer than `FEWEST` pairs that differ it cannot be below 0.05.
      extremes: the smallest and the largest difference.
      differing: pairs whose difference is not 0.
    """

    metric: str
    method_a: str
    method_b: str
    n: int
    left_out: int
    mean_a: float
    mean_b: float
    mean_difference: float
    interval: tuple[float, float]
    p: float
    extremes: tuple[float, float]
    differing: int


FEWEST = 6
"""Pairs that must differ for Wilcoxon's test: of 5, the least p is 2/2^5 = 0.0625."""


def compare(
    csv_a: files.PathLike,
    csv_b: files.PathLike,
    *,
    metric: str = "dice",
    method_a: str | None = None,
    method_b: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Tests whether two result files differ by more than chance, pair by pair.

    Wilcoxon's signed-rank test without the zero differences (exact up to 50 pairs, also
    where differences are equal), and a bootstrap over pairs. Both take the pairs as
    independent; pairs that share a subject are less than that, so a p near the limit
    deserves doubt.

    Args:
      csv_a: a file of `write_csv`.
      csv_b: another one, or the same with another method.
      metric: a name of `MEASURES`, or dice_N or hd95_mm_N for label N.
      method_a: which method of a file; may be left out where there is one besides the
        initial rows.
      method_b: the same for b.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      UserError: a file, method or metric is unknown, the pairs differ, or no pair has
        the metric.

    References:
      Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1945;
      Efron and Tibshirani, An introduction to the bootstrap, 1993.
    """
    measure = _measure_of(metric)
    chosen = [
        _one_method(read_csv(path), path, method)
        for path, method in ((csv_a, method_a), (csv_b, method_b))
    ]
    values = [{(row.task, row.pair): measure(row) for row in rows} for rows in chosen]
    _check_same_pairs(values[0], values[1], csv_a, csv_b)
    both = np.array([[values[0][key], values[1][key]] for key in values[0]])
    known = both[np.isfinite(both).all(axis=1)]
    if not len(known):
        raise UserError(
            f"no pair of {csv_a} and {csv_b} has {metric} in both; compare another "
            "metric"
        )
    difference = known[:, 1] - known[:, 0]
    # What the last digits of a subtraction say is no difference, and no order of two.
    ranked = np.round(difference / max(np.abs(known).max(), 1e-300), 12)
    ranked = ranked[ranked != 0]
    return Comparison(
        metric=metric,
        method_a=chosen[0][0].method,
        method_b=chosen[1][0].method,
        n=len(known),
        left_out=len(both) - len(known),
        mean_a=float(known[:, 0].mean()),
        mean_b=float(known[:, 1].mean()),
        mean_difference=float(difference.mean()),
        interval=_bootstrap(difference, resamples, seed),
        p=_signed_rank_p(ranked),
        extremes=(float(difference.min()), float(difference.max())),
        differing=len(ranked),
    )


_EXACT = 50  # pairs


def _signed_rank_p(differences: np.ndarray) -> float:
    """Returns the two-sided p of Wilcoxon's signed-rank test; none is 0.

    Up to 50 the distribution over all signs is counted, for equal differences by their
    mean rank, where SciPy takes the normal distribution.
    """
    if not len(differences):
        return 1.0
    if len(differences) > _EXACT:
        found: Any = stats.wilcoxon(differences, zero_method="wilcox")
        return float(found.pvalue)
    # Twice the ranks: whole numbers also where the mean of two is not.
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    total = int(ranks.sum())
    ways = np.zeros(total + 1)  # signs that give each sum of positive ranks
    ways[0] = 1.0
    for rank in ranks:
        ways[rank:] += ways[: total + 1 - rank].copy()
    positive = int(ranks[differences > 0].sum())
    tail = ways[: min(positive, total - positive) + 1].sum()
    return float(min(1.0, 2 * tail / ways.sum()))


def near_match(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" where a known name is like this one, else ""."""
    near = difflib.get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _measure_of(metric: str) -> Callable[[Row], float]:
    if metric in MEASURES:
        return MEASURES[metric]
    name, _, label = metric.rpartition("_")
    if name in ("dice", "hd95_mm") and label.isdecimal():
        return lambda row: getattr(row, name).get(int(label), math.nan)
    raise UserError(
        f"metric {metric} is unknown{near_match(metric, MEASURES)}; expected one of "
        f"{', '.join(MEASURES)}, or dice_N or hd95_mm_N for label N"
    )


def _one_method(result: Result, path, method: str | None) -> tuple[Row, ...]:
    listed = ", ".join(f'"{name}"' for name in result.methods)
    if method is None:
        real = [m for m in result.methods if m not in (INITIAL, RESIZED)]
        if len(real) != 1:
            raise UserError(
                f"result file {path} has the methods {listed}; say which one to compare"
            )
        method = real[0]
    if method not in result.methods:
        raise UserError(
            f'result file {path} has no method "{method}"'
            f"{near_match(method, result.methods)}, expected one of {listed}"
        )
    rows = result.select(method=method)
    if len({(row.task, row.pair) for row in rows}) < len(rows):
        raise UserError(f'result file {path} lists a pair of "{method}" twice; mend it')
    return rows


def _check_same_pairs(a: Mapping, b: Mapping, path_a, path_b) -> None:
    def named(keys) -> str:
        shown = [f'"{pair}" of {task}' for task, pair in keys]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        return ", ".join(shown[:5]) + more

    alone = [
        f"{path} alone has {named(keys)}"
        for path, keys in (
            (path_a, [key for key in a if key not in b]),
            (path_b, [key for key in b if key not in a]),
        )
        if keys
    ]
    if alone:
        raise UserError(
            f"the result files are of different pairs: {'; '.join(alone)}; evaluate "
            "both on one list"
        )


def _bootstrap(
    differences: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    count = len(differences)
    # One resample at a time: many pairs times many resamples would fill the memory.
    means = [
        differences[rng.integers(count, size=count)].mean() for _ in range(resamples)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def comparison_text(comparison: Comparison) -> str:
    """Returns a comparison as a sentence; Dice and its interval in per cent points."""
    c = comparison
    dice = c.metric.startswith("dice")
    scale, unit = (100, " %") if dice else (1, "")
    left_out = f" ({c.left_out} without it left out)" if c.left_out else ""
    return (
        f"{c.metric}: {c.method_b} {scale * c.mean_b:.4g}{unit}, {c.method_a} "
        f"{scale * c.mean_a:.4g}{unit}; {_difference_text(c, scale)} over "
        f"{_pairs(c.n)}{left_out}; {_significance_text(c)}"
    )


def _difference_text(c: Comparison, scale: float) -> str:
    mean = f"{scale * c.mean_difference:+.4g}"
    if c.n == 1:
        return f"difference {mean}"
    # A bootstrap of a few pairs is far narrower than what it stands for.
    few = c.n < FEWEST
    low, high = (scale * value for value in (c.extremes if few else c.interval))
    name = "from" if few else "95 % interval"
    return f"mean difference {mean} ({name} {low:+.4g} to {high:+.4g})"


def _significance_text(c: Comparison) -> str:
    if c.differing == 0:
        return "no pair differs, there is nothing to test"
    if c.differing < FEWEST:
        return (
            f"no p: fewer than {FEWEST} pairs differ ({c.differing} of {c.n}), with "
            "which Wilcoxon's signed-rank test cannot reach p < 0.05"
        )
    return f"Wilcoxon signed-rank p = {c.p:.3g}"


def compare_files(csv_a: files.PathLike, csv_b: files.PathLike, **settings: Any) -> str:
    """Compares two result files; `settings` are keyword arguments of `compare`.

    Returns:
      The sentence to be printed.

    Raises:
      UserError: see `compare`.
    """
    return comparison_text(compare(csv_a, csv_b, **settings))
