"""Corresponding points of two scans in mm, by descriptors of both.

Scans are reoriented so that array indices grow towards Superior, Posterior and Left,
and resampled to voxels of one size. Every voxel of a descriptor grid has a vector of
length 1: SAM's coarse and fine embedding, or MIND, which needs no weights. The place
that is found is the voxel whose vector is most like that at the point, moved to the top
of the parabola through it and its neighbours along each axis.

References:
  Yan et al., SAM, IEEE TMI 2022, section III-D; Heinrich et al., MIND-SSC, MICCAI 2013.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import network_grid, preprocess
from jaxreg.data.preprocess import IntensityRule
from jaxreg.errors import UserError
from jaxreg.matching import nearest
from jaxreg.models import sam
from jaxreg.nn import correlation
from jaxreg.space import filters, sampling
from jaxreg.space.grid import Grid, Volume
from jaxreg.typing import Image

_NUDGE = 1e-3  # of a voxel: how far rounding may put a point outside its scan


@dataclasses.dataclass(frozen=True)
class DescribedScan:
    """A scan by its descriptors.

    Attributes:
      vectors: D H W C, float32, of length 1 over C.
      grid: of the vectors.
      inside: D H W bool, false where a vector lies outside the scan.
      scan: the scan's own grid, and what to call it in a message.
    """

    vectors: jax.Array
    grid: Grid
    inside: np.ndarray
    scan: Grid
    source: str


@dataclasses.dataclass(frozen=True)
class FoundPoints:
    """Where points are in another scan.

    Attributes:
      points_mm: P 3, RAS+.
      similarity: P, the vectors' inner product, at most 1.
    """

    points_mm: np.ndarray
    similarity: np.ndarray


def in_sam_range(array: Any, rule: IntensityRule) -> Any:
    """Returns intensities in SAM's range: CT keeps its Hounsfield units, MR fills it.

    The one rule for training, points, pre-alignment and optimisation by features.

    Args:
      array: [0, 1], of JAX or NumPy.
      rule: by which it became so.
    """
    window = rule.ct_window if rule.modality == "ct" else sam.HU_RANGE
    return sam.to_sam_range(array, window)


def padded_for_sam(image: Volume, rule: IntensityRule) -> Volume:
    """Returns a scan as SAM sees it, of sizes that its strides divide.

    Padding at the ends of the axes repeats the edge, as in training.

    Args:
      image: from `resampled`.
      rule: of its intensities.
    """
    sizes = zip(image.array.shape, sam.COARSE_STRIDE, strict=True)
    surplus = [(0, -n % m) for n, m in sizes]
    padded = np.pad(in_sam_range(image.array, rule), surplus, "edge")
    grid = Grid(padded.shape, image.grid.affine_mm)
    return Volume(padded, grid, image.source)


def check_known(network: sam.TrainedSam, rule: IntensityRule, source: str) -> None:
    """Checks that a scan is of a kind that a SAM network was trained on.

    Raises:
      UserError: the network was trained on CT alone, and it is another scan.
    """
    if rule.modality != "ct" and network.quantile_range is None:
        raise UserError(f"this SAM network knows CT alone, {source} is another scan")


def embed(network: sam.TrainedSam, image: Image) -> sam.Embeddings:
    """Returns the embeddings of images N D H W 1 in SAM's range."""
    return _embed(network.config, network.variables, image)


_embed = jax.jit(sam.features, static_argnames="config")


def resampled(volume: Volume, rule: IntensityRule, spacing_mm: float) -> Volume:
    """Returns a scan as descriptors need it: reoriented, scaled to [0, 1], resampled.

    Args:
      volume: the scan.
      rule: its intensities.
      spacing_mm: of the result, whose extent is the scan's as far as whole voxels go.

    Raises:
      UserError: see `preprocess.normalise`.
    """
    resampling = network_grid.ResamplingRule("pad_crop", "spl", spacing_mm)
    reoriented = resampling.reoriented(volume)
    array = preprocess.normalise(reoriented.array, rule, source=volume.source)
    extent = reoriented.grid.spacing_mm * reoriented.grid.shape
    d, h, w = (max(round(float(mm) / spacing_mm), 1) for mm in extent)
    grid = resampling.grid(reoriented.grid, (d, h, w))
    array = resampling.image(array, reoriented.grid, (d, h, w), outside=rule.outside)
    return Volume(array, grid, volume.source)


def by_sam(
    volume: Volume,
    rule: IntensityRule,
    network: sam.TrainedSam,
) -> DescribedScan:
    """Returns a scan described by SAM: coarse and fine embedding on the fine grid.

    Args:
      volume: the scan.
      rule: its intensities.
      network: the trained one; the fine grid's voxels are twice its own.

    Raises:
      UserError: see `resampled` and `check_known`.
    """
    check_known(network, rule, volume.source)
    image = resampled(volume, rule, network.spacing_mm)
    shown = padded_for_sam(image, rule)
    found = embed(network, jnp.asarray(shown.array)[None, ..., None])
    vectors = nearest.descriptors(found, aligned=False)[0] * math.sqrt(0.5)
    fine = vectors.shape[:3]
    grid = shown.grid.resized(fine)
    index = np.indices(fine)
    limit = -(-np.asarray(image.array.shape) // sam.FINE_STRIDE)
    inside = np.all(index < limit.reshape(3, 1, 1, 1), 0)
    return DescribedScan(vectors, grid, inside, volume.grid, volume.source)


def by_mind(
    volume: Volume,
    rule: IntensityRule,
    *,
    spacing_mm: float = sam.SPACING_MM,
    radius: int = 2,
    dilation: int = 2,
) -> DescribedScan:
    """Returns a scan described by MIND, voxel for voxel.

    Args:
      volume: the scan.
      rule: its intensities.
      spacing_mm: of the voxels.
      radius: see `filters.mind_descriptor`.
      dilation: see `filters.mind_descriptor`.

    Raises:
      UserError: see `resampled`.
    """
    image = resampled(volume, rule, spacing_mm)
    vectors = filters.mind_descriptor(
        jnp.asarray(image.array)[None, ..., None], radius=radius, dilation=dilation
    )
    inside = np.ones(image.array.shape, bool)
    return DescribedScan(
        sam.normalise(vectors)[0], image.grid, inside, volume.grid, volume.source
    )


def find(
    points_mm: np.ndarray, query: DescribedScan, key: DescribedScan
) -> FoundPoints:
    """Returns where points of one scan are in another.

    Args:
      points_mm: P 3, RAS+, in the query's scan.
      query: the scan of the points.
      key: the scan to look in.

    Raises:
      UserError: a point lies outside its scan.
    """
    points_mm = np.asarray(points_mm, np.float64).reshape(-1, 3)
    _check_inside(points_mm, query)
    if not len(points_mm):
        return FoundPoints(points_mm, np.zeros(0, np.float32))
    at = _voxels(points_mm, query.grid)
    index, offset, similarity = _peaks(
        correlation.normalised(_at(query.vectors, at)),
        key.vectors,
        jnp.asarray(key.inside),
    )
    where = np.stack(np.unravel_index(np.asarray(index), key.inside.shape), -1)
    where = where + np.asarray(offset, np.float64)
    matrix = key.grid.affine_mm
    found = where @ matrix[:3, :3].T + matrix[:3, 3]
    return FoundPoints(found, np.asarray(similarity))


def cycle_mm(
    points_mm: np.ndarray, found: FoundPoints, query: DescribedScan, key: DescribedScan
) -> np.ndarray:
    """Returns how far from each point its match's own match lies, P.

    Args:
      points_mm: P 3, RAS+, in the query's scan.
      found: by `find`, of these points.
      query: the scan of the points.
      key: the scan in which they were found.
    """
    # A place on the outermost voxels may lie a little outside the scan.
    there = _clipped(found.points_mm, key.scan)
    back = find(there, key, query)
    return np.linalg.norm(back.points_mm - np.asarray(points_mm), axis=-1)


def _at(vectors: jax.Array, at: np.ndarray) -> jax.Array:
    """Vectors D H W C at voxels P 3, linear, edges repeated: P C."""
    return sampling.sample_voxels(vectors[None], jnp.asarray(at, jnp.float32)[None])[0]


def _voxels(points_mm: np.ndarray, grid: Grid) -> np.ndarray:
    inverse = np.linalg.inv(grid.affine_mm)
    return points_mm @ inverse[:3, :3].T + inverse[:3, 3]


def _clipped(points_mm: np.ndarray, grid: Grid) -> np.ndarray:
    """Points moved onto the box of a grid's voxel edges."""
    at = np.clip(_voxels(points_mm, grid), -0.5, np.asarray(grid.shape) - 0.5)
    return at @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]


def _check_inside(points_mm: np.ndarray, described: DescribedScan) -> None:
    at = _voxels(points_mm, described.scan)
    edge = np.asarray(described.scan.shape) - 0.5
    outside = np.any((at < -0.5 - _NUDGE) | (at > edge + _NUDGE), -1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        point, voxel = (
            " ".join(f"{x:.6g}" for x in values)
            for values in (points_mm[first], at[first][::-1])
        )
        raise UserError(
            f"point {first + 1} ({point} mm in RAS+, voxel {voxel}) lies outside "
            f"{described.source}; give places in that scan, and say in which frame"
        )


@jax.jit
def _peaks(queries: jax.Array, keys: jax.Array, inside: jax.Array):
    """The best voxel of each query, and where its similarity would be highest.

    Args:
      queries: P C.
      keys: D H W C.
      inside: D H W, where to look.

    Returns:
      (flat index P, offset in voxels P 3, similarity P).
    """
    shape, rows = keys.shape[:3], keys.reshape(-1, keys.shape[-1])
    # One more component keeps queries away from what is not inside.
    barred = jnp.where(inside.reshape(-1, 1), 0.0, -2.0)
    index, similarity = nearest.best(
        jnp.pad(queries, ((0, 0), (0, 1)), constant_values=1.0),
        jnp.concatenate([rows, barred], 1),
    )
    place = jnp.stack(jnp.unravel_index(index, shape), -1)
    offsets = []
    for axis in range(3):
        step = jnp.zeros(3, jnp.int32).at[axis].set(1)
        values, there = [], []
        for side in (-1, 1):
            at = place + side * step
            there.append((at[:, axis] >= 0) & (at[:, axis] < shape[axis]))
            at = jnp.clip(at, 0, jnp.asarray(shape) - 1)
            there[-1] &= inside[tuple(at.T)]
            values.append(jnp.sum(keys[tuple(at.T)] * queries, -1))
        curvature = values[0] + values[1] - 2 * similarity
        curved = there[0] & there[1] & (curvature < 0)
        top = 0.5 * (values[0] - values[1]) / jnp.where(curved, curvature, -1.0)
        offsets.append(jnp.where(curved, jnp.clip(top, -0.5, 0.5), 0.0))
    return index, jnp.stack(offsets, -1), similarity
