"""uniGradICON's tensors in PyTorch's files.

A `.trch` file is what `torch.save(net.regis_net.state_dict())` writes: one flat mapping
of names to tensors. `GRADICON` says for every kind of tensor in it where it lives in
our variables, which shape it must have and how its axes move. Names and shapes as
unigradicon 1.0.6 and icon_registration 1.1.9 store them.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError
from jaxreg.typing import Variables
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.state import FROM_IO, FROM_OI, Entry
from jaxreg.weights.pytorch.table import TensorTable

_LAYER = re.compile(r"(.*?)((?:downConvs|upConvs|batchNorms|lastConv)\..+)")
_KERNEL_3 = (3, 3, 3)
_KERNEL_4 = (4, 4, 4)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One kind of tensor, here and there.

    Attributes:
      layer: PyTorch's name of the layer inside its UNet.
      tensor: PyTorch's name of the tensor inside the layer.
      path: collection, module and leaf in our variables; the step comes second.
      shape: PyTorch's shape; a word is a channel count of the level, see `_channels`.
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


# Rows of one layer stand together, in the order in which PyTorch stores them; a layer
# with {level} repeats for every level before the next layer begins.
GRADICON = (
    TensorSpec(
        "downConvs.{level}",
        "weight",
        ("params", "down_{level}", "kernel"),
        ("down_out", "down_in", *_KERNEL_3),
        FROM_OI,
    ),
    TensorSpec(
        "downConvs.{level}", "bias", ("params", "down_{level}", "bias"), ("down_out",)
    ),
    TensorSpec(
        "upConvs.{level}",
        "weight",
        ("params", "up_{level}", "kernel"),
        ("up_in", "up_out", *_KERNEL_4),
        FROM_IO,
    ),
    TensorSpec(
        "upConvs.{level}", "bias", ("params", "up_{level}", "bias"), ("up_out",)
    ),
    TensorSpec(
        "batchNorms.{level}", "weight", ("params", "norm_{level}", "scale"), ("up_out",)
    ),
    TensorSpec(
        "batchNorms.{level}", "bias", ("params", "norm_{level}", "bias"), ("up_out",)
    ),
    TensorSpec(
        "batchNorms.{level}",
        "running_mean",
        ("batch_stats", "norm_{level}", "mean"),
        ("up_out",),
    ),
    TensorSpec(
        "batchNorms.{level}",
        "running_var",
        ("batch_stats", "norm_{level}", "var"),
        ("up_out",),
    ),
    TensorSpec(
        "batchNorms.{level}",
        "num_batches_tracked",
        ("batch_stats", "norm_{level}", "count"),
        (),
        (),
    ),
    TensorSpec(
        "lastConv",
        "weight",
        ("params", "last", "kernel"),
        (3, "last_in", *_KERNEL_3),
        FROM_OI,
    ),
    TensorSpec("lastConv", "bias", ("params", "last", "bias"), (3,)),
)


@dataclasses.dataclass(frozen=True)
class _Structure:
    """The four fields of GradIconConfig, checked."""

    channels_down: tuple[int, ...]
    channels_up: tuple[int, ...]
    downsampled_steps: int
    fullres_steps: int


def gradicon_prefixes(downsampled_steps: int, fullres_steps: int) -> tuple[str, ...]:
    """Returns PyTorch's key prefix of every UNet, in order of execution.

    `downsampled_steps` times the network so far moves into the first child of a
    two-step module, one resolution down, and `fullres_steps` times at the same
    resolution; the new UNet is the second child. (2, 1) is the released network, (2, 0)
    its first training stage.
    """
    prefixes = ["net."]
    for inner in ["netPhi.net."] * downsampled_steps + ["netPhi."] * fullres_steps:
        prefixes = [inner + prefix for prefix in prefixes] + ["netPsi.net."]
    return tuple(prefixes)


class _Table(TensorTable[Mapping[str, Any]]):
    """uniGradICON's `net.regis_net`; its sizes are the fields of GradIconConfig."""

    network = "uniGradICON"

    def owns(self, state: Mapping[str, Any]) -> bool:
        return any(_LAYER.fullmatch(key) for key in state)

    def config_fields(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return dict(sizes)

    def variable_sizes(
        self, variables: Variables, config: Mapping[str, Any], *, source: str
    ) -> Mapping[str, Any]:
        """Returns the fields; the variables are not looked at."""
        return config

    def preprocessing(self, variables: Variables) -> Mapping[str, Any]:
        """Returns the published networks'."""
        return {
            "shape": [175, 175, 175],
            **ResamplingRule("half_pixel", "kji").to_dict(),
            "ct_window": [-1000.0, 1000.0],
            "mri_quantiles": [0.0, 0.99],
        }

    def entries(self, sizes: Mapping[str, Any]) -> tuple[Entry, ...]:
        """Returns every tensor of a GradICON network, in the order of its PyTorch file.

        Args:
          sizes: the fields of GradIconConfig; lists, as JSON has them, are welcome, and
            fields that do not change the tensors are not looked at.

        Raises:
          UserError: the fields are not those of a GradICON network.
        """
        structure = _structure(sizes)
        levels = len(structure.channels_up)
        entries = []
        prefixes = gradicon_prefixes(
            structure.downsampled_steps, structure.fullres_steps
        )
        for step, prefix in enumerate(prefixes, start=1):
            for layer, group in itertools.groupby(GRADICON, key=lambda row: row.layer):
                rows = tuple(group)
                for level in range(levels if "{level}" in layer else 1):
                    channels = _channels(structure, level)
                    entries += [
                        _entry(row, f"step_{step}", prefix, level, channels)
                        for row in rows
                    ]
        return tuple(entries)

    def sizes_of(
        self, state: Mapping[str, np.ndarray], *, source: str
    ) -> dict[str, Any]:
        """Reads the fields of GradIconConfig off the tensors.

        A number that several tensors show is the one most of them show, so that
        `to_variables` can name the odd one out.

        Args:
          state: PyTorch's names to arrays.
          source: what the arrays came from, for the error.

        Returns:
          channels_down (input first, one more than levels), channels_up,
          downsampled_steps, fullres_steps; plain tuples and integers.

        Raises:
          UserError: the tensors are not those of a GradICON network.
        """
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, array in state.items():
            match = _LAYER.fullmatch(key)
            if match:
                found.setdefault(match[1], {})[match[2]] = np.shape(array)
        downsampled_steps, fullres_steps = _nearest_nesting(found, state, source)
        unets = [
            found[prefix]
            for prefix in gradicon_prefixes(downsampled_steps, fullres_steps)
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
            "downsampled_steps": downsampled_steps,
            "fullres_steps": fullres_steps,
        }


TABLE = _Table()


_EXPECTED_NETWORK = (
    "expected the tensors of a uniGradICON network "
    "(net.regis_net.state_dict()); give the weights of that architecture"
)
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
    numbers = (*down, *up, config["downsampled_steps"], config["fullres_steps"])
    whole = all(isinstance(n, int | np.integer) and n >= 0 for n in numbers)
    if not whole or len(down) != len(up) + 1 or not up or min(*down, *up) < 1:
        raise UserError(
            f"the network's config is {dict(config)}, expected positive channel counts "
            "with one more in channels_down than in channels_up"
        )
    if config["downsampled_steps"] + config["fullres_steps"] >= _MOST_UNETS:
        raise UserError(
            f"the network's config is {dict(config)}, expected at most {_MOST_UNETS} "
            "UNets"
        )
    return _Structure(
        down, up, int(config["downsampled_steps"]), int(config["fullres_steps"])
    )


def _channels(structure: _Structure, level: int) -> dict[str, int]:
    """Returns the channel counts of a level by the words of `TensorSpec.shape`."""
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
    row: TensorSpec, step: str, prefix: str, level: int, channels: Mapping[str, int]
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
    """Returns both numbers of steps whose prefixes differ least from those found.

    The nearest rather than the equal one, so that a network without one of its UNets is
    answered with the names of what is missing.
    """
    best: tuple[int, tuple[int, int]] | None = None
    for count in range(1, min(len(found) + 1, _MOST_UNETS) + 1):
        for fullres_steps in range(count):
            nesting = (count - 1 - fullres_steps, fullres_steps)
            expected = set(gradicon_prefixes(*nesting))
            distance = len(expected ^ set(found))
            if expected & set(found) and (best is None or distance < best[0]):
                best = (distance, nesting)
    if best is None:
        names = state_lib.listed(state) if state else "no tensors"
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
