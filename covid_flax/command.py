"""What the commands share: flags in, one line and exit status 2 for a user's error."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

# Before JAX and TensorStore load: their C++ logs are not the user's concern.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags, logging

from covid_flax.errors import UserError

_FULL_OR_LOCKED = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "it is read-only: choose another folder",
    errno.EACCES: "check its permissions, or choose another folder",
    errno.EPERM: "check its permissions, or choose another folder",
}


def run_command(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main`, and exits: 0, or 2 for an error the user can mend."""
    logging.set_verbosity(logging.ERROR)
    try:
        extra = flags.FLAGS(sys.argv)[1:]
        if extra:
            raise UserError(f"unknown argument {extra[0]!r}: flags have the form --name=value")
        main()
    except UserError as e:
        _fail(str(e))
    except flags.Error as e:
        _fail(f"{e} (--help lists the flags)")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        line = _disk_error(e)
        if line is None:
            raise
        _fail(line)


def _disk_error(e: BaseException | None) -> str | None:
    """A line for a full or locked disk, however the libraries wrapped it; None for others."""
    while e is not None:
        if isinstance(e, OSError) and e.errno in _FULL_OR_LOCKED:
            where = f"{e.filename}: " if e.filename else ""
            return f"cannot write: {where}{os.strerror(e.errno)}: {_FULL_OR_LOCKED[e.errno]}"
        for number, mend in _FULL_OR_LOCKED.items():
            # TensorStore and ArrayRecord raise ValueError or RuntimeError with the text.
            if os.strerror(number).lower() in str(e).lower():
                return f"cannot write: {' '.join(str(e).split())[:300]}: {mend}"
        e = e.__cause__ or e.__context__
    return None


def _fail(line: str) -> None:
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
