"""What the verbs of the command line share: options, shapes, printed numbers."""

from collections.abc import Mapping
from typing import Any

import typer

from jaxreg.errors import UserError


def option(name: str, text: str, panel: str | None = None, **settings) -> Any:
    """Returns a long option with its line of help, in a panel of the help page."""
    return typer.Option(name, help=text, rich_help_panel=panel, **settings)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Returns (D, H, W) of "D,H,W".

    Raises:
      UserError: these are not three positive numbers.
    """
    try:
        d, h, w = (int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        raise UserError(
            f"--shape is {text}, expected three whole numbers such as 175,175,175"
        ) from None
    if min(d, h, w) < 1:
        raise UserError(
            f"--shape is {text}, expected positive numbers such as 175,175,175"
        )
    return d, h, w


def print_numbers(numbers: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value}")
