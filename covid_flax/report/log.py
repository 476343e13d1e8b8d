"""The figures a run writes while it goes: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class RunLog:
    """Writes a run's figures; a context manager.

    Args:
      workdir: the run's folder.
      metrics_bytes: length of `metrics.jsonl` at the checkpoint from which the run goes
        on; what was written after it is dropped, for it will be written again.
      step: of that checkpoint, from which TensorBoard's view is purged likewise.
    """

    def __init__(self, workdir: Path, metrics_bytes: int = 0, step: int = 0):
        path = workdir / "metrics.jsonl"
        path.touch()
        os.truncate(path, min(metrics_bytes, path.stat().st_size))
        self._file = open(path, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._tensorboard.close()

    def epoch(self, step: int, epoch: int, split: str, **figures: float) -> None:
        """One line of `metrics.jsonl`, and the same to TensorBoard."""
        line: dict[str, Any] = {"step": step, "epoch": epoch, "split": split, **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        self._tensorboard.flush()

    def interval(self, step: int, **figures: float) -> None:
        """Figures of some steps, to TensorBoard alone."""
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"steps/{name}", value, step)

    @property
    def metrics_bytes(self) -> int:
        """Length of `metrics.jsonl`, all of it on disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()
