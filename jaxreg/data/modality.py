"""Names of modalities, their rule of intensities and their contrast."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from jaxreg.space import background
from jaxreg.space.grid import Volume

Modality = Literal["ct", "mri"]
KINDS: tuple[Modality, ...] = get_args(Modality)
AUTO = "auto"
"""In the place of a modality: what the values say, see `guessed`."""


_CT = frozenset(("ct", "cbct", "fbct", "cect", "ncct", "ldct", "hrct", "cta"))
_NEARLY_ALL = (0.001, 0.999)
_HOUNSFIELD = 90.0  # units: fat, which every CT shows, is below their negative
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
"""Names of modalities to their contrast; "mri" where it is not known."""


def canonical(modality: str) -> str:
    """Returns the key of `CONTRASTS` that a free word is, else that of its `kind`."""
    word = modality.strip().lower()
    return word if word in CONTRASTS else kind(word)


def same_contrast(first: str, second: str) -> bool:
    """Whether two modalities may show tissue alike, so that intensities compare.

    CT, ultrasound, PET and MR never do, T1 and T2 do not; an MR of unknown
    contrast ("mr", "mri") may be like any other MR.

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


def guessed(volume: Volume) -> Modality:
    """Returns which rule of intensities the values of a scan ask for.

    Hounsfield units go far below 0 and above; what else does is taken for MR.
    """
    values = volume.array[np.isfinite(volume.array)]
    if not values.size:
        return "mri"
    low, high = np.quantile(values, _NEARLY_ALL)
    return "ct" if low <= -_HOUNSFIELD and high >= _HOUNSFIELD else "mri"


def settled(modality: str, volume: Volume) -> str:
    """Returns the modality of a scan, by its values where it is "auto"."""
    return guessed(volume) if modality == AUTO else modality


def background_of(
    modality: str | None,
    volume: Volume,
    fill: float | None = None,
    *,
    nearest: bool = False,
) -> background.Background:
    """Returns the fill value of a warped scan, and which of its voxels are padding.

    Args:
      modality: see `kind`; None and "auto" go by the values.
      volume: the scan, in its stored unit.
      fill: see `background.find`.
      nearest: see `background.find`.
    """
    ct = None if modality in (None, AUTO) else kind(modality) == "ct"
    return background.find(volume, ct=ct, nearest=nearest, fill=fill)
