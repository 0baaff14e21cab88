"""The verb ``jaxreg register --pairs``; see `registration.many`."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jaxreg.cli.options import (
    Division,
    fetch,
    load_sam,
    print_merging,
    print_part,
    print_written,
)
from jaxreg.cli.parser import option_name, spelled
from jaxreg.errors import UserError
from jaxreg.registration.options import AUTO

if TYPE_CHECKING:
    from jaxreg.registration.list_reports import Pages
    from jaxreg.registration.many import Outcome, Rows
    from jaxreg.registration.options import Options
    from jaxreg.registration.parts import Part

_SUMMARY_S = 30.0
"""How much work a kill takes from the summary."""


@dataclasses.dataclass(frozen=True)
class PairList:
    """Many pairs in place of one.

    Attributes:
      pairs: CSV or JSON of pairs in place of --fixed and --moving: columns fixed,
        moving, and transform_out, warped_out, inverse_out for the results; also
        fixed_modality, fixed_mask, fixed_label, the same of moving, task, region,
        pairing.
      out_dir: Folder for what the list does not name: MOVING_to_FIXED_transform.h5 and
        MOVING_to_FIXED_warped.nii.gz; made if absent.
      report_dir: Folder for a page of each pair, MOVING_to_FIXED.html, and index.html,
        which lists them with thumbnails, to be sorted; made if absent.
      summary: Similarity, folding and seconds of each pair, and what failed: .csv.
      skip_existing: Pass over pairs whose results all exist.
    """

    PANEL: ClassVar = "Many pairs"

    pairs: pathlib.Path | None = None
    out_dir: pathlib.Path | None = None
    report_dir: pathlib.Path | None = None
    summary: pathlib.Path | None = None
    skip_existing: bool = False


def check_one_or_many(
    listed: PairList,
    divided: Division,
    one: Mapping[str, Any],
    needed: Mapping[str, Any],
) -> None:
    """Checks that the options are those of one pair, or those of a list.

    Args:
      listed: the options of a list.
      divided: those of its parts.
      one: options of one pair alone, by name.
      needed: options that one pair needs, by name.

    Raises:
      UserError: an option belongs to the other way, or is missing.
    """
    if listed.pairs is not None:
        given = [name for name, value in one.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]} is for one pair, and --pairs {listed.pairs} lists many; "
                "give it as a column of the list or leave one of them out"
            )
        return
    for name, value in (
        ("--out-dir", listed.out_dir),
        ("--report-dir", listed.report_dir),
        ("--summary", listed.summary),
        ("--skip-existing", listed.skip_existing or None),
        ("--part", divided.part),
        ("--merge-parts", divided.merge_parts),
    ):
        if value is not None:
            raise UserError(f"{name} is for a list of pairs; give --pairs as well")
    for name, value in needed.items():
        if value is None:
            raise UserError(
                f"{name} is missing; give --fixed and --moving, or a list by --pairs"
            )


def merge(listed: PairList, count: int) -> None:
    """Puts the summaries of a list's parts together.

    Args:
      listed: the options of a list.
      count: of its parts.

    Raises:
      UserError: see `many.merge_summaries`; or pairs failed.
    """
    from jaxreg.data import pair_list
    from jaxreg.io import files
    from jaxreg.registration import many

    assert listed.pairs is not None  # the caller's promise
    if listed.summary is None:
        raise UserError(
            "--merge-parts puts summaries together; give --summary, as to the parts"
        )
    files.check_writable(listed.summary, "--summary", suffixes=(".csv",))
    rows: Rows = pair_list.read_rows(listed.pairs)
    found = many.merge_summaries(listed.summary, rows, count)
    print(f"wrote {listed.summary}")
    pages = _pages(rows, listed)
    _make_folders(listed)
    many.write_overview(pages, many.skipped(rows, listed.summary))
    print_written([pages.index])
    _check_none_failed(found["failed"], len(rows), "as their parts said")


def register_list(
    listed: PairList,
    divided: Division,
    options: "Options",
    weights: str | pathlib.Path | None,
    *,
    fill: float | None,
    sam_weights: pathlib.Path | None,
    command: str,
    show: Callable[[int, int, int], None],
) -> None:
    """Registers a list, once the options have been checked.

    Args:
      listed: the options of a list.
      divided: those of its parts.
      options: of all pairs.
      weights: what to load; None for no network.
      fill: value beyond the moving scans.
      sam_weights: of --sam-weights.
      command: the command line, to be shown in reports.
      show: told after each pair (pairs done, pairs in all, pairs that failed).

    Raises:
      UserError: something is wrong, or pairs failed.
    """
    from jaxreg.registration import many, together
    from jaxreg.registration import rows as rows_lib

    part = divided.own_part()
    summary = listed.summary
    if part is not None and summary is not None:
        summary = part.file(summary)
    rows = _read(dataclasses.replace(listed, summary=summary), options)
    pages = _pages(rows, listed, part, command)
    if part is not None:
        own = part.of(list(rows))
        print_part(part, len(own), len(rows))
        rows = {row: rows[row] for row in own}
    there = many.finished(rows, pages) if listed.skip_existing else {}
    waiting = {row: pair for row, pair in rows.items() if row not in there}
    many.check_inputs(waiting, options)
    sam, model = None, None
    if waiting:
        sam = load_sam(options.prealign, sam_weights, weights)
        model = None if weights is None else fetch(weights)
        rows_lib.check_conditioning(
            list(waiting.values()), list(waiting), model, options
        )
    _make_folders(listed)
    if listed.skip_existing:
        print(f"passed over {len(there)} of {len(rows)} pairs, whose results exist")
    start, outcomes = time.perf_counter(), many.skipped(there, summary)
    keep = _Summary(summary, list(rows), pages)
    devices = together.devices_for(len(waiting))
    if len(devices) > 1:
        print(together.described(devices))
    try:
        for outcome in many.register_all(
            waiting, model, options,
            sam=sam, fill=fill, devices=devices, pages=pages,
        ):  # fmt: skip
            outcome = dataclasses.replace(outcome, reason=spelled(outcome.reason))
            outcomes.append(outcome)
            _tell(outcome)
            failed = many.by_status(outcomes)["failed"]
            show(len(outcomes) - len(there), len(waiting), failed)
            keep.now_and_then(outcomes)
    finally:  # an interrupt leaves a summary of what is done
        keep.write(outcomes)
    _conclude(outcomes, time.perf_counter() - start, [summary, pages.index])
    print_merging(part, listed.summary)
    _check_none_failed(many.by_status(outcomes)["failed"], len(outcomes))


def _make_folders(listed: PairList) -> None:
    from jaxreg.io import files

    for option, folder in (
        ("--out-dir", listed.out_dir),
        ("--report-dir", listed.report_dir),
    ):
        if folder is not None:
            files.make_folder(folder, option)


class _Summary:
    """Summary and overview of a list, written anew now and then.

    A kill loses little of them.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        rows: Sequence[str],
        pages: "Pages",
    ):
        self._path, self._pages = path, pages
        self._place = {row: number for number, row in enumerate(rows)}
        self._written = time.monotonic()

    def now_and_then(self, outcomes: "Sequence[Outcome]") -> None:
        if time.monotonic() - self._written > _SUMMARY_S:
            self.write(outcomes)

    def write(self, outcomes: "Sequence[Outcome]") -> None:
        from jaxreg.registration import many

        place = self._place
        ordered = sorted(outcomes, key=lambda o: place[o.row])
        if self._path is not None:
            many.write_summary(self._path, ordered)
        many.write_overview(self._pages, ordered)
        self._written = time.monotonic()


def _pages(
    rows: "Rows",
    listed: PairList,
    part: "Part | None" = None,
    command: str | None = None,
) -> "Pages":
    """Returns the pages that are wanted; a part of a list has an index of its own."""
    from jaxreg.registration import many
    from jaxreg.registration.list_reports import NO_PAGES, Pages

    folder = listed.report_dir
    if folder is None:
        return NO_PAGES
    from jaxreg.registration import report

    index = folder / report.INDEX
    paths = {row: folder / f"{stem}.html" for row, stem in many.stems(rows).items()}
    return Pages(paths, index if part is None else part.file(index), command)


def _read(listed: PairList, options: "Options") -> "Rows":
    """Returns the rows of a list with their outputs, checked."""
    from jaxreg.data import pair_list
    from jaxreg.io import files
    from jaxreg.registration import many

    assert listed.pairs is not None  # the caller's promise
    rows: Rows = pair_list.read_rows(listed.pairs)
    _check_modalities(rows, options)
    if listed.out_dir is not None:
        rows = many.with_outputs(rows, listed.out_dir)
    others = {"--pairs": listed.pairs}
    if listed.summary is not None:
        files.check_writable(listed.summary, "--summary", suffixes=(".csv",))
        others["--summary"] = listed.summary
    many.check_outputs(
        rows, others=others, made=listed.out_dir, pages=_pages(rows, listed)
    )
    return rows


def across(pairs: pathlib.Path, options: "Options") -> bool:
    """Whether contrasts differ in any pair of a list."""
    from jaxreg.data import modality, pair_list
    from jaxreg.registration import rows as rows_lib

    every = pair_list.read_rows(pairs).values()
    with_own = (rows_lib.options_of(pair, options) for pair in every)
    return not all(
        modality.same_contrast(one.fixed_modality, one.moving_modality)
        for one in with_own
    )


def _check_modalities(rows: "Rows", options: "Options") -> None:
    """Checks that each scan's modality is named: nobody looks at so many by eye."""
    for row, pair in rows.items():
        for name in ("fixed_modality", "moving_modality"):
            if getattr(options, name) == AUTO and getattr(pair, name) is None:
                raise UserError(
                    f"{row} names no {name}; add the column, or give "
                    f"{option_name(name)} for all"
                )


def _tell(outcome: "Outcome") -> None:
    if outcome.status == "failed":
        text = " ".join(outcome.reason.split())
        print(f"jaxreg: {outcome.row} failed: {text}", file=sys.stderr)


def _conclude(outcomes, seconds: float, written: Sequence[pathlib.Path | None]) -> None:
    from jaxreg.registration import many

    print(f"registered {many.by_status(outcomes)['done']} pairs in {seconds:.1f} s")
    print_written(written)


def _check_none_failed(failed: int, count: int, whence: str = "above") -> None:
    if failed:
        raise UserError(
            f"{failed} of {count} pairs failed for the reasons {whence}; mend them, "
            "and pass --skip-existing to register these alone"
        )
