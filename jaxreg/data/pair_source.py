"""Sources of pairs: scans on disk by a sampler, or pairs made ready."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jaxreg.data.manifest.records import Record
from jaxreg.data.pairs import PairPlan, Task

Storage = Literal["float32", "uint16"]
Batch = dict[str, np.ndarray]

QUANTA = 65535
"""What intensity 1 becomes in "uint16" storage; a step is 1.5e-5."""

IMAGES = ("moving", "fixed", "moving_target", "fixed_target")
SIDES = ("moving", "fixed")


class Plans(Protocol):
    """What `PairSource` needs of a sampler; see `sampler.Sampler`."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks that `PairPlan.task` counts."""
        ...

    def __getitem__(self, index: int, /) -> PairPlan:
        """Returns pair `index`, for any index >= 0."""
        ...


class ReadyPairs(Protocol):
    """Pairs that are made instead of read: dicts of arrays D H W 1, without N."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Returns pair `index` with the keys of a batch."""
        ...


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Pairs of scans on disk.

    Attributes:
      records: what ``ImageRef.record`` counts.
      sampler: the plan of pair i.
      classes: the label values that a dataset may have besides 0, by dataset (a
        manifest's ``labels`` will do); what is not listed is not checked.
    """

    records: Sequence[Record]
    sampler: Plans
    classes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self, index: int) -> PairPlan:
        """Returns pair `index` of the sampler."""
        return self.sampler[index]

    def named(self, index: int) -> str:
        """Returns "moving FILE, fixed FILE (dataset D)" for a sampler index."""
        plan = self.plan(index)
        names = [
            f"{key.replace('_', ' ')} {self.records[image_ref.record].image}"
            for key in IMAGES
            if (image_ref := getattr(plan, key)) is not None
        ]
        dataset = self.records[plan.fixed.record].dataset
        return f"{', '.join(names)} (dataset {dataset})"

    @property
    def label_type(self) -> np.dtype:
        """Integer type of label maps in a batch; small if all classes are listed."""
        labelled = {r.dataset for r in self.records if r.label is not None}
        if not all(self.classes.get(dataset) for dataset in labelled):
            return np.dtype(np.int32)
        highest = max((max(self.classes[dataset]) for dataset in labelled), default=0)
        return label_type(highest)


def label_type(highest: int) -> np.dtype:
    """Returns the smallest type that holds labels up to `highest`."""
    for candidate in (np.uint8, np.uint16):
        if highest <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    return np.dtype(np.int32)
