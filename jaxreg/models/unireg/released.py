"""UniReg as released: a residual pyramid with dynamic heads.

One encoder looks at both images. From the coarsest level upwards, each level warps the
moving features by the field so far and adds a displacement, which a head of the task's
own makes. With `iterations` above 1 a level is repeated as long as the images
correlate better (`Ruled`).

Fields are in voxels of their level's grid. The static form, with one convolution in
place of each head, is the network that the release starts from.

References:
  Li et al., UniReg: Foundation model for controllable medical image registration,
  2025; its released code decides everything here and differs from the paper, whose
  network is `jaxreg.models.unireg.paper`.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from jaxreg.errors import UserError
from jaxreg.models.base import (
    ActivationConfig,
    Prediction,
    RegistrationModel,
    fresh_variables,
)
from jaxreg.models.rdp import as_transform
from jaxreg.models.unireg.regions import RegionConfig
from jaxreg.nn import heads
from jaxreg.nn.conv import api
from jaxreg.nn.heads import DynamicHead, RegionPairings, SmoothnessRange
from jaxreg.nn.layers import convolution, leaky
from jaxreg.nn.remat import part
from jaxreg.space import fields
from jaxreg.space.grid import Shape
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables

LEVELS = 4
DIVISOR = 2 ** (LEVELS - 1)
RELEASED_TASKS: RegionPairings = (
    (0, "inter"),
    (1, "inter"),
    (2, "inter"),
    (3, "intra"),
    (4, "intra"),
    (5, "inter"),
)
"""Chest, abdomen, head, liver, cardiac and brain as the release trains them."""
_SLOPE = 0.1
_DEVIATION_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class UniRegRpnConfig(ActivationConfig, RegionConfig):
    """Sizes of the pyramid; read from the tensors when weights are loaded.

    Attributes:
      channels: c, of the finest level's features; the coarser ones have 2c, 4c and 4c.
      image_channels: of each image.
      head: "dynamic" heads, or "static" ones, which know of no task.
      hidden: channels inside a dynamic head.
      regions: body regions that a head can be asked for.
      tasks: region and type of each task number.
      smoothness_range: weights of the smoothness term that a dynamic head can be asked
        for; None for a network of one weight per task, as released.
      iterations: most steps of a level outside training; 1 is the plain pass.
      delta: by how much the correlation must rise for another step.
      form: convolution form, see `jaxreg.nn.conv.api`.
    """

    kind: ClassVar = "unireg_rpn"
    title: ClassVar = "UniReg's pyramid"
    multiple: ClassVar = DIVISOR
    least: ClassVar = DIVISOR
    forms: ClassVar = ("smoothness_range",)
    tensor_table: ClassVar = "jaxreg.weights.pytorch.unireg_rpn:TABLE"
    pairings: ClassVar = ("inter", "intra")
    pairing_first: ClassVar = True

    channels: int = 8
    image_channels: int = 1
    head: Literal["dynamic", "static"] = "dynamic"
    hidden: int = 8
    regions: int = 6
    tasks: RegionPairings = RELEASED_TASKS
    smoothness_range: SmoothnessRange | None = None
    iterations: int = 1
    delta: float = 0.005
    form: api.Form = "auto"

    def __post_init__(self):
        """Checks the tasks and the iterations.

        Raises:
          UserError: see `heads.check_region_pairings`, or there is not one iteration.
        """
        heads.check_region_pairings(self.tasks, self.regions)
        if self.iterations < 1:
            raise UserError(f"iterations is {self.iterations}, expected 1 or more")

    def build(self) -> "UniRegRpn":
        """Returns the network."""
        return UniRegRpn(self)

    @property
    def level_iterations(self) -> int:
        """See `iterations`."""
        return self.iterations

    def with_level_iterations(self, count: int) -> Self:
        """Returns the configuration for levels repeated so often at most."""
        return dataclasses.replace(self, iterations=count)

    @property
    def outside(self) -> Literal["edge", "zeros"]:
        """What features and fields are beyond their grid."""
        return "edge" if self.head == "dynamic" else "zeros"

    def widths(self, level: int) -> tuple[int, int]:
        """Returns the channels of a level's features and of its decoder."""
        c = self.channels
        return min(2 ** (level - 1), 4) * c, (2 if level == 1 else 4) * c


class Encoder(nn.Module):
    """One image to features at four resolutions, finest first."""

    config: UniRegRpnConfig

    @nn.compact
    def __call__(self, image: Image) -> tuple[Image, ...]:
        """Returns N D/2^l H/2^l W/2^l C_l for l = 0 .. 3."""
        inputs, found = self.config.image_channels, []
        x = image.astype(self.config.precision)
        for level in range(1, LEVELS + 1):
            width, _ = self.config.widths(level)
            layer = convolution(
                api.conv3, inputs, width, f"block_{level}", self.config.form
            )
            x = leaky(layer(x), _SLOPE)
            found.append(x)
            x, inputs = api.average_pool2(x), width
        return tuple(found)


class Decoder(nn.Module):
    """Features of both images, of one level, to a displacement in its voxels."""

    config: UniRegRpnConfig
    level: int

    @nn.compact
    def __call__(
        self, moving: Image, fixed: Image, conditioning: Float[Array, "N K"] | None
    ) -> Image:
        """Returns N D H W 3, float32.

        Args:
          moving: N D H W C, warped.
          fixed: N D H W C.
          conditioning: of each pair's task; not looked at by a static head.
        """
        config = self.config
        features, width = config.widths(self.level)

        def layer(inputs, outputs, index, **options):
            name = f"conv_{index}"
            return convolution(api.conv3, inputs, outputs, name, config.form, **options)

        x = leaky(layer(2 * features, width, 1)((moving, fixed)), _SLOPE)
        for index in (2, 3):
            x = leaky(x + layer(width, width, index)(x), _SLOPE)
        x = layer(width, width // 2, 4)(x)
        if config.head == "static":
            options = {"kernel_init": nn.initializers.zeros, "dtype": "float32"}
            return layer(width // 2, 3, 5, **options)(x)
        assert conditioning is not None
        head = DynamicHead(width // 2, config.hidden, pool_norm=True, name="head")
        return head(x, conditioning)


class UniRegRpnNetwork(nn.Module):
    """The pyramid, in one pass or piece by piece."""

    config: UniRegRpnConfig = UniRegRpnConfig()

    def setup(self):
        """Makes the parts."""
        self.encoder = Encoder(self.config)
        self.decoder_4 = Decoder(self.config, 4)
        self.decoder_3 = Decoder(self.config, 3)
        self.decoder_2 = Decoder(self.config, 2)
        self.decoder_1 = Decoder(self.config, 1)

    def __call__(
        self,
        moving: Image,
        fixed: Image,
        conditioning: Float[Array, "N K"] | None = None,
    ) -> Image:
        """Returns the field, N D H W 3 in voxels, of one pass."""
        remat = self.config.remat
        encode = part(UniRegRpnNetwork.encode, remat)
        moving_features, fixed_features = encode(self, moving), encode(self, fixed)
        field = None
        for level in range(LEVELS, 0, -1):
            if field is not None:
                field = fields.upsample_displacement(field)
            m, f = moving_features[level - 1], fixed_features[level - 1]

            def step(network, *arrays, level=level):
                return network.step(level, *arrays)

            field = part(step, remat)(self, m, f, conditioning, field)
        return field  # pyright: ignore[reportReturnType]

    def encode(self, image: Image) -> tuple[Image, ...]:
        """Returns an image's features, see `Encoder`."""
        return self.encoder(image)

    def step(
        self, level: int, moving, fixed, conditioning, field: jax.Array | None = None
    ):
        """Returns a level's field after one more displacement.

        Args:
          level: 4 is the coarsest.
          moving: features of that level, N D H W C.
          fixed: the same of the fixed image.
          conditioning: of each pair's task.
          field: so far, N D H W 3; the displacement alone is returned if None.
        """
        decode = getattr(self, f"decoder_{level}")
        if field is None:
            return decode(moving, fixed, conditioning)
        outside = self.config.outside
        moved = fields.warp_voxels(moving, field, outside=outside)
        displacement = decode(moved, fixed, conditioning)
        return fields.compose_voxels(field, displacement, outside=outside)


# --- repetition of a level, ruled by the images' correlation --------------------------


class Ruled(NamedTuple):
    """What repeating the levels gave for N pairs.

    Attributes:
      field: N D H W 3, voxels.
      steps: of levels 4, 3, 2 and 1, N 4: accepted at level 4, made at the others.
      correlation: that each level's repetitions were judged by, N 4 iterations; NaN
        where none was.
    """

    field: jax.Array
    steps: Int[Array, "N 4"]
    correlation: Float[Array, "N 4 T"]


class _Level(NamedTuple):
    """A level while it is repeated."""

    field: jax.Array
    best: jax.Array
    index: jax.Array
    steps: jax.Array
    going: jax.Array
    trace: jax.Array


def correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the correlation coefficient of two arrays, by sample deviations."""
    centred = [x - jnp.mean(x) for x in (a, b)]
    deviations = [
        jnp.maximum(jnp.sqrt(jnp.sum(x**2) / max(x.size - 1, 1)), _DEVIATION_FLOOR)
        for x in centred
    ]
    return jnp.mean(centred[0] * centred[1] / (deviations[0] * deviations[1]))


def _repeat_coarsest(step, judge, start, config: UniRegRpnConfig) -> _Level:
    """Repeats level 4: the first step stands, one that helps too little does not."""

    def once(state: _Level) -> _Level:
        first = state.index == 0
        field = lax.cond(first, lambda f: f, step, state.field)
        found = judge(field)
        accepted = first | (found >= state.best + config.delta)
        return _Level(
            jnp.where(accepted, field, state.field),
            jnp.where(accepted, found, state.best),
            state.index + 1,
            state.steps + accepted,
            accepted,
            state.trace.at[state.index].set(found),
        )

    return _while_going(once, start, config)


def _repeat(step, judge, start, config: UniRegRpnConfig) -> _Level:
    """Repeats a finer level: the field is judged, and only then refined.

    As released: a refinement after which the correlation fell is kept, and the last of
    all iterations is never judged.
    """

    def once(state: _Level) -> _Level:
        found = judge(state.field)
        going = found >= state.best + config.delta
        return _Level(
            lax.cond(going, step, lambda f: f, state.field),
            jnp.where(going, found, state.best),
            state.index + 1,
            state.steps + going,
            going,
            state.trace.at[state.index].set(found),
        )

    return _while_going(once, start, config)


def _while_going(once, start, config: UniRegRpnConfig) -> _Level:
    zero = jnp.zeros((), jnp.int32)
    trace = jnp.full(config.iterations, jnp.nan, jnp.float32)
    state = _Level(start, jnp.zeros(()), zero, zero, jnp.asarray(True), trace)
    return lax.while_loop(
        lambda s: s.going & (s.index < config.iterations), once, state
    )


def _rule_one(
    network: UniRegRpnNetwork,
    params: Variables,
    moving: Image,
    fixed: Image,
    conditioning: Float[Array, "1 K"] | None,
) -> Ruled:
    """Repeats the levels for one pair; all arrays have a batch of 1."""
    config = network.config
    encoded = [network.apply(params, x, method="encode") for x in (moving, fixed)]
    field, levels = None, []
    for level in range(LEVELS, 0, -1):
        m, f = (features[level - 1] for features in encoded)

        def step(field, level=level, m=m, f=f):
            return network.apply(
                params, level, m, f, conditioning, field, method="step"
            )

        def judge(field, level=level):
            whole = fields.upsample_displacement(field, 2 ** (level - 1))
            warped = fields.warp_voxels(moving, whole, outside=config.outside)
            return correlation(warped, fixed)

        repeat: Callable[..., _Level] = _repeat
        if field is None:
            repeat, start = _repeat_coarsest, step(None)
        else:
            start = fields.upsample_displacement(field)
        levels.append(repeat(step, judge, start, config))
        field = levels[-1].field
    steps = jnp.stack([level.steps for level in levels])
    traces = jnp.stack([level.trace for level in levels])
    return Ruled(levels[-1].field, steps[None], traces[None])


def rule(
    config: UniRegRpnConfig,
    params: Variables,
    moving: Image,
    fixed: Image,
    conditioning: Float[Array, "N K"] | None = None,
) -> Ruled:
    """Returns the field of levels that are repeated as long as it helps.

    A level ends after `config.iterations` steps, or when the whole images' correlation
    exceeds the level's best so far by less than `config.delta`; every level's best
    starts at 0. Each pair is its own judge. There is no derivative through the loops.

    Args:
      config: of the network.
      params: its {"params": ...}.
      moving: N D H W C.
      fixed: N D H W C.
      conditioning: of each pair's task, N K; None for static heads.
    """
    network = UniRegRpnNetwork(config)

    def one(pair) -> Ruled:
        moving, fixed, conditioning = jax.tree.map(lambda x: x[None], pair)
        found = _rule_one(network, params, moving, fixed, conditioning)
        return Ruled(*(x[0] for x in found))

    return lax.map(one, (moving, fixed, conditioning))


# --- the model ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class UniRegRpn(RegistrationModel):
    """The released pyramid as a `jaxreg.models.base.RegistrationModel`."""

    config: UniRegRpnConfig = UniRegRpnConfig()

    def init(self, key: Key, shape: Shape = (32, 32, 32)) -> Variables:
        """Returns fresh variables; they do not depend on the grid's shape.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
        """
        config = self.config
        config.check_grid(shape)
        conditioning = jax.ShapeDtypeStruct((1, config.conditioning_size), jnp.float32)
        network, channels = UniRegRpnNetwork(config), config.image_channels
        return fresh_variables(network, key, shape, channels, conditioning)

    def apply(
        self,
        variables: Variables,
        moving: Image,
        fixed: Image,
        *,
        task: Int[Array, " N"] | None = None,
        smoothness: Float[Array, " N"] | None = None,
        train: bool = False,
        batching: Batching = ONE_CALL,
    ) -> tuple[Prediction, Variables]:
        """Returns the prediction for moving onto fixed, and the same variables.

        Args:
          variables: as from `init`.
          moving: N D H W C, [0, 1].
          fixed: N D H W C, [0, 1].
          task: each pair's number in `config.tasks`; dynamic heads need it.
          smoothness: what each pair's heads are asked for; the middle of
            `config.smoothness_range` if None. Without a range it makes no difference.
          train: training mode is one pass whatever `config.iterations` says.
          batching: makes no difference: nothing is shared by a batch.

        Returns:
          The prediction's aux has, where levels were repeated, "level_steps" and
          "correlation_trace", see `Ruled`.

        Raises:
          UserError: see `NetworkConfig.check_grid` and `heads.look_up`.
        """
        self.config.check_grid(moving.shape[1:4])
        conditioning = self.config.condition(task, smoothness)
        params = {"params": variables["params"]}
        if train or self.config.iterations == 1:
            network = UniRegRpnNetwork(self.config)
            field = network.apply(params, moving, fixed, conditioning)
            return Prediction(as_transform(jnp.asarray(field))), variables
        found = rule(self.config, params, moving, fixed, conditioning)
        aux = {
            "level_steps": found.steps,
            "correlation_trace": found.correlation,
        }
        return Prediction(as_transform(found.field), aux), variables
