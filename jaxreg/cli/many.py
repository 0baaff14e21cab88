"""The verb ``jaxreg register --pairs``; see `registration.many`."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from jaxreg.cli.options import load_sam, option
from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.registration.many import Outcome, Rows
    from jaxreg.registration.options import Options
    from jaxreg.weights.zoo import LoadedModel

_LIST = "Many pairs"
Pairs = Annotated[
    pathlib.Path | None,
    option(
        "--pairs",
        "CSV or JSON of pairs in place of --fixed and --moving: columns fixed, moving, "
        "and transform_out, warped_out, inverse_out for the results; also "
        "fixed_modality, fixed_mask, fixed_label, the same of moving, task, region, "
        "pairing.",
        _LIST,
    ),
]
OutDir = Annotated[
    pathlib.Path | None,
    option(
        "--out-dir",
        "Folder for what the list does not name: MOVING_to_FIXED_transform.h5 and "
        "MOVING_to_FIXED_warped.nii.gz; made if absent.",
        _LIST,
    ),
]
Summary = Annotated[
    pathlib.Path | None,
    option(
        "--summary",
        "Similarity, folding and seconds of each pair, and what failed: .csv.",
        _LIST,
    ),
]
SkipExisting = Annotated[
    bool,
    option("--skip-existing", "Pass over pairs whose results all exist.", _LIST),
]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options of a list; see their help."""

    pairs: pathlib.Path | None
    out_dir: pathlib.Path | None
    summary: pathlib.Path | None
    skip_existing: bool


def check_one_or_many(
    asked: Asked, one: Mapping[str, Any], needed: Mapping[str, Any]
) -> None:
    """Checks that the options are those of one pair, or those of a list.

    Args:
      asked: the options of a list.
      one: options of one pair alone, by name.
      needed: options that one pair needs, by name.

    Raises:
      UserError: an option belongs to the other way, or is missing.
    """
    if asked.pairs is not None:
        given = [name for name, value in one.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]} is for one pair, and --pairs {asked.pairs} lists many; "
                "give it as a column of the list or leave one of them out"
            )
        return
    for name, value in (
        ("--out-dir", asked.out_dir),
        ("--summary", asked.summary),
        ("--skip-existing", asked.skip_existing or None),
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
    asked: Asked,
    options: "Options",
    weights: str | pathlib.Path | None,
    *,
    modalities: Mapping[str, Any],
    fill: float | None,
    sam_weights: pathlib.Path | None,
    fetch: Callable[[Any], "LoadedModel"],
    show: Callable[[int, int, int], None],
) -> None:
    """Registers a list, once the options have been checked.

    Args:
      asked: the options of a list.
      options: of all pairs.
      weights: what to load; None for no network.
      modalities: fixed_modality and moving_modality, None where they were not given.
      fill: value beyond the moving scans.
      sam_weights: of --sam-weights.
      fetch: loads weights.
      show: told after each pair (pairs done, pairs in all, pairs that failed).

    Raises:
      UserError: something is wrong, or pairs failed.
    """
    from jaxreg.data import pair_list
    from jaxreg.io import files
    from jaxreg.registration import many
    from jaxreg.registration import rows as rows_lib

    assert asked.pairs is not None  # the caller's promise
    rows: Rows = pair_list.read_rows(asked.pairs)
    _check_modalities(rows, modalities)
    if asked.out_dir is not None:
        rows = many.with_outputs(rows, asked.out_dir)
    others = {"--pairs": asked.pairs}
    if asked.summary is not None:
        files.check_writable(asked.summary, "--summary", suffixes=(".csv",))
        others["--summary"] = asked.summary
    many.check_outputs(rows, others=others, made=asked.out_dir)
    there = many.finished(rows) if asked.skip_existing else {}
    waiting = {row: pair for row, pair in rows.items() if row not in there}
    many.check_inputs(waiting, options)
    sam, model = None, None
    if waiting:
        sam = load_sam(options.prealign, sam_weights, weights)
        model = None if weights is None else fetch(weights)
        rows_lib.check_conditioning(
            list(waiting.values()), list(waiting), model, options
        )
        if asked.out_dir is not None:
            files.make_folder(asked.out_dir, "--out-dir")
    if asked.skip_existing:
        print(f"passed over {len(there)} of {len(rows)} pairs, whose results exist")
    start, outcomes = time.perf_counter(), many.skipped(there, asked.summary)
    try:
        for outcome in many.register_all(waiting, model, options, sam=sam, fill=fill):
            outcomes.append(outcome)
            _tell(outcome)
            failed = many.by_status(outcomes)["failed"]
            show(len(outcomes) - len(there), len(waiting), failed)
    finally:  # an interrupt leaves a summary of what is done
        if asked.summary is not None:
            place = {row: number for number, row in enumerate(rows)}
            outcomes.sort(key=lambda outcome: place[outcome.row])
            many.write_summary(asked.summary, outcomes)
    _conclude(outcomes, time.perf_counter() - start, asked.summary)


def _check_modalities(rows: "Rows", given: Mapping[str, Any]) -> None:
    for row, pair in rows.items():
        for name, value in given.items():
            if value is None and getattr(pair, name) is None:
                raise UserError(
                    f"{row} names no {name}; add the column, or give "
                    f"--{name.replace('_', '-')} for all"
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
