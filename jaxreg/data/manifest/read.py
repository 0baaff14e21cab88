"""Manifests from CSV, JSON and folders.

A manifest names files and reads none of them; `manifest.check` reads them all.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from jaxreg.data.manifest import records as records_lib
from jaxreg.data.manifest.records import Manifest, Pairing, Record, Split
from jaxreg.errors import UserError, near_match
from jaxreg.io import files, volumes

# What unigradicon-finetune calls the same things.
_ALIASES = {"segmentation": "label", "subject_id": "subject"}

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
      holdout: as `every` of `hold_out`; None: splits as in the manifest.

    Raises:
      UserError: it is no manifest, or an entry is wrong. Missing images are found by
        `manifest.check`.
    """
    path = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
    manifest = _read_folder(path) if os.path.isdir(path) else _read_file(path)
    if not manifest.records:
        raise UserError(
            f"manifest {path} lists no image, expected at least one; add rows"
        )
    return (
        manifest if holdout is None else records_lib.hold_out(manifest, every=holdout)
    )


# --- reading manifests ----------------------------------------------------------------


def _read_file(path: pathlib.Path) -> Manifest:
    path = files.check_readable(
        path, "manifest", limit_bytes=records_lib.MANIFEST_LIMIT
    )
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
    """Returns the datasets of which no entry states a pairing."""
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
                f"labels{near_match(name, ('data', 'labels'))}; remove or rename it"
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
        if name not in records_lib.FIELDS:
            known = (*records_lib.FIELDS, *_ALIASES)
            raise UserError(
                f"manifest {path} has the unknown {what} {name!r}, expected some of "
                f"{', '.join(records_lib.FIELDS)}{near_match(name, known)}; "
                "remove or rename it"
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


def _record(
    entry: Mapping[str, Any], where: str, base: pathlib.Path, dataset: str
) -> Record:
    """Returns the record of one row; the subject stays empty where it is missing."""
    values: dict[str, Any] = {"subject": "", "dataset": dataset}
    for name, value in entry.items():
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {name} is {value!r}, expected text; correct it")
        value = (value or "").strip()
        if name in records_lib.CHOICES:
            value = value.lower()
            known = records_lib.CHOICES[name]
            if value and value not in known:
                raise UserError(
                    f"{where}: {name} is {value!r}, expected one of "
                    f"{', '.join(known)}{near_match(value, known)}; correct it"
                )
        if value:
            values[name] = (
                _absolute(value, base) if name in records_lib.PATHS else value
            )
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
    """What a dataset JSON lists for one image.

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
            "label": _by_stem(folder / f"labels{end}", volumes.READ),
            "mask": _by_stem(folder / f"masks{end}", volumes.READ),
            "landmarks": {
                **_by_stem(folder / f"keypoints{end}", (".csv",)),
                **_by_stem(folder / f"landmarks{end}", (".csv",)),
            },
        }
        found = [
            _found_record(image, beside, dataset, modalities, split, bare=not end)
            for image in _by_stem(images, volumes.READ).values()
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
            for stem, image in _by_stem(folder, volumes.READ).items()
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
