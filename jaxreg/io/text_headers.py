"""Text headers of NRRD and MetaImage: fields, and checks of what would crash a reader.

SimpleITK reads them by libraries that trust a header: NrrdIO and MetaIO copy texts into
memory of a fixed size and take a name of files for a format of C. A damaged header
ended the process; here it gets a sentence first.

References:
  http://teem.sourceforge.net/nrrd/format.html; MetaIO's documentation, "MetaImage".
"""

import math
import mmap
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from jaxreg.io import files

META_SIZE = ("ElementSpacing", "ElementSize")
META_OFFSET = ("Offset", "Position", "Origin")
META_TURN = ("TransformMatrix", "Rotation", "Orientation")

_BYTES = 2**20
_META = (".mha", ".mhd")
_META_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")
_META_TYPES = {
    *("MET_CHAR", "MET_UCHAR", "MET_SHORT", "MET_USHORT", "MET_INT", "MET_UINT"),
    *("MET_LONG", "MET_ULONG", "MET_LONG_LONG", "MET_ULONG_LONG", "MET_FLOAT"),
    *("MET_DOUBLE", "MET_ASCII_CHAR"),
}
_META_TEXTS = {  # of 255 bytes at most
    *("ObjectType", "ObjectSubType", "Name", "DistanceUnits", "AnatomicalOrientation"),
    *("Modality", "ElementType", "BinaryData", "CompressedData", "AcquisitionDate"),
}
_META_LONGEST = 200
_NRRD_LONGEST = 500  # bytes of a line that NrrdIO repeats when it refuses it
_LONG_WORD = re.compile(rb"[^\s,]{200}")
_PATTERN = re.compile(r"[^%]*%0?\d{0,2}d[^%]*")


def read(path: pathlib.Path) -> tuple[dict[str, str], int]:
    """Returns the fields of a header and its length in bytes.

    NRRD's names are in small letters; its header ends at an empty line, MetaImage's
    behind the line of ElementDataFile.
    """
    fields, at = {}, 0
    nrrd = _is_nrrd(path)
    for line, end in _lines(path):
        at = end
        name, value = _field(line, nrrd=nrrd)
        if name:
            fields[name] = value
    return fields, at


def check(path: pathlib.Path) -> tuple[dict[str, str], int]:
    """Returns what `read` does, of a header that does no harm.

    Raises:
      UserError: a text or a pattern of names would end the process; or a MetaImage
        lacks a field, or a number, for which MetaIO would take zeros.
    """
    fields, end = read(path)
    if _is_nrrd(path):
        _check_nrrd(path, fields, end)
    elif path.suffix.lower() in _META:
        _check_meta(path, fields)
    return fields, end


def _is_nrrd(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"NRRD"


def _lines(path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yields the lines of a header, stripped, and where each ends in the file."""
    with path.open("rb") as file:
        head = file.read(_BYTES)
    nrrd, at = head.startswith(b"NRRD"), 0
    while at < len(head):
        end = head.find(b"\n", at)
        end = len(head) if end < 0 else end
        line = _decoded(head[at:end]).strip()
        at = end + 1
        yield line, min(at, len(head))
        last = not line if nrrd else _field(line, nrrd=False)[0] == "ElementDataFile"
        if last:
            return


def _field(line: str, *, nrrd: bool) -> tuple[str, str]:
    """Returns a line's name and value; no name of a comment or a pair of NRRD's."""
    name, *value = re.split(":" if nrrd else "[=:]", line, maxsplit=1)
    if not value or line.startswith("#") or value[0].startswith("="):
        return "", ""
    return (name.strip().lower() if nrrd else name.strip()), value[0].strip()


def _decoded(line: bytes) -> str:
    """Returns a line's text: a micro sign is two bytes in UTF-8, one in Latin-1."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _check_nrrd(path: pathlib.Path, fields: dict[str, str], end: int) -> None:
    for number, (line, _) in enumerate(_lines(path), 1):
        free = re.match(r"#|content:|[^:]*:=", line, re.IGNORECASE)
        if not free and len(line.encode()) > _NRRD_LONGEST:
            reason = f"line {number} of its header has {len(line)} characters"
            raise files.damaged(path, ValueError(reason))
    named = fields.get("data file", fields.get("datafile", ""))
    if re.search("%.*d", named):
        _check_pattern(path, named)
    if fields.get("encoding", "").lower() in ("ascii", "text", "txt"):
        beside = path.parent / named
        source, start = (beside, 0) if named else (path, end)
        if os.path.isfile(source) and _has_long_word(source, start):
            raise files.damaged(path, ValueError("its text holds more than numbers"))


def _has_long_word(path: pathlib.Path, start: int) -> bool:
    """Whether a text has a word of no number's length, which NrrdIO would repeat."""
    if path.stat().st_size <= start:
        return False
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
        return _LONG_WORD.search(text, start) is not None


def _check_meta(path: pathlib.Path, fields: dict[str, str]) -> None:
    _check_meta_lines(path)
    for name in _META_NEEDED:
        if name not in fields:  # of which MetaIO prints more than a sentence
            raise files.damaged(path, ValueError(f"its header lacks {name}"))
    kind, claimed = fields["ElementType"], fields["NDims"]
    if kind.removesuffix("_ARRAY") not in _META_TYPES:
        # ITK has memory for a byte each, where MetaIO writes 512 of a MET_STRING.
        reason = f"its ElementType is {kind[:40]}, of which no image is"
        raise files.damaged(path, ValueError(reason))
    if not (claimed.isdecimal() and 1 <= int(claimed) <= 10):
        raise files.damaged(path, ValueError(f"its header claims {claimed} axes"))
    n = int(claimed)
    wanted = {name: n for name in (*META_SIZE, *META_OFFSET)}
    wanted |= {name: n * n for name in META_TURN}
    if "ElementSpacing" in fields:
        del wanted["ElementSize"]  # of no consequence
    for name in sorted(wanted.keys() & fields.keys()):
        numbers = [_number(part) for part in fields[name].split()[: wanted[name]]]
        if len(numbers) < wanted[name] or not np.isfinite(numbers).all():
            reason = f"its {name} is not of {wanted[name]} finite numbers"
            raise files.damaged(path, ValueError(reason))
    if "%" in fields["ElementDataFile"]:
        _check_pattern(path, fields["ElementDataFile"])


def _check_meta_lines(path: pathlib.Path) -> None:
    seen = set()
    for line, _ in _lines(path):
        name, value = _field(line, nrrd=False)
        if name in _META_TEXTS and len(value.encode()) > _META_LONGEST:
            reason = f"its {name} has {len(value)} characters"
            raise files.damaged(path, ValueError(reason))
        if name in seen and name in _CHECKED:  # whichever of them MetaIO takes
            raise files.damaged(path, ValueError(f"its header gives {name} twice"))
        seen.add(name)


_CHECKED = {*_META_NEEDED, *_META_TEXTS, *META_SIZE, *META_OFFSET, *META_TURN}


def _check_pattern(path: pathlib.Path, named: str) -> None:
    """Checks a pattern of names and its first, last and step: both print by it."""
    pattern, *numbers = named.split()
    whole = all(re.fullmatch(r"-?\d{1,9}", number) for number in numbers)
    still = whole and len(numbers) > 2 and int(numbers[2]) == 0
    if not _PATTERN.fullmatch(pattern) or not whole or still:
        reason = f"{named[:40]} is no pattern of file names, as slice%03d.raw 1 9 1"
        raise files.damaged(path, ValueError(reason))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
