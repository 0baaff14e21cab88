"""Volumes split along D over the devices of the mesh axis "space".

The axis is the compiler's: it splits whatever depends on a split volume, and exchanges
the planes that convolutions need of their neighbours. What it could only do by putting
a volume together on every device is said here in another way. Where no such axis is
bound, every function gives back what it was given.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

SPACE = "space"
# From here on a volume's channels are split to sample it, instead of its points.
_MANY_CHANNELS = 8


def devices() -> int:
    """Returns over how many devices volumes are split where this is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or SPACE not in mesh.axis_names:
        return 1
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Manual inside of `sampled`: what is seen there is one device's own.
    return mesh.shape[SPACE] if types[SPACE] is AxisType.Auto else 1


def along(array: jax.Array, axis: int) -> jax.Array:
    """Returns the array split along one of its axes."""
    if devices() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, _at(axis))


def turned(array: jax.Array, axis: int, to: int) -> jax.Array:
    """Returns an array that is split along one axis split along another.

    What mixes the places along one axis is worked out split along another. Each device
    sends its part, where the compiler would send the whole array to all.

    Args:
      array: of any shape.
      axis: along which it is split; negative ones count from the end.
      to: along which it shall be.
    """
    if devices() == 1:
        return array
    axis, to = axis % array.ndim, to % array.ndim
    behind = [(0, 0)] * array.ndim
    for even in (axis, to):
        behind[even] = (0, -array.shape[even] % devices())

    def exchange(own):
        return jax.lax.all_to_all(own, SPACE, to, axis, tiled=True)

    result = jax.shard_map(
        exchange,
        in_specs=_at(axis),
        out_specs=_at(to),
        axis_names={SPACE},
        check_vma=False,
    )(jnp.pad(array, behind))
    return result[tuple(map(slice, array.shape))]


def evened(array: jax.Array, unit: int = 1) -> jax.Array:
    """Returns the array with zeros behind, so that each device has as many of D.

    Equal shares are reshaped without an exchange.

    Args:
      array: N D ....
      unit: of so many voxels each device has a whole number.
    """
    return _longer(array, -array.shape[1] % (unit * devices()))


def edged(array: jax.Array, before: int, behind: int) -> jax.Array:
    """Returns the array with its ends along D repeated, at most once each.

    Args:
      array: N D ....
      before: 1 repeats the first plane.
      behind: 1 repeats the last one.
    """
    if not before and not behind:
        return array
    if devices() == 1:
        widths = [(0, 0), (before, behind), *((0, 0),) * (array.ndim - 2)]
        return jnp.pad(array, widths, mode="edge")

    # Not put together of parts, for which the compiler would exchange all of it.
    def moved(by):
        widths = [(0, 0, 0)] * array.ndim
        widths[1] = (by, before + behind - by, 0)
        return jax.lax.pad(array, jnp.zeros((), array.dtype), widths)

    result = moved(before)
    place = jax.lax.broadcasted_iota(jnp.int32, result.shape, 1)
    if before:
        result = jnp.where(place == 0, moved(0), result)
    if behind:
        result = jnp.where(place == result.shape[1] - 1, moved(before + 1), result)
    return result


def sampled(
    function: Callable[..., jax.Array],
    values: jax.Array,
    rows: jax.Array,
    *gradient: jax.Array,
    gives: Literal["samples", "values", "rows"] = "samples",
) -> jax.Array:
    """Returns ``function(values, rows, *gradient)`` of a sampler, each device its part.

    Each device reads all of the values at its own rows, for an image or a field is
    small. Of features, which are not, it reads its own channels at all rows.

    Args:
      function: a sampler or one of its gradients.
      values: N D H W C.
      rows: where they are read, N R P 3.
      gradient: of the samples, N R P C, if there is one.
      gives: whose shape the result has; "samples" are N R P C.
    """
    count = devices()
    if count == 1:
        return function(values, rows, *gradient)
    depth, length, channels = values.shape[1], rows.shape[1], values.shape[-1]
    by_channels = channels >= _MANY_CHANNELS and channels % count == 0
    if not by_channels:
        rows, gradient = evened(rows), tuple(map(evened, gradient))
    behind = -(depth if gives == "values" else length) % count
    # What is summed over devices: over channels, or over points.
    summed = gives == ("rows" if by_channels else "values")

    def own(*arrays):
        result = function(*arrays)
        if not summed:
            return result
        result = _longer(result, behind)
        return jax.lax.psum_scatter(result, SPACE, scatter_dimension=1, tiled=True)

    if by_channels:
        specs = (_at(4), Spec(), *(_at(3) for _ in gradient))
        given = {"samples": _at(3), "values": _at(4), "rows": _at(1)}[gives]
    else:
        specs = (Spec(), *(_at(1) for _ in (rows, *gradient)))
        given = _at(1)
    result = jax.shard_map(
        own,
        in_specs=specs,
        out_specs=given,
        axis_names={SPACE},
        check_vma=False,
    )(values, rows, *gradient)
    return result[:, : depth if gives == "values" else length]


def _at(axis: int) -> Spec:
    return Spec(*(None,) * axis, SPACE)


def _longer(array: jax.Array, behind: int) -> jax.Array:
    if not behind:  # JAX would add nothing, and zeros in the gradient
        return array
    return jnp.pad(array, [(0, 0), (0, behind), *((0, 0),) * (array.ndim - 2)])
