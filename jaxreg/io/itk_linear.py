"""ITK's linear transforms: parameters to a 4x4 matrix.

The names, the order of parameters and the conventions are those of ITK's classes, 5.4;
what they mean together is ``x -> M (x - c) + c + t`` with the centre c of the fixed
parameters. Frame: the file's own, LPS mm.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

Parts = tuple[np.ndarray, np.ndarray]
"""Matrix 3x3 and translation 3."""


def matrix(kind: str, parameters: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Returns the 4x4 matrix of a transform, as ITK's TransformPoint applies it.

    Args:
      kind: a key of `KINDS`.
      parameters: float64, as in a file.
      fixed: float64, fixed parameters; the centre is 0 where they are fewer than 3.

    Raises:
      ValueError: there are other than the kind's number of parameters, or one is not
        finite, or they are no rotation.
    """
    count, parts = KINDS[kind]
    finite = np.isfinite(parameters).all() and np.isfinite(fixed).all()
    if parameters.size != count or not finite:
        raise ValueError(f"needs {count} finite parameters, has {parameters.size}")
    centre = fixed[:3] if fixed.size >= 3 else np.zeros(3)
    if kind.startswith("Centered"):
        centre = parameters[-6:-3]
    linear, translation = parts(parameters, fixed)
    result = np.eye(4)
    result[:3, :3] = linear
    result[:3, 3] = centre + translation - linear @ centre
    return result


def _affine(p: np.ndarray, _: np.ndarray) -> Parts:
    return p[:9].reshape(3, 3), p[-3:]


def _euler(p: np.ndarray, fixed: np.ndarray) -> Parts:
    """Rotation Rz Rx Ry, or Rz Ry Rx where the flag after the centre says so."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(p[:3]), np.sin(p[:3])
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    # The centred kind has its centre elsewhere, and the flag alone here.
    flag = fixed[-1] if fixed.size in (1, 4) else 0.0
    return (rz @ ry @ rx if flag else rz @ rx @ ry), p[-3:]


def _of_quaternion(x: float, y: float, z: float, w: float) -> np.ndarray:
    """Rotation; as in ITK, times the square of a length that is not 1."""
    return np.array(
        [
            [w * w + x * x - y * y - z * z, 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), w * w - x * x + y * y - z * z, 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), w * w - x * x - y * y + z * z],
        ]
    )


def _of_versor(p: np.ndarray) -> np.ndarray:
    """Rotation by the right part of a unit quaternion."""
    length = float(np.linalg.norm(p[:3]))
    if length > 1.0 + 1e-6:
        raise ValueError(f"has a versor of length {length:g}, expected at most 1")
    # ITK shortens what rounding made too long.
    x, y, z = (p[:3] / max(length, 1.0)).tolist()
    return _of_quaternion(x, y, z, math.sqrt(max(0.0, 1.0 - x * x - y * y - z * z)))


def _versor(p: np.ndarray, _: np.ndarray) -> Parts:
    return _of_versor(p), p[3:6] if p.size >= 6 else np.zeros(3)


def _quaternion(p: np.ndarray, _: np.ndarray) -> Parts:
    x, y, z, w = p[:4].tolist()
    return _of_quaternion(x, y, z, w), p[4:]


def _similarity(p: np.ndarray, _: np.ndarray) -> Parts:
    return _of_versor(p) * p[6], p[3:6]


def _scale_versor(p: np.ndarray, _: np.ndarray) -> Parts:
    # Added, not multiplied: so does ITK.
    return _of_versor(p) + np.diag(p[6:9] - 1.0), p[3:6]


def _scale_skew_versor(p: np.ndarray, _: np.ndarray) -> Parts:
    linear = _of_versor(p) + np.diag(p[6:9] - 1.0)
    linear[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] += p[9:15]
    return linear, p[3:6]


def _compose_scale_skew_versor(p: np.ndarray, _: np.ndarray) -> Parts:
    skew = np.eye(3)
    skew[[0, 0, 1], [1, 2, 2]] = p[9:12]
    return _of_versor(p) @ np.diag(p[6:9]) @ skew, p[3:6]


KINDS: Mapping[str, tuple[int, Callable[[np.ndarray, np.ndarray], Parts]]] = (
    MappingProxyType(
        {
            "AffineTransform": (12, _affine),
            "MatrixOffsetTransformBase": (12, _affine),
            "Rigid3DTransform": (12, _affine),
            "ScalableAffineTransform": (12, _affine),
            "CenteredAffineTransform": (15, _affine),
            "Euler3DTransform": (6, _euler),
            "CenteredEuler3DTransform": (9, _euler),
            "VersorTransform": (3, _versor),
            "VersorRigid3DTransform": (6, _versor),
            "QuaternionRigidTransform": (7, _quaternion),
            "Similarity3DTransform": (7, _similarity),
            "ScaleVersor3DTransform": (9, _scale_versor),
            "ScaleSkewVersor3DTransform": (15, _scale_skew_versor),
            "ComposeScaleSkewVersor3DTransform": (12, _compose_scale_skew_versor),
            "ScaleTransform": (3, lambda p, _: (np.diag(p), np.zeros(3))),
            "ScaleLogarithmicTransform": (
                3,
                lambda p, _: (np.diag(np.exp(p)), np.zeros(3)),
            ),
            "TranslationTransform": (3, lambda p, _: (np.eye(3), p)),
            "IdentityTransform": (0, lambda p, _: (np.eye(3), np.zeros(3))),
        }
    )
)
"""The kinds that are one matrix: how many parameters each has, and what they mean."""
