"""The verb ``jaxreg report``: a page of any transform between two scans."""

import dataclasses
import pathlib
import shlex
from typing import Annotated, ClassVar

import typer

from jaxreg.cli.options import (
    OUT,
    SCANS,
    Fill,
    app,
    check_outputs,
    print_numbers,
    print_written,
    warn,
)
from jaxreg.cli.parser import option_name, verb
from jaxreg.errors import UserError
from jaxreg.registration.options import MODALITIES

Path = pathlib.Path
_SEGMENTATIONS = ("fixed_segmentation", "moving_segmentation")


@dataclasses.dataclass(frozen=True)
class Reported:
    """A transform, the scans that it joins, and their label maps.

    Attributes:
      transform: Transform, fixed to moving points: .h5 .hdf5 .tfm .txt .mat of ITK,
        ANTs or 3D Slicer, or a displacement field .nii.gz .nii .nrrd .nhdr .mha .mhd.
      fixed: Scan that stays.
      moving: Scan that the transform warps onto it.
      fixed_segmentation: Label map of the fixed scan, for outlines and Dice.
      moving_segmentation: Label map of the moving scan.
      moving_modality: Kind of the moving scan, for --fill auto. Default: CT if its
        values go down to -500, by its values what else it is.
    """

    PANEL: ClassVar = SCANS

    transform: Path
    fixed: Path
    moving: Path
    fixed_segmentation: Path | None = None
    moving_segmentation: Path | None = None
    moving_modality: Annotated[str | None, MODALITIES] = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is written.

    Attributes:
      report: Page with a viewer, pictures, numbers and warnings, self-contained: .html.
    """

    PANEL: ClassVar = OUT

    report: Path


@verb(app, "report", positional=("transform",))
def report_verb(
    context: typer.Context, given: Reported, written: Outputs, outside: Fill
) -> None:
    """Show what a transform does, whoever made it: a page to judge it by.

    Slices in three planes with ways to compare, Jacobian determinant, displacement,
    deformed grid and outlines of labels; similarity before and after, folds, volume
    change, overlap; and what to look at first, which is printed as warnings too.
    """
    inputs = dict(vars(given))
    inputs.pop("moving_modality")
    check_outputs({"--report": written.report}, list(inputs.values()))
    missing = [name for name in _SEGMENTATIONS if getattr(given, name) is None]
    if len(missing) == 1:
        raise UserError(
            "outlines and Dice need the label maps of both scans; pass "
            f"{option_name(missing[0])} too, or none"
        )

    from jaxreg.io import transforms, volumes
    from jaxreg.registration import report, scan_pair
    from jaxreg.registration.options import Regions

    for name, path in inputs.items():
        if path is not None and name != "transform":
            volumes.check_source(path, option_name(name))
    mapping = transforms.read_transform(given.transform)
    scans = scan_pair.read(
        given.moving,
        given.fixed,
        Regions(**{name: getattr(given, name) for name in _SEGMENTATIONS}),
        modality=given.moving_modality,
        fill=outside.fill,
    )
    likeness = report.likeness_of(scans, mapping)
    page = report.write_report(
        written.report,
        scans,
        mapping,
        report.Known(numbers=likeness.rows, likeness=likeness, provenance={
            "transform": str(given.transform), **report.provenance(scans),
        }),
        command=shlex.join(["jaxreg", *context.obj]),
    )  # fmt: skip
    for sentence in page.cautions:
        warn(sentence)
    print_numbers(page.numbers)
    print_written([written.report])
