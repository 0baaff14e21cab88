"""Evaluation of labelled pairs: overlap, distances, folding, time.

Every pair goes through `pair.register`, as on the command line, and every transform
is judged on the fixed scan's own grid, whatever the network's grid was. Transforms of
other tools (see `baselines`) are warped and measured by the same functions.
"""

import dataclasses
import functools
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg import metrics
from jaxreg.data import modality as modality_lib
from jaxreg.data import network_grid
from jaxreg.data.manifest import neighbours as neighbours_lib
from jaxreg.data.manifest import records
from jaxreg.data.pair_list import Pairing, PairSpec, pair_names
from jaxreg.data.pair_list import read_pairs as read_pairs
from jaxreg.errors import UserError
from jaxreg.evaluation import table as table_lib
from jaxreg.io import files, tables, transforms, volumes
from jaxreg.io.tables import Frame
from jaxreg.models.sam import TrainedSam
from jaxreg.registration import conditioning, preparation
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import rows as rows_lib
from jaxreg.registration.prealign import select
from jaxreg.registration.rows import conditioning_of_pair
from jaxreg.space import transform as transform_lib
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Transform
from jaxreg.weights import zoo

Method = Callable[[Volume, Volume], Transform]
"""Another way to register: (moving, fixed) to fixed mm -> moving mm."""


# --- which pairs ---------------------------------------------------------------------


def pairs_of_manifest(
    manifest: records.Manifest,
    *,
    split: str = "val",
    neighbours: int = 3,
    across_modalities: bool = False,
    model: zoo.LoadedModel | None = None,
    options: options_lib.Options | None = None,
) -> tuple[PairSpec, ...]:
    """Returns the pairs of held-out scans, by `neighbours.neighbour_pairs`.

    A pair's task is its dataset. Label maps and landmarks come along where both scans
    have them. A dataset of which the manifest says no pairing is paired as the network
    will be told of it: as the options say, or as it was trained on it.

    Args:
      manifest: the scans.
      split: which of them.
      neighbours: moving images per fixed one, at most.
      across_modalities: see `neighbours.neighbour_pairs`.
      model: that is to register them.
      options: how; the defaults if None.

    Raises:
      UserError: the split leaves no pair.
    """
    chosen = [record for record in manifest.records if record.split == split]
    pairings = {
        (record.dataset, record.region): _trained_pairing(record, model, options)
        for record in chosen
        if record.dataset in manifest.unpaired
    }
    chosen = [
        dataclasses.replace(record, pairing=pairing)
        if (pairing := pairings.get((record.dataset, record.region))) is not None
        else record
        for record in chosen
    ]
    found = neighbours_lib.neighbour_pairs(
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
        if pairings.get((fixed.dataset, fixed.region), "") is None:
            pair = dataclasses.replace(pair, pairing=None)
        pairs.append(pair)
    return tuple(pairs)


def _trained_pairing(
    record: records.Record,
    model: zoo.LoadedModel | None,
    options: options_lib.Options | None,
) -> Pairing | None:
    """Returns what a network is told of a record's dataset; None if unsure."""
    if model is None or not conditioning.needs_region(model):
        return None
    pair = dataclasses.replace(_pair_of_records(record, record), pairing=None)
    try:
        return conditioning_of_pair(
            pair, model, options or options_lib.Options()
        ).pairing
    except UserError:  # which is said of the pair, with its name
        return None


def _pair_of_records(fixed: records.Record, moving: records.Record) -> PairSpec:
    fields: dict[str, Any] = {}
    for name in ("label", "landmarks", "mask"):
        both = {"fixed": getattr(fixed, name), "moving": getattr(moving, name)}
        if name == "mask" or None not in both.values():
            fields |= {f"{side}_{name}": path for side, path in both.items()}
    return PairSpec(
        fixed=fixed.image,
        moving=moving.image,
        fixed_modality=modality_lib.canonical(fixed.modality),
        moving_modality=modality_lib.canonical(moving.modality),
        task=fixed.dataset,
        region=fixed.region or None,
        pairing=fixed.pairing,
        **fields,
    )


def read_landmarks(
    path: files.PathLike, *, frame: Frame = "lps", grid: Grid | None = None
) -> np.ndarray:
    """Reads points of a scan.

    Args:
      path: CSV with columns x, y, z, by name in a header or the first three; or
        .fcsv or .mrk.json of 3D Slicer, which say their frame.
      frame: what the numbers of a CSV are.
      grid: the scan's grid, for "voxel".

    Returns:
      P 3, RAS+ mm, float64.

    Raises:
      UserError: the file is missing or has a row without three finite numbers.
    """
    return tables.points_mm(tables.read(path, "landmarks"), frame, grid)


# --- register and measure ------------------------------------------------------------

Progress = Callable[[int, int, table_lib.EvalRecord], None]
"""Called after each row with (rows done, rows in all, the row)."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Scans:
    """A pair in memory; landmarks are P 3, RAS+ mm."""

    spec: PairSpec
    name: str
    fixed: Volume
    moving: Volume
    regions: options_lib.Regions
    labels: tuple[Volume, Volume] | None  # fixed, moving
    landmarks: tuple[np.ndarray, np.ndarray] | None  # fixed, moving


@dataclasses.dataclass(frozen=True)
class _MethodRun:
    """One row's worth: its name, how to find the transform, what its time means."""

    name: str
    find: Callable[[_Scans], tuple[Transform, float]]
    compiles: bool = False


def evaluate(
    pairs: Sequence[PairSpec],
    model: zoo.LoadedModel | None,
    options: options_lib.Options,
    *,
    with_optimisation: bool = False,
    smoothness: Sequence[float] = (),
    others: Mapping[str, Method] | None = None,
    labels: Sequence[int] | None = None,
    landmarks_frame: Frame = "lps",
    name: str | None = None,
    sam: TrainedSam | None = None,
    progress: Progress | None = None,
    keep: Callable[[table_lib.Result], None] | None = None,
) -> table_lib.Result:
    """Registers every pair in every way that was asked for, and measures the results.

    There are always two rows for the start: "initial", where the scans' headers place
    them, and "initial, resized", where both scans' extents coincide; and one more for
    the pre-alignment, if the options ask for one. Then come the other tools, the
    model's prediction, and the result of instance optimisation.

    The grid of the fixed scan is that of all measures; where it is larger than the box
    of a network with a fixed spacing, determinants are those within the box. Labels are
    warped by nearest neighbour. A label of either scan of a pair counts; one that
    neither has is NaN and left out of the means.

    What fails on one pair is warned about and leaves a row without numbers; the others
    go on.

    Args:
      pairs: from `read_pairs` or `pairs_of_manifest`.
      model: weights from `load.load`; None for the displacement optimisation alone
        (`options.io_target`), or for other tools alone.
      options: how to register; modalities are replaced by a pair's own.
      with_optimisation: add a row after `options.io_iterations` steps from the model.
      smoothness: a row for each of these weights in place of the model's one, for a
        network that can be asked for them.
      others: further ways by name, e.g. of `baselines.TOOLS`.
      labels: which to score; all positive ones of either scan if None.
      landmarks_frame: what the numbers of landmark files are.
      name: what to call the model; its own name if None.
      sam: see `pair.register`.
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
    options = preparation.with_grid(dataclasses.replace(options, inverse=False), model)
    method_runs = _method_runs(
        model, options, with_optimisation, name, others or {}, smoothness, sam
    )
    names = pair_names(pairs)
    _check_pairs(pairs, names, options, landmarks_frame)
    pairings = [f"pair {name}" for name in names]
    rows_lib.check_conditioning(pairs, pairings, model, options, smoothness)
    rows_lib.warn_of_validation_scans(pairs, model, stacklevel=3)
    rows: list[table_lib.EvalRecord] = []
    placement = preparation.placement_of(model, options)
    for pair, called in zip(pairs, names, strict=True):
        for row in _rows_of(
            pair, called, method_runs, options, placement, labels, landmarks_frame
        ):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(pairs) * len(method_runs), row)
        if keep is not None:
            keep(table_lib.Result(_in_order(rows, method_runs)))
    return table_lib.Result(_in_order(rows, method_runs))


def _rows_of(
    pair: PairSpec,
    name: str,
    method_runs: Sequence[_MethodRun],
    options: options_lib.Options,
    placement: network_grid.ResamplingRule,
    labels: Sequence[int] | None,
    frame: Frame,
) -> Iterator[table_lib.EvalRecord]:
    """Yields a pair's rows; one without numbers, and a warning, where a way fails."""
    written = next((w for w in reversed(method_runs) if w.compiles), None)
    try:
        scans = _read(pair, name, options, frame)
    except UserError as error:
        warnings.warn(f"pair {name} is left out: {error}", stacklevel=3)
        yield from (
            table_lib.EvalRecord(method_run.name, pair.table, name)
            for method_run in method_runs
        )
        return
    present = _labels_of(scans, labels)
    measured = placement.measured(
        placement.reoriented(scans.fixed).grid, options.grid_shape
    )
    for method_run in method_runs:
        try:
            found, seconds = method_run.find(scans)
            row = _measure(scans, found, method_run.name, present, measured)
            if method_run is written:
                _write_outputs(scans, found, options)
            yield dataclasses.replace(row, seconds=seconds, first=method_run.compiles)
        except UserError as error:
            warnings.warn(
                f"pair {name}: {method_run.name} failed: {error}", stacklevel=3
            )
            yield table_lib.EvalRecord(method_run.name, pair.table, name)


def _in_order(
    rows: Sequence[table_lib.EvalRecord], method_runs: Sequence[_MethodRun]
) -> tuple[table_lib.EvalRecord, ...]:
    """Orders rows by method and gives the rows of a task the same labels.

    A row is a method's first if it is the first that did not fail.
    """
    known: dict[str, set[int]] = {}
    for row in rows:
        known.setdefault(row.task, set()).update(row.dice)

    def filled(
        row: table_lib.EvalRecord, scores: Mapping[int, float]
    ) -> dict[int, float]:
        return {n: scores.get(n, math.nan) for n in sorted(known[row.task])}

    compiled: set[str] = set()
    ordered: dict[str, list[table_lib.EvalRecord]] = {
        method_run.name: [] for method_run in method_runs
    }
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


def _method_runs(
    model: Any,
    options: options_lib.Options,
    with_optimisation,
    name,
    others,
    smoothness: Sequence[float],
    sam: TrainedSam | None,
) -> list[_MethodRun]:
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
    method_runs = _starts(model, options, start)
    method_runs += [
        _MethodRun(other, _timed(method)) for other, method in others.items()
    ]
    if model is not None:
        called = name or pathlib.PurePath(model.name).name
        single = dataclasses.replace(
            options,
            io_iterations=None,
            io_target="network",
            intensity_conservation_loss=False,
        )
        requested = {
            weight_name(called, weight): dataclasses.replace(single, smoothness=weight)
            for weight in smoothness
        } or {called: single}
        method_runs += [
            _MethodRun(row, _registered(model, each, sam, start), compiles=True)
            for row, each in requested.items()
        ]
        if with_optimisation and not displacement:
            optimised = _registered(model, options, sam, start)
            method_runs.append(_MethodRun(f"{called} + IO", optimised, compiles=True))
    refined = model is None and with_optimisation and options.io_target != "network"
    if refined or (displacement and (model is None or with_optimisation)):
        alone = dataclasses.replace(
            options, task="auto", pairing=None, smoothness=None, level_iterations=None
        )
        found = _registered(None, alone, sam, start)
        method_runs.append(_MethodRun(options.io_target, found, compiles=True))
    if (with_optimisation or displacement) and options.io_iterations is None:
        raise UserError(
            "instance optimisation needs a number of steps; pass --io-iterations"
        )
    _check_unlike([method_run.name for method_run in method_runs])
    return method_runs


def _starts(
    model: Any, options: options_lib.Options, start: "_Start | None"
) -> list[_MethodRun]:
    """Returns the rows before any registration."""
    placement = preparation.placement_of(model, options)

    def resized(scans):
        return _resized(scans, options, placement), math.nan

    method_runs = [
        _MethodRun(table_lib.INITIAL, lambda scans: (Transform(()), math.nan)),
        _MethodRun(table_lib.RESIZED, resized),
    ]
    if start is not None:

        def prealigned(scans):
            found, seconds = start(scans)
            return found.in_world, seconds

        name = f"pre-aligned, {options.prealign}"
        method_runs.append(_MethodRun(name, prealigned, compiles=True))
    return method_runs


def _check_unlike(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows would be called {name}; pass another name")


def weight_name(model: str, weight: float) -> str:
    """Returns what a model that is asked for a smoothness is called in the tables."""
    return f"{model}, smoothness {weight:g}"


_Start = Callable[[_Scans], tuple[select.Prealignment, float]]


def _prealigned(
    model: Any, options: options_lib.Options, sam: TrainedSam | None
) -> _Start:
    """Returns what finds a pair's pre-alignment, once for all its rows."""

    @functools.lru_cache(maxsize=1)
    def find(scans: _Scans) -> tuple[select.Prealignment, float]:
        start = time.perf_counter()
        found = pair_lib.prealigned(
            scans.moving,
            scans.fixed,
            model,
            rows_lib.options_of(scans.spec, options, model),
            regions=scans.regions,
            sam=sam,
        )
        return found, time.perf_counter() - start

    return find


def _resized(
    scans: _Scans, options: options_lib.Options, placement: network_grid.ResamplingRule
) -> Transform:
    """The identity of both unit cubes: what a network that does nothing answers."""
    moving, fixed, _ = preparation.reoriented(
        scans.moving, scans.fixed, options_lib.Regions(), placement, options
    )
    grids = (placement.grid(v.grid, options.grid_shape) for v in (fixed, moving))
    return transform_lib.in_world(Transform(()), *grids)


def _timed(method: Method):
    def find(scans: _Scans) -> tuple[Transform, float]:
        start = time.perf_counter()
        found = method(scans.moving, scans.fixed)
        return found, time.perf_counter() - start

    return find


def _registered(
    model: Any,
    options: options_lib.Options,
    sam: TrainedSam | None,
    start: _Start | None,
):
    def find(scans: _Scans) -> tuple[Transform, float]:
        begin, seconds = (None, 0.0) if start is None else start(scans)
        found = pair_lib.register(
            scans.moving,
            scans.fixed,
            model,
            rows_lib.options_of(scans.spec, options, model),
            regions=scans.regions,
            sam=sam,
            start=begin,
        )
        for phase in ("preprocess", "prealign", "register"):
            seconds += found.seconds.get(phase, 0.0)
        return found.transform, seconds

    return find


def _check_pairs(
    pairs: Sequence[PairSpec],
    names: Sequence[str],
    options: options_lib.Options,
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
    rows_lib.warn_of_idle_masks(pairs, options, stacklevel=4)
    if any(p.inverse_out for p in pairs):
        warnings.warn(
            "the column inverse_out has no effect here; jaxreg register --pairs writes "
            "inverse transforms",
            stacklevel=3,
        )


def _check_pair(pair: PairSpec, options: options_lib.Options, frame, grids, outputs):
    options_lib.check_options(rows_lib.options_of(pair, options))
    given = {name: None for name in vars(options_lib.Regions())}
    if rows_lib.uses_masks(options):
        given |= {"fixed_mask": pair.fixed_mask, "moving_mask": pair.moving_mask}
    options_lib.check_regions(options, given)
    for side in ("fixed", "moving"):
        rows_lib.check_grids(pair, side, grids)
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


def _landmarks(pair: PairSpec, frame: Frame, fixed: Grid, moving: Grid):
    """Returns the landmarks of both scans, P 3, RAS+ mm, or None."""
    if pair.fixed_landmarks is None and pair.moving_landmarks is None:
        return None
    if pair.fixed_landmarks is None or pair.moving_landmarks is None:
        raise UserError("it has one file of landmarks; give both or neither")
    table = tables.read(pair.fixed_landmarks, "landmarks")
    here = tables.points_mm(table, frame, fixed)
    there = read_landmarks(pair.moving_landmarks, frame=frame, grid=moving)
    if len(here) != len(there):
        raise UserError(
            f"{pair.fixed_landmarks} has {len(here)} landmarks, "
            f"{pair.moving_landmarks} {len(there)}; give the same points in one order"
        )
    outside = tables.outside(
        table, frame, lambda points: tables.count_outside(points, fixed), grid=fixed,
        points=str(pair.fixed_landmarks), scan=f"the scan {pair.fixed}",
        option="--landmarks-frame",
    )  # fmt: skip
    if outside is not None:
        raise UserError(outside)
    return here, there


def _read(
    pair: PairSpec, name: str, options: options_lib.Options, frame: Frame
) -> _Scans:
    def read(path: pathlib.Path | None, kind: volumes.Kind) -> Volume | None:
        return None if path is None else volumes.read_volume(path, kind=kind)

    fixed = volumes.read_volume(pair.fixed)
    moving = volumes.read_volume(pair.moving)
    masked = rows_lib.uses_masks(options)
    fixed_labels = read(pair.fixed_label, "labels")
    moving_labels = read(pair.moving_label, "labels")
    return _Scans(
        spec=pair,
        name=name,
        fixed=fixed,
        moving=moving,
        regions=options_lib.Regions(
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
    scans: _Scans,
    found: Transform,
    method: str,
    labels: tuple[int, ...],
    measured: Grid,
) -> table_lib.EvalRecord:
    dice, hd95 = {}, {}
    if scans.labels is not None:
        fixed, moving = scans.labels
        grid = scans.fixed.grid
        warped = warping.warp_volume(moving, found, grid, order=0, fill=0.0)
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
    folding_percent, sdlogj = metrics.regularity(found, measured)
    return table_lib.EvalRecord(
        method=method,
        task=scans.spec.table,
        pair=scans.name,
        dice=dice,
        hd95_mm=hd95,
        tre_mm=tre,
        folding_percent=folding_percent,
        sdlogj=sdlogj,
    )


def _write_outputs(
    scans: _Scans, found: Transform, options: options_lib.Options
) -> None:
    pair = scans.spec
    if pair.transform_out is not None:
        transforms.write_transform(pair.transform_out, found, scans.fixed.grid)
        found = transforms.as_written(pair.transform_out, found)
    if pair.warped_out is not None:
        stored = volumes.read_volume(pair.moving, kind="stored")
        modality = rows_lib.options_of(pair, options).moving_modality
        fill = modality_lib.background_of(modality, stored)
        warped = warping.warp_volume(stored, found, scans.fixed.grid, fill=fill)
        volumes.write_volume(pair.warped_out, warped)


# --- the command line's verb ---------------------------------------------------------


def evaluate_files(
    pairs: Sequence[PairSpec],
    model: zoo.LoadedModel | None,
    options: options_lib.Options,
    *,
    out: files.PathLike,
    label_names: Mapping[str, Mapping[int, str]] | None = None,
    **settings: Any,
) -> table_lib.Result:
    """Evaluates, writes the rows as CSV and the tables as Markdown beside it.

    Both are written anew after every pair, so that an interrupt loses one at most.

    Args:
      pairs: see `evaluate`.
      model: see `evaluate`.
      options: see `evaluate`.
      out: the CSV file; the Markdown gets its name with .md.
      label_names: see `table.markdown`.
      **settings: keyword arguments of `evaluate`, all but `keep`.

    Returns:
      The rows.

    Raises:
      UserError: see `evaluate`; or a file cannot be written, which is said first.
    """
    out = files.check_writable(out, "--out", suffixes=(".csv",))
    tables = files.check_writable(out.with_suffix(".md"), "--out")

    def keep(result: table_lib.Result) -> None:
        table_lib.write_csv(out, result)
        with files.atomic_path(tables) as unfinished:
            text = table_lib.markdown(result, label_names=label_names)
            unfinished.write_text(text, encoding="utf-8")

    return evaluate(pairs, model, options, keep=keep, **settings)
