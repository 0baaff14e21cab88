"""Update rules beside PyTorch's, schedules beside their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.errors import UserError
from jaxreg.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
    only,
)

START = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
# Large gradients first, so that AMSGrad's maximum differs from the moment.
GRADIENTS = np.array(
    [[3.0, -1.0, 0.2, 5.0], [0.1, -0.1, 2.0, 0.01], [1.0, 0.5, -0.3, 0.02]] * 5,
    np.float32,
)


def ours(config):
    optimizer = make_optimizer(config, len(GRADIENTS))
    params = {"w": jnp.asarray(START)}
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = jax.jit(optimizer.update)({"w": gradient}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["w"])


def theirs(make):
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer = make(torch.optim, [w])
    for gradient in GRADIENTS:
        w.grad = torch.tensor(gradient)
        optimizer.step()
    return w.detach().numpy()


# Adam's second decay is 0.9 here: at 0.999 optax loses digits of the first steps' bias
# correction in float32 (1e-4 of the update).
@pytest.mark.torch
@pytest.mark.parametrize(
    ("config", "make"),
    [
        (
            OptimizerConfig(learning_rate=0.1, betas=(0.9, 0.9)),
            lambda o, w: o.Adam(w, lr=0.1, betas=(0.9, 0.9)),
        ),
        (
            OptimizerConfig("amsgrad", learning_rate=0.1, betas=(0.9, 0.7)),
            lambda o, w: o.Adam(w, lr=0.1, betas=(0.9, 0.7), amsgrad=True),
        ),
        (
            OptimizerConfig("amsgrad", learning_rate=0.1),
            lambda o, w: o.Adam(w, lr=0.1, amsgrad=True),
        ),
        (
            OptimizerConfig("amsgrad", learning_rate=0.1, betas=(0.0, 0.9)),
            lambda o, w: o.Adam(w, lr=0.1, betas=(0.0, 0.9), amsgrad=True),
        ),
        (
            OptimizerConfig("sgd", learning_rate=0.01, momentum=0.8, weight_decay=0.1),
            lambda o, w: o.SGD(w, lr=0.01, momentum=0.8, weight_decay=0.1),
        ),
        (
            OptimizerConfig(learning_rate=0.1, betas=(0.9, 0.9), weight_decay=0.1),
            lambda o, w: o.Adam(w, lr=0.1, betas=(0.9, 0.9), weight_decay=0.1),
        ),
        (
            OptimizerConfig(
                "adamw", learning_rate=0.1, betas=(0.9, 0.9), weight_decay=0.1
            ),
            lambda o, w: o.AdamW(w, lr=0.1, betas=(0.9, 0.9), weight_decay=0.1),
        ),
    ],
    ids=[
        "adam",
        "amsgrad",
        "amsgrad 0.999",
        "amsgrad 0",
        "sgd",
        "adam with decay",
        "adamw",
    ],
)
def test_updates_equal_pytorch(config, make):
    np.testing.assert_allclose(ours(config), theirs(make), rtol=1e-5)


def test_amsgrad_is_not_adam():
    adam, amsgrad = (
        ours(OptimizerConfig(name, learning_rate=0.1, betas=(0.9, 0.7)))
        for name in ("adam", "amsgrad")
    )
    assert np.abs(adam - amsgrad).max() > 1e-2


def test_gradients_are_clipped_by_their_norm():
    config = OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0, clip=0.5)
    optimizer = make_optimizer(config, 1)
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose([updates["a"], updates["b"]], [[-0.3], [-0.4]], 1e-6)


def test_schedules_follow_their_formulas():
    steps = np.arange(0, 101, 10)
    cosine = make_schedule(
        OptimizerConfig(learning_rate=2.0, schedule="cosine", final=0.1), 100
    )
    wanted = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * steps / 100)))
    np.testing.assert_allclose([cosine(s) for s in steps], wanted, rtol=1e-5)
    polynomial = make_schedule(
        OptimizerConfig(learning_rate=2.0, schedule="polynomial", power=0.9), 100
    )
    wanted = 2.0 * (1 - steps / 100) ** 0.9
    np.testing.assert_allclose(
        [polynomial(s) for s in steps], wanted, rtol=1e-5, atol=1e-6
    )


def test_rate_of_an_epoch_is_that_of_its_beginning_to_8_decimals():
    # Released PromptReg: numpy.round(base * (1 - epoch / epochs) ** 0.9, 8).
    config = OptimizerConfig(
        learning_rate=1e-4, schedule="polynomial", decay_every="epoch"
    )
    schedule = make_schedule(config, 30, per_epoch=10)
    wanted = np.round(1e-4 * (1 - np.arange(3) / 3) ** 0.9, 8)
    np.testing.assert_allclose(
        [float(schedule(s)) for s in range(30)], np.repeat(wanted, 10), rtol=1e-6
    )
    warm = dataclasses.replace(config, warm_up=4)
    found = [float(make_schedule(warm, 30, per_epoch=10)(s)) for s in (2, 4, 9, 10, 19)]
    np.testing.assert_allclose(
        found,
        np.round(1e-4 * np.array([0.5, 1, 1, *[(1 - 6 / 26) ** 0.9] * 2]), 8),
        rtol=1e-6,
    )


def test_warm_up_grows_linearly_and_the_rest_decays_to_the_end():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warm_up=10)
    schedule = make_schedule(config, 110)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10)], [0.0, 0.5, 1.0])
    assert schedule(110) == pytest.approx(0.0, abs=1e-6)
    assert schedule(60) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adm"},
        {"schedule": "step"},
        {"learning_rate": 0.0},
        {"clip": -1.0},
        {"warm_up": -1},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"betas": (0.9, float("nan"))},
        {"betas": (0.9,)},
        {"epsilon": 0.0},
        {"power": -1.0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=rf"optimizer\.{next(iter(wrong))}"):
        OptimizerConfig(**wrong)


def test_only_some_parameters_change_and_the_others_keep_every_bit():
    # A decay would move parameters whose gradient is zero.
    config = OptimizerConfig("adam", learning_rate=0.1, weight_decay=0.5)
    params = {"bank": jnp.ones((3, 2)), "kernel": jnp.full((2, 2), 1.3)}
    mask = {"bank": jnp.array([[0.0], [1.0], [0.0]]), "kernel": jnp.zeros((1, 1))}
    rule = only(make_optimizer(config, 5), lambda _: mask)
    gradient = jax.tree.map(jnp.ones_like, params)
    state, moved = rule.init(params), params
    for _ in range(3):
        updates, state = rule.update(gradient, state, moved)
        moved = optax.apply_updates(moved, updates)
    np.testing.assert_array_equal(moved["kernel"], params["kernel"])
    np.testing.assert_array_equal(moved["bank"][::2], params["bank"][::2])
    assert (moved["bank"][1] < 0.8).all()
