"""Two registered scans in NiiVue, a viewer for notebooks of its own."""

import pathlib
import tempfile
from typing import Any

from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.space.grid import Volume

_OPACITY = 0.5  # of the scan on top


def viewer(fixed: Volume, warped: Volume) -> Any:
    """Returns a widget of ipyniivue with the warped scan over the fixed one.

    Args:
      fixed: the scan that stays.
      warped: the moving scan on the fixed one's grid.

    Raises:
      UserError: ipyniivue is not installed.

    References:
      https://github.com/niivue/ipyniivue
    """
    try:
        import ipyniivue  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "NiiVue's viewer needs the package ipyniivue; pip install ipyniivue, or "
            "use .view()"
        ) from None
    widget = ipyniivue.NiiVue()
    widget.load_volumes(
        [
            {"data": _nifti(fixed), "name": "fixed.nii.gz", "colormap": "gray"},
            {
                "data": _nifti(warped),
                "name": "warped.nii.gz",
                "colormap": "green",
                "opacity": _OPACITY,
            },
        ]
    )
    return widget


def _nifti(volume: Volume) -> bytes:
    with tempfile.TemporaryDirectory(prefix="jaxreg-") as folder:
        path = pathlib.Path(folder) / "volume.nii.gz"
        volumes.write_volume(path, volume)
        return path.read_bytes()
