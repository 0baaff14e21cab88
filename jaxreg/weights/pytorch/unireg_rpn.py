"""The released UniReg pyramid's PyTorch weights to Flax variables and back.

The released code saves {"model_state_dict", "arch", "name", "step", "epoch",
"metrics"}; only the first is read. Its names may carry the prefixes of the modules
around the network, which are removed. Files of the static pyramid also hold grids of
voxel indices, which say nothing and are left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxreg.errors import UserError
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.gradicon import FROM_OI
from jaxreg.weights.pytorch.state import Entry, State

_NAME = "UniReg (released pyramid)"
_TYPES = 2
_LEVELS = (4, 3, 2, 1)
_OUTPUTS = 3
_PREFIX = re.compile(r"^(?:module\.|base_model\.|net\.)+")
_GRID = re.compile(r"^transformer\.\d+\.grid$")
_FIRST = "encoder.block1.main.weight"
_CONTROLLER = "decoder1.dynamic_flow.controller.weight"
REGIONS = ("chest", "abdomen", "head", "liver", "cardiac", "brain")
"""What the columns of a released controller belong to, in this order."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of all tensors follow from.

    Attributes:
      channels: c of the finest level.
      image_channels: of each image.
      head: "dynamic" or "static".
      regions: body regions; 0 for static heads.
      hidden: channels inside a dynamic head; 0 for static heads.
    """

    channels: int
    image_channels: int
    head: Literal["dynamic", "static"]
    regions: int = 0
    hidden: int = 0

    def widths(self, level: int) -> tuple[int, int]:
        """Returns the channels of a level's features and of its decoder."""
        c = self.channels
        return min(2 ** (level - 1), 4) * c, (2 if level == 1 else 4) * c


def _hidden(count: int, inputs: int) -> int:
    """Returns the channels inside a head of `count` parameters: h, with
    ``h inputs + h h + 3 h`` weights and ``2 h + 3`` biases."""
    b = inputs + _OUTPUTS + 2
    return (math.isqrt(max(b * b + 4 * (count - _OUTPUTS), 0)) - b) // 2


def _sizes(
    first: tuple[int, ...], controller: tuple[int, ...] | None, source: str
) -> Sizes:
    """Reads the sizes off the shapes O I ... of two tensors.

    Raises:
      UserError: they are missing or do not fit each other.
    """
    if len(first) == 5 and controller is None:
        return Sizes(first[0], first[1], "static")
    if len(first) == 5 and controller is not None and len(controller) == 5:
        c, regions = first[0], controller[1] - first[0] - _TYPES
        hidden = _hidden(controller[0], c)
        if regions > 0 and hidden > 0:
            return Sizes(c, first[1], "dynamic", regions, hidden)
    raise UserError(
        f"{source} has no {_FIRST} or an unfit {_CONTROLLER} (shapes {first} and "
        f"{controller}); give the model_state_dict of a {_NAME} network"
    )


def sizes_of(state: Mapping[str, np.ndarray], *, source: str) -> Sizes:
    """Reads the sizes off the tensors, see `plain`.

    Raises:
      UserError: the tensors are not those of a released UniReg pyramid.
    """
    is_dynamic = any(".dynamic_flow." in key for key in state)
    controller = np.shape(state.get(_CONTROLLER, ())) if is_dynamic else None
    return _sizes(np.shape(state.get(_FIRST, ())), controller, source)


def variable_sizes(variables: Variables, *, source: str) -> Sizes:
    """Reads the sizes off variables.

    Raises:
      UserError: the variables are not those of a released UniReg pyramid.
    """
    try:
        params = variables["params"]
        first = np.shape(params["encoder"]["block_1"]["kernel"])
        controller = None
        if "head" in params["decoder_1"]:
            kernel = params["decoder_1"]["head"]["controller"]["kernel"]
            controller = np.shape(kernel)[::-1]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source} does not hold the variables of a {_NAME} network "
            f"({error} is missing or misshapen)"
        ) from error
    return _sizes(first[::-1], controller, source)


def entries(sizes: Sizes) -> tuple[Entry, ...]:
    """Returns every tensor, in the order of the released file, without the grids."""
    return tuple(_all_entries(sizes))


def _all_entries(sizes: Sizes) -> Iterator[Entry]:
    inputs = sizes.image_channels
    for level in sorted(_LEVELS):
        width, _ = sizes.widths(level)
        path = ("encoder", f"block_{level}")
        yield from _conv(f"encoder.block{level}.main", path, inputs, width)
        inputs = width
    for level in _LEVELS:
        features, width = sizes.widths(level)
        theirs, ours, half = f"decoder{level}", f"decoder_{level}", width // 2
        for index, inputs in ((1, 2 * features), (2, width), (3, width)):
            key, path = f"{theirs}.Conv{index}.main", (ours, f"conv_{index}")
            yield from _conv(key, path, inputs, width)
        yield from _conv(f"{theirs}.Conv4", (ours, "conv_4"), width, half)
        if sizes.head == "static":
            yield from _conv(f"{theirs}.Conv5", (ours, "conv_5"), half, _OUTPUTS)
        else:
            yield from _head(f"{theirs}.dynamic_flow", (ours, "head"), half, sizes)


def _head(
    key: str, path: tuple[str, ...], inputs: int, sizes: Sizes
) -> Iterator[Entry]:
    for tensor, leaf in (("weight", "scale"), ("bias", "bias")):
        place = ("params", *path, "norm", leaf)
        yield Entry(f"{key}.gap.0.{tensor}", place, (inputs,), (0,), False)
    h = sizes.hidden
    count = (inputs + 1) * h + (h + 1) * h + (h + 1) * _OUTPUTS
    condition = inputs + _TYPES + sizes.regions
    yield from _conv(
        f"{key}.controller", (*path, "controller"), condition, count, size=1
    )


def _conv(
    key: str, path: tuple[str, ...], inputs: int, outputs: int, size: int = 3
) -> Iterator[Entry]:
    shape = (outputs, inputs, size, size, size)
    yield Entry(f"{key}.weight", ("params", *path, "kernel"), shape, FROM_OI, False)
    yield Entry(f"{key}.bias", ("params", *path, "bias"), (outputs,), (0,), False)


def plain(state: Mapping[str, np.ndarray]) -> State:
    """Returns the network's own names: no prefixes of wrappers, no grids of indices."""
    named = {_PREFIX.sub("", key): array for key, array in state.items()}
    return {key: array for key, array in named.items() if not _GRID.match(key)}


def is_released(state: Mapping[str, np.ndarray]) -> bool:
    """Says whether the tensors' names are those of a released UniReg pyramid."""
    return _FIRST in plain(state)


def read_config(
    state: Mapping[str, np.ndarray], *, source: str = "the state dict"
) -> dict[str, Any]:
    """Reads the fields of UniRegRpnConfig off the tensors.

    The tasks of the six released regions are the config's own; of another number of
    regions each is a task between subjects first, and then one within a subject.

    Args:
      state: PyTorch's names to arrays.
      source: what the arrays came from, for the error.

    Raises:
      UserError: the tensors are not those of a released UniReg pyramid.
    """
    sizes = sizes_of(plain(state), source=source)
    found: dict[str, Any] = {
        "channels": sizes.channels,
        "image_channels": sizes.image_channels,
        "head": sizes.head,
    }
    if sizes.head == "static":
        return found
    found |= {"hidden": sizes.hidden, "regions": sizes.regions}
    if sizes.regions != len(REGIONS):
        regions = range(sizes.regions)
        found["tasks"] = tuple((r, p) for p in ("inter", "intra") for r in regions)
    return found


def to_variables(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the state dict",
) -> Variables:
    """Converts PyTorch's tensors to the variables of models.unireg_rpn.

    Args:
      state: the released code's names to arrays.
      config: not looked at, the tensors say it all.
      source: what the arrays came from, for the error.

    Returns:
      {"params": ...} of float32 host arrays.

    Raises:
      UserError: tensors are unknown, missing, misshapen, of the wrong type or not
        finite; they are named.
    """
    del config
    state = plain(state)
    table = entries(sizes_of(state, source=source))
    return state_lib.tree_of(state, table, source=source, network=_NAME)


def from_variables(
    variables: Variables,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> State:
    """Converts variables of models.unireg_rpn to PyTorch's tensors.

    Args:
      variables: {"params": ...} of host or device arrays.
      config: fields of UniRegRpnConfig.
      source: what the variables came from, for the error.

    Returns:
      The names of the network itself, without prefixes, to float32 host arrays.

    Raises:
      UserError: leaves are unknown, missing, misshapen or of the wrong type, or the
        network can be asked for a smoothness, which the released code cannot.
    """
    if _smoothness_knots(config):
        raise UserError(
            f"{source} has a smoothness_range, which the released code cannot hold; "
            "train without one to export"
        )
    table = entries(variable_sizes(variables, source=source))
    return state_lib.state_of(variables, table, source=source, network=_NAME)


def in_released_order(
    variables: Variables, names: Sequence[str], *, source: str = "the checkpoint"
) -> tuple[Variables, tuple[str, ...]]:
    """Returns variables, and names, with the regions in the released code's order.

    Args:
      variables: {"params": ...} of models.unireg_rpn; static heads know no regions.
      names: of the regions, in the order of the weights.
      source: what the variables came from, for the error.

    Raises:
      UserError: these are not the six regions that the released code knows.
    """
    sizes = variable_sizes(variables, source=source)
    if sizes.head == "static":
        return variables, ()
    if sizes.regions != len(REGIONS) or sorted(names) != sorted(REGIONS):
        raise UserError(
            f"{source} makes its heads for the regions {', '.join(names)}, a file of "
            f"the released code holds {', '.join(REGIONS)} and no others; keep other "
            "regions in a checkpoint folder, or train with these to export"
        )
    order = np.array([list(names).index(region) for region in REGIONS])
    params = dict(variables["params"])
    for level in _LEVELS:
        decoder = dict(params[f"decoder_{level}"])
        head = dict(decoder["head"])
        # The regions are what a controller is told last.
        kernel = np.array(head["controller"]["kernel"])
        kernel[..., -len(REGIONS) :, :] = kernel[..., -len(REGIONS) :, :][..., order, :]
        head["controller"] = {**head["controller"], "kernel": kernel}
        params[f"decoder_{level}"] = {**decoder, "head": head}
    return {**variables, "params": params}, REGIONS


def check_variables(
    variables: Variables,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the checkpoint",
) -> None:
    """Checks that variables are exactly those of a released UniReg pyramid.

    Args:
      variables: {"params": ...}.
      config: fields of UniRegRpnConfig; sizes that are among them must agree.
      source: what the variables came from, for the error.

    Raises:
      UserError: leaves are unknown, missing, misshapen, of the wrong type or not
        finite, or of other sizes than the fields say; they are named.
    """
    sizes = variable_sizes(variables, source=source)
    state_lib.check_tree(variables, entries(sizes), source=source, network=_NAME)
    if smoothness := _smoothness_knots(config):  # its knots follow the regions
        sizes = dataclasses.replace(sizes, regions=sizes.regions - smoothness["knots"])
    got = {name: value for name, value in dataclasses.asdict(sizes).items() if value}
    said = {name: (config or {}).get(name, value) for name, value in got.items()}
    if said != got:
        raise UserError(
            f"{source} holds weights of the sizes {got}, its config says {said}; the "
            "two do not belong together"
        )


def _smoothness_knots(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns the range of smoothness that dynamic heads can be asked for."""
    fields = config or {}
    dynamic = fields.get("head", "dynamic") == "dynamic"
    return fields.get("smoothness_range") if dynamic else None
