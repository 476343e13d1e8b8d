"""A profiler's trace of chosen steps, for TensorBoard, XProf or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from covid_flax.console import say


class Profile:
    """Traces the steps `first` to `last` of a run into `workdir/profile`; a context manager.

    Of several processes the first alone traces: they share the folder, and JAX takes the trace
    that it finds there for its own. All stop at the same steps.

    Args:
      workdir: the run's folder.
      steps: first and last step, counted from 1 over the whole run; None traces nothing.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self._folder = workdir / "profile"
        self._first, self._last = steps or (0, 0)
        self._tracing = self._traced = False
        self._step = 0

    def before(self, step: int, due: int) -> int:
        """Called when `step` steps are made and the loop would go on to `due`: where it must
        stop for the trace. Starts the trace where its first step comes next."""
        if step == self._first - 1 and jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = self._traced = True
        for edge in (self._first - 1, self._last):
            if step < edge:
                due = min(due, edge)
        return due

    def after(self, step: int, state: Any) -> None:
        """Called when the loop has asked for `step` steps in all."""
        self._step = step
        if self._tracing and step >= self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False  # even if that fails, it is not to be tried again
        jax.profiler.stop_trace()
        say(f"profile: steps {self._first} to {self._step} traced in {self._folder}")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tracing:
            self._stop()
        elif self._first and not self._traced and exc[0] is None:
            say(f"note: steps {self._first} to {self._last} were not made, so none is traced")
