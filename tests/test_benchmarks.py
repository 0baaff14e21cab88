"""The benchmarks' PyTorch networks against released arrays and against jaxreg's."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.models.rdp import RdpConfig
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.space.grid import unit_scale
from jaxreg.weights.pytorch import promptreg as promptreg_lib
from jaxreg.weights.pytorch import unireg_rpn

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SHAPE = (16, 32, 48)
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture
def module(monkeypatch):
    """Imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def tensors(state):
    return {name: torch.tensor(np.array(array)) for name, array in state.items()}


def stored_state(g):
    return tensors(
        {k.removeprefix("state/"): v for k, v in g.items() if k.startswith("state/")}
    )


def check(value, reference, tolerance=1e-5):
    value, reference = np.asarray(value.detach()), np.asarray(reference)
    assert value.shape == reference.shape
    assert np.abs(value - reference).max() <= tolerance * np.abs(reference).max()


@pytest.mark.golden
def test_pyramid_is_the_released_one(golden, module):
    g, unireg = golden("unireg_rpn_small"), module("pytorch_unireg")
    state = stored_state(g)
    known = np.concatenate([np.eye(2)[g["task_type"]], np.eye(6)[g["task_id"]]], 1)
    moving, fixed, flow, warped = (
        torch.tensor(g[name]) for name in ("moving", "fixed", "flow", "warped")
    )
    for rows, name in ((known, "flow"), (known[::-1], "flow_swapped_ids")):
        rows = torch.tensor(rows.copy(), dtype=torch.float32)
        check(unireg.pyramid(state, moving, fixed, rows), g[name], 1e-4)
    check(unireg.warp(moving, flow, "border"), g["warped"])
    check(unireg.box_ncc(warped, fixed), g["loss/ncc9"])


@pytest.mark.golden
def test_promptreg_is_the_released_one(golden, module):
    g, promptreg = golden("promptreg_small"), module("pytorch_promptreg")
    state, task = stored_state(g), int(g["task_id"])
    images = [torch.tensor(g[name]) for name in ("moving", "fixed")]
    flow, orthogonality, alike = promptreg.network(state, *images, task)
    check(flow, g["flow"], 1e-4)
    check(orthogonality, g["orthogonal_loss"])
    check(alike, g["classification_loss"])
    check(promptreg.loss(state, *images, task), g["total_loss"])
    twice = [torch.cat([image, image]) for image in images]
    check(promptreg.loss(state, *twice, task), g["total_loss"])


CONFIGS = {
    "rdp": RdpConfig(channels=2, form="native"),
    "unireg": UniRegConfig(features="mind", backbone_window=None, form="native"),
    "unireg_rpn": UniRegRpnConfig(form="native"),
}


def in_pytorch(name, module, variables, images):
    unireg, promptreg = module("pytorch_unireg"), module("pytorch_promptreg")
    if name == "rdp":
        state = tensors(promptreg_lib.PROMPTREG.from_variables(variables))
        return promptreg.network(state, *images)[0]
    # The first task of both: region 0, between subjects.
    if name == "unireg":
        known = torch.tensor([[1.0, 0, 0, 0, 0, 1]])
        return unireg.network(tensors(unireg.state_of(variables)), *images, known)
    known = torch.tensor([[1.0, 0, 1, 0, 0, 0, 0, 0]])
    state = tensors(unireg_rpn.TABLE.from_variables(variables))
    return unireg.pyramid(state, *images, known)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_libraries_agree_on_a_grid_of_three_lengths(name, module):
    model = CONFIGS[name].build()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: np.asarray(a) + 0.05 * rng.normal(size=a.shape).astype("f4"),
        model.init(jax.random.key(0), SHAPE),
    )
    images = rng.uniform(size=(2, 1, *SHAPE, 1)).astype("f4")
    task = jnp.zeros(1, jnp.int32)
    run = jax.jit(lambda v, m, f: model.apply(v, m, f, task=task)[0].transform)
    field = run(variables, *images).steps[0].field * unit_scale(SHAPE)
    assert 0.1 < np.abs(field).max() < 16
    pictures = [torch.tensor(np.moveaxis(image, -1, 1)) for image in images]
    found = in_pytorch(name, module, variables, pictures)
    check(found, np.moveaxis(np.asarray(field), -1, 1), 1e-4)
