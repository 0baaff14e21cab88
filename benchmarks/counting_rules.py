"""What each layer and function of jaxreg counts as; see `counting`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import counting
import jax
import numpy as np
from counting import Array, Layer, Product, Rules, arrays_of
from flax import linen as nn

from jaxreg.losses import contrastive, regularity, similarity
from jaxreg.losses.objective import Objective
from jaxreg.models import sam
from jaxreg.models.unireg import features as features_lib
from jaxreg.models.unireg.paper import UniReg
from jaxreg.nn import correlation, doubling, heads, layers, prompts, unet
from jaxreg.nn.conv import api
from jaxreg.space import fields, filters, sampling

_CORNERS = 8
_NORM = 8  # operations per number: two passes for the moments, one to apply them
_WEIGHTS = 21  # of a linear sampler, per point: three slopes, and eight products
_RESIZING = "pooling, resizing"
_GROUPS = {
    "pool": _RESIZING,
    "upsample": _RESIZING,
    "resize": _RESIZING,
    "normalise": "normalisation",
}
_PARTS = (
    ("encoder", ("down_", "encoder", "halve", "backbone", "block_", "residual_")),
    ("decoder", ("up_", "decoder", "remaining", "join", "refine", "lateral")),
    ("prompts", ("bottleneck",)),
    ("last layers", ("last", "head", "embedding", "flow", "fine", "coarse")),
)
"""Groups of layers with parameters: the outermost name that begins so decides."""


def _part(path: Sequence[str]) -> str:
    for name in path:
        for group, beginnings in _PARTS:
            if name.startswith(beginnings):
                return group
    return "other layers"


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- layers with parameters -----------------------------------------------------------


def convolution(function: Callable, x: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Returns flops, built and product of a layer of `jaxreg.nn.conv.api`.

    Args:
      function: the layer.
      x: N D H W I, or parts of it.
      shape: of its kernel, kD kH kW I O.
    """
    *size, i, o = shape
    n, *spatial, _ = jax.tree.leaves(x)[0].shape
    taps = math.prod(size)
    if function is api.conv3_stride2:  # four taps of an axis for three
        voxels = n * math.prod(-(-m // 2) for m in spatial)
        product = Product(8 * i, 8, o)
    elif function is api.conv4_transpose2:  # one voxel more than is kept
        voxels = n * math.prod(spatial)
        built = n * math.prod(m + 1 for m in spatial)
        flops = 2.0 * voxels * taps * i * o
        return {
            "flops": flops,
            "built": flops * built / voxels,
            "product": Product(i, 8, 8 * o),
        }
    else:
        voxels, product = n * math.prod(spatial), Product(i, taps, o)
    return {
        "flops": 2.0 * voxels * taps * i * o,
        "built": 2.0 * voxels * math.prod(product),
        "product": product,
    }


def _convolution(recorder, module, args, kwargs, found):
    (x,) = args
    x = tuple(map(layers.value, x)) if isinstance(x, tuple) else layers.value(x)
    _note_convolution(recorder, module.function, x, module.shape, found)


def _note_convolution(recorder, function, x, shape, found):
    recorder.note(
        "matrix",
        "",
        **convolution(function, x, shape),
        group=_part(recorder.path),
        inputs=arrays_of(x),
        outputs=arrays_of(found),
        weights=(Array(tuple(shape)),),
    )


def _doubling(recorder, module, args, kwargs, found):
    """A transposed convolution and the image, doubled, which is added to it."""
    x = tuple(map(layers.value, args[0]))
    _note_convolution(recorder, api.conv4_transpose2, x, module.shape, found)
    n, *spatial, _ = x[0].shape
    residual = jax.ShapeDtypeStruct((n, *spatial, module.shape[-1]), x[0].dtype)
    _UPSAMPLE(recorder, (residual,), {}, found)


def _strided(recorder, module, args, kwargs, found):
    (x,) = args
    i, o, voxels = x.shape[-1], module.outputs, _size(found) // module.outputs
    folded = [s == 2 and k > 1 for s, k in zip(module.stride, module.size, strict=True)]
    taps = [-(-k // 2) if f else k for k, f in zip(module.size, folded, strict=True)]
    product = Product(i * 2 ** sum(folded), math.prod(taps), o)
    recorder.note(
        "matrix",
        "",
        2.0 * voxels * math.prod(module.size) * i * o,
        built=2.0 * voxels * math.prod(product),
        product=product,
        group=_part(recorder.path),
        inputs=arrays_of(x),
        outputs=arrays_of(found),
        weights=(Array((*module.size, i, o)),),
    )


def _batch_norm(recorder, module, args, kwargs, found):
    if not kwargs["train"]:
        return  # a factor and a shift for the layer before it
    recorder.note(
        "vector",
        "",
        _NORM * _size(found.image),
        group="normalisation",
        inputs=arrays_of(args[0]),
        outputs=arrays_of(found.image),
    )


def _group_norm(recorder, module, args, kwargs, found):
    # What comes out is pooled at once.
    recorder.note(
        "vector", "", _NORM * _size(found), group="normalisation",
        inputs=arrays_of(args[0]), outputs=(),
    )  # fmt: skip


def _linear_layer(recorder, module, args, kwargs, found):
    (x,) = args
    rows, i, o = _size(x) // x.shape[-1], x.shape[-1], found.shape[-1]
    recorder.note(
        "matrix",
        "",
        2.0 * rows * i * o,
        product=Product(i, 1, o),
        exact=True,
        group=_part(recorder.path),
        inputs=arrays_of(x),
        outputs=arrays_of(found),
        weights=(Array((i, o)),),
    )


def _bank(recorder, module, args, kwargs, found):
    """Similarities with the bank, its weighted sum, and the prompts' own products."""
    features = args[0]
    n, z, row = len(features), module.config.tasks, _size(features) // len(features)
    recorder.note(
        "matrix",
        "bank",
        2.0 * z * row * (2 * n + z),
        product=Product(row, 1, z),
        exact=True,
        group="prompts",
        inputs=arrays_of(features),
        outputs=arrays_of(features),
        weights=(Array((z, row)),),
    )


_MODULES = {
    layers.Convolution: _convolution,
    layers.StridedConvolution: _strided,
    doubling.Doubling: _doubling,
    unet.BatchNorm: _batch_norm,
    heads.GroupNorm: _group_norm,
    heads.Controller: _linear_layer,
    nn.Dense: _linear_layer,
    prompts.PromptGenerator: _bank,
}


# --- functions ------------------------------------------------------------------------


def _per_number(what: str, count: float, *, of="outputs", linear=True, frozen=False):
    """Returns a note of so many operations per number of the inputs or outputs."""

    def note(recorder, args, kwargs, found):
        size = _size(found) if of == "outputs" else _size(args[0])
        recorder.note(
            "vector",
            what,
            count * size,
            inputs=arrays_of(args[0]),
            outputs=arrays_of(found),
            linear=linear,
            group=_GROUPS.get(what, what),
            **({"frozen": True} if frozen else {}),
        )

    return note


def sampler(points: int, channels: int) -> float:
    """Returns the operations of a linear sampler: eight multiply-adds per number."""
    return float(points * (_WEIGHTS + 2 * _CORNERS * channels))


def _sampler(recorder, args, kwargs, found):
    values, index = args[:2]
    channels = values.shape[-1]
    points = _size(found) // channels
    linear = kwargs.get("order", 1) == 1
    recorder.note(
        "gather",
        "warp or compose",
        sampler(points, channels) if linear else float(points),
        inputs=arrays_of((values, index)),
        outputs=arrays_of(found),
        group="samplers",
        taps=points * (_CORNERS if linear else 1),
    )


def _matrices(what: str, axis_of_channels: int | None):
    """A product with one matrix per spatial axis; zeros in it are not needed."""

    def note(recorder, args, kwargs, found):
        values, matrices = args
        sizes = list(values.shape)
        last = len(sizes) if axis_of_channels is None else len(sizes) - 1
        flops = built = 0.0
        for axis, matrix in zip(range(last - 3, last), matrices, strict=True):
            rest = math.prod(sizes) // sizes[axis]
            flops += 2.0 * rest * int(np.count_nonzero(matrix))
            built += 2.0 * rest * matrix.size
            sizes[axis] = matrix.shape[0]
        recorder.note(
            "matrix",
            what,
            flops,
            built=built,
            product=Product(matrices[0].shape[1], 1, matrices[0].shape[0]),
            exact=True,
            inputs=arrays_of(values),
            outputs=arrays_of(found),
            weights=tuple(Array(m.shape) for m in matrices),
            linear=True,
            group=_GROUPS.get(what, what),
        )

    return note


def _correlation(recorder, args, kwargs, found):
    source, target = args[:2]
    offsets, channels = found.shape[-1], source.shape[-1]
    voxels = _size(source) // channels
    # The products, and both lengths.
    recorder.note(
        "vector",
        "correlation",
        2.0 * voxels * channels * (offsets + 2),
        inputs=arrays_of((source, target)),
        outputs=arrays_of(found),
    )


def _head(recorder, args, kwargs, found):
    features, parameters, channels = args
    voxels = math.prod(features.shape[:-1])
    pairs = list(zip(channels[:-1], channels[1:], strict=True))
    recorder.note(
        "matrix",
        "",
        2.0 * voxels * sum(i * o for i, o in pairs),
        product=Product(channels[0], 1, channels[1]),
        exact=True,
        group="last layers",
        inputs=arrays_of(features),
        outputs=arrays_of(found),
        weights=arrays_of(parameters),
    )


def _products(recorder, args, kwargs, found):
    queries, others = args
    recorder.note(
        "matrix",
        "products of embeddings",
        2.0 * _size(found) * queries.shape[-1],
        product=Product(queries.shape[-1], 1, len(others)),
        exact=True,
        inputs=arrays_of((queries, others)),
        outputs=arrays_of(found),
    )


def _distances(recorder, args, kwargs, found):
    places, others = args[:2]
    recorder.note(
        "vector", "distances", 9.0 * len(places) * len(others),
        inputs=arrays_of((places, others)), outputs=arrays_of(found), frozen=True,
    )  # fmt: skip


# Per axis a multiplication and a multiply-add; the first two have fewer outputs.
_UPSAMPLE = _per_number("upsample", 3 * (1 + 1 / 2 + 1 / 4))
_FUNCTIONS = {
    api.average_pool: _per_number("pool", 1, of="inputs"),
    api.average_pool2: _per_number("pool", 1, of="inputs"),
    api.max_pool2: _per_number("pool", 1, of="inputs", linear=False),
    sam._max_pool_depth: _per_number("pool", 0.5, of="inputs", linear=False),
    api.repeat2: _per_number("upsample", 0),
    api.upsample2: _UPSAMPLE,
    sampling.resize_nearest_floor: _per_number("resize", 0),
    layers.instance_norm_leaky: _per_number("normalise", _NORM, linear=False),
    correlation.normalised: _per_number("normalise", 3, linear=False),
    sam.normalise: _per_number("normalise", 3, linear=False),
    # A determinant is 9 differences with their scale and 14 operations more; jaxreg
    # looks at its sign alone.
    fields.jacobian_determinant: _per_number("folds", 32, linear=False, frozen=True),
    regularity.smoothness: _per_number("smoothness", 9, of="inputs", linear=False),
    sampling.sample_voxels: _sampler,
    sampling._apply_matrices: _matrices("resize", -1),
    filters.along_axes: _matrices("filters", None),
    correlation.correlation: _correlation,
    heads.apply_head: _head,
    contrastive._products: _products,
    contrastive._nearest: _distances,
    contrastive._near: _distances,
}


def _mind(recorder, args, found):
    """What is around the filter: squared differences before, a soft minimum after."""
    image, out = arrays_of(args[0]), arrays_of(found)
    count = _size(found)
    recorder.note("vector", "MIND", 3.0 * count, inputs=image, outputs=out)
    recorder.note("vector", "MIND", 12.0 * count, inputs=out, outputs=out)


def _gradicon(recorder, args, found):
    points = 4 * _size(args[2])
    three = (Array((points,)),)
    recorder.note("vector", "gradicon", 6.0 * points, inputs=three, outputs=())


_SIMILAR = {  # operations per voxel, and maps of the images' size that are read
    "lncc": (14, 5),
    "lncc2": (15, 5),
    "box_ncc": (25, 5),
    "ncc": (12, 2),
    "mse": (3, 2),
    "mind": (3 * 12, 2 * 12),
    "nmi": (2 * 32 * 12, 2),
}


def _formula(name: str) -> Callable:
    """A similarity's formula, noted besides the filters inside it."""
    count, maps = _SIMILAR[name]

    def note(recorder, args, found):
        images = arrays_of(args[1])
        recorder.note(
            "vector", name, float(count * _size(args[1])),
            inputs=images * maps, outputs=(),
        )  # fmt: skip

    return lambda args, kwargs: {"note": note}


def _pairs(args, kwargs):
    return {"times": args[0].shape[0] // 2}


_SCOPES = {
    # Counted with the layer that it belongs to.
    api.chosen: lambda a, k: {"quiet": True},
    **{f: _formula(name) for name, f in similarity.SIMILARITIES.items()},
    fields.integrate: lambda a, k: {"times": a[1] if len(a) > 1 else 7},
    # An image, whose own gradient is not asked for.
    fields.warp: lambda a, k: {"constant": True},
    features_lib.one_by_one: lambda a, k: {"times": len(a[1])},
    filters.mind_channels: lambda a, k: {"note": _mind},
    regularity.gradicon: lambda a, k: {"note": _gradicon},
    contrastive.fine_loss: _pairs,
    contrastive.coarse_loss: _pairs,
    # For views that share no place; the other branch of the two is the usual one.
    contrastive._fine_alone: lambda a, k: {"quiet": True},
    contrastive.contrastive: lambda a, k: {"prefix": "loss: "},
}
RULES = Rules(
    modules=_MODULES,
    functions=_FUNCTIONS,
    scopes=_SCOPES,
    methods={
        (UniReg, "_extract"): lambda a, k: {"prefix": "features: ", "frozen": True},
        (Objective, "__call__"): lambda a, k: {"prefix": "loss: "},
    },
    tables=((similarity, "SIMILARITIES"),),
    package="jaxreg",
)


def record(function: Callable, *args: Any) -> list[Layer]:
    """Returns the layers of jaxreg that a function calls; see `counting.record`."""
    with whole():
        return counting.record(RULES, function, *args)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """SAM sees whole volumes meanwhile: slabs save memory and change nothing else."""
    with mock.patch.object(sam, "_pairs_per_slab", lambda image, config: None):
        yield
