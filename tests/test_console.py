"""Judge: a clock that is set by hand."""

import pytest

from covid_flax import console
from covid_flax.console import Meter

NEW = {"elapsed": 0.0, "epoch_seconds": 0.0, "epoch_examples": 0.0}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def _interval(meter, step, count):
    return meter.interval(step, count, 0.5, 0.5, 1e-3)


def test_rates_leave_compilation_and_evaluation_out(clock, capsys):
    meter = Meter(epochs=2, steps_per_epoch=5, step=0, clocks=NEW)
    with meter.compiling(10):
        clock[0] += 30.0  # the first step compiles
    assert "images_per_second" not in _interval(meter, 1, 10)
    assert "first step after 0:30" in capsys.readouterr().out
    clock[0] += 6.0
    assert _interval(meter, 4, 30)["images_per_second"] == pytest.approx(5.0)
    with meter.compiling(3):
        clock[0] += 20.0  # so does the short last one
    figures = _interval(meter, 5, 3)
    assert figures["images_per_second"] == pytest.approx(5.0)
    assert meter.epoch_rate == pytest.approx(5.0)
    clock[0] += 100.0  # evaluation
    meter.end_epoch(1, (0.5, 0.5), (0.5, 0.5), "best so far")
    clock[0] += 4.0
    assert _interval(meter, 7, 20)["images_per_second"] == pytest.approx(5.0)
    assert "left 6.0s" in capsys.readouterr().out  # three steps at two seconds
    assert meter.clocks == {"elapsed": 160.0, "epoch_seconds": 4.0, "epoch_examples": 20.0}


def test_clocks_go_on_after_a_resume(clock):
    clocks = {"elapsed": 50.0, "epoch_seconds": 6.0, "epoch_examples": 60.0}
    meter = Meter(epochs=1, steps_per_epoch=9, step=4, clocks=clocks)
    with meter.compiling(10):
        clock[0] += 7.0
    _interval(meter, 5, 10)
    with meter.waiting():
        clock[0] += 1.0
    clock[0] += 3.0
    _interval(meter, 9, 40)
    assert meter.epoch_rate == pytest.approx(10.0)
    assert meter.epoch_waiting == pytest.approx(0.25)  # of what this process has seen
    assert meter.clocks["elapsed"] == pytest.approx(61.0)


def test_an_epoch_of_compiling_steps_alone(clock):
    meter = Meter(epochs=3, steps_per_epoch=2, step=0, clocks=NEW)
    for step, count in ((1, 16), (2, 5)):
        with meter.compiling(count):
            clock[0] += 4.0
        _interval(meter, step, count)
    assert meter.epoch_rate == pytest.approx(4.0)  # the first step's own


def test_the_line_tells_waiting_memory_and_mfu(clock, capsys, monkeypatch):
    monkeypatch.setattr(console, "peak_memory", lambda: 3.2e9)
    meter = Meter(epochs=1, steps_per_epoch=9, step=0, clocks=NEW, peak_rate=50.0)
    with meter.compiling(10):
        clock[0] += 7.0
    _interval(meter, 1, 10)
    for _ in range(2):
        with meter.waiting():
            clock[0] += 0.5
        clock[0] += 1.5
    figures = _interval(meter, 3, 20)
    assert figures["waiting"] == pytest.approx(0.25)
    assert figures["mfu"] == pytest.approx(0.1)  # 5 images a second of 50
    assert figures["memory_gb"] == pytest.approx(3.2)
    out = capsys.readouterr().out
    assert "waiting 25.0% | 3.2 GB | MFU 10.0%" in out
    clock[0] += 4.0
    assert _interval(meter, 5, 20)["waiting"] == 0.0


def test_peak_memory_is_at_least_what_the_process_holds():
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * 4096
    assert 0.9 * resident <= console.peak_memory() < 1e12


def test_lines_name_the_epoch_and_the_split(clock, capsys):
    meter = Meter(epochs=2, steps_per_epoch=5, step=0, clocks=NEW)
    for step in (1, 5, 7, 10):
        clock[0] += 2.0
        _interval(meter, step, 10)
    out = capsys.readouterr().out
    for said in ("1/2 100% | step 5 |", "2/2  40% | step 7 |", "2/2 100% | step 10 |"):
        assert f"epoch {said}" in out
    meter.end_epoch(2, (0.4, 0.9), (0.7, 0.8), "best so far")
    assert (
        "epoch 2/2 done | train loss 0.4000 accuracy 0.9000 | val loss 0.7000 accuracy 0.8000 | "
        "best so far | 8.0s"
    ) in capsys.readouterr().out
