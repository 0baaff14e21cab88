"""How long a list of pairs takes in one process, against a process for each pair.

    python benchmarks/throughput.py --data Task04_Hippocampus --model WEIGHTS

Both write a transform and a warped scan of each pair: the list in one ``jaxreg register
--pairs``, then some of the pairs in turn in a ``jaxreg register`` of their own, from
which the time of all is extrapolated (--all runs them all). Once with the compiled
programs of an earlier call in the cache ("warm"), once with a cache of its own for each
process ("empty"). Prints a table; ratio is the one process by all the calls.
"""

import argparse
import csv
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def pairs_of(data: pathlib.Path, count: int) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Returns pairs (fixed, moving) of different scans of a Decathlon folder.

    Every scan with its neighbour by name, then with the one after, and so on.
    """
    folder = next(
        (data / name for name in ("imagesTr", "images") if (data / name).is_dir()), data
    )
    scans = sorted(p for p in folder.glob("*.nii.gz") if not p.name.startswith("."))
    if len(scans) < 2:
        sys.exit(f"{folder} holds {len(scans)} scans (.nii.gz), expected at least 2")
    found = []
    for distance in range(1, len(scans)):
        found += [
            (scan, scans[(i + distance) % len(scans)]) for i, scan in enumerate(scans)
        ]
    if len(found) < count:
        sys.exit(f"{len(scans)} scans make {len(found)} pairs, {count} are asked for")
    return found[:count]


def seconds(argv: list[str], cache: pathlib.Path) -> float:
    """Runs `jaxreg` in a process of its own; returns its wall time."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "jaxreg.cli.main", "register", *argv]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return taken


def measure(pairs, how: list[str], calls: int, *, keep: bool) -> tuple[float, list]:
    """Returns seconds of one process with all pairs, and of each single call.

    Args:
      pairs: fixed and moving scans.
      how: options of both.
      calls: how many pairs are registered by a call of their own as well.
      keep: whether the compiled programs of one process serve the next.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        listing = folder / "pairs.csv"
        with open(listing, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("fixed", "moving"), *pairs])

        def call(number: int) -> float:
            fixed, moving = pairs[number]
            argv = ["--fixed", str(fixed), "--moving", str(moving)]
            argv += ["--transform-out", f"{folder}/{number}.h5"]
            argv += ["--warped-moving-out", f"{folder}/{number}.nii.gz"]
            cache = folder / ("cache" if keep else f"cache of {number}")
            return seconds([*argv, *how], cache)

        if keep:
            call(0)  # fills the cache
        cache = folder / ("cache" if keep else "cache of the list")
        argv = ["--pairs", str(listing), "--out-dir", f"{folder}/out", *how]
        together = seconds(argv, cache)
        return together, [call(number) for number in range(calls)]


def main() -> None:
    """Times both ways and prints a table."""
    parser = argparse.ArgumentParser(
        description="How long a list of pairs takes in one process."
    )
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--calls", type=int, default=5, help="timed single calls")
    parser.add_argument("--all", action="store_true", help="a call for every pair")
    parser.add_argument("--modality", default="mri", choices=("mri", "ct"))
    parser.add_argument("--io-iterations", default="None")
    parser.add_argument("--cache", default="both", choices=("both", "warm", "empty"))
    asked = parser.parse_args()
    pairs = pairs_of(asked.data.absolute(), asked.pairs)
    calls = len(pairs) if asked.all else min(asked.calls, len(pairs))
    how = ["--model", asked.model, "--io-iterations", asked.io_iterations]
    how += ["--fixed-modality", asked.modality, "--moving-modality", asked.modality]
    cores = len(os.sched_getaffinity(0))
    print(f"{len(pairs)} pairs, {cores} CPU cores, {calls} calls of one pair")
    print(
        "| cache | one process, s | one call, s: median (range) "
        f"| {len(pairs)} calls, s | ratio |"
    )
    print("|---|---:|---:|---:|---:|")
    for cache in ("warm", "empty"):
        if asked.cache not in ("both", cache):
            continue
        one, each = measure(pairs, how, calls, keep=cache == "warm")
        whole = sum(each) * len(pairs) / len(each)
        said = "" if len(each) == len(pairs) else " (extrapolated)"
        spread = f"{min(each):.2f} to {max(each):.2f}"
        print(
            f"| {cache} | {one:.1f} | {statistics.median(each):.2f} ({spread}) "
            f"| {whole:.0f}{said} | {one / whole:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
