"""Judge: TensorBoard's own file format, read back record by record."""

import errno
import json
import subprocess
import sys

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from covid_flax.console import duration
from covid_flax.report import log as log_module
from covid_flax.report.log import RunLog


def _records(folder):
    """Those of all event files: length, its checksum, data, its checksum."""
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def _events(folder):
    """The scalars among them."""
    for event in _records(folder):
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value


def _purged_from(folder):
    """Steps from which on a reader is to forget what came before."""
    return [e.step for e in _records(folder) if e.session_log.status == e.session_log.START]


def test_lines_and_events(tmp_path):
    with RunLog(tmp_path) as log:
        log.interval(2, loss=0.75)
        log.epoch(4, 1, "train", loss=0.5, accuracy=0.25)
        log.epoch(4, 1, "val", loss=0.125, accuracy=1.0)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 4, "epoch": 1, "split": "train", "loss": 0.5, "accuracy": 0.25},
        {"step": 4, "epoch": 1, "split": "val", "loss": 0.125, "accuracy": 1.0},
    ]
    assert set(_events(tmp_path / "tensorboard")) == {
        ("steps/loss", 2, 0.75),
        ("train/loss", 4, 0.5),
        ("train/accuracy", 4, 0.25),
        ("val/loss", 4, 0.125),
        ("val/accuracy", 4, 1.0),
    }
    # What a run that begins anew finds there is another's.
    assert _purged_from(tmp_path / "tensorboard") == [1]


def test_what_follows_the_checkpoint_is_dropped(tmp_path):
    with RunLog(tmp_path) as log:
        log.epoch(1, 1, "val", loss=1.0, accuracy=0.0)
        kept = log.metrics_bytes
        log.epoch(2, 2, "val", loss=2.0, accuracy=0.0)
    text = (tmp_path / "metrics.jsonl").read_text()
    with RunLog(tmp_path, metrics_bytes=kept, step=1) as log:
        log.epoch(2, 2, "val", loss=2.0, accuracy=0.0)
    assert (tmp_path / "metrics.jsonl").read_text() == text
    # Step 1's figures are not written again.
    assert _purged_from(tmp_path / "tensorboard")[-1] == 2


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("left over\n")
    with RunLog(tmp_path) as log:
        assert log.metrics_bytes == 0


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("of process 0\n")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with RunLog(tmp_path) as log:
        log.interval(2, loss=0.75)
        log.epoch(4, 1, "train", loss=0.5)
        assert log.metrics_bytes == 0
    assert [p.name for p in tmp_path.rglob("*")] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "of process 0\n"


def test_durations():
    said = [duration(s) for s in (0.04, 9.94, 59.6, 187, 3727)]
    assert said == ["0.0s", "9.9s", "1:00", "3:07", "1:02:07"]


_FILLS_UP = """
import resource, sys
from pathlib import Path
from covid_flax.report.log import RunLog
try:
    with RunLog(Path(sys.argv[1])) as log:
        log.epoch(4, 1, "train", loss=0.5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        for step in range(100):
            log.epoch(step, 1, "val", loss=0.125)
except OSError as e:
    print(type(e).__name__, e.errno)
"""


_FILLS_UP_BETWEEN = """
import resource, sys
from pathlib import Path
from covid_flax.report import log as module
try:
    with module.RunLog(Path(sys.argv[1])) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        module.FLUSH_EVERY_S = -1.0 if sys.argv[2] == "at once" else 30.0
        log.interval(1, loss=0.5)
        print("not written yet")
except OSError as e:
    print(type(e).__name__, e.errno)
"""


@pytest.mark.parametrize(("when", "said"), [("at once", ""), ("at the end", "not written yet\n")])
def test_a_disk_that_only_tensorboard_met_is_told(tmp_path, when, said):
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_UP_BETWEEN, tmp_path, when],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == f"{said}OSError {errno.EFBIG}\n"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_figures_within_an_epoch_can_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "FLUSH_EVERY_S", 0.0)
    with RunLog(tmp_path) as log:
        log.interval(2, loss=0.75)
        assert set(_events(tmp_path / "tensorboard")) == {("steps/loss", 2, 0.75)}


def test_a_checkpoint_loses_no_figures_before_it(tmp_path):
    """Those of steps that a killed run has saved are not written again."""
    with RunLog(tmp_path) as log:
        log.interval(2, loss=0.75)
        assert log.metrics_bytes == 0
        assert set(_events(tmp_path / "tensorboard")) == {("steps/loss", 2, 0.75)}


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(NotADirectoryError):
        RunLog(tmp_path)
    assert (tmp_path / "tensorboard").read_text() == "mine"


def test_one_second_holds_two_logs(tmp_path):
    """A run that is interrupted and goes on at once."""
    for step in (0, 2):
        with RunLog(tmp_path, step=step) as log:
            log.epoch(step + 1, 1, "val", loss=0.5)
    assert _purged_from(tmp_path / "tensorboard") == [1, 3]
    assert {x[1] for x in _events(tmp_path / "tensorboard")} == {1, 3}


def test_a_full_disk_is_told_once(tmp_path):
    """No traceback beside it, nor at the process's exit."""
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_UP, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.split() == ["OSError", str(errno.EFBIG)]
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
