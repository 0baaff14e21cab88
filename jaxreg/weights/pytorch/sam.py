"""SAM's PyTorch weights to Flax variables and back, by an explicit key table.

The released code saves {"state_dict", "meta"}, perhaps with its optimiser's state;
only the first is read. Names and shapes as version 2 of its repository has them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.errors import UserError
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.gradicon import FROM_OI
from jaxreg.weights.pytorch.state import Entry, State

_NAME = "SAM"
_STEM = (3, 7, 7)
_POINT = (1, 1, 1)
# Of the blocks of the four stages.
_KERNELS = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
_NORM = (
    ("weight", "params", "scale"),
    ("bias", "params", "bias"),
    ("running_mean", "batch_stats", "mean"),
    ("running_var", "batch_stats", "var"),
    ("num_batches_tracked", "batch_stats", "count"),
)


def entries(channels: Sequence[int], embedding: int) -> tuple[Entry, ...]:
    """Returns every tensor, in the order of the released file.

    Args:
      channels: of the four stages.
      embedding: channels of both embeddings.
    """
    return tuple(_all_entries(tuple(channels), embedding))


def _all_entries(channels: tuple[int, ...], embedding: int) -> Iterator[Entry]:
    below = channels[0]
    yield from _conv_norm("backbone.conv1", ("stem",), (below, 1, *_STEM))
    for stage, (size, width) in enumerate(
        zip(_KERNELS, channels, strict=True), start=1
    ):
        for block in (0, 1):
            key, path = f"backbone.layer{stage}.{block}", (f"stage_{stage}_{block}",)
            inputs = width if block else below
            for index, i in ((1, inputs), (2, width)):
                yield from _conv_norm(
                    f"{key}.conv{index}", (*path, f"conv_{index}"), (width, i, *size)
                )
            if block == 0:
                yield from _conv_norm(
                    f"{key}.downsample", (*path, "shortcut"), (width, inputs, *_POINT)
                )
        below = width
    for index, width in enumerate(channels[:3]):
        yield from _conv(
            f"neck.lateral_convs.{index}",
            f"lateral_{index}",
            (embedding, width, *_POINT),
        )
    cube = (embedding, embedding, 3, 3, 3)
    yield from _conv("neck.fpn_convs.0", "fine", cube)
    shape = (embedding, channels[3], *_POINT)
    yield from _conv("read_out_head.lateral_convs.0", "lateral_coarse", shape)
    yield from _conv("read_out_head.fpn_convs.0", "coarse", cube)


def _conv_norm(key, path, shape) -> Iterator[Entry]:
    """A convolution without bias, and its normalisation."""
    inner = ("backbone", *path)
    kernel = ("params", *inner, "conv", "kernel")
    yield Entry(f"{key}.conv.weight", kernel, shape, FROM_OI, False)
    for tensor, collection, leaf in _NORM:
        is_count = leaf == "count"
        yield Entry(
            f"{key}.bn.{tensor}",
            (collection, *inner, "norm", leaf),
            () if is_count else shape[:1],
            () if is_count else (0,),
            is_count,
        )


def _conv(key, name, shape) -> Iterator[Entry]:
    kernel, bias = (("params", name, leaf) for leaf in ("kernel", "bias"))
    yield Entry(f"{key}.conv.weight", kernel, shape, FROM_OI, False)
    yield Entry(f"{key}.conv.bias", bias, shape[:1], (0,), False)


def read_config(
    state: Mapping[str, np.ndarray], *, source: str = "the state dict"
) -> dict[str, Any]:
    """Reads the fields of SamConfig off the tensors.

    Args:
      state: PyTorch's names to arrays.
      source: what the arrays came from, for the error.

    Returns:
      channels and embedding; form and precision are no matter of the tensors.

    Raises:
      UserError: the tensors are not those of a SAM network.
    """
    keys = [f"backbone.layer{stage}.1.conv2.bn.weight" for stage in (1, 2, 3, 4)]
    keys.append("read_out_head.fpn_convs.0.conv.bias")
    absent = [key for key in keys if len(np.shape(state.get(key, 0))) != 1]
    if absent:
        raise UserError(
            f"{source} has no {absent[0]}; expected the tensors of a {_NAME} network "
            "(the state_dict of its released checkpoint); give the weights of that "
            "architecture"
        )
    *channels, embedding = (len(state[key]) for key in keys)
    return {"channels": tuple(channels), "embedding": embedding}


def to_variables(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the state dict",
) -> Variables:
    """Converts PyTorch's tensors to the variables of models.sam.

    Args:
      state: the released code's names to arrays. The counters of batch normalisation
        may be absent as a whole, as older files have it, and are zero then.
      config: not looked at, the tensors say it all.
      source: what the arrays came from, for the error.

    Returns:
      {"params": ..., "batch_stats": ...} of host arrays, float32 and (counters) int32.

    Raises:
      UserError: tensors are unknown, missing, misshapen, of the wrong type or not
        finite; they are named.
    """
    del config
    table = entries(**read_config(state, source=source))
    counts = [entry.key for entry in table if entry.is_count]
    if not any(key in state for key in counts):
        state = {**state, **dict.fromkeys(counts, np.zeros((), np.int64))}
    return state_lib.tree_of(state, table, source=source, network=_NAME)


def from_variables(
    variables: Variables,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> State:
    """Converts variables of models.sam to PyTorch's tensors.

    Args:
      variables: {"params": ..., "batch_stats": ...} of host or device arrays.
      config: not looked at, the variables say it all.
      source: what the variables came from, for the error.

    Returns:
      The released code's names, in its order and with the counters, to float32 and
      (counters) int64 host arrays.

    Raises:
      UserError: leaves are unknown, missing, misshapen or of the wrong type.
    """
    del config
    table = entries(**variable_sizes(variables, source=source))
    return state_lib.state_of(variables, table, source=source, network=_NAME)


def check_variables(
    variables: Variables,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> None:
    """Checks that variables are exactly those of a SAM network.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      config: the fields of SamConfig, whose sizes must be these; any if None.
      source: what the variables came from, for the error.

    Raises:
      UserError: leaves are unknown, missing, misshapen, of the wrong type or not
        finite; they are named.
    """
    sizes = variable_sizes(variables, source=source)
    if config is not None:
        sizes = {name: config.get(name, size) for name, size in sizes.items()}
    state_lib.check_tree(variables, entries(**sizes), source=source, network=_NAME)


def write(path: str | os.PathLike[str], variables: Variables) -> None:
    """Writes variables of models.sam as a released checkpoint is laid out.

    Args:
      path: the file to write; an existing one is replaced.
      variables: {"params": ..., "batch_stats": ...}.

    Raises:
      UserError: see `from_variables` and `state.write_state_dict`.
    """
    state = from_variables(variables)
    state_lib.write_state_dict(path, state, wrapper="state_dict", beside={"meta": {}})


def variable_sizes(variables: Variables, *, source: str) -> dict[str, Any]:
    """Reads channels and embedding off variables.

    Raises:
      UserError: the variables are not those of a SAM network.
    """
    try:
        params = variables["params"]
        kernels = [
            params["backbone"][f"stage_{stage}_1"]["conv_2"]["conv"]["kernel"]
            for stage in (1, 2, 3, 4)
        ]
        channels = tuple(np.shape(kernel)[4] for kernel in kernels)
        return {"channels": channels, "embedding": len(params["coarse"]["bias"])}
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{source} does not hold the variables of a {_NAME} network "
            f"({error} is missing or misshapen)"
        ) from error
