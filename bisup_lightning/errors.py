"""The one exception that a user's mistake raises; `main.py` turns it into one line and exit code 2."""


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """What the user can mend: the message names the key or the file, and the remedy, in one line."""
