"""Options, shapes and printed numbers that verbs share."""

import enum
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxreg.errors import UserError

if TYPE_CHECKING:
    from jaxreg.models.sam import TrainedSam


def option(name: str, text: str, panel: str | None = None, **settings) -> Any:
    """Returns a long option with its line of help, in a panel of the help page."""
    return typer.Option(name, help=text, rich_help_panel=panel, **settings)


def choice(name: str, text: str, panel: str) -> Any:
    """Returns an option that takes a name of an enum, in any case."""
    return option(name, text, panel, case_sensitive=False)


class Modality(enum.StrEnum):
    """What kind of scan it is, for the intensity scale; of preprocess.CONTRASTS."""

    CT = "ct"
    CBCT = "cbct"
    MRI = "mri"
    MR = "mr"
    T1 = "t1"
    T1C = "t1c"
    T2 = "t2"
    FLAIR = "flair"
    PD = "pd"
    DWI = "dwi"
    ADC = "adc"
    FA = "fa"
    FAT = "fat"
    WATER = "water"
    US = "us"
    PET = "pet"


class Target(enum.StrEnum):
    """What instance optimisation changes."""

    NETWORK = "network"
    DISPLACEMENT = "displacement"
    FEATURES = "features"
    MAP = "map"


class Prealign(enum.StrEnum):
    """Names of prealignment.WAYS."""

    NONE = "none"
    CENTRE = "centre"
    AFFINE = "affine"
    SAM = "sam"
    SAM_AFFINE = "sam-affine"
    SAM_COARSE = "sam-coarse"


class Similarity(enum.StrEnum):
    """Names of losses.similarity.SIMILARITIES, and a choice by the modalities."""

    AUTO = "auto"
    LNCC = "lncc"
    LNCC2 = "lncc2"
    MIND = "mind"
    NMI = "nmi"
    NCC = "ncc"
    BOX_NCC = "box_ncc"
    MSE = "mse"


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


class PairingChoice(enum.StrEnum):
    """Whose scans they are."""

    INTER = "inter"
    INTRA = "intra"


class LandmarksFrame(enum.StrEnum):
    """What the numbers of a file of landmarks are."""

    LPS = "lps"
    RAS = "ras"
    VOXEL = "voxel"


# One line of help per option, its unit and default in it. [brackets] would be markup.
SCANS = "Scans"
START, OPTIMISE, REGIONS, INPUT, TASK = (
    "Pre-alignment",
    "Instance optimisation",
    "Masks and segmentations",
    "Intensities",
    "Task",
)
FIXED_MODALITY = choice(
    "--fixed-modality", "Kind of the fixed scan; of MR, also its contrast.", SCANS
)
MOVING_MODALITY = choice(
    "--moving-modality", "Kind of the moving scan; of MR, also its contrast.", SCANS
)
WARPED_MODALITY = choice(
    "--moving-modality",
    "Kind of the moving scan, as given to register, for --fill auto. Default: CT if "
    "its values go down to -500, by its values what else it is.",
    SCANS,
)
PrealignWay = Annotated[
    Prealign,
    choice(
        "--prealign",
        "What comes before the network, in mm: centre puts centres of mass onto each "
        "other, affine matches intensities; sam-affine and sam-coarse (sam is the "
        "same) follow SAM's matches.",
        START,
    ),
]
SamWeights = Annotated[
    pathlib.Path | None,
    option(
        "--sam-weights",
        "SAM network for --prealign sam and for a UniReg without one: checkpoint "
        "folder or .pth. Default: the one that a UniReg holds.",
        START,
    ),
]
IoTarget = Annotated[
    Target,
    choice(
        "--io-target",
        "What is optimised: a copy of the network's weights; an affine and a "
        "displacement field without any network; after the network, a displacement by "
        "features (of SAM, or MIND's descriptors), or its map by intensities.",
        OPTIMISE,
    ),
]
IoSim = Annotated[
    Similarity,
    choice(
        "--io-sim",
        "Similarity. auto: lncc; without a network nmi where contrasts differ.",
        OPTIMISE,
    ),
]
IoLr = Annotated[
    float | None,
    option(
        "--io-lr",
        "Learning rate of Adam. Default: 2e-5 (network), 0.05 (features), 0.008 "
        "(map), the optimiser's own (displacement).",
        OPTIMISE,
    ),
]
Seed = Annotated[
    int,
    option(
        "--seed", "Seed of the optimisation's noise.", OPTIMISE, min=0, max=2**32 - 1
    ),
]
TaskName = Annotated[
    str,
    option(
        "--task",
        "For a network with a prompt bank: auto weighs all its domains, NAME[,NAME] "
        "these alone. The closest domains are printed. For UniReg: a region, or a task "
        "that it was trained on; for another part of the body the nearest one.",
        TASK,
    ),
]
PairingName = Annotated[
    PairingChoice | None,
    choice(
        "--pairing",
        "For UniReg: scans of two subjects (inter) or of one (intra). Default: that of "
        "the task in training.",
        TASK,
    ),
]
Smoothness = Annotated[
    float | None,
    option(
        "--smoothness",
        "For a network that can be asked for it: weight of the smoothness term, as in "
        "training (lambda). Default: what tune-lambda found, else the task's own in "
        "training, else the middle.",
        TASK,
    ),
]
LevelIterations = Annotated[
    int | None,
    option(
        "--level-iterations",
        "For UniReg-RPN: repeat each level up to so many times, as long as it helps; "
        "10 is the released UniReg-IIRPN. Default: the weights' own (1).",
        TASK,
        min=1,
    ),
]
InputMasking = Annotated[
    bool,
    option("--input-masking", "Set intensities outside the masks to 0.", REGIONS),
]
LossMasking = Annotated[
    bool,
    option(
        "--loss-function-masking",
        "Count similarity inside the masks only; needs both masks.",
        REGIONS,
    ),
]
CtWindow = Annotated[
    tuple[float, float] | None,
    option(
        "--ct-window",
        "Hounsfield units that become 0 and 1. Default: the weights' own (-1000 1000 "
        "for the published ones).",
        INPUT,
        metavar="MIN MAX",
    ),
]
QuantileRange = Annotated[
    tuple[float, float] | None,
    option(
        "--quantile-range",
        "Quantiles of an MRI that become 0 and 1. Default: the weights' own (the "
        "minimum and 0.99 for the published ones).",
        INPUT,
        metavar="LO HI",
    ),
]


def parse_shape(text: str) -> tuple[int, int, int]:
    """Returns (D, H, W) of "D,H,W" or "DxHxW", or of one number, a cube's edge.

    Raises:
      UserError: these are not one or three positive numbers.
    """
    parts = text.lower().replace("x", ",").split(",")
    try:
        d, h, w = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    except ValueError:
        raise UserError(
            f"--shape is {text}, expected three whole numbers such as 175,175,175, or "
            "one for a cube"
        ) from None
    if min(d, h, w) < 1:
        raise UserError(
            f"--shape is {text}, expected positive numbers such as 175,175,175"
        )
    return d, h, w


def parse_iterations(text: str) -> int | None:
    """Returns the number of steps, or None for "None".

    Raises:
      UserError: it is neither.
    """
    if text.strip().lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"--io-iterations is {text}, expected a positive number, or None to "
            "register without instance optimisation"
        ) from None


def load_sam(
    method: str, path: pathlib.Path | None, model: str | pathlib.Path | None
) -> "TrainedSam | None":
    """Loads a SAM network, before scans are read and other weights are fetched.

    Args:
      method: of pre-alignment, one of prealignment.WAYS.
      path: of --sam-weights.
      model: name or path of the network's weights; None for no network.

    Raises:
      UserError: the way needs SAM, and there is no path, nor a checkpoint folder that
        might hold a UniReg with its own; or the path holds none.
    """
    from jaxreg.registration.prealign import select
    from jaxreg.weights import load, zoo

    if path is not None:
        return load.load_sam(path)
    if method in select.SAM_METHODS and not (
        model is not None
        and str(model) not in zoo.ZOO
        and pathlib.Path(model).suffix.lower() not in zoo.TORCH_SUFFIXES
    ):
        raise select.without_sam(method)
    return None


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


def print_numbers(numbers: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value}")
