"""ITK's transforms in HDF5, read in a process of its own with a limit on its time.

A damaged file can make the HDF5 library loop for ever, whoever calls it, in code that
no exception and no signal handler of Python reaches; or end the process that reads it.
A second process can be ended. It is started by the first file (0.2 s) and stays for the
next ones.
"""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np

from jaxreg.io import files

_WORKER = pathlib.Path(__file__).with_name("hdf5_worker.py")
_CPU_S, _WALL_S = 1.0, 60.0
_BYTES_PER_S = 5e6  # slower than any disk: what a large file gets on top


class Damaged(Exception):
    """What is wrong with a file."""


class _Worker:
    """A running `hdf5_worker`."""

    def __init__(self):
        self.owner = os.getpid()
        # -P: the folder of the script holds modules of other names than it seems.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self, path: pathlib.Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        size_s = path.stat().st_size / _BYTES_PER_S
        asked = {"path": str(path), "cpu_s": _CPU_S + size_s}
        stop = threading.Timer(_WALL_S + size_s, process.kill)
        stop.start()
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            told = json.loads(line)
            if "error" in told:
                raise Damaged(told["error"])
            return [
                (
                    one["kind"],
                    _array(process.stdout, one["parameters"]),
                    _array(process.stdout, one["fixed"]),
                )
                for one in told["transforms"]
            ]
        finally:
            stop.cancel()


def _array(stream, count: int) -> np.ndarray:
    array = np.empty(count, np.float64)
    view = array.data.cast("B")
    done = 0
    while done < len(view):
        received = stream.readinto(view[done:])
        if not received:
            raise EOFError
        done += received
    return array


_lock = threading.Lock()
_running: list[_Worker] = []


@atexit.register
def _close() -> None:
    while _running:
        worker = _running.pop()
        if worker.owner == os.getpid():
            worker.close()


def read_transforms(
    path: files.PathLike,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Reads the transforms of a file in ITK's layout.

    Returns:
      (type, parameters, fixed parameters) of each, in the file's order; the arrays are
      float64, 1D.

    Raises:
      Damaged: it is no such file, or cannot be read to its end within seconds.
    """
    path = pathlib.Path(path).absolute()
    with _lock:
        if not _running or _running[0].owner != os.getpid():
            _running[:] = [_Worker()]
        try:
            return _running[0].read(path)
        except (EOFError, BrokenPipeError):
            _close()
        except BaseException as error:
            if not isinstance(error, Damaged):  # e.g. an interrupt, between two parts
                _close()
            raise
    raise Damaged("the HDF5 library does not come to an end with it")
