"""One U-Net against the original's arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.nn import blocks, doubling, unet
from jaxreg.typing import Batching
from jaxreg.weights.pytorch import gradicon

SMALL = unet.UNetConfig(channels_down=(2, 3, 6), channels_up=(3, 4))
NAME = "unigradicon_unet_small"


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def variables_of(g, *groups):
    """The stored state as a U-Net's variables; later groups replace earlier ones."""
    state = {}
    for group in groups:
        # A U-Net on its own, named as a network of one.
        state |= {
            "net." + key.removeprefix(f"{group}/"): value
            for key, value in g.items()
            if key.startswith(f"{group}/")
        }
    config = gradicon.TABLE.read_config(state)
    assert config["downsampled_steps"] == config["fullres_steps"] == 0
    variables = gradicon.TABLE.to_variables(state)
    sizes = {name: config[name] for name in ("channels_down", "channels_up")}
    network = unet.TallUNet2(unet.UNetConfig(**sizes))
    return network, {name: tree["step_1"] for name, tree in variables.items()}


@jax.jit(static_argnums=(0,), static_argnames="calls")
def in_training(network, variables, moving, fixed, calls=1):
    field, after = network.apply(
        variables,
        moving,
        fixed,
        train=True,
        batching=Batching(calls),
        mutable=["batch_stats"],
    )
    return field, after["batch_stats"]


def check(value, reference):
    """Within 1e-4 of the largest displacement."""
    limit = 1e-4 * np.abs(reference).max()
    np.testing.assert_allclose(value, reference, rtol=0, atol=limit)


def check_statistics(after, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        dict(after),
        dict(wanted),
    )


def without_counts(statistics):
    return {
        layer: {name: v for name, v in leaves.items() if name != "count"}
        for layer, leaves in statistics.items()
    }


def random_variables(seed=0, config=SMALL):
    """Random weights, the last layer and batch norm's included."""
    network = unet.TallUNet2(config)
    image = jnp.zeros((1, 4, 4, 4, config.channels_down[0] // 2))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image, image)
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        if path[-1].key == "count":
            return np.int32(3)
        values = rng.uniform(-0.2, 0.2, like.shape).astype(np.float32)
        return 1 + values if path[-1].key in ("scale", "var") else values

    return network, jax.tree_util.tree_map_with_path(leaf, shapes)


def random_pair(seed, batch, shape=(7, 6, 9)):
    rng = np.random.default_rng(seed)
    return rng.random((2, batch, *shape, 1)).astype(np.float32)


@pytest.mark.golden
def test_sizes_match_reference(golden):
    g = golden(NAME)
    network, _ = variables_of(g, "state")
    assert network.config.channels_down == tuple(g["channels_down"])
    assert network.config.channels_up == tuple(g["channels_up"])


@pytest.mark.golden
def test_evaluation_matches_reference(golden):
    g = golden(NAME)
    network, variables = variables_of(g, "state")
    moving, fixed = channels_last(g["A"]), channels_last(g["B"])
    check(
        jax.jit(network.apply)(variables, moving, fixed), channels_last(g["out_eval"])
    )


@pytest.mark.golden
def test_training_matches_reference(golden):
    g = golden(NAME)
    network, variables = variables_of(g, "state")
    moving, fixed = channels_last(g["A"]), channels_last(g["B"])
    field, after = in_training(network, variables, moving, fixed)
    check(field, channels_last(g["out_train"]))
    _, wanted = variables_of(g, "state", "state_after_train")
    check_statistics(after, wanted["batch_stats"])


@pytest.mark.golden
def test_training_on_a_batch_matches_reference(golden):
    g = golden(NAME)
    network, variables = variables_of(g, "state")
    moving, fixed = (
        channels_last(np.concatenate([g[name], g[f"{name}_second"]])) for name in "AB"
    )
    field, after = in_training(network, variables, moving, fixed)
    check(field, channels_last(g["out_train_batch2"]))
    _, wanted = variables_of(g, "state", "state_after_train_batch2")
    # The counter is not among the stored arrays.
    check_statistics(without_counts(after), without_counts(wanted["batch_stats"]))


@pytest.mark.torch
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_fit_keeps_the_first_or_pads_in_front(icon, channels):
    import torch
    from icon_registration import networks

    x = np.random.default_rng(0).random((2, 2, 3, 4, 3)).astype(np.float32)
    size = torch.Size((2, channels, 2, 3, 4))
    wanted = networks.pad_or_crop(
        torch.from_numpy(np.moveaxis(x, -1, 1).copy()), size, 3
    )
    fitted = doubling.fit(jnp.asarray(x), channels)
    np.testing.assert_array_equal(fitted, channels_last(wanted.numpy()))


def test_groups_equal_separate_calls():
    network, variables = random_variables()
    moving, fixed = random_pair(1, 4)
    together, after = in_training(network, variables, moving, fixed, calls=2)
    fields, separate = [], variables
    for part in (slice(0, 2), slice(2, 4)):
        field, statistics = in_training(network, separate, moving[part], fixed[part])
        separate = {**variables, "batch_stats": statistics}
        fields.append(field)
    check(together, np.concatenate(fields))
    check_statistics(after, separate["batch_stats"])
    counts = [layer["count"] for layer in after.values()]
    assert counts == [5] * len(counts)


def test_groups_keep_their_order():
    network, variables = random_variables()
    moving, fixed = random_pair(1, 4)
    _, after = in_training(network, variables, moving, fixed, calls=2)
    _, turned = in_training(
        network, variables, np.roll(moving, 2, 0), np.roll(fixed, 2, 0), calls=2
    )
    first, second = after["norm_0"]["mean"], turned["norm_0"]["mean"]
    assert np.abs(first - second).max() > 1e-4


def test_a_fresh_network_gives_no_displacement():
    network = unet.TallUNet2(SMALL)
    moving, fixed = random_pair(0, 1, (3, 2, 5))
    variables = jax.jit(network.init)(jax.random.key(0), moving, fixed)
    field = jax.jit(network.apply)(variables, moving, fixed)
    assert field.shape == (1, 3, 2, 5, 3)
    np.testing.assert_array_equal(field, 0)
    counts = [layer["count"] for layer in variables["batch_stats"].values()]
    assert counts == [0] * len(counts)


def test_initial_weights_are_within_the_bounds_of_torch():
    network = unet.TallUNet2(SMALL)
    image = jnp.zeros((1, 4, 4, 4, 1))
    params = jax.jit(network.init)(jax.random.key(1), image, image)["params"]
    # fan_in of a transposed convolution counts the output channels, as PyTorch does.
    fans = {"down_0": 2 * 27, "down_1": 3 * 27, "up_0": 3 * 64, "up_1": 4 * 64}
    for name, fan in fans.items():
        bound = fan**-0.5
        assert 0.9 * bound < np.abs(params[name]["kernel"]).max() <= bound
        assert np.abs(params[name]["bias"]).max() <= bound


def test_wrong_channels_are_refused():
    network, variables = random_variables()
    image = jnp.zeros((1, 4, 4, 4, 2))
    with pytest.raises(ValueError, match="4 channels together, the U-Net expects 2"):
        network.apply(variables, image, image)


# --- forms ----------------------------------------------------------------------------

# Sums of a few hundred products, in another order: 2^-24 each, of numbers of size 1.
ROUNDING = 2e-5


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_form(form, train, variables, pair, cotangent):
    """Field, statistics, and the gradients of all that they depend on."""
    config = dataclasses.replace(SMALL, form=form)
    network = unet.TallUNet2(config)

    def run(params, moving, fixed):
        field, after = network.apply(
            {**variables, "params": params}, moving, fixed, train=train,
            batching=Batching(2), mutable=["batch_stats"],
        )  # fmt: skip
        return field, after["batch_stats"]

    field, pull, after = jax.vjp(run, variables["params"], *pair, has_aux=True)
    return field, after, pull(cotangent)


@pytest.mark.parametrize(
    ("shape", "train", "forms"),
    [
        ((7, 6, 9), True, ("native", "folded")),
        ((8, 2, 6), True, ("folded",)),
        ((5, 4, 3), False, ("folded",)),
    ],
)
def test_forms_agree_in_values_and_gradients(shape, train, forms):
    _, variables = random_variables()
    pair = random_pair(1, 2, shape)
    cotangent = np.random.default_rng(2).normal(size=(2, *shape, 3)).astype("f4")
    found = {
        form: in_form(form, train, variables, pair, cotangent)
        for form in ("slab", *forms)
    }
    for form in forms:
        for ours, direct in zip(
            jax.tree.leaves(found[form]), jax.tree.leaves(found["slab"]), strict=True
        ):
            scale = max(1.0, np.abs(direct).max())
            np.testing.assert_allclose(ours, direct, rtol=0, atol=ROUNDING * scale)


@pytest.mark.parametrize("form", ["slab", "folded"])
def test_bfloat16_in_either_form(form):
    """As far from float32 as eight bits of a number of size 1 are."""
    network, variables = random_variables()
    pair = random_pair(1, 1)
    low = dataclasses.replace(SMALL, form=form, precision="bfloat16")
    exact = network.apply(variables, *pair)
    field = unet.TallUNet2(low).apply(variables, *pair)
    assert field.dtype == jnp.float32
    limit = 4 * 2.0**-8 * np.abs(exact).max()
    np.testing.assert_allclose(field, exact, rtol=0, atol=limit)


def test_the_gradient_of_a_kernel_is_summed_in_float32():
    """Of bfloat16 arrays, whose sums would keep eight bits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((2, 4, 5, 6, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.random((3, 3, 3, 8, 24)), jnp.bfloat16)
    dy = jnp.asarray(rng.random((2, 4, 5, 6, 24)), jnp.bfloat16)

    def gradients(x, kernel, dy):
        return jax.vjp(blocks._in_float32, x, kernel)[1](dy.astype(jnp.float32))

    wanted = gradients(*(a.astype(jnp.float32) for a in (x, kernel, dy)))
    dx, dw = gradients(x, kernel.astype(jnp.float32), dy)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(dx.astype(jnp.float32), wanted[0], rtol=2.0**-8)
    np.testing.assert_allclose(dw, wanted[1], rtol=1e-5)
