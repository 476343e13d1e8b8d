"""The command: its refusals, and a grid of real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from covid_flax.sweep.validation import read_val

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "sweep.py"


def command(*args):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--config=configs/quickstart.py", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("--set=train.label_smooting=0", ["label_smooting", "train.label_smoothing"]),
        pytest.param("--config.train.epoch=3", ["epoch", "epochs"], marks=pytest.mark.slow),
    ],
)
def test_the_command_refuses_in_one_line(bad, words, tmp_path):
    done = command(f"--workdir={tmp_path / 'sweep'}", "--set=model.dropout=0,0.1", bad)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_grid_of_two_real_runs(tmp_path, phantom_dir, cache_dir):
    workdir = tmp_path / "sweep"
    done = command(
        f"--workdir={workdir}",
        "--set=optimizer.learning_rate=1e-3,3e-3",
        f"--config.data.dir={phantom_dir}",
        f"--config.data.cache_dir={cache_dir}",
        "--config.data.image_size=32",
        "--config.model.name=lenet5",
        "--config.train.epochs=2",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((workdir / "sweep.json").read_text())
    for trial in saved["trials"]:
        about = json.loads((workdir / trial["trial"] / "config.json").read_text())["config"]
        rate = trial["settings"]["optimizer.learning_rate"]
        assert about["optimizer"]["learning_rate"] == rate and about["train"]["epochs"] == 2
        assert trial["state"] == "complete" and trial["epochs"] == 2
        records = read_val(workdir / trial["trial"] / "metrics.jsonl")
        assert trial["val_loss"] == records[trial["best_epoch"] - 1]["loss"]
        # That of the checkpoint which the run keeps as its best, and has scored.
        report = json.loads((workdir / trial["trial"] / "eval/val/report.json").read_text())
        assert trial["val_loss"] == pytest.approx(report["loss"], rel=1e-5)
    assert (workdir / "sweep.png").exists() and (workdir / "sweep.csv").exists()
    done = command(f"--workdir={workdir}", "--set=optimizer.learning_rate=1e-3,1e-2")
    assert done.returncode == 2 and "another sweep" in done.stderr, done.stderr
