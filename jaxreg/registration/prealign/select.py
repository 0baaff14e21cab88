"""Pre-alignment by name: the method, and the map in mm that it finds.

The result is an affine map in mm with, perhaps, a smooth residual field of the fixed
scan's space before it. A network then sees the moving scan over the fixed scan's
network grid, carried over by that map: voxel by voxel at the same place if the map were
perfect. So a network that answers the identity leaves the pre-alignment as it is, also
where networks otherwise match the extents of two scans (GradICON), and what is
predicted is composed with the map before the original scan is warped, once.

References:
  Tian et al., SAME++, 2023; Liu et al., SAME, MICCAI 2021.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import get_args

import jax.numpy as jnp
import numpy as np
from nibabel import orientations
from scipy import ndimage

from jaxreg.data import network_grid, preprocess
from jaxreg.data.network_grid import ResamplingRule
from jaxreg.data.preprocess import IntensityRule
from jaxreg.errors import UserError
from jaxreg.matching import nearest
from jaxreg.matching import points as points_lib
from jaxreg.models import sam
from jaxreg.registration.options import INTENSITY_METHODS, SAM_METHODS, Prealign
from jaxreg.registration.prealign import affine as affine_lib
from jaxreg.registration.prealign import descent, from_matches, measure
from jaxreg.space import affine, sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.typing import Field, Image

_BODY_HU = -500.0
_BODY_MRI = 0.1  # of the scaled intensities
_EXTENTS = "stretched extents"
_LARGEST_CHANGE = 8.0  # of volume
_SMALL_PART = 0.125  # of the moving scan's volume


@dataclasses.dataclass(frozen=True)
class Prealignment:
    """A map from fixed mm to moving mm.

    Attributes:
      affine_mm: 4x4, float64.
      residual_field: applied before the affine map, 1 D H W 3 in unit coordinates of
        `grid`; None for an affine map alone.
      grid: over the fixed scan, whose unit cube the residual field lives in.
      start: what it came from: "headers", "centres", "centres of mass", "stretched
        extents", "a place beside" the first of these, "a shift", "a turn", "matches" or
        "the given transform"; "" where nothing was looked for.
      extents_fit: whether the scans fit better with their extents over each other than
        by their headers.
      fits: how well the scans fit by their headers, and by this map; None where nothing
        was looked for.
      doubts: what was warned about, a sentence each.
    """

    affine_mm: np.ndarray
    residual_field: Field | None = None
    grid: Grid | None = None
    start: str = ""
    extents_fit: bool = False
    fits: tuple[measure.Fit, measure.Fit] | None = None
    doubts: tuple[str, ...] = ()

    @property
    def transform(self) -> Transform:
        """Fixed mm to moving mm."""
        last = Affine(self.affine_mm)
        if self.residual_field is None or self.grid is None:
            return Transform((last,))
        enter, leave = np.linalg.inv(self.grid.unit_to_mm), self.grid.unit_to_mm
        residual_field = Displacement(self.residual_field)
        return Transform((Affine(enter), residual_field, Affine(leave), last))

    @property
    def in_world(self) -> Transform:
        """As files hold it: no residual field beyond half a voxel of its grid."""
        if self.residual_field is None or self.grid is None:
            return self.transform
        residual_field = Transform((Displacement(self.residual_field),))
        return transform_lib.in_world(
            residual_field, self.grid, self.moved_grid(self.grid)
        )

    def residual_on(self, fixed: Grid) -> Transform | None:
        """Returns the residual field in unit coordinates of a fixed grid."""
        if self.residual_field is None or self.grid is None:
            return None
        enter = np.linalg.inv(self.grid.unit_to_mm) @ fixed.unit_to_mm
        residual_field = Displacement(self.residual_field)
        return Transform((Affine(enter), residual_field, Affine(np.linalg.inv(enter))))

    def moved_grid(self, fixed: Grid) -> Grid:
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
    rule: IntensityRule
    mask: Volume | None = None

    @functools.cached_property
    def normalised(self) -> np.ndarray:
        """Intensities by the rule, D H W in [0, 1]."""
        volume = self.volume
        return preprocess.normalise(volume.array, self.rule, source=volume.source)


def find(
    method: Prealign,
    moving: Scan,
    fixed: Scan,
    *,
    network: sam.TrainedSam | None = None,
) -> Prealignment:
    """Finds a pre-alignment of two scans.

    Args:
      method: how, see `Prealign`.
      moving: the scan that is warped.
      fixed: the scan that stays.
      network: for SAM's ways, which need scans of the kind that it knows.

    Returns:
      What fits at least as well as the scans where their headers place them, by the
      measures of `measure.Fit`. It warns, and keeps as doubts, where that is the
      headers themselves, where the images do not say how they lie to each other, and
      where the mirrored scan fits as well.

    Raises:
      UserError: SAM's weights are missing, or its matches are too few or contradict
        each other; or a scan has nothing to see.
    """
    if method not in get_args(Prealign):
        known = ", ".join(get_args(Prealign))
        raise UserError(f"`prealign` is {method}, expected one of {known}")
    if method == "none":
        return Prealignment(np.eye(4))
    both = shown(fixed), shown(moving)
    if method in INTENSITY_METHODS:
        found = _by_intensities(method, moving, fixed, *both)
    else:
        if method in SAM_METHODS:
            given = _by_matches(method, moving, fixed, network)
        else:
            given = Prealignment(_between_centres(moving, fixed), start="centres")
        found = _not_worse(method, given, affine_lib.judged(*both))
    if affine_lib.mirrored_fits(*both, found.affine_mm):
        found = _doubted(
            found,
            f"{moving.volume.source} mirrored, left for right, fits "
            f"{fixed.volume.source} as well: these images cannot tell the sides; check "
            "that neither header flips left and right",
        )
    for doubt in found.doubts:
        warnings.warn(doubt, stacklevel=2)
    return found


def _doubted(found: Prealignment, doubt: str) -> Prealignment:
    return dataclasses.replace(found, doubts=(*found.doubts, doubt))


# --- by intensities -------------------------------------------------------------------


def shown(scan: Scan) -> measure.Shown:
    """A scan as its likeness is measured.

    MR is not cut off at a quantile of all voxels: of a head in a large field of view
    that would leave its outline.
    """
    volume = scan.volume
    array = scan.normalised  # also refuses what has nothing to see
    if scan.rule.modality != "ct":
        array = volume.array
    if scan.mask is not None:
        preprocess.check_same_grid(scan.mask, volume)
    return measure.Shown(
        affine_lib.scaled(array),
        volume.grid,
        None if scan.mask is None else scan.mask.array > 0,
    )


def _by_intensities(
    method: descent.Kind,
    moving: Scan,
    fixed: Scan,
    here: measure.Shown,
    there: measure.Shown,
) -> Prealignment:
    reoriented = network_grid.oriented(
        moving.volume, orientations.io_orientation(fixed.volume.grid.affine_mm)
    )
    grids = fixed.volume.grid, moving.volume.grid
    starts = {
        "headers": np.eye(4),  # first: what the others have to beat
        "centres": affine.to_mm(affine.centres(*grids), *grids),
        "centres of mass": _between_centres(moving, fixed),
        _EXTENTS: affine_lib.stretched(grids[0], reoriented.grid),
    }
    starts = {
        k: v
        for k, v in starts.items()
        if affine_lib.plausible(v) and affine_lib.is_of(v, method)
    }
    found = affine_lib.search(here, there, starts, method)
    doubt = _doubt_of(found, starts, moving, fixed)
    names = ("headers", _EXTENTS)
    fits = {name: found.fits[name] for name in names if name in found.fits}
    extents_fit = affine_lib.best_of(fits) == _EXTENTS
    before, after = found.fits.get("headers"), found.end
    return Prealignment(
        found.matrix,
        start=found.start,
        extents_fit=extents_fit,
        fits=None if before is None or after is None else (before, after),
        doubts=(f"`prealign` {method}: {doubt}",) if doubt else (),
    )


def _doubt_of(
    found: affine_lib.Found,
    starts: Mapping[str, np.ndarray],
    moving: Scan,
    fixed: Scan,
) -> str:
    """Returns the warning about a search's result, empty if there is none."""
    names = f"{moving.volume.source} and {fixed.volume.source}"
    begun = starts.get(found.start)
    kept = begun is not None and np.array_equal(found.matrix, begun)
    if found.certain:
        better = f"no map of {names} fits better than their {found.start}"
        return f"{better}, which is kept as it is" if kept else ""
    part = affine_lib.part_of(fixed.volume.grid, moving.volume.grid)
    if found.rivals:
        why = "places far apart fit nearly alike"
    else:
        why = "a search from other starts does not lead to the same place"
    if part < _SMALL_PART:
        why += (
            f", and the fixed scan shows {100 * part:.2g} % of the moving one's volume"
        )
    end = (
        f"their {found.start} are kept as they are"
        if kept
        else f"the best place, found from {found.start}, may be wrong"
    )
    return (
        f"these images do not say how {names} lie to each other: {why}; {end}. Give "
        "masks with `fixed_mask`, `moving_mask` and `loss_function_masking`, crop the "
        "larger scan, or align by matches (`prealign` sam-affine)"
    )


def _between_centres(moving: Scan, fixed: Scan) -> np.ndarray:
    """The shift in mm between the centres of mass, 4x4."""
    grids = fixed.volume.grid, moving.volume.grid
    here, there = (_scaled(scan) for scan in (fixed, moving))
    return affine.to_mm(affine.centres_of_mass(here, there, *grids), *grids)


def _not_worse(
    method: Prealign,
    given: Prealignment,
    level: measure.Level,
) -> Prealignment:
    """Returns a pre-alignment, or the headers where they fit better, as a doubt.

    A coarse field that fits no better than the headers is left out first.
    """
    if given.residual_field is not None:
        fits = _beside_headers(_as_function(given), level)
        if fits[1].globally < fits[0].globally:
            return dataclasses.replace(given, fits=fits)
        given = Prealignment(
            given.affine_mm,
            start=given.start,
            doubts=(
                f"`prealign` {method}: the coarse field fits no better than the scans' "
                "headers; it is left out",
            ),
        )
    fits = _beside_headers(given.affine_mm, level)
    # By one measure, which no way that is asked here has made small itself.
    worse = fits[1].globally - fits[0].globally
    if worse <= 0:
        return dataclasses.replace(given, fits=fits)
    kept = Prealignment(
        np.eye(4), start="headers", fits=(fits[0], fits[0]), doubts=given.doubts
    )
    return _doubted(
        kept,
        f"`prealign` {method} fits worse than the scans' headers (NMI loss more by "
        f"{worse:.4f}); the headers are kept",
    )


def _as_function(given: Prealignment) -> Callable[[np.ndarray], np.ndarray]:
    """A pre-alignment as a function of P 3 in mm."""

    def mapped(places: np.ndarray) -> np.ndarray:
        points = jnp.asarray(places[None], jnp.float32)
        return np.asarray(given.transform.map_points(points))[0]

    return mapped


def _beside_headers(
    found: measure.Map, level: measure.Level
) -> tuple[measure.Fit, measure.Fit]:
    """How well scans fit by their headers and by a map, measured alike."""
    fits = affine_lib.compare(level, {"headers": np.eye(4), "map": found})
    return fits["headers"], fits["map"]


def _scaled(scan: Scan) -> np.ndarray:
    """A scan's intensities, D H W in [0, 1], 0 outside its mask."""
    array = scan.normalised
    if scan.mask is not None:
        array = np.where(scan.mask.array > 0, array, np.float32(0))
    return array


def without_sam(method: str) -> UserError:
    """Returns the error of a method that needs a SAM network where there is none."""
    return UserError(
        f"`prealign` {method} needs a SAM network; give `sam_weights` PATH (a "
        "checkpoint folder or .pth), or pass `prealign` affine"
    )


# --- by SAM's matches -----------------------------------------------------------------


def _by_matches(
    method: Prealign, moving: Scan, fixed: Scan, network: sam.TrainedSam | None
) -> Prealignment:
    if network is None:
        raise without_sam(method)
    try:
        for scan in (moving, fixed):
            points_lib.check_known(network, scan.rule, scan.volume.source)
    except UserError as error:
        raise UserError(
            f"`prealign` {method}: {error}; pass `prealign` affine"
        ) from error
    (there, moving_grid, moving_body), (here, fixed_grid, fixed_body) = (
        _for_sam(scan, network) for scan in (moving, fixed)
    )
    found, wanted = (points_lib.embed(network, image) for image in (there, here))
    matches = nearest.correspond(
        found,
        wanted,
        moving_grid.shape,
        query_mask=moving_body,
        key_mask=fixed_body,
    )
    shapes = moving_grid.shape, fixed_grid.shape
    try:
        linear = from_matches.matched_affine(matches, *shapes)
        field = (
            None
            if method == "sam-affine"
            else from_matches.matched_field(matches, *shapes)
        )
    except UserError as error:
        raise UserError(
            f"`prealign` {method}: {error}; or pass `prealign` affine"
        ) from (error)
    affine_mm = affine.to_mm(linear, fixed_grid, moving_grid)
    change = float(np.linalg.det(affine_mm[:3, :3]))
    if not 1 / _LARGEST_CHANGE < change < _LARGEST_CHANGE:
        raise UserError(
            f"`prealign` {method}: the {len(matches)} matches of "
            f"{moving.volume.source} and {fixed.volume.source} ask for a map that "
            f"changes volume by a factor of {change:.3g}; check that both "
            "show the same part of the body, or pass `prealign` affine"
        )
    if field is None:
        return Prealignment(affine_mm, start="matches")
    return Prealignment(
        affine_mm, _residual_field(field, linear), fixed_grid, "matches"
    )


def _for_sam(scan: Scan, network: sam.TrainedSam) -> tuple[Image, Grid, np.ndarray]:
    """A whole scan as SAM sees it, its grid, and the body on it, D H W."""
    rule = dataclasses.replace(
        scan.rule, ct_window=network.ct_window, quantile_range=network.quantile_range
    )
    image = points_lib.resampled(scan.volume, rule, network.spacing_mm)
    if scan.mask is None:
        low, high = rule.ct_window
        air = max((_BODY_HU - low) / (high - low), 0.0)
        body = image.array > (air if rule.modality == "ct" else _BODY_MRI)
        # Slice by slice: lungs are part of the body, and open to neither side there.
        body = ndimage.binary_fill_holes(body, np.ones((1, 3, 3)))
        assert body is not None
    else:
        placement = ResamplingRule("pad_crop", "spl", network.spacing_mm)
        mask = placement.reoriented(scan.mask)
        body = placement.labels(mask.array > 0, mask.grid, image.grid.shape)
    shown = points_lib.padded_for_sam(image, rule)
    sizes = zip(image.array.shape, shown.array.shape, strict=True)
    body = np.pad(body, [(0, n - m) for m, n in sizes])
    return jnp.asarray(shown.array)[None, ..., None], shown.grid, body


def _residual_field(field: Transform, linear: Transform) -> Field:
    """Returns what comes before an affine map to make a coarse field of it.

    Both are unit, and so is the result, on the field's control points: between them a
    linear map of linear interpolations is the interpolation itself.
    """
    (step,), (last,) = field.steps, linear.steps
    assert isinstance(step, Displacement) and isinstance(last, Affine)
    shape = step.field.shape[1:4]
    here = np.asarray(sampling.identity(shape), np.float64)
    back = Affine(np.linalg.inv(np.asarray(last.matrix, np.float64)))
    residual = back(here + np.asarray(step.field, np.float64)) - here
    return jnp.asarray(residual, jnp.float32)
