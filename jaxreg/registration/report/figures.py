"""Still pictures of a registration, by matplotlib.

Every picture is drawn on the fixed scan's grid, upright and in radiological convention
(the patient's right on the left), whatever the order of the stored axes. Figures are
built without pyplot, so that a notebook's own settings and figures stay untouched.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from jaxreg.registration.optimization.loop import LEVEL
from jaxreg.registration.report import planes as planes_lib
from jaxreg.registration.report.planes import PLANES, VIEWS, slice_of, upright
from jaxreg.space import background
from jaxreg.space.grid import Grid, Volume

_GRID_LINES_MM = 10.0
_COLUMNS = (
    *("moving before", "moving after", "fixed"),
    *("before (green) on fixed", "after (green) on fixed", "Jacobian, 10 mm grid"),
)
_SMALL_DPI = (72, 55, 40, 30, 20)
_SMALL_BYTES = 220_000  # in a notebook's base64 they are a third more
_PAGE_DPI = (110, 80, 60)
_PAGE_BYTES = 1_200_000


def scaled(array: np.ndarray, reference: Sequence[np.ndarray]) -> np.ndarray:
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
    left, right, top, bottom = VIEWS[plane].edges
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
    view = VIEWS[plane]
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


def _mapped_slice(
    displacement_mm: np.ndarray, fixed: Grid, plane: str, index: int
) -> np.ndarray:
    """Returns where a slice's voxels lie in moving space: rows columns 3, RAS+ mm."""
    grid = planes_lib.upright_grid(fixed)
    axes = [np.arange(n) for n in grid.shape]
    axes[VIEWS[plane].across] = np.array([index])
    voxels = slice_of(np.stack(np.meshgrid(*axes, indexing="ij"), -1), plane, 0)
    place = voxels @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    moved = slice_of(upright(displacement_mm, fixed), plane, index)
    return (place + moved).astype(np.float32)


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def before_after_figure(
    fixed: Volume, before: Volume, after: Volume, **extra: Any
) -> bytes:
    """Returns `draw_before_after` as a PNG; the arguments are the same."""
    return png(draw_before_after(fixed, before, after, **extra))


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
    spacing = planes_lib.upright_grid(fixed.grid).spacing_mm
    local = None if determinant is None else upright(determinant, fixed.grid)
    deformation = determinant is not None or displacement_mm is not None
    names = _COLUMNS if deformation else _COLUMNS[:-1]
    size = (2.6 * len(names), round(0.4 + 2.6 * len(planes), 1))
    figure = Picture(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(planes), len(names), squeeze=False)
    centre, drawn = planes_lib.centre(fixed), None
    for row, plane in enumerate(planes):
        view = VIEWS[plane]
        index = centre[view.across]
        aspect = spacing[view.vertical] / spacing[view.horizontal]
        cuts = [slice_of(a, plane, index) for a in (*arrays, still)]
        _draw_row(grid[row], plane, aspect, cuts)
        if deformation:
            mapped = displacement_mm is not None and _mapped_slice(
                displacement_mm, fixed.grid, plane, index
            )
            last = _draw_deformation(
                grid[row, -1],
                plane,
                aspect,
                None if local is None else slice_of(local, plane, index),
                None if mapped is False else mapped,
            )
            drawn = last or drawn
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=grid[:, -1], shrink=0.4, ticks=[0, 1, 2, 3])
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def thumbnail(fixed: Volume, before: Volume, after: Volume) -> bytes:
    """Returns a small PNG of `draw_before_after`; the arguments are the same."""
    return fitting(draw_before_after(fixed, before, after), _SMALL_DPI, _SMALL_BYTES)


def strip(fixed: Volume, before: Volume, after: Volume) -> bytes:
    """Returns a PNG of a hand's breadth: axial before, then all planes after.

    Colours as `overlay`; the arguments are those of `draw_before_after`.
    """
    fixed, before, after = map(background.without_padding, (fixed, before, after))
    (one, other), still = _shown(fixed, before, after)
    spacing = planes_lib.upright_grid(fixed.grid).spacing_mm
    figure = Figure(figsize=(4.8, 1.2), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4)
    centre = planes_lib.centre(fixed)
    for axes, plane, moved in zip(
        panels, ("axial", *PLANES), (one, other, other, other), strict=True
    ):
        view = VIEWS[plane]
        cuts = (slice_of(a, plane, centre[view.across]) for a in (moved, still))
        axes.imshow(
            overlay(*cuts), aspect=spacing[view.vertical] / spacing[view.horizontal]
        )
        _blank(axes)
    return png(figure, dpi=80)


def fitting(
    figure: Figure,
    resolutions: Sequence[int] = _PAGE_DPI,
    most_bytes: int = _PAGE_BYTES,
) -> bytes:
    """Returns the sharpest PNG of a figure below a size, or the least sharp one.

    Args:
      figure: to be drawn.
      resolutions: dots per inch, the best first.
      most_bytes: of the file.
    """
    data = b""
    for dpi in resolutions:
        data = png(figure, dpi=dpi)
        if len(data) <= most_bytes:
            break
    return data


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
    return [scaled(array, moved) for array in moved], scaled(still[0], still)


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


def level_starts(history: Mapping[str, np.ndarray]) -> list[int]:
    """Returns the steps at which loops of an optimisation begin, the first one apart.

    Args:
      history: numbers per step by name, among them `LEVEL` where there are several.
    """
    level = np.atleast_1d(np.asarray(history.get(LEVEL, ())))
    return [int(step) for step in 1 + np.flatnonzero(np.diff(level))]


def history_figure(history: Mapping[str, np.ndarray]) -> bytes:
    """Returns a PNG of the objective's parts over the optimisation steps.

    Dashed lines mark where the optimisation goes on at another level of resolution:
    values on either side of one are not of the same images.
    """
    parts = {k: np.atleast_1d(np.asarray(v)) for k, v in history.items() if k != LEVEL}
    parts = {k: v for k, v in parts.items() if v.ndim == 1 and v.size > 1}
    names = sorted(parts, key=lambda name: name != "loss")  # the whole before its parts
    starts = level_starts(history)
    across = min(max(len(parts), 1), 4)
    down = -(-max(len(parts), 1) // across)
    figure = Figure(figsize=(3.4 * across, 2.4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        axes.plot(np.arange(len(parts[name])), parts[name], color="#31688e")
        for step in starts:
            axes.axvline(step - 0.5, color="#888888", linewidth=0.8, linestyle="dashed")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(parts) :]:
        axes.set_axis_off()
    return png(figure)


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Returns a figure as a PNG; the same numbers give the same bytes."""
    buffer = io.BytesIO()
    # No software version in the file, which would differ from machine to machine.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
