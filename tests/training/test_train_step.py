"""The training step: parts of a batch, moving average, bad numbers, replicas, types."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from jaxreg.losses.objective import Objective, TaskObjective
from jaxreg.models.base import Prediction
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.nn.unet import BatchNorm
from jaxreg.space.transform import Displacement, Transform
from jaxreg.training import parallel
from jaxreg.training import state as state_lib
from jaxreg.training import step as step_lib
from jaxreg.training.step import StepConfig
from jaxreg.typing import ONE_CALL, Batching, Pair

SHAPE = (8, 7, 9)
PLAIN = StepConfig()
MEAN_SQUARE = Objective(similarity="mse", inverse_consistency_weight=0.5)
CONFIG = GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0)


@dataclasses.dataclass(frozen=True)
class Shift:
    """A model of three numbers: every point moves by them, times the images' mean.

    Its statistics count the calls, as batch norm's do.
    """

    def init(self, key):
        del key
        return {
            "params": {"by": jnp.array([0.1, -0.2, 0.3])},
            "batch_stats": {"calls": jnp.zeros(())},
        }

    def apply(self, variables, moving, fixed, *, train=False, batching=ONE_CALL):
        del fixed
        scale = moving.mean((1, 2, 3, 4))[:, None, None, None, None]
        field = scale * jnp.ones((1, *SHAPE, 1)) * variables["params"]["by"]
        calls = variables["batch_stats"]["calls"] + batching.calls * train
        after = {**variables, "batch_stats": {"calls": calls}}
        return Prediction(Transform((Displacement(field),))), after


def loss(function):
    """Makes a function a `step.Loss` of both directions."""
    function.directions = "both"
    return function


@loss
def squares(forward, backward, pair, noise, *, aux, axis=None):
    """A loss by hand: the mean square of both displacements and of a bit of noise."""
    del axis, aux, pair
    a, b = (t.steps[0].field for t in (forward, backward))
    value = jnp.mean((a + 0.01 * noise) ** 2) + jnp.mean((b - 1) ** 2)
    return value, {"loss": value}


def pair_of(batch, key):
    del key
    return Pair(moving=batch["moving"], fixed=batch["fixed"])


def batch_of(count, seed=0, **more):
    rng = np.random.default_rng(seed)
    images = {}
    for name in ("moving", "fixed"):
        # Smooth, as interpolated noise has another slope on either side of a voxel.
        noise = rng.uniform(size=(count, *SHAPE, 1))
        smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5, 0))
        images[name] = jnp.asarray(3 * smooth - 1, jnp.float32)
    return images | more


def moved_variables(model, seed=0):
    """Fresh variables with a last layer that moves points."""
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        if path[-2].key == "last":
            value = rng.uniform(-0.05, 0.05, value.shape)
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(leaf, model.init(jax.random.key(seed)))


def started(model, optimizer, *, ema=False, variables=None):
    variables = model.init(jax.random.key(0)) if variables is None else variables
    return state_lib.start(variables, optimizer, jax.random.key(5), ema=ema)


def made(model, objective, optimizer, config=PLAIN, prepare=pair_of):
    return jax.jit(
        step_lib.make_train_step(model, objective, optimizer, prepare, config)
    )


def descent():
    """Plain gradient descent that keeps the gradient."""
    return optax.chain(optax.trace(0.0), optax.scale(-1.0))


def gradient_in(state):
    return state.opt_state[0].trace


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def distance(a, b):
    """L2 distance of two trees, relative to the first."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_steps_share_one_program():
    """What a step returns is traced as what it was given: training compiles once."""
    model, adam = Shift(), optax.adam(0.1)
    step = step_lib.make_train_step(model, squares, adam, pair_of, StepConfig(ema=0.7))
    once = parallel.compile_step(
        chex.assert_max_traces(step.__call__, n=1), parallel.Layout("single")
    )
    state = started(model, adam, ema=True)
    for seed in range(3):
        state, _ = once(state, batch_of(2, seed))


# --- accumulation ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """The start, two pairs twice over, and the plain step of two pairs, compiled."""
    model = GradIcon(CONFIG)
    start = started(model, descent(), variables=moved_variables(model))
    return start, batch_of(4), made(model, MEAN_SQUARE, descent())


def share(batch, part):
    return {name: array[part] for name, array in batch.items()}


def test_accumulated_parts_average_to_the_gradient_by_hand(network):
    # Parts are every n-th pair; each has batch statistics of its own and finds the
    # running ones that the part before it left. All parts share the step's key.
    start, batch, alone = network
    step = made(GradIcon(CONFIG), MEAN_SQUARE, descent(), StepConfig(accumulate=2))
    after, parts = step(start, batch)
    first, one = alone(start, share(batch, slice(0, None, 2)))
    stats = first.variables["batch_stats"]
    between = dataclasses.replace(
        start, variables={**start.variables, "batch_stats": stats}
    )
    second, two = alone(between, share(batch, slice(1, None, 2)))
    gradients = gradient_in(first), gradient_in(second)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    assert distance(mean, gradient_in(after)) < 1e-5
    assert_close(second.variables["batch_stats"], after.variables["batch_stats"])
    np.testing.assert_allclose(parts["loss"], (one["loss"] + two["loss"]) / 2, 1e-5)
    np.testing.assert_allclose(parts["gradient_norm"], optax.tree.norm(mean), 1e-4)
    # The two parts are not alike, so an average of one with itself would be seen.
    assert distance(*gradients) > 0.01


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_loss_that_is_a_mean_over_pairs_does_not_see_the_parts(accumulate):
    model, sgd = Shift(), descent()
    start = started(model, sgd)
    after, _ = made(model, squares, sgd, StepConfig(accumulate=accumulate))(
        start, batch_of(4)
    )
    whole, _ = made(model, squares, sgd)(start, batch_of(4))
    assert_close(gradient_in(whole), gradient_in(after))
    assert after.variables["batch_stats"]["calls"] == 2 * accumulate


# --- moving average, noise, numbers that are not finite -------------------------------


def test_the_moving_average_is_the_one_by_hand():
    model, adam = Shift(), optax.adam(0.1)
    step = made(model, squares, adam, StepConfig(ema=0.7))
    state = started(model, adam, ema=True)
    chex.assert_trees_all_equal(state.ema, state.variables)
    average = np.asarray(state.variables["params"]["by"])
    for seed in range(4):
        state, _ = step(state, batch_of(2, seed))
        average = 0.7 * average + 0.3 * np.asarray(state.variables["params"]["by"])
        np.testing.assert_allclose(state.ema["params"]["by"], average, rtol=1e-5)
    used = state_lib.averaged(state)
    chex.assert_trees_all_equal(used, state.ema)
    assert np.abs(used["params"]["by"] - state.variables["params"]["by"]).max() > 1e-3


def test_batch_statistics_are_averaged_with_the_parameters_they_belong_to(network):
    _, batch, _ = network
    model = GradIcon(CONFIG)
    step = made(model, MEAN_SQUARE, descent(), StepConfig(ema=0.7))
    state = started(model, descent(), ema=True, variables=moved_variables(model))

    def norm(variables):
        return variables["batch_stats"]["step_1"]["norm_0"]

    average = {name: np.asarray(norm(state.ema)[name]) for name in ("mean", "var")}
    for part in (slice(0, 2), slice(2, 4)):
        state, _ = step(state, share(batch, part))
        for name, old in average.items():
            average[name] = 0.7 * old + 0.3 * np.asarray(norm(state.variables)[name])
            np.testing.assert_allclose(
                norm(state.ema)[name], average[name], rtol=1e-5, atol=1e-7
            )
            assert np.abs(average[name] - norm(state.variables)[name]).max() > 1e-3
    # A count is not averaged: two directions a step.
    assert norm(state_lib.averaged(state))["count"] == 4


def test_each_step_has_noise_of_its_own_and_a_repeated_one_has_the_same():
    model, sgd = Shift(), optax.sgd(0.0)
    step = made(model, squares, sgd)
    first, one = step(started(model, sgd), batch_of(2))
    _, two = step(first, batch_of(2))
    _, again = step(started(model, sgd), batch_of(2))
    assert one["loss"] != two["loss"]
    assert one["loss"] == again["loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_pair_leaves_everything_but_the_step_as_it_was(value):
    model, adam = Shift(), optax.adam(0.1)
    step = made(model, squares, adam, StepConfig(ema=0.5))
    good, parts = step(started(model, adam, ema=True), batch_of(2))
    assert parts["finite"] and good.step == 1
    batch = batch_of(2)
    batch["moving"] = batch["moving"].at[1, 0, 0, 0].set(value)
    bad, parts = step(good, batch)
    assert not parts["finite"]
    assert bad.step == 2
    for name in ("variables", "opt_state", "ema"):
        chex.assert_trees_all_equal(getattr(bad, name), getattr(good, name))
    # And it goes on from there.
    after, parts = step(bad, batch_of(2))
    assert parts["finite"] and after.step == 3
    assert np.any(after.variables["params"]["by"] != good.variables["params"]["by"])


def test_a_gradient_that_is_not_finite_counts_even_if_the_loss_is():
    @loss
    def root(forward, backward, pair, noise, *, aux, axis=None):
        del backward, pair, noise, aux, axis
        # Finite at 0, but its slope is not.
        value = jnp.sqrt(jnp.sum((forward.steps[0].field * 0) ** 2))
        return value, {"loss": value}

    model, sgd = Shift(), descent()
    start = started(model, sgd)
    after, parts = made(model, root, sgd)(start, batch_of(1))
    assert np.isfinite(parts["loss"]) and not parts["finite"]
    chex.assert_trees_all_equal(after.variables, start.variables)


# --- batch statistics of replicas -----------------------------------------------------


def normalised_by_hand(x, momentum=0.1, epsilon=1e-5):
    """PyTorch's batch norm in training mode: output, new mean, new variance."""
    mean, variance = x.mean((0, 1, 2, 3)), x.var((0, 1, 2, 3))
    unbiased = x.var((0, 1, 2, 3), ddof=1)
    out = (x - mean) / np.sqrt(variance + epsilon)
    return out, momentum * mean, (1 - momentum) + momentum * unbiased


def test_each_replica_has_statistics_of_its_own():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 4, 5, 2)).astype("f4")
    x[2:] = 3 * x[2:] + 1
    norm = BatchNorm(Batching(replicas=2))
    variables = norm.init(jax.random.key(0), jnp.asarray(x), train=True)
    got, after = norm.apply(
        variables, jnp.asarray(x), train=True, mutable=["batch_stats"]
    )
    halves = [normalised_by_hand(half.astype("f8")) for half in (x[:2], x[2:])]
    np.testing.assert_allclose(
        got.value(), np.concatenate([h[0] for h in halves]), rtol=1e-4, atol=1e-5
    )
    for i, name in ((1, "mean"), (2, "var")):
        by_hand = (halves[0][i] + halves[1][i]) / 2
        np.testing.assert_allclose(
            after["batch_stats"][name], by_hand, rtol=1e-5, atol=1e-6
        )
    assert after["batch_stats"]["count"] == 1


def test_a_step_with_replicas_is_the_mean_of_steps_on_each_share(network):
    start, batch, alone = network
    step = made(GradIcon(CONFIG), MEAN_SQUARE, descent(), StepConfig(replicas=2))
    after, parts = step(start, batch)
    shares = [alone(start, share(batch, half)) for half in (slice(0, 2), slice(2, 4))]
    gradients = [gradient_in(state) for state, _ in shares]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    assert distance(mean, gradient_in(after)) < 1e-5
    assert distance(*gradients) > 0.01
    np.testing.assert_allclose(
        parts["loss"], np.mean([float(found["loss"]) for _, found in shares]), rtol=1e-5
    )
    stats = [s.variables["batch_stats"]["step_1"]["norm_0"] for s, _ in shares]
    got = after.variables["batch_stats"]["step_1"]["norm_0"]
    assert got["count"] == 2
    for name in ("mean", "var"):
        by_hand = (stats[0][name] + stats[1][name]) / 2
        np.testing.assert_allclose(got[name], by_hand, rtol=1e-5, atol=1e-6)


# --- precision, rematerialisation, tasks ----------------------------------------------


def test_whole_networks_may_be_computed_again(network):
    start, batch, alone = network
    batch = share(batch, slice(0, 2))
    model = GradIcon(dataclasses.replace(CONFIG, remat="networks"))
    again, found = made(model, MEAN_SQUARE, descent())(start, batch)
    after, parts = alone(start, batch)
    np.testing.assert_allclose(found["loss"], parts["loss"], rtol=1e-6)
    assert distance(gradient_in(after), gradient_in(again)) < 1e-5
    assert_close(again.variables["batch_stats"], after.variables["batch_stats"])


@loss
def inner_product(forward, backward, pair, noise, *, aux, axis=None):
    """A loss that is linear in the displacements: its gradient has no kinks."""
    del pair, noise, aux, axis
    a, b = (t.steps[0].field for t in (forward, backward))
    rng = np.random.default_rng(4)
    factors = ndimage.gaussian_filter(
        rng.normal(size=(2, *a.shape)), (0, 0, 2, 2, 2, 0)
    )
    loss = jnp.sum(factors[0] * a) + jnp.sum(factors[1] * b)
    return loss, {"loss": loss}


def test_half_precision_keeps_parameters_and_maps_in_single(network):
    start, batch, _ = network
    batch = share(batch, slice(0, 2))
    model = GradIcon(dataclasses.replace(CONFIG, precision="bfloat16"))
    half, found = made(model, inner_product, descent())(start, batch)
    after, parts = made(GradIcon(CONFIG), inner_product, descent())(start, batch)
    assert found["finite"]
    kept = {leaf.dtype for leaf in jax.tree.leaves(half.variables["params"])}
    assert kept == {np.dtype("f4")}
    assert half.variables["batch_stats"]["step_1"]["norm_0"]["var"].dtype == "f4"
    # Close, but not the same: bfloat16 has eight bits.
    gap = distance(gradient_in(after), gradient_in(half))
    assert 1e-4 < gap < 0.15, gap
    assert found["loss"] != parts["loss"]
    shapes = jax.eval_shape(
        lambda v, b: step_lib.predict(model, v, pair_of(b, None))[0],
        start.variables,
        batch,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("f4")}


def test_each_task_is_scored_by_its_own_objective():
    # Three pairs of two tasks: the mean of what each objective says of its pairs alone.
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (2, 3, *SHAPE, 2)).astype("f4")
    images = batch_of(3)
    pair = Pair(
        **images,
        objective=jnp.array([1, 0, 1]),
        moving_onehot=jnp.asarray(labels[0]),
        fixed_onehot=jnp.asarray(labels[1]),
        valid=jnp.ones((3, 2), bool),
    )
    several = (
        Objective(similarity="mse", inverse_consistency_weight=0.2),
        Objective(similarity="ncc", inverse_consistency_weight=2.0, dice_weight=0.5),
    )
    noise = jnp.asarray(rng.normal(size=(1, *SHAPE, 3)), jnp.float32)
    fields = 0.1 * jnp.asarray(rng.normal(size=(2, 3, *SHAPE, 3)), jnp.float32)
    score = jax.jit(lambda objective, *given: objective(*given, noise)[1],
                    static_argnums=0)  # fmt: skip

    def given(fields, pair):
        return *(Transform((Displacement(field),)) for field in fields), pair

    def one(i):
        return jax.tree.map(lambda a: a[i : i + 1], pair)

    parts = score(TaskObjective(several), *given(fields, pair))
    alone = [
        score(several[task], *given(fields[:, i : i + 1], one(i)))
        for i, task in enumerate([1, 0, 1])
    ]
    for name in ("loss", "similarity", "inverse_consistency"):
        mean = np.mean([found[name] for found in alone])
        np.testing.assert_allclose(parts[name], mean, rtol=1e-5, err_msg=name)
    dice = [found["dice"] for found in alone if "dice" in found]
    assert len(dice) == 2
    np.testing.assert_allclose(parts["dice"], np.mean(dice), rtol=1e-5)
    # With the tasks exchanged it would be another loss.
    turned = dataclasses.replace(pair, objective=1 - pair.objective)
    other = score(TaskObjective(several), *given(fields, turned))
    assert abs(other["loss"] - parts["loss"]) > 1e-3
