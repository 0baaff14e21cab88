"""Registration by other tools, as transforms that jaxreg warps and measures.

SyN goes by two names: SyN-MI by mutual information with antspyx's own settings, as the
papers of uniGradICON and UniReg have run it, and SyN-CC by local cross correlation of
radius 4. SyN alone is SyN-CC, as tables written before the two had names have it.

SyN by antspyx and greedy by picsl_greedy, both optional. Scans go to the tools and
transforms come back as files in a folder that is removed afterwards, so that geometry
passes through `io` alone.
"""

import functools
import importlib
import inspect
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.space.grid import Volume
from jaxreg.space.transform import Affine, Transform


def register_syn(
    moving: Volume,
    fixed: Volume,
    *,
    metric: str = "CC",
    radius: int = 4,
    iterations: Sequence[int] = (40, 20, 0),
    stages: str = "SyN",
    seed: int = 1,
    package: Any = None,
) -> Transform:
    """Registers by ANTs: centres of mass, affine by mutual information, then SyN.

    Args:
      moving: the scan to be warped, stored intensities.
      fixed: the scan that stays.
      metric: of the deformable stage: CC (local cross correlation), mattes (mutual
        information), meansquares or demons.
      radius: of CC's window, voxels; bins of mattes, of which antspyx has 32.
      iterations: of the deformable stage, coarse to fine; antspyx's default.
      stages: antspyx's type_of_transform; SyNRA has a rigid stage before the affine.
      seed: of the voxels that the affine stage samples, where antspyx can set it.
      package: what stands for the module ants, such as one in another process.

    Returns:
      Fixed mm to moving mm (RAS+).

    Raises:
      UserError: antspyx is not installed or fails, or a grid is sheared.

    References:
      Avants et al., Symmetric diffeomorphic image registration with cross-correlation,
      Medical Image Analysis 2008.
    """
    ants = package or _tool(*_ANTS)
    with tempfile.TemporaryDirectory(prefix="jaxreg-syn-") as name:
        folder = pathlib.Path(name)
        scans = _write_scans(folder, moving=moving, fixed=fixed)
        # Without a seed, the affine stage samples other voxels in every run.
        seeded = "random_seed" in inspect.signature(ants.registration).parameters
        try:
            ants.registration(
                fixed=ants.image_read(str(scans["fixed"])),
                moving=ants.image_read(str(scans["moving"])),
                type_of_transform=stages,
                outprefix=f"{folder / 'syn'}",
                syn_metric=metric,
                syn_sampling=radius,
                reg_iterations=tuple(iterations),
                write_composite_transform=True,
                **({"random_seed": seed} if seeded else {}),
            )
        except (RuntimeError, ValueError) as error:
            raise _failed("SyN", moving, fixed, error) from error
        return transforms.read_transform(folder / "synComposite.h5")


def register_greedy(
    moving: Volume,
    fixed: Volume,
    *,
    metric: str = "NCC 2x2x2",
    affine_iterations: str = "100x50x10",
    iterations: str = "100x50x10",
    package: Any = None,
) -> Transform:
    """Registers by greedy: image centres, affine, then diffeomorphic.

    Args:
      moving: the scan to be warped, stored intensities.
      fixed: the scan that stays.
      metric: of both stages, as greedy's option -m.
      affine_iterations: coarse to fine, as its option -n.
      iterations: the same for the deformable stage.
      package: what stands for the module picsl_greedy, such as one in another process.

    Returns:
      Fixed mm to moving mm (RAS+).

    Raises:
      UserError: picsl_greedy is not installed or fails, or a grid is sheared.

    References:
      Yushkevich et al., Fast automatic segmentation of hippocampal subfields and medial
      temporal lobe subregions in 3 Tesla and 7 Tesla MRI, Alzheimer's & Dementia 2016.
    """
    greedy = (package or _tool(*_PACKAGES["greedy"])).Greedy3D()
    with tempfile.TemporaryDirectory(prefix="jaxreg-greedy-") as name:
        folder = pathlib.Path(name)
        scans = _write_scans(folder, moving=moving, fixed=fixed)
        affine, warp = folder / "affine.mat", folder / "warp.nii.gz"
        common = f'-V 0 -i "{scans["fixed"]}" "{scans["moving"]}" -m {metric}'
        try:
            for command in (
                f'-a -dof 12 -ia-image-centers -n {affine_iterations} -o "{affine}"',
                f'-it "{affine}" -n {iterations} -o "{warp}"',
            ):
                # Quiet or not, it has a line for each level of its affine stage.
                greedy.execute(f"{common} {command}", out=io.StringIO())
        except RuntimeError as error:
            raise _failed("greedy", moving, fixed, error) from error
        # The field is in LPS mm as ITK's, the matrix in RAS mm; the field acts first.
        last = Transform((Affine(np.loadtxt(affine)),))
        return transforms.read_transform(warp).then(last)


TOOLS: Mapping[str, Callable[[Volume, Volume], Transform]] = MappingProxyType(
    {
        "SyN": register_syn,
        "SyN-MI": functools.partial(register_syn, metric="mattes", radius=32),
        "SyN-CC": register_syn,
        "greedy": register_greedy,
    }
)
"""What `evaluate` can put beside a model, by its name in the table."""


def check_installed(names: Iterable[str]) -> None:
    """Checks that tools can be used, before any work.

    Args:
      names: keys of `TOOLS`.

    Raises:
      UserError: a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in TOOLS:
            known = ", ".join(TOOLS)
            raise UserError(f"tool {name} is unknown, expected one of {known}")
        _tool(*_PACKAGES[name])


_ANTS = ("ants", "antspyx")
_PACKAGES = MappingProxyType(
    {
        "SyN": _ANTS,
        "SyN-MI": _ANTS,
        "SyN-CC": _ANTS,
        "greedy": ("picsl_greedy", "picsl_greedy"),
    }
)


def _tool(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the package {package} is not installed ({error}); run "
            'pip install "jaxreg[comparison]"'
        ) from error


def _write_scans(folder: pathlib.Path, **scans: Volume) -> dict[str, pathlib.Path]:
    """Writes scans where a tool can read them and returns their paths by name."""
    paths = {}
    for name, volume in scans.items():
        axes = volume.grid.affine_mm[:3, :3] / volume.grid.spacing_mm
        if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR:
            raise UserError(
                f"{volume.source} has a sheared voxel grid, which ITK cannot hold; "
                "resample it first, or leave SyN and greedy out"
            )
        paths[name] = folder / f"{name}.nii.gz"
        volumes.write_volume(paths[name], volume)
    return paths


_SHEAR = 1e-4  # cosine between axes


def _failed(tool: str, moving: Volume, fixed: Volume, error: Exception) -> UserError:
    return UserError(
        f"{tool} failed on fixed {fixed.source} and moving {moving.source} "
        f"({' '.join(str(error).split())}); leave the pair or the tool out"
    )
