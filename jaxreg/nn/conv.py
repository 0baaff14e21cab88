"""3D convolutions, pooling and upsampling, with the form that is fast per platform.

Arrays are N D H W C, kernels kD kH kW I O. Everything reduces to one primitive, a
stride-1 convolution without padding (`_valid`); strides move into channels by
space-to-depth, transposed strides by depth-to-space. The primitive has two forms:

* "native": XLA's own convolution. Fast on GPU and TPU.
* "slab": per slab of planes, one matrix product over gathered taps, inside a
  `lax.map`. On XLA's CPU backend 2 to 100 times faster than the native form, whose
  small-channel kernels and gradients fall back to naive loops; the loop boundary also
  keeps the gathered taps (27 copies of the input) out of memory.

"auto" picks by platform when the program is compiled. Both forms have the same custom
derivative: the input gradient is again a convolution, the kernel gradient a matrix
product, and neither scatters. Where "slab" would be taken and a strided layer's kernel
outweighs its volume, `jaxreg.nn.deep` leaves the kernel in place.

An input may be given in parts: ``conv((a, b), kernel)`` is the convolution of their
concatenation along channels, which is never built.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreg import late
from jaxreg.nn import deep, thin
from jaxreg.typing import Image

Form = Literal["auto", "native", "slab"]
Parts = tuple[jax.Array, ...]

_ROWS = 2048  # rows of a slab's matrix product: enough to amortise reading the kernel
_THIN = 5  # channels below which a tap is a whole row of a kernel, see `_taps_along_w`


# --- the primitive: stride 1, no padding ---------------------------------------------


def _native(xs: Parts, ws: Parts) -> jax.Array:
    return sum(
        lax.conv_general_dilated(
            x, w, (1, 1, 1), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        for x, w in zip(xs, ws, strict=True)
    )  # pyright: ignore[reportReturnType]


def _planes(xs: Parts, taps: int) -> tuple[int, int, int]:
    """Returns (planes per slab, slabs, output planes) for a kernel of `taps`."""
    depth = xs[0].shape[1] - taps + 1
    area = xs[0].shape[0] * xs[0].shape[2] * xs[0].shape[3]
    planes = min(depth, max(1, -(-_ROWS // area)))
    return planes, -(-depth // planes), depth


def _pad_end(x: jax.Array, planes: int) -> jax.Array:
    """Appends zero planes so that the last slab is whole."""
    if planes == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, planes), (0, 0), (0, 0), (0, 0)))


def _columns(slab: jax.Array, kernel_shape, *, along_w: bool = True) -> list[jax.Array]:
    """Returns the taps of a slab, each N planes H' W' I (W whole if not along_w)."""
    kd, kh, kw = kernel_shape
    d, h, w = (n - k + 1 for n, k in zip(slab.shape[1:4], (kd, kh, kw), strict=True))
    return [
        slab[:, a : a + d, b : b + h, c : c + w]
        if along_w
        else slab[:, a : a + d, b : b + h]
        for a in range(kd)
        for b in range(kh)
        for c in (range(kw) if along_w else (0,))
    ]


def _taps_along_w(x: jax.Array, taps: int) -> jax.Array:
    """The neighbours along W as channels, N D H W-taps+1 taps*I.

    A thin input's taps are single numbers: hundreds of them for a wide kernel, which
    takes XLA seconds to compile and long to gather; a row of them is one tap.
    """
    width = x.shape[3] - taps + 1
    return jnp.concatenate([x[:, :, :, c : c + width] for c in range(taps)], -1)


@jax.jit  # traced once for each shape, as the gradient below
def _slab(xs: Parts, ws: Parts) -> jax.Array:
    """The primitive as one matrix product per slab of planes."""
    kd, kh, kw = ws[0].shape[:3]
    out = ws[0].shape[-1]
    planes, slabs, depth = _planes(xs, kd)
    n, _, height, width, _ = xs[0].shape
    height, width = height - kh + 1, width - kw + 1
    # Taps along two axes gathered, those along the third added after the product:
    # 9 copies of the inputs and 3 of the outputs instead of 27 of the inputs.
    channels = sum(x.shape[-1] for x in xs)
    after = out < 3 * channels
    if not after and kw > 1 and channels < _THIN:
        wide = tuple(_taps_along_w(x, kw) for x in xs)
        return _slab(wide, tuple(w.reshape(kd, kh, 1, -1, out) for w in ws))
    if after:
        # rows (kd kh I), columns (kw O)
        ws = tuple(jnp.moveaxis(w, 2, 3).reshape(-1, kw * out) for w in ws)
    matrix = jnp.concatenate([w.reshape(-1, w.shape[-1]) for w in ws])

    def one(y, index):
        # The last slab ends with the volume, and so overlaps the one before.
        first = jnp.minimum(index * planes, depth - planes)
        taps = []
        for x in xs:
            slab = lax.dynamic_slice_in_dim(x, first, planes + kd - 1, axis=1)
            taps += _columns(slab, (kd, kh, kw), along_w=not after)
        rows = jnp.concatenate(taps, -1) @ matrix
        if after:
            rows = sum(
                rows[:, :, :, c : c + width, c * out : (c + 1) * out] for c in range(kw)
            )
        return lax.dynamic_update_slice_in_dim(y, rows, first, axis=1), None

    y = late.filled((n, depth, height, width, out), xs[0])  # all of it is written
    return lax.scan(one, y, jnp.arange(slabs))[0]


@functools.partial(jax.jit, static_argnums=2)
def _kernel_gradient(x: jax.Array, dy: jax.Array, kernel_shape) -> jax.Array:
    """Returns the gradient of `_valid` with respect to one kernel, slab by slab."""
    kd, kh, kw, i, o = kernel_shape
    planes, slabs, depth = _planes((x,), kd)
    extra = planes * slabs - depth
    if o < i:
        # Gather the taps of the thinner array: dw[t] = sum_q x[q] dy[q - t].
        margin = ((0, 0), (kd - 1,) * 2, (kh - 1,) * 2, (kw - 1,) * 2, (0, 0))
        swapped = _kernel_gradient(jnp.pad(dy, margin), x, (kd, kh, kw, o, i))
        return jnp.swapaxes(jnp.flip(swapped, (0, 1, 2)), 3, 4)
    if kw > 1 and i < _THIN:
        wide = _taps_along_w(x, kw)
        return _kernel_gradient(wide, dy, (kd, kh, 1, kw * i, o)).reshape(kernel_shape)
    x, dy = _pad_end(x, extra), _pad_end(dy, extra)

    # All taps of x, or those along two axes and dy's along the third (for 3 x 3 x 3: 9
    # copies of x and 3 of dy), whichever is less.
    whole = kd * kh * kw * i <= kd * kh * i + kw * o

    def add(total, first):
        slab = lax.dynamic_slice_in_dim(x, first, planes + kd - 1, axis=1)
        columns = jnp.concatenate(_columns(slab, (kd, kh, kw), along_w=whole), -1)
        rows = lax.dynamic_slice_in_dim(dy, first, planes, axis=1)
        if not whole:
            rows = jnp.concatenate(
                [_pad(rows, (0, 0), (0, 0), (c, kw - 1 - c)) for c in range(kw)], -1
            )
        columns, rows = (a.reshape(-1, a.shape[-1]) for a in (columns, rows))
        return total + columns.T @ rows, None

    size = (kd * kh * kw * i, o) if whole else (kd * kh * i, kw * o)
    total, _ = lax.scan(add, late.zeros(size, dy), jnp.arange(slabs) * planes)
    if whole:
        return total.reshape(kernel_shape)
    return jnp.moveaxis(total.reshape(kd, kh, i, kw, o), 3, 2)


def _by_platform(form: Form, slab, native, *args):
    if form == "slab":
        return slab(*args)
    if form == "native":
        return native(*args)
    return lax.platform_dependent(*args, cpu=slab, default=native)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _valid(xs: Parts, ws: Parts, form: Form) -> jax.Array:
    """Returns sum_i conv(xs[i], ws[i]) with stride 1 and no padding."""
    return _by_platform(form, _slab, _native, xs, ws)


def _valid_forward(xs, ws, form):
    return _valid(xs, ws, form), (xs, ws)


def _valid_backward(form, saved, dy):
    xs, ws = saved
    kd, kh, kw = ws[0].shape[:3]
    margin = ((0, 0), (kd - 1,) * 2, (kh - 1,) * 2, (kw - 1,) * 2, (0, 0))
    # N D H W I of all parts in one product; the parts share dy's taps.
    turned = jnp.concatenate(
        [jnp.swapaxes(jnp.flip(w, (0, 1, 2)), 3, 4) for w in ws], axis=-1
    )

    def slab(xs, ws, dy):
        dx = _slab((jnp.pad(dy, margin),), (turned,))
        dws = tuple(
            _kernel_gradient(x, dy, w.shape) for x, w in zip(xs, ws, strict=True)
        )
        edges = [0]
        for x in xs:
            edges.append(edges[-1] + x.shape[-1])
        dxs = tuple(dx[..., a:b] for a, b in zip(edges[:-1], edges[1:], strict=True))
        return dxs, dws

    def native(xs, ws, dy):
        return jax.vjp(_native, xs, ws)[1](dy)

    return _by_platform(form, slab, native, xs, ws, dy)


_valid.defvjp(_valid_forward, _valid_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _own_or(
    own, native, form: Form, x: jax.Array | Parts, kernel: jax.Array
) -> jax.Array:
    """Returns one of two functions of (x, kernel), differentiating only that one."""
    return _by_platform(form, own, native, x, kernel)


def _own_or_forward(own, native, form, x, kernel):
    return _by_platform(form, own, native, x, kernel), (x, kernel)


def _own_or_backward(own, native, form, saved, dy):
    def gradient(function):
        return lambda x, kernel, dy: jax.vjp(function, x, kernel)[1](dy)

    return _by_platform(form, gradient(own), gradient(native), *saved, dy)


_own_or.defvjp(_own_or_forward, _own_or_backward)


# --- layers -------------------------------------------------------------------------


def _whole(x: jax.Array | Parts) -> jax.Array:
    return jnp.concatenate(x, -1) if isinstance(x, tuple) else x


def _parts(x: jax.Array | Parts, kernel: jax.Array) -> tuple[Parts, Parts]:
    """Splits the kernel's input channels as the input is split."""
    xs = x if isinstance(x, tuple) else (x,)
    ws, first = [], 0
    for part in xs:
        ws.append(kernel[..., first : first + part.shape[-1], :])
        first += part.shape[-1]
    if first != kernel.shape[-2]:
        raise ValueError(
            f"the input has {first} channels, the kernel expects {kernel.shape[-2]}"
        )
    return xs, tuple(ws)


def _pad(x: jax.Array, *widths: tuple[int, int], mode: str = "constant") -> jax.Array:
    if not any(map(any, widths)):  # JAX would add nothing, and zeros in the gradient
        return x
    return jnp.pad(x, ((0, 0), *widths, (0, 0)), mode=mode)


def space_to_depth(x: Image) -> Image:
    """N 2D 2H 2W C to N D H W 8C, channels ordered (2, 2, 2, C)."""
    n, d, h, w, c = x.shape
    x = x.reshape(n, d // 2, 2, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(n, d // 2, h // 2, w // 2, 8 * c)


def depth_to_space(x: Image) -> Image:
    """N D H W 8C to N 2D 2H 2W C: the inverse of `space_to_depth`."""
    n, d, h, w, c = x.shape
    x = x.reshape(n, d, h, w, 2, 2, 2, c // 8)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, 2 * d, 2 * h, 2 * w, c // 8)


def conv1(x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"):
    """1x1x1 convolution: N D H W O.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 1 1 1 I O.
      bias: O.
      form: see the module's docstring.
    """
    return cast(jax.Array, _valid(*_parts(x, kernel), form)) + bias


def conv3(x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"):
    """3x3x3 convolution, stride 1, zero padding 1: N D H W O.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 3 3 3 I O, correlation as in ``torch.nn.Conv3d``.
      bias: O.
      form: see the module's docstring.
    """
    xs, _ = _parts(x, kernel)
    if thin.suits(kernel.shape):
        return (
            cast(jax.Array, _own_or(thin.same, _same3_native, form, xs, kernel)) + bias
        )
    return _same3(xs, kernel, form) + bias


def _same3(x: jax.Array | Parts, kernel: jax.Array, form: Form) -> jax.Array:
    xs, ws = _parts(x, kernel)
    xs = tuple(_pad(part, (1, 1), (1, 1), (1, 1)) for part in xs)
    return cast(jax.Array, _valid(xs, ws, form))


_same3_native = functools.partial(_same3, form="native")


def conv3_stride2(
    x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"
) -> Image:
    """3x3x3 convolution, stride 2, zero padding 1: N ceil(D/2) ceil(H/2) ceil(W/2) O.

    By space-to-depth and a 2x2x2 convolution: the input gradient of a strided
    convolution is as fast as its forward pass this way.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 3 3 3 I O.
      bias: O.
      form: see the module's docstring.
    """
    xs, _ = _parts(x, kernel)
    n, *spatial, _ = xs[0].shape
    if deep.outweighs(kernel.shape, n * math.prod(-(-m // 2) for m in spatial)):
        y = _own_or(deep.down3, _down3_native, form, _whole(x), kernel)
        return cast(jax.Array, y) + bias
    return _down3(xs, kernel, form) + bias


def _down3(x: jax.Array | Parts, kernel: jax.Array, form: Form) -> jax.Array:
    xs, ws = _parts(x, kernel)
    # One voxel in front and up to two behind: 2 * (ceil(n / 2) + 1) in all.
    widths = [(1, 1 + n % 2) for n in xs[0].shape[1:4]]
    xs = tuple(space_to_depth(_pad(part, *widths)) for part in xs)

    def fold(w):  # the fourth tap of each axis is zero
        i, o = w.shape[-2:]
        w = jnp.pad(w, ((0, 1),) * 3 + ((0, 0),) * 2).reshape(2, 2, 2, 2, 2, 2, i, o)
        return w.transpose(0, 2, 4, 1, 3, 5, 6, 7).reshape(2, 2, 2, 8 * i, o)

    return cast(jax.Array, _valid(xs, tuple(fold(w) for w in ws), form))


_down3_native = functools.partial(_down3, form="native")


def strided(
    x: Image,
    kernel: jax.Array,
    *,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    form: Form = "auto",
) -> Image:
    """Convolution with a stride of 1 or 2 per axis, zero padding and no bias.

    N D' H' W' O with ``D' = (D + 2 padding - kD) // stride + 1``, as
    ``torch.nn.Conv3d``. Along a strided axis pairs of voxels become channels, as in
    `conv3_stride2`; a kernel of one voxel reads every other one instead.

    Args:
      x: N D H W I.
      kernel: kD kH kW I O.
      stride: per axis, 1 or 2.
      padding: voxels of zeros on either side, per axis.
      form: see the module's docstring.

    Raises:
      ValueError: a stride is neither 1 nor 2, or the padded input is smaller than the
        kernel.
    """
    for axis, (s, margin) in enumerate(zip(stride, padding, strict=True)):
        n, k = x.shape[axis + 1], kernel.shape[axis]
        if s not in (1, 2) or n + 2 * margin < k:
            raise ValueError(
                f"axis {axis} has {n} voxels, padding {margin}, kernel {k} and stride "
                f"{s}; expected a stride of 1 or 2 and at least the kernel's size"
            )
        out = (n + 2 * margin - k) // s + 1
        # What the last window does not reach is cut off.
        behind = s * (out + -(-k // s) - 1) - n - margin
        widths = [(0, 0, 0)] * 5
        widths[axis + 1] = (margin, behind, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), widths)
        if s == 2:
            x, kernel = _fold_axis(x, kernel, axis)
    return cast(jax.Array, _valid((x,), (kernel,), form))


def _fold_axis(x: jax.Array, kernel: jax.Array, axis: int):
    """Moves pairs of voxels along an axis into channels, in image and kernel."""
    if kernel.shape[axis] == 1:
        return lax.slice_in_dim(x, 0, None, 2, axis=axis + 1), kernel

    def pairs(a, axis, channels):
        shape = [*a.shape[:axis], a.shape[axis] // 2, 2, *a.shape[axis + 1 :]]
        a = jnp.moveaxis(a.reshape(shape), axis + 1, channels)
        return a.reshape(*a.shape[:channels], -1, *a.shape[channels + 2 :])

    odd = [(0, 0)] * 5
    odd[axis] = (0, kernel.shape[axis] % 2)
    return pairs(x, axis + 1, 4), pairs(jnp.pad(kernel, odd), axis, 3)


def conv4_transpose2(
    x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"
) -> Image:
    """4x4x4 transposed convolution, stride 2, padding 1: N 2D 2H 2W O.

    ``out[2 x + k - 1] += in[x] kernel[k]``, as ``torch.nn.ConvTranspose3d``: a 2x2x2
    convolution to 8 O channels and depth-to-space (Shi et al., CVPR 2016).

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 4 4 4 I O in PyTorch's tap order, not flipped.
      bias: O.
      form: see the module's docstring.
    """
    xs, _ = _parts(x, kernel)
    if deep.outweighs(kernel.shape, math.prod(xs[0].shape[:4])):
        y = _own_or(deep.up4, _up4_native, form, _whole(x), kernel)
        return cast(jax.Array, y) + bias
    return _up4(xs, kernel, form) + bias


def _up4(x: jax.Array | Parts, kernel: jax.Array, form: Form) -> jax.Array:
    xs, ws = _parts(x, kernel)
    xs = tuple(_pad(part, (1, 1), (1, 1), (1, 1)) for part in xs)

    def fold(w):  # out[2 j - 1 + r] = sum_a in[j - 1 + a] kernel[2 + r - 2 a]
        i, o = w.shape[-2:]
        w = jnp.flip(w.reshape(2, 2, 2, 2, 2, 2, i, o), (0, 2, 4))
        return w.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(2, 2, 2, i, 8 * o)

    y = depth_to_space(_valid(xs, tuple(fold(w) for w in ws), form))
    return y[:, 1:-1, 1:-1, 1:-1]


_up4_native = functools.partial(_up4, form="native")


def average_pool2(x: Image) -> Image:
    """2x2x2 average pooling, stride 2, ceiling mode: N ceil(D/2) ceil(H/2) ceil(W/2) C.

    A window that runs past the end averages the voxels that exist, which is the same
    as repeating the last one.
    """
    x = _pad(x, *((0, n % 2) for n in x.shape[1:4]), mode="edge")
    return average_pool(x, (2, 2, 2))


def average_pool(x: Image, sizes: tuple[int, int, int]) -> Image:
    """Averages blocks of voxels that tile the volume: N D/a H/b W/c C.

    Args:
      x: N D H W C.
      sizes: a, b and c; divisors of D, H and W.
    """
    return _blocks(x, sizes).mean((2, 4, 6))


def max_pool2(x: Image) -> Image:
    """2x2x2 maximum pooling, stride 2, of even sizes: N D/2 H/2 W/2 C."""
    return _blocks(x, (2, 2, 2)).max((2, 4, 6))


def _blocks(x: jax.Array, sizes: tuple[int, int, int]) -> jax.Array:
    """N D H W C to N D/a a H/b b W/c c C."""
    n, *spatial, c = x.shape
    pairs = [(m // size, size) for m, size in zip(spatial, sizes, strict=True)]
    return x.reshape(n, *(k for pair in pairs for k in pair), c)


def repeat2(x: Image) -> Image:
    """Nearest doubling, each voxel a block of eight: N 2D 2H 2W C."""
    n, d, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :, None], (n, d, 2, h, 2, w, 2, c))
    return x.reshape(n, 2 * d, 2 * h, 2 * w, c)


def upsample2(x: Image) -> Image:
    """Trilinear doubling with half-pixel centres and clamped ends: N 2D 2H 2W C.

    ``out[2 i] = 0.25 in[i - 1] + 0.75 in[i]``, ``out[2 i + 1] = 0.75 in[i] +
    0.25 in[i + 1]`` along each axis.
    """
    x = _double_axis(x, 3)

    def sums(x):
        return functools.reduce(_double_axis, (2, 1), x)

    def products(x):
        return functools.reduce(_double_by_product, (2, 1), x)

    # XLA's CPU backend takes long to compile the sums, and longer for their gradients.
    return lax.platform_dependent(x, cpu=products, default=sums)


def _double_axis(x: jax.Array, axis: int) -> jax.Array:
    n = x.shape[axis]
    before = lax.slice_in_dim(x, 0, n - 1, axis=axis)
    after = lax.slice_in_dim(x, 1, n, axis=axis)
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    last = lax.slice_in_dim(x, n - 1, n, axis=axis)
    low = jnp.concatenate([first, before], axis)
    high = jnp.concatenate([after, last], axis)
    x = jnp.stack([0.25 * low + 0.75 * x, 0.75 * x + 0.25 * high], axis + 1)
    return x.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 2 :])


def _double_by_product(x: jax.Array, axis: int) -> jax.Array:
    """The same as a matrix product for each place along the axes before."""
    n = x.shape[axis]
    matrix = 0.75 * np.repeat(np.eye(n), 2, 0)
    for odd in (0, 1):
        neighbours = np.clip(np.arange(n) + 2 * odd - 1, 0, n - 1)
        matrix[np.arange(n) * 2 + odd, neighbours] += 0.25
    blocks = x.reshape(math.prod(x.shape[:axis]), n, -1)
    matrices = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (len(blocks), 2 * n, n))
    y = jnp.matmul(matrices, blocks, precision="highest")
    return y.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
