"""Gradients and maps of one batch under every layout, as JSON on standard output.

Run in its own process, because the number of devices is fixed when JAX starts.
"""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from jaxreg.losses.objective import Objective, TaskObjective  # noqa: E402
from jaxreg.models.gradicon import GradIcon, GradIconConfig  # noqa: E402
from jaxreg.training import parallel, state, step  # noqa: E402
from jaxreg.typing import Pair  # noqa: E402

SHAPE = (16, 10, 12)
MODEL = GradIcon(GradIconConfig((2, 4, 6), (4, 4), 1, 0, form="native"))


def batch_of(count: int) -> dict[str, np.ndarray]:
    """Random smooth-ish images, labels of which some pairs share none, and tasks."""
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
    return images | labels | {"valid": valid, "task": np.arange(count) % 2}


def result(kind, space, objective, batch, *, accumulate=1, replicas=0, devices=None):
    """The change of every parameter by one step of plain gradient descent."""
    layout = parallel.make_layout(kind, space=space, devices=devices)
    local = parallel.check_batch(
        len(batch["task"]), layout, accumulate=accumulate, replicas=replicas
    )
    optimizer = optax.sgd(1.0)
    train_step = step.make_train_step(
        MODEL,
        objective,
        optimizer,
        lambda batch, key: parallel.constrain(Pair(**batch), layout),
        step.StepConfig(accumulate=accumulate, replicas=local, axis=layout.axis),
    )
    variables = MODEL.init(jax.random.key(0))
    noisy = jax.tree.map(
        lambda a: a + 0.05 * np.random.default_rng(1).normal(size=a.shape),
        variables["params"],
    )
    variables = jax.tree.map(jnp.float32, {**variables, "params": noisy})
    before = state.start(variables, optimizer, jax.random.key(2))
    placed = parallel.place_state(before, layout)
    compiled = parallel.compile_step(train_step, layout)
    after, parts = compiled(placed, parallel.place_batch(batch, layout))
    parts = parallel.fetch_parts(parts, layout)
    after = parallel.fetch_state(after, layout)
    gradient = jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), variables["params"],
        after.variables["params"],
    )  # fmt: skip
    stats = jax.tree.map(np.asarray, after.variables["batch_stats"])
    return gradient, stats, parts


def distance(a, b) -> float:
    """Largest relative L2 distance of two trees' leaves, by the whole tree's norm."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


def compare(name, objective, batch, layouts, **options) -> dict:
    """Every layout against one device."""
    first = result("single", 1, objective, batch, devices=jax.devices()[:1], **options)
    found = {}
    for kind, space in layouts:
        other = result(kind, space, objective, batch, **options)
        found[f"{name} {kind} {space}"] = {
            "gradient": distance(first[0], other[0]),
            "statistics": distance(first[1], other[1]),
            "loss": abs(first[2]["loss"] - other[2]["loss"]) / abs(first[2]["loss"]),
            "norm": first[2]["gradient_norm"],
        }
    return found


def main() -> int:
    """Prints one JSON object."""
    batch = batch_of(8)
    dice = Objective(similarity="mind", dice_weight=0.5)
    tasks = TaskObjective((Objective(inverse_consistency_weight=0.3), dice))
    everywhere = [("mesh", 1), ("mesh", 2), ("pmap", 1)]
    found = compare("dice", dice, batch, everywhere)
    found |= compare("tasks", tasks, batch, [("mesh", 1)])
    double = jax.tree.map(lambda a: np.concatenate([a, a[::-1]]), batch)
    found |= compare("parts", dice, double, [("pmap", 1)], accumulate=2)
    found |= compare("replicas", dice, batch, [("mesh", 1)], replicas=8)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
