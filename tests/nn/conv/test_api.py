"""Every layer, in every form, against PyTorch's functional operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.nn.conv import api, folded
from jaxreg.xla import platforms

FORMS = ("slab", "native", "folded", "auto")
LAYERS = {
    "conv3": (api.conv3, 3),
    "conv3_stride2": (api.conv3_stride2, 3),
    "conv4_transpose2": (api.conv4_transpose2, 4),
}
# Shape, batch, channels of two parts of the input, channels out. The large ones take
# several blocks, the last of them incomplete.
CASES = [
    ((7, 6, 5), 1, (2, 0), 4),
    ((4, 5, 8), 2, (4, 1), 3),
    ((2, 3, 2), 2, (1, 2), 3),
    ((6, 25, 31), 1, (1, 1), 4),
    ((9, 51, 60), 1, (2, 1), 2),
    # Blocks of planes and strips of a plane that do not tile the volume.
    ((7, 25, 31), 1, (3, 3), 5),
    ((3, 75, 90), 2, (6, 0), 5),
    # Kernels that outweigh their volume, at even and odd sizes.
    ((2, 3, 2), 2, (20, 12), 16),
    ((1, 2, 1), 1, (24, 0), 16),
    # Enough channels and voxels for minimal filtering, whole and in parts.
    ((7, 12, 13), 1, (20, 12), 16),
    # Few outputs of many inputs.
    ((5, 6, 7), 2, (10, 2), 3),
    ((1, 4, 3), 1, (9, 0), 3),
    ((2, 21, 35), 1, (5, 1), 2),
]
SIZES = [(7, 6, 5), (4, 5, 8), (2, 3, 2)]


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def check(value, reference, *, tolerance=1e-5):
    """The largest error is at most `tolerance` of the largest value."""
    value, reference = np.asarray(value), np.asarray(reference)
    assert value.shape == reference.shape
    assert np.abs(value - reference).max() <= tolerance * np.abs(reference).max()


def in_torch(name, x, kernel, bias, cotangent):
    """Value and gradients (input, kernel, bias) in double precision."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional

    def tensor(array, axes):
        moved = np.ascontiguousarray(np.transpose(array, axes), np.float64)
        return torch.from_numpy(moved).requires_grad_()

    image = tensor(x, (0, 4, 1, 2, 3))
    transposed = name == "conv4_transpose2"
    weight = tensor(kernel, (3, 4, 0, 1, 2) if transposed else (4, 3, 0, 1, 2))
    shift = tensor(bias, (0,))
    if transposed:
        y = f.conv_transpose3d(image, weight, shift, stride=2, padding=1)
    else:
        stride = 2 if name == "conv3_stride2" else 1
        y = f.conv3d(image, weight, shift, stride=stride, padding=1)
    y.backward(torch.from_numpy(np.moveaxis(cotangent, -1, 1).astype(np.float64)))
    grad = weight.grad.numpy()
    grad = np.transpose(grad, (2, 3, 4, 0, 1) if transposed else (2, 3, 4, 1, 0))
    return (
        channels_last(y.detach().numpy()),
        channels_last(image.grad.numpy()),
        grad,
        shift.grad.numpy(),
    )


def in_every_form(layer, parts, x, kernel, bias, cotangent):
    """The same four arrays for each form, from the input whole and in two parts."""

    def one(form, split):
        def run(x, kernel, bias):
            given = (x[..., : parts[0]], x[..., parts[0] :]) if split else x
            return layer(given, kernel, bias, form=form)

        y, back = jax.vjp(run, x, kernel, bias)
        return y, *back(cotangent)

    whole_only = (False,) if parts[1] == 0 else (False, True)
    return {(form, split): one(form, split) for form in FORMS for split in whole_only}


@pytest.mark.torch
@pytest.mark.parametrize(("shape", "batch", "parts", "out"), CASES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_gradients_match_torch(name, shape, batch, parts, out):
    layer, taps = LAYERS[name]
    rng = np.random.default_rng(sum(shape))
    x = normal(rng, batch, *shape, sum(parts))
    kernel, bias = normal(rng, taps, taps, taps, sum(parts), out), normal(rng, out)
    after = jax.eval_shape(layer, x, kernel, bias).shape
    cotangent = normal(rng, *after)
    reference = in_torch(name, x, kernel, bias, cotangent)
    run = jax.jit(in_every_form, static_argnums=(0, 1))
    for arrays in run(layer, parts, x, kernel, bias, cotangent).values():
        for value, wanted in zip(arrays, reference, strict=True):
            check(value, wanted)


STRIDED = [
    ((6, 7, 8), (3, 7, 7), (1, 1, 1), (1, 3, 3)),
    ((5, 7, 8), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((5, 8, 7), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((4, 7, 6), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    ((5, 7, 8), (1, 1, 1), (2, 2, 2), (0, 0, 0)),
    ((6, 9, 8), (2, 2, 4), (2, 1, 2), (0, 1, 0)),
]


@pytest.mark.torch
@pytest.mark.parametrize(("shape", "taps", "stride", "padding"), STRIDED)
def test_strided_matches_torch(shape, taps, stride, padding):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(sum(shape))
    x, kernel = normal(rng, 2, *shape, 3), normal(rng, *taps, 3, 4)
    image, weight = (
        torch.from_numpy(np.ascontiguousarray(a, np.float64)).requires_grad_()
        for a in (np.moveaxis(x, -1, 1), kernel.transpose(4, 3, 0, 1, 2))
    )
    y = torch.nn.functional.conv3d(image, weight, stride=stride, padding=padding)
    cotangent = normal(rng, *y.shape)
    y.backward(torch.from_numpy(cotangent.astype(np.float64)))
    wanted = (
        channels_last(y.detach().numpy()),
        channels_last(image.grad.numpy()),
        weight.grad.numpy().transpose(2, 3, 4, 1, 0),
    )

    @jax.jit
    def run(x, kernel, cotangent):
        def layer(form):
            return lambda x, k: api.strided(
                x, k, stride=stride, padding=padding, form=form
            )

        found = [jax.vjp(layer(form), x, kernel) for form in FORMS]
        return [(y, *back(cotangent)) for y, back in found]

    for arrays in run(x, kernel, channels_last(cotangent)):
        for value, reference in zip(arrays, wanted, strict=True):
            check(value, reference)


@pytest.mark.parametrize(
    ("shape", "stride"), [((4, 4, 4), (1, 3, 1)), ((4, 2, 4), (1, 1, 1))]
)
def test_strided_refuses(shape, stride):
    x, kernel = np.zeros((1, *shape, 1), "f4"), np.zeros((1, 3, 3, 1, 1), "f4")
    with pytest.raises(ValueError, match="axis 1 has"):
        api.strided(x, kernel, stride=stride)


@pytest.mark.torch
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SIZES)
def test_pooling_and_upsampling_match_torch(shape, batch):
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    rng = np.random.default_rng(batch)
    x = normal(rng, batch, *shape, 3)

    def torch_pool(t):
        return f.avg_pool3d(t, 2, ceil_mode=True)

    def torch_up(t):
        return f.interpolate(
            t, scale_factor=2, mode="trilinear", align_corners=False
        )  # fmt: skip

    for layer, original in (
        (api.average_pool2, torch_pool),
        (api.upsample2, torch_up),
    ):
        t = torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float64)).requires_grad_()
        y = original(t)
        cotangent = normal(rng, *y.shape)
        y.backward(torch.from_numpy(cotangent.astype(np.float64)))
        value, back = jax.vjp(jax.jit(layer), x)
        check(value, channels_last(y.detach().numpy()))
        (gradient,) = back(jnp.asarray(channels_last(cotangent)))
        check(gradient, channels_last(t.grad.numpy()))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("layer", "name"), [(api.average_pool2, "pool"), (api.upsample2, "up")]
)
def test_pooling_and_upsampling_match_reference(golden, layer, name):
    g = golden("gradicon_preprocess")
    given, wanted = (channels_last(g[f"{name}_{end}"]) for end in ("in", "out"))
    check(jax.jit(layer)(given), wanted)


def test_pooling_averages_what_exists():
    line = jnp.arange(7.0)[None, :, None, None, None]
    line = jnp.broadcast_to(line, (1, 7, 2, 2, 1))
    np.testing.assert_allclose(
        api.average_pool2(line)[0, :, 0, 0, 0], [0.5, 2.5, 4.5, 6.0]
    )


def test_space_to_depth_and_back():
    x = normal(np.random.default_rng(0), 2, 4, 6, 8, 3)
    folded = api.space_to_depth(x)
    assert folded.shape == (2, 2, 3, 4, 24)
    np.testing.assert_array_equal(api.depth_to_space(folded), x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("parts", [(3,), (2, 1), (5,)])
def test_channel_mismatch_is_refused(name, parts):
    layer, taps = LAYERS[name]
    given = tuple(jnp.zeros((1, 4, 4, 4, c)) for c in parts)
    kernel = jnp.zeros((taps, taps, taps, 4, 2))
    words = f"{sum(parts)} channels, the kernel expects 4"
    with pytest.raises(ValueError, match=words):
        layer(given if len(given) > 1 else given[0], kernel, jnp.zeros(2))


def test_pooling_and_repetition_of_blocks():
    x = normal(np.random.default_rng(0), 2, 4, 6, 8, 3)
    block = x[1, 2:4, 4:6, 2:4, 1]
    assert api.max_pool2(x)[1, 1, 2, 1, 1] == block.max()
    assert np.isclose(api.average_pool2(x)[1, 1, 2, 1, 1], block.mean(), rtol=1e-5)
    pooled = api.average_pool(x, (4, 2, 1))
    assert pooled.shape == (2, 1, 3, 8, 3)
    assert np.isclose(pooled[1, 0, 2, 3, 1], x[1, :, 4:6, 3, 1].mean(), rtol=1e-5)
    repeated = api.repeat2(x)
    assert repeated.shape == (2, 8, 12, 16, 3)
    check(api.max_pool2(repeated), x)
    np.testing.assert_array_equal(repeated[:, 1::2, ::2, 1::2], x)


@pytest.mark.parametrize("shape", [(4, 6, 2), (5, 4, 7), (1, 2, 3)])
def test_pooling_of_folded_blocks(shape):
    """The form for TPU; sums of eight numbers in another order."""
    x = jnp.asarray(normal(np.random.default_rng(0), 2, *shape, 2), jnp.float32)
    cotangent = jnp.ones(jax.eval_shape(api.average_pool2, x).shape, jnp.float32)
    wanted, pull = jax.vjp(api.average_pool2, x)
    found, own_pull = jax.vjp(folded.average_pool2, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(*own_pull(cotangent), *pull(cotangent), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "channels", "platform", "folds"),
    [
        (48, 16, "tpu", True),
        (48, 16, "cuda", False),
        (16, 16, "tpu", False),
        (48, 24, "tpu", False),
    ],
)
def test_few_channels_of_many_voxels_are_folded_for_tpu(
    size, channels, platform, folds
):
    """In the layer and its gradients: blocks of eight voxels as channels."""
    x = jax.ShapeDtypeStruct((1, size, size, size, channels), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, channels, channels), jnp.bfloat16)

    def loss(x, kernel):
        bias = jnp.zeros(channels, x.dtype)
        return jnp.sum(api.conv3(x, kernel, bias).astype(jnp.float32) ** 2)

    with platforms.tracing_for(platform):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    convolutions = [t for t in text.splitlines() if "stablehlo.convolution" in t]
    assert len(convolutions) >= 3  # the layer, and a gradient for each argument
    wide = f"x{8 * channels}x"
    assert all((wide in line) == folds for line in convolutions)
