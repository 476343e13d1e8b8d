"""Whole sweeps of the stand-in: what they write, and how they go on."""

import csv
import json

import pytest
from scipy import stats
from small_sweep import FOLDS, calls, plan

from covid_flax.errors import UserError
from covid_flax.sweep.run_all import sweep


def test_a_grid_and_what_it_writes(fake_main, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    saved = sweep(plan(seeds=["0", "1", "2"]), workdir)
    assert len(calls(workdir)) == 9
    best = saved["ranking"][0]
    assert best["settings"] == {"optimizer.learning_rate": 0.5} and best["seeds"] == [0, 1, 2]
    expected = stats.ttest_1samp(best["values"], 0).confidence_interval(0.95)
    assert best["interval"] == pytest.approx([expected.low, expected.high])
    assert best["values"] == pytest.approx([0.85, 0.84, 0.83])
    assert json.loads((workdir / "sweep.json").read_text()) == saved
    with open(workdir / "sweep.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 9 and rows[0]["optimizer.learning_rate"] == "0.1"
    assert float(rows[0]["val_accuracy"]) == pytest.approx(0.03) and rows[8]["seed"] == "2"
    assert (workdir / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "trial 9/9" in out and "95 % interval" in out
    table = out[out.index("optimizer.learning_rate  val_loss") :].splitlines()
    assert [line.split()[1] for line in table[1:4]] == ["0.5", "0.2", "0.1"]
    # Again: nothing is left to train. A folder that is gone is.
    sweep(plan(seeds=["0", "1", "2"]), workdir)
    assert len(calls(workdir)) == 9
    (workdir / saved["trials"][4]["trial"] / "metrics.jsonl").unlink()
    sweep(plan(seeds=["0", "1", "2"]), workdir)
    assert calls(workdir)[9:] == [saved["trials"][4]["trial"]]


def test_folds_are_averaged(fake_main, tmp_path, capsys):
    saved = sweep(plan(fixed=FOLDS), tmp_path / "sweep")
    assert len(saved["ranking"]) == 3
    assert saved["ranking"][0]["folds"] == [0, 1, 2, 3] and len(saved["ranking"][0]["values"]) == 4
    assert "folds" in capsys.readouterr().out.rpartition("95 % interval")[2].splitlines()[0]
    with open(tmp_path / "sweep/sweep.csv", newline="") as f:
        assert [row["fold"] for row in csv.DictReader(f)] == list("0123") * 3


def test_a_sweep_interrupted_in_its_second_trial_goes_on(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "die").write_text("001")
    with pytest.raises(KeyboardInterrupt):
        sweep(plan(), workdir)
    names = [t.name for t in plan().trials]
    assert calls(workdir) == names[:2]
    saved = sweep(plan(), workdir)
    assert calls(workdir) == [*names[:2], *names[1:]]
    assert [t["state"] for t in saved["trials"]] == ["complete"] * 3


def test_an_interrupted_sweep_goes_on(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "die").touch()
    with pytest.raises(KeyboardInterrupt):
        sweep(plan(), workdir)
    names = [t.name for t in plan().trials]
    assert calls(workdir) == names[:1] and not (workdir / "sweep.csv").exists()
    saved = sweep(plan(), workdir)
    assert calls(workdir) == [names[0], *names]
    assert [t["epochs"] for t in saved["trials"]] == [3, 3, 3]
    # The stand-in went on after its first epoch.
    assert len((workdir / names[0] / "metrics.jsonl").read_text().splitlines()) == 6


def test_failed_trials(fake_main, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    sets = ["optimizer.learning_rate=0.1,2"]
    saved = sweep(plan(sets=sets), workdir)
    assert [t["state"] for t in saved["trials"]] == ["complete", "failed"]
    assert saved["trials"][1]["error"] == "the loss is nan: lower optimizer.learning_rate"
    assert "failed: seed 0" in capsys.readouterr().out
    sweep(plan(sets=sets), workdir)
    assert calls(workdir)[2:] == [saved["trials"][1]["trial"]]  # tried again
    with pytest.raises(UserError, match="every trial failed .*: the loss is nan"):
        sweep(plan(sets=["optimizer.learning_rate=2,3"]), tmp_path / "other")
