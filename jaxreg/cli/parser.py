"""Verbs of the command line, whose options are made of the fields of dataclasses.

A field gives its option's name (with hyphens), kind, default and line of help; see
`settings` for what an annotation may say. Errors of the package name fields, in
backticks: `spelled` turns them into options.
"""

import dataclasses
import inspect
import pathlib
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

from jaxreg import settings

REQUIRED: Any = ...
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT", pathlib.Path: "PATH"}
_TUPLES = {2: "MIN MAX", 3: "X Y Z"}
_FORMS = {"shape": "D,H,W", "fill": "NUMBER|auto", "part": "K/N|auto"}


@dataclasses.dataclass(frozen=True)
class _Option:
    """A field as an option.

    Attributes:
      part: the function's parameter that its dataclass is.
      field: of that dataclass.
      default: where it is not given; `REQUIRED` where it must be.
      help: its line.
      panel: of the help page.
      positional: given by its place.
    """

    part: str
    field: dataclasses.Field
    default: Any
    help: str
    panel: str | None
    positional: bool

    @property
    def name(self) -> str:
        return self.field.name

    def parameter(self) -> inspect.Parameter:
        """Returns it as typer wants to see it: text, or a flag."""
        kind = settings.kind_of(self.field.type)
        metavar: str | None = _METAVARS.get(kind.base)
        if kind.choices:
            metavar = "|".join(map(str, kind.choices))
        if kind.words > 1:
            metavar = _TUPLES[kind.words]
        flag = self.field.type is bool
        given: Any = bool if flag else tuple[(str,) * kind.words] | None
        if kind.words == 1 and not flag:
            given = str | None
        if self.positional and typing.get_origin(kind.base) is tuple:
            given, metavar = list[str], f"{self.name.upper()}..."
        info = {"help": self.help, "rich_help_panel": self.panel}
        if not flag:
            info["metavar"] = _FORMS.get(self.name, metavar)
        if self.positional:
            option = typer.Argument(**info)
        else:
            option = typer.Option(option_name(self.name), **info)
        default = self.default
        if default is REQUIRED:
            default = inspect.Parameter.empty
        elif default is not None and not flag:
            default = str(default)
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY,
            default=default, annotation=Annotated[given, option],
        )  # fmt: skip

    def read(self, given: Any) -> Any:
        """Returns the field's value."""
        if given is None:
            return self.default
        return settings.read(given, self.field.type, self.name)


def verb(
    app: typer.Typer,
    name: str,
    *,
    only: Collection[str] | None = None,
    panels: Mapping[str, str] | None = None,
    positional: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    **command: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function of dataclasses to the command line.

    Args:
      app: gets the verb.
      name: of the verb.
      only: which fields of the function's last dataclass are options; None for all.
      panels: field to its panel on the help page; else what its dataclass has as
        `PANEL`.
      positional: fields that are given by their place, a tuple as several words.
      defaults: field to a default of this verb, or `REQUIRED`.
      **command: settings of typer's command.

    Returns:
      A decorator. A parameter `context` of the function is typer's; of two fields with
      one name the first is the option.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function).parameters
        classes = {n: p.annotation for n, p in signature.items() if n != "context"}
        options: dict[str, _Option] = {}
        for part, cls in classes.items():
            own = _options_of(part, cls, defaults or {}, panels or {}, positional)
            for option in own:
                if part != [*classes][-1] or not only or option.name in only:
                    options.setdefault(option.name, option)

        def run(context: typer.Context, **given: Any) -> None:
            read: dict[str, dict[str, Any]] = {part: {} for part in classes}
            for option in options.values():
                read[option.part][option.name] = option.read(given[option.name])
            made: dict[str, Any] = {n: cls(**read[n]) for n, cls in classes.items()}
            function(**made, **({"context": context} if "context" in signature else {}))

        parameters = [
            inspect.Parameter(
                "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
            ),
            *(option.parameter() for option in options.values()),
        ]
        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, **command)(run)
        return function

    return add


def _options_of(
    part: str,
    cls: type,
    defaults: Mapping[str, Any],
    panels: Mapping[str, str],
    positional: Collection[str],
) -> list[_Option]:
    said, found = settings.described(cls), []
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = REQUIRED
        panel = panels.get(field.name, getattr(cls, "PANEL", None))
        found.append(
            _Option(
                part,
                field,
                defaults.get(field.name, default),
                said[field.name],
                panel,
                field.name in positional,
            )
        )
    return found


def option_name(field: str) -> str:
    """Returns the option of a field; a name that Python reserves ends in "_"."""
    return "--" + field.strip("_").replace("_", "-")


def spelled(text: str) -> str:
    """Returns a sentence with fields in backticks as options.

    ``io_lr`` is --io-lr, ``train.batch`` of an experiment --train.batch.
    """

    def option(found: re.Match[str]) -> str:
        return f"--{found[1]}" if "." in found[1] else option_name(found[1])

    return re.sub(r"`([\w-]+(?:\.[\w-]+)*)`", option, text)
