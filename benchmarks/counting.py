"""Arithmetic and least bytes of a program's layers, noted while it is traced.

The program is traced on abstract arrays; nothing is compiled. While it is, flax tells
which layers with parameters are called on what, and the functions that do the rest
(sampling, resizing, norms, correlation, filters, losses) note their own calls. Each
becomes a `Layer`, counted by hand from its shapes (`counting_rules`): a multiply-add is
2 operations, and inputs, weights and outputs move once. What can be fused into a
neighbour (activations, biases, sums, concatenations, batch norm in use) is not counted.

Two counts of arithmetic: `flops` is what the layer is defined to need, `built` what
jaxreg's form for GPU and TPU does, with the zeros that it multiplies: the fourth tap of
strided kernels, whole matrices where a filter is a band.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import numpy as np
from flax import linen as nn

Kind = Literal["matrix", "vector", "gather"]


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


class Recorder:
    """Takes layers while a program is traced."""

    def __init__(self):
        """Starts without layers, outside all modules."""
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
        path = "/".join(self.path)
        group = scope.pop("prefix", "") + more.pop("group", what)
        more = {"built": flops, **more, **scope}
        name = "/".join(part for part in (path, what) if part)
        self.layers.append(Layer(name, group, kind, flops, **more))


def arrays_of(tree: Any) -> tuple[Array, ...]:
    """Returns the arrays of a tree."""
    return tuple(
        Array(tuple(leaf.shape), np.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is noted, and how.

    Attributes:
      modules: class of a flax layer to ``f(recorder, module, args, kwargs, result)``.
      functions: function to ``f(recorder, args, kwargs, result)``; what it calls is not
        noted besides.
      scopes: function to ``f(args, kwargs)``: what is said of the layers inside it, see
        `Recorder.inside`; besides, "quiet" if they are not noted, and "note", called as
        ``f(recorder, args, result)`` at its end.
      methods: the same for (class, name of a method).
      tables: (module, name) of mappings of functions that are rules' or have scopes.
      package: in whose modules functions are replaced.
    """

    modules: Mapping[type, Callable]
    functions: Mapping[Callable, Callable]
    scopes: Mapping[Callable, Callable]
    methods: Mapping[tuple[type, str], Callable]
    tables: Sequence[tuple[Any, str]]
    package: str


def record(rules: Rules, function: Callable, *args: Any) -> list[Layer]:
    """Returns the layers that a function calls on abstract arguments.

    Args:
      rules: what is noted.
      function: of arrays; traced, neither compiled nor run.
      *args: trees of arrays or `jax.ShapeDtypeStruct`.
    """
    recorder = Recorder()
    with _listening(recorder, rules), nn.intercept_methods(_heard(recorder, rules)):
        # A new function each time: nothing is taken from the cache of traces.
        jax.eval_shape(lambda *a: function(*a), *args)
    return recorder.layers


def _heard(recorder: Recorder, rules: Rules):
    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        before, recorder.path = recorder.path, list(module.path)
        try:
            found = call(*args, **kwargs)
            note = rules.modules.get(type(module))
            if note is not None:
                note(recorder, module, args, kwargs, found)
        finally:
            recorder.path = before
        return found

    return intercept


@contextlib.contextmanager
def _listening(recorder: Recorder, rules: Rules):
    """Replaces the functions of the rules wherever they are named."""
    replaced = {f: _noted(recorder, f, note) for f, note in rules.functions.items()}
    for function, scope in rules.scopes.items():
        replaced[function] = _scoped(recorder, function, scope)
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] != rules.package:
                continue
            for key, value in list(vars(module).items()):
                if callable(value) and value in replaced:
                    stack.enter_context(mock.patch.object(module, key, replaced[value]))
        for module, name in rules.tables:
            table = {k: replaced.get(f, f) for k, f in getattr(module, name).items()}
            stack.enter_context(mock.patch.object(module, name, table))
        for (owner, name), scope in rules.methods.items():
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
