"""Displacements without a network: their start, and whether they are kept."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import modality, network_grid
from jaxreg.errors import UserError
from jaxreg.losses.objective import Objective
from jaxreg.registration import options as options_lib
from jaxreg.registration import preparation
from jaxreg.registration.optimization import displacement, features, loop
from jaxreg.registration.options import Options, Regions
from jaxreg.registration.prealign import affine as affine_lib
from jaxreg.registration.prealign import measure, select
from jaxreg.space import affine
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume, unit_scale
from jaxreg.typing import Pair

_LARGEST_STRETCH = 1.5  # of lengths, by which extents may still be those of one thing
_SIGMA = 2  # voxels, of the window of local correlation
_SAME_PLACE = 0.01  # half diagonals of the fixed scan


@dataclasses.dataclass(frozen=True)
class Scans:
    """Reoriented scans with their regions, network grids and pre-alignment.

    Attributes:
      moving: the scan to be warped.
      fixed: the scan that stays.
      regions: of both.
      grids: their network grids, fixed and moving.
      start: the pre-alignment over which the moving scan was carried, if any.
      guess: a pre-alignment from which a displacement starts, of scans that are left
        as they are: what lies beyond the fixed scan's box is still there.
    """

    moving: Volume
    fixed: Volume
    regions: Regions
    grids: tuple[Grid, Grid]
    start: select.Prealignment | None
    guess: select.Prealignment | None = None

    @property
    def placed(self) -> np.ndarray:
        """Where pre-alignment or headers place them, 4x4, fixed to moving mm."""
        return np.eye(4) if self.start is None else self.start.affine_mm


def placed(options: Options, scans: Scans) -> tuple[Options, loop.Optimized]:
    """Returns the options with a similarity, and where the scans are without a network.

    That is where a pre-alignment has placed them, else the start that fits best.
    """
    shown = _as_shown(scans, options)
    level = affine_lib.judged(*shown)
    found, matrix = features.UNTOUCHED, scans.placed
    if scans.start is None:
        starts = _starts(scans, *shown)
        name = affine_lib.best_of(affine_lib.compare(level, starts))
        matrix = starts[name]
        found = dataclasses.replace(
            displacement.by_affine(unit_matrix(matrix, *scans.grids)), start=name
        )
    similar = _by_images(options, level, matrix)
    found = dataclasses.replace(found, similarity=similar)
    return dataclasses.replace(options, io_sim=similar), found


def find_displacement(
    pair: Pair, options: Options, scans: Scans, common: dict[str, Any]
) -> loop.Optimized:
    """Returns an affine map and a displacement between the scans' network grids.

    Affine maps are found from several starts, by each similarity that may suit the
    pair; the displacement follows from the map that fits best. All are found on the
    parts of the scans that can meet: where one shows much more than the other, its
    whole extent on the network grid would leave few voxels to what both show. A map
    that intensities gave on finer grids already is not looked for once more.
    """
    steps, progress = common["steps"], common.pop("progress")
    shown = _as_shown(scans, options)
    level = affine_lib.judged(*shown)
    starts = {"pre-alignment": scans.placed}
    if scans.guess is not None:
        starts = {"pre-alignment": scans.guess.affine_mm}
    elif scans.start is None:
        starts = _starts(scans, *shown)
    maps, came = dict(starts), {name: name for name in starts}
    fits = affine_lib.compare(level, starts)
    tried = _possible(options)
    if _placed_by_intensities(scans, options):
        tried = ()
    first = starts[affine_lib.best_of(fits)]
    if len(tried) > 1 and _by_images(options, level, first) == tried[0]:
        tried = tried[:1]
    levels = len(displacement.DisplacementConfig().factors)
    total = steps * (2 * len(starts) * len(tried) + levels)
    report = progress and loop.Report(progress, total)
    histories = []
    for name, similar in itertools.product(starts, tried):
        by = dataclasses.replace(options, io_sim=similar)
        part, objective, grids = _parts_that_meet(pair, by, scans, starts[name])
        matrix, history = displacement.find_affine(
            part,
            objective,
            unit_matrix(starts[name], *grids),
            steps=2 * steps,
            key=common["key"],
            extent_mm=_extent_mm(grids[0]),
            report=report,
        )
        report = report and report.after(2 * steps)
        histories.append(history)
        world = grids[1].unit_to_mm @ matrix @ np.linalg.inv(grids[0].unit_to_mm)
        candidates = transform_lib.Affine(world), transform_lib.Affine(first)
        if affine_lib.plausible(world) and affine_lib.no_worse_in_common(
            level, *candidates
        ):
            maps[f"{name} by {similar}"] = world
            came[f"{name} by {similar}"] = name
    fits |= affine_lib.compare(level, {n: maps[n] for n in maps if n not in starts})
    best = affine_lib.best_of(fits)
    doubts = _doubts_of_place(scans, maps, fits, best)
    similar = _by_images(options, level, maps[best])
    by = dataclasses.replace(options, io_sim=similar)
    result = _displaced(pair, by, scans, maps[best], report, common)
    result = dataclasses.replace(
        result,
        history=displacement.chained([*histories, result.history]),
        start=came[best],
        similarity=similar,
        doubts=doubts,
    )
    return _not_worse(result, starts[came[best]], scans, level, options)


def _placed_by_intensities(scans: Scans, options: Options) -> bool:
    """Whether a pre-alignment by intensities says where a displacement starts."""
    return scans.guess is not None and options.prealign in options_lib.INTENSITY_METHODS


def _displaced(
    pair: Pair,
    options: Options,
    scans: Scans,
    matrix: np.ndarray,
    report: loop.Report | None,
    common: dict[str, Any],
) -> loop.Optimized:
    """Returns a displacement found from an affine map, between the whole grids.

    Args:
      pair: of the whole scans.
      options: with the similarity in use.
      scans: both, on their whole grids.
      matrix: 4x4, fixed to moving mm.
      report: told of each step.
      common: steps, key and, perhaps, learning rate.
    """
    part, objective, (here, there) = _parts_that_meet(pair, options, scans, matrix)
    fixed, moving = scans.grids
    found = displacement.optimize_displacement(
        part,
        objective,
        start=unit_matrix(matrix, here, there),
        # Across modalities a descent on this grid only loses the place.
        affine=not (options.io_sim == "nmi" and _placed_by_intensities(scans, options)),
        found_affine=True,
        extent_mm=_extent_mm(here),
        report=report,
        **common,
    )
    return dataclasses.replace(
        found,
        forward=_between(found.forward, (fixed, moving), (here, there)),
        backward=_between(found.backward, (moving, fixed), (there, here)),
    )


def _possible(options: Options) -> tuple[str, ...]:
    """Returns the similarities that may suit a pair without a network."""
    if options.io_sim != "auto":
        return (options.io_sim,)
    modalities = options.fixed_modality, options.moving_modality
    if not modality.same_contrast(*modalities):
        return ("nmi",)
    contrasts = {modality.CONTRASTS[modality.canonical(name)] for name in modalities}
    return ("lncc", "nmi") if "mri" in contrasts else ("lncc",)


def _by_images(
    options: Options,
    level: measure.Level,
    matrix: np.ndarray,
) -> str:
    """Returns the similarity for two scans that are roughly aligned by a 4x4 in mm.

    Where the modalities do not say it: correlation's, if what is bright in one scan is
    bright in the other.
    """
    possible = _possible(options)
    if len(possible) == 1:
        return possible[0]
    alike = level.agreement(matrix) > measure.ALIKE
    return "lncc" if alike else "nmi"


def _extent_mm(grid: Grid) -> list[float]:
    return (unit_scale(grid.shape) * grid.spacing_mm).tolist()


def _starts(
    scans: Scans, here: measure.Shown, there: measure.Shown
) -> dict[str, np.ndarray]:
    """Returns first guesses of the affine map, 4x4 from fixed to moving mm, by name.

    The headers come first. The extents are stretched onto each other where both scans
    may show the same thing in them.
    """
    grids = scans.fixed.grid, scans.moving.grid
    masses = [s.array if s.mask is None else s.array * s.mask for s in (here, there)]
    starts = {
        "headers": np.eye(4),
        "centres of mass": affine.to_mm(
            affine.centres_of_mass(masses[0], masses[1], *grids), *grids
        ),
        "stretched extents": affine_lib.stretched(*grids),
    }
    stretch = np.linalg.svd(starts["stretched extents"][:3, :3], compute_uv=False)
    if max(stretch.max(), 1 / stretch.min()) > _LARGEST_STRETCH:
        del starts["stretched extents"]
    found: dict[str, np.ndarray] = {}
    for name, start in starts.items():
        apart = [affine_lib.apart(grids[0], start, other) for other in found.values()]
        if affine_lib.plausible(start) and min(apart, default=1.0) > _SAME_PLACE:
            found[name] = start
    return found


def _as_shown(scans: Scans, options: Options) -> tuple[measure.Shown, measure.Shown]:
    """Returns fixed and moving as their likeness is measured."""
    rules = preparation.intensity_rules(options)
    masked = options.input_masking or options.loss_function_masking
    masks = scans.regions.moving_mask, scans.regions.fixed_mask
    moving, fixed = (
        select.shown(select.Scan(volume, rule, mask if masked else None))
        for volume, rule, mask in zip(
            (scans.moving, scans.fixed), rules, masks, strict=True
        )
    )
    return fixed, moving


def _objective_of(options: Options) -> Objective:
    """Returns what a displacement minimises: local correlation in a narrower window.

    A network's prediction is regular by itself, and the window of 5 voxels that it is
    trained with is as wide as a small structure.
    """
    objective = preparation.objective_of(options)
    if options.io_sim not in ("lncc", "lncc2"):
        return objective
    return dataclasses.replace(objective, similarity_options=(("sigma", _SIGMA),))


def _parts_that_meet(
    pair: Pair, options: Options, scans: Scans, start: np.ndarray
) -> tuple[Pair, Objective, tuple[Grid, Grid]]:
    """Returns the pair of the parts of both scans that can meet, and their grids.

    Between them the objective. Beyond scans that show the same part of the body lie
    zeros, so that their edges hold on to each other; where either shows more, what it
    shows goes on beyond the other, and so do the outer voxels.

    Args:
      pair: of the whole scans, which are taken as they are where both meet all over.
      options: how to register.
      scans: both, on their whole grids.
      start: 4x4, fixed to moving mm.
    """
    objective = _objective_of(options)
    placement = options.placement or network_grid.AS_GRADICON
    volumes = {"fixed": scans.fixed, "moving": scans.moving}
    fixed, moving = scans.fixed.grid, scans.moving.grid
    parts = {
        "fixed": network_grid.part_near(fixed, moving, np.linalg.inv(start)),
        "moving": network_grid.part_near(moving, fixed, start),
    }
    cut = {name: network_grid.cut(volumes[name], part) for name, part in parts.items()}
    same = all(cut[name].grid.shape == volumes[name].grid.shape for name in cut)
    has_residual = scans.start is not None and scans.start.residual_field is not None
    if has_residual or placement.resize == "pad_crop":
        return pair, objective, scans.grids
    met = (
        network_grid.part_near(fixed, moving, np.linalg.inv(start), margin=0.0),
        network_grid.part_near(moving, fixed, start, margin=0.0),
    )
    sizes = [tuple(s.stop - s.start for s in part) for part in met]
    if sizes != [fixed.shape, moving.shape]:
        objective = dataclasses.replace(objective, outside="edge")
    whole = pair, objective, scans.grids
    if same:
        return whole
    regions = scans.regions
    for name, part in parts.items():
        names = (f"{name}_mask", f"{name}_segmentation")
        regions = options_lib.map_regions(
            regions, functools.partial(network_grid.cut, part=part), names
        )
    try:
        found = preparation.make_pair(cut["moving"], cut["fixed"], options, regions)
    except UserError:  # nothing to see there, or no label
        return whole
    here, there = (placement.grid(cut[name].grid, options.grid_shape) for name in cut)
    return preparation.as_compared(found), objective, (here, there)


def _doubts_of_place(
    scans: Scans,
    maps: Mapping[str, np.ndarray],
    fits: Mapping[str, measure.Fit],
    best: str,
) -> tuple[str, ...]:
    """Returns a sentence where the scans fit nearly as well elsewhere."""
    rivals = affine_lib.rivals(scans.fixed.grid, maps, fits, best)
    if not rivals:
        return ()
    return (
        f"the place of {scans.fixed.source} in {scans.moving.source} is not certain: "
        f"affine maps from {best} and from {', '.join(rivals)} differ and fit nearly "
        "alike; look at the result, give masks with `fixed_mask`, `moving_mask` and "
        "`loss_function_masking`, or crop the larger scan",
    )


@jax.jit
def _led(transform: transform_lib.Transform, places: jax.Array) -> jax.Array:
    return jnp.asarray(transform.map_points(places))


def _not_worse(
    found: loop.Optimized,
    start: np.ndarray,
    scans: Scans,
    level: measure.Level,
    options: Options,
) -> loop.Optimized:
    """Returns what was found, or the start where that fits better, as a doubt.

    Args:
      found: between the scans' network grids.
      start: 4x4, fixed to moving mm.
      scans: both.
      level: both as they are compared.
      options: how to register.
    """
    if options.dice_loss_weight > 0 or options.intensity_conservation_loss:
        return found  # which intensities as they are do not judge
    if scans.start is not None and scans.start.residual_field is not None:
        return found  # between scans that are bent already
    fixed, moving = scans.grids

    def led(places: np.ndarray) -> np.ndarray:
        enter = transform_lib.Affine(np.linalg.inv(fixed.unit_to_mm))
        unit = jnp.asarray(enter(places), jnp.float32)
        ends = np.asarray(_led(found.forward, unit[None])[0], np.float64)
        return np.asarray(transform_lib.Affine(moving.unit_to_mm)(ends))

    candidates = {"start": transform_lib.Affine(start), "found": led}
    compared = affine_lib.compare(level, candidates)
    fits = {name: fit.globally for name, fit in compared.items()}
    common = affine_lib.no_worse_in_common(level, led, candidates["start"])
    if common and affine_lib.as_good(fits["found"], fits["start"]):
        return found
    where = "" if common else " where both results place them on each other"
    stay = "stay" if found.start.endswith("s") else "stays"
    doubt = (
        f"the optimisation made the scans less alike{where} (unlikeness "
        f"{fits['found']:.4f}, by the {found.start} {fits['start']:.4f}), so the "
        f"{found.start} {stay}; try another similarity (`io_sim`), more steps or a "
        "finer grid"
    )
    kept = displacement.by_affine(unit_matrix(start, fixed, moving))
    return dataclasses.replace(
        found,
        forward=kept.forward,
        backward=kept.backward,
        doubts=(*found.doubts, doubt),
    )


def _between(
    unit: transform_lib.Transform,
    whole: tuple[Grid, Grid],
    parts: tuple[Grid, Grid],
) -> transform_lib.Transform:
    """Returns a map between the unit cubes of two parts as one of the wholes."""
    if all(a is b for a, b in zip(whole, parts, strict=True)):
        return unit
    enter = np.linalg.inv(parts[0].unit_to_mm) @ whole[0].unit_to_mm
    leave = np.linalg.inv(whole[1].unit_to_mm) @ parts[1].unit_to_mm
    first, last = (transform_lib.Affine(jnp.asarray(m, "f4")) for m in (enter, leave))
    return transform_lib.Transform((first, *unit.steps, last))


def unit_matrix(world: np.ndarray, fixed: Grid, moving: Grid) -> np.ndarray:
    """Returns a 4x4 world map (RAS+ mm) between the unit cubes of two grids."""
    return np.linalg.inv(moving.unit_to_mm) @ world @ fixed.unit_to_mm
