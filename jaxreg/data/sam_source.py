"""Pairs of crops of single scans, for self-supervised training.

A pair of `batches.Batches` is here two crops of one scan.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxreg.data import cache as cache_lib
from jaxreg.data import loading, network_grid, pair_source, preprocess, sam_views
from jaxreg.data.manifest.records import Record
from jaxreg.data.sam_views import ViewConfig
from jaxreg.io import volumes
from jaxreg.space.grid import Volume

_SPL = network_grid.ResamplingRule("pad_crop", "spl")


@dataclasses.dataclass(frozen=True)
class ViewSource:
    """Two crops of scan after scan: every scan once per epoch, in a new order.

    A batch never holds one scan twice; the rest of an epoch is dropped. All is a
    function of seed and index.

    Attributes:
      records: the scans.
      batch: scans of a global batch, at most as many as there are.
      rule: modality to intensity rule.
      scale: scaled intensities [0, 1] and the rule to the network's range.
      config: of the crops.
      seed: of order and crops.
      shuffled: false takes the scans in their order, each always in the same crops.
      cache: of decoded scans, or None.
    """

    records: Sequence[Record]
    batch: int
    rule: Callable[[str], preprocess.IntensityRule]
    scale: Callable[[np.ndarray, preprocess.IntensityRule], np.ndarray]
    config: ViewConfig
    seed: int = 0
    shuffled: bool = True
    cache: cache_lib.Cache | None = None

    def record(self, index: int) -> Record:
        """Returns the scan of element `index`."""
        if not self.shuffled:
            return self.records[index % len(self.records)]
        whole = len(self.records) // self.batch * self.batch
        epoch, place = divmod(index, whole)
        order = np.random.default_rng((self.seed, 0, epoch))
        return self.records[order.permutation(len(self.records))[place]]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns the crops of element `index`.

        Returns:
          moving and fixed, D H W 1, the two images; moving_places and fixed_places,
          D H W 3 in mm; moving_valid and fixed_valid, D H W 1.

        Raises:
          UserError: the scan cannot be read or is constant; names it.
        """
        record = self.record(index)
        rule = self.rule(record.modality)
        volume = self._scan(record, rule)
        repeated = index if self.shuffled else index % len(self.records)
        found = sam_views.two_crops(
            self.scale(volume.array, rule),
            volume.grid.spacing_mm,
            np.random.default_rng((self.seed, 1, repeated)),
            self.config,
        )
        return {
            f"{side}{suffix}": array[i]
            for i, side in enumerate(("moving", "fixed"))
            for suffix, array in (
                ("", found.images),
                ("_places", found.places_mm),
                ("_valid", found.valid),
            )
        }

    def named(self, index: int) -> str:
        """Returns "image FILE (dataset D)" for an element."""
        record = self.record(index)
        return f"image {record.image} (dataset {record.dataset})"

    def _scan(self, record: Record, rule: preprocess.IntensityRule) -> Volume:
        """Returns the scan, [0, 1], reoriented to superior, posterior, left."""
        path = pathlib.Path(record.image)
        attached = path.suffix.lower() not in cache_lib.DETACHED
        if self.cache is None or not attached:
            return self._decoded(path, rule)
        name = cache_lib.entry_name(
            {
                "kind": "scan",
                "rule": rule.to_dict(),
                "sources": {"image": self.cache.digest(path, "image")},
            }
        )
        header = volumes.read_grid(path)
        empty = Volume(np.broadcast_to(np.float32(0), header.shape), header, str(path))
        grid = _SPL.reoriented(empty).grid
        array = np.empty(grid.shape, np.uint16)
        if self.cache.read(name, array) is None:
            decoded = self._decoded(path, rule)
            array = loading.stored(decoded.array, "uint16")
            self.cache.write(name, array)
        scaled = array.astype(np.float32) / np.float32(pair_source.QUANTA)
        return Volume(scaled, grid, str(path))

    def _decoded(self, path: pathlib.Path, rule: preprocess.IntensityRule) -> Volume:
        volume = _SPL.reoriented(volumes.read_volume(path))
        array = preprocess.normalise(volume.array, rule, source=str(path))
        return Volume(array, volume.grid, str(path))
