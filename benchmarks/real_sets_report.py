"""Tables and figure of real_sets.py."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from real_sets_cases import Kind, Measure
from real_sets_methods import NAMES, START

from jaxreg import metrics

NUMBERS = (
    "tre_mm", "folding_percent", "sdlogj", "seconds", "compile_seconds", "cpu_seconds"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One pair registered by one method; NaN where a number is missing.

    Attributes:
      set: name of the set.
      method: name of the method.
      pair: name of the pair.
      measure: the set's main one.
      kind: whether the modalities are the same.
      settings: of the method.
      machine: where and under which load it ran.
      version: of the method's package.
      error: why there are no numbers.
      dice: per label, 0 to 1.
      hd95_mm: per label.
      tre_mm: mean over the landmarks.
      folding_percent: of the fixed scan's voxels.
      sdlogj: of the same voxels.
      seconds: see `real_sets_methods.Found`.
      compile_seconds: the same.
      cpu_seconds: the same.
    """

    set: str
    method: str
    pair: str
    measure: Measure
    kind: Kind
    settings: Mapping[str, Any]
    machine: str
    version: str = ""
    error: str = ""
    dice: Mapping[int, float] = dataclasses.field(default_factory=dict)
    hd95_mm: Mapping[int, float] = dataclasses.field(default_factory=dict)
    tre_mm: float = math.nan
    folding_percent: float = math.nan
    sdlogj: float = math.nan
    seconds: float = math.nan
    compile_seconds: float = math.nan
    cpu_seconds: float = math.nan

    @property
    def dice_percent(self) -> float:
        """Mean over the labels."""
        return 100 * metrics.mean_score(self.dice)

    @property
    def mean_hd95_mm(self) -> float:
        """Mean over the labels."""
        return metrics.mean_score(self.hd95_mm)

    @property
    def score(self) -> float:
        """The set's main measure: Dice in per cent, or TRE in mm."""
        return self.dice_percent if self.measure == "dice" else self.tre_mm


def line(row: Row) -> str:
    """Returns a row as a line of the progress."""
    head = f"{row.set}, {row.method}, {row.pair}: "
    if row.error:
        return head + row.error
    parts = [f"Dice {row.dice_percent:.1f} %"] if row.dice else []
    if not math.isnan(row.tre_mm):
        parts.append(f"TRE {row.tre_mm:.2f} mm")
    return head + ", ".join([*parts, f"{row.seconds:.1f} s"])


# --- tables ---------------------------------------------------------------------------


class Cell:
    """A method's rows of a set, beside the starts of the same pairs."""

    def __init__(self, rows: Sequence[Row], starts: Mapping[str, Row]):
        """Keeps them.

        Args:
          rows: of one set and method.
          starts: by pair.
        """
        self.rows = rows
        self._done = [row for row in rows if not row.error]
        self._starts = starts

    def mean(self, value: Callable[[Row], float]) -> float:
        """Mean over the pairs that have the value."""
        found = [v for row in self._done if not math.isnan(v := value(row))]
        return statistics.fmean(found) if found else math.nan

    @property
    def gains(self) -> list[float]:
        """By how much each pair is better than its start: Dice points, or mm."""
        found = []
        for row in self._done:
            start = self._starts.get(row.pair)
            if start is not None:
                sign = 1 if row.measure == "dice" else -1
                found.append(sign * (row.score - start.score))
        return found

    @property
    def gain(self) -> float:
        """Mean of `gains`."""
        return statistics.fmean(self.gains) if self.gains else math.nan

    @property
    def failures(self) -> str:
        """Pairs worse than their start, and pairs without a result."""
        worse = sum(gain < -1e-9 for gain in self.gains)
        return f"{worse} + {len(self.rows) - len(self._done)}"


def ordered(rows: Iterable[Row], always: Sequence[str] = ()) -> list[str]:
    """Returns the methods of rows, in the order of `NAMES`, others after these.

    Args:
      rows: of any sets.
      always: methods that are listed even without a row.
    """
    listed = list(dict.fromkeys([*always, *(row.method for row in rows)]))
    return [m for m in NAMES if m in listed] + [m for m in listed if m not in NAMES]


def cells_of(rows: Sequence[Row]) -> dict[str, dict[str, Cell]]:
    """Returns each set's methods, see `ordered`."""
    found = {}
    for name in dict.fromkeys(row.set for row in rows):
        own = [row for row in rows if row.set == name]
        starts = {row.pair: row for row in own if row.method == START}
        found[name] = {
            method: Cell([row for row in own if row.method == method], starts)
            for method in ordered(own)
        }
    return found


_COLUMNS: Sequence[tuple[str, Callable[[Row], float], int]] = (
    ("Dice %", lambda row: row.dice_percent, 1),
    ("HD95 mm", lambda row: row.mean_hd95_mm, 2),
    ("TRE mm", lambda row: row.tre_mm, 2),
    ("folds %", lambda row: row.folding_percent, 3),
    ("SDlogJ", lambda row: row.sdlogj, 3),
    ("seconds", lambda row: row.seconds, 1),
    ("compiling s", lambda row: row.compile_seconds, 1),
    ("CPU s", lambda row: row.cpu_seconds, 1),
)


def tables(rows: Sequence[Row]) -> str:
    """Returns all tables as Markdown: one of all sets, then one of each."""
    found = cells_of(rows)
    parts = [
        _summary(found, ordered(rows)),
        *(_table(name, cells) for name, cells in found.items()),
    ]
    errors = [f"- {line(row)}" for row in rows if row.error]
    if errors:
        parts.append("\n".join(["Without a result:", "", *errors]))
    versions = {f"{row.method} {row.version}" for row in rows if row.version}
    parts.append(
        "Means over the pairs with a result. Seconds: without compiling; CPU s: of all "
        "processors, with compiling. Gain: over the start of the same pairs, in Dice "
        "points or mm of TRE. Failures: pairs worse than their start + pairs without a "
        f"result. Versions: {', '.join(sorted(versions)) or 'none'}."
    )
    return "\n\n".join(parts)


def _summary(found: Mapping[str, Mapping[str, Cell]], methods: Sequence[str]) -> str:
    lines = []
    for name, cells in found.items():
        measure = next(iter(cells.values())).rows[0].measure
        unit, decimals = ("Dice %", 1) if measure == "dice" else ("TRE mm", 2)
        scores = {
            method: _number(cell.mean(lambda row: row.score), decimals)
            + f" ({len(cell.rows)})"
            for method, cell in cells.items()
        }
        lines.append([f"{name}, {unit}", *(scores.get(m, "-") for m in methods)])
    return _grid(["set (pairs)", *methods], lines)


def _table(name: str, cells: Mapping[str, Cell]) -> str:
    shown = [
        (title, value, decimals)
        for title, value, decimals in _COLUMNS
        if any(not math.isnan(cell.mean(value)) for cell in cells.values())
    ]
    lines = [
        [method, str(len(cell.rows))]
        + [_number(cell.mean(value), decimals) for _, value, decimals in shown]
        + [f"{cell.gain:+.2f}" if cell.gains else "-", cell.failures]
        for method, cell in cells.items()
    ]
    titles = [title for title, _, _ in shown]
    head = ["method", "pairs", *titles, "gain", "failures"]
    return f"### {name}\n\n{_grid(head, lines)}"


def _number(value: float, decimals: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


# --- the figure -----------------------------------------------------------------------

_COLOURS = (
    "#777777", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7",
    "#111111", "#7b3294", "#8c510a", "#4d9221", "#b2182b",
)  # fmt: skip
_MARKS = "osD^v<>P*Xph"


AGAINST = {
    "seconds": "seconds a pair, without compiling",
    "cpu_seconds": "processor seconds a pair, with compiling",
}
"""What a gain may have cost, and its words."""


def draw(rows: Sequence[Row], path: pathlib.Path, *, against: str = "seconds") -> None:
    """Draws gain over the start against time, a panel for each set.

    Args:
      rows: of all sets.
      path: PNG.
      against: a key of `AGAINST`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = cells_of(rows)
    # A method looks the same whichever others are there.
    methods = [m for m in ordered(rows, always=NAMES) if m != START]
    across = min(3, len(found))
    down = math.ceil(len(found) / across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(3.2 * across, 2.5 * down + 0.6), squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, cells) in zip(axes.flat, found.items(), strict=False):
        _panel(axis, name, cells, methods, against)
    times = [
        cell.mean(lambda row: getattr(row, against))
        for cells in found.values()
        for cell in cells.values()
        if cell.gains
    ]
    times = [seconds for seconds in times if seconds > 0] or [1.0]
    for axis in axes.flat[: len(found)]:
        axis.set_xlim(min(times) / 1.6, max(times) * 3)
    for axis in axes.flat[max(0, len(found) - across) : len(found)]:
        axis.set_xlabel(AGAINST[against], fontsize=8)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    order = [m for m in methods if m in handles]
    figure.legend(
        [handles[m] for m in order], order, loc="lower center", fontsize=8, ncols=5,
        frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.04 + 0.02 * math.ceil(len(order) / 5), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(
    axis: Any,
    name: str,
    cells: Mapping[str, Cell],
    methods: Sequence[str],
    against: str,
) -> None:
    measure = next(iter(cells.values())).rows[0].measure
    for index, method in enumerate(methods):
        cell = cells.get(method)
        if cell is None or not cell.gains:
            continue
        seconds = cell.mean(lambda row: getattr(row, against))
        colour = _COLOURS[index % len(_COLOURS)]
        axis.plot(
            seconds, cell.gain, linestyle="none", color=colour, label=method,
            marker=_MARKS[index % len(_MARKS)], markersize=6,
        )  # fmt: skip
        decimals = 1 if measure == "dice" else 2
        axis.annotate(
            f"{cell.gain:+.{decimals}f}", (seconds, cell.gain), fontsize=6,
            xytext=(5, -2), textcoords="offset points", color=colour,
        )  # fmt: skip
    axis.axhline(0, color="#999999", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.margins(y=0.1)
    start = cells[START].mean(lambda row: row.score) if START in cells else math.nan
    unit = f"Dice %, start {start:.1f}"
    if measure == "tre":
        unit = f"mm of TRE, start {start:.1f}"
    axis.set_title(name, fontsize=9, loc="left")
    axis.set_ylabel(f"gain, {unit}", fontsize=7)
    axis.tick_params(labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
