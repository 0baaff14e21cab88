"""SAM against arrays of the released code, and on other sizes and in training."""

import ast
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.models import sam
from jaxreg.nn import layers
from jaxreg.typing import Batching
from jaxreg.weights.pytorch import sam as sam_lib

NAME = "sam_small"
# XLA's own convolutions compile faster than they would run on larger grids.
SMALL = sam.SamConfig(channels=(4, 6, 8, 10), embedding=5, form="native")


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def distance(value, reference):
    """The largest error relative to the largest value."""
    difference = np.asarray(value, np.float64) - reference
    return np.abs(difference).max() / np.abs(reference).max()


def stats(array):
    """Mean, deviation, largest absolute value, first five in PyTorch's order."""
    a = np.asarray(array, np.float64)
    return np.array([a.mean(), a.std(), np.abs(a).max(), *a.ravel()[:5]])


# --- weights by a hash of 32-bit integers, as the reference arrays were made ---------


def hashed(count, index, seed):
    """Returns `count` numbers in [0, 1) for tensor number `index`."""
    x = np.arange(count, dtype=np.uint32)
    x += np.uint32((1 + 1000003 * (index + 1) + 7919 * seed) % 2**32)
    for factor, shift in ((2654435769, 16), (0x7FEB352D, 15), (0x846CA68B, 16)):
        x *= np.uint32(factor)
        x ^= x >> np.uint32(shift)
    return x / 2.0**32


def hashed_tensor(name, shape, index, seed):
    v = 2.0 * hashed(int(np.prod(shape)), index, seed).reshape(shape) - 1.0
    if name.endswith("running_var"):
        v = 1.25 + 0.5 * v
    elif name.endswith("bn.weight"):
        v = 1.0 + 0.2 * v
    elif len(shape) == 1:
        v = 0.1 * v
    else:
        v *= np.sqrt(6.0 / np.prod(shape[1:]))
    return v.astype(np.float32)


@pytest.fixture(scope="module")
def state(golden):
    g = golden(NAME)
    shapes = [ast.literal_eval(str(text)) for text in g["param_shapes"]]
    names = [str(name) for name in g["param_names"]]
    return {
        name: hashed_tensor(name, shape, int(index), int(g["seed"]))
        for name, shape, index in zip(names, shapes, g["param_index"], strict=True)
    }


@pytest.fixture(scope="module")
def found(golden, state):
    """Embeddings and everything in between, by one program."""
    g = golden(NAME)
    variables = sam_lib.TABLE.to_variables(state)
    config = sam.SamConfig(**sam_lib.TABLE.read_config(state))
    run = jax.jit(
        lambda v, x: sam.SamNetwork(config).apply(
            v, x, capture_intermediates=True, mutable=["intermediates"]
        )
    )
    embeddings, seen = run(variables, channels_last(g["input"]))
    seen = jax.tree.map(
        lambda a: np.moveaxis(np.asarray(layers.value(a)), -1, 1),
        seen,
        is_leaf=lambda a: isinstance(a, layers.Scaled),
    )
    return embeddings, seen["intermediates"]


def layer_of(seen, name):
    """Our layer of the released code's name, N C D H W."""
    parts = name.split(".")
    if name == "backbone.pool2":
        return seen["backbone"]["__call__"][0][0]
    if parts[0] == "backbone":
        inner = seen["backbone"]
        if parts[1] == "conv1":
            return inner["stem"]["__call__"][0]
        inner = inner[f"stage_{parts[1].removeprefix('layer')}_{parts[2]}"]
        for part in parts[3:]:
            names = {"conv1": "conv_1", "conv2": "conv_2", "downsample": "shortcut"}
            inner = inner[names[part]]
        return inner["__call__"][0]
    heads = {
        "neck.fpn_convs.0": "fine",
        "read_out_head.lateral_convs.0": "lateral_coarse",
        "read_out_head.fpn_convs.0": "coarse",
    }
    if name.startswith("neck.lateral_convs"):
        return seen[f"lateral_{parts[2]}"]["__call__"][0]
    return seen[heads[name]]["__call__"][0]


@pytest.mark.golden
def test_the_recipe_gives_the_stored_weights(golden, state):
    g = golden(NAME)
    if int(g["seed"]) == 1:
        first, last = state["backbone.conv1.conv.weight"], [*state.values()][-1]
        np.testing.assert_allclose(
            first.ravel()[:2], [0.10653549, -0.099928081], rtol=1e-6
        )
        np.testing.assert_allclose(last[:2], [0.0026540651, -0.03211192], rtol=1e-6)
    for array, expected in zip(state.values(), g["param_stats"], strict=True):
        assert distance(stats(array), expected) < 1e-6


@pytest.mark.golden
def test_every_layer(golden, found):
    g = golden(NAME)
    names = [str(name) for name in g["layer_names"]]
    for name, shape, expected in zip(
        names, g["layer_shapes"], g["layer_stats"], strict=True
    ):
        layer = layer_of(found[1], name)
        assert layer.shape == tuple(shape), name
        assert distance(stats(layer), expected) < 1e-4, name


@pytest.mark.golden
def test_features_in_between(golden, found):
    g, seen = golden(NAME), found[1]
    for level, x in enumerate(seen["backbone"]["__call__"][0]):
        assert x.shape == tuple(g[f"backbone_out{level}_shape"])
        part = x[:, ::8, ::4, ::3, ::3]
        assert distance(part, g[f"backbone_out{level}_sub"]) < 1e-4, level
    fine, coarse = (seen[name]["__call__"][0] for name in ("fine", "coarse"))
    assert distance(fine[:, :, ::4, ::5, ::5], g["fine_unnormalised_sub"]) < 1e-4
    assert distance(coarse, g["coarse_unnormalised"]) < 1e-4


@pytest.mark.golden
def test_embeddings(golden, found):
    g, embeddings = golden(NAME), found[0]
    fine, coarse = (
        np.moveaxis(np.asarray(a), -1, 1) for a in (embeddings.fine, embeddings.coarse)
    )
    assert fine.shape == tuple(g["fine_shape"])
    assert distance(coarse, g["coarse"]) < 1e-4
    assert distance(fine[:, :, ::4, ::5, ::5], g["fine_sub"]) < 1e-4
    assert distance(fine[:, :, 2:6, 4:10, 4:10], g["fine_patch"]) < 1e-4
    assert distance(stats(fine), g["fine_stats"]) < 1e-4


# --- beyond the stored arrays -------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return sam.init(SMALL, jax.random.key(0))


def image_of(shape, seed=0):
    return np.random.default_rng(seed).uniform(-50, 205, (*shape, 1)).astype("f4")


def test_released_sizes_are_the_default(golden):
    assert sam.SamConfig() == sam.SamConfig((64, 128, 256, 512), 128)
    variables = jax.eval_shape(
        lambda k: sam.init(sam.SamConfig(), k), jax.random.key(0)
    )
    sizes = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if path[-1].key != "count"
    ]
    assert len(sizes) == 117 and sum(sizes) == 32_842_688


def test_fresh_weights_have_their_deviations(small):
    params = small["params"]
    kernel = np.asarray(params["backbone"]["stem"]["conv"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (3 * 7 * 7 * 4)), rel=0.1)
    head = np.asarray(params["fine"]["kernel"])
    bound = np.sqrt(6 / (27 * 10))
    assert 0.95 * bound < np.abs(head).max() <= bound
    assert not np.any(params["fine"]["bias"])


@pytest.mark.parametrize(
    ("shape", "fine", "coarse"),
    [
        ((2, 8, 32, 16), (4, 16, 8), (2, 2, 1)),
        ((1, 7, 17, 18), (3, 9, 9), (2, 2, 2)),
    ],
)
def test_sizes_of_the_embeddings(small, shape, fine, coarse):
    found = jax.eval_shape(lambda x: sam.features(SMALL, small, x), image_of(shape))
    assert found.fine.shape == (shape[0], *fine, 5)
    assert found.coarse.shape == (shape[0], *coarse, 5)


@pytest.mark.parametrize(
    ("shape", "pairs", "slabs"),
    [
        ((1, 8, 16, 16), 2, 2),
        ((2, 9, 18, 17), 3, 2),  # odd D, whose last slice the stem alone sees
        ((1, 14, 17, 16), 3, 3),  # the last slab has less than the others
        ((1, 3, 16, 16), 1, 1),  # no loop
    ],
)
def test_slabs_are_the_whole(small, monkeypatch, shape, pairs, slabs):
    image, rng = image_of(shape), np.random.default_rng(2)
    # Statistics that a fresh network, mean 0 and variance 1, does not have.
    moved = jax.tree.map(
        lambda a: a + rng.uniform(0.2, 1, a.shape).astype("f4"), small["batch_stats"]
    )
    variables = {**small, "batch_stats": moved}

    def run(v, x):
        return sam.features(SMALL, v, x)

    n, d, h, w = shape
    stem = f"f32[{n},{d},{h},{w},4]"
    assert stem in str(jax.make_jaxpr(run)(variables, image))
    whole = jax.jit(run)(variables, image)
    monkeypatch.setattr(sam, "_SLAB_BYTES", pairs * n * 2 * h * w * 4 * 4)
    in_slabs = functools.partial(run)  # a function that was not traced before
    assert (stem in str(jax.make_jaxpr(in_slabs)(variables, image))) == (slabs == 1)
    found = jax.jit(in_slabs)(variables, image)
    assert distance(found.fine, whole.fine) < 1e-5
    assert distance(found.coarse, whole.coarse) < 1e-5


def test_gradient_of_slabs(small, monkeypatch):
    def gradient(x):
        return jax.grad(lambda x: sam.features(SMALL, small, x).fine[..., 0].sum())(x)

    image = image_of((1, 9, 16, 16))
    whole = jax.jit(gradient)(image)
    monkeypatch.setattr(sam, "_SLAB_BYTES", 0)
    assert distance(jax.jit(functools.partial(gradient))(image), whole) < 1e-4


@pytest.fixture(scope="module")
def train():
    return jax.jit(
        lambda v, x, batching: sam.train_features(SMALL, v, x, batching=batching),
        static_argnums=2,
    )


@pytest.fixture(scope="module")
def use():
    return jax.jit(sam.features, static_argnums=0)


def test_training_moves_the_statistics_towards_those_in_use(small, train, use):
    image = image_of((2, 8, 16, 32))
    (found, moved), variables = train(small, image, Batching()), small
    for _ in range(60):
        _, variables = train(variables, image, Batching())
    used = use(SMALL, variables, image)
    # But for the unbiased variance in use, over as few as four voxels.
    assert np.abs(found.fine - used.fine).max() < 0.15
    norm = moved["batch_stats"]["backbone"]["stem"]["norm"]
    assert norm["count"] == 1 and np.any(norm["mean"])
    lengths = np.linalg.norm(found.fine, axis=-1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)


def test_calls_end_to_end_are_normalised_apart(small, train):
    image = image_of((2, 8, 16, 32))
    apart, _ = train(small, image, Batching(calls=2))
    # Twice the same image has the statistics of one.
    together, _ = train(small, np.repeat(image[:1], 2, 0), Batching())
    assert distance(apart.coarse[0], together.coarse[0]) < 1e-4
    assert distance(apart.coarse[1], together.coarse[1]) > 0.1


def loss(params, config, variables):
    """Of two images in training, and the variables after it."""
    image, rng = image_of((2, 8, 16, 32)), np.random.default_rng(1)
    found, after = sam.train_features(config, {**variables, "params": params}, image)
    products = [
        jnp.sum(rng.normal(size=e.shape) * e) for e in (found.fine, found.coarse)
    ]
    return sum(products), after


def test_gradient_reaches_every_parameter(small):
    gradient = jax.jit(jax.grad(lambda p: loss(p, SMALL, small)[0]))(small["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf), path


def test_computing_again_keeps_less_and_changes_no_number(small):
    def kept(config):
        pull = jax.eval_shape(
            lambda p: jax.vjp(lambda p: loss(p, config, small)[0], p)[1],
            small["params"],
        )
        return sum(x.size for x in jax.tree.leaves(pull) if x.shape[:1] == (2,))

    again = dataclasses.replace(SMALL, remat="networks")
    assert kept(again) < 0.5 * kept(SMALL)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    found = [run(small["params"], config, small) for config in (SMALL, again)]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        # Relative to each array's largest number: normalisation amplifies rounding.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max())


def test_bfloat16_is_near_float32(small, use):
    image = image_of((2, 8, 16, 32))
    half = dataclasses.replace(SMALL, precision="bfloat16")
    found, rough = (use(c, small, image) for c in (SMALL, half))
    assert rough.fine.dtype == jnp.float32
    assert 0 < np.abs(found.fine - rough.fine).max() < 0.1


def test_intensities():
    window = (-800.0, 400.0)
    image = np.array([0.0, 1.0, 0.5])
    expected = (np.array([-800.0, 400.0, -200.0]) + 1024) * 255 / 4095 - 50
    np.testing.assert_allclose(sam.to_sam_range(image, window), expected, rtol=1e-6)
    ends = sam.to_sam_range(image[:2], (-2000.0, 4000.0))
    np.testing.assert_allclose(ends, sam.SAM_RANGE)


def test_zeros_have_no_direction_and_no_nan():
    value, gradient = jax.value_and_grad(lambda x: sam.normalise(x).sum())(
        jnp.zeros((1, 1, 1, 1, 3))
    )
    assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(1, 1, 16, 16, 1), (1, 4, 16, 16, 2), (4, 16, 16)])
def test_images_that_are_refused(small, shape):
    with pytest.raises(UserError, match="SAM expects N D H W 1"):
        sam.features(SMALL, small, np.zeros(shape, "f4"))


def test_widths_that_are_refused():
    with pytest.raises(UserError, match="four positive numbers"):
        sam.SamConfig(channels=(1, 2, 3))  # pyright: ignore
