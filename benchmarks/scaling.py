"""Training throughput against the number of devices, by mesh and by pmap.

    python benchmarks/scaling.py --size 32 --devices 1 2 4 8

Times the training step that `jaxreg train` compiles (loss of both directions, gradient,
Adam; batch statistics over the global batch) on random images, and prints a table:

  batch       pairs of the global batch. Weak scaling, the default, keeps the pairs per
              device (--batch); with --strong that is the global batch of all rows.
  pairs/s     median over the timed steps; compilation and the first step are not timed
  efficiency  pairs/s per device, relative to the table's first row of the same kind

Runs on the machine's devices, on as many of each count as there are. Where there is
one alone, or with --simulated, each count is tried in a process of its own with so many
simulated CPU devices: they share the same cores, so the table then tests what splitting
the work costs, not how fast more devices are. Perfect is 1 / devices.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Literal

import numpy as np
from worker import host_peak, reset_host_peak

Kind = Literal["mesh", "pmap"]
KINDS: tuple[Kind, ...] = ("mesh", "pmap")
_COUNT_FLAG = "--xla_force_host_platform_device_count"


def main() -> None:
    """Parses the command line and prints the table, or measures as a worker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="voxels per axis")
    parser.add_argument("--batch", type=int, default=1, help="pairs per device")
    parser.add_argument("--runs", type=int, default=5, help="timed steps")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--network", choices=("small", "full"), default="small")
    parser.add_argument("--strong", action="store_true", help="same batch in all rows")
    parser.add_argument("--simulated", action="store_true", help="CPU devices only")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, count = arguments.worker
        print(json.dumps(measure(arguments, kind, int(count))))
        return
    counts = sorted(set(arguments.devices))
    if min(counts) < 1 or (arguments.strong and arguments.batch % counts[-1]):
        parser.error(
            f"--devices {counts} cannot share a global batch of {arguments.batch}; "
            "take a --batch that the largest count divides"
        )
    compare(arguments, counts)


# --- the parent ----------------------------------------------------------------------


def run_worker(arguments, kind: str, count: int, *, simulated: bool) -> dict:
    """Measures one row in a process of its own, since JAX fixes its devices."""
    environment = dict(os.environ)
    if simulated:
        flags = f"{environment.get('XLA_FLAGS', '')} {_COUNT_FLAG}={count}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    options = [
        "--size", arguments.size, "--batch", arguments.batch, "--runs", arguments.runs,
        "--network", arguments.network, *(["--strong"] if arguments.strong else []),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, *map(str, options), "--worker", kind, str(count)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit("a worker died; its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def real_devices() -> tuple[int, str]:
    """Returns number and kind of the devices; asked elsewhere, so none stays held."""
    question = "import jax; d = jax.devices(); print(len(d), d[0].device_kind)"
    answer = subprocess.run(
        [sys.executable, "-c", question], stdout=subprocess.PIPE, text=True, check=True
    )
    count, _, kind = answer.stdout.splitlines()[-1].partition(" ")
    return int(count), kind


def compare(arguments, counts: list[int]) -> None:
    """Runs all rows and prints the table."""
    present, kind_of_device = real_devices()
    simulated = arguments.simulated or present == 1
    if simulated:
        where = f"simulated, {os.cpu_count()} cores ({platform.machine()})"
    else:
        where = f"{present} x {kind_of_device}"
        counts = [count for count in counts if count <= present]
    scaling = "strong" if arguments.strong else "weak"
    print(
        f"{arguments.size}^3, {arguments.network} network, {scaling} scaling, {where}"
    )
    if simulated:
        print(
            "The devices share the same cores: this tests overhead, not speed; an "
            "efficiency of 1 / devices is perfect."
        )
    print("kind  devices  batch   pairs/s (range)         efficiency  compile s")
    for kind in arguments.kinds:
        first = None
        for count in counts:
            found = run_worker(arguments, kind, count, simulated=simulated)
            rates = [found["batch"] / seconds for seconds in found["seconds"]]
            rate = statistics.median(rates)
            first = rate / count if first is None else first
            spread = f"{rate:7.3f} ({min(rates):.3f}-{max(rates):.3f})"
            print(
                f"{kind:5s} {count:7d} {found['batch']:6d}   {spread:24s} "
                f"{rate / count / first:9.2f} {found['compile']:10.1f}",
                flush=True,
            )


# --- one row -------------------------------------------------------------------------


def measure(arguments, kind: Kind, count: int) -> dict:
    """Returns one row's numbers.

    Returns:
      "batch", global; "compile" and the first step, seconds; "seconds" of each timed
      step; "peak" memory in bytes, of the first device or, on CPU, the process.
    """
    import jax
    import optax

    from jaxreg.losses.objective import Objective
    from jaxreg.models.gradicon import GradIcon, GradIconConfig
    from jaxreg.training import parallel, state, step
    from jaxreg.typing import Pair

    layout = parallel.make_layout(kind, devices=jax.devices()[:count])
    small = GradIconConfig((2, 8), (8,), downsampled_steps=0, fullres_steps=0)
    model = GradIcon(small if arguments.network == "small" else GradIconConfig())
    batch = arguments.batch * (1 if arguments.strong else count)
    parallel.check_batch(batch, layout, accumulate=1, replicas=0)
    optimizer = optax.adam(1e-4)
    train_step = step.make_train_step(
        model,
        Objective(),
        optimizer,
        lambda batch, key: Pair(**batch),
        step.StepConfig(axis=layout.axis),
    )
    generator = np.random.default_rng(0)
    shape = (batch, *(arguments.size,) * 3, 1)
    images = {
        name: generator.uniform(size=shape).astype(np.float32)
        for name in ("moving", "fixed")
    }
    start = state.start(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    current = parallel.place_state(start, layout)
    placed = parallel.place_batch(images, layout)
    compiled = parallel.compile_step(train_step, layout)
    began = time.perf_counter()
    current, parts = jax.block_until_ready(compiled(current, placed))
    compile_and_first = time.perf_counter() - began
    reset_host_peak()
    seconds = []
    for _ in range(arguments.runs):
        began = time.perf_counter()
        current, parts = jax.block_until_ready(compiled(current, placed))
        seconds.append(time.perf_counter() - began)
    assert parallel.fetch_parts(parts, layout)["finite"]
    of_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "batch": batch,
        "compile": compile_and_first,
        "seconds": seconds,
        "peak": of_device or host_peak(),
    }


if __name__ == "__main__":
    main()
