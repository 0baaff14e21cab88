"""Winograd convolution along D: stride 1, half of the multiplications.

Four planes of a result of three taps along D need twelve products of a plane with the
kernel's taps along H and W. They are also linear combinations of six products: of six
combinations of the six input planes with six of the kernel's taps (Winograd 1980; Lavin
and Gray, CVPR 2016): the transpose of multiplying two polynomials, whose coefficients
are the taps and the planes of the result, by their values at six points, one of them at
infinity. The kernel's gradient is the same with input and result exchanged.

These points lose little in float32: the rounding error is two to three times that of
adding the products themselves. It is relative to the largest of six planes; what is not
finite in one of them spreads to all four of the result.

Each product is a convolution along H and W of a plane with its own kernel
(`nn.conv.blocked`); four planes of the result at a time, in cache for the most part.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreg.nn.conv import blocked
from jaxreg.nn.conv.blocked import Margin, Parts
from jaxreg.xla import scheduling

_TAPS = 3
_PLANES = 4  # of the result at a time
_PRODUCTS = _PLANES + _TAPS - 1  # and planes of the input
_POINTS = (0.0, 3 / 4, -3 / 4, 4 / 3, -4 / 3)  # and infinity
_WIDE = 512  # inputs times outputs: below, the combinations cost more than they save
_ROWS = 128  # of a plane: below, products are too small


def _powers(count: int) -> np.ndarray:
    """A polynomial's coefficients to its values at the points, 6 x count."""
    finite = np.vander(_POINTS, count, increasing=True)
    return np.concatenate([finite, np.eye(count)[-1:]])


# To the six products and, transposed, from them; axes (product, plane or tap).
_OF_INPUT = np.linalg.inv(_powers(_PRODUCTS)).T
_OF_KERNEL = _powers(_TAPS)
_OF_RESULT = _powers(_PLANES)


def suits(xs: Parts, kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether a convolution is large enough to gain, and in float32."""
    inputs, outputs = kernel_shape[3:]
    return inputs * outputs >= _WIDE and suits_gradient(xs, kernel_shape)


def suits_gradient(xs: Parts, kernel_shape: tuple[int, ...]) -> bool:
    """Returns the same for the kernel's gradient, which gains with fewer channels."""
    n, depth, height, width = blocked.result_shape(xs, kernel_shape)
    fours = -(-depth // _PLANES)  # the last one repeats some planes
    return (
        kernel_shape[0] == _TAPS
        and depth >= _PLANES
        and _PRODUCTS * fours <= 0.7 * _TAPS * depth
        and n * height * width >= _ROWS
        and not blocked.has_few_inputs(kernel_shape)
        and all(x.dtype == jnp.float32 for x in xs)
    )


@jax.jit  # traced once for each shape, as the gradient below
def convolved(xs: Parts, kernel: jax.Array) -> jax.Array:
    """Convolution without padding: N D-2 H-kH+1 W-kW+1 O.

    Args:
      xs: parts of the input along channels, N D H W I together, float32.
      kernel: 3 kH kW I O.
    """
    n, depth, height, width = blocked.result_shape(xs, kernel.shape)
    outputs = kernel.shape[-1]
    kernels = _combined(_OF_KERNEL, kernel[None])[0][:, None]  # 6 1 kH kW I O

    def one(carry, index):
        y, products = carry
        begin = jnp.minimum(_PLANES * index, depth - _PLANES)
        points = _combined(_OF_INPUT, _planes(xs, begin, _PRODUCTS))
        products = blocked.convolved_into(products, (points,), kernels)
        planes = _combined(_OF_RESULT.T, products)
        return (lax.dynamic_update_slice_in_dim(y, planes, begin, 1), products), None

    # All of both is written before it is read.
    y = scheduling.empty_after((n, depth, height, width, outputs), xs[0])
    products = scheduling.empty_after((n, _PRODUCTS, height, width, outputs), xs[0])
    return lax.scan(one, (y, products), jnp.arange(-(-depth // _PLANES)))[0][0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def kernel_gradient(
    xs: Parts, dy: jax.Array, kernel_shape: tuple[int, ...], margin: Margin
) -> jax.Array:
    """Returns the gradient of `convolved`, as `blocked.kernel_gradient` does."""
    depth = xs[0].shape[1] - _TAPS + 1
    around = _TAPS - 1 - margin[0]
    plane = 1, *kernel_shape[1:]

    def add(total, index):
        begin = jnp.minimum(_PLANES * index, depth - _PLANES)
        points = _combined(_OF_INPUT, _planes(xs, begin, _PRODUCTS))
        planes = _planes((dy,), begin + around, _PLANES)
        if depth % _PLANES:  # what was counted before
            position = lax.broadcasted_iota(jnp.int32, planes.shape, 1)
            planes = jnp.where(position >= _PLANES * index - begin, planes, 0)
        values = _combined(_OF_RESULT, planes)
        inner = 0, *margin[1:]
        return blocked.add_gradients(total, (points,), values, plane, inner), None

    total = blocked.start_gradients(_PRODUCTS, plane, dy)
    total, _ = lax.scan(add, total, jnp.arange(-(-depth // _PLANES)))
    kernels = blocked.as_kernels(total, plane)
    return _combined(_OF_KERNEL.T, jnp.swapaxes(kernels, 0, 1))[0]


def _planes(xs: Parts, begin: jax.Array, count: int) -> jax.Array:
    """Returns planes of the parts together, N count H W C."""
    planes = [lax.dynamic_slice_in_dim(x, begin, count, 1) for x in xs]
    return jnp.concatenate(planes, -1)


def _combined(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Returns linear combinations along the second axis."""
    # The matrix on the left: XLA's CPU backend turns x otherwise.
    y = lax.dot_general(
        jnp.asarray(matrix, x.dtype), x, (((1,), (1,)), ((), ())), precision="highest"
    )
    return jnp.swapaxes(y, 0, 1)  # N combinations ...
