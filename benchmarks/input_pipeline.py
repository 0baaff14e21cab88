"""How many pairs per second the input pipeline reads from its cache.

    python benchmarks/input_pipeline.py --size 175 --volumes 24 --pairs 160

Writes random scans to a temporary folder (removed at the end), preprocesses each once
and then reads pairs of them in random order, for each number of workers and each
storage. Prints a table:

  fill      scans per second while the cache fills (read, scale, resize, write)
  pairs/s   from the cache, after the first batches; nothing is done with them
  MB/s      the same in bytes
  CPU ms    processor time per pair in the process that trains (its threads included)

All that is read has just been written, so it comes out of the page cache: a cache
larger than memory is as fast as its disk.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import tempfile
import time

import nibabel as nib
import numpy as np

from jaxreg.data import batches as batches_lib
from jaxreg.data import loading as loading_lib
from jaxreg.data import pair_source
from jaxreg.data.manifest.records import Record
from jaxreg.data.pairs import ImageRef, PairPlan, Task


@dataclasses.dataclass(frozen=True)
class InTurn:
    """Scan i alone, so that each is preprocessed once."""

    tasks: tuple[Task, ...] = (Task("random"),)

    def __getitem__(self, index: int) -> PairPlan:
        """Returns scan i with itself."""
        return PairPlan(0, ImageRef(index), ImageRef(index))


@dataclasses.dataclass(frozen=True)
class AtRandom:
    """Two scans at random."""

    count: int
    tasks: tuple[Task, ...] = (Task("random"),)

    def __getitem__(self, index: int) -> PairPlan:
        """Returns pair `index`."""
        moving, fixed = np.random.default_rng(index).integers(self.count, size=2)
        return PairPlan(0, ImageRef(int(moving)), ImageRef(int(fixed)))


def write_scans(folder: pathlib.Path, count: int, size: int) -> tuple[Record, ...]:
    """Writes scans of 16-bit integers, which no file system compresses away."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        path = folder / f"{number:03}.nii"
        voxels = rng.integers(0, 4000, (size, size, size), dtype=np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        records.append(Record(path, f"{number:03}", "random"))
    return tuple(records)


def measure(
    source: pair_source.PairSource,
    loading: loading_lib.Loading,
    batch_size: int,
    pairs: int,
) -> tuple[float, float]:
    """Returns pairs per second and this process's CPU seconds per pair."""
    early = 2 + 4 * max(1, loading.workers)  # what may lie ready is not counted
    stop = early + -(-pairs // batch_size)
    with batches_lib.Batches(
        source, loading, batch_size=batch_size, stop=stop
    ) as batches:
        for _ in range(early):
            next(batches)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in batches:
            pass
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    count = (stop - early) * batch_size
    return count / seconds, cpu / count


def main() -> None:
    """Parses the command line, writes, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=175, help="voxels per axis")
    parser.add_argument("--volumes", type=int, default=24, help="scans")
    parser.add_argument("--pairs", type=int, default=160, help="pairs per measurement")
    parser.add_argument("--batch", type=int, default=4, help="pairs per batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="without workers")
    parser.add_argument("--storage", nargs="+", default=["float32", "uint16"])
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args()
    print(
        f"{args.volumes} scans of {args.size}^3, batch {args.batch}, {args.pairs} pairs"
        f", {args.threads} threads without workers, prefetch 2, "
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'storage':9}{'workers':>8}{'fill':>8}{'pairs/s':>10}{'MB/s':>8}{'CPU ms':>8}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        records = write_scans(pathlib.Path(folder), args.volumes, args.size)
        for storage in args.storage:
            loading = loading_lib.Loading(
                shape=(args.size,) * 3,
                cache_dir=pathlib.Path(folder) / "cache",
                storage=storage,
                read_threads=args.threads,
            )
            source = pair_source.PairSource(records, InTurn())
            began = time.perf_counter()
            with batches_lib.Batches(
                source, loading, batch_size=1, stop=args.volumes
            ) as each:
                for _ in each:
                    pass
            filled = args.volumes / (time.perf_counter() - began)
            source = pair_source.PairSource(records, AtRandom(args.volumes))
            megabytes = 2 * args.size**3 * np.dtype(storage).itemsize / 1e6
            for workers in args.workers:
                chosen = dataclasses.replace(loading, workers=workers)
                rate, cpu = measure(source, chosen, args.batch, args.pairs)
                print(
                    f"{storage:9}{workers:8}{filled:8.1f}{rate:10.1f}"
                    f"{rate * megabytes:8.0f}{cpu * 1e3:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
