"""Comparison of two methods on the same pairs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from jaxreg import errors
from jaxreg.errors import UserError
from jaxreg.evaluation import table
from jaxreg.evaluation.table import EvalRecord, Result
from jaxreg.io import files

# --- is the difference more than chance? ---------------------------------------------

MEASURES: Mapping[str, Callable[[EvalRecord], float]] = {
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
        _one_method(table.read_csv(path), path, method)
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
    counts = np.zeros(total + 1)  # signs that give each sum of positive ranks
    counts[0] = 1.0
    for rank in ranks:
        counts[rank:] += counts[: total + 1 - rank].copy()
    positive = int(ranks[differences > 0].sum())
    tail = counts[: min(positive, total - positive) + 1].sum()
    return float(min(1.0, 2 * tail / counts.sum()))


def _measure_of(metric: str) -> Callable[[EvalRecord], float]:
    if metric in MEASURES:
        return MEASURES[metric]
    name, _, label = metric.rpartition("_")
    if name in ("dice", "hd95_mm") and label.isdecimal():
        return lambda row: getattr(row, name).get(int(label), math.nan)
    raise UserError(
        f"metric {metric} is unknown{errors.near_match(metric, MEASURES)}; expected "
        f"one of {', '.join(MEASURES)}, or dice_N or hd95_mm_N for label N"
    )


def _one_method(result: Result, path, method: str | None) -> tuple[EvalRecord, ...]:
    listed = ", ".join(f'"{name}"' for name in result.methods)
    if method is None:
        real = [m for m in result.methods if m not in (table.INITIAL, table.RESIZED)]
        if len(real) != 1:
            raise UserError(
                f"result file {path} has the methods {listed}; say which one to compare"
            )
        method = real[0]
    if method not in result.methods:
        raise UserError(
            f'result file {path} has no method "{method}"'
            f"{errors.near_match(method, result.methods)}, expected one of {listed}"
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
    # scipy.stats.bootstrap gives this interval too, but takes no single pair, and its
    # generator's argument changes its name between the versions that are allowed.
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
        f"{table.count_of_pairs(c.n)}{left_out}; {_significance_text(c)}"
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
