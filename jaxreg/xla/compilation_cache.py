"""The cache of compiled programs that outlives a process."""

import contextlib
import contextvars
import glob
import hashlib
import os
import pathlib
import platform
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import platformdirs

from jaxreg.errors import UserError

SWITCH = "JAXREG_COMPILATION_CACHE"
_LIMIT_GB = 10.0
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
# Of many small programs each takes little to compile, and all together seconds.
_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_LEAST, _JAX_LEAST = _LEAST_SECONDS.lower(), 1.0
_ZSTD = b"\x28\xb5\x2f\xfd"
_UNREADABLE = re.compile(
    r"Error reading persistent compilation cache entry for '([^']+)'"
)
_IN_RUN = contextvars.ContextVar("in_run", default=False)


def keep() -> None:
    """Lets JAX keep compiled programs in the user's cache.

    A folder that $JAX_COMPILATION_CACHE_DIR or JAX's setting names stays as it is,
    and nothing is kept where $JAXREG_COMPILATION_CACHE is "off" or the folder cannot be
    made. Of what is there already, so many GB stay as this variable says, or 10: what
    was used last. JAX itself is not imported: what needs none stays quick.

    Raises:
      UserError: the variable says something else.
    """
    limit = _limit_bytes()
    # Not where its import is under way.
    config: Any = getattr(sys.modules.get("jax"), "config", None)
    if limit is None or _FOLDER in os.environ or getattr(config, _FOLDER.lower(), None):
        return
    compiled = pathlib.Path(platformdirs.user_cache_dir("jaxreg"), "compiled")
    folder = compiled / _machine()
    try:
        # Programs of the folder are run: nobody else may write there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    _evict(compiled, limit)
    if config is None:
        os.environ[_FOLDER] = str(folder)
        os.environ.setdefault(_LEAST_SECONDS, "0")
        return
    config.update(_FOLDER.lower(), str(folder))
    # A user who has set it has another than JAX's default.
    if _LEAST_SECONDS not in os.environ and getattr(config, _LEAST) == _JAX_LEAST:
        config.update(_LEAST, 0.0)


def _limit_bytes() -> float | None:
    """Returns how much may be kept; None for nothing."""
    said = os.environ.get(SWITCH, "").strip().lower()
    if said == "off":
        return None
    try:
        limit_gb = float(said) if said else _LIMIT_GB
    except ValueError:
        limit_gb = 0.0
    if not limit_gb > 0:
        raise UserError(
            f"the variable {SWITCH} is {said!r}, expected off, or how many GB of "
            "compiled programs are kept"
        )
    return 1e9 * limit_gb


def _evict(compiled: pathlib.Path, limit_bytes: float) -> None:
    """Removes the entries that were longest unused, until the rest has room.

    JAX's own limit (jax_compilation_cache_max_size) needs one more file beside each
    entry, and writes nothing more once that of any is missing: where the folder is
    older than the limit, or a run was killed between the two.

    Args:
      compiled: a folder with one for each kind of processor; another machine may be
        using one.
      limit_bytes: of all of them.
    """
    found = []
    for path in compiled.glob("*/*-cache"):
        with contextlib.suppress(OSError):  # removed just now by somebody else
            status = path.stat()
            # Some file systems do not note when a file was read, or once a day.
            used = max(status.st_atime, status.st_mtime)
            found.append((used, status.st_size, path))
    excess = sum(size for _, size, _ in found) - limit_bytes
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= size


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keeps compiled programs, see `keep`, and repairs what cannot be read of them.

    JAX writes in place, so that a kill or a full disk leaves half an entry; it warns of
    such a one at every start and never overwrites it. Here the warning, which comes
    before the program is compiled, removes the entry: JAX then writes it anew. Also a
    decorator.
    """
    keep()
    token = _IN_RUN.set(True)
    show, warned = warnings.showwarning, False

    def repairing(message, category, *rest, **more):
        nonlocal warned
        found = _UNREADABLE.search(str(message))
        if found is None or not _remove_damaged(found[1]):
            show(message, category, *rest, **more)
        elif not warned:
            warned = True
            show(
                UserWarning("damaged compiled programs are removed and compiled anew"),
                UserWarning, *rest, **more,
            )  # fmt: skip

    warnings.showwarning = repairing
    try:
        yield
    finally:
        _IN_RUN.reset(token)
        if warnings.showwarning is repairing:
            warnings.showwarning = show


def keeps() -> bool:
    """Whether this is inside `kept`."""
    return _IN_RUN.get()


def _remove_damaged(program: str) -> int:
    """Removes the cached entries of a program that cannot be read; returns how many.

    Where all can be decompressed, the damage is inside one of them, and all go.
    """
    config: Any = getattr(sys.modules.get("jax"), "config", None)
    folder = getattr(config, _FOLDER.lower(), None) or os.environ.get(_FOLDER)
    if not folder:
        return 0
    pattern = f"{glob.escape(program)}-*-cache"
    entries = [
        path
        for path in pathlib.Path(folder).glob(pattern)
        # Of another program, whose name goes on, there are more parts.
        if "-" not in path.name.removeprefix(f"{program}-").removesuffix("-cache")
    ]
    removed = 0
    for path in [path for path in entries if _is_damaged(path)] or entries:
        try:
            path.unlink()
        except OSError:  # somebody else's folder, or removed there just now
            continue
        removed += 1
    return removed


def _is_damaged(path: pathlib.Path) -> bool:
    """Whether an entry cannot be decompressed: by zlib, or zstd where it is there."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if content.startswith(_ZSTD):
        try:
            import zstandard  # pyright: ignore[reportMissingImports]
        except ImportError:
            return False
        decompress, error = zstandard.ZstdDecompressor().decompress, zstandard.ZstdError
    else:
        decompress, error = zlib.decompress, zlib.error
    try:
        decompress(content)
    except error:
        return True
    return False


def _machine() -> str:
    """Returns a name for this kind of processor.

    JAX takes programs of one processor for another's, which may not have all
    instructions: machines that share a home need separate folders.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    kinds = ("flags", "Features", "model name")
    warned = sorted({line for line in lines if line.startswith(kinds)} or set(lines))
    digest = hashlib.sha256("\n".join(warned).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
