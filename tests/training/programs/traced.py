"""Traces every network, similarity and optimisation with all annotations checked.

Arrays of different rank may meet only where the code gives both their axes. Nothing is
compiled or run; ends with an error at the first annotation that does not hold.
"""

import dataclasses
import functools
import sys
import typing

import beartype
import jaxtyping

# Whole numbers are welcome where a float is asked for (PEP 484), and a method that is
# decorated on its own cannot know what Self is.
_CHECK = beartype.beartype(
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,
        hint_overrides=beartype.BeartypeHintOverrides({typing.Self: object}),
    )
)


def checked(function):
    """Decorates all but dataclasses' own: JAX builds trees of placeholders."""
    return function if function.__name__ == "__init__" else _CHECK(function)


_ROOMS = ("space", "nn", "losses", "models", "registration.optimization")
jaxtyping.install_import_hook([f"jaxreg.{room}" for room in _ROOMS], "__main__.checked")

import jax
import jax.numpy as jnp

from jaxreg.losses import similarity
from jaxreg.losses.objective import Objective
from jaxreg.models import sam
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.unireg import paper
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.nn.conv import api
from jaxreg.registration.optimization import displacement, features
from jaxreg.training import step as step_lib
from jaxreg.typing import Pair

REGIONS = {"regions": 3, "tasks": ((2, "intra"), (0, "inter"))}
NETWORKS = {
    "gradicon": GradIconConfig((2, 4, 8), (4, 6), 1, 1),
    "rdp": RdpConfig(),
    "promptreg": PromptRegConfig(channels=2, tasks=2),
    "unireg": UniRegConfig(**REGIONS),
    "unireg_mind": UniRegConfig(**REGIONS, features="mind"),
    "unireg_rpn": UniRegRpnConfig(),
}
SHAPE = (16, 32, 16)
ALL_PARTS = Objective(
    dice_weight=1.0, smoothness_weight=0.1, loss_masking=True,
    intensity_conservation=True,
)  # fmt: skip


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def pair_of(shape, channels=1):
    """The shapes of a pair that has all that an objective can ask for."""
    image, one = struct(1, *shape, channels), struct(1, *shape, 1)
    classes = struct(1, *shape, 3)
    return Pair(
        image, image, one, one, classes, classes, struct(1, 3, dtype=bool),
        task=struct(1, dtype=jnp.int32),
        similarity_range=struct(1, 2),
    )  # fmt: skip


def trace_network(config):
    model = config.build()
    variables = jax.eval_shape(lambda key: model.init(key, SHAPE), jax.random.key(0))
    if getattr(config, "features", None) == "sam":
        network = jax.eval_shape(lambda key: sam.init(sam.SamConfig(), key), KEY)
        variables = {**variables, paper.SAM: network}
    for train in (False, True):
        trace_gradient(model, variables, SHAPE, ALL_PARTS, train=train)


def trace_gradient(model, variables, shape, objective, *, train=False):
    def value(params, variables, pair, noise):
        return step_lib.evaluate(
            model, {**variables, "params": params}, pair, noise,
            objective=objective, train=train,
        )  # fmt: skip

    pair, noise = pair_of(shape), struct(1, *shape, 3)
    gradient = jax.grad(value, has_aux=True)
    jax.eval_shape(gradient, variables["params"], variables, pair, noise)


def trace_similarities():
    model = NETWORKS["gradicon"].build()
    variables = jax.eval_shape(model.init, KEY)
    for name in similarity.SIMILARITIES:
        trace_gradient(model, variables, (11, 9, 10), Objective(similarity=name))


def trace_displacement():
    shape = (24, 20, 16)
    pair = dataclasses.replace(pair_of(shape), task=None)

    def value(parameters, pair, noise):
        return displacement._direct_loss(
            parameters, pair, noise, Objective(similarity="ncc"), jnp.float32(1),
            start=jnp.eye(4), extent=jnp.ones(3), folding=1.0,
        )  # fmt: skip

    for control in (None, (struct(1, 6, 5, 4, 3),) * 2):
        found = {"affine": struct(3, 4), "control": control}
        jax.eval_shape(jax.grad(value, has_aux=True), found, pair, struct(1, *shape, 3))


def trace_features():
    def extracted(image):
        return features._side_by_side(features.mind_features(image), coarse=True)

    found = jax.eval_shape(extracted, struct(1, 16, 16, 16, 1))

    def value(field, moving, fixed):
        config = features.FeatureConfig()
        return features.feature_loss(field, moving, fixed, config)

    field = struct(*found[0].shape[:4], 3)
    jax.eval_shape(jax.grad(value, has_aux=True), field, found, found)


KEY = jax.random.key(0)


def refuse_what_is_wrong():
    """The checks are on: neither an image without channels nor two ranks pass."""
    wrong = (
        (api.max_pool2, (struct(1, 8, 8, 8),), jaxtyping.TypeCheckError),
        (jnp.add, (struct(2, 3), struct(3)), ValueError),
    )
    for function, given, error in wrong:
        try:
            jax.eval_shape(function, *given)
        except error:
            continue
        raise AssertionError(f"{function.__name__} takes {given}")


WORK = {
    "refused": refuse_what_is_wrong,
    **{n: functools.partial(trace_network, config) for n, config in NETWORKS.items()},
    "similarities": trace_similarities,
    "displacement": trace_displacement,
    "features": trace_features,
}

if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for name in sys.argv[1:] or WORK:
        print(name, flush=True)
        WORK[name]()
