"""Similarity of two images: scalar losses, smaller is better.

Every measure is ``f(warped, target, *, mask=None, **options)`` on images N D H W C of
one shape. A mask (N D H W 1, any non-zero value counts) belongs to the target and is
never warped. For lncc, squared_lncc, mind_ssc and mse the map of the measure is made
from full images, averaged over the mask per sample (divisor at least 1) and then over
samples, as uniGradICON does; ncc and nmi take their statistics inside the mask.

References:
  Tian et al., uniGradICON, MICCAI 2024 (LNCC); Demir et al., multiGradICON, WBIR 2024
  (squared LNCC); Heinrich et al., MIND-SSC, MICCAI 2013; Studholme et al., An overlap
  invariant entropy measure, Pattern Recognition 1999 (NMI).
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.space import filters
from jaxreg.typing import Image, Labels

LNCC_EPSILON = 1e-5
_LEAST_COUNT = 1e-5
_LEAST_SHARE = 0.25
# Below it an image is constant up to float32 rounding of [0, 1] intensities.
_FLAT_RELATIVE_VARIANCE = 1e-12


def _check_shapes(warped: Image, target: Image, mask: Labels | None) -> None:
    if warped.shape != target.shape:
        raise ValueError(
            f"warped has shape {warped.shape}, target {target.shape}; both must be "
            "N D H W C on one grid"
        )
    if mask is not None and (
        mask.shape[:-1] != target.shape[:-1]
        or mask.shape[-1] not in (1, target.shape[-1])
    ):
        raise ValueError(
            f"mask has shape {mask.shape}, target {target.shape}; the mask needs the "
            "target's grid and one channel"
        )


def _mean(values: jax.Array, mask: Labels | None) -> jax.Array:
    """Mean over all, or per sample inside the mask and then over samples."""
    if mask is None:
        return jnp.mean(values)
    included = jnp.broadcast_to(mask != 0, values.shape)
    axes = tuple(range(1, values.ndim))
    count = jnp.maximum(jnp.sum(included, axes), 1)
    return jnp.mean(jnp.sum(jnp.where(included, values, 0.0), axes) / count)


def _gaussian_matrix(n: int, sigma: int) -> np.ndarray:
    """Returns n x n weights of a Gaussian cut at 2 sigma, zeros outside the axis."""
    offset = np.arange(-2 * sigma, 2 * sigma + 1)
    kernel = np.exp(-0.5 * (offset / sigma) ** 2)
    kernel /= kernel.sum()
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    inside = np.abs(distance) <= 2 * sigma
    return np.where(inside, kernel[np.where(inside, distance + 2 * sigma, 0)], 0.0)


def gaussian_blur(image: Image, sigma: int = 5) -> Image:
    """Returns the image blurred along D, H and W with a truncated Gaussian.

    The kernel has length 4 sigma + 1, is cut at 2 sigma and normalised to sum 1;
    outside the image are zeros, and the border is not renormalised (a quirk on which
    trained weights depend).

    Args:
      image: N D H W C.
      sigma: standard deviation in voxels, a positive integer.

    Raises:
      ValueError: sigma is not a positive integer.

    References:
      icon_registration 1.1.9, losses.py: gaussian_blur.
    """
    volumes = jnp.moveaxis(image, -1, 1)  # N C D H W
    return jnp.moveaxis(_blur(volumes, sigma), 1, -1)


def _blur(volumes: jax.Array, sigma: int) -> jax.Array:
    if sigma != int(sigma) or sigma < 1:
        raise ValueError(f"sigma is {sigma}; it must be a positive number of voxels")
    matrices = [_gaussian_matrix(n, int(sigma)) for n in volumes.shape[-3:]]
    return filters.along_axes(volumes, matrices)


def lncc_map(warped: Image, target: Image, *, sigma: int = 5) -> Image:
    """Returns the local correlation coefficient per voxel, N D H W C, about [-1, 1]."""
    i, j = jnp.moveaxis(warped, -1, 1), jnp.moveaxis(target, -1, 1)
    # Moment by moment: stacking the five first costs more in copies than it saves.
    mean_i, mean_j, mean_ii, mean_jj, mean_ij = (
        _blur(moment, sigma) for moment in (i, j, i * i, j * j, i * j)
    )
    # relu rather than maximum: at a tie its gradient is 0, as in PyTorch.
    variance_i = jax.nn.relu(mean_ii - mean_i**2) + LNCC_EPSILON
    variance_j = jax.nn.relu(mean_jj - mean_j**2) + LNCC_EPSILON
    correlation = (mean_ij - mean_i * mean_j) / jnp.sqrt(variance_i * variance_j)
    return jnp.moveaxis(correlation, 1, -1)


def lncc(
    warped: Image, target: Image, *, mask: Labels | None = None, sigma: int = 5
) -> jax.Array:
    """Returns 1 - mean local normalised cross-correlation, in [0, 2].

    Args:
      warped: N D H W C.
      target: N D H W C.
      mask: N D H W 1; where the map counts (the blur crosses its edge).
      sigma: standard deviation of the Gaussian window in voxels.

    Raises:
      ValueError: the shapes differ, or sigma is not a positive integer.

    References:
      icon_registration 1.1.9, losses.py: LNCC.
    """
    _check_shapes(warped, target, mask)
    return 1.0 - _mean(lncc_map(warped, target, sigma=sigma), mask)


def squared_lncc(
    warped: Image, target: Image, *, mask: Labels | None = None, sigma: int = 5
) -> jax.Array:
    """Returns 1 - mean squared local correlation, in [0, 1]; blind to its sign.

    Args and errors as `lncc`.

    References:
      Demir et al., multiGradICON, WBIR 2024; icon_registration 1.1.9, SquaredLNCC.
    """
    _check_shapes(warped, target, mask)
    return 1.0 - _mean(lncc_map(warped, target, sigma=sigma) ** 2, mask)


def ncc(warped: Image, target: Image, *, mask: Labels | None = None) -> jax.Array:
    """Returns 1 - the global correlation coefficient, in [0, 2].

    Mean and standard deviation (population) are per sample and channel. With a mask
    they and the correlation are those of the voxels inside (the original has no mask
    here). A constant image correlates with nothing: loss 1 (the original gives NaN).

    Raises:
      ValueError: the shapes differ.

    References:
      icon_registration 1.1.9, losses.py: NCC.
    """
    _check_shapes(warped, target, mask)
    weight = jnp.ones_like(target) if mask is None else (mask != 0) * 1.0
    weight = jnp.broadcast_to(weight, target.shape).astype(target.dtype)
    axes = (1, 2, 3)
    weight /= jnp.maximum(jnp.sum(weight, axes, keepdims=True), 1.0)

    def mean(values):
        return jnp.sum(values * weight, axes, keepdims=True)

    def normalise(image):
        centred = image - mean(image)
        variance = mean(centred**2)
        flat = variance <= _FLAT_RELATIVE_VARIANCE * mean(image**2)
        # Inside the root too: where() alone leaves a NaN in the gradient.
        return jnp.where(flat, 0.0, centred / jnp.sqrt(jnp.where(flat, 1.0, variance)))

    return 1.0 - jnp.mean(mean(normalise(warped) * normalise(target)))


def box_ncc(
    warped: Image,
    target: Image,
    *,
    mask: Labels | None = None,
    window: int | tuple[int, int, int] = 9,
    axis: str | None = None,
) -> jax.Array:
    """Returns minus the mean squared correlation in boxes of voxels, in [-1, 0].

    Outside the image are zeros, which count as voxels, as released networks trained.
    With a mask, sums and counts of voxels are those inside it, and only boxes that it
    fills to a quarter count, equally over the whole batch. The original's mask is the
    product of the fixed and the warped moving one (nearest voxel).

    Args:
      warped: N D H W C.
      target: N D H W C.
      mask: N D H W 1.
      window: the box's edge in voxels, an odd number, or one per axis.
      axis: name of the mapped axis over which the batch is split, if it is.

    Raises:
      ValueError: the shapes differ, or an edge is not odd.

    References:
      Balakrishnan et al., VoxelMorph, IEEE TMI 2019, equation 6; the mask as in UniReg.
    """
    _check_shapes(warped, target, mask)
    edges = (window,) * 3 if isinstance(window, int) else tuple(window)
    if len(edges) != 3 or any(edge < 1 or edge % 2 == 0 for edge in edges):
        raise ValueError(f"window is {window}; its edges must be odd numbers of voxels")
    sizes = target.shape[1:4]
    matrices = [filters.window_matrix(*pair) for pair in zip(sizes, edges, strict=True)]

    def total(values):
        return filters.along_axes(values, matrices)

    i, j = (jnp.moveaxis(x, -1, 1).astype(jnp.float32) for x in (warped, target))
    full = math.prod(edges)
    inside = None if mask is None else jnp.moveaxis((mask != 0) * 1.0, -1, 1)
    count = full if inside is None else jnp.maximum(total(inside), _LEAST_COUNT)
    weight = 1.0 if inside is None else inside
    sum_i, sum_j, sum_ii, sum_jj, sum_ij = (
        total(weight * moment) for moment in (i, j, i * i, j * j, i * j)
    )
    mean_i, mean_j = sum_i / count, sum_j / count
    cross = sum_ij - mean_j * sum_i - mean_i * sum_j + mean_i * mean_j * count
    variance_i = sum_ii - 2.0 * mean_i * sum_i + mean_i**2 * count
    variance_j = sum_jj - 2.0 * mean_j * sum_j + mean_j**2 * count
    # Rounding makes the variances of a flat box negative.
    product = jax.nn.relu(variance_i) * jax.nn.relu(variance_j)
    squared = cross**2 / (product + LNCC_EPSILON)
    if mask is None:
        return -jnp.mean(squared)
    valid = jnp.broadcast_to(count >= _LEAST_SHARE * full, squared.shape)
    boxes = jnp.sum(valid).astype(jnp.float32)
    if axis is not None:  # the mean over devices is then that of all boxes
        boxes = jax.lax.pmean(boxes, axis)
    return -jnp.sum(jnp.where(valid, squared, 0.0)) / jnp.maximum(boxes, 1.0)


def mse(warped: Image, target: Image, *, mask: Labels | None = None) -> jax.Array:
    """Returns the mean squared difference.

    Raises:
      ValueError: the shapes differ.
    """
    _check_shapes(warped, target, mask)
    return _mean((warped - target) ** 2, mask)


def mind_ssc(
    warped: Image,
    target: Image,
    *,
    mask: Labels | None = None,
    radius: int = 2,
    dilation: int = 2,
    axis: str | None = None,
) -> jax.Array:
    """Returns the mean squared difference of two MIND-SSC descriptors, in [0, 1].

    Args:
      warped: N D H W 1.
      target: N D H W 1.
      mask: N D H W 1; where the difference counts.
      radius: see `filters.mind_descriptor`.
      dilation: see `filters.mind_descriptor`.
      axis: name of the mapped axis over which the batch is split, if it is.

    Raises:
      ValueError: the shapes differ, or there is more than one channel.

    References:
      See `filters.mind_descriptor`.
    """
    _check_shapes(warped, target, mask)
    descriptors = [
        filters.mind_channels(image, radius, dilation, axis)
        for image in (warped, target)
    ]
    difference = descriptors[0] - descriptors[1]
    squares = jnp.mean(difference**2, 0)[..., None]  # N D H W 1
    return _mean(squares, mask)


def parzen_weights(
    values: jax.Array, bins: int, low: float = 0.0, high: float = 1.0
) -> jax.Array:
    """Returns cubic B-spline weights on the bins, values.shape + (bins,), sum 1.

    Args:
      values: of any shape, clipped to the range.
      bins: at least 4.
      low: centre of the first window.
      high: centre of the last window.
    """
    # One bin is kept free on either side, so that no window is cut off.
    unit = jnp.clip((values - low) / (high - low), 0.0, 1.0)
    position = 1.0 + unit * (bins - 3)
    centres = jnp.arange(bins, dtype=values.dtype)
    centres = jnp.expand_dims(centres, tuple(range(values.ndim)))
    t = jnp.abs(position[..., None] - centres)
    near = 2.0 / 3.0 - t**2 + 0.5 * t**3
    far = jnp.clip(2.0 - t, 0.0) ** 3 / 6.0
    return jnp.where(t < 1.0, near, far)


def _joint_histogram(
    warped: jax.Array, target: jax.Array, weight: jax.Array, bins: int, low, high
) -> jax.Array:
    """Returns the joint histogram of two volumes D H W, bins x bins, sum 1 or 0."""

    @jax.checkpoint  # the weights of a slab are cheaper to compute again than to keep
    def add_slab(total, slab):
        w, t, m = (a.reshape(-1) for a in slab)
        rows = parzen_weights(w, bins, low, high) * m[:, None]
        columns = parzen_weights(t, bins, low, high)
        product = jnp.einsum(
            "va,vb->ab", rows, columns, precision=jax.lax.Precision.HIGHEST
        )
        return total + product, None

    start = jnp.zeros((bins, bins), warped.dtype)
    joint, _ = jax.lax.scan(add_slab, start, (warped, target, weight))
    return joint / jnp.maximum(jnp.sum(weight), 1.0)


def _entropy(probability: jax.Array) -> jax.Array:
    positive = probability > 0
    safe = jnp.where(positive, probability, 1.0)
    return -jnp.sum(jnp.where(positive, probability * jnp.log(safe), 0.0))


def nmi_of_histogram(joint: jax.Array) -> jax.Array:
    """Returns what `nmi` does, of a joint histogram, bins x bins of sum 1 or 0."""
    both = _entropy(joint)
    single = _entropy(jnp.sum(joint, 0)) + _entropy(jnp.sum(joint, 1))
    return jnp.where(both > 0, 2.0 - single / jnp.where(both > 0, both, 1.0), 1.0)


def nmi(
    warped: Image,
    target: Image,
    *,
    mask: Labels | None = None,
    bins: int = 32,
    intensity_range: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
    """Returns 2 - (H(warped) + H(target)) / H(warped, target), in [0, 1].

    Entropies are those of a joint histogram with cubic B-spline windows per sample and
    channel, inside the mask, which makes them differentiable; identical images stay
    above 0 because the windows blur the histogram. An empty mask gives 1.

    Args:
      warped: N D H W C.
      target: N D H W C.
      mask: N D H W 1.
      bins: bins per image, at least 4.
      intensity_range: intensities of the first and last window's centre; values outside
        count as the nearer one and get no gradient.

    Raises:
      ValueError: the shapes differ, fewer than 4 bins, or an empty intensity range.

    References:
      Studholme et al., Pattern Recognition 32, 1999; Mattes et al., IEEE TMI 22, 2003.
    """
    _check_shapes(warped, target, mask)
    low, high = intensity_range
    if bins < 4 or not low < high:
        raise ValueError(
            f"got bins={bins} and intensity_range={intensity_range}; nmi needs at "
            "least 4 bins and an increasing range"
        )
    weight = jnp.ones_like(target) if mask is None else (mask != 0) * 1.0
    weight = jnp.broadcast_to(weight, target.shape).astype(target.dtype)

    def one_volume(w, t, m):
        return nmi_of_histogram(_joint_histogram(w, t, m, bins, low, high))

    volumes = [
        jnp.moveaxis(a, -1, 1).reshape(-1, *target.shape[1:4])
        for a in (warped, target, weight)
    ]
    return jnp.mean(jax.vmap(one_volume)(*volumes))


SIMILARITIES: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {
        "lncc": lncc,
        "lncc2": squared_lncc,
        "mind": mind_ssc,
        "nmi": nmi,
        "ncc": ncc,
        "box_ncc": box_ncc,
        "mse": mse,
    }
)
"""The names that the command line and configurations use."""
