"""Checks of a manifest: missing, damaged, misplaced and duplicate files."""

import dataclasses
import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxreg.data import modality as modality_lib
from jaxreg.data import preprocess
from jaxreg.data.manifest import records as records_lib
from jaxreg.data.manifest.records import Labels, Manifest, Problem, Record
from jaxreg.errors import UserError
from jaxreg.io import files, itk_images, tables, volumes
from jaxreg.space.grid import Grid


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


# --- checking what they name ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What reading one file found.

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
    for name in records_lib.PATHS:
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
            files.check_readable(
                path, "landmarks", limit_bytes=records_lib.MANIFEST_LIMIT
            )
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
            rule = preprocess.IntensityRule(modality_lib.kind(modality))
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
        (homogeneous @ itk_images.LPS @ to_voxel.T)[:, :3],
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
