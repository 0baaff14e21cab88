"""PyTorch's state dicts to Flax variables and back, given the entries of a table.

No weight is skipped or filled in: unknown, missing and misshapen tensors are refused
by name.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxreg.errors import UserError
from jaxreg.io.files import atomic_path
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import reader
from jaxreg.weights.pytorch.unpickle import Tensor

State = dict[str, np.ndarray]
"""PyTorch's names to host arrays in PyTorch's axis order."""
_Path = tuple[str, ...]
# D H W I O from PyTorch's O I D H W, and from its I O D H W for the transposed ones,
# whose taps stay in PyTorch's order: they are not flipped.
FROM_OI = (2, 3, 4, 1, 0)
FROM_IO = (2, 3, 4, 0, 1)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of one network, here and there.

    Attributes:
      key: PyTorch's name.
      path: collection, modules and leaf in our variables.
      torch_shape: PyTorch's shape.
      axes: for each of our axes, PyTorch's.
      is_count: whether this is a counter: int64 in the file, int32 in our variables.
    """

    key: str
    path: _Path
    torch_shape: tuple[int, ...]
    axes: tuple[int, ...] = (0,)
    is_count: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in our variables."""
        return tuple(self.torch_shape[axis] for axis in self.axes)


def tree_of(
    state: Mapping[str, np.ndarray],
    entries: Sequence[Entry],
    *,
    source: str,
    network: str,
) -> Variables:
    """Converts PyTorch's tensors to variables; see `TensorTable.to_variables`."""
    shapes = {entry.key: entry.torch_shape for entry in entries}
    _check(state, shapes, {e.key for e in entries if e.is_count}, source, network)
    variables: dict[str, Any] = {}
    for entry in entries:
        array = np.transpose(state[entry.key], entry.axes)
        dtype = np.int32 if entry.is_count else np.float32
        # A copy in C order: the file's memory is not kept alive by a view.
        put(variables, entry.path, np.array(array, dtype, order="C"))
    return variables


def state_of(
    variables: Variables,
    entries: Sequence[Entry],
    *,
    source: str,
    network: str,
) -> State:
    """Converts variables to PyTorch's tensors; see `TensorTable.from_variables`."""
    check_tree(variables, entries, source=source, network=network)
    leaves = dict(_leaves(variables))
    state = {}
    for entry in entries:
        array = np.asarray(leaves[entry.path])
        dtype = np.int64 if entry.is_count else np.float32
        array = np.transpose(array, np.argsort(entry.axes))
        state[entry.key] = np.array(array, dtype, order="C")
    return state


def check_tree(
    variables: Variables,
    entries: Sequence[Entry],
    *,
    source: str,
    network: str,
) -> None:
    """Checks that variables are those of the entries; see `check_variables`."""
    leaves = {"/".join(path): leaf for path, leaf in _leaves(variables)}
    shapes = {"/".join(entry.path): entry.shape for entry in entries}
    counts = {"/".join(entry.path) for entry in entries if entry.is_count}
    _check(leaves, shapes, counts, source, network)


def read_state_dict(
    path: str | os.PathLike[str], *, source: str | None = None
) -> State:
    """Reads a PyTorch file of plain tensors; no code in it is ever run.

    Half, bfloat16 and double tensors become float32 (doubles are rounded). A whole
    registration network is accepted as well as its `regis_net`: where every other name
    starts with `regis_net.`, that prefix is removed. Buffers called `identity_map`,
    which older versions of icon_registration store, are coordinates and are left out.
    No other name is changed or dropped. Of a training checkpoint, the entry
    "model_state_dict" or "state_dict" is read.

    Args:
      path: a file written by torch.save, in its zip or its older format.
      source: what to call the file in errors; its path if None.

    Returns:
      PyTorch's names to host arrays, in the order of the file.

    Raises:
      UserError: the file is missing, damaged, no PyTorch file or holds anything but
        tensors.
    """
    with reader.opened(path, source=source) as (content, load):
        # Beside the optimiser's, as PromptReg's; beside what is said of it, as SAM's.
        for wrapper in ("model_state_dict", "state_dict"):
            if isinstance(content, Mapping) and wrapper in content:
                content = content[wrapper]
        _check_content(source or str(path), content)
        state = {key: _as_float32(load(tensor)) for key, tensor in content.items()}
    return _strip(state)


def read_names(
    path: str | os.PathLike[str], entry: str, *, source: str | None = None
) -> tuple[str, ...]:
    """Returns names that a PyTorch file holds beside its tensors; () if it has none.

    Args:
      path: of a file that `read_state_dict` can read.
      entry: what they stand under, see `write_state_dict`.
      source: see `read_state_dict`.

    Raises:
      UserError: see `read_state_dict`.
    """
    with reader.opened(path, source=source) as (content, _):
        return _names(content, entry)


def _names(content: Any, entry: str) -> tuple[str, ...]:
    found = content.get(entry) if isinstance(content, Mapping) else None
    if not isinstance(found, list | tuple):
        return ()
    return tuple(found) if all(isinstance(name, str) for name in found) else ()


def write_state_dict(
    path: str | os.PathLike[str],
    state: Mapping[str, np.ndarray],
    *,
    wrapper: str | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes names and arrays as torch.save does, all at once or not at all.

    Args:
      path: the file to write; an existing one is replaced.
      state: PyTorch's names to arrays, in the order in which they are to be stored.
      wrapper: the file holds one entry of this name, which holds them.
      beside: further entries beside the wrapper's, of plain Python values.

    Raises:
      UserError: torch is not installed, or the file cannot be written.
    """
    torch = require_torch(f"write {path}")
    # np.array, since torch takes no read-only memory and JAX's arrays are read-only.
    tensors = {k: torch.from_numpy(np.array(v, order="C")) for k, v in state.items()}
    # Through a handle, since torch writes a path's name into the file.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        content = {wrapper: tensors, **(beside or {})} if wrapper else tensors
        torch.save(content, file)


def require_torch(purpose: str) -> Any:
    """Imports torch, which only writing weights in PyTorch's format needs.

    Args:
      purpose: what it is needed for, a verb with its object.

    Raises:
      UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'PyTorch is needed to {purpose}; run pip install "jaxreg[torch]"'
        ) from error
    return torch


_NAMED_MOST = 4


def _check(
    arrays: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    counts: set[str],
    source: str,
    network: str,
) -> None:
    """Raises UserError that names every kind of difference between got and expected."""
    unknown = [key for key in arrays if key not in shapes]
    missing = [key for key in shapes if key not in arrays]
    misshapen, mistyped, unusable = [], [], []
    for key in (key for key in shapes if key in arrays):
        array = np.asarray(arrays[key])
        kind = np.integer if key in counts else np.floating
        if array.shape != shapes[key]:
            got = f"{array.shape}, expected {shapes[key]}"
            misshapen.append(f"{key} of shape {got}")
        elif not np.issubdtype(array.dtype, kind) and array.dtype.name != "bfloat16":
            mistyped.append(f"{key} of type {array.dtype}")
        elif key in counts and not 0 <= array <= np.iinfo(np.int32).max:
            unusable.append(f"{key} = {array}")
        elif key not in counts and not np.isfinite(array).all():
            unusable.append(key)
    complaints = {
        "unknown": unknown,
        "missing": missing,
        "misshapen": misshapen,
        "of the wrong type": mistyped,
        "not finite or out of range": unusable,
    }
    if any(complaints.values()):
        text = "; ".join(
            f"{len(names)} {word}: {listed(names)}"
            for word, names in complaints.items()
            if names
        )
        raise UserError(
            f"{source} does not fit a {network} network of these sizes, tensors are "
            f"{text}; give the weights of that architecture"
        )


def _leaves(tree: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yields (path, leaf) of a nested mapping."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, child in tree.items():
        yield from _leaves(child, (*path, str(name)))


def put(tree: dict[str, Any], path: _Path, leaf: np.ndarray) -> None:
    """Puts a leaf into a tree that is still being built."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _check_content(source: str, content: Any) -> None:
    """Checks that a file holds one flat mapping of names to dense tensors."""
    if not isinstance(content, Mapping):
        raise UserError(
            f"{source} holds a {type(content).__name__}, expected a state dict of "
            "named tensors; save net.regis_net.state_dict()"
        )
    if {"state", "param_groups"} <= content.keys():
        raise UserError(
            f"{source} holds the state of an optimiser; give the network's weights, "
            "which finetuning writes beside it as network_weights_*.trch"
        )
    wrapped = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
    ]
    if wrapped:
        raise UserError(
            f"{source} is a training checkpoint with the entries {listed(content)}; "
            f"save the tensors alone: torch.save(checkpoint[{wrapped[0]!r}], path)"
        )
    other = [
        f"{key} ({type(value).__name__})"
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if other:
        raise UserError(
            f"{source} holds {len(other)} entries that are no plain tensors: "
            f"{listed(other)}; save net.regis_net.state_dict() alone"
        )


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Returns the array, float32 if it is of any floating type."""
    floating = jnp.issubdtype(array.dtype, np.floating)
    return array.astype(np.float32, copy=False) if floating else array


def _strip(state: State) -> State:
    """Leaves out identity maps and the prefix of a whole registration network."""
    state = {k: v for k, v in state.items() if k.split(".")[-1] != "identity_map"}
    whole = "regis_net."
    if all(key.startswith(whole) for key in state):
        return {key.removeprefix(whole): array for key, array in state.items()}
    return state


def listed(names: Iterable[Any]) -> str:
    """Returns the first few names, and how many more there are."""
    texts = [_shorten(str(name)) for name in names]
    more = f" and {len(texts) - _NAMED_MOST} more" if len(texts) > _NAMED_MOST else ""
    return ", ".join(texts[:_NAMED_MOST]) + more


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
