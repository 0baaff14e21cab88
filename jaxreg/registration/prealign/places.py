"""Where a search for a rigid map may begin: turns, shifts, and the best of them.

Maps are 4x4, from fixed to moving mm. All are looked at once, roughly, and those that
fit best and lie apart are taken.

References:
  Alexa, Super-Fibonacci spirals: fast, low-discrepancy sampling of SO(3), CVPR 2022;
  Jenkinson and Smith, A global optimisation method for robust affine registration of
  brain images, Medical Image Analysis 5, 2001.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreg.registration.prealign import measure
from jaxreg.registration.prealign.measure import Level, Shown
from jaxreg.space.grid import Grid

_TURNS = 240  # rotations about 30 degrees apart
_PSI = 1.533751168755204288118041  # of psi**4 = psi + 4
_STEPS, _REACH = 5, 0.34
"""Shifts per axis, and how far the outer ones reach, of the larger scan's extent."""
_SAME, _NEAR = 0.02, 0.25
"""How far apart two maps are, see `apart`, that begin one search, or need not both."""
_MOMENTS = 24  # voxels per axis from which moments are taken


def beside(level: Level, matrix: np.ndarray, step: float) -> dict[str, np.ndarray]:
    """Returns four maps at the corners of a tetrahedron around one.

    Args:
      level: both scans.
      matrix: 4x4, fixed to moving mm.
      step: how far along each axis, of the smaller scan's extents.
    """
    region = level.regions[0 if level.fixed_is_smaller else 1]
    maps = {}
    for signs in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        shift = region.unit_to_mm[:3, :3] @ (step * np.array(signs))
        name = "a place beside " + "".join("-+"[sign > 0] for sign in signs)
        maps[name] = _shifted(level, matrix, shift)
    return maps


def shifted(level: Level, matrix: np.ndarray) -> list[np.ndarray]:
    """Returns maps on a lattice of shifts around one, for scans that overlap in part.

    Args:
      level: both scans.
      matrix: 4x4, fixed to moving mm.
    """
    side = 0 if level.fixed_is_smaller else 1
    here, there = level.regions[side], level.regions[1 - side]
    directions = here.affine_mm[:3, :3] / here.spacing_mm
    extents = [
        np.abs(directions.T @ (grid.affine_mm[:3, :3] * grid.shape)).sum(-1)
        for grid in (here, there)
    ]
    reach = directions * (_REACH * np.maximum(*extents))
    steps = itertools.product(np.linspace(-1, 1, _STEPS), repeat=3)
    return [_shifted(level, matrix, reach @ np.array(step)) for step in steps]


def turned(fixed: Shown, moving: Shown) -> list[np.ndarray]:
    """Returns rotations of every kind about centres of mass and about middles.

    Those that lay principal axes onto each other, of which four mirror nothing, too.
    """
    (here, own), (there, others) = moments(fixed), moments(moving)
    middles = [
        measure.middle_of(measure.region_of(shown))[:3, 3] for shown in (fixed, moving)
    ]
    axes = []
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        chosen = others * np.array([*signs, 1])
        chosen[:, 2] *= np.linalg.det(chosen) * np.linalg.det(own)
        axes.append(chosen @ own.T)
    maps = [_about(turn, here, there) for turn in (*axes, *rotations(_TURNS))]
    return maps + [_about(turn, *middles) for turn in rotations(_TURNS)]


def best_apart(
    level: Level, maps: Sequence[np.ndarray], scores: np.ndarray, count: int
) -> list[np.ndarray]:
    """Returns so many maps of least score at most, none of them near a better one.

    Args:
      level: both scans.
      maps: 4x4, fixed to moving mm.
      scores: one a map; what has 1 has nothing in common.
      count: how many at most.
    """
    kept: list[np.ndarray] = []
    for index in np.argsort(scores, kind="stable"):
        if len(kept) == count or scores[index] >= 1:
            break
        if all(apart(level, maps[index], other) > _NEAR for other in kept):
            kept.append(maps[index])
    return kept


def distinct(level: Level, maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns maps without those that are nearly an earlier one."""
    kept: dict[str, np.ndarray] = {}
    for name, matrix in maps.items():
        if all(apart(level, matrix, other) > _SAME for other in kept.values()):
            kept[name] = matrix
    return kept


def apart(level: Level, one: np.ndarray, other: np.ndarray) -> float:
    """Returns the root mean square distance of two maps at the smaller scan's corners.

    In half diagonals of that scan.
    """
    side, one = level.from_smaller(one)
    _, other = level.from_smaller(other)
    region = level.regions[side]
    corners = measure.apply(region.unit_to_mm, np.array(list(np.ndindex(2, 2, 2))))
    wrong = measure.apply(one, corners) - measure.apply(other, corners)
    return float(np.sqrt(np.mean(np.sum(wrong**2, -1))) / half_diagonal(region))


def half_diagonal(grid: Grid) -> float:
    """Returns half the distance in mm of a grid's outermost voxels."""
    return float(np.linalg.norm(grid.unit_to_mm[:3, :3] @ [0.5, 0.5, 0.5]))


@functools.cache
def rotations(count: int) -> tuple[np.ndarray, ...]:
    """Returns so many 3x3 rotations, spread evenly over all of them."""
    from scipy.spatial.transform import Rotation  # for searches alone, slow to import

    spiral = np.arange(count) + 0.5
    share = spiral / count
    alpha, beta = 2 * np.pi * spiral / np.sqrt(2), 2 * np.pi * spiral / _PSI
    inner, outer = np.sqrt(share), np.sqrt(1 - share)
    quaternions = np.stack(
        [
            inner * np.sin(alpha),
            inner * np.cos(alpha),
            outer * np.sin(beta),
            outer * np.cos(beta),
        ],
        -1,
    )
    return tuple(Rotation.from_quat(quaternions, scalar_first=True).as_matrix())


def moments(shown: Shown) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centre of mass in mm, (3,), and the principal axes, 3x3 columns.

    Mass is intensity where the scan counts; axes are ordered by their variance.
    """
    steps = tuple(slice(None, None, max(1, n // _MOMENTS)) for n in shown.array.shape)
    mass = shown.array[steps].astype(np.float64)
    if shown.mask is not None:
        mass = mass * shown.mask[steps]
    if not mass.sum() > 0:
        mass = np.ones_like(mass)
    index = np.stack(
        np.meshgrid(
            *(
                np.arange(n)[step]
                for n, step in zip(shown.array.shape, steps, strict=True)
            ),
            indexing="ij",
        ),
        -1,
    )
    places = measure.apply(shown.grid.affine_mm, index.reshape(-1, 3))
    weights = mass.ravel() / mass.sum()
    middle = weights @ places
    away = places - middle
    _, axes = np.linalg.eigh((away * weights[:, None]).T @ away)
    return middle, axes


def _shifted(level: Level, matrix: np.ndarray, shift_mm: np.ndarray) -> np.ndarray:
    """A map with the smaller scan's place in the larger one shifted.

    By mm of the smaller scan's own space.
    """
    shift = np.eye(4)
    shift[:3, 3] = shift_mm
    return matrix @ shift if level.fixed_is_smaller else shift @ matrix


def _about(turn: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The 4x4 that turns about a place and takes it to another one."""
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = there - turn @ here
    return matrix
