"""The best weight of smoothness for a task, by scores over several weights.

References:
  Hoopes et al., HyperMorph, IPMI 2021 (hyperparameters found after training).
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.data import pair_list
from jaxreg.errors import UserError
from jaxreg.evaluation import run
from jaxreg.evaluation import table as table_lib
from jaxreg.io import files
from jaxreg.nn.heads import SmoothnessRange
from jaxreg.registration import options as options_lib
from jaxreg.registration import rows
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo


@dataclasses.dataclass(frozen=True)
class Structure:
    """The weight that serves one structure of one task best.

    Attributes:
      task: what the network is told.
      table: the pairs' own task, whose label maps have the label.
      label: the structure's value there.
      weight: with the largest mean Dice over the pairs that have one with every weight.
      dice: that mean, 0 to 1.
      pairs: how many pairs that were.
    """

    task: str
    table: str
    label: int
    weight: float
    dice: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a sweep found.

    Tasks are what the network is told: "chest, inter". Several of a list may be one.

    Attributes:
      result: rows of every weight.
      best: each task's weight with the largest mean Dice, over the pairs that have one
        with every weight; without the tasks that have no such pair.
      dice: that mean, 0 to 1.
      pairs: how many pairs that were.
      unscored: the tasks without.
      structures: the same of every structure by itself, as UniReg's paper has it (table
        4); by task, then label.
    """

    result: table_lib.Result
    best: Mapping[str, float]
    dice: Mapping[str, float]
    pairs: Mapping[str, int]
    unscored: tuple[str, ...] = ()
    structures: tuple[Structure, ...] = ()


def weights_to_try(model: zoo.LoadedModel, count: int) -> tuple[float, ...]:
    """Returns weights over a network's range, evenly spaced in their logarithm.

    Args:
      model: trained with a range of smoothness.
      count: at least 2.

    Raises:
      UserError: it was trained with one weight per task, or there are too few.
    """
    smoothness_range = _range(model)
    if count < 2:
        raise UserError(f"`steps` is {count}, expected at least 2 weights to try")
    return tuple(
        float(w)
        for w in np.geomspace(smoothness_range.low, smoothness_range.high, count)
    )


def check_weights(model: zoo.LoadedModel, weights: Sequence[float]) -> None:
    """Checks weights to try, before anything is read.

    Raises:
      UserError: there are fewer than two, one is repeated, no number or outside of the
        network's range, or it has none.
    """
    smoothness_range = _range(model)
    given = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) < 2 or len(set(weights)) < len(weights):
        raise UserError(
            f"`smoothness` is {given}, expected two or more unlike weights to compare"
        )
    for weight in weights:
        if not smoothness_range.low <= weight <= smoothness_range.high:  # nan as well
            raise UserError(
                f"`smoothness` has {weight:g}, but {model.name} was trained for "
                f"{smoothness_range.low:g} to {smoothness_range.high:g}; give numbers "
                "between"
            )


def _range(model: zoo.LoadedModel) -> SmoothnessRange:
    smoothness_range = model.model.config.smoothness_condition
    if smoothness_range is None:
        raise UserError(
            f"{model.name} was not trained to be asked for a smoothness; train with "
            "model.smoothness_range, or give `model` of such weights"
        )
    return smoothness_range


def sweep(
    pairs: Sequence[pair_list.PairSpec],
    model: zoo.LoadedModel,
    options: options_lib.Options,
    weights: Sequence[float],
    *,
    out: files.PathLike,
    **settings: Any,
) -> Tuned:
    """Registers every pair with every weight, and finds each task's best.

    Args:
      pairs: with label maps.
      model: trained with a range of smoothness.
      options: how to register; without optimisation.
      weights: to try.
      out: see `run.evaluate_files`.
      **settings: keyword arguments of `run.evaluate_files`.

    Raises:
      UserError: see `check_weights` and `run.evaluate_files`; or a pair has no
        label maps.
    """
    check_weights(model, weights)
    if any(pair.fixed_label is None for pair in pairs):
        raise UserError(
            "tuning compares Dice, but a pair has no label maps; give the columns "
            "fixed_label and moving_label"
        )
    found = run.evaluate_files(
        pairs, model, options, out=out, smoothness=weights, **settings
    )
    called = settings.get("name") or pathlib.PurePath(model.name).name
    methods = {run.weight_name(called, weight): weight for weight in weights}
    names = pair_list.pair_names(pairs)
    task_of_pair = {
        (pair.table, name): rows.conditioning_of_pair(pair, model, options).key
        for pair, name in zip(pairs, names, strict=True)
    }
    # Task, or task, table and label, to pair to weight to Dice.
    scores: dict[Any, dict[tuple[str, str], dict[float, float]]]
    scores = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in found.rows:
        if row.method not in methods:
            continue
        pair, weight = (row.task, row.pair), methods[row.method]
        task = task_of_pair[pair]
        measured = {task: row.mean_dice}
        measured |= {(task, row.task, n): score for n, score in row.dice.items()}
        for what, score in measured.items():
            if not math.isnan(score):
                scores[what][pair][weight] = score
    of_all = {
        what: winner
        for what, one in scores.items()
        if (winner := _best(one, weights)) is not None
    }
    known = list(dict.fromkeys(task_of_pair.values()))
    best = {task: of_all[task] for task in known if task in of_all}
    structures = [
        Structure(what[0], what[1], what[2], *one)
        for what, one in of_all.items()
        if isinstance(what, tuple)
    ]
    return Tuned(
        found,
        {task: weight for task, (weight, _, _) in best.items()},
        {task: dice for task, (_, dice, _) in best.items()},
        {task: count for task, (_, _, count) in best.items()},
        tuple(task for task in known if task not in best),
        tuple(
            sorted(structures, key=lambda s: (known.index(s.task), s.table, s.label))
        ),
    )


def _best(
    scores: Mapping[Any, Mapping[float, float]], weights: Sequence[float]
) -> tuple[float, float, int] | None:
    """Returns the best weight, its mean and the number of pairs with every weight."""
    whole = [s for s in scores.values() if len(s) == len(weights)]
    if not whole:
        return None
    means = {w: float(np.mean([s[w] for s in whole])) for w in weights}
    weight = max(means, key=means.__getitem__)
    return weight, means[weight], len(whole)


def lines_of(
    found: Tuned, *, label_names: Mapping[str, Mapping[int, str]] | None = None
) -> list[str]:
    """Returns a line for each task's best weight, followed by its structures' own.

    Args:
      found: by `sweep`.
      label_names: table to label to its name.
    """
    lines = []
    for task, weight in found.best.items():
        lines.append(f"{task}: {_scored(weight, found.dice[task], found.pairs[task])}")
        own = [s for s in found.structures if s.task == task]
        tables = {s.table for s in own}
        for s in own:
            name = (label_names or {}).get(s.table, {}).get(s.label, f"label {s.label}")
            where = f"{s.table}, " if len(tables) > 1 else ""
            lines.append(f"  {where}{name}: {_scored(s.weight, s.dice, s.pairs)}")
    return lines


def _scored(weight: float, dice: float, pairs: int) -> str:
    return f"smoothness {weight:g}, Dice {100 * dice:.2f} % of {pairs} pairs"


def check_found(found: Tuned) -> None:
    """Checks that what was found can be relied on, before it is stored.

    Raises:
      UserError: a registration failed, or a task has no pair to compare.
    """
    failed = found.result.failed
    if failed:
        raise UserError(
            f"{len(failed)} of {len(found.result.rows)} rows failed for the reasons "
            "above, so that nothing is stored; mend these pairs or leave them out"
        )
    if found.unscored:
        raise UserError(
            f"{' and '.join(found.unscored)} has no pair with a Dice for every weight, "
            "so that nothing is stored; give `labels` that its label maps hold"
        )


def store_best(folder: files.PathLike, best: Mapping[str, float]) -> None:
    """Writes the best weights into a checkpoint, for registrations that name none.

    Args:
      folder: of the weights.
      best: task to weight, see `Tuned`; other tasks keep what they have.

    Raises:
      UserError: it is no checkpoint folder.
    """
    bundle = bundle_lib.load_bundle(folder)
    known = {**bundle.preprocessing.get("smoothness", {}), **best}
    preprocessing = {**bundle.preprocessing, "smoothness": known}
    bundle_lib.save_bundle(
        folder, dataclasses.replace(bundle, preprocessing=preprocessing)
    )
