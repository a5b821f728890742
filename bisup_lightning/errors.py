"""The one exception that a user's mistake raises; `main.py` turns it into one line and exit code 2."""


class UserError(Exception):
    """What the user can mend: the message names the key or the file, and the remedy, in one line."""
