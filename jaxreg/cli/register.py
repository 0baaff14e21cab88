"""The verb ``jaxreg register``, of one pair; many are done by `cli.many`."""

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping, Sequence
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
    named_model,
    print_numbers,
    print_written,
    say_chosen,
    warn,
)
from jaxreg.cli.parser import option_name, verb
from jaxreg.cli.progress import Bar, compiling, interrupted, shorter
from jaxreg.errors import UserError
from jaxreg.registration import options as options_lib
from jaxreg.registration.options import AUTO, Options

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


@verb(app, "register", only=PANELS, panels=PANELS)
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
    many.check_one_or_many(
        listed,
        divided,
        _as_options({**vars(scans), **vars(start), **vars(written), **regions}),
        _as_options(vars(scans)),
    )
    options = dataclasses.replace(options, inverse=written.inverse_out is not None)
    if listed.pairs is not None and divided.merge_parts is not None:
        many.merge(listed, divided.merge_parts)
        return
    if listed.pairs is not None:
        _register_list(
            listed, divided, named, options, outside.fill,
            shlex.join(["jaxreg", *context.obj]),
        )  # fmt: skip
        return
    inputs = [*vars(scans).values(), named.network_weights, *regions.values()]
    check_outputs(outputs, [*inputs, start.initial])
    options, guessed = _with_guessed(scans, options)
    _check_start(start, options)
    regions, options = _segmentations_as_masks(regions, options)
    options_lib.check_options(options)
    options_lib.check_regions(options, regions)
    weights, why = _choose_weights(named.model, named.network_weights, options)
    _warn_about_idle_options(options, regions, outside.fill, outputs)
    _register(
        {**vars(scans), **regions}, outputs, options, weights, outside.fill,
        shlex.join(["jaxreg", *context.obj]), sam_weights=named.sam_weights,
        initial=start.initial, why=why, guessed=guessed,
    )  # fmt: skip


def _register_list(
    listed: many.PairList,
    divided: Division,
    named: Weights,
    options: Options,
    fill: float | None,
    command: str,
) -> None:
    """Chooses what registers a list, and registers it."""
    assert listed.pairs is not None  # the caller's promise
    across = many.across(listed.pairs, options)
    weights, why = _choose_weights(
        named.model, named.network_weights, options, across=across
    )
    say_chosen(why)
    _warn_about_idle_options(options, {"fixed_segmentation": None}, None, {})
    with (
        interrupted(
            "the pairs that are done are written; give the same command with "
            "--skip-existing to go on with the others"
        ),
        Bar("register", waiting="compiling and the first pair") as bar,
    ):
        many.register_list(
            listed, divided, options, weights, fill=fill,
            sam_weights=named.sam_weights, command=command, show=bar.pairs,
        )  # fmt: skip


def _with_guessed(scans: Scans, options: Options) -> tuple[Options, list[str]]:
    """Returns the options with the modalities that the scans look like, where they say
    none, and lines about it.
    """
    from jaxreg.data import modality
    from jaxreg.io import volumes

    found, lines = {}, []
    for name, path in vars(scans).items():
        if getattr(options, f"{name}_modality") == AUTO:
            volumes.check_source(path, option_name(name))
            found[name] = modality.guessed(volumes.read_volume(path))
            lines.append(f"--{name}-modality is not given: by its values {found[name]}")
    given = {f"{name}_modality": value for name, value in found.items()}
    return dataclasses.replace(options, **given), lines


def _check_start(start: Start, options: Options) -> None:
    if start.initial is None:
        return
    from jaxreg.io import files
    from jaxreg.registration.prealign import initial

    initial.check(options)
    files.check_readable(start.initial, "--initial")


def _as_options(values: Mapping[str, Any]) -> dict[str, Any]:
    return {option_name(name): value for name, value in values.items()}


def _say(guessed: Sequence[str], why: str) -> None:
    for line in guessed:
        print(line)
    say_chosen(why)


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
    why: str,
    guessed: Sequence[str],
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
    _say(guessed, why)
    model = None if weights is None else fetch(weights)
    options = preparation.with_grid(options, model, read.fixed)
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
    result = dataclasses.replace(result, scans=read, chosen=why).save(
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
    model: str | None,
    network_weights: pathlib.Path | None,
    options: Options,
    *,
    across: bool | None = None,
) -> tuple[str | pathlib.Path | None, str]:
    """Returns what `load.load` is to load, None for no network; and why, if not named.

    For `across` see `automatic.choose`.
    """
    word = "" if model is None else model.lower()
    named = [
        f"{option} {value}"
        for option, value in (
            ("--network-weights", network_weights),
            ("--model", model),
        )
        if value is not None and str(value).lower() not in ("none", AUTO)
    ]
    if options.io_target == "displacement":
        if named:
            raise UserError(
                f"{named[0]} has no effect with --io-target displacement, which uses "
                "no network; leave one of them out"
            )
        return None, ""
    if word == "none":
        if options.io_target == "network":
            raise UserError(
                "--model none leaves nothing to optimise or predict with; leave "
                "--io-target network out to register without weights"
            )
        return None, ""
    from jaxreg.weights import zoo

    if network_weights is None:
        return named_model(model, options, across=across)
    if word not in ("", AUTO) and model not in zoo.ZOO:
        raise UserError(
            f"--model {model} and --network-weights {network_weights} both name "
            "weights; pass one of them"
        )
    # A name of the zoo wins over a folder called so, unless it is spelt as a path.
    return network_weights.absolute(), ""


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
