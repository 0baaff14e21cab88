"""Download of published weights into the user's cache."""

import http.client
import os
import pathlib
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable

import platformdirs

from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo
from jaxreg.weights.bundle import Bundle

CACHE_VARIABLE = "JAXREG_CACHE"

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int | None], None]
"""Called with the bytes received so far and, where it is known, how many there are."""


def cache_dir() -> pathlib.Path:
    """Returns the folder of fetched weights: $JAXREG_CACHE or the user's own cache."""
    folder = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("jaxreg")
    return pathlib.Path(folder).expanduser()


def cache_folder(folder: PathLike | None) -> pathlib.Path:
    """Returns the folder of fetched weights: the given one, or the user's."""
    return cache_dir() if folder is None else pathlib.Path(folder).expanduser()


def manual_steps(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where a user puts a file that could not be fetched."""
    return folder / f"{name}.trch"


def is_cached(name: str, folder: pathlib.Path) -> bool:
    """Whether a network can be loaded by its name without fetching anything."""
    return (folder / name).is_dir() or manual_steps(folder, name).is_file()


def fill_cache(
    name: str,
    folder: pathlib.Path,
    base_url: str | None,
    timeout_s: float,
    progress: Progress | None,
) -> Bundle:
    """Converts the file of a name, fetched unless it was put into the cache by hand."""
    card = zoo.ZOO[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a folder that you can write"
        ) from error
    by_hand, url = manual_steps(folder, name), zoo.url_of(card, base_url)
    if by_hand.exists():
        files.check_readable(by_hand, "the file of weights")
        bundle = zoo.published(card, by_hand, str(by_hand), f"{url}, put there by hand")
        bundle_lib.save_bundle(folder / name, bundle, replace=False)
        return bundle
    bundle_lib.check_checkpoint_path(folder / name)
    # A folder of its own, so that two processes at once stay out of each other's way.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
        file = pathlib.Path(temporary) / "fetched.trch"
        try:
            _download(url, file, timeout_s, progress)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or repr(error)
            code = getattr(error, "code", None)
            reason = f"HTTP {code} {reason}" if code else reason
            raise UserError(
                f"the weights of {name} are not in the cache and cannot be fetched "
                f"({reason}); download {url} and put it at {by_hand}, where "
                "jaxreg finds and converts it, or register without weights by "
                "`io_target` displacement"
            ) from error
        bundle = zoo.published(card, file, url, url)
    bundle_lib.save_bundle(folder / name, bundle, replace=False)
    return bundle


# Not pooch: what it would save, an adapter of its progress would cost again; requests,
# below it, does not read the system's certificates; and its sums are of published ones.
def _download(
    url: str, file: pathlib.Path, timeout_s: float, progress: Progress | None
) -> None:
    """Copies an address to a file; raises OSError when bytes are missing."""
    received = 0
    with (
        urllib.request.urlopen(url, timeout=timeout_s) as answer,
        open(file, "wb") as f,
    ):
        length = answer.headers.get("Content-Length")
        expected = None if length is None else int(length)
        while chunk := answer.read(1 << 20):
            received += len(chunk)
            f.write(chunk)
            if progress is not None:
                progress(received, expected)
    if expected is not None and received != expected:
        raise OSError(f"got {received} of {expected} bytes")
