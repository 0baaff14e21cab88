"""Two overlapping crops of one volume, for self-supervised training.

Each has its own scale, noise and blur, and stores for each voxel where in the volume
it was read, in mm. Host side, NumPy; every draw comes from the Generator that is passed
in.

References:
  Yan et al., SAM: Self-supervised learning of pixel-wise anatomical embeddings in
  radiological images, IEEE TMI 2022; its released code decides how crops are drawn.
"""

import dataclasses
import math

import numpy as np

from jaxreg.errors import UserError

_SURPLUS = 1.05  # of a crop's size over what is read of it


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """How crops are drawn; the defaults are those of the released code.

    Attributes:
      shape: of a crop, D H W.
      spacing_mm: of a crop's voxels at scale 1.
      scale: smallest and largest factor of a crop's spacing.
      overlapping: how often, per axis, the crops are made to overlap where the volume
        has room for two.
      least_overlap: then, per axis, in voxels at scale 1; less where the crops are
        not much larger.
      gamma: largest factor of the contrast's exponent or its inverse, over the volume's
        range of intensities; 1 keeps the contrast, as in CT it should be.
      noise: largest deviation of Gaussian noise, in the image's intensities.
      blur_mm: largest deviation of the Gaussian blur.
      body_above: the volume is cropped to the box of intensities above this; the
        default is -500 HU in SAM's range. None keeps the whole.
    """

    shape: tuple[int, int, int] = (32, 96, 96)
    spacing_mm: float = 2.0
    scale: tuple[float, float] = (0.8, 1.2)
    overlapping: float = 0.8
    least_overlap: tuple[int, int, int] = (5, 20, 20)
    gamma: float = 1.0
    noise: float = 0.001
    blur_mm: float = 4.0
    body_above: float | None = (-500 + 1024) * 255 / 4095 - 50

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a size is not positive, a deviation negative, gamma below 1, or
            the scales are in the wrong order.
        """
        low, high = self.scale
        positive = min(*self.shape, self.spacing_mm, low) > 0
        away = min(self.noise, self.blur_mm) < 0 or self.gamma < 1
        if not positive or low > high or away:
            raise UserError(
                f"the views are {self}, expected positive sizes, scales in order, "
                "deviations of 0 or more and gamma of 1 or more"
            )


@dataclasses.dataclass(frozen=True)
class Crops:
    """Two crops of a volume, host arrays, float32.

    Attributes:
      images: 2 D H W 1.
      places_mm: 2 D H W 3, where each voxel was read: mm along the volume's array axes
        from the centre of its first voxel.
      valid: 2 D H W 1, zero outside the volume.
    """

    images: np.ndarray
    places_mm: np.ndarray
    valid: np.ndarray


def two_crops(
    image: np.ndarray,
    spacing_mm: tuple[float, float, float] | np.ndarray,
    rng: np.random.Generator,
    config: ViewConfig = ViewConfig(),
) -> Crops:
    """Returns two crops of a volume.

    Args:
      image: D H W, in the network's intensities; outside of it crops repeat its edge.
      spacing_mm: of its voxels along D, H and W.
      rng: for all draws.
      config: see `ViewConfig`.

    Raises:
      UserError: the image is not D H W with at least one voxel.
    """
    if image.ndim != 3 or not image.size:
        raise UserError(
            f"the image has shape {image.shape}, expected D H W with a voxel at least; "
            "give one volume without channels"
        )
    spacing = np.asarray(spacing_mm, np.float64)
    first, last = _body(image, config.body_above)
    extent = (last - first) * spacing / config.spacing_mm
    scales = rng.uniform(*config.scale, size=2)
    starts, sizes = _crops(np.floor(extent).astype(int), scales, rng, config)
    # The first voxel's outer edge is where the body's box begins.
    ends = float(image.min()), float(image.max())
    middles = (first - 0.5) * spacing + (starts + sizes / 2) * config.spacing_mm
    crops = []
    for middle, scale in zip(middles, scales, strict=True):
        step = config.spacing_mm * scale
        axes = [
            m + (np.arange(n) - (n - 1) / 2) * step
            for m, n in zip(middle, config.shape, strict=True)
        ]
        index = [mm / s for mm, s in zip(axes, spacing, strict=True)]
        crop = _contrasted(_read(image, index), ends, rng, config.gamma)
        crop = _noisy(crop, rng, config.noise)
        crop = _blurred(crop, rng, config.blur_mm / step)
        inside = [
            (i >= -0.5) & (i <= n - 0.5)
            for i, n in zip(index, image.shape, strict=True)
        ]
        places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        crops.append((crop[..., None], places, _all(inside)[..., None]))
    parts = zip(*crops, strict=True)
    return Crops(*(np.stack(part).astype(np.float32) for part in parts))


def _body(image: np.ndarray, above: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The box of a volume's body: first voxel, and the one after the last, (3,)."""
    whole = np.zeros(3, int), np.asarray(image.shape)
    if above is None:
        return whole
    body = image > above
    if not body.any():
        return whole
    profiles = [body.any(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    found = [np.flatnonzero(profile) for profile in profiles]
    return np.array([f[0] for f in found]), np.array([f[-1] + 1 for f in found])


def _crops(extent: np.ndarray, scales, rng, config: ViewConfig):
    """Draws two crops of a box, in voxels at scale 1 from where the box begins.

    Returns:
      (starts, sizes), each 2 3. Crops that find no room stick out.
    """
    sizes = np.array(
        [[math.ceil(_SURPLUS * math.ceil(n * s)) for n in config.shape] for s in scales]
    )
    starts = np.zeros_like(sizes)
    for axis, room in enumerate(extent - sizes.sum(0)):
        overlap = _overlap(axis, int(room), int(sizes[:, axis].min()), rng, config)
        joint = sizes[:, axis].sum() - overlap
        spare = extent[axis] - joint
        begin = rng.integers(min(spare, 0), max(spare, 0) + 1)
        # Anywhere in the joint box: the crops may overlap more than was drawn.
        starts[:, axis] = begin + rng.integers(0, joint - sizes[:, axis] + 1)
    return starts, sizes


def _overlap(axis: int, room: int, smaller: int, rng, config: ViewConfig) -> int:
    """Draws how many voxels two crops share along an axis; negative for a gap.

    The rules differ by axis as they do in the released code.

    Args:
      axis: of the array.
      room: what is left of the box beside both crops.
      smaller: size of the smaller crop.
      rng: to draw with.
      config: see `ViewConfig`.
    """
    if room > 2 or (room == 2 and axis > 0):
        if rng.uniform() < config.overlapping:
            low, high = config.least_overlap[axis], smaller - 2
        else:
            low, high = -room + 1, (-1 if axis == 0 else -room + 10)
    else:
        low = -room + (1, 1, 5)[axis]
        high = smaller - (0, 1, 2)[axis]
    # Small crops and small volumes leave no choice.
    return int(rng.integers(min(low, high - 1), high))


def _read(image: np.ndarray, index: list[np.ndarray]) -> np.ndarray:
    """Linear interpolation on a grid along the axes, edges repeated: D H W."""
    for axis, at in enumerate(index):
        n = image.shape[axis]
        at = np.clip(at, 0, n - 1)
        low = np.floor(at).astype(np.intp)
        weight = (at - low).reshape([-1 if k == axis else 1 for k in range(3)])
        below = image.take(low, axis=axis)
        above = image.take(np.minimum(low + 1, n - 1), axis=axis)
        image = (1 - weight) * below + weight * above
    return image


def _contrasted(
    crop: np.ndarray, ends: tuple[float, float], rng: np.random.Generator, most: float
) -> np.ndarray:
    low, high = ends
    if most == 1 or low == high:
        return crop
    exponent = most ** rng.uniform(-1, 1)
    return low + (high - low) * ((crop - low) / (high - low)).clip(0, 1) ** exponent


def _noisy(crop: np.ndarray, rng: np.random.Generator, most: float) -> np.ndarray:
    deviation = rng.uniform(0, most)
    return crop + deviation * rng.standard_normal(crop.shape)


def _blurred(crop: np.ndarray, rng: np.random.Generator, most: float) -> np.ndarray:
    """Gaussian blur with up to `most` voxels of deviation, renormalised at the edge."""
    deviation = rng.uniform(0, most)
    if deviation == 0:
        return crop
    for axis, n in enumerate(crop.shape):
        distance = np.arange(n)[:, None] - np.arange(n)
        weights = np.exp(-0.5 * (distance / deviation) ** 2)
        weights /= weights.sum(1, keepdims=True)
        crop = np.moveaxis(np.tensordot(weights, crop, (1, axis)), 0, axis)
    return crop


def _all(inside: list[np.ndarray]) -> np.ndarray:
    d, h, w = inside
    return d[:, None, None] & h[None, :, None] & w[None, None, :]
