"""UniReg as in its paper: a U-Net with a dynamic head, conditioned on the task.

A U-Net sees both images, and the local correlation of their anatomical embeddings at
half resolution. From its features, the body region and the type of task (between or
within subjects) a controller makes the three layers that give the displacement. SAME,
from which it descends, has one convolution in their place and integrates a velocity.

References:
  Li et al., UniReg: Foundation model for controllable medical image registration,
  2025; Tian et al., SAME++, 2023, whose code decides the U-Net and the correlation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.errors import UserError
from jaxreg.models.base import (
    ActivationConfig,
    Prediction,
    RegistrationModel,
    Window,
    fresh_variables,
)
from jaxreg.models.rdp import as_transform
from jaxreg.models.sam import HU_RANGE, SAM, config_of, to_sam_range
from jaxreg.models.unireg.features import (
    COARSE,
    FINE,
    MIND_CHANNELS,
    FeatureNetwork,
    Features,
    concatenated,
    correlated,
    mind_features,
    one_by_one,
    rescaled,
    sam_features,
)
from jaxreg.models.unireg.layer import Layer
from jaxreg.models.unireg.regions import RegionConfig
from jaxreg.nn import halved, heads
from jaxreg.nn.conv import api
from jaxreg.nn.heads import (
    LAST_DEVIATION,
    SLOPE,
    DynamicHead,
    Pairing,
    RegionPairings,
    SmoothnessRange,
)
from jaxreg.nn.layers import convolution, kaiming_uniform, leaky, normal
from jaxreg.nn.remat import part
from jaxreg.space import fields
from jaxreg.space.grid import Shape, unit_scale
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables

DIVISOR = 16
EMBEDDING = 8
_WINDOWS = ("window", "backbone_window", "sam_window")
FEATURES = "features"
"""The collection of a pair's own features, see `UniReg.cache_features`."""


@dataclasses.dataclass(frozen=True)
class UniRegConfig(ActivationConfig, RegionConfig):
    """Forms of the network, and what its images and tasks are.

    Attributes:
      regions: body regions that a head can be asked for.
      tasks: region and type of each task number; the default is the paper's head and
        neck, chest, abdomen and liver.
      head: "dynamic", made for the task; "static", the same three layers for all
        tasks; or "flow", SAME's one convolution, in canonical units (2 is an axis).
      integrate_steps: squarings by which the output is integrated as a velocity; 0
        takes it as the displacement.
      downsample: "strided" convolutions, one of them an extra one before the
        correlation comes in; or "maxpool", as SAME's code.
      residual: parameter-free shortcuts where a layer's width stays the same.
      features: what is correlated: "sam", "mind" (descriptors, for MR) or "none".
      matching: "correlation", or "concatenation" of the features themselves.
      feature_channels: of SAM's embeddings; only concatenation depends on it.
      pool_norm: see `heads.DynamicHead`.
      smoothness_range: weights of the smoothness term that a dynamic head can be asked
        for; None for a network of one weight per task.
      window: the Hounsfield units of the stored 0 and 1.
      backbone_window: those of the U-Net's -1 and 1; None is the stored range, as for
        MR.
      task_windows: those of each task's pairs; `backbone_window` for all if empty.
        Training takes them from its tasks.
      sam_window: those that the SAM network knows, what is beyond being cut off; None
        for SAM's whole scale. Training takes them from its SAM network.
      form: convolution form, see `jaxreg.nn.conv.api`.
    """

    kind: ClassVar = "unireg"
    title: ClassVar = "UniReg"
    multiple: ClassVar = DIVISOR
    least: ClassVar = DIVISOR
    forms: ClassVar = (
        "integrate_steps",
        "residual",
        "features",
        "pool_norm",
        "downsample",
        "matching",
        "window",
        "backbone_window",
        "smoothness_range",
    )
    frozen: ClassVar = (SAM,)
    pairings: ClassVar = ("intra", "inter")
    pairing_first: ClassVar = False

    regions: int = 4
    tasks: RegionPairings = ((0, "inter"), (1, "inter"), (2, "inter"), (3, "intra"))
    head: Literal["dynamic", "static", "flow"] = "dynamic"
    integrate_steps: int = 0
    downsample: Literal["strided", "maxpool"] = "strided"
    residual: bool = False
    features: Literal["sam", "mind", "none"] = "sam"
    matching: Literal["correlation", "concatenation"] = "correlation"
    feature_channels: int = 128
    pool_norm: bool = False
    smoothness_range: SmoothnessRange | None = None
    window: tuple[float, float] = HU_RANGE
    backbone_window: tuple[float, float] | None = (-800.0, 400.0)
    task_windows: tuple[tuple[float, float], ...] = ()
    sam_window: tuple[float, float] | None = None
    form: api.Form = "auto"

    def __post_init__(self):
        """Checks tasks and windows.

        Raises:
          UserError: see `heads.check_region_pairings`, a window is empty, or there is
            another number of them than of tasks.
        """
        heads.check_region_pairings(self.tasks, self.regions)
        windows = {name: (getattr(self, name),) for name in _WINDOWS}
        for name, several in {**windows, "task_windows": self.task_windows}.items():
            for low, high in filter(None, several):
                if not low < high:
                    raise UserError(
                        f"{name} is {low} to {high}; give the lower Hounsfield unit "
                        "first"
                    )
        if self.task_windows and (
            self.backbone_window is None or len(self.task_windows) != len(self.tasks)
        ):
            raise UserError(
                f"task_windows has {len(self.task_windows)} windows for "
                f"{len(self.tasks)} tasks and backbone_window "
                f"{self.backbone_window}; give one for each task of a network that "
                "reads Hounsfield units, or none"
            )

    def build(self) -> "UniReg":
        """Returns the network."""
        return UniReg(self)

    @property
    def hounsfield_window(self) -> Window | None:
        """The stored range, which SAM and a window of the U-Net take for units."""
        in_units = self.needs_sam or self.backbone_window is not None
        return self.window if in_units else None

    @property
    def network_window(self) -> Window | None:
        """The U-Net's own."""
        return self.backbone_window

    def task_window(self, task: tuple[int, Pairing]) -> Window | None:
        """Returns the Hounsfield units that the U-Net is shown of a region and pairing.

        Where training did not have the two, those of the region, if it has but one.
        """
        for alike in (lambda t: t == task, lambda t: t[0] == task[0]):
            windows = zip(self.task_windows, self.tasks, strict=False)
            found = {window for window, t in windows if alike(t)}
            if len(found) == 1:
                return found.pop()
        return self.network_window

    def with_network_windows(self, windows: Sequence[Window | None]) -> Self:
        """Returns the configuration with the window of each task; None: its own."""
        own = self.backbone_window
        if own is None:
            return self
        shown = tuple(window or own for window in windows)
        if set(shown) <= {own}:
            shown = ()
        return dataclasses.replace(self, task_windows=shown)

    def with_region_pairings(
        self, tasks: RegionPairings, window: Window | None
    ) -> Self:
        """Returns the configuration for another table of tasks, all with one window."""
        own = self.backbone_window and (window or self.backbone_window)
        return dataclasses.replace(
            self, tasks=tasks, task_windows=(), backbone_window=own
        )

    @property
    def needs_sam(self) -> bool:
        """Whether SAM's embeddings are matched."""
        return self.features == "sam"

    def with_sam_window(self, window: Window) -> Self:
        """Returns the configuration for a SAM network that knows a window."""
        low, high = window
        return dataclasses.replace(self, sam_window=(float(low), float(high)))

    @property
    def matched(self) -> int:
        """Channels that join the U-Net at half resolution."""
        if self.features == "none":
            return 0
        channels = MIND_CHANNELS if self.features == "mind" else self.feature_channels
        return 27 if self.matching == "correlation" else 4 * channels


SAME = UniRegConfig(head="flow", integrate_steps=7, downsample="maxpool")
"""The network that UniReg descends from."""


# --- the network ----------------------------------------------------------------------


class UNet(nn.Module):
    """Two images and what their features say to 16 channels per voxel.

    Attributes:
      config: see `UniRegConfig`.
      folded: whether images of full resolution are, the result among them.
    """

    config: UniRegConfig
    folded: bool = False

    @nn.compact
    def __call__(self, moving: Image, fixed: Image, matched: Image | None) -> Image:
        """Returns N D H W 16, or N D/2 H/2 W/2 128.

        Args:
          moving: N D H W 1, [-1, 1].
          fixed: N D H W 1, [-1, 1].
          matched: N D/2 H/2 W/2 C, see `UniRegConfig.matched`.
        """
        as_part = functools.partial(part, remat=self.config.remat)
        given = (x if x is None else x.astype(self.config.precision)
                 for x in (moving, fixed, matched))  # fmt: skip
        finest, *skips = as_part(UNet._encode)(self, *given)
        x = as_part(UNet._decode)(self, *skips)
        return as_part(UNet._at_full_resolution)(self, x, finest)

    def _layer(
        self,
        name: str,
        inputs: int,
        outputs: int,
        *,
        down: bool = False,
        shortcut: bool = False,
        folded: bool = False,
    ) -> Callable:
        config = self.config
        strided = config.downsample == "strided"
        stride = 2 if down and strided else 1
        shortcut = shortcut and config.residual
        module = Layer(
            inputs, outputs, stride, shortcut, config.form, folded, name=name
        )
        pooled = down and not strided
        return lambda x: module(api.max_pool2(x) if pooled else x)

    def _encode(self, moving: Image, fixed: Image, matched: Image | None):
        """Returns features at four resolutions, finest first."""
        config, layer, folds = self.config, self._layer, self.folded
        images = (moving, fixed)
        x = halved.fold(jnp.concatenate(images, -1)) if folds else images
        e0 = layer("encoder_0", 2, 16, folded=folds)(x)
        if config.downsample == "strided":
            x = Layer(16, 16, 2, form=config.form, folded=folds, name="halve")(e0)
        else:
            x = (halved if folds else api).max_pool2(e0)
        parts = (x,) if matched is None else (x, matched)
        e1 = layer("encoder_1", 16 + config.matched, 32)(parts)
        e2 = layer("encoder_2", 32, 32, down=True, shortcut=True)(e1)
        e3 = layer("encoder_3", 32, 32, down=True, shortcut=True)(e2)
        return e0, e1, e2, e3

    def _decode(self, e1: Image, e2: Image, e3: Image) -> Image:
        """Returns features at half resolution, N D/2 H/2 W/2 32."""
        x = self._layer("decoder_0", 32, 32, down=True, shortcut=True)(e3)
        for index, skip in enumerate((e3, e2, e1), start=1):
            x = self._layer(f"decoder_{index}", 64, 32)((api.repeat2(x), skip))
        return x

    def _at_full_resolution(self, x: Image, e0: Image) -> Image:
        """Returns N D H W 16, or N D/2 H/2 W/2 128."""
        layer = functools.partial(self._layer, folded=self.folded)
        repeated = x if self.folded else api.repeat2(x)
        x = layer("remaining_0", 48, 32)((repeated, e0))
        x = layer("remaining_1", 32, 16)(x)
        return layer("remaining_2", 16, 16, shortcut=True)(x)


class UniRegNetwork(nn.Module):
    """Images, features and a task to a field."""

    config: UniRegConfig = UniRegConfig()

    @nn.compact
    def __call__(
        self,
        moving: Image,
        fixed: Image,
        source: Features | None = None,
        target: Features | None = None,
        conditioning: Float[Array, "N K"] | None = None,
    ) -> Image:
        """Returns the head's output, N D H W 3 in voxels, float32; not integrated.

        Args:
          moving: N D H W 1, [-1, 1].
          fixed: N D H W 1, [-1, 1].
          source: features of the moving image; None if the config has none.
          target: features of the fixed image.
          conditioning: region and type of each pair's task, for a dynamic head.
        """
        config = self.config
        matched = None
        if source is not None and target is not None:
            match = {"correlation": correlated, "concatenation": concatenated}
            matched = match[config.matching](source, target)
        folded = api.is_folded(config.form, moving.shape[1:4])
        x = UNet(config, folded, name="unet")(moving, fixed, matched)
        head = functools.partial(UniRegNetwork._head, folded=folded)
        return part(head, config.remat)(self, x, conditioning)

    def _head(
        self, x: Image, conditioning: Float[Array, "N K"] | None, *, folded: bool
    ) -> Image:
        """Returns the displacement that a head makes of the U-Net's result."""
        config = self.config
        if config.head == "flow":
            x = (halved.unfold(x) if folded else x).astype(jnp.float32)
            flow = convolution(
                api.conv3, 16, 3, "flow", config.form, kernel_init=_near_zero()
            )
            scale = 0.5 * jnp.asarray(unit_scale(x.shape[1:4]), x.dtype)
            return flow(x) * scale[None, None, None, None]
        embed = Layer(16, EMBEDDING, form=config.form, folded=folded, name="embedding")
        x = halved.unfold(embed(x)) if folded else embed(x)
        if config.head == "dynamic":
            assert conditioning is not None
            head = DynamicHead(EMBEDDING, pool_norm=config.pool_norm, name="head")
            return head(x, conditioning)
        x = x.astype(jnp.float32)
        for index, init in enumerate((_kaiming(), _kaiming(), _near_zero())):
            width = EMBEDDING if index < 2 else 3
            name = f"head_{index}"
            x = convolution(
                api.conv1, EMBEDDING, width, name, config.form, kernel_init=init
            )(x)
            x = leaky(x, SLOPE) if index < 2 else x
        return x


def _near_zero() -> Callable:
    return normal(LAST_DEVIATION)


def _kaiming() -> Callable:
    return kaiming_uniform(EMBEDDING, SLOPE)


# --- the model ------------------------------------------------------------------------


def check_sam(config: UniRegConfig, variables: Variables) -> None:
    """Checks that variables hold the SAM network that a config needs.

    Raises:
      UserError: it is missing, is something else, or has other embeddings than a
        config that concatenates them.
    """
    if config.features != "sam":
        return
    if SAM not in variables:
        raise UserError(
            "this UniReg correlates SAM's embeddings, but its variables hold no SAM "
            "network; put a trained one in (`sam_weights` PATH, in Python "
            'models.sam.with_sam), or build it with features "mind" or "none"'
        )
    found = config_of(variables[SAM]).embedding
    if config.matching == "concatenation" and found != config.feature_channels:
        raise UserError(
            f"the SAM network has embeddings of {found} channels, this UniReg "
            f"concatenates {config.feature_channels}; give the network that it was "
            "trained with, or set feature_channels"
        )


def _as_features(found) -> Features:
    return Features(found.fine, found.coarse)


@dataclasses.dataclass(frozen=True)
class UniReg(RegistrationModel):
    """UniReg as a `jaxreg.models.base.RegistrationModel`.

    Attributes:
      config: see `UniRegConfig`.
      features: another network for the embeddings than SAM.
    """

    config: UniRegConfig = UniRegConfig()
    features: FeatureNetwork | None = None

    def _features(
        self, variables: Variables, moving: Image, fixed: Image, batching: Batching
    ) -> tuple[Features | None, Features | None]:
        """Features of the moving and of the fixed images, each image's made once."""
        if self.config.features == "none":
            return None, None
        both = variables.get(FEATURES)
        if both is None:
            count = len(moving) // (2 if batching.mirrored else 1)
            both = self._extract(variables, moving[:count], fixed[:count])
        if not batching.mirrored:
            return both
        source, target = (
            jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *order)
            for order in (both, both[::-1])
        )
        return source, target

    def _extract(
        self, variables: Variables, moving: Image, fixed: Image
    ) -> tuple[Features, Features]:
        """Features of images N D H W 1, [0, 1], as the config says."""
        images = jnp.concatenate([moving, fixed])
        if self.config.features == "mind":
            found = mind_features(images)
        else:
            if self.features is None:
                check_sam(self.config, variables)
            extract = self.features or functools.partial(
                sam_features, form=self.config.form, precision=self.config.precision
            )
            frozen = variables.get(SAM, {})
            window = self.config.sam_window or HU_RANGE
            found = one_by_one(
                lambda image: _as_features(extract(frozen, image)),
                to_sam_range(images, self.config.window, window),
            )
        # The networks that make features are frozen.
        found = jax.lax.stop_gradient(found)
        source, target = (
            jax.tree.map(lambda x, part=part: x[part], found)
            for part in (slice(len(moving)), slice(len(moving), None))
        )
        return source, target

    def cache_features(
        self, variables: Variables, moving: Image, fixed: Image
    ) -> Variables:
        """Returns variables with these images' features in place of SAM's network.

        For many calls on one batch: the embeddings cost more than all the rest.

        Args:
          variables: as `apply` takes them.
          moving: N D H W 1, [0, 1].
          fixed: N D H W 1, [0, 1].

        Raises:
          UserError: see `NetworkConfig.check_grid` and `check_sam`.
        """
        self.config.check_grid(moving.shape[1:4])
        if self.config.features == "none":
            return variables
        rest = {name: tree for name, tree in variables.items() if name != SAM}
        return {**rest, FEATURES: _extracted(self, variables, moving, fixed)}

    def _backbone(self, image: Image, task: Int[Array, " N"] | None = None) -> Image:
        """Images N D H W 1, [0, 1], as the U-Net sees them."""
        config = self.config
        window: Any = config.backbone_window
        if window is None:
            return 2.0 * image - 1.0
        if config.task_windows:
            # A task beyond the table is refused, or gives NaN, where heads are made.
            several = jnp.asarray(config.task_windows, jnp.float32)[task]
            window = (
                several[:, 0, None, None, None, None],
                several[:, 1, None, None, None, None],
            )
        return rescaled(image, config.window, window, (-1.0, 1.0))

    def init(self, key: Key, shape: Shape = (32, 32, 32)) -> Variables:
        """Returns fresh variables, {"params": ...}; they do not depend on the shape.

        Those of the network for the embeddings are not among them: they are trained
        elsewhere and join by `sam.with_sam`, without which a config with features "sam"
        cannot be applied. A fresh field is near zero.

        Raises:
          UserError: see `NetworkConfig.check_grid`.
        """
        config = self.config
        config.check_grid(shape)

        def struct(voxels, channels) -> Any:
            sizes = (n // v for n, v in zip(shape, voxels, strict=True))
            return jax.ShapeDtypeStruct((1, *sizes, channels), jnp.float32)

        conditioning = jax.ShapeDtypeStruct((1, config.conditioning_size), jnp.float32)
        features = None
        if config.features != "none":
            mind = config.features == "mind"
            channels = MIND_CHANNELS if mind else config.feature_channels
            features = Features(struct(FINE, channels), struct(COARSE, channels))
        others = (features, features, conditioning)
        return fresh_variables(UniRegNetwork(config), key, shape, 1, *others)

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
          variables: {"params": ...} as from `init`, and "sam" where embeddings are
            SAM's, see `sam.with_sam`; or as from `cache_features` for the same images.
          moving: N D H W 1, [0, 1], see `UniRegConfig.window`.
          fixed: N D H W 1, [0, 1].
          task: each pair's number in `config.tasks`; a dynamic head needs it.
          smoothness: what each pair's head is asked for; the middle of
            `config.smoothness_range` if None. Without a range it makes no difference.
          train: makes no difference.
          batching: where it is mirrored, each image's features are made once.

        Raises:
          UserError: see `NetworkConfig.check_grid`, `heads.look_up` and `check_sam`.
        """
        self.config.check_grid(moving.shape[1:4])
        conditioning = self.config.condition(task, smoothness)
        source, target = self._features(variables, moving, fixed, batching)
        field = UniRegNetwork(self.config).apply(
            {"params": variables["params"]},
            self._backbone(moving, task),
            self._backbone(fixed, task),
            source,
            target,
            conditioning,
        )
        field = jnp.asarray(field)
        if self.config.integrate_steps:
            field = fields.integrate(field, self.config.integrate_steps)
        return Prediction(as_transform(field)), variables


@functools.partial(jax.jit, static_argnames="model")
def _extracted(model: UniReg, variables: Variables, moving: Image, fixed: Image):
    return model._extract(variables, moving, fixed)
