"""The resizes of `space.sampling` in NumPy, for processes that read data.

Whole scans are resized once, on the host, while the accelerator trains; a process that
only reads should start no JAX backend, least of all on the GPU that others train on.
"""

from collections.abc import Sequence

import numpy as np

from jaxreg.space.grid import Shape

_ROUNDING = 1e-6


def half_pixel(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Trilinear resize with half-pixel centres: `sampling.resize_half_pixel`.

    Args:
      array: D H W, float32.
      shape: (D, H, W) of the result.

    Returns:
      D H W, float32, within the range of `array` but for rounding.
    """
    return _linear(
        array,
        [
            np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0.0, n - 1.0)
            for n, m in zip(array.shape, shape, strict=True)
        ],
    )


def aligned(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Trilinear resize with aligned corner centres: `sampling.resize_aligned`.

    Args:
      array: D H W, float32.
      shape: (D, H, W) of the result.

    Returns:
      D H W, float32, within the range of `array` but for rounding.
    """
    return _linear(array, _aligned_positions(array.shape, shape))


def centred(
    array: np.ndarray, shape: Shape, ratio: np.ndarray, *, outside: float
) -> np.ndarray:
    """Trilinear resampling about the common centre: pads and crops.

    Args:
      array: D H W, float32.
      shape: (D, H, W) of the result.
      ratio: spacing of the result's voxels in voxels of `array`, along each axis.
      outside: fill value of voxels whose centre lies outside the array's faces.

    Returns:
      D H W, float32.
    """
    positions = _centred_positions(array.shape, shape, ratio)
    result = _linear(
        array,
        [np.clip(p, 0, n - 1) for p, n in zip(positions, array.shape, strict=True)],
    )
    return _filled(result, positions, array.shape, outside)


def nearest_centred(array: np.ndarray, shape: Shape, ratio: np.ndarray) -> np.ndarray:
    """Nearest resampling about the common centre, 0 outside, D H W of any type."""
    positions = _centred_positions(array.shape, shape, ratio)
    index = [
        np.clip(np.floor(p + 0.5), 0, n - 1).astype(int)
        for p, n in zip(positions, array.shape, strict=True)
    ]
    return _filled(array[np.ix_(*index)], positions, array.shape, 0)


def _aligned_positions(source: Shape, target: Shape) -> list[np.ndarray]:
    return [np.linspace(0.0, n - 1.0, m) for n, m in zip(source, target, strict=True)]


def _centred_positions(
    source: Shape, target: Shape, ratio: np.ndarray
) -> list[np.ndarray]:
    return [
        (np.arange(m) - (m - 1) / 2) * r + (n - 1) / 2
        for n, m, r in zip(source, target, ratio, strict=True)
    ]


def _filled(
    array: np.ndarray, positions: Sequence[np.ndarray], source: Shape, value: float
) -> np.ndarray:
    """Sets what lies more than half a voxel outside the source's outer centres."""
    for axis, (position, n) in enumerate(zip(positions, source, strict=True)):
        padded = np.abs(position - (n - 1) / 2) > n / 2 + _ROUNDING
        array[(slice(None),) * axis + (padded,)] = value
    return array


def _linear(array: np.ndarray, positions: Sequence[np.ndarray]) -> np.ndarray:
    """Samples at positions along each axis, in voxels, all within the array."""
    source = array.shape
    # The axis that shrinks most goes first: what follows has less to do.
    for axis in sorted(range(3), key=lambda axis: len(positions[axis]) / source[axis]):
        position, n = positions[axis], source[axis]
        if len(position) == n and np.array_equal(position, np.arange(n)):
            continue
        low = np.floor(position).astype(np.intp)
        weight = (position - low).astype(np.float32)
        weight = weight.reshape([-1 if k == axis else 1 for k in range(3)])
        result = array.take(np.minimum(low + 1, n - 1), axis=axis)
        below = array.take(low, axis=axis)
        result -= below
        result *= weight
        result += below
        array = result
    return np.ascontiguousarray(array)


def nearest_floor(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Nearest resize, source index ``floor(i n_in / n_out)``, D H W of any type.

    The twin of `sampling.resize_nearest_floor`.
    """
    index = [
        np.minimum(
            np.floor(np.arange(m, dtype=np.float32) * np.float32(n / m)).astype(int),
            n - 1,
        )
        for n, m in zip(array.shape, shape, strict=True)
    ]
    return array[np.ix_(*index)]


def nearest_aligned(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Nearest resize with aligned corner centres, D H W of any type."""
    positions = _aligned_positions(array.shape, shape)
    return array[np.ix_(*(np.floor(p + 0.5).astype(int) for p in positions))]
