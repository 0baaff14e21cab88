"""Architectures by name: from stored fields to a configuration.

A network outside this package is made known by `register_kind`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxreg.errors import UserError, near_match
from jaxreg.models.base import Architecture, NetworkConfig
from jaxreg.models.former_names import present_names
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.sam import SamConfig
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig

_KINDS: dict[str, type[Architecture]] = {}


def register_kind(config: type[Architecture]) -> None:
    """Makes an architecture known by the name of its kind.

    Raises:
      ValueError: another one has the name.
    """
    if _KINDS.setdefault(config.kind, config) is not config:
        raise ValueError(f"{config.kind} is {_KINDS[config.kind]} already")


for _config in (
    GradIconConfig,
    PromptRegConfig,
    RdpConfig,
    UniRegConfig,
    UniRegRpnConfig,
    SamConfig,
):
    register_kind(_config)


def kind_named(kind: str, source: str) -> type[Architecture]:
    """Returns the configuration's class of a kind of network.

    Args:
      kind: its name.
      source: where it stands, for the error.

    Raises:
      UserError: there is none of the name.
    """
    if kind not in _KINDS:
        raise UserError(
            f"{source}: {kind!r} is not a kind of network that jaxreg knows"
            f"{near_match(kind, _KINDS)}; expected one of {', '.join(_KINDS)}"
        )
    return _KINDS[kind]


def kinds() -> Mapping[str, type[Architecture]]:
    """Returns the configuration's class of every kind of network, by its name."""
    return MappingProxyType(_KINDS)


def config_of(kind: str, fields: Mapping[str, Any]) -> Any:
    """Returns a configuration from its fields, lists in place of tuples welcome.

    Args:
      kind: one that is known.
      fields: by name, see `former_names`; the others have their defaults.

    Raises:
      UserError: the kind or a field is unknown, or a value is refused.
    """
    known = kind_named(kind, "the network")
    fields = present_names(known, fields)
    names = [field.name for field in dataclasses.fields(known)]
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise UserError(
            f"the network's config has the fields {', '.join(unknown)}, which this "
            f"jaxreg does not know (it knows {', '.join(names)}); install a newer one"
        )
    return known(**_as_stated(known, fields))


def unlike(config: NetworkConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields that give the same weights another meaning in a network.

    Args:
      config: of the network that takes them.
      fields: of the network that they were trained in.

    Returns:
      Name to what it was there.
    """
    stated = {name: fields[name] for name in config.forms if name in fields}
    return {
        name: fields[name]
        for name, value in _as_stated(type(config), stated).items()
        if getattr(config, name) != value
    }


def _as_stated(cls: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields as a class has them from what JSON holds: tuples, and sections."""
    hints = typing.get_type_hints(cls)

    def value_of(value: Any, hint: Any) -> Any:
        if isinstance(value, Mapping):
            options = [hint, *typing.get_args(hint)]
            section: Any = next(filter(dataclasses.is_dataclass, options))
            return section(**_as_stated(section, value))
        if isinstance(value, list | tuple):
            return tuple(value_of(item, None) for item in value)
        return value

    return {name: value_of(value, hints[name]) for name, value in fields.items()}
