"""ITK's transforms in HDF5, read in a worker process with a time limit.

A damaged file can make the HDF5 library loop for ever, whoever calls it, in code that
no exception and no signal handler of Python reaches; or end the process that reads it.
"""

import pathlib
from typing import IO, Any

import numpy as np

from jaxreg.io import files, workers

_WORKER = workers.Worker(pathlib.Path(__file__).with_name("hdf5_worker.py"))
_FLOAT = np.dtype(np.float64)


class Damaged(Exception):
    """What is wrong with a file."""


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
    try:
        found = _WORKER.ask({"path": str(path)}, _received, size=path.stat().st_size)
    except workers.Ended as error:
        reason = "the HDF5 library does not come to an end with it"
        raise Damaged(reason) from error
    if isinstance(found, str):
        raise Damaged(found)
    return found


def _received(
    reply: dict[str, Any], stream: IO[bytes]
) -> list[tuple[str, np.ndarray, np.ndarray]] | str:
    if "error" in reply:
        return reply["error"]
    return [
        (
            one["kind"],
            workers.receive_array(stream, _FLOAT, one["parameters"]),
            workers.receive_array(stream, _FLOAT, one["fixed"]),
        )
        for one in reply["transforms"]
    ]
