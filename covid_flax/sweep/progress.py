"""What is said while a trial trains: its figures, and the time left of it and of the sweep."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from covid_flax.console import duration, say


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a trial under way says after each epoch.

    Attributes:
      head: its number and name.
      epochs: that it trains at most.
      already: validation records that it had when it was started.
      started: when, by the monotonic clock.
      waiting: trials that come after it.
      usual: seconds that one of those before took, None for the first.
      judge: given the records, whether to stop it; None never does.
    """

    head: str
    epochs: int
    already: int
    started: float
    waiting: int
    usual: float | None
    judge: Callable[[list[dict[str, Any]]], bool] | None

    def tell(self, records: list[dict[str, Any]]) -> bool:
        """Says it; true stops the trial. One that has trained to the end is never stopped."""
        last, passed = records[-1], time.monotonic() - self.started
        rest = max(0, self.epochs - last["epoch"]) * passed / max(1, len(records) - self.already)
        usual = passed + rest if self.usual is None else self.usual
        say(
            f"{self.head} | epoch {last['epoch']}/{self.epochs} | val loss {last['loss']:.4f} "
            f"accuracy {last['accuracy']:.4f} | trial left {duration(rest)} at most | sweep left "
            f"about {duration(rest + self.waiting * usual)}"
        )
        return self.judge is not None and last["epoch"] < self.epochs and self.judge(records)
