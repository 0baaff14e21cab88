"""A registration on the fixed scan's grid: what pictures and numbers are made of."""

import dataclasses

import numpy as np

from jaxreg import metrics
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space import grid as grid_lib
from jaxreg.space import transform as transform_lib
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume

_CHECKED = 64  # voxels along an axis that are asked for their partner
_ENOUGH = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMaps:
    """Label maps on the fixed grid, D H W of integers each.

    Attributes:
      fixed: of the fixed scan.
      before: the moving scan's where the headers place it.
      after: the moving scan's through the transform.
    """

    fixed: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Registered:
    """Two registered scans on the fixed scan's grid.

    Attributes:
      fixed: the scan that stays.
      before: the moving scan where the headers place it.
      after: the moving scan through the transform.
      moving_grid: of the moving scan as it is stored.
      displacement_mm: T(x) - x, D H W 3, RAS+.
      determinant: of the map's Jacobian in mm, D H W.
      beyond_percent: see `transform.beyond_percent`.
      labels: None if not both scans have label maps.
    """

    fixed: Volume
    before: Volume
    after: Volume
    moving_grid: Grid
    displacement_mm: np.ndarray
    determinant: np.ndarray
    beyond_percent: float
    labels: LabelMaps | None = None


def on_fixed_grid(scans: ScanPair, transform: transform_lib.Transform) -> Registered:
    """Returns both scans, their labels and the map on the fixed scan's grid.

    Args:
      scans: that were registered.
      transform: fixed mm to moving mm.
    """
    fixed, grid = scans.fixed, scans.fixed.grid
    ways = transform_lib.Transform(()), transform
    before, after = (
        warping.warp_volume(scans.moving, way, grid, fill=scans.background)
        for way in ways
    )
    labels = None
    own, others = scans.regions.fixed_segmentation, scans.regions.moving_segmentation
    if own is not None and others is not None:
        warped = (
            warping.warp_volume(others, way, grid, order=0, fill=0.0) for way in ways
        )
        arrays = (own.array, *(volume.array for volume in warped))
        labels = LabelMaps(*(np.rint(array).astype(np.int32) for array in arrays))
    return Registered(
        fixed,
        before,
        after,
        scans.moving.grid,
        warping.displacement_mm(transform, grid),
        warping.jacobian_map(transform, grid),
        transform_lib.beyond_percent(transform, grid),
        labels,
    )


@dataclasses.dataclass(frozen=True)
class Measures:
    """Numbers of a map on the fixed grid.

    Attributes:
      folded_percent: voxels with a negative determinant, 0 to 100.
      sdlogj: see `metrics.sdlogj`.
      volume_change: 1 %, 50 % and 99 % quantile of the determinant.
      displacement_mm: mean, 95 % quantile and maximum of its length.
      without_partner_percent: share of the fixed scan's foreground (what is brighter
        than its mean) that the map leads out of the moving scan, 0 to 100.
      beyond_percent: see `transform.beyond_percent`.
      blank: whether the warped scan shows nothing.
      dice: mean over labels before and after, [0, 1]; None without labels.
      dice_by_label: the same by label.
    """

    folded_percent: float
    sdlogj: float
    volume_change: tuple[float, float, float]
    displacement_mm: tuple[float, float, float]
    without_partner_percent: float
    beyond_percent: float
    blank: bool
    dice: tuple[float, float] | None
    dice_by_label: dict[int, tuple[float, float]]


def measure(found: Registered) -> Measures:
    """Returns the numbers of a registration."""
    length = np.linalg.norm(found.displacement_mm, axis=-1)
    dice, by_label = None, {}
    if found.labels is not None:
        scores = [
            metrics.dice(warped, found.labels.fixed)
            for warped in (found.labels.before, found.labels.after)
        ]
        dice = metrics.mean_score(scores[0]), metrics.mean_score(scores[1])
        nothing = float("nan")
        by_label = {
            label: (scores[0].get(label, nothing), scores[1].get(label, nothing))
            for label in sorted({*scores[0], *scores[1]})
        }
    after = np.asarray(found.after.array)
    low, middle, high = np.quantile(
        _some(found.determinant), [0.01, 0.5, 0.99]
    ).tolist()
    return Measures(
        folded_percent=metrics.folding_percent(found.determinant),
        sdlogj=metrics.sdlogj(found.determinant),
        volume_change=(low, middle, high),
        displacement_mm=(
            float(length.mean(dtype=np.float64)),
            float(np.quantile(_some(length), 0.95)),
            float(length.max()),
        ),
        without_partner_percent=_without_partner(found),
        beyond_percent=found.beyond_percent,
        blank=bool((after == after.flat[0]).all()),
        dice=dice,
        dice_by_label=by_label,
    )


def _some(values: np.ndarray) -> np.ndarray:
    """Returns enough of the values for their quantiles, evenly."""
    return values.ravel()[:: max(1, values.size // _ENOUGH)]


def _without_partner(found: Registered) -> float:
    """Returns the foreground's share that the map leads out of the moving scan.

    Of a large grid up to 64 voxels along each axis are asked, evenly.
    """
    grid = found.fixed.grid
    axes = [
        np.unique(np.rint(np.linspace(0, n - 1, min(n, _CHECKED))).astype(int))
        for n in grid.shape
    ]
    chosen = np.ix_(*axes)
    values = np.asarray(found.fixed.array)[chosen]
    bright = values > values.mean(dtype=np.float64)
    if not bright.any():
        return 0.0
    index = np.stack(np.meshgrid(*axes, indexing="ij"), -1)[bright].astype(np.float64)
    place = index @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    place = place + found.displacement_mm[chosen][bright]
    enter = np.linalg.inv(found.moving_grid.affine_mm)
    there = place @ enter[:3, :3].T + enter[:3, 3]
    last = np.asarray(found.moving_grid.shape) - 0.5 + grid_lib.ROUNDING_VOXELS
    inside = (there >= -0.5 - grid_lib.ROUNDING_VOXELS) & (there <= last)
    return float(100 * (~inside.all(-1)).mean())
