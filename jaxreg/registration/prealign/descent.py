"""Descents to the map under which two scans are most alike, from a map nearby.

A rotation, the logarithm of the strain and a shift describe a map, which therefore
never mirrors: twelve numbers, of which those that are free follow the gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.registration.prealign import measure

Kind = Literal["rigid", "similarity", "affine"]
"""Similarity: rigid, and one stretch in all directions."""

_STIFFNESS, _LOCAL_STIFFNESS = 0.1, 0.5
"""What the square of a logarithmic strain costs, by grey levels and by structure: a
strain of 0.1, as of bodies of different people, asks for a gain of 0.001 and 0.005.
Structure tells about five times as much as grey levels do when scans come to fit."""
_FREE_STRAIN = 0.37  # norm of the logarithmic strain; about 24 % in each direction
_ITERATIONS, _FIRST_ITERATIONS = 60, 30  # of a descent, and of many at once
MOST = 24  # descents at once


def _free(kind: Kind) -> np.ndarray:
    """What a gradient of twelve numbers becomes where a kind of map is asked for."""
    free = np.eye(12, dtype=np.float32)
    if kind != "affine":
        free[6:, 6:] = 0
    if kind == "similarity":
        free[6:9, 6:9] = 1 / 3  # one stretch in all directions
    return free


def _map(numbers: jax.Array, radius: float | jax.Array, base: jax.Array) -> jax.Array:
    """A base after strain, rotation and shift by 12 numbers in mm at a radius."""
    strained = measure.product(_strain(numbers[6:] / radius), base[:3, :3])
    linear = measure.product(_rotation(numbers[3:6] / radius), strained)
    shift = base[:3, 3] + numbers[:3]
    return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift)


def _strain(numbers: jax.Array) -> jax.Array:
    """The exponential of a symmetric 3x3 matrix of 6 numbers: positive definite.

    A fourth power of a symmetric matrix is, however short its series.
    """
    a, b, c, d, e, f = numbers / 4
    small = jnp.stack([jnp.stack(row) for row in ([a, d, e], [d, b, f], [e, f, c])])
    square = measure.product(small, small)
    root = jnp.eye(3) + small + square / 2 + measure.product(square, small) / 6
    root = measure.product(root, root)
    return measure.product(root, root)


def _rotation(turn: jax.Array) -> jax.Array:
    """Rotation of the quaternion (1, turn / 2): about it, by nearly its length."""
    q = jnp.concatenate([jnp.ones(1), turn / 2])
    a, b, c, d = q / jnp.linalg.norm(q)
    rows = (
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    )
    return jnp.stack([jnp.stack(row) for row in rows])


def descended(
    level: measure.Level,
    start: np.ndarray,
    kind: Kind,
    *,
    base: np.ndarray | None = None,
) -> np.ndarray:
    """Returns a map after gradient descent on mutual information at one level.

    Args:
      level: the pair.
      start: 4x4, fixed to moving mm.
      kind: what the map may become, beside the start.
      base: the map whose strain is none; the start if None.
    """
    matrix = _descend(
        level.centred(start),
        level.sides,
        level.points(start, measure.FEW),
        level.fixed_is_smaller,
        level.descent(0, start, base, _free(kind), _STIFFNESS),
    )
    return level.in_mm(matrix)


def all_descended(
    level: measure.Level, starts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns maps after short rigid descents, from `MOST` starts at most."""
    maps = list(starts.values())
    if len(maps) > MOST:
        raise ValueError(f"{len(maps)} starts at once, expected {MOST} at most")
    maps += maps[:1] * (MOST - len(maps))
    points = [level.points(start, measure.FEWEST) for start in maps]
    found = _descend_all(
        np.stack([level.centred(start) for start in maps]),
        level.sides,
        jax.tree.map(lambda *each: np.stack(each), *points),
        level.fixed_is_smaller,
        level.descent(0, maps[0], None, _free("rigid"), _STIFFNESS),
    )
    return {
        name: level.in_mm(matrix) for name, matrix in zip(starts, found, strict=False)
    }


def descended_locally(
    level: measure.Level, start: np.ndarray, base: np.ndarray, kind: Kind
) -> np.ndarray:
    """Returns a map after gradient descent on local correlation.

    On the smaller scan's grid.

    Args:
      level: the pair.
      start: 4x4, fixed to moving mm.
      base: the map whose strain is none.
      kind: what the map may become, beside the start.
    """
    side = 0 if level.fixed_is_smaller else 1
    if side == 1:
        start, base = np.linalg.inv(start), np.linalg.inv(base)
    matrix = _descend_locally(
        level.centred(start, side),
        level.sides[side],
        level.sides[1 - side],
        level.about_middle(side, level.local_places(side, measure.LOCAL_DESCENT)),
        level.descent(side, start, base, _free(kind), _LOCAL_STIFFNESS),
    )
    found = level.in_mm(matrix, side)
    return found if side == 0 else np.linalg.inv(found)


@jax.jit
def _descend(base, sides, points, fixed_is_smaller, descent):
    return _by_grey_levels(base, sides, points, fixed_is_smaller, descent, _ITERATIONS)


@jax.jit
def _descend_all(bases, sides, points, fixed_is_smaller, descent):
    def one(each):
        base, own = each
        return _by_grey_levels(
            base, sides, own, fixed_is_smaller, descent, _FIRST_ITERATIONS
        )

    return jax.lax.map(one, (bases, points), batch_size=8)


def _by_grey_levels(base, sides, points, fixed_is_smaller, descent, iterations):
    windows = [
        measure.histogram_windows(*own) for own in zip(sides, points, strict=True)
    ]
    return _adam(
        lambda matrix: measure.loss(matrix, sides, points, windows, fixed_is_smaller),
        base,
        descent,
        iterations,
    )


@jax.jit
def _descend_locally(base, here, there, places, descent):
    own, counts = measure.read(here, places)
    return _adam(
        lambda matrix: measure.unlike_locally(
            own, counts, there, measure.moved(matrix, places), 1.0
        ),
        base,
        descent,
        _ITERATIONS,
    )


def _adam(
    unlike: Callable[[jax.Array], jax.Array],
    base: jax.Array,
    descent: measure.Descent,
    iterations: int,
) -> jax.Array:
    """Returns the map of least unlikeness and strain; the rate falls along a cosine."""
    strained, free, radius, rate, stiffness = descent

    def objective(numbers):
        a, b, c, d, e, f = numbers[6:] / radius
        rows = ([a, d, e], [d, b, f], [e, f, c])
        strain = strained + jnp.stack([jnp.stack(row) for row in rows])
        square = jnp.sum(strain**2)
        excess = jax.nn.relu(jnp.sqrt(square + 1e-12) - _FREE_STRAIN)
        return unlike(_map(numbers, radius, base)) + stiffness * square + excess**2

    optimizer = optax.scale_by_adam(b2=0.99)

    def iterate(carry, index):
        numbers, state = carry
        gradient = measure.product(free, jax.grad(objective)(numbers))
        update: Any
        update, state = optimizer.update(gradient, state)
        left = (1 + jnp.cos(jnp.pi * index / iterations)) / 2
        return (numbers - rate * left * update, state), None

    start = jnp.zeros(12)
    (numbers, _), _ = jax.lax.scan(
        iterate, (start, optimizer.init(start)), jnp.arange(iterations)
    )
    return _map(numbers, radius, base)
