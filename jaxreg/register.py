"""Register two scans: volumes and a model in, a transform in millimetres out.

The one place where preprocessing, prediction, instance optimisation, inversion and the
way back to world space meet. The command line, the notebooks and the evaluation all
call `register`; nothing here opens a file.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import numbers
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from nibabel import orientations

from jaxreg import (
    affine_search,
    compiled,
    metrics,
    optimize,
    prealignment,
    refine,
    tasks,
    zoo,
)
from jaxreg.data import preprocess
from jaxreg.errors import UserError
from jaxreg.io import given
from jaxreg.losses import overlap, similarity
from jaxreg.losses.objective import Objective, as_compared
from jaxreg.models import kinds, unireg
from jaxreg.models.sam import TrainedSam
from jaxreg.models.unireg_rpn import UniRegRpnConfig
from jaxreg.nn.dynamic import Pairing
from jaxreg.space import affine, fields, sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Shape, Volume, unit_scale
from jaxreg.typing import Pair

Target = Literal["network", "displacement", "features", "map"]
_REFINING = ("features", "map")
_WHOLE_NUMBERS = ("io_iterations", "level_iterations", "seed")
_NUMBERS = ("io_lr", "dice_loss_weight", "smoothness")
_LARGEST_STRETCH = 1.5  # of lengths, by which extents may still be those of one thing
_SAME_PLACE = 0.01  # half diagonals of the fixed scan
_ALIKE = 0.95  # share of local structure: bright in one scan, bright in the other
_WITHOUT_WEIGHTS = (175, 175, 175)  # the network grid
_MUCH_FOLDED = 1.0  # per cent of the voxels
_MATMUL = {"float32": "highest", "bfloat16": "bfloat16"}
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
        `refine`.
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
        `prealignment.Way`; the network sees the moving scan carried over by that, and
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
    placement: preprocess.Placement | None = None
    prealign: prealignment.Way = "none"

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


@dataclasses.dataclass(frozen=True)
class Registration:
    """What registering two scans gives.

    Attributes:
      transform: fixed mm to moving mm (RAS+), what a resampler needs.
      inverse: moving mm to fixed mm, or None if not asked for.
      inverse_residual_mm: mean and maximum of ``|T(T_inverse(x)) - x|`` within the
        moving scan, of the two transforms above; see `transform.round_trip_mm`.
      fixed_grid: the fixed scan's network grid.
      moving_grid: the moving scan's network grid; with a pre-alignment, the fixed
        scan's moved by its affine part.
      history: parts of the objective per step, by name; empty without optimisation.
      similarity: the loss that `similarity_before` and `similarity_after` are values
        of; smaller is better.
      similarity_before: with the scans where their headers place them.
      similarity_prealigned: with the scans pre-aligned, or None if they were not.
      similarity_after: with the moving scan warped by the transform.
      folding_percent: share of the fixed scan's voxels whose Jacobian determinant is
        negative, 0 to 100, see `metrics.regularity`; of a scan that is larger than the
        network's box, those within it.
      domains: share of each domain of a prompt bank in this pair's prompt, by name;
        empty for other networks.
      seconds: wall time by phase.
      fixed_image: what the similarity saw of the fixed scan, D H W, [0, 1].
      warped_before: the moving scan on the fixed network grid by the headers, D H W.
      warped_after: the same through the transform.
      sdlogj: standard deviation of the determinant's logarithm at the same voxels.
      told: what the network was told of the pair: region, pairing and, where it can be
        asked for one, the smoothness; empty for other networks.
      prealigned_from: what the pre-alignment came from, `Prealignment.start`; empty
        without one.
      started_from: what fitted best before a registration without a network:
        "headers", "centres of mass" or "stretched extents"; else empty.
    """

    transform: transform_lib.Transform
    inverse: transform_lib.Transform | None
    inverse_residual_mm: tuple[float, float] | None
    fixed_grid: Grid
    moving_grid: Grid
    history: Mapping[str, np.ndarray]
    similarity: str
    similarity_before: float
    similarity_prealigned: float | None
    similarity_after: float
    folding_percent: float
    domains: Mapping[str, float]
    seconds: Mapping[str, float]
    fixed_image: np.ndarray
    warped_before: np.ndarray
    warped_after: np.ndarray
    sdlogj: float
    told: str = ""
    prealigned_from: str = ""
    started_from: str = ""


@dataclasses.dataclass(frozen=True)
class _Scans:
    """What is registered: turned scans, what belongs to them, their network grids."""

    moving: Volume
    fixed: Volume
    regions: Regions
    grids: tuple[Grid, Grid]
    start: prealignment.Prealignment | None

    @property
    def placed(self) -> np.ndarray:
        """Where pre-alignment or headers place them, 4x4, fixed to moving mm."""
        return np.eye(4) if self.start is None else self.start.affine_mm


def check_options(options: Options) -> None:
    """Checks what can be said before any file is read.

    Raises:
      UserError: a value out of its range, or values that contradict each other.
    """
    _check_kind(options, Options, "the options are", "jaxreg.register.Options(...)")
    _check_numbers(options)
    for name, known in (("io_target", get_args(Target)), ("precision", tuple(_MATMUL))):
        if getattr(options, name) not in known:
            near = difflib.get_close_matches(str(getattr(options, name)), known, n=1)
            raise UserError(
                f"{_option(name)} is {getattr(options, name)}, expected one of "
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


def with_grid(options: Options, model: zoo.LoadedModel | None) -> Options:
    """Returns options on the grid of the weights, where they name none themselves."""
    if options.shape is not None:
        return options
    shape = _WITHOUT_WEIGHTS if model is None else model.shape
    return dataclasses.replace(options, shape=shape)


def _check_kind(value: object, kind: Any, what: str, words: str) -> None:
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
            raise UserError(f"{_option(name)} is {value!r}, expected {words}")
    for name in ("ct_window", "quantile_range"):
        ends = getattr(options, name)
        if ends is None:
            continue
        two = isinstance(ends, Sequence | np.ndarray) and len(ends) == 2
        if not two or not all(isinstance(end, numbers.Real) for end in ends):
            raise UserError(f"{_option(name)} is {ends!r}, expected two numbers")


def _check_target(options: Options) -> None:
    if options.stored_orientation and options.io_target == "displacement":
        raise UserError(
            "--stored-orientation is for networks; --io-target displacement starts "
            "from the scans' headers, leave one of the two away"
        )
    if options.io_target in _REFINING and (
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
    if options.prealign not in prealignment.WAYS:
        known = ", ".join(prealignment.WAYS)
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
        if str(modality).lower() not in preprocess.CONTRASTS:
            raise UserError(
                f"--{name}-modality is {modality}, expected one of "
                f"{', '.join(preprocess.CONTRASTS)}"
            )
    modalities = tuple(preprocess.kind(modality) for modality in modalities)
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
            f"{_option(segmentations[0])} was given alone; pass both segmentations or "
            "neither"
        )
    if options.dice_loss_weight > 0 and not segmentations:
        raise UserError(
            f"--dice-loss-weight {options.dice_loss_weight:g} needs "
            "--fixed-segmentation and --moving-segmentation"
        )
    if options.loss_function_masking and len(masks) < 2:
        raise UserError(
            "--loss-function-masking needs both --fixed-mask and --moving-mask, "
            f"{_option(masks[0]) + ' alone' if masks else 'neither'} was given"
        )
    if options.input_masking and not masks:
        raise UserError("--input-masking needs --fixed-mask or --moving-mask, or both")
    if masks and not (options.input_masking or options.loss_function_masking):
        raise UserError(
            f"{_option(masks[0])} has no effect by itself; add --input-masking, "
            "--loss-function-masking, or both"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@compiled.kept()
def register(
    moving: given.Scan,
    fixed: given.Scan,
    model: zoo.LoadedModel | str | os.PathLike[str] | None = None,
    options: Options = Options(),
    *,
    regions: Regions | None = None,
    sam: TrainedSam | None = None,
    start: prealignment.Prealignment | None = None,
    progress: Progress | None = None,
) -> Registration:
    """Registers one scan onto another.

    Args:
      moving: the scan to be warped: a volume, D H W, stored intensities; or what
        `io.given` makes one of, the path of a file or an image of nibabel or SimpleITK.
      fixed: the scan that stays, the same.
      model: weights from `zoo.load`, or what that loads; None where `io_target` can do
        without, or for a pre-alignment alone (without `io_iterations`).
      options: how to register.
      regions: masks and label maps of the two scans.
      sam: a network for SAM's pre-alignments and for a UniReg that has none; by default
        a UniReg's own aligns.
      start: the pre-alignment, where `prealigned` found it already.
      progress: called after each step with its number, the total and the objective's
        parts.

    Returns:
      The transform from fixed to moving mm, its inverse, and how well it fits.

    Raises:
      UserError: options, scans, masks or label maps do not go together, or a scan is
        an array, whose place nobody knows.
    """
    check_options(options)
    moving, fixed, regions = _given(moving, fixed, regions)
    check_regions(options, vars(regions))
    check_volumes(moving, fixed, regions)
    model, told = _told(model, options, sam)
    _warn_of_orientation(fixed, model, options)
    options = _with_rule_of(model, with_grid(options, model))
    placement = placement_of(model, options)
    moving, fixed, regions = turned(moving, fixed, regions, placement, options)
    alone = _prealigns_alone(model, options)
    seconds: dict[str, float] = {}

    def shown(pair: Pair) -> Pair:
        return _with_range(told.of(pair), model, options)

    with _Clock(seconds, "preprocess"):
        grids = (
            placement.grid(fixed.grid, options.grid_shape),
            placement.grid(moving.grid, options.grid_shape),
        )
        pair = shown(make_pair(moving, fixed, options, regions))
    apart, bend = (pair, grids), None
    if options.prealign != "none":
        with _Clock(seconds, "prealign"):
            if start is None:
                start = _prealigned(moving, fixed, model, options, regions, sam)
            carried = preprocess.Carried(grids[0], start.transform)
            pair = shown(make_pair(moving, fixed, options, regions, carried))
            grids, bend = (grids[0], start.carried(grids[0])), start.bend_on(grids[0])
    with _Clock(seconds, "register"):
        # The network's products only: sampling and losses ask for full precision.
        with jax.default_matmul_precision(_MATMUL[options.precision]):
            scans = _Scans(moving, fixed, regions, grids, start)
            found, options = _optimised(pair, model, options, scans, progress, sam)
            domains = {} if model is None else tasks.domains(model, pair)
        there, back = _bent(found, bend, options.grid_shape)
        forward = transform_lib.flatten(there, options.grid_shape)
        # What the pair's moving image, which is bent already, lacks.
        rest = forward if bend is None else found.forward
        _check_finite(forward, options)
    with _Clock(seconds, "score"):
        headers = _unit_matrix(np.eye(4), *apart[1])
        placed = transform_lib.Transform(
            (transform_lib.Affine(jnp.asarray(headers, "f4")),)
        )
        before, warped_before = _score(apart[0], placed, options)
        between = start and _score(pair, transform_lib.Transform(()), options)[0]
        after, warped_after = _score(pair, rest, options)
        transform, forward = _beyond_the_box(there, grids, fixed.grid)
        if alone and start:  # a pre-alignment alone is exact as it is
            transform = start.in_world
        folding_percent, sdlogj = metrics.regularity(
            transform, placement.measured(fixed.grid, options.grid_shape)
        )
        _warn_of_folds(folding_percent)
    inverse, residual = None, None
    if options.inverse:
        with _Clock(seconds, "inverse"):
            # With a pre-alignment both network grids lie over the fixed scan.
            over = (
                None
                if options.prealign == "none" or start is None
                else start.carried(fixed.grid)
            )
            inverse = _inverse(forward, back, grids, moving.grid, over)
            # Of what is returned: a field is read linearly between its voxels.
            residual = transform_lib.round_trip_mm(
                transform, inverse, fixed.grid, moving.grid
            )
    return Registration(
        transform=transform,
        inverse=inverse,
        inverse_residual_mm=residual,
        fixed_grid=grids[0],
        moving_grid=grids[1],
        history={k: np.asarray(v) for k, v in found.history.items()},
        similarity=options.io_sim,
        similarity_before=before,
        similarity_after=after,
        similarity_prealigned=between,
        folding_percent=folding_percent,
        sdlogj=sdlogj,
        domains=domains,
        seconds=seconds,
        fixed_image=np.asarray(_as_compared(pair).fixed[0, ..., 0]),
        warped_before=warped_before,
        warped_after=warped_after,
        told=told.text,
        prealigned_from=start.start if start else "",
        started_from="" if start else found.start,
    )


def _given(
    moving: given.Scan, fixed: given.Scan, regions: Regions | None
) -> tuple[Volume, Volume, Regions]:
    """Returns what a caller from Python gives, as volumes."""
    regions = regions or Regions()
    _check_kind(regions, Regions, "the regions are", "jaxreg.register.Regions(...)")
    return (
        given.volume(moving, "moving scan"),
        given.volume(fixed, "fixed scan"),
        regions,
    )


def _prealigns_alone(model: zoo.LoadedModel | None, options: Options) -> bool:
    """Whether nothing follows the pre-alignment.

    Raises:
      UserError: there is neither a network nor anything to do without one.
    """
    alone = model is None and options.io_target == "network"
    if alone and (options.prealign == "none" or options.io_iterations is not None):
        raise UserError(
            "--io-target network needs a model; name one with --model, pass "
            "--io-target displacement to register without weights, or --prealign and "
            "--io-iterations None to pre-align alone"
        )
    return alone


def _told(
    model: zoo.LoadedModel | str | os.PathLike[str] | None,
    options: Options,
    sam: TrainedSam | None,
) -> tuple[zoo.LoadedModel | None, tasks.Words]:
    """Returns the network as it serves the task, and what its pairs are to carry."""
    words = (options.task, options.pairing, options.smoothness)
    if isinstance(model, str | os.PathLike):
        model = zoo.load(model)
    loaded = zoo.LoadedModel | None
    _check_kind(model, loaded, "the model is", "a name, a path or what zoo.load gives")
    if model is None:
        tasks.refuse(*words)
        if options.level_iterations is not None:
            raise UserError(
                f"--level-iterations is {options.level_iterations}, but no network "
                "takes part; leave it out"
            )
        return None, tasks.NOTHING
    told = tasks.tell(_repeating(model, options), *words)
    return _with_sam(told.model, sam), told


def _repeating(model: zoo.LoadedModel, options: Options) -> zoo.LoadedModel:
    """Returns a pyramid that repeats its levels as often as it is asked to.

    Raises:
      UserError: the network has no levels to repeat, or has no derivative by which it
        could be optimised.
    """
    config: Any = getattr(model.model, "config", None)
    asked = options.level_iterations
    if not isinstance(config, UniRegRpnConfig):
        if asked is not None:
            raise UserError(
                f"--level-iterations is {asked}, but {model.name} is no UniReg-RPN; "
                "leave it out"
            )
        return model
    if asked is not None:
        config = dataclasses.replace(config, iterations=asked)
    optimised = options.io_iterations is not None and options.io_target == "network"
    if config.iterations > 1 and optimised:
        raise UserError(
            "--io-target network cannot optimise a network that repeats its levels; "
            "give --io-iterations None, --io-target map or --level-iterations 1"
        )
    fields = {**model.bundle.config, "iterations": config.iterations}
    return dataclasses.replace(
        model,
        model=kinds.build(config),
        bundle=dataclasses.replace(model.bundle, config=fields),
    )


def placement_of(
    model: zoo.LoadedModel | None, options: Options
) -> preprocess.Placement:
    """Returns how scans become arrays: as the options say, else as the weights do.

    Without either, as GradICON's after turning both scans to RAS.
    """
    found = options.placement
    if found is None:
        found = (
            preprocess.WITHOUT_WEIGHTS
            if model is None
            else preprocess.Placement.of_weights(model.bundle.preprocessing)
        )
    if options.stored_orientation:
        found = dataclasses.replace(found, orientation=None)
    return found


def turned(
    moving: Volume,
    fixed: Volume,
    regions: Regions,
    placement: preprocess.Placement,
    options: Options,
) -> tuple[Volume, Volume, Regions]:
    """Returns scans and regions with their array axes in the network's order."""
    if not options.stored_orientation:
        turn = functools.partial(oriented_like, reference=fixed.grid)
        moving = turn(moving)
        regions = _each(regions, turn, ("moving_mask", "moving_segmentation"))
    regions = _each(regions, placement.turned)
    return placement.turned(moving), placement.turned(fixed), regions


def _warn_of_orientation(
    fixed: Volume, model: zoo.LoadedModel | None, options: Options
) -> None:
    """Warns where nobody knows whether a network sees scans as in its training."""
    if model is None or options.stored_orientation or options.placement is not None:
        return
    turned = placement_of(model, options).axes == "spl"
    if turned or model.orientation is not None:
        return
    warnings.warn(
        f"{model.name} does not say how the scans of its training were oriented, and "
        f"sees the fixed scan as it is stored ({preprocess.orientation_of(fixed.grid)})"
        "; results are worse where that differs. In a checkpoint folder it is said by "
        f'"orientation": "{preprocess.CANONICAL}" (or what they had) under '
        "preprocessing in jaxreg.json",
        stacklevel=3,
    )


def _with_rule_of(model: zoo.LoadedModel | None, options: Options) -> Options:
    """Returns the options with the weights' intensity rule where they have none.

    Raises:
      UserError: see `check_units`.
    """
    if model is None:
        return dataclasses.replace(options, placement=placement_of(None, options))
    check_units(model, options)
    if model.mask_inputs and not options.input_masking:
        warnings.warn(
            f"{model.name} was trained on scans that are 0 outside a mask; pass masks "
            "and --input-masking to show it the same",
            stacklevel=3,
        )
    config: Any = getattr(model.model, "config", None)
    return dataclasses.replace(
        options,
        ct_window=options.ct_window
        or model.ct_window
        or kinds.hounsfield_window(config),
        placement=placement_of(model, options),
        io_sim="lncc" if options.io_sim == "auto" else options.io_sim,
        quantile_range=options.quantile_range or model.quantile_range,
        foreground=model.foreground
        if options.foreground is None
        else options.foreground,
    )


def check_units(model: zoo.LoadedModel, options: Options) -> None:
    """Checks that a network which reads Hounsfield units is shown them as they are.

    Raises:
      UserError: a scan is no CT for a network that knows nothing else, or another
        window would move what it reads.
    """
    config: Any = getattr(model.model, "config", None)
    needed = kinds.hounsfield_window(config)
    if needed is None:
        return
    for name in ("fixed_modality", "moving_modality"):
        modality = getattr(options, name)
        if preprocess.kind(modality) != "ct" and kinds.reads_ct_alone(config):
            raise UserError(
                f"{_option(name)} is {modality}, but {model.name} reads Hounsfield "
                f"units; give {_option(name)} ct if it is one, or weights trained with "
                "--model.features mind --model.backbone_window None"
            )
    low, high = options.ct_window or model.ct_window or needed
    if "ct" in _kinds(options) and (low, high) != needed:
        given = "--ct-window is" if options.ct_window else "its weights state"
        raise UserError(
            f"{given} {low:g} {high:g}, but {model.name} reads Hounsfield units of the "
            f"window {needed[0]:g} {needed[1]:g}; give --ct-window {needed[0]:g} "
            f"{needed[1]:g}"
        )


def _sam_for(
    model: zoo.LoadedModel | None, given: TrainedSam | None
) -> TrainedSam | None:
    """Returns the SAM network in use: the given one before that of a UniReg."""
    return given if given or model is None else zoo.sam_of(model)


def uses_sam(model: zoo.LoadedModel | None, options: Options) -> bool:
    """Whether registering has a use for a SAM network that is given."""
    config: Any = getattr(model and model.model, "config", None)
    lacks = (
        model is not None
        and kinds.correlates_sam(config)
        and unireg.SAM not in model.variables
    )
    shown = (
        options.io_iterations is not None
        and options.io_target == "features"
        and _both_ct(options)
    )
    return lacks or shown or options.prealign in prealignment.SAM_WAYS


def _compared_window(
    model: zoo.LoadedModel | None, options: Options
) -> tuple[float, float] | None:
    """Returns the Hounsfield units that are compared; None for all that is loaded."""
    return tasks.compared_window(model) if _both_ct(options) else None


def _with_range(pair: Pair, model: zoo.LoadedModel | None, options: Options) -> Pair:
    """Returns the pair with the part of its intensities that is compared."""
    window = _compared_window(model, options)
    rule, _ = _rules(options)
    if window in (None, rule.ct_window):
        return pair
    part = jnp.asarray([preprocess.part_of(window, rule.ct_window)], jnp.float32)
    return dataclasses.replace(pair, similarity_range=part)


_as_compared = jax.jit(as_compared)


def _both_ct(options: Options) -> bool:
    return _kinds(options) == {"ct"}


def _kinds(options: Options) -> set[str]:
    """Returns whose intensity rules hold, "ct", "mri" or both."""
    return {
        preprocess.kind(modality)
        for modality in (options.fixed_modality, options.moving_modality)
    }


def _with_sam(model: zoo.LoadedModel, sam: TrainedSam | None) -> zoo.LoadedModel:
    """Returns a UniReg that lacks its SAM network with the given one."""
    if sam is None or unireg.SAM in model.variables:
        return model
    if not isinstance(model.model, unireg.UniReg):
        return model
    config = kinds.with_sam_window(model.model.config, sam.ct_window)
    return dataclasses.replace(
        model,
        model=dataclasses.replace(model.model, config=config),
        variables=unireg.with_sam(model.variables, sam.variables),
    )


def prealigned(
    moving: Volume,
    fixed: Volume,
    model: zoo.LoadedModel | None,
    options: Options,
    *,
    regions: Regions | None = None,
    sam: TrainedSam | None = None,
) -> prealignment.Prealignment:
    """Returns the pre-alignment that `register` would start from.

    The arguments are those of `register`.

    Raises:
      UserError: see `prealignment.find`.
    """
    if model is not None:
        words = (options.task, options.pairing, options.smoothness)
        model = tasks.tell(model, *words).model
    options = _with_rule_of(model, options)
    placement = placement_of(model, options)
    moving, fixed, regions = turned(
        moving, fixed, regions or Regions(), placement, options
    )
    return _prealigned(moving, fixed, model, options, regions, sam)


def _prealigned(
    moving: Volume,
    fixed: Volume,
    model: zoo.LoadedModel | None,
    options: Options,
    regions: Regions,
    sam: TrainedSam | None,
) -> prealignment.Prealignment:
    window = _compared_window(model, options) or options.ct_window
    moving_rule, fixed_rule = _rules(dataclasses.replace(options, ct_window=window))
    masked = options.input_masking or options.loss_function_masking
    scans = [
        prealignment.Scan(volume, rule, mask if masked else None)
        for volume, rule, mask in (
            (moving, moving_rule, regions.moving_mask),
            (fixed, fixed_rule, regions.fixed_mask),
        )
    ]
    found = prealignment.find(options.prealign, *scans, network=_sam_for(model, sam))
    if (
        model is not None
        and found.extents_fit
        and placement_of(model, options).resize != "pad_crop"
    ):
        warnings.warn(
            f"without --prealign {model.name} sees the extents of "
            f"{moving.source} and {fixed.source} laid over each other, which fits "
            "better than their headers: scans cropped around one organ may do better "
            "with --prealign none",
            stacklevel=2,
        )
    return found


def _bent(
    found: optimize.Optimized, bend: transform_lib.Transform | None, shape: Shape
) -> tuple[transform_lib.Transform, transform_lib.Transform]:
    """Returns forward and backward with the bend that the network did not see."""
    if bend is None:
        return found.forward, found.backward
    back = _solve_inverse(bend, jnp.zeros((1, *shape, 3)))
    undone = transform_lib.Transform((transform_lib.Displacement(back),))
    return found.forward.then(bend), undone.then(found.backward)


def _beyond_the_box(
    unit: transform_lib.Transform, grids: Sequence[Grid], scan: Grid
) -> tuple[transform_lib.Transform, transform_lib.Transform]:
    """Returns a map in mm over all of the fixed scan, and the same in unit coordinates.

    Args:
      unit: between the network grids, its fields with outside="edge".
      grids: the network grids of the fixed and of the moving scan.
      scan: the fixed scan's grid; a network's box may be smaller.
    """
    shape, padding = grids[0].shape, grids[0].padding(scan)
    whole = transform_lib.padded(unit, shape, padding)
    world = transform_lib.in_world(whole, *(grid.padded(padding) for grid in grids))
    if padding.any():
        leave = transform_lib.padded_to_unit(shape, padding)
        whole = whole.seen_from(np.linalg.inv(leave))
    return world, whole


def _each(
    regions: Regions,
    function: Callable[[Volume], Volume],
    names: Iterable[str] | None = None,
) -> Regions:
    """Returns the regions with a function applied to some of them, or to all."""
    given = {n: getattr(regions, n) for n in names or vars(regions)}
    changed = {n: function(v) for n, v in given.items() if v is not None}
    return dataclasses.replace(regions, **changed)


def summary(result: Registration) -> dict[str, str]:
    """Returns the numbers of a registration as text, name to value with its unit."""
    name = result.similarity
    rows = {
        f"{name} loss before": f"{result.similarity_before:.4f} (smaller is better)",
        f"{name} loss pre-aligned": f"{result.similarity_prealigned:.4f}"
        if result.similarity_prealigned is not None
        else "",
        "pre-aligned from": result.prealigned_from,
        f"{name} loss after": f"{result.similarity_after:.4f}",
        "folded voxels": f"{result.folding_percent:.4f} %",
        "SDlogJ": f"{result.sdlogj:.4f}",
    }
    rows = {name: text for name, text in rows.items() if text}
    if result.started_from:
        rows = {"started from": result.started_from, **rows}
    if result.told:
        rows = {"told": result.told, **rows}
    if result.domains:
        nearest = sorted(result.domains.items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{name} {100 * share:.0f} %" for name, share in nearest)
        rows["closest domains"] = text
    if result.inverse_residual_mm is not None:
        mean, largest = result.inverse_residual_mm
        rows["inverse residual"] = f"{mean:.4f} mm mean, {largest:.3f} mm at most"
    for phase, taken in result.seconds.items():
        rows[f"seconds to {phase}"] = f"{taken:.1f}"
    return rows


def check_volumes(moving: Volume, fixed: Volume, regions: Regions) -> None:
    """Checks that masks and label maps lie on their scans' grids, before any work.

    Raises:
      UserError: one lies elsewhere, or the segmentations share no label.
    """
    for scan, mask, segmentation in (
        (fixed, regions.fixed_mask, regions.fixed_segmentation),
        (moving, regions.moving_mask, regions.moving_segmentation),
    ):
        if mask is not None:
            preprocess.check_same_grid(mask, scan, what="mask")
        if segmentation is not None:
            preprocess.check_same_grid(segmentation, scan, what="segmentation")
    if regions.fixed_segmentation and regions.moving_segmentation:
        _shared_labels(
            regions, regions.moving_segmentation.array, regions.fixed_segmentation.array
        )


def _shared_labels(regions: Regions, moving, fixed) -> tuple[int, ...]:
    try:
        return overlap.shared_labels(moving, fixed)
    except UserError as error:
        names = [
            v.source
            for v in (regions.moving_segmentation, regions.fixed_segmentation)
            if v is not None
        ]
        raise UserError(f"{' and '.join(names)}: {error}") from error


def oriented_like(volume: Volume, reference: Grid) -> Volume:
    """Returns the volume with array axes in the order and direction of a grid's.

    Voxels are only permuted and flipped, none moves in world space. A network sees
    arrays alone: two scans stored in different orders would look rotated or mirrored
    to it (the original feeds them as they are stored).
    """
    turned = preprocess.oriented(
        volume, orientations.io_orientation(reference.affine_mm)
    )
    return dataclasses.replace(turned, array=np.ascontiguousarray(turned.array))


def _rules(
    options: Options,
) -> tuple[preprocess.Preprocessing, preprocess.Preprocessing]:
    """Returns the intensity rules of the moving and of the fixed scan."""
    moving, fixed = (
        preprocess.Preprocessing(
            modality=preprocess.kind(modality),
            ct_window=options.ct_window or (-1000.0, 1000.0),
            quantile_range=options.quantile_range,
            foreground=bool(options.foreground),
        )
        for modality in (options.moving_modality, options.fixed_modality)
    )
    return moving, fixed


def make_pair(
    moving: Volume,
    fixed: Volume,
    options: Options,
    regions: Regions,
    carried: preprocess.Carried | None = None,
) -> Pair:
    """Returns both scans on the network grid, with what the objective needs of them.

    The volumes have their axes in the network's order already, see
    `preprocess.Placement.turned`. With `carried`, the moving scan is read over the
    fixed scan's network grid.

    Raises:
      UserError: see `preprocess.network_pair`; or the segmentations share no label.
    """
    placement = options.placement or preprocess.AS_GRADICON
    rules = _rules(options)
    pair = preprocess.network_pair(
        moving,
        fixed,
        options.grid_shape,
        moving_rule=rules[0],
        fixed_rule=rules[1],
        moving_mask=regions.moving_mask,
        fixed_mask=regions.fixed_mask,
        mask_inputs=options.input_masking,
        mask_loss=options.loss_function_masking,
        placement=placement,
        moving_placement=carried,
    )
    segmentations = (regions.moving_segmentation, regions.fixed_segmentation)
    if options.dice_loss_weight == 0 or None in segmentations:
        return pair
    labels = [
        preprocess.network_labels(volume, options.grid_shape, placement=where)
        for volume, where in zip(
            segmentations, (carried or placement, placement), strict=True
        )
        if volume is not None
    ]
    # On the network grid, where a small structure may have vanished.
    classes = _shared_labels(regions, *labels)
    onehots = [overlap.one_hot(jnp.asarray(array), classes) for array in labels]
    return dataclasses.replace(
        pair,
        moving_onehot=onehots[0],
        fixed_onehot=onehots[1],
        valid=jnp.asarray(overlap.valid_classes(*onehots)),
    )


def _objective(options: Options) -> Objective:
    return Objective(
        similarity=options.io_sim,
        dice_weight=options.dice_loss_weight,
        loss_masking=options.loss_function_masking,
        intensity_conservation=options.intensity_conservation_loss,
        original_conservation_offset=False,
    )


def _optimised(
    pair: Pair, model: zoo.LoadedModel | None, options: Options, *given: Any
) -> tuple[optimize.Optimized, Options]:
    """Returns `_optimise`'s result, and the options with the similarity in use."""
    found = _optimise(pair, model, options, *given)
    similar = found.similarity or options.io_sim
    return found, dataclasses.replace(options, io_sim=similar)


def _optimise(
    pair: Pair,
    model: zoo.LoadedModel | None,
    options: Options,
    scans: _Scans,
    progress: Progress | None,
    sam: TrainedSam | None,
) -> optimize.Optimized:
    """Returns the unit transforms of the chosen way to find them."""
    predicted = refine.UNTOUCHED
    if model is None and options.io_target != "displacement":
        options, predicted = _placed(options, scans)
    if model is not None and (
        options.io_iterations is None or options.io_target in _REFINING
    ):
        predicted = optimize.predict(model.model, model.variables, pair)
    if options.io_iterations is None:
        return predicted
    common: dict[str, Any] = {
        "steps": options.io_iterations,
        "progress": progress,
    }
    if options.io_lr is not None:
        common["learning_rate"] = options.io_lr
    if options.io_target in ("map", "displacement"):  # where nothing else is seen
        pair = _as_compared(pair)
    if options.io_target == "map":
        return refine.optimize_map(pair, predicted, loss=options.io_sim, **common)
    if options.io_target == "features":
        extract = _extractor(_sam_for(model, sam), options)
        if extract is refine.mind_features:
            pair = _as_compared(pair)
        return refine.optimize_features(pair, predicted, extract, **common)
    common["key"] = jax.random.key(options.seed)
    if options.io_target == "displacement":
        return _find_displacement(pair, options, scans, common)
    assert model is not None
    return optimize.optimize_network(
        model.model, model.variables, pair, _objective(options), **common
    )


def _placed(options: Options, scans: _Scans) -> tuple[Options, optimize.Optimized]:
    """Returns the options with a similarity, and where the scans are without a network.

    That is where a pre-alignment has placed them, else the start that fits best.
    """
    shown = _as_shown(scans, options)
    found, matrix = refine.UNTOUCHED, scans.placed
    if options.prealign == "none":
        starts = _starts(scans, *shown)
        name = affine_search.best_of(affine_search.compare(*shown, starts))
        matrix = starts[name]
        found = dataclasses.replace(
            optimize.by_affine(_unit_matrix(matrix, *scans.grids)), start=name
        )
    similar = _by_images(options, shown, matrix)
    found = dataclasses.replace(found, similarity=similar)
    return dataclasses.replace(options, io_sim=similar), found


def _find_displacement(
    pair: Pair, options: Options, scans: _Scans, common: dict[str, Any]
) -> optimize.Optimized:
    """Returns an affine map and a displacement between the scans' network grids.

    Affine maps are found from several starts, by each similarity that may suit the
    pair; the displacement follows from the map that fits best. All are found on the
    parts of the scans that can meet: where one shows much more than the other, its
    whole extent on the network grid would leave few voxels to what both show.
    """
    steps, progress = common["steps"], common.pop("progress")
    shown = _as_shown(scans, options)
    if scans.start is None:
        starts = _starts(scans, *shown)
    else:
        starts = {"pre-alignment": scans.placed}
    maps, came = dict(starts), {name: name for name in starts}
    fits = affine_search.compare(*shown, starts)
    tried = _possible(options)
    first = starts[affine_search.best_of(fits)]
    if len(tried) > 1 and _by_images(options, shown, first) == tried[0]:
        tried = tried[:1]
    levels = len(optimize.DisplacementConfig().factors)
    total = steps * (2 * len(starts) * len(tried) + levels)
    report = progress and optimize.Report(progress, total)
    histories = []
    for name, similar in itertools.product(starts, tried):
        by = dataclasses.replace(options, io_sim=similar)
        part, objective, grids = _parts_that_meet(pair, by, scans, starts[name])
        matrix, history = optimize.find_affine(
            part,
            objective,
            _unit_matrix(starts[name], *grids),
            steps=2 * steps,
            key=common["key"],
            extent_mm=_extent_mm(grids[0]),
            report=report,
        )
        report = report and report.after(2 * steps)
        histories.append(history)
        world = grids[1].unit_to_mm @ matrix @ np.linalg.inv(grids[0].unit_to_mm)
        ways = transform_lib.Affine(world), transform_lib.Affine(first)
        if affine_search.plausible(world) and affine_search.no_worse_in_common(
            *shown, *ways
        ):
            maps[f"{name} by {similar}"] = world
            came[f"{name} by {similar}"] = name
    found = {name: maps[name] for name in maps if name not in starts}
    fits = {**fits, **affine_search.compare(*shown, found)}
    best = affine_search.best_of(fits)
    _warn_of_rivals(scans, maps, fits, best)
    similar = _by_images(options, shown, maps[best])
    by = dataclasses.replace(options, io_sim=similar)
    part, objective, (here, there) = _parts_that_meet(pair, by, scans, maps[best])
    fixed, moving = scans.grids
    result = optimize.optimize_displacement(
        part,
        objective,
        start=_unit_matrix(maps[best], here, there),
        found_affine=True,
        extent_mm=_extent_mm(here),
        report=report,
        **common,
    )
    result = dataclasses.replace(
        result,
        forward=_between(result.forward, (fixed, moving), (here, there)),
        backward=_between(result.backward, (moving, fixed), (there, here)),
        history=optimize.chained([*histories, result.history]),
        start=came[best],
        similarity=similar,
    )
    return _not_worse(result, starts[came[best]], scans, shown, options)


def _possible(options: Options) -> tuple[str, ...]:
    """Returns the similarities that may suit a pair without a network."""
    if options.io_sim != "auto":
        return (options.io_sim,)
    modalities = options.fixed_modality, options.moving_modality
    if not preprocess.same_contrast(*modalities):
        return ("nmi",)
    contrasts = {preprocess.CONTRASTS[preprocess.known(name)] for name in modalities}
    return ("lncc", "nmi") if "mri" in contrasts else ("lncc",)


def _by_images(
    options: Options,
    shown: tuple[affine_search.Shown, affine_search.Shown],
    matrix: np.ndarray,
) -> str:
    """Returns the similarity for two scans that are roughly aligned by a 4x4 in mm.

    Where the modalities do not say it: correlation's, if what is bright in one scan is
    bright in the other.
    """
    possible = _possible(options)
    if len(possible) == 1:
        return possible[0]
    alike = affine_search.agreement(*shown, matrix) > _ALIKE
    return "lncc" if alike else "nmi"


def _extent_mm(grid: Grid) -> list[float]:
    return (unit_scale(grid.shape) * grid.spacing_mm).tolist()


def _starts(
    scans: _Scans, here: affine_search.Shown, there: affine_search.Shown
) -> dict[str, np.ndarray]:
    """Returns first guesses of the affine map, 4x4 from fixed to moving mm, by name.

    The headers come first. The extents are stretched onto each other where both scans
    may show the same thing in them.
    """
    grids = scans.fixed.grid, scans.moving.grid
    masses = [s.array if s.mask is None else s.array * s.mask for s in (here, there)]
    starts = {
        "headers": np.eye(4),
        "centres of mass": affine.to_mm(
            affine.centres_of_mass(masses[0], masses[1], *grids), *grids
        ),
        "stretched extents": affine_search.stretched(*grids),
    }
    stretch = np.linalg.svd(starts["stretched extents"][:3, :3], compute_uv=False)
    if max(stretch.max(), 1 / stretch.min()) > _LARGEST_STRETCH:
        del starts["stretched extents"]
    found: dict[str, np.ndarray] = {}
    for name, start in starts.items():
        apart = [
            affine_search.apart(grids[0], start, other) for other in found.values()
        ]
        if affine_search.plausible(start) and min(apart, default=1.0) > _SAME_PLACE:
            found[name] = start
    return found


def _as_shown(
    scans: _Scans, options: Options
) -> tuple[affine_search.Shown, affine_search.Shown]:
    """Returns fixed and moving as their likeness is measured."""
    rules = _rules(options)
    masked = options.input_masking or options.loss_function_masking
    masks = scans.regions.moving_mask, scans.regions.fixed_mask
    moving, fixed = (
        prealignment.shown(prealignment.Scan(volume, rule, mask if masked else None))
        for volume, rule, mask in zip(
            (scans.moving, scans.fixed), rules, masks, strict=True
        )
    )
    return fixed, moving


def _parts_that_meet(
    pair: Pair, options: Options, scans: _Scans, start: np.ndarray
) -> tuple[Pair, Objective, tuple[Grid, Grid]]:
    """Returns the pair of the parts of both scans that can meet, and their grids.

    Between them the objective. Beyond scans that show the same part of the body lie
    zeros, so that their edges hold on to each other; where either shows more, what it
    shows goes on beyond the other, and so do the outer voxels.

    Args:
      pair: of the whole scans, which are taken as they are where both meet all over.
      options: how to register.
      scans: both, on their whole grids.
      start: 4x4, fixed to moving mm.
    """
    objective = _objective(options)
    placement = options.placement or preprocess.AS_GRADICON
    volumes = {"fixed": scans.fixed, "moving": scans.moving}
    fixed, moving = scans.fixed.grid, scans.moving.grid
    parts = {
        "fixed": preprocess.part_near(fixed, moving, np.linalg.inv(start)),
        "moving": preprocess.part_near(moving, fixed, start),
    }
    cut = {name: preprocess.cut(volumes[name], part) for name, part in parts.items()}
    same = all(cut[name].grid.shape == volumes[name].grid.shape for name in cut)
    bent = scans.start is not None and scans.start.bend is not None
    if bent or placement.resize == "pad_crop":
        return pair, objective, scans.grids
    met = (
        preprocess.part_near(fixed, moving, np.linalg.inv(start), margin=0.0),
        preprocess.part_near(moving, fixed, start, margin=0.0),
    )
    sizes = [tuple(s.stop - s.start for s in part) for part in met]
    if sizes != [fixed.shape, moving.shape]:
        objective = dataclasses.replace(objective, outside="edge")
    whole = pair, objective, scans.grids
    if same:
        return whole
    regions = scans.regions
    for name, part in parts.items():
        names = (f"{name}_mask", f"{name}_segmentation")
        regions = _each(regions, functools.partial(preprocess.cut, part=part), names)
    try:
        found = make_pair(cut["moving"], cut["fixed"], options, regions)
    except UserError:  # nothing to see there, or no label
        return whole
    here, there = (placement.grid(cut[name].grid, options.grid_shape) for name in cut)
    return _as_compared(found), objective, (here, there)


def _warn_of_rivals(
    scans: _Scans,
    maps: Mapping[str, np.ndarray],
    fits: Mapping[str, affine_search.Fit],
    best: str,
) -> None:
    """Warns where the scans fit nearly as well elsewhere."""
    rivals = affine_search.rivals(scans.fixed.grid, maps, fits, best)
    if not rivals:
        return
    warnings.warn(
        f"the place of {scans.fixed.source} in {scans.moving.source} is not certain: "
        f"affine maps from {best} and from {', '.join(rivals)} differ and fit nearly "
        "alike; look at the result, give masks with --fixed-mask, --moving-mask and "
        "--loss-function-masking, or crop the larger scan",
        stacklevel=3,
    )


@jax.jit
def _led(transform: transform_lib.Transform, places: jax.Array) -> jax.Array:
    return jnp.asarray(transform.map_points(places))


def _not_worse(
    found: optimize.Optimized,
    start: np.ndarray,
    scans: _Scans,
    shown: tuple[affine_search.Shown, affine_search.Shown],
    options: Options,
) -> optimize.Optimized:
    """Returns what was found, or the start where that fits better; warns of it.

    Args:
      found: between the scans' network grids.
      start: 4x4, fixed to moving mm.
      scans: both.
      shown: both as they are compared.
      options: how to register.
    """
    if options.dice_loss_weight > 0 or options.intensity_conservation_loss:
        return found  # which intensities as they are do not judge
    if scans.start is not None and scans.start.bend is not None:
        return found  # between scans that are bent already
    fixed, moving = scans.grids

    def led(places: np.ndarray) -> np.ndarray:
        enter = transform_lib.Affine(np.linalg.inv(fixed.unit_to_mm))
        unit = jnp.asarray(enter(places), jnp.float32)
        ends = np.asarray(_led(found.forward, unit[None])[0], np.float64)
        return np.asarray(transform_lib.Affine(moving.unit_to_mm)(ends))

    ways = {"start": transform_lib.Affine(start), "found": led}
    compared = affine_search.compare(*shown, ways)
    fits = {name: fit.globally for name, fit in compared.items()}
    common = affine_search.no_worse_in_common(*shown, led, ways["start"])
    if common and affine_search.as_good(fits["found"], fits["start"]):
        return found
    where = "" if common else " where both results place them on each other"
    stay = "stay" if found.start.endswith("s") else "stays"
    warnings.warn(
        f"the optimisation made the scans less alike{where} (unlikeness "
        f"{fits['found']:.4f}, by the {found.start} {fits['start']:.4f}), so the "
        f"{found.start} {stay}; try another similarity (--io-sim), more steps or a "
        "finer grid",
        stacklevel=3,
    )
    kept = optimize.by_affine(_unit_matrix(start, fixed, moving))
    return dataclasses.replace(found, forward=kept.forward, backward=kept.backward)


def _between(
    unit: transform_lib.Transform,
    whole: tuple[Grid, Grid],
    parts: tuple[Grid, Grid],
) -> transform_lib.Transform:
    """Returns a map between the unit cubes of two parts as one of the wholes."""
    if all(a is b for a, b in zip(whole, parts, strict=True)):
        return unit
    enter = np.linalg.inv(parts[0].unit_to_mm) @ whole[0].unit_to_mm
    leave = np.linalg.inv(whole[1].unit_to_mm) @ parts[1].unit_to_mm
    first, last = (transform_lib.Affine(jnp.asarray(m, "f4")) for m in (enter, leave))
    return transform_lib.Transform((first, *unit.steps, last))


def _extractor(network: TrainedSam | None, options: Options) -> refine.Extract:
    """Returns SAM's features for two CT scans on a grid like its own, or descriptors.

    A SAM network knows voxels of one size in one orientation, and another placement
    would show it something else.
    """
    if network is None or not _both_ct(options):
        return refine.mind_features
    own = preprocess.Placement("pad_crop", "spl", network.spacing_mm)
    if options.placement != own:
        warnings.warn(
            "--io-target features takes MIND's descriptors in place of SAM's: the "
            f"network grid has not SAM's voxels of {own.spacing_mm:g} mm towards "
            "superior, posterior and left, as a UniReg's has",
            stacklevel=2,
        )
        return refine.mind_features
    window = options.ct_window or (-1000.0, 1000.0)
    return lambda image: refine.sam_features(network, image, window)


def _unit_matrix(world: np.ndarray, fixed: Grid, moving: Grid) -> np.ndarray:
    """Returns a 4x4 world map (RAS+ mm) between the unit cubes of two grids."""
    return np.linalg.inv(moving.unit_to_mm) @ world @ fixed.unit_to_mm


def _score(
    pair: Pair, unit: transform_lib.Transform, options: Options
) -> tuple[float, np.ndarray]:
    """Returns the similarity loss and the warped image, D H W."""
    pair = _as_compared(pair)
    mask = pair.fixed_mask if options.loss_function_masking else None
    points = _mapped(unit, options.grid_shape)
    # Compiled in one: operations on their own would be compiled anew for each pair.
    loss, warped = _compared(pair.moving, pair.fixed, mask, points, name=options.io_sim)
    return float(loss), np.asarray(warped[0, ..., 0])


@functools.partial(jax.jit, static_argnames="shape")
def _mapped(unit: transform_lib.Transform, shape: Shape) -> jax.Array:
    return jnp.asarray(unit.map_points(sampling.identity(shape)))


@functools.partial(jax.jit, static_argnames="name")
def _compared(moving, fixed, mask, points, *, name: str):
    warped = fields.warp(moving, points, outside="zeros")
    return similarity.SIMILARITIES[name](warped, fixed, mask=mask), warped


def _warn_of_folds(percent: float) -> None:
    if percent > 0:
        warnings.warn(
            f"the transform folds: {percent:.2g} % of the fixed scan's voxels have a "
            "negative Jacobian determinant"
            + (
                "; the result is doubtful there"
                if percent < _MUCH_FOLDED
                else ", which no anatomy does; do not use it without looking at it"
            ),
            stacklevel=3,
        )


class _Clock:
    """Adds the wall time of a block to a dictionary."""

    def __init__(self, seconds: dict[str, float], phase: str):
        self._seconds, self._phase = seconds, phase

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._seconds[self._phase] = time.perf_counter() - self._start


def _check_finite(forward: transform_lib.Transform, options: Options) -> None:
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(forward)):
        rate = "" if options.io_lr is None else f" {options.io_lr:g}"
        raise UserError(
            f"the optimisation diverged to NaN; pass an --io-lr below the present one"
            f"{rate}, or check the scans and the weights"
        )


@jax.jit
def _gap(forward, field):
    grid = sampling.identity(field.shape[1:4])
    return forward.map_points(grid + field) - grid


@jax.jit
def _solve_inverse(forward, start):
    return fields.invert(forward.map_points, start.shape[1:4], initial=start)[0]


def _inverse(forward, backward, grids, scan: Grid, over: Grid | None):
    """Returns the inverse in mm.

    The fixed point iteration starts from the backward prediction, which is nearly the
    inverse already.

    Args:
      forward: in unit coordinates of the network grids, also beyond them.
      backward: a first guess of its inverse.
      grids: the network grids of the fixed and of the moving scan.
      scan: the moving scan's grid, which the inverse covers besides.
      over: the fixed scan's grid in the moving scan's space, if the network grid lies
        over that one: where it is larger, it is covered, and what the map makes of it.
    """
    shape, padding = grids[1].shape, grids[1].padding(scan)
    if over is not None:
        lacking = grids[1].padding(over)
        if lacking.any():
            moved = np.abs(_gap(forward, jnp.zeros((1, *shape, 3)))).max((0, 1, 2, 3))
            farthest = np.ceil(moved * unit_scale(shape)).astype(int)
            lacking = lacking + farthest[:, None]
        # A grid with the scan's extent keeps its size, and one program serves all.
        padding = np.minimum(padding, lacking)
    if padding.any():
        forward = forward.seen_from(transform_lib.padded_to_unit(shape, padding))
    fixed, moving = (grid.padded(padding) for grid in grids)
    (start,) = transform_lib.padded(backward, shape, padding).steps
    assert isinstance(start, transform_lib.Displacement)
    field = _solve_inverse(forward, start.field)
    unit = transform_lib.Transform((transform_lib.Displacement(field),))
    return transform_lib.in_world(unit, moving, fixed)
