"""Synthetic anatomies: a body with a wall, and organs of random place, size and shape.

Coordinates are unit: 0 to 1 along D, H and W of the template's grid.
"""

import dataclasses

import numpy as np

from jaxreg.data import synthetic_fields as fields
from jaxreg.space.grid import Shape

AIR = 0.02
"""Intensity of what surrounds the body."""


@dataclasses.dataclass(frozen=True)
class Ellipsoid:
    """A solid in unit coordinates: ``|axes (x - centre)|`` is 1 on its surface."""

    centre: np.ndarray
    axes: np.ndarray

    def distance2(self, unit: np.ndarray) -> np.ndarray:
        """The squared distance from the centre in radii, of points ... 3."""
        return (((unit - self.centre) @ self.axes.T) ** 2).sum(-1)


@dataclasses.dataclass(frozen=True)
class Template:
    """What all subjects of an anatomy share.

    Attributes:
      body: the outermost surface.
      organs: labels 2, 3, ...
      cores: the share of each organ's squared radius that its core fills, or 0.
      roughness: displacement in unit coordinates that deforms the ellipsoids, on a
        lattice.
      texture: one channel per modality, on a lattice.
      contrast: intensities, modality by structure: air, wall, body, organs, cores.
    """

    body: Ellipsoid
    organs: tuple[Ellipsoid, ...]
    cores: np.ndarray
    roughness: np.ndarray
    texture: np.ndarray
    contrast: np.ndarray


def make_template(
    rng: np.random.Generator, *, labels: int, modalities: int, shape: Shape
) -> Template:
    """Draws a template.

    Args:
      rng: of the anatomy.
      labels: the body's and its organs'.
      modalities: contrasts to draw intensities and a texture for.
      shape: of the grid on which subjects are painted.
    """
    half = rng.uniform(0.37, 0.43, 3)
    body = Ellipsoid(np.full(3, 0.5, np.float32), np.diag(1 / half).astype(np.float32))
    organs = _organs(rng, labels - 1, half)
    lattice = fields.lattice_shape(shape)
    return Template(
        body=body,
        organs=organs,
        cores=rng.uniform(0.25, 0.4, len(organs)) * (rng.random(len(organs)) < 0.5),
        roughness=0.025 * fields.smooth_noise(rng, lattice, 6, 3),
        contrast=_contrasts(rng, modalities, len(organs)),
        texture=fields.smooth_noise(rng, lattice, 10, modalities),
    )


def _organs(
    rng: np.random.Generator, count: int, half: np.ndarray
) -> tuple[Ellipsoid, ...]:
    """Places ellipsoids in the body, each as far from the others as 64 tries find."""
    size = min((0.5 / max(count, 1)) ** (1 / 3), 0.5)
    centres: list[np.ndarray] = []
    organs = []
    for _ in range(count):
        tries = rng.standard_normal((64, 3))
        tries *= (rng.random((64, 1)) ** (1 / 3)) / np.linalg.norm(
            tries, axis=1, keepdims=True
        )
        tries *= 0.82 - 0.6 * size
        if centres:
            gaps = np.linalg.norm(tries[:, None] - np.stack(centres), axis=-1)
            centre = tries[gaps.min(1).argmax()]
        else:
            centre = tries[0]
        centres.append(centre)
        stretch = np.exp(0.25 * rng.standard_normal(3))
        radii = size * rng.uniform(0.85, 1.15) * stretch / np.prod(stretch) ** (1 / 3)
        rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        axes = (rotation / radii[:, None]) / half
        organs.append(
            Ellipsoid((0.5 + centre * half).astype(np.float32), axes.astype(np.float32))
        )
    return tuple(organs)


def _contrasts(rng: np.random.Generator, modalities: int, organs: int) -> np.ndarray:
    """Intensities, modality by structure.

    Evenly spaced, shuffled per modality: of 64 orders the one least correlated with the
    earlier modalities, and rather inverted than alike.
    """
    structures = 2 + organs
    levels = np.linspace(0.25, 0.9, structures)
    chosen: list[np.ndarray] = []
    for _ in range(modalities):
        orders = [rng.permutation(levels) for _ in range(64)]
        likeness = [
            max((abs(c) + 0.1 * c for c in (_correlation(o, e) for e in chosen)),
                default=0.0)
            for o in orders
        ]  # fmt: skip
        chosen.append(orders[int(np.argmin(likeness))])
    tissue = np.stack(chosen)
    sign = np.where(tissue[:, 2:] > 0.55, -1, 1)
    cores = tissue[:, 2:] + sign * rng.uniform(0.12, 0.3, sign.shape)
    air = np.full((modalities, 1), AIR)
    return np.concatenate([air, tissue, cores], axis=1).astype(np.float32)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def structures_at(
    template: Template, unit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which structure and which label is at each place ... 3 of the template."""
    body = template.body.distance2(unit)
    structures = np.select([body < 0.78, body < 1], [2, 1], 0)
    labels = (body < 1).astype(np.int32)
    nearest = np.where(body < 0.9, np.float32(1), np.float32(0))
    count = len(template.organs)
    for number, (organ, core) in enumerate(
        zip(template.organs, template.cores, strict=True)
    ):
        distance = organ.distance2(unit)
        inside = distance < nearest
        nearest[inside] = distance[inside]
        labels[inside] = number + 2
        structures[inside] = number + 3
        structures[inside & (distance < core)] = number + 3 + count
    return structures, labels
