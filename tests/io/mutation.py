"""Damaged copies of files, and their reading: each is refused in one sentence, or read.

A module of tests that has `MADE`, `outcomes_of(folder, name)` and `main` is run as a
script, in a process of its own: a library of C that ends its process, or never comes
back, fails one test and not the session, and peaks of memory are those of the files.
"""

import faulthandler
import gzip
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from jaxreg.errors import UserError

SEED = int(os.environ.get("JAXREG_FUZZ_SEED", "0"))
LIMIT_S = 5.0
"""Of processor time, for one file."""
_HANGS_S = 120.0
LIMIT_BYTES = 2**30

Edit = Callable[[bytearray, random.Random], None]
"""A fault, made in place."""

HEADER = 1024
"""Bytes at the start, where most formats say what follows."""

_GZIP = b"\x1f\x8b"
_NUMBER = re.compile(rb"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_NUMBERS = (
    b"0 1 -1 2 3 255 65536 2147483647 -2147483648 4294967296 9223372036854775807 "
    b"99999999999999999999 1e-300 1e300 -1e38 0.70711 nan inf -inf 1e 0x10 1,5 1;2 "
    b"none () (1,0,0) \xff \xc3\xa9"
).split(b" ")
_WORDS = (
    b"raw gzip gz bzip2 zlib hex ascii text true false yes no none unknown float double"
    b" short int uchar block complex vector list LOCAL / . .. left-posterior-superior "
    b"right-anterior-superior scanner-xyz big little"
).split(b" ")
_INTEGERS = (0, 1, 2, -1, 3, 7, 1000, 2**15 - 1, 2**31 - 1, 2**63 - 1)
_FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.70711, -0.70711, 1e-45, 1e-30, 1e30, 3.4e38, -3.4e38),
    *(float("nan"), float("inf"), float("-inf"), 1e308, 348.0, 1e9),
)


def mutations(
    data: bytes, seed: int, *, edits: Sequence[Edit] = (), others: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """Yields damaged copies of a file without end, the same ones for a seed.

    Each has one to four faults: flipped bits, a missing end, a missing, doubled or
    foreign stretch, a header field of an extreme value, or an edited line of text. Of a
    gzip file every second copy is damaged inside and compressed again, so that its
    checksum holds and the fault reaches the reader.

    Args:
      data: the whole file, not empty.
      seed: any integer.
      edits: further faults, those of a format; every second fault is one of them.
      others: whole files that the end of this one may be replaced from.
    """
    rng = random.Random(seed)

    def splice(made: bytearray, rng: random.Random) -> None:
        other = rng.choice(others)
        made[_place(made, rng) :] = other[rng.randrange(len(other)) :]

    general = [*_EDITS, splice] if others else _EDITS
    inside = None
    if data[:2] == _GZIP:
        inside = gzip.decompress(data)
    while True:
        whole = inside is not None and rng.random() < 0.5
        made = bytearray(inside if whole and inside is not None else data)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
            if made:
                own = edits and rng.random() < 0.5
                rng.choice(edits if own else general)(made, rng)
        yield gzip.compress(bytes(made), 1, mtime=0) if whole else bytes(made)


def _place(data: bytearray, rng: random.Random) -> int:
    """Picks an offset, three times of four in the header."""
    end = len(data) if rng.random() < 0.25 else min(len(data), HEADER)
    return rng.randrange(end)


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice((_place(data, rng), rng.randrange(len(data)))) :]


def _drop(data: bytearray, rng: random.Random) -> None:
    start = _place(data, rng)
    del data[start : start + rng.choice((1, 2, 4, 64))]


def _insert(data: bytearray, rng: random.Random) -> None:
    count = rng.choice((1, 4, 64))
    source = rng.randrange(len(data))
    stretch = data[source : source + count]
    start = _place(data, rng)
    data[start:start] = stretch if rng.random() < 0.5 else rng.randbytes(count)


def _field(data: bytearray, rng: random.Random) -> None:
    """Overwrites an aligned header field with an extreme value of its size."""
    order = rng.choice("<<<>")
    size = rng.choice((2, 2, 4, 4, 8))
    if rng.random() < 0.5 and size > 2:
        value = rng.choice(_FLOATS)
        if size == 4 and abs(value) > 3.4e38 and value - value == 0:
            value = 3.4e38
        field = struct.pack(order + {4: "f", 8: "d"}[size], value)
    else:
        value = rng.choice(_INTEGERS) * rng.choice((1, 1, -1))
        value = min(value, 2 ** (8 * size - 1) - 1)
        value = max(value, -(2 ** (8 * size - 1)))
        field = value.to_bytes(size, "big" if order == ">" else "little", signed=True)
    start = _place(data, rng) // 2 * 2
    for copy in range(rng.choice((1, 1, 1, 3))):
        at = start + copy * size
        if at + size <= len(data):
            data[at : at + size] = field


def _line(data: bytearray, rng: random.Random) -> None:
    """Edits one line of a text header; flips a bit where there is none."""
    head, tail = bytes(data[:HEADER]), bytes(data[HEADER:])
    lines = head.split(b"\n")
    if len(lines) < 3:
        _flip(data, rng)
        return
    at = rng.randrange(len(lines))
    line = lines[at]
    numbers = list(_NUMBER.finditer(line))
    edit = rng.choice(("number", "number", "number", "word", "key", "swap", "drop"))
    if edit == "number" and numbers:
        found = rng.choice(numbers)
        new = rng.choice(_NUMBERS)
        lines[at] = line[: found.start()] + new + line[found.end() :]
    elif edit == "word":
        words = line.split(b" ")
        words[rng.randrange(len(words))] = rng.choice(_WORDS)
        lines[at] = b" ".join(words)
    elif edit == "key":
        lines[at] = rng.choice((line * 2, line + b" 1", line.upper(), line[::-1]))
    elif edit == "swap":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif edit == "drop":
        lines[at : at + 1] = [] if rng.random() < 0.5 else [line, line]
    data[:] = b"\n".join(lines) + tail


_EDITS: tuple[Edit, ...] = (
    *(_flip, _byte, _cut, _drop, _insert),
    *(_field, _field, _line, _line),
)


def outcomes(
    read: Callable[[int], None], target: pathlib.Path, copies: Iterable[bytes]
) -> dict[str, float]:
    """Reads damaged copies of a file; returns how many were read and refused.

    Args:
      read: reads what lies at `target`; is told the copy's number.
      target: where the copies are written, one after the other.
      copies: the files.

    Raises:
      AssertionError: a refusal has several lines.
    """
    counted = {"read": 0, "refused": 0, "slowest_s": 0.0}
    for number, damaged in enumerate(copies):
        target.write_bytes(damaged)
        faulthandler.dump_traceback_later(_HANGS_S, exit=True)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of numbers
                read(number)
            counted["read"] += 1
        except UserError as error:
            assert "\n" not in str(error), (number, str(error))
            counted["refused"] += 1
        except Exception as error:
            error.add_note(f"copy {number} of {target.name}")
            raise
        # Of this process; others that it starts have limits of their own.
        counted["slowest_s"] = max(counted["slowest_s"], time.process_time() - start)
        faulthandler.cancel_dump_traceback_later()
    return counted


def peak_bytes() -> list[int]:
    """Of this process, and of the largest that it started and that has ended."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return [
        unit * resource.getrusage(whose).ru_maxrss
        for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]


def main(
    outcomes_of: Callable[[pathlib.Path, str], dict[str, Any]],
    names: Iterable[str],
    folder: pathlib.Path,
) -> None:
    """Writes the outcomes by name, or the traceback of what went wrong."""
    found: dict[str, Any] = {}
    before = peak_bytes()
    (folder / "outcomes.json").write_text("{}", "utf-8")
    for name in names:
        start = time.monotonic()
        try:
            found[name] = outcomes_of(folder, name)
        except Exception:  # noqa: BLE001 the test that waits for it fails
            found[name] = {"trouble": traceback.format_exc()}
        peaks = [now - was for was, now in zip(before, peak_bytes(), strict=True)]
        found[name] |= {"bytes": max(peaks), "s": time.monotonic() - start}
        (folder / "outcomes.json").write_text(json.dumps(found), "utf-8")


def run(script: str, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Runs a module of tests as a script; returns its outcomes by name, and its end."""
    pytest.importorskip("resource")
    command = [sys.executable, "-P", script, str(folder)]
    # As pytest has it: the folder of this module, from which the script imports it.
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    ended = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    found = json.loads((folder / "outcomes.json").read_text("utf-8"))
    if ended.returncode:
        end = f"ended with {ended.returncode} behind {list(found)}: {ended.stderr}"
        found["process"] = {"trouble": end}
    return found


def check(outcome: dict[str, Any], count: int) -> None:
    """Checks that so many damaged copies were read or refused, soon and in bounds."""
    assert "trouble" not in outcome, outcome["trouble"]
    assert outcome["slowest_s"] < LIMIT_S
    assert outcome["bytes"] < LIMIT_BYTES
    assert outcome["refused"]
    assert outcome["read"] + outcome["refused"] == count
    print(outcome)
