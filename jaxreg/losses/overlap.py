"""Overlap of label maps: the soft Dice loss and its one-hots.

`shared_labels` and `valid_classes` look at values and run on the host, in NumPy;
`one_hot` and `dice_loss` are pure JAX.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxreg.errors import UserError
from jaxreg.typing import Image, Labels

DICE_EPSILON = 1e-6


def _labels_in(labels: np.ndarray, name: str) -> np.ndarray:
    values = np.unique(np.asarray(labels))
    if not np.all(values == np.rint(values)):  # False for NaN too
        odd = values[values != np.rint(values)][0]
        raise UserError(
            f"the {name} segmentation contains {odd}, labels must be whole numbers; "
            "pass a label map, not a probability map"
        )
    return values.astype(np.int64)


def shared_labels(moving: np.ndarray, fixed: np.ndarray) -> tuple[int, ...]:
    """Returns the labels that occur in both maps (over the batch), ascending.

    Zero and negative labels are background (the original counts negative ones from the
    end of its table).

    Args:
      moving: integer labels of any shape, on the host.
      fixed: the same for the fixed scan.

    Raises:
      UserError: no label is shared, or a value is not a whole number.
    """
    found = _labels_in(moving, "moving"), _labels_in(fixed, "fixed")
    shared = np.intersect1d(*found)
    shared = shared[shared > 0]
    if shared.size == 0:
        lists = [[int(v) for v in values[values > 0][:10]] for values in found]
        raise UserError(
            f"the segmentations share no label: moving has {lists[0]}, fixed has "
            f"{lists[1]} (0 is background); give both the same labels or leave the "
            "Dice term out"
        )
    return tuple(int(v) for v in shared)


def one_hot(labels: Labels, classes: Sequence[int], dtype=jnp.float32) -> Image:
    """Returns one channel per class, 1 where the label is that class, else 0.

    Args:
      labels: N D H W 1.
      classes: the K labels of the channels.
      dtype: of the result.

    Returns:
      N D H W K; background and unlisted labels have no channel.
    """
    return (jnp.asarray(labels) == jnp.asarray(classes)).astype(dtype)


def valid_classes(moving_onehot: Image, fixed_onehot: Image) -> np.ndarray:
    """Returns which classes both members of each pair contain, N K, bool.

    Args:
      moving_onehot: N D H W K, on the host or device.
      fixed_onehot: N D H W K.

    Raises:
      UserError: a pair has no class in common.
    """
    present = [
        np.asarray(jnp.any(a > 0, axis=(1, 2, 3)))
        for a in (moving_onehot, fixed_onehot)
    ]
    valid = present[0] & present[1]
    if not valid.any(axis=1).all():
        pair = int(np.flatnonzero(~valid.any(axis=1))[0])
        raise UserError(
            f"the segmentations of pair {pair} share no label, the Dice term needs at "
            "least one; give both the same labels or leave the Dice term out"
        )
    return valid


def dice_loss(
    pred: Image,
    target: Image,
    valid: Bool[Array, "N K"] | None = None,
    *,
    axis: str | None = None,
) -> jax.Array:
    """Returns 1 - Dice, averaged over a pair's valid classes and then over pairs.

    Per class ``(2 sum(p t) + 1e-6) / (sum p + sum t + 1e-6)``. A pair without any valid
    class is left out of the mean, so that it does not affect a training batch.

    Args:
      pred: N D H W K, the warped one-hot labels, [0, 1].
      target: N D H W K, one-hot.
      valid: the classes that count per pair; all if None.
      axis: name of the mapped axis over which the batch is split, if it is; the result
        is then that of the whole batch.

    Raises:
      ValueError: the shapes differ.

    References:
      Milletari et al., V-Net, 3DV 2016; unigradicon 1.0.6, __init__.py: dice_loss.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred has shape {pred.shape}, target {target.shape}")
    axes = (1, 2, 3)
    overlap = jnp.sum(pred * target, axes)
    total = jnp.sum(pred, axes) + jnp.sum(target, axes)
    dice = (2.0 * overlap + DICE_EPSILON) / (total + DICE_EPSILON)  # N K
    counts = jnp.ones(dice.shape, bool) if valid is None else valid
    per_pair = jnp.sum((1.0 - dice) * counts, 1) / jnp.maximum(jnp.sum(counts, 1), 1)
    pairs = jnp.any(counts, 1)
    total, count = jnp.sum(per_pair * pairs), jnp.sum(pairs)
    if axis is not None:
        total, count = jax.lax.psum((total, count), axis)
    return total / jnp.maximum(count, 1)
