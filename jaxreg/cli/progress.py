"""Progress of long verbs: steps, time left, and how to go on after an interrupt.

One mechanism for all verbs: a moving bar on a terminal, plain lines at intervals
elsewhere, and a word where nothing has moved for a while, as while a program compiles.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console

from jaxreg.cli.parser import spelled

_FIRST_WORD_S, _WORD_S = 5.0, 60.0
"""Silence after which a line says that work goes on: the first one, and later ones."""
_LINE_S = 30.0
"""Longest time between two steps that are shown in a log."""
_LONG_S = 300.0
"""Time left from which on it is said how to have it shorter."""


class Bar:
    """Progress on stderr: a moving bar on a terminal, lines elsewhere."""

    def __init__(self, title: str, *, waiting: str = "", shorter: str = ""):
        """Shows nothing yet.

        Args:
          title: what is going on.
          waiting: what takes long before the first step.
          shorter: what to do about minutes that are left.
        """
        self._title, self._waiting, self._shorter = title, waiting, shorter
        self._console = Console(stderr=True, highlight=False)
        self._progress: Any = None
        self._task: Any = None
        self._next = 0.0
        self._first: tuple[float, int] | None = None  # when, and which step
        self._start = self._said = time.monotonic()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._speak_up, daemon=True)

    def __enter__(self) -> "Bar":
        """Starts to watch over silence."""
        self._start = self._said = time.monotonic()
        self._watch.start()
        return self

    def __exit__(self, *_) -> None:
        """Takes the bar away."""
        self._over.set()
        if self._progress is not None:
            self._progress.stop()

    def step(self, step: int, total: int, parts: Mapping[str, float]) -> None:
        """Shows one optimisation step and its loss."""
        text = f"loss {float(parts['loss']):.4f}" if "loss" in parts else ""
        self.show(step, total, text)

    def pairs(self, done: int, total: int, failed: int) -> None:
        """Shows how many pairs of a list are registered, and how many failed."""
        self.show(done, total, f"{failed} failed")

    def bytes(self, received: int, total: int | None) -> None:
        """Shows how much of a download has arrived."""
        if total:
            self.show(received, total, f"{received / 2**20:.0f} MiB")

    def show(self, done: int, total: int, text: str) -> None:
        """Shows that so much of a total is done, with a few words."""
        now = time.monotonic()
        left = self._left(now, done, total)
        if left is not None and left > _LONG_S and self._shorter:
            self.report(f"{about(left)} left; {self._shorter}")
            self._shorter = ""
        if not self._console.is_terminal:
            # A log wants to know that it lives, not every step.
            late = now - self._said > _LINE_S or done == total
            if late or done >= self._next * total:
                self._next = done / total + 0.2
                remaining = (
                    "" if left is None or done == total else f"{about(left)} left"
                )
                self.report(
                    ", ".join(filter(None, (f"{done} of {total}", text, remaining)))
                )
            return
        self._said = now
        if self._progress is None:
            from rich import progress

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[text]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=total, text=text)
        self._progress.update(self._task, completed=done, total=total, text=text)

    def _left(self, now: float, done: int, total: int) -> float | None:
        """Returns the seconds left; the first step compiles, so the second tells."""
        if self._first is None:
            self._first = now, done
        since, first = self._first
        if done == first:
            return None
        return (now - since) / (done - first) * (total - done)

    def report(self, text: str) -> None:
        """Shows a sentence at once."""
        text = spelled(text)
        self._said = time.monotonic()
        if self._progress is not None:
            self._progress.console.print(f"{self._title}: {text}", markup=False)
        else:
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)

    def _speak_up(self) -> None:
        """Says that work goes on, where nothing else has been said for a while."""
        patience = _FIRST_WORD_S
        while not self._over.wait(0.2):
            silent = time.monotonic() - self._said
            if self._progress is not None or silent < patience:
                continue
            patience = _WORD_S
            text = self._waiting if self._first is None else "still at work"
            passed = about(time.monotonic() - self._start).removeprefix("about ")
            self.report(f"{text or 'still at work'} ({passed} so far)")


def about(seconds: float) -> str:
    """Returns a time in words: "about 40 s", "about 28 min", "about 2.5 h"."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


def compiling(shape: tuple[int, ...], *, network: bool) -> str:
    """Returns what takes long before the first step, and for how long usually."""
    import jax

    platform = jax.default_backend()
    cube = f"{shape[0]}^3" if len(set(shape)) == 1 else "x".join(map(str, shape))
    text = f"compiling for {cube} on {platform}"
    if network and platform == "cpu" and min(shape) >= 128:
        text += ", usually 1 to 3 minutes"
    return f"{text}; the next time it is there already"


def shorter(*, network: bool) -> str:
    """Returns the options with which a registration takes less time."""
    alone = "; prediction alone: --io-iterations None" if network else ""
    return f"smaller: --shape 96,96,96{alone}"


@contextlib.contextmanager
def interrupted(kept: str | Callable[[], str]) -> Iterator[None]:
    """Says after an interrupt what is kept and how to go on; the interrupt goes on.

    Args:
      kept: what to say, or what finds it out then.
    """
    try:
        yield
    except KeyboardInterrupt:
        text = kept if isinstance(kept, str) else kept()
        print(f"jaxreg: {text}", file=sys.stderr)
        raise
