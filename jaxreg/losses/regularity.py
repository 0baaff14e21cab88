"""Regularity of maps and displacements: penalties, smaller is better.

All derivatives are finite differences in unit coordinates: displacement and position
both run over [0, 1], so the numbers do not depend on the resolution.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxreg.space import fields, sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import Field, Points

GRADICON_DELTA = 1e-3


def gradicon_points(
    shape: Shape, noise: Points, *, stride: int = 2, noise_scale: float = 2.0
) -> Points:
    """Returns the jittered grid at which inverse consistency is measured, 1 d h w 3.

    The jitter is ``noise_scale * noise / W`` on all three axes, W being the size of the
    last axis (a quirk of the original, kept). Points may leave the unit cube.

    Args:
      shape: the grid, (D, H, W).
      noise: standard normal, 1 D H W 3; one draw serves the whole batch.
      stride: every stride-th voxel per axis is kept, starting at the first; 2 for the
        sparse variant of uniGradICON, 1 for the dense one.
      noise_scale: 2 for the sparse variant, 1 for the dense one.

    Raises:
      ValueError: the noise is not 1 D H W 3.

    References:
      unigradicon 1.0.6, __init__.py: GradientICONSparse.forward.
    """
    if noise.shape != (1, *shape, 3):
        raise ValueError(f"noise has shape {noise.shape}, expected {(1, *shape, 3)}")
    points = sampling.identity(shape, noise.dtype) + noise_scale * noise / shape[-1]
    return points[:, ::stride, ::stride, ::stride]


def gradicon(
    forward: Callable[[jax.Array], jax.Array],
    backward: Callable[[jax.Array], jax.Array],
    points: Points,
    *,
    delta: float = GRADICON_DELTA,
) -> jax.Array:
    """Returns the squared gradient of the inverse consistency error, a scalar.

    With ``e(x) = x - forward(backward(x))``, the sum over the three axes of the mean
    over batch, points and components of the squared one-sided difference quotient, that
    is a third of the mean squared Frobenius norm of e's Jacobian.

    Args:
      forward: unit points N ... 3 to unit points; float32, since differences are
        divided by delta.
      backward: the map in the other direction; only this order is measured.
      points: 1 d h w 3 (or N d h w 3), see `gradicon_points`.
      delta: step of the difference quotient, unit.

    References:
      Tian et al., GradICON, CVPR 2023.
    """
    steps = [jnp.zeros(3, points.dtype), *(delta * jnp.eye(3, dtype=points.dtype))]
    lead = tuple(range(points.ndim - 1))
    shifts = [jnp.expand_dims(step, lead) for step in steps]  # 1 ... 3
    # The four point sets in one evaluation, end to end along the last point axis: along
    # the first they may be split over devices.
    stacked = jnp.concatenate([points + shift for shift in shifts], axis=-2)
    error = stacked - forward(backward(stacked))
    here, *moved = jnp.split(error, len(shifts), axis=-2)
    return sum(
        (jnp.mean(((here - there) / delta) ** 2) for there in moved),
        start=jnp.zeros((), error.dtype),
    )


def diffusion(
    field: Field, extent: Sequence[float] | jax.Array = (1.0, 1.0, 1.0)
) -> jax.Array:
    """Returns the mean squared first derivative of a displacement field.

    The sum over the three axes of the mean over batch, voxels and components of the
    squared forward difference in unit coordinates; a third of the mean squared
    Frobenius norm of the Jacobian, as in `gradicon`. An axis of one voxel adds nothing.

    Args:
      field: N D H W 3, unit.
      extent: lengths of the axes D, H and W in the unit of the field, where this is a
        length in space and the grid no cube.
    """
    total = jnp.zeros((), field.dtype)
    for axis, length in zip((1, 2, 3), extent, strict=True):
        per_unit = jnp.diff(field, axis=axis) * (max(field.shape[axis] - 1, 1) / length)
        if per_unit.size:
            total += jnp.mean(per_unit**2)
    return total


def folding(displacement: Field, *, least: float = 0.1) -> jax.Array:
    """Returns by how much the map falls short of a least Jacobian determinant.

    The mean over cells and their corners of what the determinant lacks there, which is
    that of the three edges that meet; 0 where nothing shrinks so much. A grid with an
    axis of one voxel has no cells and costs nothing.

    Args:
      displacement: N D H W 3, unit.
      least: the determinant from which a corner costs nothing; of the identity it is 1.

    References:
      Karacali and Davatzikos, Estimating topology preserving and smooth displacement
      fields, IEEE TMI 2004.
    """
    shape = displacement.shape[1:4]
    if min(shape) < 2:
        return jnp.zeros((), displacement.dtype)
    points = jnp.moveaxis(sampling.identity(shape) + displacement, -1, 0)
    ends = slice(None, -1), slice(1, None)

    def edges(axis):
        edge = jnp.diff(points, axis=axis + 2) * (shape[axis] - 1)
        corners = [
            [slice(None) if i == axis else ends[end] for i, end in enumerate(corner)]
            for corner in itertools.product((0, 1), repeat=3)
        ]
        # All corners in one array: eight determinants of their own compile slowly.
        return jnp.stack([edge[:, :, *at] for at in corners], axis=1)

    determinant = fields.triple_product(*map(edges, range(3)))
    return jnp.mean(jax.nn.relu(least - determinant))


def smoothness(displacement: Field, *, cropped: bool = False) -> jax.Array:
    """Returns the mean squared forward difference of a displacement in voxels.

    The mean over the three axes of the means over batch, components and voxels; the
    spacing of the voxels does not enter.

    Args:
      displacement: N D H W 3, voxels; 2 or more along each axis.
      cropped: whether all differences are taken where there is one along every axis,
        at ``[:-1, :-1, :-1]``, as UniReg's release does.

    References:
      Balakrishnan et al., VoxelMorph, IEEE TMI 2019, equation 8.
    """
    per_axis = []
    for axis in (1, 2, 3):
        difference = jnp.diff(displacement, axis=axis)
        if cropped:
            ends = [None if other == axis else -1 for other in (1, 2, 3)]
            difference = difference[:, *(slice(end) for end in ends)]
        per_axis.append(jnp.mean(difference**2))
    return jnp.mean(jnp.stack(per_axis))
