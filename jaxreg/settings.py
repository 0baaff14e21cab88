"""Settings: fields of dataclasses, read from text by what their annotations say.

An annotation may say more than a type. ``Annotated[str, ("a", "b")]`` is one of these
words, in any case of letters, as a `Literal` is; ``Annotated[Shape, read_shape]`` is
text of a form of its own, which the function reads.
"""

import ast
import dataclasses
import inspect
import math
import numbers
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from jaxreg.errors import UserError, near_match

_OPTION = tuple[str, Any]
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    pathlib.Path: "a path",
    type(None): "None",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an annotation lets a setting be.

    Attributes:
      base: the type beside None.
      optional: None is a value, too.
      choices: the only words; none for any.
      reader: reads text of a form of its own.
    """

    base: Any
    optional: bool
    choices: tuple[Any, ...] = ()
    reader: Callable[[str], Any] | None = None

    @property
    def words(self) -> int:
        """How many words a setting takes: those of a tuple of fixed length, or one."""
        parts = typing.get_args(self.base)
        several = typing.get_origin(self.base) is tuple and Ellipsis not in parts
        return len(parts) if several and self.reader is None else 1


def kind_of(annotation: Any) -> Kind:
    """Returns what a field's annotation says."""
    more: list[Any] = []
    if typing.get_origin(annotation) is Annotated:
        annotation, *more = typing.get_args(annotation)
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        optional = type(None) in parts
        annotation = next(part for part in parts if part is not type(None))
    choices = next((one for one in more if isinstance(one, tuple)), ())
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
    reader = next((one for one in more if callable(one)), None)
    return Kind(annotation, optional, choices, reader)


def described(cls: type) -> dict[str, str]:
    """Returns what the docstring of a dataclass says of each field.

    Those of a base class come with it.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition(
            "\nAttributes:\n"
        )
        entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.M)
        found |= {name: " ".join(text.split()) for name, text in entries}
    return found


def read(value: Any, annotation: Any, name: str, *, parse: bool = True) -> Any:
    """Returns a value as a field's annotation wants it.

    Args:
      value: text, or what a caller from Python gives.
      annotation: of the field.
      name: what an error calls the setting.
      parse: take text for what it says; otherwise text is text.

    Raises:
      UserError: it is no such value.
    """
    kind = kind_of(annotation)
    if parse and kind.reader is not None and isinstance(value, str):
        return kind.reader(value)
    if _says_none(value, kind):
        return None
    if kind.choices:
        return _read_choice(value, annotation, name)
    expected = _expected(annotation)
    if not parse:
        expected = expected.replace(", with commas", "")
    wrong = UserError(f"`{name}` is {value!r}, expected {expected}")
    if value is None or (not parse and isinstance(value, str) and kind.base is not str):
        raise wrong
    if typing.get_origin(kind.base) is tuple:
        return _read_tuple(value, typing.get_args(kind.base), name, wrong, parse=parse)
    if kind.base in _WORDS:
        return _read_scalar(value, kind.base, wrong)
    if isinstance(value, str):
        raise UserError(
            f"`{name}` cannot be given as text; set its fields, as in `{name}.FIELD`, "
            "or change the configuration file"
        )
    return value


def _says_none(value: Any, kind: Kind) -> bool:
    """Whether a value is None, which text says in any case where it can say no more."""
    if not kind.optional or value is None:
        return kind.optional
    plain = kind.base is str and not kind.choices
    return value == "None" if plain else str(value).lower() == "none"


def _read_choice(value: Any, annotation: Any, name: str) -> Any:
    choices = kind_of(annotation).choices
    by_word = {str(choice).lower(): choice for choice in choices}
    if str(value).lower() not in by_word:
        raise UserError(
            f"`{name}` is {value!r}, expected {_expected(annotation)}"
            f"{near_match(str(value), by_word)}"
        )
    return by_word[str(value).lower()]


def _read_scalar(value: Any, base: type, wrong: UserError) -> Any:
    if base in (str, pathlib.Path):
        return base(value)
    if isinstance(value, str) and base is bool:
        value = {"true": True, "false": False}.get(value.lower())
    elif isinstance(value, str):
        try:
            number = base(value)
        except ValueError:
            raise wrong from None
        if not math.isfinite(number):  # "nan", "inf"
            raise wrong
        return number
    wanted = {int: numbers.Integral, float: numbers.Real}.get(base, base)
    if not isinstance(value, wanted) or isinstance(value, bool) != (base is bool):
        raise wrong
    return base(value)


def _read_tuple(
    value: Any, parts: tuple, name: str, wrong: UserError, *, parse: bool
) -> tuple:
    if isinstance(value, str) and parts[0] == _OPTION:
        return _read_options(value, wrong)
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("()[] ").split(",") if part]
    if not isinstance(value, Iterable):
        raise wrong
    items = list(value)
    endless = len(parts) == 2 and parts[1] is Ellipsis
    if not endless and len(items) != len(parts):
        raise wrong
    kinds = [parts[0]] * len(items) if endless else list(parts)
    return tuple(
        read(item, kind, name, parse=parse)
        for item, kind in zip(items, kinds, strict=True)
    )


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


def _expected(annotation: Any) -> str:
    """Says in words what a field takes."""
    kind = kind_of(annotation)
    parts = typing.get_args(kind.base)
    if kind.choices:
        words = "one of " + ", ".join(str(choice) for choice in kind.choices)
    elif typing.get_origin(kind.base) is not tuple:
        words = _WORDS.get(kind.base, str(kind.base))
    elif parts[0] == _OPTION:
        words = "NAME=VALUE, with commas, or None"
    elif len(parts) == 2 and parts[1] is Ellipsis:
        words = f"a list of {_expected(parts[0])}, with commas"
    else:
        words = f"{len(parts)} numbers, with commas"
    return words + " or None" * kind.optional
