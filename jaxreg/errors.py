"""The exception that a user is meant to read, and names that are nearly right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A sentence: what was got, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2. Every other
    exception is a defect of jaxreg and shows its traceback.
    """


def near_match(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" where a known name is like this one, else ""."""
    near = difflib.get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""
