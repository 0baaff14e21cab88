"""Settings of nested dataclasses, changed by dotted names."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from jaxreg import settings
from jaxreg.errors import UserError, near_match
from jaxreg.models.former_names import present_names


def changed(tree: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """Returns any tree of settings with some leaves changed; see `override`."""
    return replaced(tree, split_names(changes), "")


Change = tuple[list[str], Any]


def split_name(name: str) -> list[str]:
    """Returns "section.field-name" as ["section", "field_name"]."""
    return name.replace("-", "_").split(".")


def split_names(changes: Iterable[tuple[str, Any]]) -> list[Change]:
    """Returns changes with their names split; see `split_name`."""
    return [(split_name(name), value) for name, value in changes]


def present_name(tree: Any, name: str) -> str:
    """Returns a dotted name with the present names of fields for their former ones.

    Args:
      tree: the settings, see `former_names.former_names`.
      name: "section.field".
    """
    found = []
    for part in name.split("."):
        (present,) = present_names(type(tree), {part.replace("-", "_"): None})
        found.append(part if present == part.replace("-", "_") else present)
        tree = getattr(tree, present, None)
    return ".".join(found)


def leaf_at(tree: Any, path: list[str]) -> Any:
    """Returns what a nested dataclass holds at a path."""
    for name in path:
        tree = dict(tree)[name] if isinstance(tree, tuple) else getattr(tree, name)
    return tree


def check_known(word: str, choices: Iterable[str], what: str) -> None:
    """Raises `UserError` where a word is none of the choices."""
    choices = list(choices)
    if word not in choices:
        raise UserError(
            f'{what} is "{word}", expected one of {", ".join(choices)}'
            f"{near_match(word, choices)}"
        )


def replaced(tree: Any, changes: Iterable[Change], above: str) -> Any:
    """Returns the tree with all changes made at once, so that it is checked once."""
    inside: dict[str, list[Change]] = {}
    for path, value in changes:
        (name,) = present_names(type(tree), {path[0]: None})
        inside.setdefault(name, []).append((path[1:], value))
    fields = {f.name for f in dataclasses.fields(tree)}
    made: dict[str, Any] = {}
    for name, given in inside.items():
        here = f"{above}{name}"
        if name not in fields:
            raise UserError(
                f"there is no setting `{here}`{near_match(name, fields)}; "
                f"{above.rstrip('.') or 'an experiment'} has "
                f"{', '.join(sorted(fields))}"
            )
        child = getattr(tree, name)
        for value in (value for rest, value in given if not rest):
            hints = typing.get_type_hints(type(tree), include_extras=True)
            child = settings.read(value, hints[name], here)
        below = [(rest, value) for rest, value in given if rest]
        if below and name in ("stages", "objectives") and isinstance(child, tuple):
            child = _named_replaced(child, below, here)
        elif below and not dataclasses.is_dataclass(child):
            raise UserError(
                f"`{here}.{'.'.join(below[0][0])}`: {here} is {child!r} and has no "
                "fields"
            )
        elif below:
            child = replaced(child, below, f"{here}.")
        made[name] = child
    return dataclasses.replace(tree, **made)


def _named_replaced(items: tuple, changes: Iterable[Change], here: str) -> tuple:
    """Changes some of the stages, or of the (name, objective) pairs, by their names."""
    names = [item[0] if isinstance(item, tuple) else item.name for item in items]
    inside: dict[str, list[Change]] = {name: [] for name in names}
    for path, value in changes:
        name, rest = path[0], path[1:]
        if name not in names or not rest:
            raise UserError(
                f"there is no setting `{here}.{'.'.join(path)}`; {here} has "
                f"{', '.join(names) or 'no entries'}, each with fields of its own"
                f"{near_match(name, names)}"
            )
        inside[name].append((rest, value))

    def changed(item, name):
        below = f"{here}.{name}."
        if isinstance(item, tuple):
            return item[0], replaced(item[1], inside[name], below)
        return replaced(item, inside[name], below)

    return tuple(changed(i, name) for i, name in zip(items, names, strict=True))
