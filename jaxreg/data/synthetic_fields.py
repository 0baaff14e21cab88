"""Smooth random displacement fields on a lattice, NumPy only.

Fields live on a lattice of at most 32 voxels per axis, whatever the grid: they are
smooth, and integrating them on a fine grid would take most of the time. Arrays are
D H W. Displacements are pulls in lattice voxels; component i moves along axis i.
"""

import numpy as np
from scipy import ndimage

from jaxreg.space.grid import Shape

_LATTICE = 32  # voxels per axis at which smooth fields are made; finer adds nothing
_SQUARINGS = 5


def lattice_shape(shape: Shape) -> Shape:
    """Returns the lattice's voxels per axis for a grid of `shape`."""
    return tuple(min(n, _LATTICE) for n in shape)


def voxel_indices(shape: Shape) -> np.ndarray:
    """Voxel indices of an array, D H W 3, float32."""
    axes = [np.arange(n, dtype=np.float32) for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def sample_linear(values: np.ndarray, voxel: np.ndarray) -> np.ndarray:
    """D H W C at voxel indices ... 3, linear: ... C."""
    at = np.moveaxis(voxel, -1, 0)
    channels = [
        ndimage.map_coordinates(values[..., c], at, order=1, mode="nearest")
        for c in range(values.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def _spline_weights(n: int, cells: int) -> np.ndarray:
    """Weights of the cubic B-splines over `cells` intervals: n (cells + 3)."""
    position = np.linspace(0, cells, n)[:, None] - np.arange(-1, cells + 2)
    far = np.abs(position)
    near = 2 / 3 - far**2 + far**3 / 2
    return np.where(far < 1, near, np.clip(2 - far, 0, None) ** 3 / 6)


def smooth_noise(
    rng: np.random.Generator, shape: Shape, cells: int, channels: int
) -> np.ndarray:
    """Smooth Gaussian noise, D H W C, of standard deviation about 1.

    A cubic B-spline with random coefficients; `cells` of them span each axis.
    """
    field = rng.standard_normal((*(cells + 3,) * 3, channels))
    for axis, n in enumerate(shape):
        weights = _spline_weights(n, cells)
        weights /= np.sqrt((weights**2).sum(1, keepdims=True))
        field = np.moveaxis(np.tensordot(weights, field, (1, axis)), 0, axis)
    return field.astype(np.float32)


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The displacement of ``x -> outer(inner(x))``, in lattice voxels."""
    return inner + sample_linear(outer, voxel_indices(inner.shape[:3]) + inner)


def exponential(velocity: np.ndarray) -> np.ndarray:
    """The displacement after unit time, by scaling and squaring.

    That of ``-velocity`` is the inverse.

    References:
      Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms,
      MICCAI 2006.
    """
    displacement = velocity / 2**_SQUARINGS
    for _ in range(_SQUARINGS):
        displacement = compose(displacement, displacement)
    return displacement


def voxel_per_lattice(shape: Shape) -> np.ndarray:
    """Returns the grid's voxels per lattice voxel along each axis, (3,), float32."""
    lattice = np.asarray(lattice_shape(shape))
    return ((np.asarray(shape) - 1) / (lattice - 1)).astype(np.float32)


def on_grid(field: np.ndarray, shape: Shape) -> np.ndarray:
    """Resamples a displacement from lattice to grid, both in their own voxels."""
    if field.shape[:3] == shape:
        return field
    ratio = voxel_per_lattice(shape)
    return sample_linear(field, voxel_indices(shape) / ratio) * ratio
