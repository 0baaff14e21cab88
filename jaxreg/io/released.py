"""Published PyTorch weights to Flax variables and back, by an explicit key table.

A `.trch` file is what `torch.save(net.regis_net.state_dict())` writes: one flat mapping
of names to tensors. `GRADICON` says for every kind of tensor in it where it lives in
our variables, which shape it must have and how its axes move. No weight is skipped or
filled in: unknown, missing and misshapen tensors are refused by name. Names
and shapes as unigradicon 1.0.6 and icon_registration 1.1.9 store them.
"""

import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import torch_file
from jaxreg.io.files import atomic_path
from jaxreg.io.torch_file import Tensor
from jaxreg.typing import Variables

State = dict[str, np.ndarray]
"""PyTorch's names to host arrays in PyTorch's axis order."""
_Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor, here and there.

    Attributes:
      layer: PyTorch's name of the layer inside its UNet.
      tensor: PyTorch's name of the tensor inside the layer.
      path: collection, module and leaf in our variables; the step comes second.
      shape: PyTorch's shape; a word is a channel count of the level (see `_channels`).
      axes: for each of our axes, PyTorch's.
    """

    layer: str
    tensor: str
    path: tuple[str, str, str]
    shape: tuple[int | str, ...]
    axes: tuple[int, ...] = (0,)

    @property
    def is_count(self) -> bool:
        """Whether this is a counter: int64 in the file, int32 in our variables."""
        return not self.shape


_KERNEL_3 = (3, 3, 3)
_KERNEL_4 = (4, 4, 4)
# D H W I O from PyTorch's O I D H W, and from its I O D H W for the transposed ones,
# whose taps stay in PyTorch's order: they are not flipped.
FROM_OI = (2, 3, 4, 1, 0)
FROM_IO = (2, 3, 4, 0, 1)

# Rows of one layer stand together, in the order in which PyTorch stores them; a layer
# with {level} repeats for every level before the next layer begins.
GRADICON = (
    Row(
        "downConvs.{level}",
        "weight",
        ("params", "down_{level}", "kernel"),
        ("down_out", "down_in", *_KERNEL_3),
        FROM_OI,
    ),
    Row("downConvs.{level}", "bias", ("params", "down_{level}", "bias"), ("down_out",)),
    Row(
        "upConvs.{level}",
        "weight",
        ("params", "up_{level}", "kernel"),
        ("up_in", "up_out", *_KERNEL_4),
        FROM_IO,
    ),
    Row("upConvs.{level}", "bias", ("params", "up_{level}", "bias"), ("up_out",)),
    Row(
        "batchNorms.{level}", "weight", ("params", "norm_{level}", "scale"), ("up_out",)
    ),
    Row("batchNorms.{level}", "bias", ("params", "norm_{level}", "bias"), ("up_out",)),
    Row(
        "batchNorms.{level}",
        "running_mean",
        ("batch_stats", "norm_{level}", "mean"),
        ("up_out",),
    ),
    Row(
        "batchNorms.{level}",
        "running_var",
        ("batch_stats", "norm_{level}", "var"),
        ("up_out",),
    ),
    Row(
        "batchNorms.{level}",
        "num_batches_tracked",
        ("batch_stats", "norm_{level}", "count"),
        (),
        (),
    ),
    Row(
        "lastConv",
        "weight",
        ("params", "last", "kernel"),
        (3, "last_in", *_KERNEL_3),
        FROM_OI,
    ),
    Row("lastConv", "bias", ("params", "last", "bias"), (3,)),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of one network: `Row` with its names and numbers filled in."""

    key: str
    path: _Path
    torch_shape: tuple[int, ...]
    axes: tuple[int, ...]
    is_count: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in our variables."""
        return tuple(self.torch_shape[axis] for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class _Structure:
    """The four fields of GradIconConfig, checked."""

    channels_down: tuple[int, ...]
    channels_up: tuple[int, ...]
    halvings: int
    refinements: int


def gradicon_prefixes(halvings: int, refinements: int) -> tuple[str, ...]:
    """Returns PyTorch's key prefix of every UNet, in order of execution.

    `halvings` times the network so far moves into the first child of a two-step module,
    one resolution down, and `refinements` times at the same resolution; the new UNet is
    the second child. (2, 1) is the released network, (2, 0) its first training stage.
    """
    prefixes = ["net."]
    for inner in ["netPhi.net."] * halvings + ["netPhi."] * refinements:
        prefixes = [inner + prefix for prefix in prefixes] + ["netPsi.net."]
    return tuple(prefixes)


def gradicon_entries(config: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Returns every tensor of a GradICON network, in the order of its PyTorch file.

    Args:
      config: the fields of GradIconConfig; lists, as JSON has them, are welcome, and
        fields that do not change the tensors are not looked at.

    Raises:
      UserError: the fields are not those of a GradICON network.
    """
    structure = _structure(config)
    levels = len(structure.channels_up)
    entries = []
    prefixes = gradicon_prefixes(structure.halvings, structure.refinements)
    for step, prefix in enumerate(prefixes, start=1):
        for layer, group in itertools.groupby(GRADICON, key=lambda row: row.layer):
            rows = tuple(group)
            for level in range(levels if "{level}" in layer else 1):
                channels = _channels(structure, level)
                entries += [
                    _entry(row, f"step_{step}", prefix, level, channels) for row in rows
                ]
    return tuple(entries)


def gradicon_config(
    state: Mapping[str, np.ndarray], *, source: str = "the state dict"
) -> dict[str, Any]:
    """Reads the fields of GradIconConfig off the tensors.

    A number that several tensors show is the one most of them show, so that
    `to_variables` can name the odd one out.

    Args:
      state: PyTorch's names to arrays.
      source: what the arrays came from, for the error.

    Returns:
      channels_down (input first, one more than levels), channels_up, halvings,
      refinements; plain tuples and integers.

    Raises:
      UserError: the tensors are not those of a GradICON network.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, array in state.items():
        match = re.fullmatch(
            r"(.*?)((?:downConvs|upConvs|batchNorms|lastConv)\..+)", key
        )
        if match:
            found.setdefault(match[1], {})[match[2]] = np.shape(array)
    halvings, refinements = _nearest_nesting(found, state, source)
    unets = [
        found[prefix]
        for prefix in gradicon_prefixes(halvings, refinements)
        if prefix in found
    ]
    levels = _vote(
        len({name.split(".")[1] for name in unet if name.startswith("downConvs.")})
        for unet in unets
    )
    if not levels:
        raise UserError(f"{source} has no downConvs tensors; {_EXPECTED_NETWORK}")
    down, up = [0] * (levels + 1), [0] * levels
    for level in range(levels):
        convolution = f"downConvs.{level}"
        down[level + 1] = _vote(
            _sizes(unets, {f"{convolution}.weight": 0, f"{convolution}.bias": 0})
        )
        up[level] = _vote(
            _sizes(
                unets,
                {
                    f"upConvs.{level}.weight": 1,
                    f"upConvs.{level}.bias": 0,
                    f"batchNorms.{level}.weight": 0,
                    f"batchNorms.{level}.bias": 0,
                },
            )
        )
    last_in = _vote(_sizes(unets, {"lastConv.weight": 1}))
    down[0] = _vote(_sizes(unets, {"downConvs.0.weight": 1})) or last_in - up[0]
    return {
        "channels_down": tuple(down),
        "channels_up": tuple(up),
        "halvings": halvings,
        "refinements": refinements,
    }


def to_variables(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    source: str = "the state dict",
) -> Variables:
    """Converts PyTorch's tensors to the variables of models.gradicon.

    Args:
      state: PyTorch's names to arrays, as `read_state_dict` returns them.
      config: the fields of GradIconConfig, e.g. from `gradicon_config`.
      source: what the arrays came from, for the error.

    Returns:
      {"params": ..., "batch_stats": ...} of host arrays, float32 and (counters) int32.

    Raises:
      UserError: tensors are unknown, missing, misshapen, of the wrong type or not
        finite; they are named.
    """
    return tree_of(state, gradicon_entries(config), source=source)


def from_variables(
    variables: Variables,
    config: Mapping[str, Any],
    *,
    source: str = "the checkpoint",
) -> State:
    """Converts variables of models.gradicon to PyTorch's tensors.

    Args:
      variables: {"params": ..., "batch_stats": ...} of host or device arrays.
      config: the fields of GradIconConfig.
      source: what the variables came from, for the error.

    Returns:
      PyTorch's names, in the order in which PyTorch stores them, to float32 and
      (counters) int64 host arrays.

    Raises:
      UserError: leaves are unknown, missing, misshapen or of the wrong type.
    """
    return state_of(variables, gradicon_entries(config), source=source)


def check_variables(
    variables: Variables, config: Mapping[str, Any], *, source: str = "the checkpoint"
) -> None:
    """Checks that variables are exactly those of a GradICON network.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      config: the fields of GradIconConfig.
      source: what the variables came from, for the error.

    Raises:
      UserError: leaves are unknown, missing, misshapen, of the wrong type or not
        finite; they are named as collection/step/module/leaf.
    """
    check_tree(variables, gradicon_entries(config), source=source)


# --- any network, given the entries of its tensors -----------------------------------


def tree_of(
    state: Mapping[str, np.ndarray],
    entries: Sequence[Entry],
    *,
    source: str,
    network: str = "uniGradICON",
) -> Variables:
    """Converts PyTorch's tensors to variables; see `to_variables`."""
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
    network: str = "uniGradICON",
) -> State:
    """Converts variables to PyTorch's tensors; see `from_variables`."""
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
    network: str = "uniGradICON",
) -> None:
    """Checks that variables are exactly those of the entries; see `check_variables`."""
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
    with torch_file.opened(path, source=source) as (content, load):
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
    with torch_file.opened(path, source=source) as (content, _):
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


_EXPECTED_NETWORK = (
    "expected the tensors of a uniGradICON network "
    "(net.regis_net.state_dict()); give the weights of that architecture"
)
_NAMED_MOST = 4
_MOST_UNETS = 16


def _structure(config: Mapping[str, Any]) -> _Structure:
    """Returns the checked fields of GradIconConfig."""
    fields = [field.name for field in dataclasses.fields(_Structure)]
    if not set(fields) <= set(config):
        raise UserError(
            f"the network's config has the fields {sorted(config)}, expected at least "
            f"{sorted(fields)}; the checkpoint belongs to another model or version"
        )
    down, up = tuple(config["channels_down"]), tuple(config["channels_up"])
    numbers = (*down, *up, config["halvings"], config["refinements"])
    whole = all(isinstance(n, int | np.integer) and n >= 0 for n in numbers)
    if not whole or len(down) != len(up) + 1 or not up or min(*down, *up) < 1:
        raise UserError(
            f"the network's config is {dict(config)}, expected positive channel counts "
            "with one more in channels_down than in channels_up"
        )
    if config["halvings"] + config["refinements"] >= _MOST_UNETS:
        raise UserError(
            f"the network's config is {dict(config)}, expected at most {_MOST_UNETS} "
            "UNets"
        )
    return _Structure(down, up, int(config["halvings"]), int(config["refinements"]))


def _channels(structure: _Structure, level: int) -> dict[str, int]:
    """Returns the channel counts of a level by the words that `Row.shape` uses."""
    down, up = structure.channels_down, structure.channels_up
    deepest = level == len(up) - 1
    return {
        "down_in": down[level],
        "down_out": down[level + 1],
        # The level below hands up its own output and its skip connection.
        "up_in": down[level + 1] + (0 if deepest else up[level + 1]),
        "up_out": up[level],
        "last_in": up[0] + down[0],
    }


def _entry(
    row: Row, step: str, prefix: str, level: int, channels: Mapping[str, int]
) -> Entry:
    collection, module, leaf = row.path
    return Entry(
        key=f"{prefix}{row.layer.format(level=level)}.{row.tensor}",
        path=(collection, step, module.format(level=level), leaf),
        torch_shape=tuple(channels[n] if isinstance(n, str) else n for n in row.shape),
        axes=row.axes,
        is_count=row.is_count,
    )


def _nearest_nesting(
    found: Mapping[str, Any], state: Mapping[str, Any], source: str
) -> tuple[int, int]:
    """Returns (halvings, refinements) whose prefixes differ least from those found.

    The nearest rather than the equal one, so that a network without one of its UNets is
    answered with the names of what is missing.
    """
    best: tuple[int, tuple[int, int]] | None = None
    for count in range(1, min(len(found) + 1, _MOST_UNETS) + 1):
        for refinements in range(count):
            nesting = (count - 1 - refinements, refinements)
            expected = set(gradicon_prefixes(*nesting))
            distance = len(expected ^ set(found))
            if expected & set(found) and (best is None or distance < best[0]):
                best = (distance, nesting)
    if best is None:
        names = _list(state) if state else "no tensors"
        hint = ""
        if state and all(key.startswith("module.") for key in state):
            hint = "; it was saved through DataParallel: save net.module's state dict"
        raise UserError(f"{source} has {names}; {_EXPECTED_NETWORK}{hint}")
    return best[1]


def _sizes(
    unets: Iterable[Mapping[str, tuple[int, ...]]], axes: Mapping[str, int]
) -> Iterator[int]:
    """Yields the size along an axis of each named tensor that has this axis."""
    for unet in unets:
        for name, axis in axes.items():
            if len(unet.get(name, ())) > axis:
                yield unet[name][axis]


def _vote(numbers: Iterable[int]) -> int:
    """Returns the most frequent number, or 0 where there is none."""
    return next((n for n, _ in collections.Counter(numbers).most_common(1)), 0)


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
            f"{len(names)} {word}: {_list(names)}"
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
            f"{source} is a training checkpoint with the entries {_list(content)}; "
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
            f"{_list(other)}; save net.regis_net.state_dict() alone"
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


def _list(names: Iterable[Any]) -> str:
    """Returns the first few names, and how many more there are."""
    texts = [_shorten(str(name)) for name in names]
    more = f" and {len(texts) - _NAMED_MOST} more" if len(texts) > _NAMED_MOST else ""
    return ", ".join(texts[:_NAMED_MOST]) + more


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
