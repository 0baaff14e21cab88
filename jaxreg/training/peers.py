"""The processes of one run watch each other: where one is lost, the others end.

A step waits for all processes, so that one that is gone, or stands still, would hold up
the others for ever. JAX notices it after some time and aborts, without a word for the
user. Here each process says now and then, through JAX's coordination service, that it
is there; one that has been silent for too long is named in a sentence. Process 0 holds
the service: where that is gone JAX aborts the others at once, and a small process
besides each is left to say so.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from jaxreg.errors import UserError

STATUS = 2
"""With which a process ends that has lost another."""

_FOLDER = "jaxreg/processes/"
_THERE, _DONE, _FAILED = "there", "done", "failed"
# After an error of one process the others may have the same, and say so themselves.
_GRACE_S = 10.0
_RESUME = (
    "the last checkpoint is whole; go on with the same command and `resume`, on fewer "
    "processes too"
)
_WITNESS = "import sys\nif not sys.stdin.read(): sys.stderr.write(sys.argv[1])"


class Watch:
    """Watches over the other processes of a run; a context manager.

    While it is open, the loss of another process ends this one with `STATUS`, in a
    sentence on stderr. An exception that leaves it may have come of such a loss: it
    goes on only once none has been found.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        patience_s: float,
        sentence: Callable[[str], str],
    ):
        """Watches nothing yet.

        Args:
          client: of the coordination service: `key_value_set`, `key_value_dir_get`.
          index: of this process.
          count: of processes.
          patience_s: silence after which a process is lost, seconds.
          sentence: makes a message what the user reads.
        """
        self._client, self._index, self._count = client, index, count
        self._patience, self._every = patience_s, min(patience_s / 10, 5.0)
        self._sentence = sentence
        self._status = _THERE
        self._over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        self._answered = 0.0
        self._threads: list[threading.Thread] = []
        self._witness: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        """Begins to watch."""
        now = time.monotonic()
        self._answered = now
        self._heard = {i: ("", now) for i in range(self._count) if i != self._index}
        self._witness = self._new_witness()
        # Two: a question to a process that stands still has no end.
        for work in (self._speak, self._judge):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        """Tells the others how this process has ended; waits for a loss to be found."""
        own = (UserError, KeyboardInterrupt, SystemExit)
        if kind is not None and not issubclass(kind, own):
            self._wait_for_loss(f"{kind.__name__}: {error}".splitlines()[0])
        self._status = _DONE if kind is None else _FAILED
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._every)
        self._dismiss()

    def _wait_for_loss(self, error: str) -> None:
        self._say(
            f"process {self._index} cannot go on ({error[:200]}); looking for up to "
            f"{self._patience:g} s whether another one is lost"
        )
        time.sleep(self._patience + 3 * self._every)

    def _new_witness(self) -> subprocess.Popen:
        """Starts what speaks for this process if it ends without having spoken."""
        text = f"process {self._index} of {self._count} (from 0) was ended: it was "
        if self._index:
            text += "killed, or lost process 0, on which all others depend"
        else:
            text += "killed"
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WITNESS,
             f"{self._sentence(f'{text}; {_RESUME}')}\n"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is not for it
        )  # fmt: skip

    def _dismiss(self) -> None:
        if self._witness is not None:
            with contextlib.suppress(OSError):
                self._witness.communicate(b"done", timeout=10)

    def _speak(self) -> None:
        """Says again and again that this process is there, and hears the others."""
        turn = 0
        while True:
            over = self._over.wait(self._every if turn else 0)
            turn += 1
            with contextlib.suppress(RuntimeError, ValueError):  # as JAX raises them
                self._client.key_value_set(
                    f"{_FOLDER}{self._index}", f"{self._status} {turn}", True
                )
                found = self._client.key_value_dir_get(_FOLDER)
                self._hear({int(key.rsplit("/", 1)[-1]): said for key, said in found})
            if over:
                return

    def _hear(self, said: dict[int, str]) -> None:
        now = time.monotonic()
        for index, (before, since) in self._heard.items():
            text = said.get(index, "")
            self._heard[index] = text, since if text == before else now
        self._answered = now

    def _judge(self) -> None:
        """Ends this process once another one is lost."""
        last = time.monotonic()
        while not self._over.wait(self._every / 2):
            now = time.monotonic()
            if now - last > self._patience / 2:
                # It was this one that stood still.
                self._answered = now
                self._heard = {i: (text, now) for i, (text, _) in self._heard.items()}
            last = now
            lost = self._lost(now)
            if lost is not None and not self._over.is_set():
                self._end(lost)

    def _lost(self, now: float) -> str | None:
        """Returns what is wrong with another process, or None."""
        silent = (
            f"has not answered for {self._patience:g} s: it was ended or stands still"
        )
        if now - self._answered > self._patience:
            # A question to the service, in process 0, has had no answer.
            return f"process 0 of {self._count} {silent}; {_RESUME}"
        if now - self._answered > 2 * self._every:
            return None
        for index, (text, since) in self._heard.items():
            status = text.partition(" ")[0]
            name = f"process {index} of {self._count} (from 0)"
            if status == _FAILED and now - since > min(self._patience, _GRACE_S):
                return f"{name} has ended with an error, which it has told; {_RESUME}"
            if status in ("", _THERE) and now - since > self._patience:
                return f"{name} {silent}; {_RESUME}"
        return None

    def _say(self, text: str) -> None:
        # A moving line that ends here leaves the cursor hidden.
        shown = "\n\x1b[?25h" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{shown}{self._sentence(text)}\n")
        sys.stderr.flush()

    def _end(self, text: str) -> None:
        """Ends this process at once: its main thread may wait for ever."""
        self._say(text)
        if self._index == 0:
            # The others hear of it from the service here, which ends with this process.
            time.sleep(2.5 * self._every)
        for child in multiprocessing.active_children():
            child.kill()
        self._dismiss()
        os._exit(STATUS)


def watch(
    patience_s: float, sentence: Callable[[str], str]
) -> contextlib.AbstractContextManager[Any]:
    """Returns a `Watch` over the processes that `parallel.start_processes` has joined.

    Args:
      patience_s: silence after which a process is lost, seconds.
      sentence: makes a message what the user reads.
    """
    # Not public; Orbax, which writes the checkpoints, takes it from there as well.
    from jax._src import distributed

    joined = distributed.global_state
    if joined.client is None or joined.num_processes == 1:
        return contextlib.nullcontext()
    return Watch(
        joined.client, joined.process_id, joined.num_processes, patience_s, sentence
    )
