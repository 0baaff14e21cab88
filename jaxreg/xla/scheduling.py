"""Data dependencies that stop XLA:CPU hoisting work.

XLA's CPU backend drops optimisation barriers before it merges equal computations and
schedules the rest. What a backward pass was to compute again is then computed in the
forward pass and kept, zeros for later are allocated at once, and a donated parameter
that is read in two unordered places is copied. Here a result is tied to what it should
wait for by a number that no compiler may leave out: zero times one of its values, which
need not be zero. On other platforms the barriers hold and serve.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.xla import platforms


def _one(array: jax.Array) -> jax.Array:
    """Returns a value from the middle, for edges may be known to be padding."""
    return array[tuple(n // 2 for n in array.shape)]


@jax.jit  # traced once for each shape
def depends_on(array: jax.Array, to: jax.Array) -> jax.Array:
    """Returns the array, on CPU not before `to` is known; NaN where that is not finite.

    Args:
      array: of any shape.
      to: of any shape; if it has the array's first axis, each entry of that waits for
        its own, so that nothing crosses the devices of a batch.
    """

    def waiting(array, to):
        if array.ndim and to.ndim and array.shape[0] == to.shape[0]:
            value = jax.vmap(_one)(to).reshape(-1, *(1,) * (array.ndim - 1))
        else:
            value = _one(to)
        return array + 0 * value.astype(array.dtype)

    return platforms.dependent(array, to, cpu=waiting, default=lambda array, _: array)


def empty_after(
    shape: tuple[int, ...], like: jax.Array, dtype: Any = None
) -> jax.Array:
    """Returns an array with anything in it, allocated once `like` is known."""
    return jnp.broadcast_to(_one(like).astype(dtype or like.dtype), shape)


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Returns zeros, on CPU allocated once `like` is known and is finite."""
    return platforms.dependent(
        like,
        cpu=lambda like: 0 * empty_after(shape, like),
        default=lambda like: jnp.zeros(shape, like.dtype),
    )


def mapped(function: Callable[[Any], jax.Array], xs, *, like: jax.Array) -> jax.Array:
    """`jax.lax.map`, its result allocated once `like` is known; not differentiable.

    Args:
      function: of one entry of `xs`.
      xs: arrays with one first axis.
      like: what to wait for.
    """
    count = len(jax.tree.leaves(xs)[0])
    entry = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    found = jax.eval_shape(function, entry)
    # Of the result's own type: labels that are read at places are whole numbers.
    first = empty_after((count, *found.shape), like, found.dtype)

    def one(results, given):
        index, x = given
        return lax.dynamic_update_index_in_dim(results, function(x), index, 0), None

    return lax.scan(one, first, (jnp.arange(count), xs))[0]


def recomputed(
    function: Callable[..., jax.Array],
    x: Any,
    /,
    *parameters: jax.Array,
    **settings: Any,
) -> jax.Array:
    """Returns ``function(x, *parameters, **settings)``, keeping these for the gradient.

    `jax.checkpoint` for one layer, but on CPU as well: see the module.

    Args:
      function: a module's own, so that it is traced once for each shape and setting.
      x: arrays, N first.
      *parameters: those that are smaller than x wait as well; a larger one is kept in
        any case, and would be copied.
      **settings: not arrays; hashable.
    """
    return _recomputed(function, tuple(sorted(settings.items())), x, parameters)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function, settings, x, parameters):
    return function(x, *parameters, **dict(settings))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(function, settings, x, parameters):
    return _run(function, settings, x, parameters)


def _forward(function, settings, x, parameters):
    return _run(function, settings, x, parameters), (x, parameters)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(function, settings, saved, dy):
    (x, parameters), dy = lax.optimization_barrier((saved, dy))
    size = sum(leaf.size for leaf in jax.tree.leaves(x))
    x = jax.tree.map(lambda leaf: depends_on(leaf, dy), x)
    parameters = tuple(depends_on(p, dy) if p.size < size else p for p in parameters)
    _, pull = jax.vjp(lambda *a: function(a[0], *a[1], **dict(settings)), x, parameters)
    dx, gradients = pull(dy)
    # What updates a parameter in place must come after whatever else reads it.
    last = jax.tree.leaves(dx)[0]
    return dx, tuple(depends_on(gradient, last) for gradient in gradients)


_recomputed.defvjp(_forward, _backward)
