"""How far each network's map moves in bfloat16, on real pairs, in millimetres.

    python benchmarks/precision.py --pair mri MOVING FIXED --weights weights/*gradicon

Prints a row for each network and pair: how far float32 moves the voxels of the network
grid in the mean, how much that varies (root mean square about the mean displacement),
then mean and maximum of the distance between where float32 and where bfloat16 maps
them. Weights have their own grid. --random names networks (keys of
contestants.NETWORKS) without weights: untrained, on --shape, with random last layers.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from typing import Any

import accuracy
import contestants
import numpy as np

# Else an untrained dynamic head makes little but a translation.
_ROUGHER = {"unireg": 30.0, "unireg_rpn": 7.0}


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", nargs=3, action="append", required=True,
        metavar=("MODALITY", "MOVING", "FIXED"), help="ct or mri; may be repeated",
    )  # fmt: skip
    parser.add_argument("--weights", nargs="*", default=[], help="folders of weights")
    parser.add_argument(
        "--random", nargs="*", default=[], choices=list(contestants.NETWORKS)
    )
    parser.add_argument("--shape", nargs=3, type=int, default=(48, 48, 48))
    arguments = parser.parse_args(argv)
    from jaxreg.weights import load

    print(
        "| network | grid | pair | moves, mean mm | varies mm | bfloat16, mean mm "
        "| max mm |"
    )
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    for path in arguments.weights:
        _rows(path, load.load(path), arguments.pair)
    for name in arguments.random:
        with tempfile.TemporaryDirectory() as folder:
            contestants.prepare(pathlib.Path(folder), name, tuple(arguments.shape))
            loaded = load.load(f"{folder}/weights")
            loaded = dataclasses.replace(
                loaded, variables=_rough(loaded.variables, name)
            )
            _rows(f"{name}, untrained", loaded, arguments.pair)


def _rough(variables: Any, name: str) -> Any:
    """Returns variables whose dynamic heads have larger weights to start from."""
    import jax

    def scaled(path, leaf):
        *_, layer, kind = (part.key for part in path)
        base = (layer, kind) == ("controller", "bias")
        return leaf * _ROUGHER[name] if base else leaf

    params = jax.tree_util.tree_map_with_path(scaled, variables["params"])
    return {**variables, "params": params}


def _rows(title: str, loaded: Any, pairs: list[list[str]]) -> None:
    for modality, *paths in pairs:
        pair, unit_to_mm = accuracy.read_pair(paths, modality, loaded)
        full = accuracy.map_of(loaded, pair, accuracy.FULL)
        half = accuracy.map_of(loaded, pair, "bfloat16")
        moved = (full - accuracy.identity(full)) @ unit_to_mm.T
        varies = np.linalg.norm(moved - moved.mean((0, 1, 2, 3)), axis=-1)
        gap = accuracy.distance(half, full, unit_to_mm)
        cells = (
            title,
            " x ".join(map(str, full.shape[1:4])),
            ", ".join(pathlib.Path(path).name.split(".")[0] for path in paths),
            f"{np.linalg.norm(moved, axis=-1).mean():.3f}",
            f"{np.sqrt(np.mean(varies**2)):.3f}",
            f"{gap.mean():.4f}",
            f"{gap.max():.4f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
