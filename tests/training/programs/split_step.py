"""Training steps over eight devices and on one, and what is exchanged, as JSON.

Two devices share the batch, four each volume; the batch is worked off in two parts.
Standard output: for the optimiser's state whole and split, the differences from one
device after two steps, how much of the state a device has, and the collectives of the
compiled step; the differences of the two.
Run in its own process, see `same_gradient.py`.
"""

import dataclasses
import json
import math

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import collectives
import numpy as np
import optax

from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.training import parallel, state, step
from jaxreg.typing import Pair

SHAPE = (31, 16, 16)  # four devices have unequal shares
CHANNELS = 16
BATCH, PARTS = 4, 2
MODEL = GradIcon(GradIconConfig((2, CHANNELS), (CHANNELS,), 0, 0, form="native"))
OBJECTIVE = Objective(inverse_consistency_weight=0.1)
# The norm of the whole gradient, and a state in which the gradient can be seen.
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.trace(decay=0.9), optax.scale(-1e-3)
)


def distance(a, b) -> float:
    """L2 distance of two trees, relative to the first."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


def start():
    """Returns a state that is nowhere near that of a fresh network."""
    rng = np.random.default_rng(1)
    fresh = MODEL.init(jax.random.key(0))
    params = jax.tree.map(
        lambda a: np.float32(a + 0.05 * rng.normal(size=a.shape)), fresh["params"]
    )
    variables = jax.tree.map(np.asarray, {**fresh, "params": params})
    return state.start(variables, OPTIMIZER, jax.random.key(2), ema=True)


def run(layout, batch):
    """Returns the state after two steps, and the compiled step's text."""
    train_step = step.make_train_step(
        MODEL,
        OBJECTIVE,
        OPTIMIZER,
        lambda batch, key: parallel.constrain(Pair(**batch), layout),
        step.StepConfig(accumulate=PARTS, ema=0.5, axis=layout.axis),
    )
    compiled = parallel.compile_step(train_step, layout)
    placed, arrays = (
        parallel.place_state(start(), layout),
        parallel.place_batch(batch, layout),
    )
    compiled = compiled.lower(placed, arrays).compile()
    for _ in range(2):
        # A compiled step takes no state that lies elsewhere than it was lowered for.
        placed, parts = compiled(placed, arrays)
    return placed, parallel.fetch_parts(parts, layout), compiled.as_text()


def main() -> None:
    """Prints one JSON object."""
    rng = np.random.default_rng(0)
    batch = {
        name: rng.uniform(size=(BATCH, *SHAPE, 1)).astype("f4")
        for name in ("moving", "fixed")
    }
    one, numbers, _ = run(parallel.make_layout("single"), batch)
    found, states = {}, {}
    for name, shard in (("whole", False), ("split", True)):
        layout = parallel.make_layout("mesh", space=4, shard_optimizer=shard)
        several, parts, text = run(layout, batch)
        kept = [
            leaf.addressable_shards[0].data.nbytes / leaf.nbytes
            for leaf in jax.tree.leaves((several.opt_state, several.ema))
            if leaf.size > 1000
        ]
        states[name] = jax.device_get(parallel.fetch_state(several, layout))
        found[name] = {
            "gradient": distance(one.opt_state, states[name].opt_state),
            "ema": distance(one.ema, states[name].ema),
            "numbers": {key: [numbers[key], parts[key]] for key in numbers},
            "kept": kept,
            "collectives": [
                {**dataclasses.asdict(c), "bytes": sum(c.sizes)}
                for c in collectives.of(text)
            ],
        }
    whole, split = ((s.opt_state, s.ema) for s in states.values())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(one.variables["params"]))
    # On a device of those that share the batch, of both directions.
    voxels = 2 * BATCH // PARTS // layout.data * math.prod(SHAPE)
    found |= {"apart": distance(whole, split), "weights": weights, "voxels": voxels}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
