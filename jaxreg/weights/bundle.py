"""Checkpoint folders: variables, config, preprocessing, source and licence.

    NAME/jaxreg.json   what the network is and where it came from
    NAME/variables/    the arrays, an Orbax checkpoint

A checkpoint appears under its name when it is complete, or not at all. Arrays come back
in host memory, whatever devices they were on when they were saved.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.former_names import present_names
from jaxreg.typing import Variables

DESCRIPTION = "jaxreg.json"
ARRAYS = "variables"
FORMAT = "jaxreg checkpoint"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What is needed to use a network again.

    Attributes:
      variables: {"params": ..., "batch_stats": ...}, nested mappings of arrays.
      model: kind of network, e.g. "gradicon".
      config: fields of the network's config, as JSON can hold them.
      preprocessing: what its input must look like, as JSON can hold it.
      source: where the weights came from.
      licence: under which terms they may be used.
    """

    variables: Variables
    model: str
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    source: str
    licence: str


def save_bundle(
    path: str | os.PathLike[str], bundle: Bundle, *, replace: bool = True
) -> None:
    """Writes a checkpoint folder, all at once or not at all.

    Args:
      path: the folder to write; the one above it must exist.
      bundle: what to write; arrays on devices are copied to the host.
      replace: whether a checkpoint of this name is replaced. Otherwise it stays and
        this one is dropped: two processes may fill one cache at the same time.

    Raises:
      UserError: something else stands at `path`, or it cannot be written.
    """
    path = pathlib.Path(path).absolute()
    check_checkpoint_path(path)
    tree = jax.tree.map(np.asarray, _plain(bundle.variables))
    # Anything JSON cannot hold is a mistake of the caller's, found before any work.
    description = _description(bundle) | {"checksum": tree_checksum(tree)}
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    try:
        with _temporary_sibling(path) as temporary:
            temporary.mkdir()
            with _checkpointer() as checkpointer:
                checkpointer.save(temporary / ARRAYS, tree)
            (temporary / DESCRIPTION).write_text(text, encoding="utf-8")
            _move_into_place(temporary, path, replace=replace)
    except OSError as error:
        raise UserError(
            f"the checkpoint {path} cannot be written ({error.strerror or error}); "
            "choose a writable place with enough room"
        ) from error


def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads a checkpoint folder.

    Args:
      path: a folder that `save_bundle` wrote.

    Returns:
      The bundle; its variables are NumPy arrays.

    Raises:
      UserError: the folder is missing, unfinished, damaged, of a newer format or no
        checkpoint of jaxreg.
    """
    path = pathlib.Path(path).absolute()
    fields = _read_description(path)
    arrays = path / ARRAYS
    damaged = f"the checkpoint {path} is unfinished or damaged"
    checksum = fields.pop("checksum")
    # Looked at here, since Orbax prints warnings before it fails.
    if not (arrays / "_METADATA").is_file():
        raise UserError(
            f"{damaged}: {ARRAYS}/_METADATA is missing; write or download it again"
        )
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.metadata(arrays).item_metadata
            if tree is None:
                raise ValueError("no metadata")
            # Without this Orbax asks for the devices that the arrays were saved from.
            on_host = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree.tree
            )
            variables = checkpointer.restore(arrays, restore_args=on_host)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise UserError(f"{damaged} ({reason}); write or download it again") from error
    if tree_checksum(variables) != checksum:
        raise UserError(
            f"{damaged}: its arrays do not have the checksum that they were saved "
            "with; write or download it again"
        )
    return Bundle(variables=variables, **fields)


def check_checkpoint_path(path: str | os.PathLike[str]) -> None:
    """Checks that a checkpoint could be written, before any work is done for it.

    Raises:
      UserError: the folder above is missing or not writable, or something that is no
        checkpoint stands at `path`.
    """
    path = pathlib.Path(path).absolute()
    if not os.path.isdir(path.parent):
        raise UserError(
            f"the checkpoint {path} cannot be written: there is no folder "
            f"{path.parent}; create it or choose another place"
        )
    if not os.access(path.parent, os.W_OK):
        raise UserError(
            f"the checkpoint {path} cannot be written: the folder {path.parent} is "
            "not writable; choose another place"
        )
    ours = os.path.isfile(path / DESCRIPTION)
    empty = os.path.isdir(path) and not any(path.iterdir())
    if os.path.exists(path) and not (ours or empty):
        raise UserError(
            f"{path} exists and is no jaxreg checkpoint, so it is not replaced; "
            "choose another name or remove it"
        )


def this_process() -> ocp.options.MultiprocessingOptions:
    """Makes Orbax wait for no other process."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"jaxreg{index}",
    )


def _checkpointer() -> ocp.Checkpointer:
    alone = this_process()
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        multiprocessing_options=alone,
    )


def _description(bundle: Bundle) -> dict[str, Any]:
    """Returns the content of the JSON file."""
    fields = {
        field.name: getattr(bundle, field.name)
        for field in dataclasses.fields(bundle)
        if field.name != "variables"
    }
    return {"format": FORMAT, "version": VERSION, **_plain(fields)}


def _read_description(path: pathlib.Path) -> dict[str, Any]:
    """Reads and checks the JSON file.

    Returns:
      The fields of Bundle besides the variables, and their checksum.
    """
    if not os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {what}, expected the folder of a jaxreg checkpoint")
    file = path / DESCRIPTION
    if not file.is_file():
        raise UserError(
            f"{path} is not a finished jaxreg checkpoint: it has no {DESCRIPTION}; "
            "give a folder that jaxreg wrote"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{file} cannot be read as JSON ({error}); write or download the "
            "checkpoint again"
        ) from error
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int) or content.get("format") != FORMAT:
        raise UserError(
            f"{file} does not describe a jaxreg checkpoint; give a folder that "
            "jaxreg wrote"
        )
    if version > VERSION:
        raise UserError(
            f"{file} is of format version {version}, this jaxreg reads up to "
            f"{VERSION}; install a newer jaxreg"
        )
    kinds = {"config": dict, "preprocessing": dict, "checksum": int}
    names = [f.name for f in dataclasses.fields(Bundle) if f.name != "variables"]
    names.append("checksum")
    wrong = [n for n in names if not isinstance(content.get(n), kinds.get(n, str))]
    if wrong:
        raise UserError(
            f"{file} lacks a usable {', '.join(wrong)}; write or download the "
            "checkpoint again"
        )
    if content["model"] in registry.kinds():
        kind = registry.kind_named(content["model"], str(file))
        content["config"] = present_names(kind, content["config"])
    return {name: content[name] for name in names}


def tree_checksum(tree: Any) -> int:
    """Returns the CRC-32 of all names, types, shapes and numbers.

    Orbax stores arrays without checksums: a changed byte would load as other weights.

    Args:
      tree: any tree of NumPy arrays.
    """
    checksum = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        checksum = zlib.crc32(name.encode(), checksum)
        octets = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        checksum = zlib.crc32(octets.data, checksum)
    return checksum


def _plain(tree: Any) -> Any:
    """Returns nested mappings as plain dicts, which JSON and Orbax store alike."""
    if isinstance(tree, Mapping):
        return {str(name): _plain(child) for name, child in tree.items()}
    return tree


@contextlib.contextmanager
def _temporary_sibling(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a free name beside `path`, on the same disk; removes what is left there.

    Not tempfile.mkdtemp, whose folders only their owner may read.
    """
    temporary = files.temporary_sibling(path, ".tmp")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(
    temporary: pathlib.Path, path: pathlib.Path, *, replace: bool
) -> None:
    """Renames a finished folder to its name, stepping over an older checkpoint."""
    try:
        # Takes the place of nothing and of an empty folder.
        temporary.rename(path)
        return
    except OSError:
        if not (path / DESCRIPTION).is_file():
            raise
    if not replace:
        return
    with _temporary_sibling(path) as older:
        path.rename(older)
        try:
            temporary.rename(path)
        except OSError:
            older.rename(path)
            raise
