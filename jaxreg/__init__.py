"""jaxreg: universal medical image registration in JAX and Flax.

    result = jaxreg.register(fixed="fixed.nii.gz", moving="moving.nii.gz")
    result.save(transform="transform.h5", warped="warped.nii.gz", report="report.html")

What is listed in `__all__` is public. It is imported when it is first asked for, so
that ``import jaxreg`` takes no JAX.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from jaxreg.errors import UserError
    from jaxreg.io.transforms import read_transform, write_transform
    from jaxreg.io.volumes import read_volume, write_volume
    from jaxreg.registration.options import Options, Regions
    from jaxreg.registration.pair import register
    from jaxreg.registration.result import RegistrationResult, summary
    from jaxreg.space.grid import Grid, Volume
    from jaxreg.space.transform import Transform
    from jaxreg.space.warping import warp_volume
    from jaxreg.weights.load import load

__version__ = "0.1.0"

_MODULES = {
    "Grid": "space.grid",
    "Options": "registration.options",
    "Regions": "registration.options",
    "RegistrationResult": "registration.result",
    "Transform": "space.transform",
    "UserError": "errors",
    "Volume": "space.grid",
    "load": "weights.load",
    "read_transform": "io.transforms",
    "read_volume": "io.volumes",
    "register": "registration.pair",
    "summary": "registration.result",
    "warp_volume": "space.warping",
    "write_transform": "io.transforms",
    "write_volume": "io.volumes",
}

__all__ = [
    "Grid",
    "Options",
    "Regions",
    "RegistrationResult",
    "Transform",
    "UserError",
    "Volume",
    "load",
    "read_transform",
    "read_volume",
    "register",
    "summary",
    "warp_volume",
    "write_transform",
    "write_volume",
]


def __getattr__(name: str) -> typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxreg' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxreg.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
