"""Worker processes for libraries that a damaged file can hang, crash or bloat.

A second process can be ended and limited in time and memory. It runs a
script that imports nothing of jaxreg, so that it starts in a fraction of a second; it
is started by the first request and stays for the next ones.

The script answers lines of JSON on stdin by a line of JSON on stdout, and what that
announces.
"""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

import numpy as np

_WALL_S = 60.0
_CPU_S = 1.0
_BYTES_PER_S = 5e6  # slower than any disk: what a large file gets on top


class Ended(Exception):
    """The process was ended: by its library, or by a limit of time or memory."""


class Worker:
    """One script's process.

    Attributes:
      script: what it runs.
    """

    def __init__(self, script: pathlib.Path):
        """Starts nothing yet."""
        self.script = script
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the process, if this one started it; the next request starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def ask(
        self,
        request: dict[str, Any],
        receive: Callable[[dict[str, Any], IO[bytes]], Any],
        *,
        size: int,
    ) -> Any:
        """Sends one request and returns what `receive` makes of the answer.

        Args:
          request: the request; "cpu_s" is added, the processor time that it may take.
          receive: takes the line of JSON and the stream of what follows it.
          size: bytes that are to be read, by which the time is limited.

        Raises:
          Ended: see there.
        """
        size_s = size / _BYTES_PER_S
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            stop = threading.Timer(_WALL_S + size_s, process.kill)
            stop.start()
            try:
                line = json.dumps(request | {"cpu_s": _CPU_S + size_s}).encode()
                process.stdin.write(line + b"\n")
                process.stdin.flush()
                reply = process.stdout.readline()
                if not reply.endswith(b"\n"):
                    raise EOFError
                return receive(json.loads(reply), process.stdout)
            except (EOFError, BrokenPipeError) as error:
                self.close()
                raise Ended from error
            except BaseException:  # e.g. an interrupt, between two parts
                self.close()
                raise
            finally:
                stop.cancel()

    def _started(self) -> "subprocess.Popen[bytes]":
        process = self._process
        if process is None or self._owner != os.getpid() or process.poll() is not None:
            # -P: the folder of the script holds modules of other names than it seems.
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._owner = os.getpid()
        return process


def receive_array(stream: IO[bytes], dtype: np.dtype, count: int) -> np.ndarray:
    """Returns so many numbers of a stream, 1D.

    Raises:
      EOFError: it ends too early.
    """
    array = np.empty(count, dtype)
    view = array.view(np.uint8).data
    done = 0
    while done < len(view):
        received = stream.readinto(view[done:])  # pyright: ignore
        if not received:
            raise EOFError
        done += received
    return array
