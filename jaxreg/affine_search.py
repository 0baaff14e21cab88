"""The affine map under which two scans are most alike, by their intensities alone.

Maps are 4x4, from fixed to moving mm. Likeness is normalised mutual information, which
asks for no relation between the intensities of two scanners or modalities. It is the
mean of both directions: of points of the fixed scan read in the moving one, and of
points of the moving scan read in the fixed one by the inverse map. Only points count
that lie in both scans, and in their masks.

Every program is compiled once: scans of any size lie in one buffer.

References:
  Studholme et al., An overlap invariant entropy measure of 3D medical image alignment,
  Pattern Recognition 32, 1999; Modat et al., Global image registration using a
  symmetric block-matching approach, J. Med. Imaging 2014 (both directions).
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
_POINTS = (8, 32, 32)
_COUNT = 8 * 32 * 32
_BINS = 24
_LOCAL = (48, 48, 48)  # voxels of the grid on which a map is judged
_LOCAL_SIGMA = 2  # of its voxels
_LEVELS = (16, 32, 48)  # voxels per axis of the smaller scan, were it a cube
_ITERATIONS = 60  # per level
_AROUND = 0.9
"""Where points of the larger scan lie, as a share of the smaller one's extent: so that
no map fits better for pushing points with air out of the overlap."""
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
      fit: of the map.
      rivals: names of starts that ended elsewhere and fit nearly as well.
    """

    matrix: np.ndarray
    start: str
    fit: Fit
    rivals: tuple[str, ...] = ()


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
    """Returns the map under which two scans are most alike, or the best of the starts.

    Every start is moved rigidly at the coarsest level; from the best one (the first of
    those that fit nearly as well as it) all twelve numbers are searched, coarse to
    fine. A rotation, the logarithm of the strain and a shift describe the map, which
    therefore never mirrors. The result is the best of the starts, the rigid map and the
    affine one by `best_of`; what is not plausible is out of it.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      starts: names to plausible 4x4 maps from fixed to moving mm; the first one is
        kept where none is better by both measures.
    """
    levels = [_Level.of(fixed, moving, n) for n in _LEVELS]
    moved = {
        name: _descended(levels[0], start, _RIGID) for name, start in starts.items()
    }
    # In one measure: the loss at the end of a descent has points of its start.
    scores = {name: levels[0].unlikeness(matrix) for name, matrix in moved.items()}
    tells = 1 - min(scores.values())
    best = next(k for k, score in scores.items() if 1 - score >= _AS_GOOD * tells)
    matrix = moved[best]
    for level in levels:
        matrix = _descended(level, matrix, _AFFINE, base=starts[best])
    candidates = {**starts, "rigid": moved[best], "affine": matrix}
    fits = {k: levels[-1].fit(m) for k, m in candidates.items() if plausible(m)}
    chosen = best_of(fits)
    rivals = tuple(
        name
        for name, score in scores.items()
        if 1 - score > _RIVAL * tells
        and _apart(fixed.grid, moved[name], moved[best]) > 0.25
    )
    return Found(
        candidates[chosen],
        chosen if chosen in starts else best,
        fits[chosen],
        rivals,
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


def compare(
    fixed: Shown, moving: Shown, maps: Mapping[str, np.ndarray]
) -> dict[str, Fit]:
    """Returns how well maps fit, by the measures by which a search is judged.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      maps: names to 4x4 maps from fixed to moving mm, of any determinant but 0.
    """
    level = _Level.of(fixed, moving, _LEVELS[-1])
    return {name: level.fit(matrix) for name, matrix in maps.items()}


def unlikeness_of_points(
    fixed: Shown, moving: Shown, maps: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> dict[str, float]:
    """Returns `Fit.globally` of one direction, for maps that are not affine.

    Args:
      fixed: the scan that stays.
      moving: the scan that is warped.
      maps: names to functions from fixed mm P 3 to moving mm P 3.
    """
    level = _Level.of(fixed, moving, _LEVELS[-1])
    places = _lattice(level.regions[0], 1.0)
    here = level.counted(0, places)
    return {
        name: float(
            _one_way(level.fixed, level.moving, here, level.counted(1, found(places)))
        )
        for name, found in maps.items()
    }


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
        min(level.unlikeness(_descended(level, m, _RIGID)), level.unlikeness(m))
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


def _apart(grid: Grid, one: np.ndarray, other: np.ndarray) -> float:
    """How far apart two maps take the fixed scan's middle, in its half diagonals."""
    middle = _middle(grid)[:, 3]
    radius = np.linalg.norm(grid.unit_to_mm[:3, :3] @ [0.5, 0.5, 0.5])
    return float(np.linalg.norm((one - other) @ middle) / radius)


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

    def centred(self, matrix: np.ndarray) -> jax.Array:
        """A map in mm about both middles: small numbers for float32."""
        enter, leave = (_middle(region) for region in self.regions)
        return jnp.asarray(np.linalg.inv(leave) @ matrix @ enter, jnp.float32)

    def points(self, matrix: np.ndarray) -> tuple[_Points, _Points]:
        """Points through the smaller scan, and around it through the larger one."""
        if self.fixed_is_smaller:
            inner = _lattice(self.regions[0], 1.0)
            around = _apply(matrix, _lattice(self.regions[0], _AROUND))
            places = inner, around
        else:
            inner = _lattice(self.regions[1], 1.0)
            back = np.linalg.inv(matrix)
            places = _apply(back, _lattice(self.regions[1], _AROUND)), inner
        fixed, moving = (self.counted(side, mm) for side, mm in enumerate(places))
        return fixed, moving

    def counted(self, side: int, places: np.ndarray) -> _Points:
        """Points of the fixed (0) or moving (1) scan at mm P 3."""
        grid, mask = self.grids[side], self.masks[side]
        index = _apply(np.linalg.inv(grid.affine_mm), places)
        last = np.asarray(grid.shape) - 1
        counts = np.all((index >= -0.5) & (index <= last + 0.5), -1)
        if mask is not None:
            nearest = np.rint(index).clip(0, last).astype(int)
            counts &= mask[tuple(nearest.T)] > 0.5
        middle = _middle(self.regions[side])[:3, 3]
        rest = ((0, _COUNT - len(places)), (0, 0))
        return _Points(
            jnp.asarray(np.pad(places - middle, rest), jnp.float32),
            jnp.asarray(np.pad(counts, rest[0]), jnp.float32),
        )

    def fit(self, matrix: np.ndarray) -> Fit:
        """How well a map in mm fits."""
        region, centred = self.regions[0], self.centred(matrix)
        sides = self.fixed, self.moving
        if not self.fixed_is_smaller:
            region, centred = self.regions[1], self.centred_inverse(matrix)
            sides = self.moving, self.fixed
        grid = region.resized(_LOCAL)
        enter = np.linalg.inv(_middle(region)) @ grid.unit_to_mm
        locally = float(_local(*sides, jnp.asarray(enter, jnp.float32), centred))
        return Fit(self.unlikeness(matrix), locally if np.isfinite(locally) else 1.0)

    def centred_inverse(self, matrix: np.ndarray) -> jax.Array:
        """The inverse of a map in mm, about both middles."""
        enter, leave = (_middle(region) for region in self.regions)
        inverse = np.linalg.inv(enter) @ np.linalg.inv(matrix) @ leave
        return jnp.asarray(inverse, jnp.float32)

    def unlikeness(self, matrix: np.ndarray) -> float:
        """`Fit.globally` of a map in mm."""
        value = _unlikeness(
            self.centred(matrix),
            self.fixed,
            self.moving,
            *self.points(matrix),
            self.fixed_is_smaller,
        )
        return float(value) if np.isfinite(value) else 1.0


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
    """Voxels no finer than a spacing: pairs are averaged first, none is lost."""
    sizes = zip(grid.shape, grid.spacing_mm, strict=True)
    shape = tuple(
        max(1, min(n, int(np.ceil(n * own / spacing_mm - 1e-6)))) for n, own in sizes
    )
    while any(n >= 2 * m for n, m in zip(array.shape, shape, strict=True)):
        sizes = zip(array.shape, shape, strict=True)
        array = resize.half_pixel(
            array, tuple(-(-n // 2) if n >= 2 * m else n for n, m in sizes)
        )
    return resize.half_pixel(array, shape), grid.resized(shape)


def _lattice(grid: Grid, scale: float) -> np.ndarray:
    """At most `_COUNT` points through a grid's extent, P 3 in mm, the same each time.

    Jittered within their cells: on a lattice the likeness would have artefacts where
    it falls onto voxels.
    """
    extent = grid.spacing_mm * grid.shape
    apart = (np.prod(extent) / _COUNT) ** (1 / 3)
    counts = np.maximum(1, np.floor(extent / apart)).astype(int)
    while np.prod(counts) > _COUNT:
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


def _loss(matrix, fixed, moving, fixed_points, moving_points, fixed_is_smaller):
    likenesses, shares = [], []
    for here, there, points, step in (
        (fixed, moving, fixed_points, matrix),
        (moving, fixed, moving_points, _inverse(matrix)),
    ):
        own, _ = _read(here, points.places)
        found, inside = _read(there, _moved(step, points.places))
        inside = inside * points.counts
        shares.append(jnp.sum(inside) / jnp.maximum(jnp.sum(points.counts), 1.0))
        images = (x.reshape(1, *_POINTS, 1) for x in (found, own))
        mask = (inside > 0.5).reshape(1, *_POINTS, 1)
        likenesses.append(similarity.nmi(*images, mask=mask, bins=_BINS))
    overlap = jnp.where(fixed_is_smaller, shares[0], shares[1])
    return 1.0 - overlap * (1.0 - (likenesses[0] + likenesses[1]) / 2)


_unlikeness = jax.jit(_loss)


@jax.jit
def _one_way(fixed, moving, here, there):
    own, _ = _read(fixed, here.places)
    found, inside = _read(moving, there.places)
    images = (x.reshape(1, *_POINTS, 1) for x in (found, own))
    mask = (inside * here.counts > 0.5).reshape(1, *_POINTS, 1)
    share = jnp.sum(mask) / jnp.maximum(jnp.sum(here.counts), 1.0)
    return 1.0 - share * (1.0 - similarity.nmi(*images, mask=mask, bins=_BINS))


@jax.jit
def _local(here, there, enter, matrix):
    """`Fit.locally` on a grid over one scan, whose mm lead to the other's."""
    places = _moved(enter, sampling.identity(_LOCAL).reshape(-1, 3))
    own, counts = _read(here, places)
    found, inside = _read(there, _moved(matrix, places))
    mask = ((counts > 0.5) & (inside > 0.5)).reshape(1, *_LOCAL, 1)
    images = (jnp.where(mask, x.reshape(mask.shape), 0.0) for x in (found, own))
    share = jnp.sum(mask) / jnp.maximum(jnp.sum(counts > 0.5), 1)
    unlike = similarity.squared_lncc(*images, mask=mask, sigma=_LOCAL_SIGMA)
    return 1.0 - share * (1.0 - unlike)


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


def _descended(
    level: _Level,
    start: np.ndarray,
    free: np.ndarray,
    *,
    base: np.ndarray | None = None,
) -> np.ndarray:
    """Returns a map after a descent at one level.

    Args:
      level: the pair.
      start: 4x4, fixed to moving mm.
      free: 12, which numbers change: 1 or 0.
      base: the map whose strain is none; the start if None.
    """
    extent = level.regions[0].spacing_mm * level.regions[0].shape
    radius = float(np.linalg.norm(extent) / 2 / np.sqrt(3))
    before = np.zeros((3, 3)) if base is None else _log_strain(start, base)
    centred = level.centred(start)
    matrix = _descend(
        centred,
        jnp.asarray(before, jnp.float32),
        level.fixed,
        level.moving,
        *level.points(start),
        level.fixed_is_smaller,
        radius,
        free,
        0.5 * level.spacing_mm,
    )
    enter, leave = (_middle(region) for region in level.regions)
    found = leave @ np.asarray(matrix, np.float64) @ np.linalg.inv(enter)
    found[3] = [0, 0, 0, 1]
    return found


def _log_strain(matrix: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The logarithm of the strain that a map has beyond another, 3x3."""
    beyond = matrix[:3, :3] @ np.linalg.inv(base[:3, :3])
    values, vectors = np.linalg.eigh(beyond.T @ beyond)
    return vectors @ np.diag(np.log(values) / 2) @ vectors.T


@jax.jit
def _descend(
    base, strained, fixed, moving, points, more, fixed_is_smaller, radius, free, rate
):
    """Adam with a rate that falls along a cosine; returns the map."""

    def objective(numbers):
        matrix = _map(numbers, radius, base)
        fit = _loss(matrix, fixed, moving, points, more, fixed_is_smaller)
        a, b, c, d, e, f = numbers[6:] / radius
        rows = ([a, d, e], [d, b, f], [e, f, c])
        strain = strained + jnp.stack([jnp.stack(row) for row in rows])
        size = jnp.sqrt(jnp.sum(strain**2) + 1e-12)
        return fit + jax.nn.relu(size - _FREE_STRAIN) ** 2

    optimizer = optax.scale_by_adam(b2=0.99)

    def iterate(carry, index):
        numbers, state = carry
        gradient = jax.grad(objective)(numbers) * free
        update, state = optimizer.update(gradient, state)
        left = (1 + jnp.cos(jnp.pi * index / _ITERATIONS)) / 2
        return (numbers - rate * left * update, state), None

    start = jnp.zeros(12)
    (numbers, _), _ = jax.lax.scan(
        iterate, (start, optimizer.init(start)), jnp.arange(_ITERATIONS)
    )
    return _map(numbers, radius, base)
