"""The orientation in which a run's networks see scans."""

import collections
import contextlib
import pathlib
from collections.abc import Iterable, Mapping

from jaxreg.data import network_grid, pair_source, synthetic
from jaxreg.errors import UserError
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.datasets import Sources
from jaxreg.io import volumes


def stored_orientations(several: Iterable[Sources]) -> dict[str, int]:
    """Returns how many scans of manifests are stored in each orientation.

    By their headers. What cannot be read is left to those who read scans.
    """
    images: set[pathlib.Path] = set()
    for sources in several:
        for source in (sources.train, sources.validation):
            if isinstance(source, pair_source.PairSource):
                images |= {record.image for record in source.records}
    found: collections.Counter[str] = collections.Counter()
    for image in sorted(images):
        with contextlib.suppress(UserError):
            found[network_grid.orientation_of(volumes.read_grid(image))] += 1
    return dict(found)


def seen_orientation(
    experiment: Experiment, stored: Mapping[str, int], start: str | None
) -> tuple[str | None, str]:
    """Returns the orientation in which a network sees scans, and a sentence on it.

    That which the settings name; else that of the weights to start from; else the one
    in which all scans are stored. Where they are stored in several, RAS: a network
    would be shown some pairs with one scan mirrored or rotated against the other.

    Args:
      experiment: what to train.
      stored: number of scans by orientation, of `stored_orientations`.
      start: that of the weights to start from.

    Returns:
      (orientation, sentence); None where the placement turns scans anyhow, and the
      sentence is empty where no scan is turned.
    """
    loading = experiment.loading
    if loading.axes == "spl":
        return None, ""
    if experiment.data.synthetic:
        return synthetic.ORIENTATION, ""
    wanted = loading.placement.orientation
    known = None if start in (None, network_grid.ANY_ORIENTATION) else start
    if wanted is not None:
        differs = known is not None and known != wanted
        return wanted, (
            f"the scans are turned to {wanted}, but those of train.start were {known}"
            if differs
            else ""
        )
    listed = ", ".join(f"{count} {name}" for name, count in sorted(stored.items()))
    if known is not None:
        turned = set(stored) - {known}
        why = f"the scans ({listed}) are turned to {known}, as those of train.start"
        return known, why if turned else ""
    if len(stored) > 1:
        return network_grid.CANONICAL, (
            f"the scans are stored in several orientations ({listed}) and are turned "
            f"to {network_grid.CANONICAL}; loading.orientation names another"
        )
    return next(iter(stored), None), ""
