"""Options of a registration, and whether they fit together.

The command line makes its options of `Options`: a field's name, annotation, default and
line of documentation are those of the option as well. Imports no JAX, so that its help
is quick.
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxreg import settings
from jaxreg.data import modality as modality_lib
from jaxreg.data.manifest.records import Pairing
from jaxreg.errors import UserError
from jaxreg.space.grid import Shape, Volume

if TYPE_CHECKING:
    from jaxreg.data import network_grid

Target = Literal["auto", "network", "displacement", "features", "map"]
REFINING = ("features", "map")
SIMILARITIES = ("auto", "lncc", "lncc2", "mind", "nmi", "ncc", "box_ncc", "mse")
"""The keys of `losses.similarity.SIMILARITIES`, and a choice by the scans."""
Prealign = Literal[
    "auto",
    "none",
    "centre",
    "rigid",
    "similarity",
    "affine",
    "sam",
    "sam-affine",
    "sam-coarse",
]
"""auto: see `settled`; none; centres of mass; by intensities a rigid, a similarity
(rigid, and one stretch in all directions) or an affine map; by SAM's matches an affine
map ("sam-affine") or a coarse field ("sam-coarse" and "sam", as UniReg was trained)."""
INTENSITY_METHODS = ("rigid", "similarity", "affine")
SAM_METHODS = ("sam", "sam-affine", "sam-coarse")
AUTO = modality_lib.AUTO
"""What jaxreg chooses: a model (`automatic.choose`), or an option (`settled`)."""
MATMUL = {"float32": "highest", "bfloat16": "bfloat16"}
Progress = Callable[[int, int, dict[str, float]], None]
MODALITIES = tuple(modality_lib.CONTRASTS)
_MODALITIES = (AUTO, *MODALITIES)


def read_shape(text: str) -> Shape:
    """Returns (D, H, W) of "D,H,W" or "DxHxW", or of one number, a cube's edge.

    Raises:
      UserError: these are not one or three positive numbers.
    """
    parts = text.lower().replace("x", ",").split(",")
    try:
        d, h, w = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    except ValueError:
        raise UserError(
            f"`shape` is {text}, expected three whole numbers such as 175,175,175, or "
            "one for a cube"
        ) from None
    if min(d, h, w) < 1:
        raise UserError(
            f"`shape` is {text}, expected positive numbers such as 175,175,175"
        )
    return d, h, w


@dataclasses.dataclass(frozen=True)
class Effort:
    """What a quality means where the options do not say it.

    Attributes:
      network_steps: of instance optimisation after a network; None for none.
      steps: of a displacement without a network, at each level.
      voxels: of the grid without a network, at most, see `network_grid.shape_within`.
      least: of the same, at least: a displacement moves parts of voxels.
    """

    network_steps: int | None
    steps: int
    voxels: int
    least: int


Quality = Literal["fast", "default", "best"]
EFFORTS: Mapping[Quality, Effort] = MappingProxyType(
    {
        "fast": Effort(network_steps=None, steps=30, voxels=48**3, least=0),
        "default": Effort(network_steps=50, steps=50, voxels=80**3, least=48**3),
        "best": Effort(network_steps=200, steps=100, voxels=128**3, least=64**3),
    }
)


def read_iterations(text: str) -> int | Literal["auto"] | None:
    """Returns a number of steps, None for "None", or "auto".

    Raises:
      UserError: it is none of them.
    """
    if text.strip().lower() == "none":
        return None
    if text.strip().lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise _wrong_iterations(text) from None


def _wrong_iterations(given: int | str) -> UserError:
    return UserError(
        f"`io_iterations` is {given}, expected a positive number, auto, or None to "
        "register without instance optimisation"
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """How to register.

    Attributes:
      fixed_modality: Kind of the fixed scan; of MR, also its contrast. auto: CT if its
        values look like Hounsfield units, else MR.
      moving_modality: Kind of the moving scan; of MR, also its contrast. auto: by its
        own values, as of the fixed scan.
      shape: Network grid in voxels, the slowest axis of the volume first, as the
        network sees it turned (without weights: superior, anterior, right; its fastest
        for weights that see NIfTI's order, as PromptReg's), or one number for a cube.
        Default: the grid that the weights were trained on, 175,175,175 for the
        published ones; without weights the fixed scan's own, or a coarser or finer one
        of as many voxels as the quality has.
      quality: How much work is done where other options do not say it. fast: a
        network's prediction alone, or a coarse grid; best: more steps, and a finer
        grid.
      precision: Of the network's products, where the device has a choice: weights and
        images stay float32, and a CPU always computes in it.
      stored_orientation: Feed both scans as they are stored, as the PyTorch tool does.
        Default: their axes are permuted and flipped into the order that the weights
        were trained with, where they say it, else the moving scan's into the fixed
        scan's.
      task: For a network with a prompt bank: auto weighs all its domains, NAME or
        NAME,NAME these alone. The closest domains are printed. For UniReg: a region, or
        a task that it was trained on; for another part of the body the nearest one.
      pairing: For UniReg: scans of two subjects (inter) or of one (intra). Default:
        that of the task in training.
      smoothness: For a network that can be asked for it: weight of the smoothness term,
        as in training (lambda). Default: what tune-lambda found, else the task's own in
        training, else the middle.
      level_iterations: For UniReg-RPN: repeat each level up to so many times, as long
        as it helps; 10 is the released UniReg-IIRPN. Default: the weights' own (1).
      prealign: What comes before the network, in mm. auto: affine without a network,
        unless io_target is given; else none. centre puts centres of mass onto each
        other; rigid, similarity (one stretch in all directions) and affine match
        intensities; sam-affine and sam-coarse (sam is the
        same) follow SAM's matches.
      io_iterations: Steps of instance optimisation (for a displacement per level of
        resolution), or None for a single prediction. auto: by quality, 50.
      io_target: What is optimised: a copy of the network's weights; an affine and a
        displacement field without any network (auto: the first of these with a
        network, the second without); after the network, a displacement by
        features (of SAM, or MIND's descriptors), or its map by intensities.
      io_sim: Similarity. auto: lncc; without a network nmi where contrasts differ, by
        the modalities or else by the intensities.
      io_lr: Learning rate of Adam. Default: 2e-5 (network), 0.05 (features), 0.008
        (map), the optimiser's own (displacement).
      seed: Seed of the optimisation's noise.
      input_masking: Set intensities outside the masks to 0.
      loss_function_masking: Count similarity inside the masks only; needs both masks.
      dice_loss_weight: Weight of the Dice term; needs both segmentations.
      intensity_conservation_loss: Multiply warped intensity by the Jacobian
        determinant; both scans CT.
      ct_window: Hounsfield units that become 0 and 1. Default: the weights' own (-1000
        1000 for the published ones).
      quantile_range: Quantiles of an MRI that become 0 and 1. Default: the weights' own
        (the minimum and 0.99 for the published ones).
      foreground: Take these quantiles of the voxels above 0 alone. Default: as the
        weights do.
      inverse: Compute the inverse transform as well.
      placement: How scans become arrays on the network grid. Default: as the weights
        do, or as GradICON.
    """

    fixed_modality: Annotated[str, _MODALITIES] = AUTO
    moving_modality: Annotated[str, _MODALITIES] = AUTO
    shape: Annotated[Shape | None, read_shape] = None
    quality: Quality = "default"
    precision: Literal["float32", "bfloat16"] = "float32"
    stored_orientation: bool = False
    task: str = "auto"
    pairing: Pairing | None = None
    smoothness: float | None = None
    level_iterations: int | None = None
    prealign: Prealign = "auto"
    io_iterations: Annotated[int | Literal["auto"] | None, read_iterations] = "auto"
    io_target: Target = "auto"
    io_sim: Annotated[str, SIMILARITIES] = "auto"
    io_lr: float | None = None
    seed: int = 0
    input_masking: bool = False
    loss_function_masking: bool = False
    dice_loss_weight: float = 0.0
    intensity_conservation_loss: bool = False
    ct_window: tuple[float, float] | None = None
    quantile_range: tuple[float, float] | None = None
    foreground: bool | None = None
    inverse: bool = True
    placement: "network_grid.ResamplingRule | None" = None

    def __post_init__(self):
        """Makes a cube of one number.

        Raises:
          UserError: the shape is no three whole numbers, nor one.
        """
        if self.shape is None:
            return
        one = isinstance(self.shape, numbers.Integral)
        shape = (self.shape,) * 3 if one else self.shape
        try:
            d, h, w = (operator.index(n) for n in shape)  # pyright: ignore
        except (TypeError, ValueError):
            raise UserError(
                f"`shape` is {self.shape!r}, expected three whole numbers such as "
                "(175, 175, 175), or one for a cube"
            ) from None
        object.__setattr__(self, "shape", (d, h, w))

    @property
    def steps(self) -> int | None:
        """`io_iterations` of options that say them; see `settled`."""
        assert not isinstance(self.io_iterations, str), "the caller has called settled"
        return self.io_iterations

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
        from jaxreg.io import given  # with all libraries of image files

        for name, region in vars(self).items():
            if region is not None:
                kind = "mask" if name.endswith("mask") else "labels"
                read = given.volume(region, name.replace("_", " "), kind=kind)
                object.__setattr__(self, name, read)


def settled(options: Options, *, network: bool, started: bool = False) -> Options:
    """Returns the options with what "auto" stands for, but for the similarity.

    Args:
      options: how to register.
      network: whether a network takes part.
      started: whether something else says already where the scans are.
    """
    effort, steps = EFFORTS[options.quality], options.io_iterations
    target, prealign = options.io_target, options.prealign
    if steps == AUTO:
        alone = not network or target == "displacement"
        steps = effort.steps if alone else effort.network_steps
        if steps is None and _asks_for_steps(options):
            steps = EFFORTS["default"].network_steps
    if target == AUTO:
        target = "network" if network or steps is None else "displacement"
    if prealign == AUTO:
        unplaced = not (network or started) and options.io_target == AUTO
        prealign = "affine" if unplaced else "none"
    return dataclasses.replace(
        options, io_iterations=steps, io_target=target, prealign=prealign
    )


def _asks_for_steps(options: Options) -> bool:
    """Whether anything would have no effect without instance optimisation."""
    weighted = options.dice_loss_weight > 0 or options.intensity_conservation_loss
    return weighted or options.io_target != AUTO


def check_options(options: Options) -> None:
    """Checks what can be said before any file is read.

    Raises:
      UserError: a value out of its range, or values that contradict each other.
    """
    check_kind(
        options, Options, "the options are", "jaxreg.registration.options.Options(...)"
    )
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "io_iterations" and value == AUTO:
            continue
        if not isinstance(field.type, str):  # placement, which names a later module
            settings.read(value, field.type, field.name, parse=False)
    check_modalities(options)
    _check_prealign(options)
    steps = options.io_iterations
    if isinstance(steps, int) and steps < 1:
        raise _wrong_iterations(steps)
    if options.io_lr is not None and not 0 < options.io_lr < math.inf:
        raise UserError(f"`io_lr` is {options.io_lr:g}, expected a positive number")
    if not 0 <= options.dice_loss_weight < math.inf:
        raise UserError(
            f"`dice_loss_weight` is {options.dice_loss_weight:g}, expected 0 or more"
        )
    if options.shape is not None and min(options.shape) < 8:
        raise UserError(
            f"`shape` is {','.join(map(str, options.shape))}, expected three numbers "
            "of at least 8; leave it out for the grid of the weights"
        )
    if not 0 <= options.seed < 2**32:
        raise UserError(f"`seed` is {options.seed}, expected 0 to {2**32 - 1}")
    if options.level_iterations is not None and options.level_iterations < 1:
        raise UserError(
            f"`level_iterations` is {options.level_iterations}, expected a positive "
            "number"
        )
    _check_target(options)


def check_kind(value: object, kind: Any, what: str, words: str) -> None:
    """Raises `UserError` for a value of another type."""
    if not isinstance(value, kind):
        raise UserError(f"{what} a {type(value).__name__}, expected {words}")


def _check_target(options: Options) -> None:
    if options.stored_orientation and options.io_target == "displacement":
        raise UserError(
            "`stored_orientation` is for networks; `io_target` displacement starts "
            "from the scans' headers, leave one of the two away"
        )
    if options.io_target in REFINING and (
        options.dice_loss_weight > 0 or options.intensity_conservation_loss
    ):
        raise UserError(
            f"`io_target` {options.io_target} knows neither `dice_loss_weight` nor "
            "`intensity_conservation_loss`; leave them out"
        )
    if options.io_iterations is None:
        for name, used in (
            (
                f"`io_target` {options.io_target}",
                options.io_target not in (AUTO, "network"),
            ),
            ("`dice_loss_weight`", options.dice_loss_weight > 0),
            ("`intensity_conservation_loss`", options.intensity_conservation_loss),
        ):
            if used:
                raise UserError(
                    f"{name} needs instance optimisation, which `io_iterations` None "
                    "switches off; pass a number of iterations"
                )


def _check_prealign(options: Options) -> None:
    if options.prealign not in (AUTO, "none") and options.stored_orientation:
        raise UserError(
            "`stored_orientation` shows the network the moving scan as it is stored, "
            f"`prealign` {options.prealign} over the fixed scan; leave one of the two "
            "away"
        )


def check_modalities(options: Options) -> None:
    """Checks that the options go with the modalities, where these are known.

    Raises:
      UserError: an option is for scans that neither is, or not both are.
    """
    modalities = (options.fixed_modality, options.moving_modality)
    if AUTO in modalities:  # until the scans are read, either may be anything
        ranges = options.ct_window, options.quantile_range
        check_intensities(*ranges, modality_lib.KINDS)
        return
    modalities = tuple(modality_lib.kind(modality) for modality in modalities)
    check_intensities(options.ct_window, options.quantile_range, modalities)
    if options.intensity_conservation_loss and set(modalities) != {"ct"}:
        raise UserError(
            "`intensity_conservation_loss` needs two CT scans, the modalities are "
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
                f"`ct_window` is {low:g} {high:g}, expected two Hounsfield units, the "
                "smaller first"
            )
        if "ct" not in modalities:
            raise UserError(
                "`ct_window` has no effect, because neither modality is ct; leave it "
                "out or correct the modality"
            )
    if quantile_range is not None:
        low, high = quantile_range
        if not 0 <= low < high <= 1:
            raise UserError(
                f"`quantile_range` is {low:g} {high:g}, expected two numbers between 0 "
                "and 1, the smaller first"
            )
        if "mri" not in modalities:
            raise UserError(
                "`quantile_range` has no effect, because neither modality is mri; "
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
            f"`{segmentations[0]}` was given alone; pass both segmentations or neither"
        )
    if options.dice_loss_weight > 0 and not segmentations:
        raise UserError(
            f"`dice_loss_weight` {options.dice_loss_weight:g} needs "
            "`fixed_segmentation` and `moving_segmentation`"
        )
    if options.loss_function_masking and len(masks) < 2:
        raise UserError(
            "`loss_function_masking` needs both `fixed_mask` and `moving_mask`, "
            f"{f'`{masks[0]}` alone' if masks else 'neither'} was given"
        )
    if options.input_masking and not masks:
        raise UserError("`input_masking` needs `fixed_mask` or `moving_mask`, or both")
    if masks and not (options.input_masking or options.loss_function_masking):
        raise UserError(
            f"`{masks[0]}` has no effect by itself; add `input_masking`, "
            "`loss_function_masking`, or both"
        )


def map_regions(
    regions: Regions,
    function: Callable[[Volume], Volume],
    names: Iterable[str] | None = None,
) -> Regions:
    """Returns the regions with a function applied to some of them, or to all."""
    given = {n: getattr(regions, n) for n in names or vars(regions)}
    changed = {n: function(v) for n, v in given.items() if v is not None}
    return dataclasses.replace(regions, **changed)
