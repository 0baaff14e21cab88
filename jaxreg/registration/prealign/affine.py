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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.registration.prealign import descent, measure, places
from jaxreg.registration.prealign.measure import Fit, Level, Map, Shown
from jaxreg.space.grid import Grid

_SAME, _ELSEWHERE = 0.08, 0.25
"""How far apart two maps are, see `places.apart`, that are one place, or two."""
_ASIDE = 0.2  # of the smaller scan's extents
_SHIFTS = 4  # that are descended from
_PLACES, _TURNED_PLACES = 3, 2  # that are looked at more closely
_OVERLAP = 0.3  # of the smaller scan: with less, headers are no place to keep
_LEVELS = (16, 32, 48)  # voxels per axis of the smaller scan, were it a cube
MOST_STRETCH = 2.0
"""Largest factor by which a map may stretch or shrink any direction. Organs of adults
and of children differ by less than two in length; what asks for more is a mistake."""
_AS_GOOD = 0.99  # share of what the images tell of each other
_RIVAL = 0.9
_CLEARER = 1.25
"""By how much a map has to raise squared local correlation to be believed by it."""
_TELLS = 0.15
"""What a map has to tell to be believed that leads elsewhere than the first start:
ultrasound and MR tell each other up to 0.1, and that at any place."""


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
      end: how well the map fits.
    """

    matrix: np.ndarray
    start: str
    fits: Mapping[str, Fit]
    rivals: tuple[str, ...] = ()
    certain: bool = True
    end: Fit | None = None


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


def is_of(matrix: np.ndarray, kind: descent.Kind) -> bool:
    """Whether a 4x4 map in mm is of a kind, or of a narrower one."""
    if kind == "affine":
        return True
    square = matrix[:3, :3].T @ matrix[:3, :3]
    stretch = np.trace(square) / 3 if kind == "similarity" else 1.0
    return bool(np.allclose(square, stretch * np.eye(3), atol=1e-4))


def search(
    fixed: Shown,
    moving: Shown,
    starts: Mapping[str, np.ndarray],
    kind: descent.Kind = "affine",
) -> Found:
    """Returns the map under which two scans are most alike, or one of the starts.

    Every start, places around the first one that overlaps, and the best of many shifts
    and turns is moved rigidly at the coarsest level, by grey levels; where the best of
    these lead to different places, they are moved on at the next level. From the one
    that is best then (the first of those that fit nearly as well) the map asked for is
    searched: by grey levels, and at the last level by structure. The result is the
    best of the starts, the rigid map and these by `best_of`; what is not plausible is
    out of it.

    A turn is taken only if it fits well, and so much better than all that the starts
    lead to that none of these is its rival: how a patient lies is known by headers more
    often than images of symmetric anatomy tell.
    A place to which one start alone leads, or that is one of several which fit nearly
    alike, or to which the first start does not lead and that tells hardly anything, is
    an accident of two images that tell little of each other. Then the first start is
    kept, if it overlaps, but where local structure says more, see
    `_told_by_structure`.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      starts: names to plausible 4x4 maps from fixed to moving mm; the first one is
        kept where none is better by both measures.
      kind: of the map, beside the start from which it is searched.
    """
    coarse, middle, fine = (measure.Level.of(fixed, moving, n) for n in _LEVELS)
    first = next(iter(starts))
    overlapping = [
        k for k, start in starts.items() if _overlap(fixed, moving, start) > _OVERLAP
    ]
    begun, turns = _begun(coarse, fixed, moving, starts, overlapping)
    ended = _Ended.of(coarse, middle, begun, turns)
    best, rivals, certain = ended.chosen()
    doubted = not certain and first in overlapping
    if doubted and rivals:
        kept = fine.fit(starts[first])
        return Found(starts[first], first, {first: kept}, rivals, False, kept)
    rigid = ended.maps[best]
    base = begun[best]
    rough = rigid
    for level in (coarse, middle):
        rough = descent.descended(level, rough, kind, base=base)
    last = descent.descended_locally(fine, rough, base, kind)
    candidates = {**starts, "rigid": rigid, "rough": rough, "fine": last}
    fits = {k: fine.fit(m) for k, m in candidates.items() if plausible(m)}
    chosen = best_of(fits)
    matrix, end, kept = candidates[chosen], fits[chosen], fits[first]
    if doubted and not _told_by_structure(fine, matrix, end, kept):
        return Found(starts[first], first, {first: kept}, rivals, False, kept)
    start = chosen if chosen in starts else best
    return Found(matrix, start, fits, rivals, certain or doubted, end)


def _told_by_structure(level: Level, matrix: np.ndarray, end: Fit, kept: Fit) -> bool:
    """Whether a map is sure although grey levels tell little: by local structure.

    Where scans of one contrast lie on each other, nearly all that is bright in one is
    bright in the other. No wrong place of ultrasound on MR has come near that and
    raised local correlation so much.

    Args:
      level: both scans, see `judged`.
      matrix: 4x4, fixed to moving mm.
      end: how well it fits.
      kept: how well the map fits that would be kept.
    """
    clearer = 1 - end.locally > _CLEARER * (1 - kept.locally)
    return clearer and level.agreement(matrix) > measure.ALIKE


def _begun(
    level: Level,
    fixed: Shown,
    moving: Shown,
    starts: Mapping[str, np.ndarray],
    overlapping: Sequence[str],
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Where descents begin, by name, and the names of those that were turned."""
    around = starts[overlapping[0] if overlapping else next(iter(starts))]
    begun = places.distinct(level, {**starts, **places.beside(level, around, _ASIDE)})
    bases = places.distinct(level, dict(list(starts.items())[:2]))
    shifts = [m for base in bases.values() for m in places.shifted(level, base)]
    turns = places.turned(fixed, moving)
    scores = level.first_look([*shifts, *turns])
    left = descent.MOST - _SHIFTS - len(begun)
    found = places.best_apart(level, shifts, scores[: len(shifts)], _SHIFTS)
    begun |= {f"a shift ({i + 1})": matrix for i, matrix in enumerate(found)}
    found = places.best_apart(level, turns, scores[len(shifts) :], left)
    added = {f"a turn ({i + 1})": matrix for i, matrix in enumerate(found)}
    return begun | added, set(added)


@dataclasses.dataclass(frozen=True)
class _Ended:
    """Where descents ended.

    Attributes:
      level: the coarsest one.
      begun, ends: names to maps, before and after the descents at this level.
      turns: names of those that began with a turn.
      maps: of those that fit best and end apart, after the next level.
      scores: of these, `Fit.globally` at the next level.
    """

    level: Level
    begun: Mapping[str, np.ndarray]
    ends: Mapping[str, np.ndarray]
    turns: Collection[str]
    maps: Mapping[str, np.ndarray]
    scores: Mapping[str, float]

    @classmethod
    def of(
        cls,
        coarse: Level,
        middle: Level,
        begun: Mapping[str, np.ndarray],
        turns: Collection[str],
    ) -> "_Ended":
        """Descends from all starts, and on from the best of them that end apart."""
        ends = descent.all_descended(coarse, begun)
        # In one measure: the loss at the end of a descent has points of its start.
        rough = {k: coarse.unlikeness(m, measure.FEW) for k, m in ends.items()}
        apart: list[str] = []
        for turned, most in ((False, _PLACES), (True, _TURNED_PLACES)):
            names = [k for k in begun if (k in turns) == turned]
            most += len(apart)
            for name in sorted(names, key=rough.__getitem__):
                away = (places.apart(coarse, ends[name], ends[k]) for k in apart)
                if len(apart) < most and all(a > _SAME for a in away):
                    apart.append(name)
        maps = {k: descent.descended(middle, ends[k], "rigid") for k in apart}
        scores = {k: middle.unlikeness(m, measure.FEW) for k, m in maps.items()}
        return cls(coarse, begun, ends, turns, maps, scores)

    def chosen(self) -> tuple[str, tuple[str, ...], bool]:
        """Returns the best name, those of its rivals, and whether it is certain."""
        plain = {k: v for k, v in self.scores.items() if k not in self.turns}
        tells = 1 - min(plain.values())
        able = [k for k, v in plain.items() if 1 - v >= _AS_GOOD * tells]
        best = min(able, key=list(self.begun).index)
        turned = min(self.scores, key=self.scores.__getitem__)
        told = 1 - self.scores[turned]
        if turned in self.turns and told > max(_TELLS, tells / _RIVAL):
            if self._agreed(turned) and not self._rivals(turned, self.scores):
                return turned, (), True
        rivals = self._rivals(best, plain)
        first = self.ends[next(iter(self.begun))]
        there = places.apart(self.level, self.maps[best], first) < _SAME
        certain = (there or tells > _TELLS) and self._agreed(best) and not rivals
        return best, rivals, certain

    def _rivals(self, best: str, names: Collection[str]) -> tuple[str, ...]:
        """Those of the names that ended elsewhere and fit nearly as well."""
        tells = 1 - self.scores[best]
        return tuple(
            name
            for name in names
            if 1 - self.scores[name] >= _RIVAL * tells
            and places.apart(self.level, self.maps[name], self.maps[best]) > _ELSEWHERE
        )

    def _agreed(self, best: str) -> bool:
        """Whether one that began elsewhere ended in the same place."""
        return any(
            min(
                places.apart(self.level, end, self.ends[best]),
                places.apart(self.level, end, self.maps[best]),
            )
            < _SAME
            and places.apart(self.level, self.begun[name], self.begun[best]) > 2 * _SAME
            for name, end in self.ends.items()
        )


def best_of(fits: Mapping[str, Fit]) -> str:
    """Returns the name of the map to trust, the first one's if none is better.

    Of those at least as good as the first by both measures, the best locally, unless
    the first is as good by both but for what sampling adds. The search goes by the
    global measure, so the other one is a judge of its own: across modalities, images
    that tell little of each other can be made to share more grey levels by a map that
    agrees with no structure.
    """
    name_of_first, first = next(iter(fits.items()))
    able = {
        name: fit.locally
        for name, fit in fits.items()
        if fit.globally <= first.globally and fit.locally <= first.locally
    }
    best = min(able, key=able.__getitem__)
    same = as_good(first.locally, fits[best].locally) and as_good(
        first.globally, fits[best].globally
    )
    return name_of_first if same else best


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
        return float(apart_mm / places.half_diagonal(fixed))

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
    points = measure.lattice(level.regions[0], 1.0, measure.MANY)
    here = level.counted(0, points, measure.MANY)
    ends = [
        level.counted(1, np.asarray(found(points)), measure.MANY)
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
            for found in (m, descent.descended(level, m, "rigid"))
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
    return float(shifts.max() / places.half_diagonal(grid))


def as_good(one: float, other: float) -> bool:
    """Whether one number of a `Fit` is as good as another, but for sampling."""
    return 1 - one >= _AS_GOOD * (1 - other)


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
