"""The verb ``jaxreg labels``: an atlas' labels on a scan; see `label_fusion`."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from jaxreg.cli.options import (
    OUT,
    PANELS,
    SCANS,
    app,
    check_outputs,
    named_model,
    print_numbers,
    print_written,
    say_chosen,
)
from jaxreg.cli.parser import verb
from jaxreg.cli.progress import Bar, interrupted
from jaxreg.errors import UserError
from jaxreg.registration.options import Options

if TYPE_CHECKING:
    from jaxreg.registration.label_fusion import Carried
    from jaxreg.space.grid import Volume

Path = pathlib.Path
_MASKS = ("input_masking", "loss_function_masking", "dice_loss_weight")
_REGISTRATION = [name for name in PANELS if name not in _MASKS]


@dataclasses.dataclass(frozen=True)
class Atlases:
    """The scan, and the labelled scans whose labels it gets.

    Attributes:
      fixed: Scan that gets labels.
      moving: Labelled scans, atlas or subjects: FILE or FILE,FILE,...
      moving_segmentation: Their label maps, in the same order.
      transform: Their transforms, fixed to moving points, in the same order; formats as
        --transform of warp. Default: each scan is registered.
      model: As in register.
    """

    PANEL: ClassVar = SCANS

    fixed: Path
    moving: tuple[Path, ...]
    moving_segmentation: tuple[Path, ...]
    transform: tuple[Path, ...] | None = None
    model: Annotated[str | None, str] = None


@dataclasses.dataclass(frozen=True)
class Labelled:
    """What is written and compared.

    Attributes:
      segmentation_out: Label map on the fixed grid: .nii.gz .nii .nrrd .mha.
      truth: Label map of the fixed scan, with which Dice is computed.
    """

    PANEL: ClassVar = OUT

    segmentation_out: Path
    truth: Path | None = None


@verb(app, "labels", only=_REGISTRATION, panels=PANELS)
def labels_verb(atlases: Atlases, labelled: Labelled, options: Options) -> None:
    """Carry labels of an atlas, or of several subjects, to a scan.

    Each labelled scan is registered onto the fixed one, as register does with the same
    options, or brought there by --transform. One atlas' labels are interpolated
    linearly, label by label, and the largest is taken. Several atlases vote, each as
    much as it resembles the scan around a voxel (locally weighted voting).
    """
    out, truth = labelled.segmentation_out, labelled.truth
    given = atlases.transform or ()
    inputs = [
        atlases.fixed, truth, *atlases.moving, *atlases.moving_segmentation, *given,
    ]  # fmt: skip
    check_outputs({"--segmentation-out": out}, inputs)
    _check_counts(atlases)
    options = dataclasses.replace(options, inverse=False)

    from jaxreg import metrics
    from jaxreg.data import preprocess
    from jaxreg.io import volumes
    from jaxreg.registration import label_fusion
    from jaxreg.registration import options as options_lib

    options_lib.check_options(options)
    fixed = volumes.read_volume(atlases.fixed)
    known = None
    if truth is not None:
        known = volumes.read_volume(truth, kind="labels")
        preprocess.check_same_grid(known, fixed, what="truth")
    model = None
    if atlases.transform is None:
        model, why = named_model(atlases.model, options)
        say_chosen(why)
    with (
        interrupted("nothing was written"),
        Bar("labels", waiting="compiling and the first scan") as bar,
    ):
        carried = [
            _carried(atlases, number, fixed, model, options, bar)
            for number in range(len(atlases.moving))
        ]
        found = label_fusion.fuse(fixed.grid, carried)
    volumes.write_volume(out, found)
    if known is not None:
        scores = metrics.dice(found.array, known.array)
        rows = {f"Dice of label {k}": f"{value:.4f}" for k, value in scores.items()}
        rows["mean Dice"] = f"{metrics.mean_score(scores):.4f}"
        print_numbers(rows)
    print_written([out])


def _check_counts(atlases: Atlases) -> None:
    count = len(atlases.moving)
    if not count:
        raise UserError("--moving names no scan; give one, or several with commas")
    for name, paths in (
        ("--moving-segmentation", atlases.moving_segmentation),
        ("--transform", atlases.transform),
    ):
        if paths is not None and len(paths) != count:
            raise UserError(
                f"{name} names {len(paths)} files for {count} scans of --moving; give "
                "one for each, in the same order, with commas"
            )
    if atlases.transform is not None and atlases.model is not None:
        raise UserError(
            "--model registers the scans, which --transform brings to each other "
            "already; leave one of the two away"
        )


def _carried(
    atlases: Atlases,
    number: int,
    fixed: "Volume",
    model: Any,
    options: Options,
    bar: Bar,
) -> "Carried":
    """Reads an atlas, registers it and weighs it, if there are several."""
    from jaxreg.data import preprocess
    from jaxreg.io import transforms, volumes
    from jaxreg.registration import label_fusion, pair, preparation

    count, path = len(atlases.moving), atlases.moving[number]
    labels = volumes.read_volume(atlases.moving_segmentation[number], kind="labels")
    moving = volumes.read_volume(path)
    preprocess.check_same_grid(labels, moving, what="segmentation")
    if atlases.transform is not None:
        mapping = transforms.read_transform(atlases.transform[number])
    else:
        mapping = pair.register(moving, fixed, model, options).transform
    options = preparation.with_modalities(options, fixed, moving)
    weight = None
    if count > 1:
        rules = preparation.intensity_rules(options)
        weight = label_fusion.local_weight(fixed, moving, mapping, rules)
    bar.show(number + 1, count, path.name)
    return label_fusion.Carried(labels, mapping, weight)
