"""Errors meant for the person at the keyboard: one clear line, no traceback."""


class UserError(Exception):
    """The work failed for a reason the user can mend. Commands print it and exit with status 1."""

    status = 1


class CallError(UserError):
    """The call itself was wrong (a flag, a name, a path). Commands print it and exit with status 2."""

    status = 2
