"""From a list of labelled pairs to a table: overlap, distances, folding, time.

Every pair goes through `register.register`, as on the command line, and every transform
is judged on the fixed scan's own grid, whatever the network's grid was. Transforms of
other tools (see `comparison`) are warped and measured by the same functions.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from jaxreg import metrics, prealignment, register, results, tasks, zoo
from jaxreg.data import manifest as manifest_lib
from jaxreg.data import preprocess
from jaxreg.errors import UserError
from jaxreg.io import files, tables, transforms, volumes
from jaxreg.io.tables import Frame
from jaxreg.models.sam import TrainedSam
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Transform

Pairing = manifest_lib.Pairing
Method = Callable[[Volume, Volume], Transform]
"""Another way to register: (moving, fixed) to fixed mm -> moving mm."""


# --- which pairs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """Two scans and what is known of them; the fields are the columns of a pairs file.

    Attributes:
      fixed: the scan that stays.
      moving: the scan to be warped onto it.
      fixed_label: label map on the fixed scan's grid; both label maps or neither.
      moving_label: the same for the moving scan.
      fixed_mask: region of the fixed scan, used where the options ask for masks.
      moving_mask: the same for the moving scan.
      fixed_landmarks: CSV of points in the fixed scan; both or neither.
      moving_landmarks: the same points in the moving scan, in the same order.
      fixed_modality: "ct" or "mri"; the options' own if None.
      moving_modality: the same for the moving scan.
      task: which table the pair counts in ("all" if None), and what a network with
        heads for tasks is told unless the options name one.
      region: part of the body; where such a network knows it, it is told that.
      pairing: "inter" or "intra" subject, told to such a network; that of the task in
        its training if None.
      transform_out: where to write the transform of the last way of registering.
      warped_out: where to write the moving scan warped by it.
    """

    fixed: pathlib.Path
    moving: pathlib.Path
    fixed_label: pathlib.Path | None = None
    moving_label: pathlib.Path | None = None
    fixed_mask: pathlib.Path | None = None
    moving_mask: pathlib.Path | None = None
    fixed_landmarks: pathlib.Path | None = None
    moving_landmarks: pathlib.Path | None = None
    fixed_modality: register.Modality | None = None
    moving_modality: register.Modality | None = None
    task: str | None = None
    region: str | None = None
    pairing: Pairing | None = None
    transform_out: pathlib.Path | None = None
    warped_out: pathlib.Path | None = None

    @property
    def table(self) -> str:
        """The name of the table that the pair counts in."""
        return self.task or "all"


_COLUMNS = tuple(field.name for field in dataclasses.fields(PairSpec))
_WORDS = ("fixed_modality", "moving_modality", "task", "region", "pairing")
_IMAGES = (
    "fixed",
    "moving",
    "fixed_label",
    "moving_label",
    "fixed_mask",
    "moving_mask",
)
_LANDMARKS = ("fixed_landmarks", "moving_landmarks")


def read_pairs(path: files.PathLike) -> tuple[PairSpec, ...]:
    """Reads a list of pairs.

    Args:
      path: .csv with the columns of `PairSpec`, of which fixed and moving must be
        there; or .json, a list of objects with these keys, or {"pairs": list}. Paths
        are relative to the file's folder; empty cells are absent.

    Raises:
      UserError: the file is missing or damaged, a column is unknown, or a row is
        incomplete, contradicts itself or repeats another; names the row.
    """
    path = files.check_readable(path, "list of pairs")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise UserError(
            f"list of pairs {path} has the extension {suffix or '(none)'}, expected "
            ".csv or .json; rename or convert it"
        )
    rows = _csv_rows(path) if suffix == ".csv" else _json_rows(path)
    if not rows:
        raise UserError(f"{path} lists no pairs; add at least one")
    pairs = [_pair(row, where, path.parent) for where, row in rows]
    seen: dict[tuple[str, pathlib.Path, pathlib.Path], str] = {}
    for (where, _), pair in zip(rows, pairs, strict=True):
        key = (pair.table, pair.fixed, pair.moving)
        if key in seen:
            raise UserError(f"{where} repeats the pair of {seen[key]}; remove one")
        seen[key] = where
    return tuple(pairs)


def _csv_rows(path: pathlib.Path) -> list[tuple[str, dict[str, str]]]:
    """Returns (where, cells by column) of each row; the header is row 1."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV text ({error}); write it again") from error
    header = [name.strip() for name in lines[0]] if lines else []
    _check_names(header, f"{path} has the column", needed=("fixed", "moving"))
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        where = f"{path}, row {number}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where} has {len(cells)} cells, the header {len(header)}; correct it"
            )
        rows.append((where, dict(zip(header, cells, strict=True))))
    return rows


def _json_rows(path: pathlib.Path) -> list[tuple[str, dict[str, str]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of Unicode as well
        raise UserError(f"{path} is no JSON text ({error}); write it again") from error
    if isinstance(content, dict):
        content = content.get("pairs")
    if not isinstance(content, list):
        raise UserError(
            f'{path} holds no list of pairs, expected [{{"fixed": ..., "moving": ...}},'
            ' ...] or {"pairs": [...]}'
        )
    rows = []
    for number, entry in enumerate(content, start=1):
        where = f"{path}, pair {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry!r}, expected an object with keys")
        _check_names(entry, f"{where} has the key", needed=("fixed", "moving"))
        for key, value in entry.items():
            if not isinstance(value, str | None):
                raise UserError(f"{where}: {key} is {value!r}, expected a text")
        rows.append((where, {key: value or "" for key, value in entry.items()}))
    return rows


def _check_names(names: Iterable[str], having: str, *, needed: Sequence[str]) -> None:
    names = list(names)
    for name in names:
        if name not in _COLUMNS:
            near = results.near_match(name, _COLUMNS)
            raise UserError(
                f'{having} "{name}", which is unknown{near}; expected '
                f"{', '.join(_COLUMNS)}"
            )
        if names.count(name) > 1:
            raise UserError(f'{having} "{name}" twice; remove one')
    for name in needed:
        if name not in names:
            raise UserError(
                f'{having.split(" has the ")[0]} lacks "{name}", expected at least '
                f"{' and '.join(needed)}"
            )


def _pair(row: Mapping[str, str], where: str, folder: pathlib.Path) -> PairSpec:
    cells = {name: cell.strip() for name, cell in row.items() if cell.strip()}
    for name in ("fixed", "moving"):
        if name not in cells:
            raise UserError(f"{where} names no {name} scan; give its path")
    for kind in ("label", "landmarks"):
        given = [n for n in (f"fixed_{kind}", f"moving_{kind}") if n in cells]
        if len(given) == 1:
            raise UserError(
                f"{where} has {given[0]} alone; give both of fixed_{kind} and "
                f"moving_{kind}, or neither"
            )
    if cells.get("pairing", "inter") not in ("inter", "intra"):
        raise UserError(
            f"{where}: pairing is {cells['pairing']}, expected inter, intra"
        )
    fields: dict[str, Any] = {}
    for name, cell in cells.items():
        if name.endswith("_modality"):
            fields[name] = preprocess.kind(cell)
        else:
            fields[name] = cell if name in _WORDS else folder / cell
    pair = PairSpec(**fields)
    for name in (*_IMAGES, *_LANDMARKS):
        value = getattr(pair, name)
        if value is not None and not value.is_file():
            raise UserError(f"{where}: {name} {value} does not exist; check the path")
    return pair


def pairs_of_manifest(
    manifest: manifest_lib.Manifest,
    *,
    split: str = "val",
    neighbours: int = 3,
    across_modalities: bool = False,
    model: zoo.LoadedModel | None = None,
    options: register.Options | None = None,
) -> tuple[PairSpec, ...]:
    """Returns the pairs of held-out scans, by `manifest.neighbour_pairs`.

    A pair's task is its dataset. Label maps and landmarks come along where both scans
    have them. A dataset of which the manifest says no pairing is paired as the network
    will be told of it: as the options say, or as it was trained on it.

    Args:
      manifest: the scans.
      split: which of them.
      neighbours: moving images per fixed one, at most.
      across_modalities: see `manifest.neighbour_pairs`.
      model: that is to register them.
      options: how; the defaults if None.

    Raises:
      UserError: the split leaves no pair.
    """
    chosen = [record for record in manifest.records if record.split == split]
    told = {
        (record.dataset, record.region): _trained_pairing(record, model, options)
        for record in chosen
        if record.dataset in manifest.unpaired
    }
    chosen = [
        dataclasses.replace(record, pairing=pairing)
        if (pairing := told.get((record.dataset, record.region))) is not None
        else record
        for record in chosen
    ]
    found = manifest_lib.neighbour_pairs(
        chosen, neighbours, across_modalities=across_modalities
    )
    if not found:
        held = any(record.split == "val" for record in manifest.records)
        mend = (
            "give another --split, or hold out at least two subjects (of intra pairs: "
            "two scans of one)"
            if held or split != "val"
            else "give --holdout 5, --split train, or a column split"
        )
        raise UserError(
            f'{manifest.source} has {len(chosen)} scans of the split "{split}" and no '
            f"pair among them; {mend}"
        )
    pairs = []
    for fixed, moving in found:
        pair = _pair_of_records(fixed, moving)
        if told.get((fixed.dataset, fixed.region), "") is None:
            pair = dataclasses.replace(pair, pairing=None)
        pairs.append(pair)
    return tuple(pairs)


def _trained_pairing(
    record: manifest_lib.Record,
    model: zoo.LoadedModel | None,
    options: register.Options | None,
) -> Pairing | None:
    """Returns what a network is told of a record's dataset; None if unsure."""
    if model is None or not tasks.told_of_regions(model):
        return None
    pair = dataclasses.replace(_pair_of_records(record, record), pairing=None)
    try:
        return told_of(pair, model, options or register.Options()).pairing
    except UserError:  # which is said of the pair, with its name
        return None


def _pair_of_records(
    fixed: manifest_lib.Record, moving: manifest_lib.Record
) -> PairSpec:
    fields: dict[str, Any] = {}
    for name in ("label", "landmarks", "mask"):
        both = {"fixed": getattr(fixed, name), "moving": getattr(moving, name)}
        if name == "mask" or None not in both.values():
            fields |= {f"{side}_{name}": path for side, path in both.items()}
    return PairSpec(
        fixed=fixed.image,
        moving=moving.image,
        fixed_modality=preprocess.kind(fixed.modality),
        moving_modality=preprocess.kind(moving.modality),
        task=fixed.dataset,
        region=fixed.region or None,
        pairing=fixed.pairing,
        **fields,
    )


def told_of(
    pair: PairSpec, model: zoo.LoadedModel, options: register.Options
) -> tasks.Told:
    """Returns what a network is told of a pair: by the options, else by the pair.

    Raises:
      UserError: see `tasks.tell`; it names the column.
    """
    chosen, said = _options_of(pair, options, model), "--task"
    if options.task == "auto" and tasks.told_of_regions(model):
        columns = {"region": pair.region, "task": pair.task}
        column = next((n for n, word in columns.items() if word == chosen.task), None)
        said = f"the column {column}" if column else "without a column task, --task"
    return tasks.tell(model, chosen.task, chosen.pairing, chosen.smoothness, said=said)


def pair_names(pairs: Sequence[PairSpec]) -> tuple[str, ...]:
    """Returns what to call each pair: "moving to fixed", by file name.

    Where two scans have one file name, all are called by their path below the common
    folder, so that the names do not depend on where the data lie.
    """
    paths = {scan for pair in pairs for scan in (pair.fixed, pair.moving)}
    called = {path: pathlib.Path(path.name) for path in paths}
    if len(set(called.values())) < len(paths):
        whole = {path: pathlib.Path(os.path.abspath(path)) for path in paths}
        common = os.path.commonpath([path.parent for path in whole.values()])
        called = {path: whole[path].relative_to(common) for path in paths}

    def name(path: pathlib.Path) -> str:
        return called[path].as_posix().removesuffix(files.full_suffix(path))

    return tuple(f"{name(pair.moving)} to {name(pair.fixed)}" for pair in pairs)


def read_landmarks(
    path: files.PathLike, *, frame: Frame = "lps", grid: Grid | None = None
) -> np.ndarray:
    """Reads points of a scan.

    Args:
      path: CSV with columns x, y, z, by name in a header or the first three.
      frame: what the numbers are.
      grid: the scan's grid, for "voxel".

    Returns:
      P 3, RAS+ mm, float64.

    Raises:
      UserError: the file is missing or has a row without three finite numbers.
    """
    return tables.to_mm(tables.read(path, "landmarks").places, frame, grid)


# --- register and measure ------------------------------------------------------------

Progress = Callable[[int, int, results.Row], None]
"""Called after each row with (rows done, rows in all, the row)."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Scans:
    """A pair in memory; landmarks are P 3, RAS+ mm."""

    spec: PairSpec
    name: str
    fixed: Volume
    moving: Volume
    regions: register.Regions
    labels: tuple[Volume, Volume] | None  # fixed, moving
    landmarks: tuple[np.ndarray, np.ndarray] | None  # fixed, moving


@dataclasses.dataclass(frozen=True)
class _Way:
    """One row's worth: its name, how to find the transform, what its time means."""

    name: str
    find: Callable[[_Scans], tuple[Transform, float]]
    compiles: bool = False


def evaluate(
    pairs: Sequence[PairSpec],
    model: zoo.LoadedModel | None,
    options: register.Options,
    *,
    with_optimisation: bool = False,
    smoothness: Sequence[float] = (),
    others: Mapping[str, Method] | None = None,
    labels: Sequence[int] | None = None,
    landmarks_frame: Frame = "lps",
    name: str | None = None,
    sam: TrainedSam | None = None,
    progress: Progress | None = None,
    keep: Callable[[results.Result], None] | None = None,
) -> results.Result:
    """Registers every pair in every way that was asked for, and measures the results.

    There are always two rows for the start: "initial", where the scans' headers place
    them, and "initial, resized", where both scans' extents coincide; and one more for
    the pre-alignment, if the options ask for one. Then come the other tools, the
    model's prediction, and the result of instance optimisation.

    The grid of the fixed scan is that of all measures. Labels are warped by nearest
    neighbour. A label of either scan of a pair counts; one that neither has is NaN and
    left out of the means.

    What fails on one pair is warned about and leaves a row without numbers; the others
    go on.

    Args:
      pairs: from `read_pairs` or `pairs_of_manifest`.
      model: weights from `zoo.load`; None for the displacement optimisation alone
        (`options.io_target`), or for other tools alone.
      options: how to register; modalities are replaced by a pair's own.
      with_optimisation: add a row after `options.io_iterations` steps from the model.
      smoothness: a row for each of these weights in place of the model's one, for a
        network that can be asked for them.
      others: further ways by name, e.g. of `comparison.TOOLS`.
      labels: which to score; all positive ones of either scan if None.
      landmarks_frame: what the numbers of landmark files are.
      name: what to call the model; its own name if None.
      sam: see `register.register`.
      progress: called after each row.
      keep: called after each pair with all rows so far, to save them.

    Returns:
      One row per method and pair.

    Raises:
      UserError: files do not go together or options do not, as far as headers show it;
        said before the first registration.
    """
    if not pairs:
        raise UserError("there are no pairs to evaluate; list at least one")
    if options.dice_loss_weight > 0:
        raise UserError(
            f"--dice-loss-weight is {options.dice_loss_weight:g}: the evaluation would "
            "optimise what it measures; leave it out"
        )
    ways = _ways(model, options, with_optimisation, name, others or {}, smoothness, sam)
    names = pair_names(pairs)
    _check_pairs(pairs, names, options, landmarks_frame)
    _check_told(pairs, names, model, options, smoothness)
    rows: list[results.Row] = []
    for pair, called in zip(pairs, names, strict=True):
        for row in _rows_of(pair, called, ways, options, labels, landmarks_frame):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(pairs) * len(ways), row)
        if keep is not None:
            keep(results.Result(_in_order(rows, ways)))
    return results.Result(_in_order(rows, ways))


def _rows_of(
    pair: PairSpec,
    name: str,
    ways: Sequence[_Way],
    options: register.Options,
    labels: Sequence[int] | None,
    frame: Frame,
) -> Iterator[results.Row]:
    """Yields a pair's rows; one without numbers, and a warning, where a way fails."""
    written = next((w for w in reversed(ways) if w.compiles), None)
    try:
        scans = _read(pair, name, options, frame)
    except UserError as error:
        warnings.warn(f"pair {name} is left out: {error}", stacklevel=3)
        yield from (results.Row(way.name, pair.table, name) for way in ways)
        return
    present = _labels_of(scans, labels)
    for way in ways:
        try:
            found, seconds = way.find(scans)
            row = _measure(scans, found, way.name, present)
            if way is written:
                _write_outputs(scans, found, options)
            yield dataclasses.replace(row, seconds=seconds, first=way.compiles)
        except UserError as error:
            warnings.warn(f"pair {name}: {way.name} failed: {error}", stacklevel=3)
            yield results.Row(way.name, pair.table, name)


def _in_order(
    rows: Sequence[results.Row], ways: Sequence[_Way]
) -> tuple[results.Row, ...]:
    """Orders rows by method and gives the rows of a task the same labels.

    A row is a method's first if it is the first that did not fail.
    """
    known: dict[str, set[int]] = {}
    for row in rows:
        known.setdefault(row.task, set()).update(row.dice)

    def filled(row: results.Row, scores: Mapping[int, float]) -> dict[int, float]:
        return {n: scores.get(n, math.nan) for n in sorted(known[row.task])}

    compiled: set[str] = set()
    ordered: dict[str, list[results.Row]] = {way.name: [] for way in ways}
    for row in rows:
        ordered[row.method].append(
            dataclasses.replace(
                row,
                dice=filled(row, row.dice),
                hd95_mm=filled(row, row.hd95_mm),
                first=row.first and row.method not in compiled,
            )
        )
        compiled |= {row.method} if row.first else set()
    return tuple(row for group in ordered.values() for row in group)


def _ways(
    model: Any,
    options: register.Options,
    with_optimisation,
    name,
    others,
    smoothness: Sequence[float],
    sam: TrainedSam | None,
) -> list[_Way]:
    """Returns the rows of the table, after checking what was asked for."""
    displacement = options.io_target == "displacement"
    prealigned = options.prealign != "none"
    if (
        prealigned
        and model is None
        and with_optimisation
        and options.io_target == "network"
    ):
        raise UserError(
            "--io-iterations has no network to optimise; give a --model or another "
            "--io-target, or leave it out"
        )
    if model is None and not displacement and not others and not prealigned:
        raise UserError(
            "there is nothing to evaluate; name a model with --model, pass --io-target "
            "displacement or --prealign, or name another tool"
        )
    start = _prealigned(model, options, sam) if prealigned else None
    ways = _starts(model, options, start)
    ways += [_Way(other, _timed(method)) for other, method in others.items()]
    if model is not None:
        called = name or pathlib.PurePath(model.name).name
        single = dataclasses.replace(
            options,
            io_iterations=None,
            io_target="network",
            intensity_conservation_loss=False,
        )
        asked = {
            weight_name(called, weight): dataclasses.replace(single, smoothness=weight)
            for weight in smoothness
        } or {called: single}
        ways += [
            _Way(row, _registered(model, each, sam, start), compiles=True)
            for row, each in asked.items()
        ]
        if with_optimisation and not displacement:
            optimised = _registered(model, options, sam, start)
            ways.append(_Way(f"{called} + IO", optimised, compiles=True))
    refined = model is None and with_optimisation and options.io_target != "network"
    if refined or (displacement and (model is None or with_optimisation)):
        alone = dataclasses.replace(
            options, task="auto", pairing=None, smoothness=None, level_iterations=None
        )
        found = _registered(None, alone, sam, start)
        ways.append(_Way(options.io_target, found, compiles=True))
    if (with_optimisation or displacement) and options.io_iterations is None:
        raise UserError(
            "instance optimisation needs a number of steps; pass --io-iterations"
        )
    _check_unlike([way.name for way in ways])
    return ways


def _starts(
    model: Any, options: register.Options, start: "_Start | None"
) -> list[_Way]:
    """Returns the rows before any registration."""
    placement = options.placement or preprocess.Placement.of_weights(
        {} if model is None else model.bundle.preprocessing
    )

    def resized(scans):
        return _resized(scans, options, placement), math.nan

    ways = [
        _Way(results.INITIAL, lambda scans: (Transform(()), math.nan)),
        _Way(results.RESIZED, resized),
    ]
    if start is not None:

        def prealigned(scans):
            found, seconds = start(scans)
            return found.in_world, seconds

        name = f"pre-aligned, {options.prealign}"
        ways.append(_Way(name, prealigned, compiles=True))
    return ways


def _check_unlike(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows would be called {name}; pass another name")


def weight_name(model: str, weight: float) -> str:
    """Returns what a model that is asked for a smoothness is called in the tables."""
    return f"{model}, smoothness {weight:g}"


_Start = Callable[[_Scans], tuple[prealignment.Prealignment, float]]


def _prealigned(
    model: Any, options: register.Options, sam: TrainedSam | None
) -> _Start:
    """Returns what finds a pair's pre-alignment, once for all its rows."""

    @functools.lru_cache(maxsize=1)
    def find(scans: _Scans) -> tuple[prealignment.Prealignment, float]:
        start = time.perf_counter()
        found = register.prealigned(
            scans.moving,
            scans.fixed,
            model,
            _options_of(scans.spec, options, model),
            regions=scans.regions,
            sam=sam,
        )
        return found, time.perf_counter() - start

    return find


def _resized(
    scans: _Scans, options: register.Options, placement: preprocess.Placement
) -> Transform:
    """The identity of both unit cubes: what a network that does nothing answers."""
    moving = scans.moving
    if not options.stored_orientation:
        moving = register.oriented_like(moving, scans.fixed.grid)
    grids = (
        placement.grid(placement.turned(volume).grid, options.shape)
        for volume in (scans.fixed, moving)
    )
    return transform_lib.in_world(Transform(()), *grids)


def _timed(method: Method):
    def find(scans: _Scans) -> tuple[Transform, float]:
        start = time.perf_counter()
        found = method(scans.moving, scans.fixed)
        return found, time.perf_counter() - start

    return find


def _registered(
    model: Any,
    options: register.Options,
    sam: TrainedSam | None,
    start: _Start | None,
):
    def find(scans: _Scans) -> tuple[Transform, float]:
        begin, seconds = (None, 0.0) if start is None else start(scans)
        found = register.register(
            scans.moving,
            scans.fixed,
            model,
            _options_of(scans.spec, options, model),
            regions=scans.regions,
            sam=sam,
            start=begin,
        )
        for phase in ("preprocess", "prealign", "register"):
            seconds += found.seconds.get(phase, 0.0)
        return found.transform, seconds

    return find


def _options_of(
    pair: PairSpec, options: register.Options, model: zoo.LoadedModel | None = None
) -> register.Options:
    """Returns the options with a pair's modalities, and its words for the network."""
    chosen = dataclasses.replace(
        options,
        fixed_modality=pair.fixed_modality or options.fixed_modality,
        moving_modality=pair.moving_modality or options.moving_modality,
        inverse=False,
    )
    if model is None or not tasks.told_of_regions(model):
        return chosen
    own = tasks.word_of(model, pair.task, pair.region)
    return dataclasses.replace(
        chosen,
        task=own if options.task == "auto" else options.task,
        pairing=options.pairing or pair.pairing,
    )


def _uses_masks(options: register.Options) -> bool:
    return options.input_masking or options.loss_function_masking


def _check_pairs(
    pairs: Sequence[PairSpec],
    names: Sequence[str],
    options: register.Options,
    frame: Frame,
) -> None:
    """Says what is wrong as far as headers show it, before the first registration."""
    grids: dict[pathlib.Path, Grid] = {}
    outputs: set[pathlib.Path] = set()
    seen: set[tuple[str, str]] = set()
    for pair, name in zip(pairs, names, strict=True):
        if (pair.table, name) in seen:
            raise UserError(f"pair {name} of {pair.table} is listed twice; remove one")
        seen.add((pair.table, name))
        try:
            _check_pair(pair, options, frame, grids, outputs)
        except UserError as error:
            raise UserError(f"pair {name}: {error}") from error
    if any(p.fixed_mask or p.moving_mask for p in pairs) and not _uses_masks(options):
        warnings.warn(
            "the masks have no effect without --input-masking or "
            "--loss-function-masking",
            stacklevel=3,
        )


def _check_told(
    pairs: Sequence[PairSpec],
    names: Sequence[str],
    model: zoo.LoadedModel | None,
    options: register.Options,
    smoothness: Sequence[float],
) -> None:
    """Says what the network cannot be told or shown of a pair, and warns of doubts."""
    if model is None:
        tasks.refuse(options.task, options.pairing, options.smoothness)
        return
    doubts: dict[str, None] = {}
    for pair, name in zip(pairs, names, strict=True):
        try:
            for weight in smoothness or (options.smoothness,):
                asking = dataclasses.replace(options, smoothness=weight)
                told = told_of(pair, model, asking)
                shown = _options_of(pair, options, model)
                register.check_units(told.model, shown)
        except UserError as error:
            raise UserError(f"pair {name}: {error}") from error
        if not tasks.told_of_regions(model):
            continue
        if options.pairing and pair.pairing not in (None, options.pairing):
            doubts[
                f"{pair.table} is {pair.pairing} in the list, but --pairing is "
                f"{options.pairing}, which the network is told"
            ] = None
        elif not told.trained:
            doubts[
                f"{pair.table} is told to {model.name} as {told.key}, which training "
                "did not have; correct the column pairing, or give --pairing, if the "
                "pairs are of the other type"
            ] = None
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=3)


def _check_pair(pair: PairSpec, options: register.Options, frame, grids, outputs):
    register.check_options(_options_of(pair, options))
    given = {name: None for name in vars(register.Regions())}
    if _uses_masks(options):
        given |= {"fixed_mask": pair.fixed_mask, "moving_mask": pair.moving_mask}
    register.check_regions(options, given)
    for side in ("fixed", "moving"):
        _check_grids(pair, side, grids)
    if (pair.fixed_label is None) != (pair.moving_label is None):
        raise UserError("it has one label map; give both or neither")
    _landmarks(pair, frame, grids[pair.fixed], grids[pair.moving])
    if pair.transform_out is not None:
        transforms.check_transform_path(pair.transform_out, "transform_out")
    if pair.warped_out is not None:
        volumes.check_volume_path(pair.warped_out, "warped_out")
    for path in (pair.transform_out, pair.warped_out):
        if path is not None and path.absolute() in outputs:
            raise UserError(f"{path} is an output twice; name another file")
        outputs.update([path.absolute()] if path is not None else [])


def _check_grids(pair: PairSpec, side: str, grids: dict[pathlib.Path, Grid]) -> None:
    image = getattr(pair, side)
    for name in (side, f"{side}_label", f"{side}_mask"):
        path = getattr(pair, name)
        if path is None:
            continue
        if path not in grids:
            grids[path] = volumes.read_grid(path)
        if not grids[path].matches(grids[image]):
            raise UserError(
                f"{name} {path} lies on another grid than its image {image}; resample "
                "it onto the image first"
            )


def _landmarks(pair: PairSpec, frame: Frame, fixed: Grid, moving: Grid):
    """Returns the landmarks of both scans, P 3, RAS+ mm, or None."""
    if pair.fixed_landmarks is None and pair.moving_landmarks is None:
        return None
    if pair.fixed_landmarks is None or pair.moving_landmarks is None:
        raise UserError("it has one file of landmarks; give both or neither")
    here = read_landmarks(pair.fixed_landmarks, frame=frame, grid=fixed)
    there = read_landmarks(pair.moving_landmarks, frame=frame, grid=moving)
    if len(here) != len(there):
        raise UserError(
            f"{pair.fixed_landmarks} has {len(here)} landmarks, "
            f"{pair.moving_landmarks} {len(there)}; give the same points in one order"
        )
    outside = _count_outside(here, fixed)
    if outside:
        others = [other for other in get_args(Frame) if other != frame]
        fitting = [
            other
            for other in others
            if not _count_outside(
                read_landmarks(pair.fixed_landmarks, frame=other, grid=fixed), fixed
            )
        ]
        raise UserError(
            f"{outside} of {len(here)} points of {pair.fixed_landmarks} lie outside "
            f"the scan {pair.fixed}, read as {frame}; "
            + (
                f"pass --landmarks-frame {' or '.join(fitting)}, where all are inside"
                if fitting
                else "no other --landmarks-frame puts all inside, check the file"
            )
        )
    return here, there


def _count_outside(points_mm: np.ndarray, grid: Grid) -> int:
    """Returns how many points, P 3 RAS+ mm, are a voxel or more off the grid."""
    turn, origin = grid.affine_mm[:3, :3], grid.affine_mm[:3, 3]
    voxels = (points_mm - origin) @ np.linalg.inv(turn).T
    inside = (voxels > -1) & (voxels < np.asarray(grid.shape))
    return int((~inside.all(axis=1)).sum())


def _read(pair: PairSpec, name: str, options: register.Options, frame: Frame) -> _Scans:
    def read(path: pathlib.Path | None, kind: volumes.Kind) -> Volume | None:
        return None if path is None else volumes.read_volume(path, kind=kind)

    fixed = volumes.read_volume(pair.fixed)
    moving = volumes.read_volume(pair.moving)
    masked = _uses_masks(options)
    fixed_labels = read(pair.fixed_label, "labels")
    moving_labels = read(pair.moving_label, "labels")
    return _Scans(
        spec=pair,
        name=name,
        fixed=fixed,
        moving=moving,
        regions=register.Regions(
            fixed_mask=read(pair.fixed_mask, "mask") if masked else None,
            moving_mask=read(pair.moving_mask, "mask") if masked else None,
        ),
        labels=(fixed_labels, moving_labels)
        if fixed_labels is not None and moving_labels is not None
        else None,
        landmarks=_landmarks(pair, frame, fixed.grid, moving.grid),
    )


def _labels_of(scans: _Scans, labels: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the labels to score: before warping, which may lose a small one."""
    if scans.labels is None:
        return ()
    if labels is not None:
        return tuple(int(label) for label in labels)
    found = np.union1d(*(np.unique(volume.array) for volume in scans.labels))
    return tuple(int(label) for label in found if label > 0)


def _measure(
    scans: _Scans, found: Transform, method: str, labels: tuple[int, ...]
) -> results.Row:
    dice, hd95 = {}, {}
    if scans.labels is not None:
        fixed, moving = scans.labels
        grid = scans.fixed.grid
        warped = transform_lib.warp_volume(moving, found, grid, order=0)
        dice = metrics.dice(warped.array, fixed.array, labels=labels)
        hd95 = metrics.hd95_mm(
            warped.array, fixed.array, spacing_mm=grid.spacing_mm, labels=labels
        )
        # A label that the moving scan alone has is scored 0 even if warping loses it.
        unknown = (
            set(labels) - set(np.unique(moving.array)) - set(np.unique(fixed.array))
        )
        dice = {
            n: 0.0 if math.isnan(score) and n not in unknown else score
            for n, score in dice.items()
        }
    tre = math.nan
    if scans.landmarks is not None:
        here, there = scans.landmarks
        mapped = np.asarray(found.map_points(here[None]))[0]
        tre = float(metrics.tre_mm(mapped, there).mean())
    determinant = transform_lib.jacobian_map(found, scans.fixed.grid)
    return results.Row(
        method=method,
        task=scans.spec.table,
        pair=scans.name,
        dice=dice,
        hd95_mm=hd95,
        tre_mm=tre,
        folding_percent=metrics.folding_fraction(determinant),
        sdlogj=metrics.sdlogj(determinant),
    )


def _write_outputs(scans: _Scans, found: Transform, options: register.Options) -> None:
    pair = scans.spec
    if pair.transform_out is not None:
        transforms.write_transform(pair.transform_out, found, scans.fixed.grid)
    if pair.warped_out is not None:
        stored = volumes.read_volume(pair.moving, kind="stored")
        # Air where a CT has nothing to show, as on the command line.
        ct = _options_of(pair, options).moving_modality == "ct"
        fill = max(-1000.0, float(stored.array.min())) if ct else 0.0
        warped = transform_lib.warp_volume(stored, found, scans.fixed.grid, fill=fill)
        volumes.write_volume(pair.warped_out, warped)


# --- the command line's verb ---------------------------------------------------------


def evaluate_files(
    pairs: Sequence[PairSpec],
    model: zoo.LoadedModel | None,
    options: register.Options,
    *,
    out: files.PathLike,
    label_names: Mapping[str, Mapping[int, str]] | None = None,
    **settings: Any,
) -> results.Result:
    """Evaluates, writes the rows as CSV and the tables as Markdown beside it.

    Both are written anew after every pair, so that an interrupt loses one at most.

    Args:
      pairs: see `evaluate`.
      model: see `evaluate`.
      options: see `evaluate`.
      out: the CSV file; the Markdown gets its name with .md.
      label_names: see `results.markdown`.
      **settings: keyword arguments of `evaluate`, all but `keep`.

    Returns:
      The rows.

    Raises:
      UserError: see `evaluate`; or a file cannot be written, which is said first.
    """
    out = pathlib.Path(out)
    if out.suffix.lower() != ".csv":
        raise UserError(
            f"--out {out} has the extension {out.suffix or '(none)'}, expected .csv; "
            "rename it"
        )
    tables = out.with_suffix(".md")
    for path in (out, tables):
        files.check_writable(path, "--out")

    def keep(result: results.Result) -> None:
        results.write_csv(out, result)
        with files.atomic_path(tables) as unfinished:
            text = results.markdown(result, label_names=label_names)
            unfinished.write_text(text, encoding="utf-8")

    return evaluate(pairs, model, options, keep=keep, **settings)
