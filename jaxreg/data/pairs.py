"""Sampling of training pairs: pair i, from the seed and i alone.

uniGradICON draws as many pairs from every dataset (``schedule="per_dataset"``),
multiGradICON draws datasets with replacement by weight (``"weighted"``). The two images
of the network and, where a task randomises the similarity, the two images that the
similarity compares come from separate random streams: changing the strategy never
changes what the network sees. (In the first multiGradICON models the similarity's
images had overwritten the network's.)
"""

import dataclasses
import difflib
import functools
import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from jaxreg.data import modality as modality_lib
from jaxreg.data.manifest.records import Pairing, Record
from jaxreg.errors import UserError

Strategy = Literal["B", "F", "R"]
"""What the similarity compares.

B: the network's own images. F: one modality that both subjects have, drawn for the
pair. R: a modality drawn for each image by itself.
"""

Schedule = Literal["per_dataset", "weighted"]

INVERTED_CT = "ct inverted"
"""The modality that `Task.invert_ct` adds: one minus a normalised CT image."""

# One random stream per decision: drawing more in one leaves the others as they are.
_TASK, _NETWORK, _TARGET, _ORDER = range(4)


@dataclasses.dataclass(frozen=True)
class Task:
    """How one dataset is trained on.

    Attributes:
      dataset: whose records; several tasks may share one dataset.
      weight: share of the pairs up to normalisation; None: `modality_weights`. Only
        ``schedule="weighted"`` looks at it.
      pairing: "inter" pairs two subjects, "intra" two scans of one; None: what the
        dataset's records say.
      randomise: see `Strategy`.
      invert_ct: every CT image is also an image of the modality `INVERTED_CT`.
      distinct: inter pairs are of two different subjects. False: two independent draws
        that may be the same image, as uniGradICON was trained.
      objective: name of the settings (lambda, similarity, masks, label supervision)
        that this task's pairs are scored with.
      region: body part that a network of tasks (UniReg) is told; the dataset's name if
        None. Tasks may share a region.
      smoothness: weight of the smoothness term for this task's pairs, UniReg's lambda;
        that of the objective if None.
      ct_window: Hounsfield values that become 0 and 1 in this task's scans; that of
        the loading if None.
      quantile_range: the same for other modalities.
      network_window: Hounsfield values that a network which reads them (UniReg) is
        shown of this task's scans, within those that are loaded; its own
        `backbone_window` if None.
      similarity_window: those that the similarity compares, the scans being cut to
        them; if None what such a network is shown, or all that is loaded.
    """

    dataset: str
    weight: float | None = None
    pairing: Pairing | None = None
    randomise: Strategy = "B"
    invert_ct: bool = False
    distinct: bool = True
    objective: str = "default"
    region: str | None = None
    smoothness: float | None = None
    ct_window: tuple[float, float] | None = None
    quantile_range: tuple[float, float] | None = None
    network_window: tuple[float, float] | None = None
    similarity_window: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """One image as it is shown.

    Attributes:
      record: index into the sampler's records.
      inverted: shown as one minus its normalised intensities.
    """

    record: int
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """One pair of images, not yet read.

    Attributes:
      task: index into the sampler's tasks.
      moving: what the network sees as moving image.
      fixed: what it sees as fixed image.
      moving_target: what the similarity takes for the moving image: another modality of
        the same scan, or None for the network's own image.
      fixed_target: the same of the fixed image.
    """

    task: int
    moving: ImageRef
    fixed: ImageRef
    moving_target: ImageRef | None = None
    fixed_target: ImageRef | None = None


Scan = Mapping[str, tuple[ImageRef, ...]]
"""Aligned images of one subject, region and session, by modality."""


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The images of one dataset, region and modality.

    Attributes:
      views: n of them.
      subjects: (n,) numbers that differ where subjects differ.
    """

    views: tuple[ImageRef, ...]
    subjects: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Inter:
    """Draws pairs of two subjects: region, then both modalities, then the images.

    Attributes:
      regions: for each region the pairs of cells from which a pair can be drawn.
      distinct: see `Task`.
    """

    regions: tuple[tuple[tuple[_Cell, _Cell], ...], ...]
    distinct: bool

    def draw(self, rng: np.random.Generator) -> tuple[ImageRef, ImageRef]:
        region = _pick(rng, self.regions)
        first, second = _pick(rng, region)
        if not self.distinct:
            return _pick(rng, first.views), _pick(rng, second.views)
        allowed = np.arange(len(first.views))
        if (second.subjects == second.subjects[0]).all():
            # Whoever is alone in the second cell cannot be drawn from the first.
            allowed = np.flatnonzero(first.subjects != second.subjects[0])
        i = int(_pick(rng, allowed))
        others = np.flatnonzero(second.subjects != first.subjects[i])
        return first.views[i], second.views[int(_pick(rng, others))]


@dataclasses.dataclass(frozen=True)
class _Intra:
    """Draws pairs of two scans: subject, region, scans in random order, modalities.

    Attributes:
      subjects: for each subject, for each of its regions, two scans or more.
    """

    subjects: tuple[tuple[tuple[Scan, ...], ...], ...]

    def draw(self, rng: np.random.Generator) -> tuple[ImageRef, ImageRef]:
        scans = _pick(rng, _pick(rng, self.subjects))
        i, j = rng.choice(len(scans), size=2, replace=False)
        return _pick_image(rng, scans[i]), _pick_image(rng, scans[j])


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
    _pools: tuple[_Inter | _Intra, ...] = dataclasses.field(repr=False, compare=False)
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
        task = self._task(index)
        moving, fixed = self._pools[task].draw(_rng(self.seed, _NETWORK, index))
        targets = self._targets(task, moving, fixed, _rng(self.seed, _TARGET, index))
        return PairPlan(task, moving, fixed, *targets)

    def _task(self, index: int) -> int:
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
        self, task: int, moving: ImageRef, fixed: ImageRef, rng: np.random.Generator
    ) -> tuple[ImageRef | None, ImageRef | None]:
        """Draws what the similarity compares; sees the subjects, not the images."""
        strategy = self.tasks[task].randomise
        if strategy == "B":
            return None, None
        of_moving = self._scans[task][moving.record]
        of_fixed = self._scans[task][fixed.record]
        if strategy == "R":
            return _pick_image(rng, of_moving), _pick_image(rng, of_fixed)
        common = sorted(of_moving.keys() & of_fixed.keys())
        if not common:
            return None, None
        modality = _pick(rng, common)
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
    and two of its scans; scans are told apart by `Record.session`, and where a subject
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
        members = _members(records, task)
        pairing = _pairing(records, task, members)
        build = _inter_pool if pairing == "inter" else _intra_pool
        pools.append(build(records, task, members))
        scans.append(_target_scans(records, task, members, pairing))
    if schedule == "weighted":
        automatic = modality_weights(records, tasks)
        weights = [
            other if task.weight is None else task.weight
            for task, other in zip(tasks, automatic, strict=True)
        ]
    else:
        weights = [1.0] * len(tasks)
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
        members = _members(records, task)
        modalities = {name for i in members for name in _image_refs(records, task, i)}
        regions = {records[i].region for i in members}
        weights.append(float(len(regions) * math.comb(len(modalities) + 1, 2)))
    return tuple(weights)


def equal_shares(counts: Sequence[int], total: int) -> list[int]:
    """Divides a number into equal shares, each at least 1 and at most its count.

    What one share lacks of an equal one, the others have; the first ones have what does
    not divide.
    """
    shares = [0] * len(counts)
    left = min(max(total, len(counts)), sum(counts)) if total else 0
    while left:
        open_ones = [i for i, count in enumerate(counts) if shares[i] < count]
        each = max(left // len(open_ones), 1)
        for i in open_ones[:left]:
            given = min(each, counts[i] - shares[i])
            shares[i], left = shares[i] + given, left - given
    return shares


def region_weights(anatomies: Mapping[str, Collection[str]]) -> dict[str, float]:
    """Returns weights that even out how often anatomies are met.

    A dataset's weight is the sum over its anatomies of ``max_count / count``, where
    count is the number of datasets that show the anatomy and max_count the largest of
    these (multiGradICON, further training).

    Args:
      anatomies: what each dataset shows, e.g. ``{"UKB": ("abdomen", "lung", "knee")}``.

    Raises:
      UserError: a dataset shows nothing.
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
    """Returns a permutation of `count`, kept because every pair of an epoch asks."""
    order = _rng(seed, _ORDER, epoch).permutation(count)
    order.setflags(write=False)
    return order


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _pick_image(rng: np.random.Generator, scan: Scan) -> ImageRef:
    return _pick(rng, scan[_pick(rng, sorted(scan))])


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


def pairing_of(records: Sequence[Record], task: Task) -> Pairing:
    """Returns the kind of a task's pairs, as it says or its dataset's records do.

    Raises:
      UserError: there are no records, or they say both.
    """
    return _pairing(records, task, _members(records, task))


def _members(records: Sequence[Record], task: Task) -> list[int]:
    """Returns the indices of the records of a task's dataset."""
    members = [i for i, record in enumerate(records) if record.dataset == task.dataset]
    if not members:
        names = sorted({record.dataset for record in records})
        near = difflib.get_close_matches(task.dataset, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "correct the name"
        raise UserError(
            f"task {task.dataset!r} has no records, the manifest has the datasets "
            f"{', '.join(names) or '(none)'}; {hint}"
        )
    return members


def _image_refs(records: Sequence[Record], task: Task, i: int) -> dict[str, ImageRef]:
    """Returns what record i can be shown as, by modality."""
    modality = records[i].modality.lower()
    views = {modality: ImageRef(i)}
    if task.invert_ct and modality_lib.kind(modality) == "ct":
        views[INVERTED_CT] = ImageRef(i, inverted=True)
    return views


def _pairing(records: Sequence[Record], task: Task, members: Sequence[int]) -> Pairing:
    """Returns the pairing of a task, checked against its records."""
    said: set[Pairing] = {records[i].pairing for i in members}
    if task.pairing is None and len(said) > 1:
        raise UserError(
            f"dataset {task.dataset!r} has records for inter and for intra pairs, "
            "expected one kind; set the task's pairing or split the dataset"
        )
    if task.invert_ct and not any(
        modality_lib.kind(records[i].modality) == "ct" for i in members
    ):
        raise UserError(
            f"task {task.dataset!r} inverts CT images, its dataset has none; "
            "set invert_ct to False or correct the records' modality"
        )
    return task.pairing or said.pop()


def _inter_pool(
    records: Sequence[Record], task: Task, members: Sequence[int]
) -> _Inter:
    numbers = {
        name: number
        for number, name in enumerate(sorted({records[i].subject for i in members}))
    }
    views: dict[str, dict[str, list[ImageRef]]] = {}
    for i in members:
        region = views.setdefault(records[i].region, {})
        for modality, view in _image_refs(records, task, i).items():
            region.setdefault(modality, []).append(view)
    regions = []
    for _, by_modality in sorted(views.items()):
        cells = [
            _Cell(
                tuple(group),
                np.array([numbers[records[view.record].subject] for view in group]),
            )
            for _, group in sorted(by_modality.items())
        ]
        pairs = [
            (first, second)
            for first in cells
            for second in cells
            if not task.distinct
            or len({*first.subjects.tolist(), *second.subjects.tolist()}) > 1
        ]
        if pairs:
            regions.append(tuple(pairs))
    if not regions:
        raise UserError(
            f"dataset {task.dataset!r} has no two subjects with an image of the same "
            f"region among {len(members)} records, inter pairs need them; add "
            "subjects, or set the pairing to intra"
        )
    return _Inter(tuple(regions), task.distinct)


def _intra_pool(
    records: Sequence[Record], task: Task, members: Sequence[int]
) -> _Intra:
    subjects = []
    for _, regions in sorted(_scans(records, task, members, "intra").items()):
        several = [scans for _, scans in sorted(regions.items()) if len(scans) > 1]
        if several:
            subjects.append(tuple(several))
    if not subjects:
        raise UserError(
            f"dataset {task.dataset!r} has no subject with two scans of a region among "
            f"{len(members)} records, intra pairs need them; check the columns subject "
            "and session, or set the pairing to inter"
        )
    return _Intra(tuple(subjects))


def _scans(
    records: Sequence[Record], task: Task, members: Sequence[int], pairing: Pairing
) -> dict[str, dict[str, tuple[Scan, ...]]]:
    """Returns the scans of each subject and region: sets of aligned images."""
    grouped: dict[str, dict[str, list[int]]] = {}
    for i in members:
        regions = grouped.setdefault(records[i].subject, {})
        regions.setdefault(records[i].region, []).append(i)
    return {
        subject: {
            region: _split_by_session(records, task, chosen, pairing)
            for region, chosen in regions.items()
        }
        for subject, regions in grouped.items()
    }


def _split_by_session(
    records: Sequence[Record], task: Task, chosen: Sequence[int], pairing: Pairing
) -> tuple[Scan, ...]:
    # Two images of one subject to be registered are not aligned yet: without sessions
    # that say more, each is a scan by itself.
    alone = pairing == "intra" and len({records[i].session for i in chosen}) == 1
    sessions: dict[str, dict[str, tuple[ImageRef, ...]]] = {}
    for i in chosen:
        scan = sessions.setdefault(str(i) if alone else records[i].session, {})
        for modality, view in _image_refs(records, task, i).items():
            scan[modality] = (*scan.get(modality, ()), view)
    return tuple(sessions.values())


def _target_scans(
    records: Sequence[Record], task: Task, members: Sequence[int], pairing: Pairing
) -> dict[int, Scan]:
    """Returns the scan of each record; empty for strategy B, which asks for none.

    Raises:
      UserError: a scan has two images of a modality, so they may not be aligned.
    """
    if task.randomise == "B":
        return {}
    found: dict[int, Scan] = {}
    for subject, regions in _scans(records, task, members, pairing).items():
        for scan in (scan for scans in regions.values() for scan in scans):
            for modality, views in scan.items():
                if len(views) > 1:
                    paths = [str(records[view.record].image) for view in views[:2]]
                    raise UserError(
                        f"dataset {task.dataset!r}, subject {subject!r}: "
                        f"{' and '.join(paths)} are both {modality} of one session, "
                        f"strategy {task.randomise} needs aligned images of different "
                        "modalities; fill in the column session, or use strategy B"
                    )
                found |= {view.record: scan for view in views}
    return found
