"""Gradients of one batch under every layout, as JSON on standard output.

    python same_gradient.py layouts | parts | tasks

Run in its own process, because the number of devices is fixed when JAX starts.
Compiling takes all of the time, so each compiled step is asked all it can answer.
"""

import dataclasses
import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import numpy as np
import optax

from jaxreg.losses.objective import Objective, TaskObjective
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.training import parallel, state, step
from jaxreg.typing import Pair

SHAPE = (9, 8, 10)
MODEL = GradIcon(GradIconConfig((2, 4), (4,), 0, 0, form="native"))
WEIGHTS = (0.0, 1.5)
# Scored over the whole batch: MIND's clip, Dice's number of pairs with valid classes.
DICE = Objective(similarity="mind", dice_weight=0.5)


class WeightedByData(Objective):
    """An objective whose consistency weight comes with the batch, as the task.

    One compiled step then serves all weights.
    """

    def __post_init__(self):
        """Checks nothing: a traced weight has no value yet."""

    def __call__(self, forward, backward, pair, noise, *, aux=None, axis=None):
        """Returns the loss and its parts, see `Objective`."""
        weight = pair.task[0]
        weighted = dataclasses.replace(self, inverse_consistency_weight=weight)
        return super(WeightedByData, weighted).__call__(
            forward, backward, pair, noise, aux=aux or {}, axis=axis
        )


def batch_of(count: int) -> dict[str, np.ndarray]:
    """Random images, and labels of which pair 1 has no valid class."""
    rng = np.random.default_rng(0)
    images = {
        name: rng.uniform(size=(count, *SHAPE, 1)).astype("f4")
        for name in ("moving", "fixed")
    }
    labels = {
        f"{name}_onehot": rng.integers(0, 2, (count, *SHAPE, 2)).astype("f4")
        for name in ("moving", "fixed")
    }
    valid = np.arange(2 * count).reshape(count, 2) % 3 > 0
    valid[1] = False
    return images | labels | {"valid": valid}


def variables_to_try():
    """Variables that are nowhere near those of a fresh network, whose map is flat."""
    rng = np.random.default_rng(1)
    fresh = MODEL.init(jax.random.key(0))
    params = jax.tree.map(
        lambda a: np.float32(a + 0.05 * rng.normal(size=a.shape)), fresh["params"]
    )
    return jax.tree.map(np.asarray, {**fresh, "params": params})


def stepper(kind, space, objective, *, batch, accumulate=1, replicas=0):
    """Returns a function of a batch: the step's gradient, statistics and numbers."""
    devices = jax.devices()[:1] if kind == "single" else None
    layout = parallel.make_layout(kind, space=space, devices=devices)
    local, span = parallel.check_batch(
        batch, layout, accumulate=accumulate, replicas=replicas
    )
    # Keeps the gradient as it is, where a step's change of the weights would round it.
    optimizer = optax.trace(decay=0.0)
    train_step = step.make_train_step(
        MODEL,
        objective,
        optimizer,
        lambda batch, key: parallel.constrain(Pair(**batch), layout),
        step.StepConfig(
            accumulate=accumulate, replicas=local, axis=layout.axis, span=span
        ),
    )
    compiled = parallel.compile_step(train_step, layout)

    def run(arrays):
        before = state.start(variables_to_try(), optimizer, jax.random.key(2))
        after, parts = compiled(
            parallel.place_state(before, layout), parallel.place_batch(arrays, layout)
        )
        after = jax.device_get(parallel.fetch_state(after, layout))
        stats = after.variables["batch_stats"]
        return after.opt_state.trace, stats, parallel.fetch_parts(parts, layout)

    return run


def distance(a, b) -> float:
    """L2 distance of two trees, relative to the first."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


def compare(objective, batches, layouts, **options) -> dict:
    """Every layout against one device, for each of the batches."""
    count = len(next(iter(batches.values()))["moving"])
    single = stepper("single", 1, objective, batch=count, **options)
    expected = {name: single(batch) for name, batch in batches.items()}
    found = {}
    for kind, space in layouts:
        run = stepper(kind, space, objective, batch=count, **options)
        for name, batch in batches.items():
            one, other = expected[name], run(batch)
            found[f"{kind} {space} {name}"] = {
                "gradient": distance(one[0], other[0]),
                "statistics": distance(one[1], other[1]),
                "numbers": {key: [one[2][key], other[2][key]] for key in one[2]},
            }
    return found


def layouts() -> dict:
    """The batch over 4 devices; over 2, with each volume over 2; and by pmap."""
    batch = batch_of(4)
    batches = {
        f"weight {weight}": {**batch, "task": np.full(4, weight, "f4")}
        for weight in WEIGHTS
    }
    objective = WeightedByData(similarity="mind", dice_weight=0.5)
    return compare(objective, batches, [("mesh", 1), ("mesh", 2), ("pmap", 1)])


def parts() -> dict:
    """Two accumulated parts with statistics per device; statistics per two devices."""
    objective = dataclasses.replace(DICE, inverse_consistency_weight=0.0)
    own = compare(
        objective, {"parts": batch_of(8)}, [("mesh", 1)], accumulate=2, replicas=4
    )
    shared = compare(
        objective, {"pairs of devices": batch_of(4)}, [("mesh", 1)], replicas=2
    )
    return own | shared


def tasks() -> dict:
    """Every other pair by another objective, one of which asks for no labels."""
    objective = TaskObjective(
        (
            Objective(inverse_consistency_weight=0.0, similarity="mse"),
            Objective(
                inverse_consistency_weight=0.0, similarity="ncc", dice_weight=0.5
            ),
        )
    )
    batch = batch_of(4) | {"objective": np.arange(4) % 2}
    return compare(objective, {"tasks": batch}, [("mesh", 1)])


if __name__ == "__main__":
    chosen = {"layouts": layouts, "parts": parts, "tasks": tasks}[sys.argv[1]]
    print(json.dumps(chosen()))
