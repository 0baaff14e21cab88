"""UniReg's released pyramid against arrays of its code, and on other grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.models.unireg import released
from jaxreg.space import fields
from jaxreg.space.grid import unit_scale
from jaxreg.weights.pytorch import unireg_rpn

NAME = "unireg_rpn_small"
ITERATIONS = 10
DELTA = 0.005


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def check(value, reference, tolerance=1e-4):
    value, reference = np.asarray(value), np.asarray(reference)
    assert value.shape == reference.shape
    assert np.abs(value - reference).max() <= tolerance * np.abs(reference).max()


def variables_of(g):
    state = {k.removeprefix("state/"): v for k, v in g.items() if "state/" in k}
    return unireg_rpn.TABLE.to_variables(state), unireg_rpn.TABLE.read_config(state)


def model_of(g, group="", **options):
    """The model whose tasks are the stored pairs', in their order."""
    types = [released.UniRegRpnConfig.pairings[t] for t in g[f"{group}task_type"]]
    tasks = tuple(zip(g[f"{group}task_id"].tolist(), types, strict=True))
    _, sizes = variables_of(g)
    config = released.UniRegRpnConfig(**{**sizes, "tasks": tasks, **options})
    return released.UniRegRpn(config), jnp.arange(len(tasks))


def images_of(g, group=""):
    return (channels_last(g[f"{group}moving"]), channels_last(g[f"{group}fixed"]))


def voxels(prediction):
    field = prediction.transform.steps[0].field
    return field * unit_scale(field.shape[1:4])


@pytest.fixture(scope="module")
def one_pass(golden):
    """The stored pass, computed here, for any task numbers."""
    g = golden(NAME)
    variables, _ = variables_of(g)
    model, task = model_of(g)
    run = jax.jit(lambda m, f, t: voxels(model.apply(variables, m, f, task=t)[0]))
    return run, images_of(g), task


@pytest.mark.golden
def test_field_and_warped_image(golden, one_pass):
    g = golden(NAME)
    run, (moving, fixed), task = one_pass
    flow = run(moving, fixed, task)
    check(flow, channels_last(g["flow"]))
    warped = fields.warp_voxels(moving, flow, outside="edge")
    check(warped, channels_last(g["warped"]))
    check(run(moving, fixed, task[::-1]), channels_last(g["flow_swapped_ids"]))


@pytest.mark.golden
def test_what_happens_between(golden):
    g = golden(NAME)
    variables, _ = variables_of(g)
    model, task = model_of(g)
    network = released.UniRegRpnNetwork(model.config)
    run = jax.jit(
        lambda *images: network.apply(
            variables, *images, capture_intermediates=True, mutable=["intermediates"]
        )
    )
    _, seen = run(*images_of(g), model.config.condition(task, None))
    seen = seen["intermediates"]
    for level in (4, 3, 2, 1):
        decoder = seen[f"decoder_{level}"]
        if f"inter/delta{level}" in g:
            (delta,) = decoder["__call__"]
            check(delta, channels_last(g[f"inter/delta{level}"]))
        (parameters,) = decoder["head"]["controller"]["__call__"]
        check(parameters, g[f"inter/params{level}"])
    for level, feature in enumerate(seen["encoder"]["__call__"][0], start=1):
        first = np.moveaxis(np.asarray(feature), -1, 1).reshape(-1)
        stored = g[f"inter/enc{level}_stats"]
        check([first.mean(), first.std(ddof=1), *first[:6]], stored)


@pytest.mark.golden
def test_iterations_with_their_rule(golden):
    g = golden(NAME)
    variables, _ = variables_of(g)
    model, task = model_of(g, "iir/", iterations=ITERATIONS, delta=DELTA)
    moving, fixed = images_of(g, "iir/")
    run = jax.jit(lambda *a: model.apply(variables, *a[:2], task=a[2])[0])
    prediction = run(moving, fixed, task)
    check(voxels(prediction), channels_last(g["iir/flow"]))
    warped = fields.warp_voxels(moving, voxels(prediction), outside="edge")
    check(warped, channels_last(g["iir/warped"]))
    np.testing.assert_array_equal(prediction.aux["level_steps"][0], g["iir/counts"])
    traces = np.asarray(prediction.aux["correlation_trace"][0])
    for row, level in zip(traces, (4, 3, 2, 1), strict=True):
        check(row[~np.isnan(row)], g[f"iir/ncc_trace_l{level}"])


# --- beyond the stored arrays -------------------------------------------------------


SHAPE = (8, 16, 24)
# The native form compiles several times faster, and the grids are tiny.
SMALL = released.UniRegRpnConfig(
    channels=4, regions=2, tasks=((1, "inter"), (0, "intra")), hidden=4, form="native"
)


def images(seed=0, batch=2, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(2, batch, *shape, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    """A network whose heads are strong and differ from task to task."""
    fresh = released.UniRegRpn(SMALL).init(jax.random.key(0), SHAPE)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype("f4"), fresh
    )


def plainly(judged, step, start, iterations, delta, *, coarsest):
    """The rule as a program: (field, steps, trace)."""
    best, steps, trace, field = 0.0, 0, [], start
    for index in range(iterations):
        if coarsest:
            tried = field if index == 0 else step(field)
            trace.append(judged(tried))
            if trace[-1] < best + delta and index:
                break
            field = tried
        else:
            trace.append(judged(field))
            if trace[-1] < best + delta:
                break
            field = step(field)
        best, steps = trace[-1], steps + 1
    return field, steps, trace


@pytest.mark.parametrize("coarsest", [True, False])
@pytest.mark.parametrize("iterations", [2, 6])
@pytest.mark.parametrize(
    "rises", [(0.9, 0.1, 0.1), (0.001, 0.9), (0.9, -0.2, 0.5), (0.3,) * 9]
)
def test_rule_stops_where_the_release_does(coarsest, iterations, rises):
    """Fields are counters here; the correlation is looked up."""
    values = np.cumsum((*rises, *[0.0] * 10)).astype(np.float32)
    config = released.UniRegRpnConfig(iterations=iterations)
    repeat = released._repeat_coarsest if coarsest else released._repeat
    found = repeat(
        lambda f: f + 1, lambda f: jnp.asarray(values)[f], jnp.asarray(0), config
    )
    field, steps, trace = plainly(
        lambda f: values[f],
        lambda f: f + 1,
        0,
        iterations,
        config.delta,
        coarsest=coarsest,
    )
    assert (int(found.field), int(found.steps)) == (field, steps)
    judged = np.asarray(found.trace)
    np.testing.assert_array_equal(judged[: len(trace)], trace)
    assert np.isnan(judged[len(trace) :]).all()


def test_each_pair_rules_itself(small):
    moving, fixed = images()
    fixed[1] = moving[1]  # so that the two pairs stop at different times
    known = np.float32([[1, 0, 0, 1], [0, 1, 1, 0]])
    config = released.UniRegRpnConfig(**{**vars(SMALL), "iterations": 3, "delta": 0})
    run = jax.jit(lambda *a: released.rule(config, small, *a))
    both = run(moving, fixed, known)
    for i in range(2):
        one = run(*(np.stack([a[i], a[i]]) for a in (moving, fixed, known)))
        np.testing.assert_array_equal(both.steps[i], one.steps[0])
        check(both.field[i], one.field[0])
    assert both.correlation.shape == (2, 4, 3) and both.steps.shape == (2, 4)


def test_correlation_is_numpys_but_for_the_deviations():
    a, b = images()
    n = a.size
    expected = np.corrcoef(a.ravel(), b.ravel())[0, 1] * (n - 1) / n
    assert float(released.correlation(a, b)) == pytest.approx(expected, rel=1e-4)
    assert float(released.correlation(np.ones_like(a), b)) == 0


def test_tasks_matter_and_a_batch_is_its_pairs(small):
    model = released.UniRegRpn(SMALL)
    run = jax.jit(lambda m, f, t: voxels(model.apply(small, m, f, task=t)[0]))
    moving, fixed = images()
    both = run(moving, fixed, jnp.array([1, 0]))
    twice = [np.stack([a[0], a[0]]) for a in (moving, fixed)]
    again = np.asarray(run(*twice, jnp.array([1, 0])))
    check(both[:1], again[:1])
    assert np.abs(again[0] - again[1]).max() > 1e-3 * np.abs(again).max()
    with pytest.raises(UserError, match="given none"):
        model.apply(small, moving, fixed)


def test_fresh_network_hardly_moves_and_training_is_one_pass():
    config = released.UniRegRpnConfig(**{**vars(SMALL), "iterations": 4})
    model = released.UniRegRpn(config)
    variables = model.init(jax.random.key(1), SHAPE)
    moving, fixed = images(batch=1)

    def moved(params):
        prediction, _ = model.apply(
            {"params": params}, moving, fixed, task=jnp.array([0]), train=True
        )
        assert not prediction.aux
        return jnp.sum(voxels(prediction) ** 2), voxels(prediction)

    gradient, field = jax.jit(jax.grad(moved, has_aux=True))(variables["params"])
    assert 0 < np.abs(field).max() < 1e-2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    for level in (4, 3, 2, 1):
        assert np.any(gradient[f"decoder_{level}"]["head"]["controller"]["kernel"])


def test_static_heads_start_at_zero_and_need_no_task():
    config = released.UniRegRpnConfig(channels=4, head="static", form="native")
    model = released.UniRegRpn(config)
    variables = model.init(jax.random.key(0), SHAPE)
    apply = jax.jit(lambda m, f: voxels(model.apply(variables, m, f)[0]))
    assert not np.asarray(apply(*images())).any()
    assert config.outside == "zeros" and SMALL.outside == "edge"


def test_released_sizes():
    model = released.UniRegRpn()
    shapes = jax.eval_shape(lambda k: model.init(k, (16, 16, 16)), jax.random.key(0))
    leaves = jax.tree.leaves(shapes)
    assert len(leaves) == 56 and sum(leaf.size for leaf in leaves) == 436_060


def test_grids_and_settings_that_do_not_fit():
    image = np.zeros((1, 8, 12, 16, 1), "f4")
    with pytest.raises(UserError, match="8 x 12 x 16.*multiple of 8"):
        released.UniRegRpn(SMALL).apply({}, image, image)
    with pytest.raises(UserError, match="iterations is 0"):
        released.UniRegRpnConfig(iterations=0)
    with pytest.raises(UserError, match="region from 0 to 1"):
        released.UniRegRpnConfig(regions=2)
