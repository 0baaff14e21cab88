"""Parallel training: a step on one device, on a mesh of devices and hosts, or by pmap.

The step of `training.step` sees one device's share of the batch and the name of the
axis over which the batch is split. Here that axis is bound:

  single  ``jax.jit``, no axis
  mesh    ``jax.jit`` of a ``jax.shard_map`` over the mesh axis "data"; the axis "space"
          stays with the compiler, which splits volumes along D and exchanges halos
  pmap    ``jax.pmap`` of the same function

The global batch and its gradient are the same in all three, whatever the number of
devices. On a mesh the optimiser's state may be split over "data": the gradient is then
taken within the `jax.shard_map`, and the update outside of it, split by the compiler as
the state is.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxreg.errors import UserError
from jaxreg.training.state import TrainState
from jaxreg.training.step import TrainStep
from jaxreg.typing import Pair
from jaxreg.xla import lowered_cache, splitting
from jaxreg.xla.splitting import SPACE

Kind = Literal["single", "mesh", "pmap"]
DATA = "data"
# How long one that ends waits for the others, seconds. JAX's own 5 minutes are how long
# an error would take to end a run.
_PATIENCE_S = 60


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which devices share the work, and how.

    Attributes:
      kind: see the module.
      data: devices (of all processes) that share the batch.
      space: devices that share each volume, along D.
      mesh: of the devices, (data, space); None for "single".
      shard_optimizer: whether each "data" device holds its part alone of the
        optimiser's state and of the moving average.
    """

    kind: Kind
    data: int = 1
    space: int = 1
    mesh: Mesh | None = None
    shard_optimizer: bool = False

    @property
    def axis(self) -> str | None:
        """The name of the axis that splits the batch."""
        return None if self.kind == "single" else DATA


def make_layout(
    kind: Kind | Literal["auto"] = "auto",
    *,
    space: int = 1,
    shard_optimizer: bool = False,
    devices: list[Any] | None = None,
) -> Layout:
    """Returns the layout over all devices of all processes.

    Args:
      kind: "auto" takes "single" on one device, else "mesh".
      space: devices per volume; must divide each process' number of devices.
      shard_optimizer: see `Layout`; one device holds all of it in any case.
      devices: all of `jax.devices()` if None.

    Raises:
      UserError: `space` does not fit, or the kind cannot have it.
    """
    devices = list(jax.devices() if devices is None else devices)
    if kind == "auto":
        kind = "single" if len(devices) == 1 else "mesh"
    if kind == "single":
        if space > 1:
            raise UserError(
                f'space is {space}, but parallel is "single"; take "mesh" to split '
                "volumes over devices"
            )
        if jax.process_count() > 1:
            raise UserError(
                f'parallel is "single", but {jax.process_count()} processes take '
                'part; take "mesh"'
            )
        return Layout("single")
    local = sum(d.process_index == jax.process_index() for d in devices)
    if space < 1 or local % space:
        raise UserError(
            f"space is {space}, but each process has {local} devices; take a divisor"
        )
    if kind == "pmap" and space > 1:
        raise UserError('pmap splits batches only; take parallel "mesh" for space > 1')
    if kind == "pmap" and shard_optimizer:
        raise UserError(
            "pmap keeps the whole of the optimiser's state on each device; take "
            'parallel "mesh" for shard_optimizer'
        )
    shape = (len(devices) // space, space)
    mesh = Mesh(_arranged(devices, space), (DATA, SPACE), (AxisType.Auto,) * 2)
    return Layout(kind, *shape, mesh, shard_optimizer)


def _arranged(devices: list[Any], space: int) -> np.ndarray:
    """Returns the devices, data space; those that share a volume are neighbours.

    Those of a process stay together, in the order of the processes.
    """
    if space == 1 or getattr(devices[0], "platform", "") != "tpu":
        return np.array(devices).reshape(-1, space)
    processes: dict[int, list[Any]] = {}
    for device in devices:
        processes.setdefault(device.process_index, []).append(device)
    # In their own order a ring of chips has long ways, on which libtpu 0.0.42 aborts.
    rows = [
        mesh_utils.create_device_mesh((len(own) // space, space), own)
        for own in processes.values()
    ]
    return np.concatenate(rows)


def check_batch(
    batch: int, layout: Layout, *, accumulate: int, replicas: int
) -> tuple[int, int]:
    """Checks that a global batch can be shared out.

    Returns:
      (replicas per device, devices per replica): one of the two is 1, or the first is 0
      without replicas.

    Raises:
      UserError: the batch, its parts or its replicas do not divide evenly.
    """
    share, rest = divmod(batch, layout.data * accumulate)
    if rest or not share:
        raise UserError(
            f"batch is {batch}, which {layout.data} devices (data) and {accumulate} "
            f"accumulated parts cannot share evenly; take a multiple of "
            f"{layout.data * accumulate}"
        )
    if not replicas:
        return 0, 1
    even = not (replicas % layout.data and layout.data % replicas)
    if not even or (batch // accumulate) % replicas:
        raise UserError(
            f"replicas is {replicas}, expected a multiple or a divisor of the "
            f"{layout.data} devices that divides the {batch // accumulate} pairs "
            "worked off at once; take 0 for statistics over the whole batch"
        )
    return max(replicas // layout.data, 1), max(layout.data // replicas, 1)


def compile_step(step: Callable, layout: Layout, *, donate: bool = True) -> Callable:
    """Returns ``compiled(state, batch) -> (state, parts)``.

    Args:
      step: from `make_train_step`, made with `layout.axis`; pure. On one device it is
        lowered once for all starts, see `lowered_cache.kept`.
      layout: what to run it on; state and batch must have been placed for it.
      donate: the state's buffers are reused, so the caller's state is gone.
    """
    donated = (0,) if donate else ()
    if layout.kind == "single":
        return jax.jit(lowered_cache.kept(step), donate_argnums=donated)
    if layout.kind == "pmap":
        chosen = list(_mesh(layout).devices.flat)
        # Named only if there are others: the order of all of them is pmap's affair.
        named = chosen if len(chosen) < jax.device_count() else None
        return jax.pmap(step, axis_name=DATA, devices=named, donate_argnums=donated)
    if not layout.shard_optimizer:
        mapped = _over_data(step, layout, Spec(), Spec(DATA))
        return jax.jit(mapped, donate_argnums=donated)
    assert isinstance(step, TrainStep)  # others have no optimiser
    gradient = _over_data(step.parts_of, layout, Spec(), Spec(DATA), Spec())
    split = dataclasses.replace(step, parts_of=gradient)

    def run(state, batch):
        state, parts = split(state, batch)
        placed = jax.lax.with_sharding_constraint(state, _shardings(state, layout))
        return placed, parts

    return jax.jit(run, donate_argnums=donated)


def _over_data(function: Callable, layout: Layout, *specs: Spec) -> Callable:
    """Returns a function that runs on each "data" device; results are the same on all.

    With check_vma=False, that is pmap's rule for gradients: the mean over devices of
    the gradient of the averaged loss. With it on, collectives would count twice.
    """
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=Spec(),
        axis_names={DATA},
        check_vma=False,
    )


def constrain(pair: Pair, layout: Layout) -> Pair:
    """Returns the pair with its volumes split along D over the axis "space".

    To be called inside the step; without such an axis nothing happens.
    """
    if layout.space == 1:
        return pair

    return jax.tree.map(lambda a: splitting.along(a, 1) if a.ndim == 5 else a, pair)


def _shardings(state: Any, layout: Layout) -> Any:
    """Returns where the leaves of a state, or of another tree, are on a mesh."""
    whole = NamedSharding(_mesh(layout), Spec())
    found = jax.tree.map(lambda _: whole, state)
    if not layout.shard_optimizer or not isinstance(state, TrainState):
        return found

    def split(leaf):
        # The longest axis that the devices can share evenly; small arrays are whole.
        even = [n if n % layout.data == 0 else 0 for n in leaf.shape]
        if not any(even):
            return whole
        axis = even.index(max(even))
        return NamedSharding(_mesh(layout), Spec(*(None,) * axis, DATA))

    split_fields = {
        name: jax.tree.map(split, getattr(state, name)) for name in ("opt_state", "ema")
    }
    return dataclasses.replace(found, **split_fields)


def place_state(state: Any, layout: Layout) -> Any:
    """Returns a copy of the state on all devices; see `Layout.shard_optimizer`."""
    if layout.kind == "single":
        return jax.tree.map(jax.numpy.array, state)
    if layout.kind == "pmap":
        n = len(_mesh(layout).local_devices)
        return jax.tree.map(lambda a: jax.numpy.stack([a] * n), state)

    def put(leaf, sharding):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, sharding, functools.partial(_part, host)
        )

    return jax.tree.map(put, state, _shardings(state, layout))


def _part(host: np.ndarray, index) -> np.ndarray:
    return host[index]


def fetch_state(state: Any, layout: Layout) -> Any:
    """Returns one copy of the state, or of some of it, that the host can read.

    Every process calls it: what is split over processes is put together, array by
    array, in host memory.
    """
    if layout.kind == "pmap":
        return jax.tree.map(lambda a: a[0], state)

    def whole(leaf):
        split = isinstance(leaf, jax.Array) and not leaf.is_fully_replicated
        if not split or leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, state)


def place_batch(batch: Mapping[str, np.ndarray], layout: Layout) -> dict[str, Any]:
    """Returns this process' share of a batch on its devices.

    Args:
      batch: arrays with the pairs of this process along axis 0.
      layout: where they go; each device gets its contiguous share.
    """
    if layout.kind == "single":
        return {name: jax.device_put(array) for name, array in batch.items()}
    if layout.kind == "pmap":
        n = len(_mesh(layout).local_devices)
        return {k: a.reshape(n, -1, *a.shape[1:]) for k, a in batch.items()}
    split = NamedSharding(_mesh(layout), Spec(DATA))
    return {
        name: jax.make_array_from_process_local_data(split, array)
        for name, array in batch.items()
    }


def placed_shapes(state: Any, batch: Any, layout: Layout) -> tuple[Any, Any]:
    """Returns the shapes and shardings for which a step is lowered.

    Args:
      state: tree of `jax.ShapeDtypeStruct`, or of arrays.
      batch: the same, of the global batch.
      layout: for which `place_state` and `place_batch` would place them.
    """
    if layout.kind == "single":
        return jax.tree.map(_shape, (state, batch))
    if layout.kind == "pmap":
        n = len(_mesh(layout).local_devices)
        share = layout.data
        return (
            jax.tree.map(lambda a: _shape(a, (n, *a.shape)), state),
            jax.tree.map(
                lambda a: _shape(a, (n, a.shape[0] // share, *a.shape[1:])), batch
            ),
        )
    split = NamedSharding(_mesh(layout), Spec(DATA))
    return (
        jax.tree.map(
            lambda a, place: _shape(a, sharding=place), state, _shardings(state, layout)
        ),
        jax.tree.map(lambda a: _shape(a, sharding=split), batch),
    )


def _shape(leaf: Any, shape: Any = None, sharding: Any = None) -> jax.ShapeDtypeStruct:
    kind = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
    found = leaf.shape if shape is None else shape
    return jax.ShapeDtypeStruct(found, kind, sharding=sharding)


def fetch_parts(parts: Mapping[str, Any], layout: Layout) -> dict[str, float]:
    """Returns a step's numbers on the host; waits for the step."""
    one = fetch_state(dict(parts), layout)
    return {name: float(value) for name, value in jax.device_get(one).items()}


def start_processes(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    heartbeat_s: int = 100,
    *,
    patience_s: int = _PATIENCE_S,
) -> None:
    """Joins this process to the others; before anything asks JAX for devices.

    Args:
      coordinator: HOST:PORT of process 0. None where JAX finds all three itself: under
        SLURM, Open MPI, Kubernetes and on Cloud TPU pods.
      count: number of processes.
      index: this one's, from 0.
      heartbeat_s: silence of another after which JAX aborts; `peers` says more, sooner.
      patience_s: how long one that ends waits for the others.

    Raises:
      UserError: the others cannot be found.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=patience_s,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes cannot be joined ({error}); give `coordinator` HOST:PORT, "
            "`processes` and `process` to each"
        ) from error


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def same_everywhere(text: str) -> bool:
    """Whether all processes have the same text; every one calls it."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(digest))
    return bool((found == digest).all())


def from_first_process(text: str) -> str:
    """Returns the first process' text on all of them; at most 1000 bytes of it."""
    if jax.process_count() == 1:
        return text
    room = np.zeros(1000, np.uint8)
    octets = np.frombuffer(text.encode()[: len(room)], np.uint8)
    room[: len(octets)] = octets
    sent = np.asarray(multihost_utils.broadcast_one_to_all(room))
    return sent.tobytes().rstrip(b"\0").decode(errors="ignore")


def _mesh(layout: Layout) -> Mesh:
    assert layout.mesh is not None  # every kind but "single" has one
    return layout.mesh
