"""SIGTERM: how TPU VMs, preemptible machines and Slurm say that a run's time is up.

While steps are made it is noted, and the loop saves and ends in good order. At any other time, or
the second time, a second later or more, it ends the process at once, as it ends any: there is
nothing that a save could keep, and the process may be in a call that no Python code interrupts.
(Python's handlers wait for such a call, which a thread does not: it looks at the signals.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from covid_flax import distributed

STATUS = 143  # 128 + SIGTERM, as a shell reports one that the signal ended too

# Between two looks at whether a notice has come, where steps are slow. Of the 30 s of grace that
# machines commonly give, most is then left for the save.
LOOK_EVERY_S = 5.0
_APART_S = 1.0  # signals that are two

_noted = False
_interrupted = False


class Terminated(BaseException):
    """Ends the command with `STATUS`; its text is the line to print."""


def notice_interrupts() -> None:
    """From now on an interrupt (Ctrl-C) is remembered as well as raised.

    Python loses an exception that is raised in a callback of its garbage collector, and JAX has
    such a callback.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    # A shell without job control has what it runs in the background ignore interrupts.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)


def heed_interrupt() -> None:
    """Raises KeyboardInterrupt where one has come and was lost."""
    if _interrupted:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: Any) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _note(number: int, frame: Any) -> None:
    global _noted
    _noted = True


def _end_at_the_second(reader: int) -> None:
    """Reads the numbers of signals, which arrive whatever the main thread does.

    Make, srun and others hand on a signal that reaches the process by itself too: what comes at
    once is one.
    """
    first = None
    while numbers := os.read(reader, 64):
        if signal.SIGTERM in numbers:
            first = time.monotonic() if first is None else first
            if time.monotonic() - first > _APART_S:
                os._exit(STATUS)
    os.close(reader)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, the first SIGTERM is only noted; leaving it, one not yet heeded is."""
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python lets nobody handle signals
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_end_at_the_second, args=(reader,), daemon=True).start()
    before = signal.signal(signal.SIGTERM, _note)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        os.close(writer)
        signal.signal(signal.SIGTERM, before)
        noted, _noted = _noted, False
    if noted:
        raise Terminated("SIGTERM: ended; the same command goes on from what was saved")


def noticed(*, together: bool) -> bool:
    """Whether SIGTERM has come, to any process of the run.

    Args:
      together: whether all processes ask here; else the answer is False where there are several,
        for they must end at one and the same step.
    """
    if jax.process_count() == 1:
        return _noted
    return together and distributed.anywhere(_noted)
