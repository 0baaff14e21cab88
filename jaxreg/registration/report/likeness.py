"""How alike two scans are before and after a registration."""

import dataclasses

import numpy as np

from jaxreg.registration.prealign import affine, measure
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space.grid import Volume
from jaxreg.space.transform import Transform


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How alike the scans are, by a loss: smaller is better.

    Attributes:
      name: of the loss.
      before: with the scans where their headers place them.
      after: with the moving scan warped.
      prealigned: between the two, or None.
    """

    name: str
    before: float
    after: float
    prealigned: float | None = None

    @property
    def rows(self) -> dict[str, str]:
        """Both values as text, name to value."""
        return {
            f"{self.name} before": f"{self.before:.4f} (smaller is better)",
            f"{self.name} after": f"{self.after:.4f}",
        }


def likeness_of(scans: ScanPair, transform: Transform) -> Likeness:
    """Returns the measure by which pre-alignments are judged, of any transform.

    It asks for no relation between the intensities of both scans, and counts what of
    the smaller one lies in the larger one; see `prealign.measure.Fit.globally`.

    Args:
      scans: both.
      transform: fixed mm to moving mm.
    """
    level = affine.judged(_shown(scans.fixed), _shown(scans.moving))

    def led(places: np.ndarray) -> np.ndarray:
        return np.asarray(transform.map_points(places[None].astype(np.float64)))[0]

    fits = affine.compare(level, {"before": lambda places: places, "after": led})
    return Likeness(
        "mutual information loss", fits["before"].globally, fits["after"].globally
    )


def _shown(volume: Volume) -> measure.Shown:
    return measure.Shown(affine.scaled(np.asarray(volume.array)), volume.grid)
