"""Which descriptors find a point again: SAM's, trained from scratch, or MIND's?

    python benchmarks/sam_points.py --data Task04_Hippocampus --model runs/.../weights

The middle of each held-out scan (every fifth subject, as in configs/hippocampus_sam.py)
is deformed smoothly, blurred, and given other contrast and noise. Random points of the
scan are looked for in the deformed one, where their places are known. All descriptors
have the same rule: the most similar voxel, moved to the top of the parabola through it
and its neighbours (`jaxreg.matching.points`). The two scans are cut out with
different edges, which therefore tell nothing. Points whose match leads back to within
--consistent mm count as consistent.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import network_grid, preprocess
from jaxreg.data.manifest import read, records
from jaxreg.data.preprocess import IntensityRule
from jaxreg.io import volumes
from jaxreg.losses.similarity import gaussian_blur
from jaxreg.matching import points
from jaxreg.matching.points import DescribedScan
from jaxreg.space import fields
from jaxreg.space.grid import Grid, Shape, Volume
from jaxreg.weights import load

Describe = Callable[[Volume, IntensityRule], DescribedScan]
RULE = IntensityRule("mri")
TURNED = network_grid.ResamplingRule("pad_crop", "spl")
MARGIN = 2  # voxels between a point and the scan's edge
SLACK = 4  # voxels that the two scans' edges may differ by: edges must tell nothing


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is done to a scan.

    Attributes:
      shift_mm: root mean square length of the displacement.
      smooth: deviation of the Gaussian that smooths it, in voxels.
      blur: largest deviation of the image's blur, whole voxels.
      noise: deviation of the noise, as a share of the scan's intensity range.
      gamma: largest factor of the contrast's exponent, either way.
    """

    shift_mm: float = 4.0
    smooth: int = 8
    blur: int = 1
    noise: float = 0.05
    gamma: float = 1.3


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="manifest or folder of scans")
    parser.add_argument("--model", action="append", default=[], help="weights of SAM")
    parser.add_argument(
        "--shape", default="28,42,28", help="of both scans; smaller ones are left out"
    )
    parser.add_argument("--volumes", type=int, default=20)
    parser.add_argument("--points", type=int, default=100, help="per volume")
    parser.add_argument("--inside", choices=("scan", "labels"), default="scan")
    parser.add_argument("--consistent", type=float, default=2.0, help="mm")
    parser.add_argument("--shift-mm", type=float, default=Changes.shift_mm)
    parser.add_argument("--noise", type=float, default=Changes.noise)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    held = read.read_manifest(given.data, holdout=5).of_split("val")
    shape = tuple(int(n) for n in given.shape.split(","))
    whole = tuple(n + SLACK for n in shape)
    held = [r for r in held if np.all(np.array(size_of(r)) >= whole)]
    held = held[:: max(len(held) // given.volumes, 1)][: given.volumes]
    changes = Changes(shift_mm=given.shift_mm, noise=given.noise)
    methods = {
        **{f"SAM {path}": sam_of(path) for path in given.model},
        "MIND, voxels of 1 mm": functools.partial(points.by_mind, spacing_mm=1.0),
        "MIND, voxels of 2 mm": functools.partial(points.by_mind, spacing_mm=2.0),
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    nothing = []
    for number, record in enumerate(held):
        rng = np.random.default_rng((given.seed, number))
        scan = middle_of(volumes.read_volume(record.image), whole)
        label = None
        if given.inside == "labels" and record.label is not None:
            labels = volumes.read_volume(record.label, kind="labels")
            label = middle_of(labels, whole).array
        other, field = changed(scan, changes, rng)
        corners = rng.integers(0, SLACK + 1, (2, 3))
        here, there = places(scan, field, label, corners, shape, given.points, rng)
        scan, other = (
            part(volume, corner, shape)
            for volume, corner in zip((scan, other), corners, strict=True)
        )
        nothing.append(np.linalg.norm(here - there, axis=-1))
        for name, describe in methods.items():
            found[name].append(errors(describe, scan, other, here, there))
    print(
        f"{len(held)} scans, {sum(map(len, nothing))} points inside the {given.inside}"
    )
    rows = {"nothing": (np.concatenate(nothing), None)}
    for name, parts in found.items():
        error, cycle = np.concatenate(parts, 1)
        rows[name] = (error, cycle < given.consistent)
    show(rows, given.consistent)


def size_of(record: records.Record) -> tuple[int, ...]:
    """Returns a scan's shape as `middle_of` turns it."""
    grid = volumes.read_grid(record.image)
    empty = Volume(np.broadcast_to(np.float32(0), grid.shape), grid)
    return TURNED.reoriented(empty).grid.shape


def middle_of(volume: Volume, shape: Shape) -> Volume:
    """Returns the middle of a scan, of one shape for all: programs compile once."""
    turned = TURNED.reoriented(volume)
    first = [(n - m) // 2 for n, m in zip(turned.array.shape, shape, strict=True)]
    return part(turned, first, shape)


def part(volume: Volume, first: Sequence[int] | np.ndarray, shape: Shape) -> Volume:
    """Returns the part of a scan that begins at a voxel."""
    box = tuple(slice(a, a + m) for a, m in zip(first, shape, strict=True))
    matrix = volume.grid.affine_mm.copy()
    matrix[:3, 3] += matrix[:3, :3] @ np.asarray(first)
    return Volume(volume.array[box], Grid(shape, matrix), volume.source)


def sam_of(path: str) -> Describe:
    """Returns how SAM describes a scan."""
    loaded = load.load_sam(path)

    def describe(volume, rule):
        own = dataclasses.replace(rule, quantile_range=loaded.quantile_range)
        return points.by_sam(volume, own, loaded)

    return describe


def changed(
    scan: Volume, changes: Changes, rng: np.random.Generator
) -> tuple[Volume, np.ndarray]:
    """Returns a scan that looks otherwise, and its displacement.

    Returns:
      The scan on the same grid, and D H W 3: its voxel x shows the scan's x plus this.
    """
    shape = scan.grid.shape
    noise = rng.standard_normal((1, *shape, 3)).astype(np.float32)
    smooth = np.asarray(gaussian_blur(jnp.asarray(noise), changes.smooth))[0]
    length = np.sqrt(np.mean(np.sum((smooth * scan.grid.spacing_mm) ** 2, -1)))
    field = smooth * (changes.shift_mm / length)
    image = preprocess.normalise(scan.array, RULE)[None, ..., None]
    warped = fields.warp_voxels(
        jnp.asarray(image), jnp.asarray(field)[None], outside="edge"
    )
    blur = int(rng.integers(0, changes.blur + 1))
    if blur:
        # The border of this blur is dark; divided by that of ones it is not.
        ones = jnp.ones_like(warped)
        warped = gaussian_blur(warped, blur) / gaussian_blur(ones, blur)
    power = changes.gamma ** rng.uniform(-1, 1)
    array = np.asarray(warped)[0, ..., 0].clip(0, 1) ** power
    array = array + changes.noise * rng.standard_normal(shape)
    return Volume(array.astype(np.float32), scan.grid, "changed"), field


def places(
    scan: Volume,
    field: np.ndarray,
    label: np.ndarray | None,
    corners: np.ndarray,
    size: Shape,
    count: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws points of the scan and says where they are in the changed one, P 3 mm.

    Args:
      scan: whole.
      field: see `changed`.
      label: of the scan, where points are to lie; anywhere if None.
      corners: first voxel of the part of the scan that is used, and of the changed one.
      size: of both parts.
      count: of points.
      rng: to draw with.
    """
    shape = np.asarray(scan.grid.shape)
    index = np.moveaxis(np.indices(scan.grid.shape), 0, -1).reshape(-1, 3)
    origin = index + field.reshape(-1, 3)
    inside = np.ones(len(index), bool)
    for at, corner in ((origin, corners[0]), (index, corners[1])):
        last = corner + np.asarray(size) - 1
        inside &= np.all((at >= corner + MARGIN) & (at <= last - MARGIN), -1)
    if label is not None:
        nearest = np.clip(np.round(origin), 0, shape - 1).astype(int)
        inside &= label[tuple(nearest.T)] > 0
    chosen = rng.choice(np.flatnonzero(inside), count, replace=False)
    matrix = scan.grid.affine_mm
    here, there = (
        at[chosen] @ matrix[:3, :3].T + matrix[:3, 3] for at in (origin, index)
    )
    return here, there


def errors(
    describe: Describe,
    scan: Volume,
    other: Volume,
    here: np.ndarray,
    there: np.ndarray,
) -> np.ndarray:
    """Returns the distances of matches from the truth and of their returns, 2 P mm."""
    query, key = describe(scan, RULE), describe(other, RULE)
    found = points.find(here, query, key)
    back = points.cycle_mm(here, found, query, key)
    return np.stack([np.linalg.norm(found.points_mm - there, axis=-1), back])


def show(rows: Mapping[str, tuple[np.ndarray, np.ndarray | None]], limit: float):
    """Prints a table."""
    width = max(map(len, rows))
    print(
        f"{'':{width}}  median mm  mean mm   p95 mm  "
        f"consistent (< {limit:g} mm) %  median mm  mean mm"
    )
    for name, (error, consistent) in rows.items():
        numbers = f"{np.median(error):9.2f}  {error.mean():7.2f}"
        text = f"{name:{width}}  {numbers}  {np.percentile(error, 95):7.2f}"
        if consistent is not None and consistent.any():
            kept = error[consistent]
            text += (
                f"  {100 * consistent.mean():23.1f}"
                f"  {np.median(kept):9.2f}  {kept.mean():7.2f}"
            )
        print(text)


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
