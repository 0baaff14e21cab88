"""The released UniReg pyramid's tensors in PyTorch's files.

The released code saves {"model_state_dict", "arch", "name", "step", "epoch",
"metrics"}; only the first is read. Its names may carry the prefixes of the modules
around the network, which are removed. Files of the static pyramid also hold grids of
voxel indices, which say nothing and are left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError
from jaxreg.typing import Variables
from jaxreg.weights.pytorch.state import FROM_OI, Entry, State
from jaxreg.weights.pytorch.table import TensorTable

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
        yield Entry(f"{key}.gap.0.{tensor}", place, (inputs,))
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
    yield Entry(f"{key}.weight", ("params", *path, "kernel"), shape, FROM_OI)
    yield Entry(f"{key}.bias", ("params", *path, "bias"), (outputs,))


def _smoothness_knots(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns the range of smoothness that dynamic heads can be asked for."""
    fields = config or {}
    dynamic = fields.get("head", "dynamic") == "dynamic"
    return fields.get("smoothness_range") if dynamic else None


class _Table(TensorTable[Sizes]):
    """The released pyramid."""

    network = _NAME
    wrapper = "model_state_dict"
    ordered = True

    def owns(self, state: Mapping[str, Any]) -> bool:
        return _FIRST in self.plain(state)

    def plain(self, state: Mapping[str, np.ndarray], *, source: str = "") -> State:
        """Returns the network's own names: no prefixes of wrappers, no grids."""
        named = {_PREFIX.sub("", key): array for key, array in state.items()}
        return {key: array for key, array in named.items() if not _GRID.match(key)}

    def sizes_of(self, state: Mapping[str, np.ndarray], *, source: str) -> Sizes:
        is_dynamic = any(".dynamic_flow." in key for key in state)
        controller = np.shape(state.get(_CONTROLLER, ())) if is_dynamic else None
        return _sizes(np.shape(state.get(_FIRST, ())), controller, source)

    def variable_sizes(
        self, variables: Variables, config: Mapping[str, Any], *, source: str
    ) -> Sizes:
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

    def config_fields(self, sizes: Sizes) -> dict[str, Any]:
        """See `TensorTable`.

        The tasks of the six released regions are the config's own; of another number of
        regions each is a task between subjects first, and then one within a subject.
        """
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

    def entries(self, sizes: Sizes) -> Iterator[Entry]:
        """Returns every tensor, in the order of the released file, without grids."""
        return _all_entries(sizes)

    def preprocessing(self, variables: Variables) -> dict[str, Any]:
        """Returns the released code's, with its tasks' names where they are the six."""
        sizes = self.variable_sizes(variables, {}, source="the weights")
        names = list(REGIONS)
        known = sizes.regions == len(names)
        return {
            "shape": [160, 192, 192],
            **ResamplingRule("aligned", "kji").to_dict(),
            "ct_window": [-150.0, 250.0],
            "mri_quantiles": [0.005, 0.995],
            "mri_foreground": True,
            **({"tasks": names, "regions": names} if known else {}),
        }

    def check_exportable(self, config: Mapping[str, Any], *, source: str) -> None:
        """Checks that a network is conditional on no smoothness.

        Raises:
          UserError: it is.
        """
        if _smoothness_knots(config):
            raise UserError(
                f"{source} has a smoothness_range, which the released code cannot "
                "hold; train without one to export"
            )

    def check_variables(
        self,
        variables: Variables,
        config: Mapping[str, Any] = MappingProxyType({}),
        *,
        source: str = "the checkpoint",
    ) -> None:
        """See `TensorTable`; sizes that are among the config's fields must agree."""
        super().check_variables(variables, config, source=source)
        sizes = self.variable_sizes(variables, config, source=source)
        if smoothness := _smoothness_knots(config):  # its knots follow the regions
            sizes = dataclasses.replace(
                sizes, regions=sizes.regions - smoothness["knots"]
            )
        got = {
            name: value for name, value in dataclasses.asdict(sizes).items() if value
        }
        said = {name: config.get(name, value) for name, value in got.items()}
        if said != got:
            raise UserError(
                f"{source} holds weights of the sizes {got}, its config says {said}; "
                "the two do not belong together"
            )

    def in_order(
        self,
        config: Any,
        variables: Variables,
        names: Sequence[str],
        *,
        source: str = "the checkpoint",
    ) -> tuple[Variables, tuple[str, ...]]:
        """Returns variables, and names, with the regions in the released code's order.

        Static heads know no regions.

        Raises:
          UserError: these are not the six regions that the released code knows.
        """
        sizes = self.variable_sizes(variables, {}, source=source)
        if sizes.head == "static":
            return variables, ()
        if sizes.regions != len(REGIONS) or sorted(names) != sorted(REGIONS):
            raise UserError(
                f"{source} makes its heads for the regions {', '.join(names)}, a file "
                f"of the released code holds {', '.join(REGIONS)} and no others; keep "
                "other regions in a checkpoint folder, or train with these to export"
            )
        order = np.array([list(names).index(region) for region in REGIONS])
        params = dict(variables["params"])
        for level in _LEVELS:
            decoder = dict(params[f"decoder_{level}"])
            head = dict(decoder["head"])
            # The regions are what a controller is told last.
            kernel = np.array(head["controller"]["kernel"])
            told = kernel[..., -len(REGIONS) :, :]
            kernel[..., -len(REGIONS) :, :] = told[..., order, :]
            head["controller"] = {**head["controller"], "kernel": kernel}
            params[f"decoder_{level}"] = {**decoder, "head": head}
        return {**variables, "params": params}, REGIONS


TABLE = _Table()
