"""SIGTERM: how TPU VMs, preemptible machines and Slurm say that a run's time is up.

While steps are made it is only noted; the loop then saves and ends in good order. At any other
time the command ends at once, for nothing would be lost that a save could keep. A second SIGTERM
ends it at once in either case.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

STATUS = 143  # 128 + SIGTERM, as a shell reports it

# Between two looks at whether a notice has come, where steps are slow. Of the 30 s of grace that
# machines commonly give, most is then left for the save.
LOOK_EVERY_S = 5.0

_LINE = "SIGTERM: ended; the same command goes on from what was saved"
_noted = False
_deferred = False


class Terminated(BaseException):
    """Ends the command with `STATUS`; its text is the line to print."""


def catch() -> None:
    """From here on SIGTERM raises `Terminated`, or is noted within `deferred`."""
    global _noted
    _noted = False
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: Any) -> None:
    global _noted
    if _deferred and not _noted:
        _noted = True
        return
    raise Terminated(_LINE)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, SIGTERM is only noted; leaving it, a note that nobody heeded ends the command."""
    global _deferred, _noted
    _deferred = True
    try:
        yield
    finally:
        _deferred, noted, _noted = False, _noted, False
    if noted:
        raise Terminated(_LINE)


def noticed(*, together: bool) -> bool:
    """Whether SIGTERM has come, to any process of the run.

    Args:
      together: whether all processes ask here; else the answer is False where there are several,
        for they must end at one and the same step.
    """
    if jax.process_count() == 1:
        return _noted
    if not together:
        return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(_noted))))
