"""Features that UniReg correlates: SAM's embeddings, or MIND descriptors.

References:
  Yan et al., SAM: Self-supervised learning of pixel-wise anatomical embeddings in
  radiological images, IEEE TMI 2022; Tian et al., SAME++, 2023, whose code decides how
  fine and coarse embeddings are correlated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.models import sam
from jaxreg.nn.conv import api
from jaxreg.nn.correlation import correlation, normalised
from jaxreg.nn.layers import Precision
from jaxreg.space import filters, sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import Image, Variables

FINE = (2, 2, 2)
COARSE = sam.COARSE_STRIDE
"""Voxels of the image per voxel of the features, along D H W."""
MIND_CHANNELS = 12
Features = sam.Embeddings
"""Of one image, or descriptors in their place; of length 1 along their channels."""
FeatureNetwork = Callable[[Variables, Image], Any]
"""A frozen network's variables and images in `sam.SAM_RANGE` to what has a `Features`'
attributes."""


def _fine_shape(features: Features) -> Shape:
    return features.fine.shape[1:4]


def correlated(source: Features, target: Features) -> Image:
    """Returns the sum of the fine and the coarse correlation, N D/2 H/2 W/2 27.

    The coarse one is made on its own grid and then resized, with aligned corners.

    Args:
      source: of the moving image.
      target: of the fixed image.
    """
    coarse = correlation(source.coarse, target.coarse)
    coarse = sampling.resize_aligned(coarse, _fine_shape(target))
    return correlation(source.fine, target.fine) + coarse


def concatenated(source: Features, target: Features) -> Image:
    """Returns the features side by side, N D/2 H/2 W/2 4C.

    Those of the moving image come first, each time the fine before the coarse ones,
    which are resized and brought back to length 1.

    Args:
      source: of the moving image.
      target: of the fixed image.
    """
    parts = []
    for features in (source, target):
        coarse = sampling.resize_aligned(features.coarse, _fine_shape(features))
        parts += [features.fine, normalised(coarse)]
    return jnp.concatenate(parts, -1)


def mind_features(image: Image) -> Features:
    """Returns self-similarity descriptors in place of embeddings, 12 channels.

    Args:
      image: N D H W 1, [0, 1]; each by itself.
    """
    halved = api.average_pool(image, FINE)
    # One by one: the descriptor's floor follows the batch that it sees.
    fine = jax.vmap(lambda x: filters.mind_descriptor(x[None])[0])(halved)
    ratio = tuple(c // f for c, f in zip(COARSE, FINE, strict=True))
    coarse = api.average_pool(fine, (ratio[0], ratio[1], ratio[2]))
    return Features(normalised(fine), normalised(coarse))


def sam_features(
    variables: Variables,
    image: Image,
    *,
    form: api.Form = "auto",
    precision: Precision = "float32",
) -> Features:
    """Returns the frozen SAM network's embeddings, float32.

    Args:
      variables: of that network, which tell its sizes.
      image: N D H W 1 in `sam.SAM_RANGE`.
      form: convolution form, see `jaxreg.nn.conv.api`.
      precision: of the network's activations.

    Raises:
      UserError: see `sam.config_of`.
    """
    config = sam.config_of(variables, form=form, precision=precision)
    return sam.features(config, variables, image)


def one_by_one(function: Callable[[Image], Features], images: Image) -> Features:
    """Returns the features of images N D H W 1, made of one image at a time.

    A network of full resolution and many channels fills the memory with one.
    """
    return jax.lax.map(
        lambda image: jax.tree.map(lambda x: x[0], function(image[None])), images
    )


def rescaled(
    image: Image,
    stored: tuple[float, float],
    window: tuple[float, float] | tuple[jax.Array, jax.Array],
    to: tuple[float, float],
) -> Image:
    """Returns an image cut to a window and brought to another range.

    Args:
      image: N D H W 1, [0, 1].
      stored: the Hounsfield units of 0 and 1.
      window: those of the new range's ends; numbers, or N 1 1 1 1 each.
      to: the new range.
    """
    low, high = stored
    share = (low - window[0] + image * (high - low)) / (window[1] - window[0])
    return to[0] + jnp.clip(share, 0.0, 1.0) * (to[1] - to[0])
