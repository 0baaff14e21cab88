"""Validation metrics; finds pairs with a non-finite loss."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import metrics
from jaxreg.data import augment, pair_source
from jaxreg.data import batches as batches_lib
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.datasets import (
    Source,
    Sources,
    dataset_names,
    loading_of,
    loss_of,
    make_prepare,
    objectives_of,
    task_settings,
    with_task_settings,
)
from jaxreg.space import fields, sampling
from jaxreg.training import loop, parallel, step
from jaxreg.training.parallel import Layout
from jaxreg.typing import Variables


def _one_volume(layout: Layout) -> Layout:
    """Returns the layout of one pair: as many devices as share a volume in training.

    They are this process' first, since each process works on pairs of its own.
    """
    if layout.space == 1:
        return Layout("single")
    mine = jax.local_devices()[: layout.space]
    return parallel.make_layout("mesh", space=layout.space, devices=mine)


def make_validation(
    experiment: Experiment, sources: Sources, model: Any, layout: Layout
) -> Callable[[Variables], loop.Validation] | None:
    """Returns ``validate(variables)``, or None where there is nothing to score on.

    Each process scores its share of the pairs, one at a time: the objective's parts in
    evaluation mode with fixed noise, "dice" (mean over a pair's labels, nearest, on the
    network grid), and "folding_percent". A score is the mean over a dataset's pairs,
    then over the datasets that have it: a small one counts as a large one.
    """
    source = sources.validation
    if source is None:
        return None
    loading = loading_of(experiment, validation=True)
    one = _one_volume(layout)
    compiled = parallel.compile_step(
        _make_score(experiment, sources, model, one), one, donate=False
    )
    mine = _own_share(sources.validation_count)
    names = dataset_names(sources)

    def validate(variables):
        rows: list[tuple[str, dict[str, float]]] = []
        images = {}
        placed = parallel.place_state(variables, one)
        # One reader for all of them: worker processes take seconds to start.
        with batches_lib.Batches(
            source, loading, batch_size=1, start=mine.start, stop=mine.stop
        ) as batches:
            for i, batch in zip(mine, batches, strict=True):
                parts, (points, warped, shown) = jax.device_get(
                    compiled(placed, parallel.place_batch(batch, one))
                )
                row = {name: float(value) for name, value in parts.items()}
                cells = metrics.cell_determinant(np.asarray(points))
                row["folding_percent"] = metrics.folding_percent(cells)
                row |= _overlap(warped, batch)
                if "dice" in row and not np.isfinite(points).all():
                    row["dice"] = np.nan
                rows.append((names[int(batch["task"][0])], row))
                _warn_if_not_finite(row, _pair_name(source, i))
                if i == 0:
                    images = {name: a[0, ..., 0] for name, a in shown.items()}
        found = _of_datasets(rows, tuple(dict.fromkeys(names)))
        return loop.Validation(_means(found), images, found)

    return validate


def _make_score(
    experiment: Experiment, sources: Sources, model: Any, one: Layout
) -> Callable:
    """Returns ``score(variables, batch)`` of one pair.

    It gives the objective's parts, and (points of the forward transform, warped labels,
    images to show).
    """
    objective, shape = loss_of(experiment), experiment.loading.shape
    supervised = any(o.dice_weight > 0 for o in objectives_of(experiment))
    noise = jax.random.normal(jax.random.key(0), (1, *shape, 3))
    settings = task_settings(sources)

    def score(variables, batch):
        classes = settings.classes if supervised else ()
        pair = augment.to_pair(batch, None, None, classes=classes)
        pair = parallel.constrain(with_task_settings(pair, experiment, settings), one)
        _, (parts, maps, _) = step.evaluate(
            model, variables, pair, noise, objective=objective
        )
        points = maps.forward.on_grid(shape)
        # The Dice term's part is a loss; the score of that name is the overlap.
        if "dice" in parts:
            parts["dice_loss"] = parts.pop("dice")
        labels = batch.get("moving_labels")
        if labels is not None:
            labels = sampling.sample(labels.astype(jnp.float32), points, order=0)
        shown = {"fixed": pair.fixed, "moving": pair.moving}
        shown["warped"] = fields.warp(pair.moving, points)
        return parts, (points, labels, shown)

    return score


def _own_share(count: int) -> range:
    """Returns this process' part of the first `count` numbers; process 0 has 0."""
    share = -(-count // jax.process_count())
    start = min(share * jax.process_index(), count)
    return range(start, min(start + share, count))


def _overlap(warped: np.ndarray | None, batch: pair_source.Batch) -> dict[str, float]:
    """Returns the Dice score of a pair; none unless both scans have labels."""
    # A scan without a label map has zeros.
    sides = ("moving_labels", "fixed_labels")
    if warped is None or not all(np.any(batch[side]) for side in sides):
        return {}
    overlap = metrics.dice(warped.astype(int), batch["fixed_labels"])
    return {"dice": metrics.mean_score(overlap)}


def _pair_name(source: Source, index: int) -> str:
    named = isinstance(source, pair_source.PairSource)
    return f"pair {index} ({source.named(index)})" if named else f"pair {index}"


def _warn_if_not_finite(row: Mapping[str, float], pair: str) -> None:
    broken = [f"{n} {value:g}" for n, value in row.items() if not np.isfinite(value)]
    if broken:
        warnings.warn(
            f"validation {pair} gives {', '.join(broken)}, so that the means are not "
            "finite and never the best; look at the pair, or start anew with a lower "
            "optimizer.learning_rate",
            stacklevel=3,
        )


_NAMES = (
    "loss", "inverse_consistency", "similarity", "transform_magnitude", "folds",
    "dice_loss", "smoothness", "orthogonality", "task_similarity", "folding_percent",
    "dice",
)  # fmt: skip


def _of_datasets(
    rows: Sequence[tuple[str, Mapping[str, float]]], datasets: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Means over each dataset's pairs of all processes.

    A pair without a score is left out. A score that is not finite makes its mean
    infinite, which is never the best.

    Args:
      rows: of this process' pairs: (dataset, scores).
      datasets: all of them, in the same order on every process.
    """
    sums = np.zeros((2, len(datasets), len(_NAMES)))
    for dataset, row in rows:
        of_dataset = sums[:, datasets.index(dataset)]
        for i, name in enumerate(_NAMES):
            if name in row:
                of_dataset[:, i] += row[name] if np.isfinite(row[name]) else np.inf, 1
    totals, counts = loop.sum_over_processes(sums)
    return {
        dataset: {
            n: float(t / c) for n, t, c in zip(_NAMES, total, count, strict=True) if c
        }
        for dataset, total, count in zip(datasets, totals, counts, strict=True)
        if count.any()
    }


def _means(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the datasets that have a score, each of which counts alike."""
    having = {n: [s[n] for s in found.values() if n in s] for n in _NAMES}
    return {name: float(np.mean(values)) for name, values in having.items() if values}


def make_find_bad_pairs(
    experiment: Experiment, sources: Sources, model: Any, layout: Layout
) -> loop.FindBadPairs:
    """Returns ``find_bad_pairs(variables, batch)``, see `loop.FindBadPairs`."""
    objective, one = loss_of(experiment), _one_volume(layout)
    prepare = make_prepare(dataclasses.replace(experiment, augment=None), sources, one)

    def loss(variables, batch):
        pair = prepare(batch, None)
        noise = jnp.zeros((1, *pair.fixed.shape[1:4], 3))
        value, (parts, *_) = step.evaluate(
            model, variables, pair, noise, objective=objective
        )
        return value, parts

    compiled = parallel.compile_step(loss, one, donate=False)

    def find_bad_pairs(variables, batch):
        found, placed = [], parallel.place_state(variables, one)
        for i in range(len(batch["index"])):
            pair = {name: array[i : i + 1] for name, array in batch.items()}
            broken = not all(np.isfinite(a).all() for a in pair.values())
            if broken or not np.isfinite(
                compiled(placed, parallel.place_batch(pair, one))[0]
            ):
                found.append(i)
        return found

    return find_bad_pairs
