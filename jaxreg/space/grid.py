"""Grids: axis order and the three frames, voxel, unit and mm.

* voxel: continuous array index (d, h, w) of ``array[d, h, w]``; integers are centres.
  ``array[d, h, w] == nifti[w, h, d]``, so (d, h, w) is ITK's (k, j, i).
* unit: ``voxel / (n - 1)`` per axis, 0 at the first centre and 1 at the last. On an
  axis of one voxel the scale is 1: unit and voxel coordinates are the same number.
* mm: RAS+ world coordinates (x, y, z), NIfTI's frame. LPS exists only in `jaxreg.io`.

Geometry is small and exact: NumPy, float64, on the host.
"""

import dataclasses

import numpy as np

Shape = tuple[int, ...]
"""Voxels per array axis, always three: (D, H, W)."""
_ROUNDING = 1e-3  # of a voxel: more than float32 coordinates of a scan are off by

ROUNDING_VOXELS = 0.01
"""Grids whose corners lie closer than this part of a voxel are one: a header's digits.
"""


def unit_scale(shape: Shape) -> np.ndarray:
    """Returns voxels per unit, shape (3,): n - 1, and 1 on an axis of one voxel."""
    return np.maximum(np.asarray(shape, np.float64) - 1.0, 1.0)


def unit_to_voxel(shape: Shape) -> np.ndarray:
    """Returns the 4x4 matrix from unit to voxel coordinates of an array of `shape`."""
    return np.diag([*unit_scale(shape), 1.0])


def resize_to_source(source: Shape, target: Shape) -> np.ndarray:
    """Returns the 4x4 matrix from target voxel to source voxel of a half-pixel resize.

    Centres and extents of both grids coincide: ``i = (q + 0.5) * N / n - 0.5``.
    """
    ratio = np.asarray(source, np.float64) / np.asarray(target, np.float64)
    matrix = np.diag([*ratio, 1.0])
    matrix[:3, 3] = 0.5 * ratio - 0.5
    return matrix


@dataclasses.dataclass(frozen=True)
class Grid:
    """A regular lattice of voxels in world space.

    Attributes:
      shape: voxels per array axis, (D, H, W).
      affine_mm: 4x4 float64, array index (d, h, w, 1) to RAS+ mm (x, y, z, 1).
    """

    shape: Shape
    affine_mm: np.ndarray

    @property
    def voxel_to_mm(self) -> np.ndarray:
        """The 4x4 matrix from voxel (d, h, w) to RAS+ mm (x, y, z)."""
        return self.affine_mm

    @property
    def unit_to_mm(self) -> np.ndarray:
        """The 4x4 matrix from unit coordinates to RAS+ mm."""
        return self.affine_mm @ unit_to_voxel(self.shape)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbouring voxel centres along each array axis, (3,)."""
        return np.linalg.norm(self.affine_mm[:3, :3], axis=0)

    def resized(self, shape: Shape) -> "Grid":
        """Returns the grid of a half-pixel resize to `shape`: the same extent in mm."""
        return Grid(shape, self.affine_mm @ resize_to_source(self.shape, shape))

    def resized_aligned(self, shape: Shape) -> "Grid":
        """Returns the grid of a resize to `shape` that keeps the corners' centres.

        On an axis with one voxel, here or there, the first centre stays.
        """
        ratio = unit_scale(self.shape) / unit_scale(shape)
        return Grid(shape, self.affine_mm @ np.diag([*ratio, 1.0]))

    def centred(self, shape: Shape, spacing_mm: float) -> "Grid":
        """Returns a grid of isotropic voxels with this one's directions and centre."""
        ratio = spacing_mm / self.spacing_mm
        matrix = np.diag([*ratio, 1.0])
        middle, there = ((np.asarray(s) - 1) / 2 for s in (self.shape, shape))
        matrix[:3, 3] = middle - ratio * there
        return Grid(shape, self.affine_mm @ matrix)

    def transposed(self) -> "Grid":
        """Returns the grid of the array with its axes in reverse order."""
        return Grid(self.shape[::-1], self.affine_mm[:, [2, 1, 0, 3]])

    def gap_mm(self, other: "Grid") -> float:
        """Returns the largest distance between equal corners; infinite by shape."""
        if tuple(self.shape) != tuple(other.shape):
            return np.inf
        gap = _corners(self.shape) @ (self.affine_mm - other.affine_mm).T
        return float(np.linalg.norm(gap[:, :3], axis=1).max())

    def gap_voxels(self, other: "Grid") -> float:
        """Returns how far equal corners lie apart along an axis of this grid at most.

        In this grid's voxels; infinite where the shapes differ.
        """
        if tuple(self.shape) != tuple(other.shape):
            return np.inf
        corners = _corners(self.shape)
        there = corners @ (np.linalg.inv(self.affine_mm) @ other.affine_mm).T
        return float(np.abs(there - corners).max())

    def matches(self, other: "Grid", *, tolerance_mm: float | None = None) -> bool:
        """Whether both grids have one shape and the same corners.

        Args:
          other: the other grid.
          tolerance_mm: how far corners may lie apart; `ROUNDING_VOXELS` of this grid's
            voxels if None.
        """
        if tolerance_mm is None:
            return self.gap_voxels(other) <= ROUNDING_VOXELS
        return self.gap_mm(other) <= tolerance_mm

    def padding(self, other: "Grid") -> np.ndarray:
        """Returns how many voxels must be added to cover another grid, (3, 2).

        Before and after each axis. Nothing where it covers all of the other's voxel
        centres by its own voxels' extent; else as much as covers their extents.
        """
        to_index = np.linalg.inv(self.affine_mm) @ other.affine_mm
        last = np.asarray(self.shape) - 1.0
        lacking = []
        for half in (0.0, 0.5):  # to the outer centres, to the outer faces
            ends = np.stack([np.full(3, -half), np.asarray(other.shape) - 1 + half])
            bits = np.array(list(np.ndindex(2, 2, 2)))
            corners = ends[bits, np.arange(3)] @ to_index[:3, :3].T + to_index[:3, 3]
            overhang = np.stack([-corners.min(0), corners.max(0) - last], -1) - 0.5
            lacking.append(overhang)
        if (lacking[0] < -_ROUNDING).all():
            return np.zeros((3, 2), int)
        return np.maximum(np.ceil(lacking[1] - _ROUNDING), 0).astype(int)

    def padded(self, padding: np.ndarray) -> "Grid":
        """Returns this grid with voxels added before and after each axis, (3, 2)."""
        matrix = np.eye(4)
        matrix[:3, 3] = -padding[:, 0]
        shape = tuple(int(n) for n in self.shape + padding.sum(1))
        return Grid(shape, self.affine_mm @ matrix)

    def within(self, other: "Grid") -> "Grid":
        """Returns the part whose voxel centres lie between another's outer centres.

        The axes of both are parallel, in one order. An axis without two such voxels
        stays whole.
        """
        to_index = np.linalg.inv(other.affine_mm) @ self.affine_mm
        matrix, shape = np.eye(4), list(self.shape)
        for axis, n in enumerate(other.shape):
            at = to_index[axis, 3] + to_index[axis, axis] * np.arange(shape[axis])
            inside = np.flatnonzero((at >= -_ROUNDING) & (at <= n - 1 + _ROUNDING))
            if inside.size > 1:
                matrix[axis, 3], shape[axis] = inside[0], inside.size
        return Grid(tuple(shape), self.affine_mm @ matrix)


def _corners(shape: Shape) -> np.ndarray:
    """Returns the indices of the corner voxels, homogeneous, 8 x 4."""
    last = np.asarray(shape) - 1
    return np.array([[*(last * bits), 1.0] for bits in np.ndindex(2, 2, 2)], np.float64)


@dataclasses.dataclass(frozen=True)
class Volume:
    """One scan or label map in world space.

    Attributes:
      array: (D, H, W), a NumPy array in the stored unit of intensity.
      grid: its place in world space; ``grid.shape == array.shape``.
      source: what to call the volume in a message, usually its path.
    """

    array: np.ndarray
    grid: Grid
    source: str = "volume"

    def __post_init__(self):
        """Checks that array and grid agree."""
        if tuple(self.array.shape) != tuple(self.grid.shape):
            raise ValueError(
                f"array has shape {self.array.shape}, its grid {self.grid.shape}"
            )

    def transposed(self) -> "Volume":
        """Returns the same scan with its array axes in reverse order; a view."""
        return Volume(self.array.T, self.grid.transposed(), self.source)
