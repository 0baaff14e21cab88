"""How far each network is from the hardware's limit: arithmetic and memory by layer.

    python benchmarks/roofline.py --device nvidia-h200 tpu-v5e
    python benchmarks/roofline.py --train --device tpu-v5e --precision bfloat16
    python benchmarks/roofline.py --models gradicon --size 64 --device cpu --measure

For every network at its published grid, one pair: the operations that its layers need
and the bytes that they must move (`counting`), the two times that these take on a
device, and as the bound the sum over layers of the longer one. Nothing is compiled but
with --measure. --check counts the same program by XLA, before it optimises it.

Figures of devices and where they are from: `devices`.
"""

import argparse
import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import counting
import counting_rules
import jax
import jax.numpy as jnp
from counting import Layer
from devices import DEVICES, Device
from programs import MODELS, Precision, Program, build

from jaxreg.xla import platforms


def this_cpu() -> Device:
    """Measures a matrix product and a copy on the present device, best of several."""

    def best(function, *args):
        program = jax.jit(function)
        jax.block_until_ready(program(*args))
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    n, numbers = 2048, 2**26
    square = jnp.ones((n, n))
    rate = 2 * n**3 / best(jnp.matmul, square, square)
    # Read once, written once.
    bandwidth = 8 * numbers / best(lambda x: x + 1, jnp.ones(numbers))
    return Device(rate, rate, rate, bandwidth)


# --- times ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Clock:
    """Seconds that layers take on a device.

    Attributes:
      device: which.
      precision: "float32" has all products at full precision.
      lanes: None for peak rates. Otherwise what jaxreg's form does, in arrays padded to
        the device's tiles, on a matrix unit whose rows hold what one result sums over:
        "taps", all of it, the best case, or "channels" of one tap after the other.
    """

    device: Device
    precision: Precision
    lanes: Literal["taps", "channels"] | None = None

    def compute(self, layer: Layer) -> float:
        """Arithmetic alone."""
        device = self.device
        if layer.kind != "matrix":
            return 0.0 if device.vector is None else layer.flops / device.vector
        rate = device.default
        if layer.exact or (self.precision == "float32" and layer.itemsize == 4):
            rate = device.float32
        elif layer.itemsize == 2:
            rate = device.bfloat16
        if self.lanes is None:
            return layer.flops / rate
        return layer.built / (rate * self.filled(layer))

    def filled(self, layer: Layer) -> float:
        """The part of the matrix unit that a layer can use."""
        array = self.device.array
        if not array or layer.product is None:
            return 1.0
        channels, taps, columns = layer.product
        summed = channels * taps if self.lanes == "taps" else channels
        return math.prod(n / (-(-n // array) * array) for n in (summed, columns))

    def memory(self, layer: Layer) -> float:
        """Moving alone."""
        if self.lanes is None or not self.device.array:
            return layer.bytes / self.device.bandwidth
        return sum(a.padded_bytes() for a in layer.arrays) / self.device.bandwidth

    def bound(self, layer: Layer) -> float:
        """The longer of both."""
        return max(self.compute(layer), self.memory(layer))


def table(layers: Sequence[Layer], clock: Clock, *, each: bool) -> str:
    """Returns a table in Markdown, a row for each group, or for each layer."""
    rows: dict[str, list[Layer]] = collections.defaultdict(list)
    for index, layer in enumerate(layers):
        rows[f"{index} {layer.name}" if each else layer.group].append(layer)
    clocks = [clock]
    heads = ["part", "calls", "GFLOP", "GB", "compute ms", "memory ms", "bound ms"]
    if clock.device.array:
        for lanes in ("taps", "channels"):
            clocks.append(dataclasses.replace(clock, lanes=lanes))
            heads += [f"{lanes}: used %", "ms"]
    lines = _head(heads)
    for name, group in [*rows.items(), ("all", list(layers))]:
        sums = [counting.total(group, what) for what in _numbers(clock)]
        calls = sum(layer.times for layer in group)
        cells = [name, str(calls), *(_short(x) for x in sums)]
        for lane in clocks[1:]:
            ideal, real = (counting.total(group, c.compute) for c in (clock, lane))
            used = f"{100 * ideal / real:.0f}" if real else "-"
            cells += [used, _short(1e3 * counting.total(group, lane.bound))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _head(heads: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]


def _numbers(clock: Clock) -> list[Callable[[Layer], float]]:
    return [
        lambda layer: layer.flops / 1e9,
        lambda layer: layer.bytes / 1e9,
        lambda layer: 1e3 * clock.compute(layer),
        lambda layer: 1e3 * clock.memory(layer),
        lambda layer: 1e3 * clock.bound(layer),
    ]


def _short(number: float) -> str:
    if not number:
        return "0"
    digits = min(3, max(0, 2 - math.floor(math.log10(abs(number)))))
    return f"{number:,.{digits}f}"


def estimate(layers: Sequence[Layer], clock: Clock) -> str:
    """Returns what a TPU would need, in one sentence."""
    milliseconds = [
        1e3 * counting.total(layers, dataclasses.replace(clock, lanes=lanes).bound)
        for lanes in (None, "taps", "channels")
    ]
    taps = counting.total(layers, lambda layer: layer.taps)
    peak, best, worst = map(_short, milliseconds)
    array = f"{clock.device.array} x {clock.device.array}"
    said = (
        f"estimate: {peak} ms at peak, {best} to {worst} ms as a {array} array is "
        "filled"
    )
    if taps:
        said += (
            f"; samplers read or write {taps / 1e6:,.0f} million voxels one by one, "
            f"{_short(taps * 1e-6)} ms more for each nanosecond that one takes"
        )
    return said


def check(program: Program, layers: Sequence[Layer]) -> str:
    """Returns the count by hand beside XLA's of the program as it is handed to it."""
    with counting_rules.whole(), platforms.tracing_for("tpu"):
        traced = jax.jit(program.whole).trace(*program.whole_args)
        lowered = traced.lower(lowering_platforms=("tpu",))
        xla = (lowered.cost_analysis() or {}).get("flops", math.nan)
    once = sum(layer.built for layer in layers)
    counts = [counting.total(layers, lambda layer: layer.flops)]
    counts.append(counting.total(layers, lambda layer: layer.built))
    needed, built, once, xla = (x / 1e9 for x in (*counts, once, xla))
    return (
        f"GFLOP: needed {needed:,.1f}; with the zeros that jaxreg's form multiplies "
        f"{built:,.1f}; loops counted once {once:,.1f}; by XLA {xla:,.1f} (by hand / "
        f"XLA {once / xla:.3f})"
    )


# --- measuring ------------------------------------------------------------------------


def measure(program: Program, runs: int) -> tuple[list[float], float]:
    """Returns the seconds of each run, and XLA's count of the compiled program."""
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def real(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return next(keys)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Small weights: the maps stay near the identity, as trained ones do.
        scale = 1.0 if len(leaf.shape) == 5 and leaf.shape[0] == 1 else 0.01
        return scale * jax.random.uniform(next(keys), leaf.shape, leaf.dtype)

    args = jax.tree.map(real, program.whole_args)
    compiled = jax.jit(program.whole).lower(*args).compile()
    counted = (compiled.cost_analysis() or {}).get("flops", math.nan)
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return seconds, counted


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--device", nargs="+", choices=["cpu", *DEVICES], default=["cpu"]
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "default", "bfloat16"),
        default="default",
        help="float32: products at full precision; default: as JAX takes them, TF32 or "
        "one bfloat16 pass; bfloat16: activations too, where a network can",
    )
    parser.add_argument("--size", type=int, help="longest axis; published if absent")
    parser.add_argument("--train", action="store_true", help="a training step")
    parser.add_argument("--layers", action="store_true", help="a row for every layer")
    parser.add_argument("--check", action="store_true", help="XLA's count beside ours")
    parser.add_argument("--measure", action="store_true", help="run it here")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Parses the command line, counts, perhaps measures, prints."""
    given = _arguments()
    devices = {n: this_cpu() if n == "cpu" else DEVICES[n] for n in given.device}
    for name, device in devices.items():
        print(
            f"{name}: products {_short(device.float32 / 1e12)} TFLOP/s at full "
            f"float32, {_short(device.default / 1e12)} by default, "
            f"{_short(device.bfloat16 / 1e12)} in bfloat16; memory "
            f"{_short(device.bandwidth / 1e9)} GB/s"
        )
    summary = collections.defaultdict(list)
    for model in given.models:
        program = build(
            model,
            size=given.size,
            task="train" if given.train else "forward",
            precision=given.precision,
        )
        layers = program.layers()
        print(f"\n{program.title}")
        if given.check:
            print(check(program, layers))
        seconds, counted = [], math.nan
        if given.measure:
            seconds, counted = measure(program, given.runs)
        for name, device in devices.items():
            clock = Clock(device, given.precision)
            print(f"\n{name}, products {given.precision}\n")
            print(table(layers, clock, each=given.layers))
            summary[name].append(_summary(model, layers, clock))
            if device.array:
                print(estimate(layers, clock))
            if seconds:
                middle = statistics.median(seconds)
                bound = counting.total(layers, clock.bound)
                print(
                    f"measured here: {middle:.3f} s ({min(seconds):.3f} to "
                    f"{max(seconds):.3f}, {len(seconds)} runs), {middle / bound:.1f} "
                    f"times the bound; XLA counts {counted / 1e9:,.1f} GFLOP in the "
                    "compiled program, loops once"
                )
    for name, rows in summary.items():
        print(f"\n{name}, all models, products {given.precision}\n")
        lanes = ["as taps fill it ms", "as channels fill it ms"]
        heads = ["network", "GFLOP", "GB", "compute ms", "memory ms", "bound ms"]
        heads += lanes if devices[name].array else []
        print("\n".join([*_head(heads), *rows]))


def _summary(model: str, layers: Sequence[Layer], clock: Clock) -> str:
    sums = [counting.total(layers, what) for what in _numbers(clock)]
    if clock.device.array:
        for lanes in ("taps", "channels"):
            lane = dataclasses.replace(clock, lanes=lanes)
            sums.append(1e3 * counting.total(layers, lane.bound))
    return "| " + " | ".join([model, *map(_short, sums)]) + " |"


if __name__ == "__main__":
    main()
