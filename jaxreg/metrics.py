"""Metrics of a registration: overlap, distances, folding; one definition each.

On the host, in NumPy. Label maps are D H W arrays of integers on one grid; distances
are in mm; points are world coordinates in mm. `cell_determinant` turns a map in unit
coordinates into the determinants that the folding measures count; a determinant map in
mm (`space.warping.jacobian_map`) serves them as well.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from scipy import ndimage

from jaxreg.space import fields, warping
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid

SDLOGJ_FLOOR = 1e-9
SDLOGJ_LEAST = 1e-6


def _check_same_shape(warped: np.ndarray, fixed: np.ndarray) -> None:
    if warped.shape != fixed.shape:
        raise ValueError(
            f"warped labels have shape {warped.shape}, fixed labels {fixed.shape}; "
            "bring both to one grid first"
        )


def _labels(warped, fixed, labels: Sequence[int] | None) -> list[int]:
    if labels is not None:
        return [int(label) for label in labels]
    found = np.union1d(np.unique(warped), np.unique(fixed))
    return [int(label) for label in found if label > 0]


def dice(
    warped: np.ndarray, fixed: np.ndarray, *, labels: Sequence[int] | None = None
) -> dict[int, float]:
    """Returns the Dice overlap per label, in [0, 1].

    ``2 |A and B| / (|A| + |B|)``: 0 where one map lacks the label, NaN where both do.

    Args:
      warped: integer labels, any shape.
      fixed: the same shape.
      labels: which to report; all positive labels of either map if None.

    Raises:
      ValueError: the shapes differ.
    """
    warped, fixed = np.asarray(warped), np.asarray(fixed)
    _check_same_shape(warped, fixed)
    scores = {}
    for label in _labels(warped, fixed, labels):
        a, b = warped == label, fixed == label
        total = int(a.sum()) + int(b.sum())
        scores[label] = 2.0 * int((a & b).sum()) / total if total else float("nan")
    return scores


def mean_score(scores: Mapping[int, float]) -> float:
    """Returns the mean over labels with a score; NaN if there is none."""
    values = [value for value in scores.values() if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def cell_determinant(
    points: np.ndarray, *, differences: fields.Differences = "backward"
) -> np.ndarray:
    """Returns the Jacobian determinant per grid cell of a map; 1 for the identity.

    As the original: in 3-D backward differences at ``[1:, 1:, 1:]``, in 2-D forward
    differences at ``[:-1, :-1]``.

    Args:
      points: N D H W 3 or N H W 2, unit coordinates of the mapped voxels.
      differences: in 3-D, see `fields.jacobian_determinant`.

    Returns:
      N D-1 H-1 W-1 or N H-1 W-1.

    Raises:
      ValueError: the last axis is not the number of spatial axes.

    References:
      icon_registration 1.1.9, losses.py: flips.
    """
    points = np.asarray(points, np.float32)
    dimension = points.ndim - 2
    if dimension not in (2, 3) or points.shape[-1] != dimension:
        raise ValueError(
            f"points have shape {points.shape}, expected N D H W 3 or N H W 2"
        )
    if dimension == 3:
        return np.asarray(_determinant(points, differences=differences))
    n_h, n_w = points.shape[1:3]
    here = points[:, :-1, :-1]
    a = (points[:, 1:, :-1] - here) * max(n_h - 1, 1)
    b = (points[:, :-1, 1:] - here) * max(n_w - 1, 1)
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


_determinant = jax.jit(fields.jacobian_determinant, static_argnames="differences")


def folding_percent(determinant: np.ndarray) -> float:
    """Returns the share of negative determinants in per cent, 0 to 100.

    Args:
      determinant: any shape, see `cell_determinant`.
    """
    determinant = np.asarray(determinant)
    return float(100.0 * np.mean(determinant < 0)) if determinant.size else 0.0


def sdlogj(
    determinant: np.ndarray, *, mode: Literal["clip", "exclude", "l2r"] = "clip"
) -> float:
    """Returns the standard deviation of log |J|; 0 for affine maps.

    Args:
      determinant: any shape, see `cell_determinant`.
      mode: "clip": determinants below 1e-9, folded ones among them, count as 1e-9, and
        the deviation is the population's. "exclude": those up to 1e-6 do not count,
        and it is the sample's, as in UniReg's release. "l2r": 3 is added before the
        clipping, as in the Learn2Reg script, whose field has another convention.

    References:
      Leow et al., Statistical properties of Jacobian maps, IEEE TMI 2007; Hering et
      al., Learn2Reg, IEEE TMI 2022.
    """
    values = np.asarray(determinant, np.float64)
    if mode == "exclude":
        kept = values[values > SDLOGJ_LEAST]
        return float(np.std(np.log(kept), ddof=1)) if kept.size > 1 else float("nan")
    values = values + 3.0 if mode == "l2r" else values
    values = np.clip(values, SDLOGJ_FLOOR, 1.0 / SDLOGJ_FLOOR)
    return float(np.std(np.log(values))) if values.size else 0.0


def regularity(transform: transform_lib.Transform, grid: Grid) -> tuple[float, float]:
    """Returns the folded voxels in per cent, and SDlogJ, of a map between scans.

    The one measure of `register` and `evaluate`, of the determinants that `jacobian`
    writes: of the map in mm, at a grid's voxels.

    Args:
      transform: fixed mm to moving mm.
      grid: of the fixed scan, see `ResamplingRule.measured`.
    """
    determinant = warping.jacobian_map(transform, grid)
    return folding_percent(determinant), sdlogj(determinant)


def tre_mm(mapped_mm: np.ndarray, target_mm: np.ndarray) -> np.ndarray:
    """Returns the target registration error of each landmark, shape (P,), mm.

    Args:
      mapped_mm: P 3, the fixed scan's landmarks mapped by the transform.
      target_mm: P 3, the moving scan's landmarks, in the same order.

    Raises:
      ValueError: the shapes differ or are not P 3.
    """
    mapped, target = np.asarray(mapped_mm), np.asarray(target_mm)
    if mapped.shape != target.shape or mapped.ndim != 2 or mapped.shape[1] != 3:
        raise ValueError(
            f"mapped points have shape {mapped.shape}, targets {target.shape}; both "
            "must be P 3, in the same order"
        )
    return np.linalg.norm(mapped.astype(np.float64) - target, axis=1)


def _directed_mm(
    surface: np.ndarray, other: np.ndarray, spacing_mm: np.ndarray
) -> np.ndarray:
    """Distance of every voxel of one surface to the nearest of the other, mm."""
    to_other = ndimage.distance_transform_edt(~other, sampling=spacing_mm)
    return np.asarray(to_other)[surface]


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with a face neighbour outside it; the grid's edge is outside."""
    return mask & np.logical_not(ndimage.binary_erosion(mask))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    corners = [
        np.flatnonzero(mask.any(axis=tuple(set(range(mask.ndim)) - {axis})))
        for axis in range(mask.ndim)
    ]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) for at in corners)


def hd95_mm(
    warped: np.ndarray,
    fixed: np.ndarray,
    *,
    spacing_mm: Sequence[float] | np.ndarray,
    labels: Sequence[int] | None = None,
    percentile: float = 95.0,
) -> dict[int, float]:
    """Returns the 95th percentile Hausdorff distance per label, mm.

    The larger of the two directed percentiles, each over the distances (between voxel
    centres) of one label's surface voxels to the other's. NaN where a map lacks the
    label.

    Args:
      warped: integer labels, D H W.
      fixed: the same shape.
      spacing_mm: voxel spacing along the array's axes, (3,), see `Grid.spacing_mm`.
      labels: which to report; all positive labels of either map if None.
      percentile: 100 gives the Hausdorff distance.

    Raises:
      ValueError: the shapes differ.

    References:
      Huttenlocher et al., Comparing images using the Hausdorff distance, PAMI 1993.
    """
    warped, fixed = np.asarray(warped), np.asarray(fixed)
    _check_same_shape(warped, fixed)
    spacing = np.asarray(spacing_mm, np.float64)
    distances = {}
    for label in _labels(warped, fixed, labels):
        a, b = warped == label, fixed == label
        if not (a.any() and b.any()):
            distances[label] = float("nan")
            continue
        # Nothing outside the common box matters, and the transform is the costly part.
        box = _bounding_box(a | b)
        a, b = _surface(a[box]), _surface(b[box])
        distances[label] = max(
            float(np.percentile(_directed_mm(a, b, spacing), percentile)),
            float(np.percentile(_directed_mm(b, a, spacing), percentile)),
        )
    return distances
