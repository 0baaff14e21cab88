"""Affine pre-alignment: from centres, from matched points, between grids.

Each result is a `Transform` of one affine step in unit coordinates, from the fixed
image's cube to the moving one's.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.space import grid as grid_lib
from jaxreg.space import sampling
from jaxreg.space.transform import Affine, Transform, linear_matrix


def from_mm(
    matrix: np.ndarray | jax.Array, fixed: grid_lib.Grid, moving: grid_lib.Grid
) -> Transform:
    """Returns a 4x4 map from fixed to moving mm in unit coordinates of two grids."""
    out = np.linalg.inv(moving.unit_to_mm)
    if isinstance(matrix, np.ndarray):  # stays float64
        return Transform((Affine(out @ matrix @ fixed.unit_to_mm),))
    inner, outer = (jnp.asarray(m, matrix.dtype) for m in (fixed.unit_to_mm, out))
    return Transform((Affine(_product(outer, _product(matrix, inner))),))


def to_mm(
    transform: Transform, fixed: grid_lib.Grid, moving: grid_lib.Grid
) -> np.ndarray:
    """Returns the 4x4 map from fixed to moving mm, float64: the inverse of `from_mm`.

    Raises:
      ValueError: a step is not affine.
    """
    matrix = linear_matrix(transform)
    return moving.unit_to_mm @ matrix @ np.linalg.inv(fixed.unit_to_mm)


def centres(fixed: grid_lib.Grid, moving: grid_lib.Grid) -> Transform:
    """Returns the translation that puts the middles of two grids onto each other."""
    return from_mm(_shift(_middle_mm(moving) - _middle_mm(fixed)), fixed, moving)


def centres_of_mass(
    fixed_image: jax.Array | np.ndarray,
    moving_image: jax.Array | np.ndarray,
    fixed: grid_lib.Grid,
    moving: grid_lib.Grid,
) -> Transform:
    """Returns the translation that puts the centres of mass onto each other.

    An image's mass is what exceeds its minimum. A constant image's is in its middle.

    Args:
      fixed_image: D H W, or with axes of length 1 besides.
      moving_image: the same for the moving image.
      fixed: the grid of the first.
      moving: the grid of the second.
    """
    found, wanted = (
        centre_of_mass_mm(image, grid)
        for image, grid in ((moving_image, moving), (fixed_image, fixed))
    )
    return from_mm(_shift(found - wanted), fixed, moving)


def centre_of_mass_mm(image: jax.Array | np.ndarray, grid: grid_lib.Grid) -> np.ndarray:
    """Returns where an image's mass lies in RAS+ mm, (3,) float64."""
    # On the host, where scans of another size need no program of their own.
    mass = np.reshape(np.asarray(image, np.float32), grid.shape)
    low, high = mass.min(), mass.max()
    voxel = []
    for axis, n in enumerate(grid.shape):
        others = tuple(a for a in range(3) if a != axis)
        profile = np.ones(n)
        if high > low:
            profile = mass.mean(others, dtype=np.float64) - np.float64(low)
        voxel.append(np.sum(profile * np.arange(n)) / profile.sum())
    return (grid.voxel_to_mm @ [*voxel, 1.0])[:3]


def fit(
    start: jax.Array | np.ndarray,
    end: jax.Array | np.ndarray,
    weights: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Returns the affine map between points with the least squared error, 4x4.

    Four points that lie in no plane determine it; of fewer, or flat ones, it is the
    map with the smallest numbers.

    Args:
      start: P 3.
      end: P 3, where they go.
      weights: P, of the squared errors; 1 if None.
    """
    start, end = jnp.asarray(start), jnp.asarray(end)
    weight = jnp.ones(start.shape[0]) if weights is None else jnp.asarray(weights)
    total = jnp.maximum(jnp.sum(weight), jnp.finfo(start.dtype).tiny)
    # About the middle: the digits are spent on directions, and a shift costs nothing.
    from_middle, to_middle = (
        jnp.sum(weight[:, None] * points, 0, keepdims=True) / total
        for points in (start, end)
    )
    root = jnp.sqrt(weight)[:, None]
    linear = jnp.linalg.lstsq(root * (start - from_middle), root * (end - to_middle))[0]
    shift = to_middle - _product(from_middle, linear)
    top = jnp.concatenate([linear.T, shift.T], 1)
    return jnp.concatenate([top, jnp.asarray([[0.0, 0.0, 0.0, 1.0]], top.dtype)])


def from_points(
    fixed: jax.Array | np.ndarray,
    moving: jax.Array | np.ndarray,
    weights: jax.Array | np.ndarray | None = None,
) -> Transform:
    """Returns the affine transform that matched points ask for.

    The error is that of the *moving* points in the fixed image, and the map is inverted
    then, as SAME does: fitted the other way round it would differ a little.

    Args:
      fixed: P 3, unit coordinates of the fixed image.
      moving: P 3, unit coordinates of the moving image.
      weights: P, of the squared errors; 1 if None.

    References:
      Liu et al., SAME: Deformable image registration based on self-supervised
      anatomical embeddings, MICCAI 2021.
    """
    return Transform((Affine(jnp.linalg.inv(fit(moving, fixed, weights))),))


def displacement(matrix: jax.Array | np.ndarray, shape: grid_lib.Shape) -> jax.Array:
    """Returns a 4x4 map in unit coordinates as a field, 1 D H W 3."""
    points = sampling.identity(shape)
    moved = Affine(jnp.asarray(matrix, points.dtype))(points)
    return jnp.asarray(moved) - points


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full precision on every platform."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _middle_mm(grid: grid_lib.Grid) -> np.ndarray:
    middle = (np.asarray(grid.shape, np.float64) - 1) / 2
    return (grid.voxel_to_mm @ [*middle, 1.0])[:3]


def _shift(vector: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix
