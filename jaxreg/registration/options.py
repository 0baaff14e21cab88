"""Options of a registration, and whether they fit together."""

import dataclasses
import difflib
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxreg.data import modality as modality_lib
from jaxreg.data import network_grid
from jaxreg.errors import UserError
from jaxreg.io import given
from jaxreg.losses import similarity
from jaxreg.nn.heads import Pairing
from jaxreg.registration.prealign import select
from jaxreg.space.grid import Shape, Volume

Target = Literal["network", "displacement", "features", "map"]
REFINING = ("features", "map")
_WHOLE_NUMBERS = ("io_iterations", "level_iterations", "seed")
_NUMBERS = ("io_lr", "dice_loss_weight", "smoothness")
MATMUL = {"float32": "highest", "bfloat16": "bfloat16"}
Progress = Callable[[int, int, dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to register; the names are the command line's, with underscores.

    A shape of one number is that of a cube.

    Attributes:
      fixed_modality: a key of `preprocess.CONTRASTS`: how the fixed scan's intensities
        are scaled, "ct" or as any MR.
      moving_modality: the same for the moving scan.
      ct_window: lowest and highest Hounsfield unit kept; if None the model's own, or
        -1000 to 1000 where there is none.
      quantile_range: for MRI, the quantiles that become 0 and 1; if None the model's
        own, or the minimum and the 0.99 quantile where there are none.
      foreground: these quantiles are of the voxels above 0 alone; if None as the
        model's.
      input_masking: set preprocessed intensities outside the masks to 0.
      loss_function_masking: count similarity inside the masks only.
      io_iterations: steps of instance optimisation, for a displacement per level of
        resolution; None for a single prediction.
      io_target: optimise the network's weights ("network"); without it an affine map
        and a displacement ("displacement"); or after it, by the images' features, a
        displacement ("features") or, by intensities, the map itself ("map"), see
        `optimization.features`.
      io_sim: similarity, a key of `losses.similarity.SIMILARITIES`; or "auto": "lncc",
        but without a network "nmi" where the modalities differ or, where they do not
        say it, what is bright in one scan is not bright in the other.
      io_lr: learning rate of Adam; the target's own default if None.
      dice_loss_weight: weight of the Dice term; needs both segmentations.
      intensity_conservation_loss: multiply warped CT by the Jacobian determinant.
      shape: the network grid, voxels along the network's array axes: (D, H, W), or
        the reverse where its placement has NIfTI's order; if None that of the weights,
        or 175 x 175 x 175 where there are none.
      precision: of the network's products, where the device has a choice; all else is
        float32, coordinates and losses included.
      stored_orientation: feed both scans as they are stored, as the original does,
        instead of turned to the orientation of the network's training, or where that
        is not known the moving one to the fixed one's; see `oriented_like`.
      seed: of the noise in the inverse consistency term.
      inverse: compute the inverse transform as well.
      task: for a network with a prompt bank: "auto" weighs all its domains, names (with
        commas) these alone. For UniReg a region, or a task that it was trained on.
        Other networks know no tasks.
      pairing: for UniReg: scans of two subjects or of one; that of the task if None.
      smoothness: for a network that can be asked for it: the weight of the smoothness
        term as in training; the task's own if None.
      level_iterations: for a UniReg-RPN: most steps of each level, 10 for the released
        UniReg-IIRPN; the weights' own number if None.
      placement: how scans become arrays on the network grid; if None the model's own,
        or GradICON's where there is none.
      prealign: how the scans are aligned in mm before anything else, see
        `select.Method`; the network sees the moving scan carried over by that, and
        the results hold it.
    """

    fixed_modality: str = "mri"
    moving_modality: str = "mri"
    ct_window: tuple[float, float] | None = None
    quantile_range: tuple[float, float] | None = None
    foreground: bool | None = None
    input_masking: bool = False
    loss_function_masking: bool = False
    io_iterations: int | None = 50
    io_target: Target = "network"
    io_sim: str = "auto"
    io_lr: float | None = None
    dice_loss_weight: float = 0.0
    intensity_conservation_loss: bool = False
    shape: Shape | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    stored_orientation: bool = False
    seed: int = 0
    inverse: bool = True
    task: str = "auto"
    pairing: Pairing | None = None
    smoothness: float | None = None
    level_iterations: int | None = None
    placement: network_grid.ResamplingRule | None = None
    prealign: select.Method = "none"

    def __post_init__(self):
        """Makes a cube of one number.

        Raises:
          UserError: the shape is no three whole numbers, nor one.
        """
        if self.shape is None:
            return
        one = isinstance(self.shape, int | np.integer)
        shape = (self.shape,) * 3 if one else self.shape
        try:
            d, h, w = (operator.index(n) for n in shape)  # pyright: ignore
        except (TypeError, ValueError):
            raise UserError(
                f"shape is {self.shape!r}, expected three whole numbers such as "
                "(175, 175, 175), or one for a cube"
            ) from None
        object.__setattr__(self, "shape", (d, h, w))

    @property
    def grid_shape(self) -> Shape:
        """The network grid of options that say one; see `with_grid`."""
        assert self.shape is not None, "the caller has called with_grid"
        return self.shape


@dataclasses.dataclass(frozen=True)
class Regions:
    """Masks and label maps that belong to the scans, each on its scan's own grid.

    They may be given as scans may, see `io.given`, and are volumes from then on.
    """

    fixed_mask: Volume | None = None
    moving_mask: Volume | None = None
    fixed_segmentation: Volume | None = None
    moving_segmentation: Volume | None = None

    def __post_init__(self):
        """Reads what is no volume yet.

        Raises:
          UserError: see `given.volume`.
        """
        for name, region in vars(self).items():
            if region is not None:
                kind = "mask" if name.endswith("mask") else "labels"
                read = given.volume(region, name.replace("_", " "), kind=kind)
                object.__setattr__(self, name, read)


def check_options(options: Options) -> None:
    """Checks what can be said before any file is read.

    Raises:
      UserError: a value out of its range, or values that contradict each other.
    """
    check_kind(
        options, Options, "the options are", "jaxreg.registration.options.Options(...)"
    )
    _check_numbers(options)
    for name, known in (("io_target", get_args(Target)), ("precision", tuple(MATMUL))):
        if getattr(options, name) not in known:
            near = difflib.get_close_matches(str(getattr(options, name)), known, n=1)
            raise UserError(
                f"{option_name(name)} is {getattr(options, name)}, expected one of "
                f"{', '.join(known)}" + "".join(f"; did you mean {n}?" for n in near)
            )
    _check_modality_options(options)
    _check_prealign(options)
    if options.io_sim not in ("auto", *similarity.SIMILARITIES):
        known = ", ".join(["auto", *sorted(similarity.SIMILARITIES)])
        raise UserError(f"--io-sim is {options.io_sim}, expected one of {known}")
    if options.io_iterations is not None and options.io_iterations < 1:
        raise UserError(
            f"--io-iterations is {options.io_iterations}, expected a positive number, "
            "or None to register without instance optimisation"
        )
    if options.io_lr is not None and not 0 < options.io_lr < math.inf:
        raise UserError(f"--io-lr is {options.io_lr:g}, expected a positive number")
    if not 0 <= options.dice_loss_weight < math.inf:
        raise UserError(
            f"--dice-loss-weight is {options.dice_loss_weight:g}, expected 0 or more"
        )
    if options.shape is not None and min(options.shape) < 8:
        raise UserError(
            f"--shape is {','.join(map(str, options.shape))}, expected three numbers "
            "of at least 8; leave it out for the grid of the weights"
        )
    _check_target(options)


def check_kind(value: object, kind: Any, what: str, words: str) -> None:
    """Raises `UserError` for a value of another type."""
    if not isinstance(value, kind):
        raise UserError(f"{what} a {type(value).__name__}, expected {words}")


def _check_numbers(options: Options) -> None:
    """Checks what the command line makes numbers of, for callers from Python."""
    for name, kind, words in (
        *((n, numbers.Integral, "a whole number") for n in _WHOLE_NUMBERS),
        *((n, numbers.Real, "a number") for n in _NUMBERS),
    ):
        value = getattr(options, name)
        optional = value is None and name not in ("seed", "dice_loss_weight")
        if not optional and not isinstance(value, kind):
            raise UserError(f"{option_name(name)} is {value!r}, expected {words}")
    for name in ("ct_window", "quantile_range"):
        ends = getattr(options, name)
        if ends is None:
            continue
        two = isinstance(ends, Sequence | np.ndarray) and len(ends) == 2
        if not two or not all(isinstance(end, numbers.Real) for end in ends):
            raise UserError(f"{option_name(name)} is {ends!r}, expected two numbers")


def _check_target(options: Options) -> None:
    if options.stored_orientation and options.io_target == "displacement":
        raise UserError(
            "--stored-orientation is for networks; --io-target displacement starts "
            "from the scans' headers, leave one of the two away"
        )
    if options.io_target in REFINING and (
        options.dice_loss_weight > 0 or options.intensity_conservation_loss
    ):
        raise UserError(
            f"--io-target {options.io_target} knows neither --dice-loss-weight nor "
            "--intensity-conservation-loss; leave them out"
        )
    if options.io_iterations is None:
        for name, used in (
            (f"--io-target {options.io_target}", options.io_target != "network"),
            ("--dice-loss-weight", options.dice_loss_weight > 0),
            ("--intensity-conservation-loss", options.intensity_conservation_loss),
        ):
            if used:
                raise UserError(
                    f"{name} needs instance optimisation, which --io-iterations None "
                    "switches off; pass a number of iterations"
                )


def _check_prealign(options: Options) -> None:
    if options.prealign not in select.METHODS:
        known = ", ".join(select.METHODS)
        raise UserError(f"--prealign is {options.prealign}, expected one of {known}")
    if options.prealign != "none" and options.stored_orientation:
        raise UserError(
            "--stored-orientation shows the network the moving scan as it is stored, "
            f"--prealign {options.prealign} over the fixed scan; leave one of the two "
            "away"
        )


def _check_modality_options(options: Options) -> None:
    modalities = (options.fixed_modality, options.moving_modality)
    for name, modality in zip(("fixed", "moving"), modalities, strict=True):
        if str(modality).lower() not in modality_lib.CONTRASTS:
            raise UserError(
                f"--{name}-modality is {modality}, expected one of "
                f"{', '.join(modality_lib.CONTRASTS)}"
            )
    modalities = tuple(modality_lib.kind(modality) for modality in modalities)
    check_intensities(options.ct_window, options.quantile_range, modalities)
    if options.intensity_conservation_loss and set(modalities) != {"ct"}:
        raise UserError(
            "--intensity-conservation-loss needs two CT scans, the modalities are "
            f"{modalities[0]} and {modalities[1]}; leave it out"
        )


def check_intensities(
    ct_window: tuple[float, float] | None,
    quantile_range: tuple[float, float] | None,
    modalities: Sequence[str],
) -> None:
    """Checks how intensities are to be scaled.

    Args:
      ct_window: see `Options`.
      quantile_range: see `Options`.
      modalities: of both scans, "ct" or "mri".

    Raises:
      UserError: a range is empty, or one for scans that neither is.
    """
    if ct_window is not None:
        low, high = ct_window
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(
                f"--ct-window is {low:g} {high:g}, expected two Hounsfield units, the "
                "smaller first"
            )
        if "ct" not in modalities:
            raise UserError(
                "--ct-window has no effect, because neither modality is ct; leave it "
                "out or correct the modality"
            )
    if quantile_range is not None:
        low, high = quantile_range
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--quantile-range is {low:g} {high:g}, expected two numbers between 0 "
                "and 1, the smaller first"
            )
        if "mri" not in modalities:
            raise UserError(
                "--quantile-range has no effect, because neither modality is mri; "
                "leave it out or correct the modality"
            )


def check_regions(options: Options, given: Mapping[str, Any]) -> None:
    """Checks which masks and label maps go together with the options.

    Args:
      options: how to register.
      given: the names of `Regions` to anything, or to None where absent.

    Raises:
      UserError: something asked for lacks its files, or files would have no effect.
    """
    masks = [n for n in ("fixed_mask", "moving_mask") if given[n] is not None]
    segmentations = [
        n for n in ("fixed_segmentation", "moving_segmentation") if given[n] is not None
    ]
    if len(segmentations) == 1:
        raise UserError(
            f"{option_name(segmentations[0])} was given alone; pass both segmentations "
            "or neither"
        )
    if options.dice_loss_weight > 0 and not segmentations:
        raise UserError(
            f"--dice-loss-weight {options.dice_loss_weight:g} needs "
            "--fixed-segmentation and --moving-segmentation"
        )
    if options.loss_function_masking and len(masks) < 2:
        raise UserError(
            "--loss-function-masking needs both --fixed-mask and --moving-mask, "
            f"{option_name(masks[0]) + ' alone' if masks else 'neither'} was given"
        )
    if options.input_masking and not masks:
        raise UserError("--input-masking needs --fixed-mask or --moving-mask, or both")
    if masks and not (options.input_masking or options.loss_function_masking):
        raise UserError(
            f"{option_name(masks[0])} has no effect by itself; add --input-masking, "
            "--loss-function-masking, or both"
        )


def option_name(name: str) -> str:
    """Returns a field's option on the command line."""
    return "--" + name.replace("_", "-")


def map_regions(
    regions: Regions,
    function: Callable[[Volume], Volume],
    names: Iterable[str] | None = None,
) -> Regions:
    """Returns the regions with a function applied to some of them, or to all."""
    given = {n: getattr(regions, n) for n in names or vars(regions)}
    changed = {n: function(v) for n, v in given.items() if v is not None}
    return dataclasses.replace(regions, **changed)
