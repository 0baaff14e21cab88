"""Displacement fields on the unit cube: evaluate, warp, compose, invert, measure.

A field u (N D H W 3, unit) stands for the map ``x -> x + u(x)``.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.space import sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import Field, Image, Points

Differences = Literal["backward", "forward", "central"]
_CELLS = {
    "backward": (slice(1, None), slice(None, -1), slice(1, None)),
    "forward": (slice(None, -1), slice(None, -1), slice(1, None)),
    "central": (slice(1, -1), slice(None, -2), slice(2, None)),
}
"""Where the determinant is taken, and the ends of a difference, along an axis."""
_ROUNDING = 1e-3  # of a voxel


def evaluate(field: Field, points: Points, *, outside: sampling.Outside = "edge"):
    """Returns ``points + field(points)``, N ... 3 in unit coordinates."""
    return points + sampling.sample(field, points, outside=outside)


def warp(
    image: Image,
    points: Points,
    *,
    order: Literal[0, 1] = 1,
    outside: sampling.Outside = "edge",
    fill: float = 0.0,
) -> Image:
    """Returns ``image[points]``: pulls the moving image onto the points' grid.

    Args:
      image: N D H W C, the moving image.
      points: N D' H' W' 3, where each fixed voxel lies in the moving image, unit.
      order: 1 linear, 0 nearest.
      outside: see `sampling.Outside`.
      fill: the value more than half a voxel outside, for "half_voxel" only.
    """
    return sampling.sample(image, points, order=order, outside=outside, fill=fill)


def inside(points: Points, shape: Shape) -> jax.Array:
    """Returns whether unit points lie within the voxels of an image, N ... 1."""
    last = jnp.asarray(shape) - 1.0
    last = jnp.expand_dims(last, tuple(range(points.ndim - 1)))
    half = 0.5 + _ROUNDING
    index = points * last
    return jnp.all((index >= -half) & (index <= last + half), axis=-1, keepdims=True)


def compose(outer: Field, inner: Field) -> Field:
    """Returns the field of ``x -> outer(inner(x))``.

    Args:
      outer: unit, applied second, at any resolution.
      inner: unit, applied first; sets the output grid.

    Raises:
      ValueError: the batch sizes differ and neither is 1.

    References:
      Tian et al., GradICON, CVPR 2023, equation 4.
    """
    if outer.shape[0] != inner.shape[0] and 1 not in (outer.shape[0], inner.shape[0]):
        raise ValueError(
            f"outer has batch size {outer.shape[0]}, inner {inner.shape[0]}"
        )
    d, h, w = inner.shape[1:4]
    points = sampling.identity((d, h, w), inner.dtype) + inner
    return inner + sampling.sample(outer, points)


def _voxels(field: jax.Array) -> jax.Array:
    """Returns where a displacement in voxels leads, N D H W 3."""
    axes = [jnp.arange(n, dtype=field.dtype) for n in field.shape[1:4]]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)[None] + field


def warp_voxels(
    image: Image, displacement: jax.Array, *, outside: sampling.Outside = "zeros"
) -> Image:
    """Returns ``image[x + u(x)]``, N D H W C of the image's type.

    Args:
      image: N D H W C.
      displacement: N D H W 3, voxels of the same grid.
      outside: see `sampling.Outside`.
    """
    return sampling.sample_voxels(image, _voxels(displacement), outside=outside)


def compose_voxels(
    outer: jax.Array, inner: jax.Array, *, outside: sampling.Outside = "zeros"
) -> jax.Array:
    """Returns the displacement of ``x -> outer(inner(x))``, in voxels.

    Args:
      outer: N D H W 3, voxels of its grid.
      inner: N D H W 3, on the same grid.
      outside: what `outer` is outside its grid, see `sampling.Outside`.
    """
    return inner + warp_voxels(outer, inner, outside=outside)


def upsample_displacement(displacement: jax.Array, factor: int = 2) -> jax.Array:
    """Returns a displacement in voxels on a grid of `factor` times the size.

    The exact ratio of two grids with aligned corners is (f n - 1) / (n - 1); released
    pyramids were trained with f.

    Args:
      displacement: N D H W 3, voxels of its grid.
      factor: f.
    """
    d, h, w = displacement.shape[1:4]
    shape = (factor * d, factor * h, factor * w)
    return sampling.resize_aligned(factor * displacement, shape)


def integrate(velocity: jax.Array, squarings: int = 7) -> jax.Array:
    """Returns the displacement at time 1 along a stationary velocity, N D H W 3.

    Scaling and squaring: 1 / 2^squarings of the velocity, composed with itself as often
    as that. Zero outside the grid, so a velocity that points outwards is damped at the
    border.

    Args:
      velocity: N D H W 3, voxels of its grid per unit of time.
      squarings: number of compositions.

    References:
      Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms,
      MICCAI 2006.
    """

    # A loop: unrolled, the compiler works for minutes on it.
    def square(field, _):
        return compose_voxels(field, field), None

    return jax.lax.scan(square, velocity / 2**squarings, length=squarings)[0]


def invert(
    forward: Callable[[jax.Array], jax.Array],
    shape: tuple[int, int, int],
    *,
    initial: Field | None = None,
    iterations: int = 30,
) -> tuple[Field, jax.Array]:
    """Returns the inverse of a map by fixed point iteration, and how far off it is.

    Solves ``forward(y) = x`` on a grid by ``y <- y - (forward(y) - x)``, which
    converges where the displacement's Lipschitz constant is below 1.

    Args:
      forward: unit points N D H W 3 to unit points.
      shape: the grid of the inverse field.
      initial: a first guess of the inverse field; zero if absent.
      iterations: fixed point steps.

    Returns:
      (field, residual): the inverse as a displacement field, and ``|forward(y) - x|``
      per voxel, N D H W, in unit coordinates.

    References:
      Chen et al., A simple fixed-point approach to invert a deformation field, 2008.
    """
    grid = sampling.identity(shape)
    start = jnp.zeros_like(grid) if initial is None else initial

    def gap(field):
        return forward(grid + field) - grid

    # The best iterate per voxel survives where the iteration does not converge.
    def step(_, carry):
        field, best, best_residual = carry
        change = gap(field)
        residual = jnp.linalg.norm(change, axis=-1)
        better = residual < best_residual
        best = jnp.where(better[..., None], field, best)
        return field - change, best, jnp.minimum(residual, best_residual)

    worst = jnp.full(start.shape[:-1], jnp.inf, start.dtype)
    _, best, residual = jax.lax.fori_loop(
        0, iterations + 1, step, (start, start, worst)
    )
    return best, residual


def jacobian_determinant(
    points: Points, *, spacing=None, differences: Differences = "backward"
) -> jax.Array:
    """Returns the determinant per cell of a map given on a grid, N D' H' W'.

    Backward differences along the three axes at ``[1:, 1:, 1:]``, as the original
    counts folded voxels, or others. With ``spacing`` None the map is taken in units of
    the unit cube's own grid: the identity has determinant 1.

    Args:
      points: N D H W 3, unit coordinates of the mapped voxels.
      spacing: distance of neighbouring voxels per axis; ``1 / (n - 1)`` if None.
      differences: "backward"; "forward", at ``[:-1, :-1, :-1]``; or "central", at
        ``[1:-1, 1:-1, 1:-1]``.
    """
    if spacing is None:
        spacing = [1.0 / max(n - 1, 1) for n in points.shape[1:4]]
    here, low, high = _CELLS[differences]
    reach = 2 if differences == "central" else 1

    def difference(axis):
        ends = [
            points[:, *(end if i == axis else here for i in range(3))]
            for end in (high, low)
        ]
        return (ends[0] - ends[1]) / (reach * spacing[axis])

    return jnp.sum(jnp.cross(difference(0), difference(1)) * difference(2), axis=-1)


def triple_product(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Returns the determinant of three vectors whose components come first, 3 ..."""
    (a0, a1, a2), (b0, b1, b2), (c0, c1, c2) = a, b, c
    return (
        (a1 * b2 - a2 * b1) * c0 + (a2 * b0 - a0 * b2) * c1 + (a0 * b1 - a1 * b0) * c2
    )


def least_determinant(points: Points, *, between: bool = False) -> jax.Array:
    """Returns the least Jacobian determinant of each cell of a map, N D-1 H-1 W-1.

    At a cell's corner the determinant is that of the three edges that meet there; at a
    voxel, the determinant of central differences is the mean of those at the corners
    around it. Between the voxels a map is read linearly along each axis. There its
    derivative along an axis is a mean of the cell's four edges in this direction, and
    the determinant a mean of those of one edge of each direction: the least of these 64
    is a lower bound everywhere in the cell.

    Args:
      points: N D H W 3, unit coordinates of the mapped voxels, two or more along each
        axis. The identity has determinant 1.
      between: the lower bound for all of the cell in place of the least at its corners.
    """
    components = jnp.moveaxis(points, -1, 0)  # 3 N D H W: whole vectors are slow on CPU
    edges = [
        jnp.diff(components, axis=axis + 2) * (components.shape[axis + 2] - 1)
        for axis in range(3)
    ]
    ends = (slice(None, -1), slice(1, None))

    def edge(axis, corner):
        at = [slice(None) if a == axis else ends[c] for a, c in enumerate(corner)]
        return edges[axis][:, :, *at]

    corners = list(itertools.product((0, 1), repeat=3))
    triples = {
        tuple((*c[:axis], 0, *c[axis + 1 :]) for axis, c in enumerate(chosen))
        for chosen in (
            itertools.product(corners, repeat=3)
            if between
            else ((corner,) * 3 for corner in corners)
        )
    }

    def determinant(triple):
        return triple_product(*(edge(axis, at) for axis, at in enumerate(triple)))

    return functools.reduce(jnp.minimum, map(determinant, sorted(triples)))
