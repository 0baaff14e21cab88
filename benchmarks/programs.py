"""The programs that are counted and compiled: each network at its grid, its steps."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import counting
import counting_rules
import jax
import jax.numpy as jnp
import optax
from counting import Layer

from jaxreg.experiments import fields, files
from jaxreg.experiments import sam as sam_lib
from jaxreg.losses.objective import Objective
from jaxreg.models import sam
from jaxreg.registration.optimization import network as network_lib
from jaxreg.training import optimizer, state, step
from jaxreg.typing import Pair

ROOT = pathlib.Path(__file__).parents[1]
Shape = tuple[int, int, int]
Precision = Literal["float32", "default", "bfloat16"]
Task = Literal["forward", "train", "io"]
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
      update: the optimiser's step, in training and optimisation.
      donate: arguments of the program whose memory its results take.
      config: of the network, as it is built.
    """

    title: str
    counted: Callable
    args: tuple[Any, ...]
    whole: Callable
    whole_args: tuple[Any, ...]
    update: Layer | None = None
    donate: tuple[int, ...] = ()
    config: Any = None

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


def build(
    name: str,
    *,
    size: int | None,
    task: Task,
    precision: Precision,
    batch: int | None = None,
    remat: str | None = None,
    settings: Sequence[tuple[str, str]] = (),
) -> Program:
    """Returns the program of a network: a prediction, a step of its recipe, or of IO.

    Args:
      name: in `MODELS`.
      size: longest axis instead of the published one.
      task: "forward" predicts one direction; "train" is a training step, and "io" one
        of instance optimisation, which SAM has not.
      precision: "bfloat16" has effect on networks that can compute in it.
      batch: pairs; of SAM images, and in training volumes of which it sees two views.
        1 if None, in SAM's training the recipe's.
      remat: has effect on networks that can compute activations again.
      settings: of the network, name and value as on the command line of training.

    Raises:
      UserError: the network has no such setting, or not this value.
    """
    recipe, shape, changes = MODELS[name]
    given: Any = files.load_any(ROOT / "configs" / f"{recipe}.py")
    if precision == "bfloat16" and hasattr(given.model, "precision"):
        changes = {**changes, "precision": precision}
    if remat is not None and hasattr(given.model, "remat"):
        changes = {**changes, "remat": remat}
    network = dataclasses.replace(given.model, **changes)
    network = fields.replaced(network, [([n], v) for n, v in settings], "model.")
    given = dataclasses.replace(given, model=network)
    if size is not None:
        shape = _smaller(shape, size, 1 if name == "gradicon" else 16)
    if name != "sam":
        return registration(name, given, shape, task=task, batch=batch or 1)
    if task == "io":
        raise ValueError("sam predicts no map that could be optimised")
    if task == "train":
        return _sam_step(given, batch or given.train.batch)
    return _sam(given.model, shape, batch or 1)


def _smaller(shape: Shape, size: int, divisor: int) -> Shape:
    d, h, w = (
        max(divisor, round(n * size / max(shape) / divisor) * divisor) for n in shape
    )
    return d, h, w


def _title(name: str, shape: Sequence[int], what: str, dtype: str | None) -> str:
    grid = " x ".join(map(str, shape))
    return f"{name}, {grid}, {what}, activations {dtype or 'float32'}"


def registration(
    name: str, given: Any, shape: Shape, *, task: Task, batch: int = 1
) -> Program:
    """Returns the program of a registration network.

    Args:
      name: for the title.
      given: a recipe, see `jaxreg.experiments.config.Experiment`.
      shape: the network grid.
      task: see `build`.
      batch: pairs.
    """
    model = given.model.build()
    variables = dict(jax.eval_shape(lambda k: model.init(k, shape), jax.random.key(0)))
    if given.model.needs_sam:
        frozen = jax.eval_shape(
            lambda k: sam.init(sam.SamConfig(), k), jax.random.key(0)
        )
        variables = sam.with_sam(variables, frozen)
    image: Any = _abstract((batch, *shape, 1))
    which: Any = _abstract((batch,), jnp.int32)
    pair = Pair(image, image, task=which)
    # Of labels the scans decide how many there are.
    objective = dataclasses.replace(given.objective, dice_weight=0.0)
    rule = optimizer.make_optimizer(given.optimizer, 1)
    if task == "io":
        objective, rule = Objective(), optax.adam(1e-5)
        variables = dict(jax.eval_shape(model.cache_features, variables, image, image))
    states = jax.eval_shape(rule.init, variables["params"])
    noise = _abstract((1, *shape, 3))

    def forward(variables, pair):
        maps, _ = step.predict(model, variables, pair, directions="forward")
        return maps.forward.on_grid(shape)

    def loss(variables, pair, noise):
        return step.evaluate(
            model, variables, pair, noise, objective=objective, train=task == "train"
        )[0]

    def train(*args):  # no maps among the results, as in a training loop
        return step.make_step(model, objective, rule)(*args)[:3]

    def optimise(state, pair, key):
        rate = jnp.float32(1e-5)
        return network_lib._network_step(
            state, 0, pair, key, None, rate, model=model, objective=objective
        )

    pairs = "one pair" if batch == 1 else f"{batch} pairs"
    both = "both directions" if objective.directions == "both" else "one direction"
    what = {
        "forward": "one direction" + (f" of {pairs}" if batch > 1 else ""),
        "train": f"training step of {pairs}, {both}",
        "io": f"optimisation step of {pairs}, {both}",
    }
    title = _title(name, shape, what[task], getattr(given.model, "precision", None))
    args = (variables, pair)
    if task == "forward":
        return Program(title, forward, args, forward, args, config=given.model)
    updated = counting.update(
        "adam" if task == "io" else given.optimizer.name, parameters(variables)
    )
    args, run, donate = (*args, noise), train, (0, 1)
    whole_args: tuple[Any, ...] = (variables, states, pair, noise)
    if task == "io":
        key = jax.eval_shape(lambda: jax.random.key(0))
        run, donate, whole_args = optimise, (0,), ((variables, states), pair, key)
    return Program(title, loss, args, run, whole_args, updated, donate, given.model)


def parameters(variables: Any) -> int:
    """Returns how many numbers are trained."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def _sam(config: sam.SamConfig, shape: Shape, images: int) -> Program:
    variables = jax.eval_shape(lambda k: sam.init(config, k), jax.random.key(0))
    args = (variables, _abstract((images, *shape, 1)))

    def forward(variables, image):
        found = sam.features(config, variables, image)
        return found.fine, found.coarse

    what = "one image" if images == 1 else f"{images} images"
    title = _title("sam", shape, what, config.precision)
    return Program(title, forward, args, forward, args, config=config)


def _sam_step(given: Any, volumes: int) -> Program:
    shape = given.views.shape
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
        (0,),
        given.model,
    )
