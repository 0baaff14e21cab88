"""How far each network's map moves in bfloat16, on real pairs, in millimetres.

    python benchmarks/precision.py --pair mri MOVING FIXED --weights weights/*gradicon

Prints a row for each network and pair: how far float32 moves the voxels of the network
grid in the mean, then mean and maximum of the distance between where float32 and where
bfloat16 maps them. Weights have their own grid. --random names networks (keys of
contestants.NETWORKS) without weights: untrained, with last layers that move something,
on --shape. Weights of a bundle are its network's kind; a bank of prompts is asked for
all of them.
"""

import argparse
import pathlib
import tempfile

import accuracy
import contestants


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
    print("| network | grid | pair | moves, mean mm | bfloat16, mean mm | max mm |")
    print("|---|---|---|---:|---:|---:|", flush=True)
    for path in arguments.weights:
        _rows(path, path, arguments.pair)
    for name in arguments.random:
        with tempfile.TemporaryDirectory() as folder:
            contestants.prepare(pathlib.Path(folder), name, tuple(arguments.shape))
            _rows(f"{name}, untrained", f"{folder}/weights", arguments.pair)


def _rows(title: str, weights: str, pairs: list[list[str]]) -> None:
    from jaxreg.weights import load

    loaded = load.load(weights)
    for modality, *paths in pairs:
        pair, unit_to_mm = accuracy.read_pair(paths, modality, loaded)
        full = accuracy.map_of(loaded, pair, accuracy.FULL)
        half = accuracy.map_of(loaded, pair, "bfloat16")
        moved = accuracy.distance(full, accuracy.identity(full), unit_to_mm)
        gap = accuracy.distance(half, full, unit_to_mm)
        cells = (
            title,
            " x ".join(map(str, full.shape[1:4])),
            ", ".join(pathlib.Path(path).name.split(".")[0] for path in paths),
            f"{moved.mean():.3f}",
            f"{gap.mean():.4f}",
            f"{gap.max():.4f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
