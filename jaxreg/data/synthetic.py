"""Synthetic labelled pairs of known deformation, endless, from a seed alone.

A *template* is a body with a wall and organs of random place, size and shape. A
*subject* is the template under a smooth diffeomorphism of its own. A pair is two
subjects ("inter"), or one subject before and after a second diffeomorphism ("intra").
Images are painted from the label map: an intensity per structure and modality, texture,
a bias field, blur and noise.

Everything is a pure function of (config, seed, index), in any order of access. Host
side: NumPy and SciPy only, since the input pipeline's worker processes import this.
Arrays are D H W. Displacements are pulls in voxels; component i moves along axis i.

References:
  Hoffmann et al., SynthMorph: learning contrast-invariant registration without acquired
  images, IEEE TMI 2022. Unlike there, a label means the same in every subject.
"""

import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from jaxreg.data import synthetic_anatomy as anatomy
from jaxreg.data import synthetic_fields as fields
from jaxreg.errors import UserError
from jaxreg.io import files, volumes
from jaxreg.space.grid import Grid, Shape, Volume

MAX_LABELS = 16
MIN_SIZE = 8
_COLUMNS = (
    "image", "label", "subject", "dataset", "region", "modality", "pairing", "split",
    "session",
)  # fmt: skip
_AMOUNTS = (
    "deformation_voxel", "organ_change", "texture", "bias", "blur_voxel", "noise",
)  # fmt: skip
_SPACING_MM = (2.0, 1.25, 1.5)
_HOLD_OUT = 5
ORIENTATION = "LPS"
"""Of all synthetic scans, as NIfTI counts it: see `_scanner_grid`."""
_STORED_RANGE = 1000

# What a stream of random numbers is for: streams with other purposes are independent.
_TEMPLATE, _SUBJECT, _SCAN, _IMAGE, _PAIR = range(5)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """One kind of synthetic data.

    Attributes:
      name: of the task or data set.
      shape: voxels per axis, D H W.
      labels: foreground labels 1 to this: the body, then the organs within it. From 10
        voxels per axis on every one occurs.
      modalities: image contrasts that exist.
      pairing: "inter" for two subjects, "intra" for two scans of one.
      multimodal: whether the images of a pair differ in contrast. Otherwise a pair
        shares one.
      anatomy: number of the template; it depends on this and `labels` alone, so that
        other seeds show other subjects of the same anatomy.
      deformation_voxel: largest displacement of a smooth deformation, before organs
        change; each draws 0.5 to 1 times this. An eighth of the shortest axis if None.
      organ_change: standard deviation of the organs' relative growth.
      texture: amplitude of the texture within structures.
      bias: standard deviation of the logarithm of the bias field.
      blur_voxel: largest standard deviation of the blur.
      noise: largest standard deviation of the noise.
    """

    name: str = "inter_mono"
    shape: Shape = (32, 32, 32)
    labels: int = 5
    modalities: int = 1
    pairing: Literal["inter", "intra"] = "inter"
    multimodal: bool = False
    anatomy: int = 0
    deformation_voxel: float | None = None
    organ_change: float = 0.1
    texture: float = 0.06
    bias: float = 0.15
    blur_voxel: float = 0.8
    noise: float = 0.03

    def __post_init__(self):
        """Checks the values; lists become tuples."""
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        what = f"synthetic task {self.name}: "
        if len(self.shape) != 3 or min(self.shape) < MIN_SIZE:
            raise UserError(
                f"{what}shape is {self.shape}, expected three sizes of at least "
                f"{MIN_SIZE} voxels; give e.g. (32, 32, 32)"
            )
        if not 1 <= self.labels <= MAX_LABELS:
            raise UserError(
                f"{what}labels is {self.labels}, expected 1 to {MAX_LABELS}"
            )
        if self.pairing not in ("inter", "intra"):
            raise UserError(
                f'{what}pairing is "{self.pairing}", expected "inter" or "intra"'
            )
        if self.modalities < (2 if self.multimodal else 1):
            raise UserError(
                f"{what}modalities is {self.modalities}, expected at least 1, and 2 "
                "for multimodal pairs; raise it"
            )
        for name in _AMOUNTS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{what}{name} is {value}, expected at least 0")


TASKS: Mapping[str, SyntheticConfig] = {
    task.name: task
    for task in (
        SyntheticConfig("inter_mono", anatomy=0),
        SyntheticConfig("inter_multi", anatomy=1, modalities=3, multimodal=True),
        SyntheticConfig("intra_mono", anatomy=2, pairing="intra"),
        SyntheticConfig(
            "intra_multi", anatomy=3, pairing="intra", modalities=3, multimodal=True
        ),
    )
}
"""One configuration per kind of pair, each with its own anatomy. For another grid:
``dataclasses.replace(TASKS["inter_mono"], shape=(64, 64, 64))``."""


@dataclasses.dataclass(frozen=True)
class SyntheticSubject:
    """One scan of one subject.

    Attributes:
      images: by modality, D H W 1, float32 in [0, 1], aligned with each other.
      labels: D H W 1, int32, 0 is background.
      to_template_voxel: D H W 3, float32; adding it to a voxel's place gives the place
        in the template.
    """

    images: Mapping[int, np.ndarray]
    labels: np.ndarray
    to_template_voxel: np.ndarray


@dataclasses.dataclass(frozen=True)
class SyntheticPair:
    """Two scans and how they correspond.

    Attributes:
      moving: D H W 1, float32 in [0, 1].
      fixed: D H W 1, float32 in [0, 1].
      moving_labels: D H W 1, int32, 0 is background.
      fixed_labels: D H W 1, int32.
      displacement_voxel: u, D H W 3, float32, the known map from fixed to moving
        points: ``fixed_labels(x) = moving_labels(x + u(x))`` but for sampling errors.
      moving_modality: number of the moving image's contrast.
      fixed_modality: number of the fixed image's contrast.
      task: the name of its configuration.
    """

    moving: np.ndarray
    fixed: np.ndarray
    moving_labels: np.ndarray
    fixed_labels: np.ndarray
    displacement_voxel: np.ndarray
    moving_modality: int
    fixed_modality: int
    task: str


def subject(
    config: SyntheticConfig,
    seed: int,
    index: int,
    *,
    scan: int = 0,
    modalities: Sequence[int] | None = None,
) -> SyntheticSubject:
    """Makes one scan of a subject.

    Args:
      config: the kind of data.
      seed: of the population, 0 or more.
      index: of the subject, 0 or more.
      scan: 0, or a later scan of the same subject, deformed against the first.
      modalities: the contrasts to paint; all if None.
    """
    template = _template(config)
    to_template = fields.exponential(_subject_velocity(config, template, seed, index))
    if scan:
        motion = fields.exponential(_scan_velocity(config, template, seed, index, scan))
        to_template = fields.compose(to_template, motion)
    chosen = range(config.modalities) if modalities is None else modalities
    return _scan(config, template, to_template, (seed, index, scan), chosen)


def pair(config: SyntheticConfig, seed: int, index: int) -> SyntheticPair:
    """Makes one pair of the endless row.

    Inter-subject pair i is of subjects 2i (moving) and 2i + 1 (fixed), intra-subject
    pair i of the scans 1 (moving) and 0 (fixed) of subject i: see `subject`.

    Args:
      config: the kind of pair.
      seed: of the population, 0 or more.
      index: of the pair, 0 or more.
    """
    template = _template(config)
    if config.pairing == "inter":
        moving_id, fixed_id = (seed, 2 * index, 0), (seed, 2 * index + 1, 0)
        velocity = _subject_velocity(config, template, *moving_id[:2])
    else:
        moving_id, fixed_id = (seed, index, 1), (seed, index, 0)
        velocity = _scan_velocity(config, template, *moving_id)
    moving_to, known = fields.exponential(velocity), fields.exponential(-velocity)
    fixed_velocity = _subject_velocity(config, template, *fixed_id[:2])
    fixed_to = fields.exponential(fixed_velocity)
    if config.pairing == "inter":
        known = fields.compose(known, fixed_to)
    else:
        moving_to = fields.compose(fixed_to, moving_to)
    chosen = _pair_modalities(config, seed, index)
    moving, fixed = (
        _scan(config, template, to, identity, [modality])
        for to, identity, modality in zip(
            (moving_to, fixed_to), (moving_id, fixed_id), chosen, strict=True
        )
    )
    return SyntheticPair(
        moving=moving.images[chosen[0]],
        fixed=fixed.images[chosen[1]],
        moving_labels=moving.labels,
        fixed_labels=fixed.labels,
        displacement_voxel=fields.on_grid(known, config.shape),
        moving_modality=chosen[0],
        fixed_modality=chosen[1],
        task=config.name,
    )


class SyntheticPairs:
    """A map-style source of pairs that goes through its tasks in turn.

    ``source[i]`` is pair ``i // T`` of task ``i % T`` of T, for any i >= 0. An epoch
    has ``len(source)`` pairs; larger indices give the next epochs new ones.
    """

    def __init__(
        self, configs: Sequence[SyntheticConfig], seed: int = 0, length: int = 1000
    ):
        """Checks that the tasks can share a batch.

        Args:
          configs: the tasks.
          seed: of the population, 0 or more.
          length: pairs per epoch.

        Raises:
          UserError: no task, several shapes, or no length.
        """
        self.configs = tuple(configs)
        self.seed = seed
        self.length = length
        shapes = {config.shape for config in self.configs}
        if len(shapes) != 1:
            raise UserError(
                f"synthetic tasks have the shapes {sorted(shapes)}, expected at least "
                "one task and one shape; a batch holds one size"
            )
        if length < 1:
            raise UserError(f"synthetic length is {length}, expected at least 1 pair")

    def __len__(self) -> int:
        """Pairs per epoch."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns pair `index` under the batch's names, without the batch axis."""
        index = int(index)
        if index < 0:
            raise IndexError(f"pair {index}: indices start at 0")
        number, task = divmod(index, len(self.configs))
        made = pair(self.configs[task], self.seed, number)
        return {
            "moving": made.moving,
            "fixed": made.fixed,
            "moving_labels": made.moving_labels,
            "fixed_labels": made.fixed_labels,
            "task": np.int32(task),
            "index": np.int64(index),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Goes through one epoch."""
        return (self[index] for index in range(self.length))


def write_dataset(
    folder: str | os.PathLike[str],
    config: SyntheticConfig,
    *,
    subjects: int,
    seed: int = 0,
) -> pathlib.Path:
    """Writes subjects as NIfTI files with a manifest; existing files are replaced.

    Images are 16-bit integers up to 1000 in ``images/``, label maps lie in ``labels/``.
    Voxels are 2 x 1.25 x 1.5 mm along D H W, columns and rows run to the left and back
    as scanners write them. A multimodal set has every contrast of every scan, else only
    the first. An intra-subject set has two scans of each subject. Every fifth subject
    is for validation.

    Args:
      folder: where to; made if missing.
      config: the kind of data.
      subjects: how many.
      seed: of the population, 0 or more.

    Returns:
      The path of ``manifest.csv``.

    Raises:
      UserError: there are no subjects to write, or the folder cannot be written.
    """
    if subjects < 1:
        raise UserError(f"subjects is {subjects}, expected at least 1")
    folder = pathlib.Path(folder)
    for name in ("images", "labels"):
        files.make_folder(folder / name)
    rows = []
    for index in range(subjects):
        split = "val" if index % _HOLD_OUT == _HOLD_OUT - 1 else "train"
        name = f"subject_{index + 1:0{max(4, len(str(subjects)))}d}"
        for scan in range(2 if config.pairing == "intra" else 1):
            stem = f"{name}_scan{scan + 1}" if config.pairing == "intra" else name
            for image, label, modality in _write_scan(
                folder, stem, config, (seed, index, scan)
            ):
                rows.append(
                    (image, label, name, config.name, f"anatomy{config.anatomy}",
                     modality, config.pairing, split, f"scan{scan + 1}")
                )  # fmt: skip
    path = folder / "manifest.csv"
    with files.atomic_path(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
    return path


def _write_scan(
    folder: pathlib.Path,
    stem: str,
    config: SyntheticConfig,
    identity: tuple[int, int, int],
) -> list[tuple[str, str, str]]:
    """Writes one scan's files: (image, label, modality) relative to the folder."""
    seed, index, scan = identity
    chosen = range(config.modalities) if config.multimodal else [0]
    made = subject(config, seed, index, scan=scan, modalities=chosen)
    grid = _scanner_grid(config.shape)
    label = f"labels/{stem}.nii.gz"
    volumes.write_volume(
        folder / label, Volume(made.labels[..., 0].astype(np.uint8), grid)
    )
    written = []
    for number, image in made.images.items():
        modality = f"contrast{number + 1}"
        name = f"images/{stem}_{modality}.nii.gz"
        stored = np.rint(image[..., 0] * _STORED_RANGE).astype(np.int16)
        volumes.write_volume(folder / name, Volume(stored, grid))
        written.append((name, label, modality))
    return written


def _scanner_grid(shape: Shape) -> Grid:
    """A grid centred at 0: D to the head, H to the back, W to the left."""
    affine = np.zeros((4, 4))
    depth, height, width = _SPACING_MM
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = depth, -height, -width, 1
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


def _generator(purpose: int, *identity: int) -> np.random.Generator:
    # Philox mixes what SeedSequence spreads: neighbouring indices are unrelated.
    sequence = np.random.SeedSequence([purpose, *identity])
    return np.random.Generator(np.random.Philox(sequence))


def _template(config: SyntheticConfig) -> anatomy.Template:
    return anatomy.make_template(
        _generator(_TEMPLATE, config.anatomy, config.labels),
        labels=config.labels,
        modalities=config.modalities,
        shape=config.shape,
    )


def _subject_velocity(
    config: SyntheticConfig, template: anatomy.Template, seed: int, index: int
) -> np.ndarray:
    rng = _generator(_SUBJECT, config.anatomy, seed, index)
    return _velocity(config, template, rng)


def _scan_velocity(
    config: SyntheticConfig,
    template: anatomy.Template,
    seed: int,
    index: int,
    scan: int,
) -> np.ndarray:
    rng = _generator(_SCAN, config.anatomy, seed, index, scan)
    return _velocity(config, template, rng)


def _velocity(
    config: SyntheticConfig,
    template: anatomy.Template,
    rng: np.random.Generator,
) -> np.ndarray:
    """A stationary velocity on the lattice, in lattice voxels, 0 at the border."""
    lattice = fields.lattice_shape(config.shape)
    largest = config.deformation_voxel
    if largest is None:
        largest = min(config.shape) / 8
    field = fields.smooth_noise(rng, lattice, 3, 3) + 0.3 * fields.smooth_noise(
        rng, lattice, 6, 3
    )
    field *= largest * rng.uniform(0.5, 1.0) / np.linalg.norm(field, axis=-1).max()
    unit = fields.voxel_indices(lattice) / (np.asarray(lattice, np.float32) - 1)
    size = np.asarray(config.shape, np.float32) - 1
    for organ in template.organs:
        growth = config.organ_change * rng.standard_normal()
        near = np.exp(-0.5 * organ.distance2(unit))[..., None]
        field += growth * near * (unit - organ.centre) * size
    ramp = np.clip(np.minimum(unit, 1 - unit) / 0.15, 0, 1)
    field *= np.prod(ramp**2 * (3 - 2 * ramp), axis=-1, keepdims=True)
    return (field / fields.voxel_per_lattice(config.shape)).astype(np.float32)


def _pair_modalities(config: SyntheticConfig, seed: int, index: int) -> tuple[int, int]:
    rng = _generator(_PAIR, config.anatomy, seed, index)
    if config.multimodal:
        moving, fixed = rng.choice(config.modalities, 2, replace=False)
        return int(moving), int(fixed)
    both = int(rng.integers(config.modalities))
    return both, both


def _scan(
    config: SyntheticConfig,
    template: anatomy.Template,
    lattice_to_template: np.ndarray,
    identity: tuple[int, int, int],
    modalities: Sequence[int],
) -> SyntheticSubject:
    """Paints the template deformed by a displacement on the lattice."""
    lattice = fields.lattice_shape(config.shape)
    to_template = fields.on_grid(lattice_to_template, config.shape)
    place = (
        fields.voxel_indices(config.shape) + to_template
    ) / fields.voxel_per_lattice(config.shape)
    last = np.asarray(lattice, np.float32) - 1
    structures, labels = anatomy.structures_at(
        template,
        place / last + fields.sample_linear(template.roughness, place),
    )
    seed, index, _ = identity
    own = _generator(_SUBJECT, config.anatomy, seed, index, 1)
    own_texture = fields.sample_linear(fields.smooth_noise(own, lattice, 10, 1), place)[
        ..., 0
    ]
    images = {}
    for m in modalities:
        rng = _generator(_IMAGE, config.anatomy, *identity, m)
        texture = fields.sample_linear(template.texture[..., m : m + 1], place)[..., 0]
        texture = config.texture * (0.8 * texture + 0.6 * own_texture)
        levels = template.contrast[m] + 0.02 * rng.standard_normal(
            template.contrast.shape[1]
        )
        levels[0] = anatomy.AIR
        image = levels.astype(np.float32)[structures] + np.where(labels, texture, 0)
        images[m] = _acquired(config, rng, image)[..., None]
    return SyntheticSubject(images, labels[..., None], to_template)


def _acquired(
    config: SyntheticConfig, rng: np.random.Generator, image: np.ndarray
) -> np.ndarray:
    """What a scanner adds: bias, blur and noise; float32 in [0, 1]."""
    bias = config.bias * fields.smooth_noise(rng, config.shape, 2, 1)[..., 0]
    sigma = config.blur_voxel * rng.uniform(0.5, 1.0)
    blurred = ndimage.gaussian_filter(image * np.exp(bias), sigma, truncate=3.0)
    noise = rng.standard_normal(image.shape, np.float32)
    noisy = blurred + config.noise * rng.uniform(0.5, 1.0) * noise
    # A magnitude image: no negative values in air.
    return np.clip(np.abs(noisy), 0, 1).astype(np.float32)
