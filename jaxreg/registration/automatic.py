"""The model where none is named: published weights that are there, else none."""

import dataclasses
import os
import pathlib
from typing import Any

from jaxreg.data import modality
from jaxreg.errors import UserError
from jaxreg.registration.options import AUTO, Options, settled
from jaxreg.weights import download, zoo


@dataclasses.dataclass(frozen=True)
class Choice:
    """What registers where no model is named.

    Attributes:
      model: a name of the zoo, whose weights are there; None for no network.
      why: one line for the user.
    """

    model: str | None
    why: str


def named(
    model: Any, options: Options, *, across: bool | None = None
) -> tuple[Any, str]:
    """Returns the model that a word stands for, and why it is the one.

    Args:
      model: "auto", see `choose`; "none"; any other is the model itself.
      options: how to register.
      across: see `choose`.

    Returns:
      The model, None for no network; and one line, empty where it was named.

    Raises:
      UserError: see `choose`.
    """
    word = os.fspath(model).lower() if isinstance(model, str | os.PathLike) else ""
    if word == "none" or (word == AUTO and options.io_target == "displacement"):
        return None, ""
    if word != AUTO:
        return model, ""
    choice = choose(options, across=across)
    return choice.model, choice.why


def choose(
    options: Options,
    *,
    across: bool | None = None,
    folder: pathlib.Path | None = None,
) -> Choice:
    """Returns the published network whose weights are in the cache, or none.

    Of those that know the scans, uniGradICON first; multiGradICON where contrasts
    differ. Nothing is fetched.

    Args:
      options: how to register.
      across: whether contrasts differ; by the options' modalities if None.
      folder: of fetched weights, the user's if None.

    Raises:
      UserError: the options need a network, and there is none.
    """
    folder = download.cache_folder(folder)
    if across is None:
        across = not modality.same_contrast(
            options.fixed_modality, options.moving_modality
        )
    fitting = [name for name, card in zoo.ZOO.items() if card.across or not across]
    found = [name for name in fitting if download.is_cached(name, folder)]
    if found:
        return Choice(found[0], f"{found[0]}, whose weights are in {folder}")
    scans = "scans of two contrasts" if across else "such scans"
    lacking = f"no published weights for {scans} in {folder}"
    needing = _needing_network(options)
    if needing:
        raise UserError(
            f"`{needing}` is for a network, and there are {lacking}; name one with "
            f"`model` ({' or '.join(fitting)} is fetched then, or give a path), or "
            f"leave `{needing}` out"
        )
    return Choice(None, f"no network, as there are {lacking}: {_without(options)}")


def _needing_network(options: Options) -> str:
    """Returns an option that says nothing without a network, or no text."""
    if options.io_target == "network":
        return "io_target"
    default = Options()
    names = (
        "task", "pairing", "smoothness", "level_iterations", "stored_orientation",
    )  # fmt: skip
    asked = (n for n in names if getattr(options, n) != getattr(default, n))
    return next(asked, "")


def _without(options: Options) -> str:
    """Says what is done without a network."""
    done = settled(options, network=False)
    first = "" if done.prealign == "none" else f"{done.prealign} pre-alignment"
    steps = (
        ""
        if done.io_iterations is None
        else f"{done.io_target} by its own optimisation"
    )
    return ", then ".join(filter(None, (first, steps)))
