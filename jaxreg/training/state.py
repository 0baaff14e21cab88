"""The state of training, from step to step and in a checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreg.typing import Key, Variables

TRAINED = ("params", "batch_stats")
"""Collections of variables that training changes, averages and stores; all others are
frozen: another network's, see `base.Architecture.frozen`."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "variables", "opt_state", "ema", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: number of steps done, int32 scalar.
      variables: {"params", "batch_stats"} of the model, and what is frozen.
      opt_state: of the optimizer.
      ema: moving average of the variables, batch statistics included and what is
        frozen left out, or None.
      key: the root key; step i draws from ``fold_in(key, i)``.
    """

    step: jax.Array
    variables: Variables
    opt_state: Any
    ema: Any
    key: Key


def start(
    variables: Variables,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(variables["params"]),
        ema=jax.tree.map(jnp.array, changing(variables)) if ema else None,
        key=key,
    )


def changing(variables: Variables) -> dict[str, Any]:
    """Returns the variables that training changes."""
    return {name: tree for name, tree in variables.items() if name in TRAINED}


def frozen(variables: Variables) -> dict[str, Any]:
    """Returns the variables that training leaves as they are."""
    return {name: tree for name, tree in variables.items() if name not in TRAINED}


def to_tree(state: TrainState) -> dict[str, Any]:
    """Returns the state as arrays that a checkpoint can hold, without what is frozen.

    See `from_tree`.
    """
    tree = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    tree["key"] = jax.random.key_data(state.key)
    tree["variables"] = changing(state.variables)
    return {name: value for name, value in tree.items() if value is not None}


def from_tree(
    tree: dict[str, Any], held: Mapping[str, Any] = MappingProxyType({})
) -> TrainState:
    """Returns the state that `to_tree` took apart.

    Args:
      tree: of a checkpoint.
      held: what was frozen, see `frozen`.
    """
    key = jax.random.wrap_key_data(jnp.asarray(tree["key"]))
    variables = {**tree["variables"], **held}
    return TrainState(**{"ema": None, **tree, "key": key, "variables": variables})


def averaged(state: TrainState) -> Variables:
    """Returns the variables to use and to score: the moving average if there is one."""
    return state.variables if state.ema is None else {**state.variables, **state.ema}
