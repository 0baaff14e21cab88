"""The controller and the head that it fills."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.nn import heads

TASKS = ((1, "inter"), (0, "intra"), (2, "inter"))
SHAPE = (3, 4, 5)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def head(inputs=8, pool_norm=False, batch=3):
    module = heads.DynamicHead(inputs, pool_norm=pool_norm)
    features, known = random(batch, *SHAPE, inputs), random(batch, 5, seed=1)
    return module, module.init(jax.random.key(0), features, known), features, known


@pytest.mark.parametrize(("inputs", "count"), [(8, 171), (16, 235)])
def test_counts(inputs, count):
    assert heads.parameter_count(heads.widths(inputs)) == count
    controller = head(inputs)[1]["params"]["controller"]
    assert controller["bias"].shape == (count,)
    assert controller["kernel"].shape == (1, 1, 1, inputs + 5, count)


def test_parameters_are_kernels_by_rows_and_then_biases():
    kernels, biases = heads.split(np.arange(171.0)[None], heads.widths(8))
    assert [k.shape[1:] for k in kernels] == [(8, 8), (8, 8), (3, 8)]
    assert [float(k[0, 0, 0]) for k in kernels] == [0, 64, 128]
    assert kernels[1][0, 2, 3] == 64 + 2 * 8 + 3
    assert [float(b[0, 0]) for b in biases] == [152, 160, 168]
    with pytest.raises(ValueError, match="takes 171"):
        heads.split(np.zeros((1, 170)), heads.widths(8))


def test_head_is_three_layers_per_voxel():
    features, parameters = random(2, *SHAPE, 8), random(2, 171, seed=2)
    found = heads.apply_head(features, parameters, heads.widths(8))
    (w1, w2, w3), (b1, b2, b3) = heads.split(parameters, heads.widths(8))
    x = features[1, 0, 2, 3]
    for w, b in ((w1, b1), (w2, b2)):
        x = np.asarray(w[1]) @ x + np.asarray(b[1])
        x = np.where(x > 0, x, 0.2 * x)
    expected = np.asarray(w3[1]) @ x + np.asarray(b3[1])
    np.testing.assert_allclose(found[1, 0, 2, 3], expected, rtol=1e-5)


@pytest.mark.parametrize("pool_norm", [False, True])
def test_fresh_head_hardly_moves_and_is_alive(pool_norm):
    module, variables, features, known = head(pool_norm=pool_norm)
    bias = np.asarray(variables["params"]["controller"]["bias"])
    bound = np.sqrt(6 / (1.04 * 8))
    assert 0.9 * bound < np.abs(bias[:128]).max() <= bound
    assert np.abs(bias[128:152]).max() < 1e-4 and not bias[152:].any()
    goal = random(3, *SHAPE, 3, seed=3)

    def loss(params):
        field = module.apply({"params": params}, features, known)
        return jnp.sum((field - goal) ** 2), field

    gradient, field = jax.grad(loss, has_aux=True)(variables["params"])
    assert 0 < np.abs(field).max() < 1e-3
    kernel = gradient["controller"]["kernel"][0, 0, 0]
    # Every number of the condition and every weight of the head is reached, but for
    # those behind a unit that is off nowhere.
    assert np.any(kernel, 1).all() and np.mean(np.any(kernel, 0)) > 0.9
    assert np.any(kernel[:, 128:152], 0).all()


@pytest.mark.parametrize("pool_norm", [False, True])
def test_a_batch_is_its_pairs_one_by_one(pool_norm):
    module, variables, features, known = head(16, pool_norm)
    rng = np.random.default_rng(4)
    variables = jax.tree.map(
        lambda a: a + 0.3 * rng.standard_normal(a.shape).astype("f4"), variables
    )
    both = module.apply(variables, features, known)
    for i in range(len(features)):
        one = module.apply(variables, features[i : i + 1], known[i : i + 1])
        np.testing.assert_allclose(both[i], one[0], rtol=1e-5, atol=1e-5)
    swapped = module.apply(variables, features, known[::-1])
    assert np.abs(swapped[0] - both[0]).max() > 1e-2


def test_group_norm_has_as_many_groups_as_fit():
    for channels, groups in ((16, 8), (12, 4), (6, 2), (3, 1)):
        x = random(2, *SHAPE, channels)
        norm = heads.GroupNorm()
        found, _ = norm.init_with_output(jax.random.key(0), x)
        grouped = np.asarray(found).reshape(2, -1, groups, channels // groups)
        np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-5)
        np.testing.assert_allclose(grouped.std((1, 3)), 1, rtol=1e-3)


def test_tasks_are_looked_up():
    region, pairing = heads.one_hot_region_pairings(TASKS, 3, ("intra", "inter"))
    found = heads.look_up(region, jnp.array([1, 0]), TASKS)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(pairing, [[0, 1], [1, 0], [0, 1]])
    inside = jax.jit(lambda t: heads.look_up(region, t, TASKS))
    np.testing.assert_array_equal(inside(jnp.array([2])), [[0, 0, 1]])
    assert np.isnan(inside(jnp.array([3]))).all()
    with pytest.raises(UserError, match="given none; give each pair's task number"):
        heads.look_up(region, None, TASKS)
    with pytest.raises(UserError, match=r"\[3\], UniReg knows 0: region 1 inter"):
        heads.look_up(region, np.array([3]), TASKS)
    with pytest.raises(UserError, match="region from 0 to 1"):
        heads.check_region_pairings(TASKS, 2)
