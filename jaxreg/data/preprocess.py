"""Preprocessing of a scan for a network: intensities, mask, resampling.

The rules are those of unigradicon 1.0.6, on which released weights depend: a CT window
or a k-th value quantile on the scan's own grid, then a half-pixel resize to the network
grid whatever the spacing and orientation. Host side: NumPy in, NumPy float32 out.
"""

import dataclasses
import math
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxreg.data import network_grid
from jaxreg.data.modality import Modality
from jaxreg.data.network_grid import Resampled, ResamplingRule
from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.space import background
from jaxreg.space.grid import ROUNDING_VOXELS, Grid, Shape, Volume
from jaxreg.typing import Pair

SAME_GRID_VOXELS = 0.25
"""How far apart the grids of an image and its mask may lie, see `check_grids`."""


@dataclasses.dataclass(frozen=True)
class IntensityRule:
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
        """Scaled fill value outside a scan: air in CT, else 0."""
        if self.modality != "ct":
            return 0.0
        low, high = self.ct_window
        return min(max((background.AIR_HU - low) / (high - low), 0.0), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return {
            "modality": self.modality,
            "ct_window": list(self.ct_window),
            "quantile_range": self.quantile_range and list(self.quantile_range),
            **({"foreground": True} if self.foreground else {}),
        }


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
    array: np.ndarray, rule: IntensityRule, *, source: str = "image"
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
    between two corners a warning is issued and voxels are taken for those of the same
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
            stacklevel=1,  # once for a mask, wherever it is checked
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
    rule: IntensityRule,
    *,
    mask: Volume | None = None,
    inverted: bool = False,
    placement: ResamplingRule | Resampled = network_grid.AS_GRADICON,
) -> np.ndarray:
    """Returns a scan as network input, 1 D H W 1, float32 in [0, 1].

    Args:
      volume: the scan.
      shape: the network grid, e.g. (175, 175, 175).
      rule: the intensity rule.
      mask: on the scan's grid; where it is not above 0 the image becomes 0, after the
        intensities of the whole scan were scaled.
      inverted: one minus the intensities, before the mask.
      placement: how the scan, reoriented by it, is resized.

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
    fill = 1 - rule.outside if inverted else rule.outside
    outside = 0.0 if mask is not None else fill
    placed = placement.image(array, volume.grid, shape, outside=outside)
    return placed[None, ..., None]  # N D H W C


def network_mask(
    volume: Volume,
    shape: Shape,
    *,
    placement: ResamplingRule | Resampled = network_grid.AS_GRADICON,
) -> np.ndarray:
    """Returns a mask on the network grid, 1 D H W 1, float32: 1 where it is above 0.

    Half-pixel: source index ``floor(i n_in / n_out)``, so up to half a voxel off the
    image, the rule of the original. Aligned: the nearest voxel.
    """
    inside = (volume.array > 0).astype(np.float32)
    placed = placement.labels(inside, volume.grid, shape)
    return placed[None, ..., None]  # N D H W C


def network_labels(
    volume: Volume,
    shape: Shape,
    *,
    placement: ResamplingRule | Resampled = network_grid.AS_GRADICON,
) -> np.ndarray:
    """Returns a label map on the network grid, 1 D H W 1, int32; see `network_mask`.

    Raises:
      UserError: a label is negative or larger than 32 bits.
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
    moving_rule: IntensityRule,
    fixed_rule: IntensityRule,
    moving_mask: Volume | None = None,
    fixed_mask: Volume | None = None,
    mask_inputs: bool = False,
    mask_loss: bool = False,
    placement: ResamplingRule = network_grid.AS_GRADICON,
    moving_placement: ResamplingRule | Resampled | None = None,
) -> Pair:
    """Returns both scans as model and objective see them, without segmentations.

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
      placement: how all of them, reoriented by it, are resized.
      moving_placement: another one for what belongs to the moving scan.

    Raises:
      UserError: see `network_image`; or a mask that is needed is missing.
    """
    count = sum(mask is not None for mask in (moving_mask, fixed_mask))
    if mask_loss and count < 2:
        raise UserError(
            f"loss masking needs a mask of both images, got {count}; give "
            "`fixed_mask` and `moving_mask`"
        )
    if mask_inputs and not count:
        raise UserError(
            "input masking needs a mask, got none; give `fixed_mask` or `moving_mask`"
        )
    sides = {
        "moving": (moving, moving_rule, moving_mask, moving_placement or placement),
        "fixed": (fixed, fixed_rule, fixed_mask, placement),
    }
    for image, _, mask, _ in sides.values():
        if mask is not None:
            check_same_grid(mask, image)
    shown: dict[str, jnp.ndarray] = {}
    for side, (image, rule, mask, rule_of_grid) in sides.items():
        inputs = mask if mask_inputs else None
        shown[side] = jnp.asarray(
            network_image(image, shape, rule, mask=inputs, placement=rule_of_grid)
        )
        if mask is not None and mask_loss:
            shown[f"{side}_mask"] = jnp.asarray(
                network_mask(mask, shape, placement=rule_of_grid)
            )
    return Pair(**shown)
