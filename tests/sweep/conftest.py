"""The trials are a stand-in's: quick, with figures that are known beforehand."""

import sys

import pytest

from covid_flax.sweep import process

# As much of covid_flax.main as the sweep sees. A higher rate is better, a seed shifts it a little;
# it goes on after the epochs that its metrics.jsonl has.
FAKE = """
import json, os, pathlib, sys, time
args = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(args["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir.parent / "calls", "a") as f:
    f.write(workdir.name + "\\n")
rate, seed = float(args["config.optimizer.learning_rate"]), int(args["config.seed"])
if rate > 1:
    print("noise\\nerror: the loss is nan: lower optimizer.learning_rate", file=sys.stderr)
    sys.exit(2)
path = workdir / "metrics.jsonl"
done = len(path.read_text().splitlines()) // 2 if path.exists() else 0
stop = workdir.parent / "die"
for epoch in range(done + 1, int(args.get("config.train.epochs", 3)) + 1):
    accuracy = rate * epoch / 10 + seed / 100
    with open(path, "a") as f:
        for split in ("train", "val"):
            line = {"step": epoch, "epoch": epoch, "split": split, "loss": 1 - accuracy,
                    "accuracy": accuracy}
            f.write(json.dumps(line) + "\\n")
    if stop.exists() and workdir.name.startswith(stop.read_text()):
        stop.unlink()
        sys.exit(130)
    time.sleep(float(args.get("config.optimizer.weight_decay", 0)))
"""


@pytest.fixture
def fake_main(tmp_path, monkeypatch):
    path = tmp_path / "fake_main.py"
    path.write_text(FAKE)
    monkeypatch.setattr(process, "MAIN", (sys.executable, str(path)))
    monkeypatch.setattr(process, "_POLL_SECONDS", 0.05)
