"""One forward pass of uniGradICON at its published grid on this machine.

    python benchmarks/full_size.py --size 175

Prints compile time, the time of one direction (network and its map on the grid) and
the peak resident memory, compilation included.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp

from jaxreg.models.gradicon import GradIcon


def main() -> None:
    """Parses the command line, compiles, runs twice, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=175, help="voxels per axis")
    size = parser.parse_args().size
    model = GradIcon()
    variables = model.init(jax.random.key(0))
    for step in variables["params"].values():  # a fresh last layer is zero
        step["last"]["kernel"] = jnp.full_like(step["last"]["kernel"], 1e-3)
    images = jax.random.uniform(jax.random.key(1), (2, 1, size, size, size, 1))

    def forward(variables, moving, fixed):
        prediction, _ = model.apply(variables, moving, fixed)
        return prediction.transform.on_grid(fixed.shape[1:4])

    start = time.perf_counter()
    program = jax.jit(forward).lower(variables, *images).compile()
    compiled = time.perf_counter() - start
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        points = jax.block_until_ready(program(variables, *images))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{size}^3 on {jax.devices()[0].platform}: compile {compiled:.1f} s, "
        f"forward {', '.join(f'{s:.1f} s' for s in seconds)}, "
        f"peak memory {peak / 1e9:.1f} GB, finite {bool(jnp.isfinite(points).all())}"
    )


if __name__ == "__main__":
    main()
