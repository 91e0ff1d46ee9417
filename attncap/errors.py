"""Errors for the user: one clear line, no traceback."""


class UserError(Exception):
    """The work failed for a reason that the user can fix. Commands print it and exit with status 1."""

    status = 1


class CallError(UserError):
    """The call was wrong: a flag, an argument, a name, a path. Commands print it and exit with status 2."""

    status = 2
