"""The resizes of `space.sampling` in NumPy, for processes that read data.

Whole scans are resized once, on the host, while the accelerator trains; a process that
only reads should start no JAX backend, least of all on the GPU that others train on.
"""

from collections.abc import Callable

import numpy as np

from jaxreg.space.grid import Shape


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
        shape,
        lambda n, m: np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0.0, n - 1.0),
    )


def aligned(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Trilinear resize with aligned corner centres: `sampling.resize_aligned`.

    Args:
      array: D H W, float32.
      shape: (D, H, W) of the result.

    Returns:
      D H W, float32, within the range of `array` but for rounding.
    """
    return _linear(array, shape, lambda n, m: np.linspace(0.0, n - 1.0, m))


def _linear(
    array: np.ndarray, shape: Shape, positions: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    # The axis that shrinks most goes first: what follows has less to do.
    for axis in sorted(range(3), key=lambda axis: shape[axis] / array.shape[axis]):
        n, m = array.shape[axis], shape[axis]
        if n == m:
            continue
        position = positions(n, m)
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
    index = [
        np.floor(np.linspace(0.0, n - 1.0, m) + 0.5).astype(int)
        for n, m in zip(array.shape, shape, strict=True)
    ]
    return array[np.ix_(*index)]
