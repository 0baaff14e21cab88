"""Registration of two scans with a model: the transform in mm.

The one place where preprocessing, prediction, instance optimisation, inversion and the
way back to world space meet. The command line, the notebooks and the evaluation all
call `register`.
"""

import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import metrics
from jaxreg.data import network_grid
from jaxreg.errors import UserError
from jaxreg.io import given
from jaxreg.losses import similarity
from jaxreg.models.sam import TrainedSam
from jaxreg.registration import (
    automatic,
    conditioning,
    preparation,
    scan_pair,
    without_network,
)
from jaxreg.registration import inverse as inverse_lib
from jaxreg.registration import options as options_lib
from jaxreg.registration.optimization import features, loop
from jaxreg.registration.optimization import map as map_lib
from jaxreg.registration.optimization import network as network_lib
from jaxreg.registration.options import Options, Progress, Regions
from jaxreg.registration.prealign import initial as initial_lib
from jaxreg.registration.prealign import select
from jaxreg.registration.result import RegistrationResult
from jaxreg.space import fields, sampling, warping
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Shape, Volume
from jaxreg.typing import Pair
from jaxreg.weights import zoo
from jaxreg.xla import compilation_cache

_MUCH_FOLDED = 1.0  # per cent of the voxels


@compilation_cache.kept()
def register(
    moving: given.Scan,
    fixed: given.Scan,
    model: zoo.LoadedModel | str | os.PathLike[str] | None = options_lib.AUTO,
    options: Options = Options(),
    *,
    regions: Regions | None = None,
    sam: TrainedSam | None = None,
    start: select.Prealignment | None = None,
    initial: transform_lib.Transform | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> RegistrationResult:
    """Registers one scan onto another.

    Args:
      moving: the scan to be warped: the path of a file, an image of nibabel or
        SimpleITK, or a volume, D H W, stored intensities.
      fixed: the scan that stays, the same.
      model: weights from `load.load`, or what that loads; None for no network; "auto"
        for published weights that are in the cache, else none, see
        `automatic.choose`.
      options: how to register.
      regions: masks and label maps of the two scans.
      sam: a network for SAM's pre-alignments and for a UniReg that has none; by default
        a UniReg's own aligns.
      start: the pre-alignment, where `prealigned` found it already.
      initial: a transform from fixed to moving mm, or its file, in the place of a
        pre-alignment: the registration starts from it, and its result is the whole
        transform.
      progress: called after each step with its number, the total and the objective's
        parts.

    Returns:
      The transform from fixed to moving mm, its inverse, and how well it fits.

    Raises:
      UserError: options, scans, masks or label maps do not go together, or a scan is
        an array, whose place nobody knows; or the initial transform leads nowhere.
    """
    prepared = prepare(moving, fixed, model, options, regions, sam, start, initial)
    return finish(prepared, progress=progress)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Two scans on the network grid, with all that registers them.

    Attributes:
      given: the scans as they were read.
      model: as it serves the pair's task, see `preparation.conditioning_of`.
      options: with the grid and the intensities of the weights.
      conditioned: what the network is told of the pair.
      sam: see `register`.
      placed: the scans on the network grid.
      seconds: of each phase so far.
      why: why the model is the one, where none was named.
    """

    given: scan_pair.ScanPair
    model: zoo.LoadedModel | None
    options: Options
    conditioned: conditioning.TaskValues
    sam: TrainedSam | None
    placed: "_Placed"
    seconds: dict[str, float]
    why: str = ""


def prepare(
    moving: given.Scan,
    fixed: given.Scan,
    model: zoo.LoadedModel | str | os.PathLike[str] | None,
    options: Options,
    regions: Regions | None,
    sam: TrainedSam | None,
    start: select.Prealignment | None,
    initial: transform_lib.Transform | str | os.PathLike[str] | None = None,
) -> Prepared:
    """Returns two scans ready for the network; the arguments are those of `register`.

    Raises:
      UserError: see `register`.
    """
    options_lib.check_options(options)
    if initial is not None:
        initial_lib.check(options)
    scans = scan_pair.read(moving, fixed, regions, modality=options.moving_modality)
    options = preparation.with_modalities(options, scans.fixed, scans.moving)
    scans = dataclasses.replace(scans, modality=options.moving_modality)
    model, why = automatic.named(model, options)
    started = initial is not None or start is not None
    options = options_lib.settled(options, network=model is not None, started=started)
    options_lib.check_options(options)
    options_lib.check_regions(options, vars(scans.regions))
    model, conditioned = preparation.conditioning_of(model, options, sam)
    preparation.warn_of_orientation(scans.fixed, model, options)
    options = preparation.with_grid(options, model, scans.fixed)
    options = preparation.with_rule_of(model, options)
    _prealigns_alone(model, options)  # or there is nothing to do
    if initial is not None:
        start = initial_lib.prealignment(initial, scans.fixed, scans.moving)
    seconds: dict[str, float] = {}
    placed = _placed(scans, model, options, conditioned, sam, start, seconds)
    return Prepared(scans, model, options, conditioned, sam, placed, seconds, why)


def finish(
    prepared: Prepared,
    *,
    by_network: loop.Optimized | None = None,
    progress: Progress | None = None,
) -> RegistrationResult:
    """Returns the registration of prepared scans.

    Args:
      prepared: by `prepare`.
      by_network: what the network made of the pair, where it has seen it already, see
        `network_task`.
      progress: see `register`.

    Raises:
      UserError: the optimisation diverged.
    """
    model, options, placed = prepared.model, prepared.options, prepared.placed
    seconds = prepared.seconds
    scan, grids, start = placed.scans.fixed.grid, placed.scans.grids, placed.scans.start
    with _Clock(seconds, "register"):
        found, options, domains = _found(prepared, by_network, progress)
        there, back = _with_residual_field(
            found, placed.residual_field, options.grid_shape
        )
        forward = transform_lib.flatten(there, options.grid_shape)
        _check_finite(forward, options)
    with _Clock(seconds, "score"):
        # The pair's moving image has the residual field already.
        rest = forward if placed.residual_field is None else found.forward
        scores = _scores(placed, rest, options)
        transform, forward = _beyond_the_box(there, grids, scan)
        if start and _prealigns_alone(model, options):
            transform = start.in_world  # a pre-alignment alone is exact as it is
        placement = preparation.placement_of(model, options)
        folding_percent, sdlogj = metrics.regularity(
            transform, placement.measured(scan, options.grid_shape)
        )
        _warn_of_folds(folding_percent)
    inverse, residual = None, None
    if options.inverse:
        with _Clock(seconds, "inverse"):
            # With a pre-alignment both network grids lie over the fixed scan.
            over = None
            if start is not None:
                over = start.moved_grid(scan)
            back_on = placed.scans.moving.grid
            inverse = inverse_lib.inverse_of(forward, back, grids, back_on, over)
            # Of what is returned: a field is read linearly between its voxels.
            residual = warping.round_trip_mm(transform, inverse, scan, back_on)
    return RegistrationResult(
        transform=transform,
        inverse=inverse,
        inverse_residual_mm=residual,
        fixed_grid=grids[0],
        moving_grid=grids[1],
        history={k: np.asarray(v) for k, v in found.history.items()},
        similarity=options.io_sim,
        folding_percent=folding_percent,
        sdlogj=sdlogj,
        domains=domains,
        seconds=seconds,
        **_started(placed.scans, found),
        conditioning=prepared.conditioned.text,
        weights="" if model is None else model.described,
        chosen=prepared.why,
        scans=dataclasses.replace(prepared.given, regions=Regions()),
        **scores,
    )


def _started(scans: without_network.Scans, found: loop.Optimized) -> dict[str, Any]:
    """Returns what a result says of where the registration started."""
    aligned = scans.start or scans.guess
    if aligned is None:
        return {"started_from": found.start, "doubts": found.doubts}
    return {
        "prealigned_from": aligned.start,
        "prealigned_fits": aligned.fits,
        "doubts": aligned.doubts + found.doubts,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """Two scans on the network grid, by their headers and by a pre-alignment.

    Attributes:
      scans: reoriented, with their network grids and pre-alignment.
      apart: as the headers place them.
      apart_grids: their network grids then.
      pair: pre-aligned; `apart` without.
      residual_field: of the pre-alignment, which the network does not see.
    """

    scans: without_network.Scans
    apart: Pair
    apart_grids: tuple[Grid, Grid]
    pair: Pair
    residual_field: transform_lib.Transform | None


def _placed(
    scans: scan_pair.ScanPair,
    model: zoo.LoadedModel | None,
    options: Options,
    conditioned: conditioning.TaskValues,
    sam: TrainedSam | None,
    start: select.Prealignment | None,
    seconds: dict[str, float],
) -> _Placed:
    placement = preparation.placement_of(model, options)
    moving, fixed, regions = preparation.reoriented(
        scans.moving, scans.fixed, scans.regions, placement, options
    )

    def shown(resampled: network_grid.Resampled | None = None) -> Pair:
        pair = preparation.make_pair(moving, fixed, options, regions, resampled)
        return preparation.with_range(conditioned.of(pair), model, options)

    with _Clock(seconds, "preprocess"):
        apart_grids = grids = (
            placement.grid(fixed.grid, options.grid_shape),
            placement.grid(moving.grid, options.grid_shape),
        )
        apart = pair = shown()
    residual_field = guess = None
    if options.prealign != "none" or start is not None:
        with _Clock(seconds, "prealign"):
            if start is None:
                start = _prealigned(moving, fixed, model, options, regions, sam)
                if options.io_target == "displacement" and start.residual_field is None:
                    start, guess = None, start
            if start is not None:
                pair = shown(network_grid.Resampled(grids[0], start.transform))
                grids = grids[0], start.moved_grid(grids[0])
                residual_field = start.residual_on(grids[0])
    turned = without_network.Scans(moving, fixed, regions, grids, start, guess)
    return _Placed(turned, apart, apart_grids, pair, residual_field)


def _found(
    prepared: Prepared, by_network: loop.Optimized | None, progress: Progress | None
) -> tuple[loop.Optimized, Options, Mapping[str, float]]:
    """Returns unit transforms, the options with the similarity in use, the domains."""
    model, options, pair = prepared.model, prepared.options, prepared.placed.pair
    # The network's products only: sampling and losses ask for full precision.
    with jax.default_matmul_precision(options_lib.MATMUL[options.precision]):
        found = _optimise(prepared, by_network, progress)
        domains = {} if model is None else conditioning.domains(model, pair)
    for doubt in found.doubts:
        warnings.warn(doubt, stacklevel=3)
    similar = found.similarity or options.io_sim
    return found, dataclasses.replace(options, io_sim=similar), domains


def _scores(
    placed: _Placed, rest: transform_lib.Transform, options: Options
) -> dict[str, Any]:
    """Returns the result's similarities, and the images that they compare, by name.

    Args:
      placed: the pair.
      rest: unit transform of its moving image.
      options: with the similarity in use.
    """
    headers = without_network.unit_matrix(np.eye(4), *placed.apart_grids)
    unmoved = transform_lib.Affine(jnp.asarray(headers, "f4"))
    before, warped_before = _score(
        placed.apart, transform_lib.Transform((unmoved,)), options
    )
    between, guess = None, placed.scans.guess
    if placed.scans.start is not None:
        between, _ = _score(placed.pair, transform_lib.Transform(()), options)
    elif guess is not None:
        moved = without_network.unit_matrix(guess.affine_mm, *placed.apart_grids)
        led = transform_lib.Affine(jnp.asarray(moved, "f4"))
        between, _ = _score(placed.apart, transform_lib.Transform((led,)), options)
    after, warped_after = _score(placed.pair, rest, options)
    compared = preparation.as_compared(placed.pair)
    return {
        "similarity_before": before,
        "similarity_prealigned": between,
        "similarity_after": after,
        "fixed_image": np.asarray(compared.fixed[0, ..., 0]),
        "warped_before": warped_before,
        "warped_after": warped_after,
    }


def _prealigns_alone(model: zoo.LoadedModel | None, options: Options) -> bool:
    """Whether nothing follows the pre-alignment.

    Raises:
      UserError: there is neither a network nor anything to do without one.
    """
    alone = model is None and options.io_target == "network"
    if alone and (options.prealign == "none" or options.io_iterations is not None):
        raise UserError(
            "`io_target` network needs a model; name one with `model`, pass "
            "`io_target` displacement to register without weights, or `prealign` and "
            "`io_iterations` None to pre-align alone"
        )
    return alone


def prealigned(
    moving: Volume,
    fixed: Volume,
    model: zoo.LoadedModel | None,
    options: Options,
    *,
    regions: Regions | None = None,
    sam: TrainedSam | None = None,
) -> select.Prealignment:
    """Returns the pre-alignment that `register` would start from.

    The arguments are those of `register`.

    Raises:
      UserError: see `select.find`.
    """
    if model is not None:
        words = (options.task, options.pairing, options.smoothness)
        model = conditioning.condition(model, *words).model
    options = preparation.with_modalities(options, fixed, moving)
    options = preparation.with_rule_of(model, options)
    placement = preparation.placement_of(model, options)
    moving, fixed, regions = preparation.reoriented(
        moving, fixed, regions or Regions(), placement, options
    )
    return _prealigned(moving, fixed, model, options, regions, sam)


def _prealigned(
    moving: Volume,
    fixed: Volume,
    model: zoo.LoadedModel | None,
    options: Options,
    regions: Regions,
    sam: TrainedSam | None,
) -> select.Prealignment:
    window = preparation.compared_window(model, options) or options.ct_window
    moving_rule, fixed_rule = preparation.intensity_rules(
        dataclasses.replace(options, ct_window=window)
    )
    masked = options.input_masking or options.loss_function_masking
    scans = [
        select.Scan(volume, rule, mask if masked else None)
        for volume, rule, mask in (
            (moving, moving_rule, regions.moving_mask),
            (fixed, fixed_rule, regions.fixed_mask),
        )
    ]
    found = select.find(
        options.prealign, *scans, network=preparation.sam_for(model, sam)
    )
    if (
        model is not None
        and found.extents_fit
        and preparation.placement_of(model, options).resize != "pad_crop"
    ):
        warnings.warn(
            f"without `prealign` {model.name} sees the extents of "
            f"{moving.source} and {fixed.source} laid over each other, which fits "
            "better than their headers: scans cropped around one organ may do better "
            "with `prealign` none",
            stacklevel=2,
        )
    return found


def _with_residual_field(
    found: loop.Optimized, residual_field: transform_lib.Transform | None, shape: Shape
) -> tuple[transform_lib.Transform, transform_lib.Transform]:
    """Returns forward and backward with the residual field before the network's map."""
    if residual_field is None:
        return found.forward, found.backward
    back = inverse_lib.solve_inverse(residual_field, jnp.zeros((1, *shape, 3)))
    undone = transform_lib.Transform((transform_lib.Displacement(back),))
    return found.forward.then(residual_field), undone.then(found.backward)


def _beyond_the_box(
    unit: transform_lib.Transform, grids: Sequence[Grid], scan: Grid
) -> tuple[transform_lib.Transform, transform_lib.Transform]:
    """Returns a map in mm over all of the fixed scan, and the same in unit coordinates.

    Args:
      unit: between the network grids, its fields with outside="edge".
      grids: the network grids of the fixed and of the moving scan.
      scan: the fixed scan's grid; a network's box may be smaller.
    """
    shape, padding = grids[0].shape, grids[0].padding(scan)
    whole = transform_lib.padded(unit, shape, padding)
    world = transform_lib.in_world(whole, *(grid.padded(padding) for grid in grids))
    if padding.any():
        leave = transform_lib.padded_to_unit(shape, padding)
        whole = whole.seen_from(np.linalg.inv(leave))
    return world, whole


def network_task(
    model: zoo.LoadedModel | None, options: Options
) -> Literal["none", "predict", "optimise"]:
    """Returns what the network does for a pair."""
    if model is None:
        return "none"
    if options.io_iterations is None or options.io_target in options_lib.REFINING:
        return "predict"
    return "optimise" if options.io_target == "network" else "none"


def optimisation_of(options: Options) -> dict[str, Any]:
    """Returns steps and, perhaps, learning rate of an optimisation, by argument."""
    found: dict[str, Any] = {"steps": options.steps}
    if options.io_lr is not None:
        found["learning_rate"] = options.io_lr
    return found


def _optimise(
    prepared: Prepared, by_network: loop.Optimized | None, progress: Progress | None
) -> loop.Optimized:
    """Returns the unit transforms of prediction and instance optimisation."""
    model, options, scans = prepared.model, prepared.options, prepared.placed.scans
    pair, task = prepared.placed.pair, network_task(prepared.model, options)
    predicted = features.UNTOUCHED
    if model is None and options.io_target != "displacement":
        options, predicted = without_network.placed(options, scans)
    if model is not None and task == "predict":
        predicted = by_network or network_lib.predict(
            model.model, model.variables, pair
        )
    if options.io_iterations is None:
        return predicted
    common: dict[str, Any] = {**optimisation_of(options), "progress": progress}
    if options.io_target in ("map", "displacement"):  # where nothing else is seen
        pair = preparation.as_compared(pair)
    if options.io_target == "map":
        return map_lib.optimize_map(pair, predicted, loss=options.io_sim, **common)
    if options.io_target == "features":
        extract = _extractor(preparation.sam_for(model, prepared.sam), options)
        if extract is features.mind_features:
            pair = preparation.as_compared(pair)
        return features.optimize_features(pair, predicted, extract, **common)
    common["key"] = jax.random.key(options.seed)
    if options.io_target == "displacement":
        return without_network.find_displacement(pair, options, scans, common)
    assert model is not None
    return by_network or network_lib.optimize_network(
        model.model, model.variables, pair, preparation.objective_of(options), **common
    )


def _extractor(network: TrainedSam | None, options: Options) -> features.Extract:
    """Returns SAM's features for two CT scans on a grid like its own, or descriptors.

    A SAM network knows voxels of one size in one orientation, and another placement
    would show it something else.
    """
    if network is None or not preparation.both_ct(options):
        return features.mind_features
    own = network_grid.ResamplingRule("pad_crop", "spl", network.spacing_mm)
    if options.placement != own:
        warnings.warn(
            "`io_target` features takes MIND's descriptors in place of SAM's: the "
            f"network grid has not SAM's voxels of {own.spacing_mm:g} mm towards "
            "superior, posterior and left, as a UniReg's has",
            stacklevel=2,
        )
        return features.mind_features
    window = options.ct_window or (-1000.0, 1000.0)
    return lambda image: features.sam_features(network, image, window)


def _score(
    pair: Pair, unit: transform_lib.Transform, options: Options
) -> tuple[float, np.ndarray]:
    """Returns the similarity loss and the warped image, D H W."""
    pair = preparation.as_compared(pair)
    mask = pair.fixed_mask if options.loss_function_masking else None
    points = _mapped(unit, options.grid_shape)
    # Compiled in one: operations on their own would be compiled anew for each pair.
    loss, warped = _compared(pair.moving, pair.fixed, mask, points, name=options.io_sim)
    return float(loss), np.asarray(warped[0, ..., 0])


@functools.partial(jax.jit, static_argnames="shape")
def _mapped(unit: transform_lib.Transform, shape: Shape) -> jax.Array:
    return jnp.asarray(unit.map_points(sampling.identity(shape)))


@functools.partial(jax.jit, static_argnames="name")
def _compared(moving, fixed, mask, points, *, name: str):
    warped = fields.warp(moving, points, outside="zeros")
    return similarity.SIMILARITIES[name](warped, fixed, mask=mask), warped


def _warn_of_folds(percent: float) -> None:
    if percent > 0:
        warnings.warn(
            f"the transform folds: {percent:.2g} % of the fixed scan's voxels have a "
            "negative Jacobian determinant"
            + (
                "; the result is doubtful there"
                if percent < _MUCH_FOLDED
                else ", which no anatomy does; do not use it without looking at it"
            ),
            stacklevel=3,
        )


class _Clock:
    """Adds the wall time of a block to a dictionary."""

    def __init__(self, seconds: dict[str, float], phase: str):
        self._seconds, self._phase = seconds, phase

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        spent = time.perf_counter() - self._start
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent


def _check_finite(forward: transform_lib.Transform, options: Options) -> None:
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(forward)):
        rate = "" if options.io_lr is None else f" {options.io_lr:g}"
        raise UserError(
            f"the optimisation diverged to NaN; pass an `io_lr` below the present one"
            f"{rate}, or check the scans and the weights"
        )
