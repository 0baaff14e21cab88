"""Values of nested dataclasses, set by dotted names and read from text."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from jaxreg.errors import UserError
from jaxreg.models.base import present_names


def changed(tree: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """Returns any tree of settings with some leaves changed; see `override`."""
    return replaced(tree, split_names(changes), "")


Change = tuple[list[str], Any]
_OPTION = tuple[str, Any]


def split_name(name: str) -> list[str]:
    """Returns "section.field-name" as ["section", "field_name"]."""
    return name.replace("-", "_").split(".")


def split_names(changes: Iterable[tuple[str, Any]]) -> list[Change]:
    """Returns changes with their names split; see `split_name`."""
    return [(split_name(name), value) for name, value in changes]


def present_name(tree: Any, name: str) -> str:
    """Returns a dotted name with the present names of fields for their former ones.

    Args:
      tree: the settings, see `models.base.former_names`.
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


def near_names(word: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean X?" where choices are like a word, else ""."""
    near = difflib.get_close_matches(word, list(choices), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_known(word: str, choices: Iterable[str], what: str) -> None:
    """Raises `UserError` where a word is none of the choices."""
    choices = list(choices)
    if word not in choices:
        raise UserError(
            f'{what} is "{word}", expected one of {", ".join(choices)}'
            f"{near_names(word, choices)}"
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
                f"there is no setting --{here}{near_names(name, fields)}; "
                f"{above.rstrip('.') or 'an experiment'} has "
                f"{', '.join(sorted(fields))}"
            )
        child = getattr(tree, name)
        for value in (value for rest, value in given if not rest):
            child = read_value(value, typing.get_type_hints(type(tree))[name], here)
        below = [(rest, value) for rest, value in given if rest]
        if below and name in ("stages", "objectives") and isinstance(child, tuple):
            child = _named_replaced(child, below, here)
        elif below and not dataclasses.is_dataclass(child):
            raise UserError(
                f"--{here}.{'.'.join(below[0][0])}: {here} is {child!r} and has no "
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
                f"there is no setting --{here}.{'.'.join(path)}; {here} has "
                f"{', '.join(names) or 'no entries'}, each with fields of its own"
                f"{near_names(name, names)}"
            )
        inside[name].append((rest, value))

    def changed(item, name):
        below = f"{here}.{name}."
        if isinstance(item, tuple):
            return item[0], replaced(item[1], inside[name], below)
        return replaced(item, inside[name], below)

    return tuple(changed(i, name) for i, name in zip(items, names, strict=True))


def read_value(value: Any, kind: Any, name: str) -> Any:
    """Returns a value as its field's type wants it; text is parsed."""
    expected = _spelled(kind)
    wrong = UserError(f"--{name} is {value!r}, expected {expected}")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "None":
            if type(None) not in arguments:
                raise wrong
            return None
        rest = [a for a in arguments if a is not type(None)]
        return read_value(value, rest[0], name)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"--{name} is {value!r}, expected {expected}")
        return value
    if origin is tuple:
        return _read_tuple(value, arguments, name, wrong)
    if kind in (int, float, bool, str):
        return _read_scalar(value, kind, wrong)
    if isinstance(value, str):
        raise UserError(
            f"--{name} cannot be given as text; set its fields, as in --{name}.FIELD, "
            "or change the configuration file"
        )
    return value


def _read_scalar(value: Any, kind: type, wrong: UserError) -> Any:
    if kind is str:
        return str(value)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(
                value.title() if value.lower() in ("true", "false") else value
            )
        except (ValueError, SyntaxError):
            raise wrong from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def _read_tuple(value: Any, arguments: tuple, name: str, wrong: UserError) -> tuple:
    if isinstance(value, str) and arguments[0] == _OPTION:
        return _read_options(value, wrong)
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("()[] ").split(",") if part]
    if not isinstance(value, Iterable):
        raise wrong
    items = list(value)
    endless = len(arguments) == 2 and arguments[1] is Ellipsis
    if not endless and len(items) != len(arguments):
        raise wrong
    kinds = [arguments[0]] * len(items) if endless else list(arguments)
    return tuple(read_value(i, k, name) for i, k in zip(items, kinds, strict=True))


def _read_options(text: str, wrong: UserError) -> tuple[tuple[str, Any], ...]:
    """Reads ``sigma=2, bins=32`` as Python reads arguments; "None" is no option."""
    inside = text.strip()
    if inside.lower() in ("", "()", "none"):
        return ()
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise wrong
        names = [keyword.arg for keyword in call.keywords]
        if call.args or None in names or len(set(names)) < len(names):
            raise wrong
        return tuple((str(k.arg), ast.literal_eval(k.value)) for k in call.keywords)
    except (ValueError, SyntaxError):
        raise wrong from None


def _spelled(kind: Any) -> str:
    """Says in words what a field takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelled(a) for a in arguments)
    if origin is tuple:
        if arguments[0] == _OPTION:
            return "NAME=VALUE, with commas, or None"
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a list of {_spelled(arguments[0])}, with commas"
        return f"{len(arguments)} values, with commas"
    words = {int: "a whole number", float: "a number", bool: "true or false",
             str: "text", type(None): "None"}  # fmt: skip
    return words.get(kind, str(kind))
