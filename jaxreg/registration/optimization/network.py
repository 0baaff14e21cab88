"""Instance optimisation of a network's weights for one pair.

Every optimisation repeats one jitted step. Iteration i evaluates the objective and
updates; the last iteration's update is dropped, so that its maps and numbers are those
of the final parameters without a second compiled program.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxreg.losses.objective import Objective
from jaxreg.models.base import RegistrationModel
from jaxreg.registration.optimization import loop
from jaxreg.registration.optimization.loop import Optimized, Progress, Report
from jaxreg.training import step as step_lib
from jaxreg.typing import Key, Pair, Variables
from jaxreg.xla import spreading


@functools.partial(jax.jit, static_argnames="model")
def _predict(model, variables, pair):
    maps, _ = step_lib.predict(model, variables, pair)
    return maps.forward, maps.backward


@functools.partial(jax.jit, static_argnames="model")
def _auxiliaries(model, variables, pair):
    return model.apply(variables, pair.moving, pair.fixed)[0].aux


def auxiliaries(
    model: RegistrationModel, variables: Variables, pair: Pair
) -> dict[str, np.ndarray]:
    """Returns the model's outputs for moving and fixed besides the transform.

    Only that is computed: the compiler leaves out the rest of the network.
    """
    found = _auxiliaries(model, variables, pair)
    return {name: np.asarray(value) for name, value in found.items()}


def predict(model: RegistrationModel, variables: Variables, pair: Pair) -> Optimized:
    """Returns the model's predicted transforms, in evaluation mode."""
    return Optimized(*_predict(model, variables, pair))


@jax.jit
def _network_start(variables):
    """A copy of the weights, which the steps overwrite, and Adam's state."""
    variables = jax.tree.map(jnp.copy, variables)
    return variables, optax.adam(0.0).init(variables["params"])  # whatever the rate


@functools.partial(
    jax.jit, static_argnames=("model", "objective"), donate_argnames="state"
)
def _network_step(state, index, pair, key, noise, learning_rate, *, model, objective):
    step = step_lib.make_step(model, objective, optax.adam(learning_rate), train=False)
    draw = loop.draw_noise(key, index, pair.fixed.shape[1:4], noise)
    variables, adam, parts, maps = step(*state, pair, draw)
    return (variables, adam), parts, (maps.forward, maps.backward)


def _network_loop(
    variables, pair, key, noise, learning_rate, *, model, objective, steps, report
):
    def step(state, index):
        return _network_step(
            state, index, pair, key, noise, learning_rate,
            model=model, objective=objective,
        )  # fmt: skip

    return loop.repeat(step, _network_start(variables), steps, report)


def optimize_network(
    model: RegistrationModel,
    variables: Variables,
    pair: Pair,
    objective: Objective,
    *,
    steps: int = 50,
    learning_rate: float = 2e-5,
    key: Key,
    noise: jax.Array | None = None,
    progress: Progress | None = None,
) -> Optimized:
    """Returns the transforms after adapting a copy of the weights to one pair.

    Adam over all parameters, batch norm's affine ones included, in evaluation mode:
    running statistics are used and stay. The given variables are not changed.

    Args:
      model: the network.
      variables: its weights; the optimisation works on a copy.
      pair: the images on the network grid, N D H W C, and what the objective needs.
      objective: what is minimised.
      steps: number of updates, at least 1.
      learning_rate: of Adam (beta 0.9 and 0.999, epsilon 1e-8).
      key: draws the jitter of each step.
      noise: the jitter itself instead, steps + 1 of 1 D H W 3.
      progress: called after each step.

    References:
      Tian et al., uniGradICON, MICCAI 2024, section 2.3.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    variables = model.cache_features(variables, pair.moving, pair.fixed)
    found = _network_loop(
        dict(variables),
        pair,
        key,
        noise,
        learning_rate,
        model=model,
        objective=objective,
        steps=steps,
        report=None if progress is None else Report(progress, steps),
    )
    forward, backward = found[0]
    return Optimized(forward, backward, found[1])


# --- several pairs at once, each on a device of its own ------------------------------


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _predict_each(model, mesh, variables, pairs):
    def one(variables, pair):
        return _predict(model, variables, pair)

    return spreading.each(one, mesh)(variables, pairs)


def predict_each(
    model: RegistrationModel,
    variables: Variables,
    pairs: Sequence[Pair],
    mesh: Mesh,
    to: Sequence[spreading.Device],
) -> list[Optimized]:
    """Returns what `predict` gives for each of several pairs, to float rounding.

    Args:
      model: the network.
      variables: its weights.
      pairs: one for each device, alike in form and shapes.
      mesh: the devices.
      to: where each result is to be.
    """
    on_all = spreading.replicate(variables, mesh)
    found = _predict_each(model, mesh, on_all, spreading.place(pairs, mesh))
    return [Optimized(*maps) for maps in spreading.split(found, mesh, to)]


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _start_each(model, mesh, variables, pairs):
    def one(variables, pair):
        own = model.cache_features(variables, pair.moving, pair.fixed)
        return _network_start(dict(own))

    return spreading.each(one, mesh)(variables, pairs)


@functools.partial(
    jax.jit, static_argnames=("model", "objective", "mesh"), donate_argnames="states"
)
def _step_each(states, index, pairs, key, learning_rate, *, model, objective, mesh):
    def one(shared, own):
        index, key, learning_rate = shared
        state, pair = own
        return _network_step(
            state, index, pair, key, None, learning_rate,
            model=model, objective=objective,
        )  # fmt: skip

    return spreading.each(one, mesh)((index, key, learning_rate), (states, pairs))


def optimize_each(
    model: RegistrationModel,
    variables: Variables,
    pairs: Sequence[Pair],
    objective: Objective,
    mesh: Mesh,
    to: Sequence[spreading.Device],
    *,
    steps: int = 50,
    learning_rate: float = 2e-5,
    key: Key,
) -> list[Optimized]:
    """Returns what `optimize_network` gives for each of several pairs, to rounding.

    Each device adapts weights of its own, by its own pair's objective.

    Args:
      model: the network.
      variables: its weights.
      pairs: one for each device, alike in form and shapes.
      objective: what is minimised.
      mesh: the devices.
      to: where each result is to be.
      steps: see `optimize_network`.
      learning_rate: see `optimize_network`.
      key: draws the jitter of each step, the same for every pair.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    placed = spreading.place(pairs, mesh)

    def step(states, index):
        return _step_each(
            states, index, placed, key, learning_rate,
            model=model, objective=objective, mesh=mesh,
        )  # fmt: skip

    start = _start_each(model, mesh, spreading.replicate(variables, mesh), placed)
    found, history = loop.repeat(step, start, steps)
    return [
        Optimized(
            forward, backward, {name: values[:, i] for name, values in history.items()}
        )
        for i, (forward, backward) in enumerate(spreading.split(found, mesh, to))
    ]
