"""The verb ``jaxreg register``, of one pair; many are done by `cli.many`."""

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any, ClassVar

import typer

from jaxreg.cli import many
from jaxreg.cli.options import (
    OUT,
    PANELS,
    SCANS,
    Division,
    Fill,
    Weights,
    app,
    check_outputs,
    fetch,
    load_sam,
    print_numbers,
    print_written,
    warn,
    with_modalities,
)
from jaxreg.cli.parser import option_name, verb
from jaxreg.cli.progress import Bar, compiling, interrupted, shorter
from jaxreg.errors import UserError
from jaxreg.registration import options as options_lib
from jaxreg.registration.options import NETWORK, Options

Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Scans:
    """The two scans.

    Attributes:
      fixed: Scan that stays.
      moving: Scan to be warped onto it.
    """

    PANEL: ClassVar = SCANS

    fixed: Path | None = None
    moving: Path | None = None


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the registration starts.

    Attributes:
      initial: Transform to start from, fixed to moving points, in place of --prealign;
        the result is the whole transform. Formats as --transform of warp.
    """

    PANEL: ClassVar = "Pre-alignment"

    initial: Path | None = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is written.

    Attributes:
      transform_out: Transform, fixed to moving points: .h5 .hdf5 .tfm .txt (ITK
        composite, LPS mm) or .nii.gz .nii (displacement field on the fixed grid, LPS
        mm).
      warped_moving_out: Moving scan on the fixed grid in its own pixel type: .nii.gz
        .nii .nrrd .mha.
      inverse_out: Numerical inverse, moving to fixed points; formats as
        --transform-out.
      report: Page with pictures and numbers, self-contained: .html.
    """

    PANEL: ClassVar = OUT

    transform_out: Path | None = None
    warped_moving_out: Path | None = None
    inverse_out: Path | None = None
    report: Path | None = None


@dataclasses.dataclass(frozen=True)
class RegionFiles:
    """Masks and label maps of the scans.

    Attributes:
      fixed_mask: Region of the fixed scan.
      moving_mask: Region of the moving scan.
      fixed_segmentation: Label map of the fixed scan.
      moving_segmentation: Label map of the moving scan.
    """

    PANEL: ClassVar = "Masks and segmentations"

    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_segmentation: Path | None = None
    moving_segmentation: Path | None = None


@verb(
    app,
    "register",
    only=PANELS,
    panels=PANELS,
    defaults={"fixed_modality": None, "moving_modality": None},
)
def register_verb(
    context: typer.Context,
    scans: Scans,
    written: Outputs,
    outside: Fill,
    region_files: RegionFiles,
    start: Start,
    named: Weights,
    listed: many.PairList,
    divided: Division,
    options: Options,
) -> None:
    """Register one scan onto another: a transform, a warped scan, a report.

    With --pairs many, in one process; what fails on one pair leaves the others alone.

    Options that would have no effect are refused if you surely meant them (masks
    without a masking option, a Dice weight without optimisation), and answered with a
    warning otherwise. Both segmentations without masks and without --dice-loss-weight
    are taken as masks, as the PyTorch tool does; this is deprecated.
    """
    regions = dict(vars(region_files))
    outputs = _as_options(vars(written))
    modalities = {
        name: getattr(options, name) for name in ("fixed_modality", "moving_modality")
    }
    many.check_one_or_many(
        listed,
        divided,
        _as_options({**vars(scans), **vars(start), **vars(written), **regions}),
        _as_options({**vars(scans), **modalities}),
    )
    options = dataclasses.replace(
        with_modalities(options), inverse=written.inverse_out is not None
    )
    if listed.pairs is not None and divided.merge_parts is not None:
        many.merge(listed, divided.merge_parts)
        return
    if listed.pairs is not None:
        weights = _choose_weights(named.model, named.network_weights, options)
        _warn_about_idle_options(options, regions, None, outputs)
        with (
            interrupted(
                "the pairs that are done are written; give the same command with "
                "--skip-existing to go on with the others"
            ),
            Bar("register", waiting="compiling and the first pair") as bar,
        ):
            many.register_list(
                listed, divided, options, weights, modalities=modalities,
                fill=outside.fill, sam_weights=named.sam_weights,
                command=shlex.join(["jaxreg", *context.obj]), show=bar.pairs,
            )  # fmt: skip
        return
    inputs = [*vars(scans).values(), named.network_weights, *regions.values()]
    check_outputs(outputs, [*inputs, start.initial])
    _check_start(start, options)
    regions, options = _segmentations_as_masks(regions, options)
    options_lib.check_options(options)
    options_lib.check_regions(options, regions)
    weights = _choose_weights(named.model, named.network_weights, options)
    _warn_about_idle_options(options, regions, outside.fill, outputs)
    _register(
        {**vars(scans), **regions}, outputs, options, weights, outside.fill,
        shlex.join(["jaxreg", *context.obj]), sam_weights=named.sam_weights,
        initial=start.initial,
    )  # fmt: skip


def _check_start(start: Start, options: Options) -> None:
    if start.initial is None:
        return
    from jaxreg.io import files
    from jaxreg.registration.prealign import initial

    initial.check(options)
    files.check_readable(start.initial, "--initial")


def _as_options(values: Mapping[str, Any]) -> dict[str, Any]:
    return {option_name(name): value for name, value in values.items()}


def _register(
    scans,
    outputs,
    options,
    weights,
    fill,
    command: str,
    *,
    sam_weights: pathlib.Path | None,
    initial: pathlib.Path | None,
) -> None:
    """Reads, registers and writes, once everything else has been checked."""
    from jaxreg.io import volumes
    from jaxreg.registration import pair, preparation, scan_pair
    from jaxreg.registration import result as result_lib

    for name, path in scans.items():
        if path is not None:
            volumes.check_source(path, option_name(name))
    sam = load_sam(options.prealign, sam_weights, weights)
    read = scan_pair.read(
        scans["moving"], scans["fixed"],
        options_lib.Regions(**{n: scans[n] for n in vars(options_lib.Regions())}),
        modality=options.moving_modality, fill=fill,
        to_warp=outputs["--warped-moving-out"] is not None,
    )  # fmt: skip
    model = None if weights is None else fetch(weights)
    options = preparation.with_grid(options, model)
    if sam is not None and not preparation.uses_sam(model, options):
        warn(
            "--sam-weights has no effect without --prealign sam, --io-target features "
            "of two CT scans, or a UniReg that lacks its SAM network"
        )
    network = model is not None
    waiting = compiling(options.grid_shape, network=network)
    with (
        interrupted(
            "nothing was written; give the same command again, what was compiled and "
            "downloaded is kept"
        ),
        Bar("optimise", waiting=waiting, shorter=shorter(network=network)) as bar,
    ):
        result = pair.register(
            read.moving, read.fixed, model, options,
            regions=read.regions, sam=sam, initial=initial, progress=bar.step,
        )  # fmt: skip
    if model is not None and outputs["--report"] is not None:
        known = f"{result.weights}; CRC-32 {model.checksum}"
        result = dataclasses.replace(result, weights=known)
    result = dataclasses.replace(result, scans=read).save(
        transform=outputs["--transform-out"],
        warped=outputs["--warped-moving-out"],
        inverse=outputs["--inverse-out"],
        report=outputs["--report"],
        command=command,
    )
    print_numbers(result_lib.summary(result))
    print_written(outputs.values())


def _segmentations_as_masks(regions: dict, options):
    """Applies the PyTorch tool's older meaning of segmentations, with a warning."""
    no_masks = regions["fixed_mask"] is None and regions["moving_mask"] is None
    both = regions["fixed_segmentation"] and regions["moving_segmentation"]
    wanted = options.loss_function_masking or not options.input_masking
    if not (no_masks and both and options.dice_loss_weight == 0 and wanted):
        return regions, options
    warn(
        "the segmentations are used as masks, because there are no masks and "
        "--dice-loss-weight is 0; this is deprecated, pass them as --fixed-mask and "
        "--moving-mask"
    )
    if not options.loss_function_masking:
        options = dataclasses.replace(options, input_masking=True)
    regions = {
        "fixed_mask": regions["fixed_segmentation"],
        "moving_mask": regions["moving_segmentation"],
        "fixed_segmentation": None,
        "moving_segmentation": None,
    }
    return regions, options


def _choose_weights(
    model: str | None, network_weights: pathlib.Path | None, options
) -> str | pathlib.Path | None:
    """Returns what `load.load` is to load; None where no network takes part."""
    target, prealigned = options.io_target, options.prealign != "none"
    named = [
        f"{option} {value}"
        for option, value in (
            ("--network-weights", network_weights),
            ("--model", model),
        )
        if value is not None and str(value).lower() != "none"
    ]
    if target == "displacement":
        if named:
            raise UserError(
                f"{named[0]} has no effect with --io-target displacement, which uses "
                "no network; leave one of them out"
            )
        return None
    if model is not None and model.lower() == "none":
        if target in ("features", "map"):  # from where the scans are
            return None
        if prealigned and options.io_iterations is None:
            return None
        raise UserError(
            "--model none leaves nothing to optimise or predict with; add --io-target "
            "displacement to register without weights"
            + ", or --io-iterations None to pre-align alone"
            * prealigned
        )
    from jaxreg.weights import zoo

    if network_weights is None:
        return model or NETWORK
    if model is not None and model not in zoo.ZOO:
        raise UserError(
            f"--model {model} and --network-weights {network_weights} both name "
            "weights; pass one of them"
        )
    # A name of the zoo wins over a folder called so, unless it is spelt as a path.
    return network_weights.absolute()


def _warn_about_idle_options(options, regions, fill, outputs) -> None:
    if options.io_iterations is None:
        if options.io_lr is not None:
            warn("--io-lr has no effect with --io-iterations None")
        if options.loss_function_masking:
            warn(
                "--loss-function-masking affects only the printed similarity with "
                "--io-iterations None"
            )
    elif options.io_target == "features":
        for name, used in (
            ("--loss-function-masking", options.loss_function_masking),
            (f"--io-sim {options.io_sim}", options.io_sim != type(options).io_sim),
        ):
            if used:
                warn(
                    f"{name} affects only the printed similarity with --io-target "
                    "features"
                )
    if regions["fixed_segmentation"] and options.dice_loss_weight == 0:
        warn("the segmentations have no effect without --dice-loss-weight")
    if fill is not None and not (outputs["--warped-moving-out"] or outputs["--report"]):
        warn("--fill has no effect without --warped-moving-out or --report")
