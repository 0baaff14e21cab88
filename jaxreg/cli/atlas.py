"""The verb ``jaxreg atlas``: the mean of a list of scans; see `registration.atlas`."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

from jaxreg.cli.options import (
    OUT,
    PANELS,
    SCANS,
    app,
    named_model,
    print_written,
    say_chosen,
)
from jaxreg.cli.parser import verb
from jaxreg.cli.progress import Bar, interrupted
from jaxreg.errors import UserError
from jaxreg.registration.options import AUTO, MODALITIES, Options

if TYPE_CHECKING:
    from jaxreg.space.grid import Volume
    from jaxreg.space.transform import Transform

Path = pathlib.Path
_NOT_HERE = (
    "fixed_modality", "moving_modality", "input_masking", "loss_function_masking",
    "dice_loss_weight",
)  # fmt: skip
_REGISTRATION = [name for name in PANELS if name not in _NOT_HERE]


@dataclasses.dataclass(frozen=True)
class Scans:
    """The scans to be averaged.

    Attributes:
      scans: Two or more scans: FILE,FILE,... The first gives the grid of the mean, and
        is what the others are registered onto in the first round.
      modality: Kind of the scans. auto: CT if the first one's values look like
        Hounsfield units, else MR.
      rounds: How often all are registered onto the mean so far.
      model: As in register.
    """

    PANEL: ClassVar = SCANS

    scans: tuple[Path, ...]
    modality: Annotated[str, (AUTO, *MODALITIES)] = AUTO
    rounds: int = 4
    model: Annotated[str | None, str] = None


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where the results go.

    Attributes:
      out_dir: Folder for mean.nii.gz, NUMBER_NAME_transform.h5 of each scan (points of
        the mean to points of the scan) and the rounds; made if absent. Of an atlas that
        was begun there, what is done is kept.
    """

    PANEL: ClassVar = OUT

    out_dir: Path


@verb(app, "atlas", only=_REGISTRATION, panels=PANELS)
def atlas_verb(scans: Scans, folder: Folder, options: Options) -> None:
    """Build the mean of several scans, without bias to any of them.

    Each round registers all scans onto the mean so far, as register does with the same
    options, averages the warped scans, and moves the mean to where their transforms
    lead on average. Intensities of MR are scaled to [0, 1]. An interrupted command goes
    on where it was when it is given again.
    """
    from jaxreg.data.modality import settled
    from jaxreg.io import files, volumes
    from jaxreg.registration import options as options_lib

    if len(scans.scans) < 2:
        raise UserError("--scans names one scan; give two or more, with commas")
    if scans.rounds < 1:
        raise UserError(f"--rounds is {scans.rounds}, expected a positive number")
    for path in scans.scans:
        volumes.check_source(path, "--scans")
    first = volumes.read_volume(scans.scans[0])
    grid = first.grid
    scans = dataclasses.replace(scans, modality=settled(scans.modality, first))
    options = dataclasses.replace(
        options,
        fixed_modality=scans.modality,
        moving_modality=scans.modality,
        inverse=False,
    )
    options_lib.check_options(options)
    files.make_folder(folder.out_dir, "--out-dir")
    _check_same(folder.out_dir, scans, options)
    build = _Build(scans, options, folder.out_dir)
    with (
        interrupted("give the same command again to go on; what is done is kept"),
        Bar("atlas", waiting="compiling and the first scan") as bar,
    ):
        for number in range(1, scans.rounds + 1):
            grid = build.round(number, grid, bar)
        written = build.results()
    print_written(written)


def _check_same(out_dir: Path, scans: Scans, options: Options) -> None:
    """Says what is built in the folder, or checks that it is the same.

    Raises:
      UserError: something else was begun there.
    """
    from jaxreg.io import files

    wanted = {
        "scans": [str(path.absolute()) for path in scans.scans],
        "model": scans.model,
        # The number of rounds may grow.
        **{
            name: getattr(options, name)
            for name in ("fixed_modality", *_REGISTRATION)
            if name != "sam_weights"
        },
    }
    wanted = json.loads(json.dumps(wanted, default=str))
    path = out_dir / "atlas.json"
    if not path.exists():
        if any(out_dir.iterdir()):
            raise UserError(
                f"--out-dir {out_dir} has other files in it; name a new folder"
            )
        with files.atomic_path(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        begun = {}
    changed = [name for name in wanted if begun.get(name) != wanted[name]]
    if changed:
        raise UserError(
            f"--out-dir {out_dir} holds an atlas with another `{changed[0]}` "
            f"({begun.get(changed[0])}); give the same options, or name a new folder"
        )


class _Build:
    """The rounds of an atlas, whose files say how far it is."""

    def __init__(self, scans: Scans, options: Options, out_dir: Path):
        from jaxreg.registration import preparation

        self._scans, self._options, self._out_dir = scans, options, out_dir
        self._rule, _ = preparation.intensity_rules(options)
        self._model, why = named_model(scans.model, options)
        say_chosen(why)

    def _name(self, number: int) -> str:
        path = self._scans.scans[number]
        return f"{number + 1:03d}_{path.name.partition('.')[0]}_transform.h5"

    def _read(self, number: int) -> "Volume":
        from jaxreg.io import volumes
        from jaxreg.registration import atlas

        return atlas.scaled(volumes.read_volume(self._scans.scans[number]), self._rule)

    def round(self, number: int, grid, bar: Bar):
        """Makes a round's mean, or passes over one that is there; returns its grid."""
        from jaxreg.io import transforms, volumes
        from jaxreg.registration import atlas

        place = self._out_dir / f"round_{number:02d}"
        mean = place / "mean.nii.gz"
        if mean.exists():
            return volumes.read_grid(mean)
        place.mkdir(exist_ok=True)
        every = range(len(self._scans.scans))
        before = self._read(0)
        if number > 1:
            earlier = self._out_dir / f"round_{number - 1:02d}" / "mean.nii.gz"
            before = volumes.read_volume(earlier)
        paths = [place / self._name(each) for each in every]
        for each in every:
            if not paths[each].exists():
                self._register(each, before, paths[each])
            total = self._scans.rounds * len(every)
            done = (number - 1) * len(every) + each + 1
            bar.show(done, total, f"round {number}, {self._scans.scans[each].name}")
        maps = (transforms.read_transform(path) for path in paths)
        centre = atlas.centre_of(maps, before.grid)
        bar.report(
            f"round {number}: the mean moves by {centre.shift_mm:.3f} mm and bends by "
            f"{centre.bend_mm:.3f} mm (root mean square)"
        )
        leads = self._leads(paths, centre.back)
        transforms.write_transform(place / "back.h5", centre.back)
        found = atlas.mean_of(
            [lambda each=each: self._read(each) for each in every],
            leads, centre.grid, self._scans.modality,
        )  # fmt: skip
        # Last: its file says that the round is done.
        volumes.write_volume(mean, found)
        return centre.grid

    def _register(self, each: int, mean: "Volume", path: Path) -> None:
        from jaxreg.io import transforms
        from jaxreg.registration import pair

        found = pair.register(self._read(each), mean, self._model, self._options)
        transforms.write_transform(path, found.transform)

    def _leads(
        self, paths: list[Path], back: "Transform"
    ) -> "list[Callable[[], Transform]]":
        """Returns what reads the map of the new mean to each scan."""
        from jaxreg.io import transforms

        return [
            lambda path=path: back.then(transforms.read_transform(path))
            for path in paths
        ]

    def results(self) -> list[Path]:
        """Writes the last round's mean and transforms beside the rounds."""
        from jaxreg.io import transforms, volumes

        place = self._out_dir / f"round_{self._scans.rounds:02d}"
        back = transforms.read_transform(place / "back.h5")
        every = range(len(self._scans.scans))
        names = [self._name(each) for each in every]
        written = []
        for name, lead in zip(
            names, self._leads([place / n for n in names], back), strict=True
        ):
            transforms.write_transform(self._out_dir / name, lead())
            written.append(self._out_dir / name)
        mean = volumes.read_volume(place / "mean.nii.gz")
        volumes.write_volume(self._out_dir / "mean.nii.gz", mean)
        return [self._out_dir / "mean.nii.gz", *written]
