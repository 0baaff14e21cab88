"""ITK's displacement-field and B-spline transforms: parameters to vectors on a grid.

Frame: the file's own, LPS mm, components in x, y, z. Arrays are D H W 3.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxreg.space.grid import Shape, unit_to_voxel

TOLERANCE_MM = 0.01
"""How far a B-spline's samples, read linearly, may be from it, as memory allows."""

# A field ends half a sample outside its last one, a B-spline with its domain.
_COARSEST_MM = 4.0
_MOST_SAMPLES = 2**24  # of a B-spline: 200 MB in float32
REVERSE = np.eye(4)[[2, 1, 0, 3]]  # d, h, w to x, y, z and back
_GEOMETRY = 18  # fixed parameters: size, origin, spacing, direction


def is_field(kind: str) -> bool:
    """Whether the parameters of an ITK class are a displacement field's."""
    return kind.endswith("DisplacementFieldTransform")


def is_spline(kind: str) -> bool:
    """Whether the parameters of an ITK class are a B-spline's."""
    return kind in ("BSplineTransform", "BSplineDeformableTransform")


def displacement(
    parameters: np.ndarray, fixed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors D H W 3 and the 4x4 matrix from unit coordinates to mm.

    Args:
      parameters: 3 D H W, float64, vector by vector, x fastest.
      fixed: 18: size, origin, spacing, direction.

    Raises:
      ValueError: says what does not fit.
    """
    shape, voxel_to_file = _geometry(parameters, fixed)
    unit_to_file = voxel_to_file @ unit_to_voxel(shape)
    return parameters.reshape(*shape, 3), unit_to_file


def spline(
    parameters: np.ndarray, fixed: np.ndarray, order: int = 3
) -> tuple[np.ndarray, np.ndarray, float]:
    """Samples a B-spline over its domain, outside of which ITK displaces nothing.

    The samples divide each interval of control points into as many parts as
    `TOLERANCE_MM` needs: linear reading between samples h apart is wrong by at most
    ``h^2 max|u''| / 8``, and ``u''`` is at most the largest second difference of the
    control points over the square of their distance.

    Args:
      parameters: 3 D H W, float64, all of x, then y, then z, x fastest.
      fixed: 18: size, origin, spacing and direction of the control points.
      order: 1 to 3.

    Returns:
      (vectors D H W 3, matrix from unit coordinates to mm, largest possible error in
      mm of reading them linearly).

    Raises:
      ValueError: says what does not fit.
    """
    shape, voxel_to_file = _geometry(parameters, fixed)
    if min(shape) <= order:
        raise ValueError(
            f"a B-spline of order {order} needs {order + 1} control points, has "
            f"{min(shape)}"
        )
    vectors = np.moveaxis(parameters.reshape(3, *shape), 0, -1)
    d, h, w = shape
    if not np.isfinite(vectors).all():
        raise ValueError("not all of its control points are finite")
    curvatures = [
        float(np.linalg.norm(np.diff(vectors, 2, axis), axis=-1).max())
        if order > 1
        else 0.0
        for axis in range(3)
    ]
    if not np.isfinite(curvatures).all():
        raise ValueError("its control points lie too far apart to sample between")
    intervals = [n - order for n in shape]
    steps_mm = np.linalg.norm(voxel_to_file[:3, :3], axis=0)
    parts = _parts(intervals, steps_mm, curvatures)
    if not parts:
        raise ValueError(f"{w} x {h} x {d} control points are too many to sample")
    for axis, (count, divided) in enumerate(zip(intervals, parts, strict=True)):
        weights = _weights(count, divided, order)
        vectors = np.moveaxis(np.tensordot(weights, vectors, (1, axis)), 0, axis)
    d, h, w = vectors.shape[:3]
    # A cubic one's domain starts at the second control point.
    to_control = np.diag([*(1.0 / np.asarray(parts)), 1.0])
    to_control[:3, 3] = (order - 1) / 2
    error = sum(c / (8 * p * p) for c, p in zip(curvatures, parts, strict=True))
    matrix = voxel_to_file @ to_control @ unit_to_voxel((d, h, w))
    return vectors, matrix, error


def _parts(
    intervals: Sequence[int], steps_mm: np.ndarray, curvatures: Sequence[float]
) -> list[int]:
    """Returns into how many parts each axis's intervals are divided; [] if too many.

    Args:
      intervals: of control points along each axis.
      steps_mm: their lengths.
      curvatures: largest second differences of the control points, mm.
    """
    parts = [
        max(
            math.ceil(math.sqrt(3 * curvature / (8 * TOLERANCE_MM))),
            math.ceil(min(step / _COARSEST_MM, _MOST_SAMPLES)),
            1,
        )
        for curvature, step in zip(curvatures, steps_mm, strict=True)
    ]
    while (
        math.prod(i * p + 1 for i, p in zip(intervals, parts, strict=True))
        > _MOST_SAMPLES
    ):
        if max(parts) == 1:
            return []
        parts = [max(1, int(0.8 * p)) for p in parts]
    return parts


def _weights(intervals: int, parts: int, order: int) -> np.ndarray:
    """Weights of intervals + order control points at parts * intervals + 1 places."""
    place = np.arange(intervals * parts + 1) / parts
    first = np.minimum(place.astype(int), intervals - 1)
    t = place - first
    basis = {
        1: (1 - t, t),
        2: ((1 - t) ** 2 / 2, (1 + 2 * t - 2 * t**2) / 2, t**2 / 2),
        3: (
            (1 - t) ** 3 / 6,
            (3 * t**3 - 6 * t**2 + 4) / 6,
            (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
            t**3 / 6,
        ),
    }[order]
    weights = np.zeros((place.size, intervals + order))
    for k, values in enumerate(basis):
        weights[np.arange(place.size), first + k] = values
    return weights


def _geometry(parameters: np.ndarray, fixed: np.ndarray) -> tuple[Shape, np.ndarray]:
    """Returns (D, H, W) and the matrix from d, h, w to mm."""
    if fixed.size != _GEOMETRY or not np.isfinite(fixed).all():
        raise ValueError(f"needs {_GEOMETRY} finite fixed parameters, has {fixed.size}")
    if not ((fixed[:3] >= 1) & (fixed[:3] == np.rint(fixed[:3]))).all():
        raise ValueError(f"its grid has {fixed[:3].tolist()} points")
    w, h, d = (int(n) for n in fixed[:3])
    if parameters.size != 3 * math.prod((d, h, w)):
        raise ValueError(f"{parameters.size} parameters for {w} x {h} x {d} vectors")
    matrix = np.eye(4)
    matrix[:3, :3] = fixed[9:].reshape(3, 3) * fixed[6:9]
    matrix[:3, 3] = fixed[3:6]
    axes = matrix[:3, :3] / np.maximum(np.linalg.norm(matrix[:3, :3], axis=0), 1e-300)
    if not np.isfinite(matrix).all() or abs(np.linalg.det(axes)) < 1e-9:
        raise ValueError("its grid is singular")
    return (d, h, w), matrix @ REVERSE
