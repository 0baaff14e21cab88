"""3D convolution, pooling and upsampling layers, in the fast form per platform.

Arrays are N D H W C, kernels kD kH kW I O. Layers have three forms:

* "native": one primitive, XLA's own convolution of stride 1; strides move into channels
  by space-to-depth, transposed strides by depth-to-space. For GPU.
* "slab": the same with another primitive, matrix products over blocks of the volume
  (`nn.conv.blocked`), with fewer multiplications where channels are many
  (`nn.conv.winograd`). For CPU: 2 to 100 times faster there than XLA's convolution,
  whose small-channel kernels and gradients fall back to naive loops. The input's
  gradient is again a convolution, the kernel's a matrix product, and neither scatters.
  `nn.conv.large_kernel` leaves a strided layer's kernel in place that outweighs its
  volume, and `nn.conv.few_outputs` makes few channels of many.
* "folded": XLA's own convolution with its strides and dilations, and what has few
  channels at full resolution computed at half of it (`nn.conv.folded`). For TPU, where
  reshapes and transposes of the minor axes cost more than arithmetic.

"auto" picks by the platform that a program is traced for (`xla.platforms`).

An input may be given in parts: ``conv((a, b), kernel)`` is the convolution of their
concatenation along channels, which is not built at stride 1 and of several channels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreg.nn.conv import blocked, few_outputs, folded, large_kernel, winograd
from jaxreg.nn.conv.blocked import Parts
from jaxreg.typing import Image
from jaxreg.xla import platforms, splitting

Form = Literal["auto", "native", "slab", "folded"]
_FEW_INPUTS = 4  # channels that leave most of a TPU's lanes empty, folded or not
_FEW = 16  # channels that are a tile of 128 when folded
_MANY = 2**16  # voxels; fewer are in a TPU's own memory in any layout


class Forms(NamedTuple):
    """Functions of the same arguments, for equal results.

    Attributes:
      slab: for CPU.
      native: for GPU, and for TPU without `folded`.
      folded: for TPU.
    """

    slab: Callable
    native: Callable
    folded: Callable | None = None


def _by_platform(form: Form, forms: Forms, *args):
    on_tpu = forms.folded or forms.native
    given = {"slab": forms.slab, "native": forms.native, "folded": on_tpu}
    if form != "auto":
        return given[form](*args)
    on_others = {"tpu": forms.folded} if forms.folded else {}
    return platforms.dependent(*args, cpu=forms.slab, **on_others, default=forms.native)


def is_folded(form: Form, shape: Sequence[int]) -> bool:
    """Returns whether so many voxels are computed in TPU's form, where this is traced.

    Not where volumes are split: each device's part of a gradient would be summed over
    devices as that of a kernel between folded images, many times the weights.

    Args:
      form: see the module's docstring; "folded" says so whatever the shape is.
      shape: voxels along each axis.
    """
    on_tpu = form == "folded" or (form == "auto" and platforms.traced() == "tpu")
    return on_tpu and _are_many(form, shape) and splitting.devices() == 1


def _are_many(form: Form, shape: Sequence[int]) -> bool:
    """Returns whether TPU's form pays for so many voxels, or was asked for."""
    return form == "folded" or math.prod(shape) >= _MANY


def chosen(forms: Forms, form: Form, *args: Any) -> Any:
    """Applies one of several functions, and differentiates only that one.

    The gradient keeps the arguments.

    Args:
      forms: of a module's own functions, so that each is traced once for each shape.
      form: see the module's docstring.
      *args: trees of arrays.
    """
    return _chosen(forms, form, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(forms, form, *args):
    return _by_platform(form, forms, *args)


_chosen = jax.jit(_differentiable, static_argnums=(0, 1))


def _chosen_forward(forms, form, *args):
    return _by_platform(form, forms, *args), args


def _chosen_backward(forms, form, args, dy):
    def gradient(function):
        return function and functools.partial(_pulled, function)

    return _by_platform(form, Forms(*map(gradient, forms)), dy, *args)


_differentiable.defvjp(_chosen_forward, _chosen_backward)


def _pulled(function: Callable, dy: Any, images: Any, *parameters: Any) -> tuple:
    """Returns the gradients with respect to the arguments of a layer.

    Where volumes are split each device has a sum of its own for the parameters', and
    XLA adds these up in the type that they have: float32, whatever the parameters' is.
    """
    gradients = jax.vjp(function, images, *parameters)[1](dy)
    narrow = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(parameters))
    if splitting.devices() == 1 or not narrow:
        return gradients
    given = (dy, images, *parameters)
    dy, *wide = jax.tree.map(lambda a: a.astype(jnp.float32), given)
    _, *sums = jax.vjp(function, *wide)[1](dy)
    narrowed = jax.tree.map(lambda s, p: s.astype(p.dtype), tuple(sums), parameters)
    return gradients[0], *narrowed


# --- the primitive: stride 1, no padding ---------------------------------------------


def _native(xs: Parts, kernel: jax.Array) -> jax.Array:
    edges = np.cumsum([x.shape[-1] for x in xs])[:-1]
    convolved = [
        folded.convolved(x, w, ((0, 0),) * 3)
        for x, w in zip(xs, jnp.split(kernel, edges, axis=3), strict=True)
    ]
    return functools.reduce(jnp.add, convolved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolved(
    xs: Parts, kernel: jax.Array, margin: blocked.Margin, form: Form
) -> jax.Array:
    """Returns the convolution of the parts together, stride 1.

    Args:
      xs: parts along channels.
      kernel: kD kH kW I O.
      margin: zeros on either side, per axis; fewer than the kernel's taps. Its gradient
        needs none of the zeros' gradients.
      form: see the module's docstring.
    """

    def slab(xs, kernel):
        return _slab(_padded(xs, margin), kernel)

    def native(xs, kernel):
        return _native(_padded(xs, margin), kernel)

    on_tpu = _few_folded if _folds(xs, kernel, margin, form) else None
    return _by_platform(form, Forms(slab, native, on_tpu), xs, kernel)


def _folds(xs: Parts, kernel: jax.Array, margin: blocked.Margin, form: Form) -> bool:
    """Returns whether a layer is better folded on TPU: few channels, many voxels."""
    same = kernel.shape[:3] == (3, 3, 3) and margin == (1, 1, 1)
    few = max(kernel.shape[3:]) <= _FEW
    many = _are_many(form, xs[0].shape[1:4])
    # Volumes that are split over devices exchange less as they are.
    return same and few and many and splitting.devices() == 1


def _few_folded(xs: Parts, kernel: jax.Array) -> jax.Array:
    return folded.conv3(jnp.concatenate(xs, -1), kernel)


def _slab(xs: Parts, kernel: jax.Array) -> jax.Array:
    minimally = winograd.suits(xs, kernel.shape)
    return (winograd if minimally else blocked).convolved(xs, kernel)


def _slab_gradients(
    xs: Parts, kernel: jax.Array, dy: jax.Array, margin: blocked.Margin
):
    """The gradients of `_slab` with respect to what is within the margin, and kernel.

    Args:
      xs: inputs whose outermost voxels are zero.
      kernel: kD kH kW I O.
      dy: gradient of the result.
      margin: how wide those zeros are.
    """
    sizes = kernel.shape[:3]
    around = [k - 1 - m for k, m in zip(sizes, margin, strict=True)]
    dy = _pad(dy, *((m, m) for m in around))
    flipped = jnp.swapaxes(jnp.flip(kernel, (0, 1, 2)), 3, 4)
    dx = _slab((dy,), flipped)
    edges = np.cumsum([x.shape[-1] for x in xs])[:-1]
    dxs = tuple(jnp.split(dx, edges, axis=-1))
    own = winograd if winograd.suits_gradient(xs, kernel.shape) else blocked
    return dxs, own.kernel_gradient(xs, dy, kernel.shape, margin)


def _convolved_forward(xs, kernel, margin, form):
    return _convolved(xs, kernel, margin, form), (xs, kernel)


def _convolved_backward(margin, form, saved, dy):
    def slab(xs, kernel, dy):
        return _slab_gradients(_padded(xs, margin), kernel, dy, margin)

    def native(xs, kernel, dy):
        def function(xs, kernel):
            return _native(_padded(xs, margin), kernel)

        return _pulled(function, dy, xs, kernel)

    def on_tpu(xs, kernel, dy):
        return _pulled(_few_folded, dy, xs, kernel)

    xs, kernel = saved
    folds = _folds(xs, kernel, margin, form)
    forms = Forms(slab, native, on_tpu if folds else None)
    return _by_platform(form, forms, xs, kernel, dy)


_convolved.defvjp(_convolved_forward, _convolved_backward)


def _valid(xs: Parts, kernel: jax.Array, form: Form) -> jax.Array:
    """Returns the convolution without padding."""
    return cast(jax.Array, _convolved(xs, kernel, (0, 0, 0), form))


def _same(xs: Parts, kernel: jax.Array, form: Form) -> jax.Array:
    """Returns the convolution with half the kernel of zeros around; odd sizes."""
    d, h, w = kernel.shape[:3]
    return cast(jax.Array, _convolved(xs, kernel, (d // 2, h // 2, w // 2), form))


_same_native = functools.partial(_same, form="native")


def _padded(xs: Parts, margin: blocked.Margin) -> Parts:
    return tuple(_pad(x, *((m, m) for m in margin)) for x in xs)


# --- layers -------------------------------------------------------------------------


def _parts(x: jax.Array | Parts, kernel: jax.Array) -> Parts:
    """Returns the input as parts, which must fit the kernel's input channels."""
    xs = x if isinstance(x, tuple) else (x,)
    channels = sum(part.shape[-1] for part in xs)
    if channels != kernel.shape[-2]:
        raise ValueError(
            f"the input has {channels} channels, the kernel expects {kernel.shape[-2]}"
        )
    return xs


def _pad(x: jax.Array, *widths: tuple[int, int], mode: str = "constant") -> jax.Array:
    if not any(map(any, widths)):  # JAX would add nothing, and zeros in the gradient
        return x
    return jnp.pad(x, ((0, 0), *widths, (0, 0)), mode=mode)


def space_to_depth(x: Image) -> Image:
    """N 2D 2H 2W C to N D H W 8C, channels ordered (2, 2, 2, C)."""
    n, d, h, w, c = x.shape
    x = splitting.evened(x, 2)
    # N D 2 H 2 W 2 C, of the result's D H W
    x = x.reshape(n, -1, 2, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(n, -1, h // 2, w // 2, 8 * c)[:, : d // 2]


def depth_to_space(x: Image) -> Image:
    """N D H W 8C to N 2D 2H 2W C: the inverse of `space_to_depth`."""
    n, d, h, w, c = x.shape
    x = splitting.evened(x)
    x = x.reshape(n, -1, h, w, 2, 2, 2, c // 8)  # N D H W 2 2 2 C
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(n, -1, 2 * h, 2 * w, c // 8)[:, : 2 * d]


def conv1(x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"):
    """1x1x1 convolution: N D H W O.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 1 1 1 I O.
      bias: O.
      form: see the module's docstring.
    """
    return _valid(_parts(x, kernel), kernel, form) + bias[None, None, None, None]


def conv3(x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"):
    """3x3x3 convolution, stride 1, zero padding 1: N D H W O.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 3 3 3 I O, correlation as in ``torch.nn.Conv3d``.
      bias: O.
      form: see the module's docstring.
    """
    xs = _parts(x, kernel)
    if few_outputs.suits(kernel.shape):
        forms = Forms(few_outputs.same, _same_native, _few_folded)
        y = chosen(forms, form, xs, kernel)
    else:
        y = _same(xs, kernel, form)
    return y + bias[None, None, None, None]


def conv3_stride2(
    x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"
) -> Image:
    """3x3x3 convolution, stride 2, zero padding 1: N ceil(D/2) ceil(H/2) ceil(W/2) O.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 3 3 3 I O.
      bias: O.
      form: see the module's docstring.
    """
    x = jnp.concatenate(_parts(x, kernel), -1)
    n, *spatial, channels = x.shape
    voxels = n * math.prod(-(-m // 2) for m in spatial)
    outweighs = large_kernel.outweighs(kernel.shape, voxels)
    forms = Forms(
        large_kernel.down3 if outweighs else _down3_slab,
        _down3_native,
        folded.down3 if channels <= _FEW_INPUTS else _down3_strided,
    )
    return chosen(forms, form, x, kernel) + bias[None, None, None, None]


def _down3(x: jax.Array, kernel: jax.Array, form: Form) -> jax.Array:
    # By space-to-depth and a 2x2x2 convolution, whose input gradient is as fast as its
    # forward pass. One voxel in front and up to two behind: 2 * (ceil(n / 2) + 1).
    x = space_to_depth(_pad(x, *((1, 1 + n % 2) for n in x.shape[1:4])))
    i, o = kernel.shape[-2:]
    # The fourth tap of each axis is zero.
    # tap and place in the pair, per axis: 2 2 2 2 2 2 I O
    w = jnp.pad(kernel, ((0, 1),) * 3 + ((0, 0),) * 2).reshape(2, 2, 2, 2, 2, 2, i, o)
    w = w.transpose(0, 2, 4, 1, 3, 5, 6, 7).reshape(2, 2, 2, 8 * i, o)  # 2 2 2 8I O
    return _valid((x,), w, form)


_down3_slab = functools.partial(_down3, form="slab")
_down3_native = functools.partial(_down3, form="native")


def _down3_strided(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (2, 2, 2), ((1, 1),) * 3, dimension_numbers=folded.DIMENSIONS
    )


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
    return _valid((x,), kernel, form)


def _fold_axis(x: jax.Array, kernel: jax.Array, axis: int):
    """Moves pairs of voxels along an axis into channels, in image and kernel."""
    if kernel.shape[axis] == 1:
        return lax.slice_in_dim(x, 0, None, 2, axis=axis + 1), kernel

    def pairs(a, axis, channels):
        shape = [*a.shape[:axis], a.shape[axis] // 2, 2, *a.shape[axis + 1 :]]
        # the pair before the channels
        a = jnp.moveaxis(a.reshape(shape), axis + 1, channels)
        return a.reshape(*a.shape[:channels], -1, *a.shape[channels + 2 :])

    odd = [(0, 0)] * 5
    odd[axis] = (0, kernel.shape[axis] % 2)
    return pairs(x, axis + 1, 4), pairs(jnp.pad(kernel, odd), axis, 3)


def conv4_transpose2(
    x: Image | Parts, kernel: jax.Array, bias: jax.Array, *, form: Form = "auto"
) -> Image:
    """4x4x4 transposed convolution, stride 2, padding 1: N 2D 2H 2W O.

    ``out[2 x + k - 1] += in[x] kernel[k]``, as ``torch.nn.ConvTranspose3d``.

    Args:
      x: N D H W I, or parts of it along channels.
      kernel: 4 4 4 I O in PyTorch's tap order, not flipped.
      bias: O.
      form: see the module's docstring.
    """
    xs = _parts(x, kernel)
    outweighed = large_kernel.outweighs(kernel.shape, math.prod(xs[0].shape[:4]))
    slab = _up4_large if outweighed else _up4_slab
    forms = Forms(slab, _up4_native, _up4_dilated)
    return chosen(forms, form, xs, kernel) + bias[None, None, None, None]


def _up4(xs: Parts, kernel: jax.Array, form: Form) -> jax.Array:
    # A 2x2x2 convolution to 8 O channels and depth-to-space (Shi et al., CVPR 2016).
    xs = tuple(_pad(part, (1, 1), (1, 1), (1, 1)) for part in xs)
    i, o = kernel.shape[-2:]
    # out[2 j - 1 + r] = sum_a in[j - 1 + a] kernel[2 + r - 2 a]
    # tap a and place r, per axis: 2 2 2 2 2 2 I O
    w = jnp.flip(kernel.reshape(2, 2, 2, 2, 2, 2, i, o), (0, 2, 4))
    w = w.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(2, 2, 2, i, 8 * o)  # 2 2 2 I 8O
    y = depth_to_space(_valid(xs, w, form))
    return y[:, 1:-1, 1:-1, 1:-1]


_up4_slab = functools.partial(_up4, form="slab")
_up4_native = functools.partial(_up4, form="native")


def _up4_large(xs: Parts, kernel: jax.Array) -> jax.Array:
    return large_kernel.up4(jnp.concatenate(xs, -1), kernel)


def _up4_dilated(xs: Parts, kernel: jax.Array) -> jax.Array:
    if splitting.devices() > 1:  # the gradient of a dilated kernel exchanges all of x
        return _up4_native(xs, kernel)
    return dilated(jnp.concatenate(xs, -1), jnp.flip(kernel, (0, 1, 2)), 2)


def dilated(x: jax.Array, kernel: jax.Array, margin: int, **options: Any) -> jax.Array:
    """Convolves an image with a zero between its voxels and `margin` around it."""
    return folded.convolved(
        x, kernel, ((margin, margin),) * 3, lhs_dilation=(2, 2, 2), **options
    )


def average_pool2(x: Image) -> Image:
    """2x2x2 average pooling, stride 2, ceiling mode: N ceil(D/2) ceil(H/2) ceil(W/2) C.

    A window that runs past the end averages the voxels that exist, which is the same
    as repeating the last one.
    """

    def repeated(x):
        d, h, w = (n % 2 for n in x.shape[1:4])
        return _pad(splitting.edged(x, 0, d), (0, 0), (0, h), (0, w), mode="edge")

    def windows(x):
        # A TPU would move the numbers of a reshaped minor axis one by one.
        size = (1, 2, 2, 2, 1)
        total = lax.reduce_window(
            repeated(x).astype(jnp.float32), 0.0, lax.add, size, size, "VALID"
        )
        return (total / 8).astype(x.dtype)

    on_tpu = folded.average_pool2 if x.shape[-1] <= _FEW_INPUTS else windows
    return platforms.dependent(
        x, tpu=on_tpu, default=lambda x: average_pool(repeated(x), (2, 2, 2))
    )


def average_pool(x: Image, sizes: tuple[int, int, int]) -> Image:
    """Averages blocks of voxels that tile the volume: N D/a H/b W/c C.

    Args:
      x: N D H W C.
      sizes: a, b and c; divisors of D, H and W.
    """
    return _blocks(x, sizes).mean((2, 4, 6))


def max_pool2(x: Image) -> Image:
    """2x2x2 maximum pooling, stride 2, of even sizes: N D/2 H/2 W/2 C."""
    return functools.reduce(larger_of_pairs, (3, 2, 1), x)


def larger_of_pairs(x: Image, axis: int) -> Image:
    """Returns the maximum of every two neighbours along an axis of even size."""
    shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    first, second = jnp.split(x.reshape(shape), 2, axis + 1)
    # Not `max`, whose gradient divides by the number of entries that equal the
    # maximum: none where XLA computes them once more and rounds otherwise.
    return jnp.maximum(first, second).squeeze(axis + 1)


def _blocks(x: jax.Array, sizes: tuple[int, int, int]) -> jax.Array:
    """N D H W C to N D/a a H/b b W/c c C."""
    n, *spatial, c = x.shape
    x = splitting.evened(x, sizes[0])
    pairs = [(m // size, size) for m, size in zip(x.shape[1:4], sizes, strict=True)]
    x = x.reshape(n, *(k for pair in pairs for k in pair), c)
    return x[:, : spatial[0] // sizes[0]]


def repeat2(x: Image) -> Image:
    """Nearest doubling, each voxel a block of eight: N 2D 2H 2W C."""
    n, d, h, w, c = x.shape
    x = splitting.evened(x)[:, :, None, :, None, :, None]
    x = jnp.broadcast_to(x, (*x.shape[:2], 2, h, 2, w, 2, c))
    return x.reshape(n, -1, 2 * h, 2 * w, c)[:, : 2 * d]


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

    if splitting.devices() > 1:  # the products would put x together
        return sums(x)
    # XLA's CPU backend takes long to compile the sums, and longer for their gradients.
    return platforms.dependent(x, cpu=products, default=sums)


def _double_axis(x: jax.Array, axis: int) -> jax.Array:
    n = x.shape[axis]
    place = lax.broadcasted_iota(jnp.int32, x.shape, axis)

    # Not put together of parts: where x is split along the axis, only its ends travel.
    def neighbours(step, end):
        widths = [(0, 0, 0)] * x.ndim
        widths[axis] = (step, -step, 0)
        return jnp.where(place == end, x, lax.pad(x, jnp.zeros((), x.dtype), widths))

    low, high = neighbours(1, 0), neighbours(-1, n - 1)
    # ... n 2 ...
    x = jnp.stack([0.25 * low + 0.75 * x, 0.75 * x + 0.25 * high], axis + 1)
    if axis == 1:
        x = splitting.evened(x)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, 2 * n, axis=axis)


def _double_by_product(x: jax.Array, axis: int) -> jax.Array:
    """The same as a matrix product for each place along the axes before."""
    n = x.shape[axis]
    matrix = 0.75 * np.repeat(np.eye(n), 2, 0)
    for odd in (0, 1):
        neighbours = np.clip(np.arange(n) + 2 * odd - 1, 0, n - 1)
        matrix[np.arange(n) * 2 + odd, neighbours] += 0.25
    blocks = x.reshape(math.prod(x.shape[:axis]), n, -1)  # before axis after
    matrices = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (len(blocks), 2 * n, n))
    y = jnp.matmul(matrices, blocks, precision="highest")
    return y.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
