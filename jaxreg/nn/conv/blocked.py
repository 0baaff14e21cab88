"""Blocked convolution: matrix products over blocks of a volume, stride 1.

A block is some planes, or a strip of one plane, small enough that what is made of it
stays in cache. Taps along the first axes are gathered as channels before the product;
those along the other axes are columns of the product, shifted and added after it. For a
kernel of 3 x 3 x 3 that is 3 copies of the input and 9 of the output moved per voxel,
or 9 and 3, or 27 and 1: whichever is least.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.xla import scheduling

Parts = tuple[jax.Array, ...]
Margin = tuple[int, int, int]

SUM = jnp.float32  # the type of sums of products, of bfloat16 as well

_ROWS = 2048  # of a block at least, if the volume has them: amortises the kernel
_MOST_ROWS = 4096  # about: more leave the cache
_GATHERING = 2.5  # moving a number into columns, against adding one to a sum: measured
_FEW = 5  # inputs below which a tap is a whole row of a kernel, see `_taps_along_w`


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How planes and rows are cut; the last blocks end with the volume.

    Attributes:
      volume: planes, and rows of each.
      block: the same of a block.
    """

    volume: tuple[int, int]
    block: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks along either axis."""
        (d, h), (planes, rows) = self.volume, self.block
        return -(-d // planes), -(-h // rows)

    def own(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns where a block begins that does not overlap those before."""
        strips = self.counts[1]
        return index // strips * self.block[0], index % strips * self.block[1]

    def begin(self, index: jax.Array) -> list[jax.Array]:
        """Returns where a whole block begins."""
        last = (m - k for m, k in zip(self.volume, self.block, strict=True))
        return [jnp.minimum(*pair) for pair in zip(self.own(index), last, strict=True)]


def _cut(
    batch: int, depth: int, height: int, width: int, *, planewise: bool
) -> _Blocks:
    """Returns blocks of at least `_ROWS` voxels and about `_MOST_ROWS` at most.

    Those of single planes, if asked for, may be smaller.
    """
    area = batch * height * width
    slabs = depth if planewise else -(-depth // -(-_ROWS // area))
    strips = max(1, round(area / _MOST_ROWS))
    return _Blocks((depth, height), (-(-depth // slabs), -(-height // strips)))


def _gathered(
    xs: Parts,
    begin: Sequence[jax.Array],
    shifts: Sequence[Sequence[int]],
    sizes: Sequence[int],
) -> jax.Array:
    """Returns shifted windows of N D H W C beside each other as channels.

    Each is cut out of the volume: a window of a block would be moved number by number.
    """
    windows = []
    for shift in shifts:
        start = 0, *(b + a for b, a in zip(begin, shift, strict=False)), shift[2], 0
        for x in xs:
            size = len(x), *sizes, x.shape[-1]
            windows.append(lax.dynamic_slice(x, start, size))
    return jnp.concatenate(windows, -1)


def _window(
    x: jax.Array, start: Sequence[int], sizes: Sequence[int], channels: slice
) -> jax.Array:
    """Returns some channels of a window of N D H W C."""
    end = [a + m for a, m in zip(start, sizes, strict=True)]
    low, high = (0, *start, channels.start), (len(x), *end, channels.stop)
    return lax.slice(x, low, high)


def _shifts(taps: Sequence[int], split: int) -> tuple[list, list]:
    """Returns the shifts along the axes before `split` and along those after."""
    kinds = [*taps[:split], 1, 1, 1][:3], [1, 1, 1, *taps[split:]][-3:]
    before, after = (list(itertools.product(*map(range, k))) for k in kinds)
    return before, after


def result_shape(xs: Parts, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns N D H W of `convolved`."""
    n, *size, _ = xs[0].shape
    return n, *(m - k + 1 for m, k in zip(size, kernel_shape[:3], strict=True))


def has_few_inputs(kernel_shape: tuple[int, ...]) -> bool:
    """Whether a tap of a kernel kD kH kW I O is to be a whole row along W."""
    return kernel_shape[2] > 1 and kernel_shape[3] < _FEW


def _least(costs: Mapping[int, float]) -> int:
    return min(costs, key=costs.__getitem__)


def _taps_along_w(x: jax.Array, taps: int) -> jax.Array:
    """The neighbours along W as channels, N D H W-taps+1 taps*I.

    The taps of few inputs are single numbers: hundreds of them for a wide kernel, which
    takes XLA seconds to compile and long to gather; a row of them is one tap.
    """
    width = x.shape[3] - taps + 1
    return jnp.concatenate([x[:, :, :, c : c + width] for c in range(taps)], -1)


@jax.jit  # traced once for each shape, as the gradient below
def convolved(xs: Parts, kernel: jax.Array) -> jax.Array:
    """Convolution without padding: N D-kD+1 H-kH+1 W-kW+1 O.

    Args:
      xs: parts of the input along channels, N D H W I together.
      kernel: kD kH kW I O.
    """
    *taps, inputs, outputs = kernel.shape
    if has_few_inputs(kernel.shape):
        wide = _taps_along_w(jnp.concatenate(xs, -1), taps[2])
        return convolved((wide,), kernel.reshape(*taps[:2], 1, -1, outputs))
    shape = *result_shape(xs, kernel.shape), outputs
    y = scheduling.empty_after(shape, xs[0])  # all of it is written
    return convolved_into(y, xs, kernel[None])


def convolved_into(y: jax.Array, xs: Parts, kernels: jax.Array) -> jax.Array:
    """Returns `convolved`, written over an array of its shape.

    Args:
      y: anything, N D' H' W' O.
      xs: parts of the input along channels, N D H W I together.
      kernels: 1 kD kH kW I O; or D 1 kH kW I O, one for each plane.
    """
    count, *taps, inputs, outputs = kernels.shape
    split = _least(
        {
            g: _GATHERING * math.prod(taps[:g]) * inputs + math.prod(taps[g:]) * outputs
            for g in (1, 2, 3)
        }
    )
    before, after = _shifts(taps, split)
    matrices = jnp.moveaxis(kernels, 4, 1 + split)  # count taps-before I taps-after O
    # count before*I after*O
    matrices = matrices.reshape(count, len(before) * inputs, -1)
    n, depth, height, width, _ = y.shape
    blocks = _cut(n, depth, height, width, planewise=count > 1)
    result = *blocks.block, width
    reach = [m + k - 1 for m, k in zip(result, taps, strict=True)]
    sizes = [*result[:split], *reach[split:]]

    def one(y, index):
        begin = blocks.begin(index)
        columns = _gathered(xs, begin, before, sizes)
        product = jnp.matmul(
            columns, _of_plane(matrices, begin[0]), preferred_element_type=SUM
        )
        windows = [
            _window(product, shift, result, slice(tap * outputs, (tap + 1) * outputs))
            for tap, shift in enumerate(after)
        ]
        total = functools.reduce(jnp.add, windows).astype(y.dtype)
        return lax.dynamic_update_slice(y, total, (0, *begin, 0, 0)), None

    return lax.scan(one, y, jnp.arange(math.prod(blocks.counts)))[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def kernel_gradient(
    xs: Parts, dy: jax.Array, kernel_shape: tuple[int, ...], margin: Margin
) -> jax.Array:
    """Returns the gradient of `convolved` with respect to the kernel.

    Args:
      xs: as there.
      dy: of the result, with zeros around it, see `margin`.
      kernel_shape: kD kH kW I O.
      margin: how wide the outermost voxels of `xs` are known to be zero, per axis; at
        most the kernel's size less one, and what it is less than that is the width of
        the zeros around `dy`.
    """
    *taps, inputs, outputs = kernel_shape
    if has_few_inputs(kernel_shape):
        wide = _taps_along_w(jnp.concatenate(xs, -1), taps[2])
        around = taps[2] - 1 - margin[2]
        dy = dy[:, :, :, around : dy.shape[3] - around]
        shape = *taps[:2], 1, taps[2] * inputs, outputs
        margin = *margin[:2], 0
        return kernel_gradient((wide,), dy, shape, margin).reshape(kernel_shape)
    total = start_gradients(1, kernel_shape, dy)
    total = add_gradients(total, xs, dy, kernel_shape, margin)
    return as_kernels(total, kernel_shape)[0].astype(dy.dtype)


def _gradient_split(kernel_shape: tuple[int, ...]) -> int:
    """Returns the axis before which taps are gathered from x, and from dy after."""
    *taps, inputs, outputs = kernel_shape
    return _least(
        {
            g: math.prod(taps[:g]) * inputs + math.prod(taps[g:]) * outputs
            for g in (0, 1, 2, 3)
        }
    )


def start_gradients(
    count: int, kernel_shape: tuple[int, ...], like: jax.Array
) -> jax.Array:
    """Returns zeros for `add_gradients` to add to, of one kernel or one per plane."""
    *taps, inputs, outputs = kernel_shape
    split = _gradient_split(kernel_shape)
    widths = math.prod(taps[:split]) * inputs, math.prod(taps[split:]) * outputs
    # Products with the narrower factor turned are the faster ones.
    return scheduling.zeros((count, min(widths), max(widths)), like).astype(SUM)


def as_kernels(total: jax.Array, kernel_shape: tuple[int, ...]) -> jax.Array:
    """Returns what `add_gradients` added up as kernels, count kD kH kW I O."""
    *taps, inputs, outputs = kernel_shape
    split = _gradient_split(kernel_shape)
    if math.prod(taps[:split]) * inputs > math.prod(taps[split:]) * outputs:
        total = jnp.swapaxes(total, 1, 2)
    # count taps-before I taps-after O
    total = total.reshape(-1, *taps[:split], inputs, *taps[split:], outputs)
    return jnp.moveaxis(total, 1 + split, 4)


def add_gradients(
    total: jax.Array,
    xs: Parts,
    dy: jax.Array,
    kernel_shape: tuple[int, ...],
    margin: Margin,
) -> jax.Array:
    """Adds to gradients of kernels.

    Args:
      total: of `start_gradients`: of one kernel, or one for each plane if kD is 1.
      xs: see `kernel_gradient`.
      dy: see `kernel_gradient`.
      kernel_shape: kD kH kW I O.
      margin: see `kernel_gradient`.
    """
    taps = kernel_shape[:3]
    split = _gradient_split(kernel_shape)
    # Taps along the first axes are gathered from x for each voxel of the result, those
    # along the others from dy for each voxel of x within its margin.
    of_x, of_dy = _shifts(taps, split)
    n, *size, _ = xs[0].shape
    volume = [
        m - k + 1 if axis < split else m - 2 * zeros
        for axis, (m, k, zeros) in enumerate(zip(size, taps, margin, strict=True))
    ]
    blocks = _cut(n, volume[0], volume[1], volume[2], planewise=len(total) > 1)
    sizes = *blocks.block, volume[2]
    inner = [0 if axis < split else zeros for axis, zeros in enumerate(margin)]
    there = [[a + b for a, b in zip(inner, tap, strict=True)] for tap in of_x]
    # For x[q] and its tap a that is dy[q - a]. Both begin behind their zeros.
    behind = [
        k - 1 - (zeros if axis < split else 0)
        for axis, (k, zeros) in enumerate(zip(taps, margin, strict=True))
    ]
    back = [[k - a for k, a in zip(behind, tap, strict=True)] for tap in of_dy]
    whole = all(m % k == 0 for m, k in zip(blocks.volume, blocks.block, strict=True))

    def add(total, index):
        begin = blocks.begin(index)
        columns = _gathered(xs, begin, there, sizes)
        moved = _gathered((dy,), begin, back, sizes)
        if not whole:  # what an earlier block has counted
            for axis, (own, first) in enumerate(
                zip(blocks.own(index), begin, strict=True)
            ):
                position = lax.broadcasted_iota(jnp.int32, moved.shape, axis + 1)
                moved = jnp.where(position >= own - first, moved, 0)
        # voxels of_x*I, voxels of_dy*O
        columns, moved = (a.reshape(-1, a.shape[-1]) for a in (columns, moved))
        if columns.shape[1] > moved.shape[1]:
            columns, moved = moved, columns
        new = jnp.matmul(columns.T, moved, preferred_element_type=SUM)
        new = _of_plane(total, begin[0]) + new
        plane = begin[0] if len(total) > 1 else 0
        return lax.dynamic_update_index_in_dim(total, new, plane, 0), None

    return lax.scan(add, total, jnp.arange(math.prod(blocks.counts)))[0]


def _of_plane(matrices: jax.Array, plane: jax.Array) -> jax.Array:
    """Returns the one matrix there is, or a plane's own."""
    if len(matrices) == 1:
        return matrices[0]
    return lax.dynamic_index_in_dim(matrices, plane, keepdims=False)
