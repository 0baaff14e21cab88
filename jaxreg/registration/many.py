"""Registration of a list of pairs in one process.

Reading, the network and writing overlap: a thread reads the next pairs, another warps
and writes those that are done, and the main one registers, as many at a time as there
are devices. Scans of all sizes share the
compiled programs of a network grid, so that the first pair alone pays for them.
"""

import collections
import csv
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Literal

import jax

from jaxreg.data import pair_list
from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.io import files, transforms, volumes
from jaxreg.models.sam import TrainedSam
from jaxreg.registration import options as options_lib
from jaxreg.registration import parts, result, scan_pair, together
from jaxreg.registration import rows as rows_lib
from jaxreg.registration.list_reports import NO_PAGES, Pages
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space.grid import Grid
from jaxreg.weights import zoo
from jaxreg.xla import spreading

Rows = Mapping[str, PairSpec]
"""Pairs by what to call them in a message, see `pair_list.read_rows`."""
OUTPUTS = ("transform_out", "warped_out", "inverse_out")
"""Columns of the files that a row asks for."""
_FIGURES = ("before", "after", "folding_percent", "seconds")
_AHEAD = 2  # pairs that are read before their turn, and that wait; more on more devices


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a row; its fields are the columns of a summary.

    Attributes:
      row: what to call it in a message.
      fixed: the scan that stays.
      moving: the scan that was warped.
      status: "done"; "failed"; or "skipped", because its files were there.
      transform_out: what was written, None where nothing was asked for.
      warped_out: the same.
      inverse_out: the same.
      similarity: the loss that the next two are values of.
      before: with the scans where their headers place them.
      after: with the moving scan warped.
      folding_percent: see `result.RegistrationResult`.
      seconds: to register, without reading and writing.
      reason: why it failed, or what is doubtful, see `RegistrationResult.doubts`.
    """

    row: str
    fixed: pathlib.Path
    moving: pathlib.Path
    status: Literal["done", "failed", "skipped"]
    transform_out: pathlib.Path | None = None
    warped_out: pathlib.Path | None = None
    inverse_out: pathlib.Path | None = None
    similarity: str = ""
    before: float = math.nan
    after: float = math.nan
    folding_percent: float = math.nan
    seconds: float = math.nan
    reason: str = ""


def stems(rows: Rows) -> dict[str, str]:
    """Returns what the files of each row are called: MOVING_to_FIXED.

    By the names of the scans' files; by their paths below the common folder, with "-"
    for the separator, where two scans have one name.
    """
    called = pair_list.pair_names(tuple(rows.values()))
    return {
        row: re.sub(r"[/\\]", "-", name).replace(" to ", "_to_")
        for row, name in zip(rows, called, strict=True)
    }


def with_outputs(rows: Rows, folder: pathlib.Path) -> dict[str, PairSpec]:
    """Returns the rows with files in a folder where they name no output of their own.

    They are called MOVING_to_FIXED_transform.h5 and MOVING_to_FIXED_warped.nii.gz, see
    `stems`.
    """
    named = {}
    for (row, pair), stem in zip(rows.items(), stems(rows).values(), strict=True):
        named[row] = dataclasses.replace(
            pair,
            transform_out=pair.transform_out or folder / f"{stem}_transform.h5",
            warped_out=pair.warped_out or folder / f"{stem}_warped.nii.gz",
        )
    return named


def finished(rows: Rows, pages: Pages = NO_PAGES) -> dict[str, PairSpec]:
    """Returns the rows whose files and pages all exist."""
    return {
        row: pair
        for row, pair in rows.items()
        if pages.made(row) and all(p.is_file() for p in _outputs(pair).values())
    }


def _outputs(pair: PairSpec) -> dict[str, Any]:
    given = {name: getattr(pair, name) for name in OUTPUTS}
    return {name: path for name, path in given.items() if path is not None}


def check_outputs(
    rows: Rows,
    *,
    others: Mapping[str, pathlib.Path],
    made: pathlib.Path | None = None,
    pages: Pages = NO_PAGES,
) -> None:
    """Checks that all files can be written, each once and none onto an input.

    Args:
      rows: the pairs.
      others: further files that no row may write, by what to call them.
      made: a folder that may be missing, because it will be made.
      pages: that are written besides.

    Raises:
      UserError: names the row.
    """
    taken: dict[pathlib.Path, str] = {}
    for name, path in others.items():
        files.claim(path, name, taken)
    for row, pair in rows.items():
        for name, path in vars(pair).items():
            if isinstance(path, pathlib.Path) and name not in OUTPUTS:
                taken.setdefault(path.resolve(), f"an input of {row}")
    if made is not None and not made.exists():
        files.check_to_be_made(made, "`out_dir`")
    pages.claim(taken)
    for row, pair in rows.items():
        outputs = _outputs(pair)
        if not outputs and row not in pages.paths:
            raise UserError(
                f"{row} names nothing to write; add a column {', '.join(OUTPUTS[:-1])} "
                f"or {OUTPUTS[-1]}, or pass `out_dir`"
            )
        for name, path in outputs.items():
            if made is None or path.parent != made or made.exists():
                check = (
                    volumes.check_volume_path
                    if name == "warped_out"
                    else transforms.check_transform_path
                )
                check(path, f"{row}: {name}")
            files.claim(path, f"{row}: {name}", taken)


def check_inputs(rows: Rows, options: options_lib.Options) -> None:
    """Checks all rows by their headers, before the first registration.

    Raises:
      UserError: names the row.
    """
    grids: dict[pathlib.Path, Grid] = {}
    for row, pair in rows.items():
        try:
            options_lib.check_options(rows_lib.options_of(pair, options))
            options_lib.check_regions(options, _region_paths(pair, options))
            for side in ("fixed", "moving"):
                rows_lib.check_grids(pair, side, grids)
        except UserError as error:
            raise UserError(f"{row}: {error}") from error
    rows_lib.warn_of_idle_masks(rows.values(), options, stacklevel=3)


def _region_paths(pair: PairSpec, options: options_lib.Options) -> dict[str, Any]:
    """Returns the files of `options.Regions` that the options have a use for."""
    masked = rows_lib.uses_masks(options)
    overlap = options.dice_loss_weight > 0
    return {
        "fixed_mask": pair.fixed_mask if masked else None,
        "moving_mask": pair.moving_mask if masked else None,
        "fixed_segmentation": pair.fixed_label if overlap else None,
        "moving_segmentation": pair.moving_label if overlap else None,
    }


def register_all(
    rows: Rows,
    model: zoo.LoadedModel | None,
    options: options_lib.Options,
    *,
    sam: TrainedSam | None = None,
    fill: float | None = None,
    devices: Sequence[spreading.Device] | None = None,
    pages: Pages = NO_PAGES,
) -> Iterator[Outcome]:
    """Registers pairs and writes their files, in order.

    What fails on one pair is told by its outcome; the others go on. What was registered
    is written, also where the iteration ends early.

    Args:
      rows: the pairs, checked by `check_outputs` and `check_inputs`.
      model: see `pair.register`.
      options: of all pairs; a row's own columns come before them, see
        `rows.options_of`.
      sam: see `pair.register`.
      fill: value beyond the moving scans; that of `modality.background_of` if None.
      devices: on which so many pairs are registered at a time, see `together`; those of
        `together.devices_for` if None.
      pages: that are written besides.

    Yields:
      The outcome of each row, in their order.
    """
    pages = pages.naming(model)
    if model is not None:  # once, not with each pair
        on_device = jax.device_put(model.variables)
        model = dataclasses.replace(model, variables=on_device)
    devices = together.devices_for(len(rows)) if devices is None else devices
    to_read = iter(rows.items())
    reading: collections.deque[tuple[str, PairSpec, futures.Future[ScanPair]]]
    writing: collections.deque[tuple[str, PairSpec, futures.Future[Outcome]]]
    reading, writing = collections.deque(), collections.deque()
    reader = futures.ThreadPoolExecutor(1, "read")
    writer = futures.ThreadPoolExecutor(1, "write")
    ahead = max(_AHEAD, len(devices))

    def read_on(count: int) -> None:
        for row, pair in itertools.islice(to_read, count):
            row_options = _options_of_row(pair, options, model)
            future = reader.submit(_read, pair, row_options, fill)
            reading.append((row, pair, future))

    try:
        read_on(ahead)
        while reading:
            batch = [reading.popleft() for _ in devices if reading]
            read_on(len(batch))
            for row, pair, scans, found in _registered(
                batch, model, options, sam, devices
            ):
                future = _written(writer, pages, row, pair, scans, found)
                writing.append((row, pair, future))
            while len(writing) > ahead or (writing and writing[0][-1].done()):
                yield _outcome(*writing.popleft())
        while writing:
            yield _outcome(*writing.popleft())
    except KeyboardInterrupt:
        while writing:  # registered before, so that their files are written
            yield _outcome(*writing.popleft())
        raise
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown()


def _registered(
    batch: Sequence[tuple[str, PairSpec, futures.Future[ScanPair]]],
    model: zoo.LoadedModel | None,
    options: options_lib.Options,
    sam: TrainedSam | None,
    devices: Sequence[spreading.Device],
) -> list[tuple[str, PairSpec, ScanPair | None, together.Outcome]]:
    """Returns rows with their scans and what came of registering them."""
    read: list[ScanPair | UserError] = []
    for *_, future in batch:
        try:
            read.append(future.result())
        except UserError as error:
            read.append(error)
    requests = [
        together.Request(
            scans.moving,
            scans.fixed,
            model,
            _options_of_row(pair, options, model),
            scans.regions,
            sam,
        )
        for (_, pair, _), scans in zip(batch, read, strict=True)
        if isinstance(scans, ScanPair)
    ]
    found = iter(together.register_each(requests, devices))
    return [
        (row, pair, None, scans)
        if isinstance(scans, UserError)
        else (row, pair, scans, next(found))
        for (row, pair, _), scans in zip(batch, read, strict=True)
    ]


def _written(
    writer: futures.Executor,
    pages: Pages,
    row: str,
    pair: PairSpec,
    scans: ScanPair | None,
    found: together.Outcome,
) -> futures.Future[Outcome]:
    """Returns the row's outcome to be: when its files are written, or at once."""
    if scans is not None and not isinstance(found, UserError):
        return writer.submit(_write, row, pair, scans, found, pages)
    failed: futures.Future[Outcome] = futures.Future()
    assert isinstance(found, UserError)
    failed.set_exception(found)
    return failed


def _options_of_row(
    pair: PairSpec, options: options_lib.Options, model: zoo.LoadedModel | None
) -> options_lib.Options:
    row_options = rows_lib.options_of(pair, options, model)
    return dataclasses.replace(row_options, inverse=pair.inverse_out is not None)


def _read(pair: PairSpec, options: options_lib.Options, fill: float | None) -> ScanPair:
    return scan_pair.read(
        pair.moving,
        pair.fixed,
        options_lib.Regions(**_region_paths(pair, options)),
        modality=options.moving_modality,
        fill=fill,
        to_warp=pair.warped_out is not None,
    )


def _write(
    row: str,
    pair: PairSpec,
    scans: ScanPair,
    found: result.RegistrationResult,
    pages: Pages,
) -> Outcome:
    outputs = _outputs(pair)
    scan_pair.write(scans, found.transform, found.inverse, **outputs)
    pages.write(row, pair, scans, found)
    return Outcome(
        row,
        pair.fixed,
        pair.moving,
        "done",
        **outputs,
        similarity=found.similarity,
        before=found.similarity_before,
        after=found.similarity_after,
        folding_percent=found.folding_percent,
        seconds=sum(found.seconds.values()),
        reason="; ".join(found.doubts),
    )


def _outcome(row: str, pair: PairSpec, written: futures.Future[Outcome]) -> Outcome:
    try:
        return written.result()
    except UserError as error:
        return Outcome(row, pair.fixed, pair.moving, "failed", reason=str(error))


def skipped(rows: Rows, summary: pathlib.Path | None = None) -> list[Outcome]:
    """Returns the outcomes of rows that are passed over.

    Args:
      rows: of the list.
      summary: a file that `write_summary` wrote of an earlier run, if there is one:
        what it says of these pairs is kept.
    """
    known = {} if summary is None else _read_summary(summary)
    found = []
    for row, pair in rows.items():
        earlier = known.get(_scans_of(pair.fixed, pair.moving), {})
        found.append(
            Outcome(
                row,
                pair.fixed,
                pair.moving,
                "skipped",
                **_outputs(pair),
                **earlier,
            )  # fmt: skip
        )
    return found


def _scans_of(fixed: files.PathLike, moving: files.PathLike) -> tuple[str, str]:
    return os.path.abspath(fixed), os.path.abspath(moving)


def _read_summary(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns what an earlier summary measured, by its pairs' scans.

    Nothing where there is none, or a table of something else, which is replaced.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    found = {}
    for row in rows:
        try:
            figures = {name: float(row[name] or "nan") for name in _FIGURES}
            scans = _scans_of(row["fixed"], row["moving"])
            if row["similarity"]:
                words = {name: row[name] for name in ("similarity", "reason")}
                found[scans] = {**words, **figures}
        except (KeyError, TypeError, ValueError):
            continue
    return found


def write_overview(pages: Pages, outcomes: Iterable[Outcome]) -> None:
    """Writes the page that lists the pages of pairs, whole or not at all; if wanted.

    Raises:
      UserError: the file cannot be written.
    """
    if pages.index is None:
        return
    from jaxreg.registration import report

    shown = ("similarity", "before", "after", "folding_percent", "seconds")
    entries = [
        report.Entry(
            name=pages.paths[outcome.row].stem.replace("_to_", " to "),
            page=pages.paths[outcome.row],
            remark=outcome.reason,
            **{name: getattr(outcome, name) for name in shown},
        )
        for outcome in outcomes
    ]
    report.write_overview(pages.index, entries)


_COLUMNS = tuple(field.name for field in dataclasses.fields(Outcome))


def write_summary(path: files.PathLike, outcomes: Iterable[Outcome]) -> None:
    """Writes a CSV with a row for each outcome, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    _write_cells(
        path,
        ([_cell(getattr(outcome, name)) for name in _COLUMNS] for outcome in outcomes),
    )


def _write_cells(path: files.PathLike, lines: Iterable[Sequence[str]]) -> None:
    with files.atomic_path(path) as unfinished:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(lines)


def merge_summaries(
    path: files.PathLike, rows: Rows, count: int
) -> collections.Counter[str]:
    """Puts the summaries of a list's parts together, in the list's order.

    Args:
      path: of the whole list's summary; those of its parts lie beside it, see
        `parts.Part.file`.
      rows: of the whole list.
      count: of its parts.

    Returns:
      How many rows have each status.

    Raises:
      UserError: a part lacks a row, or is one of another list; or the file cannot be
        written.
    """
    cells: dict[str, list[str]] = {}
    for part in parts.every(count):
        names = part.of(list(rows))
        known = _summary_lines(part.file(path)) if names else {}
        for row in names:
            if row not in known:
                raise UserError(
                    f"{part.file(path)} lacks {row}; finish {part} first, by `part` "
                    f"{part.number}/{part.count} and `skip_existing`"
                )
            for name in ("fixed", "moving"):
                here, there = getattr(rows[row], name), known[row][name]
                if files.scan_name(here) != files.scan_name(there):
                    raise UserError(
                        f"{part.file(path)} has {there} as {name} scan of {row}, the "
                        f"list {here}; register the parts of the present list"
                    )
            cells[row] = [known[row][name] for name in _COLUMNS]
    _write_cells(path, (cells[row] for row in rows))
    status = _COLUMNS.index("status")
    return collections.Counter(line[status] for line in cells.values())


def _summary_lines(path: pathlib.Path) -> dict[str, dict[str, str]]:
    """Returns the lines of a part's summary, by their rows.

    Raises:
      UserError: it is missing or no summary.
    """
    files.check_readable(path, "summary")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV text ({error}); write it again") from error
    if tuple(reader.fieldnames or ()) != _COLUMNS or any(
        None in line or None in line.values() for line in lines
    ):
        raise UserError(
            f"{path} is no summary that register wrote, or is damaged; write it again"
        )
    return {line["row"]: line for line in lines}


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def by_status(outcomes: Iterable[Outcome]) -> collections.Counter[str]:
    """Returns how many rows have each status."""
    return collections.Counter(outcome.status for outcome in outcomes)
