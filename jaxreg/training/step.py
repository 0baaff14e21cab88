"""One evaluation of a model on a pair, and one training step: pure functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxreg.models.base import RegistrationModel
from jaxreg.space.transform import Transform
from jaxreg.training.state import TrainState, changing
from jaxreg.typing import Batching, Key, Pair, Points, Variables

Parts = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


class Loss(Protocol):
    """What is minimised: `losses.objective.Objective` or one like it."""

    @property
    def directions(self) -> Literal["both", "forward"]:
        """Which transforms it looks at."""
        ...

    def __call__(
        self,
        forward: Transform,
        backward: Transform | None,
        pair: Pair,
        noise: Points,
        *,
        aux: Mapping[str, jax.Array] = ...,
        axis: str | None = None,
    ) -> tuple[jax.Array, Parts]:
        """Returns (loss, parts), of the whole batch where `axis` splits it."""
        ...


class Maps(NamedTuple):
    """Transforms that a model predicts for a batch of pairs.

    Attributes:
      forward: fixed to moving points, unit.
      backward: moving to fixed points, unit; None if it was not asked for.
      aux: the model's auxiliary values, one entry per pair; of two directions the mean.
    """

    forward: Transform
    backward: Transform | None
    aux: dict[str, jax.Array]


def predict(
    model: RegistrationModel,
    variables: Variables,
    pair: Pair,
    *,
    directions: Literal["both", "forward"] = "both",
    train: bool = False,
    replicas: int = 0,
    axis: str | None = None,
    span: int = 1,
) -> tuple[Maps, Variables]:
    """Returns the forward and backward transforms, and the variables after both.

    One call of the network on both directions, end to end in the batch: moving onto
    fixed, then fixed onto moving. In training mode each direction has its own batch
    statistics, and the running ones are updated twice, as in the original's two calls.

    Args:
      model: the network.
      variables: its variables.
      pair: the two images.
      directions: "forward" leaves the backward transform out, and half the work.
      train: batch statistics instead of running ones.
      replicas: see `jaxreg.typing.Batching`.
      axis: see `jaxreg.typing.Batching`.
      span: see `jaxreg.typing.Batching`.
    """
    calls = 2 if directions == "both" else 1
    views = [(pair.moving, pair.fixed), (pair.fixed, pair.moving)][:calls]
    moving, fixed = (jnp.concatenate(images) for images in zip(*views, strict=True))
    found, variables = model.apply(
        variables,
        moving,
        fixed,
        **_conditions(pair, calls),
        train=train,
        batching=Batching(
            calls=calls,
            replicas=replicas,
            mirrored=calls == 2,
            axis=axis,
            span=span,
        ),
    )
    count = len(pair.moving)

    def per_pair(value):
        if value.ndim == 0:
            return jnp.broadcast_to(value, count)
        return value.reshape(calls, count, *value.shape[1:]).mean(0)

    aux = {name: per_pair(value) for name, value in found.aux.items()}
    forward, *backward = found.transform.split(calls)
    return Maps(forward, backward[0] if backward else None, aux), variables


def _conditions(pair: Pair, calls: int) -> dict[str, jax.Array]:
    """Returns what the network is conditioned on, for each pair and direction."""
    given = {"task": pair.task, "smoothness": pair.smoothness}
    return {
        n: jnp.tile(value, calls) for n, value in given.items() if value is not None
    }


def evaluate(
    model: RegistrationModel,
    variables: Variables,
    pair: Pair,
    noise: Points,
    *,
    objective: Loss,
    train: bool = False,
    replicas: int = 0,
    axis: str | None = None,
    span: int = 1,
) -> tuple[jax.Array, tuple[Parts, Maps, Variables]]:
    """Returns (loss, (parts, maps, variables after it)).

    Args:
      model: the network.
      variables: its variables.
      pair: the two images and what the objective needs besides.
      noise: standard normal, 1 D H W 3, shared by the batch.
      objective: what is minimised.
      train: batch statistics instead of running ones.
      replicas: see `jaxreg.typing.Batching`.
      axis: the mapped axis over which the batch is split; the loss is the whole one's.
      span: see `jaxreg.typing.Batching`.
    """
    maps, variables = predict(
        model,
        variables,
        pair,
        directions=objective.directions,
        train=train,
        replicas=replicas,
        axis=axis,
        span=span,
    )
    loss, parts = objective(
        maps.forward, maps.backward, pair, noise, aux=maps.aux, axis=axis
    )
    return loss, (parts, maps, variables)


def make_step(
    model: RegistrationModel,
    objective: Loss,
    optimizer: optax.GradientTransformation,
    *,
    train: bool = True,
) -> Callable:
    """Returns ``step(variables, opt_state, pair, noise)``, to be jitted by the caller.

    The step returns (variables, opt_state, parts, maps); parts and maps are those
    before the update. All parameters are trained; in training
    mode the running statistics are updated twice.
    """

    def step(variables, opt_state, pair, noise):
        def loss_of(params):
            return evaluate(
                model,
                {**variables, "params": params},
                pair,
                noise,
                objective=objective,
                train=train,
            )

        params = variables["params"]
        gradient, aux = jax.grad(loss_of, has_aux=True)(params)
        parts, maps, after = aux
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return {**after, "params": params}, opt_state, parts, maps

    return step


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How one training step is computed.

    Attributes:
      accumulate: the batch is worked off in this many parts, one after the other, and
        their gradients are averaged.
      replicas: 0: batch statistics over the global batch (of a part). Otherwise the
        number of replicas on this device that have statistics of their own.
      ema: decay per step of the moving average of the variables, 0 for none.
      axis: the mapped axis over which the batch is split, None on one device.
      span: with one replica per device: how many devices share a replica.
    """

    accumulate: int = 1
    replicas: int = 0
    ema: float = 0.0
    axis: str | None = None
    span: int = 1


def make_train_step(
    model: RegistrationModel,
    objective: Loss,
    optimizer: optax.GradientTransformation,
    prepare: Callable[[Batch, Key], Pair],
    config: StepConfig = StepConfig(),
) -> "TrainStep":
    """Returns ``step(state, batch) -> (state, parts)`` for one device's share.

    A pure function, to be compiled by `parallel.compile_step`, which binds the axis.
    Parts are of the global batch, before the update: those of the objective,
    "gradient_norm", and "finite". Where the loss or the gradient is not finite the
    state comes back as it was, but for its step: no parameter changes.

    Args:
      model: the network.
      objective: what is minimised.
      optimizer: applied to the gradient of the global batch.
      prepare: device side of the data: arrays of a batch and a key to a Pair.
      config: see `StepConfig`.
    """
    return TrainStep(
        _accumulated(model, objective, prepare, config), optimizer, config.ema
    )


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One training step, ``step(state, batch) -> (state, parts)``.

    See `make_train_step`.

    Attributes:
      parts_of: ``f(variables, batch, key) -> (gradient, parts, variables after it)``,
        of the global batch; "loss" is among the parts.
      optimizer: applied to the gradient.
      ema: see `StepConfig`.
    """

    parts_of: Callable[[Variables, Batch, Key], tuple[Any, Parts, Variables]]
    optimizer: optax.GradientTransformation
    ema: float = 0.0

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Parts]:
        """Returns the state after the step, and its numbers."""
        key = jax.random.fold_in(state.key, state.step)
        gradient, parts, after = self.parts_of(state.variables, batch, key)
        params = state.variables["params"]
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        variables = {**state.variables, **changing(after), "params": params}
        average = state.ema
        if average is not None:
            average = _averaged(average, changing(variables), self.ema)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(parts["loss"])
        new = TrainState(
            step=state.step,
            variables=variables,
            opt_state=opt_state,
            ema=average,
            key=state.key,
        )
        # What came back as it was needs no choice.
        kept = jax.tree.map(
            lambda a, b: b if a is b else jnp.where(finite, a, b), new, state
        )
        kept = dataclasses.replace(kept, step=state.step + 1)
        return kept, {**parts, "gradient_norm": norm, "finite": finite}


def _averaged(average: Variables, newest: Variables, decay: float) -> Variables:
    """Returns the moving average one step on; whole numbers, as counts, are the newest.

    Batch statistics are averaged too: those of other parameters would not fit.
    """

    def moved(old, new):
        if jnp.issubdtype(new.dtype, jnp.integer):
            return new
        # What does not change stays to the bit.
        return old + (1.0 - decay) * (new - old)

    return jax.tree.map(moved, average, newest)


def _accumulated(model, objective: Loss, prepare, config: StepConfig):
    """Returns ``f(variables, batch, key) -> (gradient, parts, variables after it)``."""

    def of_part(variables, batch, key):
        prepare_key, noise_key = jax.random.split(key)
        pair = prepare(batch, prepare_key)
        noise = jax.random.normal(noise_key, (1, *pair.fixed.shape[1:4], 3))

        def loss_of(params):
            return evaluate(
                model,
                {**variables, "params": params},
                pair,
                noise,
                objective=objective,
                train=True,
                replicas=config.replicas,
                axis=config.axis,
                span=config.span,
            )

        gradient, aux = jax.grad(loss_of, has_aux=True)(variables["params"])
        return gradient, aux[0], aux[2]

    def accumulated(variables, batch, key):
        gradient, parts, after = over_parts(variables, batch, key)
        if config.axis is not None:
            # Each device differentiated the global loss by its own copy of the
            # parameters; the collectives' transposes make their mean the gradient.
            gradient = jax.lax.pmean(gradient, config.axis)
        return gradient, parts, after

    def over_parts(variables, batch, key):
        n = config.accumulate
        if n == 1:
            return of_part(variables, batch, key)
        # Every n-th pair: the same parts however many devices share the batch.
        parts_of_batch = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0), batch
        )

        def add(variables, part):
            gradient, parts, after = of_part(variables, part, key)
            return after, (gradient, parts)

        # Only the running sum of gradients is kept, not all of them.
        def body(carry, part):
            variables, total = carry
            variables, found = add(variables, part)
            return (variables, jax.tree.map(jnp.add, total, found)), None

        first = jax.tree.map(lambda a: a[0], parts_of_batch)
        shapes = jax.eval_shape(lambda v, p: add(v, p)[1], variables, first)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (after, total), _ = jax.lax.scan(body, (variables, zero), parts_of_batch)
        gradient, parts = jax.tree.map(lambda a: a / n, total)
        return gradient, parts, after

    return accumulated
