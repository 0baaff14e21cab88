"""SAM's tensors in PyTorch's files.

The released code saves {"state_dict", "meta"}, perhaps with its optimiser's state;
only the first is read. Names and shapes as version 2 of its repository has them.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError
from jaxreg.models.sam import HU_RANGE, SPACING_MM
from jaxreg.typing import Variables
from jaxreg.weights.pytorch.state import FROM_OI, Entry, State
from jaxreg.weights.pytorch.table import TensorTable

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
    yield Entry(f"{key}.conv.weight", kernel, shape, FROM_OI)
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
    yield Entry(f"{key}.conv.weight", kernel, shape, FROM_OI)
    yield Entry(f"{key}.conv.bias", bias, shape[:1])


class _Table(TensorTable[Mapping[str, Any]]):
    """SAM; its sizes are the fields channels and embedding of SamConfig."""

    network = _NAME
    wrapper = "state_dict"
    beside = MappingProxyType({"meta": {}})

    def owns(self, state: Mapping[str, Any]) -> bool:
        own = ("backbone.conv1.conv.", "read_out_head.")
        return any(key.startswith(own) for key in state)

    def plain(self, state: Mapping[str, np.ndarray], *, source: str) -> State:
        """Returns the tensors with the counters of batch normalisation, from zero.

        Older files lack them, as a whole.
        """
        table = self.entries(self.sizes_of(state, source=source))
        counts = [entry.key for entry in table if entry.is_count]
        if any(key in state for key in counts):
            return dict(state)
        return {**state, **dict.fromkeys(counts, np.zeros((), np.int64))}

    def sizes_of(
        self, state: Mapping[str, np.ndarray], *, source: str
    ) -> dict[str, Any]:
        keys = [f"backbone.layer{stage}.1.conv2.bn.weight" for stage in (1, 2, 3, 4)]
        keys.append("read_out_head.fpn_convs.0.conv.bias")
        absent = [key for key in keys if len(np.shape(state.get(key, 0))) != 1]
        if absent:
            raise UserError(
                f"{source} has no {absent[0]}; expected the tensors of a {_NAME} "
                "network (the state_dict of its released checkpoint); give the weights "
                "of that architecture"
            )
        *channels, embedding = (len(state[key]) for key in keys)
        return {"channels": tuple(channels), "embedding": embedding}

    def variable_sizes(
        self, variables: Variables, config: Mapping[str, Any], *, source: str
    ) -> dict[str, Any]:
        """Reads the sizes off variables; those of the fields, where there are any."""
        try:
            params = variables["params"]
            kernels = [
                params["backbone"][f"stage_{stage}_1"]["conv_2"]["conv"]["kernel"]
                for stage in (1, 2, 3, 4)
            ]
            channels = tuple(np.shape(kernel)[4] for kernel in kernels)
            sizes = {"channels": channels, "embedding": len(params["coarse"]["bias"])}
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{source} does not hold the variables of a {_NAME} network "
                f"({error} is missing or misshapen)"
            ) from error
        return {name: config.get(name, size) for name, size in sizes.items()}

    def config_fields(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return dict(sizes)

    def entries(self, sizes: Mapping[str, Any]) -> Iterator[Entry]:
        """Returns every tensor, in the order of the released file."""
        return _all_entries(tuple(sizes["channels"]), sizes["embedding"])

    def preprocessing(self, variables: Variables) -> dict[str, Any]:
        """Returns the released network's, which knows CT alone: no quantiles of MR."""
        rule = ResamplingRule("pad_crop", "spl", SPACING_MM)
        return {**rule.to_dict(), "ct_window": list(HU_RANGE)}


TABLE = _Table()
