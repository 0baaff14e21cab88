"""Verbs that score: ``jaxreg evaluate``, ``tune-lambda`` and ``compare``.

Their bodies live in `evaluation`; here options become arguments
and results become text. Heavy imports live inside the verbs.
"""

import contextlib
import math
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from jaxreg.cli.options import (
    FIXED_MODALITY,
    MOVING_MODALITY,
    CtWindow,
    InputMasking,
    IoLr,
    IoSim,
    IoTarget,
    LandmarksFrame,
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
    parse_iterations,
    parse_labels,
    parse_shape,
)
from jaxreg.cli.progress import Bar, interrupted
from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.data.manifest.records import Manifest
    from jaxreg.data.pair_list import PairSpec
    from jaxreg.evaluation.run import Progress
    from jaxreg.evaluation.table import EvalRecord

_WHICH, _HOW = "Which pairs", "Registration"
Out = Annotated[
    pathlib.Path, option("--out", "Rows as .csv; the tables go beside it as .md.")
]
Pairs = Annotated[
    pathlib.Path | None, option("--pairs", "CSV or JSON of pairs.", _WHICH)
]
ManifestPath = Annotated[
    pathlib.Path | None,
    option("--manifest", "Instead: a manifest or folder of scans.", _WHICH),
]
Split = Annotated[str, option("--split", "Of the manifest.", _WHICH)]
Holdout = Annotated[
    int | None,
    option(
        "--holdout",
        "Every n-th subject of a manifest without splits belongs to val.",
        _WHICH,
    ),
]
Neighbours = Annotated[
    int, option("--neighbours", "Moving scans per fixed scan of a manifest.", _WHICH)
]
AcrossModalities = Annotated[
    bool,
    option(
        "--across-modalities",
        "Pair scans of two modalities of a manifest as well.",
        _WHICH,
    ),
]
Count = Annotated[
    int | None, option("--count", "Only so many pairs, from the first.", _WHICH, min=1)
]
Labels = Annotated[
    str | None, option("--labels", "Which to score, such as 1,2.", _WHICH)
]
Name = Annotated[str | None, option("--name", "What the tables call it.", _HOW)]
GridShape = Annotated[
    str | None, option("--shape", "Network grid. Default: the weights' own.", _HOW)
]


def evaluate_verb(  # noqa: PLR0913
    *,
    out: Out,
    pairs: Pairs = None,
    manifest: ManifestPath = None,
    split: Split = "val",
    holdout: Holdout = None,
    neighbours: Neighbours = 3,
    across_modalities: AcrossModalities = False,
    count: Count = None,
    labels: Labels = None,
    landmarks_frame: Annotated[
        LandmarksFrame,
        choice(
            "--landmarks-frame",
            "What landmark files hold: mm as in ITK (lps) or NIfTI (ras), or NIfTI's "
            "voxel indices, as Learn2Reg's do.",
            _WHICH,
        ),
    ] = LandmarksFrame.LPS,
    fixed_modality: Annotated[Modality | None, FIXED_MODALITY] = None,
    moving_modality: Annotated[Modality | None, MOVING_MODALITY] = None,
    model: Annotated[
        str | None,
        option("--model", "Name of jaxreg models, or a path; none for none.", _HOW),
    ] = None,
    name: Name = None,
    shape: GridShape = None,
    prealign: PrealignWay = Prealign.NONE,
    sam_weights: SamWeights = None,
    io_iterations: Annotated[
        str,
        option(
            "--io-iterations",
            "Adds rows with so many steps of optimisation; None adds none.",
            _HOW,
            metavar="N",
        ),
    ] = "None",
    io_target: IoTarget = Target.NETWORK,
    io_sim: IoSim = Similarity.AUTO,
    io_lr: IoLr = None,
    seed: Seed = 0,
    task: TaskName = "auto",
    pairing: PairingName = None,
    smoothness: Smoothness = None,
    level_iterations: LevelIterations = None,
    input_masking: InputMasking = False,
    loss_function_masking: LossMasking = False,
    ct_window: CtWindow = None,
    quantile_range: QuantileRange = None,
    others: Annotated[
        str | None,
        option("--others", "Other tools beside it: SyN-MI, SyN-CC, greedy.", _HOW),
    ] = None,
) -> None:
    """Score registrations of labelled pairs: Dice, HD95, TRE, folding, time.

    A pair that names no modality takes the options', MRI without. The files of --out
    are written anew after every pair; a pair that fails is warned about and left empty.
    """
    if (pairs is None) == (manifest is None):
        raise UserError("give either --pairs or --manifest, to say what to evaluate")
    from jaxreg.evaluation import baselines, run, table
    from jaxreg.registration import options as options_lib
    from jaxreg.weights import load

    tools = [tool.strip() for tool in (others or "").split(",") if tool.strip()]
    baselines.check_installed(tools)
    displacement = io_target is Target.DISPLACEMENT
    nothing = not tools and not displacement and prealign is Prealign.NONE
    if (model is None or model == "none") and nothing:
        raise UserError(
            "give a --model, --others SyN-MI,greedy, --io-target displacement or "
            "--prealign, to evaluate"
        )
    wanted = None if labels is None else parse_labels(labels)
    iterations = parse_iterations(io_iterations)
    listed = _read(pairs, manifest, holdout)
    named = None if model == "none" else model
    sam = load_sam(prealign.value, sam_weights, named)
    loaded = None if named is None else load.load(named)
    options = options_lib.Options(
        fixed_modality=(fixed_modality or Modality.MRI).value,
        moving_modality=(moving_modality or Modality.MRI).value,
        task=task,
        pairing=None if pairing is None else pairing.value,
        smoothness=smoothness,
        level_iterations=level_iterations,
        input_masking=input_masking,
        loss_function_masking=loss_function_masking,
        io_iterations=iterations,
        io_target=io_target.value,
        io_sim=io_sim.value,
        io_lr=io_lr,
        prealign=prealign.value,
        seed=seed,
        ct_window=ct_window,
        quantile_range=quantile_range,
        shape=None if shape is None else parse_shape(shape),
        inverse=False,
    )
    chosen, names = _paired(
        listed,
        count,
        (fixed_modality, moving_modality),
        split=split,
        neighbours=neighbours,
        across_modalities=across_modalities,
        model=loaded,
        options=options,
    )
    with _shown(out) as progress:
        found = run.evaluate_files(
            chosen,
            loaded,
            options,
            out=out,
            label_names=names,
            with_optimisation=iterations is not None,
            others={tool: baselines.TOOLS[tool] for tool in tools},
            labels=wanted,
            landmarks_frame=landmarks_frame.value,
            name=name,
            sam=sam,
            progress=progress,
        )
    print(table.markdown(found, label_names=names))
    print(f"wrote {out} and {out.with_suffix('.md')}")
    if found.failed:
        raise UserError(
            f"{len(found.failed)} of {len(found.rows)} rows failed for the reasons "
            "above and are empty; mend these pairs or leave them out"
        )


def _read(
    pairs: pathlib.Path | None, manifest: pathlib.Path | None, holdout: int | None
) -> "Manifest | tuple[PairSpec, ...]":
    """Returns what a list of pairs or a manifest holds."""
    from jaxreg.data import pair_list
    from jaxreg.data.manifest import read

    if pairs is not None:
        return pair_list.read_pairs(pairs)
    assert manifest is not None  # the caller's promise
    return read.read_manifest(manifest, holdout=holdout)


def _paired(
    listed: "Manifest | tuple[PairSpec, ...]", count: int | None, modalities, **how
):
    """Returns the first pairs, and a manifest's names of labels.

    Warns of pairs whose modality neither they nor the options (fixed, moving) name.
    """
    from jaxreg.evaluation import pairs as pairs_lib

    if isinstance(listed, tuple):
        pairs, names = listed, None
    else:
        pairs, names = pairs_lib.pairs_of_manifest(listed, **how), listed.labels
    pairs = pairs[:count]
    _warn_about_modalities(pairs, *modalities)
    return pairs, names


def _warn_about_modalities(pairs, fixed_modality, moving_modality) -> None:
    unknown = sum(
        (pair.fixed_modality or fixed_modality) is None
        or (pair.moving_modality or moving_modality) is None
        for pair in pairs
    )
    if unknown:
        warnings.warn(
            f"{unknown} of {len(pairs)} pairs name no modality and count as MRI; "
            "give --fixed-modality and --moving-modality, or columns of that name",
            stacklevel=4,
        )


@contextlib.contextmanager
def _shown(out: pathlib.Path) -> "Iterator[Progress]":
    """Shows rows as they are done; after an interrupt, says where those are.

    The table has whole pairs, and is not there before the first one is done.
    """
    before = _written_at(out)

    def show(done: int, total: int, row: "EvalRecord") -> None:
        score = "" if math.isnan(row.mean_dice) else f", Dice {row.mean_dice:.3f}"
        bar.show(done, total, f"{row.method}{score}")

    def kept() -> str:
        done = _written_at(out) != before
        found = f"the pairs that are done are in {out}" if done else "no pair is done"
        return f"{found}; give --count for fewer pairs"

    with interrupted(kept), Bar("evaluate", waiting="compiling, the first pair") as bar:
        yield show


def _written_at(path: pathlib.Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def tune_verb(  # noqa: PLR0913
    *,
    out: Out,
    model: Annotated[
        str, option("--model", "Checkpoint folder, trained with a range.", _HOW)
    ],
    pairs: Pairs = None,
    manifest: ManifestPath = None,
    split: Split = "val",
    holdout: Holdout = None,
    neighbours: Neighbours = 3,
    across_modalities: AcrossModalities = False,
    count: Count = None,
    labels: Labels = None,
    fixed_modality: Annotated[Modality | None, FIXED_MODALITY] = None,
    moving_modality: Annotated[Modality | None, MOVING_MODALITY] = None,
    steps: Annotated[
        int | None,
        option("--steps", "How many weights to try, over the range. Default: 7.", _HOW),
    ] = None,
    smoothness: Annotated[
        str | None,
        option("--smoothness", "Instead: these weights, such as 0.1,1,10.", _HOW),
    ] = None,
    name: Name = None,
    shape: GridShape = None,
    prealign: PrealignWay = Prealign.NONE,
    sam_weights: SamWeights = None,
    task: TaskName = "auto",
    pairing: PairingName = None,
    level_iterations: LevelIterations = None,
    input_masking: InputMasking = False,
    ct_window: CtWindow = None,
    quantile_range: QuantileRange = None,
    write: Annotated[
        bool,
        option("--write", "Store each task's best weight in the checkpoint.", _HOW),
    ] = False,
) -> None:
    """Find the smoothness (lambda) that serves each task best, on labelled pairs.

    One network, trained with model.smoothness_range, is asked for several weights.
    Dice per structure and overall, folding and roughness of each are printed. Register
    as you will later: pre-alignment, masks and intensities are those of evaluate.
    """
    if (pairs is None) == (manifest is None):
        raise UserError("give either --pairs or --manifest, to say what to tune on")
    if steps is not None and smoothness is not None:
        raise UserError("--steps and --smoothness both say what to try; give one")
    if write and not os.path.isdir(model):
        raise UserError(f"--write needs a checkpoint folder, --model is {model}")
    from jaxreg.evaluation import sweep, table
    from jaxreg.registration import options as options_lib
    from jaxreg.weights import load

    given = None if smoothness is None else _parse_weights(smoothness)
    wanted = None if labels is None else parse_labels(labels)
    listed = _read(pairs, manifest, holdout)
    sam = load_sam(prealign.value, sam_weights, model)
    loaded = load.load(model)
    tried = given or sweep.weights_to_try(loaded, 7 if steps is None else steps)
    sweep.check_weights(loaded, tried)
    options = options_lib.Options(
        fixed_modality=(fixed_modality or Modality.MRI).value,
        moving_modality=(moving_modality or Modality.MRI).value,
        task=task,
        pairing=None if pairing is None else pairing.value,
        level_iterations=level_iterations,
        input_masking=input_masking,
        io_iterations=None,
        prealign=prealign.value,
        ct_window=ct_window,
        quantile_range=quantile_range,
        shape=None if shape is None else parse_shape(shape),
        inverse=False,
    )
    chosen, names = _paired(
        listed,
        count,
        (fixed_modality, moving_modality),
        split=split,
        neighbours=neighbours,
        across_modalities=across_modalities,
        model=loaded,
        options=options,
    )
    with _shown(out) as progress:
        found = sweep.sweep(
            chosen,
            loaded,
            options,
            tried,
            out=out,
            label_names=names,
            labels=wanted,
            name=name,
            sam=sam,
            progress=progress,
        )
    print(table.markdown(found.result, label_names=names))
    print("\n".join(sweep.lines_of(found, label_names=names)))
    print(f"wrote {out} and {out.with_suffix('.md')}")
    sweep.check_found(found)
    if write:
        sweep.store_best(model, found.best)
        print(f"stored in {model}; register takes it for these tasks from now on")


def _parse_weights(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--smoothness is {text}, expected numbers such as 0.1,1,10"
        ) from None
    return found


def compare_verb(
    *,
    a: Annotated[pathlib.Path, typer.Argument(help="A .csv of jaxreg evaluate.")],
    b: Annotated[pathlib.Path, typer.Argument(help="Another one, or the same.")],
    metric: Annotated[
        str,
        option(
            "--metric",
            "dice, hd95_mm, tre_mm, folding_percent, sdlogj or seconds; dice_N or "
            "hd95_mm_N for label N.",
        ),
    ] = "dice",
    method_a: Annotated[
        str | None, option("--method-a", "Which method of the first.")
    ] = None,
    method_b: Annotated[
        str | None, option("--method-b", "Which method of the second.")
    ] = None,
) -> None:
    """Test whether two results differ by more than chance, pair by pair."""
    from jaxreg.evaluation import statistics

    print(
        statistics.compare_files(
            a, b, metric=metric, method_a=method_a, method_b=method_b
        )
    )


def add_to(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("evaluate")(evaluate_verb)
    app.command("tune-lambda")(tune_verb)
    app.command("compare")(compare_verb)
