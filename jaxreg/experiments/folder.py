"""The folder of a run: its settings, and what it was started with."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxreg.data.manifest.records import Record
from jaxreg.errors import UserError
from jaxreg.experiments import files as files_lib
from jaxreg.io import files
from jaxreg.training import parallel

SETTINGS = "experiment.json"
SCANS = "scans.txt"
START_TASKS = "start_tasks.txt"
VALIDATION_SCANS = "validation_scans.txt"
SAM = "sam"
ORIENTATION = "orientation.txt"


def read_lines(path: pathlib.Path) -> list[str]:
    """Returns a text file's lines; none if there is no such file."""
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def holds_run(out: pathlib.Path) -> bool:
    """Whether a run was started in the folder."""
    return (out / SETTINGS).is_file()


def begun_everywhere(out: pathlib.Path) -> bool:
    """Returns what the first process finds by `holds_run`; every process calls it.

    A process that looked itself might find what the first has just begun.
    """
    return bool(parallel.from_first_process("a run" if holds_run(out) else ""))


def line_of(stage: str, record: Record) -> str:
    """Returns the line of a scan, by which a resumed run is compared with its start."""
    values = dataclasses.asdict(record)
    for name, value in values.items():
        # The same scans may lie elsewhere when a run is resumed.
        if isinstance(value, pathlib.Path):
            values[name] = files.scan_name(value)
    text = ", ".join(f"{name} {value}" for name, value in values.items() if value)
    return f"{stage}: {text}"


def _check_scans(path: pathlib.Path, scans: Sequence[str]) -> None:
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else scans
    for was, now in itertools.zip_longest(before, scans, fillvalue="nothing"):
        if was != now:
            raise UserError(
                f"the run in {path.parent} was started with other scans, the first "
                f"difference is {was} -> {now}; put the manifest back as it was, or "
                "give another `out`"
            )


def open_folder(
    experiment: Any,
    out: pathlib.Path,
    records: Mapping[str, Sequence[str]],
    *,
    resume: bool,
) -> None:
    """Writes settings and lists of a new run, or compares them with an old one's.

    Args:
      experiment: any tree of settings.
      out: folder of the run.
      records: lines of text by name of file.
      resume: whether an old run is resumed.

    Raises:
      UserError: the folder does not fit, or cannot be written.
    """
    problem = None
    if jax.process_index() == 0:
        problem = _folder_problem(experiment, out, records, resume=resume)
    problems = parallel.from_first_process(problem or "")
    if problems:
        raise UserError(problems)


def _folder_problem(
    experiment: Any,
    out: pathlib.Path,
    records: Mapping[str, Sequence[str]],
    *,
    resume: bool,
) -> str | None:
    settings = out / SETTINGS
    try:
        if holds_run(out):
            if not resume:
                return (
                    f"`out` {out} holds a run already; pass `resume` to go on with it, "
                    "or give another folder"
                )
            files_lib.check_same(settings, experiment)
            _check_scans(out / SCANS, records[SCANS])
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return f"`out` {out} exists and holds no run; give another folder"
        out.mkdir(parents=True, exist_ok=True)
        files_lib.write(settings, experiment)
        for name, lines in records.items():
            if lines:
                with files.atomic_path(out / name) as temporary:
                    text = "\n".join(lines) + "\n"
                    pathlib.Path(temporary).write_text(text, encoding="utf-8")
    except OSError as error:
        return f"`out` {out} cannot be written ({error.strerror}); give another folder"
    except UserError as error:
        return str(error)
    return None
