"""The error of a user's making."""


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the mend.

    The commands print it on stderr without a traceback and exit with status 2.
    """
