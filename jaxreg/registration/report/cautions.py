"""Warnings of a report: what to look at before a registration is used."""

from collections.abc import Iterator

from jaxreg.registration.report.likeness import Likeness
from jaxreg.registration.report.registered import Measures

_EDGE, _POOR = 2.0, 50.0  # per cent of the foreground
_GAIN = 1e-4  # of a loss, below which it is as it was
_LARGEST_CHANGE = 5.0  # of a volume, that organs of two people may differ by


def cautions(found: Measures, likeness: Likeness | None = None) -> list[str]:
    """Returns what a reader should look at before using a registration, in sentences.

    Args:
      found: of the map.
      likeness: of the scans, if it was measured.
    """
    worse = [] if likeness is None else _worse_than_start(likeness)
    return [*_of_map(found), *worse, *_of_labels(found), *_of_overlap(found)]


def _of_map(found: Measures) -> Iterator[str]:
    if found.folded_percent > 50:
        yield (
            "The map mirrors the scan: the Jacobian determinant is negative in "
            f"{found.folded_percent:.0f} % of the voxels. Check left and right in both "
            "headers."
        )
        return
    if found.folded_percent > 0:
        yield (
            f"The map folds in {found.folded_percent:.2g} % of the voxels (yellow in "
            "the Jacobian), which no anatomy does."
        )
    low, _, high = found.volume_change
    if 0 < low < 1 / _LARGEST_CHANGE:
        yield f"Volumes shrink to less than {low:.2g} times in 1 % of the voxels."
    if high > _LARGEST_CHANGE:
        yield f"Volumes grow to more than {high:.2g} times in 1 % of the voxels."


def _worse_than_start(likeness: Likeness) -> Iterator[str]:
    for name, value in (
        ("where the headers place them", likeness.before),
        ("after the pre-alignment alone", likeness.prealigned),
    ):
        if value is not None and likeness.after > value + _GAIN:
            yield (
                f"The start is better than the end: the scans are more alike {name} "
                f"({likeness.name} {value:.4f}) than after the registration "
                f"({likeness.after:.4f})."
            )


def _of_labels(found: Measures) -> Iterator[str]:
    if found.dice is not None and found.dice[1] < found.dice[0]:
        yield (
            f"The labels overlap less than before: mean Dice {found.dice[1]:.3f}, "
            f"before {found.dice[0]:.3f}."
        )


def _of_overlap(found: Measures) -> Iterator[str]:
    outside = found.without_partner_percent
    if outside > _POOR:
        yield (
            f"Poor overlap: {outside:.0f} % of the fixed scan's foreground has no "
            "partner in the moving scan."
        )
    elif outside > _EDGE:
        yield (
            f"Edge of the field of view: {outside:.1f} % of the fixed scan's "
            "foreground has no partner in the moving scan; there the warped scan shows "
            "its fill value."
        )
    if found.beyond_percent > 0:
        yield (
            f"{found.beyond_percent:.2g} % of the fixed scan lies beyond the "
            "transform's displacement field, which displaces nothing there."
        )
    if found.blank:
        yield "The warped scan shows nothing: all of it has one value."
