"""Pages of a list's pairs in a folder, and the page that lists them."""

import dataclasses
import pathlib
from collections.abc import Mapping

from jaxreg.data.pair_list import PairSpec
from jaxreg.io import files
from jaxreg.registration import result
from jaxreg.registration.options import Regions
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.weights import zoo


@dataclasses.dataclass(frozen=True)
class Pages:
    """The page of each pair, with a thumbnail beside it.

    Attributes:
      paths: of the pages by row; none where none are wanted.
      index: the page that lists them.
      command: the command line, to be shown.
      weights: what the pages say of the network.
    """

    paths: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    index: pathlib.Path | None = None
    command: str | None = None
    weights: str = ""

    def naming(self, model: zoo.LoadedModel | None) -> "Pages":
        """Returns the same pages, which name a network's weights."""
        if model is None or not self.paths:
            return self
        weights = f"{model.described}; CRC-32 {model.checksum}"
        return dataclasses.replace(self, weights=weights)

    def made(self, row: str) -> bool:
        """Whether the row's page exists, or is not wanted."""
        return row not in self.paths or self.paths[row].is_file()

    def claim(self, taken: dict[pathlib.Path, str]) -> None:
        """Claims the pages and thumbnails; their folder may be missing.

        Args:
          taken: see `files.claim`.

        Raises:
          UserError: one cannot be written, or is claimed already.
        """
        if self.index is not None:
            if self.index.parent.exists():
                files.check_writable(self.index, "`report_dir`: its list")
            else:
                files.check_to_be_made(self.index.parent, "`report_dir`")
            files.claim(self.index, "the list of `report_dir`", taken)
        for row, page in self.paths.items():
            for path in (page, page.with_suffix(".png")):
                files.claim(path, f"{row}: its report", taken)

    def write(
        self,
        row: str,
        pair: PairSpec,
        scans: ScanPair,
        found: result.RegistrationResult,
    ) -> None:
        """Writes the row's page and thumbnail, if they are wanted.

        Label maps of the row are drawn, whether or not they took part.

        Raises:
          UserError: a file cannot be read or written.
        """
        if row not in self.paths:
            return
        from jaxreg.registration import report  # drawing takes long to import

        named = {
            "fixed_segmentation": pair.fixed_label,
            "moving_segmentation": pair.moving_label,
        }
        if None not in named.values():
            regions = Regions(**named)  # pyright: ignore[reportArgumentType]
            scans = dataclasses.replace(scans, regions=regions)
        seen = dataclasses.replace(found, scans=scans, weights=self.weights)
        page = self.paths[row]
        report.write_report(
            page, scans, found.transform, seen.reported,
            command=self.command, thumbnail=report.thumbnail_of(page),
        )  # fmt: skip


NO_PAGES = Pages()
"""Where none are wanted."""
