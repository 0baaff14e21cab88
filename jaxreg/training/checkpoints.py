"""Checkpoints of a training run: all that is needed to resume it to the bit.

    FOLDER/STEP/   one checkpoint, see `training.checkpoint_files`

A checkpoint appears under its step when it is complete. It is written in the background
from a copy in host memory, and read into host memory, whatever the devices were. With
several processes (`jax.distributed`) every one holds the whole state, process 0 writes,
and all read from the same disk.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxreg.errors import UserError
from jaxreg.training import checkpoint_files as files
from jaxreg.weights.bundle import this_process

_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A training state as it was saved.

    Attributes:
      step: the step that it was saved at.
      state: NumPy arrays in the structure that was asked for.
      record: what was stored with it; tuples have become lists.
      skipped: a sentence for each newer checkpoint that could not be used. Empty on
        all processes but the first.
    """

    step: int
    state: Any
    record: dict[str, Any]
    skipped: tuple[str, ...]


class RunCheckpoints:
    """The checkpoints of one training run in one folder.

    Steps grow. To go on from an earlier checkpoint, `restore` it: the later ones belong
    to an abandoned course and go when the next save is complete. In a folder that held
    checkpoints when it was opened, a run that has restored none of them saves nothing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_latest: int = 3,
        keep_best: int = 1,
        metric: str | None = None,
        larger_is_better: bool = True,
        read_only: bool = False,
    ):
        """Opens the folder, creates it if need be, removes unfinished checkpoints.

        Every process of `jax.distributed` opens it.

        Args:
          folder: where the checkpoints are; nothing else should be in it.
          keep_latest: how many of the latest stay, at least 1.
          keep_best: how many of the best stay besides.
          metric: by which of the metrics given to `save` one is best; without it no
            checkpoint is best.
          larger_is_better: how the metric is read.
          read_only: creates and removes nothing, for a look at a run that goes on.

        Raises:
          UserError: the folder cannot be written, is missing if `read_only`, or a
            number makes no sense.
        """
        if keep_latest < 1 or keep_best < 0:
            raise UserError(
                f"keep_latest is {keep_latest} and keep_best {keep_best}, expected at "
                "least 1 and at least 0; the latest checkpoint is needed to resume"
            )
        self.folder = pathlib.Path(folder).absolute()
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._metric = metric
        self._sign = 1 if larger_is_better else -1
        self._read_only = read_only
        # The step that this run has come to: the last one saved or restored.
        self._course: int | None = None
        # Later ones that it did not continue, until a save replaces or removes them.
        self._abandoned: set[int] = set()
        self._metrics: dict[int, float | None] = {}
        self._manager: ocp.CheckpointManager | None = None
        self._unfinished: tuple[str, ...] = ()
        self._quiet = contextlib.ExitStack()
        # Looked up before the others can have saved anything.
        self._found = self.latest_step()
        self._agree(self._open())
        self._quiet.enter_context(_quiet())

    def __enter__(self) -> "RunCheckpoints":
        """Returns itself."""
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Closes it, without hiding an error that is under way."""
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            # The first error is the one to be reported.
            error.add_note(str(failure))

    def save(
        self,
        step: int,
        state: Any,
        record: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint, after the one before it is complete.

        The state is copied before this returns: its buffers may be donated.

        Args:
          step: number of the checkpoint, larger than the last one's.
          state: any tree of JAX or NumPy arrays and numbers; keys as raw key data.
          record: what JSON can hold. With several processes, the first one's is kept.
          metrics: numbers by which the best checkpoint is found. One that is not
            finite is never best.

        Raises:
          UserError: this or the previous checkpoint could not be written, or the folder
            holds checkpoints of a run that this one does not continue.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only")
        self.wait()
        self._check_step(step)
        fields = {"record": dict(record), "metrics": dict(metrics or {})}
        # Found here if JSON cannot hold it, and the caller may change it afterwards.
        fields = json.loads(json.dumps(fields))
        self._course = step
        self._abandoned.discard(step)
        self._metrics[step] = self._metric_in(fields)
        problem = None
        if jax.process_index() == 0:
            arrays = files.host_copy(state)
            content = files.describe(step, fields, arrays)
            # Orbax stores no empty arrays; the shape in the record is all they are.
            arrays = {name: leaf for name, leaf in arrays.items() if leaf.size}
            with self._writing(step) as problems:
                self._make_room(step)
                self._opened_manager().save(
                    step,
                    args=ocp.args.Composite(
                        **{
                            files.STATE: ocp.args.PyTreeSave(arrays),
                            files.RECORD: ocp.args.JsonSave(content),
                        }
                    ),
                    force=True,
                )
            problem = next(iter(problems), None)
        self._agree(problem)

    def amend(
        self,
        step: int,
        record: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Replaces the record and metrics of a checkpoint; every process calls it.

        Args:
          step: of a complete checkpoint.
          record: as in `save`.
          metrics: as in `save`.

        Raises:
          UserError: there is no sound checkpoint of this step, or it cannot be written.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only")
        self.wait()
        path = self.folder / str(step)
        problem = None
        if jax.process_index() == 0:
            try:
                content = files.read_description(path)
                content |= {"record": dict(record), "metrics": dict(metrics or {})}
                files.write_description(path, content)
            except (files.DamagedError, UserError) as error:
                problem = str(error)
        self._agree(problem)
        # Asked for anew from the file.
        self._metrics.pop(step, None)

    def wait(self) -> None:
        """Waits until what was saved is complete; every process calls it.

        Raises:
          UserError: it could not be written.
        """
        self._agree(self._finish())

    def close(self) -> None:
        """Waits until what was saved is complete, in this process alone.

        Raises:
          UserError: it could not be written.
        """
        with self._quiet:
            problem = self._finish()
            if self._manager is not None:
                self._manager.close()
                self._manager = None
        if problem:
            raise UserError(problem)

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of the checkpoints on disk, without those being written."""
        names = [path.name for path in _entries(self.folder) if path.is_dir()]
        return tuple(sorted(int(name) for name in names if _is_step(name)))

    def latest_step(self) -> int | None:
        """Returns the largest of the steps, None without any."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the best metric, None without any.

        Of equals it is the latest.
        """
        return next(iter(self._best_first(self.steps())), None)

    def restore(
        self, like: Any, *, step: int | None = None, best: bool = False
    ) -> Restored:
        """Reads a checkpoint, the latest sound one if no step is given.

        Every process calls it.

        Args:
          like: a tree of arrays, numbers or `jax.ShapeDtypeStruct` with the structure,
            shapes and types of the state.
          step: which checkpoint, or None for the latest.
          best: without a step, prefer those that have the metric, the best first.

        Returns:
          The state and its record. Checkpoints that would have come first but are
          unfinished or damaged are left out and named.

        Raises:
          UserError: there is no sound checkpoint, that of `step` is not sound, or it
            does not fit `like`.
        """
        self.wait()
        skipped: list[str] = []
        if step is None:
            step = self._agreed_step(skipped, best=best)
        elif step not in self.steps():
            raise UserError(
                f"there is no checkpoint of step {step} in {self.folder}; "
                f"{self._what_there_is()}"
            )
        path = self.folder / str(step)
        try:
            arrays, record = files.read(path)
        except files.DamagedError as error:
            raise UserError(
                f"{error}; choose another step than {step}: {self._what_there_is()}"
            ) from error
        state = files.fit(arrays, like, path)
        self._course = step
        self._abandoned = {later for later in self.steps() if later > step}
        return Restored(step, state, record, tuple(skipped))

    def _open(self) -> str | None:
        """Prepares the folder, returns what is wrong with it."""
        if self._read_only:
            if not self.folder.is_dir():
                return f"{self.folder} is no folder of checkpoints; check the path"
            return None
        if jax.process_index() != 0:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            names = self._remove_unfinished()
        except OSError as error:
            return (
                f"checkpoints cannot be written to {self.folder} "
                f"({error.strerror or error}); choose a writable folder"
            )
        self._unfinished = tuple(
            f"the checkpoint {self.folder / name} was not finished, so it was removed"
            for name in names
        )
        return None

    def _remove_unfinished(self) -> list[str]:
        """Removes what was not finished; returns the steps, the latest first."""
        names = set()
        for path in _entries(self.folder):
            name, mark, _ = path.name.partition(_UNFINISHED)
            if mark and _is_step(name):
                shutil.rmtree(path, ignore_errors=True)
                names.add(name)
        return sorted(names, key=int, reverse=True)

    def _check_step(self, step: int) -> None:
        if self._course is not None:
            if step <= self._course:
                raise ValueError(
                    f"step {step} is saved after step {self._course}; steps must grow"
                )
            return
        if self._found is not None:
            raise UserError(
                f"{self.folder} already holds checkpoints up to step {self._found}, so "
                f"that of step {step} is not written; resume that run or choose "
                "another folder"
            )

    def _make_room(self, step: int) -> None:
        """Removes the checkpoint of this step that an abandoned course has left."""
        path = self.folder / str(step)
        if path.exists():
            # Renamed first: half removed, it must not pass for a checkpoint.
            aside = path.with_name(path.name + _UNFINISHED)
            path.rename(aside)
            shutil.rmtree(aside)
            if self._manager is not None:
                self._manager.reload()

    def _opened_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            alone = this_process()
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    save_root_metadata=False,
                    # Metrics are in our record; Orbax fails on damaged metadata.
                    lightweight_initialize=True,
                    # In the background, a folder that cannot be made keeps Orbax's
                    # threads, and with them the process, waiting for minutes.
                    async_options=ocp.AsyncOptions(
                        create_directories_asynchronously=False
                    ),
                    multiprocessing_options=alone,
                    preservation_policy=_Retention(self),
                ),
                item_handlers={
                    # Weights hardly compress, and the data loader needs the cores.
                    files.STATE: ocp.PyTreeCheckpointHandler(
                        use_compression=False, multiprocessing_options=alone
                    ),
                    files.RECORD: ocp.JsonCheckpointHandler(
                        multiprocessing_options=alone
                    ),
                },
            )
        return self._manager

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[list[str]]:
        """Turns a failure of the disk into a sentence, in the list that it yields."""
        problems: list[str] = []
        try:
            yield problems
        except (OSError, ValueError) as error:
            reason = _machine_reason(error)
            if reason is None:
                raise
            manager, self._manager = self._manager, None
            # A part of it may raise the failure once more before it closes.
            while manager is not None:
                with contextlib.suppress(OSError, ValueError):
                    manager.close()
                    manager = None
            files.settle()
            # Half a checkpoint would keep a full disk full.
            self._remove_unfinished()
            problems.append(
                f"the checkpoint of step {step} cannot be written to {self.folder} "
                f"({reason}); {self._what_there_is()}; make room there or choose "
                "another folder, then resume"
            )

    def _finish(self) -> str | None:
        """Waits for the background; returns what went wrong there."""
        if self._manager is None:
            return None
        with self._writing(self._course) as problems:
            self._manager.wait_until_finished()
        return next(iter(problems), None)

    def _agree(self, problem: str | None) -> None:
        """Raises on every process what process 0 has found."""
        failed = problem is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
        if problem is not None:
            raise UserError(problem)
        if failed:
            raise UserError(
                f"checkpoints in {self.folder} cannot be written; process 0 says why"
            )

    def _agreed_step(self, skipped: list[str], *, best: bool) -> int:
        """Returns the first sound step as process 0 sees it; fills `skipped` there."""
        found = -1
        if jax.process_index() == 0:
            skipped.extend(self._unfinished)
            latest = self.steps()[::-1]
            # One whose metric cannot be read may have been the best: it is named.
            damaged = [s for s in latest if best and not self._is_described(s)]
            ranked = self._best_first(latest) if best else []
            # Each once, at its first place.
            for step in dict.fromkeys((*damaged, *ranked, *latest)):
                try:
                    files.read(self.folder / str(step))
                except files.DamagedError as error:
                    skipped.append(f"{error}, so it is skipped")
                else:
                    found = step
                    break
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found < 0:
            raise UserError(
                f"there is no usable checkpoint in {self.folder}; start the run anew"
                + "".join(f"\n{sentence}" for sentence in skipped)
            )
        return found

    def _what_there_is(self) -> str:
        steps = ", ".join(map(str, self.steps()))
        return f"steps {steps} are there" if steps else "no other is there"

    def _is_described(self, step: int) -> bool:
        try:
            files.read_description(self.folder / str(step))
        except files.DamagedError:
            return False
        return True

    def _metric_in(self, fields: Mapping[str, Any]) -> float | None:
        """Returns the metric of a checkpoint's description, None if it cannot count."""
        if self._metric is None or fields["metrics"].get(self._metric) is None:
            return None
        value = float(fields["metrics"][self._metric])
        return value if math.isfinite(value) else None

    def _best_first(self, steps: Iterable[int]) -> list[int]:
        """Returns those of the steps that have the metric, the best first."""
        ranked = []
        for step in steps:
            if step not in self._metrics:
                try:
                    fields = files.read_description(self.folder / str(step))
                    self._metrics[step] = self._metric_in(fields)
                except files.DamagedError:
                    self._metrics[step] = None
            value = self._metrics[step]
            if value is not None:
                ranked.append((self._sign * value, step))
        return [step for _, step in sorted(ranked, reverse=True)]

    def _kept(self, steps: Iterable[int]) -> set[int]:
        """Returns the steps that stay once the newest save is complete."""
        course = sorted(set(steps) - self._abandoned)
        best = self._best_first(course)[: self._keep_best]
        return {*course[-self._keep_latest :], *best}


class _Retention:
    """Which checkpoints stay; Orbax's policies know no NaN and no abandoned course."""

    def __init__(self, owner: RunCheckpoints):
        self._owner = owner

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._owner._kept(steps)
        return [step in kept for step in steps]


class _WithoutOrbax(logging.Filter):
    """Drops what Orbax logs, and asyncio of its reads and writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        by_orbax = "orbax" in pathlib.PurePath(record.pathname).parts
        return not by_orbax and "tensorstore_spec" not in record.getMessage()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax on stderr: what matters is raised or returned.

    After a failure it closes its event loop, and each read or write that ends later,
    or whose failure nobody asks for, would print a traceback.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    without_orbax = _WithoutOrbax()
    hook = sys.unraisablehook

    def without_closed_loops(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    for logger in loggers:
        logger.addFilter(without_orbax)
    sys.unraisablehook = without_closed_loops
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(without_orbax)
        if sys.unraisablehook is without_closed_loops:
            sys.unraisablehook = hook


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _machine_reason(error: Exception) -> str | None:
    """Returns the operating system's reason for an error, None if it is a defect."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError for a failed write, with the number in its text.
    number = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
    return os.strerror(int(number[1] or number[2])) if number else None
