"""The memory of a training step as `jaxreg train --dry-run` says it, and as it is.

    python benchmarks/step_memory.py
    python benchmarks/step_memory.py --recipes unireg_rpn --sizes 48

For each recipe and grid the last stage's step of one pair. The figure of the dry run is
what the compiled program asks for; beside it stands by how much the resident set of a
fresh process grows, at its peak, while it makes a state and a batch and does one step.
The program is compiled by the dry run and comes out of the cache there, so that memory
which the compiler has freed is not counted as there already. Linux, CPU.
"""

import argparse
import ctypes
import multiprocessing
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.experiments import config, dry_run, files, overrides
from jaxreg.experiments.config import Experiment
from jaxreg.xla import compilation_cache

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = ("unigradicon", "unireg_rpn")
_STATUS = pathlib.Path("/proc/self/status")
_FORGET_PEAK = pathlib.Path("/proc/self/clear_refs")


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'recipe':20} grid   pairs  dry run GB  measured GB  ratio")
    for recipe in arguments.recipes:
        for size in arguments.sizes:
            job = (recipe, size, arguments.batch)
            said, grown = (_in_own_process(part, job) for part in (figure, measured))
            print(
                f"{recipe:20} {size:3}^3  {arguments.batch:5}  {said / 1e9:10.3f}  "
                f"{grown / 1e9:11.3f}  {said / grown:5.2f}",
                flush=True,
            )


def _in_own_process(part: Any, job: tuple[str, int, int]) -> float:
    # Spawned: a fork would start with its parent's memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(part, job)


def experiment_of(recipe: str, size: int, batch: int) -> Experiment:
    """Returns a recipe's last stage at another grid, without the data of others."""
    found = files.load(CONFIGS / f"{recipe}.py")
    last, during = config.stages(found)[-1]
    changes: list[tuple[str, Any]] = [
        ("stages", (type(last)(last.name, last.epochs),)),
        ("loading.shape", (size, size, size)),
        ("train.batch", batch),
        ("train.replicas", 0),
        ("train.start", None),
    ]
    return overrides.override(during, changes)


def figure(recipe: str, size: int, batch: int) -> float:
    """Returns the bytes that a dry run says."""
    (memory,) = dry_run.dry_run(experiment_of(recipe, size, batch)).memory.values()
    if memory.total is None:
        sys.exit(f"{recipe}: {memory.reason}")
    return memory.total


def measured(recipe: str, size: int, batch: int) -> float:
    """Returns by how many bytes this process grows for a step, at its peak."""
    with compilation_cache.kept():
        (step,) = dry_run.traced_steps(experiment_of(recipe, size, batch))
        program = step.lowered.compile()
    info = step.lowered.args_info[0]
    jax.block_until_ready(jax.random.key(0))  # which compiles, too
    ctypes.CDLL(None).malloc_trim(0)
    _FORGET_PEAK.write_text("5")
    before = _resident("VmRSS")
    state, pairs = jax.tree.map(_array, info)
    jax.block_until_ready(program(state, pairs))
    return _resident("VmHWM") - before


def _array(info: Any) -> jax.Array:
    if jnp.issubdtype(info.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    # Copied from pages that were written to; a program for zeros would be compiled.
    return jax.device_put(np.ones(info.shape, info.dtype), may_alias=False)


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
