"""Sampling of training pairs: pair i, from the seed and i alone.

uniGradICON draws as many pairs from every dataset (``schedule="per_dataset"``),
multiGradICON draws datasets with replacement by weight (``"weighted"``). The two images
of the network and, where a task randomises the similarity, the two images that the
similarity compares come from separate random streams: changing the strategy never
changes the network's inputs. (In the first multiGradICON models the similarity's
images had overwritten the network's.)
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from jaxreg.data import pairs
from jaxreg.data.manifest.records import Pairing, Record
from jaxreg.data.pairs import ImageRef, PairPlan, Scan, Strategy, Task
from jaxreg.errors import UserError

Schedule = Literal["per_dataset", "weighted"]

# One random stream per decision: drawing more in one leaves the others as they are.
_TASK, _NETWORK, _TARGET, _ORDER = range(4)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The pairs of a training run, for random access; made by `sampler`.

    ``sampler[i]`` is pair i for any ``i >= 0``, a pure function of the seed and i; i is
    of epoch ``i // len(sampler)``. Iterating goes through the first epoch.

    Attributes:
      records: what `ImageRef.record` counts.
      tasks: what `PairPlan.task` counts.
      pairs_per_epoch: of all tasks together.
      schedule: see `sampler`.
      seed: of all that is drawn.
      shares: the expected share of each task, adding up to one.
    """

    records: tuple[Record, ...]
    tasks: tuple[Task, ...]
    pairs_per_epoch: int
    schedule: Schedule
    seed: int
    shares: tuple[float, ...]
    _pools: tuple[pairs.InterPool | pairs.IntraPool, ...] = dataclasses.field(
        repr=False, compare=False
    )
    _scans: tuple[Mapping[int, Scan], ...] = dataclasses.field(
        repr=False, compare=False
    )

    def __len__(self) -> int:
        """Returns the pairs of one epoch."""
        return self.pairs_per_epoch

    def __iter__(self) -> Iterator[PairPlan]:
        """Goes through the first epoch."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> PairPlan:
        """Returns pair `index`.

        Raises:
          IndexError: it is negative.
        """
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"pair {index}: pairs are counted from 0")
        number = self._task_number(index)
        moving, fixed = self._pools[number].draw(_rng(self.seed, _NETWORK, index))
        targets = self._targets(number, moving, fixed, _rng(self.seed, _TARGET, index))
        return PairPlan(number, moving, fixed, *targets)

    def _task_number(self, index: int) -> int:
        if self.schedule == "weighted":
            edges = np.cumsum(self.shares)[:-1]
            draw = _rng(self.seed, _TASK, index).random()
            return int(np.searchsorted(edges, draw, side="right"))
        epoch, place = divmod(index, self.pairs_per_epoch)
        start = epoch * self.pairs_per_epoch
        order = _order(self.seed, epoch, self.pairs_per_epoch)
        # Counting on over epochs, tasks take turns with what cannot be shared evenly.
        return (start + int(order[place])) % len(self.tasks)

    def _targets(
        self, number: int, moving: ImageRef, fixed: ImageRef, rng: np.random.Generator
    ) -> tuple[ImageRef | None, ImageRef | None]:
        """Draws what the similarity compares; depends on the subjects alone."""
        strategy = self.tasks[number].randomise
        if strategy == "B":
            return None, None
        of_moving = self._scans[number][moving.record]
        of_fixed = self._scans[number][fixed.record]
        if strategy == "R":
            return pairs.pick_image(rng, of_moving), pairs.pick_image(rng, of_fixed)
        common = sorted(of_moving.keys() & of_fixed.keys())
        if not common:
            return None, None
        modality = pairs.pick(rng, common)
        return of_moving[modality][0], of_fixed[modality][0]


def sampler(
    records: Sequence[Record],
    tasks: Sequence[Task],
    *,
    pairs_per_epoch: int,
    schedule: Schedule = "per_dataset",
    seed: int = 0,
) -> Sampler:
    """Returns the pairs of a training run.

    An inter pair shares the region; each image's modality is drawn uniformly, then the
    image uniformly among that modality's. An intra pair is a subject drawn uniformly
    and two of its scans; scans differ by `Record.session`, and where a subject
    has one session only, every image counts as a scan. Targets (F, R) are images of the
    same scans as the network's: same subject, region and session. F falls back to the
    network's images where two scans share no modality.

    Args:
      records: of one split; datasets without a task are left out.
      tasks: at least one.
      pairs_per_epoch: of all tasks together.
      schedule: "per_dataset": each task has the same number of pairs in every epoch, up
        to what does not divide, in shuffled order (uniGradICON: 4000 pairs, 1000 of
        each of 4). "weighted": each pair's task is drawn by weight (multiGradICON).
      seed: not negative.

    Raises:
      UserError: a task without records, without any possible pair, or with settings
        that do not fit.
      ValueError: the records are of several splits.
    """
    records, tasks = tuple(records), tuple(tasks)
    splits = {record.split for record in records}
    if len(splits) > 1:
        raise ValueError(f"records of several splits in one sampler: {sorted(splits)}")
    _check_settings(tasks, pairs_per_epoch, schedule, seed)
    pools, scans = [], []
    for task in tasks:
        members = pairs.records_of(records, task)
        pairing = pairs.checked_pairing(records, task, members)
        pools.append(pairs.pool_of(records, task, members, pairing))
        scans.append(pairs.target_scans(records, task, members, pairing))
    weights = [1.0] * len(tasks)
    if schedule == "weighted":
        weights = [
            other if task.weight is None else task.weight
            for task, other in zip(tasks, modality_weights(records, tasks), strict=True)
        ]
    shares = tuple(float(weight / math.fsum(weights)) for weight in weights)
    return Sampler(
        records=records,
        tasks=tasks,
        pairs_per_epoch=pairs_per_epoch,
        schedule=schedule,
        seed=seed,
        shares=shares,
        _pools=tuple(pools),
        _scans=tuple(scans),
    )


def modality_weights(
    records: Sequence[Record], tasks: Sequence[Task]
) -> tuple[float, ...]:
    """Returns each task's number of regions times its pairs of modalities.

    ``regions * C(m + 1, 2)`` for m modalities, the inverted CT counting as one: the
    unordered pairs, with repetition, that registration meets (multiGradICON, training).

    Raises:
      UserError: a task's dataset has no records.
    """
    weights = []
    for task in tasks:
        members = pairs.records_of(records, task)
        modalities = {
            name for i in members for name in pairs.image_refs_of(records, task, i)
        }
        regions = {records[i].region for i in members}
        weights.append(float(len(regions) * math.comb(len(modalities) + 1, 2)))
    return tuple(weights)


def equal_shares(counts: Sequence[int], total: int) -> list[int]:
    """Divides a number into equal shares, each at least 1 and at most its count.

    A share that its count cuts short leaves the rest to the others; a remainder goes
    to the first ones.
    """
    shares = [0] * len(counts)
    left = min(max(total, len(counts)), sum(counts)) if total else 0
    while left:
        open_ones = [i for i, count in enumerate(counts) if shares[i] < count]
        each = max(left // len(open_ones), 1)
        for i in open_ones[:left]:
            added = min(each, counts[i] - shares[i])
            shares[i], left = shares[i] + added, left - added
    return shares


def region_weights(anatomies: Mapping[str, Collection[str]]) -> dict[str, float]:
    """Returns weights that even out how often anatomies are met.

    A dataset's weight is the sum over its anatomies of ``max_count / count``, where
    count is the number of datasets that show the anatomy and max_count the largest of
    these (multiGradICON, further training).

    Args:
      anatomies: what each dataset shows, e.g. ``{"UKB": ("abdomen", "lung", "knee")}``.

    Raises:
      UserError: a dataset has no anatomy.
    """
    counts: dict[str, int] = {}
    for dataset, names in anatomies.items():
        if isinstance(names, str):
            raise TypeError(f"anatomies of {dataset!r}: one name, expected several")
        if not names:
            raise UserError(
                f"dataset {dataset!r} has no anatomy, expected at least one to weigh "
                "it by; name one or give the task a weight"
            )
        for name in set(names):
            counts[name] = counts.get(name, 0) + 1
    most = max(counts.values(), default=0)
    return {
        dataset: math.fsum(most / counts[name] for name in sorted(set(names)))
        for dataset, names in anatomies.items()
    }


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, index))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns a permutation of `count`, cached for all pairs of an epoch."""
    order = _rng(seed, _ORDER, epoch).permutation(count)
    order.setflags(write=False)
    return order


def _check_settings(tasks, pairs_per_epoch: int, schedule: str, seed: int) -> None:
    if not tasks:
        raise UserError("no task to train on, expected at least one; name a dataset")
    if pairs_per_epoch < 1:
        raise UserError(
            f"pairs_per_epoch is {pairs_per_epoch}, expected at least 1; raise it"
        )
    if seed < 0:
        raise UserError(f"seed is {seed}, expected 0 or more; choose another")
    _check_choice("schedule", schedule, get_args(Schedule))
    for task in tasks:
        name = f"task {task.dataset!r}: randomise"
        _check_choice(name, task.randomise, get_args(Strategy))
        if task.pairing is not None:
            _check_choice(
                f"task {task.dataset!r}: pairing", task.pairing, get_args(Pairing)
            )
        weight = task.weight
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"task {task.dataset!r} has weight {weight:g}, expected a positive "
                "number; leave the task out if it is not to be trained"
            )
        if task.smoothness is not None and not 0 <= task.smoothness < math.inf:
            raise UserError(
                f"task {task.dataset!r} has smoothness {task.smoothness:g}, expected 0 "
                "or more; leave it out for that of its objective"
            )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} is {value!r}, expected one of {', '.join(choices)}; correct it"
        )
