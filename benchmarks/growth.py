"""How time and memory grow: with the voxels, the batch and the devices.

    python benchmarks/growth.py
    python benchmarks/growth.py --network unireg_rpn --largest 96 --parts voxels
    python benchmarks/growth.py --plot

Measures the forward pass and the training step, each size in a process of its own
(worker.py), jaxreg's and PyTorch's where there is one, and writes growth_NETWORK.csv
and two plots, growth_NETWORK_time.png and growth_NETWORK_memory.png, with the slopes of
the three largest sizes (1: in proportion). A sweep ends at the memory's limit or after
a step that took longer than --limit. --plot draws a CSV that is there once more.

  voxels   grids of --sizes along each axis, up to --largest; one pair
  batch    pairs of a step on a grid of --batch-size
  devices  scaling.py's training step of its small network on --device-size, as many
           pairs as devices; on CPU simulated ones, which share the same cores

The original uniGradICON needs 66 voxels along each axis; smaller grids have no point.
"""

import argparse
import csv
import dataclasses
import importlib.util
import os
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import scaling
from contestants import NETWORKS, Job, Library, Task, prepare
from worker import Died, Worker, available_memory

PARTS = ("voxels", "batch", "devices")
SIZES = (32, 48, 64, 96, 128, 160, 192)
_FITTED = 3
_SHARE_OF_MEMORY = 0.8
_LEAST_SPAN = 10.0


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of one sweep.

    Attributes:
      part: one of `PARTS`.
      library: see `contestants.Job`.
      task: "forward" or "train".
      size: voxels per axis.
      batch: pairs.
      devices: that share them.
      seconds: median of a run; NaN where there is none.
      low: least seconds.
      high: most seconds.
      peak: bytes.
      compile: seconds of tracing and compilation (devices: and of the first step).
      note: why there are no numbers.
      where: the machine.
    """

    part: str
    library: str
    task: str
    size: int
    batch: int = 1
    devices: int = 1
    seconds: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    peak: float = float("nan")
    compile: float = float("nan")
    note: str = ""
    where: str = ""

    @property
    def amount(self) -> int:
        """What its sweep is over."""
        found = {"voxels": self.size**3, "batch": self.batch, "devices": self.devices}
        return found[self.part]


def main() -> None:
    """Parses the command line, measures and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="unigradicon")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--largest", type=int, default=max(SIZES), help="of --sizes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=48, help="voxels per axis")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device-size", type=int, default=32, help="voxels per axis")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--tasks", nargs="+", choices=("forward", "train"), default=["forward", "train"]
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs of a size")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a step")
    parser.add_argument("--memory-limit", type=float, help="GB, on CPU")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's CPU threads")
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument("--plot", action="store_true", help="what was measured before")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "plots"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / f"growth_{arguments.network}.csv"
    if not arguments.plot:
        write(table, measure(arguments))
    draw(read(table), table.with_suffix(""))


# --- measuring ------------------------------------------------------------------------


def measure(arguments) -> Iterator[Point]:
    """Yields all points asked for, as they are found."""
    if "voxels" in arguments.parts:
        sizes = sorted(n for n in arguments.sizes if n <= arguments.largest)
        steps = [(size, 1) for size in sizes]
        yield from sweeps(arguments, "voxels", steps)
    if "batch" in arguments.parts:
        steps = [(arguments.batch_size, n) for n in sorted(arguments.batches)]
        yield from sweeps(arguments, "batch", steps)
    if "devices" in arguments.parts:
        yield from of_devices(arguments)


def sweeps(
    arguments, part: Literal["voxels", "batch"], steps: Sequence[tuple[int, int]]
) -> Iterator[Point]:
    """Yields a sweep over (size, batch) for each library and task."""
    libraries: list[Library] = ["jaxreg"]
    needed = ["torch", *(["unigradicon"] if arguments.network == "unigradicon" else [])]
    if not arguments.alone and all(importlib.util.find_spec(name) for name in needed):
        libraries.append("pytorch")
    limit = None
    if scaling.real_devices()[1] == "cpu":  # a GPU's memory ends by itself
        given = arguments.memory_limit
        limit = 1e9 * given if given else _SHARE_OF_MEMORY * available_memory()
    with tempfile.TemporaryDirectory() as name:
        for task in arguments.tasks:
            for library in libraries:
                for size, batch in steps:
                    folder = pathlib.Path(name) / str(size)
                    if not folder.exists():
                        folder.mkdir()
                        prepare(folder, arguments.network, (size, size, size))
                    empty = Point(part, library, task, size, batch)
                    point = of_size(arguments, folder, empty, limit)
                    yield point
                    ended = point.note == "memory" or point.high > arguments.limit
                    if ended:
                        break


def of_size(
    arguments, folder: pathlib.Path, empty: Point, limit: float | None
) -> Point:
    """Returns a point with its numbers, measured in a fresh process.

    Args:
      arguments: of the command line.
      folder: of `contestants.prepare`.
      empty: the point without them.
      limit: bytes of resident memory, on CPU.
    """
    library: Library = "jaxreg" if empty.library == "jaxreg" else "pytorch"
    task: Task = "train" if empty.task == "train" else "forward"
    job = Job(
        library,
        arguments.network,
        task,
        str(folder),
        batch=empty.batch,
        threads=arguments.threads,
        alone=True,
    )
    try:
        worker = start(job, folder, limit)
        seconds = [worker.run()]
        while len(seconds) < arguments.runs and seconds[-1] < arguments.limit:
            seconds.append(worker.run())
        peak = worker.stop()
    except Died as died:
        if died.reason != "memory" and library == "jaxreg":
            raise
        # The original does not run on every grid; its last words say why.
        words = died.message.strip().splitlines()[-1:] or [died.reason]
        note = "memory" if died.reason == "memory" else words[0]
        return dataclasses.replace(empty, note=note[:200], where=machine(""))
    return dataclasses.replace(
        empty,
        seconds=statistics.median(seconds),
        low=min(seconds),
        high=max(seconds),
        peak=peak,
        compile=worker.ready["compile"][0],
        where=machine(worker.ready["device"]),
    )


def start(job: Job, folder: pathlib.Path, limit: float | None) -> Worker:
    """Returns a warm worker, whose peak memory has no compilation in it."""
    cache = folder / f"programs_{job.task}_{job.batch}"
    worker = Worker(job, cache=cache, memory_limit=limit)
    if job.library != "jaxreg" or worker.ready["on_host"]:
        return worker
    compiled = worker.ready["compile"]
    worker.stop()
    worker = Worker(job, cache=cache, memory_limit=limit)
    worker.ready["compile"] = compiled
    return worker


def machine(device: str) -> str:
    """Returns what to call the machine."""
    if device in ("", "cpu"):
        return f"{os.cpu_count()} cores ({platform.machine()})"
    return device


def of_devices(arguments) -> Iterator[Point]:
    """Yields scaling.py's training step on more and more devices."""
    present, kind = scaling.real_devices()
    simulated = present == 1
    settings = argparse.Namespace(
        size=arguments.device_size,
        batch=1,
        runs=arguments.runs,
        network="small",
        strong=False,
    )
    for count in sorted(arguments.devices):
        if count > present and not simulated:
            return
        found = scaling.run_worker(settings, "mesh", count, simulated=simulated)
        yield Point(
            "devices",
            "jaxreg",
            "train",
            arguments.device_size,
            found["batch"],
            count,
            statistics.median(found["seconds"]),
            min(found["seconds"]),
            max(found["seconds"]),
            found["peak"],
            found["compile"],
            where=machine("cpu" if simulated else f"{present} x {kind}"),
        )
        if max(found["seconds"]) > arguments.limit:
            return


# --- the table ------------------------------------------------------------------------


def write(path: pathlib.Path, points: Iterator[Point]) -> None:
    """Writes points as they come, so that an interrupted run keeps what it has."""
    names = [field.name for field in dataclasses.fields(Point)]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        for point in points:
            table.writerow(dataclasses.asdict(point))
            file.flush()
            print(
                f"{point.part:8s} {point.library:8s} {point.task:8s} {point.size}^3 "
                f"batch {point.batch} devices {point.devices}: "
                + (
                    point.note
                    or f"{point.seconds:.4g} s ({point.low:.4g}-{point.high:.4g}), "
                    f"{point.peak / 1e9:.2f} GB, compile {point.compile:.1f} s"
                ),
                flush=True,
            )


def read(path: pathlib.Path) -> list[Point]:
    """Returns the points of a table."""
    kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Point)}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Point(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


# --- the plots ------------------------------------------------------------------------


def draw(points: Sequence[Point], stem: pathlib.Path) -> None:
    """Writes the two plots beside the table.

    Args:
      points: of `read`.
      stem: path of the table without its ending.
    """
    drawn = [point for point in points if np.isfinite(point.seconds)]
    parts = [part for part in PARTS if any(p.part == part for p in drawn)]
    if not parts:
        raise SystemExit(f"{stem.name}.csv has no numbers to draw")
    title = stem.name.replace("_", " ", 1)
    for name, height, unit in (("time", "s per run", 1.0), ("memory", "peak GB", 1e-9)):
        figure = panels(drawn, parts, name, height, unit)
        figure.suptitle(f"{title}, {', '.join(sorted({p.where for p in drawn}))}")
        figure.tight_layout()
        figure.savefig(f"{stem}_{name}.png", dpi=120)


def panels(drawn, parts, name: str, height: str, unit: float):
    """Returns a figure with a panel per sweep, both axes logarithmic."""
    from matplotlib import figure as figures
    from matplotlib import ticker

    figure = figures.Figure(figsize=(4.6 * len(parts), 4.2))
    axes = figure.subplots(1, len(parts), squeeze=False)
    for part, axis in zip(parts, axes[0], strict=True):
        of_part = [point for point in drawn if point.part == part]
        ticks = sorted({point.amount for point in of_part})
        for library, mark in (("jaxreg", "o-"), ("pytorch", "s--")):
            for task, colour in (("forward", "tab:blue"), ("train", "tab:red")):
                line = [p for p in of_part if (p.library, p.task) == (library, task)]
                if not line:
                    continue
                x = np.array([point.amount for point in line], float)
                y = unit * np.array(
                    [p.seconds if name == "time" else p.peak for p in line]
                )
                label = f"{library} {task}{slope(x, y)}"
                axis.plot(x, y, mark, color=colour, label=label, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel=axis_title(of_part), ylabel=height)
        low, high = axis.get_ylim()
        if high < _LEAST_SPAN * low:  # what hardly changes is to look so
            middle, half = (low * high) ** 0.5, _LEAST_SPAN**0.5
            axis.set_ylim(middle / half, middle * half)
        axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        labels = [
            f"{round(n ** (1 / 3))}³" if part == "voxels" else str(n) for n in ticks
        ]
        axis.set_xticklabels(labels)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def slope(x: np.ndarray, y: np.ndarray) -> str:
    """Returns the slope of the largest points in logarithms, for a label."""
    x, y = np.log(x[-_FITTED:]), np.log(y[-_FITTED:])
    return f", slope {np.polyfit(x, y, 1)[0]:.2f}" if len(x) > 1 else ""


def axis_title(points: Sequence[Point]) -> str:
    """Returns what a panel's horizontal axis is."""
    part, size = points[0].part, points[0].size
    return {
        "voxels": "voxels, one pair",
        "batch": f"pairs of {size}³ voxels",
        "devices": f"devices, {size}³ voxels each, small network",
    }[part]


if __name__ == "__main__":
    main()
