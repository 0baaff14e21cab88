"""How far a network's map moves in lower precision, in millimetres.

    python benchmarks/vs_pytorch.py --accuracy --weights W --images A.nii.gz B.nii.gz

Prints mean, 95th percentile and maximum over the network grid's voxels of the distance
between where float32 and where another precision maps a voxel. Without --images the
pair is a smooth random one of 1 mm voxels, without --weights the network a random one
(--network).
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from contestants import smooth_pair
from jaxreg_side import MATMUL, at_precision

FULL = "float32"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this module's options to a command line."""
    parser.add_argument("--accuracy", action="store_true", help="of lower precision")
    parser.add_argument("--weights", help="of --accuracy; random ones if absent")
    parser.add_argument("--images", nargs=2, help="moving and fixed scan of --accuracy")
    parser.add_argument("--modality", choices=("ct", "mri"), default="mri")


def report(arguments: Any, folder: pathlib.Path) -> None:
    """Prints the errors of lower precisions.

    Args:
      arguments: of the command line, see `add_options`.
      folder: of `contestants.prepare`, where no weights are given.
    """
    import jax

    from jaxreg.weights import load

    loaded = load.load(arguments.weights or str(folder / "weights"))
    if arguments.images:
        pair, unit_to_mm = read_pair(arguments.images, arguments.modality, loaded)
    else:
        pair, unit_to_mm = _smooth(
            loaded.shape if arguments.weights else arguments.shape
        )
    full = map_of(loaded, pair, FULL)
    moved = distance(full, identity(full), unit_to_mm)
    shape = " x ".join(map(str, full.shape[1:4]))
    print(
        f"{arguments.weights or arguments.network} ({loaded.bundle.model}), {shape}, "
        f"on {jax.devices()[0].device_kind}; float32 moves {moved.mean():.3f} mm in "
        "the mean"
    )
    print(f"{'precision':34s} mean mm  p95 mm  max mm")
    for precision in ("tf32", "bfloat16"):
        error = distance(map_of(loaded, pair, precision), full, unit_to_mm)
        print(
            f"{precision:34s} {error.mean():7.4f} {np.percentile(error, 95):7.4f} "
            f"{error.max():7.4f}"
        )


def distance(a: np.ndarray, b: np.ndarray, unit_to_mm: np.ndarray) -> np.ndarray:
    """Returns how far points are from others, mm: ... 3, unit, to ... ."""
    return np.linalg.norm((a - b) @ unit_to_mm.T, axis=-1)


def map_of(loaded: Any, pair: Any, precision: Any) -> np.ndarray:
    """Returns where each fixed voxel lies in the moving image: 1 D H W 3, unit."""
    import jax

    model = at_precision(loaded.model, precision)
    shape = pair.fixed.shape[1:4]

    @jax.jit
    def run(variables, pair):
        found = model.apply(variables, pair.moving, pair.fixed, task=pair.task)
        return found[0].transform.on_grid(shape)

    with jax.default_matmul_precision(MATMUL[precision]):
        return np.asarray(run(dict(loaded.variables), pair), np.float64)


def identity(points: np.ndarray) -> np.ndarray:
    """Returns the voxels of the grid that points N D H W 3 are given on, unit."""
    from jaxreg.space import sampling

    d, h, w = points.shape[1:4]
    return np.asarray(sampling.identity((d, h, w)), np.float64)


def _smooth(shape: tuple[int, int, int]):
    """Returns a pair of smooth images of 1 mm voxels, and unit to mm, 3 x 3."""
    import jax.numpy as jnp

    from jaxreg.space.grid import unit_scale
    from jaxreg.typing import Pair

    moving, fixed = (np.moveaxis(x, 1, -1) for x in smooth_pair(shape))
    task = jnp.zeros(1, jnp.int32)
    pair = Pair(jnp.asarray(moving), jnp.asarray(fixed), task=task)
    return pair, np.diag(unit_scale(shape))


def read_pair(paths: Sequence[str], modality: Any, loaded: Any):
    """Returns scans on the network grid, and unit coordinates to mm, 3 x 3.

    Args:
      paths: of the moving and the fixed scan.
      modality: of both.
      loaded: the network that sees them.
    """
    import jax.numpy as jnp

    from jaxreg.data import network_grid
    from jaxreg.io import volumes
    from jaxreg.registration import options as options_lib
    from jaxreg.registration import preparation

    scans = [volumes.read_volume(path) for path in paths]
    moving = preparation.oriented_like(scans[0], scans[1].grid)
    placement = network_grid.ResamplingRule.of_weights(loaded.bundle.preprocessing)
    options = options_lib.Options(
        fixed_modality=modality,
        moving_modality=modality,
        ct_window=loaded.ct_window if modality == "ct" else None,
        quantile_range=loaded.quantile_range if modality == "mri" else None,
        foreground=loaded.foreground,
        shape=loaded.shape,
        placement=placement,
    )
    moving, fixed = placement.reoriented(moving), placement.reoriented(scans[1])
    pair = preparation.make_pair(moving, fixed, options, options_lib.Regions())
    pair = dataclasses.replace(pair, task=jnp.zeros(1, jnp.int32))
    return pair, placement.grid(moving.grid, options.grid_shape).unit_to_mm[:3, :3]
