"""What a network has to compute and to move: arithmetic and least bytes, by layer.

A program is traced on abstract arrays and nothing is compiled. While it is, flax tells
which layers with parameters are called on what, and the functions that do the rest
(sampling, resizing, norms, correlation, filters, losses) note their own calls. Each
becomes a `Layer`, counted by hand from its shapes: a multiply-add is 2 operations, and
inputs, weights and outputs move once. What can be fused into a neighbour (activations,
biases, sums, concatenations, batch norm in use) is not counted.

Two counts of arithmetic: `flops` is what the layer is defined to need, `built` what
jaxreg's form for GPU and TPU does, with the zeros that it multiplies: the fourth tap of
strided kernels, whole matrices where a filter is a band.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import numpy as np
from flax import linen as nn

from jaxreg.losses import contrastive, regularity, similarity
from jaxreg.losses.objective import Objective
from jaxreg.models import sam, unireg_features
from jaxreg.models.unireg import UniReg
from jaxreg.nn import conv, correlation, dynamic, layers, prompts, unet
from jaxreg.space import fields, filters, sampling

Kind = Literal["matrix", "vector", "gather"]
_CORNERS = 8
_NORM = 8  # operations per number: two passes for the moments, one to apply them
_WEIGHTS = 21  # of a linear sampler, per point: three slopes, and eight products


class Array(NamedTuple):
    """Shape and bytes per number of something that is moved."""

    shape: tuple[int, ...]
    itemsize: int = 4

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * self.itemsize

    def padded_bytes(self, lanes: int = 128) -> int:
        """In tiles of 32-bit sublanes x lanes, by the two axes that suit it best."""
        sublanes = 32 // self.itemsize
        axes = [i for i, n in enumerate(self.shape) if n > 1]
        if len(axes) < 2:
            return -(-self.bytes // (lanes * self.itemsize)) * lanes * self.itemsize
        pads = (
            _padded(self.shape[a], lanes) * _padded(self.shape[b], sublanes)
            / (self.shape[a] * self.shape[b])
            for a in axes for b in axes if a != b
        )  # fmt: skip
        return round(self.bytes * min(pads))


def _padded(n: int, to: int) -> int:
    return -(-n // to) * to


class Product(NamedTuple):
    """How a layer fills a unit that multiplies matrices.

    Attributes:
      channels: summed over, of one tap.
      taps: summed over as well.
      columns: results per row.
    """

    channels: int
    taps: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of a layer, or of its gradient.

    Attributes:
      name: where it is called.
      group: what it is a part of.
      kind: the unit that it keeps busy.
      flops: that it needs.
      built: that jaxreg's form for GPU and TPU does.
      inputs: read.
      weights: parameters, read as well.
      outputs: written.
      times: how often a loop repeats it; the other numbers are of one turn.
      product: for matrices.
      exact: whether its products are float32 on every platform.
      taps: voxels read or written one by one.
      linear: whether its gradient needs none of its inputs.
      frozen: whether nobody asks for its gradient.
      constant: of a sampler, whether nobody asks for that of what it reads.
    """

    name: str
    group: str
    kind: Kind
    flops: float
    built: float
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    weights: tuple[Array, ...] = ()
    times: int = 1
    product: Product | None = None
    exact: bool = False
    taps: int = 0
    linear: bool = False
    frozen: bool = False
    constant: bool = False

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All that is moved."""
        return self.inputs + self.weights + self.outputs

    @property
    def bytes(self) -> int:
        """Of one turn."""
        return sum(array.bytes for array in self.arrays)

    @property
    def itemsize(self) -> int:
        """Bytes per number of what is multiplied."""
        return self.inputs[0].itemsize


# --- recording ------------------------------------------------------------------------


class _Recorder:
    """Takes layers while a program is traced."""

    def __init__(self):
        self.layers: list[Layer] = []
        self.path: list[str] = []
        self.scopes: list[dict[str, Any]] = [{}]
        self.silent = False

    @contextlib.contextmanager
    def inside(self, **said):
        """What is noted meanwhile has these attributes; `times` multiply."""
        before = self.scopes[-1]
        times = before.get("times", 1) * said.pop("times", 1)
        self.scopes.append({**before, **said, "times": times})
        try:
            yield
        finally:
            self.scopes.pop()

    @contextlib.contextmanager
    def quiet(self):
        """Nothing is noted meanwhile."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    def note(self, kind: Kind, what: str, flops: float, **more):
        """Notes a layer; `built` is `flops` unless it is given."""
        if self.silent:
            return
        scope = dict(self.scopes[-1])
        prefix = scope.pop("prefix", "")
        path = "/".join(self.path)
        named = more.pop("group", None) or _GROUPS.get(what, what)
        more = {"built": flops, **more, **scope}
        group = f"{prefix}{named}"
        name = "/".join(part for part in (path, what) if part)
        self.layers.append(Layer(name, group, kind, flops, **more))


_GROUPS = {
    "warp or compose": "samplers",
    "pool": "pooling, resizing",
    "upsample": "pooling, resizing",
    "resize": "pooling, resizing",
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


def arrays_of(tree: Any) -> tuple[Array, ...]:
    """Returns the arrays of a tree."""
    return tuple(
        Array(tuple(leaf.shape), np.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def record(function: Callable, *args: Any) -> list[Layer]:
    """Returns the layers that a function calls on abstract arguments.

    Args:
      function: of arrays; traced, neither compiled nor run.
      *args: trees of arrays or `jax.ShapeDtypeStruct`.
    """
    recorder = _Recorder()
    with _listening(recorder), nn.intercept_methods(_interceptor(recorder)), whole():
        # A new function each time: nothing is taken from the cache of traces.
        jax.eval_shape(lambda *a: function(*a), *args)
    return recorder.layers


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """SAM sees whole volumes meanwhile: slabs save memory and change nothing else."""
    with mock.patch.object(sam, "_pairs_per_slab", lambda image, config: None):
        yield


def _interceptor(recorder: _Recorder):
    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        before, recorder.path = recorder.path, list(module.path)
        try:
            found = call(*args, **kwargs)
            for known, note in _MODULES.items():
                if type(module) is known:
                    note(recorder, module, args, kwargs, found)
        finally:
            recorder.path = before
        return found

    return intercept


@contextlib.contextmanager
def _listening(recorder: _Recorder):
    """Replaces the functions of `_FUNCTIONS` and `_SCOPES` wherever they are named."""
    replaced = {}
    for function, note in _FUNCTIONS.items():
        replaced[function] = _noted(recorder, function, note)
    for function, scope in _SCOPES.items():
        replaced[function] = _scoped(recorder, function, scope)
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] != "jaxreg":
                continue
            for key, value in list(vars(module).items()):
                if callable(value) and value in replaced:
                    stack.enter_context(mock.patch.object(module, key, replaced[value]))
        table = {
            name: _similarity(recorder, name, replaced.get(f, f))
            for name, f in similarity.SIMILARITIES.items()
        }
        stack.enter_context(mock.patch.object(similarity, "SIMILARITIES", table))
        for owner, name, scope in _METHODS:
            wrapped = _scoped(recorder, getattr(owner, name), scope)
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield


def _noted(recorder, function, note):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with recorder.quiet():
            found = function(*args, **kwargs)
        note(recorder, args, kwargs, found)
        return found

    return call


def _scoped(recorder, function, scope):
    @functools.wraps(function)
    def call(*args, **kwargs):
        said = dict(scope(args, kwargs))
        note = said.pop("note", None)
        with recorder.quiet() if said.pop("quiet", False) else contextlib.nullcontext():
            with recorder.inside(**said):
                found = function(*args, **kwargs)
                if note is not None:
                    note(recorder, args, found)
        return found

    return call


# --- layers with parameters -----------------------------------------------------------


def convolution(function: Callable, x: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Returns flops, built and product of a layer of `jaxreg.nn.conv`.

    Args:
      function: the layer.
      x: N D H W I, or parts of it.
      shape: of its kernel, kD kH kW I O.
    """
    *size, i, o = shape
    n, *spatial, _ = jax.tree.leaves(x)[0].shape
    taps = math.prod(size)
    if function is conv.conv3_stride2:  # four taps of an axis for three
        voxels = n * math.prod(-(-m // 2) for m in spatial)
        product = Product(8 * i, 8, o)
    elif function is conv.conv4_transpose2:  # one voxel more than is kept
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
    recorder.note(
        "matrix",
        "",
        **convolution(module.function, x, module.shape),
        group=_part(recorder.path),
        inputs=arrays_of(x),
        outputs=arrays_of(found),
        weights=(Array(tuple(module.shape)),),
    )


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
        _NORM * _size(found),
        group="normalisation",
        inputs=arrays_of(args[0]),
        outputs=arrays_of(found),
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
    unet.BatchNorm: _batch_norm,
    dynamic.GroupNorm: _group_norm,
    dynamic.Controller: _linear_layer,
    prompts.Linear: _linear_layer,
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
        product=Product(*channels[:1], 1, channels[1]),
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


_FUNCTIONS = {
    conv.average_pool: _per_number("pool", 1, of="inputs"),
    conv.average_pool2: _per_number("pool", 1, of="inputs"),
    conv.max_pool2: _per_number("pool", 1, of="inputs", linear=False),
    sam._max_pool_depth: _per_number("pool", 0.5, of="inputs", linear=False),
    conv.repeat2: _per_number("upsample", 0),
    # Per axis a multiplication and a multiply-add; the first two have fewer outputs.
    conv.upsample2: _per_number("upsample", 3 * (1 + 1 / 2 + 1 / 4)),
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
    dynamic.apply_head: _head,
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


def _similarity(recorder, name: str, function):
    """Filters inside note themselves; the formula on top is noted here."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        count, maps = _SIMILAR[name]
        recorder.note(
            "vector", name, float(count * _size(args[1])),
            inputs=arrays_of(args[1]) * maps, outputs=(),
        )  # fmt: skip
        return found

    return call


def _pairs(args, kwargs):
    return {"times": args[0].shape[0] // 2}


_SCOPES = {
    fields.integrate: lambda a, k: {"times": a[1] if len(a) > 1 else 7},
    # An image, whose own gradient is not asked for.
    fields.warp: lambda a, k: {"constant": True},
    unireg_features.one_by_one: lambda a, k: {"times": len(a[1])},
    filters.mind_channels: lambda a, k: {"note": _mind},
    regularity.gradicon: lambda a, k: {"note": _gradicon},
    contrastive.fine_loss: _pairs,
    contrastive.coarse_loss: _pairs,
    # For views that share no place; the other branch of the two is the usual one.
    contrastive._fine_alone: lambda a, k: {"quiet": True},
    contrastive.contrastive: lambda a, k: {"prefix": "loss: "},
}
_METHODS = (
    (UniReg, "_extract", lambda a, k: {"prefix": "features: ", "frozen": True}),
    (Objective, "__call__", lambda a, k: {"prefix": "loss: "}),
)


# --- gradients and updates ------------------------------------------------------------


def gradient(layer: Layer) -> list[Layer]:
    """Returns what a layer's gradient takes.

    A convolution's has two of its size, that of the input and that of the kernel; those
    of the first layers, whose inputs are images, count as well.
    """
    if layer.frozen:
        return []
    change = functools.partial(dataclasses.replace, layer, weights=())
    dy = layer.outputs
    if layer.product is not None and layer.weights and not layer.linear:
        channels, taps, columns = layer.product
        voxels = max(1, round(layer.built / (2 * math.prod(layer.product))))
        return [
            change(
                name=f"{layer.name} d input",
                inputs=dy,
                weights=layer.weights,
                outputs=layer.inputs,
                product=Product(columns, taps, channels),
            ),
            change(
                name=f"{layer.name} d kernel",
                inputs=layer.inputs + dy,
                outputs=layer.weights,
                product=Product(voxels, 1, columns),
            ),
        ]
    if layer.kind == "gather":
        values, index = layer.inputs
        found = [
            change(
                name=f"{layer.name} d points",
                inputs=(values, index, *dy),
                outputs=(index,),
            )
        ]
        if not layer.constant:
            found.append(
                change(
                    name=f"{layer.name} d values",
                    inputs=(index, *dy),
                    outputs=(values,),
                )
            )
        return found
    name = f"{layer.name} d input"
    if layer.linear:
        weights = layer.weights
        return [change(name=name, inputs=dy, outputs=layer.inputs, weights=weights)]
    return [
        change(
            name=name,
            flops=2 * layer.flops,
            built=2 * layer.built,
            inputs=layer.inputs + dy,
            outputs=layer.inputs,
        )
    ]


_STATES = {"adam": 2, "adamw": 2, "amsgrad": 3, "sgd": 1}


def update(name: str, parameters: int) -> Layer:
    """Returns an optimiser's step: parameters, gradient and states in, two of them out.

    Args:
      name: see `jaxreg.training.optimizer.OptimizerConfig`.
      parameters: how many numbers are trained.
    """
    states = _STATES[name]
    numbers = Array((parameters,))
    flops = (3 if states == 1 else 12) * float(parameters)
    return Layer(
        name,
        "optimiser",
        "vector",
        flops,
        flops,
        (numbers,) * (2 + states),
        (numbers,) * (1 + states),
        frozen=True,
    )


def total(layers: Sequence[Layer], what: Callable[[Layer], float]) -> float:
    """Returns a sum over layers, each as often as it is repeated."""
    return sum(layer.times * what(layer) for layer in layers)
