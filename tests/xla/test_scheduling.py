"""What should wait, waits and keeps its value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.nn import layers
from jaxreg.xla import scheduling


def squared(x, weight, *, power):
    return weight * x**power


def test_a_recomputed_function_has_its_value_and_gradient():
    x, weight = jnp.arange(1.0, 7.0).reshape(2, 3), jnp.array([2.0, 3.0, 5.0])

    def direct(x, weight):
        return jnp.sum(jnp.sin(squared(x, weight, power=2)))

    def indirect(x, weight):
        return jnp.sum(jnp.sin(scheduling.recomputed(squared, x, weight, power=2)))

    for wanted, found in zip(
        jax.value_and_grad(direct, (0, 1))(x, weight),
        jax.jit(jax.value_and_grad(indirect, (0, 1)))(x, weight),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), wanted, found)


def test_a_tied_array_waits_for_every_entry_of_the_batch():
    """The compiler may not see that nothing is added: NaN shows that it is."""
    array = jnp.ones((2, 3))
    other = jnp.array([[[1.0], [2.0]], [[jnp.nan], [jnp.nan]]])
    tied = jax.jit(scheduling.depends_on)(array, other)
    np.testing.assert_array_equal(np.isnan(tied), [[False] * 3, [True] * 3])
    np.testing.assert_array_equal(scheduling.depends_on(array, jnp.float32(7.0)), array)


def test_mapped_is_map():
    xs = jnp.arange(12.0).reshape(4, 3)
    found = jax.jit(lambda xs: scheduling.mapped(lambda x: x[:2] ** 2, xs, like=xs))(xs)
    np.testing.assert_array_equal(found, jax.lax.map(lambda x: x[:2] ** 2, xs))


def test_zeros_are_zeros():
    assert not np.any(jax.jit(lambda x: scheduling.zeros((2, 3), x))(jnp.ones(5)))


def test_the_gradient_of_a_layer_keeps_its_input_alone():
    """The padded and activated copies of a convolution's input are made again."""
    shape = (1, 24, 24, 24, 8)
    layer = layers.convolution(layers.api.conv3, 8, 8, "c", "auto", activated=True)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def volumes(count):
        def loss(variables, x):
            for _ in range(count):
                x = layer.apply(variables, x)
            return jnp.sum(x**2)

        compiled = jax.jit(jax.grad(loss)).lower(variables, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * np.prod(shape))

    if jax.default_backend() != "cpu":
        pytest.skip("other compilers plan otherwise")
    # One volume more for each layer; with jax.checkpoint 2.3 on this backend.
    assert (volumes(8) - volumes(4)) / 4 < 1.3
