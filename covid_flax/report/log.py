"""The figures a run writes while it goes: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax

# tensorboardX loads PyTorch where it is installed, for formats that are not written here.
_hide_torch = "torch" not in sys.modules
if _hide_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

if _hide_torch:
    del sys.modules["torch"]

# Within an epoch, figures go to the disk with the first that comes so much after the last that did.
FLUSH_EVERY_S = 30.0


class RunLog:
    """Writes a run's figures, in process 0 alone; a context manager.

    Args:
      workdir: the run's folder.
      metrics_bytes: length of `metrics.jsonl` at the checkpoint from which the run goes
        on; what was written after it is dropped, for it will be written again.
      step: of that checkpoint, after which TensorBoard's view is purged likewise.

    Raises:
      OSError: the disk is full or fails; the context's end raises it of what was still to be
        written, unless another error is under way.
    """

    def __init__(self, workdir: Path, metrics_bytes: int = 0, step: int = 0):
        first = jax.process_index() == 0
        path = workdir / "metrics.jsonl" if first else Path(os.devnull)
        if first:
            path.touch()
            os.truncate(path, min(metrics_bytes, path.stat().st_size))
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(open(path, "a", encoding="utf-8"))
            # Without tensorboardX's own writer, whose thread and queue outlive a disk that fails.
            self._events = _Events(workdir / "tensorboard", step + 1) if first else None
            if self._events is not None:
                opened.callback(self._events.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._opened.close()
        except OSError:
            if error is None:  # else that one is told, which met the full disk first
                raise

    def epoch(self, step: int, epoch: int, split: str, **figures: float) -> None:
        """One line of `metrics.jsonl`, and the same to TensorBoard."""
        line: dict[str, Any] = {"step": step, "epoch": epoch, "split": split, **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(split, step, figures)

    def interval(self, step: int, **figures: float) -> None:
        """Figures of some steps, to TensorBoard alone."""
        if self._events is not None:
            self._events.scalars("steps", step, figures)

    @property
    def metrics_bytes(self) -> int:
        """Length of `metrics.jsonl`, all of it on disk as are the events; 0 in other processes."""
        if self._events is not None:
            os.fsync(self._file.fileno())
            self._events.flush()
        return self._file.tell()


class _Events:
    """A file of TensorBoard's events; of an older file's, those from `first_step` on are void."""

    def __init__(self, folder: Path, first_step: int):
        if not folder.exists():
            folder.mkdir()
        when = f"{time.time():.0f}"
        name = f"events.out.tfevents.{when}.{socket.gethostname()}.{os.getpid()}.{first_step}"
        self._records = RecordWriter(str(folder / name))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def _write(self, **what: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **what).SerializeToString())

    def scalars(self, prefix: str, step: int, figures: dict[str, float]) -> None:
        values = [Summary.Value(tag=f"{prefix}/{k}", simple_value=v) for k, v in figures.items()]
        self._write(step=step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()
