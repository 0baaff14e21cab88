"""Which scans there are: CSV, JSON and folders to records, and what is wrong with them.

A manifest names files and reads none of them; `check` reads them all.
"""

import csv
import dataclasses
import difflib
import hashlib
import io
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxreg.data import preprocess
from jaxreg.errors import UserError
from jaxreg.io import files, tables, volumes
from jaxreg.space.grid import Grid

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
        anything else the MRI rule, see `preprocess.kind`.
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
      labels: names of label values by dataset; empty where the file says nothing.
      unpaired: datasets of which the file says no pairing; that of their records is
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
    """Something in a manifest that stops or spoils a training run.

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


_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_PATHS = ("image", "label", "mask", "landmarks")
_CHOICES = {"pairing": get_args(Pairing), "split": get_args(Split)}
# What unigradicon-finetune calls the same things.
_ALIASES = {"segmentation": "label", "subject_id": "subject"}
_IMAGES = (*volumes.NIFTI, *volumes.ITK_READ)
_MANIFEST_LIMIT = 2**28

# Learn2Reg names its images CASE_CHANNEL; the channel tells modalities or visits.
_CASE_AND_CHANNEL = re.compile(r"(.*\d{4})_(\d{4})")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_LISTS: tuple[tuple[str, Split], ...] = (
    ("training", "train"),
    ("training_paired_images", "train"),
    ("registration_val", "val"),
    ("validation", "val"),
    ("registration_test", "test"),
    ("test_paired_images", "test"),
    ("test", "test"),
)
_FOREIGN = {
    "label": "label",
    "segmentation": "label",
    "mask": "mask",
    "keypoint": "landmarks",
    "keypoints": "landmarks",
    "landmark": "landmarks",
    "landmarks": "landmarks",
}
_FOLDERS: tuple[tuple[str, str, Split], ...] = (
    ("images", "", "train"),
    ("imagesTr", "Tr", "train"),
    ("imagesVal", "Val", "val"),
    ("imagesTs", "Ts", "test"),
)


def read_manifest(path: files.PathLike, *, holdout: int | None = None) -> Manifest:
    """Reads a manifest of whatever kind its content shows.

    * CSV: columns are the fields of `Record`, only image is required. The comma may be
      a semicolon or a tab.
    * JSON ``{"data": [{"image": ...}, ...], "labels": {dataset: {value: name}}}`` with
      the same fields; unigradicon-finetune's segmentation and subject_id are understood
      (in CSV too).
    * The dataset JSON of Learn2Reg, the Medical Segmentation Decathlon or nnU-Net.
      Learn2Reg's channels (the last four digits of a name) become sessions; numbered
      sets of keypoints, which belong to pairs and not to images, are left out. FBCT and
      CBCT count as CT.
    * A folder with one such dataset JSON, else with images in imagesTr, imagesTs or
      images (and labelsTr ..., masksTr ...) under equal names, else with images.

    Paths are relative to the manifest's folder. A subject without a name is called
    after its image, a dataset after the manifest.

    Args:
      path: file or folder.
      holdout: as `every` of `hold_out`; None: splits as the manifest says.

    Raises:
      UserError: it is no manifest, or an entry is wrong. Missing images are found by
        `check`.
    """
    path = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
    manifest = _read_folder(path) if os.path.isdir(path) else _read_file(path)
    if not manifest.records:
        raise UserError(
            f"manifest {path} lists no image, expected at least one; add rows"
        )
    return manifest if holdout is None else hold_out(manifest, every=holdout)


def write_manifest(path: files.PathLike, manifest: Manifest) -> None:
    """Writes a manifest so that `read_manifest` reads the same records.

    Files below the manifest's folder are named relative to it.

    Args:
      path: .csv, or .json, which alone keeps the names of labels.
      manifest: what to write.

    Raises:
      UserError: the path has another extension or cannot be written.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise UserError(
            f"manifest {path} has the extension {suffix or '(none)'}, expected .csv or "
            ".json; rename it"
        )
    folder = pathlib.Path(os.path.abspath(path.parent))
    rows = [_row(record, folder) for record in manifest.records]
    for row in rows:
        if row["dataset"] in manifest.unpaired:
            row["pairing"] = ""
    with files.atomic_path(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            if suffix == ".csv":
                writer = csv.DictWriter(file, _FIELDS)
                writer.writeheader()
                writer.writerows(rows)
            else:
                data = [{k: v for k, v in row.items() if v} for row in rows]
                labels = {name: dict(v) for name, v in manifest.labels.items()}
                json.dump({"labels": labels, "data": data}, file, indent=1)


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


def neighbour_pairs(
    records: Sequence[Record], neighbours: int = 3, *, across_modalities: bool = False
) -> list[tuple[Record, Record]]:
    """Returns pairs (fixed, moving) in which all images take part about equally.

    Sorted by name, each subject is fixed image for the next three, cyclically, within
    its dataset, region, modality and session (its first image there, if it has
    several). Intra pairs stay within subject and region, sorted by session; as in
    `pairs.sampler`, images of one session are aligned and no pair, unless the subject
    has that session only.

    Args:
      records: of one split.
      neighbours: moving images per fixed image, fewer where there are no more.
      across_modalities: inter pairs may be of two modalities: each image is fixed, and
        the subjects that follow take turns in which of their modalities is moving.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.pairing == "intra":
            same = (record.subject,)
        elif across_modalities:
            same = (record.session,)
        else:
            same = (record.modality.lower(), record.session)
        key = (record.dataset, record.region, record.pairing, *same)
        groups.setdefault(key, []).append(record)
    pairs: list[tuple[Record, Record]] = []
    for _, group in sorted(groups.items()):
        group.sort(key=lambda r: (r.subject, r.session, str(r.image)))
        if group[0].pairing == "inter":
            pairs += _inter_pairs(group, neighbours)
        else:
            pairs += _intra_pairs(group, neighbours)
    return pairs


def _inter_pairs(
    group: Sequence[Record], neighbours: int
) -> Iterator[tuple[Record, Record]]:
    """Yields each subject's first image of a modality with those of the next ones."""
    subjects: dict[str, dict[str, Record]] = {}
    for record in group:
        images = subjects.setdefault(record.subject, {})
        images.setdefault(record.modality.lower(), record)
    shown = [[image for _, image in sorted(i.items())] for i in subjects.values()]
    for i, images in enumerate(shown):
        for place, fixed in enumerate(images):
            for step in range(1, min(neighbours, len(shown) - 1) + 1):
                others = shown[(i + step) % len(shown)]
                yield fixed, others[(place + step) % len(others)]


def _intra_pairs(
    group: Sequence[Record], neighbours: int
) -> Iterator[tuple[Record, Record]]:
    """Yields each image of a subject with the next ones of its other sessions."""
    alone = len({record.session for record in group}) == 1
    for i, fixed in enumerate(group):
        others = [
            moving
            for moving in (*group[i + 1 :], *group[:i])
            if alone or moving.session != fixed.session
        ]
        yield from ((fixed, moving) for moving in others[:neighbours])


def check(
    manifest: Manifest,
    *,
    voxels: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Reads every file that a manifest names and returns all that is wrong.

    Nothing stops it. Images may differ in shape; a label map or mask must lie on its
    image's grid.

    Args:
      manifest: what to check.
      voxels: False looks only at which files exist and at the records, which is quick.
      progress: called with the records done and their number.

    Returns:
      Problems, those of files first, in the records' order; empty if all is well.
    """
    readings: dict[tuple[pathlib.Path, str], _Reading] = {}
    problems: list[Problem] = []
    total = len(manifest.records)
    for done, record in enumerate(manifest.records, start=1):
        if voxels:
            problems += _record_problems(record, manifest.labels, readings)
        else:
            problems += _missing(record)
        if progress is not None:
            progress(done, total)
    for find in (_duplicates, _lonely, _leaks, _partial, _unaligned, _unequal_points):
        problems += find(manifest, readings)
    return list(dict.fromkeys(problems))


# --- reading manifests ----------------------------------------------------------------


def _read_file(path: pathlib.Path) -> Manifest:
    path = files.check_readable(path, "manifest", limit_bytes=_MANIFEST_LIMIT)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"manifest {path} is no UTF-8 text ({error.reason} at byte {error.start}), "
            "expected a CSV or JSON file, or a folder; name another or save it as UTF-8"
        ) from error
    if text.lstrip()[:1] in ("{", "["):
        return _read_json(text, path)
    return _read_csv(text, path)


def _read_csv(text: str, path: pathlib.Path) -> Manifest:
    first = text.lstrip().partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=max(",;\t", key=first.count),
        strict=True,
    )
    try:
        rows = [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        raise UserError(
            f"manifest {path}, line {reader.line_num}: {error}, expected CSV; correct "
            "the quotes"
        ) from error
    if not rows:
        raise UserError(f"manifest {path} has no rows, expected a header; write one")
    names = _known_names([c.strip().lower() for c in rows[0][1]], "column", path)
    entries, records = [], []
    for line, row in rows[1:]:
        where = f"manifest {path}, line {line}"
        if len(row) != len(names):
            raise UserError(
                f"{where} has {len(row)} cells, expected {len(names)} as the header "
                "has; correct the line (a comma within a cell needs quotes)"
            )
        entries.append(dict(zip(names, row, strict=True)))
        records.append(_record(entries[-1], where, path.parent, path.stem))
    records = _name_subjects(records, path.parent)
    return Manifest(records, str(path), unpaired=_unpaired(entries, records))


def _unpaired(
    entries: Sequence[Mapping[str, Any]], records: Sequence[Record]
) -> frozenset[str]:
    """Returns the datasets of which no entry says a pairing."""
    stated = {
        record.dataset
        for entry, record in zip(entries, records, strict=True)
        if (entry.get("pairing") or "").strip()
    }
    return frozenset(record.dataset for record in records) - stated


def _read_json(text: str, path: pathlib.Path) -> Manifest:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"manifest {path} is no valid JSON: {error}; correct it there"
        ) from error
    if isinstance(content, dict) and "data" in content:
        return _read_own_json(content, path)
    if isinstance(content, dict) and (
        "channel_names" in content or any(key in content for key, _ in _LISTS)
    ):
        return _read_dataset_json(content, path)
    found = ", ".join(list(content)[:6]) if isinstance(content, dict) else "a list"
    raise UserError(
        f"manifest {path} holds {found or 'nothing'}, expected data (a list of entries "
        "with image) or a dataset JSON with training; name another file"
    )


def _read_own_json(content: dict[str, Any], path: pathlib.Path) -> Manifest:
    data = content["data"]
    for name in content:
        if name not in ("data", "labels"):
            raise UserError(
                f"manifest {path} has the unknown key {name!r}, expected data and "
                f"labels; {_hint(name, ('data', 'labels'))}"
            )
    if not isinstance(data, list):
        raise UserError(
            f"manifest {path}: data is {type(data).__name__}, expected a list of "
            "entries; correct it"
        )
    entries, records = [], []
    for number, entry in enumerate(data, start=1):
        where = f"manifest {path}, entry {number}"
        if not isinstance(entry, dict):
            raise UserError(
                f"{where} is {type(entry).__name__}, expected an object with image; "
                "correct it"
            )
        names = _known_names(list(entry), "key", path)
        entries.append(dict(zip(names, entry.values(), strict=True)))
        records.append(_record(entries[-1], where, path.parent, path.stem))
    records = _name_subjects(records, path.parent)
    given = content.get("labels", {})
    if isinstance(given, dict) and all(isinstance(v, dict) for v in given.values()):
        labels = {name: _label_names(v, path) for name, v in given.items()}
    else:
        names = _label_names(given, path)
        labels = {record.dataset: names for record in records}
    return Manifest(records, str(path), labels, _unpaired(entries, records))


def _known_names(
    given: Sequence[str], what: str, path: pathlib.Path
) -> tuple[str, ...]:
    """Returns the fields that column or key names stand for."""
    names = tuple(_ALIASES.get(name, name) for name in given)
    for name in names:
        if name not in _FIELDS:
            known = (*_FIELDS, *_ALIASES)
            raise UserError(
                f"manifest {path} has the unknown {what} {name!r}, expected some of "
                f"{', '.join(_FIELDS)}; {_hint(name, known)}"
            )
        if names.count(name) > 1:
            raise UserError(
                f"manifest {path} has the {what} {name!r} twice, expected it once; "
                "remove one"
            )
    if "image" not in names:
        raise UserError(
            f"manifest {path} has no {what} image, got {', '.join(given) or 'none'}; "
            "add it"
        )
    return names


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else "remove or rename it"


def _record(
    entry: Mapping[str, Any], where: str, base: pathlib.Path, dataset: str
) -> Record:
    """Returns the record of one row; the subject stays empty where none is given."""
    values: dict[str, Any] = {"subject": "", "dataset": dataset}
    for name, value in entry.items():
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {name} is {value!r}, expected text; correct it")
        value = (value or "").strip()
        if name in _CHOICES:
            value = value.lower()
            if value and value not in _CHOICES[name]:
                raise UserError(
                    f"{where}: {name} is {value!r}, expected one of "
                    f"{', '.join(_CHOICES[name])}; {_hint(value, _CHOICES[name])}"
                )
        if value:
            values[name] = _absolute(value, base) if name in _PATHS else value
    if "image" not in values:
        raise UserError(f"{where} names no image; fill in its path or remove it")
    return Record(**values)


def _absolute(value: str, base: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(os.path.abspath(base / os.path.expanduser(value)))


def _stem(path: pathlib.Path) -> str:
    return path.name.removesuffix(files.full_suffix(path))


def _name_subjects(records: Sequence[Record], base: pathlib.Path) -> tuple[Record, ...]:
    """Calls nameless subjects after their images: by name if that is unique."""
    images: dict[tuple[str, str], set[pathlib.Path]] = {}
    for record in records:
        images.setdefault((record.dataset, _stem(record.image)), set()).add(
            record.image
        )
    ambiguous = {dataset for (dataset, _), paths in images.items() if len(paths) > 1}

    def named(record: Record) -> Record:
        name = _stem(record.image)
        if record.dataset in ambiguous:  # sub-01/t1.nii.gz, sub-02/t1.nii.gz
            folder = pathlib.Path(os.path.relpath(record.image.parent, base))
            name = (folder / name).as_posix()
        return dataclasses.replace(record, subject=name)

    return tuple(record if record.subject else named(record) for record in records)


def _label_names(content: Any, path: pathlib.Path) -> dict[int, str]:
    """Reads {value: name}, {name: value}, {name: [values]} or those by modality."""
    wrong = UserError(
        f"manifest {path}: labels is {str(content)[:60]}, expected whole numbers and "
        'their names such as {"1": "liver"}; correct it'
    )
    if not isinstance(content, dict):
        raise wrong
    names: dict[int, str] = {}
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            names |= _label_names(value, path)
        elif isinstance(value, str) and re.fullmatch(r"-?\d+", key.strip()):
            names[int(key)] = value
        elif all(isinstance(v, int) for v in values):
            names |= {v: key for v in values if v not in names}
        else:
            raise wrong
    return names


@dataclasses.dataclass(frozen=True)
class _Listed:
    """What a dataset JSON says of one image.

    Attributes:
      split: the most withheld one of the lists that name it.
      channel: the list within the list, for names that show no channel.
      files: fields of `Record`.
    """

    split: Split
    channel: str
    files: Mapping[str, pathlib.Path]


def _read_dataset_json(content: dict[str, Any], path: pathlib.Path) -> Manifest:
    base = path.parent
    dataset = str(content.get("name") or base.name)
    modalities = _modalities(content)
    names = _label_names(content.get("labels") or {}, path)
    said = str(content.get("pairings", "")).strip().lower()
    listed: dict[pathlib.Path, _Listed] = {}
    for key, split in _LISTS:
        for channel, entry in _entries(content.get(key), key, path):
            for image, belonging in _images_of(entry, key, path):
                old = listed.get(image, _Listed(split, channel, {}))
                rank = get_args(Split).index
                withheld = split if rank(split) > rank(old.split) else old.split
                listed[image] = _Listed(
                    withheld, old.channel or channel, {**old.files, **belonging}
                )
    if listed:
        pairing: Pairing = "intra" if said == "paired" else "inter"
        records = [
            _listed_record(image, found, dataset, modalities, pairing)
            for image, found in listed.items()
        ]
    else:  # nnU-Net's second version lists nothing
        records = _scan_folder(base, dataset, modalities)
    labels = {dataset: names} if names else {}
    stated = bool(listed) and said in ("paired", "unpaired")
    unpaired = frozenset() if stated else frozenset({dataset})
    return Manifest(tuple(records), str(path), labels, unpaired)


def _listed_record(
    image: pathlib.Path,
    found: _Listed,
    dataset: str,
    modalities: Mapping[int, str],
    pairing: Pairing,
) -> Record:
    match = _CASE_AND_CHANNEL.fullmatch(_stem(image))
    channel = match[2] if match else found.channel
    return Record(
        image=image,
        subject=match[1] if match else _stem(image),
        dataset=dataset,
        modality=_modality(modalities, channel),
        pairing=pairing,
        split=found.split,
        session=match[2] if match else "",
        label=found.files.get("label"),
        mask=found.files.get("mask"),
        landmarks=found.files.get("landmarks"),
    )


def _modalities(content: Mapping[str, Any]) -> dict[int, str]:
    """Reads {"0": "MRI"}: a name for each channel."""
    names = content.get("modality") or content.get("channel_names") or {}
    if not isinstance(names, dict):
        names = {"0": names}
    found = {}
    for key, value in names.items():
        name = str(value).strip().lower()
        # Fan beam and cone beam: in Hounsfield units or close to it.
        name = "ct" if name in ("fbct", "cbct") else name
        found[int(key) if str(key).isdigit() else 0] = name
    return found


def _modality(modalities: Mapping[int, str], channel: str) -> str:
    first = modalities.get(0, "mri")
    return modalities.get(int(channel), first) if channel.isdigit() else first


def _entries(content: Any, key: str, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (channel, entry) of a list, or of lists by channel."""
    groups = content if isinstance(content, dict) else {"": content or []}
    for channel, group in groups.items():
        if not isinstance(group, list):
            raise UserError(
                f"manifest {path}: {key} is {type(group).__name__}, expected a list of "
                "images; correct it"
            )
        for entry in group:
            yield str(channel), entry


def _images_of(
    entry: Any, key: str, path: pathlib.Path
) -> list[tuple[pathlib.Path, dict[str, pathlib.Path]]]:
    """Returns the images that an entry names, with what belongs to each."""
    if isinstance(entry, str):
        entry = {"image": entry}
    names = ("image",) if isinstance(entry, dict) and "image" in entry else None
    names = names or ("fixed", "moving")
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(name), str) for name in names
    ):
        raise UserError(
            f"manifest {path}: {key} has the entry {str(entry)[:60]}, expected image "
            "or fixed and moving with their paths; correct it"
        )
    belonging = {
        field: _absolute(entry[name], path.parent)
        for name, field in _FOREIGN.items()
        if isinstance(entry.get(name), str) and names == ("image",)
    }
    points = belonging.get("landmarks")
    if points is not None and files.full_suffix(points).lower() in volumes.NIFTI:
        # Learn2Reg lists its tables of keypoints under the image's extension.
        belonging["landmarks"] = points.with_name(_stem(points) + ".csv")
    return [(_absolute(entry[name], path.parent), dict(belonging)) for name in names]


def _read_folder(folder: pathlib.Path) -> Manifest:
    lists = [folder / "dataset.json", *sorted(folder.glob("*_dataset.json"))]
    lists = [path for path in lists if path.is_file()]
    if len(lists) > 1:
        raise UserError(
            f"manifest {folder} holds {' and '.join(p.name for p in lists[:3])}, "
            "expected one; name the file"
        )
    if lists:
        return _read_file(lists[0])
    records = tuple(_scan_folder(folder, folder.name, {}))
    return Manifest(records, str(folder), unpaired=frozenset({folder.name}))


def _scan_folder(
    folder: pathlib.Path, dataset: str, modalities: Mapping[int, str]
) -> list[Record]:
    known: list[tuple[pathlib.Path, str, Split]] = [
        (folder / name, end, split)
        for name, end, split in _FOLDERS
        if (folder / name).is_dir()
    ]
    records = []
    for images, end, split in known:
        beside = {
            "label": _by_stem(folder / f"labels{end}", _IMAGES),
            "mask": _by_stem(folder / f"masks{end}", _IMAGES),
            "landmarks": {
                **_by_stem(folder / f"keypoints{end}", (".csv",)),
                **_by_stem(folder / f"landmarks{end}", (".csv",)),
            },
        }
        found = [
            _found_record(image, beside, dataset, modalities, split, bare=not end)
            for image in _by_stem(images, _IMAGES).values()
        ]
        if beside["label"] and found and not any(record.label for record in found):
            raise UserError(
                f"{images} and labels{end} beside it share no file name, expected "
                "equal names; rename the files or write a CSV manifest"
            )
        records += found
    if not known:
        records = [
            Record(image, stem, dataset, _modality(modalities, ""))
            for stem, image in _by_stem(folder, _IMAGES).items()
        ]
    return records


def _by_stem(folder: pathlib.Path, suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """Returns the files of a folder by name without extension, sorted."""
    if not folder.is_dir():
        return {}
    # Hidden files: macOS leaves ._name.nii.gz in archives.
    found = [
        path
        for path in sorted(folder.iterdir())
        if files.full_suffix(path).lower() in suffixes and not path.name.startswith(".")
    ]
    stems = {_stem(path): path for path in found}
    if len(stems) < len(found):
        twice = next(path for path in found if stems[_stem(path)] != path)
        raise UserError(
            f"{twice} and {stems[_stem(twice)].name} have one name, expected one file "
            "for each; remove one"
        )
    return stems


def _found_record(
    image: pathlib.Path,
    beside: Mapping[str, Mapping[str, pathlib.Path]],
    dataset: str,
    modalities: Mapping[int, str],
    split: Split,
    *,
    bare: bool,
) -> Record:
    """Returns the record of a file in imagesTr; `bare`: of one in images."""
    name = _stem(image)
    subject, session, channel = name, "", ""
    case = None if bare else _CHANNEL.fullmatch(name)
    learn2reg = None if bare else _CASE_AND_CHANNEL.fullmatch(name)
    if case and name not in beside["label"] and case[1] in beside["label"]:
        # nnU-Net: aligned channels share one label map.
        name = subject = case[1]
        channel = case[2]
    elif learn2reg:
        subject, session = learn2reg.groups()
        channel = session
    modality = _modality(modalities, channel)
    if not modalities and channel and int(channel):
        modality = f"channel {int(channel)}"
    return Record(
        image=image,
        subject=subject,
        dataset=dataset,
        modality=modality,
        split=split,
        session=session,
        label=beside["label"].get(name),
        mask=beside["mask"].get(name),
        landmarks=beside["landmarks"].get(name),
    )


def _row(record: Record, folder: pathlib.Path) -> dict[str, str]:
    """Returns a record's fields as text, its paths relative to `folder` if below."""
    row = {}
    for name in _FIELDS:
        value = getattr(record, name)
        if isinstance(value, pathlib.Path):
            path = pathlib.Path(os.path.abspath(value))
            value = path.relative_to(folder) if path.is_relative_to(folder) else path
            value = value.as_posix()
        row[name] = value or ""
    return row


# --- checking what they name ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What one file turned out to be.

    Attributes:
      problems: of the file by itself.
      grid: where it lies; None if it could not be read.
      digest: of an image's voxels.
      values: those of a label map; the points (P, 3) of a table of landmarks.
    """

    problems: tuple[Problem, ...] = ()
    grid: Grid | None = None
    digest: str = ""
    values: np.ndarray | None = None


_Readings = dict[tuple[pathlib.Path, str], _Reading]


def _belongings(record: Record) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields the fields that name a file, with the file."""
    for name in _PATHS:
        path = getattr(record, name)
        if path is not None:
            yield name, path


def _missing(record: Record) -> Iterator[Problem]:
    for name, path in _belongings(record):
        if not os.path.exists(path):
            yield Problem(
                str(path), "missing", f"{name} {path} does not exist; check the path"
            )


def _record_problems(
    record: Record, labels: Labels, readings: _Readings
) -> Iterator[Problem]:
    image = None
    for name, path in _belongings(record):
        if (path, name) not in readings:
            readings[path, name] = _read(path, name, record.modality)
        reading = readings[path, name]
        yield from reading.problems
        if name == "image":
            image = reading.grid
        elif name == "landmarks":
            yield from _point_problems(path, reading, image)
        else:
            yield from _grid_problems(name, path, reading, record, image)
        if name == "label" and reading.values is not None:
            yield from _label_problems(path, reading.values, record, labels)


def _read(path: pathlib.Path, name: str, modality: str) -> _Reading:
    """Reads one file; `name` is its field in the record, `modality` an image's."""
    if not os.path.exists(path):
        sentence = f"{name} {path} does not exist; check the path"
        return _Reading((Problem(str(path), "missing", sentence),))
    if name == "landmarks":
        try:
            files.check_readable(path, "landmarks", limit_bytes=_MANIFEST_LIMIT)
            return _Reading(values=tables.read(path, "landmarks").places)
        except UserError as error:
            return _Reading((Problem(str(path), "landmarks", str(error)),))
    kind: Any = {"label": "labels"}.get(name, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            volume = volumes.read_volume(path, kind=kind)
        except UserError as error:
            return _Reading((Problem(str(path), _fault(path, error), str(error)),))
    problems = tuple(
        Problem(str(path), "orientation", str(warning.message), "warning")
        for warning in caught
        if str(path) in str(warning.message)
    )
    if name == "image":
        try:
            # As training will, with the intensity rule that it has by default.
            rule = preprocess.Preprocessing(preprocess.kind(modality))
            preprocess.normalise(volume.array, rule, source=str(path))
        except UserError as error:
            problems += (Problem(str(path), "values", str(error)),)
        digest = hashlib.blake2b(volume.array.tobytes(), digest_size=16)
        return _Reading(problems, volume.grid, digest.hexdigest())
    values = np.unique(volume.array) if name == "label" else None
    return _Reading(problems, volume.grid, values=values)


def _fault(path: pathlib.Path, error: UserError) -> str:
    """Tells at which stage a volume was refused: file, header or voxels."""
    if error.__cause__ is not None:  # the format's library gave up
        return "unreadable"
    try:
        files.check_readable(path)
    except UserError:
        return "unreadable"
    try:
        volumes.read_grid(path)
    except UserError:
        return "shape"
    return "values"


def _grid_problems(
    name: str,
    path: pathlib.Path,
    reading: _Reading,
    record: Record,
    image: Grid | None,
) -> Iterator[Problem]:
    grid = reading.grid
    if image is None or grid is None or image.matches(grid):
        return
    if grid.shape != image.shape:
        yield Problem(
            str(path),
            "grid",
            f"{name} {path} has {_voxels(grid)} voxels, its image {record.image} "
            f"{_voxels(image)}, expected the same grid; resample it with nearest "
            "neighbour",
        )
        return
    gap = image.gap_mm(grid)
    small = image.gap_voxels(grid) <= preprocess.SAME_GRID_VOXELS
    yield Problem(
        str(path),
        "grid",
        f"{name} {path} lies up to {gap:.3g} mm from the grid of its image "
        f"{record.image}, expected the same place; correct the header or resample it",
        "warning" if small else "error",
    )


def _voxels(grid: Grid) -> str:
    return " x ".join(str(n) for n in reversed(grid.shape))


def _label_problems(
    path: pathlib.Path, values: np.ndarray, record: Record, labels: Labels
) -> Iterator[Problem]:
    listed = labels.get(record.dataset, {})
    unlisted = [v for v in values.tolist() if v > 0 and v not in listed]
    if listed and unlisted:
        yield Problem(
            str(path),
            "labels",
            f"label map {path} has the values {_few(unlisted)}, which the labels of "
            f"{record.dataset} ({_few(sorted(listed))}) leave out; list or renumber "
            "them",
        )
    if not (values > 0).any():
        yield Problem(
            str(path),
            "labels",
            f"label map {path} is background only, expected some label; check that it "
            "is the right file",
            "warning",
        )


def _few(values: Sequence[Any] | np.ndarray, most: int = 5) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > most else shown


def _point_problems(
    path: pathlib.Path, reading: _Reading, image: Grid | None
) -> Iterator[Problem]:
    if reading.values is None or image is None:
        return
    # Tables come in RAS mm, LPS mm and voxels; only what fits none is surely wrong.
    to_voxel = np.linalg.inv(image.affine_mm)
    homogeneous = np.pad(reading.values, ((0, 0), (0, 1)), constant_values=1.0)
    places = (
        (homogeneous @ to_voxel.T)[:, :3],
        (homogeneous * [-1.0, -1.0, 1.0, 1.0] @ to_voxel.T)[:, :3],
        reading.values[:, ::-1],
    )
    inside = [
        int(((v > -1) & (v < np.asarray(image.shape))).all(axis=1).sum())
        for v in places
    ]
    if max(inside) < len(reading.values):
        yield Problem(
            str(path),
            "landmarks",
            f"landmarks {path}: {len(reading.values) - max(inside)} of "
            f"{len(reading.values)} points lie outside the image, whether read as mm "
            "or as voxels; check that the table belongs to the image",
            "warning",
        )


def _grouped(
    records: Iterable[Record], key: Callable[[Record], Any]
) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _duplicates(manifest: Manifest, readings: _Readings) -> Iterator[Problem]:
    groups = _grouped(
        manifest.records, lambda r: (r.dataset, os.path.realpath(r.image))
    )
    for (dataset, _), group in groups.items():
        if len(group) > 1:
            yield Problem(
                str(group[0].image),
                "duplicate",
                f"image {group[0].image} is listed {len(group)} times in {dataset}, "
                "expected once; remove the other rows",
            )
    same: dict[str, list[str]] = {}
    for (path, name), reading in readings.items():
        if name == "image" and reading.digest:
            same.setdefault(reading.digest, []).append(os.path.realpath(path))
    for paths in same.values():
        paths = sorted(set(paths))
        if len(paths) > 1:
            yield Problem(
                paths[0],
                "duplicate",
                f"images {' and '.join(paths[:2])} have the same voxels; remove one, "
                "or check that the right files were copied",
                "warning",
            )


def _lonely(manifest: Manifest, readings: _Readings) -> Iterator[Problem]:
    """Finds images that no pair can have, by dataset and split."""
    del readings
    groups = _grouped(manifest.records, lambda r: (r.dataset, r.split, r.pairing))
    for (dataset, split, pairing), group in groups.items():
        if pairing == "inter":
            subjects = _grouped(group, lambda r: r.region)
            counts = {
                region or "(unnamed)": len({r.subject for r in members})
                for region, members in subjects.items()
            }
            what = "regions with one subject only"
            advice = "inter pairs need two; add subjects or set the pairing to intra"
        else:
            images = _grouped(group, lambda r: (r.subject, r.region))
            counts = {
                " ".join(key).strip(): len({os.path.realpath(r.image) for r in members})
                for key, members in images.items()
            }
            what = "subjects with one scan only"
            advice = "intra pairs need two; check the column subject"
        alone = [name for name, count in counts.items() if count < 2]
        if alone:
            none = len(alone) == len(counts)
            yield Problem(
                manifest.source,
                "pairs",
                f"dataset {dataset}, split {split}, has {'only ' * none}{what} "
                f"({_few(alone)}), {advice}",
                "error" if none and split == "train" else "warning",
            )


def _leaks(manifest: Manifest, readings: _Readings) -> Iterator[Problem]:
    del readings
    splits: dict[str, dict[str, set[str]]] = {}
    for record in manifest.records:
        subjects = splits.setdefault(record.dataset, {})
        subjects.setdefault(record.subject, set()).add(record.split)
    for dataset, subjects in splits.items():
        shared = sorted(name for name, found in subjects.items() if len(found) > 1)
        if shared:
            yield Problem(
                manifest.source,
                "leak",
                f"dataset {dataset} has subjects in more than one split "
                f"({_few(shared)}), so that results on held-out images flatter; give "
                "each subject one split",
                "warning",
            )


def _partial(manifest: Manifest, readings: _Readings) -> Iterator[Problem]:
    del readings
    groups = _grouped(manifest.records, lambda r: (r.dataset, r.split))
    for (dataset, split), group in groups.items():
        for name in ("label", "mask", "landmarks"):
            without = [str(r.image) for r in group if getattr(r, name) is None]
            if without and len(without) < len(group):
                yield Problem(
                    manifest.source,
                    "partial",
                    f"dataset {dataset}, split {split}: {len(without)} of {len(group)} "
                    f"records have no {name} (first {without[0]}), the others have "
                    "one; complete or remove them",
                    "warning",
                )


def _unaligned(manifest: Manifest, readings: _Readings) -> Iterator[Problem]:
    """Finds modalities of one scan that cannot be voxel by voxel the same place."""
    scans = _grouped(
        manifest.records, lambda r: (r.dataset, r.subject, r.region, r.session)
    )
    for (dataset, subject, _, session), group in scans.items():
        if len({record.modality.lower() for record in group}) < 2:
            continue
        if group[0].pairing == "intra" and not session:
            yield Problem(
                manifest.source,
                "alignment",
                f"dataset {dataset}, subject {subject}: images of several modalities "
                "have no session, so that two aligned images of one scan may become "
                "an intra pair; fill in the column session",
                "warning",
            )
            continue
        grids = [
            (record, reading.grid)
            for record in group
            if (reading := readings.get((record.image, "image"))) and reading.grid
        ]
        for record, grid in grids[1:]:
            if not grid.matches(grids[0][1]):
                yield Problem(
                    str(record.image),
                    "alignment",
                    f"images {grids[0][0].image} and {record.image} of subject "
                    f"{subject} lie on different grids, expected aligned modalities "
                    "of one session; resample one or name two sessions",
                    "warning",
                )


def _unequal_points(manifest: Manifest, readings: _Readings) -> Iterator[Problem]:
    intra = (r for r in manifest.records if r.pairing == "intra" and r.landmarks)
    groups = _grouped(intra, lambda r: (r.dataset, r.subject, r.region))
    for (dataset, subject, _), group in groups.items():
        tables = [
            readings.get((r.landmarks, "landmarks")) for r in group if r.landmarks
        ]
        counts = {
            len(t.values) for t in tables if t is not None and t.values is not None
        }
        if len(counts) > 1:
            yield Problem(
                str(group[0].landmarks),
                "landmarks",
                f"dataset {dataset}, subject {subject}: the tables of landmarks have "
                f"{' and '.join(map(str, sorted(counts)))} points, expected equally "
                "many in the same order; check them",
            )
