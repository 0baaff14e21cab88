"""Pre-alignment of two scans by name: what is looked for, and the map in mm.

The result is an affine map in mm with, perhaps, a gentle bend of the fixed scan's space
before it. A network then sees the moving scan over the fixed scan's network grid,
carried over by that map: voxel by voxel at the same place if the map were perfect. So a
network that answers the identity leaves the pre-alignment as it is, also where networks
otherwise match the extents of two scans (GradICON), and what is predicted is composed
with the map before the original scan is warped, once.

References:
  Tian et al., SAME++, 2023; Liu et al., SAME, MICCAI 2021.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from jaxreg import matching, points, prealign
from jaxreg.data import preprocess, resize
from jaxreg.data.preprocess import Placement, Preprocessing
from jaxreg.errors import UserError
from jaxreg.losses import similarity
from jaxreg.models import sam
from jaxreg.space import affine, sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.typing import Field, Image

Way = Literal["none", "centre", "affine", "sam", "sam-affine", "sam-coarse"]
"""none; centres of mass; an affine map by intensities; by SAM's matches an affine map
("sam-affine") or a coarse field ("sam-coarse", and "sam", as UniReg was trained)."""
SAM_WAYS = ("sam", "sam-affine", "sam-coarse")
WAYS = ("none", "centre", "affine", *SAM_WAYS)

_OVERVIEW = (64, 64, 64)
_BODY_HU = -500.0
_BODY_MRI = 0.1  # of the scaled intensities
_LARGEST_CHANGE = 8.0  # of volume


@dataclasses.dataclass(frozen=True)
class Prealignment:
    """A map from fixed mm to moving mm.

    Attributes:
      affine_mm: 4x4, float64.
      bend: what comes before it, 1 D H W 3 in unit coordinates of `grid`; None for
        nothing.
      grid: over the fixed scan, whose unit cube the bend lives in.
    """

    affine_mm: np.ndarray
    bend: Field | None = None
    grid: Grid | None = None

    @property
    def transform(self) -> Transform:
        """Fixed mm to moving mm."""
        last = Affine(self.affine_mm)
        if self.bend is None or self.grid is None:
            return Transform((last,))
        enter, leave = np.linalg.inv(self.grid.unit_to_mm), self.grid.unit_to_mm
        bend = Displacement(self.bend)
        return Transform((Affine(enter), bend, Affine(leave), last))

    @property
    def in_world(self) -> Transform:
        """The same as files hold it: beyond half a voxel of the bend there is none."""
        if self.bend is None or self.grid is None:
            return self.transform
        bend = Transform((Displacement(self.bend),))
        return transform_lib.in_world(bend, self.grid, self.carried(self.grid))

    def bend_on(self, fixed: Grid) -> Transform | None:
        """Returns the bend in unit coordinates of a grid over the fixed scan."""
        if self.bend is None or self.grid is None:
            return None
        enter = np.linalg.inv(self.grid.unit_to_mm) @ fixed.unit_to_mm
        bend = Displacement(self.bend)
        return Transform((Affine(enter), bend, Affine(np.linalg.inv(enter))))

    def carried(self, fixed: Grid) -> Grid:
        """Returns a grid over the fixed scan, moved into the moving scan's space.

        By the affine part: between both grids' unit cubes it is the identity.
        """
        return Grid(fixed.shape, self.affine_mm @ fixed.affine_mm)


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan, how its intensities are scaled, and where it counts.

    Attributes:
      volume: stored intensities.
      rule: intensity rule.
      mask: on the volume's grid.
    """

    volume: Volume
    rule: Preprocessing
    mask: Volume | None = None


def find(
    way: Way, moving: Scan, fixed: Scan, *, network: sam.TrainedSam | None = None
) -> Prealignment:
    """Looks for a pre-alignment of two scans.

    Args:
      way: how, see `Way`.
      moving: the scan that is warped.
      fixed: the scan that stays.
      network: for SAM's ways, which need scans of the kind that it knows.

    Raises:
      UserError: SAM's weights are missing, or its matches are too few or contradict
        each other; or a scan has nothing to see.
    """
    if way not in WAYS:
        raise UserError(f"--prealign is {way}, expected one of {', '.join(WAYS)}")
    if way == "none":
        return Prealignment(np.eye(4))
    if way in SAM_WAYS:
        return _by_matches(way, moving, fixed, network)
    here, there = (_scaled(scan) for scan in (fixed, moving))
    grids = fixed.volume.grid, moving.volume.grid
    if way == "centre":
        found = affine.centres_of_mass(here, there, *grids)
        return Prealignment(affine.to_mm(found, *grids))
    here, there = _overview(here), _overview(there)
    fixed_grid, moving_grid = (grid.resized(_OVERVIEW) for grid in grids)
    alike = moving.rule.modality == fixed.rule.modality
    config = prealign.IntensityConfig(loss="ncc" if alike else "mind")
    starts = (
        affine.from_mm(np.eye(4), fixed_grid, moving_grid),
        affine.centres(fixed_grid, moving_grid),
        affine.centres_of_mass(here, there, fixed_grid, moving_grid),
    )
    found = prealign.intensity_affine(
        here,
        there,
        fixed_grid,
        moving_grid,
        start=_best(starts, here, there, config.loss),
        config=config,
    )
    return Prealignment(affine.to_mm(found, fixed_grid, moving_grid))


# --- by intensities -------------------------------------------------------------------


def _scaled(scan: Scan) -> np.ndarray:
    """A scan's intensities, D H W in [0, 1], 0 outside its mask."""
    volume = scan.volume
    array = preprocess.normalise(volume.array, scan.rule, source=volume.source)
    if scan.mask is not None:
        preprocess.check_same_grid(scan.mask, volume)
        array = np.where(scan.mask.array > 0, array, np.float32(0))
    return array


def _overview(array: np.ndarray) -> Image:
    """A whole scan D H W on few voxels, 1 D H W 1.

    Of one size, so that one program serves all scans.
    """
    while any(n >= 2 * m for n, m in zip(array.shape, _OVERVIEW, strict=True)):
        # Step by step: one long step would skip voxels.
        sizes = zip(array.shape, _OVERVIEW, strict=True)
        array = resize.half_pixel(
            array, tuple(-(-n // 2) if n >= 2 * m else n for n, m in sizes)
        )
    return jnp.asarray(resize.half_pixel(array, _OVERVIEW))[None, ..., None]


@functools.partial(jax.jit, static_argnames="loss")
def _unlikeness(matrix, fixed: Image, moving: Image, *, loss: str):
    """The loss where both images overlap, and the share of the fixed one there."""
    points = jnp.asarray(Affine(matrix)(sampling.identity(fixed.shape[1:4])))
    inside = jnp.all((points >= 0) & (points <= 1), -1, keepdims=True)
    warped = sampling.sample(moving, points)
    measure = {"ncc": similarity.ncc, "mind": similarity.mind_ssc}[loss]
    share = jnp.mean(inside)
    return prealign.unlikeness(measure(warped, fixed, mask=inside), share), share


def _best(
    starts: Sequence[Transform], fixed: Image, moving: Image, loss: str
) -> Transform:
    """Returns the start with the least loss of those with enough in common."""

    def rank(start: Transform) -> tuple[bool, float]:
        (step,) = start.steps
        assert isinstance(step, Affine)
        matrix = jnp.asarray(step.matrix, jnp.float32)
        value, share = _unlikeness(matrix, fixed, moving, loss=loss)
        value = float(value)
        return float(share) < prealign.OVERLAP, math.inf if math.isnan(value) else value

    return min(starts, key=rank)


def without_sam(way: str) -> UserError:
    """Returns what to say where a way needs a SAM network and there is none."""
    return UserError(
        f"--prealign {way} needs a SAM network; give --sam-weights PATH (a checkpoint "
        "folder or .pth), or pass --prealign affine"
    )


# --- by SAM's matches -----------------------------------------------------------------


def _by_matches(
    way: Way, moving: Scan, fixed: Scan, network: sam.TrainedSam | None
) -> Prealignment:
    if network is None:
        raise without_sam(way)
    try:
        for scan in (moving, fixed):
            points.check_known(network, scan.rule, scan.volume.source)
    except UserError as error:
        raise UserError(f"--prealign {way}: {error}; pass --prealign affine") from error
    (there, moving_grid, moving_body), (here, fixed_grid, fixed_body) = (
        _for_sam(scan, network) for scan in (moving, fixed)
    )
    found, wanted = (points.embed(network, image) for image in (there, here))
    matches = matching.correspond(
        found,
        wanted,
        moving_grid.shape,
        query_mask=moving_body,
        key_mask=fixed_body,
    )
    shapes = moving_grid.shape, fixed_grid.shape
    try:
        linear = prealign.matched_affine(matches, *shapes)
        field = (
            None if way == "sam-affine" else prealign.matched_field(matches, *shapes)
        )
    except UserError as error:
        raise UserError(f"--prealign {way}: {error}; or pass --prealign affine") from (
            error
        )
    affine_mm = affine.to_mm(linear, fixed_grid, moving_grid)
    change = float(np.linalg.det(affine_mm[:3, :3]))
    if not 1 / _LARGEST_CHANGE < change < _LARGEST_CHANGE:
        raise UserError(
            f"--prealign {way}: the {len(matches)} matches of {moving.volume.source} "
            f"and {fixed.volume.source} ask for a map that changes volume by a factor "
            f"of {change:.3g}; check that both show the same part of the body, or pass "
            "--prealign affine"
        )
    if field is None:
        return Prealignment(affine_mm)
    return Prealignment(affine_mm, _bend(field, linear), fixed_grid)


def _for_sam(scan: Scan, network: sam.TrainedSam) -> tuple[Image, Grid, np.ndarray]:
    """A whole scan as SAM sees it, its grid, and the body on it, D H W."""
    rule = dataclasses.replace(
        scan.rule, ct_window=network.ct_window, quantile_range=network.quantile_range
    )
    image = points.placed(scan.volume, rule, network.spacing_mm)
    if scan.mask is None:
        low, high = rule.ct_window
        air = max((_BODY_HU - low) / (high - low), 0.0)
        body = image.array > (air if rule.modality == "ct" else _BODY_MRI)
        # Slice by slice: lungs are part of the body, and open to neither side there.
        body = ndimage.binary_fill_holes(body, np.ones((1, 3, 3)))
        assert body is not None
    else:
        placement = Placement("pad_crop", "spl", network.spacing_mm)
        mask = placement.turned(scan.mask)
        body = placement.labels(mask.array > 0, mask.grid, image.grid.shape)
    shown = points.shown_to_sam(image, rule)
    sizes = zip(image.array.shape, shown.array.shape, strict=True)
    body = np.pad(body, [(0, n - m) for m, n in sizes])
    return jnp.asarray(shown.array)[None, ..., None], shown.grid, body


def _bend(field: Transform, linear: Transform) -> Field:
    """Returns what comes before an affine map to make a coarse field of it.

    Both are unit, and so is the result, on the field's control points: between them a
    linear map of linear interpolations is the interpolation itself.
    """
    (step,), (last,) = field.steps, linear.steps
    assert isinstance(step, Displacement) and isinstance(last, Affine)
    shape = step.field.shape[1:4]
    here = np.asarray(sampling.identity(shape), np.float64)
    back = Affine(np.linalg.inv(np.asarray(last.matrix, np.float64)))
    bent = back(here + np.asarray(step.field, np.float64)) - here
    return jnp.asarray(bent, jnp.float32)
