"""Preprocessing of two scans to the pair that a network or loss sees."""

import dataclasses
import functools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from nibabel import orientations

from jaxreg.data import modality as modality_lib
from jaxreg.data import network_grid, preprocess
from jaxreg.errors import UserError
from jaxreg.losses import objective as objective_lib
from jaxreg.losses import overlap
from jaxreg.losses.objective import Objective
from jaxreg.models.sam import SAM, TrainedSam, with_sam
from jaxreg.registration import conditioning
from jaxreg.registration import options as options_lib
from jaxreg.registration.options import Options, Regions
from jaxreg.space.grid import Grid, Volume
from jaxreg.typing import Pair
from jaxreg.weights import load, zoo


def with_grid(
    options: Options, model: zoo.LoadedModel | None, fixed: Volume
) -> Options:
    """Returns options on the grid of the weights, where they name none themselves.

    Without weights on the fixed scan's, a coarser or a finer one, see `options.Effort`.
    """
    if options.shape is not None:
        return options
    if model is not None:
        return dataclasses.replace(options, shape=model.shape)
    seen = placement_of(None, options).reoriented(fixed).grid
    effort = options_lib.EFFORTS[options.quality]
    shape = network_grid.shape_within(seen, effort.voxels, effort.least)
    return dataclasses.replace(options, shape=shape)


def with_modalities(options: Options, fixed: Volume, moving: Volume) -> Options:
    """Returns options that say what both scans are, by their values where "auto".

    Raises:
      UserError: what they are does not go with the other options.
    """
    found = dataclasses.replace(
        options,
        fixed_modality=modality_lib.settled(options.fixed_modality, fixed),
        moving_modality=modality_lib.settled(options.moving_modality, moving),
    )
    options_lib.check_modalities(found)
    return found


def conditioning_of(
    model: zoo.LoadedModel | str | os.PathLike[str] | None,
    options: Options,
    sam: TrainedSam | None,
) -> tuple[zoo.LoadedModel | None, conditioning.TaskValues]:
    """Returns the network as it serves the task, and what its pairs are to carry."""
    words = (options.task, options.pairing, options.smoothness)
    if isinstance(model, str | os.PathLike):
        model = load.load(model)
    loaded = zoo.LoadedModel | None
    options_lib.check_kind(
        model, loaded, "the model is", "a name, a path or what zoo.load gives"
    )
    if model is None:
        conditioning.check_unconditioned(*words)
        if options.level_iterations is not None:
            raise UserError(
                f"`level_iterations` is {options.level_iterations}, but no network "
                "takes part; leave it out"
            )
        return None, conditioning.UNCONDITIONED
    conditioned = conditioning.condition(_repeating(model, options), *words)
    return _with_sam(conditioned.model, sam), conditioned


def _repeating(model: zoo.LoadedModel, options: Options) -> zoo.LoadedModel:
    """Returns a pyramid that repeats its levels as often as it is asked to.

    Raises:
      UserError: the network has no levels to repeat, or has no derivative by which it
        could be optimised.
    """
    config, level_iterations = model.model.config, options.level_iterations
    if config.level_iterations is None:
        if level_iterations is not None:
            raise UserError(
                f"`level_iterations` is {level_iterations}, but {model.name} is no "
                "network that repeats its levels, as UniReg-RPN is; leave it out"
            )
        return model
    if level_iterations is not None:
        config = config.with_level_iterations(level_iterations)
    optimised = options.io_iterations is not None and options.io_target == "network"
    if (config.level_iterations or 1) > 1 and optimised:
        raise UserError(
            "`io_target` network cannot optimise a network that repeats its levels; "
            "give `io_iterations` None, `io_target` map or `level_iterations` 1"
        )
    return model.with_config(config)


def placement_of(
    model: zoo.LoadedModel | None, options: Options
) -> network_grid.ResamplingRule:
    """Returns how scans become arrays: as the options say, else as the weights do.

    Without either, as GradICON's after turning both scans to RAS.
    """
    found = options.placement
    if found is None:
        found = (
            network_grid.WITHOUT_WEIGHTS
            if model is None
            else network_grid.ResamplingRule.of_weights(model.bundle.preprocessing)
        )
    if options.stored_orientation:
        found = dataclasses.replace(found, orientation=None)
    return found


def reoriented(
    moving: Volume,
    fixed: Volume,
    regions: Regions,
    placement: network_grid.ResamplingRule,
    options: Options,
) -> tuple[Volume, Volume, Regions]:
    """Returns scans and regions with their array axes in the network's order."""
    if not options.stored_orientation:
        turn = functools.partial(oriented_like, reference=fixed.grid)
        moving = turn(moving)
        regions = options_lib.map_regions(
            regions, turn, ("moving_mask", "moving_segmentation")
        )
    regions = options_lib.map_regions(regions, placement.reoriented)
    return placement.reoriented(moving), placement.reoriented(fixed), regions


def warn_of_orientation(
    fixed: Volume, model: zoo.LoadedModel | None, options: Options
) -> None:
    """Warns where nobody knows whether a network sees scans as in its training."""
    if model is None or options.stored_orientation or options.placement is not None:
        return
    turned = placement_of(model, options).axes == "spl"
    if turned or model.orientation is not None:
        return
    warnings.warn(
        f"{model.name} does not say how the scans of its training were oriented, and "
        "sees the fixed scan as it is stored "
        f"({network_grid.orientation_of(fixed.grid)}); results are worse where that "
        "differs. In a checkpoint folder it is said by "
        f'"orientation": "{network_grid.CANONICAL}" (or what they had) under '
        "preprocessing in jaxreg.json",
        stacklevel=4,
    )


def with_rule_of(model: zoo.LoadedModel | None, options: Options) -> Options:
    """Returns the options with the weights' intensity rule where they have none.

    Raises:
      UserError: see `check_units`.
    """
    if model is None:
        return dataclasses.replace(options, placement=placement_of(None, options))
    check_units(model, options)
    if model.mask_inputs and not options.input_masking:
        warnings.warn(
            f"{model.name} was trained on scans that are 0 outside a mask; pass masks "
            "and `input_masking` to show it the same",
            stacklevel=3,
        )
    return dataclasses.replace(
        options,
        ct_window=options.ct_window
        or model.ct_window
        or model.model.config.hounsfield_window,
        placement=placement_of(model, options),
        io_sim="lncc" if options.io_sim == "auto" else options.io_sim,
        quantile_range=options.quantile_range or model.quantile_range,
        foreground=model.foreground
        if options.foreground is None
        else options.foreground,
    )


def check_units(model: zoo.LoadedModel, options: Options) -> None:
    """Checks that a network which reads Hounsfield units is shown them as they are.

    Raises:
      UserError: a scan is no CT for a network that knows nothing else, or another
        window would move what it reads.
    """
    config = model.model.config
    needed = config.hounsfield_window
    if needed is None:
        return
    for name in ("fixed_modality", "moving_modality"):
        modality = getattr(options, name)
        if modality == options_lib.AUTO:
            continue  # until the scan is read
        if modality_lib.kind(modality) != "ct" and config.network_window is not None:
            raise UserError(
                f"`{name}` is {modality}, but {model.name} reads Hounsfield units; "
                f"give `{name}` ct if it is one, or weights trained with "
                "`model.features` mind `model.backbone_window` None"
            )
    low, high = options.ct_window or model.ct_window or needed
    if "ct" in _kinds(options) and (low, high) != needed:
        given = "`ct_window` is" if options.ct_window else "its weights state"
        raise UserError(
            f"{given} {low:g} {high:g}, but {model.name} reads Hounsfield units of the "
            f"window {needed[0]:g} {needed[1]:g}; give `ct_window` {needed[0]:g} "
            f"{needed[1]:g}"
        )


def sam_for(
    model: zoo.LoadedModel | None, given: TrainedSam | None
) -> TrainedSam | None:
    """Returns the SAM network in use: the given one before that of a UniReg."""
    return given if given or model is None else zoo.sam_of(model)


def uses_sam(model: zoo.LoadedModel | None, options: Options) -> bool:
    """Whether registering has a use for a SAM network that is given."""
    lacks = (
        model is not None
        and model.model.config.needs_sam
        and SAM not in model.variables
    )
    shown = (
        options.io_iterations is not None
        and options.io_target == "features"
        and both_ct(options)
    )
    return lacks or shown or options.prealign in options_lib.SAM_METHODS


def compared_window(
    model: zoo.LoadedModel | None, options: Options
) -> tuple[float, float] | None:
    """Returns the Hounsfield units that are compared; None for all that is loaded."""
    return conditioning.compared_window(model) if both_ct(options) else None


def with_range(pair: Pair, model: zoo.LoadedModel | None, options: Options) -> Pair:
    """Returns the pair with the part of its intensities that is compared."""
    window = compared_window(model, options)
    rule, _ = intensity_rules(options)
    if window in (None, rule.ct_window):
        return pair
    part = jnp.asarray([network_grid.part_of(window, rule.ct_window)], jnp.float32)
    return dataclasses.replace(pair, similarity_range=part)


as_compared = jax.jit(objective_lib.as_compared)


def both_ct(options: Options) -> bool:
    """Says whether both scans are scaled as CT."""
    return _kinds(options) == {"ct"}


def _kinds(options: Options) -> set[str]:
    """Returns whose intensity rules hold, "ct", "mri" or both."""
    return {
        modality_lib.kind(modality)
        for modality in (options.fixed_modality, options.moving_modality)
    }


def _with_sam(model: zoo.LoadedModel, sam: TrainedSam | None) -> zoo.LoadedModel:
    """Returns a network that lacks the SAM network that it needs with the given one."""
    config = model.model.config
    if sam is None or not config.needs_sam or SAM in model.variables:
        return model
    return dataclasses.replace(
        model,
        model=config.with_sam_window(sam.ct_window).build(),
        variables=with_sam(model.variables, sam.variables),
    )


def check_volumes(moving: Volume, fixed: Volume, regions: Regions) -> None:
    """Checks that masks and label maps lie on their scans' grids, before any work.

    Raises:
      UserError: one lies elsewhere, or the segmentations share no label.
    """
    for scan, mask, segmentation in (
        (fixed, regions.fixed_mask, regions.fixed_segmentation),
        (moving, regions.moving_mask, regions.moving_segmentation),
    ):
        if mask is not None:
            preprocess.check_same_grid(mask, scan, what="mask")
        if segmentation is not None:
            preprocess.check_same_grid(segmentation, scan, what="segmentation")
    if regions.fixed_segmentation and regions.moving_segmentation:
        _shared_labels(
            regions, regions.moving_segmentation.array, regions.fixed_segmentation.array
        )


def _shared_labels(regions: Regions, moving, fixed) -> tuple[int, ...]:
    try:
        return overlap.shared_labels(moving, fixed)
    except UserError as error:
        names = [
            v.source
            for v in (regions.moving_segmentation, regions.fixed_segmentation)
            if v is not None
        ]
        raise UserError(f"{' and '.join(names)}: {error}") from error


def oriented_like(volume: Volume, reference: Grid) -> Volume:
    """Returns the volume with array axes in the order and direction of a grid's.

    Voxels are only permuted and flipped, none moves in world space. A network sees
    arrays alone: two scans stored in different orders would look rotated or mirrored
    to it (the original feeds them as they are stored).
    """
    turned = network_grid.oriented(
        volume, orientations.io_orientation(reference.affine_mm)
    )
    return dataclasses.replace(turned, array=np.ascontiguousarray(turned.array))


def intensity_rules(
    options: Options,
) -> tuple[preprocess.IntensityRule, preprocess.IntensityRule]:
    """Returns the intensity rules of the moving and of the fixed scan."""
    named = (options.moving_modality, options.fixed_modality)
    assert options_lib.AUTO not in named, "the caller has called with_modalities"
    moving, fixed = (
        preprocess.IntensityRule(
            modality=modality_lib.kind(modality),
            ct_window=options.ct_window or (-1000.0, 1000.0),
            quantile_range=options.quantile_range,
            foreground=bool(options.foreground),
        )
        for modality in named
    )
    return moving, fixed


def make_pair(
    moving: Volume,
    fixed: Volume,
    options: Options,
    regions: Regions,
    carried: network_grid.Resampled | None = None,
) -> Pair:
    """Returns both scans on the network grid, with what the objective needs of them.

    The volumes have their axes in the network's order already, see
    `network_grid.ResamplingRule.reoriented`. With `carried`, the moving scan is read
    over the fixed scan's network grid.

    Raises:
      UserError: see `preprocess.network_pair`; or the segmentations share no label.
    """
    placement = options.placement or network_grid.AS_GRADICON
    rules = intensity_rules(options)
    pair = preprocess.network_pair(
        moving,
        fixed,
        options.grid_shape,
        moving_rule=rules[0],
        fixed_rule=rules[1],
        moving_mask=regions.moving_mask,
        fixed_mask=regions.fixed_mask,
        mask_inputs=options.input_masking,
        mask_loss=options.loss_function_masking,
        placement=placement,
        moving_placement=carried,
    )
    segmentations = (regions.moving_segmentation, regions.fixed_segmentation)
    if options.dice_loss_weight == 0 or None in segmentations:
        return pair
    labels = [
        preprocess.network_labels(volume, options.grid_shape, placement=where)
        for volume, where in zip(
            segmentations, (carried or placement, placement), strict=True
        )
        if volume is not None
    ]
    # On the network grid, where a small structure may have vanished.
    classes = _shared_labels(regions, *labels)
    onehots = [overlap.one_hot(jnp.asarray(array), classes) for array in labels]
    return dataclasses.replace(
        pair,
        moving_onehot=onehots[0],
        fixed_onehot=onehots[1],
        valid=jnp.asarray(overlap.valid_classes(*onehots)),
    )


def objective_of(options: Options) -> Objective:
    """Returns the objective that options ask for."""
    return Objective(
        similarity=options.io_sim,
        dice_weight=options.dice_loss_weight,
        loss_masking=options.loss_function_masking,
        intensity_conservation=options.intensity_conservation_loss,
        original_conservation_offset=False,
    )
