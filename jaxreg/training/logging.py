"""The log of a training run: TensorBoard, CSV, a progress line, device memory.

    FOLDER/log.csv              one row a step, a column for each name
    FOLDER/events.out.tfevents  the same and pictures, for TensorBoard

The CSV is complete up to the last call even if the run is killed. A run that goes on
from a checkpoint drops what was written after it, so that the file reads as if nothing
had happened.
"""

import contextlib
import csv
import dataclasses
import datetime
import errno
import io
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxreg.errors import UserError
from jaxreg.io.files import atomic_path

STEP = "step"
_FLUSH_S = 10


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Memory of the fullest device of this process, in bytes.

    Attributes:
      in_use: now.
      peak: the most since the process started.
    """

    in_use: int
    peak: int


class RunLog:
    """Scalars and pictures of one run; every call takes the step that they belong to.

    Steps do not go down. Several calls of one step make one row.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        enabled: bool = True,
        every: int = 50,
        console: Any = None,
    ):
        """Opens the log of a run, or goes on with it.

        Args:
          folder: where the files are; it is created if need be.
          start_step: the step that the run goes on from. Rows of later steps are
            dropped; with 0 the log starts anew.
          tensorboard: whether TensorBoard's file is written besides the CSV.
          enabled: whether anything is written; on all processes but one it is not.
          every: without a terminal, at least how many steps lie between two lines of
            progress.
          console: a rich console for them; stderr if None.

        Raises:
          UserError: the folder cannot be written, `log.csv` is none of ours, or
            tensorboardX is missing.
        """
        self._table: _Table | None = None
        self._events: Any = None
        self._line: ProgressLine | None = None
        self._step = start_step
        if not enabled:
            return
        self._line = ProgressLine(every=every, console=console)
        folder = pathlib.Path(folder)
        writer = _summary_writer() if tensorboard else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._table = _Table(folder / "log.csv", start_step)
            if writer is not None:
                # TensorBoard hides what an earlier run has written from there on.
                purged = start_step + 1 if start_step else 0
                self._events = writer(
                    str(folder), purge_step=purged, flush_secs=_FLUSH_S
                )
        except OSError as error:
            raise UserError(
                f"the log cannot be written to {folder} ({error.strerror or error}); "
                "choose a writable folder"
            ) from error

    def __enter__(self) -> "RunLog":
        """Returns itself."""
        return self

    def __exit__(self, *_) -> None:
        """Closes it."""
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes named numbers.

        Args:
          step: what they belong to.
          values: the numbers by name; "loss/similarity" is in TensorBoard's group loss.

        Raises:
          UserError: the disk takes no more.
        """
        self._check_step(step)
        if self._table is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        if STEP in numbers:
            raise ValueError(f"{STEP!r} is the column of the step itself")
        try:
            self._table.write(step, numbers)
        except OSError as error:
            raise UserError(
                f"the log {self._table.path} cannot be written "
                f"({error.strerror or error}); make room there, then resume"
            ) from error
        if self._events is not None:
            for name, number in numbers.items():
                self._events.add_scalar(name, number, global_step=step)

    def images(self, step: int, volumes: Mapping[str, np.ndarray]) -> None:
        """Writes the middle slices of volumes to TensorBoard.

        Args:
          step: what they belong to.
          volumes: arrays D H W by name, see `middle_slices`.
        """
        self._check_step(step)
        if self._events is None:
            return
        for name, volume in volumes.items():
            picture = middle_slices(volume)
            self._events.add_image(name, picture, global_step=step, dataformats="HW")

    def progress(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Shows how far the run is, see `ProgressLine`.

        Args:
          step: how many steps are done.
          total: of how many.
          values: by name, of which some are shown.
        """
        if self._line is not None:
            self._line.update(step, total, values)

    def note(self, text: str) -> None:
        """Shows a line that stays, above the moving one."""
        if self._line is not None:
            self._line.note(text)

    def close(self) -> None:
        """Writes what is left; nothing can be written afterwards."""
        if self._line is not None:
            self._line.close()
        if self._table is not None:
            self._table.close()
        if self._events is not None:
            # On a full disk the sentence about a checkpoint or the CSV counts more,
            # and the CSV has the same numbers.
            with contextlib.suppress(OSError):
                self._events.close()

    def _check_step(self, step: int) -> None:
        if step < self._step:
            raise ValueError(f"step {step} comes after step {self._step}")
        self._step = step


class ProgressLine:
    """How far a run is: one moving line on a terminal, a line now and then elsewhere.

    step 120 of 1000, loss 0.1234, 3.21 pairs/s, 38% of peak arithmetic, 12.1 GB,
    waiting for data 4%, 0:12:05 left
    """

    def __init__(
        self,
        *,
        every: int = 50,
        console: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares the line.

        Args:
          every: without a terminal, at least how many steps lie between two lines.
          console: a rich console; stderr if None.
          clock: seconds, for the time left.
        """
        from rich.console import Console

        self._every = every
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._live: Any = None
        # The first step compiles, so its time is no rate.
        self._first: tuple[int, float] | None = None
        self._printed: int | None = None

    def update(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Shows a step.

        Args:
          step: how many steps are done.
          total: of how many.
          values: "loss", "pairs_per_s", "model_flops_utilisation" and
            "data_wait_share" in [0, 1], "device_memory_peak_gb"; what is missing is not
            shown.
        """
        shown = {
            "loss": "loss {:.4f}",
            "pairs_per_s": "{:.3g} pairs/s",
            "model_flops_utilisation": "{:.0%} of peak arithmetic",
            "device_memory_peak_gb": "{:.1f} GB",
            "data_wait_share": "waiting for data {:.0%}",
        }
        parts = [f"step {step} of {total}"]
        parts += [f.format(values[name]) for name, f in shown.items() if name in values]
        line = ", ".join(parts + self._left(step, total))
        if self._console.is_terminal:
            self._move(line)
        elif (
            self._printed is None
            or step >= min(total, self._printed + self._every) > self._printed
        ):
            self._printed = step
            self.note(line)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the moving one."""
        # A log file has no width; brackets are no markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the moving line; its last state stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self, step: int, total: int) -> list[str]:
        if self._first is None:
            self._first = (step, self._clock())
        since, start = self._first
        if step <= since:
            return []
        seconds = (self._clock() - start) / (step - since) * max(total - step, 0)
        return [f"{datetime.timedelta(seconds=math.ceil(seconds))} left"]

    def _move(self, line: str) -> None:
        from rich.live import Live
        from rich.text import Text

        text = Text(line, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(text, console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(text)


def device_memory(devices: Iterable[Any] | None = None) -> DeviceMemory | None:
    """Returns the memory of the fullest device, None if the backend does not say.

    Args:
      devices: JAX devices; those of this process if None.
    """
    devices = jax.local_devices() if devices is None else devices
    reported = [stats for device in devices if (stats := device.memory_stats())]
    if not reported:
        return None
    return DeviceMemory(
        in_use=max(stats.get("bytes_in_use", 0) for stats in reported),
        peak=max(stats.get("peak_bytes_in_use", 0) for stats in reported),
    )


def middle_slices(volume: np.ndarray) -> np.ndarray:
    """Returns the middle slices across D, H and W, side by side, as grey values.

    Args:
      volume: D H W. Black is 0 or the smallest value if that is less, white 1 or the
        largest if that is more; what is not finite is black.

    Returns:
      uint8, of height max(H, D) and width W + W + H: the slices H W, D W and D H, each
      in the upper left of its place.
    """
    volume = np.asarray(volume, np.float32)
    if volume.ndim != 3:
        raise ValueError(f"the volume has shape {volume.shape}, expected D H W")
    d, h, w = volume.shape
    slices = [volume[d // 2], volume[:, h // 2], volume[:, :, w // 2]]
    picture = np.full((max(h, d), w + w + h), np.nan, np.float32)
    left = 0
    for rows in slices:
        picture[: rows.shape[0], left : left + rows.shape[1]] = rows
        left += rows.shape[1]
    finite = np.isfinite(picture)
    low = picture.min(where=finite, initial=0)
    high = picture.max(where=finite, initial=1)
    grey = (np.where(finite, picture, low) - low) / (high - low)
    return np.round(255 * grey).astype(np.uint8)


class _Table:
    """A CSV file that grows by rows and by columns."""

    def __init__(self, path: pathlib.Path, start_step: int):
        self.path = path
        self._file: Any = None
        rows = _read_rows(path, start_step)
        # In order of first appearance, so that a resumed run has the same.
        names = {name: None for row in rows for name in row}
        self._columns = [STEP, *(name for name in names if name != STEP)]
        self._rewrite(rows)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a row, or to the last one if it is of the same step."""
        last = self._row if self._row.get(STEP) == str(step) else {}
        row = {STEP: str(step), **last} | {n: repr(v) for n, v in numbers.items()}
        new = [name for name in numbers if name not in self._columns]
        if new:
            rows = _read_rows(self.path)
            self._columns += new
            self._rewrite([*(rows[:-1] if last else rows), row])
            return
        if not last:
            self._start = self._file.seek(0, os.SEEK_END)
        # At once, not through a buffer: a kill leaves the row or none of it.
        text = _csv_text([row], self._columns).encode()
        self._file.seek(self._start)
        if self._file.write(text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file.truncate()
        self._row = row

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Writes the whole file anew, all at once or not at all, and opens it."""
        header = _csv_text([{name: name for name in self._columns}], self._columns)
        with atomic_path(self.path) as temporary:
            body = header + _csv_text(rows, self._columns)
            temporary.write_bytes(body.encode())
        if self._file is not None:
            self._file.close()
        self._file = open(self.path, "r+b", buffering=0)
        self._row = dict(rows[-1]) if rows else {}
        last = _csv_text(rows[-1:], self._columns).encode()
        self._start = self._file.seek(-len(last), os.SEEK_END)


def _csv_text(rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read_rows(
    path: pathlib.Path, last_step: int | None = None
) -> list[dict[str, str]]:
    """Reads the rows of a log, each without its empty fields.

    Args:
      path: the file; missing or empty, it has no rows.
      last_step: rows of later steps are left out, all with 0: the run starts anew.

    Raises:
      UserError: it is something else.
    """
    if not path.exists():
        return []
    # A last line without its end was cut.
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    columns = next(lines, [STEP])
    if columns[:1] != [STEP]:
        raise UserError(
            f"{path} is no log of a training run: its first column is not {STEP!r}; "
            "choose another folder"
        )
    rows = [
        {name: value for name, value in zip(columns, line, strict=True) if value}
        for line in lines
        if len(line) == len(columns) and line[0].isdecimal()
    ]
    if last_step is None:
        return rows
    return [row for row in rows if int(row[STEP]) <= last_step and last_step > 0]


def _summary_writer() -> Any:
    """Returns tensorboardX's writer, which is imported only where it is wanted."""
    # It imports PyTorch where that is installed, for two seconds and nothing of ours.
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # pyright: ignore
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "TensorBoard's files need tensorboardX, which is not installed; "
            "pip install tensorboardX, or switch tensorboard off"
        ) from error
    finally:
        if hides:
            del sys.modules["torch"]
    return SummaryWriter
