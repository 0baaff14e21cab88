"""Networks in bfloat16, and networks whose backward pass computes again."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.errors import UserError
from jaxreg.experiments import fields
from jaxreg.models import rdp, registry
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import AS_PAPER
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.unireg.paper import SAME, UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.space.grid import unit_scale

SHAPE = (16, 32, 16)
NETWORKS = {
    "gradicon": GradIconConfig((2, 4, 8), (4, 6), 1, 1),
    "promptreg": dataclasses.replace(AS_PAPER, channels=4, tasks=2, static_block=True),
    "unireg": UniRegConfig(features="mind", backbone_window=None, residual=True),
    "unireg_rpn": UniRegRpnConfig(),
}
OTHER_FORMS = {
    "rdp": RdpConfig(channels=4),
    "unireg_static": dataclasses.replace(NETWORKS["unireg"], head="static"),
    "same": dataclasses.replace(SAME, features="none", backbone_window=None),
    "unireg_rpn_static": UniRegRpnConfig(head="static"),
}
LAST = ("last", "flow", "conv_5", *(f"head_{i}" for i in range(5)))


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


@pytest.mark.parametrize("name", NETWORKS | OTHER_FORMS)
def test_both_are_settings_of_a_recipe_that_older_files_lack(name):
    config = (NETWORKS | OTHER_FORMS)[name]
    given = [(["precision"], "bfloat16"), (["remat"], "networks")]
    set_by_text = fields.replaced(config, given, "model.")
    assert set_by_text == changed(config, precision="bfloat16", remat="networks")
    stored = json.loads(json.dumps(dataclasses.asdict(set_by_text)))
    assert registry.config_of(config.kind, stored) == set_by_text
    older = {n: v for n, v in stored.items() if n not in ("precision", "remat")}
    assert registry.config_of(config.kind, older) == config
    for field in ("precision", "remat"):
        with pytest.raises(UserError, match=f"`model.{field}` is 'float16'"):
            fields.replaced(config, [([field], "float16")], "model.")


def variables_of(config):
    """Fresh variables, but for last layers that move about a voxel."""
    rng = np.random.default_rng(0)

    def stirred(path, leaf):
        *_, layer, kind = (part.key for part in path)
        if layer == "controller" or (kind == "kernel" and layer in LAST):
            scale = 0.3 if (layer, kind) == ("controller", "bias") else 0.02
            return rng.normal(scale=scale, size=leaf.shape).astype("f4")
        return leaf

    variables = config.build().init(jax.random.key(0), SHAPE)
    params = jax.tree_util.tree_map_with_path(stirred, variables["params"])
    return {**variables, "params": params}


def images():
    rng = np.random.default_rng(1)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *SHAPE)), (0, 2, 2, 2))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return smooth[:, None, ..., None].astype("f4")


def predict(config, variables, *, train=False):
    """Where each voxel goes, in voxels, the auxiliary values, the variables after."""
    task = jnp.zeros(1, jnp.int32)
    model = config.build()
    found, after = model.apply(variables, *images(), task=task, train=train)
    return found.transform.on_grid(SHAPE) * unit_scale(SHAPE), dict(found.aux), after


def loss(params, config, variables, *, train=False):
    """Linear in the map: its gradient has no kinks of its own."""
    found = predict(config, {**variables, "params": params}, train=train)
    factors = np.random.default_rng(2).normal(size=(1, *SHAPE, 3)).astype("f4")
    total = jnp.sum(factors * found[0]) + sum(jnp.sum(x) for x in found[1].values())
    return total, found


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name", NETWORKS | OTHER_FORMS)
def test_what_is_float32_in_bfloat16(name):
    config = changed((NETWORKS | OTHER_FORMS)[name], precision="bfloat16")
    config = changed(config, remat="networks")
    variables = jax.eval_shape(
        lambda k: config.build().init(k, SHAPE), jax.random.key(0)
    )
    gradient = jax.grad(
        functools.partial(loss, config=config, train=True), has_aux=True
    )
    found = jax.eval_shape(
        lambda v: gradient(v["params"], variables=v), variables
    )  # gradients, map, auxiliary values, variables after
    assert dtypes(found) - {"int32"} == {"float32"}


def bytes_kept(config):
    """Of the volumes that the gradient keeps of a forward pass."""
    variables = jax.eval_shape(
        lambda k: config.build().init(k, SHAPE), jax.random.key(0)
    )
    kept = jax.eval_shape(
        lambda v: jax.vjp(lambda p: loss(p, config, v)[0], v["params"])[1], variables
    )
    volumes = [x for x in jax.tree.leaves(kept) if x.ndim == 5 and x.shape[0] == 1]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in volumes)


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_kept_in_bfloat16_and_much_less_of_parts_that_are_computed_again(name):
    config = NETWORKS[name]
    whole = bytes_kept(config)
    # Heads, coordinates and fields stay float32.
    assert bytes_kept(changed(config, precision="bfloat16")) < 0.8 * whole
    share = 0.5 if name == "gradicon" else 0.45
    assert bytes_kept(changed(config, remat="networks")) < share * whole


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_near_float32(name):
    config = NETWORKS[name]
    run = jax.jit(lambda v, config: predict(config, v)[0], static_argnames="config")
    variables = variables_of(config)
    full = run(variables, config)
    half = run(variables, changed(config, precision="bfloat16"))
    start = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    moved, gap = (np.linalg.norm(x, axis=-1) for x in (full - start, half - full))
    assert 0.1 < moved.mean() < 10
    # Voxels. Random pyramids of velocities are rough, and have seven squarings a pass.
    assert 0 < gap.mean() < (0.1 if name == "promptreg" else 0.005)


@pytest.mark.parametrize("name", ["promptreg", "unireg", "unireg_rpn", "same"])
def test_computing_again_changes_no_number(name, monkeypatch):
    # Each level of the pyramid once, where it would repeat what it did.
    monkeypatch.setattr(rdp, "_PASSES", dict.fromkeys(rdp._PASSES, 1))
    config = (NETWORKS | OTHER_FORMS)[name]
    variables = variables_of(config)
    run = jax.jit(
        jax.value_and_grad(lambda p, v, config: loss(p, config, v)[0]),
        static_argnames="config",
    )
    params = variables["params"]
    once, again = (
        run(params, variables, changed(config, remat=remat))
        for remat in ("layers", "networks")
    )
    np.testing.assert_allclose(again[0], once[0], rtol=1e-6)
    # One rounding of the parameters, which deep normalised pyramids amplify.
    rounded = jax.tree.map(lambda x: x * np.float32(1 + 2e-7), params)
    scale = distance(run(rounded, variables, config)[1], once[1])
    assert distance(again[1], once[1]) < max(2 * scale, 1e-6)


def distance(a, b):
    """Of two gradients, relative to the second."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)
