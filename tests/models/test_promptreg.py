"""PromptReg against arrays of the released code, and on other shapes and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.losses import similarity
from jaxreg.models import promptreg
from jaxreg.nn import prompts
from jaxreg.space import fields, sampling
from jaxreg.space.grid import unit_scale
from jaxreg.weights.pytorch import promptreg as promptreg_lib

NAME = "promptreg_small"
GRADIENTS = "grad/"


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def distance(value, reference):
    difference = np.asarray(value, np.float64) - reference
    return np.linalg.norm(difference) / np.linalg.norm(reference)


def network_of(g):
    """The released model, its variables, and its two images."""
    state = {k.removeprefix("state/"): v for k, v in g.items() if "state/" in k}
    variables = promptreg_lib.PROMPTREG.to_variables(state)
    config = promptreg.PromptRegConfig(
        channels=int(g["channels"]), tasks=int(g["task_total_number"])
    )
    images = (channels_last(g["moving"]), channels_last(g["fixed"]))
    return promptreg.PromptReg(config), variables, images


@pytest.fixture(scope="module")
def found(golden):
    """Everything that is stored, computed here in one program with its gradient."""
    g = golden(NAME)
    model, variables, (moving, fixed) = network_of(g)
    task = jnp.asarray(np.reshape(g["task_id"], -1))
    shape = moving.shape[1:4]

    def run(params, moving, fixed):
        prediction, _ = model.apply({"params": params}, moving, fixed, task=task)
        points = prediction.transform.on_grid(shape)
        warped = fields.warp(moving, points, outside="zeros")
        flow = prediction.transform.steps[0].field * unit_scale(shape)
        mind = similarity.mind_ssc(warped, fixed)
        smooth = sum(jnp.mean(jnp.diff(flow, axis=a) ** 2) for a in (1, 2, 3)) / 3
        alike = jnp.mean(prediction.aux["task_similarity"])
        total = mind + 0.1 * smooth
        total += 0.001 * (prediction.aux["orthogonality"] + alike)
        numbers = {
            "mind_loss": mind,
            "grad3d_l2": smooth,
            "classification_loss": alike,
            "orthogonal_loss": prediction.aux["orthogonality"],
            "total_loss": total,
        }
        weights = prediction.aux["task_weights"]
        return total, (flow, warped, weights, numbers)

    run = jax.jit(jax.value_and_grad(run, has_aux=True))
    (_, aux), gradient = run(variables["params"], moving, fixed)
    return *aux, gradient


@pytest.mark.golden
def test_field_and_warped_image(golden, found):
    g = golden(NAME)
    flow, warped, weights, _, _ = found
    assert distance(flow, channels_last(g["flow"])) < 1e-5
    assert distance(warped, channels_last(g["warped"])) < 1e-5
    assert distance(weights, g["task_weights"]) < 1e-5


@pytest.mark.golden
def test_losses(golden, found):
    numbers = found[3]
    for name, value in numbers.items():
        assert distance(value, golden(NAME)[name]) < 1e-5, name


@pytest.mark.golden
def test_gradients(golden, found):
    """To 1e-2: trilinear sampling has kinks, see the rounding of one coordinate."""
    g = golden(NAME)
    gradient = promptreg_lib.PROMPTREG.from_variables({"params": found[4]})
    stored = [key for key in g if key.startswith(GRADIENTS)]
    assert stored
    for key in stored:
        assert distance(gradient[key.removeprefix(GRADIENTS)], g[key]) < 1e-2, key


@pytest.mark.golden
def test_what_happens_between(golden):
    g = golden(NAME)
    model, variables, images = network_of(g)
    grid = promptreg.bank_of(variables).shape[1:4]
    network = model._network(grid)
    _, seen = jax.jit(
        lambda v, m, f: network.apply(
            v, m, f, capture_intermediates=True, mutable=["intermediates"]
        )
    )({"params": variables["params"]}, *images)
    seen = seen["intermediates"]
    generator = seen["bottleneck"]["generator"]
    expected = {
        "c4": seen["join_4"],
        "p_d": generator["dynamic_1"],
        "p_w_conv": generator["static"],
        "p_fused": generator["join_1"],
        "c4_fused": seen["bottleneck"]["fuse"],
    }
    for name, outputs in expected.items():
        (output,) = outputs["__call__"]
        assert distance(output, channels_last(g[name])) < 2e-5, name
    prompt, _ = generator["__call__"][0]
    assert distance(prompt, channels_last(g["prompt"])) < 2e-5
    velocities = [key for key in g if key.startswith("velocity/")]
    assert len(velocities) == 8
    for key in velocities:
        level, index = key.removeprefix("velocity/defconv").split("_")
        output = seen[f"head_{level}"]["__call__"][int(index)]
        assert distance(output, channels_last(g[key])) < 2e-5, key


@pytest.mark.golden
def test_forms_of_the_paper(golden):
    g = golden(NAME)
    _, variables, _ = network_of(g)
    bank = promptreg.bank_of(variables)
    dynamic = channels_last(g["p_d"])
    cosine = prompts.similarities(dynamic, bank)
    assert distance(cosine[0], g["derived/cosine"]) < 1e-5
    raw = prompts.orthogonality(bank, "raw")
    assert distance(raw, g["derived/orthogonality_raw_frobenius"]) < 1e-5
    task = jnp.asarray(np.reshape(g["task_id"], -1))
    for tau in (0.1, 0.5):
        weights = jax.nn.softmax(cosine / tau, -1)
        assert distance(weights[0], g[f"derived/task_weights_tau{tau}"]) < 1e-5
        weighted = jnp.einsum("nz,zdhwc->ndhwc", weights, bank)
        alike = prompts.task_distance(weighted, bank, task)[0]
        # (1 - cos)^2 doubles the relative error of 1 - cos; cos is four roundings off.
        reference = g[f"derived/task_similarity_raw_tau{tau}"]
        assert distance(alike, reference) < 8 * 2.0**-24 * (1 + reference**-0.5)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("form", "expected"),
    [(promptreg.PromptRegConfig(), "orthogonal_loss"),
     (promptreg.AS_PAPER, "derived/orthogonality_raw_frobenius")],
)  # fmt: skip
def test_each_form_has_its_own_orthogonality(golden, form, expected):
    """The released code's of normalised prompts, the paper's of the prompts as such."""
    g = golden(NAME)
    _, variables, _ = network_of(g)
    bank = promptreg.bank_of(variables)
    found = prompts.orthogonality(bank, form.orthogonality)
    assert distance(found, g[expected]) < 1e-5


# --- beyond the stored arrays -------------------------------------------------------


SMALL = promptreg.PromptRegConfig(channels=2, tasks=3)
SHAPE = (16, 24, 16)


@pytest.fixture(scope="module")
def small():
    """A network with strong prompts and heads, so that nothing is near zero."""
    model = promptreg.PromptReg(SMALL)
    fresh = model.init(jax.random.key(0), SHAPE)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype("f4"),
        fresh["params"],
    )
    images = rng.uniform(size=(2, 2, *SHAPE, 1)).astype("f4")
    return model, {"params": params}, images


def run(model, variables, moving, fixed, **options):
    apply = jax.jit(lambda v, m, f: model.apply(v, m, f, **options)[0])
    found = apply(variables, moving, fixed)
    return np.asarray(found.transform.steps[0].field), found.aux


@pytest.mark.slow
def test_a_batch_is_its_pairs_one_by_one(small):
    model, variables, (moving, fixed) = small
    task = jnp.array([2, 0])
    both, aux = run(model, variables, moving, fixed, task=task)
    for i in range(2):
        part = slice(i, i + 1)
        one, of_one = run(model, variables, moving[part], fixed[part], task=task[part])
        assert distance(both[part], one.astype(np.float64)) < 1e-4
        for name in ("task_weights", "task_similarity"):
            assert distance(aux[name][part], np.float64(of_one[name])) < 1e-4, name


def test_fresh_network_hardly_moves():
    model = promptreg.PromptReg(SMALL)
    variables = model.init(jax.random.key(1), SHAPE)
    bank = promptreg.bank_of(variables)
    assert bank.shape == (3, 2, 3, 2, 16)
    images = np.random.default_rng(0).uniform(size=(2, 1, *SHAPE, 1)).astype("f4")
    field, _ = run(model, variables, *images)
    largest = np.abs(field * unit_scale(SHAPE)).max()
    assert 0 < largest < 0.1


def test_task_makes_no_difference_to_the_field(small):
    model, variables, (moving, fixed) = small
    plain, aux = run(model, variables, moving, fixed)
    named, _ = run(model, variables, moving, fixed, task=jnp.array([1, 1]))
    np.testing.assert_array_equal(plain, named)
    assert "task_similarity" not in aux
    np.testing.assert_allclose(aux["task_weights"].sum(1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 16, 16), (16, 20, 16)])
def test_grids_that_do_not_halve_three_times(small, shape):
    image = np.zeros((1, *shape, 1), "f4")
    with pytest.raises(UserError, match="multiple of 8 and at least 16"):
        small[0].apply(small[1], image, image)


def test_bank_follows_another_grid(small):
    model, variables, _ = small
    images = np.random.default_rng(1).uniform(size=(2, 1, 32, 16, 24, 1)).astype("f4")
    resized = promptreg.resize_bank(variables, (4, 2, 3))
    assert promptreg.bank_of(resized).shape == (3, 4, 2, 3, 16)
    expected = sampling.resize_half_pixel(promptreg.bank_of(variables), (4, 2, 3))
    np.testing.assert_array_equal(promptreg.bank_of(resized), expected)
    left, _ = run(model, variables, *images)
    right, _ = run(model, resized, *images)
    np.testing.assert_array_equal(left, right)
    assert promptreg.resize_bank(variables, (2, 3, 2)) is variables


def test_an_extended_bank_answers_as_before_with_its_old_rows(small):
    model, variables, (moving, fixed) = small
    wider = promptreg.PromptReg(promptreg.PromptRegConfig(channels=2, tasks=4))
    fresh = wider.init(jax.random.key(2), SHAPE)
    # The new task comes second, so that the old ones move.
    extended = promptreg.take_rows(fresh, variables, {0: 0, 2: 1, 3: 2})
    bank = promptreg.bank_of(extended)
    np.testing.assert_array_equal(bank[1], promptreg.bank_of(fresh)[1])
    before, _ = run(model, variables, moving, fixed)
    chosen = small[0].config.with_prompts(extended, [0, 2, 3])
    after, _ = run(wider, chosen, moving, fixed)
    np.testing.assert_array_equal(before, after)


def test_prompts_alone_are_masked_by_their_rows(small):
    mask = small[0].config.prompt_mask(small[1]["params"], rows=(1,))
    chosen = mask["bottleneck"]["generator"].pop("bank")
    np.testing.assert_array_equal(chosen[:, 0, 0, 0, 0], [0, 1, 0])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(mask))


def test_weights_follow_grid_and_tasks_when_they_start_another_run(small):
    model, variables, _ = small
    wider = promptreg.PromptRegConfig(channels=2, tasks=4)
    fresh = promptreg.PromptReg(wider).init(jax.random.key(3), (32, 16, 24))
    found = wider.fitted(variables, (32, 16, 24), fresh, {0: 2, 3: 0}, 3)
    bank = promptreg.bank_of(found)
    resized = promptreg.bank_of(promptreg.resize_bank(variables, (4, 2, 3)))
    np.testing.assert_array_equal(bank[[0, 3]], resized[np.array([2, 0])])
    np.testing.assert_array_equal(bank[1:3], promptreg.bank_of(fresh)[1:3])
    assert found["params"]["head_1"] is variables["params"]["head_1"]
    other = model.config.fitted({"params": {"step_1": {}}}, SHAPE, fresh, {}, 0)
    assert other == {"params": {"step_1": {}}}


@pytest.mark.parametrize(
    ("change", "module"),
    [({"readout": "spatial"}, "value"), ({"static_block": False}, "static")],
)
def test_forms_leave_out_what_they_do_not_use(change, module):
    config = promptreg.PromptRegConfig(channels=2, tasks=2, **change)
    variables = promptreg.PromptReg(config).init(jax.random.key(0), SHAPE)
    generator = variables["params"]["bottleneck"]["generator"]
    assert module not in generator and "join_1" in generator


def test_orthogonality_is_zero_with_gradient_zero_for_orthogonal_rows():
    bank = jnp.eye(3).reshape(3, 1, 1, 1, 3)
    for kind in ("cosine", "raw"):
        value, gradient = jax.value_and_grad(prompts.orthogonality)(bank, kind)
        assert value == 0 and not np.any(gradient)
    assert prompts.orthogonality(2 * bank, "cosine") == 0


def test_a_prompt_of_zeros_has_no_direction_and_no_nan():
    bank = jnp.zeros((2, 1, 1, 1, 3)).at[0].set(1.0)
    dynamic = jnp.ones((1, 1, 1, 1, 3))
    value, gradient = jax.value_and_grad(
        lambda b: prompts.similarities(dynamic, b).sum()
    )(bank)
    assert value == pytest.approx(1.0) and np.isfinite(gradient).all()
