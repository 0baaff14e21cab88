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

import jax
import numpy as np

from jaxreg import metrics
from jaxreg.data import network_grid
from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.evaluation import cases, sharing
from jaxreg.evaluation import table as table_lib
from jaxreg.evaluation.cases import Case
from jaxreg.io import files
from jaxreg.io.tables import Frame
from jaxreg.models.sam import TrainedSam
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import parts, preparation, scan_pair, together
from jaxreg.registration import rows as rows_lib
from jaxreg.registration.prealign import select
from jaxreg.space import transform as transform_lib
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Transform
from jaxreg.weights import zoo
from jaxreg.xla import spreading

Method = Callable[[Volume, Volume], Transform]
"""Another way to register: (moving, fixed) to fixed mm -> moving mm."""


# --- register and measure ------------------------------------------------------------

Progress = Callable[[int, int, table_lib.EvalRecord], None]
"""Called after each row with (rows done, rows in all, the row)."""
_Found = tuple[Transform, float] | UserError


@dataclasses.dataclass(frozen=True)
class _MethodRun:
    """A method.

    Attributes:
      name: in the table.
      find: (cases, devices) to each case's transform and seconds, or why there is none.
      compiles: whether it compiles programs.
    """

    name: str
    find: Callable[[Sequence[Case], Sequence[spreading.Device]], list[_Found]]
    compiles: bool = False


def _one_by_one(find: Callable[[Case], tuple[Transform, float]]):
    def each(cases: Sequence[Case], devices: Sequence[spreading.Device]):
        return [together.or_error(find, case) for case in cases]

    return each


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
    share: sharing.Share | None = None,
) -> table_lib.Result:
    """Registers every pair by every method asked for, and measures the results.

    There are always two rows for the start: "initial", where the scans' headers place
    them, and "initial, resized", where both scans' extents coincide; and one more for
    the pre-alignment, if the options ask for one. Then come the other tools, the
    model's prediction, and the result of instance optimisation.

    The grid of the fixed scan is that of all measures; where it is larger than the box
    of a network with a fixed spacing, determinants are those within the box. Labels are
    warped by nearest neighbour. A label of either scan of a pair counts; one that
    neither has is NaN and left out of the means.

    What fails on one pair is warned about and leaves a row without numbers; the others
    go on. As many pairs are registered at a time as there are devices, see `together`.

    Args:
      pairs: from `pair_list.read_pairs` or `pairs.pairs_of_manifest`.
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
      share: which of the pairs are this process', and where their rows go.

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
            f"`dice_loss_weight` is {options.dice_loss_weight:g}: the evaluation would "
            "optimise what it measures; leave it out"
        )
    options = dataclasses.replace(options, inverse=False)
    options = options_lib.settled(options, network=True)
    method_runs = _method_runs(
        model, options, with_optimisation, name, others or {}, smoothness, sam
    )
    share = share or sharing.Share()
    whole = sharing.named(pairs)
    own = share.of(whole)
    mine, names = list(own.values()), [name for _, name in own]
    cases.check_pairs(mine, names, options, landmarks_frame)
    pairings = [f"pair {name}" for name in names]
    rows_lib.check_conditioning(mine, pairings, model, options, smoothness)
    rows_lib.warn_of_validation_scans(mine, model, stacklevel=3)
    methods = [method_run.name for method_run in method_runs]
    rows = share.finished(own, methods)
    there = {(row.task, row.pair) for row in rows}
    waiting = [(p, name[1]) for name, p in own.items() if name not in there]
    if rows and share.keep is not None:
        share.keep(sharing.in_order(rows, methods, whole))
    devices = share.devices or together.devices_for(len(waiting))
    compiled: set[str] = set()
    for first in range(0, len(waiting), len(devices)):
        batch = waiting[first : first + len(devices)]
        firsts: set[str] = set()
        for row in _rows_of(
            batch, method_runs, devices, options, model, labels, landmarks_frame
        ):
            firsts |= {row.method} if row.first else set()
            first_ever = row.first and row.method not in compiled
            rows.append(dataclasses.replace(row, first=first_ever))
            if progress is not None:
                progress(len(rows), len(own) * len(method_runs), rows[-1])
        compiled |= firsts
        if share.keep is not None:
            share.keep(sharing.in_order(rows, methods, whole))
    return sharing.in_order(rows, methods, whole)


def _rows_of(
    batch: Sequence[tuple[PairSpec, str]],
    method_runs: Sequence[_MethodRun],
    devices: Sequence[spreading.Device],
    options: options_lib.Options,
    model: Any,
    labels: Sequence[int] | None,
    frame: Frame,
) -> Iterator[table_lib.EvalRecord]:
    """Yields the rows of pairs that are registered at once, method by method.

    Without numbers, and with a warning, where a method fails.
    """
    placement = preparation.placement_of(model, options)
    written = next((w for w in reversed(method_runs) if w.compiles), None)
    read = [_read(pair, name, options, frame) for pair, name in batch]
    present = [() if c is None else cases.labels_of(c, labels) for c in read]
    for method_run in method_runs:
        found = iter(method_run.find([c for c in read if c is not None], devices))
        for (pair, name), case, counted in zip(batch, read, present, strict=True):
            if case is None:
                yield table_lib.EvalRecord(method_run.name, pair.table, name)
                continue
            fixed = case.scans.fixed
            on_grid = preparation.with_grid(options, model, fixed)
            measured = placement.measured(
                placement.reoriented(fixed).grid, on_grid.grid_shape
            )
            try:
                yield _row(
                    case, next(found), method_run, counted, measured,
                    write=method_run is written,
                )  # fmt: skip
            except UserError as error:
                warnings.warn(
                    f"pair {name}: {method_run.name} failed: {error}", stacklevel=3
                )
                yield table_lib.EvalRecord(method_run.name, pair.table, name)


def _read(
    pair: PairSpec, name: str, options: options_lib.Options, frame: Frame
) -> Case | None:
    try:
        return cases.read(pair, name, options, frame)
    except UserError as error:
        warnings.warn(f"pair {name} is left out: {error}", stacklevel=4)
        return None


def _row(
    case: Case,
    found: _Found,
    method_run: _MethodRun,
    present: tuple[int, ...],
    measured: Grid,
    *,
    write: bool,
) -> table_lib.EvalRecord:
    """Returns the row of what a method found; see `measure`.

    Raises:
      UserError: it found nothing, or a file cannot be written.
    """
    if isinstance(found, UserError):
        raise found
    transform, seconds = found
    row = measure(case, transform, method_run.name, present, measured)
    if write:
        scan_pair.write(
            case.scans, transform,
            transform_out=case.spec.transform_out, warped_out=case.spec.warped_out,
        )  # fmt: skip
    return dataclasses.replace(row, seconds=seconds, first=method_run.compiles)


def _method_runs(
    model: Any,
    options: options_lib.Options,
    with_optimisation,
    name,
    others,
    smoothness: Sequence[float],
    sam: TrainedSam | None,
) -> list[_MethodRun]:
    """Returns the methods of the table, after checking what was asked for."""
    displacement = options.io_target == "displacement"
    prealigned = options.prealign != "none"
    _check_requested(model, options, with_optimisation, others)
    start = _prealigned(model, options, sam) if prealigned else None
    method_runs = _starts(model, options, start)
    method_runs += [
        _MethodRun(other, _one_by_one(_timed(method)))
        for other, method in others.items()
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
    _check_unlike([method_run.name for method_run in method_runs])
    return method_runs


def _check_requested(
    model: Any, options: options_lib.Options, with_optimisation, others
) -> None:
    displacement = options.io_target == "displacement"
    prealigned = options.prealign != "none"
    if (
        prealigned
        and model is None
        and with_optimisation
        and options.io_target == "network"
    ):
        raise UserError(
            "`io_iterations` has no network to optimise; give a `model` or another "
            "`io_target`, or leave it out"
        )
    if model is None and not displacement and not others and not prealigned:
        raise UserError(
            "there is nothing to evaluate; name a model with `model`, pass `io_target` "
            "displacement or `prealign`, or name another tool"
        )
    if (with_optimisation or displacement) and options.io_iterations is None:
        raise UserError(
            "instance optimisation needs a number of steps; pass `io_iterations`"
        )


def _starts(
    model: Any, options: options_lib.Options, start: "_Start | None"
) -> list[_MethodRun]:
    """Returns the methods that register nothing: the starts."""
    placement = preparation.placement_of(model, options)

    def resized(case):
        on_grid = preparation.with_grid(options, model, case.scans.fixed)
        return _resized(case, on_grid, placement), math.nan

    method_runs = [
        _MethodRun(
            table_lib.INITIAL, _one_by_one(lambda case: (Transform(()), math.nan))
        ),
        _MethodRun(table_lib.RESIZED, _one_by_one(resized)),
    ]
    if start is not None:

        def prealigned(case):
            found, seconds = start(case)
            return found.in_world, seconds

        name = f"pre-aligned, {options.prealign}"
        method_runs.append(_MethodRun(name, _one_by_one(prealigned), compiles=True))
    return method_runs


def _check_unlike(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows would be called {name}; pass another name")


def weight_name(model: str, weight: float) -> str:
    """Returns the name in the tables of a model conditional on a smoothness."""
    return f"{model}, smoothness {weight:g}"


_Start = Callable[[Case], tuple[select.Prealignment, float]]


def _prealigned(
    model: Any, options: options_lib.Options, sam: TrainedSam | None
) -> _Start:
    """Returns what finds a pair's pre-alignment, once for all its rows."""

    # Of the pairs that are registered at once.
    @functools.lru_cache(maxsize=len(jax.local_devices()))
    def find(case: Case) -> tuple[select.Prealignment, float]:
        start = time.perf_counter()
        found = pair_lib.prealigned(
            case.scans.moving,
            case.scans.fixed,
            model,
            rows_lib.options_of(case.spec, options, model),
            regions=case.scans.regions,
            sam=sam,
        )
        return found, time.perf_counter() - start

    return find


def _resized(
    case: Case,
    options: options_lib.Options,
    placement: network_grid.ResamplingRule,
) -> Transform:
    """The identity of both unit cubes: what a network that does nothing answers."""
    moving, fixed, _ = preparation.reoriented(
        case.scans.moving, case.scans.fixed, options_lib.Regions(), placement, options
    )
    grids = (placement.grid(v.grid, options.grid_shape) for v in (fixed, moving))
    return transform_lib.in_world(Transform(()), *grids)


def _timed(method: Method):
    def find(case: Case) -> tuple[Transform, float]:
        start = time.perf_counter()
        found = method(case.scans.moving, case.scans.fixed)
        return found, time.perf_counter() - start

    return find


def _registered(
    model: Any,
    options: options_lib.Options,
    sam: TrainedSam | None,
    start: _Start | None,
):
    def find(
        several: Sequence[Case], devices: Sequence[spreading.Device]
    ) -> list[_Found]:
        begins = [
            (None, 0.0) if start is None else together.or_error(start, case)
            for case in several
        ]
        requests = [
            together.Request(
                case.scans.moving,
                case.scans.fixed,
                model,
                rows_lib.options_of(case.spec, options, model),
                case.scans.regions,
                sam,
                begin[0],
            )
            for case, begin in zip(several, begins, strict=True)
            if not isinstance(begin, UserError)
        ]
        registered = iter(together.register_each(requests, devices))
        return [
            begin
            if isinstance(begin, UserError)
            else _timed_result(next(registered), begin[1])
            for begin in begins
        ]

    return find


def _timed_result(found: together.Outcome, seconds: float) -> _Found:
    if isinstance(found, UserError):
        return found
    for phase in ("preprocess", "prealign", "register"):
        seconds += found.seconds.get(phase, 0.0)
    return found.transform, seconds


def measure(
    case: Case,
    found: Transform,
    method: str,
    labels: tuple[int, ...],
    measured: Grid,
) -> table_lib.EvalRecord:
    """Returns what a registration is worth; see `evaluate`.

    Args:
      case: the pair.
      found: fixed mm to moving mm.
      method: how it was found.
      labels: that count, see `cases.labels_of`.
      measured: the grid whose voxels' determinants count.
    """
    dice, hd95 = {}, {}
    if case.labels is not None:
        fixed, moving = case.labels
        grid = case.scans.fixed.grid
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
    if case.landmarks is not None:
        here, there = case.landmarks
        mapped = np.asarray(found.map_points(here[None]))[0]
        tre = float(metrics.tre_mm(mapped, there).mean())
    folding_percent, sdlogj = metrics.regularity(found, measured)
    return table_lib.EvalRecord(
        method=method,
        task=case.spec.table,
        pair=case.name,
        dice=dice,
        hd95_mm=hd95,
        tre_mm=tre,
        folding_percent=folding_percent,
        sdlogj=sdlogj,
    )


# --- the command line's verb ---------------------------------------------------------


def evaluate_files(
    pairs: Sequence[PairSpec],
    model: zoo.LoadedModel | None,
    options: options_lib.Options,
    *,
    out: files.PathLike,
    label_names: Mapping[str, Mapping[int, str]] | None = None,
    part: parts.Part | None = None,
    skip_existing: bool = False,
    **settings: Any,
) -> table_lib.Result:
    """Evaluates, writes the rows as CSV and the tables as Markdown beside it.

    Both are written anew after every pair, so that an interrupt loses one at most, or
    as many as there are devices.

    Args:
      pairs: see `evaluate`.
      model: see `evaluate`.
      options: see `evaluate`.
      out: the CSV file; the Markdown gets its name with .md.
      label_names: see `table.markdown`.
      part: the pairs to evaluate, whose files have names of their own beside those, see
        `parts.Part.file`; all if None.
      skip_existing: pass over pairs whose rows are in the CSV file.
      **settings: keyword arguments of `evaluate`, all but `share`.

    Returns:
      The rows.

    Raises:
      UserError: see `evaluate`; or a file cannot be written, which is said first.
    """
    out = sharing.check_files(out if part is None else part.file(out))
    there = skip_existing and out.exists()
    share = sharing.Share(
        part,
        known=table_lib.read_csv(out).rows if there else (),
        keep=functools.partial(sharing.write_files, out, label_names=label_names),
    )
    return evaluate(pairs, model, options, share=share, **settings)
