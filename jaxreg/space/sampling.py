"""Sampling at points (aligned corners) and resizing (half-pixel centres).

`sample` reads an array at unit coordinates: 0 and 1 are the *centres* of the corner
voxels. The resizers keep the *extent* instead: voxel edges coincide. Both come from the
original programs, whose weights learned the difference.
"""

import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

from jaxreg.space import grid as grid_lib
from jaxreg.space import windows
from jaxreg.typing import Image, Labels, Points
from jaxreg.xla import platforms, scheduling, splitting

Outside = Literal["edge", "zeros", "half_voxel"]
"""What lies outside the array.

edge: the nearest voxel of the array (PyTorch's "border").
zeros: 0 outside the grid, reached linearly within one voxel.
half_voxel: the nearest voxel up to half a voxel outside, else `fill` (ITK's rule).
"""
Form = Literal["auto", "map_coordinates", "window", "packed"]
"""How linear samples are computed.

map_coordinates: by `jax.scipy.ndimage.map_coordinates`; its gradients tap by tap.
window: with one gather or scatter of eight voxels a point, see `jaxreg.space.windows`.
packed: the same, of one row a point.
auto: map_coordinates on CPU, window on GPU; on TPU map_coordinates or packed, see
  `_packs`. Nearest samples, and those of whole numbers, are map_coordinates'
  everywhere.
"""


def identity(shape: grid_lib.Shape, dtype=jnp.float32) -> jax.Array:
    """Returns the unit coordinates of an array's voxels, 1 D H W 3."""
    scale = grid_lib.unit_scale(shape)
    axes = [
        jnp.arange(n, dtype=dtype) / jnp.asarray(s, dtype)
        for n, s in zip(shape, scale, strict=True)
    ]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)[None]


def sample(
    values: Image,
    points: Points,
    *,
    order: Literal[0, 1] = 1,
    outside: Outside = "edge",
    fill: float = 0.0,
    form: Form = "auto",
) -> jax.Array:
    """Returns the values at unit coordinates, N ... C, by `map_coordinates`.

    Args:
      values: N D H W C, or 1 D H W C to be read at every batch element's points.
      points: N ... 3 in unit coordinates of `values`, or 1 ... 3 for all of the batch.
      order: 1 linear, 0 nearest.
      outside: see `Outside`.
      fill: the value more than half a voxel outside, for "half_voxel" only.
      form: see `Form`; the numbers are the same but for rounding.

    The gradient with respect to `points` is zero where a clamped coordinate lies at or
    outside the corner voxel's centre, as in PyTorch's border sampling. Nearest sampling
    has no gradient.
    """
    scale = grid_lib.unit_scale(values.shape[1:4])
    scale = jnp.asarray(scale, points.dtype)
    index = points * jnp.expand_dims(scale, tuple(range(points.ndim - 1)))
    return sample_voxels(
        values, index, order=order, outside=outside, fill=fill, form=form
    )


def sample_voxels(
    values: Image,
    index: jax.Array,
    *,
    order: Literal[0, 1] = 1,
    outside: Outside = "edge",
    fill: float = 0.0,
    form: Form = "auto",
) -> jax.Array:
    """Returns the values at voxel indices, N ... C: `sample` in voxels.

    Of the values' type; sums, those of the gradient too, are in that of the indices
    where it is wider.

    Args:
      values: N D H W C, or 1 D H W C to be read at every batch element's points.
      index: N ... 3, voxels of `values`, or 1 ... 3 for all of the batch.
      order: 1 linear, 0 nearest.
      outside: see `Outside`.
      fill: the value more than half a voxel outside, for "half_voxel" only.
      form: see `Form`.
    """
    values = jnp.asarray(values)
    # The first axis of points may be split over devices.
    length = index.shape[1] if index.ndim > 2 else 1
    rows = index.reshape(len(index), length, -1, 3)
    batch = max(values.shape[0], index.shape[0])
    if not jnp.issubdtype(values.dtype, jnp.floating):
        form = "map_coordinates"  # which rounds
    if order == 0:
        result: Any = _sampled(
            values,
            rows,
            order=0,
            zeros=outside == "zeros",
            form="map_coordinates",
        )
    else:
        result = _linear(values, rows, outside == "zeros", form)
    result = result.reshape(batch, *index.shape[1:-1], values.shape[-1])
    if outside == "half_voxel":
        last = jnp.asarray(np.asarray(values.shape[1:4]) - 1, index.dtype)
        last = jnp.expand_dims(last, tuple(range(index.ndim - 1)))
        inside = jnp.all((index >= -0.5) & (index <= last + 0.5), -1, keepdims=True)
        result = jnp.where(inside, result, jnp.asarray(fill, result.dtype))
    return result


# --- linear sampling of N D H W C at voxel indices N P 3, with its derivative --------
#
# XLA's CPU backend fuses a sampler into everything that reads it and computes it again
# for every reader; composed samplers multiply. A loop over chunks of points is a
# boundary that fusion does not cross. Automatic differentiation would scatter each of
# the eight taps of each channel on its own; here the points' gradient only gathers.

_CHUNK = 2**15
_UNROLLED = 16  # channels gathered one by one on CPU; more would swell the program
# On TPU a row of up to 16 channels' windows may take the memory of 128 numbers, for
# each voxel of the values.
_PACKED_CHANNELS = 16
_PACKED_VOXELS = 2**20
_SMALL = 2**18  # voxels, see `_packs`


def _over_batch(function, *arrays, loop: bool):
    """Applies `function` per batch element; an array of batch 1 serves them all."""
    batch = max(a.shape[0] for a in arrays)
    if batch == 1:
        return function(*(a[0] for a in arrays))[None]
    own = [a.shape[0] == batch for a in arrays]
    shared = [a if o else a[0] for a, o in zip(arrays, own, strict=True)]
    if not loop:
        return jax.vmap(function, in_axes=[0 if o else None for o in own])(*shared)

    def one(n):
        return function(*(a[n] if o else a for a, o in zip(shared, own, strict=True)))

    return scheduling.mapped(one, jnp.arange(batch), like=arrays[0])


def _by_form(form: Form, looped, whole, windowed, values, *per_point):
    """Applies the function of (values, *per_point) that computes a form.

    Args:
      form: see `Form`.
      looped: what stands for "map_coordinates" on CPU.
      whole: and elsewhere.
      windowed: a function of one batch element, with the keyword `fetch`, see
        `jaxreg.space.windows`.
      values: N D H W C.
      *per_point: N P K each, the indices; of a gradient also that of the samples.
    """

    def fetched(fetch: windows.Fetch):
        function = functools.partial(windowed, fetch=fetch)
        # Rows of a whole batch at once take a batch's memory, and more than its time.
        return lambda *a: _over_batch(function, *a, loop=fetch == "packed")

    if form == "window" or form == "packed":
        return fetched(form)(values, *per_point)
    args = values, *per_point
    if form == "map_coordinates":
        return platforms.dependent(*args, cpu=looped, default=whole)
    packs = _packs(values, per_point[0], gradient=len(per_point) > 1)
    return platforms.dependent(
        *args,
        cpu=looped,
        tpu=fetched("packed") if packs else whole,
        default=fetched("window"),
    )


def _packs(values: jax.Array, index: jax.Array, *, gradient: bool) -> bool:
    """Returns whether rows of packed windows pay on TPU, by its compiler's estimates.

    Packing touches every voxel. A forward pass that reads as few points as there are
    voxels saves less, unless the values are few: then XLA keeps a row of 128 numbers
    for each point.
    """
    voxels, points = math.prod(values.shape[1:4]), index.shape[1]
    if voxels > _PACKED_VOXELS or values.shape[4] > _PACKED_CHANNELS:
        return False
    if gradient:
        return voxels <= 8 * points
    return 2 * voxels <= points or (values.shape[4] > 1 and voxels <= _SMALL)


def _per_point(function, windowed, form: Form, values, *per_point, cpu=None):
    """Applies ``function(values, *per_point)``, in chunks of points on CPU.

    With `cpu`, that is the function there; for other forms see `_by_form`.
    """
    on_cpu = cpu or function

    def chunked(values, *arrays):
        count = arrays[0].shape[0]
        if count <= _CHUNK:
            return on_cpu(values, *arrays)
        chunks = windows.in_parts(_CHUNK, *arrays)
        out = scheduling.mapped(lambda c: on_cpu(values, *c), chunks, like=arrays[0])
        return out.reshape(-1, out.shape[-1])[:count]

    return _by_form(
        form,
        lambda *a: _over_batch(chunked, *a, loop=True),
        lambda *a: _over_batch(function, *a, loop=False),
        windowed,
        values,
        *per_point,
    )


def _clamp(index: jax.Array, shape) -> jax.Array:
    """Clamps P 3 voxel indices to an array of shape D H W C."""
    last = jnp.asarray(np.asarray(shape[:3]) - 1, index.dtype)
    return jnp.clip(index, 0.0, last[None])


# Jitted, as the gradients below: a network samples arrays of the same few shapes many
# times, and each is traced and lowered once.
@functools.partial(jax.jit, static_argnames=("order", "zeros", "form"))
def _read(values: jax.Array, index: jax.Array, *, order: int, zeros: bool, form: Form):
    """N D H W C at N P 3 voxel indices: N P C."""
    mode = "constant" if zeros else "nearest"

    def read(values, at):
        at = at if zeros else _clamp(at, values.shape)
        coordinates = [at[:, axis] for axis in range(3)]
        return jax.vmap(
            lambda v: ndimage.map_coordinates(v, coordinates, order=order, mode=mode),
            in_axes=-1,
            out_axes=-1,
        )(values)

    windowed = functools.partial(windows.read, zeros=zeros)
    return _per_point(read, windowed, form, values, index)


def _flat(function, **settings):
    """Returns a function of arrays N P K as one of rows of points, N R P K."""

    def of_rows(values, *rows):
        flat = (a.reshape(len(a), -1, a.shape[-1]) for a in rows)
        return function(values, *flat, **settings)

    return of_rows


def _sampled(values: jax.Array, rows: jax.Array, **settings):
    """N D H W C at N R P 3 voxel indices: N R P C."""

    def read(values, rows):
        found = _flat(_read, **settings)(values, rows)
        return found.reshape(len(found), *rows.shape[1:-1], -1)

    return splitting.sampled(read, values, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(values: jax.Array, rows: jax.Array, zeros: bool, form: Form):  # noqa: FBT001
    return _sampled(values, rows, order=1, zeros=zeros, form=form)


def _linear_forward(values, rows, zeros, form):
    return _linear(values, rows, zeros, form), (values, rows)


_OFFSETS = np.array(list(np.ndindex(2, 2, 2)), np.int32)  # low and high corners


def _cell(index: jax.Array, shape, *, zeros: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the low corner of P 3 indices, integers, and the fraction above it."""
    last = np.asarray(shape[:3]) - 1
    at = index if zeros else _clamp(index, shape)
    low = jnp.floor(at)
    if not zeros:
        low = jnp.minimum(low, jnp.asarray(np.maximum(last - 1, 0), at.dtype)[None])
    return low.astype(jnp.int32), at - low


def _corner(low: jax.Array, offset, shape, *, zeros: bool):
    """Returns a corner's flat voxel index, P, and whether it lies in the array.

    True for all of them if not `zeros`: the fraction above the low corner is 0 where
    there is no high one.
    """
    corner = low + offset[None]
    bounded = jnp.clip(corner, 0, (np.asarray(shape[:3]) - 1)[None])
    inside = jnp.all(bounded == corner, axis=-1) if zeros else True
    d, h, w = bounded[:, 0], bounded[:, 1], bounded[:, 2]
    return (d * shape[1] + h) * shape[2] + w, inside


def _taken(taps: jax.Array, at: jax.Array) -> jax.Array:
    """Returns rows of P ... at indices that are in bounds."""
    rows = jax.lax.GatherDimensionNumbers(tuple(range(1, taps.ndim)), (0,), (0,))
    sizes = 1, *taps.shape[1:]
    return jax.lax.gather(taps, at[:, None], rows, sizes, mode="promise_in_bounds")


@functools.partial(jax.jit, static_argnames=("zeros", "form"))
def _index_gradient(values, index, dy, *, zeros: bool, form: Form):
    """The gradient with respect to the indices: N P 3, by gathering."""

    def by_rows(values, corners, dy):
        taps = values.reshape(-1, values.shape[-1])
        return [jnp.sum(_taken(taps, at) * dy, axis=-1) for at in corners]

    # XLA's CPU backend would gather anew for each of the three slopes: a stacked array
    # behind a barrier is computed once.
    def by_channels(values, corners, dy):
        if values.shape[-1] > _UNROLLED:
            return by_rows(values, corners, dy)
        channels = [values[..., c].reshape(-1) for c in range(values.shape[-1])]
        gradients = [dy[:, c] for c in range(values.shape[-1])]
        along = [
            sum(
                _taken(taps, at) * g
                for taps, g in zip(channels, gradients, strict=True)
            )
            for at in corners
        ]
        stacked = jax.lax.optimization_barrier(jnp.stack(along, axis=-1))
        return [stacked[:, i] for i in range(len(corners))]

    def gradient(products, values, at, dy):
        low, fraction = _cell(at, values.shape, zeros=zeros)
        corners = [_corner(low, o, values.shape, zeros=zeros) for o in _OFFSETS]
        fractions = [fraction[:, axis] for axis in range(3)]
        weights = [(1.0 - w, w) for w in fractions]
        # Of the four corners of a face across an axis.
        faces = [
            {
                (i, j): weights[a][i] * weights[b][j]
                for i, j in itertools.product((0, 1), repeat=2)
            }
            for a, b in ((1, 2), (0, 2), (0, 1))
        ]
        slopes = [jnp.zeros_like(at[:, 0])] * 3
        taps = products(values, [flat for flat, _ in corners], dy)
        for offset, tap, (_, inside) in zip(_OFFSETS, taps, corners, strict=True):
            along = jnp.where(inside, tap, 0.0) if zeros else tap
            for axis in range(3):
                signed = along if offset[axis] else -along
                face = tuple(np.delete(offset, axis))
                slopes[axis] += signed * faces[axis][face]
        slope = jnp.stack(slopes, axis=-1)
        if zeros:
            return slope
        # PyTorch's border rule; clip alone would pass half the gradient at a tie.
        last = jnp.asarray(np.asarray(values.shape[:3]) - 1, at.dtype)
        return jnp.where((at > 0) & (at < last[None]), slope, 0.0)

    return _per_point(
        functools.partial(gradient, by_rows),
        functools.partial(windows.index_gradient, zeros=zeros),
        form,
        values,
        index,
        dy,
        cpu=functools.partial(gradient, by_channels),
    )


@functools.partial(jax.jit, static_argnames=("zeros", "form"))
def _values_gradient(values, index, dy, *, zeros: bool, form: Form):
    """The gradient with respect to the values: N D H W C, by scattering."""
    shape = values.shape[1:]

    def empty():
        return scheduling.zeros((math.prod(shape[:3]), shape[3]), dy)

    def added(total, points, unroll=1):
        at, dy = points
        low, fraction = _cell(at, shape, zeros=zeros)

        def add(total, offset):
            flat, inside = _corner(low, offset, shape, zeros=zeros)
            along = jnp.where(offset == 1, fraction, 1.0 - fraction)
            weight = along[:, 0] * along[:, 1] * along[:, 2]
            weight = jnp.where(inside, weight, 0.0) if zeros else weight
            scaled = weight[:, None] * dy
            return total.at[flat].add(scaled, mode="promise_in_bounds"), None

        return jax.lax.scan(add, total, _OFFSETS, unroll=unroll)

    # A loop over the corners on CPU: eight scatters are eight programs to compile.
    def chunked(index, dy):
        total, _ = jax.lax.scan(added, empty(), windows.in_parts(_CHUNK, index, dy))
        return total.reshape(shape)

    def whole(index, dy):
        total, _ = added(empty(), (index, dy), unroll=len(_OFFSETS))
        return total.reshape(shape)

    total = _by_form(
        form,
        lambda _, *a: _over_batch(chunked, *a, loop=True),
        lambda _, *a: _over_batch(whole, *a, loop=False),
        functools.partial(windows.values_gradient, zeros=zeros),
        values,
        index,
        dy,
    )
    return _like(total, values)


def _like(gradient, array):
    """Sums a gradient over the batch that shared one element."""
    if gradient.shape[0] != array.shape[0]:
        return gradient.sum(0, keepdims=True)
    return gradient


def _linear_backward(zeros, form, saved, dy):
    # Two loops, so that the one whose gradient is unused is removed.
    values, rows = saved
    # The sums of bfloat16 values are float32, as `map_coordinates` has them.
    dy = dy.astype(jnp.promote_types(dy.dtype, rows.dtype))

    def index_gradient(values, rows, dy):
        slopes = _flat(_index_gradient, zeros=zeros, form=form)(values, rows, dy)
        return _like(slopes.reshape(len(slopes), *rows.shape[1:]), rows)

    of_values = _flat(_values_gradient, zeros=zeros, form=form)
    return (
        splitting.sampled(of_values, values, rows, dy, gives="values").astype(
            values.dtype
        ),
        splitting.sampled(index_gradient, values, rows, dy, gives="rows"),
    )


_linear.defvjp(_linear_forward, _linear_backward)


# --- resizing ------------------------------------------------------------------------


def _linear_matrix(n: int, position: np.ndarray) -> np.ndarray:
    """Returns (len(position), n) weights of linear sampling at clamped positions."""
    position = np.clip(position, 0.0, n - 1.0)
    low = np.clip(np.floor(position).astype(int), 0, max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    weight = position - low
    matrix = np.zeros((len(position), n))
    rows = np.arange(len(position))
    np.add.at(matrix, (rows, low), 1.0 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def _apply_matrices(image: Image, matrices: list[np.ndarray]) -> Image:
    image = splitting.turned(image, 1, 2)  # it may be split along D
    for matrix, spec in zip(
        matrices, ("ad,ndhwc->nahwc", "ah,ndhwc->ndawc", "aw,ndhwc->ndhac"), strict=True
    ):
        image = jnp.einsum(
            spec,
            jnp.asarray(matrix, image.dtype),
            image,
            precision=jax.lax.Precision.HIGHEST,
        )
        if spec.startswith("ad"):
            image = splitting.turned(image, 2, 1)
    return image


def resize_half_pixel(image: Image, shape: grid_lib.Shape) -> Image:
    """Trilinear resize to `shape` with half-pixel centres and no antialiasing.

    Equals ``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)``.
    """
    matrices = [
        _linear_matrix(n, (np.arange(m) + 0.5) * n / m - 0.5)
        for n, m in zip(image.shape[1:4], shape, strict=True)
    ]
    return _apply_matrices(image, matrices)


def resize_aligned(image: Image, shape: grid_lib.Shape) -> Image:
    """Trilinear resize to `shape` with aligned corner centres.

    Equals ``sample(image, identity(shape))``; separable, so cheap to differentiate.
    """
    matrices = [
        _linear_matrix(n, np.linspace(0.0, n - 1.0, m))
        for n, m in zip(image.shape[1:4], shape, strict=True)
    ]
    return _apply_matrices(image, matrices)


def resize_nearest_floor(labels: Labels, shape: grid_lib.Shape) -> Labels:
    """Nearest resize with source index ``floor(i * n_in / n_out)``.

    Equals ``torch.nn.functional.interpolate(mode="nearest")``: up to half a voxel off
    `resize_half_pixel`, as the original program's masks and segmentations are.
    """
    for axis, (n, m) in enumerate(zip(labels.shape[1:4], shape, strict=True)):
        # float32, as PyTorch computes it: floor(i * scale) differs in rare last bits.
        source = np.floor(np.arange(m, dtype=np.float32) * np.float32(n / m))
        index = np.minimum(source.astype(np.int64), n - 1)
        labels = jnp.take(labels, jnp.asarray(index), axis=axis + 1)
    return labels
