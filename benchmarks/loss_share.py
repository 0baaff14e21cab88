"""What the loss costs in a training step.

    python benchmarks/loss_share.py --size 96
    python benchmarks/loss_share.py --size 96 --network unireg_rpn

Times the step (loss, gradient, Adam; batch statistics) as the network's recipe has it,
and the same step whose loss is the mean square of the maps on the grid: the network,
its maps and their gradient alone. The two take turns; the loss's share is the
difference of their medians over the first.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time

from contestants import NETWORKS, Job, prepare
from jaxreg_side import build, objective_of


@dataclasses.dataclass(frozen=True)
class Bare:
    """A loss that costs next to nothing: the mean square of the maps.

    Attributes:
      directions: see `jaxreg.losses.objective.Objective`.
    """

    directions: str

    def __call__(self, forward, backward, pair, _noise, **_):
        """Returns (loss, parts) as an `Objective` does."""
        import jax.numpy as jnp

        shape = pair.fixed.shape[1:4]
        maps = [t.on_grid(shape) for t in (forward, backward) if t is not None]
        loss = sum(jnp.mean(jnp.square(points)) for points in maps)
        return loss, {"loss": loss}


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="unigradicon")
    parser.add_argument("--size", type=int, default=96, help="voxels per axis")
    parser.add_argument("--channels", type=int, default=16, help="PromptReg's width")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shape = (arguments.size,) * 3
        prepare(folder, arguments.network, shape, arguments.channels)
        objective = objective_of(NETWORKS[arguments.network])
        job = Job("jaxreg", arguments.network, "train", str(folder))
        steps = [
            build(job, loss).run for loss in (objective, Bare(objective.directions))
        ]
    seconds: list[list[float]] = [[], []]
    for _ in range(arguments.runs):
        for step, found in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
    whole, bare = (statistics.median(found) for found in seconds)
    for name, found in zip(("step", "without loss"), seconds, strict=True):
        print(f"{name:12s} {statistics.median(found):.4g} s ({min(found):.4g}", end="")
        print(f"-{max(found):.4g})")
    print(f"loss         {100 * (1 - bare / whole):.1f} % of the step")


if __name__ == "__main__":
    main()
