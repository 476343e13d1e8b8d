"""One device and four give the same run, under jit and pmap (devices faked by XLA)."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from covid_flax.checkpoint import Checkpoints
from covid_flax.mesh import make_layout
from covid_flax.models import STAGES, create_model
from covid_flax.optimizer import make_optimizer
from covid_flax.step import create_state

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
    """Three steps whose updates are near to the gradients themselves.

    Longer runs part: batch norm over few images turns rounding into visible differences.
    Adam's usual epsilon would hide a gradient that is off by the number of devices.
    """
    tiny_config.train.last_batch = "drop"  # 60 images: 3 batches of 16
    tiny_config.train.epochs = 1
    tiny_config.optimizer.epsilon = 1.0
    tiny_config.optimizer.learning_rate = 0.01
    tiny_config.model.dropout = 0.0  # under pmap each device draws its own
    return tiny_config


def _update(config, workdir):
    """How far training moved the parameters, as one vector."""
    _, before, batch_stats = create_model(config.model, 4, config.seed)
    tx = make_optimizer(config.optimizer, lambda _: 0.0)
    state = create_state(before, batch_stats, frozenset(STAGES), tx, config.seed)
    with Checkpoints(workdir / "checkpoints") as c:
        state, _ = c.load(c.latest_step, make_layout("jit").put_state(state))
    moved = jax.tree.map(lambda a, b: np.ravel(a) - np.ravel(b), state.params, before)
    return np.concatenate(jax.tree.leaves(moved))


def test_four_devices_give_the_run_of_one(config, tmp_path):
    """Under jit and pmap; and a checkpoint of four is evaluated on one."""
    one, losses = _run(config, tmp_path / "one", 1)
    update = _update(config, tmp_path / "one")
    for parallel in ("jit", "pmap"):
        config.train.parallel = parallel
        workdir = tmp_path / parallel
        four, losses_of_four = _run(config, workdir, 4)
        np.testing.assert_allclose(losses_of_four, losses, rtol=1e-4)
        assert four["num_examples"] == one["num_examples"] == 20
        np.testing.assert_allclose(four["loss"], one["loss"], rtol=1e-3)
        difference = _update(config, workdir) - update
        assert 0 < np.linalg.norm(difference) < 0.01 * np.linalg.norm(update)

    again, _ = _run(config, workdir, 1)  # complete: nothing to train, evaluated anew
    np.testing.assert_allclose(again["loss"], four["loss"], rtol=1e-5)
    assert again["confusion_matrix"] == four["confusion_matrix"]
