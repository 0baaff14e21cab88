"""Optimisers and learning rate schedules by name, from optax.

All parameters are trained. Numbers are those of PyTorch's optimisers of the same name;
AMSGrad is our own, because optax keeps the maximum of another quantity.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate over time.

    Attributes:
      name: "adam", "amsgrad", "adamw" or "sgd".
      learning_rate: peak.
      schedule: "constant", "cosine" (to `final` times the peak) or "polynomial"
        (``(1 - t)^power``, to the same).
      warm_up: steps of linear growth; they count among the total.
      warm_up_from: the first learning rate as a fraction of the peak.
      final: last learning rate as a fraction of the peak.
      power: of the polynomial schedule, 0 or more.
      decay_every: "step", or "epoch": the rate after warm-up stays what it is at the
        beginning of the epoch, to 8 decimals (released PromptReg).
      momentum: of SGD.
      betas: decay of Adam's two moments, each in [0, 1).
      epsilon: of Adam, positive.
      weight_decay: added to the gradient (Adam, AMSGrad, SGD), or decoupled (AdamW).
      clip: largest global norm of the gradient, 0 for no limit.
    """

    name: Literal["adam", "amsgrad", "adamw", "sgd"] = "adam"
    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine", "polynomial"] = "constant"
    warm_up: int = 0
    warm_up_from: float = 0.0
    final: float = 0.0
    power: float = 0.9
    decay_every: Literal["step", "epoch"] = "step"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a name is unknown or a number is out of its range.
        """
        for field, choices in (
            ("name", _RULES),
            ("schedule", _SCHEDULES),
            ("decay_every", ("step", "epoch")),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise UserError(
                    f'optimizer.{field} is "{value}", expected one of '
                    f"{', '.join(choices)}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"optimizer.learning_rate is {self.learning_rate}, expected a positive "
                "number"
            )
        for field in (
            "warm_up", "warm_up_from", "final", "power", "weight_decay", "clip",
            "momentum",
        ):  # fmt: skip
            if not 0 <= getattr(self, field) < math.inf:
                raise UserError(
                    f"optimizer.{field} is {getattr(self, field)}, expected 0 or more"
                )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(
                f"optimizer.betas is {self.betas}, expected two numbers of at least 0 "
                "and below 1"
            )
        # With 0, a parameter without a gradient would become 0 / 0.
        if not 0 < self.epsilon < math.inf:
            raise UserError(
                f"optimizer.epsilon is {self.epsilon}, expected a positive number"
            )


class AmsgradState(NamedTuple):
    """Step count, both moments, and the largest second moment so far."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    largest: optax.Updates


def scale_by_amsgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns AMSGrad as PyTorch computes it.

    The maximum is taken over the second moment before its bias is corrected; optax's
    own takes it afterwards.

    References:
      Reddi et al., On the convergence of Adam and beyond, ICLR 2018; PyTorch 2.13,
      torch.optim.Adam(amsgrad=True).
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AmsgradState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        largest = jax.tree.map(jnp.maximum, state.largest, nu)
        unbias_mu, unbias_nu = (_unbias(b, count) for b in (b1, b2))
        scaled = jax.tree.map(
            lambda m, v: (m / unbias_mu) / (jnp.sqrt(v / unbias_nu) + eps), mu, largest
        )
        return scaled, AmsgradState(count, mu, nu, largest)

    return optax.GradientTransformation(init, update)


def _unbias(b: float, count: jax.Array) -> jax.Array | float:
    """Returns 1 - b^count; the difference itself loses four digits for b near 1."""
    return -jnp.expm1(count * math.log(b)) if b else 1.0


def make_schedule(
    config: OptimizerConfig, steps: int, per_epoch: int = 1
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, 0 to `steps`.

    Args:
      config: see `OptimizerConfig`.
      steps: in all.
      per_epoch: steps of an epoch.
    """
    after = max(steps - config.warm_up, 1)
    decay = _SCHEDULES[config.schedule](config, after)
    if config.decay_every == "epoch":
        decay = _by_epochs(decay, config.warm_up, per_epoch)
    if not config.warm_up:
        return decay
    first = config.warm_up_from * config.learning_rate
    growth = optax.linear_schedule(first, config.learning_rate, config.warm_up)
    return optax.join_schedules([growth, decay], [config.warm_up])


def _by_epochs(decay: optax.Schedule, warm_up: int, per_epoch: int) -> optax.Schedule:
    def at_beginning(count):
        # The count begins after the warm-up, epochs begin before it.
        past = (count + warm_up) // per_epoch * per_epoch - warm_up
        return jnp.round(jnp.asarray(decay(jnp.maximum(past, 0))), 8)

    return at_beginning


def make_optimizer(
    config: OptimizerConfig, steps: int, per_epoch: int = 1
) -> optax.GradientTransformation:
    """Returns the optimiser of a stage of `steps` steps; see `make_schedule`."""
    parts = []
    if config.clip:
        parts.append(optax.clip_by_global_norm(config.clip))
    if config.weight_decay and config.name != "adamw":
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(_RULES[config.name](config))
    if config.weight_decay and config.name == "adamw":
        parts.append(optax.add_decayed_weights(config.weight_decay))
    schedule = make_schedule(config, steps, per_epoch)
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def only(
    rule: optax.GradientTransformation, mask_of: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Returns an optimiser that leaves parameters alone where their mask is 0.

    Args:
      rule: sees zeros as their gradient, and its updates of them are dropped, so they
        keep every bit.
      mask_of: parameters to a tree of arrays of 0 and 1 that broadcast to them.
    """

    def masked(tree):
        return jax.tree.map(lambda a, keep: a * keep, tree, mask_of(tree))

    def update(updates, state, params=None):
        updates, state = rule.update(masked(updates), state, params)
        return masked(updates), state

    return optax.GradientTransformation(rule.init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(*config.betas, eps=config.epsilon)


_RULES = {
    "adam": _adam,
    "adamw": _adam,
    "amsgrad": lambda config: scale_by_amsgrad(*config.betas, eps=config.epsilon),
    "sgd": lambda config: optax.trace(decay=config.momentum),
}
_SCHEDULES = {
    "constant": lambda config, steps: optax.constant_schedule(config.learning_rate),
    "cosine": lambda config, steps: optax.cosine_decay_schedule(
        config.learning_rate, steps, alpha=config.final
    ),
    "polynomial": lambda config, steps: optax.polynomial_schedule(
        config.learning_rate, config.final * config.learning_rate, config.power, steps
    ),
}
