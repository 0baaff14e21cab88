"""Which smoothness serves a task best: a network is asked for several and scored.

References:
  Hoopes et al., HyperMorph, IPMI 2021 (hyperparameters found after training).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg import evaluate, register, results, zoo
from jaxreg.errors import UserError
from jaxreg.io import checkpoints, files
from jaxreg.models import kinds


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a sweep found.

    Attributes:
      result: rows of every weight.
      best: each task's weight with the largest mean Dice over its pairs.
      dice: that mean, 0 to 1.
    """

    result: results.Result
    best: Mapping[str, float]
    dice: Mapping[str, float]


def weights_to_try(model: zoo.LoadedModel, count: int) -> tuple[float, ...]:
    """Returns weights over a network's range, evenly spaced in their logarithm.

    Args:
      model: trained with a range of smoothness.
      count: at least 2.

    Raises:
      UserError: it was trained with one weight per task, or there are too few.
    """
    config: Any = getattr(model.model, "config", None)
    asked = kinds.smoothness_range(config)
    if asked is None:
        raise UserError(
            f"{model.name} was not trained to be asked for a smoothness; train with "
            "model.smoothness_range, or give --model of such weights"
        )
    if count < 2:
        raise UserError(f"--count is {count}, expected at least 2 weights to try")
    return tuple(float(w) for w in np.geomspace(asked.low, asked.high, count))


def sweep(
    pairs: Sequence[evaluate.PairSpec],
    model: zoo.LoadedModel,
    options: register.Options,
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
      out: see `evaluate.evaluate_files`.
      **settings: keyword arguments of `evaluate.evaluate_files`.

    Raises:
      UserError: see `evaluate.evaluate_files`; or a pair has no label maps.
    """
    if any(pair.fixed_label is None for pair in pairs):
        raise UserError(
            "tuning compares Dice, but a pair has no label maps; give the columns "
            "fixed_label and moving_label"
        )
    found = evaluate.evaluate_files(
        pairs, model, options, out=out, smoothness=weights, **settings
    )
    called = settings.get("name") or pathlib.PurePath(model.name).name
    best, dice = {}, {}
    told = {task: task for task in found.tasks}
    if options.task != "auto":  # all of them are told one task
        told = {options.task: None}
    for called_task, task in told.items():
        means = {}
        for weight in weights:
            method = evaluate.weight_name(called, weight)
            rows = found.select(method=method, task=task)
            means[weight] = results.mean_and_deviation(r.mean_dice for r in rows)[0]
        scored = {weight: mean for weight, mean in means.items() if mean == mean}
        if scored:
            best[called_task] = max(scored, key=scored.__getitem__)
            dice[called_task] = scored[best[called_task]]
    return Tuned(found, best, dice)


def remember(folder: files.PathLike, best: Mapping[str, float]) -> None:
    """Writes the best weights into a checkpoint, for registrations that name none.

    Args:
      folder: of the weights.
      best: task to weight; other tasks keep what they have.

    Raises:
      UserError: it is no checkpoint folder.
    """
    bundle = checkpoints.load_bundle(folder)
    known = {**bundle.preprocessing.get("smoothness", {}), **best}
    preprocessing = {**bundle.preprocessing, "smoothness": known}
    checkpoints.save_bundle(
        folder, dataclasses.replace(bundle, preprocessing=preprocessing)
    )
