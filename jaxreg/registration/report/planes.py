"""Anatomical planes: upright arrays, and slices as radiologists look at them.

Upright axes run towards the patient's right, front and top; a picture has the patient's
right (axial, coronal) or front (sagittal) on its left.
"""

import dataclasses

import numpy as np
from nibabel import orientations

from jaxreg.space.grid import Grid, Volume


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


VIEWS = {
    "axial": Plane(2, 0, 1, ("R", "L", "A", "P")),
    "coronal": Plane(1, 0, 2, ("R", "L", "S", "I")),
    "sagittal": Plane(0, 1, 2, ("A", "P", "S", "I")),
}
PLANES = tuple(VIEWS)


def upright(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Returns a view of the array with axes towards right, anterior, superior.

    An oblique grid goes to the nearest order of axes.

    Args:
      array: D H W, or D H W C with the channels left alone.
      grid: the array's place in world space.
    """
    order = orientations.io_orientation(grid.affine_mm)
    return orientations.apply_orientation(array, order)


def upright_grid(grid: Grid) -> Grid:
    """Returns the place of an upright array: axes right, anterior, superior."""
    order = orientations.io_orientation(grid.affine_mm)
    shape = np.asarray(grid.shape)[np.argsort(order[:, 0])]
    back = orientations.inv_ornt_aff(order, grid.shape)
    return Grid(tuple(int(n) for n in shape), grid.affine_mm @ back)


def slice_of(array: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Returns one slice of an upright array as a picture: rows from top to bottom.

    The patient's right (axial, coronal) or front (sagittal) is on the left.
    """
    view = VIEWS[plane]
    picture = array[(*[slice(None)] * view.across, index)]  # horizontal, vertical
    return np.swapaxes(picture, 0, 1)[::-1, ::-1]


def centre(volume: Volume) -> tuple[int, int, int]:
    """Returns the upright index of the brightness's centre: slices that show much."""
    array = upright(np.asarray(volume.array), volume.grid)[::2, ::2, ::2]
    low, high = np.quantile(array.astype(np.float32), [0.01, 0.99])
    weight = np.clip(array.astype(np.float32), low, high) - low
    total = float(weight.sum())
    if not total > 0:
        return tuple(n - 1 for n in array.shape)  # type: ignore[return-value]
    found = []
    for axis in range(3):
        profile = weight.sum(axis=tuple(i for i in range(3) if i != axis))
        found.append(int(round(2 * float(profile @ np.arange(len(profile))) / total)))
    return tuple(found)  # type: ignore[return-value]
