"""One of two processes of two devices: a state split over all four, put together again.

    python split_state.py HOST:PORT INDEX

Standard output: as JSON, how much of the largest array this process holds, and whether
what is fetched is what was placed.
"""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import numpy as np
import optax

from jaxreg.training import checkpoint_files, parallel, state


def main() -> None:
    """Prints one JSON object."""
    parallel.start_processes(sys.argv[1], 2, int(sys.argv[2]))
    params = {"kernel": np.arange(3 * 8 * 4.0, dtype="f4").reshape(3, 8, 4)}
    params["bias"] = np.arange(3.0, dtype="f4")  # which four devices cannot share
    start = state.start(
        {"params": params}, optax.adam(1e-3), jax.random.key(0), ema=True
    )
    # Moments that are not zero.
    start = jax.tree.map(lambda a: a + 1 if a.dtype == "float32" else a, start)
    layout = parallel.make_layout("mesh", shard_optimizer=True)
    placed = parallel.place_state(start, layout)
    moment = placed.opt_state[0].mu["kernel"]
    held = sum(shard.data.size for shard in moment.addressable_shards) / moment.size
    fetched = checkpoint_files.host_copy(
        state.to_tree(parallel.fetch_state(placed, layout))
    )
    wanted = checkpoint_files.host_copy(state.to_tree(start))
    same = all(np.array_equal(fetched[name], wanted[name]) for name in wanted)
    print(json.dumps({"held": held, "same": same and fetched.keys() == wanted.keys()}))


if __name__ == "__main__":
    main()
