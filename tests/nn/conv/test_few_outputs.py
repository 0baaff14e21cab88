"""Convolutions to few channels: where they are taken, and what they keep apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.nn.conv import api, few_outputs


@pytest.mark.parametrize(
    ("inputs", "outputs", "suits"),
    [(24, 8, True), (27, 9, False), (9, 3, True), (8, 3, False), (3, 1, True)],
)
def test_where_it_is_taken(monkeypatch, inputs, outputs, suits):
    seen = []
    own = few_outputs.same
    monkeypatch.setattr(few_outputs, "same", lambda *a: (seen.append(a), own(*a))[1])
    x, kernel = jnp.ones((1, 3, 4, 5, inputs)), jnp.ones((3, 3, 3, inputs, outputs))
    api.conv3(x, kernel, jnp.zeros(outputs), form="slab")
    assert bool(seen) == suits == few_outputs.suits(kernel.shape)


@pytest.mark.torch
@pytest.mark.parametrize("taps", [(3, 1, 1), (3, 5, 3), (5, 3, 3)])
def test_kernels_of_other_sizes_match_torch(taps):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        rng.standard_normal(shape).astype("f4")
        for shape in ((2, 6, 5, 7, 7), (*taps, 7, 2), (2, 6, 5, 7, 2))
    )
    image, weight = (
        torch.from_numpy(np.ascontiguousarray(a, np.float64)).requires_grad_()
        for a in (np.moveaxis(x, -1, 1), kernel.transpose(4, 3, 0, 1, 2))
    )
    y = torch.nn.functional.conv3d(image, weight, padding=[k // 2 for k in taps])
    y.backward(torch.from_numpy(np.moveaxis(dy, -1, 1).astype(np.float64)))
    found, back = jax.vjp(lambda *a: few_outputs.same(*a), (x,), kernel)
    (dx,), dk = back(jnp.asarray(dy))
    for value, reference in (
        (found, y.detach().numpy().transpose(0, 2, 3, 4, 1)),
        (dx, image.grad.numpy().transpose(0, 2, 3, 4, 1)),
        (dk, weight.grad.numpy().transpose(2, 3, 4, 1, 0)),
    ):
        assert np.abs(value - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("channels", [(9, 3), (32, 16)])
def test_what_is_not_finite_stays_in_its_scan(channels):
    x = np.ones((2, 8, 12, 13, channels[0]), np.float32)
    x[1, 4, 6, 6, channels[0] // 2] = np.nan
    kernel = jnp.ones((3, 3, 3, *channels))
    y = api.conv3(jnp.asarray(x), kernel, jnp.zeros(channels[1]), form="slab")
    assert np.isfinite(y[0]).all()
    assert np.isfinite(y[1, :3]).all() or channels == (32, 16)  # or of four planes
    assert np.isnan(y[1, 3:6, 5:8, 5:8]).all()


@pytest.mark.parametrize(("taps", "outputs"), [(1, 4), (3, 3), (3, 5)])
def test_bfloat16_is_added_up_in_float32(taps, outputs):
    """Positive numbers in many blocks: sums of bfloat16 would stop growing."""
    rng = np.random.default_rng(0)
    layer = api.conv1 if taps == 1 else api.conv3

    def value_and_gradient(x, kernel):
        bias = jnp.zeros(outputs, x.dtype)
        y, back = jax.vjp(lambda k: layer(x, k, bias, form="slab"), kernel)
        return y, back(jnp.ones_like(y))[0]

    given = [
        jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.bfloat16)
        for shape in ((1, 26, 48, 48, 9), (taps, taps, taps, 9, outputs))
    ]
    found = value_and_gradient(*given)
    wanted = value_and_gradient(*(a.astype("f4") for a in given))
    for value, reference in zip(found, wanted, strict=True):
        assert value.dtype == jnp.bfloat16
        error = np.abs(np.asarray(value, "f4") - reference).max()
        assert error <= 2**-8 * np.abs(reference).max()
