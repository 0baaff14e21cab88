"""The verb ``jaxreg register --pairs``; see `registration.many`."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jaxreg.cli.options import fetch, load_sam
from jaxreg.cli.parser import option_name, spelled
from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.registration.many import Outcome, Rows
    from jaxreg.registration.options import Options


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
      summary: Similarity, folding and seconds of each pair, and what failed: .csv.
      skip_existing: Pass over pairs whose results all exist.
    """

    PANEL: ClassVar = "Many pairs"

    pairs: pathlib.Path | None = None
    out_dir: pathlib.Path | None = None
    summary: pathlib.Path | None = None
    skip_existing: bool = False


def check_one_or_many(
    listed: PairList, one: Mapping[str, Any], needed: Mapping[str, Any]
) -> None:
    """Checks that the options are those of one pair, or those of a list.

    Args:
      listed: the options of a list.
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
        ("--summary", listed.summary),
        ("--skip-existing", listed.skip_existing or None),
    ):
        if value is not None:
            raise UserError(f"{name} is for a list of pairs; give --pairs as well")
    for name, value in needed.items():
        if value is None:
            raise UserError(
                f"{name} is missing; give --fixed, --moving and their modalities, or a "
                "list by --pairs"
            )


def register_list(
    listed: PairList,
    options: "Options",
    weights: str | pathlib.Path | None,
    *,
    modalities: Mapping[str, Any],
    fill: float | None,
    sam_weights: pathlib.Path | None,
    show: Callable[[int, int, int], None],
) -> None:
    """Registers a list, once the options have been checked.

    Args:
      listed: the options of a list.
      options: of all pairs.
      weights: what to load; None for no network.
      modalities: fixed_modality and moving_modality, None where they were not given.
      fill: value beyond the moving scans.
      sam_weights: of --sam-weights.
      show: told after each pair (pairs done, pairs in all, pairs that failed).

    Raises:
      UserError: something is wrong, or pairs failed.
    """
    from jaxreg.io import files
    from jaxreg.registration import many
    from jaxreg.registration import rows as rows_lib

    rows = _read(listed, modalities)
    there = many.finished(rows) if listed.skip_existing else {}
    waiting = {row: pair for row, pair in rows.items() if row not in there}
    many.check_inputs(waiting, options)
    sam, model = None, None
    if waiting:
        sam = load_sam(options.prealign, sam_weights, weights)
        model = None if weights is None else fetch(weights)
        rows_lib.check_conditioning(
            list(waiting.values()), list(waiting), model, options
        )
        if listed.out_dir is not None:
            files.make_folder(listed.out_dir, "--out-dir")
    if listed.skip_existing:
        print(f"passed over {len(there)} of {len(rows)} pairs, whose results exist")
    start, outcomes = time.perf_counter(), many.skipped(there, listed.summary)
    try:
        for outcome in many.register_all(waiting, model, options, sam=sam, fill=fill):
            outcome = dataclasses.replace(outcome, reason=spelled(outcome.reason))
            outcomes.append(outcome)
            _tell(outcome)
            failed = many.by_status(outcomes)["failed"]
            show(len(outcomes) - len(there), len(waiting), failed)
    finally:  # an interrupt leaves a summary of what is done
        if listed.summary is not None:
            place = {row: number for number, row in enumerate(rows)}
            outcomes.sort(key=lambda outcome: place[outcome.row])
            many.write_summary(listed.summary, outcomes)
    _conclude(outcomes, time.perf_counter() - start, listed.summary)


def _read(listed: PairList, modalities: Mapping[str, Any]) -> "Rows":
    """Returns the rows of a list with their outputs, checked."""
    from jaxreg.data import pair_list
    from jaxreg.io import files
    from jaxreg.registration import many

    assert listed.pairs is not None  # the caller's promise
    rows: Rows = pair_list.read_rows(listed.pairs)
    _check_modalities(rows, modalities)
    if listed.out_dir is not None:
        rows = many.with_outputs(rows, listed.out_dir)
    others = {"--pairs": listed.pairs}
    if listed.summary is not None:
        files.check_writable(listed.summary, "--summary", suffixes=(".csv",))
        others["--summary"] = listed.summary
    many.check_outputs(rows, others=others, made=listed.out_dir)
    return rows


def _check_modalities(rows: "Rows", given: Mapping[str, Any]) -> None:
    for row, pair in rows.items():
        for name, value in given.items():
            if value is None and getattr(pair, name) is None:
                raise UserError(
                    f"{row} names no {name}; add the column, or give "
                    f"{option_name(name)} for all"
                )


def _tell(outcome: "Outcome") -> None:
    if outcome.status == "failed":
        text = " ".join(outcome.reason.split())
        print(f"jaxreg: {outcome.row} failed: {text}", file=sys.stderr)


def _conclude(outcomes, seconds: float, summary: pathlib.Path | None) -> None:
    from jaxreg.registration import many

    count = many.by_status(outcomes)
    print(f"registered {count['done']} pairs in {seconds:.1f} s")
    if summary is not None:
        print(f"wrote {summary}")
    if count["failed"]:
        raise UserError(
            f"{count['failed']} of {len(outcomes)} pairs failed for the reasons above; "
            "mend them, and pass --skip-existing to register these alone"
        )
