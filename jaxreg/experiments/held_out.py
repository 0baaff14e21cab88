"""Pairs of held-out scans, by which the best weights are chosen."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from jaxreg.data import pairs
from jaxreg.data import sampler as sampler_lib
from jaxreg.data.manifest import neighbours
from jaxreg.data.manifest.records import Manifest, Record
from jaxreg.experiments.config import Experiment


@dataclasses.dataclass(frozen=True)
class FixedPlans:
    """A list of pairs in place of a sampler.

    Attributes:
      tasks: what `PairPlan.task` counts.
      plans: pair i is the i-th.
    """

    tasks: tuple[pairs.Task, ...]
    plans: tuple[pairs.PairPlan, ...]

    def __getitem__(self, index: int, /) -> pairs.PairPlan:
        """Returns pair `index`."""
        return self.plans[index]


def validation_plans(
    whole: Manifest, tasks: Sequence[pairs.Task], experiment: Experiment
) -> tuple[tuple[pairs.PairPlan, ...], tuple[Record, ...]]:
    """Returns the pairs that validate, see `DataConfig`, and the records they count.

    Of several tasks of one dataset, the first has its pairs. A dataset with held-out
    scans, but no pair of them, is warned about.
    """
    pairing_of = {task.dataset: task.pairing for task in reversed(tasks)}
    held_out = tuple(
        dataclasses.replace(
            record, pairing=pairing_of.get(record.dataset) or record.pairing
        )
        for record in whole.of_split("val")
    )
    number = {record: i for i, record in enumerate(held_out)}
    task_of = {task.dataset: i for i, task in reversed(list(enumerate(tasks)))}
    found = [
        pairs.PairPlan(
            task_of[fixed.dataset],
            moving=pairs.ImageRef(number[moving]),
            fixed=pairs.ImageRef(number[fixed]),
        )
        for fixed, moving in neighbours.neighbour_pairs(
            held_out,
            experiment.data.neighbours,
            across_modalities=True,  # as the sampler draws them
        )
        if fixed.dataset in task_of
    ]
    by_task: dict[int, list[pairs.PairPlan]] = {}
    for plan in found:
        by_task.setdefault(plan.task, []).append(plan)
    if experiment.data.validation_pairs:
        _warn_of_unpaired(held_out, {tasks[i].dataset for i in by_task}, tasks)
    counts = [len(several) for several in by_task.values()]
    shares = sampler_lib.equal_shares(counts, experiment.data.validation_pairs)
    plans: list[pairs.PairPlan] = []
    for several, share in zip(by_task.values(), shares, strict=True):
        chosen = np.linspace(0, len(several), share, endpoint=False).astype(int)
        plans += [several[i] for i in chosen]
    return tuple(plans), held_out


def _warn_of_unpaired(
    held_out: Sequence[Record], paired: set[str], tasks: Sequence[pairs.Task]
) -> None:
    for dataset in dict.fromkeys(task.dataset for task in tasks):
        scans = sum(record.dataset == dataset for record in held_out)
        if scans and dataset not in paired:
            warnings.warn(
                f"dataset {dataset} has {scans} held-out scans and no pair among them, "
                "so that it neither validates nor has a say in which weights are the "
                "best; hold out two subjects (of intra pairs: two scans of one), by a "
                "column split or a smaller data.holdout",
                stacklevel=4,
            )
