"""Files: atomic writing, checks before work starts, reading of compressed bytes."""

import contextlib
import errno
import hashlib
import math
import os
import pathlib
import secrets
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal

import numpy as np

from jaxreg.errors import UserError

PathLike = str | os.PathLike[str]
Wrapper = Literal["gzip", "zlib"]
"""What is around deflated data."""

_COMPRESSED = (".gz", ".bz2", ".zst", ".xz")
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error)
"""What reading a damaged file may raise, besides what its format's library has."""

_CHUNK = 2**20
_NAME_BYTES = 255  # NAME_MAX of the usual file systems
_STEM_BYTES = 40
GZIP = b"\x1f\x8b"
MOST_PACKED = 1040
"""Bytes that one compressed byte can hold: 1032 of deflate, and what is around it."""
# What the machine can do to a write in progress; anything else is a defect of ours.
_MACHINE_ERRORS = {
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}


def full_suffix(path: PathLike) -> str:
    """Returns the extension as written, with what a compression adds: ".nii.gz"."""
    path = pathlib.Path(path)
    suffix = path.suffix
    if suffix.lower() in _COMPRESSED:
        suffix = pathlib.Path(path.stem).suffix + suffix
    return suffix


def scan_name(path: PathLike) -> str:
    """Returns a scan's folder and file, the same wherever its dataset lies."""
    return "/".join(pathlib.Path(path).parts[-2:])


def check_readable(
    path: PathLike, what: str = "file", *, limit_bytes: int | None = None
) -> pathlib.Path:
    """Checks that a file can be opened for reading, before any work.

    Args:
      path: the file.
      what: its role in the sentence: "image", "transform", ...
      limit_bytes: the largest size accepted; any if None.

    Returns:
      The path.

    Raises:
      UserError: it is missing, a folder, empty, unreadable or too large.
    """
    path = pathlib.Path(path)
    if not os.path.exists(path):  # Path.exists raises on a name that is too long
        raise UserError(f"{what} {path} does not exist; check the path")
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder, expected a file; name one file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} {path} cannot be read; check its permissions")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{what} {path} is empty (0 bytes); write or fetch it again")
    if limit_bytes is not None and size > limit_bytes:
        raise UserError(
            f"{what} {path} has {size} bytes, at most {limit_bytes} are expected; "
            "check that it is the right file"
        )
    return path


def check_writable(
    path: PathLike, option: str = "output", *, suffixes: Sequence[str] = ()
) -> pathlib.Path:
    """Checks that a file can be written, before any work; writes nothing.

    Args:
      path: the file to be.
      option: what to call it in the sentence, e.g. "--transform-out".
      suffixes: the extensions that it may have, in small letters, the usual one first;
        any if empty.

    Returns:
      The path.

    Raises:
      UserError: its folder is missing, no folder or read-only, or the path is a folder
        or has another extension.
    """
    path = pathlib.Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(
            f"{option} {path} has the extension {path.suffix or '(none)'}, expected "
            f"{suffixes[0]}; rename it"
        )
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _NAME_BYTES:
        raise UserError(
            f"{option} {path} has a name of {longest} bytes, at most {_NAME_BYTES} are "
            "possible; shorten it"
        )
    folder = path.parent
    if not os.path.exists(folder):
        raise UserError(
            f"{option} {path} is in a folder that does not exist; "
            f"create {folder} or name another place"
        )
    if not os.path.isdir(folder):
        raise UserError(
            f"{option} {path} lies below {folder}, which is a file; name another place"
        )
    if os.path.isdir(path):
        raise UserError(f"{option} {path} is a folder, expected a file name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{option} {path} cannot be written: no permission to create files in "
            f"{folder}; name another place"
        )
    return path


def claim(path: pathlib.Path, name: str, taken: dict[pathlib.Path, str]) -> None:
    """Claims a file for an output.

    Args:
      path: the file.
      name: of the output, for messages.
      taken: whose each file is, by its path; the new one is added.

    Raises:
      UserError: the file is claimed already.
    """
    whose = taken.setdefault(path.resolve(), name)
    if whose != name:
        raise UserError(f"{name} {path} is also {whose}; name another file")


def damaged(path: PathLike, error: BaseException) -> UserError:
    """Returns the sentence about a file that its format's reader gave up on."""
    if isinstance(error, FileNotFoundError):  # since it was checked
        return UserError(f"{path} does not exist any more; put it back")
    return UserError(
        f"{path} cannot be read, it may be truncated or of another format "
        f"({last_line(error)}); write or fetch it again"
    )


def too_large(path: PathLike, size: int) -> UserError:
    """Returns the sentence about a file that memory does not hold."""
    return UserError(
        f"{path} needs {size / 2**30:.1f} GiB of memory, more than there is; resample "
        "it or use a machine with more"
    )


def available_bytes() -> float:
    """Returns how much memory a process may still take; infinite where unknown."""
    found = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        meminfo = pathlib.Path("/proc/meminfo").read_text("ascii")
        found = 1024.0 * int(meminfo.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # a container's; "max" if none
        found = min(found, float(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def check_memory(path: PathLike, size: int) -> None:
    """Checks that memory holds so many bytes, which Linux promises and never gives.

    Raises:
      UserError: it does not.
    """
    if size > available_bytes():
        raise too_large(path, size)


def last_line(error: BaseException) -> str:
    """Returns the last line of an error's text, or its kind if it has none."""
    text = str(error).strip().splitlines()
    return text[-1].strip().rstrip(".") if text else type(error).__name__


def inflated(
    file: BinaryIO, path: PathLike, *, wrapper: Wrapper = "gzip"
) -> Iterator[bytes]:
    """Yields what compressed data hold, in parts of up to 1 MiB, to their very end.

    The checksum and the length behind the data are compared, which a reader that stops
    at the last byte it needs never does. Members of a gzip follow one another; zeros
    behind them are padding; a warning says when something else follows.

    Args:
      file: open for reading, at the first compressed byte.
      path: its name in the warning.
      wrapper: what is around the deflated data.

    Raises:
      zlib.error: the data or their checksum are wrong.
      EOFError: they end too early.

    References:
      RFC 1950 (zlib), RFC 1952 (gzip).
    """
    wbits = {"gzip": 31, "zlib": 15}[wrapper]
    member = zlib.decompressobj(wbits)
    packed = file.read(_CHUNK)
    while True:
        part = member.decompress(packed, _CHUNK)
        if part:
            yield part
        if member.eof:
            packed = _after_zeros(member.unused_data, file)
            if wrapper == "gzip" and packed.startswith(GZIP):
                member = zlib.decompressobj(wbits)
                continue
            if packed:
                warnings.warn(
                    f"{path}: what follows the end of its compressed data is left out",
                    stacklevel=2,
                )
            return
        packed = member.unconsumed_tail or file.read(_CHUNK)
        if not packed and not part:
            raise EOFError("its compressed data end too early")


def read_bytes(
    path: PathLike,
    size: int,
    *,
    start: int = 0,
    skip: int = 0,
    wrapper: Wrapper | None = None,
) -> np.ndarray:
    """Reads so many bytes, compressed or not, once and into memory of just that size.

    Compressed data are read to their end, so that their checksum counts. A warning says
    when more follows than was requested.

    Args:
      path: the file.
      size: how many bytes; as claimed by a header, perhaps wrongly.
      start: the byte of the file where the data begin.
      skip: how many bytes of the data, uncompressed, come before those wanted.
      wrapper: what is around compressed data; None if they are as they are.

    Returns:
      uint8, (size,).

    Raises:
      UserError: the file ends too early, is damaged, or there is not enough memory.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            file.seek(start)
            there = path.stat().st_size - start
            if skip + size > there * (MOST_PACKED if wrapper else 1):
                raise EOFError(
                    f"its header claims {size} bytes of voxels, {there} bytes are left"
                )
            check_memory(path, size)
            flat = np.empty(size, np.uint8)
            if wrapper is not None:
                more = _fill(flat, skip, inflated(file, path, wrapper=wrapper))
            else:
                file.seek(skip, os.SEEK_CUR)
                if file.readinto(flat.data) != size:
                    raise EOFError("it ends before its last voxel")
                more = there - skip - size
    except MemoryError as error:
        raise too_large(path, size) from error
    except READ_ERRORS as error:
        raise damaged(path, error) from error
    if more > 0:
        warnings.warn(
            f"{path}: {more} bytes follow the voxels that its header speaks of; check "
            "that its size is right",
            stacklevel=2,
        )
    return flat


def _fill(flat: np.ndarray, skip: int, parts: Iterator[bytes]) -> int:
    """Fills `flat` from byte `skip` of the parts on; returns how many are left over."""
    seen, end = 0, skip + flat.size
    for part in parts:
        low, high = max(skip - seen, 0), min(end - seen, len(part))
        if low < high:
            at = seen + low - skip
            flat[at : at + high - low] = np.frombuffer(part, np.uint8)[low:high]
        seen += len(part)
        if seen > 2 * end + 64 * _CHUNK:  # a checksum that nobody wants to wait for
            raise ValueError("it holds far more than its header says")
    if seen < end:
        raise EOFError("it ends before its last voxel")
    return seen - end


def _after_zeros(rest: bytes, file: BinaryIO) -> bytes:
    """Returns what follows, from the first byte that is not 0 on; two bytes or more."""
    rest = rest.lstrip(b"\0")
    while len(rest) < 2 and (more := file.read(_CHUNK)):
        rest = (rest + more).lstrip(b"\0")
    return rest


def check_to_be_made(folder: pathlib.Path, name: str) -> None:
    """Checks that a folder that is missing can be made; makes nothing.

    Args:
      folder: to be made.
      name: what to call it in the sentence.

    Raises:
      UserError: it cannot be made.
    """
    there = next(path for path in folder.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{name} {folder} cannot be made in {there}; name another place"
        )


def make_folder(path: PathLike, option: str = "folder") -> pathlib.Path:
    """Makes a folder and those above it, if they are missing.

    Args:
      path: the folder.
      option: what to call it in the sentence, e.g. "--out-dir".

    Returns:
      The path.

    Raises:
      UserError: it cannot be made.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be made: {error.strerror}; name another place"
        ) from error
    return path


def temporary_sibling(path: PathLike, suffix: str = "") -> pathlib.Path:
    """Returns a free name beside `path`, hidden, for what is not finished.

    It begins as the file's own and is short, so that no name that the file system takes
    is too long for it.

    Args:
      path: the file or folder to be.
      suffix: what the name ends in.
    """
    path = pathlib.Path(path)
    stem = os.fsencode(path.name.removesuffix(suffix))[:_STEM_BYTES]
    # A character cut in two is left out.
    begin = stem.decode("utf-8", errors="ignore")
    return path.with_name(f".{begin}-{secrets.token_hex(8)}{suffix}")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` that takes its place on success.

    The temporary name ends in the same full suffix (".nii.gz"), because writers choose
    the format by it. Nothing exists there yet. When the block raises, what was written
    is removed and an earlier file at `path` stays as it was.

    Args:
      path: the file to be, replaced if it exists.

    Raises:
      UserError: the folder is missing or cannot be written, or the disk fails.
    """
    path = check_writable(path)
    temporary = temporary_sibling(path, full_suffix(path))
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _MACHINE_ERRORS:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; name another place"
            ) from error
        raise
    finally:
        _remove(temporary)


def sha256(path: PathLike) -> str:
    """Returns the SHA-256 digest of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
