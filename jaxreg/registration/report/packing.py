"""Volumes packed into a page for its viewer, in as many voxels as the page has room.

Volumes are upright, x (towards the right) fastest, a byte a voxel; differences between
neighbours along x are compressed by gzip and written in base64. The displacement has a
grid of its own, from corner to corner of the fixed scan's voxel centres, as int16.
"""

import base64
import gzip
from typing import Any

import numpy as np

from jaxreg.data import resample
from jaxreg.registration.report import figures, planes
from jaxreg.registration.report.planes import upright
from jaxreg.registration.report.registered import Registered
from jaxreg.space import background
from jaxreg.space.grid import Shape

_MOST_VOXELS = 3_000_000
_FIELD_POINTS = 48  # along each axis at most
LOG2_RANGE = 2.0
"""The determinant is shown from 2 to the power of minus this to 2 to the power of it.
"""


def packed(found: Registered, most_bytes: int) -> dict[str, Any]:
    """Returns what the viewer needs of a registration, as JSON can hold it.

    Voxels are merged, the finest axis first, until all fits.

    Args:
      found: the registration.
      most_bytes: of all volumes together, in base64.
    """
    grid = planes.upright_grid(found.fixed.grid)
    volumes = _bytes_of(found)
    field = _field(found)
    room = most_bytes - len(field["data"])
    factors = _factors(grid.shape, grid.spacing_mm, [1, 1, 1], _MOST_VOXELS)
    while True:
        small = {name: _pack(merge(a, factors)) for name, merge, a in volumes}
        size, voxels = (
            sum(map(len, small.values())),
            np.prod(_merged(grid.shape, factors)),
        )
        if size <= room or voxels == 1:
            break
        # A little less than in proportion: small volumes compress worse.
        factors = _factors(
            grid.shape, grid.spacing_mm, factors, int(0.95 * voxels * room / size)
        )
    return {
        "shape": list(_merged(grid.shape, factors)),
        "factors": factors,
        "scanShape": list(grid.shape),
        "spacing": grid.spacing_mm.tolist(),
        "affine": grid.affine_mm.tolist(),
        "start": list(planes.centre(found.fixed)),
        "planes": [{"name": k, **vars(plane)} for k, plane in planes.VIEWS.items()],
        "log2Range": LOG2_RANGE,
        "volumes": small,
        "field": field,
    }


def _merged(shape: Shape, factors: list[int]) -> Shape:
    return tuple(-(-n // f) for n, f in zip(shape, factors, strict=True))


def _factors(
    shape: Shape, spacing_mm: np.ndarray, factors: list[int], most_voxels: int
) -> list[int]:
    """Returns by how much to merge voxels along each axis, the finest axis first."""
    factors = list(factors)
    while np.prod(_merged(shape, factors)) > max(most_voxels, 1):
        size = [
            np.inf if f >= n else s * f
            for n, s, f in zip(shape, spacing_mm, factors, strict=True)
        ]
        factors[int(np.argmin(size))] += 1
    return factors


def _bytes_of(found: Registered):
    """Returns the volumes as uint8, each with its name and how voxels are merged."""
    scans = map(background.without_padding, (found.fixed, found.before, found.after))
    fixed, *moving = (
        np.nan_to_num(upright(np.asarray(v.array), found.fixed.grid)) for v in scans
    )
    volumes = [
        ("fixed", _mean, _grey(fixed, [fixed])),
        ("before", _mean, _grey(moving[0], moving)),
        ("after", _mean, _grey(moving[1], moving)),
        (
            "jacobian",
            _mean_or_fold,
            jacobian_bytes(upright(found.determinant, found.fixed.grid)),
        ),
    ]
    if found.labels is not None:
        named = vars(found.labels)
        known = np.unique(np.concatenate([np.unique(a) for a in named.values()]))
        known = known[known > 0]
        for name, array in named.items():
            # Of more than 255 labels neighbours in number may share a byte.
            index = 1 + np.searchsorted(known, array) % 255
            numbers = np.where(array > 0, index, 0).astype(np.uint8)
            own = f"labels_{name}"
            volumes.append((own, _middle, upright(numbers, found.fixed.grid)))
    return volumes


def _grey(array: np.ndarray, reference: list[np.ndarray]) -> np.ndarray:
    return np.rint(255 * figures.scaled(array, reference)).astype(np.uint8)


def jacobian_bytes(determinant: np.ndarray) -> np.ndarray:
    """Returns the determinant's logarithm as bytes: 128 keeps volume, 0 is a fold."""
    log2 = np.log2(np.maximum(determinant, 2.0**-LOG2_RANGE))
    level = np.clip(np.rint(128 + 127 * log2 / LOG2_RANGE), 1, 255)
    return np.where(determinant > 0, level, 0).astype(np.uint8)


def _mean(array: np.ndarray, factors: list[int]) -> np.ndarray:
    """Returns means over blocks of voxels; those at the end may be smaller."""
    total, count = array.astype(np.float32), 1.0
    for axis, f in enumerate(factors):
        starts = np.arange(0, array.shape[axis], f)
        total = np.add.reduceat(total, starts, axis=axis)
        sizes = np.diff([*starts, array.shape[axis]]).astype(np.float32)
        count = count * sizes.reshape([-1 if i == axis else 1 for i in range(3)])
    return np.rint(total / count).astype(np.uint8)


def _mean_or_fold(array: np.ndarray, factors: list[int]) -> np.ndarray:
    """Returns means over blocks, and 0 where any voxel of one folds."""
    least = array
    for axis, f in enumerate(factors):
        least = np.minimum.reduceat(least, np.arange(0, array.shape[axis], f), axis)
    return np.where(least == 0, 0, np.maximum(_mean(array, factors), 1)).astype(
        np.uint8
    )


def _middle(array: np.ndarray, factors: list[int]) -> np.ndarray:
    """Returns the middle voxel of each block: labels have no mean."""
    at = [
        np.minimum(np.arange(0, n, f) + f // 2, n - 1)
        for n, f in zip(array.shape, factors, strict=True)
    ]
    return array[np.ix_(*at)]


def _pack(volume: np.ndarray) -> str:
    """Returns x y z bytes as text: differences along x, which is the fastest axis."""
    rows = np.ascontiguousarray(volume.transpose(2, 1, 0))  # z y x
    rows[..., 1:] = np.diff(rows, axis=-1)  # modulo 256
    return _text(rows.tobytes())


def _text(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _field(found: Registered) -> dict[str, Any]:
    """Returns the displacement along the upright axes, in mm, on a coarse grid."""
    grid = planes.upright_grid(found.fixed.grid)
    moved = upright(found.displacement_mm, found.fixed.grid)
    shape = tuple(min(n, _FIELD_POINTS) for n in grid.shape)
    coarse = np.stack(
        [resample.aligned(moved[..., axis], shape) for axis in range(3)], -1
    )
    along = np.linalg.inv(grid.affine_mm[:3, :3] / grid.spacing_mm)
    coarse = coarse @ along.T.astype(np.float32)
    largest = float(np.abs(coarse).max())
    unit = largest / 32767 if largest > 0 else 1.0
    numbers = np.rint(coarse / unit).astype("<i2")
    # Component by component, z y x each.
    order = np.ascontiguousarray(numbers.transpose(3, 2, 1, 0))
    length = np.linalg.norm(coarse, axis=-1)
    return {
        "shape": list(shape),
        "unit": unit,
        "most": float(np.quantile(length, 0.99)),
        "data": _text(order.tobytes()),
    }
