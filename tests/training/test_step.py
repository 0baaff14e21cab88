"""Both directions in one call, and the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.training import step as step_lib
from jaxreg.typing import Pair

SHAPE = (9, 8, 10)
MODEL = GradIcon(GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0))


def random_variables(model=MODEL, seed=0):
    """Fresh variables with a last layer that moves points."""
    variables = model.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        if path[-2].key == "last":
            return jnp.asarray(rng.uniform(-0.05, 0.05, value.shape), jnp.float32)
        return value

    return jax.tree_util.tree_map_with_path(leaf, variables)


def blobs(batch=2):
    """Pairs of a blob and the same blob one voxel on, not of the same brightness."""
    axes = [np.arange(n) for n in SHAPE]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)

    def blob(centre):
        return np.exp(-((grid - centre) ** 2).sum(-1) / 8)

    moving = np.stack([blob([4.0, 3.5 + i, 4.5]) for i in range(batch)])
    fixed = 0.7 * np.stack([blob([5.0, 3.5 + i, 4.5]) for i in range(batch)])
    return Pair(*(jnp.asarray(a[..., None], jnp.float32) for a in (moving, fixed)))


@jax.jit(static_argnums=(0, 4))
def apply(model, variables, moving, fixed, train):
    prediction, after = model.apply(variables, moving, fixed, train=train)
    return prediction.transform, after


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
    )


@pytest.mark.parametrize("train", [False, True])
def test_both_directions_equal_two_calls(train):
    variables, pair = random_variables(), blobs()
    run = jax.jit(step_lib.predict, static_argnums=0, static_argnames="train")
    (forward, backward, aux), after = run(MODEL, variables, pair, train=train)
    assert aux == {}
    first, between = apply(MODEL, variables, pair.moving, pair.fixed, train)
    second, last = apply(MODEL, between, pair.fixed, pair.moving, train)
    close(forward, first)
    close(backward, second)
    close(dict(after), dict(last))
    norm = after["batch_stats"]["step_1"]["norm_0"]
    assert norm["count"] == (2 if train else 0)
    if train:
        # The other order gives other running statistics.
        _, between = apply(MODEL, variables, pair.fixed, pair.moving, train)
        _, turned = apply(MODEL, between, pair.moving, pair.fixed, train)
        turned = turned["batch_stats"]["step_1"]["norm_0"]["mean"]
        assert np.abs(norm["mean"] - turned).max() > 1e-4
    else:
        close(dict(after), dict(variables))


@pytest.fixture(scope="module")
def trained():
    """Five updates of Adam from the identity."""
    optimizer = optax.adam(3e-3)
    step = jax.jit(step_lib.make_step(MODEL, Objective(similarity="ncc"), optimizer))
    variables, pair = MODEL.init(jax.random.key(0)), blobs()
    state = optimizer.init(variables["params"])
    noise = jax.random.normal(jax.random.key(1), (1, *SHAPE, 3))
    calls = []
    for _ in range(6):
        before = variables
        variables, state, parts, maps = step(variables, state, pair, noise)
        calls.append((before, variables, parts, maps))
    return calls


def test_training_lowers_the_loss(trained):
    losses = [float(parts["loss"]) for _, _, parts, *_ in trained]
    assert np.isfinite(losses).all()
    assert losses[5] < 0.98 * losses[0]


def test_each_step_moves_the_running_statistics_twice(trained):
    for index, (_, variables, *_) in enumerate(trained):
        norm = variables["batch_stats"]["step_1"]["norm_0"]
        assert norm["count"] == 2 * (index + 1)


def test_every_parameter_is_trained(trained):
    # From the second step on: behind a last layer of zeros there is no gradient.
    _, between, *_ = trained[0]
    _, variables, *_ = trained[-1]

    def moved(path, before, after):
        if not np.array_equal(before, after):
            return
        # Batch norm takes a constant away again, in training mode.
        assert path[-2].key.startswith("up") and path[-1].key == "bias"

    jax.tree_util.tree_map_with_path(moved, between["params"], variables["params"])


def test_parts_and_maps_are_those_before_the_update(trained):
    before, after, parts, maps = trained[0]
    for transform in (maps.forward, maps.backward):  # a fresh network is the identity
        np.testing.assert_array_equal(transform.steps[0].field, 0)
    assert parts["transform_magnitude"] == 0
    np.testing.assert_array_equal(before["params"]["step_1"]["last"]["kernel"], 0)
    assert np.any(after["params"]["step_1"]["last"]["kernel"])
