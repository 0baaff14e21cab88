"""Instance optimisation of a network's weights and of a displacement itself.

Against the original: tests/models/test_gradicon.py.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.registration.optimization import displacement, network
from jaxreg.space import fields, sampling
from jaxreg.space.transform import Affine
from jaxreg.typing import Pair

TINY = GradIcon(GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0))
SHAPE = (9, 8, 10)
STEPS = 3
CHEAP = Objective(similarity="ncc")
PARTS = (
    "loss",
    "inverse_consistency",
    "similarity",
    "transform_magnitude",
    "folds",
)


# --- a network ----------------------------------------------------------------------


def tiny_variables(seed=0):
    variables = TINY.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        if path[-2].key == "last":
            return jnp.asarray(rng.uniform(-0.05, 0.05, value.shape), jnp.float32)
        return value

    return jax.tree_util.tree_map_with_path(leaf, variables)


def tiny_pair(seed=0, batch=1):
    images = np.random.default_rng(seed).random((2, batch, *SHAPE, 1))
    return Pair(*jnp.asarray(images, jnp.float32))


def optimised(variables, *, key=0, **options):
    return network.optimize_network(
        TINY,
        variables,
        tiny_pair(),
        CHEAP,
        **{"steps": STEPS, "key": jax.random.key(key), **options},
    )


def equal(a, b):
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))


def test_loaded_weights_are_unchanged():
    variables = tiny_variables()
    copy = jax.tree.map(lambda a: np.array(a, copy=True), variables)
    result = optimised(variables, learning_rate=1e-2)
    assert result.history["loss"][-1] != result.history["loss"][0]
    assert equal(variables, copy)  # bitwise, and not given away to the program


def test_running_statistics_are_used_and_stay():
    # They are inputs only: the first maps are the prediction, in evaluation mode, and
    # as many updates of nothing leave it.
    variables = tiny_variables()
    result = optimised(variables, learning_rate=0.0)
    predicted = network.predict(TINY, variables, tiny_pair())
    for got, wanted in (
        (result.forward, predicted.forward),
        (result.backward, predicted.backward),
    ):
        np.testing.assert_allclose(got.steps[0].field, wanted.steps[0].field, atol=1e-7)
    magnitude = result.history["transform_magnitude"]
    np.testing.assert_array_equal(magnitude, magnitude[0])


def test_history_has_one_entry_more_than_steps():
    result = optimised(tiny_variables())
    assert set(result.history) == set(PARTS)
    assert {v.shape for v in result.history.values()} == {(STEPS + 1,)}


def test_last_entry_belongs_to_the_result():
    result = optimised(tiny_variables(), learning_rate=1e-2)
    moved = result.forward.on_grid(SHAPE) - sampling.identity(SHAPE)
    magnitude = result.history["transform_magnitude"]
    np.testing.assert_allclose(magnitude[-1], jnp.mean(moved**2), rtol=1e-4)
    assert magnitude[-1] != magnitude[-2]


def test_the_same_key_gives_the_same_result():
    first, second, other = (optimised(tiny_variables(), key=k) for k in (1, 1, 2))
    assert equal(first.forward, second.forward)
    assert equal(first.history, second.history)
    assert not equal(first.history, other.history)


def test_each_step_draws_its_own_noise():
    result = optimised(tiny_variables(), learning_rate=0.0)
    consistency = result.history["inverse_consistency"]
    assert len(np.unique(consistency)) == STEPS + 1


def test_progress_counts_the_steps():
    calls = []
    result = optimised(tiny_variables(), progress=lambda *call: calls.append(call))
    assert [step for step, _, _ in calls] == list(range(1, STEPS + 1))
    assert {total for _, total, _ in calls} == {STEPS}
    for index, (_, _, parts) in enumerate(calls):
        assert parts == {k: float(v[index]) for k, v in result.history.items()}


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match="at least 1"):
        optimised(tiny_variables(), steps=steps)
    with pytest.raises(ValueError, match="at least 1"):
        displacement.optimize_displacement(
            tiny_pair(), CHEAP, steps=steps, key=jax.random.key(0)
        )


def test_pairs_of_one_shape_share_one_program(monkeypatch):
    """Neither another pair, nor weights, rate or number of steps is traced anew."""
    once = chex.assert_max_traces(network._network_step.__wrapped__, n=1)
    monkeypatch.setattr(
        network, "_network_step",
        jax.jit(once, static_argnames=("model", "objective"), donate_argnames="state"),
    )  # fmt: skip
    predict = chex.assert_max_traces(network._predict.__wrapped__, n=1)
    monkeypatch.setattr(network, "_predict", jax.jit(predict, static_argnames="model"))
    for seed, rate, steps in ((0, 1e-2, 2), (1, 1e-3, 3)):
        variables, pair = tiny_variables(seed), tiny_pair(seed)
        network.predict(TINY, variables, pair)
        network.optimize_network(
            TINY, variables, pair, CHEAP,
            steps=steps, learning_rate=rate, key=jax.random.key(seed),
        )  # fmt: skip


def test_predict_equals_the_model():
    variables, pair = tiny_variables(), tiny_pair(batch=2)
    result = network.predict(TINY, variables, pair)
    assert result.history == {}
    apply = jax.jit(lambda *given: TINY.apply(*given)[0].transform)
    for got, images in (
        (result.forward, (pair.moving, pair.fixed)),
        (result.backward, (pair.fixed, pair.moving)),
    ):
        (step,) = apply(variables, *images).steps
        np.testing.assert_allclose(got.steps[0].field, step.field, atol=1e-6)


# --- a displacement ------------------------------------------------------------------

CUBE = (24, 24, 24)
CONFIG = displacement.DisplacementConfig(factors=(2, 1), affine_factor=2)
DIRECT_STEPS = 40


def blobs(points, seed=0):
    """A sum of Gaussian blobs at points N D H W 3, unit."""
    rng = np.random.default_rng(seed)
    value = 0.0
    for _ in range(14):
        centre, width = rng.uniform(0.2, 0.8, 3), rng.uniform(0.05, 0.12)
        distance = ((np.asarray(points) - centre) ** 2).sum(-1)
        value = value + rng.uniform(0.3, 1) * np.exp(-distance / (2 * width**2))
    return jnp.asarray(value[..., None], jnp.float32)


def truth(x):
    """A known map: fixed to moving points, affine after smooth waves."""
    x = np.asarray(x, np.float64)
    waves = 0.02 * np.sin(np.pi * x[..., [1, 2, 0]] * 2)
    linear = np.asarray([[1.05, 0.04, 0.0], [-0.04, 0.97, 0.02], [0.0, 0.0, 1.03]])
    return (x + waves - 0.5) @ linear.T + 0.5 + np.asarray([0.03, -0.02, 0.01])


def found(pair, **options):
    return displacement.optimize_displacement(
        pair,
        CHEAP,
        **{
            "steps": DIRECT_STEPS,
            "key": jax.random.key(0),
            "config": CONFIG,
            **options,
        },
    )


@pytest.fixture(scope="module")
def recovered():
    grid = sampling.identity(CUBE)
    calls = []
    pair = Pair(blobs(grid), blobs(truth(grid)))
    result = found(pair, progress=lambda *call: calls.append(call))
    return pair, result, calls


def test_a_known_map_is_recovered(recovered):
    pair, result, _ = recovered
    grid = sampling.identity(CUBE)
    wanted = truth(grid)
    inside = np.asarray(pair.fixed)[..., 0] > 0.2
    voxels = np.asarray(CUBE) - 1

    def mean_error(points):
        error = np.linalg.norm((np.asarray(points) - wanted) * voxels, axis=-1)
        return error[inside].mean()

    assert mean_error(grid) > 1.0
    assert mean_error(result.forward.on_grid(CUBE)) < 0.3


def test_similarity_falls_and_nothing_folds(recovered):
    pair, result, _ = recovered
    forward, backward = (t.on_grid(CUBE) for t in (result.forward, result.backward))

    def distance(points):
        warped = fields.warp(pair.moving, points)
        return float(jnp.mean((warped - pair.fixed) ** 2))

    assert distance(forward) < 0.1 * distance(sampling.identity(CUBE))
    for points in (forward, backward):
        assert fields.jacobian_determinant(points).min() > 0


@pytest.mark.parametrize("folding", [0.0, CONFIG.folding])
def test_what_would_fold_is_held(folding):
    """Two scans that have nothing in common, and every freedom."""
    images = np.random.default_rng(0).random((2, 1, 16, 16, 16, 1), np.float32)
    config = displacement.DisplacementConfig(
        factors=(1,), smoothness=0.0, folding=folding
    )
    objective = dataclasses.replace(CHEAP, inverse_consistency_weight=0.0)
    result = displacement.optimize_displacement(
        Pair(*images), objective, steps=40, learning_rate=0.02,
        key=jax.random.key(0), affine=False, config=config,
    )  # fmt: skip
    determinant = fields.jacobian_determinant(result.forward.on_grid((16, 16, 16)))
    folds = float(jnp.mean(determinant < 0))
    assert folds < 1e-3 if folding else folds > 0.1
    assert result.history["folding"].shape == result.history["loss"].shape


def test_the_two_maps_are_inverse(recovered):
    _, result, _ = recovered
    grid = sampling.identity(CUBE)
    there = result.backward.map_points(grid)
    error = (result.forward.map_points(there) - grid)[:, 4:-4, 4:-4, 4:-4]
    assert np.abs(error).mean() * 23 < 0.15  # voxels


def test_history_spans_all_levels(recovered):
    _, result, _ = recovered
    total = (2 + len(CONFIG.factors)) * DIRECT_STEPS
    # Each level closes with the numbers of what it found.
    assert {len(v) for v in result.history.values()} == {
        total + 1 + len(CONFIG.factors)
    }
    assert np.all(result.history["smoothness"][: 2 * DIRECT_STEPS] == 0)
    assert result.history["smoothness"][-1] > 0


def test_progress_counts_the_steps_of_all_levels(recovered):
    *_, calls = recovered
    total = (2 + len(CONFIG.factors)) * DIRECT_STEPS
    assert [step for step, _, _ in calls] == list(range(1, total + 1))
    assert {given for _, given, _ in calls} == {total}


def test_it_begins_at_the_start():
    grid = sampling.identity(CUBE)
    start = np.eye(4)
    start[:3, 3] = [0.25, 0.0, -0.2]  # further than the descent finds by itself
    pair = Pair(blobs(grid), blobs(Affine(start)(np.asarray(grid))))
    result = found(pair, affine=False, start=start)
    np.testing.assert_allclose(result.forward.steps[-1].matrix, start, atol=1e-6)
    # Started in the right place, there is little left to do.
    points = result.forward.on_grid(CUBE)
    inside = np.asarray(pair.fixed)[..., 0] > 0.2
    error = np.asarray(points - Affine(start)(grid))[inside]
    assert np.linalg.norm(error * 23, axis=-1).mean() < 0.3


def test_one_pair_at_a_time():
    with pytest.raises(ValueError, match="batch of 2"):
        displacement.optimize_displacement(
            tiny_pair(batch=2), CHEAP, key=jax.random.key(0)
        )


def test_what_is_small_is_no_program_by_itself():
    """Around a level's step: its start, mask and images, and the maps at the end."""
    compiled = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    images = np.random.default_rng(0).random((2, 1, 15, 13, 11, 1), np.float32)
    pair, key = Pair(*jnp.asarray(images)), jax.random.key(0)
    config = displacement.DisplacementConfig(factors=(2, 1))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        displacement.optimize_displacement(
            pair, CHEAP, steps=1, key=key, affine=False, config=config
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert 2 <= len(compiled) <= 15, len(compiled)


def test_a_coarser_pair_knows_the_same():
    image = jnp.ones((1, 16, 16, 16, 1))
    known = {
        "valid": jnp.ones((1, 2), bool),
        "task": jnp.zeros(1, jnp.int32),
        "objective": jnp.ones(1, jnp.int32),
        "smoothness": jnp.full(1, 0.3),
    }
    coarse = displacement._coarser(Pair(image, image, fixed_mask=image, **known), 2)
    assert coarse.fixed.shape == coarse.fixed_mask.shape == (1, 8, 8, 8, 1)
    for name, value in known.items():
        assert getattr(coarse, name) is value


def test_what_has_no_partner_does_not_count():
    """Half a cube away only half of each image meets the other, within its mask."""
    mask = np.ones((1, 9, 9, 9, 1))
    mask[:, :, :3] = 0
    image = jnp.ones((1, 9, 9, 9, 1))
    pair = Pair(image, image, fixed_mask=jnp.asarray(mask), moving_mask=image)
    start = np.eye(4)
    start[0, 3] = 0.5  # by 4 voxels
    nothing = {"affine": jnp.zeros((3, 4)), "control": None}
    for masked, rows in ((False, 0), (True, 3)):
        meets = displacement._meeting(
            pair, nothing, jnp.asarray(start), jnp.ones(3), masked=masked
        )
        fixed, moving = np.zeros((2, 9, 9, 9))
        fixed[:5, rows:] = moving[4:] = 1
        np.testing.assert_array_equal(meets.fixed_mask[0, ..., 0], fixed)
        np.testing.assert_array_equal(meets.moving_mask[0, ..., 0], moving)


def test_an_affine_map_that_changes_volume_too_much_is_not_believed():
    grid = sampling.identity(CUBE)
    pair = Pair(blobs(grid), blobs(truth(grid)))
    start = np.eye(4)
    start[:3, 3] = [0.02, 0.0, -0.01]
    for rate, believed in ((0.01, True), (4.0, False)):
        matrix, history = displacement.find_affine(
            pair, CHEAP, start, steps=1, key=jax.random.key(0),
            config=dataclasses.replace(CONFIG, affine_learning_rate=rate),
        )  # fmt: skip
        assert np.array_equal(matrix, start) != believed
        assert len(history["loss"]) == 2


def test_an_affine_change_is_one_of_space():
    """A turn stays a turn where the cube's edges differ, against float64."""
    edges, c, s = np.array([0.5, 1.0, 1.5]), np.cos(0.3), np.sin(0.3)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    shift = np.array([0.1, 0.0, -0.2])
    change = np.concatenate([turn - np.eye(3), shift[:, None]], 1)
    start = np.eye(4)
    start[:3] += np.random.default_rng(0).normal(size=(3, 4)) * 0.1
    found = displacement._affine(jnp.asarray(change, jnp.float32), start, tuple(edges))
    points = np.random.default_rng(1).random((5, 3))
    moved = ((points - 0.5) * edges @ turn.T + shift) / edges + 0.5
    np.testing.assert_allclose(found(points), Affine(start)(moved), atol=1e-5)
