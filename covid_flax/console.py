"""What a run says on the console while it goes: one dense line for some steps, one an epoch."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax

from covid_flax import STARTED


def say(line: str) -> None:
    """A line on the console, from one process alone."""
    if jax.process_index() == 0:
        print(line, flush=True)


def duration(seconds: float) -> str:
    """`4.2s`, `3:07` or `1:02:07`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_memory() -> float:
    """Most bytes held so far: of a device's memory where it tells, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Meter:
    """Clocks and console lines of the training loop.

    Args:
      epochs, steps_per_epoch: of the whole run.
      step: from which this process goes on.
      clocks: of a checkpoint: `elapsed`, seconds of the run; `epoch_seconds` and
        `epoch_examples`, of the timed steps of the epoch under way.
      peak_rate: images a second at which all devices would do nothing but the network's
        arithmetic at their peak; 0 where that is not known.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        step: int,
        clocks: Mapping[str, float],
        peak_rate: float = 0.0,
    ):
        self.epochs, self.steps_per_epoch, self.peak_rate = epochs, steps_per_epoch, peak_rate
        self.last_step, self.first = step, True
        self.started = self.last = time.monotonic()
        self.elapsed_before = clocks["elapsed"]
        self.epoch_seconds = self.epoch_seconds_before = clocks["epoch_seconds"]
        self.epoch_examples = clocks["epoch_examples"]
        self.step_seconds, self.timed_steps = 0.0, 0
        self.waited = self.epoch_waited = 0.0
        self.rate, self.untimed_examples, self.untimed_steps = 0.0, 0, 0

    @property
    def clocks(self) -> dict[str, float]:
        elapsed = self.elapsed_before + time.monotonic() - self.started
        return {
            "elapsed": elapsed,
            "epoch_seconds": self.epoch_seconds,
            "epoch_examples": self.epoch_examples,
        }

    @contextlib.contextmanager
    def compiling(self, examples: int, steps: int = 1) -> Iterator[None]:
        """Leaves steps over so many examples, which compile, out of the rates."""
        started = time.monotonic()
        yield
        if not self.first:
            self.last += time.monotonic() - started
            self.untimed_examples += examples
            self.untimed_steps += steps

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which the loop waits for its next batch."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def interval(
        self, step: int, count: float, loss: float, accuracy: float, learning_rate: float
    ) -> dict[str, float]:
        """Prints the steps since the last call, `count` examples; returns what it printed."""
        now = time.monotonic()
        seconds, steps = now - self.last, step - self.last_step
        waited, self.waited = self.waited, 0.0
        self.epoch_waited += 0.0 if self.first else waited
        self.last, self.last_step = now, step
        figures = {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
        if self.first:
            # The first step's time is the compiler's: it is in no rate but its own.
            self.first, self.rate = False, count / seconds
            say(
                f"first step after {duration(seconds)}, {duration(now - STARTED)} from the "
                f"command: loss {loss:.4f}"
            )
            return figures
        self.epoch_seconds += seconds
        steps, self.untimed_steps = steps - self.untimed_steps, 0
        # Not below 0: examples whose update was skipped are in no count.
        count, self.untimed_examples = max(0.0, count - self.untimed_examples), 0
        self.epoch_examples += count
        self.step_seconds += seconds
        self.timed_steps += steps
        if count:
            self.rate = count / seconds
        figures |= {
            "images_per_second": self.rate,
            "waiting": min(1.0, waited / seconds) if seconds > 0 else 0.0,
            "memory_gb": peak_memory() / 1e9,
        }
        mfu = ""
        if self.peak_rate:
            figures["mfu"] = self.rate / self.peak_rate
            mfu = f" | MFU {figures['mfu']:.1%}"
        step_seconds = self.step_seconds / max(1, self.timed_steps)
        left = (self.epochs * self.steps_per_epoch - step) * step_seconds
        epoch = (step - 1) // self.steps_per_epoch
        done = step / self.steps_per_epoch - epoch
        say(
            f"epoch {epoch + 1}/{self.epochs} {done:4.0%} | step {step:,} | loss {loss:.4f} | "
            f"accuracy {accuracy:.4f} | lr {learning_rate:.2e} | {self.rate:,.1f} images/s | "
            f"waiting {figures['waiting']:.1%} | {figures['memory_gb']:.1f} GB{mfu} | "
            f"left {duration(left)}"
        )
        return figures

    @property
    def epoch_rate(self) -> float:
        """Images a second of the epoch that ends, evaluation left out."""
        return self.epoch_examples / self.epoch_seconds if self.epoch_examples else self.rate

    @property
    def epoch_waiting(self) -> float:
        """Share of those seconds, since it was last resumed, in which this process waited."""
        seconds = self.epoch_seconds - self.epoch_seconds_before
        return min(1.0, self.epoch_waited / seconds) if seconds else 0.0

    def end_epoch(
        self,
        epoch: int,
        train: Sequence[float],
        val: Sequence[float],
        verdict: str,
    ) -> None:
        """Prints the epoch's (loss, accuracy) pairs; what came between stays out of the rates."""
        say(
            f"epoch {epoch}/{self.epochs} done | train loss {train[0]:.4f} accuracy "
            f"{train[1]:.4f} | val loss {val[0]:.4f} accuracy {val[1]:.4f} | {verdict} | "
            f"{duration(self.clocks['elapsed'])}"
        )
        self.epoch_seconds = self.epoch_seconds_before = self.epoch_examples = 0.0
        self.waited = self.epoch_waited = 0.0
        self.last = time.monotonic()
