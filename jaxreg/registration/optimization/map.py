"""Instance optimisation of a map of any resolution that does not fold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxreg.losses import similarity
from jaxreg.registration.optimization import features
from jaxreg.registration.optimization.loop import Optimized, Progress
from jaxreg.space import fields, sampling
from jaxreg.space.transform import Displacement, Transform
from jaxreg.typing import Field, Pair

# --- the map itself -------------------------------------------------------------------

_LEAST_DETERMINANT = 0.1
"""What the determinant at a cell's corners stays above; the identity has 1."""
_HALVINGS = 3  # of a step, before it is left out where it would fold


def optimize_map(
    pair: Pair,
    start: Optimized,
    *,
    loss: str = "ncc",
    steps: int = 100,
    learning_rate: float = 0.008,
    folding: float = 10.0,
    progress: Progress | None = None,
) -> Optimized:
    """Returns a map optimised voxel by voxel for an intensity similarity.

    It does not fold: where a step would take a determinant at a corner of a cell of
    the network grid to 0.1 or below, the step is shortened at that cell's voxels, to
    nothing if need be. Where the start folds already, it is smoothed first, as little
    as will do. SAME's code has the penalty alone, which folds of 1 to 4 % of the voxels
    outbid.

    Args:
      pair: one pair on the network grid, 1 D H W C.
      start: what a network says of it.
      loss: a key of `similarity.SIMILARITIES`; SAME has "ncc".
      steps: number of updates, at least 1.
      learning_rate: of Adam, canonical units per step.
      folding: weight of the mean of what determinants lack to 0.1, the identity's
        being 1.
      progress: called after each step.

    Raises:
      ValueError: steps below 1, or more than one pair.
    """
    features.check_single_pair(pair, steps)
    shape = pair.fixed.shape[1:4]
    begin = unfolded(start.forward.on_grid(shape) - sampling.identity(shape))

    def step(state, index):
        return _map_step(state, pair, learning_rate, folding, loss=loss)

    found, history = features.descend(step, 2.0 * begin, steps, progress)
    # Once more, between the voxels: too costly for every step.
    field = unfolded(0.5 * found, between=True)
    return dataclasses.replace(
        start, forward=Transform((Displacement(field),)), history=history
    )


@functools.partial(jax.jit, static_argnames="loss")
def _map_step(state, pair, learning_rate, folding, *, loss):
    measure = similarity.SIMILARITIES[loss]

    def value(displacement):
        points = sampling.identity(pair.fixed.shape[1:4]) + 0.5 * displacement
        warped = features.warp_features(pair.moving, points)
        unlike = measure(warped, pair.fixed, mask=pair.fixed_mask)
        lacking = _LEAST_DETERMINANT - fields.jacobian_determinant(points)
        folds = jnp.mean(jax.nn.relu(lacking))
        total = unlike + folding * folds
        return total, {"similarity": unlike, "folding": folds, "loss": total}

    (moved, adam), parts, here = features.adam_step(
        jax.grad(value, has_aux=True), state, learning_rate
    )
    moved = 2.0 * _without_folds(0.5 * here, 0.5 * moved)
    return (moved, adam), parts, here


def unfolded(field: Field, *, between: bool = False) -> Field:
    """Returns a displacement with its folds removed, 1 D H W 3, unit; the same if none.

    Where it folds it is mixed with the least smoothed version of itself that does not.

    Args:
      field: 1 D H W 3, unit.
      between: see `fields.least_determinant`: determinants are above 0 everywhere, else
        above 0.1 at the corners of all cells.
    """
    if not bool(_folds(field, between=between)):
        return field
    sigma, longest = 1, max(field.shape[1:4])
    smooth = field
    while sigma < longest and bool(_folds(smooth, between=between)):
        smooth = _smoothed(field, sigma)
        sigma *= 2
    if bool(_folds(smooth, between=between)):  # a shift never does
        mean = jnp.mean(field, (1, 2, 3), keepdims=True)
        smooth = jnp.broadcast_to(mean, field.shape)
    return _without_folds(smooth, field, between=between)


@functools.partial(jax.jit, static_argnames="sigma")
def _smoothed(field: Field, sigma: int) -> Field:
    """Gaussian means of the voxels that there are."""
    weight = similarity.gaussian_blur(jnp.ones_like(field[..., :1]), sigma)
    return similarity.gaussian_blur(field, sigma) / weight


def _folded_cells(field: Field, *, between: bool) -> jax.Array:
    points = sampling.identity(field.shape[1:4]) + field
    least = fields.least_determinant(points, between=between)
    return ~(least > (0.0 if between else _LEAST_DETERMINANT))  # NaN folds as well


@functools.partial(jax.jit, static_argnames="between")
def _folds(field: Field, *, between: bool) -> jax.Array:
    return jnp.any(_folded_cells(field, between=between))


@functools.partial(jax.jit, static_argnames="between")
def _without_folds(here: Field, there: Field, *, between: bool = False) -> Field:
    """Goes from a displacement without folds to another as far as none appear.

    Every voxel has its own share of the way. It is halved, and at last set to 0, at the
    corners of cells that fold. A cell with shares of 0 is as it was, so the loop ends.
    """

    def place(share):
        # At a share of 0 exactly the first, also where the second is not finite.
        return here + jnp.where(share > 0, share * (there - here), 0.0)

    def at_corners(cells):  # N D-1 H-1 W-1 to N D H W
        padded = jnp.pad(cells, ((0, 0), (1, 1), (1, 1), (1, 1)))
        return jax.lax.reduce_window(
            padded, False, jnp.logical_or, (1, 2, 2, 2), (1, 1, 1, 1), "valid"
        )

    def shorten(carry):
        share, bad, count = carry
        factor = jnp.where(count < _HALVINGS, 0.5, 0.0)
        share = jnp.where(bad, factor * share, share)
        return share, to_shorten(share), count + 1

    def to_shorten(share):
        bad = at_corners(_folded_cells(place(share), between=between))[..., None]
        return bad & (share > 0)

    share = jnp.ones_like(here[..., :1])
    start = (share, to_shorten(share), 0)
    share, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), shorten, start)
    return place(share)
