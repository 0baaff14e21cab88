"""The exception that a user is meant to read, and names that are nearly right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A sentence: what was got, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2. Every other
    exception is a defect of jaxreg and shows its traceback.
    """


def near_match(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X or Y?)" of known names like this one, else ""."""
    near = difflib.get_close_matches(name.lower(), list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
