"""Records of scans and manifests of records."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal, get_args

from jaxreg.errors import UserError

Pairing = Literal["inter", "intra"]
Split = Literal["train", "val", "test"]
Level = Literal["error", "warning"]
Labels = Mapping[str, Mapping[int, str]]
"""Names of label values, by dataset."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One image and what belongs to it.

    Attributes:
      image: the scan.
      subject: who was scanned; a name means one person within a dataset.
      dataset: what the image is a part of.
      modality: any name (ct, t1, t2, fa, fat); those of CT select the CT window,
        anything else the MRI rule, see `modality.kind`.
      region: part of the body; the images of a pair show the same.
      label: label map on the image's grid.
      mask: mask on the image's grid, above 0 inside.
      landmarks: points in the image, a CSV with columns x, y, z, or .fcsv or .mrk.json
        of 3D Slicer.
      pairing: whether pairs are of two subjects or of one.
      split: what the image is used for.
      session: visit or breathing state. Images of one subject, region and session are
        aligned with each other: the modalities of one scan.
    """

    image: pathlib.Path
    subject: str
    dataset: str
    modality: str = "mri"
    region: str = ""
    label: pathlib.Path | None = None
    mask: pathlib.Path | None = None
    landmarks: pathlib.Path | None = None
    pairing: Pairing = "inter"
    split: Split = "train"
    session: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one manifest lists.

    Attributes:
      records: in the file's order.
      source: the file or folder, for messages.
      labels: names of label values by dataset; empty where the file has none.
      unpaired: datasets of which the file states no pairing; that of their records is
        the default.
    """

    records: tuple[Record, ...]
    source: str
    labels: Labels = dataclasses.field(default_factory=dict)
    unpaired: frozenset[str] = frozenset()

    def of_split(self, split: Split) -> tuple[Record, ...]:
        """Returns the records of one split, in order."""
        return tuple(record for record in self.records if record.split == split)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A fault in a manifest that stops or harms a training run.

    Attributes:
      file: the file that it is about, or the manifest.
      kind: one word for grouping: missing, unreadable, shape, values, grid, labels,
        landmarks, orientation, alignment, duplicate, pairs, leak, partial.
      sentence: what was found and what to do.
      level: an error stops training; a warning does not.
    """

    file: str
    kind: str
    sentence: str
    level: Level = "error"


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
PATHS = ("image", "label", "mask", "landmarks")
CHOICES = {"pairing": get_args(Pairing), "split": get_args(Split)}
MANIFEST_LIMIT = 2**28


def hold_out(manifest: Manifest, every: int = 5) -> Manifest:
    """Moves every fifth training subject to the split "val".

    Subjects are sorted by name within their dataset; the fifth, tenth, ... are held
    out with all their images. A dataset that has validation images keeps its splits,
    and test images stay what they are.

    Args:
      manifest: what to divide.
      every: at least 2.

    Raises:
      UserError: `every` is less.
    """
    if every < 2:
        raise UserError(
            f"holdout is {every}, expected 2 or more (5: every fifth subject); raise it"
        )
    decided = {r.dataset for r in manifest.records if r.split == "val"}
    subjects: dict[str, set[str]] = {}
    for record in manifest.records:
        if record.split == "train" and record.dataset not in decided:
            subjects.setdefault(record.dataset, set()).add(record.subject)
    held = {
        (dataset, name)
        for dataset, names in subjects.items()
        for name in sorted(names)[every - 1 :: every]
    }
    records = tuple(
        dataclasses.replace(record, split="val")
        if record.split == "train" and (record.dataset, record.subject) in held
        else record
        for record in manifest.records
    )
    return dataclasses.replace(manifest, records=records)
