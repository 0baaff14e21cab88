"""PromptReg's PyTorch weights to Flax variables and back, by an explicit key table.

The released code saves {"epoch", "model_state_dict", "optimizer_state_dict"}; only the
second is read. Tensors that its network stores and never uses, or whose values cannot
change its output, live in the collection "unused", so that a file survives the way
here and back; a network trained here has none of them, and gets zeros when exported.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxreg.errors import UserError
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.gradicon import FROM_IO, FROM_OI
from jaxreg.weights.pytorch.state import Entry, State

_DIVISOR = 8  # of the network grid by the bank's
_PROMPT = (0, 2, 3, 4, 1)
_GENERATOR = ("params", "bottleneck", "generator")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of all tensors follow from.

    Attributes:
      channels: c of the finest level.
      image_channels: of each image.
      tasks: Z, rows of the bank; 0 for a pyramid without prompts (RDP).
      grid: of the bank, D H W.
    """

    channels: int
    image_channels: int
    tasks: int
    grid: tuple[int, int, int]


def sizes_of(state: Mapping[str, np.ndarray], *, source: str) -> Sizes:
    """Reads the sizes off the tensors.

    Raises:
      UserError: the tensors are not those of a PromptReg network.
    """
    first = np.shape(state.get("encoder_moving.conv0.conv.weight", ()))
    bank = np.shape(state.get("prompt_generator.static_prompt", ()))
    prompted = any(key.startswith("prompt_") for key in state)
    if len(first) != 5 or (prompted and len(bank) != 5):
        raise UserError(
            f"{source} has no encoder_moving.conv0.conv.weight or, for its prompts, no "
            "prompt_generator.static_prompt; give the model_state_dict of a PromptReg "
            "or RDP network"
        )
    grid = (bank[2], bank[3], bank[4]) if prompted else (1, 1, 1)
    return Sizes(first[0], first[1], bank[0] if prompted else 0, grid)


def entries(sizes: Sizes, *, unused: bool = True) -> tuple[Entry, ...]:
    """Returns every tensor, in the order of the released file, without the grids.

    Args:
      sizes: of the network.
      unused: whether to name the tensors that have no effect.
    """
    found = tuple(_all_entries(sizes))
    return found if unused else tuple(e for e in found if e.path[0] == "params")


def _all_entries(sizes: Sizes) -> Iterator[Entry]:
    c = sizes.channels
    if sizes.tasks:
        yield from _prompts(8 * c, sizes)
        yield from _blocks("prompt_fusion_layer", ("bottleneck", "fuse"), 16 * c, 8 * c)
    for name in ("encoder_moving", "encoder_fixed"):
        yield from _conv(
            f"{name}.conv0.conv", (name, "block_1", "conv"), sizes.image_channels, c
        )
        for level in (2, 3, 4):
            width = c * 2 ** (level - 1)
            yield from _conv(
                f"{name}.conv{level - 1}.0", (name, f"down_{level}"), width // 2, width
            )
            yield from _conv(
                f"{name}.conv{level - 1}.1.block.2",
                (name, f"residual_{level}"),
                width,
                width,
            )
    yield from _blocks("cconv_4", ("join_4",), 16 * c, 8 * c)
    yield from _conv("defconv4", ("head_4",), 8 * c, 3)
    yield from _blocks("dconv4", ("refine_4",), 24 * c, 8 * c)
    below = 8 * c
    for level in (3, 2, 1):
        width = c * 2 ** (level - 1)
        path = (f"up_{level}", "conv")
        yield from _layer(
            f"upconv{level}.upconv", path, (below, width, 4, 4, 4), FROM_IO
        )
        below = 3 * width
        yield from _blocks(f"cconv_{level}.conv", (f"join_{level}",), below, below)
        yield from _conv(f"defconv{level}", (f"head_{level}",), below, 3)
        if level > 1:
            yield from _conv(
                f"dconv{level}.conv", (f"refine_{level}", "conv"), below, width
            )


def _prompts(k: int, sizes: Sizes) -> Iterator[Entry]:
    name = "prompt_generator"
    for key, leaf, rows in (
        ("static_prompt", "bank", sizes.tasks),
        ("prompt_template", "template", 1),
    ):
        shape = (rows, k, *sizes.grid)
        yield Entry(f"{name}.{key}", (*_GENERATOR, leaf), shape, _PROMPT, False)
    voxels = int(np.prod(sizes.grid))

    def block(layer, module, inputs, size=3):
        yield from _conv(
            f"{name}.{layer}", (*_GENERATOR[1:], module, "conv"), inputs, k, size
        )

    def linear(layer, path, inputs, outputs, collection):
        yield from _layer(
            f"{name}.{layer}", path, (outputs, inputs), (1, 0), collection
        )

    yield from block("dynamic_fusion.0", "dynamic_0", 2 * k)
    yield from block("dynamic_fusion.3", "dynamic_1", k)
    yield from linear("prompt_mlp.0", ("prompt_mlp_0",), voxels, 2 * k, "unused")
    yield from linear("prompt_mlp.2", ("prompt_mlp_2",), 2 * k, k, "unused")
    yield from block("conv.0", "static", k)
    yield from block("fusion.0", "join_0", 2 * k)
    yield from block("fusion.3", "join_1", k, 1)
    shape = (k, 2 * k, 1, 1, 1)
    yield from _layer(f"{name}.x_proj", ("x_proj",), shape, FROM_OI, "unused")
    for layer, path, collection in (
        ("q", ("query",), "unused"),
        ("k", ("key",), "unused"),
        ("v", (*_GENERATOR[1:], "value"), "params"),
        ("proj", (*_GENERATOR[1:], "out"), "params"),
    ):
        yield from linear(f"cross_attention.{layer}", path, k, k, collection)


def _layer(key, path, shape, axes, collection="params") -> Iterator[Entry]:
    """A layer's weight and bias; PyTorch's transposed kernels have I O in front."""
    outputs = shape[1] if axes == FROM_IO else shape[0]
    yield Entry(f"{key}.weight", (collection, *path, "kernel"), shape, axes, False)
    yield Entry(f"{key}.bias", (collection, *path, "bias"), (outputs,), (0,), False)


def _conv(key, path, inputs, outputs, size=3) -> Iterator[Entry]:
    return _layer(key, path, (outputs, inputs, size, size, size), FROM_OI)


def _blocks(key, path, inputs, outputs) -> Iterator[Entry]:
    for index, width in enumerate((inputs, outputs)):
        yield from _conv(
            f"{key}.{index}.conv", (*path, str(index), "conv"), width, outputs
        )


def _is_buffer(key: str) -> bool:
    """Whether a tensor is a grid of voxel indices, which says nothing."""
    parts = key.split(".")
    return parts[0] in ("warp", "diff") and parts[-1] == "grid"


def _buffers(sizes: Sizes) -> Iterator[tuple[str, np.ndarray]]:
    shape = [n * _DIVISOR for n in sizes.grid]
    for name, middle in (("warp", ""), ("diff", "transformer.")):
        for level in range(4):
            axes = [np.arange(n // 2**level, dtype=np.float32) for n in shape]
            grid = np.stack(np.meshgrid(*axes, indexing="ij"))[None]
            yield f"{name}.{level}.{middle}grid", grid


def read_config(
    state: Mapping[str, np.ndarray], *, source: str = "the state dict", kind: str
) -> dict[str, Any]:
    """Reads the fields of PromptRegConfig or RdpConfig off the tensors.

    Temperature and forms are not among them; they are the released code's.

    Args:
      state: PyTorch's names to arrays.
      source: what the arrays came from, for the error.
      kind: "promptreg" or "rdp".

    Raises:
      UserError: the tensors are not those of such a network.
    """
    sizes = sizes_of(state, source=source)
    if (kind == "promptreg") != bool(sizes.tasks):
        raise UserError(
            f"{source} has {'a' if sizes.tasks else 'no'} prompt bank; give --model "
            f"{'promptreg' if sizes.tasks else 'rdp'}"
        )
    found = {"channels": sizes.channels, "image_channels": sizes.image_channels}
    return found | ({"tasks": sizes.tasks} if sizes.tasks else {})


def network_shape(variables: Variables) -> tuple[int, int, int]:
    """Returns the network grid that a bank is made for; 160^3 without a bank."""
    sizes = variable_sizes(variables, source="the weights")
    d, h, w = sizes.grid if sizes.tasks else (20, 20, 20)
    return d * _DIVISOR, h * _DIVISOR, w * _DIVISOR


def to_variables(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the state dict",
) -> Variables:
    """Converts PyTorch's tensors to the variables of models.promptreg or models.rdp.

    Args:
      state: the released code's names to arrays; grids of indices are left out.
      config: not looked at, the tensors say it all.
      source: what the arrays came from, for the error.

    Returns:
      {"params": ..., "unused": ...} of float32 host arrays.

    Raises:
      UserError: tensors are unknown, missing, misshapen, of the wrong type or not
        finite; they are named.
    """
    del config
    state = {key: array for key, array in state.items() if not _is_buffer(key)}
    table = entries(sizes_of(state, source=source))
    return state_lib.tree_of(state, table, source=source, network=_NAME)


def from_variables(
    variables: Variables,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> State:
    """Converts variables of models.promptreg or models.rdp to PyTorch's tensors.

    Args:
      variables: {"params": ...} and perhaps "unused", of host or device arrays.
      config: fields of the network; the released code has the released forms alone.
      source: what the variables came from, for the error.

    Returns:
      The released code's names, grids of indices among them, to float32 host arrays.

    Raises:
      UserError: the network has a form that the released code has not, or leaves are
        unknown, missing, misshapen or of the wrong type.
    """
    other = [
        f"{name} {value}"
        for name, value in (config or {}).items()
        if name in _RELEASED and value != _RELEASED[name]
    ]
    if other:
        raise UserError(
            f"{source} has {', '.join(other)}, which the released code cannot hold "
            f"({', '.join(f'{n} {v}' for n, v in _RELEASED.items())}); train with "
            "these to export"
        )
    sizes = variable_sizes(variables, source=source)
    table = entries(sizes)
    tree = {name: dict(leaves) for name, leaves in variables.items()}
    for entry in table:
        if entry.path[0] == "unused" and "unused" not in variables:
            state_lib.put(tree, entry.path, np.zeros(entry.shape, np.float32))
    state = state_lib.state_of(tree, table, source=source, network=_NAME)
    return state | dict(_buffers(sizes)) if sizes.tasks else state


def check_variables(
    variables: Variables,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> None:
    """Checks that variables are exactly those of a PromptReg or RDP network.

    Args:
      variables: {"params": ...} and perhaps "unused".
      config: fields of the network; the released forms if None.
      source: what the variables came from, for the error.

    Raises:
      UserError: leaves are unknown, missing, misshapen, of the wrong type or not
        finite; they are named.
    """
    config = config or {}
    absent = set()
    if config.get("readout", "pooled_attention") == "spatial":
        absent |= {"value", "out"}
    if not config.get("static_block", True):
        absent |= {"static"}
    sizes = variable_sizes(variables, source=source)
    table = [
        entry
        for entry in entries(sizes, unused="unused" in variables)
        if not (entry.path[:3] == _GENERATOR and entry.path[3] in absent)
    ]
    state_lib.check_tree(variables, table, source=source, network=_NAME)


def variable_sizes(variables: Variables, *, source: str) -> Sizes:
    """Reads the sizes off variables.

    Raises:
      UserError: the variables are not those of a PromptReg or RDP network.
    """
    try:
        params = variables["params"]
        first = np.shape(params["encoder_moving"]["block_1"]["conv"]["kernel"])
        image, channels = first[3], first[4]
        if "bottleneck" not in params:
            return Sizes(channels, image, 0, (1, 1, 1))
        z, d, h, w, _ = np.shape(params["bottleneck"]["generator"]["bank"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{source} does not hold the variables of a {_NAME} network "
            f"({error} is missing or misshapen)"
        ) from error
    return Sizes(channels, image, z, (d, h, w))


_NAME = "PromptReg"
_RELEASED = {
    "slope": 0.01,
    "temperature": 0.5,
    "readout": "pooled_attention",
    "static_block": True,
}
"""What the released code computes whatever the tensors say."""
