"""One device and eight give the same run, under jit and pmap (devices faked by XLA)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

_PROGRAM = """
import json, sys
from pathlib import Path
import jax
from absl import logging
from covid_flax import config as config_lib
from covid_flax.evaluate import evaluate
from covid_flax.run import setup
from covid_flax.train import train

logging.set_verbosity(logging.ERROR)
saved, workdir, devices = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
assert jax.device_count() == devices
train(setup(config_lib.from_json(saved), workdir))
evaluate(workdir)
"""


def _run(config, workdir, devices):
    env = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    args = [json.dumps(json.loads(config.to_json())), str(workdir), str(devices)]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *args], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((workdir / "eval" / "val" / "report.json").read_text())
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return report, np.array([x["loss"] for x in lines])


@pytest.fixture
def config(tiny_config):
    # 60 training images: 3 batches of 16, then 12 of which 8 devices can share 8 and one all.
    tiny_config.train.last_batch = "drop"
    tiny_config.train.epochs = 2
    tiny_config.optimizer.epsilon = 1e-2  # Adam's first steps are signs, which rounding flips
    tiny_config.model.dropout = 0.0  # under pmap each device draws its own
    return tiny_config


@pytest.fixture
def one(config, tmp_path):
    return _run(config, tmp_path / "one", 1)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_eight_devices_give_the_losses_of_one(config, one, parallel, tmp_path):
    config.train.parallel = parallel
    report, losses = _run(config, tmp_path / "eight", 8)
    np.testing.assert_allclose(losses, one[1], rtol=2e-3)
    assert report["num_examples"] == one[0]["num_examples"] == 20
    np.testing.assert_allclose(report["loss"], one[0]["loss"], rtol=2e-3)


def test_a_checkpoint_of_eight_devices_is_evaluated_on_one(config, tmp_path):
    workdir = tmp_path / "run"
    config.train.batch_size = 16
    config.train.last_batch = "drop"
    config.train.epochs = 1
    eight, _ = _run(config, workdir, 8)
    one, _ = _run(config, workdir, 1)  # complete: nothing to train, evaluated anew
    np.testing.assert_allclose(one["loss"], eight["loss"], rtol=1e-5)
    assert one["confusion_matrix"] == eight["confusion_matrix"]
