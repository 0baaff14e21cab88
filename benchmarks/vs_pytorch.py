"""jaxreg against the PyTorch original, in turn, in one process tree.

    python benchmarks/vs_pytorch.py --size 96
    python benchmarks/vs_pytorch.py --size 64 --network promptreg --channels 16

Prints, per task, the median time of each library, their ratio and the ratio of peak
memory. Both run the same network with the same random weights on the same random
images: the full uniGradICON (four U-Nets, 70.7 M parameters), PyTorch's side being
unigradicon's own; or PromptReg in its released form, PyTorch's side being
pytorch_promptreg.py beside this file, since the released program is no package. Each
library has a worker process per task; the workers take turns, one run each, so that a
busy machine hurts both alike. Compilation and first runs are not timed; compilation is
shown on its own.

Tasks: forward (one direction: network and its map on the grid), train (loss, gradient,
Adam; batch statistics; uniGradICON's loss is of both directions, PromptReg's of one),
io (uniGradICON alone: the same with running statistics, as in instance optimisation).
Peak memory is that of the process after warming up (CPU: its resident set; GPU: the
allocator's peak).

Needs: pip install "jaxreg[torch]"
"""

import argparse
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types

import numpy as np

TASKS = {"unigradicon": ("forward", "train", "io"), "promptreg": ("forward", "train")}


def main() -> None:
    """Parses the command line and runs the parent or a worker."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=96, help="voxels per axis")
    parser.add_argument("--runs", type=int, default=5, help="timed runs per library")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's CPU threads")
    parser.add_argument("--network", choices=list(TASKS), default="unigradicon")
    parser.add_argument("--channels", type=int, default=16, help="PromptReg's width")
    parser.add_argument("--tasks", nargs="+", choices=("forward", "train", "io"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    offered = TASKS[arguments.network]
    arguments.tasks = arguments.tasks or list(offered)
    if not set(arguments.tasks) <= set(offered):
        parser.error(f"--tasks: {arguments.network} has {', '.join(offered)}")
    if arguments.worker:
        library, task, folder = arguments.worker
        work(library, task, pathlib.Path(folder), arguments.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, pathlib.Path(folder))


# --- the parent ----------------------------------------------------------------------


class Worker:
    """A process that runs one task of one library whenever it is asked to."""

    def __init__(self, library: str, task: str, folder: pathlib.Path, threads: int):
        """Starts the process and waits until it is warm."""
        command = [sys.executable, __file__, "--threads", str(threads)]
        self._process = subprocess.Popen(
            [*command, "--worker", library, task, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._read()

    def _read(self) -> dict:
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a worker died; its message is above")

    def run(self) -> float:
        """Returns the seconds of one run."""
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def stop(self) -> float:
        """Ends the process and returns its peak memory in bytes."""
        self._process.stdin.write("stop\n")
        self._process.stdin.flush()
        peak = self._read()["peak"]
        self._process.wait()
        return peak


def compare(arguments, folder: pathlib.Path) -> None:
    """Runs all tasks and prints the table."""
    prepare(folder, arguments)
    prompted = arguments.network == "promptreg"
    packages = ["jax", "torch", *([] if prompted else ["unigradicon"])]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    width = f" of {arguments.channels} channels" if prompted else ""
    print(
        f"{arguments.network}{width}, {arguments.size}^3, {arguments.runs} "
        f"alternating runs, {os.cpu_count()} cores ({platform.machine()}), "
        f"PyTorch threads {arguments.threads}, {', '.join(versions)}"
    )
    print(
        "task     jaxreg s (range)        PyTorch s (range)       time  memory  ",
        end="",
    )
    print("peak GB   compile s  difference")
    for task in arguments.tasks:
        workers = {
            name: Worker(name, task, folder, arguments.threads)
            for name in ("jaxreg", "pytorch")
        }
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(arguments.runs):
            for name, worker in workers.items():
                seconds[name].append(worker.run())
        peak = {name: worker.stop() for name, worker in workers.items()}
        ours, theirs = (statistics.median(s) for s in seconds.values())
        spread = [
            f"{statistics.median(s):7.2f} ({min(s):.2f}-{max(s):.2f})"
            for s in seconds.values()
        ]
        print(
            f"{task:8s} {spread[0]:23s} {spread[1]:22s} {ours / theirs:5.2f} "
            f"{peak['jaxreg'] / peak['pytorch']:7.2f}  "
            f"{peak['jaxreg'] / 1e9:.2f}/{peak['pytorch'] / 1e9:.2f}"
            f"{workers['jaxreg'].ready['compile']:11.1f}  {difference(folder, task)}",
            flush=True,
        )


def prepare(folder: pathlib.Path, arguments) -> None:
    """Writes random images and weights that both libraries load."""
    import jax
    import torch

    from jaxreg import zoo
    from jaxreg.io import released, released_promptreg
    from jaxreg.models import kinds
    from jaxreg.models.gradicon import GradIconConfig
    from jaxreg.models.promptreg import PromptRegConfig

    generator = np.random.default_rng(0)
    prompted = arguments.network == "promptreg"
    config = PromptRegConfig(arguments.channels) if prompted else GradIconConfig()
    convert = released_promptreg if prompted else released
    model, shape = kinds.build(config), (arguments.size,) * 3
    variables = jax.tree.map(np.array, model.init(jax.random.key(0), shape))
    # Fresh networks move nothing: the last layers get weights that do.
    if prompted:
        heads = [variables["params"][f"head_{level}"] for level in (1, 2, 3, 4)]
    else:
        heads = [step["last"] for step in variables["params"].values()]
    for head in heads:
        head["kernel"] = generator.normal(scale=0.01, size=head["kernel"].shape).astype(
            np.float32
        )
    released.write_state_dict(
        folder / "weights.pth",
        convert.from_variables(variables, dataclasses.asdict(config)),
    )
    zoo.convert(folder / "weights.pth", folder / "weights")
    coarse = generator.uniform(size=(2, 1, 12, 12, 12)).astype(np.float32)
    images = torch.nn.functional.interpolate(
        torch.tensor(coarse), shape, mode="trilinear"
    )
    np.savez(folder / "images.npz", moving=images[:1], fixed=images[1:])


def difference(folder: pathlib.Path, task: str) -> str:
    """Returns how far the two libraries' first results are apart."""
    ours, theirs = (
        np.load(folder / f"{task}_{name}.npy") for name in ("jaxreg", "pytorch")
    )
    if task == "forward":
        return f"map {np.abs(ours - theirs).max():.1e} (unit)"
    return f"loss {abs(ours / theirs - 1):.1e} (relative)"


# --- the workers ---------------------------------------------------------------------


def work(library: str, task: str, folder: pathlib.Path, threads: int) -> None:
    """Prepares the task, reports, and runs it on request."""
    build = {"jaxreg": build_jaxreg, "pytorch": build_pytorch}[library]
    started = time.perf_counter()
    run, first_result, device_peak = build(task, folder, threads)
    np.save(folder / f"{task}_{library}.npy", first_result)
    compiled = time.perf_counter() - started
    run()
    reset_peak()
    say({"compile": compiled})
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        start = time.perf_counter()
        run()
        say({"seconds": time.perf_counter() - start})
    say({"peak": device_peak() or host_peak()})


def say(message: dict) -> None:
    """Sends one line to the parent."""
    print(json.dumps(message), flush=True)


def reset_peak() -> None:
    """Forgets the resident set's peak so far (compilation, loading)."""
    # What the compiler freed but the C library keeps is not the step's memory.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def host_peak() -> float:
    """Returns the resident set's peak in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def build_jaxreg(task: str, folder: pathlib.Path, _threads: int):
    """Returns (run, first result, device peak) of jaxreg."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxreg import experiment, zoo
    from jaxreg.losses.objective import Objective
    from jaxreg.models.promptreg import PromptReg
    from jaxreg.training.step import make_step
    from jaxreg.typing import Pair

    loaded = zoo.load(str(folder / "weights"))
    model, variables = loaded.model, jax.tree.map(jnp.array, dict(loaded.variables))
    del loaded  # a second copy of the weights
    with np.load(folder / "images.npz") as images:
        moving, fixed = (
            jnp.moveaxis(jnp.asarray(images[k]), 1, -1) for k in ("moving", "fixed")
        )
    shape = fixed.shape[1:4]

    def peak():
        statistics = jax.devices()[0].memory_stats()
        return (statistics or {}).get("peak_bytes_in_use")

    if task == "forward":

        def forward(variables, moving, fixed):
            return model.apply(variables, moving, fixed)[0].transform.on_grid(shape)

        program = jax.jit(forward).lower(variables, moving, fixed).compile()

        def once():
            return jax.block_until_ready(program(variables, moving, fixed))

        return once, np.moveaxis(np.asarray(once()), -1, 1), peak

    optimizer, objective, row = optax.adam(2e-5), Objective(), None
    if isinstance(model, PromptReg):
        row = jnp.zeros(1, jnp.int32)
        configs = pathlib.Path(__file__).parents[1] / "configs"
        objective = experiment.load(configs / "promptreg.py").objective
    step = make_step(model, objective, optimizer, train=task == "train")
    # No maps among the results, as in a training loop.
    program = jax.jit(lambda *a: step(*a)[:3], donate_argnums=(0, 1))
    state = [variables, optimizer.init(variables["params"])]
    pair = Pair(moving, fixed, task=row)
    noise = jax.random.normal(jax.random.key(0), (1, *shape, 3))
    program = program.lower(*state, pair, 0 * noise).compile()

    def once(noise=noise):
        state[0], state[1], parts = program(*state, pair, noise)
        return float(jax.block_until_ready(parts["loss"]))

    return once, once(0 * noise), peak


def build_pytorch(task: str, folder: pathlib.Path, threads: int):
    """Returns (run, first result, device peak) of the network in PyTorch."""
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with np.load(folder / "images.npz") as images:
        moving, fixed = (
            torch.tensor(images[k], device=device) for k in ("moving", "fixed")
        )
    weights = torch.load(folder / "weights.pth", weights_only=True)
    build = promptreg_in_pytorch if "defconv1.bias" in weights else unigradicon_itself
    forward, loss, parameters = build(weights, moving, fixed, task)
    del weights  # a second copy

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def peak():
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    if task == "forward":

        def once():
            with torch.no_grad():
                result = forward()
            wait()
            return result

        return once, once().cpu().numpy(), peak

    optimizer = torch.optim.Adam(parameters, lr=2e-5)

    def once():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        wait()
        return float(value)

    # Without jitter, so that both libraries' first loss is the same number.
    jittered, torch.randn = torch.randn, lambda *a, **k: torch.zeros(*a, **k)
    first = once()
    torch.randn = jittered
    return once, first, peak


def unigradicon_itself(weights, moving, fixed, task: str):
    """Returns (forward, loss, parameters) of unigradicon's own network."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # imported by icon_registration, never used
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = types.ModuleType("torchvision")
    import unigradicon

    net = unigradicon.make_network(moving.shape, include_last_step=True)
    net.regis_net.load_state_dict(weights)
    net.to(moving.device)
    net.train(task == "train")
    return (
        lambda: net.regis_net(moving, fixed)(net.identity_map),
        lambda: net(moving, fixed).all_loss,
        list(net.parameters()),
    )


def promptreg_in_pytorch(weights, moving, fixed, _task: str):
    """Returns (forward, loss, parameters) of pytorch_promptreg.py's network."""
    import pytorch_promptreg
    import torch

    # What has no effect is stored by the released program; it is not trained here.
    idle = ("prompt_mlp", "x_proj", "cross_attention.q", "cross_attention.k", "grid")
    state = {
        name: tensor.to(moving.device).requires_grad_()
        for name, tensor in weights.items()
        if not any(word in name for word in idle)
    }
    scale = torch.tensor(moving.shape[2:], device=moving.device) - 1.0

    def forward():  # as a map in unit coordinates, for the comparison
        field = pytorch_promptreg.network(state, moving, fixed)[0]
        axes = [torch.arange(n, device=field.device) for n in field.shape[2:]]
        places = torch.stack(torch.meshgrid(axes, indexing="ij")) + field
        return places / scale.view(1, 3, 1, 1, 1)

    return (
        forward,
        lambda: pytorch_promptreg.loss(state, moving, fixed),
        list(state.values()),
    )


if __name__ == "__main__":
    main()
