"""Worker process of `hdf5`: reads transform files on request.

A script that imports nothing of jaxreg, so that it starts in a fifth of a second. Asked
by lines of JSON on stdin, it answers on stdout with a line of JSON, then the numbers.
"""

import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

# Deflate reaches 1032 to 1: what claims to unpack to more is damaged.
_MOST_DEFLATED = 1032
_LONGEST_NAME = 256

_ERRORS = (
    *(OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError),
    *(MemoryError, OverflowError, IndexError),
)


def _checked(node: Any, name: str) -> h5py.Dataset:
    """Returns a dataset whose claimed size the file can hold."""
    if not isinstance(node, h5py.Dataset):
        raise ValueError(f"{name} is no dataset")
    # ITK writes numbers and text alone; what h5py makes of other types can be large.
    if node.dtype.kind not in "fiuSO" or node.dtype.itemsize > _LONGEST_NAME:
        raise ValueError(f"{name} has the type {node.dtype}")
    stored = node.id.get_storage_size()
    if node.size is None or node.size * node.dtype.itemsize > _MOST_DEFLATED * stored:
        raise ValueError(f"{name} claims {node.shape} numbers in {stored} bytes")
    return node


def _numbers(group: Any, *spellings: str) -> np.ndarray:
    for name in spellings:
        if name in group:
            node = _checked(group[name], name)
            if node.dtype.kind not in "fiu":
                raise ValueError(f"{name} holds no numbers")
            return np.ravel(np.asarray(node[()], np.float64))
    return np.zeros(0)


def _kind(group: Any) -> str:
    node = _checked(group["TransformType"], "TransformType")
    if node.size != 1:
        raise ValueError(f"TransformType has {node.size} entries")
    kind = np.ravel(node[()])[0]
    return kind.decode("ascii") if isinstance(kind, bytes) else str(kind)


def _transforms(path: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    with h5py.File(path, "r") as file:
        root = file["TransformGroup"]
        if not isinstance(root, h5py.Group):
            raise ValueError("TransformGroup is no group")
        found = []
        for name in sorted(root, key=int):  # as numbers: "10" comes after "9"
            group = root[name]
            if not isinstance(group, h5py.Group):
                raise ValueError(f"TransformGroup/{name} is no group")
            # Files of older ITK versions misspell both.
            found.append(
                (
                    _kind(group),
                    _numbers(group, "TransformParameters", "TranformParameters"),
                    _numbers(
                        group, "TransformFixedParameters", "TranformFixedParameters"
                    ),
                )
            )
        return found


def _answer(path: str) -> Iterator[bytes]:
    try:
        found = _transforms(path)
    except _ERRORS as error:
        text = str(error).strip("'\"").splitlines() or [type(error).__name__]
        yield json.dumps({"error": text[0]}).encode() + b"\n"
        return
    described = [
        {"kind": kind, "parameters": parameters.size, "fixed": fixed.size}
        for kind, parameters, fixed in found
    ]
    yield json.dumps({"transforms": described}).encode() + b"\n"
    for _, *arrays in found:
        yield from (array.tobytes() for array in arrays)


def main() -> None:
    """Answers until stdin ends."""
    limited = hasattr(signal, "setitimer")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if limited:  # the default action of SIGPROF ends the process, in any C code
            signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
        for part in _answer(request["path"]):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        if limited:
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
