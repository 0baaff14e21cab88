"""jaxreg against the PyTorch original, in turn, in one process tree.

    python benchmarks/vs_pytorch.py --size 96
    python benchmarks/vs_pytorch.py --network unireg_rpn --shape 160,192,192
    python benchmarks/vs_pytorch.py --size 175 --precision tf32 --autocast --batch 2
    python benchmarks/vs_pytorch.py --size 175 --tasks io --io-steps 50
    python benchmarks/vs_pytorch.py --size 175 --largest-batch
    python benchmarks/vs_pytorch.py --accuracy --weights W --images A.nii.gz B.nii.gz

Prints, per task, the median time of each library, their ratio and the ratio of peak
memory; ratios below 1 favour jaxreg. Both run the same network with the same random
weights on the same smooth random images: the full uniGradICON (four U-Nets, 70.7 M
parameters), PyTorch's side being unigradicon's own; or a network whose released
program is no package, PyTorch's side being pytorch_promptreg.py or pytorch_unireg.py
beside this file: PromptReg in its released form, RDP (the same without prompts), the
released UniReg-RPN, and the paper's UniReg with MIND in place of SAM.

Each library has a worker process per task (worker.py); the workers take turns, one run
each, so that a busy machine hurts both alike. Compilation and first runs are not timed.
Tasks: forward (one direction: network and its map on the grid), train (loss, gradient,
Adam; batch statistics; uniGradICON's loss is of both directions, the others' of one, as
their recipes say), io (uniGradICON alone: the same with running statistics, as in
instance optimisation; with --io-steps a whole optimisation by
jaxreg.registration.optimization.network and by unigradicon's own function, in seconds
per 50 steps).

PyTorch runs as its users run it: float32, on a GPU with its default of TF32 in
convolutions. With --autocast there is a further column, of autocast to bfloat16 with
channels last. --precision is jaxreg's: activations and products in bfloat16, products
of TF32, or of full float32.

Compile is tracing and compilation without stored programs, seconds (CPU seconds);
"again" is the same in a second start with the persistent cache (--cache). On a GPU the
timed worker is always a second one: JAX's peak memory cannot be reset, and that of the
first one has the trials of the compiler in it. On a CPU the timed worker is the second
one with --cache; that of a first start still holds some of the compiler's own memory.

--largest-batch doubles the batch, each in a fresh process that may fill the device, and
prints the largest that fits. On a CPU the limit counts compilation too.

Needs: pip install "jaxreg[torch]"
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import statistics
import tempfile

import accuracy
import numpy as np
from contestants import NETWORKS, Job, Library, prepare
from worker import Died, Worker, available_memory, first_result

_TITLES = {"jaxreg": "jaxreg", "pytorch": "PyTorch", "autocast": "autocast"}
_PER_STEPS = 50
Compiled = tuple[float, float]
"""Seconds and CPU seconds."""


def main() -> None:
    """Parses the command line and runs what it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=96, help="voxels per axis")
    parser.add_argument("--shape", help="D,H,W in place of --size")
    parser.add_argument("--batch", type=int, default=1, help="pairs per step")
    parser.add_argument("--runs", type=int, default=5, help="timed runs per library")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's CPU threads")
    parser.add_argument("--network", choices=list(NETWORKS), default="unigradicon")
    parser.add_argument("--channels", type=int, default=16, help="PromptReg's width")
    parser.add_argument("--tasks", nargs="+", choices=("forward", "train", "io"))
    parser.add_argument(
        "--precision", choices=("float32", "tf32", "bfloat16"), default="float32"
    )
    parser.add_argument("--autocast", action="store_true", help="a column of it")
    parser.add_argument("--cache", action="store_true", help="time a second start too")
    parser.add_argument("--io-steps", type=int, default=0, help="a whole optimisation")
    parser.add_argument("--largest-batch", action="store_true", help="which one fits")
    parser.add_argument(
        "--memory-limit", type=float, help="GB on CPU; most of what is free by default"
    )
    parser.add_argument("--batch-limit", type=int, default=256, help="of that search")
    accuracy.add_options(parser)
    arguments = parser.parse_args()
    offered = NETWORKS[arguments.network].tasks
    arguments.tasks = arguments.tasks or list(offered)
    if not set(arguments.tasks) <= set(offered):
        parser.error(f"--tasks: {arguments.network} has {', '.join(offered)}")
    if arguments.io_steps and (arguments.tasks != ["io"] or arguments.batch != 1):
        parser.error("--io-steps is of one pair: give --tasks io and --batch 1")
    shape = arguments.shape or ",".join([str(arguments.size)] * 3)
    d, h, w = (int(n) for n in shape.split(","))
    arguments.shape = (d, h, w)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if not (arguments.accuracy and arguments.weights):
            prepare(folder, arguments.network, arguments.shape, arguments.channels)
        if arguments.accuracy:
            accuracy.report(arguments, folder)
        elif arguments.largest_batch:
            search(arguments, folder)
        else:
            compare(arguments, folder)


# --- times and memory, in turn --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What became of one library in one task.

    Attributes:
      seconds: of each run.
      peak: bytes.
      compiled: seconds and CPU seconds of compilation in the first start.
      again: the same in the second start; None if there was none.
      device: its name.
    """

    seconds: list[float]
    peak: float
    compiled: Compiled
    again: Compiled | None
    device: str

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    def spread(self) -> str:
        """Returns median and range."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median:.4g} ({low:.4g}-{high:.4g})"


def libraries(arguments) -> list[Library]:
    """Returns who takes part."""
    return ["jaxreg", "pytorch", *(["autocast"] if arguments.autocast else [])]


def make_job(arguments, folder: pathlib.Path, library: Library, task, **more) -> Job:
    """Returns a job of the command line."""
    fields = {"batch": arguments.batch, "io_steps": arguments.io_steps, **more}
    return Job(
        library,
        arguments.network,
        task,
        str(folder),
        precision=arguments.precision,
        threads=arguments.threads,
        **fields,
    )


def start(
    job: Job, folder: pathlib.Path, *, twice: bool
) -> tuple[Worker, Compiled, Compiled | None]:
    """Returns (worker, compilation in the first start, and in the second or None)."""
    if job.library != "jaxreg":
        worker = Worker(job)
        return worker, compilation(worker), None
    cache = folder / f"programs_{job.task}"
    worker = Worker(job, cache=cache)
    compiled = compilation(worker)
    if not twice and worker.ready["on_host"]:
        return worker, compiled, None
    worker.stop()
    worker = Worker(job, cache=cache)
    return worker, compiled, compilation(worker)


def compilation(worker: Worker) -> Compiled:
    """Returns what a worker's compilation took."""
    wall, cpu = worker.ready["compile"]
    return wall, cpu


def measure(arguments, folder: pathlib.Path, task) -> dict[str, Measured]:
    """Runs one task of all libraries in turn."""
    workers: dict[str, Worker] = {}
    starts: dict[str, tuple[Compiled, Compiled | None]] = {}
    for library in libraries(arguments):
        job = make_job(arguments, folder, library, task)
        worker, first, again = start(job, folder, twice=arguments.cache)
        workers[library], starts[library] = worker, (first, again)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    scale = _PER_STEPS / arguments.io_steps if arguments.io_steps else 1.0
    for _ in range(arguments.runs):
        for name, worker in workers.items():
            seconds[name].append(scale * worker.run())
    return {
        name: Measured(
            seconds[name], worker.stop(), *starts[name], worker.ready["device"]
        )
        for name, worker in workers.items()
    }


def compare(arguments, folder: pathlib.Path) -> None:
    """Runs all tasks and prints the table."""
    print(heading(arguments))
    for index, task in enumerate(arguments.tasks):
        try:
            found = measure(arguments, folder, task)
        except Died as died:
            raise SystemExit(f"{task}: a worker died, {died}") from died
        cells = row(arguments, folder, task, found)
        if index == 0:
            where = {found[name].device for name in found}
            print(f"on {', '.join(sorted(where))}")
            print("  ".join(f"{name:{width}s}" for name, width, _ in cells))
        print("  ".join(f"{value:{width}s}" for _, width, value in cells), flush=True)


def heading(arguments) -> str:
    """Returns what is compared, on which machine, with which versions."""
    network = NETWORKS[arguments.network]
    names = ["jax", "torch"]
    names += ["unigradicon"] if arguments.network == "unigradicon" else []
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    width = f" of {arguments.channels} channels" if network.has_width else ""
    return (
        f"{arguments.network}{width}, {' x '.join(map(str, arguments.shape))}, batch "
        f"{arguments.batch}, jaxreg in {arguments.precision}, {arguments.runs} "
        f"alternating runs, {os.cpu_count()} cores ({platform.machine()}), PyTorch "
        f"threads {arguments.threads}, {', '.join(versions)}"
    )


def row(arguments, folder: pathlib.Path, task, found: dict[str, Measured]):
    """Returns (column, width, value) of a task."""
    unit = f"s/{_PER_STEPS} steps" if arguments.io_steps else "s"
    ours, *others = (found[name] for name in libraries(arguments))
    cells = [("task", 7, task)]
    for name, measured in found.items():
        cells.append((f"{_TITLES[name]} {unit} (range)", 25, measured.spread()))

    def ratios(value):
        return "/".join(f"{value(ours) / value(other):.2f}" for other in others)

    peaks = "/".join(f"{measured.peak / 1e9:.2f}" for measured in found.values())
    wide = 10 if len(others) > 1 else 6
    cells += [
        ("time", wide, ratios(lambda m: m.median)),
        ("memory", wide, ratios(lambda m: m.peak)),
        ("peak GB", 15 if len(others) > 1 else 10, peaks),
        ("compile s", 15, "{:.1f} ({:.1f})".format(*ours.compiled)),
    ]
    if arguments.cache:
        assert ours.again is not None
        cells.append(("again s", 13, "{:.1f} ({:.1f})".format(*ours.again)))
    last = difference(arguments, folder, task)
    return [*cells, ("difference", 10, last)]


def difference(arguments, folder: pathlib.Path, task) -> str:
    """Returns how far the first results of jaxreg and of plain PyTorch are apart."""
    ours, theirs = (
        first_result(make_job(arguments, folder, name, task))
        for name in ("jaxreg", "pytorch")
    )
    if task == "forward":
        return f"map {np.abs(ours - theirs).max():.1e} (unit)"
    return f"loss {abs(ours / theirs - 1):.1e} (relative)"


# --- the largest batch ----------------------------------------------------------------


def search(arguments, folder: pathlib.Path) -> None:
    """Doubles the batch of each library until its memory is gone, and prints both."""
    print(heading(arguments))
    on_cpu = arguments.memory_limit
    limit = 1e9 * on_cpu if on_cpu else 0.8 * available_memory()
    for task in arguments.tasks:
        for library in libraries(arguments):
            largest, seconds, why = doubled(arguments, folder, library, task, limit)
            rate = f"{largest / seconds:.4g} pairs/s" if largest else "no pair fits"
            print(
                f"{task:8s} {_TITLES[library]:9s} largest batch {largest:4d}, {rate} "
                f"({why})",
                flush=True,
            )


def doubled(arguments, folder: pathlib.Path, library: Library, task, limit: float):
    """Returns (largest batch that fits, seconds of a step of it, why it ended)."""
    largest, seconds, batch = 0, float("nan"), 1
    while batch <= arguments.batch_limit:
        job = make_job(
            arguments, folder, library, task, batch=batch, io_steps=0, alone=True
        )
        try:
            worker = Worker(job, memory_limit=_on_cpu(limit))
            seconds_now = worker.run()
            peak = worker.stop()
        except Died as died:
            if died.reason != "memory" and not largest:
                raise SystemExit(f"{task}, batch {batch}: {died}") from died
            # Some layers of PyTorch have limits of their own besides the memory.
            words = died.message.strip().splitlines()[-1:]
            why = "does not fit" if died.reason == "memory" else f"fails: {words}"
            return largest, seconds, f"{batch} {why}"
        largest, seconds = batch, seconds_now
        print(f"  {_TITLES[library]} {task} batch {batch}: {peak / 1e9:.2f} GB")
        batch *= 2
    return largest, seconds, "the limit of the search"


def _on_cpu(limit: float) -> float | None:
    """Returns the limit of resident memory; None on a GPU, which ends by itself."""
    import torch

    return None if torch.cuda.is_available() else limit


if __name__ == "__main__":
    main()
