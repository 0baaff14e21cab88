"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A sentence: what was got, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2. Every other
    exception is a defect of jaxreg and shows its traceback.
    """
