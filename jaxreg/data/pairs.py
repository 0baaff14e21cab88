"""Tasks of training and the pairs of images that a dataset offers for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxreg.data import modality as modality_lib
from jaxreg.data.manifest.records import Pairing, Record
from jaxreg.errors import UserError, near_match

Strategy = Literal["B", "F", "R"]
"""What the similarity compares.

B: the network's own images. F: one modality that both subjects have, drawn for the
pair. R: a modality drawn for each image by itself.
"""

INVERTED_CT = "ct inverted"
"""The modality that `Task.invert_ct` adds: one minus a normalised CT image."""


@dataclasses.dataclass(frozen=True)
class Task:
    """How one dataset is trained on.

    Attributes:
      dataset: whose records; several tasks may share one dataset.
      weight: share of the pairs up to normalisation, for ``schedule="weighted"`` alone;
        `sampler.modality_weights` if None.
      pairing: "inter" pairs two subjects, "intra" two scans of one; None: what the
        dataset's records say.
      randomise: see `Strategy`.
      invert_ct: every CT image is also an image of the modality `INVERTED_CT`.
      distinct: inter pairs are of two different subjects. False: two independent draws
        that may be the same image, as uniGradICON was trained.
      objective: name of the settings (lambda, similarity, masks, label supervision)
        that this task's pairs are scored with.
      region: body part that a network with task heads (UniReg) is conditioned on; the
        dataset's name if None. Tasks may share a region.
      smoothness: weight of the smoothness term for this task's pairs, UniReg's lambda;
        that of the objective if None.
      ct_window: Hounsfield values that become 0 and 1 in this task's scans; that of
        the loading if None.
      quantile_range: the same for other modalities.
      network_window: Hounsfield window of this task's scans for a network that reads
        Hounsfield values (UniReg), within the loaded one; the network's
        `backbone_window` if None.
      similarity_window: Hounsfield window to which the similarity clips both scans;
        `network_window` for such a network, else the loaded one, if None.
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
    """One record's image, plain or inverted.

    Attributes:
      record: index into the sampler's records.
      inverted: as one minus its normalised intensities.
    """

    record: int
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """One pair of images, not yet read.

    Attributes:
      task: index into the sampler's tasks.
      moving: the network's moving image.
      fixed: the network's fixed image.
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
      images: n of them.
      subjects: (n,) numbers that differ where subjects differ.
    """

    images: tuple[ImageRef, ...]
    subjects: np.ndarray


@dataclasses.dataclass(frozen=True)
class InterPool:
    """Draws pairs of two subjects: region, then both modalities, then the images.

    Attributes:
      regions: for each region the pairs of cells from which a pair can be drawn.
      distinct: see `Task`.
    """

    regions: tuple[tuple[tuple[_Cell, _Cell], ...], ...]
    distinct: bool

    def draw(self, rng: np.random.Generator) -> tuple[ImageRef, ImageRef]:
        """Draws a moving and a fixed image."""
        region = pick(rng, self.regions)
        first, second = pick(rng, region)
        if not self.distinct:
            return pick(rng, first.images), pick(rng, second.images)
        allowed = np.arange(len(first.images))
        if (second.subjects == second.subjects[0]).all():
            # Whoever is alone in the second cell cannot be drawn from the first.
            allowed = np.flatnonzero(first.subjects != second.subjects[0])
        i = int(pick(rng, allowed))
        others = np.flatnonzero(second.subjects != first.subjects[i])
        return first.images[i], second.images[int(pick(rng, others))]


@dataclasses.dataclass(frozen=True)
class IntraPool:
    """Draws pairs of two scans: subject, region, scans in random order, modalities.

    Attributes:
      subjects: for each subject, for each of its regions, two scans or more.
    """

    subjects: tuple[tuple[tuple[Scan, ...], ...], ...]

    def draw(self, rng: np.random.Generator) -> tuple[ImageRef, ImageRef]:
        """Draws a moving and a fixed image."""
        scans = pick(rng, pick(rng, self.subjects))
        i, j = rng.choice(len(scans), size=2, replace=False)
        return pick_image(rng, scans[i]), pick_image(rng, scans[j])


def pick(rng: np.random.Generator, choices):
    """Draws one of a sequence, uniformly."""
    return choices[int(rng.integers(len(choices)))]


def pick_image(rng: np.random.Generator, scan: Scan) -> ImageRef:
    """Draws one of a scan's modalities, then an image of that modality."""
    return pick(rng, scan[pick(rng, sorted(scan))])


def pairing_of(records: Sequence[Record], task: Task) -> Pairing:
    """Returns the pairing of a task: its own, else that of its dataset's records.

    Raises:
      UserError: there are no records, or they have both.
    """
    return checked_pairing(records, task, records_of(records, task))


def records_of(records: Sequence[Record], task: Task) -> list[int]:
    """Returns the indices of the records of a task's dataset."""
    members = [i for i, record in enumerate(records) if record.dataset == task.dataset]
    if not members:
        names = sorted({record.dataset for record in records})
        raise UserError(
            f"task {task.dataset!r} has no records, the manifest has the datasets "
            f"{', '.join(names) or '(none)'}{near_match(task.dataset, names)}; "
            "correct the name"
        )
    return members


def image_refs_of(records: Sequence[Record], task: Task, i: int) -> dict[str, ImageRef]:
    """Returns record i by modality: as it is, and inverted if the task inverts CT."""
    modality = records[i].modality.lower()
    image_refs = {modality: ImageRef(i)}
    if task.invert_ct and modality_lib.kind(modality) == "ct":
        image_refs[INVERTED_CT] = ImageRef(i, inverted=True)
    return image_refs


def checked_pairing(
    records: Sequence[Record], task: Task, members: Sequence[int]
) -> Pairing:
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


def pool_of(
    records: Sequence[Record], task: Task, members: Sequence[int], pairing: Pairing
) -> InterPool | IntraPool:
    """Returns what draws a task's pairs from its records.

    Raises:
      UserError: there is no possible pair.
    """
    build = _inter_pool if pairing == "inter" else _intra_pool
    return build(records, task, members)


def _inter_pool(
    records: Sequence[Record], task: Task, members: Sequence[int]
) -> InterPool:
    numbers = {
        name: number
        for number, name in enumerate(sorted({records[i].subject for i in members}))
    }
    by_region: dict[str, dict[str, list[ImageRef]]] = {}
    for i in members:
        region = by_region.setdefault(records[i].region, {})
        for modality, image_ref in image_refs_of(records, task, i).items():
            region.setdefault(modality, []).append(image_ref)
    regions = []
    for _, by_modality in sorted(by_region.items()):
        cells = [
            _Cell(
                tuple(group),
                np.array([numbers[records[one.record].subject] for one in group]),
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
    return InterPool(tuple(regions), task.distinct)


def _intra_pool(
    records: Sequence[Record], task: Task, members: Sequence[int]
) -> IntraPool:
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
    return IntraPool(tuple(subjects))


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
        for modality, image_ref in image_refs_of(records, task, i).items():
            scan[modality] = (*scan.get(modality, ()), image_ref)
    return tuple(sessions.values())


def target_scans(
    records: Sequence[Record], task: Task, members: Sequence[int], pairing: Pairing
) -> dict[int, Scan]:
    """Returns the scan of each record; empty for strategy B, which needs none.

    Raises:
      UserError: a scan has two images of a modality, so they may not be aligned.
    """
    if task.randomise == "B":
        return {}
    found: dict[int, Scan] = {}
    for subject, regions in _scans(records, task, members, pairing).items():
        for scan in (scan for scans in regions.values() for scan in scans):
            for modality, image_refs in scan.items():
                if len(image_refs) > 1:
                    paths = [str(records[one.record].image) for one in image_refs[:2]]
                    raise UserError(
                        f"dataset {task.dataset!r}, subject {subject!r}: "
                        f"{' and '.join(paths)} are both {modality} of one session, "
                        f"strategy {task.randomise} needs aligned images of different "
                        "modalities; fill in the column session, or use strategy B"
                    )
                found |= {one.record: scan for one in image_refs}
    return found
