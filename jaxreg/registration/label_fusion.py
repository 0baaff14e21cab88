"""Labels of one or several atlases on a scan: warped, and fused where they differ.

Each atlas votes at each voxel of the scan for the labels around the place to which its
transform leads, with the weights of linear interpolation, as if each label's map of
zeros and ones were warped; its votes count as much as it resembles the scan there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxreg.data import preprocess
from jaxreg.data.preprocess import IntensityRule
from jaxreg.losses import similarity
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Transform

GAIN = 4
"""Exponent of the local similarity."""
_LEAST_WEIGHT = 1e-3  # where no atlas resembles the scan, all count alike
_MOST_VOTES = 2**22  # labels times voxels at a time: of two labels 0.4 GB in all


@dataclasses.dataclass(frozen=True)
class Carried:
    """An atlas on its way to a scan.

    Attributes:
      labels: its label map, D H W, whole numbers from 0 on.
      transform: the scan's mm to the atlas' mm.
      weight: of its votes at each voxel of the scan, D H W; 1 if None.
    """

    labels: Volume
    transform: Transform
    weight: np.ndarray | None = None


def local_weight(
    fixed: Volume,
    atlas: Volume,
    transform: Transform,
    rules: tuple[IntensityRule, IntensityRule],
) -> np.ndarray:
    """Returns how much an atlas counts at each voxel of a scan, D H W, float16.

    The local correlation coefficient of both to the power of `GAIN`, which is even:
    what is bright in one contrast may be dark in another.

    Args:
      fixed: the scan.
      atlas: the atlas' scan.
      transform: the scan's mm to the atlas' mm.
      rules: how the intensities of the atlas and of the scan are scaled.

    References:
      Artaechevarria, Munoz-Barrutia and Ortiz-de-Solorzano, Combination strategies in
      multi-atlas image segmentation: application to brain MR data, IEEE TMI 2009.
    """
    moving, here = (
        dataclasses.replace(
            scan, array=preprocess.normalise(scan.array, rule, source=scan.source)
        )
        for scan, rule in zip((atlas, fixed), rules, strict=True)
    )
    warped = warping.warp_volume(moving, transform, fixed.grid, fill=0.0)
    alike = _alike(*(v.array[None, ..., None] for v in (warped, here)))
    return np.asarray(alike, np.float16)[0, ..., 0]


@jax.jit
def _alike(warped, fixed):
    correlation = similarity.lncc_map(warped, fixed)
    return (correlation**GAIN).clip(_LEAST_WEIGHT, 1.0)


def fuse(
    grid: Grid,
    atlases: Sequence[Carried],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Volume:
    """Returns the label with most votes at each voxel of a scan.

    Of one atlas this is the largest of all labels' maps of zeros and ones, each warped
    linearly. An atlas has no vote where its label map ends; where none has, and where
    votes are equal between it and another, background (0) is the answer, and between
    others the smallest label. Memory does not grow with the number of labels: votes are
    counted by parts of the scan.

    Args:
      grid: of the scan.
      atlases: one or more.
      progress: told after each part (slices done, slices in all).

    Returns:
      Label map on the grid, of the type that holds the labels of all atlases.
    """
    classes = functools.reduce(
        np.union1d, (np.unique(a.labels.array) for a in atlases), np.zeros(1, int)
    )
    numbered = [
        np.searchsorted(classes, a.labels.array).astype(np.int32) for a in atlases
    ]
    dtype = np.result_type(*(a.labels.array.dtype for a in atlases))
    depth, height, width = grid.shape
    step = max(1, _MOST_VOTES // (height * width * classes.size))
    found = np.zeros(grid.shape, dtype)
    for first in range(0, depth, step):
        count = min(step, depth - first)
        part = Grid((count, height, width), _from_slice(grid, first))
        votes = np.zeros((math.prod(part.shape), classes.size), np.float32)
        for atlas, labels in zip(atlases, numbered, strict=True):
            weight = None
            if atlas.weight is not None:
                weight = atlas.weight[first : first + count].astype(np.float32).ravel()
            _vote(votes, labels, _places(part, atlas), weight)
        chosen = classes[votes.argmax(1)].astype(dtype)
        found[first : first + count] = chosen.reshape(part.shape)
        if progress is not None:
            progress(first + count, depth)
    return Volume(found, grid, "labels")


def _from_slice(grid: Grid, first: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = first
    return grid.affine_mm @ matrix


def _places(part: Grid, atlas: Carried) -> np.ndarray:
    """Returns where a scan's voxels lie in an atlas' label map, P 3, voxels."""
    back = np.linalg.inv(atlas.labels.grid.voxel_to_mm)
    moved = warping.displacement_mm(atlas.transform, part) @ back[:3, :3].T
    unmoved = back @ part.voxel_to_mm
    index = np.moveaxis(np.indices(part.shape, np.float64), 0, -1)
    return (moved + index @ unmoved[:3, :3].T + unmoved[:3, 3]).reshape(-1, 3)


def _vote(
    votes: np.ndarray,
    labels: np.ndarray,
    places: np.ndarray,
    weight: np.ndarray | None,
) -> None:
    """Adds an atlas' votes.

    Args:
      votes: P K, changed in place.
      labels: D H W, numbers of classes.
      places: P 3, voxels of the label map.
      weight: P; 1 if None.
    """
    last = np.asarray(labels.shape) - 1
    inside = np.flatnonzero(((places >= -0.5) & (places <= last + 0.5)).all(-1))
    at = np.clip(places[inside], 0, last)
    low = np.minimum(at.astype(np.intp), np.maximum(last - 1, 0))
    fraction = at - low
    share = 1.0 if weight is None else weight[inside]
    for corner in np.ndindex(2, 2, 2):
        part = np.where(corner, fraction, 1 - fraction).prod(-1) * share
        d, h, w = np.minimum(low + corner, last).T
        # A voxel occurs once among these rows: nothing is added over another.
        votes[inside, labels[d, h, w]] += part.astype(np.float32)
