"""PromptReg's and RDP's tensors in PyTorch's files.

The released code saves {"epoch", "model_state_dict", "optimizer_state_dict"}; only the
second is read. Tensors that its network stores and never uses, or whose values cannot
change its output, live in the collection "unused", so that a file survives the way
here and back; a network trained here has none of them, and gets zeros when exported.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.state import FROM_IO, FROM_OI, Entry, State
from jaxreg.weights.pytorch.table import TensorTable

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
        yield Entry(f"{name}.{key}", (*_GENERATOR, leaf), shape, _PROMPT)
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
    yield Entry(f"{key}.weight", (collection, *path, "kernel"), shape, axes)
    yield Entry(f"{key}.bias", (collection, *path, "bias"), (outputs,))


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


_NAME = "PromptReg"
_RELEASED = {
    "slope": 0.01,
    "temperature": 0.5,
    "readout": "pooled_attention",
    "static_block": True,
}
"""What the released code computes whatever the tensors say."""


class _Table(TensorTable[Sizes]):
    """The pyramid of the released code, with a bank of prompts or without.

    Attributes:
      prompted: whether there is a bank.
    """

    network = _NAME
    wrapper = "model_state_dict"

    def __init__(self, *, prompted: bool):
        self.prompted = prompted

    def owns(self, state: Mapping[str, Any]) -> bool:
        with_bank = any(key.startswith("prompt_generator.") for key in state)
        pyramid = any(key.startswith("encoder_moving.") for key in state)
        return with_bank if self.prompted else pyramid and not with_bank

    def plain(self, state: Mapping[str, np.ndarray], *, source: str) -> State:
        """Returns the tensors without grids of voxel indices, which say nothing."""
        return {key: array for key, array in state.items() if not _is_buffer(key)}

    def sizes_of(self, state: Mapping[str, np.ndarray], *, source: str) -> Sizes:
        first = np.shape(state.get("encoder_moving.conv0.conv.weight", ()))
        bank = np.shape(state.get("prompt_generator.static_prompt", ()))
        prompted = any(key.startswith("prompt_") for key in state)
        if len(first) != 5 or (prompted and len(bank) != 5):
            raise UserError(
                f"{source} has no encoder_moving.conv0.conv.weight or, for its "
                "prompts, no prompt_generator.static_prompt; give the "
                "model_state_dict of a PromptReg or RDP network"
            )
        if prompted != self.prompted:
            raise UserError(
                f"{source} has {'a' if prompted else 'no'} prompt bank; give `model` "
                f"{'promptreg' if prompted else 'rdp'}"
            )
        grid = (bank[2], bank[3], bank[4]) if prompted else (1, 1, 1)
        return Sizes(first[0], first[1], bank[0] if prompted else 0, grid)

    def variable_sizes(
        self, variables: Variables, config: Mapping[str, Any], *, source: str
    ) -> Sizes:
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

    def config_fields(self, sizes: Sizes) -> dict[str, Any]:
        """See `TensorTable`; temperature and forms are the released code's."""
        found = {"channels": sizes.channels, "image_channels": sizes.image_channels}
        return found | ({"tasks": sizes.tasks} if sizes.tasks else {})

    def entries(self, sizes: Sizes) -> Iterator[Entry]:
        """Returns every tensor, in the order of the released file, without grids."""
        return _all_entries(sizes)

    def preprocessing(self, variables: Variables) -> dict[str, Any]:
        """Returns the released code's, on the grid that the bank is made for.

        160^3 without a bank.
        """
        sizes = self.variable_sizes(variables, {}, source="the weights")
        grid = sizes.grid if sizes.tasks else (20, 20, 20)
        return {
            **ResamplingRule("aligned", "ijk").to_dict(),
            "ct_window": [-1024.0, 1024.0],
            "mri_quantiles": [0.01, 0.99],
            "shape": [n * _DIVISOR for n in grid],
        }

    def check_exportable(self, config: Mapping[str, Any], *, source: str) -> None:
        """Checks that a network has the released forms.

        Raises:
          UserError: it has another.
        """
        other = [
            f"{name} {value}"
            for name, value in config.items()
            if name in _RELEASED and value != _RELEASED[name]
        ]
        if other:
            raise UserError(
                f"{source} has {', '.join(other)}, which the released code cannot hold "
                f"({', '.join(f'{n} {v}' for n, v in _RELEASED.items())}); train with "
                "these to export"
            )

    def completed(self, variables: Variables, entries: Sequence[Entry]) -> Variables:
        """Returns the variables with zeros for what has no effect, if it is absent."""
        tree = {name: dict(leaves) for name, leaves in variables.items()}
        for entry in entries:
            if entry.path[0] == "unused" and "unused" not in variables:
                state_lib.put(tree, entry.path, np.zeros(entry.shape, np.float32))
        return tree

    def held(
        self, entries: Sequence[Entry], variables: Variables, config: Mapping[str, Any]
    ) -> Sequence[Entry]:
        """Returns the entries that networks of these forms have."""
        absent = set()
        if config.get("readout", "pooled_attention") == "spatial":
            absent |= {"value", "out"}
        if not config.get("static_block", True):
            absent |= {"static"}
        return [
            entry
            for entry in entries
            if (entry.path[0] == "params" or "unused" in variables)
            and not (entry.path[:3] == _GENERATOR and entry.path[3] in absent)
        ]

    def buffers(self, sizes: Sizes) -> State:
        """Returns the grids of voxel indices that files with a bank hold."""
        found: State = {}
        if not sizes.tasks:
            return found
        shape = [n * _DIVISOR for n in sizes.grid]
        for name, middle in (("warp", ""), ("diff", "transformer.")):
            for level in range(4):
                axes = [np.arange(n // 2**level, dtype=np.float32) for n in shape]
                grid = np.stack(np.meshgrid(*axes, indexing="ij"))[None]
                found[f"{name}.{level}.{middle}grid"] = grid
        return found


PROMPTREG, RDP = _Table(prompted=True), _Table(prompted=False)
