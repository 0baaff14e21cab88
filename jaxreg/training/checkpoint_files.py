"""The files of one checkpoint: its description, its arrays, their checksums.

STEP/state/            the arrays, an Orbax checkpoint, one array per leaf
STEP/record/metadata   JSON: the caller's record, names, shapes, checksums
"""

import gc
import json
import math
import pathlib
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxreg.errors import UserError
from jaxreg.io.files import atomic_path
from jaxreg.weights.bundle import this_process, tree_checksum

FORMAT = "jaxreg run"
VERSION = 1
STATE = "state"
RECORD = "record"

# What Orbax and TensorStore raise on files that are cut or changed.
_READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError)


class DamagedError(Exception):
    """A checkpoint that cannot be used; the message names its folder and the reason."""

    def __init__(self, path: pathlib.Path, reason: str):
        """Names the checkpoint's folder, and what is wrong with it."""
        super().__init__(f"the checkpoint {path} is unfinished or damaged ({reason})")


def settle() -> None:
    """Waits for late failures of a read or write, while nothing is printed of them."""
    time.sleep(0.1)
    gc.collect()


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name: "params/step_1/down_0/kernel"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    if len(named) < len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def host_copy(tree: Any) -> dict[str, np.ndarray]:
    """Returns copies by name: on the CPU a view would share a donated buffer."""
    return {
        name: np.array(leaf)
        for name, leaf in named_leaves(jax.device_get(tree)).items()
    }


def _kind(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """Returns type and shape of an array, an abstract one or a number."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), tuple(leaf.shape)


def describe(
    step: int, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the JSON content of a checkpoint, with its checksum."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        **fields,
        "leaves": {name: list(_kind(leaf)) for name, leaf in arrays.items()},
        "arrays_checksum": tree_checksum(arrays),
    }
    return content | {"checksum": _text_checksum(content)}


def write_description(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Replaces the JSON content of a checkpoint, all at once or not at all."""
    # As it will be read: JSON knows no tuples, and the checksum is of its text.
    content = json.loads(json.dumps(content))
    text = json.dumps(content | {"checksum": _text_checksum(content)})
    with atomic_path(path / RECORD / "metadata") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _text_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON content of a checkpoint and checks it against its checksum."""
    file = path / RECORD / "metadata"
    short = f"{RECORD}/{file.name}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedError(path, f"{short} is missing") from error
    except (OSError, ValueError) as error:
        raise DamagedError(path, f"{short} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(path, f"{short} does not describe a training run")
    checksum = content.pop("checksum", None)
    if checksum != _text_checksum(content):
        raise DamagedError(
            path, f"{short} does not have the checksum it was saved with"
        )
    if content["version"] > VERSION:
        raise UserError(
            f"the checkpoint {path} is of format version {content['version']}, this "
            f"jaxreg reads up to {VERSION}; install a newer jaxreg"
        )
    if path.name != str(content["step"]):
        raise DamagedError(path, f"it was saved at step {content['step']}")
    return content


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads and checks a checkpoint; returns its arrays by name and its record."""
    content = read_description(path)
    leaves = content["leaves"]
    on_host = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        for name, (_, shape) in leaves.items()
        if math.prod(shape)
    }
    alone = this_process()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            stored = checkpointer.restore(
                path / STATE, args=ocp.args.PyTreeRestore(restore_args=on_host)
            )
        arrays = {
            name: stored[name] if name in on_host else np.zeros(shape, kind)
            for name, (kind, shape) in leaves.items()
        }
        checksum = tree_checksum(arrays)
    except _READ_ERRORS as error:
        settle()
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise DamagedError(path, f"{STATE} cannot be read: {reason}") from error
    if checksum != content["arrays_checksum"]:
        raise DamagedError(
            path, "its arrays do not have the checksum they were saved with"
        )
    return arrays, content["record"]


def fit(arrays: Mapping[str, np.ndarray], like: Any, path: pathlib.Path) -> Any:
    """Returns the arrays in the structure of `like`."""
    wanted = named_leaves(like)
    differing = [
        f"{name} is {_text(arrays.get(name))} there, {_text(wanted.get(name))} here"
        for name in {**wanted, **arrays}
        if name not in arrays
        or name not in wanted
        or _kind(arrays[name]) != _kind(wanted[name])
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"the checkpoint {path} does not fit this run: {'; '.join(differing[:3])}"
            f"{more}; use the configuration that it was saved with"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[n] for n in wanted])


def _text(leaf: Any) -> str:
    if leaf is None:
        return "missing"
    kind, shape = _kind(leaf)
    return f"{kind} {shape}"
