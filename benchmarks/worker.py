"""Processes that run one task of one library whenever they are asked to.

`Worker` is the asking side, `serve` the process. Peak memory is that after warming up.
On a CPU it is the process' resident set, its libraries included, of both libraries
alike; on a GPU the most bytes that arrays held at once, by each library's allocator.
"""

import ctypes
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from contestants import Built, Job

_OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory", "bad_alloc", "MemoryError",
    "can't allocate memory", "Failed to allocate", "ALLOC_FAILED",
    "Failed to determine best cudnn convolution algorithm",  # that is how it shows
)  # fmt: skip
_CACHE = (
    ("JAX_COMPILATION_CACHE_DIR", ""),
    ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
    ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0"),
)
_WATCH_S = 0.05


class Died(Exception):
    """A worker ended before it answered; `reason` is "memory" or "other"."""

    def __init__(self, reason: str, message: str = ""):
        """Keeps the reason and the end of what the process said."""
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message


class Worker:
    """A process that runs one task of one library whenever it is asked to."""

    def __init__(
        self,
        job: Job,
        *,
        cache: pathlib.Path | None = None,
        memory_limit: float | None = None,
    ):
        """Starts the process and waits until it is warm.

        Args:
          job: what it runs.
          cache: folder of compiled programs; none is used if None.
          memory_limit: bytes of resident set at which it is ended; for CPUs, where
            the machine would otherwise run out for all.

        Raises:
          Died: see there.
        """
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(pathlib.Path(__file__).resolve()),
                json.dumps(dataclasses.asdict(job)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(job, cache),
        )
        self._is_full = False
        if memory_limit is not None:
            watch = threading.Thread(
                target=self._watch_memory, args=(memory_limit,), daemon=True
            )
            watch.start()
        self.ready = self._read()

    def run(self) -> float:
        """Returns the seconds of one run."""
        return self._ask("run")["seconds"]

    def stop(self) -> float:
        """Ends the process and returns its peak memory in bytes."""
        peak = self._ask("stop")["peak"]
        self._process.wait()
        return peak

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise self._died()

    def _died(self) -> Died:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-4000:]
        # The system's own way to end a process for its memory leaves no message.
        full = code == -9 or any(word in said for word in _OUT_OF_MEMORY)
        full = full or self._is_full
        return Died("memory" if full else "other", said)

    def _watch_memory(self, limit: float) -> None:
        while self._process.poll() is None:
            try:
                if _status(self._process.pid, "VmRSS") > limit:
                    self._is_full = True
                    self._process.kill()
                    return
            except (OSError, IndexError):  # it has just ended
                return
            time.sleep(_WATCH_S)


def _environment(job: Job, cache: pathlib.Path | None) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if k not in dict(_CACHE)}
    if cache is not None:
        found |= dict(_CACHE) | {_CACHE[0][0]: str(cache)}
    if job.alone:
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    else:  # PyTorch's worker needs memory of the same device
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return found


def _status(process: int | str, name: str) -> float:
    """Returns an entry of /proc/PID/status in bytes."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return 1024.0 * int(status.split(f"{name}:")[1].split()[0])


def available_memory() -> float:
    """Returns the bytes that the machine could still give to processes."""
    found = pathlib.Path("/proc/meminfo").read_text()
    return 1024.0 * int(found.split("MemAvailable:")[1].split()[0])


def first_result(job: Job) -> np.ndarray:
    """Returns what a job's worker found at first: a map, or a loss."""
    return np.load(_result(job))


def _result(job: Job) -> pathlib.Path:
    return pathlib.Path(job.folder) / f"{job.task}_{job.library}.npy"


# --- the process ----------------------------------------------------------------------


def serve(job: Job) -> None:
    """Prepares the task, reports, and runs it on request."""
    if job.library == "jaxreg":
        import jaxreg_side as side
    else:
        import pytorch_side as side
    built: Built = side.build(job)
    np.save(_result(job), built.first)
    built.run()
    built.reset_peak()
    reset_host_peak()
    say(
        device=built.device,
        compile=built.compile,
        # Until a GPU's peak can be forgotten, it has that of compilation in it.
        on_host=built.peak() is None,
    )
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        start = time.perf_counter()
        built.run()
        say(seconds=time.perf_counter() - start)
    say(peak=built.peak() or host_peak())


def say(**message: Any) -> None:
    """Sends one line to the asking process."""
    print(json.dumps(message), flush=True)


def reset_host_peak() -> None:
    """Forgets the resident set's peak so far (compilation, loading)."""
    # What the compiler freed but the C library keeps is not the step's memory.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def host_peak() -> float:
    """Returns the resident set's peak in bytes."""
    return _status("self", "VmHWM")


def read_job(text: str) -> Job:
    """Returns the job that a command line holds."""
    fields: Mapping[str, Any] = json.loads(text)
    return Job(**fields)


if __name__ == "__main__":
    serve(read_job(sys.argv[1]))
