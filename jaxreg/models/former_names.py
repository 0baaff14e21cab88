"""Former names of fields, for stored configurations and settings."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxreg.models import base

# --- former names of fields -----------------------------------------------------------


def former_names(**renamed: str):
    """Lets the fields of a dataclass be given by the names that they once had.

    The constructor (so `dataclasses.replace`, too), stored configurations and settings
    on the command line take both names; the present ones are written. A former name
    wins, since `replace` gives the present one beside it.

    Args:
      **renamed: former name to present one.
    """

    def decorate(cls: type[base.T]) -> type[base.T]:
        init = cls.__init__

        @functools.wraps(init)
        def accepting(self, *args, **given):
            init(self, *args, **present_names(cls, given))

        cls.__init__ = accepting
        cls.former_names = MappingProxyType(renamed)  # pyright: ignore
        return cls

    return decorate


def present_names(cls: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of a class by their present names; see `former_names`."""
    renamed = getattr(cls, "former_names", {})
    found = {name: value for name, value in fields.items() if name not in renamed}
    return found | {renamed[n]: value for n, value in fields.items() if n in renamed}
