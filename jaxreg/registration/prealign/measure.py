"""How unlike two scans are under a map: mutual information, and local correlation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import resample
from jaxreg.losses import similarity
from jaxreg.space import sampling
from jaxreg.space.grid import Grid

_BUFFER = 96**3  # voxels
_MOST_OF = 0.7  # of an axis's voxels: it keeps them all rather than so many
FEWEST, FEW, MANY = 2**11, 2**12, 2**15
"""Points of a first look, of a descent by grey levels, and of a judgement: what points
that were drawn say is sure to one over the root of their number."""
ALIKE = 0.95
"""Share of local structure, see `Level.agreement`, from which contrasts are one."""
_BINS, _FEW_BINS = 24, 12  # the latter where points are few
MOST = 768  # maps of a first look
_LOCAL, LOCAL_DESCENT = 48, 48
"""Voxels per axis of the grids on which a map is judged, and moved, by structure."""
_LOCAL_SIGMA = 2  # of its voxels
_AROUND = 0.9
"""Where points of the larger scan lie, as a share of the smaller one's extent: so that
no map fits better for pushing points with air out of the overlap."""


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


# --- a pair at one resolution ---------------------------------------------------------


class _Side(NamedTuple):
    values: jax.Array  # buffer 2: intensity and mask
    shape: jax.Array  # 3
    enter: jax.Array  # 4x4, mm about the middle to voxels


class _Points(NamedTuple):
    places: jax.Array  # P 3, mm about the middle
    counts: jax.Array  # P, 1 within scan and mask, else 0


@dataclasses.dataclass(frozen=True)
class Level:
    """A pair of scans at one resolution, in buffers of one size."""

    spacing_mm: float
    fixed: _Side
    moving: _Side
    regions: tuple[Grid, Grid]  # of fixed and moving
    grids: tuple[Grid, Grid]
    masks: tuple[np.ndarray | None, np.ndarray | None]

    @classmethod
    def of(cls, fixed: Shown, moving: Shown, voxels: int) -> "Level":
        """Reduces two scans to a number of voxels per axis of the smaller."""
        regions = region_of(fixed), region_of(moving)
        volumes = [volume_mm3(region) for region in regions]
        own = max(np.prod(s.grid.spacing_mm) ** (1 / 3) for s in (fixed, moving))
        whole = max(volume_mm3(s.grid) for s in (fixed, moving))
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
            enter = np.linalg.inv(grid.affine_mm) @ middle_of(region)
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
        """Whether the fixed scan has the smaller volume."""
        return volume_mm3(self.regions[0]) <= volume_mm3(self.regions[1])

    def centred(self, matrix: np.ndarray, side: int = 0) -> np.ndarray:
        """A map from a side's mm in mm about both middles: small for float32."""
        enter, leave = middle_of(self.regions[side]), middle_of(self.regions[1 - side])
        return (np.linalg.inv(leave) @ matrix @ enter).astype(np.float32)

    def in_mm(self, centred: jax.Array, side: int = 0) -> np.ndarray:
        """The opposite of `centred`, float64."""
        enter, leave = middle_of(self.regions[side]), middle_of(self.regions[1 - side])
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
    ) -> "Descent":
        """Returns the settings of a descent from a start, seen from a side."""
        extent = self.regions[side].spacing_mm * self.regions[side].shape
        radius = float(np.linalg.norm(extent) / 2 / np.sqrt(3))
        before = np.zeros((3, 3)) if base is None else _log_strain(start, base)
        return Descent(
            jnp.asarray(before, jnp.float32),
            free,
            radius,
            0.5 * self.spacing_mm,
            stiffness,
        )

    @property
    def sides(self) -> tuple[_Side, _Side]:
        """The fixed and the moving scan."""
        return self.fixed, self.moving

    def points(self, matrix: np.ndarray, count: int) -> tuple[_Points, _Points]:
        """Points through the smaller scan, and around it through the larger one."""
        side, step = self.from_smaller(matrix)
        region = self.regions[side]
        inner = lattice(region, 1.0, count)
        around = apply(step, lattice(region, _AROUND, count))
        places = (inner, around) if self.fixed_is_smaller else (around, inner)
        fixed, moving = (
            self.counted(side, mm, count) for side, mm in enumerate(places)
        )
        return fixed, moving

    def counted(self, side: int, places: np.ndarray, count: int) -> _Points:
        """Points of the fixed (0) or moving (1) scan at mm P 3, up to a count."""
        grid, mask = self.grids[side], self.masks[side]
        index = apply(np.linalg.inv(grid.affine_mm), places)
        last = np.asarray(grid.shape) - 1
        counts = np.all((index >= -0.5) & (index <= last + 0.5), -1)
        if mask is not None:
            nearest = np.rint(index).clip(0, last).astype(int)
            counts &= mask[tuple(nearest.T)] > 0.5
        middle = middle_of(self.regions[side])[:3, 3]
        rest = ((0, count - len(places)), (0, 0))
        return _Points(
            jnp.asarray(np.pad(places - middle, rest), jnp.float32),
            jnp.asarray(np.pad(counts, rest[0]), jnp.float32),
        )

    def from_smaller(self, matrix: np.ndarray) -> tuple[int, np.ndarray]:
        """Returns the smaller scan's side, and the 4x4 in mm from it to the other."""
        return (0, matrix) if self.fixed_is_smaller else (1, np.linalg.inv(matrix))

    def fit(self, matrix: np.ndarray) -> Fit:
        """How well a map in mm fits."""
        side, step = self.from_smaller(matrix)
        locally = self.locally(side, functools.partial(apply, step), 1.0)
        return Fit(self.unlikeness(matrix, MANY), locally)

    def fit_of_places(self, found: Map) -> Fit:
        """How well a map in mm fits, by the fixed scan's points alone."""
        matrix = isinstance(found, np.ndarray)
        step = functools.partial(apply, found) if matrix else found
        mine, other = (volume_mm3(region) for region in self.regions)
        least = min(1.0, other / mine)
        places = lattice(self.regions[0], 1.0, MANY)
        value = unlikeness_of_places(
            self.sides,
            self.counted(0, places, MANY),
            self.counted(1, step(places), MANY).places,
            least,
        )
        return Fit(finite_or_worst(value), self.locally(0, step, least))

    def locally(
        self, side: int, step: Callable[[np.ndarray], np.ndarray], least: float
    ) -> float:
        """`Fit.locally` over the fixed (0) or moving (1) scan, by a step to the other.

        Args:
          side: whose grid.
          step: from its mm to those of the other scan, P 3.
          least: share of it that the other scan can hold.
        """
        places = self.local_places(side, _LOCAL)
        value = _local(
            self.sides[side],
            self.sides[1 - side],
            self.about_middle(side, places),
            self.about_middle(1 - side, step(places)),
            least,
        )
        return finite_or_worst(value)

    def agreement(self, matrix: np.ndarray) -> float:
        """In how far what is bright in one scan is bright in the other, -1 to 1.

        The mean of local correlation times its size, as a share of the mean square, on
        the grid of `Fit.locally`: 1 where all structures correlate positively, -1 where
        all do negatively; 0 where nothing is there to compare.

        Args:
          matrix: 4x4, fixed to moving mm.
        """
        side, step = self.from_smaller(matrix)
        places = self.local_places(side, _LOCAL)
        value = _agreement(
            self.sides[side],
            self.sides[1 - side],
            self.about_middle(side, places),
            self.about_middle(1 - side, apply(step, places)),
        )
        return float(value)

    def local_places(self, side: int, voxels: int) -> np.ndarray:
        """A cube of voxels over the fixed (0) or moving (1) scan, P 3 in mm."""
        grid = self.regions[side].resized((voxels,) * 3)
        unit = np.asarray(sampling.identity(grid.shape), np.float64).reshape(-1, 3)
        return apply(grid.unit_to_mm, unit)

    def about_middle(self, side: int, places: np.ndarray) -> jax.Array:
        """Returns mm P 3 about the middle of a side's scan."""
        middle = middle_of(self.regions[side])[:3, 3]
        return jnp.asarray(places - middle, jnp.float32)

    def first_look(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """`Fit.globally` of many maps in mm, roughly: by points of the smaller scan.

        Args:
          maps: at most `MOST` of them, 4x4.

        Returns:
          One number a map.
        """
        side = 0 if self.fixed_is_smaller else 1
        if len(maps) > MOST:
            raise ValueError(f"{len(maps)} maps at once, expected {MOST} at most")
        steps = [self.centred(self.from_smaller(m)[1], side) for m in maps]
        steps += [np.eye(4, dtype=np.float32)] * (MOST - len(maps))
        points = self.counted(side, lattice(self.regions[side], 1.0, FEWEST), FEWEST)
        values = _looked(
            np.stack(steps), self.sides[side], self.sides[1 - side], points
        )
        values = np.asarray(values[: len(maps)])
        return np.where(np.isfinite(values), values, 1.0)

    def unlikeness(self, matrix: np.ndarray, count: int) -> float:
        """`Fit.globally` of a map in mm."""
        points = self.points(matrix, count)
        value = _unlikeness(
            self.centred(matrix), self.sides, points, self.fixed_is_smaller
        )
        return finite_or_worst(value)


def finite_or_worst(unlike: jax.Array) -> float:
    """Returns an unlikeness, 1 where it is not finite."""
    return float(unlike) if np.isfinite(unlike) else 1.0


def region_of(shown: Shown) -> Grid:
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


def volume_mm3(grid: Grid) -> float:
    """Returns the volume of a grid's extent."""
    return float(np.prod(grid.spacing_mm * grid.shape))


def middle_of(grid: Grid) -> np.ndarray:
    """Returns the 4x4 shift to the middle of a grid's extent, in mm."""
    matrix = np.eye(4)
    matrix[:3, 3] = grid.unit_to_mm[:3] @ [0.5, 0.5, 0.5, 1.0]
    return matrix


def apply(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns where a 4x4 takes points P 3, in NumPy."""
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
        array = resample.half_pixel(
            array, tuple(-(-n // 2) if n >= 2 * m else n for n, m in sizes)
        )
    return resample.half_pixel(array, shape), grid.resized(shape)


def lattice(grid: Grid, scale: float, count: int) -> np.ndarray:
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
    return apply(grid.affine_mm, index)


# --- the programs ---------------------------------------------------------------------


def read(side: _Side, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Intensities at mm P 3, interpolated, and whether scan and mask hold them."""
    index = moved(side.enter, places)
    last = side.shape - 1.0
    reach = jnp.clip(jnp.minimum(index, last - index) + 1.0, 0.0, 1.0)
    at = jnp.clip(index, 0.0, last)
    low = jnp.floor(at)
    fraction = at - low
    low, high = (jnp.minimum(low + n, last).astype(jnp.int32) for n in (0, 1))
    rows = [x[:, 0] * side.shape[1] for x in (low, high)]
    lines = [(row + x[:, 1]) * side.shape[2] for row in rows for x in (low, high)]
    # Axis by axis: a product of three shares a corner costs more, most in its gradient.
    corners = [side.values[line + x[:, 2]] for line in lines for x in (low, high)]
    for axis in (2, 1, 0):
        part = fraction[:, axis, None]
        pairs = zip(corners[::2], corners[1::2], strict=True)
        corners = [one + part * (other - one) for one, other in pairs]
    (found,) = corners
    return found[:, 0], reach[:, 0] * reach[:, 1] * reach[:, 2] * found[:, 1]


def moved(matrix: jax.Array, places: jax.Array) -> jax.Array:
    """Returns where a 4x4 takes points P 3, at full precision in JAX."""
    return product(places, matrix[:3, :3].T) + matrix[:3, 3]


product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _inverse(matrix: jax.Array) -> jax.Array:
    """Inverse of a 4x4 affine map."""
    a, b, c = matrix[:3, :3]
    columns = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], 1)
    linear = columns / jnp.dot(a, columns[:, 0])
    shift = -product(linear, matrix[:3, 3])
    return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift)


def histogram_windows(side: _Side, points: _Points) -> jax.Array:
    """What points of a scan add to a histogram, P bins: the same under every map."""
    bins = _BINS if len(points.places) > FEWEST else _FEW_BINS
    return similarity.parzen_weights(read(side, points.places)[0], bins)


def _one_way(windows, there: _Side, places, counts) -> tuple[jax.Array, jax.Array]:
    """NMI of points with what the other scan has at their places; and their share."""
    found, inside = read(there, places)
    inside = inside * counts
    mask = jnp.where(inside > 0.5, 1.0, 0.0)
    rows = similarity.parzen_weights(found, windows.shape[-1]) * mask[:, None]
    joint = product(rows.T, windows) / jnp.maximum(jnp.sum(mask), 1.0)
    share = jnp.sum(inside) / jnp.maximum(jnp.sum(counts), 1.0)
    return similarity.nmi_of_histogram(joint), share


def loss(matrix, sides, points, windows, fixed_is_smaller):
    """`Fit.globally`, of the points of fixed and moving scan."""
    losses, shares = [], []
    for here, step in enumerate((matrix, _inverse(matrix))):
        places = moved(step, points[here].places)
        loss, share = _one_way(
            windows[here], sides[1 - here], places, points[here].counts
        )
        losses.append(loss)
        shares.append(share)
    overlap = jnp.where(fixed_is_smaller, shares[0], shares[1])
    return 1.0 - overlap * (1.0 - (losses[0] + losses[1]) / 2)


@jax.jit
def _unlikeness(matrix, sides, points, fixed_is_smaller):
    windows = [histogram_windows(*own) for own in zip(sides, points, strict=True)]
    return loss(matrix, sides, points, windows, fixed_is_smaller)


@jax.jit
def _looked(steps, here: _Side, there: _Side, points: _Points):
    windows = histogram_windows(here, points)

    def unlike(step):
        places = moved(step, points.places)
        loss, share = _one_way(windows, there, places, points.counts)
        return 1.0 - share * (1.0 - loss)

    return jax.lax.map(unlike, steps, batch_size=16)


@jax.jit
def unlikeness_of_places(sides, points, places, least):
    """`Fit.globally` in one direction; `least` is the share that can be had."""
    windows = histogram_windows(sides[0], points)
    loss, share = _one_way(windows, sides[1], places, points.counts)
    return 1.0 - jnp.minimum(share / least, 1.0) * (1.0 - loss)


def unlike_locally(own, counts, there: _Side, places, least):
    """`Fit.locally` of a grid's intensities with the other scan's at some places."""
    found, inside = read(there, places)
    mask = _cube((counts > 0.5) & (inside > 0.5))
    images = (jnp.where(mask, x.reshape(mask.shape), 0.0) for x in (found, own))
    share = jnp.sum(mask) / jnp.maximum(jnp.sum(counts > 0.5), 1)
    unlike = similarity.squared_lncc(*images, mask=mask, sigma=_LOCAL_SIGMA)
    return 1.0 - jnp.minimum(share / least, 1.0) * (1.0 - unlike)


def _cube(values: jax.Array) -> jax.Array:
    """Values of a cube's voxels, P, as an image: 1 D D D 1."""
    voxels = round(len(values) ** (1 / 3))
    return values.reshape(1, voxels, voxels, voxels, 1)


@jax.jit
def _local(here, there, own_places, places, least):
    return unlike_locally(*read(here, own_places), there, places, least)


@jax.jit
def _agreement(here, there, own_places, places):
    own, counts = read(here, own_places)
    found, inside = read(there, places)
    mask = _cube((counts > 0.5) & (inside > 0.5))
    # Means beyond the overlap: zeros would make an edge there that both images have.
    count = jnp.maximum(jnp.sum(mask), 1)
    images = (image.reshape(mask.shape) for image in (found, own))
    images = (jnp.where(mask, x, jnp.sum(x * mask) / count) for x in images)
    correlation = similarity.lncc_map(*images, sigma=_LOCAL_SIGMA) * mask
    square = jnp.sum(correlation**2)
    return jnp.sum(correlation * jnp.abs(correlation)) / jnp.maximum(square, 1e-6)


class Descent(NamedTuple):
    """Settings of one descent over the twelve numbers of a map."""

    strained: jax.Array  # 3x3, logarithm of the strain that the start has already
    free: np.ndarray  # 12, which numbers change: 1 or 0
    radius: float  # mm
    rate: float  # mm, of the first step
    stiffness: float


def _log_strain(matrix: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The logarithm of the strain that a map has beyond another, 3x3."""
    change = matrix[:3, :3] @ np.linalg.inv(base[:3, :3])
    values, vectors = np.linalg.eigh(change.T @ change)
    return vectors @ np.diag(np.log(values) / 2) @ vectors.T
