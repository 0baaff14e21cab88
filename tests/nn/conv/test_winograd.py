"""Minimal filtering against PyTorch in double precision, and its rounding error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.nn.conv import api, blocked, winograd

# Taps, shape, batch, channels of two parts of the input, channels out, margin of zeros.
# Depths of a result that fours tile and do not; strips of a plane that do not tile it.
CASES = [
    ((3, 3, 3), (6, 7, 5), 1, (6, 0), 5, (0, 0, 0)),
    ((3, 3, 3), (9, 6, 8), 2, (5, 3), 20, (1, 1, 1)),
    ((3, 1, 1), (8, 5, 4), 2, (7, 0), 3, (0, 0, 0)),
    ((3, 2, 4), (11, 7, 6), 1, (20, 0), 4, (1, 0, 2)),
    ((3, 3, 3), (6, 77, 92), 2, (5, 0), 2, (1, 1, 1)),
]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize(("taps", "shape", "batch", "parts", "out", "margin"), CASES)
def test_matches_torch(taps, shape, batch, parts, out, margin):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(sum(shape))
    x = normal(rng, batch, *shape, sum(parts))
    inner = (slice(m, n - m) for m, n in zip(margin, shape, strict=True))
    known = np.zeros_like(x)
    known[(slice(None), *inner)] = 1
    x *= known
    kernel = normal(rng, *taps, sum(parts), out)
    image, weight = (
        torch.from_numpy(np.ascontiguousarray(a, np.float64)).requires_grad_()
        for a in (np.moveaxis(x, -1, 1), kernel.transpose(4, 3, 0, 1, 2))
    )
    y = torch.nn.functional.conv3d(image, weight)
    dy = normal(rng, *y.shape)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    xs = (x[..., : parts[0]], x[..., parts[0] :]) if parts[1] else (x,)
    around = [(k - 1 - m,) * 2 for k, m in zip(taps, margin, strict=True)]
    padded = np.pad(np.moveaxis(dy, 1, -1), ((0, 0), *around, (0, 0)))
    wanted = (
        np.moveaxis(y.detach().numpy(), 1, -1),
        weight.grad.numpy().transpose(2, 3, 4, 1, 0),
    )
    for own in (winograd, blocked):
        found = (
            own.convolved(xs, kernel),
            own.kernel_gradient(xs, padded, kernel.shape, margin),
        )
        for value, reference in zip(found, wanted, strict=True):
            assert value.shape == reference.shape
            assert np.abs(value - reference).max() <= 1e-5 * np.abs(reference).max()


def test_loses_little_more_than_direct_sums():
    rng = np.random.default_rng(0)
    x = normal(rng, 1, 18, 18, 18, 48)
    kernel = normal(rng, 3, 3, 3, 48, 32)
    dy = normal(rng, 1, 16, 16, 16, 32)
    padded = np.pad(dy, ((0, 0), (2, 2), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        x.astype(np.float64), (3, 3, 3), (1, 2, 3)
    )
    exact = (
        np.einsum("ndhwiabc,abcio->ndhwo", windows, kernel, optimize=True),
        np.einsum("ndhwiabc,ndhwo->abcio", windows, dy, optimize=True),
    )

    def errors(own):
        found = (
            own.convolved((x,), kernel),
            own.kernel_gradient((x,), padded, kernel.shape, (0, 0, 0)),
        )
        return [
            np.sqrt(np.mean((value - true) ** 2) / np.mean(true**2))
            for value, true in zip(found, exact, strict=True)
        ]

    # Points 0, 1, -1, 2, -2 would be 2.4 and 3.5 times as far off.
    for minimally, directly, most in zip(
        errors(winograd), errors(blocked), (2.2, 3.0), strict=True
    ):
        assert minimally <= most * directly


@pytest.mark.parametrize(
    ("shape", "channels", "dtype", "forward", "gradient"),
    [
        ((16, 18, 18), (32, 16), "f4", True, True),
        ((16, 18, 18), (16, 16), "f4", False, True),
        ((16, 18, 18), (32, 32), "bfloat16", False, False),
        ((7, 18, 18), (32, 32), "f4", False, False),  # five planes: two fours
        ((5, 18, 18), (32, 32), "f4", False, False),  # three, fewer than four
        ((16, 8, 8), (32, 32), "f4", False, False),
        ((16, 18, 18), (2, 512), "f4", False, False),
    ],
)
def test_where_it_gains(shape, channels, dtype, forward, gradient):
    xs = (jnp.zeros((1, *shape, channels[0]), dtype),)
    kernel = (3, 3, 3, *channels)
    assert winograd.suits(xs, kernel) == forward
    assert winograd.suits_gradient(xs, kernel) == gradient
    assert not winograd.suits(xs, (2, 2, 2, *channels))


def test_the_layer_takes_it(monkeypatch):
    seen = []
    for name in ("convolved", "kernel_gradient"):
        own = getattr(winograd, name)
        monkeypatch.setattr(
            winograd,
            name,
            lambda *a, own=own, name=name: (seen.append(name), own(*a))[1],
        )
    x, kernel = jnp.ones((1, 8, 12, 12, 32)), jnp.ones((3, 3, 3, 32, 16))

    def total(x, kernel):
        return api.conv3(x, kernel, jnp.zeros(16), form="slab").sum()

    jax.grad(total, (0, 1))(x, kernel)
    assert seen == ["convolved", "convolved", "kernel_gradient"]
