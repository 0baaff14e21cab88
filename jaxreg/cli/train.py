"""The verbs ``jaxreg train`` and ``jaxreg data``, and those of `cli.evaluate`.

Their bodies live in `experiments` and `data`; here options become arguments and results
become text. Heavy imports live inside the verbs.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jaxreg.cli import evaluate
from jaxreg.cli.options import option, print_numbers
from jaxreg.cli.progress import Bar, interrupted
from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.experiments.config import Experiment

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
            "Build everything, compile the training step, print parameters, "
            "arithmetic, and memory per device and pair; trains nothing, allocates "
            "nothing, needs no data.",
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

    from jaxreg.experiments import files, overrides, run, sam, sam_config

    found = files.load_any(config)
    if isinstance(found, sam_config.SamExperiment):
        itself = sam_config.override(found, changes)
        dry = functools.partial(sam.dry_run, itself)
        train = functools.partial(sam.run, itself)
    else:
        chosen = overrides.override(files.checked(found, config), changes)
        dry = functools.partial(_dry_rows, chosen)
        train = functools.partial(run.run, chosen)
    if dry_run:
        with Bar("dry run") as bar:
            rows = dry(report=bar.report)
        print_numbers(rows)
        return
    assert out is not None
    with interrupted(
        f"what was saved is in {out}; go on with the same command and --resume"
    ):
        outcome = train(out, resume=resume, report=_print_line)
    _print_line(
        f"{outcome.steps} steps of the last stage, {outcome.seconds:.0f} s in all"
    )
    for name, value in outcome.scores.items():
        _print_line(f"validation {name}: {value:.5g}")
    _print_line(f"wrote {outcome.weights}")


def _dry_rows(chosen: "Experiment", *, report: Callable[[str], None]) -> dict[str, str]:
    from jaxreg.experiments import dry_run as dry_run_lib

    return dry_run_lib.dry_run(chosen, report=report).rows()


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


def _print_line(text: str) -> None:
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
    from jaxreg.data.manifest import check, read

    found = read.read_manifest(manifest, holdout=holdout)

    with Bar("check") as bar:
        problems = check.check(
            found, progress=lambda done, total: bar.show(done, total, "images")
        )
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


def add_to(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("train", context_settings=_PASS_ON)(train_verb)
    evaluate.add_to(app)
    app.add_typer(data_app, name="data")
