"""The demonstration: two real heads that other Python packages ship.

Moving is the mean T1 head of pydeface (whole head, 176 x 256 x 256, oblique), fixed the
MNI152 T1 template of nilearn (brain only, 1 mm, 197 x 233 x 189), which comes with maps
of grey and white matter. pydeface is located without importing it: its import needs
FSL's Python interface, its data does not.
"""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import cast

import numpy as np
from scipy import ndimage

from jaxreg import metrics
from jaxreg.errors import UserError
from jaxreg.io import files, volumes
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import report, scan_pair
from jaxreg.registration import result as result_lib
from jaxreg.space import transform as transform_lib
from jaxreg.space import warping
from jaxreg.space.grid import Shape, Volume
from jaxreg.weights import load as load_lib

_NILEARN = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_PYDEFACE = "data/mean_reg2mean.nii.gz"
TISSUES = ("grey matter", "white matter")
_FILES = (
    *("transform.h5", "displacement.nii.gz", "warped.nii.gz"),
    *("before_after.png", "report.html"),
)


@dataclasses.dataclass(frozen=True)
class DemoPair:
    """Two heads with rough brain masks, and the template's tissues.

    Attributes:
      moving: mean T1 head of pydeface.
      fixed: MNI152 T1 template of nilearn, brain only.
      moving_mask: brain of the moving head by threshold and opening: rough.
      fixed_mask: where the template is above 0.
      tissues: on the fixed grid: 1 grey matter, 2 white matter, 0 neither.
    """

    moving: Volume
    fixed: Volume
    moving_mask: Volume
    fixed_mask: Volume
    tissues: Volume


def _packaged(package: str, name: str) -> pathlib.Path:
    """Returns a data file inside an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    folders = (found.submodule_search_locations if found else None) or []
    for folder in folders:
        if (path := pathlib.Path(folder) / name).is_file():
            return path
    what = f"its file {name} is missing" if folders else "it is not installed"
    raise UserError(
        f"the demo's data come with the Python package {package}, but {what}; "
        'pip install "jaxreg[demo]"'
    )


def paths() -> tuple[pathlib.Path, pathlib.Path]:
    """Returns where the moving head and the fixed template lie.

    Raises:
      UserError: pydeface or nilearn is not installed.
    """
    return _packaged("pydeface", _PYDEFACE), _packaged("nilearn", _NILEARN.format("t1"))


def load() -> DemoPair:
    """Reads the pair and derives its masks.

    Raises:
      UserError: pydeface or nilearn is not installed.
    """
    moving, fixed = (volumes.read_volume(path) for path in paths())
    grey, white = (
        volumes.read_volume(_packaged("nilearn", _NILEARN.format(name))).array
        for name in ("gm", "wm")
    )
    # The maps are probabilities times 255.
    labels = np.select([grey > 127.5, white > 127.5], [1, 2], 0).astype(np.uint8)
    return DemoPair(
        moving=moving,
        fixed=fixed,
        moving_mask=brain_mask(moving),
        fixed_mask=_like(fixed, fixed.array > 0, "the template's brain"),
        tissues=_like(fixed, labels, "the template's tissues"),
    )


def _like(volume: Volume, array: np.ndarray, source: str) -> Volume:
    return Volume(array.astype(np.uint8), volume.grid, source)


def brain_mask(head: Volume, *, threshold: float = 0.65, radius_mm: float = 16.0):
    """Returns a rough brain mask of a T1 head: the largest thick bright blob.

    Skull and its surroundings are dark in T1, and what is bright outside (skin, fat,
    neck) is thinner than the brain: an opening separates them. Good enough for the
    demo's averaged head, not a brain extraction for patients.

    Args:
      head: T1 intensities, background near 0.
      threshold: brightness relative to the median of the head's tissue.
      radius_mm: of the opening.
    """
    coarse = head.array[::2, ::2, ::2]
    spacing = 2 * head.grid.spacing_mm
    bright = coarse > threshold * np.median(coarse[coarse > coarse.mean()])
    thick = _distance_mm(bright, spacing) > radius_mm
    blobs, count = cast(tuple[np.ndarray, int], ndimage.label(thick))
    if count == 0:
        raise UserError(f"{head.source} shows no brain; use a T1 scan of a head")
    largest = blobs == 1 + np.argmax(np.bincount(blobs.ravel())[1:])
    near = _distance_mm(~largest, spacing) <= radius_mm + 2.0
    brain = np.asarray(ndimage.binary_fill_holes(bright & near))
    fine = np.repeat(np.repeat(np.repeat(brain, 2, 0), 2, 1), 2, 2)
    d, h, w = head.array.shape
    return _like(head, fine[:d, :h, :w], f"rough brain mask of {head.source}")


def _distance_mm(inside: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Returns how far each voxel inside is from the outside, 0 outside."""
    return np.asarray(ndimage.distance_transform_edt(inside, sampling=spacing_mm))


def three_means(values: np.ndarray, *, rounds: int = 50) -> tuple[float, float]:
    """Returns the two thresholds between three intensity classes (k-means in 1-D)."""
    low, high = np.quantile(values, [0.05, 0.95])
    centres = np.linspace(low, high, 3)
    for _ in range(rounds):
        cuts = (centres[1:] + centres[:-1]) / 2
        classes = np.digitize(values, cuts)
        fresh = np.array(
            [values[classes == i].mean() if (classes == i).any() else centres[i]
             for i in range(3)]
        )  # fmt: skip
        if np.allclose(fresh, centres, rtol=1e-6):
            break
        centres = fresh
    cuts = (centres[1:] + centres[:-1]) / 2
    return float(cuts[0]), float(cuts[1])


def tissue_overlap(warped: Volume, pair: DemoPair, cuts: tuple[float, float]):
    """Returns the Dice overlap per tissue between a warped head and the template.

    The head has no tissue maps, so its tissues are guessed from brightness inside the
    template's brain: between the two thresholds grey matter, above them white matter.

    Args:
      warped: moving head on the fixed grid.
      pair: the demo's data.
      cuts: thresholds in the head's intensity, see `three_means`.
    """
    inside = pair.fixed_mask.array > 0
    guess = np.where(inside, np.digitize(warped.array, cuts), 0)
    scores = metrics.dice(guess, pair.tissues.array, labels=[1, 2])
    return dict(zip(TISSUES, (scores[1], scores[2]), strict=True))


def run(
    out: str | os.PathLike,
    *,
    shape: Shape = (64, 80, 64),
    model: str | None = None,
    iterations: int | None = 50,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    pair: DemoPair | None = None,
) -> tuple[dict[str, str], list[pathlib.Path]]:
    """Registers the pair and writes everything into a folder.

    Args:
      out: the folder, made if absent.
      shape: the network grid, D H W.
      model: name or path of weights; None optimises a displacement field.
      iterations: of instance optimisation; None for none (with a model).
      seed: of the optimisation's noise.
      command: the command line, for the report.
      progress: see `pair.register`.
      pair: other data of the same form; `load()` if None.

    Returns:
      The printed numbers by name, and the files written.

    Raises:
      UserError: the data's packages are missing, or the folder cannot be written.
    """
    options = options_lib.Options(
        input_masking=True,
        io_iterations=iterations,
        io_target="displacement" if model is None else "network",
        shape=shape,
        seed=seed,
    )
    options_lib.check_options(options)
    pair = pair or load()
    loaded = None if model is None else load_lib.load(model)
    folder = files.make_folder(out, "--out")
    files.check_writable(folder / "report.html", "--out")
    regions = options_lib.Regions(pair.fixed_mask, pair.moving_mask)
    scans = dataclasses.replace(
        scan_pair.read(pair.moving, pair.fixed, regions),
        stored=dataclasses.replace(pair.moving, array=_small(pair.moving.array)),
    )
    result = pair_lib.register(
        scans.moving, scans.fixed, loaded, options, regions=regions, progress=progress
    )
    numbers = {**result_lib.summary(result), **_tissue_numbers(pair, result.transform)}
    written = [folder / name for name in _FILES]
    scan_pair.write(scans, result.transform, transform_out=written[1])
    scan_pair.write(
        scans, result.transform, transform_out=written[0], warped_out=written[2]
    )
    report.write_report(
        written[4], scans, result.transform,
        report.Known(numbers=numbers, history=result.history, notes=(_NOTE,)),
        command=command, picture=written[3],
    )  # fmt: skip
    return numbers, written


_NOTE = (
    "Tissue overlap compares the template's maps of grey and white matter with a "
    "guess from the warped head's brightness (three classes inside the template's "
    "brain). The head is an average of many people, so its tissues are blurred: the "
    "change matters, not the value."
)


def _tissue_numbers(pair: DemoPair, found: transform_lib.Transform) -> dict[str, str]:
    """Returns the overlap before and after, with one pair of thresholds for both."""
    nothing = transform_lib.Transform(())
    before, after = (
        warping.warp_volume(pair.moving, mapping, pair.fixed.grid)
        for mapping in (nothing, found)
    )
    cuts = three_means(pair.moving.array[pair.moving_mask.array > 0])
    scores = [tissue_overlap(warped, pair, cuts) for warped in (before, after)]
    return {
        f"{tissue} overlap (Dice, from brightness)": (
            f"{scores[0][tissue]:.3f} before, {scores[1][tissue]:.3f} after"
        )
        for tissue in TISSUES
    }


def _small(array: np.ndarray) -> np.ndarray:
    """Returns whole numbers as int16, as the head was stored; others as they are."""
    small = array.astype(np.int16)
    return small if np.array_equal(small, array) else array
