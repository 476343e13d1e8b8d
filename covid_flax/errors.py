"""The error of a user's making."""


def printable(text: str) -> str:
    """`text` as one line that no terminal acts on: file names may hold anything."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the mend.

    The commands print it on stderr without a traceback and exit with status 2.
    """
