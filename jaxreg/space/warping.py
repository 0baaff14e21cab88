"""Resampling of whole scans through a transform, and its Jacobian, slab by slab.

A compiled program serves one size of arrays alone, and scans differ in size. Voxels are
therefore mapped and read in slabs of few sizes, from arrays of few sizes: scan after
scan, the programs of the first are used again.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.space import background, sampling
from jaxreg.space import grid as grid_lib
from jaxreg.space.transform import Affine, Displacement, Step, Transform

_FEW, _MANY = 2**16, 2**21  # voxels in a slab of a scan of up to 16 _FEW, or of more
_STEP = 64  # what the axes of a scan of up to _MANY voxels are multiples of when read


def _merge_affines(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    merged: list[Step] = []
    for step in steps:
        if isinstance(step, Affine) and merged and isinstance(merged[-1], Affine):
            before = merged.pop()
            assert isinstance(before, Affine)
            step = Affine(np.asarray(step.matrix) @ np.asarray(before.matrix))
        merged.append(step)
    return tuple(merged)


@functools.partial(jax.jit, static_argnames="count")
def _map_slab(steps, start, shape, *, count: int):
    """Where voxels lead, 1 P 3: `count` from (slice, voxel of it) in order of storage.

    Voxels after the last one of the shape belong to slices that do not exist.
    """
    points = _voxels_of_slab(start, shape, count)
    for step in steps:
        points = step(points)
    return points


def _voxels_of_slab(start, shape, count: int):
    in_slice = start[1] + jnp.arange(count, dtype=jnp.int32)
    size = shape[1] * shape[2]
    voxel = [in_slice // size + start[0], in_slice % size // shape[2]]
    return jnp.stack([*voxel, in_slice % shape[2]], -1).astype(jnp.float32)[None]


@jax.jit
def _read_slab(values, points, shape, fill):
    """Reads a scan of a shape, padded, at unit points 1 P 3, as "half_voxel": 1 P.

    Of two channels see `_padded`: where less than half of what is read counts, it is as
    outside.
    """
    # The scan is an argument: closed over, it would be a constant of the program.
    clipped, inside = _voxel_at(points, shape)
    read = sampling.sample_voxels(values, clipped)
    if read.shape[-1] == 1:
        return jnp.where(inside, read, fill)[..., 0]
    product, weight = read[..., 0], read[..., 1]
    known = inside[..., 0] & (weight >= 0.5)
    mean = background.AIR_HU + product / jnp.maximum(weight, 0.5)
    return jnp.where(known, mean, fill)


@jax.jit
def _place_slab(points, shape):
    """Unit points 1 P 3 in voxels of a shape, clipped to it; within half a voxel: P."""
    clipped, inside = _voxel_at(points, shape)
    # What is no number is outside, and an index all the same.
    return jnp.where(inside, clipped, 0.0)[0], inside[0, :, 0]


@jax.jit
def _nearest_slab(points, shape):
    """The voxels nearest to unit points, 1 P 3: three indices, P; see `_place_slab`."""
    at, inside = _place_slab(points, shape)
    low = jnp.floor(at)
    nearest = (low + (at - low >= 0.5)).astype(jnp.int32)
    return tuple(nearest.T), inside


def _voxel_at(points, shape):
    last = (shape - 1).astype(points.dtype)[None, None]
    index = points * jnp.maximum(last, 1.0)
    inside = jnp.all((index >= -0.5) & (index <= last + 0.5), -1, keepdims=True)
    return jnp.clip(index, 0.0, last), inside


def _by_slabs(
    steps,
    shape: grid_lib.Shape,
    function,
    voxels_per_slab: int | None = None,
    *,
    program=_map_slab,
    first_slice: int = 0,
) -> np.ndarray:
    """Applies `function` to what a program makes of a grid's voxels, slab by slab.

    Args:
      steps: the program's first argument.
      shape: D H W, of which D counts from the first slice.
      function: of the program's result.
      voxels_per_slab: by the number of voxels if None.
      program: `_map_slab` or one like it.
      first_slice: where the voxels begin along the first axis.
    """
    total = math.prod(shape)
    count = voxels_per_slab or (_FEW if total <= 16 * _FEW else _MANY)
    sizes = np.asarray(shape, np.int32)
    out = []
    for first in range(0, total, count):
        start = np.asarray(divmod(first, math.prod(shape[1:])), np.int32)
        start[0] += first_slice
        found = program(steps, start, sizes, count=count)
        out.append(np.asarray(function(found))[0, : total - first])
    flat = np.concatenate(out)
    return flat.reshape(*shape, *flat.shape[1:])


def _padded(values: np.ndarray, padding: float | None = None) -> np.ndarray:
    """Returns a scan as float32, 1 D H W 1, a small one with zeros behind its ends.

    With padding 1 D H W 2: how far each value is above air, and its weight; both are 0
    where it is padding. So the mean of air by weights is air to the last digit.
    """
    shape = values.shape
    if values.size <= _MANY:
        shape = tuple(-(-n // _STEP) * _STEP for n in shape)
    elif padding is None:
        return values.astype(np.float32, copy=False)[None, ..., None]
    padded = np.zeros((1, *shape, 1 if padding is None else 2), np.float32)
    within = padded[(0, *(slice(n) for n in values.shape))]
    if padding is None:
        within[..., 0] = values
    else:
        np.greater(values, padding, out=within[..., 1], casting="unsafe")
        within[..., 0] = values
        within[..., 0] -= background.AIR_HU
        within[..., 0] *= within[..., 1]
    return padded


_EXACT = 2**24  # the whole numbers up to here are all different in float32


def _read_float64(array: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Interpolates D H W linearly at voxel indices P 3 within it: P, float64."""
    flat, strides = (
        np.ravel(array),
        (array.shape[1] * array.shape[2], array.shape[2], 1),
    )
    first, fractions, steps = np.zeros(len(at), np.intp), [], []
    for axis, (n, stride) in enumerate(zip(array.shape, strides, strict=True)):
        low = np.minimum(at[:, axis].astype(np.intp), max(n - 2, 0))
        first += low * stride
        fraction = at[:, axis].astype(np.float64) - low
        fractions.append((1.0 - fraction, fraction))
        steps.append((0, stride * (n > 1)))
    total = np.zeros(len(at))
    for corner in np.ndindex(2, 2, 2):
        d, h, w = (
            fraction[end] for fraction, end in zip(fractions, corner, strict=True)
        )
        place = first + sum(s[end] for s, end in zip(steps, corner, strict=True))
        total += d * h * w * flat[place]
    return total


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns numbers in a type; integers are rounded, and clipped to its range."""
    if np.issubdtype(dtype, np.floating) or values.dtype == dtype:
        return values.astype(dtype, copy=False)
    if dtype.kind == "b":
        return values >= 0.5
    limits = np.iinfo(dtype)
    # float64 holds every 32-bit limit; a 64-bit one rounds up, out of the type.
    top = float(limits.max)
    top = top if int(top) <= limits.max else np.nextafter(top, 0.0)
    return np.clip(np.rint(values).astype(np.float64), limits.min, top).astype(dtype)


def warp_volume(
    moving: grid_lib.Volume,
    transform: Transform,
    fixed: grid_lib.Grid,
    *,
    order: Literal[0, 1] = 1,
    fill: background.Fill = "auto",
) -> grid_lib.Volume:
    """Resamples a volume on the fixed grid, as ITK's resampler does.

    Args:
      moving: the volume to read, its array of any real type.
      transform: fixed mm to moving mm.
      fixed: the output grid.
      order: 1 linear, 0 nearest.
      fill: the value outside the moving volume (more than half a voxel); "auto" and a
        `Background` say which of its voxels are padding as well, see
        `background.find`. Padding becomes the fill, and what is interpolated beside
        it is the mean of the other voxels by their weights.

    Returns:
      A volume of the fixed grid in the moving array's type. Nearest values are exact in
      any type; interpolated ones are rounded where the type is one of integers (the
      original truncates), and float32 in between unless those are too large for it.
    """
    if isinstance(fill, str):
        fill = background.find(moving, nearest=order == 0)
    elif not isinstance(fill, background.Background):
        fill = background.Background(float(fill))
    # From voxel to voxel: small numbers, so that float32 keeps 1e-4 of a voxel.
    voxel_to_unit = np.linalg.inv(moving.grid.unit_to_mm)
    steps = _merge_affines(
        (Affine(fixed.voxel_to_mm), *transform.steps, Affine(voxel_to_unit))
    )
    stored = np.asarray(moving.array)
    read = (_nearest if order == 0 else _linear)(stored, fill)
    found = _as_type(_by_slabs(steps, fixed.shape, read), stored.dtype)
    return grid_lib.Volume(found, fixed, moving.source)


def _nearest(array: np.ndarray, fill_rule: background.Background):
    """Returns what reads D H W of any type at unit points 1 P 3: 1 P, in its type."""
    shape = np.asarray(array.shape, np.int32)
    fill = _as_type(np.asarray(fill_rule.fill, np.float64), array.dtype)

    def read(points):
        voxel, inside = jax.tree.map(np.asarray, _nearest_slab(points, shape))
        found = array[voxel]
        if fill_rule.padding is not None:
            inside = inside & (found > fill_rule.padding)
        return np.where(inside, found, fill)[None]

    return read


def _linear(array: np.ndarray, fill_rule: background.Background):
    """Returns what interpolates D H W at unit points 1 P 3: 1 P, real."""
    shape = np.asarray(array.shape, np.int32)
    if _is_wide(array):

        def exact(points):
            at, inside = map(np.asarray, _place_slab(points, shape))
            return np.where(inside, _read_float64(array, at), fill_rule.fill)[None]

        return exact

    on_device = jnp.asarray(_padded(array, fill_rule.padding))
    fill = np.float32(fill_rule.fill)
    return lambda points: _read_slab(on_device, points, shape, fill)


def _is_wide(array: np.ndarray) -> bool:
    """Whether integers are too large for float32."""
    if not np.issubdtype(array.dtype, np.integer):
        return False
    return max(abs(int(array.min())), abs(int(array.max()))) > _EXACT


def displacement_mm(transform: Transform, fixed: grid_lib.Grid) -> np.ndarray:
    """Returns ``T(x) - x`` at the fixed voxels, D H W 3, RAS+ mm, float32."""
    # In voxels of the fixed grid, where float32 is exact enough, and to mm at the end.
    to_voxel = Affine(np.linalg.inv(fixed.voxel_to_mm))
    steps = _merge_affines((Affine(fixed.voxel_to_mm), *transform.steps, to_voxel))
    mapped = _by_slabs(steps, fixed.shape, lambda points: points)
    voxels = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"), -1)
    return ((mapped - voxels) @ fixed.voxel_to_mm[:3, :3].T).astype(np.float32)


_ROUND_TRIPS = 2**17  # points: a mean to a few per mille


@jax.jit
def _there_and_back(back, there, points):
    """Where `back` leads from points 1 P 3, and how far off `there` returns from it."""
    partner = Transform(back).map_points(points)
    return partner, Transform(there).map_points(partner) - points


def round_trip_mm(
    transform: Transform,
    inverse: Transform,
    fixed: grid_lib.Grid,
    moving: grid_lib.Grid,
) -> tuple[float, float]:
    """Returns the mean and the maximum of ``|T(T_inverse(x)) - x|`` in mm.

    At points x drawn evenly between the moving scan's outer voxel centres, the same
    ones each time, whose partner lies between those of the fixed scan: what is outside
    has no inverse. The points lie between the voxels of fields too, where an inverse
    that is exact at its voxels is not.

    Args:
      transform: fixed mm to moving mm.
      inverse: moving mm to fixed mm.
      fixed: the fixed scan's grid.
      moving: the moving scan's grid.

    Returns:
      NaN twice if no point has a partner.
    """
    span = np.asarray(moving.shape) - 1
    points = np.random.default_rng(0).random((1, _ROUND_TRIPS, 3)) * span
    # From voxel to voxel, as in `warp_volume`.
    to_fixed, to_moving = (
        Affine(np.linalg.inv(grid.voxel_to_mm)) for grid in (fixed, moving)
    )
    back = (Affine(moving.voxel_to_mm), *inverse.steps, to_fixed)
    there = (Affine(fixed.voxel_to_mm), *transform.steps, to_moving)
    partner, gap = _there_and_back(
        _merge_affines(back),
        _merge_affines(there),
        points.astype(np.float32),
    )
    partner = np.asarray(partner)
    inside = (partner >= 0) & (partner <= np.asarray(fixed.shape) - 1)
    gap_mm = np.asarray(gap) @ moving.voxel_to_mm[:3, :3].T
    residual = np.linalg.norm(gap_mm, axis=-1)[inside.all(-1)]
    if not residual.size:
        return math.nan, math.nan
    return float(residual.mean()), float(residual.max())


_JACOBIAN_SLAB = _MANY  # voxels; the differences of a whole scan would take gigabytes


@functools.partial(jax.jit, static_argnames="count")
def _departure_slab(steps, start, shape, *, count: int):
    """What fields add to the affine maps' product at voxels, 1 P 3; see `_map_slab`."""
    points = _voxels_of_slab(start, shape, count)
    departure = jnp.zeros_like(points)
    for step in steps:
        if isinstance(step, Affine):
            rotated = Affine(jnp.asarray(step.matrix).at[:3, 3].set(0.0))
            points, departure = step(points), rotated(departure)
        else:
            field = jnp.asarray(step.field)
            moved = sampling.sample(field, jnp.asarray(points), outside=step.outside)
            points, departure = points + moved, departure + moved
    return departure


def jacobian_map(transform: Transform, fixed: grid_lib.Grid) -> np.ndarray:
    """Returns ``det dT/dx`` in mm at the fixed voxels, D H W, float32.

    Central differences inside, one-sided ones at the border, in world coordinates:
    image direction and spacing are taken into account (the original ignores the
    direction and halves the border's differences). The affine maps' own part is exact,
    so that only what the fields add is rounded: a shift has the determinant 1 to 1e-6,
    however far from the origin the scans lie.
    """
    # From voxel to voxel of the fixed grid: the determinant is the same there.
    to_voxel = Affine(np.linalg.inv(fixed.voxel_to_mm))
    steps = _merge_affines((Affine(fixed.voxel_to_mm), *transform.steps, to_voxel))
    matrices = [np.asarray(s.matrix) for s in steps if isinstance(s, Affine)]
    linear = functools.reduce(lambda product, m: m @ product, matrices)[:3, :3]
    if not any(isinstance(step, Displacement) for step in steps):
        return np.full(fixed.shape, np.linalg.det(linear), np.float32)
    d, h, w = fixed.shape
    depth = max(1, _JACOBIAN_SLAB // (h * w) - 2)
    out = []
    for first in range(0, d, depth):  # with a slice more on either side
        below, above = min(first, 1), min(first + depth + 1, d)
        shape = (above - first + below, h, w)
        departure = _by_slabs(
            steps,
            shape,
            lambda found: found,
            program=_departure_slab,
            first_slice=first - below,
        )
        determinant = _determinant_of_slab(departure, linear)
        out.append(determinant[below : below + depth])
    return np.concatenate(out)


def _determinant_of_slab(departure: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """det of a linear map and the differences of a displacement D H W 3, in voxels."""
    a, b, c = (
        np.moveaxis(
            np.gradient(departure, axis=axis)
            if departure.shape[axis] > 1
            else np.zeros_like(departure),
            -1,
            0,
        )
        + linear[:, axis, None, None, None].astype(np.float32)
        for axis in range(3)
    )
    return (
        a[0] * (b[1] * c[2] - b[2] * c[1])
        + a[1] * (b[2] * c[0] - b[0] * c[2])
        + a[2] * (b[0] * c[1] - b[1] * c[0])
    )
