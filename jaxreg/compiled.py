"""Compiled programs that outlive the process: the second start takes seconds."""

import hashlib
import os
import pathlib
import platform

import platformdirs

SWITCH = "JAXREG_COMPILATION_CACHE"
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
# Of many small programs each takes little to compile, and all together seconds.
_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep() -> None:
    """Lets JAX keep compiled programs in the user's cache, before it is imported.

    A folder that $JAX_COMPILATION_CACHE_DIR names stays as it is, and nothing is kept
    where $JAXREG_COMPILATION_CACHE is "off" or the folder cannot be made. JAX itself is
    not imported: what needs none stays quick.
    """
    off = os.environ.get(SWITCH, "").strip().lower() == "off"
    if off or _FOLDER in os.environ:
        return
    folder = pathlib.Path(platformdirs.user_cache_dir("jaxreg"), "compiled", _machine())
    try:
        # Programs of the folder are run: nobody else may write there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    os.environ[_FOLDER] = str(folder)
    os.environ.setdefault(_LEAST_SECONDS, "0")


def _machine() -> str:
    """Returns a name for this kind of processor.

    JAX takes programs of one processor for another's, which may lack instructions:
    machines that share a home need folders of their own.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    kinds = ("flags", "Features", "model name")
    told = sorted({line for line in lines if line.startswith(kinds)} or set(lines))
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
