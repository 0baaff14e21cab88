"""SAM: anatomical embeddings of each voxel of a scan.

A ResNet-18 with three-dimensional kernels, and a feature pyramid with two heads. The
fine embedding has half the input's resolution; the coarse one a quarter of it along D
and a sixteenth along H and W. Both have length 1, so that their inner products are
cosines. Network, constants and quirks are those of the released code, whose weights
load unchanged.

References:
  Yan et al., SAM: Self-supervised learning of pixel-wise anatomical embeddings in
  radiological images, IEEE TMI 2022; He et al., Deep residual learning for image
  recognition, CVPR 2016.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxreg.errors import UserError
from jaxreg.models.base import Architecture
from jaxreg.nn.conv import api
from jaxreg.nn.layers import (
    Precision,
    StridedConvolution,
    init_lazily,
    value,
    xavier_uniform,
)
from jaxreg.nn.remat import Remat, part
from jaxreg.nn.unet import BatchNorm
from jaxreg.space import sampling
from jaxreg.typing import ONE_CALL, Batching, Image, Key, Variables

SAM = "sam"
"""The kind of network, and the collection of another's variables that holds one."""
FINE_STRIDE = 2
"""Voxels of the image per voxel of the fine grid, along every axis."""
COARSE_STRIDE = (4, 16, 16)
"""The same for the coarse grid, along D, H and W."""
HU_RANGE = (-1024.0, 3071.0)
SAM_RANGE = (-50.0, 205.0)
"""What `HU_RANGE` is mapped to."""
SPACING_MM = 2.0
_SMALLEST_NORM = 1e-12
_STEM, _STEM_PADDING = (3, 7, 7), (0, 3, 3)  # D is padded before, see `Backbone`
# Of the stem's output in use, the largest array, per slab: a twelfth of it at the
# paper's 192 x 192 x 160. A few such arrays are less than what follows there (380 MB in
# each copy of the fine embedding) and have slices enough for the loop to cost nothing.
# What is smaller as a whole needs no loop.
_SLAB_BYTES = 2**27
# Of each stage's first and second block: kernel, and the stride of the first.
_FLAT, _CUBE = (1, 3, 3), (3, 3, 3)
_STAGES = (
    (_FLAT, (1, 2, 2)),
    (_FLAT, (1, 2, 2)),
    (_CUBE, (1, 2, 2)),
    (_CUBE, (2, 2, 2)),
)


@dataclasses.dataclass(frozen=True)
class SamConfig(Architecture):
    """Sizes; the defaults are those of the released network.

    Attributes:
      channels: of the four stages; the stem has the first's.
      embedding: channels of both embeddings.
      form: convolution form, see `jaxreg.nn.conv.api`.
      precision: of activations and products; the embeddings are float32.
      remat: what a gradient computes again, see `jaxreg.nn.remat`: the networks that
        the whole is made of are the stem with the first stage, and each other stage.
    """

    kind: ClassVar = SAM
    tensor_table: ClassVar = "jaxreg.weights.pytorch.sam:TABLE"

    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    embedding: int = 128
    form: api.Form = "auto"
    precision: Precision = "float32"
    remat: Remat = "layers"

    def __post_init__(self):
        """Checks the sizes.

        Raises:
          UserError: there are not four positive numbers of channels, or the embedding
            has none.
        """
        if len(self.channels) != 4 or min(*self.channels, self.embedding) < 1:
            raise UserError(
                f"SAM has channels {self.channels} and embedding {self.embedding}, "
                "expected four positive numbers and one; give widths such as "
                "(64, 128, 256, 512) and 128"
            )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["fine", "coarse"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Embeddings:
    """What SAM says about each place of a scan; float32, of length 1 over channels.

    Attributes:
      fine: N D/2 H/2 W/2 C; along D rounded down, else up.
      coarse: N D/4 H/16 W/16 C, rounded likewise.
    """

    fine: Image
    coarse: Image


class ConvNorm(nn.Module):
    """Convolution and batch normalisation, then perhaps a ReLU."""

    outputs: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] | None = None
    activated: bool = False
    form: api.Form = "auto"
    batching: Batching = ONE_CALL

    @nn.compact
    def __call__(self, x: Image, *, train: bool) -> Image:
        """Maps N D H W I to N D' H' W' outputs."""
        layer = StridedConvolution(
            self.outputs,
            self.size,
            self.stride,
            self.padding,
            form=self.form,
            name="conv",
        )
        x = value(BatchNorm(self.batching, name="norm")(layer(x), train=train))
        return nn.relu(x) if self.activated else x


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution in a first block."""

    outputs: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    projected: bool = False
    form: api.Form = "auto"
    batching: Batching = ONE_CALL

    @nn.compact
    def __call__(self, x: Image, *, train: bool) -> Image:
        """Maps N D H W I to N D' H' W' outputs."""
        layer = functools.partial(
            ConvNorm, self.outputs, form=self.form, batching=self.batching
        )
        first = layer(size=self.size, stride=self.stride, activated=True, name="conv_1")
        y = layer(size=self.size, name="conv_2")(first(x, train=train), train=train)
        if self.projected:
            shortcut = layer(size=(1, 1, 1), stride=self.stride, name="shortcut")
            x = shortcut(x, train=train)
        return nn.relu(y + x)


class Backbone(nn.Module):
    """One image to features at four resolutions, finest first.

    What has all of the image's slices, the stem and the first stage, sees its
    neighbours along D in the stem alone. In use it runs on slabs of slices where it
    would be large, so that its arrays never exist as a whole.
    """

    config: SamConfig
    batching: Batching = ONE_CALL

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> tuple[Image, ...]:
        """Maps N D H W 1 to N D/2 H/2^l W/2^l, l = 1 .. 3, and N D/4 H/16 W/16."""
        # The stem's own zeros along D: a slab has neighbours in their place.
        image = jnp.pad(image, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        pairs = _pairs_per_slab(image, self.config)
        remat = self.config.remat
        if train or self.is_initializing() or pairs is None:
            whole = functools.partial(Backbone._full_depth, train=train)
            x = part(whole, remat)(self, image)
        else:
            x = self._in_slabs(image, pairs)
        features = [x]
        for number in (2, 3, 4):
            stage = functools.partial(Backbone._stage, stage=number, train=train)
            x = part(stage, remat)(self, x)
            features.append(x)
        return tuple(features)

    def _stage(self, x: Image, stage: int, *, train: bool) -> Image:
        size, stride = _STAGES[stage - 1]
        block = functools.partial(
            BasicBlock,
            self.config.channels[stage - 1],
            size,
            form=self.config.form,
            batching=self.batching,
        )
        first = block(stride=stride, projected=True, name=f"stage_{stage}_0")
        return block(name=f"stage_{stage}_1")(first(x, train=train), train=train)

    def _full_depth(self, image: Image, *, train: bool) -> Image:
        """Maps slices N 2P+2 H W 1, one more at either end, to N P H/2 W/2 C."""
        stem = ConvNorm(
            self.config.channels[0],
            _STEM,
            padding=_STEM_PADDING,
            activated=True,
            form=self.config.form,
            batching=self.batching,
            name="stem",
        )
        x = self._stage(stem(image, train=train), 1, train=train)
        # The first stage keeps D; its features are halved before anyone sees them.
        return _max_pool_depth(x)

    def _in_slabs(self, image: Image, pairs: int) -> Image:
        """Returns what `_full_depth` does in use, `pairs` pairs of slices at a time."""
        total = (image.shape[1] - 2) // 2
        slabs = -(-total // pairs)
        # The last slab is made whole by slices that nobody sees.
        behind = max(2 * slabs * pairs + 2 - image.shape[1], 0)
        image = jnp.pad(image, ((0, 0), (0, behind), (0, 0), (0, 0), (0, 0)))

        def one(backbone, carry, first):
            slab = jax.lax.dynamic_slice_in_dim(image, first, 2 * pairs + 2, axis=1)
            return carry, backbone._full_depth(slab, train=False)

        loop = nn.scan(
            one,
            variable_broadcast=("params", "batch_stats"),
            split_rngs={"params": False},
            out_axes=1,
        )
        _, x = loop(self, (), 2 * pairs * jnp.arange(slabs))
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :total]


class SamNetwork(nn.Module):
    """The backbone with its two heads."""

    config: SamConfig = SamConfig()
    batching: Batching = ONE_CALL

    @nn.compact
    def __call__(self, image: Image, *, train: bool = False) -> Embeddings:
        """Returns the embeddings of an image N D H W 1, `SAM_RANGE`."""

        def head(name, size):
            return StridedConvolution(
                self.config.embedding,
                size,
                biased=True,
                kernel_init=xavier_uniform(),
                form=self.config.form,
                name=name,
            )

        image = image.astype(self.config.precision)
        *levels, last = Backbone(self.config, self.batching, name="backbone")(
            image, train=train
        )
        lateral = [
            head(f"lateral_{index}", (1, 1, 1))(x) for index, x in enumerate(levels)
        ]
        x = lateral.pop()
        while lateral:
            finer = lateral.pop()
            d, h, w = finer.shape[1:4]
            x = finer + sampling.resize_nearest_floor(x, (d, h, w))
        fine = head("fine", _CUBE)(x)
        coarse = head("coarse", _CUBE)(head("lateral_coarse", (1, 1, 1))(last))
        return Embeddings(normalise(fine), normalise(coarse))


def _pairs_per_slab(image: Image, config: SamConfig) -> int | None:
    """Returns how many pairs of slices run together; None if all of them do.

    Args:
      image: N D+2 H W 1.
      config: of the network.
    """
    n, d, h, w, _ = image.shape
    pair = 2 * n * h * w * config.channels[0] * image.dtype.itemsize
    total = (d - 2) // 2
    slabs = -(-total // max(_SLAB_BYTES // pair, 1))
    return -(-total // slabs) if slabs > 1 else None


def _max_pool_depth(x: Image) -> Image:
    """N D H W C to N D/2 H W C, a last odd plane left out."""
    return api.larger_of_pairs(x[:, : x.shape[1] // 2 * 2], 1)


def normalise(x: Image) -> Image:
    """Returns features of length 1 over channels, N D H W C float32; zeros stay."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x**2, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM**2))


def to_sam_range(
    image: Any,
    window: tuple[float, float],
    known: tuple[float, float] = HU_RANGE,
) -> Any:
    """Returns a CT image, an array of JAX or NumPy, as SAM sees it, `SAM_RANGE`.

    Args:
      image: [0, 1] over `window`; what the window cut off stays cut off.
      window: Hounsfield units of 0 and 1.
      known: those that the network was trained on; what is beyond is cut off, too.
    """
    low, high = window
    hounsfield = (low + image * (high - low)).clip(*HU_RANGE).clip(*known)
    scale = (SAM_RANGE[1] - SAM_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0])
    return (hounsfield - HU_RANGE[0]) * scale + SAM_RANGE[0]


@dataclasses.dataclass(frozen=True)
class TrainedSam:
    """A network in use, and the scans that it knows.

    Attributes:
      config: its sizes.
      variables: {"params": ..., "batch_stats": ...}.
      spacing_mm: of the voxels that it sees.
      ct_window: Hounsfield units that CT is cut off at; they keep their place in SAM's
        scale.
      quantile_range: the quantiles of an MR scan that become the ends of SAM's scale;
        None if it knows CT alone.
    """

    config: SamConfig
    variables: Variables
    spacing_mm: float = SPACING_MM
    ct_window: tuple[float, float] = HU_RANGE
    quantile_range: tuple[float, float] | None = None


def init(config: SamConfig, key: Key) -> Variables:
    """Returns fresh variables, which serve images of any size."""
    image = jax.ShapeDtypeStruct((1, 4, 16, 16, 1), jnp.float32)
    return init_lazily(SamNetwork(config), key, image)


def config_of(
    variables: Variables, *, form: api.Form = "auto", precision: Precision = "float32"
) -> SamConfig:
    """Returns the configuration that variables have.

    Args:
      variables: as from `init`.
      form: convolution form, see `jaxreg.nn.conv.api`.
      precision: of activations, which variables do not tell.

    Raises:
      UserError: the variables are not those of a SAM network.
    """
    try:
        params = variables["params"]
        channels = tuple(
            params["backbone"][f"stage_{stage}_1"]["conv_2"]["conv"]["kernel"].shape[-1]
            for stage in (1, 2, 3, 4)
        )
        embedding = params["coarse"]["bias"].shape[0]
        return SamConfig(channels, embedding, form, precision=precision)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"these are not the variables of a SAM network ({error} is missing or "
            'misshapen); give {"params", "batch_stats"} as jaxreg.models.sam.init does'
        ) from error


def with_sam(variables: Variables, sam: Variables) -> Variables:
    """Returns a network's variables with a SAM network's, frozen, for its embeddings.

    Args:
      variables: {"params": ...}; a SAM network is replaced.
      sam: {"params": ..., "batch_stats": ...}.

    Raises:
      UserError: `sam` holds no SAM network.
    """
    config_of(sam)
    return {**variables, SAM: {n: sam[n] for n in ("params", "batch_stats")}}


def features(config: SamConfig, variables: Variables, image: Image) -> Embeddings:
    """Returns the embeddings by a network in use: its running statistics count.

    Args:
      config: of the network.
      variables: as from `init`.
      image: N D H W 1, `SAM_RANGE`, 2 mm, axes towards Superior, Posterior, Left.

    Raises:
      UserError: see `check_image`.
    """
    check_image(image)
    return SamNetwork(config).apply(variables, image)  # pyright: ignore


def train_features(
    config: SamConfig,
    variables: Variables,
    image: Image,
    *,
    batching: Batching = ONE_CALL,
) -> tuple[Embeddings, Variables]:
    """Returns the embeddings by a network in training, and the variables after it.

    Args:
      config: of the network.
      variables: as from `init`.
      image: N D H W 1, `SAM_RANGE`.
      batching: over what batch statistics are taken.

    Raises:
      UserError: see `check_image`.
    """
    check_image(image)
    found, moved = SamNetwork(config, batching).apply(
        variables, image, train=True, mutable=["batch_stats"]
    )
    return found, {**variables, **moved}  # pyright: ignore


def check_image(image: Image) -> None:
    """Checks an image's shape.

    Raises:
      UserError: it has more than one channel, or fewer than 2 slices.
    """
    if image.ndim != 5 or image.shape[-1] != 1 or image.shape[1] < 2:
        raise UserError(
            f"the image has shape {image.shape}, SAM expects N D H W 1 with at least "
            "2 slices along D; give one CT channel"
        )
