"""Where a report came from: program, device, scans and grids."""

import datetime
import platform

import jax
from nibabel import orientations

import jaxreg
from jaxreg.registration.scan_pair import ScanPair
from jaxreg.space.grid import Grid


def described(grid: Grid) -> str:
    """Returns a grid's shape, voxels and axes in words."""
    size = " x ".join(map(str, grid.shape))
    spacing = " x ".join(f"{s:.4g}" for s in grid.spacing_mm)
    axes = "".join(orientations.aff2axcodes(grid.affine_mm))
    return f"{size} voxels (D x H x W) of {spacing} mm, axes towards {axes}"


def provenance(
    scans: ScanPair, network_grid: Grid | None = None, weights: str | None = None
) -> dict[str, str]:
    """Returns who made a registration's report, of what and with what.

    Args:
      scans: that were registered.
      network_grid: on which, if it is known.
      weights: of the network, or that there was none; None if it is not known.
    """
    device = jax.devices()[0]
    rows = {
        "fixed scan": scans.fixed.source,
        "its grid": described(scans.fixed.grid),
        "moving scan": scans.moving.source,
        "grid of the moving scan": described(scans.moving.grid),
    }
    if network_grid is not None:
        rows["registered on"] = described(network_grid)
    if weights is not None:
        rows["weights"] = weights or "none"
    rows["made by"] = (
        f"jaxreg {jaxreg.__version__}, JAX {jax.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    rows["device"] = (
        f"{jax.device_count()} x {device.device_kind}"
        if device.platform != "cpu"
        else "CPU"
    )
    now = datetime.datetime.now(datetime.UTC)
    rows["made on"] = now.strftime("%Y-%m-%d %H:%M UTC")
    return rows
