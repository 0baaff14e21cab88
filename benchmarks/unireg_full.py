"""The paper's UniReg at its published grid: size, and one registration on this machine.

    python benchmarks/unireg_full.py --features mind
    python benchmarks/unireg_full.py --features sam

Prints parameters and multiply-adds of its forms next to the paper's numbers, then
compile time, the time of both directions of one pair (as `jaxreg register` asks for
them) and the peak resident memory, compilation included. Weights are random.
"""

import argparse
import dataclasses
import math
import resource
import time

import counting
import jax
import jax.numpy as jnp
import programs

from jaxreg.experiments import files
from jaxreg.models import sam
from jaxreg.models.unireg import paper
from jaxreg.models.unireg.features import FINE
from jaxreg.models.unireg.paper import UniReg, UniRegConfig
from jaxreg.training import step
from jaxreg.typing import Pair

PAPER = (360_000, 477_000_000_000)
"""Parameters and multiply-adds that the paper states, rounded as it does."""
PAPER_SHAPE = programs.UNIREG_SHAPE
OFFSETS = 27

FORMS = {
    "strided convolutions (the default)": UniRegConfig(),
    "maximum pooling": UniRegConfig(downsample="maxpool"),
    "SAME, its ancestor": paper.SAME,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a network without the one that makes its embeddings.

    Attributes:
      parameters: trained numbers.
      convolutions: multiply-adds of a pass, those of the generated layers included.
      correlation: of three products (of both maps, and their two lengths) at each
        offset and fine voxel, as the paper may have counted; jaxreg has one of each
        length per voxel.
    """

    parameters: int
    convolutions: int
    correlation: int


def size_of(config: UniRegConfig, shape: programs.Shape = PAPER_SHAPE) -> Size:
    """Counts a form of the network at a grid."""
    # What is correlated has 27 channels, whatever it is made of.
    small = dataclasses.replace(config, features="mind")
    given = files.load(programs.ROOT / "configs" / "unireg.py")
    given = dataclasses.replace(given, model=small)
    program = programs.registration("unireg", given, shape, task="forward")
    parts = ("encoder", "decoder", "last layers")
    layers = [layer for layer in program.layers() if layer.group in parts]
    # The controller's one product is not a convolution, and nothing beside them.
    layers = [layer for layer in layers if "controller" not in layer.name]
    voxels = math.prod(n // f for n, f in zip(shape, FINE, strict=True))
    return Size(
        parameters=programs.parameters(program.args[0]),
        convolutions=round(counting.total(layers, lambda x: x.flops) / 2),
        correlation=3 * OFFSETS * config.feature_channels * voxels,
    )


def print_sizes() -> None:
    """Prints the count of each form at the paper's grid."""
    for name, config in FORMS.items():
        size = size_of(config)
        print(
            f"{name}: {size.parameters:,} parameters, "
            f"{size.convolutions / 1e9:.1f} G multiply-adds, "
            f"{size.correlation / 1e9:.1f} G more to correlate fine embeddings"
        )
    print(f"UniReg in the paper: {PAPER[0] / 1e6:.2f} M, {PAPER[1] / 1e9:.0f} G")


def main() -> None:
    """Parses the command line, counts, compiles, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--features", choices=("mind", "sam", "none"), default="mind")
    parser.add_argument("--shape", default=",".join(map(str, PAPER_SHAPE)))
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    print_sizes()
    shape = tuple(int(n) for n in given.shape.split(","))
    model = UniReg(UniRegConfig(features=given.features))
    variables = dict(model.init(jax.random.key(0)))
    if given.features == "sam":
        frozen = sam.init(sam.SamConfig(), jax.random.key(1))
        variables = sam.with_sam(variables, frozen)
    images = jax.random.uniform(jax.random.key(2), (2, 1, *shape, 1))

    def both(variables, moving, fixed):
        pair = Pair(moving, fixed, task=jnp.zeros(1, jnp.int32))
        maps = step.predict(model, variables, pair)[0]
        return [m.steps[0].field for m in (maps.forward, maps.backward)]

    start = time.perf_counter()
    program = jax.jit(both).lower(variables, *images).compile()
    compiled = time.perf_counter() - start
    seconds, found = [], None
    for _ in range(given.runs):
        start = time.perf_counter()
        found = jax.block_until_ready(program(variables, *images))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    finite = all(bool(jnp.isfinite(field).all()) for field in found or ())
    print(
        f"features {given.features}, {' x '.join(map(str, shape))} on "
        f"{jax.devices()[0].platform}: compile {compiled:.1f} s, both directions "
        f"{', '.join(f'{s:.1f} s' for s in seconds)}, peak memory {peak / 1e9:.1f} GB, "
        f"finite {finite}"
    )


if __name__ == "__main__":
    main()
