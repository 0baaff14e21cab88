"""The affine map under which two scans are most alike, by their intensities alone.

Maps are 4x4, from fixed to moving mm. The search begins by grey levels: normalised
mutual information, which asks for no relation between the intensities of two scanners
or modalities. It is the mean of both directions: of points of the fixed scan read in
the moving one, and of points of the moving scan read in the fixed one by the inverse
map. It ends by structure: squared local correlation, which is the more precise one.
Only points count that lie in both scans, and in their masks.

A place is believed if several starts lead to it; what a search finds is judged by both
measures beside the headers.

Every program is compiled once: scans of any size lie in one buffer.

References:
  Studholme et al., An overlap invariant entropy measure of 3D medical image alignment,
  Pattern Recognition 32, 1999; Modat et al., Global image registration using a
  symmetric block-matching approach, J. Med. Imaging 2014 (both directions); Jenkinson
  and Smith, A global optimisation method for robust affine registration of brain
  images, Medical Image Analysis 5, 2001 (many starts at a coarse level).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.registration.prealign import measure
from jaxreg.registration.prealign.measure import Fit, Level, Map, Shown
from jaxreg.space.grid import Grid

_SAME, _ELSEWHERE = 0.08, 0.25
"""How far apart two maps are, see `_apart`, that are one place, or two."""
_STEP_ASIDE = 0.2  # of the smaller scan's extents
_OVERLAP = 0.3  # of the smaller scan: with less, headers are no place to keep
_LEVELS = (16, 32, 48)  # voxels per axis of the smaller scan, were it a cube
_ITERATIONS = 60  # per level
_STIFFNESS, _LOCAL_STIFFNESS = 0.1, 0.5
"""What the square of a logarithmic strain costs, by grey levels and by structure: a
strain of 0.1, as of bodies of different people, asks for a gain of 0.001 and 0.005.
Structure tells about five times as much as grey levels do when scans come to fit."""
_FREE_STRAIN = 0.37  # norm of the logarithmic strain; about 24 % in each direction
MOST_STRETCH = 2.0
"""Largest factor by which a map may stretch or shrink any direction. Organs of adults
and of children differ by less than two in length; what asks for more is a mistake."""
_AS_GOOD = 0.99  # share of what the images tell of each other
_RIVAL = 0.9


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
      matrix: 4x4, fixed to moving mm; of positive determinant, see `plausible`.
      start: the name of the start that led to it.
      fits: of the map and of what it was chosen from, by name; of the first start
        alone where that is kept without a search.
      rivals: names of starts that ended elsewhere and fit nearly as well.
      certain: whether several starts led to the map, and none elsewhere.
    """

    matrix: np.ndarray
    start: str
    fits: Mapping[str, Fit]
    rivals: tuple[str, ...] = ()
    certain: bool = True


def scaled(array: np.ndarray) -> np.ndarray:
    """Returns intensities from the least to the 0.99 quantile of the foreground.

    The foreground is what exceeds the mean. So a head in a large field of view keeps
    its grey levels, of which the quantiles of all voxels would leave one.

    Args:
      array: D H W, any scale.

    Returns:
      D H W, float32, clipped to [0, 1].
    """
    array = array.astype(np.float32)
    low, above = array.min(), array[array > array.mean(dtype=np.float64)]
    high = np.quantile(above, 0.99) if above.size else low
    if not high > low:
        return np.zeros_like(array)
    return ((array - low) / (high - low)).clip(0, 1)


def plausible(matrix: np.ndarray) -> bool:
    """Whether a 4x4 map in mm mirrors nothing and stretches no direction too much."""
    linear = matrix[:3, :3]
    if not np.all(np.isfinite(matrix)) or np.linalg.det(linear) <= 0:
        return False
    stretch = np.linalg.svd(linear, compute_uv=False)
    return bool(stretch[0] < MOST_STRETCH and stretch[-1] > 1 / MOST_STRETCH)


def search(fixed: Shown, moving: Shown, starts: Mapping[str, np.ndarray]) -> Found:
    """Returns the map under which two scans are most alike, or one of the starts.

    Every start, and four places around the first one that overlaps, is moved rigidly
    at the coarsest level, by grey levels. From the best one (the first of those that
    fit nearly as well as it) all twelve numbers are searched: at two levels by grey
    levels, at the last by structure. A rotation, the logarithm of the strain and a
    shift describe the map, which therefore never mirrors. The result is the best of
    the starts, the rigid map and the affine ones by `best_of`; what is not plausible
    is out of it.

    A place to which one start alone leads, or that is one of several which fit nearly
    alike, is an accident of two images that tell little of each other. Then the first
    start is kept, if it overlaps.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      starts: names to plausible 4x4 maps from fixed to moving mm; the first one is
        kept where none is better by both measures.
    """
    levels = [measure.Level.of(fixed, moving, n) for n in _LEVELS]
    first = next(iter(starts))
    overlapping = [
        k for k, start in starts.items() if _overlap(fixed, moving, start) > _OVERLAP
    ]
    around = _aside(levels[0], starts[overlapping[0] if overlapping else first])
    begun = _distinct({**starts, **around}, levels[0])
    moved = {k: _descended(levels[0], matrix, _RIGID) for k, matrix in begun.items()}
    # In one measure: the loss at the end of a descent has points of its start.
    scores = {
        name: levels[0].unlikeness(matrix, measure.FEW)
        for name, matrix in moved.items()
    }
    tells = 1 - min(scores.values())
    best = next(k for k, score in scores.items() if 1 - score >= _AS_GOOD * tells)
    ends, begins = (
        {name: _apart(maps[name], maps[best], levels[0]) for name in begun}
        for maps in (moved, begun)
    )
    rivals = [
        name
        for name, score in scores.items()
        if 1 - score >= _RIVAL * tells and ends[name] > _ELSEWHERE
    ]
    agreeing = [k for k in begun if ends[k] < _SAME and begins[k] > 2 * _SAME]
    certain = bool(agreeing) and not rivals
    if not certain and first in overlapping:
        fits = {first: levels[-1].fit(starts[first])}
        return Found(starts[first], first, fits, tuple(rivals), certain)
    rough = moved[best]
    for level in levels[:-1]:
        rough = _descended(level, rough, _AFFINE, base=begun[best])
    fine = _descended_locally(levels[-1], rough, begun[best])
    candidates = {**starts, "rigid": moved[best], "rough": rough, "fine": fine}
    fits = {k: levels[-1].fit(m) for k, m in candidates.items() if plausible(m)}
    chosen = best_of(fits)
    start = chosen if chosen in starts else best
    return Found(candidates[chosen], start, fits, tuple(rivals), certain)


def best_of(fits: Mapping[str, Fit]) -> str:
    """Returns the name of the map to trust, the first one's if none is better.

    Of those at least as good as the first by both measures, the best locally. The
    search goes by the global measure, so the other one is a judge of its own: across
    modalities, images that tell little of each other can be made to share more grey
    levels by a map that agrees with no structure.
    """
    first = next(iter(fits.values()))
    able = {
        name: fit.locally
        for name, fit in fits.items()
        if fit.globally <= first.globally and fit.locally <= first.locally
    }
    return min(able, key=able.__getitem__)


def judged(fixed: Shown, moving: Shown) -> Level:
    """Returns two scans at the resolution at which maps between them are judged."""
    return Level.of(fixed, moving, _LEVELS[-1])


def compare(level: Level, maps: Mapping[str, Map]) -> dict[str, Fit]:
    """Returns how well maps fit, by the measures by which a search is judged.

    All of them are measured alike: in both directions if all are matrices, and
    otherwise, as functions have no inverse here, from the fixed scan's points alone.

    Args:
      level: both scans, see `judged`.
      maps: names to maps from fixed to moving mm: 4x4 of any determinant but 0, or
        functions of P 3.
    """
    if all(isinstance(found, np.ndarray) for found in maps.values()):
        return {name: level.fit(np.asarray(found)) for name, found in maps.items()}
    return {name: level.fit_of_places(found) for name, found in maps.items()}


def rivals(
    fixed: Grid, maps: Mapping[str, np.ndarray], fits: Mapping[str, Fit], best: str
) -> tuple[str, ...]:
    """Returns names of maps that fit nearly as well as the best but lead elsewhere.

    Args:
      fixed: the grid of the scan that stays, whose middle they lead elsewhere.
      maps: names to 4x4 maps from fixed to moving mm.
      fits: of the maps, see `compare`.
      best: name of the one to trust.
    """
    tells = 1 - fits[best].globally
    middle = measure.middle_of(fixed)[:, 3]

    def away(name: str) -> float:
        apart_mm = np.linalg.norm((maps[name] - maps[best]) @ middle)
        return float(apart_mm / _half_diagonal(fixed))

    return tuple(
        name
        for name, fit in fits.items()
        if 1 - fit.globally > _RIVAL * tells and away(name) > _ELSEWHERE
    )


def no_worse_in_common(
    level: Level,
    one: Callable[[np.ndarray], Any],
    other: Callable[[np.ndarray], Any],
) -> bool:
    """Whether a map fits as well as another one on points that both find partners for.

    Overlap that a map gains or loses says nothing here: scans of neighbouring regions
    are not pulled over each other by it.

    Args:
      level: both scans, see `judged`.
      one: from fixed mm P 3 to moving mm P 3.
      other: the same, such as where a search began.
    """
    places = measure.lattice(level.regions[0], 1.0, measure.MANY)
    here = level.counted(0, places, measure.MANY)
    ends = [
        level.counted(1, np.asarray(found(places)), measure.MANY)
        for found in (one, other)
    ]
    common = here._replace(counts=here.counts * ends[0].counts * ends[1].counts)
    mine, others = (
        measure.finite_or_worst(
            measure.unlikeness_of_places(level.sides, common, end.places, 1.0)
        )
        for end in ends
    )
    return as_good(mine, others)


def mirrored_fits(fixed: Shown, moving: Shown, matrix: np.ndarray) -> bool:
    """Whether the mirror image of the fixed scan fits as well under a map.

    Left and right change places about the plane through the fixed scan's middle; this
    map is moved rigidly, as is the one without a mirror, before both are compared.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      matrix: 4x4, fixed to moving mm.
    """
    level = measure.Level.of(fixed, moving, _LEVELS[0])
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirror[0, 3] = 2 * measure.middle_of(measure.region_of(fixed))[0, 3]
    plain, other = (
        min(
            level.unlikeness(found, measure.FEW)
            for found in (m, _descended(level, m, _RIGID))
        )
        for m in (matrix, matrix @ mirror)
    )
    return 1 - other >= _AS_GOOD * (1 - plain)


def stretched(fixed: Grid, moving: Grid) -> np.ndarray:
    """Returns the 4x4 map in mm of the extents of two grids of like orientation."""
    over = moving.resized(fixed.shape)
    return over.affine_mm @ np.linalg.inv(fixed.affine_mm)


def part_of(fixed: Grid, moving: Grid) -> float:
    """Returns the volume of the fixed grid as a share of the moving one's."""
    return measure.volume_mm3(fixed) / measure.volume_mm3(moving)


def apart(grid: Grid, one: np.ndarray, other: np.ndarray) -> float:
    """Returns how far apart two maps take the corners of a scan, in half diagonals."""
    corners = measure.apply(grid.unit_to_mm, np.array(list(np.ndindex(2, 2, 2)), float))
    shifts = np.linalg.norm(
        measure.apply(one, corners) - measure.apply(other, corners), axis=1
    )
    return float(shifts.max() / _half_diagonal(grid))


def as_good(one: float, other: float) -> bool:
    """Whether `Fit.globally` is as good as another, but for what sampling adds."""
    return 1 - one >= _AS_GOOD * (1 - other)


def _apart(one: np.ndarray, other: np.ndarray, level: "Level") -> float:
    """Root mean square distance of two maps at the smaller scan's corners.

    In half diagonals of that scan.
    """
    region = level.regions[0 if level.fixed_is_smaller else 1]
    if not level.fixed_is_smaller:
        one, other = np.linalg.inv(one), np.linalg.inv(other)
    places = measure.apply(region.unit_to_mm, np.array(list(np.ndindex(2, 2, 2))))
    wrong = measure.apply(one, places) - measure.apply(other, places)
    return float(np.sqrt(np.mean(np.sum(wrong**2, -1))) / _half_diagonal(region))


def _half_diagonal(grid: Grid) -> float:
    return float(np.linalg.norm(grid.unit_to_mm[:3, :3] @ [0.5, 0.5, 0.5]))


def _aside(level: "Level", matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Four maps at the corners of a tetrahedron around one."""
    region = level.regions[0 if level.fixed_is_smaller else 1]
    maps = {}
    for signs in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        shift = np.eye(4)
        shift[:3, 3] = region.unit_to_mm[:3, :3] @ (_STEP_ASIDE * np.array(signs))
        name = "a place beside " + "".join("-+"[sign > 0] for sign in signs)
        maps[name] = shift @ matrix if level.fixed_is_smaller else matrix @ shift
    return maps


def _distinct(maps: Mapping[str, np.ndarray], level: "Level") -> dict[str, np.ndarray]:
    """Maps without those that are nearly an earlier one."""
    kept: dict[str, np.ndarray] = {}
    for name, matrix in maps.items():
        if all(_apart(matrix, other, level) > _SAME / 4 for other in kept.values()):
            kept[name] = matrix
    return kept


def _overlap(fixed: Shown, moving: Shown, matrix: np.ndarray) -> float:
    """The share of the smaller scan that lies in the larger one."""
    sides = [(measure.region_of(fixed), measure.region_of(moving), matrix)]
    sides.append((sides[0][1], sides[0][0], np.linalg.inv(matrix)))
    here, there, step = sides[
        0 if measure.volume_mm3(sides[0][0]) <= measure.volume_mm3(sides[0][1]) else 1
    ]
    places = measure.apply(step, measure.lattice(here, 1.0, measure.FEW))
    index = measure.apply(np.linalg.inv(there.affine_mm), places)
    last = np.asarray(there.shape) - 0.5
    return float(np.mean(np.all((index >= -0.5) & (index <= last), -1)))


_RIGID = np.array([1.0] * 6 + [0.0] * 6, np.float32)
_AFFINE = np.ones(12, np.float32)


def _map(numbers: jax.Array, radius: float | jax.Array, base: jax.Array) -> jax.Array:
    """A base after strain, rotation and shift by 12 numbers in mm at a radius."""
    strained = measure.product(_strain(numbers[6:] / radius), base[:3, :3])
    linear = measure.product(_rotation(numbers[3:6] / radius), strained)
    shift = base[:3, 3] + numbers[:3]
    return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift)


def _strain(numbers: jax.Array) -> jax.Array:
    """The exponential of a symmetric 3x3 matrix of 6 numbers: positive definite.

    A fourth power of a symmetric matrix is, however short its series.
    """
    a, b, c, d, e, f = numbers / 4
    small = jnp.stack([jnp.stack(row) for row in ([a, d, e], [d, b, f], [e, f, c])])
    square = measure.product(small, small)
    root = jnp.eye(3) + small + square / 2 + measure.product(square, small) / 6
    root = measure.product(root, root)
    return measure.product(root, root)


def _rotation(turn: jax.Array) -> jax.Array:
    """Rotation of the quaternion (1, turn / 2): about it, by nearly its length."""
    q = jnp.concatenate([jnp.ones(1), turn / 2])
    a, b, c, d = q / jnp.linalg.norm(q)
    rows = (
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    )
    return jnp.stack([jnp.stack(row) for row in rows])


def _descended(
    level: measure.Level,
    start: np.ndarray,
    free: np.ndarray,
    *,
    base: np.ndarray | None = None,
) -> np.ndarray:
    """Returns a map after gradient descent on mutual information at one level.

    Args:
      level: the pair.
      start: 4x4, fixed to moving mm.
      free: 12, which numbers change: 1 or 0.
      base: the map whose strain is none; the start if None.
    """
    matrix = _descend(
        level.centred(start),
        level.sides,
        level.points(start, measure.FEW),
        level.fixed_is_smaller,
        level.descent(0, start, base, free, _STIFFNESS),
    )
    return level.in_mm(matrix)


def _descended_locally(
    level: measure.Level, start: np.ndarray, base: np.ndarray
) -> np.ndarray:
    """Returns an affine map after gradient descent on local correlation.

    On the smaller scan's grid.

    Args:
      level: the pair.
      start: 4x4, fixed to moving mm.
      base: the map whose strain is none.
    """
    side = 0 if level.fixed_is_smaller else 1
    if side == 1:
        start, base = np.linalg.inv(start), np.linalg.inv(base)
    matrix = _descend_locally(
        level.centred(start, side),
        level.sides[side],
        level.sides[1 - side],
        level.about_middle(side, level.local_places(side)),
        level.descent(side, start, base, _AFFINE, _LOCAL_STIFFNESS),
    )
    found = level.in_mm(matrix, side)
    return found if side == 0 else np.linalg.inv(found)


@jax.jit
def _descend(base, sides, points, fixed_is_smaller, descent):
    windows = [
        measure.histogram_windows(*own) for own in zip(sides, points, strict=True)
    ]
    return _adam(
        lambda matrix: measure.loss(matrix, sides, points, windows, fixed_is_smaller),
        base,
        descent,
    )


@jax.jit
def _descend_locally(base, here, there, places, descent):
    own, counts = measure.read(here, places)
    return _adam(
        lambda matrix: measure.unlike_locally(
            own, counts, there, measure.moved(matrix, places), 1.0
        ),
        base,
        descent,
    )


def _adam(unlike: Callable[[jax.Array], jax.Array], base, descent: measure.Descent):
    """Returns the map of least unlikeness and strain; the rate falls along a cosine."""
    strained, free, radius, rate, stiffness = descent

    def objective(numbers):
        a, b, c, d, e, f = numbers[6:] / radius
        rows = ([a, d, e], [d, b, f], [e, f, c])
        strain = strained + jnp.stack([jnp.stack(row) for row in rows])
        square = jnp.sum(strain**2)
        excess = jax.nn.relu(jnp.sqrt(square + 1e-12) - _FREE_STRAIN)
        return unlike(_map(numbers, radius, base)) + stiffness * square + excess**2

    optimizer = optax.scale_by_adam(b2=0.99)

    def iterate(carry, index):
        numbers, state = carry
        gradient = jax.grad(objective)(numbers) * free
        update: Any
        update, state = optimizer.update(gradient, state)
        left = (1 + jnp.cos(jnp.pi * index / _ITERATIONS)) / 2
        return (numbers - rate * left * update, state), None

    start = jnp.zeros(12)
    (numbers, _), _ = jax.lax.scan(
        iterate, (start, optimizer.init(start)), jnp.arange(_ITERATIONS)
    )
    return _map(numbers, radius, base)
