"""Random affine views of a batch, on the device: a batch of arrays to a `Pair`.

As uniGradICON trains: both images of a pair get one random signed permutation of the
axes and each its own small affine noise. Masks, labels and the images of the similarity
follow their image by the same matrix. Everything is jit-able and reads no values.

A matrix is N 3 4 and acts on PyTorch's normalised coordinates: (x, y, z), x along the
*last* array axis, -1 to 1 across the grid. It takes an output voxel to the place that
is read, so permuted axes of unequal length are stretched onto each other.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxreg.errors import UserError
from jaxreg.space import sampling
from jaxreg.space.grid import Shape, unit_scale
from jaxreg.typing import Image, Key, Labels, Pair, Points

Theta = Float[Array, "N 3 4"]
"""Output to source position in normalised (x, y, z)."""
Batch = Mapping[str, Shaped[Array, "..."]]
"""The input pipeline's arrays by name, see `to_pair`."""

_SIDES = ("moving", "fixed")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is drawn for each pair.

    Attributes:
      permute: one of the 6 orders of the axes, common to both images.
      flip: the sign of each axis, common to both images; reflections are allowed.
      noise: standard deviation of all 12 entries of each image's affine noise.
      shared_noise: standard deviation of affine noise that both images share.
      aligned: whether -1 and 1 are the centres of the corner voxels (as unigradicon's
        fine-tuning has it) or the outer edges of the grid (as the released weights
        were trained).
    """

    permute: bool = True
    flip: bool = True
    noise: float = 0.05
    shared_noise: float = 0.0
    aligned: bool = False

    def __post_init__(self):
        """Checks the values."""
        for name in ("noise", "shared_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(
                    f"augmentation {name} is {value}, expected a standard deviation "
                    "of at least 0; give e.g. 0.05"
                )


def draw(key: Key, numbers: jax.Array, config: Augmentation) -> tuple[Theta, Theta]:
    """Draws the matrices of a batch.

    A pair uses ``fold_in(key, number)`` alone: what it gets does not depend on how the
    batch is split over devices.

    Args:
      key: of this step.
      numbers: N, different for each pair of the global batch, such as the sampler's
        indices.
      config: what to draw.

    Returns:
      (moving, fixed): N 3 4 each.
    """
    orders = itertools.permutations(range(3)) if config.permute else [(0, 1, 2)]
    signs = [*itertools.product((1.0, -1.0), repeat=3)] if config.flip else [(1.0,) * 3]
    rows = np.eye(3, 4)
    turns = np.stack([np.diag(s) @ rows[list(o)] for o in orders for s in signs])
    turns = turns.astype(np.float32)

    def one(number):
        which, normal = jax.random.split(jax.random.fold_in(key, number))
        turn = jnp.asarray(turns)[jax.random.randint(which, (), 0, len(turns))]
        shared, *own = jax.random.normal(normal, (3, 3, 4), turn.dtype)
        turn += config.shared_noise * shared
        return turn + config.noise * own[0], turn + config.noise * own[1]

    return jax.vmap(one)(numbers)


def source_points(theta: Theta, shape: Shape, *, aligned: bool = False) -> Points:
    """Returns where each output voxel is read: N D H W 3, unit coordinates.

    Equals ``torch.nn.functional.affine_grid`` but for frame and axis order. On an axis
    of n voxels, voxel i is at ``(2i + 1) / n - 1``, or ``2i / (n - 1) - 1`` if aligned.

    Args:
      theta: N 3 4.
      shape: (D, H, W), of output and source.
      aligned: see `Augmentation`.
    """
    size = np.asarray(shape, np.float32)
    axes = []
    for n, grid_axis in zip(shape, np.eye(3, dtype=int), strict=True):
        middle = np.arange(n, dtype=np.float32) * 2 - (n - 1)
        position = middle / np.float32(max(n - 1, 1) if aligned else n)
        axes.append(jnp.asarray(position.reshape(np.where(grid_axis, n, 1))))
    # Sums, no matrix product: accelerators round those to 10 bits.
    places = []
    for row in (2, 1, 0):  # z, y, x are the array axes 0, 1, 2
        x, y, z, offset = (theta[:, row, k, None, None, None] for k in range(4))
        places.append(x * axes[2] + y * axes[1] + z * axes[0] + offset)
    normalised = jnp.stack(jnp.broadcast_arrays(*places), -1)
    if aligned:
        voxel = (normalised + 1) / 2 * (size - 1)
    else:
        voxel = ((normalised + 1) * size - 1) / 2
    return voxel / jnp.asarray(unit_scale(shape), voxel.dtype)


def transform_image(
    image: Image | Labels,
    theta: Theta,
    *,
    order: Literal[0, 1] = 1,
    aligned: bool = False,
) -> jax.Array:
    """Returns the image resampled through the matrices, N D H W C, same shape and type.

    Outside the grid the nearest voxel is repeated.

    Args:
      image: N D H W C; for order 0 whole numbers below 2**24.
      theta: N 3 4.
      order: 1 linear for images, 0 nearest for labels and masks. A point half-way
        between two voxels takes the even one, as ``torch.round`` does; on which side
        of such a tie float32 falls is anyone's guess once there is noise.
      aligned: see `Augmentation`.

    References:
      ``torch.nn.functional.grid_sample(padding_mode="border")``.
    """
    shape = image.shape[1:4]
    points = source_points(theta, shape, aligned=aligned)
    if order == 0:
        # `sample` would take the voxel farther from 0 at a tie.
        scale = jnp.asarray(unit_scale(shape), points.dtype)
        points = jnp.round(jnp.clip(points, 0.0, 1.0) * scale) / scale
    return sampling.sample(image, points, order=order, outside="edge")


def to_pair(
    batch: Batch,
    key: Key | None,
    config: Augmentation | None,
    *,
    classes: Sequence[int] = (),
) -> Pair:
    """Makes the pairs of a training step; jit-able.

    Args:
      batch: by name, X being "moving" and "fixed": "X" (N D H W C, float, or unsigned
        integers that stand for value / largest), "X_target" likewise if the similarity
        compares other images, "X_inverted" and "X_target_inverted" (N, bool: the image
        becomes 1 - image), "X_mask" and "X_labels" (N D H W 1, integers), "task" (N),
        "index" (N, see `draw`; the place in this batch if absent). Other names are
        passed over.
      key: of this step; unused without a config.
      config: what to draw; None leaves the arrays as they are.
      classes: the labels of the Dice term, positive; none leaves it out.

    Returns:
      Images and masks as float32. With labels and classes also the one-hots, and
      `valid`: the classes that both images of a pair still contain, so none where a
      pair has no labels.

    Raises:
      UserError: a class is not positive.
      ValueError: the network's and the similarity's images have other sizes.
    """
    if any(c <= 0 for c in classes):
        raise UserError(
            f"classes are {', '.join(map(str, classes))}, expected positive labels (0 "
            "is background); leave the others out"
        )
    thetas: tuple[Theta | None, Theta | None] = (None, None)
    if config is not None:
        if key is None:
            raise ValueError("augmentation needs a key")
        places = jnp.arange(batch["moving"].shape[0])
        thetas = draw(key, batch.get("index", places), config)
    aligned = config is not None and config.aligned
    fields: dict[str, Any] = {"task": batch.get("task")}
    for side, theta in zip(_SIDES, thetas, strict=True):
        fields |= _images(batch, side, theta, aligned=aligned)
        fields |= _annotations(batch, side, theta, tuple(classes), aligned=aligned)
    if "moving_onehot" in fields and "fixed_onehot" in fields:
        inside = [jnp.any(fields[f"{s}_onehot"] > 0, (1, 2, 3)) for s in _SIDES]
        fields["valid"] = inside[0] & inside[1]
    return Pair(**fields)


def _images(batch: Batch, side: str, theta: Theta | None, *, aligned: bool):
    """The network's and the similarity's image of one side, in one pass."""
    names = [name for name in (side, f"{side}_target") if name in batch]
    images = [_unit_range(batch, name) for name in names]
    if len({image.shape for image in images}) > 1:
        shapes = " and ".join(str(image.shape) for image in images)
        raise ValueError(f"{' and '.join(names)} have shapes {shapes}")
    if theta is not None:
        moved = transform_image(jnp.concatenate(images, -1), theta, aligned=aligned)
        images = jnp.split(moved, len(images), axis=-1)
    return dict(zip(names, images, strict=True))


def _unit_range(batch: Batch, name: str) -> jax.Array:
    """An image as float32 in [0, 1], inverted where it is flagged."""
    image = jnp.asarray(batch[name])
    if jnp.issubdtype(image.dtype, jnp.unsignedinteger):
        image = image.astype(jnp.float32) / jnp.iinfo(image.dtype).max
    elif not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"{name} is {image.dtype}, expected float or unsigned integer")
    image = image.astype(jnp.float32)
    flags = batch.get(f"{name}_inverted")
    if flags is None:
        return image
    return jnp.where(flags[:, None, None, None, None], 1.0 - image, image)


def _annotations(
    batch: Batch,
    side: str,
    theta: Theta | None,
    classes: tuple[int, ...],
    *,
    aligned: bool,
):
    """Mask and one-hot labels of one side, in one pass."""
    maps = {}
    if (mask := batch.get(f"{side}_mask")) is not None:
        maps["mask"] = (mask > 0).astype(jnp.int32)
    if classes and (labels := batch.get(f"{side}_labels")) is not None:
        maps["labels"] = labels.astype(jnp.int32)
    if maps and theta is not None:
        stacked = jnp.concatenate(list(maps.values()), -1)
        moved = transform_image(stacked, theta, order=0, aligned=aligned)
        maps = dict(zip(maps, jnp.split(moved, len(maps), axis=-1), strict=True))
    fields = {}
    if "mask" in maps:
        fields[f"{side}_mask"] = maps["mask"].astype(jnp.float32)
    if "labels" in maps:
        onehot = maps["labels"] == jnp.asarray(classes, jnp.int32)
        fields[f"{side}_onehot"] = onehot.astype(jnp.float32)
    return fields
