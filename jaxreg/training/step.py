"""One evaluation of a model on a pair, and one training step: pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxreg.losses.objective import Objective
from jaxreg.models.base import Registration
from jaxreg.space.transform import Transform
from jaxreg.typing import Pair, Points, Variables

Parts = dict[str, jax.Array]


def predict_both(
    model: Registration, variables: Variables, pair: Pair, *, train: bool = False
) -> tuple[Transform, Transform, Variables]:
    """Returns the forward and backward transforms, and the variables after both.

    One call of the network on both directions, end to end in the batch: moving onto
    fixed, then fixed onto moving. In training mode each direction has its own batch
    statistics, and the running ones move twice, as in the original's two calls.
    """
    both, variables = model.apply(
        variables,
        jnp.concatenate([pair.moving, pair.fixed]),
        jnp.concatenate([pair.fixed, pair.moving]),
        train=train,
        groups=2,
    )
    forward, backward = both.transform.split(2)
    return forward, backward, variables


def evaluate(
    model: Registration,
    variables: Variables,
    pair: Pair,
    noise: Points,
    *,
    objective: Objective,
    train: bool = False,
) -> tuple[jax.Array, tuple[Parts, Transform, Transform, Variables]]:
    """Returns (loss, (parts, forward, backward, variables after it)).

    Args:
      model: the network.
      variables: its variables.
      pair: the two images and what the objective needs besides.
      noise: standard normal, 1 D H W 3, shared by the batch.
      objective: what is minimised.
      train: batch statistics instead of running ones.
    """
    forward, backward, variables = predict_both(model, variables, pair, train=train)
    loss, parts = objective(forward, backward, pair, noise)
    return loss, (parts, forward, backward, variables)


def make_step(
    model: Registration,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    train: bool = True,
) -> Callable:
    """Returns ``step(variables, opt_state, pair, noise)``, to be jitted by the caller.

    The step returns (variables, opt_state, parts, forward, backward); parts and
    transforms are those before the update. All parameters are trained; in training
    mode the running statistics move twice.
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
        parts, forward, backward, after = aux
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return {**after, "params": params}, opt_state, parts, forward, backward

    return step
