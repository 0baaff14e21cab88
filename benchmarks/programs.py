"""The programs that are counted: each network at its grid, and its recipe's step."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import counting
import counting_rules
import jax
import jax.numpy as jnp
from counting import Layer

from jaxreg.experiments import files
from jaxreg.experiments import sam as sam_lib
from jaxreg.models import sam
from jaxreg.training import optimizer, state, step
from jaxreg.typing import Pair

ROOT = pathlib.Path(__file__).parents[1]
Shape = tuple[int, int, int]
Precision = Literal["float32", "default", "bfloat16"]
UNIREG_SHAPE = (192, 192, 160)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is counted, and what is compiled.

    Attributes:
      title: network and grid.
      counted: a function of `args` that makes the layers, without their gradients.
      args: abstract.
      whole: the program, gradients and update included.
      whole_args: its arguments.
      update: the optimiser's step, in training.
    """

    title: str
    counted: Callable
    args: tuple[Any, ...]
    whole: Callable
    whole_args: tuple[Any, ...]
    update: Layer | None = None

    def layers(self) -> list[Layer]:
        """Returns all layers, those of the gradient after the others."""
        layers = counting_rules.record(self.counted, *self.args)
        if self.update is None:
            return layers
        backward = [g for layer in reversed(layers) for g in counting.gradient(layer)]
        return [*layers, *backward, self.update]


MODELS: dict[str, tuple[str, Shape, dict[str, Any]]] = {
    "gradicon": ("unigradicon", (175, 175, 175), {}),
    "unireg-mind": ("unireg", UNIREG_SHAPE, {"features": "mind"}),
    "unireg-sam": ("unireg", UNIREG_SHAPE, {"features": "sam"}),
    "unireg-rpn": ("unireg_rpn", UNIREG_SHAPE, {}),
    "promptreg": ("promptreg", (160, 160, 160), {}),
    "rdp": ("rdp", (160, 160, 160), {}),
    "sam": ("sam", UNIREG_SHAPE, {}),
}
"""Recipe in configs/, published grid, and what is changed in the recipe's network."""


def _abstract(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def build(name: str, *, size: int | None, train: bool, precision: Precision) -> Program:
    """Returns the program of a network: one pair, or one step of its recipe.

    Args:
      name: in `MODELS`.
      size: longest axis instead of the published one.
      train: a training step of one pair; of the recipe's batch of views for SAM.
      precision: "bfloat16" has effect on networks that can compute in it.
    """
    recipe, shape, changes = MODELS[name]
    given: Any = files.load_any(ROOT / "configs" / f"{recipe}.py")
    if precision == "bfloat16" and hasattr(given.model, "precision"):
        changes = {**changes, "precision": precision}
    given = dataclasses.replace(
        given, model=dataclasses.replace(given.model, **changes)
    )
    if size is not None:
        shape = _smaller(shape, size, 1 if name == "gradicon" else 16)
    if name == "sam":
        return _sam_step(given) if train else _sam(given.model, shape)
    return registration(name, given, shape, train=train)


def _smaller(shape: Shape, size: int, divisor: int) -> Shape:
    d, h, w = (
        max(divisor, round(n * size / max(shape) / divisor) * divisor) for n in shape
    )
    return d, h, w


def _title(name: str, shape: Sequence[int], what: str, dtype: str) -> str:
    return f"{name}, {' x '.join(map(str, shape))}, {what}, activations {dtype}"


def registration(name: str, given: Any, shape: Shape, *, train: bool) -> Program:
    """Returns the program of a registration network.

    Args:
      name: for the title.
      given: a recipe, see `jaxreg.experiments.config.Experiment`.
      shape: the network grid.
      train: see `build`.
    """
    model = given.model.build()
    variables = dict(jax.eval_shape(lambda k: model.init(k, shape), jax.random.key(0)))
    if given.model.needs_sam:
        frozen = jax.eval_shape(
            lambda k: sam.init(sam.SamConfig(), k), jax.random.key(0)
        )
        variables = sam.with_sam(variables, frozen)
    image: Any = _abstract((1, *shape, 1))
    task: Any = _abstract((1,), jnp.int32)
    pair = Pair(image, image, task=task)
    dtype = getattr(given.model, "precision", "float32")

    def forward(variables, pair):
        maps, _ = step.predict(model, variables, pair, directions="forward")
        return maps.forward.on_grid(shape)

    if not train:
        title = _title(name, shape, "one direction", dtype)
        return Program(title, forward, (variables, pair), forward, (variables, pair))

    # Of labels the scans decide how many there are.
    objective = dataclasses.replace(given.objective, dice_weight=0.0)
    rule = optimizer.make_optimizer(given.optimizer, 1)
    states = jax.eval_shape(rule.init, variables["params"])
    noise = _abstract((1, *shape, 3))

    def loss(variables, pair, noise):
        return step.evaluate(
            model, variables, pair, noise, objective=objective, train=True
        )[0]

    both = "both directions" if objective.directions == "both" else "one direction"
    return Program(
        _title(name, shape, f"training step of one pair, {both}", dtype),
        loss,
        (variables, pair, noise),
        step.make_step(model, objective, rule),
        (variables, states, pair, noise),
        counting.update(given.optimizer.name, parameters(variables)),
    )


def parameters(variables: Any) -> int:
    """Returns how many numbers are trained."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def _sam(config: sam.SamConfig, shape: Shape) -> Program:
    variables = jax.eval_shape(lambda k: sam.init(config, k), jax.random.key(0))
    args = (variables, _abstract((1, *shape, 1)))

    def forward(variables, image):
        found = sam.features(config, variables, image)
        return found.fine, found.coarse

    title = _title("sam", shape, "one image", config.precision)
    return Program(title, forward, args, forward, args)


def _sam_step(given: Any) -> Program:
    shape, volumes = given.views.shape, given.train.batch
    batch = {
        f"{side}{suffix}": _abstract((volumes, *shape, channels))
        for side in ("moving", "fixed")
        for suffix, channels in (("", 1), ("_places", 3), ("_valid", 1))
    }
    variables = jax.eval_shape(lambda k: sam.init(given.model, k), jax.random.key(0))
    rule = optimizer.make_optimizer(given.optimizer, 1)
    start = jax.eval_shape(
        lambda v: state.start(v, rule, jax.random.key(1), ema=False), variables
    )
    loss = sam_lib.make_loss(given)

    def counted(variables, batch):
        return loss(variables, batch, jax.random.key(0), train=True)[0]

    what = f"training step of {volumes} x 2 views"
    return Program(
        _title("sam", shape, what, given.model.precision),
        counted,
        (variables, batch),
        sam_lib.make_train_step(given),
        (start, batch),
        counting.update(given.optimizer.name, parameters(variables)),
    )
