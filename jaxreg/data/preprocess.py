"""From a scan to what the network sees: intensity rule, mask, network grid.

The rules are those of unigradicon 1.0.6, on which released weights depend: a CT window
or a k-th value quantile on the scan's own grid, then a half-pixel resize to the network
grid whatever the spacing and orientation. Host side: NumPy in, NumPy float32 out.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from nibabel import orientations

from jaxreg.data import resize
from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.space import background
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import ROUNDING_VOXELS, Grid, Shape, Volume
from jaxreg.space.transform import Transform
from jaxreg.typing import Pair

Modality = Literal["ct", "mri"]
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
_FEWEST_KEPT = 4  # voxels along each axis of a part
_WHOLE = 0.8  # share of an axis from which all of it is kept
SAME_GRID_VOXELS = 0.25
"""How far apart the grids of an image and its mask may lie, see `check_grids`."""
CANONICAL = "RAS"
ANY_ORIENTATION = "any"
"""What weights say that were trained on scans turned and mirrored at random."""


_CT = frozenset(("ct", "cbct", "fbct", "cect", "ncct", "ldct", "hrct", "cta"))
_EMISSION = frozenset(("pet", "spect"))


def kind(modality: str) -> Modality:
    """Returns whose intensity rule holds: that of CT, or of MR for everything else.

    A word with CT in it is CT ("CT", "ct_venous", "low-dose CT"), cone-beam CT as well:
    its numbers are meant as Hounsfield units, and multiGradICON saw ThoraxCBCT in the
    window of CT. "PET/CT" is not: it may name either scan. In any case of letters.
    """
    words = set(re.split(r"[^a-z0-9]+", modality.lower()))
    return "ct" if words & _CT and not words & _EMISSION else "mri"


CONTRASTS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("ct", "cbct", "fbct"), "ct"),
        **dict.fromkeys(("us", "trus"), "us"),
        "pet": "pet",
        **dict.fromkeys(("mri", "mr"), "mri"),
        **dict.fromkeys(("t1", "t1w"), "t1"),
        **dict.fromkeys(("t1c", "t1ce", "t1gd"), "t1c"),
        **dict.fromkeys(("t2", "t2w"), "t2"),
        **{name: name for name in ("flair", "pd", "dwi", "adc", "fa", "fat", "water")},
    }
)
"""Names of modalities to the contrast that they mean; "mri" where that is not said."""


def known(modality: str) -> str:
    """Returns the key of `CONTRASTS` that a free word is, else that of its `kind`."""
    word = modality.strip().lower()
    return word if word in CONTRASTS else kind(word)


def same_contrast(first: str, second: str) -> bool:
    """Whether two modalities may show tissue alike, so that intensities compare.

    CT, ultrasound, PET and MR never do, T1 and T2 do not; an MR whose contrast is not
    said ("mr", "mri") may be like any other MR.

    Args:
      first: name of a modality, in any case; a key of `CONTRASTS` or any other word.
      second: the same of the other scan.
    """
    if kind(first) != kind(second):
        return False
    words = (name.strip().lower() for name in (first, second))
    one, other = (CONTRASTS.get(word, word) for word in words)
    if one == other or kind(first) == "ct":
        return True
    return "mri" in (one, other) and not {one, other} & {"us", "pet"}


def beyond(
    modality: str | None,
    volume: Volume,
    fill: float | None = None,
    *,
    nearest: bool = False,
) -> background.Background:
    """Returns what a warped scan shows where there is nothing of it.

    Args:
      modality: see `kind`; None goes by the values.
      volume: the scan, in its stored unit.
      fill: see `background.find`.
      nearest: see `background.find`.
    """
    ct = None if modality is None else kind(modality) == "ct"
    return background.find(volume, ct=ct, nearest=nearest, fill=fill)


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
class Placement:
    """How a scan's voxels become those of the network; travels with a model's weights.

    Attributes:
      resize: "half_pixel" keeps the scan's extent (GradICON); "aligned" the centres of
        its corner voxels (PromptReg); "pad_crop" voxels of `spacing_mm` about the
        scan's centre (UniReg).
      axes: order of the network's array axes: "kji", as `Volume` has them; "ijk",
        NIfTI's own (PromptReg); "spl": the scan is turned first, so that array
        indices grow towards superior, posterior and left (UniReg).
      spacing_mm: of the network's voxels, for "pad_crop" alone.
      orientation: what scans are turned to before that, as NIfTI counts it: "RAS" is i
        towards right, j anterior, k superior, as near as permuting and flipping axes
        comes. None leaves them as they are stored. For "spl" there is none to give.
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
    def of_weights(cls, preprocessing: Mapping[str, Any]) -> "Placement":
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
        told: dict[str, Any] = {
            "axes": _AXES_WORDS[self.axes],
            "resize": _RESIZE_WORDS[self.resize],
            "resize_labels": "nearest" + f", {nearest}" * (not self._fixed_spacing),
        }
        if self.orientation is not None:
            told["orientation"] = self.orientation
        return told | ({"spacing_mm": self.spacing_mm} if self._fixed_spacing else {})

    @property
    def _fixed_spacing(self) -> bool:
        return self.resize == "pad_crop"

    def turned(self, volume: Volume) -> Volume:
        """Returns the scan with its array axes in the network's order; a view."""
        if self.axes == "spl":
            return oriented(volume, _SUPERIOR_POSTERIOR_LEFT)
        if self.orientation is not None:
            volume = oriented(volume, _world_axes(self.orientation))
        return volume.transposed() if self.axes == "ijk" else volume

    def grid(self, grid: Grid, shape: Shape) -> Grid:
        """Returns the network grid over a turned scan's grid."""
        if self._fixed_spacing:
            return grid.centred(shape, self.spacing_mm)
        if self.resize == "aligned":
            return grid.resized_aligned(shape)
        return grid.resized(shape)

    def measured(self, grid: Grid, shape: Shape) -> Grid:
        """Returns where a map is judged: what the network sees of a turned scan's grid.

        All of it, but for "pad_crop" the scan's voxels within the network's box. Beyond
        it the map only goes on, and papers measure on the box.
        """
        return grid.within(self.grid(grid, shape)) if self._fixed_spacing else grid

    def image(
        self, array: np.ndarray, grid: Grid, shape: Shape, *, outside: float = 0.0
    ) -> np.ndarray:
        """Resamples linearly.

        Args:
          array: D H W, float32, turned.
          grid: of the array.
          shape: of the network grid.
          outside: value beyond the array, for "pad_crop".
        """
        if self._fixed_spacing:
            ratio = self.spacing_mm / grid.spacing_mm
            return resize.centred(array, shape, ratio, outside=outside)
        linear = resize.aligned if self.resize == "aligned" else resize.half_pixel
        return linear(array, shape)

    def labels(self, array: np.ndarray, grid: Grid, shape: Shape) -> np.ndarray:
        """Resamples to the nearest voxel, 0 beyond; arguments as `image`, any type."""
        if self._fixed_spacing:
            return resize.nearest_centred(
                array, shape, self.spacing_mm / grid.spacing_mm
            )
        aligned = self.resize == "aligned"
        return (resize.nearest_aligned if aligned else resize.nearest_floor)(
            array, shape
        )


AS_GRADICON = Placement()
WITHOUT_WEIGHTS = Placement(orientation=CANONICAL)
"""Where no network says what it was trained on: one result, however scans are stored.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """How a moving scan's voxels become those of a network grid over the fixed scan.

    In place of a `Placement`: each voxel of the grid is read where a map leads it.

    Attributes:
      grid: the fixed scan's network grid.
      transform: fixed mm to moving mm.
    """

    grid: Grid
    transform: Transform

    def image(
        self, array: np.ndarray, grid: Grid, shape: Shape, *, outside: float = 0.0
    ) -> np.ndarray:
        """Resamples linearly; arguments as `Placement.image`."""
        return self._read(array, grid, shape, order=1, fill=outside)

    def labels(self, array: np.ndarray, grid: Grid, shape: Shape) -> np.ndarray:
        """Resamples to the nearest voxel, 0 beyond; arguments as `Placement.labels`."""
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
        return transform_lib.warp_volume(
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


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The intensity rule of one scan; travels with a model's weights.

    Attributes:
      modality: "ct" scales a fixed window, "mri" a range of the scan's own values.
      ct_window: the Hounsfield values that become 0 and 1.
      quantile_range: the quantiles that become 0 and 1 in MRI; the minimum and the
        0.99 quantile if None.
      foreground: these quantiles are those of the voxels above 0 alone (UniReg-RPN).
    """

    modality: Modality = "mri"
    ct_window: tuple[float, float] = (-1000.0, 1000.0)
    quantile_range: tuple[float, float] | None = None
    foreground: bool = False

    def __post_init__(self):
        """Checks the values; JSON's lists become tuples."""
        if self.modality not in ("ct", "mri"):
            raise UserError(
                f'modality is "{self.modality}", expected "ct" or "mri"; give one'
            )
        low, high = _two_numbers("ct_window", self.ct_window)
        if not low < high:
            raise UserError(
                f"ct_window is {low:g} {high:g}, expected minimum < maximum; swap them"
            )
        object.__setattr__(self, "ct_window", (low, high))
        if self.quantile_range is not None:
            low, high = _two_numbers("quantile_range", self.quantile_range)
            if not 0 <= low < high <= 1:
                raise UserError(
                    f"quantile_range is {low:g} {high:g}, expected 0 <= low < high <= "
                    "1; give e.g. 0.01 0.99"
                )
            object.__setattr__(self, "quantile_range", (low, high))

    @property
    def outside(self) -> float:
        """What is beyond a scan, scaled: air in CT, else 0."""
        if self.modality != "ct":
            return 0.0
        low, high = self.ct_window
        return min(max((background.AIR_HU - low) / (high - low), 0.0), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON knows them."""
        return {
            "modality": self.modality,
            "ct_window": list(self.ct_window),
            "quantile_range": self.quantile_range and list(self.quantile_range),
            **({"foreground": True} if self.foreground else {}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Returns the rule that `to_dict` wrote; absent fields take their defaults.

        Raises:
          UserError: a field is unknown or its value does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(names))
        if unknown:
            raise UserError(
                f"preprocessing has unknown fields {', '.join(unknown)}, expected "
                f"{', '.join(names)}; were the weights written by a newer jaxreg?"
            )
        return cls(**fields)


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


def _two_numbers(name: str, values: Any) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {values}, expected two numbers") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} is {low:g} {high:g}, expected finite numbers")
    return low, high


def quantile(array: np.ndarray, q: float) -> float:
    """Returns the k-th smallest of all n values, ``k = min(max(int(q n), 1), n)``.

    No interpolation, and k is rounded down: the original's rule, not NumPy's.

    Args:
      array: any shape, not empty.
      q: 0 to 1.
    """
    k = min(max(int(q * array.size), 1), array.size)
    return np.partition(array, k - 1, axis=None)[k - 1].item()


def normalise(
    array: np.ndarray, rule: Preprocessing, *, source: str = "image"
) -> np.ndarray:
    """Scales intensities to [0, 1] on the scan's own grid.

    Args:
      array: D H W, stored intensities, finite.
      rule: modality and range.
      source: what to call the image in a message.

    Returns:
      D H W, float32.

    Raises:
      UserError: nothing is left to see: the image is constant, in its range or at all.
    """
    array = array.astype(np.float32)
    if rule.modality == "ct":
        low, high = rule.ct_window
        mend = f"ct_window {low:g} {high:g}; give the window that holds its values"
    else:
        a, b = rule.quantile_range or (0.0, 0.99)
        seen = array[array > 0] if rule.foreground else array
        seen = seen if seen.size else array
        low, high = quantile(seen, a), quantile(seen, b)
        mend = f"quantiles {a:g} to {b:g}; widen quantile_range, e.g. to 0 1"
    low, high = np.float32(low), np.float32(high)
    if array.min() == array.max():
        raise UserError(
            f"{source} is constant ({array.flat[0]:g} everywhere), there is nothing to "
            "register; check that it is the right file"
        )
    if high <= low or array.max() <= low or array.min() >= high:
        raise UserError(
            f"{source} is constant within its intensity range, the {mend} (its values "
            f"run from {array.min():g} to {array.max():g})"
        )
    return (np.clip(array, low, high) - low) / (high - low)


def check_same_grid(volume: Volume, image: Volume, *, what: str = "mask") -> None:
    """Checks that a mask or segmentation lies on its image's grid; see `check_grids`.

    Raises:
      UserError: another shape or another place; names both files.
    """
    check_grids(volume.grid, image.grid, f"{what} {volume.source}", image.source)


def check_grids(grid: Grid, image: Grid, name: str, image_name: object) -> None:
    """Checks that what belongs to an image lies on its grid.

    A header's rounding is passed over (`ROUNDING_VOXELS`). Up to `SAME_GRID_VOXELS`
    between two corners a warning is given and voxels are taken for those of the same
    index, which are also the nearest. Half a voxel, the mistake of a grid that is
    counted from its edge, is not near.

    Args:
      grid: of a mask, segmentation or label map.
      image: of its image.
      name: what to call the first, e.g. "mask FILE".
      image_name: what to call the image.

    Raises:
      UserError: another shape, or corners farther apart; names both.
    """
    gap = image.gap_voxels(grid)
    if gap <= ROUNDING_VOXELS:
        return
    apart = f"{gap:.2g} of a voxel ({image.gap_mm(grid):.2g} mm)"
    if gap <= SAME_GRID_VOXELS:
        warnings.warn(
            f"{name} lies up to {apart} from the grid of its image {image_name}; taken "
            "for rounding, and for the same grid",
            stacklevel=1,  # once for a mask, wherever it is looked at
        )
        return
    here, there = (" x ".join(map(str, g.shape[::-1])) for g in (grid, image))
    detail = (
        f"{here} voxels against {there}"
        if here != there
        else f"one shape at another place, corners up to {apart} apart, at most "
        f"{SAME_GRID_VOXELS} of a voxel is taken for rounding"
    )
    raise UserError(
        f"{name} lies on another grid than its image {image_name} ({detail}); resample "
        "it onto the image first"
    )


def network_image(
    volume: Volume,
    shape: Shape,
    rule: Preprocessing,
    *,
    mask: Volume | None = None,
    inverted: bool = False,
    placement: Placement | Carried = AS_GRADICON,
) -> np.ndarray:
    """Returns the network's view of a scan, 1 D H W 1, float32 in [0, 1].

    Args:
      volume: the scan.
      shape: the network grid, e.g. (175, 175, 175).
      rule: the intensity rule.
      mask: on the scan's grid; where it is not above 0 the image becomes 0, after the
        intensities of the whole scan were scaled.
      inverted: one minus the intensities, before the mask.
      placement: how the scan, turned by it, is resized.

    Raises:
      UserError: see `normalise` and `check_same_grid`; or the mask leaves nothing.
    """
    array = normalise(volume.array, rule, source=volume.source)
    if inverted:
        array = 1 - array
    if mask is not None:
        check_same_grid(mask, volume)
        array = np.where(mask.array > 0, array, np.float32(0))
        if not array.any():
            raise UserError(
                f"mask {mask.source} leaves nothing of its image {volume.source} (all "
                "voxels become 0); check that they belong together"
            )
    beyond = 1 - rule.outside if inverted else rule.outside
    outside = 0.0 if mask is not None else beyond
    placed = placement.image(array, volume.grid, shape, outside=outside)
    return placed[None, ..., None]  # N D H W C


def network_mask(
    volume: Volume, shape: Shape, *, placement: Placement | Carried = AS_GRADICON
) -> np.ndarray:
    """Returns a mask on the network grid, 1 D H W 1, float32: 1 where it is above 0.

    Half-pixel: source index ``floor(i n_in / n_out)``, so up to half a voxel off the
    image, the rule of the original. Aligned: the nearest voxel.
    """
    inside = (volume.array > 0).astype(np.float32)
    placed = placement.labels(inside, volume.grid, shape)
    return placed[None, ..., None]  # N D H W C


def network_labels(
    volume: Volume, shape: Shape, *, placement: Placement | Carried = AS_GRADICON
) -> np.ndarray:
    """Returns a label map on the network grid, 1 D H W 1, int32; see `network_mask`.

    Raises:
      UserError: a label is negative or beyond 32 bits.
    """
    labels = volume.array
    volumes.check_labels(labels, volume.source)
    high = labels.max()
    if high > np.iinfo(np.int32).max:
        raise UserError(
            f"label map {volume.source} has labels up to {high}, expected at most "
            f"{np.iinfo(np.int32).max}; renumber it"
        )
    placed = placement.labels(labels.astype(np.int32), volume.grid, shape)
    return placed[None, ..., None]


def network_pair(
    moving: Volume,
    fixed: Volume,
    shape: Shape,
    *,
    moving_rule: Preprocessing,
    fixed_rule: Preprocessing,
    moving_mask: Volume | None = None,
    fixed_mask: Volume | None = None,
    mask_inputs: bool = False,
    mask_loss: bool = False,
    placement: Placement = AS_GRADICON,
    moving_placement: Placement | Carried | None = None,
) -> Pair:
    """Returns both scans as model and objective see them.

    Segmentations are not part of it: a Dice term adds its one-hots of `network_labels`.

    Args:
      moving: the scan that is warped.
      fixed: the scan it is warped onto.
      shape: the network grid of both.
      moving_rule: intensity rule of the moving scan.
      fixed_rule: intensity rule of the fixed scan.
      moving_mask: on the moving scan's grid.
      fixed_mask: on the fixed scan's grid.
      mask_inputs: set each image to 0 outside its mask.
      mask_loss: put the masks into the pair; needs both.
      placement: how all of them, turned by it, are resized.
      moving_placement: another one for what belongs to the moving scan.

    Raises:
      UserError: see `network_image`; or a mask is missing that was asked for.
    """
    masks = (moving_mask, fixed_mask)
    given = sum(mask is not None for mask in masks)
    if mask_loss and given < 2:
        raise UserError(
            f"loss masking needs a mask of both images, got {given}; give "
            "--fixed-mask and --moving-mask"
        )
    if mask_inputs and not given:
        raise UserError(
            "input masking needs a mask, got none; give --fixed-mask or --moving-mask"
        )
    for mask, image in ((moving_mask, moving), (fixed_mask, fixed)):
        if mask is not None:
            check_same_grid(mask, image)
    placements = (moving_placement or placement, placement)
    images = [
        network_image(
            image,
            shape,
            rule,
            mask=mask if mask_inputs else None,
            placement=where,
        )
        for image, rule, mask, where in zip(
            (moving, fixed), (moving_rule, fixed_rule), masks, placements, strict=True
        )
    ]
    on_network = [
        jnp.asarray(network_mask(mask, shape, placement=where))
        if mask is not None and mask_loss
        else None
        for mask, where in zip(masks, placements, strict=True)
    ]
    return Pair(
        moving=jnp.asarray(images[0]),
        fixed=jnp.asarray(images[1]),
        moving_mask=on_network[0],
        fixed_mask=on_network[1],
    )
