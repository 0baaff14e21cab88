"""Processes of real_sets.py, which register a pair whenever they are asked to.

`Process` is the asking side; `serve` is the loop of real_sets_peers.py, which may run
in an environment without jaxreg, and of real_sets_ours.py. Jobs and answers are lines
of JSON. A process that takes too long is ended, and the next job starts another.
"""

import collections
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any


class FailedError(Exception):
    """A job that gave no answer; the text says why."""


class Process:
    """A script that answers jobs one by one; it starts with the first one."""

    def __init__(
        self, script: str, *, python: str = sys.executable, threads: int, limit_s: float
    ):
        """Keeps what to start.

        Args:
          script: a file of this folder, or any path.
          python: the interpreter of its environment.
          threads: of ITK, OpenMP and greedy.
          limit_s: seconds that a job may take.
        """
        self._command: Sequence[str] = (
            python,
            str(pathlib.Path(__file__).parent / script),
        )
        self._limit_s = limit_s
        self._running: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")
        names = ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS")
        self._environment = os.environ | dict.fromkeys(names, str(threads))

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a job.

        Raises:
          FailedError: the script failed, died or took too long.
        """
        if self._running is None:
            self._start()
        running = self._running
        assert running is not None and running.stdin and running.stdout
        try:
            running.stdin.write(json.dumps(job) + "\n")
            running.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        with selectors.DefaultSelector() as waiting:
            waiting.register(running.stdout, selectors.EVENT_READ)
            if not waiting.select(self._limit_s):
                self.stop()
                raise FailedError(f"took longer than {self._limit_s:g} s")
        line = running.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer

    def stop(self) -> None:
        """Ends the process, if it runs."""
        running, self._running = self._running, None
        if running is None:
            return
        if running.poll() is None:
            # Of a session of its own, so that what it has started ends, too.
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()

    def _start(self) -> None:
        self._running = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
            start_new_session=True,
        )

    def _died(self) -> FailedError:
        assert self._running is not None
        code = self._running.wait()
        self.stop()
        self._errors.seek(0)
        said = " / ".join(collections.deque(self._errors.read().splitlines(), 3))
        return FailedError(f"its process ended with {code}: {said}"[:500])


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the jobs on standard input until it ends.

    Args:
      answer: job to answer; what it raises is an answer as well.
    """
    # What libraries print, also from C++, must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001  whatever it is, the row shall say it
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found = {"error": text[:500]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
