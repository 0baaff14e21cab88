"""Stride-1 convolution without padding as matrix products over blocks of a volume.

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

from jaxreg import late

Parts = tuple[jax.Array, ...]

_ROWS = 2048  # of a block at least, if the volume has them: amortises the kernel
_MOST_ROWS = 4096  # about: more leave the cache
_GATHERING = 2.5  # moving a number into columns, against adding one to a sum: measured
_THIN = 5  # channels below which a tap is a whole row of a kernel, see `_taps_along_w`


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


def _cut(batch: int, depth: int, height: int, width: int) -> _Blocks:
    """Returns blocks of at least `_ROWS` voxels and about `_MOST_ROWS` at most."""
    area = batch * height * width
    slabs = -(-depth // -(-_ROWS // area))
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


def _window(x: jax.Array, start: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """Returns a window of N D H W C."""
    window = (slice(a, a + m) for a, m in zip(start, sizes, strict=True))
    return x[(slice(None), *window)]


def _shifts(taps: Sequence[int], split: int) -> tuple[list, list]:
    """Returns the shifts along the axes before `split` and along those after."""
    kinds = [*taps[:split], 1, 1, 1][:3], [1, 1, 1, *taps[split:]][-3:]
    before, after = (list(itertools.product(*map(range, k))) for k in kinds)
    return before, after


def _least(costs: Mapping[int, float]) -> int:
    return min(costs, key=costs.__getitem__)


def _taps_along_w(x: jax.Array, taps: int) -> jax.Array:
    """The neighbours along W as channels, N D H W-taps+1 taps*I.

    A thin input's taps are single numbers: hundreds of them for a wide kernel, which
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
    if taps[2] > 1 and inputs < _THIN:
        wide = _taps_along_w(jnp.concatenate(xs, -1), taps[2])
        return convolved((wide,), kernel.reshape(*taps[:2], 1, -1, outputs))
    split = _least(
        {
            g: _GATHERING * math.prod(taps[:g]) * inputs + math.prod(taps[g:]) * outputs
            for g in (1, 2, 3)
        }
    )
    before, after = _shifts(taps, split)
    matrix = jnp.moveaxis(kernel, 3, split).reshape(len(before) * inputs, -1)
    n, *size, _ = xs[0].shape
    depth, height, width = (m - k + 1 for m, k in zip(size, taps, strict=True))
    blocks = _cut(n, depth, height, width)
    result = *blocks.block, width
    reach = [m + k - 1 for m, k in zip(result, taps, strict=True)]
    rows = [*result[:split], *reach[split:]]

    def one(y, index):
        begin = blocks.begin(index)
        product = _gathered(xs, begin, before, rows) @ matrix
        windows = [
            _window(product[..., tap * outputs : (tap + 1) * outputs], shift, result)
            for tap, shift in enumerate(after)
        ]
        total = functools.reduce(jnp.add, windows)
        return lax.dynamic_update_slice(y, total, (0, *begin, 0, 0)), None

    y = late.filled((n, depth, height, width, outputs), xs[0])  # all of it is written
    return lax.scan(one, y, jnp.arange(math.prod(blocks.counts)))[0]


@functools.partial(jax.jit, static_argnums=2)
def kernel_gradient(
    xs: Parts, dy: jax.Array, kernel_shape: tuple[int, ...]
) -> jax.Array:
    """Returns the gradient of `convolved` with respect to the kernel.

    Args:
      xs: as there.
      dy: of the result, with a margin of the kernel's size less one: zeros.
      kernel_shape: kD kH kW I O.
    """
    *taps, inputs, outputs = kernel_shape
    if taps[2] > 1 and inputs < _THIN:
        wide = _taps_along_w(jnp.concatenate(xs, -1), taps[2])
        dy = dy[:, :, :, taps[2] - 1 : 1 - taps[2]]
        shape = *taps[:2], 1, taps[2] * inputs, outputs
        return kernel_gradient((wide,), dy, shape).reshape(kernel_shape)
    # Taps along the first axes are gathered from x for each voxel of the result, those
    # along the others from dy for each voxel of x.
    split = _least(
        {
            g: math.prod(taps[:g]) * inputs + math.prod(taps[g:]) * outputs
            for g in (0, 1, 2, 3)
        }
    )
    of_x, of_dy = _shifts(taps, split)
    n, *size, _ = xs[0].shape
    volume = [
        m - k + 1 if axis < split else m
        for axis, (m, k) in enumerate(zip(size, taps, strict=True))
    ]
    blocks = _cut(n, *volume)
    rows = *blocks.block, volume[2]
    # For x[q] and its tap a that is dy[q - a], which begins behind a margin of k - 1.
    back = [[k - 1 - a for k, a in zip(taps, shift, strict=True)] for shift in of_dy]
    whole = all(m % k == 0 for m, k in zip(blocks.volume, blocks.block, strict=True))

    def add(total, index):
        begin = blocks.begin(index)
        columns = _gathered(xs, begin, of_x, rows)
        moved = _gathered((dy,), begin, back, rows)
        if not whole:  # what an earlier block has counted
            for axis, (own, first) in enumerate(
                zip(blocks.own(index), begin, strict=True)
            ):
                position = lax.broadcasted_iota(jnp.int32, moved.shape, axis + 1)
                moved = jnp.where(position >= own - first, moved, 0)
        columns, moved = (a.reshape(-1, a.shape[-1]) for a in (columns, moved))
        return total + columns.T @ moved, None

    shape = len(of_x) * inputs, len(of_dy) * outputs
    count = jnp.arange(math.prod(blocks.counts))
    total, _ = lax.scan(add, late.zeros(shape, dy), count)
    total = total.reshape(*taps[:split], inputs, *taps[split:], outputs)
    return jnp.moveaxis(total, split, 3)
