"""The verbs around training: ``jaxreg train``, ``evaluate``, ``compare``, ``data``.

Their bodies live in `trainer`, `evaluate` and `data`; here options become arguments and
results become text. Heavy imports live inside the verbs.
"""

import functools
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jaxreg.cli_options import (
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
    option,
    parse_labels,
    parse_shape,
    print_numbers,
)
from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.experiment import Experiment

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
data_app = typer.Typer(help="Look after training data.")


_PROCESSES = "Several hosts"


def train_verb(
    context: typer.Context,
    *,
    config: Annotated[
        pathlib.Path, option("--config", "The experiment: configs/NAME.py.")
    ],
    out: Annotated[
        pathlib.Path | None,
        option("--out", "Folder of the run; new, or with --resume an old one."),
    ] = None,
    resume: Annotated[
        bool,
        option("--resume", "Go on with the run in --out, from its last checkpoint."),
    ] = False,
    dry_run: Annotated[
        bool,
        option(
            "--dry-run",
            "Build everything, compile one step on a small grid, print parameters, "
            "arithmetic and memory; trains nothing, needs no data.",
        ),
    ] = False,
    distributed: Annotated[
        bool,
        option(
            "--distributed",
            "This is one of several processes; SLURM, Open MPI, Kubernetes and Cloud "
            "TPU pods tell JAX which.",
            _PROCESSES,
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        option(
            "--coordinator", "HOST:PORT of process 0, elsewhere than there.", _PROCESSES
        ),
    ] = None,
    processes: Annotated[
        int | None, option("--processes", "How many there are.", _PROCESSES)
    ] = None,
    process: Annotated[
        int | None, option("--process", "Which one this is, from 0.", _PROCESSES)
    ] = None,
) -> None:
    """Train a network: all stages of an experiment, or one that was interrupted.

    Any setting of the experiment can follow as `--section.field value`, for example
    `--data.manifests scans.csv --optimizer.learning_rate 1e-4`.
    """
    changes = setting_pairs(context.args)
    if out is None and not dry_run:
        raise UserError("--out is missing; name a folder for the run, or --dry-run")
    if distributed or (coordinator, processes, process) != (None, None, None):
        _join(coordinator, processes, process)

    from jaxreg import experiment as experiment_lib
    from jaxreg import sam_experiment, sam_training, trainer

    found = experiment_lib.load_any(config)
    if isinstance(found, sam_experiment.SamExperiment):
        itself = sam_experiment.override(found, changes)
        dry = functools.partial(sam_training.dry_run, itself)
        train = functools.partial(sam_training.run, itself)
    else:
        chosen = experiment_lib.override(experiment_lib.checked(found, config), changes)
        dry = functools.partial(_dry_rows, chosen)
        train = functools.partial(trainer.run, chosen)
    if dry_run:
        print_numbers(dry())
        return
    assert out is not None
    outcome = train(out, resume=resume, say=_say)
    _say(f"{outcome.steps} steps of the last stage, {outcome.seconds:.0f} s in all")
    for name, value in outcome.scores.items():
        _say(f"validation {name}: {value:.5g}")
    _say(f"wrote {outcome.weights}")


def _dry_rows(chosen: "Experiment") -> dict[str, str]:
    from jaxreg import dryrun

    return dryrun.dry_run(chosen).rows()


def setting_pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Returns ``--section.field value`` and ``--section.field=value`` as pairs.

    Raises:
      UserError: something else is among them.
    """
    found: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise UserError(
                f"{name} is not understood; settings are given as --section.field value"
            )
        if not equals:
            if not rest:
                raise UserError(f"{name} has no value; give one after it")
            value = rest.pop(0)
        found.append((name[2:], value))
    return found


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --processes and --process belong together; give all three, "
            "or --distributed alone where the cluster tells"
        )
    from jaxreg.training import parallel

    parallel.start_processes(coordinator, processes, process)


def _say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


@data_app.command("check")
def check_verb(
    manifest: Annotated[
        pathlib.Path, typer.Argument(help="CSV, JSON or a folder of scans.")
    ],
    *,
    holdout: Annotated[
        int | None,
        option("--holdout", "Every n-th subject validates, if no split is given."),
    ] = None,
) -> None:
    """Read every file of a manifest and report what would stop or spoil training."""
    from jaxreg.data import manifest as manifest_lib

    found = manifest_lib.read_manifest(manifest, holdout=holdout)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total}", end="", file=sys.stderr, flush=True)

    problems = manifest_lib.check(found, progress=progress)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    for problem in problems:
        print(problem.sentence)
    counts = ", ".join(
        f"{len(found.of_split(split))} {split}" for split in ("train", "val", "test")
    )
    print(f"{len(found.records)} images: {counts}")
    serious = [p for p in problems if p.level == "error"]
    if serious:
        raise UserError(
            f"{manifest} has {len(serious)} problems, listed above; mend these files "
            "or leave them out"
        )
    print("no problem found" if not problems else f"{len(problems)} warnings")


_WHICH, _HOW = "Which pairs", "Registration"


def evaluate_verb(  # noqa: PLR0913
    *,
    out: Annotated[
        pathlib.Path,
        option("--out", "Rows as .csv; the tables go beside it as .md."),
    ],
    pairs: Annotated[
        pathlib.Path | None, option("--pairs", "CSV or JSON of pairs.", _WHICH)
    ] = None,
    manifest: Annotated[
        pathlib.Path | None,
        option("--manifest", "Instead: a manifest or folder of scans.", _WHICH),
    ] = None,
    split: Annotated[str, option("--split", "Of the manifest.", _WHICH)] = "val",
    holdout: Annotated[
        int | None,
        option(
            "--holdout",
            "Every n-th subject of a manifest without splits belongs to val.",
            _WHICH,
        ),
    ] = None,
    neighbours: Annotated[
        int,
        option("--neighbours", "Moving scans per fixed scan of a manifest.", _WHICH),
    ] = 3,
    across_modalities: Annotated[
        bool,
        option(
            "--across-modalities",
            "Pair scans of two modalities of a manifest as well.",
            _WHICH,
        ),
    ] = False,
    count: Annotated[
        int | None, option("--count", "Only so many pairs, from the first.", _WHICH)
    ] = None,
    labels: Annotated[
        str | None, option("--labels", "Which to score, such as 1,2.", _WHICH)
    ] = None,
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
    name: Annotated[
        str | None, option("--name", "What the tables call it.", _HOW)
    ] = None,
    shape: Annotated[
        str | None,
        option("--shape", "Network grid. Default: the weights' own.", _HOW),
    ] = None,
    prealign: PrealignWay = Prealign.NONE,
    sam_weights: SamWeights = None,
    io_iterations: Annotated[
        int | None,
        option(
            "--io-iterations", "Adds rows with so many steps of optimisation.", _HOW
        ),
    ] = None,
    io_target: IoTarget = Target.NETWORK,
    io_sim: IoSim = Similarity.LNCC,
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
        option("--others", "Other tools beside it: SyN, greedy.", _HOW),
    ] = None,
) -> None:
    """Score registrations of labelled pairs: Dice, HD95, TRE, folding, time.

    A pair that names no modality takes the options', MRI without. The files of --out
    are written anew after every pair; a pair that fails is warned about and left empty.
    """
    if (pairs is None) == (manifest is None):
        raise UserError("give either --pairs or --manifest, to say what to evaluate")
    from jaxreg import comparison, evaluate, register, results, zoo

    tools = [tool.strip() for tool in (others or "").split(",") if tool.strip()]
    comparison.check_installed(tools)
    displacement = io_target is Target.DISPLACEMENT
    nothing = not tools and not displacement and prealign is Prealign.NONE
    if (model is None or model == "none") and nothing:
        raise UserError(
            "give a --model, --others SyN,greedy, --io-target displacement or "
            "--prealign, to evaluate"
        )
    wanted = None if labels is None else parse_labels(labels)
    chosen, names = _listed(
        pairs, manifest, split, holdout, neighbours, across=across_modalities
    )
    chosen = chosen if count is None else chosen[:count]
    _warn_about_modalities(chosen, fixed_modality, moving_modality)
    loaded = None if model in (None, "none") else zoo.load(model)
    grid = (175, 175, 175) if loaded is None else loaded.shape
    options = register.Options(
        fixed_modality=(fixed_modality or Modality.MRI).value,
        moving_modality=(moving_modality or Modality.MRI).value,
        task=task,
        pairing=None if pairing is None else pairing.value,
        smoothness=smoothness,
        level_iterations=level_iterations,
        input_masking=input_masking,
        loss_function_masking=loss_function_masking,
        io_iterations=io_iterations,
        io_target=io_target.value,
        io_sim=io_sim.value,
        io_lr=io_lr,
        prealign=prealign.value,
        seed=seed,
        ct_window=ct_window,
        quantile_range=quantile_range,
        shape=grid if shape is None else parse_shape(shape),
        inverse=False,
    )
    found = evaluate.evaluate_files(
        chosen,
        loaded,
        options,
        out=out,
        label_names=names,
        with_optimisation=io_iterations is not None,
        others={tool: comparison.TOOLS[tool] for tool in tools},
        labels=wanted,
        landmarks_frame=landmarks_frame.value,
        name=name,
        sam=None if sam_weights is None else zoo.load_sam(sam_weights),
        progress=_row_done,
    )
    print(results.markdown(found, label_names=names))
    print(f"wrote {out} and {out.with_suffix('.md')}")
    if found.failed:
        raise UserError(
            f"{len(found.failed)} of {len(found.rows)} rows failed for the reasons "
            "above and are empty; mend these pairs or leave them out"
        )


def _listed(pairs, manifest, split, holdout, neighbours, *, across: bool):
    """Returns the pairs of a list or a manifest, and a manifest's names of labels."""
    from jaxreg import evaluate
    from jaxreg.data import manifest as manifest_lib

    if manifest is None:
        return evaluate.read_pairs(pairs), None
    listed = manifest_lib.read_manifest(manifest, holdout=holdout)
    chosen = evaluate.pairs_of_manifest(
        listed, split=split, neighbours=neighbours, across_modalities=across
    )
    return chosen, listed.labels


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
            stacklevel=3,
        )


def _row_done(done: int, total: int, row) -> None:
    if sys.stderr.isatty() or done == total or done % 50 == 0:
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        text = f"{done} of {total}: {row.method}, Dice {row.mean_dice:.3f}   "
        print(text, end=end, file=sys.stderr, flush=True)


def tune_verb(  # noqa: PLR0913
    *,
    out: Annotated[
        pathlib.Path,
        option("--out", "Rows as .csv; the tables go beside it as .md."),
    ],
    model: Annotated[
        str, option("--model", "Checkpoint folder, trained with a range.", _HOW)
    ],
    pairs: Annotated[
        pathlib.Path | None, option("--pairs", "CSV or JSON of pairs.", _WHICH)
    ] = None,
    manifest: Annotated[
        pathlib.Path | None,
        option("--manifest", "Instead: a manifest or folder of scans.", _WHICH),
    ] = None,
    split: Annotated[str, option("--split", "Of the manifest.", _WHICH)] = "val",
    holdout: Annotated[
        int | None,
        option(
            "--holdout",
            "Every n-th subject of a manifest without splits belongs to val.",
            _WHICH,
        ),
    ] = None,
    neighbours: Annotated[
        int,
        option("--neighbours", "Moving scans per fixed scan of a manifest.", _WHICH),
    ] = 3,
    pair_count: Annotated[
        int | None, option("--pair-count", "Only so many pairs.", _WHICH)
    ] = None,
    labels: Annotated[
        str | None, option("--labels", "Which to score, such as 1,2.", _WHICH)
    ] = None,
    fixed_modality: Annotated[Modality | None, FIXED_MODALITY] = None,
    moving_modality: Annotated[Modality | None, MOVING_MODALITY] = None,
    count: Annotated[
        int, option("--count", "How many weights to try, over the range.", _HOW)
    ] = 7,
    weights: Annotated[
        str | None, option("--weights", "Or these, such as 0.1,1,10.", _HOW)
    ] = None,
    task: TaskName = "auto",
    pairing: PairingName = None,
    write: Annotated[
        bool,
        option("--write", "Store each task's best weight in the checkpoint.", _HOW),
    ] = False,
) -> None:
    """Find the smoothness (lambda) that serves each task best, on labelled pairs.

    One network, trained with model.smoothness_range, is asked for several weights.
    Dice per structure and overall, folding and roughness of each are printed.
    """
    if (pairs is None) == (manifest is None):
        raise UserError("give either --pairs or --manifest, to say what to tune on")
    from jaxreg import register, results, tuning, zoo

    chosen, names = _listed(pairs, manifest, split, holdout, neighbours, across=False)
    chosen = chosen if pair_count is None else chosen[:pair_count]
    _warn_about_modalities(chosen, fixed_modality, moving_modality)
    if write and not pathlib.Path(model).is_dir():
        raise UserError(f"--write needs a checkpoint folder, --model is {model}")
    loaded = zoo.load(model)
    tried = tuning.weights_to_try(loaded, count)
    if weights is not None:
        tried = _parse_weights(weights)
    options = register.Options(
        fixed_modality=(fixed_modality or Modality.MRI).value,
        moving_modality=(moving_modality or Modality.MRI).value,
        task=task,
        pairing=None if pairing is None else pairing.value,
        io_iterations=None,
        shape=loaded.shape,
        inverse=False,
    )
    found = tuning.sweep(
        chosen,
        loaded,
        options,
        tried,
        out=out,
        label_names=names,
        labels=None if labels is None else parse_labels(labels),
        progress=_row_done,
    )
    print(results.markdown(found.result, label_names=names))
    for name, weight in found.best.items():
        print(f"{name}: smoothness {weight:g}, Dice {100 * found.dice[name]:.2f} %")
    print(f"wrote {out} and {out.with_suffix('.md')}")
    if write:
        tuning.remember(model, found.best)
        print(f"stored in {model}; register takes it for these tasks from now on")


def _parse_weights(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--weights is {text}, expected numbers such as 0.1,1,10"
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
    from jaxreg import results

    print(
        results.compare_files(a, b, metric=metric, method_a=method_a, method_b=method_b)
    )


def add_to(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("train", context_settings=_PASS_ON)(train_verb)
    app.command("evaluate")(evaluate_verb)
    app.command("tune-lambda")(tune_verb)
    app.command("compare")(compare_verb)
    app.add_typer(data_app, name="data")
