"""The report of a registration: numbers, warnings, pictures and viewer on a page."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreg.io import files
from jaxreg.registration.report import cautions, figures, packing, registered
from jaxreg.registration.report import page as page_lib
from jaxreg.registration.report.figures import Picture
from jaxreg.registration.report.likeness import Likeness
from jaxreg.registration.report.page import Page
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space import transform as transform_lib


@dataclasses.dataclass(frozen=True)
class Known:
    """What a page says of a registration besides what it measures itself.

    Attributes:
      numbers: rows of the table, see `result.summary`.
      likeness: of the scans before and after.
      history: parts of the objective per step, by name.
      provenance: rows of a second table, see `provenance.provenance`.
      doubts: warnings of the registration, beside those of `cautions.cautions`.
      notes: sentences below the table.
    """

    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    likeness: Likeness | None = None
    history: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doubts: Sequence[str] = ()
    notes: Sequence[str] = ()


_NOTHING = Known()


def registration_figure(
    scans: ScanPair, transform: transform_lib.Transform, *, title: str | None = None
) -> Picture:
    """Returns `draw_before_after` of a registration, with its deformation.

    Args:
      scans: that were registered.
      transform: fixed mm to moving mm.
      title: a line above the pictures.
    """
    return _figure(registered.on_fixed_grid(scans, transform), title)


def _figure(found: registered.Registered, title: str | None = None) -> Picture:
    return figures.draw_before_after(
        found.fixed,
        found.before,
        found.after,
        displacement_mm=found.displacement_mm,
        determinant=found.determinant,
        title=title,
    )


def page_of(
    scans: ScanPair,
    transform: transform_lib.Transform,
    known: Known = _NOTHING,
    *,
    command: str | None = None,
) -> Page:
    """Returns the page of a registration; the arguments are those of `write_report`."""
    found = registered.on_fixed_grid(scans, transform)
    return _page(found, scans, known, command)[0]


def _page(
    found: registered.Registered, scans: ScanPair, known: Known, command: str | None
) -> tuple[Page, bytes]:
    """Returns the page, and its picture as a PNG."""
    measures = registered.measure(found)
    picture = figures.fitting(_figure(found))
    pictures = {"Before and after, on the fixed scan's grid": picture}
    if any(np.size(values) > 1 for values in known.history.values()):
        caption = "Objective by step"
        if figures.level_starts(known.history):
            caption += " (dashed: the next level begins)"
        pictures[caption] = figures.history_figure(known.history)
    names = (pathlib.PurePath(s.source).name for s in (scans.moving, scans.fixed))
    warned = [*cautions.cautions(measures, known.likeness), *known.doubts]
    rows = {**known.numbers, **_rows(measures, known.numbers)}
    content = page_lib.Content(
        title="Registration",
        subtitle=" onto ".join(names),
        cautions=warned,
        cards=_cards(measures, known.likeness),
        pictures=pictures,
        tables={
            "Numbers": rows,
            "Where it came from": known.provenance
            or {"fixed scan": scans.fixed.source, "moving scan": scans.moving.source},
        },
        label_table=_label_table(measures),
        command=command,
        notes=known.notes,
    )
    text = page_lib.html_page(content, functools.partial(packing.packed, found))
    return Page(text, rows, tuple(warned)), picture


def _cards(found: registered.Measures, likeness: Likeness | None) -> dict[str, str]:
    """Returns the numbers that come first, name to value with its unit."""
    cards = {}
    if likeness is not None:
        cards[f"{likeness.name} (less is better)"] = (
            f"{likeness.before:.4f} → {likeness.after:.4f}"
        )
    if found.dice is not None:
        before, after = found.dice
        cards["mean Dice of labels"] = f"{before:.3f} → {after:.3f}"
    low, _, high = found.volume_change
    return {
        **cards,
        "folded voxels": f"{found.folded_percent:.3g} %",
        "displacement (most)": (
            f"{found.displacement_mm[0]:.1f} mm ({found.displacement_mm[2]:.1f})"
        ),
        "volume change (98 %)": f"{low:.2f} to {high:.2f} ×",
        "without partner": f"{found.without_partner_percent:.1f} %",
    }


def _rows(found: registered.Measures, known: Mapping[str, str]) -> dict[str, str]:
    """Returns the numbers of the map on all of the fixed grid, but for known ones.

    A registration may have measured the same within a network's box alone.
    """
    mean, high, most = found.displacement_mm
    low, middle, large = found.volume_change
    rows = {
        "displacement": f"{mean:.2f} mm mean, {high:.2f} mm 95 %, {most:.2f} mm most",
        "Jacobian determinant": f"{low:.3f} (1 %), {middle:.3f}, {large:.3f} (99 %)",
    }
    for name, value in (
        ("folded voxels", f"{found.folded_percent:.4f} %"),
        ("SDlogJ", f"{found.sdlogj:.4f}"),
    ):
        if name not in known:
            rows[name] = value
        elif known[name] != value:
            rows[f"{name}, whole scan"] = value
    if found.dice is not None:
        before, after = found.dice
        rows["mean Dice of labels"] = f"{before:.4f} before, {after:.4f} after"
    return rows


_MOST_LABELS = 500


def _label_table(found: registered.Measures) -> list[tuple[str, ...]]:
    if not found.dice_by_label:
        return []
    rows = [
        (str(label), f"{before:.3f}", f"{after:.3f}")
        for label, (before, after) in found.dice_by_label.items()
    ]
    return [("label", "before", "after"), *rows[:_MOST_LABELS]]


def write_report(
    path: files.PathLike,
    scans: ScanPair,
    transform: transform_lib.Transform,
    known: Known = _NOTHING,
    *,
    command: str | None = None,
    picture: files.PathLike | None = None,
    thumbnail: files.PathLike | None = None,
) -> Page:
    """Writes the HTML page of a registration, and its picture as a PNG if asked.

    Args:
      path: the page.
      scans: that were registered; the outlines of their segmentations are drawn.
      transform: fixed mm to moving mm.
      known: what else there is to say.
      command: the command line, to be shown.
      picture: a PNG file of the first picture alone.
      thumbnail: a PNG file of small overlays, for `overview.write_overview`.

    Returns:
      The page.

    Raises:
      UserError: a file cannot be written.
    """
    found = registered.on_fixed_grid(scans, transform)
    page, data = _page(found, scans, known, command)
    if picture is not None:
        _write_bytes(picture, data)
    if thumbnail is not None:
        strip = figures.strip(found.fixed, found.before, found.after)
        _write_bytes(thumbnail, strip)
    page.save(path)
    return page


def _write_bytes(path: files.PathLike, data: bytes) -> None:
    with files.atomic_path(path) as unfinished:
        unfinished.write_bytes(data)
