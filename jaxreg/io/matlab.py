"""MATLAB's level 4 files, in which ANTs writes its affine transforms (.mat).

A matrix is a header of five int32 (type, rows, columns, whether imaginary, length of
the name), the name, and the numbers, column by column.

References:
  MathWorks, MAT-File Format, chapter 2.
"""

import math
import pathlib
from collections.abc import Mapping

import numpy as np

_HEADER = 20
_TYPES = ("f8", "f4", "i4", "i2", "u2", "u1")
_LONGEST_NAME = 256


def read_matrices(path: pathlib.Path) -> list[tuple[str, np.ndarray]]:
    """Reads all matrices of a file, in order.

    Returns:
      (name, numbers) of each; numbers are float64, 1D, column by column.

    Raises:
      ValueError: it is no such file, or damaged.
    """
    data = path.read_bytes()
    found, at = [], 0
    while at < len(data):
        name, numbers, at = _matrix(data, at)
        found.append((name, numbers))
    return found


def _matrix(data: bytes, at: int) -> tuple[str, np.ndarray, int]:
    if len(data) - at < _HEADER:
        raise ValueError("no header of a matrix")
    for order in "<>":
        header = np.frombuffer(data, order + "i4", 5, at)
        # Thousands: whose order of bytes the file has.
        if int(header[0]) // 1000 == "<>".index(order):
            break
    else:
        raise ValueError("no header of a matrix")
    kind, rows, columns, imaginary, length = (int(n) for n in header)
    known = 0 <= kind % 1000 and kind % 100 // 10 < len(_TYPES) and kind % 10 == 0
    if not known or imaginary or min(rows, columns) < 0:
        raise ValueError("a matrix of another kind than numbers")
    if not 1 <= length <= _LONGEST_NAME:
        raise ValueError("no name of a matrix")
    dtype = np.dtype(order + _TYPES[kind % 100 // 10])
    count = math.prod((rows, columns))
    start = at + _HEADER + length
    end = start + count * dtype.itemsize
    if end > len(data):
        raise ValueError(f"it ends within {rows} x {columns} numbers")
    name = data[at + _HEADER : start].split(b"\0")[0].decode("ascii")
    numbers = np.frombuffer(data, dtype, count, start).astype(np.float64)
    return name, numbers, end


def write_matrices(path: pathlib.Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns of numbers by name, float64, in the byte order of most machines.

    Args:
      path: the file.
      columns: 1D arrays, in order.
    """
    parts = []
    for name, numbers in columns.items():
        text = name.encode("ascii") + b"\0"
        parts += [np.array([0, numbers.size, 1, 0, len(text)], "<i4").tobytes(), text]
        parts.append(np.asarray(numbers, "<f8").tobytes())
    path.write_bytes(b"".join(parts))
