"""The error of a user's making."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def printable(text: str) -> str:
    """`text` as one line that no terminal acts on: file names may hold anything."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the mend.

    The commands print it on stderr without a traceback and exit with status 2.
    """


def die_of_interrupts() -> None:
    """As most programs do, without a traceback: for the seconds in which a command is imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Ends with what a script's `main` returns; an error of the user's or the disk's is one line.

    The exit status is 2 then.

    The package's own commands, which want JAX, have `covid_flax.command.run_command`.
    """
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(f"error: {printable(where + (e.strerror or str(e)))}", file=sys.stderr)
    sys.exit(2)


def no_command(module: str, instead: str) -> NoReturn:
    """Ends a module that is run as if it were a command, which would else do nothing, with 2."""
    print(f"error: covid_flax.{module} is no command: {instead}", file=sys.stderr)
    sys.exit(2)
