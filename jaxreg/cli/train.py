"""The verbs ``jaxreg train`` and ``jaxreg data check``.

Their bodies live in `experiments` and `data`; here options become arguments and results
become text. Heavy imports live inside the verbs.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from jaxreg.cli.options import app, print_numbers
from jaxreg.cli.parser import spelled, verb
from jaxreg.cli.progress import Bar, interrupted
from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.experiments.config import Experiment

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
data_app = typer.Typer(help="Look after training data.")
app.add_typer(data_app, name="data")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and where to.

    Attributes:
      config: The experiment: configs/NAME.py.
      out: Folder of the run; new, or with --resume an old one.
      resume: Go on with the run in --out, from its last checkpoint.
      dry_run: Build everything, compile the training step, print parameters,
        arithmetic, and memory per device and pair; trains nothing, allocates nothing,
        needs no data.
      profile: Trace so many steps, after the first few, into the stage's folder
        OUT/STAGE/profile, for TensorBoard's profile plugin or ui.perfetto.dev.
    """

    config: pathlib.Path
    out: pathlib.Path | None = None
    resume: bool = False
    dry_run: bool = False
    profile: int | None = None


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of one run.

    Attributes:
      distributed: This is one of several processes; SLURM, Open MPI, Kubernetes and
        Cloud TPU pods tell JAX which.
      coordinator: HOST:PORT of process 0, elsewhere than there.
      processes: How many there are.
      process: Which one this is, from 0.
      patience: Seconds without a word of another process after which the run ends.
    """

    PANEL: ClassVar = "Several hosts"

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    patience: float = 60.0


@verb(app, "train", context_settings=_PASS_ON)
def train_verb(context: typer.Context, run: Run, hosts: Hosts) -> None:
    """Train a network: all stages of an experiment, or one that was interrupted.

    Any setting of the experiment can follow as `--section.field value`, for example
    `--data.manifests scans.csv --optimizer.learning_rate 1e-4`.
    """
    changes = setting_pairs(context.args)
    if run.out is None and not run.dry_run:
        raise UserError("--out is missing; name a folder for the run, or --dry-run")
    if run.profile is not None and run.dry_run:
        raise UserError("--dry-run trains nothing to be traced; leave out --profile")
    processes = hosts.coordinator, hosts.processes, hosts.process
    watched = contextlib.nullcontext()
    if hosts.distributed or processes != (None, None, None):
        watched = _join(*processes, hosts.patience)
    with watched:
        _train(run, changes)


def _train(run: Run, changes: Sequence[tuple[str, str]]) -> None:
    from jaxreg.experiments import files, overrides, sam, sam_config
    from jaxreg.experiments import run as run_lib

    found = files.load_any(run.config)
    if isinstance(found, sam_config.SamExperiment):
        itself = sam_config.override(found, changes)
        dry = functools.partial(sam.dry_run, itself)
        train = functools.partial(sam.run, itself)
    else:
        chosen = overrides.override(files.checked(found, run.config), changes)
        dry = functools.partial(_dry_rows, chosen)
        train = functools.partial(run_lib.run, chosen)
    if run.dry_run:
        with Bar("dry run") as bar:
            rows = dry(report=bar.report)
        print_numbers(rows)
        return
    assert run.out is not None
    with interrupted(
        f"what was saved is in {run.out}; go on with the same command and --resume"
    ):
        outcome = train(
            run.out, resume=run.resume, report=_print_line, profile=run.profile
        )
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


def _join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    patience: float,
) -> contextlib.AbstractContextManager[Any]:
    """Joins this process to the others; returns what watches over them."""
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --processes and --process belong together; give all three, "
            "or --distributed alone where the cluster tells"
        )
    if not 1 <= patience <= 86400:
        raise UserError(f"--patience is {patience:g}, expected 1 to 86400 seconds")
    from jaxreg.training import parallel, peers

    # JAX watches as well, but aborts without a sentence: it has its turn later.
    heartbeat = max(100, int(2 * patience))
    parallel.start_processes(coordinator, processes, process, heartbeat)
    return peers.watch(patience, lambda text: f"jaxreg: {spelled(text)}")


def _print_line(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(spelled(text), flush=True)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A manifest to be checked.

    Attributes:
      manifest: CSV, JSON or a folder of scans.
      holdout: Every n-th subject validates, if no split is given.
    """

    manifest: pathlib.Path
    holdout: int | None = None


@verb(data_app, "check", positional=("manifest",))
def check_verb(checked: Checked) -> None:
    """Read every file of a manifest and report what would stop or spoil training."""
    from jaxreg.data.manifest import check, read

    found = read.read_manifest(checked.manifest, holdout=checked.holdout)

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
            f"{checked.manifest} has {len(serious)} problems, listed above; mend these "
            "files or leave them out"
        )
    print("no problem found" if not problems else f"{len(problems)} warnings")
