"""The result of a registration: the transform, its numbers, pictures and files."""

import dataclasses
import functools
import html
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import files, transforms, volumes
from jaxreg.registration import scan_pair
from jaxreg.registration.prealign import measure
from jaxreg.space import transform as transform_lib
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume

if TYPE_CHECKING:
    from jaxreg.registration.report import Known, Page, Picture


@dataclasses.dataclass(frozen=True, repr=False)
class RegistrationResult:
    """The result of registering two scans.

    A notebook shows it as a picture with its numbers.

    Attributes:
      transform: fixed mm to moving mm (RAS+), what a resampler needs.
      inverse: moving mm to fixed mm, or None if not asked for.
      inverse_residual_mm: mean and maximum of ``|T(T_inverse(x)) - x|`` within the
        moving scan, of the two transforms above; see `warping.round_trip_mm`.
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
      conditioning: what the network is conditioned on: region, pairing and, where it
        takes one, the weight of smoothness; empty for other networks.
      prealigned_from: what the pre-alignment came from, `Prealignment.start`; empty
        without one.
      prealigned_fits: the pre-alignment's measures by the headers and after it, if any.
      started_from: what fitted best before a registration without a network:
        "headers", "centres of mass" or "stretched extents"; else empty.
      weights: name, source and licence of the network's; empty without one.
      doubts: what was warned about of the place and the map, a sentence each; folds are
        in `folding_percent`.
      chosen: the model, and why it is the one, where none was named; else empty.
      scans: the two scans, which are warped, drawn and written from; what was given as
        a volume or an image is referred to, not copied.
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
    conditioning: str = ""
    prealigned_from: str = ""
    prealigned_fits: tuple[measure.Fit, measure.Fit] | None = None
    started_from: str = ""
    weights: str = ""
    chosen: str = ""
    doubts: tuple[str, ...] = ()
    scans: scan_pair.ScanPair | None = None

    def __repr__(self) -> str:
        """One line: what was registered, and how well it fits."""
        return f"<RegistrationResult: {self._line}>"

    @property
    def _line(self) -> str:
        names = ""
        if self.scans is not None:
            scans = (self.scans.moving, self.scans.fixed)
            names = " to ".join(pathlib.PurePath(s.source).name for s in scans) + ", "
        return (
            f"{names}{self.similarity} loss {self.similarity_before:.4f} before, "
            f"{self.similarity_after:.4f} after, {self.folding_percent:.2g} % folded"
        )

    @functools.cached_property
    def warped(self) -> Volume:
        """The moving scan on the fixed scan's grid, in its own type; made when asked.

        What ``jaxreg register --warped-moving-out`` writes. A moving scan that was
        given as a path is read once more.

        Raises:
          UserError: it cannot be read any more.
        """
        return self._scans.warped(self.transform)

    @property
    def _scans(self) -> scan_pair.ScanPair:
        if self.scans is None:
            raise UserError(
                "this result has no scans to be warped, drawn or written; take one of "
                "jaxreg.register, or set its scans"
            )
        return self.scans

    def plot(self) -> "Picture":
        """Returns a figure: both scans and their overlay before and after, the folds.

        On the fixed scan's grid; a notebook shows it, `savefig` writes it. It needs no
        display and leaves pyplot's figures alone.
        """
        # Drawing takes long to import.
        from jaxreg.registration import report

        return report.registration_figure(self._scans, self.transform, title=self._line)

    def view(self, *, command: str | None = None) -> "Page":
        """Returns the report, whose viewer a notebook shows; `save` writes it.

        It goes into the notebook's file: up to 6 MB.

        Args:
          command: the command line, to be shown.
        """
        from jaxreg.registration import report

        return report.page_of(
            self._scans, self.transform, self.reported, command=command
        )

    def niivue(self) -> Any:
        """Returns both scans in NiiVue, for a notebook with the package ipyniivue.

        The warped scan lies over the fixed one; both go into the notebook whole.

        Raises:
          UserError: ipyniivue is not installed.
        """
        from jaxreg.registration.report import niivue

        return niivue.viewer(self._scans.fixed, self.warped)

    @property
    def reported(self) -> "Known":
        """What a report says besides what it measures."""
        from jaxreg.registration import report

        return report.Known(
            numbers=summary(self),
            likeness=report.Likeness(
                f"{self.similarity} loss",
                self.similarity_before,
                self.similarity_after,
                self.similarity_prealigned,
            ),
            history=self.history,
            provenance=report.provenance(self._scans, self.fixed_grid, self.weights),
            doubts=self.doubts,
        )

    def save(
        self,
        *,
        transform: files.PathLike | None = None,
        warped: files.PathLike | None = None,
        inverse: files.PathLike | None = None,
        report: files.PathLike | None = None,
        command: str | None = None,
    ) -> "RegistrationResult":
        """Writes the files that are asked for, as the command line does.

        All names are checked before the first file is written; each file appears whole
        or not at all.

        Args:
          transform: fixed to moving points: .h5, .hdf5, .tfm or .txt (ITK's composite)
            or .nii.gz or .nii (a displacement field).
          warped: the moving scan on the fixed grid: .nii.gz, .nii, .nrrd or .mha.
          inverse: moving to fixed points, as `transform`.
          report: a page with pictures and numbers: .html or .htm.
          command: the command line, to be shown in the report.

        Returns:
          The result with the inverse residual of the maps as the files hold them.

        Raises:
          UserError: nothing or a file of an unknown extension is asked for, a file
            cannot be written, or there is no inverse.
        """
        _check_outputs(
            self,
            {
                "transform": transform,
                "warped": warped,
                "inverse": inverse,
                "report": report,
            },
        )
        scans = self._scans if warped is None else self._scans.with_stored()
        forward, backward = scan_pair.write(
            scans, self.transform, self.inverse,
            transform_out=transform, inverse_out=inverse, warped_out=warped,
        )  # fmt: skip
        found = self
        if backward is not None:
            residual = warping.round_trip_mm(
                forward, backward, scans.fixed.grid, scans.moving.grid
            )
            found = dataclasses.replace(self, inverse_residual_mm=residual)
        if report is not None:
            from jaxreg.registration import report as report_lib

            report_lib.write_report(
                report, scans, self.transform, found.reported, command=command
            )
        return found

    def _repr_html_(self) -> str:
        """A small picture and the numbers, which notebooks show."""
        from jaxreg.registration import report

        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in summary(self).items()
        )
        seen = (self.fixed_image, self.warped_before, self.warped_after)
        picture = report.thumbnail(*(Volume(array, self.fixed_grid) for array in seen))
        image = report.inline_image(picture, self._line)
        return (
            f"<div><p>{html.escape(self._line)}</p>\n{image}\n"
            f"<table>{rows}</table></div>"
        )


def _check_outputs(
    result: RegistrationResult, paths: Mapping[str, files.PathLike | None]
) -> None:
    """Checks the names of files before any is written."""
    given = {name: pathlib.Path(p) for name, p in paths.items() if p is not None}
    if not given:
        raise UserError(f"nothing to save; give {', '.join(paths)} or several of them")
    if "inverse" in given and result.inverse is None:
        raise UserError(
            "there is no inverse to save; register with Options(inverse=True)"
        )
    taken: dict[pathlib.Path, str] = {}
    if result.scans is not None:
        for scan in (result.scans.fixed, result.scans.moving):
            taken[pathlib.Path(scan.source).resolve()] = "an input"
    for name, path in given.items():
        if name == "warped":
            volumes.check_volume_path(path, name)
        elif name == "report":
            files.check_writable(path, name, suffixes=(".html", ".htm"))
        else:
            transforms.check_transform_path(path, name)
        files.claim(path, name, taken)


def _pre_alignment(fits: tuple[measure.Fit, measure.Fit] | None) -> dict[str, str]:
    """The measures of a pre-alignment at its start and end, by name."""
    if fits is None:
        return {}
    rows = zip(("grey levels", "local correlation"), *fits, strict=True)
    return {
        f"pre-alignment by {name}": f"{before:.4f} by the headers, {after:.4f} after it"
        for name, before, after in rows
    }


def summary(result: RegistrationResult) -> dict[str, str]:
    """Returns the numbers of a registration as text, name to value with its unit."""
    name = result.similarity
    rows = {
        f"{name} loss before": f"{result.similarity_before:.4f} (smaller is better)",
        f"{name} loss pre-aligned": f"{result.similarity_prealigned:.4f}"
        if result.similarity_prealigned is not None
        else "",
        "pre-aligned from": result.prealigned_from,
        **_pre_alignment(result.prealigned_fits),
        f"{name} loss after": f"{result.similarity_after:.4f}",
        "folded voxels": f"{result.folding_percent:.4f} %",
        "SDlogJ": f"{result.sdlogj:.4f}",
    }
    rows = {name: text for name, text in rows.items() if text}
    if result.started_from:
        rows = {"started from": result.started_from, **rows}
    if result.chosen:
        rows = {"chosen": result.chosen, **rows}
    if result.conditioning:
        rows = {"told": result.conditioning, **rows}
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
