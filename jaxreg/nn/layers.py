"""Convolutional layers, initialisers and instance normalisation.

Weights start as PyTorch's do, so that networks train alike.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxreg.nn.conv import api
from jaxreg.typing import Image, Key, Variables
from jaxreg.xla import scheduling

_NORM_EPSILON = 1e-5
Precision = Literal["float32", "bfloat16"]
"""Of activations and products; parameters, statistics, coordinates and displacements
are float32 whatever it is."""


def leaky(x: jax.Array, slope: float = 0.01) -> jax.Array:
    """Returns x where it is positive, ``slope x`` elsewhere."""
    return jnp.where(x > 0, x, slope * x)


def host_initializer(draw: Callable[..., np.ndarray]) -> Callable:
    """Returns an initialiser that draws on the host: ``draw(generator, shape)``.

    Philox, seeded by the key: compiling JAX's generator for each of a network's shapes
    would take most of a minute.
    """

    def init(key, shape, dtype=jnp.float32):
        def on_host(seed):
            generator = np.random.Generator(np.random.Philox(np.asarray(seed).tolist()))
            return draw(generator, shape).astype(dtype)

        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(on_host, result, jax.random.key_data(key))

    return init


@functools.partial(jax.jit, static_argnames=("network", "inputs"))
def _init_lazily(network, key, inputs):
    return network.lazy_init(key, *inputs)


def init_lazily(network: nn.Module, key: Key, *inputs: Any) -> Variables:
    """Returns the variables that a network starts from.

    The network is traced, not run. One program makes the variables: operation by
    operation, what a network does to its weights before it meets an image would be
    compiled as hundreds of them.

    Args:
      network: whose weights are drawn by `host_initializer`.
      key: seeds them.
      *inputs: `jax.ShapeDtypeStruct` of its inputs.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names other platforms alone
        return _init_lazily(network, key, inputs)
    # The host draws: its own device waits for no other.
    with jax.default_device(host):
        return _init_lazily(network, key, inputs)


def uniform(fan_in: int) -> Callable:
    """PyTorch's default for weights and biases: uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return host_initializer(lambda g, shape: g.uniform(-bound, bound, shape))


def normal(deviation: float) -> Callable:
    """Normal around 0."""
    return host_initializer(lambda g, shape: g.normal(0.0, deviation, shape))


def kaiming_bound(fan_in: int, slope: float) -> float:
    """Returns the bound of a uniform start that keeps the scale through a leaky ReLU.

    References:
      He et al., Delving deep into rectifiers, ICCV 2015.
    """
    return math.sqrt(6.0 / ((1.0 + slope**2) * fan_in))


def kaiming_uniform(fan_in: int, slope: float) -> Callable:
    """Uniform in the bound of `kaiming_bound`."""
    bound = kaiming_bound(fan_in, slope)
    return host_initializer(lambda g, shape: g.uniform(-bound, bound, shape))


def kaiming_normal(gain: float = math.sqrt(2.0)) -> Callable:
    """Normal with deviation gain / sqrt(fan out), for kernels kD kH kW I O.

    References:
      He et al., Delving deep into rectifiers, ICCV 2015.
    """

    def draw(generator, shape):
        fan_out = math.prod(shape[:3]) * shape[4]
        return generator.normal(0.0, gain / math.sqrt(fan_out), shape)

    return host_initializer(draw)


def xavier_uniform() -> Callable:
    """Uniform in +-sqrt(6 / (fan in + fan out)), for kernels kD kH kW I O.

    References:
      Glorot and Bengio, Understanding the difficulty of training deep feedforward
      neural networks, AISTATS 2010.
    """

    def draw(generator, shape):
        fans = math.prod(shape[:3]) * (shape[3] + shape[4])
        bound = math.sqrt(6.0 / fans)
        return generator.uniform(-bound, bound, shape)

    return host_initializer(draw)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["image", "factor", "shift"],
    meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An image times a factor plus a shift, not worked out yet.

    What reads it works it out for itself: a backward pass then keeps the image alone.

    Attributes:
      image: N D H W C.
      factor: of N 1 1 1 C or of a shape that broadcasts to it.
      shift: likewise.
      shape: the first voxels along each axis that count; all of them if None.
    """

    image: jax.Array
    factor: jax.Array
    shift: jax.Array
    shape: tuple[int, int, int] | None = None

    def value(self) -> jax.Array:
        """Returns N D H W C."""
        d, h, w = self.shape or self.image.shape[1:4]
        image = self.image[:, :d, :h, :w]
        return image * self.factor.astype(image.dtype) + self.shift.astype(image.dtype)


def value(x: "jax.Array | Scaled") -> jax.Array:
    """Returns an image as it is, or worked out."""
    return x.value() if isinstance(x, Scaled) else x


class Convolution(nn.Module):
    """Kernel and bias of one layer of `jaxreg.nn.conv.api`, created and applied.

    Attributes:
      function: the layer, ``(x, kernel, bias, form=)``.
      shape: of the kernel, kD kH kW I O.
      activated: whether the input passes a leaky ReLU first.
      kernel_init: of the kernel; with zero biases. As PyTorch starts both if None.
      form: see `jaxreg.nn.conv.api`.
      dtype: of the arithmetic and the result; the input's if None.
    """

    function: Callable
    shape: tuple[int, ...]
    activated: bool = False
    kernel_init: Callable | None = None
    form: api.Form = "auto"
    dtype: str | None = None

    @nn.compact
    def __call__(self, x):
        """Applies the layer to N D H W I, or to parts of it along channels.

        A part may be `Scaled`.
        """
        kernel, bias = kernel_and_bias(
            self, self.shape, self.function, kernel_init=self.kernel_init
        )
        return convolved(
            x, kernel, bias, function=self.function, activated=self.activated,
            form=self.form, dtype=self.dtype,
        )  # fmt: skip


def kernel_and_bias(
    layer: nn.Module,
    shape: tuple[int, ...],
    function: Callable,
    *,
    kernel_init: Callable | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Creates or returns the parameters of one layer of `jaxreg.nn.conv.api`.

    Args:
      layer: whose parameters they are, "kernel" and "bias".
      shape: of the kernel, kD kH kW I O.
      function: of `jaxreg.nn.conv.api`.
      kernel_init: see `Convolution`.
    """
    kd, kh, kw, i, o = shape
    # PyTorch takes a transposed convolution's fan from the output channels.
    fan = kd * kh * kw * (o if function is api.conv4_transpose2 else i)
    kernel = layer.param("kernel", kernel_init or uniform(fan), shape)
    bias_init = nn.initializers.zeros if kernel_init else uniform(fan)
    return kernel, layer.param("bias", bias_init, (o,))


class Weights(nn.Module):
    """Kernel and bias of a layer, for a form of it that is no module.

    Attributes:
      shape: of the kernel, kD kH kW I O.
      function: see `kernel_and_bias`.
      kernel_init: see `Convolution`.
    """

    shape: tuple[int, ...]
    function: Callable = api.conv3
    kernel_init: Callable | None = None

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Creates or returns both."""
        return kernel_and_bias(
            self, self.shape, self.function, kernel_init=self.kernel_init
        )


def convolved(x: Any, kernel: jax.Array, bias: jax.Array, **settings: Any) -> jax.Array:
    """Applies a layer of `jaxreg.nn.conv.api` to N D H W I or parts of it.

    The backward pass scales, pads and activates once more instead of keeping all.

    Args:
      x: N D H W I, or parts of it along channels; a part may be `Scaled`.
      kernel: kD kH kW I O.
      bias: O.
      **settings: function, activated, form and dtype of `Convolution`.
    """
    return scheduling.recomputed(_convolved, x, kernel, bias, **settings)


def _convolved(x, kernel, bias, *, function, activated, form, dtype):
    x = tuple(map(value, x)) if isinstance(x, tuple) else value(x)
    dtype = dtype or jax.tree.leaves(x)[0].dtype
    x = jax.tree.map(lambda part: part.astype(dtype), x)
    x = jax.tree.map(leaky, x) if activated else x
    return function(x, kernel.astype(dtype), bias.astype(dtype), form=form)


class StridedConvolution(nn.Module):
    """Kernel, and bias if there is one, of `jaxreg.nn.conv.api.strided`.

    Attributes:
      outputs: channels.
      size: of the kernel, kD kH kW, odd.
      stride: per axis, 1 or 2.
      padding: voxels of zeros on either side, per axis; half the kernel if None.
      biased: whether there is a bias; it starts at zero.
      kernel_init: of the kernel.
      form: see `jaxreg.nn.conv.api`.
    """

    outputs: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] | None = None
    biased: bool = False
    kernel_init: Callable = kaiming_normal()
    form: api.Form = "auto"

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Applies the layer to N D H W I."""
        shape = (*self.size, x.shape[-1], self.outputs)
        kernel = self.param("kernel", self.kernel_init, shape)

        # The backward pass pads and folds once more instead of keeping both.
        y = scheduling.recomputed(
            _strided, x, kernel, stride=self.stride, form=self.form,
            padding=self.padding or tuple(k // 2 for k in self.size),
        )  # fmt: skip
        if not self.biased:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
        return y + bias.astype(y.dtype)[None, None, None, None]


def _strided(x, kernel, **settings):
    return api.strided(x, kernel.astype(x.dtype), **settings)


def instance_norm_leaky(x: Image, slope: float) -> Image:
    """Instance normalisation without parameters, then a leaky ReLU: N D H W C.

    Per sample and channel over the voxels, with the biased variance and epsilon 1e-5.

    References:
      Ulyanov et al., Instance normalization, 2016.
    """
    return scheduling.recomputed(_normalised, x, slope=slope)


def _normalised(x, *, slope):
    wide = x.astype(jnp.float32)
    mean = wide.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
    normal = (wide - mean) * jax.lax.rsqrt(variance + _NORM_EPSILON)
    return leaky(normal, slope).astype(x.dtype)


def convolution(
    function: Callable, inputs: int, outputs: int, name: str, form: api.Form, **options
) -> Convolution:
    """Returns a layer of `nn.conv.api` with its kernel's size from its function."""
    size = {api.conv1: 1, api.conv4_transpose2: 4}.get(function, 3)
    shape = (size, size, size, inputs, outputs)
    return Convolution(function, shape, form=form, name=name, **options)


class ConvBlock(nn.Module):
    """Convolution, instance normalisation, leaky ReLU; N D H W C, or parts of it."""

    inputs: int
    outputs: int
    slope: float = 0.01
    form: api.Form = "auto"
    function: Callable = api.conv3

    @nn.compact
    def __call__(self, x) -> Image:
        """Returns N D' H' W' outputs."""
        layer = convolution(self.function, self.inputs, self.outputs, "conv", self.form)
        return instance_norm_leaky(layer(x), self.slope)
