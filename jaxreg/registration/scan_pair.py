"""Two scans in memory: reading them, and writing what their registration gives.

The one place where `register`, lists of pairs, the evaluation, the demonstration and
the command line read what they are given and write what they are asked for.
"""

import dataclasses

from jaxreg.data import modality as modality_lib
from jaxreg.io import files, given, transforms, volumes
from jaxreg.registration import options as options_lib
from jaxreg.registration import preparation
from jaxreg.registration.options import Regions
from jaxreg.space import warping
from jaxreg.space.background import Background
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Transform


@dataclasses.dataclass(frozen=True, eq=False)
class ScanPair:
    """A fixed and a moving scan, and what the moving one is warped from.

    Attributes:
      fixed: the scan that stays, D H W, float32.
      moving: the scan to be warped, the same.
      regions: masks and label maps of both.
      stored: the moving scan in its own type, or what that can be read from.
      modality: of the moving scan, which tells what lies beyond it; None and "auto"
        go by the values.
      fill: value beyond the moving scan; that of `modality.background_of` if None.
    """

    fixed: Volume
    moving: Volume
    regions: Regions
    stored: given.Scan
    modality: str | None
    fill: float | Background | None = None

    def with_stored(self) -> "ScanPair":
        """Returns the pair with the moving scan in its own type, ready to be warped.

        Raises:
          UserError: it cannot be read any more, or its type cannot hold the fill.
        """
        if isinstance(self.fill, Background):
            return self
        stored = given.volume(self.stored, "moving scan", kind="stored")
        beyond = modality_lib.background_of(self.modality, stored, self.fill)
        volumes.check_storable(beyond.fill, stored)
        return dataclasses.replace(self, stored=stored, fill=beyond)

    @property
    def background(self) -> Background:
        """What a warped scan shows where there is nothing of the moving one."""
        if isinstance(self.fill, Background):
            return self.fill
        return modality_lib.background_of(self.modality, self.moving, self.fill)

    def warped(self, transform: Transform) -> Volume:
        """Returns the moving scan on the fixed scan's grid, in its own type.

        Args:
          transform: fixed mm to moving mm.

        Raises:
          UserError: see `with_stored`.
        """
        ready = self.with_stored()
        assert isinstance(ready.stored, Volume)
        return warping.warp_volume(
            ready.stored, transform, self.fixed.grid, fill=ready.background
        )


def read(
    moving: given.Scan,
    fixed: given.Scan,
    regions: Regions | None = None,
    *,
    modality: str | None = None,
    fill: float | None = None,
    to_warp: bool = False,
) -> ScanPair:
    """Reads two scans and checks that what belongs to them lies on their grids.

    Args:
      moving: the scan to be warped: see `given.volume`.
      fixed: the scan that stays, the same.
      regions: masks and label maps of the two scans.
      modality: of the moving scan; None and "auto" go by the values.
      fill: value beyond the moving scan; that of `modality.background_of` if None.
      to_warp: read the moving scan in its own type as well.

    Raises:
      UserError: a scan cannot be read, masks or label maps are no `Regions` or lie
        elsewhere, or the moving scan's type cannot hold the fill.
    """
    regions = regions or Regions()
    options_lib.check_kind(
        regions, Regions, "the regions are", "jaxreg.registration.options.Regions(...)"
    )
    found = ScanPair(
        fixed=given.volume(fixed, "fixed scan"),
        moving=given.volume(moving, "moving scan"),
        regions=regions,
        stored=moving,
        modality=modality,
        fill=fill,
    )
    preparation.check_volumes(found.moving, found.fixed, regions)
    if to_warp:
        return found.with_stored()
    if fill is not None:
        volumes.check_storable(fill, found.moving)
    return found


def write(
    scans: ScanPair,
    transform: Transform,
    inverse: Transform | None = None,
    *,
    transform_out: files.PathLike | None = None,
    inverse_out: files.PathLike | None = None,
    warped_out: files.PathLike | None = None,
) -> tuple[Transform, Transform | None]:
    """Writes the files that are asked for, each whole or not at all.

    Args:
      scans: that were registered.
      transform: fixed mm to moving mm.
      inverse: moving mm to fixed mm.
      transform_out: see `transforms.write_transform`.
      inverse_out: the same for the inverse; nothing is written where there is none.
      warped_out: the moving scan on the fixed grid, by the transform as written.

    Returns:
      The transform and its inverse as readers of these files find them: a displacement
      field is read linearly between its voxels, which is another map than that in
      memory.

    Raises:
      UserError: a file cannot be written.
    """

    def written(path: files.PathLike | None, mapping: Transform, grid: Grid):
        if path is None:
            return mapping
        transforms.write_transform(path, mapping, grid)
        return transforms.as_written(path, mapping)

    transform = written(transform_out, transform, scans.fixed.grid)
    if inverse is not None:
        inverse = written(inverse_out, inverse, scans.moving.grid)
    if warped_out is not None:
        volumes.write_volume(warped_out, scans.warped(transform))
    return transform, inverse
