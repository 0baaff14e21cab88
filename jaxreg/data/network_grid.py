"""Network grids: orientation, axes and resampling of a scan to the network's shape."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from nibabel import orientations

from jaxreg.data import resample
from jaxreg.errors import UserError
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Shape, Volume
from jaxreg.space.transform import Transform

Resize = Literal["half_pixel", "aligned", "pad_crop"]
Axes = Literal["kji", "ijk", "spl"]
_RESIZE_WORDS: Mapping[Resize, str] = MappingProxyType(
    {
        "half_pixel": "linear, half-pixel",
        "aligned": "linear, aligned",
        "pad_crop": "linear, fixed spacing, padded and cropped about the centre",
    }
)
_AXES_WORDS: Mapping[Axes, str] = MappingProxyType(
    {
        "kji": "D H W: NIfTI's i, j, k reversed; the image's direction is not used",
        "ijk": "I J K: NIfTI's order; the image's direction is not used",
        "spl": "D H W towards superior, posterior, left, by the image's direction",
    }
)
_SUPERIOR_POSTERIOR_LEFT = ((2, 1), (1, -1), (0, -1))
_EVEN, _EVENER, _LONG = 8, 16, 32
"""Voxels along an axis come in multiples of 8, of more than 32 in multiples of 16: so
scans of nearly one size have one grid, and one program, which takes longer to compile
than a few more voxels do."""
_FINER = 1.5  # times as many voxels as a scan has along an axis, at most
_FEWEST_KEPT = 4  # voxels along each axis of a part
_WHOLE = 0.8  # share of an axis from which all of it is kept
CANONICAL = "RAS"
ANY_ORIENTATION = "any"
"""Orientation of weights that were trained on randomly rotated and flipped scans."""


def _world_axes(orientation: str) -> np.ndarray:
    """Returns `oriented`'s axes, (3, 2), of an orientation such as "RAS".

    Raises:
      UserError: it is none.
    """
    letters = tuple(str(orientation).upper())
    try:
        ijk = orientations.axcodes2ornt(letters)
        complete = sorted(ijk[:, 0]) == [0, 1, 2]
    except (ValueError, IndexError):
        complete = False
    if len(letters) != 3 or not complete:
        raise UserError(
            f'orientation is "{orientation}", expected a letter of each pair R L, A P '
            'and S I for the directions in which i, j and k grow, e.g. "RAS"'
        )
    return ijk[::-1]


@dataclasses.dataclass(frozen=True)
class ResamplingRule:
    """How a scan's voxels become those of the network; travels with a model's weights.

    Attributes:
      resize: "half_pixel" keeps the scan's extent (GradICON); "aligned" the centres of
        its corner voxels (PromptReg); "pad_crop" voxels of `spacing_mm` about the
        scan's centre (UniReg).
      axes: order of the network's array axes: "kji", as `Volume` has them; "ijk",
        NIfTI's own (PromptReg); "spl": the scan is reoriented first, so that array
        indices grow towards superior, posterior and left (UniReg).
      spacing_mm: of the network's voxels, for "pad_crop" alone.
      orientation: what scans are reoriented to before that, in NIfTI's terms: "RAS" is
        i towards right, j anterior, k superior, as near as permuting and flipping axes
        comes. None leaves them as they are stored. "spl" takes none.
    """

    resize: Resize = "half_pixel"
    axes: Axes = "kji"
    spacing_mm: float = 2.0
    orientation: str | None = None

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a name is unknown or the spacing not positive.
        """
        if self.orientation is not None:
            _world_axes(self.orientation)
        for field, words in (("resize", _RESIZE_WORDS), ("axes", _AXES_WORDS)):
            if getattr(self, field) not in words:
                raise UserError(
                    f'{field} is "{getattr(self, field)}", expected one of '
                    f"{', '.join(words)}"
                )
        if not 0 < self.spacing_mm < math.inf:
            raise UserError(
                f"spacing_mm is {self.spacing_mm:g}, expected a positive number"
            )

    @classmethod
    def of_weights(cls, preprocessing: Mapping[str, Any]) -> "ResamplingRule":
        """Returns what weights say of it, GradICON's where they say nothing."""

        def named(words: Mapping[Any, str], name: str) -> Any:
            said = str(preprocessing.get(name, ""))
            first = next(iter(words))
            return next(
                (k for k, text in words.items() if said.startswith(text)), first
            )

        orientation = preprocessing.get("orientation", ANY_ORIENTATION)
        return cls(
            named(_RESIZE_WORDS, "resize"),
            named(_AXES_WORDS, "axes"),
            float(preprocessing.get("spacing_mm", 2.0)),
            None if orientation == ANY_ORIENTATION else str(orientation),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns what `of_weights` reads, in words."""
        nearest = "floor" if self.resize == "half_pixel" else "aligned"
        stored: dict[str, Any] = {
            "axes": _AXES_WORDS[self.axes],
            "resize": _RESIZE_WORDS[self.resize],
            "resize_labels": "nearest" + f", {nearest}" * (not self._fixed_spacing),
        }
        if self.orientation is not None:
            stored["orientation"] = self.orientation
        return stored | ({"spacing_mm": self.spacing_mm} if self._fixed_spacing else {})

    @property
    def _fixed_spacing(self) -> bool:
        return self.resize == "pad_crop"

    def reoriented(self, volume: Volume) -> Volume:
        """Returns the scan with its array axes in the network's order; a view."""
        if self.axes == "spl":
            return oriented(volume, _SUPERIOR_POSTERIOR_LEFT)
        if self.orientation is not None:
            volume = oriented(volume, _world_axes(self.orientation))
        return volume.transposed() if self.axes == "ijk" else volume

    def grid(self, grid: Grid, shape: Shape) -> Grid:
        """Returns the network grid over a reoriented scan's grid."""
        if self._fixed_spacing:
            return grid.centred(shape, self.spacing_mm)
        if self.resize == "aligned":
            return grid.resized_aligned(shape)
        return grid.resized(shape)

    def measured(self, grid: Grid, shape: Shape) -> Grid:
        """Returns the grid on which folds and roughness are measured.

        The reoriented scan's, but for "pad_crop" its voxels within the network's box:
        outside it the map is extrapolated, and papers measure on the box.
        """
        return grid.within(self.grid(grid, shape)) if self._fixed_spacing else grid

    def image(
        self, array: np.ndarray, grid: Grid, shape: Shape, *, outside: float = 0.0
    ) -> np.ndarray:
        """Resamples linearly.

        Args:
          array: D H W, float32, reoriented.
          grid: of the array.
          shape: of the network grid.
          outside: fill value outside the array, for "pad_crop".
        """
        if self._fixed_spacing:
            ratio = self.spacing_mm / grid.spacing_mm
            return resample.centred(array, shape, ratio, outside=outside)
        linear = resample.aligned if self.resize == "aligned" else resample.half_pixel
        return linear(array, shape)

    def labels(self, array: np.ndarray, grid: Grid, shape: Shape) -> np.ndarray:
        """Resamples to the nearest voxel, 0 outside; arguments as `image`, any type."""
        if self._fixed_spacing:
            return resample.nearest_centred(
                array, shape, self.spacing_mm / grid.spacing_mm
            )
        aligned = self.resize == "aligned"
        return (resample.nearest_aligned if aligned else resample.nearest_floor)(
            array, shape
        )


AS_GRADICON = ResamplingRule()
WITHOUT_WEIGHTS = ResamplingRule(orientation=CANONICAL)
"""Without a network: RAS first, so that the stored orientation does not matter."""


@dataclasses.dataclass(frozen=True, eq=False)
class Resampled:
    """How a moving scan's voxels become those of a network grid over the fixed scan.

    In place of a `ResamplingRule`: each voxel of the grid is read where a map leads it.

    Attributes:
      grid: the fixed scan's network grid.
      transform: fixed mm to moving mm.
    """

    grid: Grid
    transform: Transform

    def image(
        self, array: np.ndarray, grid: Grid, shape: Shape, *, outside: float = 0.0
    ) -> np.ndarray:
        """Resamples linearly; arguments as `ResamplingRule.image`."""
        return self._read(array, grid, shape, order=1, fill=outside)

    def labels(self, array: np.ndarray, grid: Grid, shape: Shape) -> np.ndarray:
        """Resamples to the nearest voxel, 0 outside; see `ResamplingRule.labels`."""
        return self._read(array, grid, shape, order=0, fill=0.0)

    def _read(
        self,
        array: np.ndarray,
        grid: Grid,
        shape: Shape,
        *,
        order: Literal[0, 1],
        fill: float,
    ) -> np.ndarray:
        if tuple(shape) != tuple(self.grid.shape):
            raise ValueError(f"shape {shape} is not that of the grid {self.grid.shape}")
        scan = Volume(array, grid)
        return warping.warp_volume(
            scan, self.transform, self.grid, order=order, fill=fill
        ).array


def part_of(
    window: tuple[float, float], loaded: tuple[float, float]
) -> tuple[float, float]:
    """Returns where a window's ends are in scans of which another was loaded.

    Args:
      window: Hounsfield units.
      loaded: those that became 0 and 1.
    """
    low, high = loaded
    return (window[0] - low) / (high - low), (window[1] - low) / (high - low)


def oriented(volume: Volume, axes: Any) -> Volume:
    """Returns the volume with its array axes as near to given world axes as can be.

    Voxels are only permuted and flipped, none moves in world space. A view.

    Args:
      volume: D H W.
      axes: for each array axis the world axis (0 x, 1 y, 2 z of RAS+) and 1 or -1: an
        array (3, 2) or what becomes one.
    """
    change = orientations.ornt_transform(
        orientations.io_orientation(volume.grid.affine_mm), np.asarray(axes)
    )
    array = orientations.apply_orientation(volume.array, change)
    back = orientations.inv_ornt_aff(change, volume.grid.shape)
    return Volume(array, Grid(array.shape, volume.grid.affine_mm @ back), volume.source)


def orientation_of(grid: Grid) -> str:
    """Returns the directions in which NIfTI's i, j and k grow, e.g. "RAS"."""
    return "".join(orientations.aff2axcodes(grid.transposed().affine_mm))


def shape_within(grid: Grid, voxels: int, least: int = 0) -> Shape:
    """Returns a scan's shape, or a coarser or a finer one of about so many voxels.

    A coarser one has voxels that are as cubic as the scan's own allow. A finer one has
    up to `_FINER` times as many along each axis. Axes of more than 8 voxels get a
    multiple of 8 or 16: the next larger one where the scan has so many, else the
    nearest.

    Args:
      grid: of the scan.
      voxels: how many, at most.
      least: how many, at least.
    """
    spacing = np.maximum(np.asarray(grid.spacing_mm, np.float64), 1e-9)
    own = np.asarray(grid.shape, np.float64)

    def count(edge: float) -> np.ndarray:
        return np.maximum(np.minimum(own, own * spacing / edge), 1.0)

    low, high, wanted = spacing.min(), (own * spacing).max(), own
    if own.prod() > voxels:
        for _ in range(50):  # bisection of the voxels' edge in mm
            middle = math.sqrt(low * high)
            fits = count(middle).prod() <= voxels
            low, high = (low, middle) if fits else (middle, high)
        wanted = count(high)
    elif own.prod() < least:
        finer = min(_FINER, (least / own.prod()) ** (1 / 3))
        wanted = np.where(own > _EVEN, own * finer, own)
    step = np.where(wanted > _LONG, _EVENER, np.where(wanted > _EVEN, _EVEN, 1))
    rounded = np.where(wanted == own, np.ceil(own / step), np.rint(wanted / step))
    d, h, w = (step * np.maximum(rounded, 1)).astype(int).tolist()
    return d, h, w


def part_near(
    grid: Grid, other: Grid, other_to_mm: np.ndarray, margin: float = 0.25
) -> tuple[slice, ...]:
    """Returns the part of a scan's grid that another scan can meet.

    That is the box around the other one's corners, with a margin. An axis of which it
    would leave out less than a fifth stays whole, and so do all where it is empty.

    Args:
      grid: the scan's.
      other: the other scan's.
      other_to_mm: 4x4, where the other one's points lie in this one's space, mm.
      margin: on each side, relative to the box's own edge or this scan's, the shorter.
    """
    size = np.asarray(grid.shape)
    ends = np.stack([np.full(3, -0.5), np.asarray(other.shape) - 0.5])
    corners = ends[np.array(list(np.ndindex(2, 2, 2))), np.arange(3)]
    to_index = np.linalg.inv(grid.affine_mm) @ other_to_mm @ other.affine_mm
    places = corners @ to_index[:3, :3].T + to_index[:3, 3]
    low, high = places.min(0) + 0.5, places.max(0) + 0.5  # 0 and n are the faces
    reach = margin * np.minimum(high - low, size)
    first = np.clip(np.floor(low - reach), 0, size).astype(int)
    last = np.clip(np.ceil(high + reach), 0, size).astype(int)
    if np.any(last - first < _FEWEST_KEPT):
        return tuple(slice(0, int(n)) for n in size)
    whole = last - first > _WHOLE * size
    return tuple(
        slice(0, int(n)) if all_of_it else slice(int(a), int(b))
        for n, a, b, all_of_it in zip(size, first, last, whole, strict=True)
    )


def cut(volume: Volume, part: tuple[slice, ...]) -> Volume:
    """Returns a part of a scan where it is; a view."""
    matrix = np.eye(4)
    matrix[:3, 3] = [s.start for s in part]
    array = volume.array[part]
    grid = Grid(array.shape, volume.grid.affine_mm @ matrix)
    return Volume(array, grid, volume.source)
