"""Every network and its training step lower for TPU and GPU, in forms made for them.

Programs are traced on abstract arrays and lowered; nothing is compiled or run. What is
looked for is read off the text of the lowered program.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

from jaxreg.experiments import files
from jaxreg.experiments import sam as sam_lib
from jaxreg.losses.contrastive import ContrastiveConfig
from jaxreg.losses.objective import Objective
from jaxreg.models import rdp, sam
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import AS_PAPER, PromptRegConfig
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.unireg import paper
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.space import sampling
from jaxreg.training import optimizer, state, step
from jaxreg.typing import Pair
from jaxreg.xla.platforms import tracing_for

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SHAPE = (32, 16, 16)
ODD = (9, 11, 10)  # GradICON takes any size
KEY = jax.random.key(0)
BOTH = ("tpu", "cuda")
LARGEST_KERNEL = 7
SMALL_SAM = sam.SamConfig((2, 2, 4, 4), 4)
PAPER = dataclasses.replace(AS_PAPER, channels=1, tasks=2)
PROMPTS = {"orthogonality_weight": 0.1, "task_weight": 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what it is trained by.

    Attributes:
      loops: of a forward pass, by the network's definition: integrations (8 in the
        recursive pyramid), offsets of a correlation, images one after the other.
      trained_loops: of a training step; integrations have a gradient, the others make
        features that are frozen.
    """

    config: Any
    similarity: str = "mse"
    weights: tuple[tuple[str, Any], ...] = ()
    loops: int = 0
    trained_loops: int = 0

    @property
    def shape(self):
        return ODD if isinstance(self.config, GradIconConfig) else SHAPE

    @property
    def objective(self) -> Objective:
        weights: dict[str, Any] = dict(self.weights)
        if isinstance(self.config, GradIconConfig):
            return Objective(self.similarity, **weights)
        return Objective(
            self.similarity,
            inverse_consistency_weight=0.0,
            smoothness_weight=1.0,
            directions="forward",
            **weights,
        )


CASES = {
    "gradicon": Case(
        GradIconConfig((2, 4), (4,), downsampled_steps=1, fullres_steps=0), "lncc"
    ),
    "bfloat16": Case(GradIconConfig((2, 4), (4,), 0, 0, precision="bfloat16"), "lncc2"),
    "rdp": Case(RdpConfig(1), loops=8),
    "promptreg": Case(PAPER, "mind", tuple(PROMPTS.items()), 8, 2 * 5),
    "released": Case(PromptRegConfig(channels=1, tasks=2), loops=8),
    "unireg": Case(UniRegConfig(features="mind"), "ncc", (), 2, 2),
    "with sam": Case(UniRegConfig(), loops=3),
    "same": Case(paper.SAME, loops=4),
    "unireg_rpn": Case(UniRegRpnConfig(2), "box_ncc"),
}
LONG = pytest.mark.slow  # a gradient takes its time to trace
TRAINED = (
    "gradicon",
    "unireg",
    "unireg_rpn",
    pytest.param("bfloat16", marks=LONG),
    pytest.param("promptreg", marks=LONG),
)
"""The others are parts of these, but for what is frozen."""


def abstract(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


@functools.cache
def arguments(name: str) -> tuple[Any, Pair]:
    """Abstract variables of a case's network, and a pair for it."""
    case = CASES[name]
    model, shape = case.config.build(), case.shape
    variables = dict(jax.eval_shape(lambda key: model.init(key, shape), KEY))
    if case.config.needs_sam:
        frozen = jax.eval_shape(lambda key: sam.init(SMALL_SAM, key), KEY)
        variables = sam.with_sam(variables, frozen)
    image: Any = abstract((1, *shape, 1))
    task: Any = abstract((1,), jnp.int32)
    return variables, Pair(image, image, task=task)


def exported(function: Callable, *args, platforms=BOTH) -> str:
    """The text of a program as it is handed to XLA, without its lines' origins."""
    with tracing_for("any"):
        found = export.export(jax.jit(function), platforms=platforms)(*args)
    return re.sub(r"^#loc.*$", "", found.mlir_module(), flags=re.MULTILINE)


def forward(name: str, platforms=BOTH) -> str:
    model, shape = CASES[name].config.build(), CASES[name].shape

    def run(variables, pair):
        maps, _ = step.predict(model, variables, pair, directions="forward")
        return maps.forward.on_grid(shape)

    return exported(run, *arguments(name), platforms=platforms)


# On TPU these read points part by part, and one volume of a batch after the other.
SAMPLERS = re.compile(r"_(read|index_gradient|values_gradient)(_\d+)?$")


def functions(text: str) -> dict[str, str]:
    """The functions of a program's text, by name."""
    parts = re.split(r"func\.func [^@\n]*@([\w.]+)(?=\()", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check(text: str, loops: int) -> None:
    """Checks that a program suits a TPU and a GPU.

    Args:
      text: of the program.
      loops: that it may have, samplers aside; those over slabs and chunks are for CPU
        alone.
    """
    assert "stablehlo.convolution" in text
    others = {n: t for n, t in functions(text).items() if not SAMPLERS.match(n)}
    assert sum(t.count("stablehlo.while") for t in others.values()) <= loops
    assert "?" not in "".join(re.findall(r"tensor<[^>]*>", text)), "a dynamic shape"
    assert not re.search(r"dynamic_(reshape|iota|pad|gather|broadcast)", text)
    assert "callback" not in text
    assert not re.search(r"xf64>|tensor<f64>|complex", text)
    assert flipped(text) == [], "a flipped volume is slow on a TPU"


def flipped(text: str) -> list[str]:
    """Returns the reversals of what is larger than a kernel, along a reversed axis."""
    found = re.findall(
        r"reverse %[\w#]+, dims = \[([^\]]*)\] : tensor<([\dx]*)x\w+>", text
    )
    assert len(found) == text.count("stablehlo.reverse")
    large = []
    for axes, sizes in found:
        shape = [int(n) for n in sizes.split("x")]
        if any(shape[int(axis)] > LARGEST_KERNEL for axis in axes.split(",")):
            large.append(f"{sizes} along {axes}")
    return large


@pytest.mark.parametrize("name", CASES)
def test_forward_pass_lowers_for_tpu_and_gpu(name):
    check(forward(name), CASES[name].loops)


@pytest.mark.parametrize("name", TRAINED)
def test_training_step_lowers_for_tpu_and_gpu(name, monkeypatch):
    case = CASES[name]
    config = case.config
    if name in ("promptreg", "unireg", "unireg_rpn"):
        # Half the time: the forms for CPU, which the forward pass had, are not traced.
        config = dataclasses.replace(config, form="native")
    # Each level of the pyramid once, where it would repeat what it did.
    monkeypatch.setattr(rdp, "_PASSES", dict.fromkeys(rdp._PASSES, 1))
    variables, pair = arguments(name)
    rule = optax.adam(1e-4)
    states = jax.eval_shape(rule.init, variables["params"])
    function = step.make_step(config.build(), case.objective, rule)
    noise = abstract((1, *case.shape, 3))
    text = exported(function, variables, states, pair, noise)
    check(text, case.trained_loops)


@LONG
def test_sam_s_training_step_lowers_for_tpu_and_gpu():
    given: Any = files.load_any(CONFIGS / "sam.py")
    contrast = ContrastiveConfig(8, 4, 8, 4, coarse_hard=4, coarse_negatives=2)
    config = dataclasses.replace(SMALL_SAM, form="native")  # as above
    given = dataclasses.replace(given, model=config, contrast=contrast)
    rule = optimizer.make_optimizer(given.optimizer, 10, 10)
    start = jax.eval_shape(
        lambda: state.start(sam.init(config, KEY), rule, KEY, ema=False)
    )
    batch = {
        f"{side}{suffix}": abstract((2, *SHAPE, channels))
        for side in ("moving", "fixed")
        for suffix, channels in (("", 1), ("_places", 3), ("_valid", 1))
    }
    text = exported(sam_lib.make_train_step(given), start, batch)
    # Volumes one after the other, in either loss and in their gradients; and in each
    # view's search for the nearest places of the other, which has none.
    check(text, 4 + 4)


def test_the_forms_for_cpu_would_be_seen():
    text = forward("gradicon", ("cpu",))
    assert text.count("stablehlo.while") > 0
    with pytest.raises(AssertionError):
        check(text, 0)


def gathers_and_scatters(function, *args, platform: str) -> tuple[int, int]:
    """How many a program executes; a function counts as often as it is called."""
    bodies = functions(exported(function, *args, platforms=(platform,)))

    @functools.cache
    def count(name: str, operation: str) -> int:
        found = 0
        for line in bodies[name].splitlines():
            found += f'"stablehlo.{operation}"(' in line
            found += sum(
                count(f, operation) for f in re.findall(r"call @([\w.]+)", line)
            )
        return found

    return count("main", "gather"), count("main", "scatter")


@pytest.mark.parametrize(
    ("platform", "channels", "forward"), [("cuda", 3, 1), ("tpu", 3, 1), ("tpu", 1, 8)]
)
@pytest.mark.parametrize("outside", ["edge", "zeros"])
def test_a_sampler_s_gradients_gather_and_scatter_once(
    platform, channels, forward, outside
):
    field, points = abstract((1, *SHAPE, channels)), abstract((1, *SHAPE, 3))
    sample = functools.partial(sampling.sample, outside=outside)
    count = functools.partial(gathers_and_scatters, platform=platform)
    assert count(sample, field, points) == (forward, 0)

    def gradient(argnums):
        return jax.grad(lambda *a: jnp.sum(sample(*a) ** 2), argnums)

    assert count(gradient((0, 1)), field, points) == (forward + 1, 1)
    # An image has no gradient: nothing is scattered for it.
    assert count(gradient(1), field, points) == (forward + 1, 0)


@LONG
def test_a_training_step_gathers_and_scatters_once_a_sampler():
    case = CASES["gradicon"]
    variables, pair = arguments("gradicon")
    rule = optax.adam(1e-4)
    states = jax.eval_shape(rule.init, variables["params"])
    function = step.make_step(case.config.build(), case.objective, rule)
    noise = abstract((1, *case.shape, 3))
    found = gathers_and_scatters(
        function, variables, states, pair, noise, platform="cuda"
    )
    # 11 samplers; the points of 8 have a gradient, and the values of 8.
    assert found == (11 + 8, 8)


def test_a_tap_by_tap_sampler_would_be_seen():
    field, points = abstract((1, *SHAPE, 3)), abstract((1, *SHAPE, 3))
    sample = functools.partial(sampling.sample, form="map_coordinates")
    found, _ = gathers_and_scatters(sample, field, points, platform="cuda")
    assert found == 8


def test_a_flipped_volume_would_be_seen():
    text = exported(lambda x: x[:, ::-1], abstract((1, *SHAPE, 1)))
    assert flipped(text) == ["1x32x16x16x1 along 1"]


def test_double_precision_and_callbacks_would_be_seen():
    image = abstract((1, 4, 4, 4, 1))

    def conv(x):
        kernel = jnp.ones((3, 3, 3, 1, 1), jnp.float32)
        numbers = ("NDHWC", "DHWIO", "NDHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), "SAME", dimension_numbers=numbers
        )

    check(exported(conv, image), 0)
    with jax.enable_x64(True), pytest.raises(AssertionError):
        check(exported(lambda x: conv(x).astype("float64") * 2.0, image), 0)

    def called(x):
        return jax.pure_callback(lambda y: y, image, conv(x))

    with pytest.raises((AssertionError, NotImplementedError)):
        check(exported(called, image), 0)
