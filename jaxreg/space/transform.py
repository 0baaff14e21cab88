"""Transform: affine matrices and displacement fields, applied one after the other.

A transform maps points of the fixed image to points of the moving image, the direction
in which an image is resampled: ``warped[x] = moving[T(x)]``. A model's transform lives
in unit coordinates; `in_world` puts it between the two scans in mm.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.space import fields, sampling
from jaxreg.space import grid as grid_lib


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Affine:
    """Points p to ``matrix[:3, :3] @ p + matrix[:3, 3]``; the matrix is 4x4."""

    matrix: np.ndarray | jax.Array

    def __call__(self, points):
        """Maps points N ... 3 (or ... 3); NumPy float64 in, NumPy float64 out."""
        m = self.matrix
        # Written out: a matrix product would run in bfloat16 on TPU.
        return sum(points[..., i, None] * m[:3, i] for i in range(3)) + m[:3, 3]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["field"], meta_fields=["outside"]
)
@dataclasses.dataclass(frozen=True)
class Displacement:
    """Points x to ``x + field(x)`` in the field's own unit coordinates.

    Attributes:
      field: N D H W 3, unit.
      outside: see `sampling.Outside`.
    """

    field: jax.Array | np.ndarray
    outside: sampling.Outside = "edge"

    def __call__(self, points):
        """Maps points N ... 3."""
        if isinstance(points, np.ndarray):  # keep the affines around it in float64
            moved = sampling.sample(
                jnp.asarray(self.field),
                jnp.asarray(points, jnp.float32),
                outside=self.outside,
            )
            return points + np.asarray(moved, np.float64)
        return fields.evaluate(jnp.asarray(self.field), points, outside=self.outside)


Step = Affine | Displacement


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["steps"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Transform:
    """Steps in the order in which a point meets them: ``steps[0]`` acts first."""

    steps: tuple[Step, ...]

    def map_points(self, points):
        """Maps points N ... 3. NumPy float64 points keep their precision."""
        for step in self.steps:
            points = step(points)
        return points

    def on_grid(self, shape: grid_lib.Shape) -> jax.Array:
        """Maps the voxels of a grid: `map_points` of its identity, N D H W 3, unit.

        A field at regular points is added or resized, never sampled.
        """
        points = sampling.identity(shape)
        steps = self.steps
        if steps and isinstance(steps[0], Displacement) and steps[0].outside == "edge":
            field = jnp.asarray(steps[0].field)
            if field.shape[1:4] != tuple(shape):
                field = sampling.resize_aligned(field, shape)
            points, steps = points + field, steps[1:]
        return jnp.asarray(Transform(steps).map_points(points))

    def split(self, parts: int) -> tuple["Transform", ...]:
        """Returns the transforms of equal parts of the batch; affines are shared."""

        def part(step, index):
            if isinstance(step, Affine):
                return step
            return dataclasses.replace(
                step, field=jnp.split(jnp.asarray(step.field), parts)[index]
            )

        return tuple(
            Transform(tuple(part(step, index) for step in self.steps))
            for index in range(parts)
        )

    def then(self, other: "Transform") -> "Transform":
        """Returns the transform that applies `other` to this one's result."""
        return Transform(self.steps + other.steps)


def in_world(unit: Transform, fixed: grid_lib.Grid, moving: grid_lib.Grid) -> Transform:
    """Returns a transform from fixed mm to moving mm (RAS+).

    Args:
      unit: between the unit cubes of the two network grids.
      fixed: the fixed scan's network grid, in mm.
      moving: the moving scan's network grid, in mm.

    Displacement fields switch to the file's rule outside their grid ("half_voxel"):
    the edge value for half a voxel, no displacement beyond.
    """
    steps = tuple(
        dataclasses.replace(s, outside="half_voxel")
        if isinstance(s, Displacement)
        else s
        for s in unit.steps
    )
    return Transform(
        (
            Affine(np.linalg.inv(fixed.unit_to_mm)),
            *steps,
            Affine(moving.unit_to_mm),
        )
    )


def flatten(unit: Transform, shape: grid_lib.Shape) -> Transform:
    """Returns the same map as one displacement field on a grid of `shape`, unit."""
    return Transform((Displacement(unit.on_grid(shape) - sampling.identity(shape)),))


def _merge_affines(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    merged: list[Step] = []
    for step in steps:
        if isinstance(step, Affine) and merged and isinstance(merged[-1], Affine):
            before = merged.pop()
            assert isinstance(before, Affine)
            step = Affine(np.asarray(step.matrix) @ np.asarray(before.matrix))
        merged.append(step)
    return tuple(merged)


@jax.jit
def _map_slab(steps, first, slab):
    points = slab + jnp.asarray([1.0, 0.0, 0.0]) * first
    for step in steps:
        points = step(points)
    return points


@functools.partial(jax.jit, static_argnames="order")
def _read_slab(values, points, fill, *, order):
    # The scan is an argument: closed over, it would be a constant of the program.
    read = sampling.sample(values, points, order=order, outside="half_voxel", fill=fill)
    return read[..., 0]


def _by_slabs(steps, shape: grid_lib.Shape, function, voxels_per_slab=2**21):
    """Applies `function` to the mapped voxel indices of `shape`, slab by slab."""
    d, h, w = shape
    depth = max(1, min(d, voxels_per_slab // (h * w)))
    slab = jnp.stack(
        jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in (depth, h, w)),
                     indexing="ij"), -1)[None]  # fmt: skip
    out = []
    for first in range(0, d, depth):
        points = _map_slab(steps, float(first), slab)
        out.append(np.asarray(function(points)[0, : d - first]))
    return np.concatenate(out)


def warp_volume(
    moving: grid_lib.Volume,
    transform: Transform,
    fixed: grid_lib.Grid,
    *,
    order: Literal[0, 1] = 1,
    fill: float = 0.0,
) -> grid_lib.Volume:
    """Resamples a volume on the fixed grid, as ITK's resampler does.

    Args:
      moving: the volume to read, its array of any real type.
      transform: fixed mm to moving mm.
      fixed: the output grid.
      order: 1 linear, 0 nearest.
      fill: the value outside the moving volume (more than half a voxel).

    Returns:
      A volume of the fixed grid in the moving array's type; integers are rounded
      (the original truncates).
    """
    # From voxel to voxel: small numbers, so that float32 keeps 1e-4 of a voxel.
    voxel_to_unit = np.linalg.inv(moving.grid.unit_to_mm)
    steps = _merge_affines(
        (Affine(fixed.voxel_to_mm), *transform.steps, Affine(voxel_to_unit))
    )
    dtype = moving.array.dtype
    labels = order == 0 and not np.issubdtype(dtype, np.floating)
    # Label values beyond float32's integers (2^24) survive as indices of a table.
    table, values = (
        np.unique(moving.array, return_inverse=True) if labels else (None, moving.array)
    )
    values = jnp.asarray(values.reshape(moving.array.shape), jnp.float32)[
        None, ..., None
    ]

    def read(points):
        return _read_slab(values, points, -1.0 if labels else fill, order=order)

    array = _by_slabs(steps, fixed.shape, read)
    if table is not None:
        index = np.rint(array).astype(np.int64)
        array = np.where(
            index < 0, np.asarray(fill, dtype), table[np.maximum(index, 0)]
        )
    elif not np.issubdtype(dtype, np.floating):
        limits = np.iinfo(dtype)
        # float64 holds every 32-bit limit; a 64-bit one rounds up, out of the type.
        top = float(limits.max)
        top = top if int(top) <= limits.max else np.nextafter(top, 0.0)
        array = np.clip(np.rint(array).astype(np.float64), limits.min, top)
    return grid_lib.Volume(array.astype(dtype), fixed, moving.source)


def displacement_mm(transform: Transform, fixed: grid_lib.Grid) -> np.ndarray:
    """Returns ``T(x) - x`` at the fixed voxels, D H W 3, RAS+ mm, float32."""
    # In voxels of the fixed grid, where float32 is exact enough, and to mm at the end.
    to_voxel = Affine(np.linalg.inv(fixed.voxel_to_mm))
    steps = _merge_affines((Affine(fixed.voxel_to_mm), *transform.steps, to_voxel))
    mapped = _by_slabs(steps, fixed.shape, lambda points: points)
    voxels = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"), -1)
    return ((mapped - voxels) @ fixed.voxel_to_mm[:3, :3].T).astype(np.float32)


_JACOBIAN_SLAB = 2**20  # voxels; a whole scan in float64 would take gigabytes


def jacobian_map(transform: Transform, fixed: grid_lib.Grid) -> np.ndarray:
    """Returns ``det dT/dx`` in mm at the fixed voxels, D H W, float32.

    Central differences inside, one-sided ones at the border, in world coordinates:
    image direction and spacing are taken into account (the original ignores the
    direction and halves the border's differences).
    """
    displacement = displacement_mm(transform, fixed)
    d, h, w = fixed.shape
    depth = max(1, _JACOBIAN_SLAB // (h * w))
    out = []
    for first in range(0, d, depth):  # with a slice more on either side
        below, above = min(first, 1), min(first + depth + 1, d)
        slab = displacement[first - below : above].astype(np.float64)
        determinant = _jacobian_of_slab(slab, fixed.voxel_to_mm[:3, :3])
        out.append(determinant[below : below + depth].astype(np.float32))
    return np.concatenate(out)


def _jacobian_of_slab(displacement: np.ndarray, voxel_to_mm: np.ndarray) -> np.ndarray:
    """det dT/dx as the volume of the voxel's mapped axes over that of its own."""
    mapped = [
        voxel_to_mm[:, axis]
        + (
            np.gradient(displacement, axis=axis)
            if displacement.shape[axis] > 1
            else np.zeros_like(displacement)
        )
        for axis in range(3)
    ]
    volume = np.sum(np.cross(mapped[0], mapped[1]) * mapped[2], axis=-1)
    return volume / np.linalg.det(voxel_to_mm)
