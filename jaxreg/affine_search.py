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
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.data import resize
from jaxreg.losses import similarity
from jaxreg.space import sampling
from jaxreg.space.grid import Grid

_BUFFER = 96**3  # voxels
_MOST_OF = 0.7  # of an axis's voxels: it keeps them all rather than so many
_SAME, _ELSEWHERE = 0.08, 0.25
"""How far apart two maps are, see `_apart`, that are one place, or two."""
_STEP_ASIDE = 0.2  # of the smaller scan's extents
_OVERLAP = 0.3  # of the smaller scan: with less, headers are no place to keep
_FEW, _MANY = 2**12, 2**15
"""Points of a descent by grey levels, and of a judgement: what points that were drawn
say is sure to one over the root of their number."""
_BINS = 24
_LOCAL = (48, 48, 48)  # voxels of the grid on which a map is judged
_LOCAL_SIGMA = 2  # of its voxels
_LEVELS = (16, 32, 48)  # voxels per axis of the smaller scan, were it a cube
_ITERATIONS = 60  # per level
_AROUND = 0.9
"""Where points of the larger scan lie, as a share of the smaller one's extent: so that
no map fits better for pushing points with air out of the overlap."""
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
class Shown:
    """A scan as it is compared.

    Attributes:
      array: D H W, float32 in [0, 1].
      grid: its place in RAS+ mm.
      mask: D H W, where it counts; None for everywhere.
    """

    array: np.ndarray
    grid: Grid
    mask: np.ndarray | None = None


Map = np.ndarray | Callable[[np.ndarray], np.ndarray]
"""Fixed to moving mm: 4x4, or a function of P 3."""


class Fit(NamedTuple):
    """How unlike two scans are under a map, by two measures from 0 to 1; 1 if apart.

    Each is 1 - o S, where o is the share of the smaller scan that lies in the larger
    one: nothing is won by losing overlap, however little images tell of each other.

    Attributes:
      globally: S is by how much the ratio of entropies exceeds 1, in both directions.
      locally: S is the mean squared local correlation, on a grid over the smaller scan.
    """

    globally: float
    locally: float


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search gives.

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
    levels = [_Level.of(fixed, moving, n) for n in _LEVELS]
    first = next(iter(starts))
    overlapping = [
        k for k, start in starts.items() if _overlap(fixed, moving, start) > _OVERLAP
    ]
    around = _aside(levels[0], starts[overlapping[0] if overlapping else first])
    begun = _distinct({**starts, **around}, levels[0])
    moved = {k: _descended(levels[0], matrix, _RIGID) for k, matrix in begun.items()}
    # In one measure: the loss at the end of a descent has points of its start.
    scores = {
        name: levels[0].unlikeness(matrix, _FEW) for name, matrix in moved.items()
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
    return Found(
        candidates[chosen],
        chosen if chosen in starts else best,
        fits,
        tuple(rivals),
        certain,
    )


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


def compare(fixed: Shown, moving: Shown, maps: Mapping[str, Map]) -> dict[str, Fit]:
    """Returns how well maps fit, by the measures by which a search is judged.

    All of them are measured alike: in both directions if all are matrices, and
    otherwise, as functions have no inverse here, from the fixed scan's points alone.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      maps: names to maps from fixed to moving mm: 4x4 of any determinant but 0, or
        functions of P 3.
    """
    level = _Level.of(fixed, moving, _LEVELS[-1])
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
    middle = _middle(fixed)[:, 3]

    def away(name: str) -> float:
        apart_mm = np.linalg.norm((maps[name] - maps[best]) @ middle)
        return float(apart_mm / _half_diagonal(fixed))

    return tuple(
        name
        for name, fit in fits.items()
        if 1 - fit.globally > _RIVAL * tells and away(name) > _ELSEWHERE
    )


def agreement(fixed: Shown, moving: Shown, matrix: np.ndarray) -> float:
    """Returns in how far what is bright in one scan is bright in the other, -1 to 1.

    The mean of local correlation times its size, as a share of the mean square, on the
    grid of `Fit.locally`: 1 where all structures correlate positively, -1 where all do
    negatively; 0 where nothing is there to compare.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      matrix: 4x4, fixed to moving mm.
    """
    return _Level.of(fixed, moving, _LEVELS[-1]).agreement(matrix)


def no_worse_in_common(
    fixed: Shown,
    moving: Shown,
    one: Callable[[np.ndarray], Any],
    other: Callable[[np.ndarray], Any],
) -> bool:
    """Whether a map fits as well as another one on points that both find partners for.

    Overlap that a map gains or loses says nothing here: scans of neighbouring regions
    are not pulled over each other by it.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      one: from fixed mm P 3 to moving mm P 3.
      other: the same, such as where a search began.
    """
    level = _Level.of(fixed, moving, _LEVELS[-1])
    places = _lattice(level.regions[0], 1.0, _MANY)
    here = level.counted(0, places, _MANY)
    ends = [
        level.counted(1, np.asarray(found(places)), _MANY) for found in (one, other)
    ]
    common = here._replace(counts=here.counts * ends[0].counts * ends[1].counts)
    mine, others = (
        _number(_unlikeness_of_places(level.sides, common, end.places, 1.0))
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
    level = _Level.of(fixed, moving, _LEVELS[0])
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirror[0, 3] = 2 * _middle(_region(fixed))[0, 3]
    plain, other = (
        min(
            level.unlikeness(found, _FEW) for found in (m, _descended(level, m, _RIGID))
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
    return _volume(fixed) / _volume(moving)


def apart(grid: Grid, one: np.ndarray, other: np.ndarray) -> float:
    """Returns how far apart two maps take the corners of a scan, in half diagonals."""
    corners = _apply(grid.unit_to_mm, np.array(list(np.ndindex(2, 2, 2)), float))
    ways = np.linalg.norm(_apply(one, corners) - _apply(other, corners), axis=1)
    return float(ways.max() / _half_diagonal(grid))


def as_good(one: float, other: float) -> bool:
    """Whether `Fit.globally` is as good as another, but for what sampling adds."""
    return 1 - one >= _AS_GOOD * (1 - other)


def _apart(one: np.ndarray, other: np.ndarray, level: "_Level") -> float:
    """Root mean square distance of two maps at the smaller scan's corners.

    In half diagonals of that scan.
    """
    region = level.regions[0 if level.fixed_is_smaller else 1]
    if not level.fixed_is_smaller:
        one, other = np.linalg.inv(one), np.linalg.inv(other)
    places = _apply(region.unit_to_mm, np.array(list(np.ndindex(2, 2, 2))))
    wrong = _apply(one, places) - _apply(other, places)
    return float(np.sqrt(np.mean(np.sum(wrong**2, -1))) / _half_diagonal(region))


def _half_diagonal(grid: Grid) -> float:
    return float(np.linalg.norm(grid.unit_to_mm[:3, :3] @ [0.5, 0.5, 0.5]))


def _aside(level: "_Level", matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Four maps at the corners of a tetrahedron around one."""
    region = level.regions[0 if level.fixed_is_smaller else 1]
    maps = {}
    for signs in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        shift = np.eye(4)
        shift[:3, 3] = region.unit_to_mm[:3, :3] @ (_STEP_ASIDE * np.array(signs))
        name = "a place beside " + "".join("-+"[sign > 0] for sign in signs)
        maps[name] = shift @ matrix if level.fixed_is_smaller else matrix @ shift
    return maps


def _distinct(maps: Mapping[str, np.ndarray], level: "_Level") -> dict[str, np.ndarray]:
    """Maps without those that are nearly an earlier one."""
    kept: dict[str, np.ndarray] = {}
    for name, matrix in maps.items():
        if all(_apart(matrix, other, level) > _SAME / 4 for other in kept.values()):
            kept[name] = matrix
    return kept


def _overlap(fixed: Shown, moving: Shown, matrix: np.ndarray) -> float:
    """The share of the smaller scan that lies in the larger one."""
    sides = [(_region(fixed), _region(moving), matrix)]
    sides.append((sides[0][1], sides[0][0], np.linalg.inv(matrix)))
    here, there, step = sides[0 if _volume(sides[0][0]) <= _volume(sides[0][1]) else 1]
    places = _apply(step, _lattice(here, 1.0, _FEW))
    index = _apply(np.linalg.inv(there.affine_mm), places)
    last = np.asarray(there.shape) - 0.5
    return float(np.mean(np.all((index >= -0.5) & (index <= last), -1)))


# --- a pair at one resolution ---------------------------------------------------------


class _Side(NamedTuple):
    values: jax.Array  # buffer 2: intensity and mask
    shape: jax.Array  # 3
    enter: jax.Array  # 4x4, mm about the middle to voxels


class _Points(NamedTuple):
    places: jax.Array  # P 3, mm about the middle
    counts: jax.Array  # P, 1 within scan and mask, else 0


@dataclasses.dataclass(frozen=True)
class _Level:
    spacing_mm: float
    fixed: _Side
    moving: _Side
    regions: tuple[Grid, Grid]  # of fixed and moving
    grids: tuple[Grid, Grid]
    masks: tuple[np.ndarray | None, np.ndarray | None]

    @classmethod
    def of(cls, fixed: Shown, moving: Shown, voxels: int) -> "_Level":
        regions = _region(fixed), _region(moving)
        volumes = [_volume(region) for region in regions]
        own = max(np.prod(s.grid.spacing_mm) ** (1 / 3) for s in (fixed, moving))
        whole = max(_volume(s.grid) for s in (fixed, moving))
        spacing = max(
            (min(volumes) / voxels**3) ** (1 / 3),
            float(own),
            (whole / (0.85 * _BUFFER)) ** (1 / 3),
        )
        sides, grids, masks = [], [], []
        for shown, region in zip((fixed, moving), regions, strict=True):
            array, grid = _reduced(shown.array, shown.grid, spacing)
            mask = None
            values = np.ones((array.size, 2), np.float32)
            values[:, 0] = array.ravel()
            if shown.mask is not None:
                mask, _ = _reduced(shown.mask.astype(np.float32), shown.grid, spacing)
                values[:, 1] = mask.ravel()
            values = np.pad(values, ((0, _BUFFER - len(values)), (0, 0)))
            enter = np.linalg.inv(grid.affine_mm) @ _middle(region)
            sides.append(
                _Side(
                    jnp.asarray(values),
                    jnp.asarray(grid.shape),
                    jnp.asarray(enter, jnp.float32),
                )
            )
            grids.append(grid)
            masks.append(mask)
        first, second = sides
        return cls(
            spacing,
            first,
            second,
            regions,
            (grids[0], grids[1]),
            (masks[0], masks[1]),
        )

    @property
    def fixed_is_smaller(self) -> bool:
        return _volume(self.regions[0]) <= _volume(self.regions[1])

    def centred(self, matrix: np.ndarray, side: int = 0) -> jax.Array:
        """A map from a side's mm in mm about both middles: small for float32."""
        enter, leave = _middle(self.regions[side]), _middle(self.regions[1 - side])
        return jnp.asarray(np.linalg.inv(leave) @ matrix @ enter, jnp.float32)

    def in_mm(self, centred: jax.Array, side: int = 0) -> np.ndarray:
        """The opposite of `centred`, float64."""
        enter, leave = _middle(self.regions[side]), _middle(self.regions[1 - side])
        found = leave @ np.asarray(centred, np.float64) @ np.linalg.inv(enter)
        found[3] = [0, 0, 0, 1]
        return found

    def descent(
        self,
        side: int,
        start: np.ndarray,
        base: np.ndarray | None,
        free: np.ndarray,
        stiffness: float,
    ) -> "_Descent":
        extent = self.regions[side].spacing_mm * self.regions[side].shape
        radius = float(np.linalg.norm(extent) / 2 / np.sqrt(3))
        before = np.zeros((3, 3)) if base is None else _log_strain(start, base)
        return _Descent(
            jnp.asarray(before, jnp.float32),
            free,
            radius,
            0.5 * self.spacing_mm,
            stiffness,
        )

    @property
    def sides(self) -> tuple[_Side, _Side]:
        return self.fixed, self.moving

    def points(self, matrix: np.ndarray, count: int) -> tuple[_Points, _Points]:
        """Points through the smaller scan, and around it through the larger one."""
        region = self.regions[0 if self.fixed_is_smaller else 1]
        step = matrix if self.fixed_is_smaller else np.linalg.inv(matrix)
        inner = _lattice(region, 1.0, count)
        around = _apply(step, _lattice(region, _AROUND, count))
        places = (inner, around) if self.fixed_is_smaller else (around, inner)
        fixed, moving = (
            self.counted(side, mm, count) for side, mm in enumerate(places)
        )
        return fixed, moving

    def counted(self, side: int, places: np.ndarray, count: int) -> _Points:
        """Points of the fixed (0) or moving (1) scan at mm P 3, up to a count."""
        grid, mask = self.grids[side], self.masks[side]
        index = _apply(np.linalg.inv(grid.affine_mm), places)
        last = np.asarray(grid.shape) - 1
        counts = np.all((index >= -0.5) & (index <= last + 0.5), -1)
        if mask is not None:
            nearest = np.rint(index).clip(0, last).astype(int)
            counts &= mask[tuple(nearest.T)] > 0.5
        middle = _middle(self.regions[side])[:3, 3]
        rest = ((0, count - len(places)), (0, 0))
        return _Points(
            jnp.asarray(np.pad(places - middle, rest), jnp.float32),
            jnp.asarray(np.pad(counts, rest[0]), jnp.float32),
        )

    def fit(self, matrix: np.ndarray) -> Fit:
        """How well a map in mm fits."""
        side = 0 if self.fixed_is_smaller else 1
        step = matrix if self.fixed_is_smaller else np.linalg.inv(matrix)
        locally = self.locally(side, functools.partial(_apply, step), 1.0)
        return Fit(self.unlikeness(matrix, _MANY), locally)

    def fit_of_places(self, found: Map) -> Fit:
        """How well a map in mm fits, by the fixed scan's points alone."""
        step = functools.partial(_apply, found) if isinstance(
            found, np.ndarray) else found  # fmt: skip
        mine, other = (_volume(region) for region in self.regions)
        least = min(1.0, other / mine)
        places = _lattice(self.regions[0], 1.0, _MANY)
        value = _unlikeness_of_places(
            self.sides,
            self.counted(0, places, _MANY),
            self.counted(1, step(places), _MANY).places,
            least,
        )
        return Fit(_number(value), self.locally(0, step, least))

    def locally(
        self, side: int, step: Callable[[np.ndarray], np.ndarray], least: float
    ) -> float:
        """`Fit.locally` over the fixed (0) or moving (1) scan, by a step to the other.

        Args:
          side: whose grid.
          step: from its mm to those of the other scan, P 3.
          least: share of it that the other scan can hold.
        """
        places = self.local_places(side)
        value = _local(
            self.sides[side],
            self.sides[1 - side],
            self.about_middle(side, places),
            self.about_middle(1 - side, step(places)),
            least,
        )
        return _number(value)

    def agreement(self, matrix: np.ndarray) -> float:
        """See `agreement`, of a map in mm."""
        side = 0 if self.fixed_is_smaller else 1
        step = matrix if self.fixed_is_smaller else np.linalg.inv(matrix)
        places = self.local_places(side)
        value = _agreement(
            self.sides[side],
            self.sides[1 - side],
            self.about_middle(side, places),
            self.about_middle(1 - side, _apply(step, places)),
        )
        return float(value)

    def local_places(self, side: int) -> np.ndarray:
        """The grid of `Fit.locally` over fixed (0) or moving (1) scan, P 3 in mm."""
        grid = self.regions[side].resized(_LOCAL)
        unit = np.asarray(sampling.identity(_LOCAL), np.float64).reshape(-1, 3)
        return _apply(grid.unit_to_mm, unit)

    def about_middle(self, side: int, places: np.ndarray) -> jax.Array:
        middle = _middle(self.regions[side])[:3, 3]
        return jnp.asarray(places - middle, jnp.float32)

    def unlikeness(self, matrix: np.ndarray, count: int) -> float:
        """`Fit.globally` of a map in mm."""
        points = self.points(matrix, count)
        value = _unlikeness(
            self.centred(matrix), self.sides, points, self.fixed_is_smaller
        )
        return _number(value)


def _number(unlike: jax.Array) -> float:
    return float(unlike) if np.isfinite(unlike) else 1.0


def _region(shown: Shown) -> Grid:
    """The grid of a scan, cut to the box around its mask."""
    if shown.mask is None or not np.any(shown.mask):
        return shown.grid
    low, shape = np.zeros(3), []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        (used,) = np.nonzero(np.any(shown.mask, others))
        low[axis] = used[0]
        shape.append(int(used[-1] - used[0] + 1))
    shift = np.eye(4)
    shift[:3, 3] = low
    return Grid(tuple(shape), shown.grid.affine_mm @ shift)


def _volume(grid: Grid) -> float:
    return float(np.prod(grid.spacing_mm * grid.shape))


def _middle(grid: Grid) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = grid.unit_to_mm[:3] @ [0.5, 0.5, 0.5, 1.0]
    return matrix


def _apply(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    return places @ matrix[:3, :3].T + matrix[:3, 3]


def _reduced(array: np.ndarray, grid: Grid, spacing_mm: float):
    """Voxels no finer than a spacing, or nearly: pairs are averaged, none is lost.

    An axis that would keep most of its voxels keeps all of them if there is room: on a
    slightly coarser grid linear interpolation blurs here more and there less.
    """
    sizes = zip(grid.shape, grid.spacing_mm, strict=True)
    shape = tuple(
        max(1, min(n, int(np.ceil(n * own / spacing_mm - 1e-6)))) for n, own in sizes
    )
    sizes = zip(grid.shape, shape, strict=True)
    fuller = tuple(n if m > _MOST_OF * n else m for n, m in sizes)
    if np.prod(fuller) <= _BUFFER:
        shape = fuller
    while any(n >= 2 * m for n, m in zip(array.shape, shape, strict=True)):
        sizes = zip(array.shape, shape, strict=True)
        array = resize.half_pixel(
            array, tuple(-(-n // 2) if n >= 2 * m else n for n, m in sizes)
        )
    return resize.half_pixel(array, shape), grid.resized(shape)


def _lattice(grid: Grid, scale: float, count: int) -> np.ndarray:
    """At most so many points through a grid's extent, P 3 in mm, the same each time.

    Jittered within their cells: on a lattice the likeness would have artefacts where
    it falls onto voxels.
    """
    extent = grid.spacing_mm * grid.shape
    apart = (np.prod(extent) / count) ** (1 / 3)
    counts = np.maximum(1, np.floor(extent / apart)).astype(int)
    while np.prod(counts) > count:
        counts[np.argmax(counts)] -= 1
    cells = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1)
    jitter = np.random.default_rng(0).uniform(size=cells.shape)
    unit = ((cells + jitter) / counts - 0.5) * scale + 0.5  # 0 to 1 over the extent
    index = unit.reshape(-1, 3) * grid.shape - 0.5
    return _apply(grid.affine_mm, index)


# --- the programs ---------------------------------------------------------------------


def _read(side: _Side, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Intensities at mm P 3, and whether scan and mask hold the points, 0 to 1."""
    index = _moved(side.enter, places)
    last = side.shape - 1.0
    reach = jnp.clip(jnp.minimum(index, last - index) + 1.0, 0.0, 1.0)
    at = jnp.clip(index, 0.0, last)
    low = jnp.floor(at)
    way = at - low
    corner = low.astype(jnp.int32)
    total: Any = 0.0
    for offset in np.ndindex(2, 2, 2):
        voxel = jnp.minimum(corner + np.array(offset), side.shape - 1)
        flat = (voxel[:, 0] * side.shape[1] + voxel[:, 1]) * side.shape[2] + voxel[:, 2]
        share = jnp.prod(jnp.where(np.array(offset) == 1, way, 1 - way), -1)
        total += share[:, None] * side.values[flat]
    return total[:, 0], jnp.prod(reach, -1) * total[:, 1]


def _moved(matrix: jax.Array, places: jax.Array) -> jax.Array:
    return _product(places, matrix[:3, :3].T) + matrix[:3, 3]


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _inverse(matrix: jax.Array) -> jax.Array:
    """Of a 4x4 map."""
    a, b, c = matrix[:3, :3]
    columns = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], 1)
    linear = columns / jnp.dot(a, columns[:, 0])
    shift = -_product(linear, matrix[:3, 3])
    return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift)


def _windows(side: _Side, points: _Points) -> jax.Array:
    """What points of a scan add to a histogram, P bins: the same under every map."""
    return similarity.parzen_weights(_read(side, points.places)[0], _BINS)


def _one_way(windows, there: _Side, places, counts) -> tuple[jax.Array, jax.Array]:
    """NMI of points with what the other scan has at their places; and their share."""
    found, inside = _read(there, places)
    inside = inside * counts
    mask = jnp.where(inside > 0.5, 1.0, 0.0)
    rows = similarity.parzen_weights(found, _BINS) * mask[:, None]
    joint = _product(rows.T, windows) / jnp.maximum(jnp.sum(mask), 1.0)
    share = jnp.sum(inside) / jnp.maximum(jnp.sum(counts), 1.0)
    return similarity.nmi_of_histogram(joint), share


def _loss(matrix, sides, points, windows, fixed_is_smaller):
    """`Fit.globally`, of the points of fixed and moving scan."""
    losses, shares = [], []
    for here, step in enumerate((matrix, _inverse(matrix))):
        places = _moved(step, points[here].places)
        loss, share = _one_way(
            windows[here], sides[1 - here], places, points[here].counts
        )
        losses.append(loss)
        shares.append(share)
    overlap = jnp.where(fixed_is_smaller, shares[0], shares[1])
    return 1.0 - overlap * (1.0 - (losses[0] + losses[1]) / 2)


@jax.jit
def _unlikeness(matrix, sides, points, fixed_is_smaller):
    windows = [_windows(*own) for own in zip(sides, points, strict=True)]
    return _loss(matrix, sides, points, windows, fixed_is_smaller)


@jax.jit
def _unlikeness_of_places(sides, points, places, least):
    """`Fit.globally` in one direction; `least` is the share that can be had."""
    windows = _windows(sides[0], points)
    loss, share = _one_way(windows, sides[1], places, points.counts)
    return 1.0 - jnp.minimum(share / least, 1.0) * (1.0 - loss)


def _unlike_locally(own, counts, there: _Side, places, least):
    """`Fit.locally` of a grid's intensities with the other scan's at some places."""
    found, inside = _read(there, places)
    mask = ((counts > 0.5) & (inside > 0.5)).reshape(1, *_LOCAL, 1)
    images = (jnp.where(mask, x.reshape(mask.shape), 0.0) for x in (found, own))
    share = jnp.sum(mask) / jnp.maximum(jnp.sum(counts > 0.5), 1)
    unlike = similarity.squared_lncc(*images, mask=mask, sigma=_LOCAL_SIGMA)
    return 1.0 - jnp.minimum(share / least, 1.0) * (1.0 - unlike)


@jax.jit
def _local(here, there, own_places, places, least):
    return _unlike_locally(*_read(here, own_places), there, places, least)


@jax.jit
def _agreement(here, there, own_places, places):
    own, counts = _read(here, own_places)
    found, inside = _read(there, places)
    mask = ((counts > 0.5) & (inside > 0.5)).reshape(1, *_LOCAL, 1)
    # Means beyond the overlap: zeros would make an edge there that both images have.
    count = jnp.maximum(jnp.sum(mask), 1)
    images = (image.reshape(mask.shape) for image in (found, own))
    images = (jnp.where(mask, x, jnp.sum(x * mask) / count) for x in images)
    correlation = similarity.lncc_map(*images, sigma=_LOCAL_SIGMA) * mask
    square = jnp.sum(correlation**2)
    return jnp.sum(correlation * jnp.abs(correlation)) / jnp.maximum(square, 1e-6)


_RIGID = np.array([1.0] * 6 + [0.0] * 6, np.float32)
_AFFINE = np.ones(12, np.float32)


def _map(numbers: jax.Array, radius: float | jax.Array, base: jax.Array) -> jax.Array:
    """A base, strained, turned and shifted by 12 numbers in mm at a radius."""
    strained = _product(_strain(numbers[6:] / radius), base[:3, :3])
    linear = _product(_rotation(numbers[3:6] / radius), strained)
    shift = base[:3, 3] + numbers[:3]
    return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift)


def _strain(numbers: jax.Array) -> jax.Array:
    """The exponential of a symmetric 3x3 matrix of 6 numbers: positive definite.

    A fourth power of a symmetric matrix is, however short its series.
    """
    a, b, c, d, e, f = numbers / 4
    small = jnp.stack([jnp.stack(row) for row in ([a, d, e], [d, b, f], [e, f, c])])
    square = _product(small, small)
    root = jnp.eye(3) + small + square / 2 + _product(square, small) / 6
    root = _product(root, root)
    return _product(root, root)


def _rotation(turn: jax.Array) -> jax.Array:
    """Of the quaternion (1, turn / 2): about the vector, by nearly its length."""
    q = jnp.concatenate([jnp.ones(1), turn / 2])
    a, b, c, d = q / jnp.linalg.norm(q)
    rows = (
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    )
    return jnp.stack([jnp.stack(row) for row in rows])


class _Descent(NamedTuple):
    strained: jax.Array  # 3x3, logarithm of the strain that the start has already
    free: np.ndarray  # 12, which numbers change: 1 or 0
    radius: float  # mm
    rate: float  # mm, of the first step
    stiffness: float


def _descended(
    level: _Level,
    start: np.ndarray,
    free: np.ndarray,
    *,
    base: np.ndarray | None = None,
) -> np.ndarray:
    """Returns a map after a descent by grey levels at one level.

    Args:
      level: the pair.
      start: 4x4, fixed to moving mm.
      free: 12, which numbers change: 1 or 0.
      base: the map whose strain is none; the start if None.
    """
    matrix = _descend(
        level.centred(start),
        level.sides,
        level.points(start, _FEW),
        level.fixed_is_smaller,
        level.descent(0, start, base, free, _STIFFNESS),
    )
    return level.in_mm(matrix)


def _descended_locally(
    level: _Level, start: np.ndarray, base: np.ndarray
) -> np.ndarray:
    """Returns an affine map after a descent by structure, on the smaller scan's grid.

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


def _log_strain(matrix: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The logarithm of the strain that a map has beyond another, 3x3."""
    beyond = matrix[:3, :3] @ np.linalg.inv(base[:3, :3])
    values, vectors = np.linalg.eigh(beyond.T @ beyond)
    return vectors @ np.diag(np.log(values) / 2) @ vectors.T


@jax.jit
def _descend(base, sides, points, fixed_is_smaller, descent):
    windows = [_windows(*own) for own in zip(sides, points, strict=True)]
    return _adam(
        lambda matrix: _loss(matrix, sides, points, windows, fixed_is_smaller),
        base,
        descent,
    )


@jax.jit
def _descend_locally(base, here, there, places, descent):
    own, counts = _read(here, places)
    return _adam(
        lambda matrix: _unlike_locally(own, counts, there, _moved(matrix, places), 1.0),
        base,
        descent,
    )


def _adam(unlike: Callable[[jax.Array], jax.Array], base, descent: _Descent):
    """Returns the map of least unlikeness and strain; the rate falls along a cosine."""
    strained, free, radius, rate, stiffness = descent

    def objective(numbers):
        a, b, c, d, e, f = numbers[6:] / radius
        rows = ([a, d, e], [d, b, f], [e, f, c])
        strain = strained + jnp.stack([jnp.stack(row) for row in rows])
        square = jnp.sum(strain**2)
        beyond = jax.nn.relu(jnp.sqrt(square + 1e-12) - _FREE_STRAIN)
        return unlike(_map(numbers, radius, base)) + stiffness * square + beyond**2

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
