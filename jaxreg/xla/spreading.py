"""One program on several devices, each of which has arguments of its own."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

_Tree = TypeVar("_Tree")
Device = Any
"""One of `jax.devices()`; type checkers take `jax.Device` for a variable."""
_AXIS = "devices"


def mesh_of(devices: Sequence[Device]) -> Mesh:
    """Returns the devices in a row."""
    return Mesh(np.asarray(devices), (_AXIS,))


def each(function: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Returns what calls a function on each device by itself.

    The program is one, and no device sees what belongs to another: whatever the
    function computes over its batch, as a mean, is that of its own.

    Args:
      function: (shared, own) to a result, all of them trees of arrays.
      mesh: the devices.

    Returns:
      A function of trees: `shared` is the same on each device, `own` and the result
      have one entry a device along a first axis of their own, see `place` and `split`.
    """

    def alone(shared, own):
        result = function(shared, jax.tree.map(lambda leaf: leaf[0], own))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)

    return jax.shard_map(
        alone,
        mesh=mesh,
        in_specs=(Spec(), Spec(_AXIS)),
        out_specs=Spec(_AXIS),
        check_vma=False,
    )


def place(trees: Sequence[_Tree], mesh: Mesh) -> _Tree:
    """Returns one tree of which the i-th device holds the i-th of these.

    Args:
      trees: as many as there are devices, of one form and with leaves of one shape.
      mesh: the devices.
    """
    sharding = NamedSharding(mesh, Spec(_AXIS))

    def one(*leaves):
        parts = [
            jax.device_put(jnp.asarray(leaf)[None], device)
            for leaf, device in zip(leaves, mesh.devices.flat, strict=True)
        ]
        shape = (len(parts), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(one, *trees)


def replicate(tree: _Tree, mesh: Mesh) -> _Tree:
    """Returns a tree that is the same on each device."""
    return jax.device_put(tree, NamedSharding(mesh, Spec()))


def split(tree: _Tree, mesh: Mesh, to: Sequence[Device]) -> list[_Tree]:
    """Returns each device's entry of a tree.

    Args:
      tree: of `each`.
      mesh: the devices.
      to: where each entry is to be.
    """

    def of(device, target):
        def entry(leaf):
            (own,) = (s.data for s in leaf.addressable_shards if s.device == device)
            return jax.device_put(own, target)[0]

        return jax.tree.map(entry, tree)

    return [of(*pair) for pair in zip(mesh.devices.flat, to, strict=True)]
