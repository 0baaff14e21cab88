"""Convolution to few output channels, such as a displacement's three; stride 1.

Gathering the taps of many channels to make three would move far more than it computes.
Here each plane of the input is multiplied by all taps of the kernel at once; the
products, a row of voxels for each tap and output, are shifted and added. The input is
read once, and everything between stays in cache. In the gradient the taps of the few
channels are gathered, again plane by plane.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.nn.conv.blocked import SUM, Parts
from jaxreg.xla import scheduling

_MOST = 8  # output channels
_INPUTS = 3  # for each output at least


def suits(kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether a kernel kD kH kW I O has few outputs, and more inputs."""
    inputs, outputs = kernel_shape[3:]
    return outputs <= min(_MOST, inputs // _INPUTS)


@jax.custom_vjp
def same(xs: Parts, kernel: jax.Array) -> jax.Array:
    """Convolution with half the kernel of zeros around the input: N D H W O.

    Args:
      xs: parts of the input along channels, N D H W I together.
      kernel: kD kH kW I O, of odd sizes; kD is 3 or more.
    """
    return _forward(xs, kernel)[0]


@jax.jit  # traced once for each shape, as the gradient below
def _forward(xs, kernel):
    kd, kh, kw, _, o = kernel.shape
    n, depth, height, width, _ = xs[0].shape
    size = (o, n, height, width)
    matrix = _matrix(kernel)
    around = [(0, 0), *((k // 2, k // 2) for k in (kh, kw)), (0, 0)]

    def add(sums, index):
        """Returns the sum that is whole with this plane, and those that are not yet."""
        plane = jnp.pad(_plane(xs, index), around)
        rows = lax.dot_general(
            matrix,
            plane.reshape(-1, plane.shape[-1]),
            (((1,), (1,)), ((), ())),
            preferred_element_type=SUM,
            # kD kH kW O N H W, with the zeros around
        ).reshape(kd, kh, kw, o, *plane.shape[:3])
        shifted = [
            rows[:, b, c, :, :, b : b + height, c : c + width]
            for b in range(kh)
            for c in range(kw)
        ]
        new = functools.reduce(jnp.add, shifted)
        sums = [*sums, jnp.zeros(size, new.dtype)]
        whole, *sums = (s + new[kd - 1 - a] for a, s in enumerate(sums))
        return whole, sums

    def one(carry, index):
        y, sums = carry
        whole, sums = add(sums, index)
        # The first kd // 2 belong before the volume, and are written over.
        first = jnp.maximum(index - kd // 2, 0)
        return (_written(y, whole, first), sums), None

    sums = [jnp.zeros(size, SUM) for _ in range(kd - 1)]
    y = scheduling.empty_after((depth, *size), xs[0])
    (y, sums), _ = lax.scan(one, (y, sums), jnp.arange(depth))
    for a in range(kd // 2):  # what the last planes leave
        y = _written(y, sums[a], depth - kd // 2 + a)
    return y.transpose(2, 0, 3, 4, 1), (xs, kernel)  # D O N H W to N D H W O


@jax.jit
def _backward(saved, dy):
    xs, kernel = saved
    kd, kh, kw, _, o = kernel.shape
    n, depth, height, width, _ = xs[0].shape
    matrix = _matrix(kernel)
    around = [(0, 0), (0, 0), *((k // 2, k // 2) for k in (kd, kh, kw))]
    dy = jnp.pad(dy.transpose(4, 0, 1, 2, 3), around)  # O N D H W

    def taps(index):
        """The taps of one plane of dy, kH*kW*O rows of voxels."""
        plane = lax.dynamic_index_in_dim(dy, index, 2, keepdims=False)
        shifts = [
            plane[:, :, b : b + height, c : c + width]
            for b in reversed(range(kh))
            for c in reversed(range(kw))
        ]
        return jnp.stack(shifts).reshape(kh * kw * o, -1)

    def one(carry, index):
        dxs, total, before = carry
        rows = jnp.concatenate([taps(index + kd - 1), before])
        plane = _plane(xs, index)
        columns = plane.reshape(-1, plane.shape[-1])  # NHW I
        total = total + jnp.matmul(rows, columns, preferred_element_type=SUM)
        dx = lax.dot_general(matrix, rows, (((0,), (0,)), ((), ())))
        # Tied, or XLA turns the product instead of its result: five times the time.
        dx = scheduling.depends_on(dx, rows).T.reshape(plane.shape)  # I NHW to N H W I
        parts, first = [], 0
        for whole in dxs:
            part = dx[..., first : first + whole.shape[-1]]
            parts.append(lax.dynamic_update_index_in_dim(whole, part, index, 1))
            first += whole.shape[-1]
        return (tuple(parts), total, rows[: len(before)]), None

    before = [taps(index) for index in reversed(range(kd - 1))]
    carry = (
        tuple(scheduling.empty_after(x.shape, dy) for x in xs),
        scheduling.zeros(matrix.shape, dy).astype(SUM),
        jnp.concatenate(before),
    )
    (dxs, total, _), _ = lax.scan(one, carry, jnp.arange(depth))
    gradient = total.reshape(kd, kh, kw, o, -1)  # kD kH kW O I
    return dxs, jnp.swapaxes(gradient, 3, 4).astype(kernel.dtype)


same.defvjp(_forward, _backward)


def _written(y: jax.Array, plane: jax.Array, index: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(y, plane.astype(y.dtype), index, 0)


def _matrix(kernel: jax.Array) -> jax.Array:
    """A row for each tap and output, kD kH kW O, a column for each input."""
    return jnp.swapaxes(kernel, 3, 4).reshape(-1, kernel.shape[3])


def _plane(xs: Parts, index: jax.Array) -> jax.Array:
    """One plane of the parts together, N H W I."""
    planes = [lax.dynamic_index_in_dim(x, index, 1, keepdims=False) for x in xs]
    return jnp.concatenate(planes, -1)
