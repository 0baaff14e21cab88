"""The command line: ``jaxreg <verb>``.

Long options have hyphens; the underscore spelling of the PyTorch tool works as well, so
that a script changes one word (``unigradicon-register`` to ``jaxreg register``). What
can be checked without registering is checked first, and a mistake of the user is one
sentence on stderr with exit status 2. Heavy imports live inside the verbs: ``--help``
is quick.
"""

import contextlib
import dataclasses
import enum
import pathlib
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jaxreg import __version__
from jaxreg.cli import many, match, train
from jaxreg.cli.options import (
    FIXED_MODALITY,
    INPUT,
    MOVING_MODALITY,
    OPTIMISE,
    REGIONS,
    SCANS,
    WARPED_MODALITY,
    CtWindow,
    InputMasking,
    IoLr,
    IoSim,
    IoTarget,
    LevelIterations,
    LossMasking,
    Modality,
    PairingName,
    Prealign,
    PrealignWay,
    QuantileRange,
    SamWeights,
    Seed,
    Similarity,
    Smoothness,
    Target,
    TaskName,
    choice,
    load_sam,
    option,
    parse_fill,
    parse_iterations,
    parse_shape,
    print_numbers,
)
from jaxreg.cli.progress import Bar as _Bar
from jaxreg.cli.progress import compiling, interrupted, shorter
from jaxreg.errors import UserError
from jaxreg.xla import compilation_cache

if TYPE_CHECKING:
    from jaxreg.space.grid import Grid, Volume
    from jaxreg.space.transform import Transform
    from jaxreg.weights.zoo import LoadedModel

# typer carries its own copy of click since 0.26; the base of all usage errors is found
# through the one exception that it exports in every version.
_ClickException: Any = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Universal medical image registration in JAX.",
)


train.add_to(app)
match.add_to(app)


class Precision(enum.StrEnum):
    """Arithmetic of the network."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Frame(enum.StrEnum):
    """Sign convention of points in mm."""

    LPS = "lps"
    RAS = "ras"


# One line of help per option, its unit and default in it. [brackets] would be markup.
_OUT, _MODEL = "Outputs", "Model"
Path = pathlib.Path
Fixed = Annotated[Path | None, option("--fixed", "Scan that stays.", SCANS)]
Moving = Annotated[Path | None, option("--moving", "Scan to be warped onto it.", SCANS)]
TransformOut = Annotated[
    Path | None,
    option(
        "--transform-out",
        "Transform, fixed to moving points: .h5 .hdf5 .tfm .txt (ITK composite, LPS "
        "mm) or .nii.gz .nii (displacement field on the fixed grid, LPS mm).",
        _OUT,
    ),
]
WarpedOut = Annotated[
    Path | None,
    option(
        "--warped-moving-out",
        "Moving scan on the fixed grid in its own pixel type: .nii.gz .nii .nrrd .mha.",
        _OUT,
    ),
]
InverseOut = Annotated[
    Path | None,
    option(
        "--inverse-out",
        "Numerical inverse, moving to fixed points; formats as --transform-out.",
        _OUT,
    ),
]
Report = Annotated[
    Path | None,
    option("--report", "Page with pictures and numbers, self-contained: .html.", _OUT),
]
Fill = Annotated[
    str,
    option(
        "--fill",
        "Value outside the moving scan and in a CT's padding, or auto: air for CT (the "
        "border's commonest value, as -1024, else -1000); 0 for label maps and scans "
        "without negative values; for others the border's commonest value or the "
        "minimum.",
        _OUT,
        metavar="NUMBER|auto",
    ),
]
Model = Annotated[
    str | None,
    option(
        "--model",
        "unigradicon, multigradicon, a path to weights (checkpoint folder or .trch), "
        "or none. Default: unigradicon; none with --io-target displacement.",
        _MODEL,
    ),
]
NetworkWeights = Annotated[
    Path | None,
    option(
        "--network-weights",
        "Your own weights for the model: checkpoint folder or .trch.",
        _MODEL,
    ),
]
ShapeText = Annotated[
    str | None,
    option(
        "--shape",
        "Network grid in voxels, the slowest axis of the volume first, as the network "
        "sees it turned (without weights: superior, anterior, right; its fastest for "
        "weights that see NIfTI's order, as PromptReg's). Default: the grid that the "
        "weights were trained on, 175,175,175 for the published ones.",
        _MODEL,
        metavar="D,H,W",
    ),
]
PrecisionName = Annotated[
    Precision,
    choice(
        "--precision",
        "Of the network's products, where the device has a choice: weights and images "
        "stay float32, and a CPU always computes in it.",
        _MODEL,
    ),
]
Iterations = Annotated[
    str,
    option(
        "--io-iterations",
        "Steps (for a displacement per level of resolution), or None for a single "
        "prediction.",
        OPTIMISE,
        metavar="N",
    ),
]
FixedMask = Annotated[
    Path | None, option("--fixed-mask", "Region of the fixed scan.", REGIONS)
]
MovingMask = Annotated[
    Path | None, option("--moving-mask", "Region of the moving scan.", REGIONS)
]
StoredOrientation = Annotated[
    bool,
    option(
        "--stored-orientation",
        "Feed both scans as they are stored, as the PyTorch tool does. Default: their "
        "axes are permuted and flipped into the order that the weights were trained "
        "with, where they say it, else the moving scan's into the fixed scan's.",
        _MODEL,
    ),
]
FixedSegmentation = Annotated[
    Path | None,
    option("--fixed-segmentation", "Label map of the fixed scan.", REGIONS),
]
MovingSegmentation = Annotated[
    Path | None,
    option("--moving-segmentation", "Label map of the moving scan.", REGIONS),
]
DiceWeight = Annotated[
    float,
    option(
        "--dice-loss-weight",
        "Weight of the Dice term; needs both segmentations.",
        REGIONS,
    ),
]
Conservation = Annotated[
    bool,
    option(
        "--intensity-conservation-loss",
        "Multiply warped intensity by the Jacobian determinant; both scans CT.",
        INPUT,
    ),
]


@app.command("register")
def register_verb(  # noqa: PLR0913
    context: typer.Context,
    *,
    fixed: Fixed = None,
    moving: Moving = None,
    fixed_modality: Annotated[Modality | None, FIXED_MODALITY] = None,
    moving_modality: Annotated[Modality | None, MOVING_MODALITY] = None,
    transform_out: TransformOut = None,
    warped_moving_out: WarpedOut = None,
    inverse_out: InverseOut = None,
    report: Report = None,
    fill: Fill = "auto",
    model: Model = None,
    network_weights: NetworkWeights = None,
    shape: ShapeText = None,
    precision: PrecisionName = Precision.FLOAT32,
    stored_orientation: StoredOrientation = False,
    task: TaskName = "auto",
    pairing: PairingName = None,
    smoothness: Smoothness = None,
    level_iterations: LevelIterations = None,
    prealign: PrealignWay = Prealign.NONE,
    sam_weights: SamWeights = None,
    io_iterations: Iterations = "50",
    io_target: IoTarget = Target.NETWORK,
    io_sim: IoSim = Similarity.AUTO,
    io_lr: IoLr = None,
    seed: Seed = 0,
    fixed_mask: FixedMask = None,
    moving_mask: MovingMask = None,
    input_masking: InputMasking = False,
    loss_function_masking: LossMasking = False,
    fixed_segmentation: FixedSegmentation = None,
    moving_segmentation: MovingSegmentation = None,
    dice_loss_weight: DiceWeight = 0.0,
    intensity_conservation_loss: Conservation = False,
    ct_window: CtWindow = None,
    quantile_range: QuantileRange = None,
    pairs: many.Pairs = None,
    out_dir: many.OutDir = None,
    summary: many.Summary = None,
    skip_existing: many.SkipExisting = False,
) -> None:
    """Register one scan onto another: a transform, a warped scan, a report.

    With --pairs many, in one process; what fails on one pair leaves the others alone.

    Options that would have no effect are refused if you surely meant them (masks
    without a masking option, a Dice weight without optimisation), and answered with a
    warning otherwise. Both segmentations without masks and without --dice-loss-weight
    are taken as masks, as the PyTorch tool does; this is deprecated.
    """
    regions = {
        "fixed_mask": fixed_mask,
        "moving_mask": moving_mask,
        "fixed_segmentation": fixed_segmentation,
        "moving_segmentation": moving_segmentation,
    }
    outputs = {
        "--transform-out": transform_out,
        "--warped-moving-out": warped_moving_out,
        "--inverse-out": inverse_out,
        "--report": report,
    }
    scans = {"--fixed": fixed, "--moving": moving}
    modalities = {"fixed_modality": fixed_modality, "moving_modality": moving_modality}
    asked = many.Asked(pairs, out_dir, summary, skip_existing)
    many.check_one_or_many(
        asked,
        {**scans, **outputs, **{_hyphened(name): v for name, v in regions.items()}},
        {**scans, **{_hyphened(name): v for name, v in modalities.items()}},
    )
    from jaxreg.registration import options as options_lib

    value = parse_fill(fill)
    options = options_lib.Options(
        fixed_modality=(fixed_modality or Modality.MRI).value,
        moving_modality=(moving_modality or Modality.MRI).value,
        ct_window=ct_window,
        quantile_range=quantile_range,
        input_masking=input_masking,
        loss_function_masking=loss_function_masking,
        io_iterations=parse_iterations(io_iterations),
        io_target=io_target.value,
        io_sim=io_sim.value,
        io_lr=io_lr,
        dice_loss_weight=dice_loss_weight,
        intensity_conservation_loss=intensity_conservation_loss,
        shape=None if shape is None else parse_shape(shape),
        precision=precision.value,
        stored_orientation=stored_orientation,
        task=task,
        pairing=None if pairing is None else pairing.value,
        smoothness=smoothness,
        level_iterations=level_iterations,
        prealign=prealign.value,
        seed=seed,
        inverse=inverse_out is not None,
    )
    if pairs is not None:
        weights = _choose_weights(model, network_weights, options)
        _warn_about_idle_options(options, regions, None, outputs)
        with (
            interrupted(
                "the pairs that are done are written; give the same command with "
                "--skip-existing to go on with the others"
            ),
            _Bar("register", waiting="compiling and the first pair") as bar,
        ):
            many.register_list(
                asked, options, weights, modalities=modalities, fill=value,
                sam_weights=sam_weights, fetch=_fetch, show=bar.pairs,
            )  # fmt: skip
        return
    _check_outputs(outputs, [fixed, moving, network_weights, *regions.values()])
    regions, options = _segmentations_as_masks(regions, options)
    options_lib.check_options(options)
    options_lib.check_regions(options, regions)
    weights = _choose_weights(model, network_weights, options)
    _warn_about_idle_options(options, regions, value, outputs)
    _register(
        {"fixed": fixed, "moving": moving, **regions}, outputs, options, weights, value,
        shlex.join(["jaxreg", *context.obj]), sam_weights=sam_weights,
    )  # fmt: skip


def _register(
    scans,
    outputs,
    options,
    weights,
    fill,
    command: str,
    *,
    sam_weights: pathlib.Path | None,
) -> None:
    """Reads, registers and writes, once everything else has been checked."""
    from jaxreg.io import volumes
    from jaxreg.registration import options as options_lib
    from jaxreg.registration import pair, preparation, scan_pair
    from jaxreg.registration import result as result_lib

    for name, path in scans.items():
        if path is not None:
            volumes.check_source(path, _hyphened(name))
    sam = load_sam(options.prealign, sam_weights, weights)
    read = scan_pair.read(
        scans["moving"], scans["fixed"],
        options_lib.Regions(**{n: scans[n] for n in vars(options_lib.Regions())}),
        modality=options.moving_modality, fill=fill,
        to_warp=outputs["--warped-moving-out"] is not None,
    )  # fmt: skip
    model = None if weights is None else _fetch(weights)
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
        _Bar("optimise", waiting=waiting, shorter=shorter(network=network)) as bar,
    ):
        result = pair.register(
            read.moving, read.fixed, model, options,
            regions=read.regions, sam=sam, progress=bar.step,
        )  # fmt: skip
    result = dataclasses.replace(result, scans=read).save(
        transform=outputs["--transform-out"],
        warped=outputs["--warped-moving-out"],
        inverse=outputs["--inverse-out"],
        report=outputs["--report"],
        command=command,
    )
    print_numbers(result_lib.summary(result))
    _print_written(outputs.values())


def _fetch(weights: str | pathlib.Path) -> "LoadedModel":
    from jaxreg.weights import load

    with _Bar("fetch weights") as bar:
        return load.load(weights, progress=bar.bytes)


@app.command("warp")
def warp_verb(
    *,
    fixed: Annotated[
        Path | None, option("--fixed", "Scan whose grid is the result's.", SCANS)
    ] = None,
    moving: Annotated[
        Path | None, option("--moving", "Scan or label map to be warped.", SCANS)
    ] = None,
    transform: Annotated[
        Path | None,
        option(
            "--transform",
            "Transform, fixed to moving points: .h5 .hdf5 .tfm .txt .mat of ITK, ANTs "
            "or 3D Slicer, or a displacement field .nii.gz .nii .nrrd .nhdr .mha .mhd. "
            "Default: none, the moving scan is resampled on the fixed grid where the "
            "two headers place it.",
            SCANS,
        ),
    ] = None,
    warped_moving_out: WarpedOut = None,
    moving_modality: Annotated[Modality | None, WARPED_MODALITY] = None,
    linear: Annotated[
        bool, option("--linear", "Interpolate linearly: for scans.", _OUT)
    ] = False,
    nearest_neighbor: Annotated[
        bool,
        option("--nearest-neighbor", "Take the nearest voxel: for label maps.", _OUT),
    ] = False,
    fill: Fill = "auto",
    points: Annotated[
        Path | None,
        option(
            "--points",
            "Points in the fixed scan, mm: .csv with columns x, y, z (by name or the "
            "first three), or .fcsv or .mrk.json of 3D Slicer. Other columns are kept.",
            SCANS,
        ),
    ] = None,
    points_out: Annotated[
        Path | None,
        option(
            "--points-out",
            "The same points in the moving scan, mm: .csv .fcsv .mrk.json.",
            _OUT,
        ),
    ] = None,
    points_frame: Annotated[
        Frame,
        choice(
            "--points-frame",
            "Sign convention of the points: lps as in ITK and ANTs, ras as in NIfTI. "
            "3D Slicer's files say it themselves.",
            SCANS,
        ),
    ] = Frame.LPS,
) -> None:
    """Apply a transform to a scan, a label map or points.

    Images are pulled from moving onto the fixed grid; points go the other way, from
    the fixed scan to the moving one. For points of the moving scan, or to bring the
    fixed scan onto the moving one, take what --inverse-out of register wrote. Label
    maps need --nearest-neighbor. Beyond a displacement field nothing is displaced, and
    beyond the moving scan there is --fill.
    """
    outputs = {"--warped-moving-out": warped_moving_out, "--points-out": points_out}
    _check_outputs(outputs, [fixed, moving, transform, points])
    if (points is None) != (points_out is None):
        missing = "--points-out" if points_out is None else "--points"
        raise UserError(f"--points and --points-out go together; pass {missing}")
    if warped_moving_out is not None:
        _check_warp_options(fixed, moving, linear=linear, nearest=nearest_neighbor)
    elif moving is not None:
        raise UserError("--moving needs --warped-moving-out, where to write the result")
    value = parse_fill(fill)

    from jaxreg.io import transforms, volumes
    from jaxreg.space import transform as transform_lib

    _check_sources({"--fixed": fixed, "--moving": moving}, points)
    mapping = transform_lib.Transform(())
    if transform is not None:
        mapping = transforms.read_transform(transform)
    if points is not None and points_out is not None:
        if transform is None:
            warn("without --transform the points are those of the moving scan as well")
        map_points(points, points_out, mapping, frame=points_frame, fixed=fixed)
    if warped_moving_out is not None and fixed is not None and moving is not None:
        grid = volumes.read_grid(fixed)
        _warn_beyond(mapping, transform, grid, fixed)
        stored = volumes.read_volume(moving, kind="stored")
        _warn_about_warp(transform, moving, stored, linear=linear)
        warped = _warped(
            stored, mapping, grid,
            nearest=nearest_neighbor, modality=moving_modality, fill=value,
        )  # fmt: skip
        volumes.write_volume(warped_moving_out, warped)
    _print_written(outputs.values())


def _warn_about_warp(transform, moving, stored: "Volume", *, linear: bool) -> None:
    from jaxreg.space import background

    if transform is None:
        warn("without --transform the scan is brought onto the fixed grid, unmoved")
    if linear and background.looks_like_labels(stored.array):
        warn(
            f"{moving} looks like a label map (patches of equal whole numbers), of "
            "which --linear makes other labels along every border; pass "
            "--nearest-neighbor for one"
        )


def _warn_beyond(mapping: "Transform", transform, grid: "Grid", fixed) -> None:
    from jaxreg.space import transform as transform_lib

    percent = transform_lib.beyond_percent(mapping, grid)
    if percent > 0:
        warn(
            f"{percent:.2g} % of the voxels of {fixed} lie beyond the displacement "
            f"field of {transform}, which displaces nothing there; expect a jump at "
            "its edge, or use a field that covers the scan"
        )


def _check_sources(scans: Mapping[str, pathlib.Path | None], points) -> None:
    from jaxreg.io import files, volumes

    for name, path in scans.items():
        if path is not None:
            volumes.check_source(path, name)
    if points is not None:
        files.check_readable(points, "--points")


def _warped(
    moving: "Volume",
    mapping: "Transform",
    fixed: "Grid",
    *,
    nearest: bool,
    modality: str | None,
    fill: float | None,
) -> "Volume":
    """Resamples a scan or label map as stored; what is doubtful is warned about."""
    from jaxreg.data import modality as modality_lib
    from jaxreg.io import volumes
    from jaxreg.space import warping

    outside = modality_lib.background_of(modality, moving, fill, nearest=nearest)
    volumes.check_storable(outside.fill, moving)
    warped = warping.warp_volume(
        moving, mapping, fixed, order=0 if nearest else 1, fill=outside
    )
    empty, blank = ((v.array == outside.fill).all() for v in (warped, moving))
    if empty and not blank:
        warn(
            f"all of the result is the fill, {outside.fill:g}: on the fixed grid there "
            f"is nothing of {moving.source}; check that the files belong together"
        )
    return warped


def _check_warp_options(fixed, moving, *, linear: bool, nearest: bool) -> None:
    for name, path in (("--fixed", fixed), ("--moving", moving)):
        if path is None:
            raise UserError(f"--warped-moving-out needs {name}")
    if linear == nearest:
        given = "both were given" if linear else "neither was given"
        raise UserError(
            "pass --linear for a scan or --nearest-neighbor for a label map; " + given
        )


@app.command("jacobian")
def jacobian_verb(
    *,
    fixed: Annotated[
        Path, option("--fixed", "Scan on whose grid the transform is measured.")
    ],
    transform: Annotated[
        Path,
        option("--transform", "Transform; formats as --transform of warp."),
    ],
    jacob: Annotated[
        Path | None,
        option("--jacob", "Determinant map to write: .nii.gz .nii .nrrd .mha."),
    ] = None,
    log_jacob: Annotated[
        Path | None,
        option(
            "--log-jacob",
            "Map of its natural logarithm; determinants below 1e-6, folded voxels "
            "among them, count as 1e-6.",
        ),
    ] = None,
) -> None:
    """Measure local volume change: determinant map, its range, folded voxels.

    The determinant is that of the map in mm: 1 keeps volume, 2 means that a voxel of
    the fixed scan covers twice its volume in the moving scan, below 0 is a fold. It is
    taken by central differences at the fixed scan's voxels; the share of folded voxels
    is the one that register and evaluate print. Where a scan is larger than the box
    of a network with a fixed spacing (UniReg), those two count within the box alone.
    """
    outputs = {"--jacob": jacob, "--log-jacob": log_jacob}
    _check_outputs(outputs, [fixed, transform], needed=False)

    import numpy as np

    from jaxreg import metrics
    from jaxreg.io import transforms, volumes
    from jaxreg.space import warping
    from jaxreg.space.grid import Volume

    grid = volumes.read_grid(fixed)
    mapping = transforms.read_transform(transform)
    _warn_beyond(mapping, transform, grid, fixed)
    determinant = warping.jacobian_map(mapping, grid)
    if jacob is not None:
        volumes.write_volume(jacob, Volume(determinant, grid))
    if log_jacob is not None:
        logarithm = np.log(np.maximum(determinant, 1e-6))
        volumes.write_volume(log_jacob, Volume(logarithm.astype(np.float32), grid))
    folded = int((determinant < 0).sum())
    percent = metrics.folding_fraction(determinant)
    print_numbers(
        {
            "minimum": f"{determinant.min():.4f}",
            "mean": f"{determinant.mean(dtype=np.float64):.4f}",
            "maximum": f"{determinant.max():.4f}",
            "folded voxels": f"{percent:.4f} % ({folded})",
        }
    )
    _print_written(outputs.values())


@app.command("convert")
def convert_verb(
    *,
    source: Annotated[Path, option("--from", "Checkpoint folder or .trch file.")],
    target: Annotated[
        Path, option("--to", "The other of the two; replaced if it exists.")
    ],
    model: Annotated[
        str | None,
        option(
            "--model",
            "Kind of network (gradicon, promptreg, rdp, unireg_rpn, sam), or a name of "
            "jaxreg models. Default: whose names the tensors have.",
        ),
    ] = None,
) -> None:
    """Convert weights between a checkpoint folder and a PyTorch file.

    The paths say which is which; the tensors decide the sizes.
    """
    from jaxreg.weights import convert

    convert.convert(source, target, model=model)
    _print_written([target])


@app.command("models")
def models_verb() -> None:
    """List the published models: size, tasks, licence, where the weights are."""
    from jaxreg.weights import listing

    console = Console(soft_wrap=True, highlight=False)
    for row in listing.describe():
        console.print(f"{row.name}  {row.title}", markup=False, style="bold")
        for name, value in (
            ("parameters", f"{row.parameters:,}"),
            ("grid", " x ".join(map(str, row.grid))),
            ("tasks", row.coverage),
            ("licence", row.licence),
            ("paper", row.paper),
            ("weights", row.location),
        ):
            console.print(f"  {name:<11}{value}", markup=False)


@app.command("demo")
def demo_verb(
    context: typer.Context,
    *,
    out: Annotated[Path, option("--out", "Folder for the results; made if absent.")],
    shape: Annotated[
        str | None,
        option(
            "--shape",
            "Network grid in voxels, stored volume's slowest axis first. Default: "
            "64,80,64, or 175,175,175 with a model.",
            _MODEL,
            metavar="D,H,W",
        ),
    ] = None,
    model: Annotated[
        str,
        option("--model", "As in register; none optimises a displacement field."),
    ] = "none",
    io_iterations: Iterations = "50",
    seed: Seed = 0,
) -> None:
    """Register two real heads that other packages ship, with a report.

    Moving: the mean T1 head of pydeface. Fixed: the MNI152 T1 template of nilearn. No
    download, no weights; a few minutes on two cores.
    """
    iterations = parse_iterations(io_iterations)
    name = None if model.lower() == "none" else model
    if name is None and iterations is None:
        raise UserError(
            "--model none needs optimisation; pass --io-iterations with a number, or "
            "name a --model"
        )
    grid = parse_shape(shape or ("64,80,64" if name is None else "175,175,175"))

    from jaxreg import demo

    waiting = compiling(grid, network=name is not None)
    with _Bar("optimise", waiting=waiting) as bar:
        numbers, written = demo.run(
            out,
            shape=grid,
            model=name,
            iterations=iterations,
            seed=seed,
            command=shlex.join(["jaxreg", *context.obj]),
            progress=bar.step,
        )
    print_numbers(numbers)
    _print_written(written)


def _check_outputs(
    outputs: Mapping[str, pathlib.Path | None],
    inputs: Sequence[pathlib.Path | None],
    *,
    needed: bool = True,
) -> None:
    """Checks names and folders of all results before anything is read."""
    from jaxreg.io import files, tables, transforms, volumes

    given = {name: path for name, path in outputs.items() if path is not None}
    if needed and not given:
        raise UserError(f"nothing to write; pass {' or '.join(outputs)}")
    seen = {path.resolve(): "an input" for path in inputs if path is not None}
    for name, path in given.items():
        if name in ("--transform-out", "--inverse-out"):
            transforms.check_transform_path(path, name)
        elif name == "--report":
            files.check_writable(path, name, suffixes=(".html", ".htm"))
        elif name == "--points-out":
            tables.check_target(path, name)
        else:
            volumes.check_volume_path(path, name)
        if path.resolve() in seen:
            raise UserError(
                f"{name} {path} is also {seen[path.resolve()]}; name another file"
            )
        seen[path.resolve()] = name


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
        return model or "unigradicon"
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


def _hyphened(name: str) -> str:
    return "--" + name.replace("_", "-")


def map_points(
    source: pathlib.Path,
    target: pathlib.Path,
    mapping: "Transform",
    *,
    frame: Frame,
    fixed: pathlib.Path | None = None,
) -> None:
    """Maps the points of a file and writes them with everything else in it.

    Warns where points lie outside the fixed scan, or without one outside the domain
    of the transform's field.

    Args:
      source: the points, see `io.tables.read`.
      target: the same table with the mapped points.
      mapping: fixed to moving mm, RAS+.
      frame: of both files, where they do not say it.
      fixed: the scan in which the points are.

    Raises:
      UserError: the table has no three columns of numbers.
    """
    import numpy as np

    from jaxreg.io import tables, volumes
    from jaxreg.space import transform as transform_lib

    table = tables.read(source, "--points")
    grid = None if fixed is None else volumes.read_grid(fixed)
    outside = tables.outside(
        table,
        frame.value,
        lambda places: (
            transform_lib.count_beyond(mapping, places)
            if grid is None
            else tables.count_outside(places, grid)
        ),
        points=str(source),
        scan="the domain of the transform's field (beyond it nothing is displaced)"
        if fixed is None
        else f"the scan {fixed}",
        option="--points-frame",
    )
    if outside is not None:
        warn(outside)
    given = tables.points_mm(table, frame.value)
    mapped = np.asarray(mapping.map_points(given[None]))[0]
    tables.write(target, table, mapped, frame=frame.value)


def _print_written(paths) -> None:
    for path in paths:
        if path is not None:
            print(f"wrote {path}")


def warn(text: str) -> None:
    """Prints one line about something that the user may not have meant."""
    print(f"jaxreg: warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows UserWarnings of jaxreg as one line, without file and source line."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def one_line(message, category, *rest, **more):
            if issubclass(category, UserWarning):
                warn(" ".join(str(message).split()))
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = one_line
        yield


def _hyphens(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the PyTorch tool's underscores as hyphens."""
    normal = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        normal.append(name + equals + value)
    return normal


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.")
    ] = False,
) -> None:
    """Universal medical image registration in JAX."""
    if version:
        print(f"jaxreg {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status.

    Args:
      argv: arguments after the program's name; the process's own if None.

    Returns:
      0, or 2 after a mistake of the user, told in one sentence on stderr, or 130 after
      an interrupt. A defect of jaxreg raises.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _plain_warnings(), compilation_cache.kept():
            status = typer.main.get_command(app).main(
                args=_hyphens(argv), prog_name="jaxreg", standalone_mode=False, obj=argv
            )
        if status == _INTERRUPTED:  # typer's, from 0.29 on; older ones abort
            print("jaxreg: interrupted", file=sys.stderr)
        return status if isinstance(status, int) else 0
    except UserError as error:
        return _complain(str(error))
    except _ClickException as error:
        return _complain(error.format_message().replace("Value error, ", ""))
    except (KeyboardInterrupt, typer.Abort):
        print("jaxreg: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except MemoryError:
        return _complain(_OUT_OF_MEMORY)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
            return _complain(_OUT_OF_MEMORY)
        raise


_INTERRUPTED = 130  # 128 and the number of SIGINT
_OUT_OF_MEMORY = (
    "there is not enough memory; pass a smaller --shape (its voxels decide), or use "
    "another machine"
)


def _complain(text: str) -> int:
    print(f"jaxreg: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
