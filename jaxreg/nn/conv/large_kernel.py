"""Strided convolution of large kernels over few voxels, in the kernel's layout.

At the bottom of a U-Net a kernel has millions of weights and the volume a few hundred
voxels. Folding such a kernel for space-to-depth, turning it for the input gradient and
unfolding its gradient copies tens of megabytes each time. Here kernels are read, and
their gradients written, as they are stored (kD kH kW I O); voxels move instead.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.typing import Image
from jaxreg.xla import scheduling

_COPIES = 8  # of the voxels that are moved for a kernel that stays


def outweighs(kernel_shape: tuple[int, ...], voxels: int) -> bool:
    """Returns whether a kernel is larger than what moving the voxels costs.

    Args:
      kernel_shape: kD kH kW I O.
      voxels: of the batch, at the coarse end of the layer.
    """
    return math.prod(kernel_shape) > _COPIES * voxels * sum(kernel_shape[3:])


@jax.custom_vjp
def down3(x: Image, kernel: jax.Array) -> Image:
    """3x3x3 convolution, stride 2, zero padding 1: N ceil(D/2) ceil(H/2) ceil(W/2) O.

    Args:
      x: N D H W I.
      kernel: 3 3 3 I O.
    """
    return _down3_forward(x, kernel)[0]


def _down3_forward(x, kernel):
    taps = _gathered(x)
    matrix = kernel.reshape(-1, kernel.shape[-1])  # 27I O
    rows = taps.reshape(-1, len(matrix))  # voxels 27I
    return (rows @ matrix).reshape(*taps.shape[:4], -1), (x, kernel)


def _down3_backward(saved, dy):
    x, kernel = saved
    matrix = kernel.reshape(-1, kernel.shape[-1])  # 27I O
    rows = _gathered(x).reshape(-1, len(matrix))  # voxels 27I
    dy_rows = dy.reshape(-1, kernel.shape[-1])  # voxels O
    # N D H W 3 3 3 I
    taps = (dy_rows @ matrix.T).reshape(*dy.shape[:4], *kernel.shape[:4])
    dx = _given_back(taps)[:, : x.shape[1], : x.shape[2], : x.shape[3]]
    return dx, (rows.T @ dy_rows).reshape(kernel.shape)


down3.defvjp(_down3_forward, _down3_backward)


def _gathered(x: Image) -> jax.Array:
    """N D H W C to its taps, N ceil(D/2) ceil(H/2) ceil(W/2) 3 3 3 C."""
    for axis in (1, 2, 3):
        # Pairs of voxels: tap 0 is the second of the pair before, 1 and 2 are the pair.
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, x.shape[axis] % 2)
        x = jnp.pad(x, widths)
        pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])  # ... n/2 2 ...
        first, second = (
            lax.index_in_dim(pairs, k, axis + 1, keepdims=False) for k in (0, 1)
        )
        x = jnp.stack([_moved(second, 1, axis), first, second], -2)
    return x


def _given_back(taps: jax.Array) -> Image:
    """The transpose of `_gathered`, of even sizes: N 2D' 2H' 2W' C."""
    for axis in (3, 2, 1):
        before, first, second = (taps[..., k, :] for k in range(3))
        pair = first, second + _moved(before, -1, axis)
        taps = jnp.stack(pair, axis + 1)
        # ... 2n ...
        taps = taps.reshape(*taps.shape[:axis], -1, *taps.shape[axis + 2 :])
    return taps


@jax.custom_vjp
def up4(x: Image, kernel: jax.Array) -> Image:
    """4x4x4 transposed convolution, stride 2, padding 1: N 2D 2H 2W O.

    Args:
      x: N D H W I.
      kernel: 4 4 4 I O, as in `api.conv4_transpose2`.
    """
    inputs, outputs = kernel.shape[3:]
    rows = x.reshape(-1, inputs)  # voxels I
    matrices = kernel.reshape(-1, inputs, outputs)  # 64 I O
    # A loop, for one product would have to copy the kernel, whose inputs are not first.
    taps = scheduling.mapped(lambda matrix: rows @ matrix, matrices, like=x)
    return _interleaved(taps.reshape(*kernel.shape[:3], *x.shape[:4], outputs))


def _up4_forward(x, kernel):
    return up4(x, kernel), (x, kernel)


def _up4_backward(saved, dy):
    x, kernel = saved
    inputs, outputs = kernel.shape[3:]
    rows = x.reshape(-1, inputs)  # voxels I
    matrices = kernel.reshape(-1, inputs, outputs)  # 64 I O
    taps = jax.ShapeDtypeStruct((*kernel.shape[:3], *x.shape[:4], outputs), dy.dtype)
    (taps,) = jax.linear_transpose(_interleaved, taps)(dy)
    taps = taps.reshape(len(matrices), -1, outputs)  # 64 voxels O

    def one(carry, given):
        dx, gradient = carry
        index, matrix, tap = given
        gradient = lax.dynamic_update_index_in_dim(gradient, rows.T @ tap, index, 0)
        return (dx + tap @ matrix.T, gradient), None

    start = scheduling.zeros(rows.shape, dy), scheduling.empty_after(matrices.shape, dy)
    given = jnp.arange(len(matrices)), matrices, taps
    (dx, gradient), _ = lax.scan(one, start, given)
    return dx.reshape(x.shape), gradient.reshape(kernel.shape)


up4.defvjp(_up4_forward, _up4_backward)


def _interleaved(taps: jax.Array) -> jax.Array:
    """4 4 4 N D H W O, what each tap adds, to N 2D 2H 2W O."""
    for _ in range(3):
        # out[2 j] = tap1[j] + tap3[j - 1], out[2 j + 1] = tap2[j] + tap0[j + 1]; the
        # next axis's taps are first then, and its voxels fourth.
        pair = taps[1] + _moved(taps[3], 1, 3), taps[2] + _moved(taps[0], -1, 3)
        taps = jnp.stack(pair, 4)
        # the doubled axis fourth
        taps = taps.reshape(*taps.shape[:3], -1, *taps.shape[5:])
    return taps


def _moved(x: jax.Array, by: int, axis: int) -> jax.Array:
    """Moves an axis by voxels; zeros come in."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (by, -by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)
