"""A cache of preprocessed volumes on disk, by the hash of what they were made from.

An entry is a .npy file with a footer that NumPy does not look at: JSON with notes, the
type of the voxels and checksums. Several processes may share a folder: entries are
written under another name and renamed, whoever comes last wins, and both wrote the
same. The cache is a convenience: when it cannot be written, work goes on without.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import files

VERSION = 1
"""Part of every entry's name: raise it when preprocessing gives other numbers."""

DETACHED = (".nhdr", ".mhd")
"""Formats whose voxels lie in a second file: the hash of the first is not enough."""

_MAGIC = b"JXRGC001"
_TAIL = struct.Struct("<QL8s")
"""At the end of an entry: length and CRC-32 of the footer's JSON, and _MAGIC."""

_STALE_S = 3600.0
"""A temporary file this old was left behind by a process that was killed."""
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, struct.error)


@dataclasses.dataclass
class Cache:
    """A folder of arrays, each under a name made of what it depends on.

    Attributes:
      folder: where; made when first written to. Read-only will do for reading.
      limit_bytes: the least recently used entries go when there are more; None for as
        many as the disk takes.
      reserve_bytes: of the disk, left free for others, such as checkpoints.
    """

    folder: pathlib.Path
    limit_bytes: int | None = None
    reserve_bytes: int = 2**30

    def __post_init__(self):
        """Starts with no digest and no verified entry."""
        self.folder = pathlib.Path(self.folder)
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}
        self._verified: dict[str, tuple[int, int]] = {}
        self._writable = True

    def digest(self, path: files.PathLike, what: str = "file") -> str:
        """Returns the SHA-256 of a file, remembered by path, size and time of change.

        The file is read again only if size or time of change differ.

        Args:
          path: the file.
          what: its role in a message, e.g. "image".

        Raises:
          UserError: it is missing or unreadable.
        """
        path = os.path.abspath(path)
        try:
            stamp = _stamp(os.stat(path))
        except OSError:
            stamp = _stamp(files.check_readable(path, what).stat())
        known = self._digests.get(path)
        if known is None or known[0] != stamp:
            known = stamp, self._remembered(path, stamp) or self._hashed(path, what)
            self._digests[path] = known
        return known[1]

    def read(self, name: str, out: np.ndarray) -> dict[str, Any] | None:
        """Reads an entry into `out`.

        The checksum is compared when this process first meets a version of the entry,
        size and header every time.

        Args:
          name: see `entry_name`.
          out: C-contiguous; the entry has as many voxels and any type.

        Returns:
          The entry's notes, or None if there is no such entry or it is damaged; then
          `out` may have been written to.

        Raises:
          ValueError: `out` is not C-contiguous.
        """
        if not out.flags.c_contiguous:
            raise ValueError("out is not C-contiguous")
        path = self._entry(name)
        try:
            with open(path, "rb", buffering=0) as file:
                stamp = _stamp(os.fstat(file.fileno()))
                first = self._verified.get(name) != stamp
                notes = _read_entry(file, out, verify=first)
        except FileNotFoundError:
            return None
        except _DAMAGE:  # rebuilt by the caller, which replaces it
            return None
        self._verified[name] = stamp
        self._use(path, stamp)
        return notes

    def has(self, name: str) -> bool:
        """Returns whether there is an entry, and moves it to the end of the queue."""
        path = self._entry(name)
        try:
            self._use(path, _stamp(path.stat()))
        except OSError:
            return False
        return True

    def write(
        self, name: str, array: np.ndarray, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Writes an entry, whole or not at all, and evicts others to make room.

        When the disk is full or cannot be written, a warning says so once and nothing
        more is written by this process.

        Args:
          name: see `entry_name`.
          array: any shape and plain type.
          notes: what JSON can hold, handed back by `read`.
        """
        if not self._writable:
            return
        array = np.ascontiguousarray(array)
        head, footer = _head_and_footer(array, notes or {})
        path = self._entry(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(head) + array.nbytes + len(footer))
            with (
                files.atomic_path(path) as temporary,
                open(temporary, "wb") as file,
            ):
                for part in (head, array.data, footer):
                    file.write(part)
        except (OSError, UserError) as error:
            self._stop(error)

    def _entry(self, name: str) -> pathlib.Path:
        return self.folder / "entries" / f"{name}.npy"

    def _use(self, path: pathlib.Path, stamp: tuple[int, int]) -> None:
        if self.limit_bytes is not None:
            # The time of access is the place in the queue, whether or not the file
            # system keeps it; the time of change stays the version.
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), stamp[1]))

    def _note(self, path: str) -> pathlib.Path:
        name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()
        return self.folder / "index" / f"{name[:32]}.json"

    def _remembered(self, path: str, stamp: tuple[int, int]) -> str | None:
        try:
            note = json.loads(self._note(path).read_bytes())
            size, changed = note["stamp"]
            digest = note["sha256"]
        except _DAMAGE:
            return None
        same = (size, changed) == stamp and note.get("path") == path
        return digest if same and isinstance(digest, str) else None

    def _hashed(self, path: str, what: str) -> str:
        file = files.check_readable(path, what)
        try:
            before = _stamp(file.stat())
            digest = files.sha256(file)
            after = _stamp(file.stat())
        except OSError as error:
            raise UserError(
                f"{what} {path} cannot be read ({error.strerror}); check the disk or "
                "network folder that holds it"
            ) from error
        if before == after and self._writable:
            note = {"path": path, "stamp": before, "sha256": digest}
            try:
                target = self._note(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                with files.atomic_path(target) as temporary:
                    temporary.write_text(json.dumps(note))
            except (OSError, UserError) as error:
                self._stop(error)
        return digest

    def _make_room(self, size: int) -> None:
        """Removes the least recently used entries, and what killed processes left."""
        if shutil.disk_usage(self.folder).free < size + self.reserve_bytes:
            raise UserError(
                f"less than {(size + self.reserve_bytes) / 2**30:.1f} GiB are free"
            )
        if self.limit_bytes is None:
            return
        if size > self.limit_bytes:
            raise UserError(
                f"one volume has {size / 1e9:.3f} GB, the limit is "
                f"{self.limit_bytes / 1e9:.3f} GB"
            )
        entries = []
        with os.scandir(self.folder / "entries") as found:
            for entry in found:
                with contextlib.suppress(OSError):  # another process removed it
                    status = entry.stat()
                    if not entry.name.startswith("."):
                        entries.append((status.st_atime_ns, status.st_size, entry.path))
                    elif time.time() - status.st_mtime > _STALE_S:
                        os.unlink(entry.path)
        excess = sum(entry[1] for entry in entries) + size - self.limit_bytes
        for _, freed, path in sorted(entries):
            if excess <= 0:
                return
            # Who is reading it keeps the open file; Windows refuses, then it stays.
            with contextlib.suppress(OSError):
                os.unlink(path)
                excess -= freed

    def _stop(self, error: BaseException) -> None:
        if self._writable:
            self._writable = False
            warnings.warn(
                f"the cache {self.folder} takes no more volumes ({error}); going on "
                "without, which preprocesses the others each time",
                stacklevel=4,
            )


def entry_name(fields: Mapping[str, Any]) -> str:
    """Returns the name of an entry that depends on these JSON values and `VERSION`."""
    text = json.dumps({**fields, "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _head_and_footer(
    array: np.ndarray, notes: Mapping[str, Any]
) -> tuple[bytes, bytes]:
    head = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(head, fields)
    text = json.dumps(
        {
            "head": zlib.crc32(head.getvalue()),
            "dtype": array.dtype.str,
            "crc32": zlib.crc32(array.data),
            "notes": dict(notes),
        }
    ).encode()
    return head.getvalue(), text + _TAIL.pack(len(text), zlib.crc32(text), _MAGIC)


def _read_entry(file: BinaryIO, out: np.ndarray, *, verify: bool) -> dict[str, Any]:
    """Returns the notes of an open entry whose voxels it reads into `out`.

    Raises:
      one of _DAMAGE: the file is not what `Cache.write` wrote, or of other voxels.
    """
    end = os.fstat(file.fileno()).st_size
    file.seek(max(0, end - _TAIL.size))
    length, check, magic = _TAIL.unpack(file.read())
    if magic != _MAGIC or length > end - _TAIL.size:
        raise ValueError("no entry, or truncated")
    file.seek(end - _TAIL.size - length)
    text = file.read(length)
    if zlib.crc32(text) != check:
        raise ValueError("another checksum of the footer")
    footer = json.loads(text)
    dtype = np.dtype(footer["dtype"])
    begin = end - _TAIL.size - length - out.size * dtype.itemsize
    file.seek(max(0, begin))
    target = out if dtype == out.dtype else np.empty(out.shape, dtype)
    _fill(file, target)
    file.seek(0)
    if begin <= 0 or zlib.crc32(file.read(begin)) != footer["head"]:
        raise ValueError("another checksum of the header, or other voxels")
    if verify and zlib.crc32(target.data) != footer["crc32"]:
        raise ValueError("another checksum")
    if target is not out:
        out[...] = target
    return dict(footer["notes"])


def _fill(file: Any, target: np.ndarray) -> None:
    view = target.reshape(-1).view(np.uint8).data
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("truncated")
        view = view[count:]
