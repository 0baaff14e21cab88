"""Background of a scan: the fill value outside it, and padding stored in its file.

One rule for every verb that resamples scans. A CT of a round field of view is stored
in a square: the scanner pads the corners with a number far below air (-2000, -2048,
-3024), which is no measurement and must not bleed into the scan by interpolation.
"""

import dataclasses
import warnings
from typing import Literal

import numpy as np

from jaxreg.space.grid import Volume

AIR_HU = -1000.0
_CT_HU = -500.0  # a scan that goes down to here has air in it: a CT
_USUAL_AIR_HU = (-1100.0, -900.0)  # -1024 where that is the least that is stored
_COMMON = 0.1  # of the border's voxels, to be what lies around the scan
_PADDED = 0.01  # of the border's voxels, to be padding and no outlier
_LEAST = 8  # of them: in a scan of few voxels one is a hundredth
_SLICES = 16  # that show whether regions are flat


@dataclasses.dataclass(frozen=True)
class Background:
    """The fill value of a resampled scan, and which stored voxels are padding.

    Attributes:
      fill: the value there, in the scan's unit.
      padding: values up to this one are no measurements: they become `fill`, and
        interpolation leaves them out. None if there are none.
    """

    fill: float
    padding: float | None = None


Fill = float | Literal["auto"] | Background
"""A fill value without padding, or the rule of `find`."""


def find(
    volume: Volume,
    *,
    ct: bool | None = None,
    nearest: bool = False,
    fill: float | None = None,
) -> Background:
    """Returns what is no part of a scan.

    * A CT, which goes down to -500 HU at least: the border's commonest value if a tenth
      of the border has it and it is that of air (-1100 to -900, e.g. -1024), else -1000
      or the scan's minimum if that is higher. Padding does not count: a value below
      -1100 that 1 % of the border has.
    * Other scans: 0 if none of their values is negative, else the border's commonest
      value if a tenth of the border has it, else the minimum.
    * Label maps: 0.

    Args:
      volume: the scan, in its stored unit.
      ct: whether it is a CT; None goes by its values, with a warning in doubt.
      nearest: it is read by nearest neighbour: without a word it is a label map then,
        unless it has a CT's values and no flat regions.
      fill: taken in place of the rule's value.
    """
    array = np.asarray(volume.array)
    lowest = float(np.fmin.reduce(array, axis=None))
    airy = lowest <= _CT_HU
    if nearest and ct is None and not (airy and not looks_like_labels(array)):
        return Background(0.0 if fill is None else fill)
    if ct is False or not airy:
        return Background(_around(array, lowest) if fill is None else fill)
    border = _counted(_faces(array))
    padding = _padding(*border)
    if padding is not None:
        border, lowest = _measured(array, padding)
    if fill is not None:
        return Background(fill, padding)
    common = _commonest(*border)
    if lowest > _CT_HU:  # but for padding, it is no CT
        return Background(_lowest_or(common, lowest), padding)
    low, high = _USUAL_AIR_HU
    if common is not None and low <= common <= high:
        return Background(common, padding)
    air = max(AIR_HU, lowest)
    if ct is None and common is not None and common > _CT_HU:
        warnings.warn(
            f"{volume.source or 'the scan'} goes down to {lowest:g} and is taken for a "
            f"CT, filled with {air:g} beyond, but {common:g} is the commonest value at "
            "its border; if it is no CT pass `moving_modality` mri, or `fill`",
            stacklevel=2,
        )
    return Background(air, padding)


def without_padding(volume: Volume) -> Volume:
    """Returns a scan with its padding replaced by the fill value, for display."""
    array = np.asarray(volume.array)
    if not np.fmin.reduce(array, axis=None) < _USUAL_AIR_HU[0]:
        return volume
    found = find(volume, ct=True)
    if found.padding is None:
        return volume
    filled = np.where(array <= found.padding, array.dtype.type(found.fill), array)
    return dataclasses.replace(volume, array=filled)


def looks_like_labels(array: np.ndarray) -> bool:
    """Whether values look like those of a label map: whole numbers in flat regions.

    Half of the neighbours are equal, where not both are the commonest value. In label
    maps of organs and of brain structures it is 70 % and more, in scans 20 % at most.

    Args:
      array: D H W.
    """
    depth = array.shape[0]
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, _SLICES)).astype(int))
    slices = array[chosen]
    if np.issubdtype(array.dtype, np.floating) and not np.all(
        np.rint(slices) == slices
    ):
        return False
    values, counts = np.unique(slices, return_counts=True)
    ground = slices == values[counts.argmax()]
    pairs = equal = 0
    for axis in (1, 2):
        ends = slice(None, -1), slice(1, None)
        one, other = ((slice(None),) * axis + (end,) for end in ends)
        counted = ~(ground[one] & ground[other])
        pairs += int(counted.sum())
        equal += int((counted & (slices[one] == slices[other])).sum())
    return pairs > 0 and 2 * equal >= pairs


_Counted = tuple[np.ndarray, np.ndarray]  # values in order, and how often each


def _counted(values: np.ndarray) -> _Counted:
    return np.unique(values[np.isfinite(values)], return_counts=True)


def _faces(array: np.ndarray) -> np.ndarray:
    """Returns the outermost voxels of an array D H W."""
    faces = [array.take(end, axis).ravel() for axis in range(3) for end in (0, -1)]
    return np.concatenate(faces)


def _commonest(values: np.ndarray, counts: np.ndarray) -> float | None:
    if not counts.size or counts.max() < _COMMON * counts.sum():
        return None
    return float(values[counts.argmax()])


def _lowest_or(common: float | None, lowest: float) -> float:
    if not lowest < 0:
        return 0.0
    return lowest if common is None else common


def _around(array: np.ndarray, lowest: float) -> float:
    if not lowest < 0:
        return 0.0
    return _lowest_or(_commonest(*_counted(_faces(array))), lowest)


def _padding(values: np.ndarray, counts: np.ndarray) -> float | None:
    least = max(_PADDED * counts.sum(), _LEAST)
    padded = (values < _USUAL_AIR_HU[0]) & (counts >= least)
    return float(values[padded].max()) if padded.any() else None


def _measured(array: np.ndarray, padding: float) -> tuple[_Counted, float]:
    """Returns the border's values and the scan's minimum, both without padding."""
    real = array > padding
    lowest = float(np.min(array, where=real, initial=array.max()))
    border = _faces(array)
    border = border[border > padding]
    # Of a circle that touches no face, what is common within it is around the body.
    return _counted(border if border.size else array[real]), lowest
