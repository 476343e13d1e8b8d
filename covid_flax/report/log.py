"""The figures a run writes while it goes: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax

# tensorboardX loads PyTorch where it is installed, for formats that are not written here.
_hide_torch = "torch" not in sys.modules
if _hide_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import _EventLoggerThread

if _hide_torch:
    del sys.modules["torch"]


class RunLog:
    """Writes a run's figures, in process 0 alone; a context manager.

    Args:
      workdir: the run's folder.
      metrics_bytes: length of `metrics.jsonl` at the checkpoint from which the run goes
        on; what was written after it is dropped, for it will be written again.
      step: of that checkpoint, after which TensorBoard's view is purged likewise.
    """

    def __init__(self, workdir: Path, metrics_bytes: int = 0, step: int = 0):
        self._first = jax.process_index() == 0
        path = workdir / "metrics.jsonl" if self._first else Path(os.devnull)
        if self._first:
            path.touch()
            os.truncate(path, min(metrics_bytes, path.stat().st_size))
        self._file = open(path, "a", encoding="utf-8")
        # TensorBoard's thread writes when it likes: what stops it is told by the next figure.
        self._failed: OSError | None = None
        self._worker: threading.Thread | None = None
        self._excepthook, threading.excepthook = threading.excepthook, self._heed
        try:
            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=step + 1,
                write_to_disk=self._first,
                max_queue=0,  # without a bound: a full one waits for its thread, which may be dead
            )
        except BaseException:
            self._unhook()
            self._file.close()
            raise
        if self._first:
            self._worker = self._tensorboard.file_writer.event_writer._worker

    def __enter__(self) -> RunLog:
        return self

    def _heed(self, args: threading.ExceptHookArgs) -> None:
        ours = args.thread is self._worker or (
            self._worker is None and isinstance(args.thread, _EventLoggerThread)
        )
        if ours and isinstance(args.exc_value, OSError):
            self._failed = args.exc_value
        else:
            self._excepthook(args)

    def _refuse_failed(self) -> None:
        """Where TensorBoard's thread is dead: nobody would write what is handed to it."""
        if self._failed is not None:
            raise self._failed

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._file.close()
            self._refuse_failed()  # before the close, which a disk that has recovered lets pass
            self._tensorboard.close()
            self._refuse_failed()
        except OSError:
            self._abandon()
            if error is None:  # else that one is told, which met the full disk first
                raise
        finally:
            self._unhook()

    def _unhook(self) -> None:
        if threading.excepthook == self._heed:  # else another log, of another thread, came after
            threading.excepthook = self._excepthook

    def _abandon(self) -> None:
        """Else TensorBoard's thread and its handler at exit would each print a traceback."""
        if self._tensorboard.file_writer is None:
            return  # closed
        writer = self._tensorboard.file_writer.event_writer
        if not writer._closed:
            writer._closed = True
            writer._event_queue.cancel_join_thread()
            if writer._worker.is_alive():
                writer._worker.stop()
            with contextlib.suppress(OSError):
                writer._ev_writer._py_recordio_writer._writer.close()

    def epoch(self, step: int, epoch: int, split: str, **figures: float) -> None:
        """One line of `metrics.jsonl`, and the same to TensorBoard."""
        self._refuse_failed()
        line: dict[str, Any] = {"step": step, "epoch": epoch, "split": split, **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        self._tensorboard.flush()

    def interval(self, step: int, **figures: float) -> None:
        """Figures of some steps, to TensorBoard alone."""
        self._refuse_failed()
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"steps/{name}", value, step)

    @property
    def metrics_bytes(self) -> int:
        """Length of `metrics.jsonl`, all of it on disk; 0 in other processes."""
        if self._first:
            os.fsync(self._file.fileno())
        return self._file.tell()
