"""The mean of a list of scans, without bias to any: image and place.

Each round registers all scans onto the present mean, warps them, and averages them
where the mean of their transforms leads: so the transforms of the next mean to the
scans are the identity on average, whichever scan came first.

References:
  Guimond, Meunier and Thirion, Average brain models: a convergence study, CVIU 2000;
  Joshi et al., Unbiased diffeomorphic atlas construction for computational anatomy,
  NeuroImage 2004; Avants et al., The optimal template effect in hippocampus studies of
  diseased populations, NeuroImage 2010.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxreg.data import modality as modality_lib
from jaxreg.data import preprocess
from jaxreg.data.preprocess import IntensityRule
from jaxreg.registration import inverse
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Displacement, Transform


@dataclasses.dataclass(frozen=True)
class Centre:
    """Where the mean of several maps from one grid leads.

    Attributes:
      back: mm around the new mean to mm around the present one: the mean map undone.
      grid: the present grid, moved by the mean shift.
      shift_mm: length of the mean shift.
      bend_mm: root mean square of what the mean map adds to it.
    """

    back: Transform
    grid: Grid
    shift_mm: float
    bend_mm: float


def centre_of(maps: Iterable[Transform], grid: Grid) -> Centre:
    """Returns the mean of maps of a grid, and its inverse.

    The mean is that of the displacements at the grid's voxels. Its shift is exact, so
    that scans may lie far apart; the rest is inverted numerically.

    Args:
      maps: the present mean's mm to each scan's mm; one or more.
      grid: of the present mean.
    """
    total, count = np.zeros((*grid.shape, 3)), 0
    for one in maps:
        total += warping.displacement_mm(one, grid)
        count += 1
    total /= count
    shift = total.mean((0, 1, 2))
    bend = total - shift
    to_unit = np.linalg.inv(grid.unit_to_mm)
    field = (bend @ to_unit[:3, :3].T).astype(np.float32)[None]
    around = Transform(
        (
            Affine(to_unit),
            Displacement(field, outside="half_voxel"),
            Affine(grid.unit_to_mm),
        )
    )
    undone, moved = np.eye(4), np.eye(4)
    undone[:3, 3], moved[:3, 3] = -shift, shift
    return Centre(
        Transform((Affine(undone), *inverse.inverted(around).steps)),
        Grid(grid.shape, moved @ grid.affine_mm),
        float(np.linalg.norm(shift)),
        float(np.sqrt((bend**2).sum(-1).mean())),
    )


def scaled(scan: Volume, rule: IntensityRule) -> Volume:
    """Returns a scan as it is averaged: CT as it is, else scaled to [0, 1]."""
    array = scan.array
    if rule.modality != "ct":
        array = preprocess.normalise(array, rule, source=scan.source)
    return dataclasses.replace(scan, array=np.asarray(array, np.float32))


def mean_of(
    scans: Sequence[Callable[[], Volume]],
    maps: Sequence[Callable[[], Transform]],
    grid: Grid,
    modality: str,
) -> Volume:
    """Returns the mean image of scans on a grid, float32.

    At each voxel of the scans that reach it; where none does, what lies around the
    first scan.

    Args:
      scans: read each scan, one at a time, scaled.
      maps: read the transform of each, the grid's mm to the scan's mm.
      grid: of the mean.
      modality: of the scans.
    """
    total, count = np.zeros(grid.shape), np.zeros(grid.shape, np.int32)
    fill = 0.0
    for number, (read, lead) in enumerate(zip(scans, maps, strict=True)):
        scan = read()
        if number == 0:
            fill = modality_lib.background_of(modality, scan).fill
        warped = warping.warp_volume(scan, lead(), grid, fill=np.nan).array
        there = np.isfinite(warped)
        total[there] += warped[there]
        count += there
    mean = np.where(count > 0, total / np.maximum(count, 1), fill)
    return Volume(mean.astype(np.float32), grid, "the mean")
