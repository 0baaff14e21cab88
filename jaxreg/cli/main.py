"""The command line: ``jaxreg <verb>``.

Long options have hyphens; the underscore spelling of the PyTorch tool works as well, so
that a script changes one word (``unigradicon-register`` to ``jaxreg register``). What
can be checked without registering is checked first, and a mistake of the user is one
sentence on stderr with exit status 2. Heavy imports live inside the verbs: ``--help``
is quick.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from jaxreg import __version__
from jaxreg.cli.options import PANELS, app, print_numbers, print_written, warn
from jaxreg.cli.parser import spelled, verb
from jaxreg.cli.progress import Bar, compiling
from jaxreg.errors import UserError
from jaxreg.registration.options import Options, settled
from jaxreg.xla import compilation_cache

# isort: off
# Each adds its verbs to `app`, in the order of the help page.
from jaxreg.cli import (  # noqa: F401
    register,
    warp,
    transform,
    labels,
    atlas,
    report,
    match,
    train,
    evaluate,
)
# isort: on

# typer carries its own copy of click since 0.26; the base of all usage errors is found
# through the one exception that it exports in every version.
_ClickException: Any = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Weights in two forms.

    Attributes:
      from_: Checkpoint folder or .trch file.
      to: The other of the two; replaced if it exists.
      model: Kind of network (gradicon, promptreg, rdp, unireg_rpn, sam), or a name of
        jaxreg models. Default: whose names the tensors have.
    """

    from_: pathlib.Path
    to: pathlib.Path
    model: str | None = None


@verb(app, "convert")
def convert_verb(wanted: Conversion) -> None:
    """Convert weights between a checkpoint folder and a PyTorch file.

    The paths say which is which; the tensors decide the sizes.
    """
    from jaxreg.weights import convert

    convert.convert(wanted.from_, wanted.to, model=wanted.model)
    print_written([wanted.to])


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


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demonstration does.

    Attributes:
      out: Folder for the results; made if absent.
      model: As in register; none optimises a displacement field.
    """

    out: pathlib.Path
    model: str = "none"


@verb(app, "demo", only=("shape", "io_iterations", "seed"), panels=PANELS)
def demo_verb(context: typer.Context, wanted: Demo, options: Options) -> None:
    """Register two real heads that other packages ship, with a report.

    Moving: the mean T1 head of pydeface. Fixed: the MNI152 T1 template of nilearn. No
    download, no weights; a few minutes on two cores.
    """
    name = None if wanted.model.lower() == "none" else wanted.model
    steps = settled(options, network=name is not None).steps
    if name is None and steps is None:
        raise UserError(
            "--model none needs optimisation; pass --io-iterations with a number, or "
            "name a --model"
        )
    grid = options.shape or ((64, 80, 64) if name is None else (175, 175, 175))

    from jaxreg import demo

    waiting = compiling(grid, network=name is not None)
    with Bar("optimise", waiting=waiting) as bar:
        numbers, written = demo.run(
            wanted.out,
            shape=grid,
            model=name,
            iterations=steps,
            seed=options.seed,
            command=shlex.join(["jaxreg", *context.obj]),
            progress=bar.step,
        )
    print_numbers(numbers)
    print_written(written)


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
    print(f"jaxreg: {' '.join(spelled(text).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
