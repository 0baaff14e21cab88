"""Former names of modules, for configuration files of earlier versions."""

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

_GONE = {
    "jaxreg.experiment": ("jaxreg.experiments.config", "jaxreg.experiments.files"),
    "jaxreg.sam_experiment": ("jaxreg.experiments.sam_config",),
    "jaxreg.data.pipeline": ("jaxreg.data.loading",),
    "jaxreg.data.views": ("jaxreg.data.sam_views",),
    "jaxreg.models.unireg_rpn": ("jaxreg.models.unireg.released",),
}
"""Modules that are no more: where their names are."""
_SPLIT = {
    "jaxreg.data.pairs": ("jaxreg.data.sampler",),
    "jaxreg.models.unireg": ("jaxreg.models.unireg.paper",),
}
"""Modules that have given names to others: to which."""


@contextlib.contextmanager
def importable(source: str) -> Iterator[None]:
    """Lets former names be imported for as long as it is entered, with a warning.

    Args:
      source: what imports them, for the warning.
    """
    warned: set[str] = set()

    def find(former: str, name: str) -> Any:
        for present in (_GONE | _SPLIT)[former]:
            module = importlib.import_module(present)
            if not name.startswith("__") and hasattr(module, name):
                if former not in warned:
                    warnings.warn(
                        f"{source} imports {former}, whose {name} is in {present} now; "
                        "import it from there, the former name will go",
                        stacklevel=2,
                    )
                warned.add(former)
                return getattr(module, name)
        raise AttributeError(f"module {former!r} has no attribute {name!r}")

    with contextlib.ExitStack() as stack:
        for former in (*_GONE, *_SPLIT):
            if former in _SPLIT:
                module = importlib.import_module(former)
            else:
                module = types.ModuleType(former)
                stack.callback(_put, sys.modules, former, sys.modules.get(former))
                sys.modules[former] = module
            names = module.__dict__
            stack.callback(_put, names, "__getattr__", names.get("__getattr__"))
            names["__getattr__"] = functools.partial(find, former)
        yield


def _put(entries: dict[str, Any], name: str, value: Any) -> None:
    """Puts an entry back; None takes it out."""
    if value is None:
        entries.pop(name, None)
    else:
        entries[name] = value
