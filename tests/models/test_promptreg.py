"""PromptReg against arrays of the released code, and on other shapes and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.io import released_promptreg
from jaxreg.losses import similarity
from jaxreg.models import promptreg
from jaxreg.nn import prompts
from jaxreg.space import fields
from jaxreg.space.grid import unit_scale

NAME = "promptreg_small"
GRADIENTS = "grad/"

pytestmark = pytest.mark.golden


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def distance(value, reference):
    difference = np.asarray(value, np.float64) - reference
    return np.linalg.norm(difference) / np.linalg.norm(reference)


def network_of(g):
    """The released model, its variables, and its two images."""
    state = {k.removeprefix("state/"): v for k, v in g.items() if "state/" in k}
    variables = released_promptreg.to_variables(state)
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


def test_field_and_warped_image(golden, found):
    g = golden(NAME)
    flow, warped, weights, _, _ = found
    assert distance(flow, channels_last(g["flow"])) < 1e-5
    assert distance(warped, channels_last(g["warped"])) < 1e-5
    assert distance(weights, g["task_weights"]) < 1e-5


def test_losses(golden, found):
    numbers = found[3]
    for name, value in numbers.items():
        assert distance(value, golden(NAME)[name]) < 1e-5, name


def test_gradients(golden, found):
    """To 1e-2: trilinear sampling has kinks, see the rounding of one coordinate."""
    g = golden(NAME)
    gradient = released_promptreg.from_variables({"params": found[4]})
    stored = [key for key in g if key.startswith(GRADIENTS)]
    assert stored
    for key in stored:
        assert distance(gradient[key.removeprefix(GRADIENTS)], g[key]) < 1e-2, key


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
        assert distance(alike, g[f"derived/task_similarity_raw_tau{tau}"]) < 1e-5
