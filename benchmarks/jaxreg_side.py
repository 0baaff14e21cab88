"""The tasks of a benchmark in jaxreg."""

import dataclasses
import functools
import pathlib
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from contestants import (
    LEARNING_RATE,
    NETWORKS,
    Built,
    Job,
    Network,
    Precision,
    images_of,
)

MATMUL: Mapping[str, str] = types.MappingProxyType(
    {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
)
"""JAX's default precision of products for each precision asked for."""
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def at_precision(model: Any, precision: Precision) -> Any:
    """Returns a network whose activations are bfloat16, if asked for.

    TF32 is of products alone, by JAX's default (`MATMUL`).
    """
    if precision != "bfloat16":
        return model
    return dataclasses.replace(model.config, precision="bfloat16").build()


def objective_of(network: Network) -> Any:
    """Returns what its training minimises, without labels."""
    from jaxreg.experiments import files
    from jaxreg.losses.objective import Objective

    if not network.recipe:
        return Objective()
    found = files.load(CONFIGS / f"{network.recipe}.py").objective
    return dataclasses.replace(found, dice_weight=0.0)


@dataclasses.dataclass
class Stopwatch:
    """Wall and processor seconds of what runs inside it."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self):
        """Starts."""
        self._start = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *_):
        """Stops."""
        self.wall = time.perf_counter() - self._start[0]
        self.cpu = time.process_time() - self._start[1]


def build(job: Job, objective: Any = None) -> Built:
    """Returns a task of jaxreg, compiled.

    Args:
      job: the task.
      objective: of a step, in place of the one that the network's recipe has.
    """
    import jax
    import jax.numpy as jnp

    from jaxreg.typing import Pair
    from jaxreg.weights import load

    loaded = load.load(str(pathlib.Path(job.folder) / "weights"))
    model = at_precision(loaded.model, job.precision)
    variables = jax.tree.map(jnp.array, dict(loaded.variables))
    del loaded  # a second copy of the weights
    moving, fixed = (
        jnp.moveaxis(jnp.asarray(image), 1, -1)
        for image in images_of(job.folder, job.batch)
    )
    pair = Pair(moving, fixed, task=jnp.zeros(job.batch, jnp.int32))
    device = jax.devices()[0]

    def peak():
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    step = functools.partial(_jaxreg_step, objective=objective)
    make = {"forward": _jaxreg_forward, "train": step, "io": step}
    build = _jaxreg_optimisation if job.io_steps else make[job.task]
    with jax.default_matmul_precision(MATMUL[job.precision]):
        run, first, compiled = build(job, model, variables, pair)
    return Built(run, first, device.device_kind, compiled, peak=peak)


def _jaxreg_forward(_job: Job, model, variables, pair):
    import jax

    shape = pair.fixed.shape[1:4]

    def forward(variables, pair):
        found = model.apply(variables, pair.moving, pair.fixed, task=pair.task)
        return found[0].transform.on_grid(shape)

    with Stopwatch() as watch:
        program = jax.jit(forward).lower(variables, pair).compile()

    def once():
        return jax.block_until_ready(program(variables, pair))

    first = np.moveaxis(np.asarray(once()), -1, 1)
    return once, first, (watch.wall, watch.cpu)


def _jaxreg_step(job: Job, model, variables, pair, *, objective):
    import jax
    import optax

    from jaxreg.losses.objective import Objective
    from jaxreg.training.step import make_step

    training = job.task == "train"
    if objective is None:
        objective = objective_of(NETWORKS[job.network]) if training else Objective()
    optimizer = optax.adam(LEARNING_RATE)
    step = make_step(model, objective, optimizer, train=training)
    # No maps among the results, as in a training loop.
    program = jax.jit(lambda *a: step(*a)[:3], donate_argnums=(0, 1))
    state = [variables, optimizer.init(variables["params"])]
    noise = jax.random.normal(jax.random.key(0), (1, *pair.fixed.shape[1:4], 3))
    with Stopwatch() as watch:
        program = program.lower(*state, pair, 0 * noise).compile()

    def once(noise=noise):
        state[0], state[1], parts = program(*state, pair, noise)
        return float(jax.block_until_ready(parts["loss"]))

    return once, once(0 * noise), (watch.wall, watch.cpu)


def _jaxreg_optimisation(job: Job, model, variables, pair):
    import jax

    from jaxreg.losses.objective import Objective
    from jaxreg.registration.optimization import network as network_lib

    precision = MATMUL[job.precision]

    def once():
        with jax.default_matmul_precision(precision):
            found = network_lib.optimize_network(
                model,
                variables,
                pair,
                Objective(),
                steps=job.io_steps,
                learning_rate=LEARNING_RATE,
                key=jax.random.key(0),
            )
        jax.block_until_ready((found.forward, found.backward))
        return float(found.history["loss"][-1])

    # Compilation is what the first of two equal calls takes longer.
    with Stopwatch() as first:
        loss = once()
    with Stopwatch() as second:
        once()
    return once, loss, (first.wall - second.wall, first.cpu - second.cpu)
