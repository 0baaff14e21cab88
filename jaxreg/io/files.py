"""Files as such: whole or not at all, checked before work starts, hashed."""

import contextlib
import errno
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Sequence

from jaxreg.errors import UserError

PathLike = str | os.PathLike[str]

_COMPRESSED = (".gz", ".bz2", ".zst", ".xz")
# What the machine can do to a write in progress; anything else is a defect of ours.
_MACHINE_ERRORS = {
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
    if not path.exists():
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
    folder = path.parent
    if not folder.exists():
        raise UserError(
            f"{option} {path} is in a folder that does not exist; "
            f"create {folder} or name another place"
        )
    if not folder.is_dir():
        raise UserError(
            f"{option} {path} lies below {folder}, which is a file; name another place"
        )
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder, expected a file name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{option} {path} cannot be written: no permission to create files in "
            f"{folder}; name another place"
        )
    return path


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
    suffix = full_suffix(path)
    stem = path.name.removesuffix(suffix)
    temporary = path.with_name(f".{stem}-{secrets.token_hex(4)}{suffix}")
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
