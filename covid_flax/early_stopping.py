"""When to stop training, by the rule of keras.callbacks.EarlyStopping (Keras 3.15)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from covid_flax.errors import UserError


@dataclasses.dataclass
class EarlyStopping:
    """Watches one value an epoch; after each, `update` says whether it is the best so far.

    Keras's rule, to the detail:

    * The first epoch is always the best so far, even with a NaN; a NaN best is never improved on.
    * An improvement is a value below best - min_delta (mode "max": above best + min_delta). Keras
      compares in float32, so values that differ by less than float32 resolves are ties, and ties
      are no improvement.
    * `should_stop` turns true on the patience-th epoch in a row without an improvement. In Keras
      patience 0 means the same as 1.
    * Epochs up to `start_from_epoch` do not count beside those after it: the first of these is the
      best so far whatever its value. (Keras keeps no best before; here the best of them stands in.)

    Attributes:
      mode: "min" or "max", the good direction of the value.
      patience: epochs without improvement until the stop, 1 or more; None never stops, and the
        best epoch is still kept. The config's `train.patience = 0` means None.
      min_delta: the smallest change that counts, absolute.
      start_from_epoch: epochs that are waited for before the judging begins.
      epoch: epochs seen.
      best, best_epoch: the best value and the number of its epoch, counted from 1; None and 0
        before the first epoch.
      wait: epochs since the best.

    Raises:
      UserError: mode, patience or min_delta is none of these.
    """

    mode: str = "min"
    patience: int | None = None
    min_delta: float = 0.0
    start_from_epoch: int = 0
    epoch: int = 0
    best: float | None = None
    best_epoch: int = 0
    wait: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise UserError(f"early stopping's mode must be min or max, got {self.mode!r}")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"patience must be at least 1 epoch or None, got {self.patience}")
        if not math.isfinite(self.min_delta):
            raise UserError(f"min_delta must be a finite number, got {self.min_delta}")

    def update(self, value: float) -> bool:
        """Takes the next epoch's value; true if it is the best so far."""
        value = float(value)
        self.epoch += 1
        begins = self.best_epoch <= self.start_from_epoch < self.epoch
        if self.best is None or begins or self._improves(value, self.best):
            self.best, self.best_epoch, self.wait = value, self.epoch, 0
            return True
        if self.epoch > self.start_from_epoch:
            self.wait += 1
        return False

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.wait >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Settings and progress for JSON; floats as text, which is exact and can hold NaN."""
        state = dataclasses.asdict(self)
        state["min_delta"] = repr(float(self.min_delta))
        state["best"] = None if self.best is None else repr(self.best)
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EarlyStopping:
        """What `state_dict` was called on. For other settings: `dataclasses.replace`."""
        best = state["best"]
        floats = {
            "min_delta": float(state["min_delta"]),
            "best": None if best is None else float(best),
        }
        return cls(**(state | floats))

    def _improves(self, value: float, best: float) -> bool:
        delta = abs(self.min_delta)
        with np.errstate(over="ignore"):  # beyond float32 is infinity, as in Keras
            if self.mode == "min":
                return bool(np.float32(value + delta) < np.float32(best))
            return bool(np.float32(value - delta) > np.float32(best))


def best_epoch(
    figures: Mapping[int, float],
    monitor: str,
    *,
    min_delta: float = 0.0,
    start_from_epoch: int = 0,
) -> int:
    """The epoch that a training keeps as its best; 0 of none.

    Args:
      figures: of the validation, by epoch, counted from 1; some may be missing.
      monitor: which figure it is, as `train.monitor` names it.
      min_delta, start_from_epoch: see `EarlyStopping`.
    """
    mode = "min" if monitor == "val_loss" else "max"
    stopping = EarlyStopping(mode, None, min_delta, start_from_epoch)
    for epoch in sorted(figures):
        stopping.epoch = epoch - 1
        stopping.update(figures[epoch])
    return stopping.best_epoch
