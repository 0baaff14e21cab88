"""Real labelled sets: ours, ANTs' SyN and greedy, one command, one row a pair.

    python benchmarks/real_sets.py --data DATA --records DIR --peers-python V/bin/python
    python benchmarks/real_sets.py --data DATA --records DIR --pairs 3 --methods affine
    python benchmarks/real_sets.py --data DATA --records DIR --variant mind io_sim=mind
    python benchmarks/real_sets.py --records DIR --table

DATA holds a folder for each set (real_sets_cases.py says which). Every row, one pair by
one method, is a JSON file of DIR, and is not done again; so a stopped command goes on,
and DIR may be filled by several commands one after another. The peers need

    python -m venv V && V/bin/pip install antspyx picsl_greedy numpy nibabel

Labels are warped by nearest neighbour, and everything is measured on the fixed scan's
own grid by `evaluation.run.measure`, of the transform as each tool's file has it. A
method that fails, dies or takes longer than --limit leaves a row that says so; remove
its file to try again.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import real_sets_report
from real_sets_cases import SETS, RealSet, kind_of, pairs_of
from real_sets_methods import NAMES, Found, Method, methods_of
from real_sets_process import FailedError
from real_sets_report import Row

from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.evaluation import cases, run
from jaxreg.io import files
from jaxreg.registration.options import Options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures what is missing, prints and draws."""
    given = parser().parse_args(arguments)
    try:
        if not given.table:
            measure_all(given)
        rows = read_rows(given.records, sets_of(given.sets))
        print(real_sets_report.tables(rows))
        if given.figure is not None:
            real_sets_report.draw(rows, given.figure, against=given.against)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    known = [real_set.name for real_set in SETS]
    add("--data", type=pathlib.Path, help="folder of the sets' folders")
    add("--records", type=pathlib.Path, required=True)
    add("--sets", nargs="+", default=known, metavar="SET")
    listed = f"of {', '.join(NAMES)}; the start is always there"
    add("--methods", nargs="*", default=list(NAMES), metavar="METHOD", help=listed)
    several = "checkpoints, each alone and with optimisation after it"
    add("--weights", nargs="+", default=[], metavar="FOLDER", help=several)
    words = ("NAME", "FIELD=VALUE")
    add("--variant", nargs="+", action="append", default=[], metavar=words,
        help="ours with other options")  # fmt: skip
    add("--pairs", type=int, help="of each set; all by default")
    add("--peers-python", metavar="FILE", default=os.environ.get("JAXREG_PEERS_PYTHON"),
        help="default: the environment's JAXREG_PEERS_PYTHON")  # fmt: skip
    add("--threads", type=int, default=os.cpu_count(), help="of the peers")
    add("--limit", type=float, default=900.0, help="seconds of a row")
    add("--table", action="store_true", help="print what is there")
    add("--figure", type=pathlib.Path, help="PNG to draw")
    kinds = list(real_sets_report.AGAINST)
    add("--against", choices=kinds, default=kinds[0], help="what, in the figure")
    return made


def sets_of(names: Sequence[str]) -> list[RealSet]:
    """Returns the sets of these names.

    Raises:
      UserError: one is unknown.
    """
    known = {real_set.name: real_set for real_set in SETS}
    for name in names:
        if name not in known:
            raise UserError(
                f"set {name} is unknown, expected one of {', '.join(known)}"
            )
    return [known[name] for name in names]


def measure_all(given: argparse.Namespace) -> None:
    """Writes the rows that are missing, a set and a method at a time."""
    if given.data is None:
        raise UserError("--data is missing; name the folder that holds the sets")
    chosen = sets_of(given.sets)
    methods = methods_of(
        given.methods, weights=given.weights, variants=given.variant,
        peers_python=given.peers_python, threads=given.threads, limit_s=given.limit,
    )  # fmt: skip
    listed = {s: list(pairs_of(s, given.data).items())[: given.pairs] for s in chosen}
    todo = [
        (real_set, method, pair)
        for real_set in chosen
        for method in methods
        for pair in listed[real_set]
        if not is_there(given.records, real_set, method, pair, methods[method])
    ]
    files.make_folder(given.records, "--records")
    current: Method | None = None
    try:
        for number, (real_set, name, pair) in enumerate(todo, start=1):
            # Programs and images of one set are of no use to the next.
            if current is not None and current is not methods[name]:
                current.stop()
            current = methods[name]
            row = measure_row(real_set, name, pair, current)
            write_row(given.records, row)
            print(f"{number}/{len(todo)} {real_sets_report.line(row)}", flush=True)
    finally:
        for method in methods.values():
            method.stop()


def measure_row(
    real_set: RealSet, name: str, pair: tuple[str, PairSpec], method: Method
) -> Row:
    """Returns the row of a pair, with numbers or the reason why there are none."""
    called, spec = pair
    row = Row(
        set=real_set.name, method=name, pair=called, measure=real_set.measure,
        kind=kind_of(spec), settings=method.settings(), machine=machine(),
    )  # fmt: skip
    try:
        case = cases.read(spec, called, Options(), "lps")
        found: Found = method.find(case)
        record = run.measure(
            case,
            found.transform,
            name,
            cases.labels_of(case, real_set.labels),
            case.scans.fixed.grid,
        )
    except (FailedError, UserError) as error:
        return dataclasses.replace(row, error=" ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001  one pair must not end a night's run
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return dataclasses.replace(row, error=text[:500])
    return dataclasses.replace(
        row,
        dice=dict(record.dice),
        hd95_mm=dict(record.hd95_mm),
        tre_mm=record.tre_mm,
        folding_percent=record.folding_percent,
        sdlogj=record.sdlogj,
        seconds=found.seconds,
        compile_seconds=found.compile_seconds,
        cpu_seconds=found.cpu_seconds,
        version=found.version,
    )


def machine() -> str:
    """Returns the processor's kind, number of cores and present load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}"


# --- the records ----------------------------------------------------------------------


def path_of(
    records: pathlib.Path, real_set: str, method: str, pair: str
) -> pathlib.Path:
    """Returns the file of a row."""
    words = (re.sub(r"[^A-Za-z0-9_.+-]+", "_", word) for word in (method, pair))
    return records / real_set / f"{'--'.join(words)}.json"


def is_there(
    records: pathlib.Path,
    real_set: RealSet,
    name: str,
    pair: tuple[str, PairSpec],
    method: Method,
) -> bool:
    """Returns whether a row is done.

    Raises:
      UserError: it is, but with other settings.
    """
    path = path_of(records, real_set.name, name, pair[0])
    if not path.is_file():
        return False
    there = json.loads(path.read_text())["settings"]
    now = json.loads(json.dumps(method.settings()))
    if there != now:
        raise UserError(
            f"{path} is of the settings {there}, now they are {now}; name another "
            "folder with --records, or remove the file"
        )
    return True


def write_row(records: pathlib.Path, row: Row) -> None:
    """Writes a row, whole or not at all; NaN becomes null."""
    path = path_of(records, row.set, row.method, row.pair)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(path) as unfinished:
        text = json.dumps(_without_nan(dataclasses.asdict(row)), indent=1)
        pathlib.Path(unfinished).write_text(text + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def read_rows(records: pathlib.Path, chosen: Sequence[RealSet]) -> list[Row]:
    """Returns all rows of some sets, in the sets' order.

    Raises:
      UserError: there are none.
    """
    rows = []
    for real_set in chosen:
        for path in sorted((records / real_set.name).glob("*.json")):
            rows.append(row_of(json.loads(path.read_text())))
    if not rows:
        raise UserError(f"{records} holds no rows of these sets; run without --table")
    return rows


def row_of(stored: dict[str, Any]) -> Row:
    """Returns a row as `write_row` wrote it."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    scores = {
        name: {int(label): number(score) for label, score in stored[name].items()}
        for name in ("dice", "hd95_mm")
    }
    numbers = {name: number(stored[name]) for name in real_sets_report.NUMBERS}
    return Row(**{**stored, **scores, **numbers})


if __name__ == "__main__":
    # Scans of every kind come along; what is odd about them is no news here.
    warnings.simplefilter("ignore")
    # An end by another program ends the processes of the methods as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
