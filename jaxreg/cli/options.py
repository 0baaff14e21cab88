"""What verbs share: options of theirs, checks, and printed lines."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from jaxreg.cli.parser import spelled
from jaxreg.cli.progress import Bar
from jaxreg.errors import UserError
from jaxreg.registration import options as options_lib
from jaxreg.registration import parts

if TYPE_CHECKING:
    from jaxreg.models.sam import TrainedSam
    from jaxreg.weights.zoo import LoadedModel

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Universal medical image registration in JAX.",
)

LandmarksFrame = Literal["lps", "ras", "voxel"]
SCANS, OUT = "Scans", "Outputs"
_PANELS = {
    SCANS: ("fixed_modality", "moving_modality"),
    "Model": ("quality", "shape", "precision", "stored_orientation"),
    "Task": ("task", "pairing", "smoothness", "level_iterations"),
    "Pre-alignment": ("prealign", "sam_weights"),
    "Instance optimisation": ("io_iterations", "io_target", "io_sim", "io_lr", "seed"),
    "Masks and segmentations": (
        "input_masking", "loss_function_masking", "dice_loss_weight",
    ),
    "Intensities": ("intensity_conservation_loss", "ct_window", "quantile_range"),
}  # fmt: skip
PANELS = {name: panel for panel, names in _PANELS.items() for name in names}
"""Fields of `Options` that are options, to their panels of the help page."""
OPTIMISATION = (
    *_PANELS["Instance optimisation"],
    "loss_function_masking", "dice_loss_weight", "intensity_conservation_loss",
)  # fmt: skip
"""Those of them that no prediction depends on."""


def parse_fill(text: str) -> float | None:
    """Returns a number, or None for "auto".

    Raises:
      UserError: it is neither.
    """
    if text.strip().lower() == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f'--fill is "{text}", expected auto or a number, e.g. -1000'
        ) from None


@dataclasses.dataclass(frozen=True)
class Fill:
    """What a warped scan shows where there is nothing of it.

    Attributes:
      fill: Value outside the moving scan and in a CT's padding, or auto: air for CT
        (the border's commonest value, as -1024, else -1000); 0 for label maps and scans
        without negative values; for others the border's commonest value or the minimum.
    """

    PANEL: ClassVar = OUT

    fill: Annotated[float | None, parse_fill] = None


def parse_labels(text: str) -> tuple[int, ...]:
    """Returns the labels of "1,2".

    Raises:
      UserError: these are not positive whole numbers.
    """
    labels = [part.strip() for part in text.split(",")]
    if not all(label.isdecimal() and int(label) > 0 for label in labels):
        raise UserError(
            f"--labels is {text}, expected positive whole numbers such as 1,2"
        )
    return tuple(int(label) for label in labels)


@dataclasses.dataclass(frozen=True)
class SamWeights:
    """The network of a pre-alignment by SAM.

    Attributes:
      sam_weights: SAM network for --prealign sam and for a UniReg without one:
        checkpoint folder or .pth. Default: the one that a UniReg holds.
    """

    sam_weights: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Weights(SamWeights):
    """Which networks take part.

    Attributes:
      model: unigradicon, multigradicon, a path to weights (checkpoint folder or .trch),
        none, or auto: published weights that are in the cache already, else none.
        [default: auto]
      network_weights: Your own weights for the model: checkpoint folder or .trch.
    """

    PANEL: ClassVar = "Model"

    model: Annotated[str | None, str] = None
    network_weights: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Division:
    """Parts of a list, for processes and hosts that share it.

    Attributes:
      part: Do the third of sixteen parts alone, 3/16, with a table of its own; auto
        takes this process' part under srun and mpirun and on a TPU pod.
      merge_parts: Put the tables of so many parts together, when all are done.
    """

    PANEL: ClassVar = "Many pairs"

    part: Annotated[parts.Part | str | None, parts.read_part] = None
    merge_parts: int | None = None

    def __post_init__(self):
        """Checks what is asked for.

        Raises:
          UserError: both, or no part.
        """
        if self.merge_parts is not None:
            parts.every(self.merge_parts)
            if self.part is not None:
                raise UserError(
                    "--part does one part, and --merge-parts puts those together that "
                    "are done; leave one of them out"
                )

    def own_part(self) -> parts.Part | None:
        """Returns the part of this process; None for the whole list.

        Raises:
          UserError: see `parts.part_of_process`.
        """
        if isinstance(self.part, str):
            return parts.part_of_process()
        return self.part


def print_part(part: parts.Part | None, count: int, of_all: int) -> None:
    """Says how much of a list is this process' part."""
    if part is not None:
        print(f"{part}: {count} of {of_all} pairs")


def print_merging(part: parts.Part | None, path: pathlib.Path | None) -> None:
    """Says how the table of a part is put together with the others."""
    if part is not None and path is not None:
        print(
            f"when all parts are done, --merge-parts {part.count} in place of --part "
            f"makes {path}"
        )


def load_sam(
    method: str, path: pathlib.Path | None, model: str | pathlib.Path | None
) -> "TrainedSam | None":
    """Loads a SAM network, before scans are read and other weights are fetched.

    Args:
      method: of pre-alignment, see `Options`.
      path: of --sam-weights.
      model: name or path of the network's weights; None for no network.

    Raises:
      UserError: the method needs SAM, and there is no path, nor a checkpoint folder
        that might hold a UniReg with its own; or the path holds none.
    """
    from jaxreg.weights import load, zoo

    if path is not None:
        return load.load_sam(path)
    if method in options_lib.SAM_METHODS and not (
        model is not None
        and str(model) not in zoo.ZOO
        and pathlib.Path(model).suffix.lower() not in zoo.TORCH_SUFFIXES
    ):
        from jaxreg.registration.prealign import select

        raise select.without_sam(method)
    return None


def named_model(
    model: str | None, options: options_lib.Options, *, across: bool | None = None
) -> tuple[str | None, str]:
    """Returns the model that --model stands for, and why where jaxreg chooses it.

    Args:
      model: its value; None for "auto".
      options: how to register.
      across: see `automatic.choose`.
    """
    from jaxreg.registration import automatic

    found, why = automatic.named(model or options_lib.AUTO, options, across=across)
    return found, spelled(why)


def say_chosen(why: str) -> None:
    """Says which model takes part, where none was named."""
    if why:
        print(f"chosen: {why}")


def fetch(weights: str | pathlib.Path) -> "LoadedModel":
    """Loads weights, and downloads them where they are not there."""
    from jaxreg.weights import load

    with Bar("fetch weights") as bar:
        return load.load(weights, progress=bar.bytes)


def check_outputs(
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
    taken = {path.resolve(): "an input" for path in inputs if path is not None}
    for name, path in given.items():
        if name in ("--transform-out", "--inverse-out"):
            transforms.check_transform_path(path, name)
        elif name == "--report":
            files.check_writable(path, name, suffixes=(".html", ".htm"))
        elif name == "--points-out":
            tables.check_target(path, name)
        else:
            volumes.check_volume_path(path, name)
        files.claim(path, name, taken)


def print_numbers(numbers: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {spelled(value)}")


def print_written(paths: Iterable[pathlib.Path | None]) -> None:
    """Says which files there are now."""
    for path in paths:
        if path is not None:
            print(f"wrote {path}")


def warn(text: str) -> None:
    """Prints one line about something that the user may not have meant."""
    print(f"jaxreg: warning: {spelled(text)}", file=sys.stderr)
