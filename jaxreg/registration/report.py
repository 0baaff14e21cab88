"""Pictures of a registration, and one self-contained HTML page around them.

Every picture is drawn on the fixed scan's grid, upright and in radiological convention
(the patient's right on the left), whatever the order of the stored axes. Figures are
built without pyplot, so that a notebook's own settings and figures stay untouched.
"""

import base64
import dataclasses
import html
import io
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from nibabel import orientations

from jaxreg.io import files
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space import background, warping
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume

PLANES = ("axial", "coronal", "sagittal")
_GRID_LINES_MM = 10.0
_COLUMNS = (
    *("moving before", "moving after", "fixed"),
    *("before (green) on fixed", "after (green) on fixed", "Jacobian, 10 mm grid"),
)
_THUMBNAIL_DPI = (72, 55, 40, 30, 20)  # the first that is small enough
_THUMBNAIL_BYTES = 220_000  # in a notebook's base64 they are a third more


@dataclasses.dataclass(frozen=True)
class Plane:
    """How one anatomical plane is cut out of an upright array.

    Attributes:
      across: the world axis (0 x, 1 y, 2 z) that the plane is perpendicular to.
      horizontal: the world axis that runs along the picture's width, reversed.
      vertical: the world axis that runs up the picture.
      edges: what lies left, right, at the top and at the bottom.
    """

    across: int
    horizontal: int
    vertical: int
    edges: tuple[str, str, str, str]


_PLANES = {
    "axial": Plane(2, 0, 1, ("R", "L", "A", "P")),
    "coronal": Plane(1, 0, 2, ("R", "L", "S", "I")),
    "sagittal": Plane(0, 1, 2, ("A", "P", "S", "I")),
}


def upright(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Returns a view of the array with axes towards right, anterior, superior.

    An oblique grid goes to the nearest order of axes.

    Args:
      array: D H W, or D H W C with the channels left alone.
      grid: the array's place in world space.
    """
    order = orientations.io_orientation(grid.affine_mm)
    return orientations.apply_orientation(array, order)


def _upright_spacing_mm(grid: Grid) -> np.ndarray:
    order = orientations.io_orientation(grid.affine_mm)[:, 0].astype(int)
    return grid.spacing_mm[np.argsort(order)]


def slice_of(array: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Returns one slice of an upright array as a picture: rows from top to bottom.

    The patient's right (axial, coronal) or front (sagittal) is on the left.
    """
    view = _PLANES[plane]
    picture = np.take(array, index, axis=view.across)  # horizontal, vertical
    return np.swapaxes(picture, 0, 1)[::-1, ::-1]


def _centre(volume: Volume) -> tuple[int, int, int]:
    """Returns the upright index of the brightness's centre: slices that show much."""
    array = upright(np.asarray(volume.array), volume.grid)[::2, ::2, ::2]
    low, high = np.quantile(array.astype(np.float32), [0.01, 0.99])
    weight = np.clip(array.astype(np.float32), low, high) - low
    total = float(weight.sum())
    if not total > 0:
        return tuple(n - 1 for n in array.shape)  # type: ignore[return-value]
    centre = []
    for axis in range(3):
        profile = weight.sum(axis=tuple(i for i in range(3) if i != axis))
        centre.append(int(round(2 * float(profile @ np.arange(len(profile))) / total)))
    return tuple(centre)  # type: ignore[return-value]


def _scaled(array: np.ndarray, reference: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the array between the 0.5 and 99.5 % quantiles of the references."""
    values = np.concatenate([r[::3, ::3, ::3].ravel() for r in reference])
    values = values[np.isfinite(values)].astype(np.float32)
    low, high = np.quantile(values, [0.005, 0.995]) if values.size else (0.0, 1.0)
    if not high > low:
        high = low + 1.0
    return np.clip((array.astype(np.float32) - low) / (high - low), 0.0, 1.0)


def overlay(moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Returns an RGB picture: moving green, fixed magenta, grey where they agree."""
    return np.stack([fixed, moving, fixed], axis=-1)


def _letters(axes: Axes, plane: str) -> None:
    left, right, top, bottom = _PLANES[plane].edges
    for x, y, letter in (
        (0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.98, top), (0.5, 0.02, bottom),
    ):  # fmt: skip
        axes.text(
            x, y, letter, color="#ffd23f", fontsize=8, transform=axes.transAxes,
            ha={0.02: "left", 0.98: "right"}.get(x, "center"),
            va={0.02: "bottom", 0.98: "top"}.get(y, "center"),
        )  # fmt: skip


def _blank(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")


def _draw_deformation(axes: Axes, plane, aspect, determinant, mapped_mm):
    """Draws the determinant in colour, and lines of constant moving coordinate."""
    view = _PLANES[plane]
    drawn = None
    if determinant is not None:
        drawn = axes.imshow(
            np.clip(determinant, 0.0, 3.0),
            cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, 3.0), aspect=aspect,
            interpolation="nearest",
        )  # fmt: skip
        if np.any(determinant <= 0):
            folded = np.zeros((*determinant.shape, 4))
            folded[determinant <= 0] = (1.0, 0.9, 0.0, 1.0)
            axes.imshow(folded, aspect=aspect, interpolation="nearest")
    if mapped_mm is not None:
        for component in (view.horizontal, view.vertical):
            values = mapped_mm[..., component]
            if min(values.shape) < 2:
                continue
            first = np.floor(values.min() / _GRID_LINES_MM)
            last = np.ceil(values.max() / _GRID_LINES_MM)
            levels = np.arange(first, last + 1) * _GRID_LINES_MM
            if 1 < len(levels) < 400:
                axes.contour(
                    values, levels=levels, colors="black", linewidths=0.5,
                    linestyles="solid",
                )  # fmt: skip
        axes.set_xlim(-0.5, mapped_mm.shape[1] - 0.5)
        axes.set_ylim(mapped_mm.shape[0] - 0.5, -0.5)
        axes.set_aspect(aspect)
    return drawn


def _mapped_mm(displacement_mm: np.ndarray | None, fixed: Grid) -> np.ndarray | None:
    """Returns where the fixed voxels lie in moving space, D H W 3, RAS+ mm."""
    if displacement_mm is None:
        return None
    index = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"), -1)
    place = index @ fixed.affine_mm[:3, :3].T + fixed.affine_mm[:3, 3]
    return (place + displacement_mm).astype(np.float32)


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        return _png(self)


def before_after_figure(
    fixed: Volume, before: Volume, after: Volume, **extra: Any
) -> bytes:
    """Returns `draw_before_after` as a PNG; the arguments are the same."""
    return _png(draw_before_after(fixed, before, after, **extra))


def draw_before_after(
    fixed: Volume,
    before: Volume,
    after: Volume,
    *,
    displacement_mm: np.ndarray | None = None,
    determinant: np.ndarray | None = None,
    title: str | None = None,
    planes: Sequence[str] = PLANES,
) -> Picture:
    """Returns a figure: planes of moving before and after, fixed, and overlays.

    Args:
      fixed: the fixed scan.
      before: the moving scan resampled on the fixed grid without registration.
      after: the moving scan resampled on the fixed grid through the transform.
      displacement_mm: D H W 3, RAS+ mm on the fixed grid, to draw the deformed grid;
        lines are 10 mm apart in moving space.
      determinant: D H W, Jacobian determinant on the fixed grid, drawn in colour from
        0 (blue) over 1 (white) to 3 (red), with folded voxels in yellow.
      title: a line above the pictures.
      planes: a row of pictures for each of these, of `PLANES`.

    Raises:
      ValueError: a volume is not on the fixed grid.
    """
    # Padding far below air would leave the eye a narrow part of the grey scale.
    fixed, before, after = map(background.without_padding, (fixed, before, after))
    arrays, still = _shown(fixed, before, after)
    spacing = _upright_spacing_mm(fixed.grid)
    parts = [
        None if a is None else upright(a, fixed.grid)
        for a in (determinant, _mapped_mm(displacement_mm, fixed.grid))
    ]
    deformation = any(part is not None for part in parts)
    names = _COLUMNS if deformation else _COLUMNS[:-1]
    size = (2.6 * len(names), round(0.4 + 2.6 * len(planes), 1))
    figure = Picture(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(planes), len(names), squeeze=False)
    centre, drawn = _centre(fixed), None
    for row, plane in enumerate(planes):
        view = _PLANES[plane]
        aspect = spacing[view.vertical] / spacing[view.horizontal]
        cuts = [
            None if a is None else slice_of(a, plane, centre[view.across])
            for a in (*arrays, still, *parts)
        ]
        _draw_row(grid[row], plane, aspect, cuts[:3])
        if deformation:
            last = _draw_deformation(grid[row, -1], plane, aspect, *cuts[3:])
            drawn = last or drawn
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=grid[:, -1], shrink=0.4, ticks=[0, 1, 2, 3])
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def registration_figure(
    scans: ScanPair, transform: transform_lib.Transform, *, title: str | None = None
) -> Picture:
    """Returns `draw_before_after` of a registration, with its deformation.

    Args:
      scans: that were registered.
      transform: fixed mm to moving mm.
      title: a line above the pictures.
    """
    fixed = scans.fixed
    before, after = (
        warping.warp_volume(scans.moving, mapping, fixed.grid, fill=scans.background)
        for mapping in (transform_lib.Transform(()), transform)
    )
    return draw_before_after(
        fixed,
        before,
        after,
        displacement_mm=warping.displacement_mm(transform, fixed.grid),
        determinant=warping.jacobian_map(transform, fixed.grid),
        title=title,
    )


def thumbnail(fixed: Volume, before: Volume, after: Volume) -> bytes:
    """Returns a small PNG of `draw_before_after`; the arguments are the same."""
    figure = draw_before_after(fixed, before, after)
    pictures = (_png(figure, dpi=dpi) for dpi in _THUMBNAIL_DPI)
    return next(data for data in pictures if len(data) <= _THUMBNAIL_BYTES)


def _shown(fixed: Volume, before: Volume, after: Volume):
    """Returns [before, after], fixed: upright, scaled to [0, 1] for the eye."""
    for volume in (before, after):
        if volume.grid.shape != fixed.grid.shape:
            raise ValueError(
                f"{volume.source} has shape {volume.grid.shape}, "
                f"the fixed grid {fixed.grid.shape}"
            )
    moved, still = (
        [np.nan_to_num(upright(v.array, fixed.grid)) for v in volumes]
        for volumes in ((before, after), (fixed,))
    )
    return [_scaled(array, moved) for array in moved], _scaled(still[0], still)


def _draw_row(row, plane: str, aspect: float, cuts) -> None:
    """Draws one plane of before, after, fixed and the two overlays."""
    pictures = [*cuts, overlay(cuts[0], cuts[2]), overlay(cuts[1], cuts[2])]
    for axes, picture in zip(row, pictures, strict=False):
        axes.imshow(
            picture, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest"
        )
        _letters(axes, plane)
    for axes in row:
        _blank(axes)
    row[0].set_ylabel(plane, fontsize=9)


def history_figure(history: Mapping[str, np.ndarray]) -> bytes:
    """Returns a PNG of the objective's parts over the optimisation steps."""
    parts = {k: np.atleast_1d(np.asarray(v)) for k, v in history.items()}
    parts = {k: v for k, v in parts.items() if v.ndim == 1 and v.size > 1}
    figure = Figure(figsize=(3.2 * max(len(parts), 1), 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(
        np.atleast_1d(figure.subplots(1, max(len(parts), 1))), parts.items(),
        strict=False,
    ):  # fmt: skip
        axes.plot(np.arange(len(values)), values, color="#31688e")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
    return _png(figure)


def _png(figure: Figure, *, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    # No software version in the file: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; color: #222; }
img { max-width: 100%; }
table { border-collapse: collapse; }
td { border-top: 1px solid #ddd; padding: .25em 1.5em .25em 0; }
td + td { font-variant-numeric: tabular-nums; }
pre { background: #f4f4f4; padding: .75em; white-space: pre-wrap;
      overflow-wrap: anywhere; }
"""


def inline_image(data: bytes, caption: str) -> str:
    """Returns an HTML image that holds its PNG."""
    return (
        f'<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def html_page(
    *,
    title: str,
    numbers: Mapping[str, str],
    pictures: Mapping[str, bytes],
    command: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Returns a page without outside references: PNGs inline, all text escaped.

    Args:
      title: the page's heading.
      numbers: rows of the table, name to value.
      pictures: PNG data by caption.
      command: the command line that made it.
      notes: sentences below the table.
    """
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in numbers.items()
    )
    figures = "\n".join(
        f"<h2>{html.escape(caption)}</h2>\n{inline_image(data, caption)}"
        for caption, data in pictures.items()
    )
    ran = f"<h2>Command</h2>\n<pre>{html.escape(command)}</pre>" if command else ""
    remarks = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n<table>\n{rows}\n</table>\n"
        f"{remarks}\n{figures}\n{ran}\n</body>\n</html>\n"
    )


def write_html(path: str | os.PathLike, page: str) -> None:
    """Writes a page of `html_page` to a file, which appears whole or not at all."""
    with files.atomic_path(path) as unfinished:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(page)


def write_report(
    path: files.PathLike,
    scans: ScanPair,
    transform: transform_lib.Transform,
    *,
    numbers: Mapping[str, str],
    history: Mapping[str, np.ndarray] = MappingProxyType({}),
    command: str | None = None,
    picture: files.PathLike | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes the HTML page of a registration, and its picture as a PNG if asked.

    Args:
      path: the page.
      scans: that were registered.
      transform: fixed mm to moving mm.
      numbers: rows of the table, see `result.summary`.
      history: parts of the objective per step, by name.
      command: the command line, to be shown.
      picture: a PNG file of the first picture alone.
      notes: sentences below the table.

    Raises:
      UserError: a file cannot be written.
    """
    data = _png(registration_figure(scans, transform))
    if picture is not None:
        with files.atomic_path(picture) as unfinished:
            unfinished.write_bytes(data)
    pictures = {"Before and after, on the fixed scan's grid": data}
    if any(np.size(values) > 1 for values in history.values()):
        pictures["Objective by step"] = history_figure(history)
    sources = {"moving": scans.moving.source, "fixed": scans.fixed.source}
    page = html_page(
        title="Registration",
        numbers={**sources, **numbers},
        pictures=pictures,
        command=command,
        notes=notes,
    )
    write_html(path, page)
