"""Instance optimisation of a displacement field, without a network."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.losses import regularity, similarity
from jaxreg.losses.objective import Objective
from jaxreg.registration.optimization import discrete, loop
from jaxreg.registration.optimization.discrete import DiscreteConfig
from jaxreg.registration.optimization.loop import Optimized, Progress, Report
from jaxreg.space import fields, sampling
from jaxreg.space.grid import Shape
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.typing import Field, Image, Key, Pair

# --- the displacement itself ---------------------------------------------------------


LARGEST_CHANGE = 2.0
"""By how much an affine map may change volume against its start, either way."""
_NO_CHANGE = np.zeros((3, 4), np.float32)  # of an affine map's start


@dataclasses.dataclass(frozen=True)
class DisplacementConfig:
    """How a displacement is optimised without a network.

    Attributes:
      factors: resolution levels, coarse to fine, as divisors of the network grid.
      affine_factor: the level at which the affine part is found.
      control_spacing: voxels of a level per control point of its field.
      affine_learning_rate: of Adam, in means of the extents per step.
      smoothness: weight of the field's diffusion energy.
      folding: weight of `regularity.folding`.
      discrete: how a start for large displacements is searched for; None for no search,
        which after an affine map has been as good on real pairs.
    """

    factors: tuple[int, ...] = (4, 2, 1)
    affine_factor: int = 4
    control_spacing: int = 2
    affine_learning_rate: float = 0.01
    smoothness: float = 1.0
    folding: float = 10.0
    discrete: DiscreteConfig | None = None


def _coarser(pair: Pair, factor: int) -> Pair:
    """Returns the pair on a grid of 1/factor the size, each axis at least 8 voxels."""
    full = pair.fixed.shape[1:4]
    shape = tuple(min(n, max(8, -(-n // factor))) for n in full)
    if shape == tuple(full):
        return pair

    def resize(name, value):
        if value is None or value.ndim != 5:  # what is known of a pair besides images
            return value
        if name.endswith("mask"):
            return sampling.resize_nearest_floor(value, shape)
        return _smoothed(value, sigma=max(1, factor // 2), shape=shape)

    return dataclasses.replace(
        pair,
        **{
            f.name: resize(f.name, getattr(pair, f.name))
            for f in dataclasses.fields(pair)
        },
    )


# What is small is compiled as a whole too: every operation by itself is a program.
@functools.partial(jax.jit, static_argnames=("sigma", "shape"))
def _smoothed(image: Image, *, sigma: int, shape: Shape) -> Image:
    return sampling.resize_half_pixel(similarity.gaussian_blur(image, sigma), shape)


def _affine(parameters, start, extent) -> Affine:
    """Returns a 4x4 matrix in unit coordinates: a start, after a change of space.

    Args:
      parameters: 3x4, what the change adds to the identity, about the cube's centre: a
        linear map of space, and a shift in means of the extents.
      start: 4x4.
      extent: the fixed cube's edges, relative to their mean.
    """
    extent = jnp.asarray(extent)
    linear = jnp.eye(3) + parameters[:, :3] * extent[None, :] / extent[:, None]
    # Summed, not multiplied: a TPU would round a matrix product to bfloat16.
    shift = 0.5 + parameters[:, 3] / extent - 0.5 * linear.sum(axis=1)
    # The start after it, column by column.
    columns = [*linear.T, shift]
    outer = [sum(start[:3, i] * column[i] for i in range(3)) for column in columns]
    top = jnp.stack([*outer[:3], outer[3] + start[:3, 3]], axis=1)
    return Affine(jnp.concatenate([top, jnp.asarray([[0.0, 0.0, 0.0, 1.0]])]))


def _determinant(linear: jax.Array) -> jax.Array:
    a, b, c = linear.T
    return jnp.sum(jnp.cross(a, b) * c)


def _inverse(affine: Affine) -> Affine:
    # 3x3 by cofactors: no linear solver, which would be slow to compile on TPU.
    linear, shift = affine.matrix[:3, :3], affine.matrix[:3, 3]
    rows = [jnp.cross(linear[:, (i + 1) % 3], linear[:, (i + 2) % 3]) for i in range(3)]
    inverse = jnp.stack(rows) / jnp.sum(linear[:, 0] * rows[0])
    top = jnp.concatenate(
        [inverse, -(inverse * shift[None]).sum(axis=1, keepdims=True)], axis=1
    )
    return Affine(jnp.concatenate([top, jnp.asarray([[0.0, 0.0, 0.0, 1.0]])]))


def _maps(affine: Affine, control, shape: Shape, extent) -> tuple[Transform, Transform]:
    """Returns forward = affine after field, backward = field' after inverse affine."""
    if control is None:
        return Transform((affine,)), Transform((_inverse(affine),))
    extent = jnp.asarray(extent)[None, None, None, None]
    forward, backward = (sampling.resize_aligned(c, shape) / extent for c in control)
    return (
        Transform((Displacement(forward), affine)),
        Transform((_inverse(affine), Displacement(backward))),
    )


@functools.partial(jax.jit, static_argnames="shape")
def _maps_found(
    parameters, start, extent, *, shape: Shape
) -> tuple[tuple[Transform, Transform], jax.Array]:
    """Returns the maps of parameters, see `_direct_loss`, and the change of volume."""
    change = parameters["affine"]
    affine = _affine(change, start, extent)
    maps = _maps(affine, parameters["control"], shape, extent)
    return maps, _determinant(jnp.eye(3) + change[:, :3])


def _direct_loss(
    parameters, pair, noise, objective, smoothness,
    *, start, extent, folding=0.0, affine=True,
):  # fmt: skip
    """Returns (loss, (parts, maps)) of "affine", 3 4, and "control", two fields.

    The fields are lengths in means of the extents, so that they cost, and move, the
    same along every axis in space.
    """
    control = parameters["control"]
    shape = pair.fixed.shape[1:4]
    change = parameters["affine"]
    change = change if affine else jax.lax.stop_gradient(change)
    forward, backward = _maps(_affine(change, start, extent), control, shape, extent)
    if control is None:  # affine maps are each other's inverse: no jitter to evaluate
        objective = dataclasses.replace(objective, inverse_consistency_weight=0.0)
    loss, parts = objective(forward, backward, pair, noise)
    volume = _determinant(jnp.eye(3) + change[:, :3])
    low, high = 1 / LARGEST_CHANGE, LARGEST_CHANGE
    loss = loss + jax.nn.relu(low - volume) + jax.nn.relu(volume / high - 1.0)
    if control is not None:
        smooth = sum(regularity.diffusion(c, extent) for c in control)
        # Of the control points: between them the map is read linearly.
        unit = jnp.concatenate(control) / jnp.asarray(extent)[None, None, None, None]
        folds = 2 * regularity.folding(unit)
        parts = {**parts, "smoothness": smooth, "folding": folds}
        loss = loss + smoothness * smooth + folding * folds
    return loss, ({**parts, "loss": loss}, (forward, backward))


@functools.partial(
    jax.jit,
    static_argnames=("objective", "steps", "smoothness", "folding", "affine"),
)
def _direct_step(
    state, index, pair, key, learning_rate, start, extent,
    *, objective, steps, smoothness, folding, affine,
):  # fmt: skip
    # The step size falls to nothing: the field settles instead of trembling.
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps, 0.05))
    loss = functools.partial(
        _direct_loss, start=start, extent=extent, folding=folding, affine=affine
    )
    gradient_of = jax.grad(loss, has_aux=True)
    parameters, adam = state
    noise = loop.draw_noise(key, index, pair.fixed.shape[1:4], None)
    gradient, (parts, _) = gradient_of(parameters, pair, noise, objective, smoothness)
    updates, adam = optimizer.update(gradient, adam)
    return (optax.apply_updates(parameters, updates), adam), parts, parameters


@jax.jit
def _direct_start(parameters):
    """The parameters and the state of Adam with a schedule, whatever its rates."""
    return parameters, optax.adam(lambda _: 0.0).init(parameters)


@functools.partial(jax.jit, static_argnames="masked")
def _meeting(pair: Pair, parameters, start, extent, *, masked: bool) -> Pair:
    """Returns the pair with masks of what has a partner in the other image.

    Args:
      pair: one pair.
      parameters: see `_direct_loss`, as are start and extent.
      start: of the affine map.
      extent: of the fixed cube.
      masked: whether the pair's own masks say what counts.
    """
    shape = pair.fixed.shape[1:4]
    affine = _affine(parameters["affine"], start, extent)
    maps = _maps(affine, parameters["control"], shape, extent)
    here, masks = sampling.identity(shape), {}
    for name, to_other in zip(("fixed_mask", "moving_mask"), maps, strict=True):
        meets = fields.inside(jnp.asarray(to_other.map_points(here)), shape)
        own = getattr(pair, name)
        masks[name] = 1.0 * (meets & (own != 0) if masked else meets)
    return dataclasses.replace(pair, **masks)


def _direct_loop(
    parameters, pair, key, learning_rate, start, extent,
    *, objective, steps, report, **settings,
):  # fmt: skip
    """Repeats the step; what counts is what has a partner where it begins."""
    pair = _meeting(pair, parameters, start, extent, masked=objective.loss_masking)
    objective = dataclasses.replace(objective, loss_masking=True)

    def step(state, index):
        return _direct_step(
            state, index, pair, key, learning_rate, start, extent,
            objective=objective, steps=steps, **settings,
        )  # fmt: skip

    return loop.repeat(step, _direct_start(parameters), steps, report)


def _relative(extent_mm: Sequence[float]) -> np.ndarray:
    """Edges of a cube relative to their mean; one of a single slice is no length."""
    extent = np.maximum(np.asarray(extent_mm, np.float64), 1e-6 * np.max(extent_mm))
    return (extent / extent.mean()).astype(np.float32)


def by_affine(matrix) -> Optimized:
    """Returns an affine map, 4x4 in unit coordinates, as a result."""
    nothing = {"affine": _NO_CHANGE, "control": None}
    start = np.asarray(matrix, np.float32)
    maps, _ = _maps_found(nothing, start, np.ones(3, np.float32), shape=())
    return Optimized(*maps)


def find_affine(
    pair: Pair,
    objective: Objective,
    start: np.ndarray | None = None,
    *,
    steps: int = 100,
    key: Key,
    extent_mm: Sequence[float] = (1.0, 1.0, 1.0),
    config: DisplacementConfig | None = None,
    report: Report | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns an affine map for one pair, 4x4 in unit coordinates, and its history.

    A map that changes volume by more than `LARGEST_CHANGE` against its start, or
    mirrors, is not believed: the start takes its place.

    Args:
      pair: one pair on the network grid, 1 D H W C, and what the objective needs.
      objective: what is minimised.
      start: 4x4, unit coordinates; the identity if None.
      steps: updates, on a grid of 1 / `config.affine_factor` the size.
      key: the objective's.
      extent_mm: see `optimize_displacement`.
      config: levels and weights; `DisplacementConfig()` if absent.
      report: told of every update.
    """
    config = config or DisplacementConfig()
    start = np.eye(4) if start is None else np.asarray(start, np.float64)
    extent = _relative(extent_mm)
    begin = np.asarray(start, np.float32)
    parameters, history = _direct_loop(
        {"affine": _NO_CHANGE, "control": None},
        _coarser(pair, config.affine_factor),
        key,
        config.affine_learning_rate,
        begin,
        extent,
        objective=objective,
        steps=steps,
        smoothness=0.0,
        folding=0.0,
        affine=True,
        report=report,
    )
    (found, _), volume = _maps_found(parameters, begin, extent, shape=())
    if 1 / LARGEST_CHANGE < float(volume) < LARGEST_CHANGE:
        start = np.asarray(found.steps[0].matrix, np.float64)
    return start, history


def optimize_displacement(
    pair: Pair,
    objective: Objective,
    *,
    steps: int = 50,
    learning_rate: float = 5e-3,
    key: Key,
    affine: bool = True,
    found_affine: bool = False,
    start: np.ndarray | None = None,
    extent_mm: Sequence[float] = (1.0, 1.0, 1.0),
    config: DisplacementConfig | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Optimized:
    """Returns transforms found for one pair without a network.

    First an affine map, then a forward and a backward displacement field on control
    grids, coarse to fine, all by Adam on the objective plus a diffusion term. The
    inverse consistency term of the objective ties the two fields together. The fields
    begin where a discrete search leads, if there is one and the similarity says that
    this is better.

    Only voxels count that have a partner in the other image where a descent begins. One
    that loses it later is compared with what `objective.outside` says: so nothing is
    won by pushing what does not fit out of the common view, nor by stretching one image
    over all of the other's.

    Args:
      pair: one pair on the network grid, 1 D H W C, and what the objective needs.
      objective: what is minimised.
      steps: updates per level; the affine level takes twice as many.
      learning_rate: of Adam for the fields: means of the extents per step.
      key: draws the jitter of each step.
      affine: whether to find an affine map, and to refine it with the fields; otherwise
        the start stays as it is.
      found_affine: whether the start is such a map already.
      start: 4x4, unit coordinates; the identity (the two volumes' extents coincide) if
        None.
      extent_mm: of the fixed image along D, H and W, from the first to the last voxel's
        centre. Shears, shifts and roughness are measured in space by it.
      config: levels and weights; `DisplacementConfig()` if absent.
      progress: called after each step.
      report: told instead, where steps came before.

    Raises:
      ValueError: steps below 1, or more than one pair.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    if pair.fixed.shape[0] != 1:
        raise ValueError(f"one pair at a time, got a batch of {pair.fixed.shape[0]}")
    config = config or DisplacementConfig()
    search = affine and not found_affine
    if report is None and progress is not None:
        total = (2 * steps if search else 0) + steps * len(config.factors)
        report = Report(progress, total)
    histories = []
    if search:
        start, history = find_affine(
            pair, objective, start, steps=2 * steps, key=key,
            extent_mm=extent_mm, config=config, report=report,
        )  # fmt: skip
        histories.append(history)
        report = report and report.after(2 * steps)
    begin = np.asarray(np.eye(4) if start is None else start, np.float32)
    extent = _relative(extent_mm)
    found = _searched(pair, begin, extent, objective, config)
    parameters: dict[str, Any] = {"affine": _NO_CHANGE, "control": found}
    for level, factor in enumerate(config.factors):
        at_level = _coarser(pair, factor)
        control = _controls(parameters["control"], at_level, config)
        parameters, history = _direct_loop(
            {**parameters, "control": control},
            at_level,
            jax.random.fold_in(key, level),
            learning_rate / 2**level,
            begin,
            extent,
            objective=objective,
            steps=steps,
            smoothness=config.smoothness,
            folding=config.folding,
            affine=affine,
            report=report,
        )
        histories.append(history)
        report = report and report.after(steps)
    shape = tuple(pair.fixed.shape[1:4])
    (forward, backward), _ = _maps_found(parameters, begin, extent, shape=shape)
    return Optimized(forward, backward, chained(histories))


def _searched(
    pair: Pair, start, extent, objective: Objective, config: DisplacementConfig
) -> tuple[Field, Field] | None:
    """Returns fields for large displacements; None without, or if they are no help.

    The objective's similarity says so, at the middle level, on the voxels that the
    affine map gives a partner: a coarser level is blind to what they bring together.

    Args:
      pair: one pair, 1 D H W C.
      start: of the affine map.
      extent: of the fixed cube.
      objective: what is minimised.
      config: says how to search.
    """
    search = config.discrete
    if search is None:
        return None
    shape = discrete.grid_shape(
        pair.fixed.shape[1:4], np.asarray(extent).tolist(), search
    )
    found = discrete.search(
        pair.fixed, _carried(pair, start), shape=shape, config=search
    )
    found = tuple(field * extent for field in found)
    judged = _coarser(pair, config.factors[len(config.factors) // 2])
    nothing = {"affine": _NO_CHANGE, "control": None}
    judged = _meeting(judged, nothing, start, extent, masked=objective.loss_masking)
    objective = dataclasses.replace(objective, loss_masking=True)
    mine, others = (
        _similarity(control, judged, start, extent, objective=objective)
        for control in (_controls(both, judged, config) for both in (found, None))
    )
    return found if mine < others else None


@jax.jit
def _carried(pair: Pair, start) -> Image:
    """Returns the moving image over the fixed one's grid, by an affine map."""
    points = Affine(start)(sampling.identity(pair.fixed.shape[1:4]))
    return fields.warp(pair.moving, jnp.asarray(points))


@functools.partial(jax.jit, static_argnames="objective")
def _similarity(control, pair: Pair, start, extent, *, objective: Objective):
    """Returns the objective's similarity under an affine start and two fields."""
    maps = _maps(Affine(start), control, pair.fixed.shape[1:4], extent)
    noise = jnp.zeros((1, *pair.fixed.shape[1:4], 3))
    return objective(*maps, pair, noise)[1]["similarity"]


def _controls(
    control: tuple[Field, Field] | None, pair: Pair, config: DisplacementConfig
) -> tuple[Field, Field]:
    """Returns both control grids at a level's resolution; zeros where there are none.

    Args:
      control: those of the coarser level, each 1 d h w 3.
      pair: at this level, 1 D H W C.
      config: how many voxels lie between control points.
    """
    shape = tuple(
        max(4, -(-n // config.control_spacing)) if n > 4 else n
        for n in pair.fixed.shape[1:4]
    )
    if control is None:
        nothing = jnp.asarray(np.zeros((1, *shape, 3), np.float32))
        return nothing, nothing
    return _resized(control, shape=shape)


@functools.partial(jax.jit, static_argnames="shape")
def _resized(control: tuple[Field, Field], *, shape: Shape) -> tuple[Field, Field]:
    first, second = control
    return (
        sampling.resize_aligned(first, shape),
        sampling.resize_aligned(second, shape),
    )


def chained(histories: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the histories of loops one after the other, by the last one's parts.

    `loop.LEVEL` counts the loops, those within a history that was chained before too.
    """
    levels, begun = [], 0
    for history in histories:
        within = history.get(loop.LEVEL, np.zeros(len(history["loss"]), int))
        levels.append(begun + within)
        begun += int(within.max()) + 1
    return {
        name: np.concatenate([h.get(name, np.zeros_like(h["loss"])) for h in histories])
        for name in histories[-1]
    } | {loop.LEVEL: np.concatenate(levels)}
