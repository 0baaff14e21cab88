"""Transform: affine matrices and displacement fields, applied one after the other.

A transform maps points of the fixed image to points of the moving image, the direction
in which an image is resampled: ``warped[x] = moving[T(x)]``. A model's transform lives
in unit coordinates; `in_world` puts it between the two scans in mm.
"""

import dataclasses
import functools

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
        # Columns with the points' leading axes, as 1.
        columns = [
            self.matrix[(*[None] * (points.ndim - 1), slice(3), i)] for i in range(4)
        ]
        # Written out: a matrix product would run in bfloat16 on TPU.
        return sum(points[..., i, None] * columns[i] for i in range(3)) + columns[3]


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

    def seen_from(self, matrix: np.ndarray) -> "Transform":
        """Returns the same map in other coordinates, from which a 4x4 matrix leads."""
        enter, leave = Affine(matrix), Affine(np.linalg.inv(matrix))
        return Transform((enter, *self.steps, leave))

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
    the edge value for half a voxel, then no displacement.
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
    if _is_field(unit, shape):
        # As it is: adding the voxels' places and taking them off again would round it.
        return unit
    return _flatten(unit, shape)


def _is_field(unit: Transform, shape: grid_lib.Shape) -> bool:
    (step, *more) = unit.steps or (None,)
    return (
        isinstance(step, Displacement)
        and not more
        and step.outside == "edge"
        and step.field.shape[1:4] == tuple(shape)
    )


@functools.partial(jax.jit, static_argnames="shape")
def _flatten(unit: Transform, shape: grid_lib.Shape) -> Transform:
    return Transform((Displacement(unit.on_grid(shape) - sampling.identity(shape)),))


def linear_matrix(transform: Transform) -> np.ndarray:
    """Returns the 4x4 matrix of a transform of affine steps alone, float64.

    Raises:
      ValueError: a step is not affine.
    """
    matrix = np.eye(4)
    for step in transform.steps:
        if not isinstance(step, Affine):
            raise ValueError(f"the transform has a {type(step).__name__}, not affine")
        matrix = np.asarray(step.matrix, np.float64) @ matrix
    return matrix


def is_linear(transform: Transform) -> bool:
    """Whether all steps are affine."""
    return all(isinstance(step, Affine) for step in transform.steps)


def first_grid(transform: Transform) -> grid_lib.Grid | None:
    """Returns the grid of the first field among the transform's points; None without.

    Args:
      transform: from mm.
    """
    found = _first_field(transform)
    if found is None:
        return None
    return grid_lib.Grid(found[1], np.linalg.inv(found[0].matrix))


def last_grid(transform: Transform) -> grid_lib.Grid | None:
    """Returns the grid of the last field where the transform leads; None without.

    Args:
      transform: to mm.
    """
    matrix = np.eye(4)
    for step in reversed(transform.steps):
        if isinstance(step, Displacement):
            shape = tuple(step.field.shape[1:4])
            return grid_lib.Grid(
                shape, matrix @ np.linalg.inv(grid_lib.unit_to_voxel(shape))
            )
        matrix = matrix @ np.asarray(step.matrix, np.float64)
    return None


def count_beyond(transform: Transform, points_mm: np.ndarray) -> int:
    """Returns how many points the transform's first field does not reach.

    Args:
      transform: fixed mm to moving mm.
      points_mm: P 3, RAS+.
    """
    found = _first_field(transform)
    if found is None:
        return 0
    voxels = np.asarray(found[0](np.asarray(points_mm, np.float64)))
    inside = (voxels > -1) & (voxels < np.asarray(found[1]))
    return int((~inside.all(-1)).sum())


def beyond_percent(transform: Transform, grid: grid_lib.Grid) -> float:
    """Returns how much of a grid the transform's first field does not reach, 0 to 100.

    More than half a voxel outside its grid a field displaces nothing. Of a large grid
    up to 64 voxels along each axis are checked, evenly, the outermost among them.

    Args:
      transform: from the grid's mm, its fields with outside="half_voxel".
      grid: of a scan.
    """
    found = _first_field(transform)
    if found is None:
        return 0.0
    axes = [np.linspace(0, n - 1, min(n, _MOST_CHECKED)) for n in grid.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    voxels = np.asarray(found[0](Affine(grid.voxel_to_mm)(index)))
    edge = 0.5 + 1e-3  # a rounding of headers
    inside = (voxels >= -edge) & (voxels <= np.asarray(found[1]) - 1 + edge)
    return float(100 * (~inside.all(-1)).mean())


_MOST_CHECKED = 64


def _first_field(transform: Transform) -> tuple[Affine, grid_lib.Shape] | None:
    """Returns what leads to the voxels of the first field, and its shape, if any."""
    matrix = np.eye(4)
    for step in transform.steps:
        if isinstance(step, Displacement):
            shape = tuple(step.field.shape[1:4])
            return Affine(grid_lib.unit_to_voxel(shape) @ matrix), shape
        matrix = np.asarray(step.matrix, np.float64) @ matrix
    return None


def padded_to_unit(shape: grid_lib.Shape, padding: np.ndarray) -> np.ndarray:
    """Returns the 4x4 matrix from unit coordinates of a padded grid to the grid's own.

    Args:
      shape: of the grid.
      padding: voxels before and after each axis, (3, 2), see `Grid.padded`.
    """
    scale = grid_lib.unit_scale(shape)
    whole = grid_lib.unit_scale(tuple(np.asarray(shape) + padding.sum(1)))
    matrix = np.diag([*(whole / scale), 1.0])
    matrix[:3, 3] = -padding[:, 0] / scale
    return matrix


def padded(unit: Transform, shape: grid_lib.Shape, padding: np.ndarray) -> Transform:
    """Returns the same map as one field on a padded grid, in that one's unit.

    Outside its grid a field continues with the nearest voxel's displacement: a shift
    stays that shift, and the determinant stays above 0 wherever it is along the edge.

    Args:
      unit: in unit coordinates of the grid, its fields with outside="edge".
      shape: of the grid.
      padding: voxels before and after each axis, (3, 2), see `Grid.padding`.
    """
    if not padding.any():
        return flatten(unit, shape)
    leave = padded_to_unit(shape, padding)
    if _is_field(unit, shape):
        (step,) = unit.steps
        assert isinstance(step, Displacement)
        field = np.pad(np.asarray(step.field), [(0, 0), *padding, (0, 0)], "edge")
        scaled = field / np.diag(leave)[:3].astype(np.float32)
        return Transform((Displacement(jnp.asarray(scaled)),))
    whole = tuple(int(n) for n in np.asarray(shape) + padding.sum(1))
    return flatten(unit.seen_from(leave), whole)
