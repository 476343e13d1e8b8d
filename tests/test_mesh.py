"""One device and several give the same run, however they are laid out (devices faked by XLA)."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_update import update
from small_resnet import with_batch_norm

from covid_flax.mesh import AXIS, sharded

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
devices, *runs = json.loads(sys.argv[1])
assert jax.device_count() == devices
for saved, workdir in runs:
    train(setup(config_lib.from_json(saved), Path(workdir)))
    if ", on" not in workdir:
        evaluate(Path(workdir))
"""


def _run(devices, *runs):
    """Trains runs, (config, workdir) each, in a process of so many devices.

    And evaluates those that do not go on from another's checkpoint.
    """
    env = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    argument = json.dumps([devices, *((json.loads(c.to_json()), str(w)) for c, w in runs)])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, argument], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _results(workdir):
    report = json.loads((workdir / "eval" / "val" / "report.json").read_text())
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return report, np.array([x["loss"] for x in lines])


@pytest.fixture
def config(tiny_config):
    """Steps, some of them short, whose updates are near to the gradients themselves.

    Longer runs part: batch norm over few images turns rounding into visible differences.
    Adam's usual epsilon would hide a gradient that is off by the number of devices.
    """
    with_batch_norm(tiny_config)
    tiny_config.train.batch_size = 16
    tiny_config.train.epochs = 2  # of 60 images: 3 batches of 16, one of 12
    tiny_config.train.min_delta = 100.0  # the first epoch is the best
    tiny_config.optimizer.epsilon = 1.0
    tiny_config.optimizer.learning_rate = 0.01
    tiny_config.model.dropout = 0.0  # under pmap each device draws its own
    return tiny_config


def _with(config, **settings):
    config = config.copy_and_resolve_references()
    for key, value in settings.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def _forget_the_second_epoch(workdir, copy):
    """What a kill after the first epoch leaves."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "8")
    return copy


@pytest.mark.slow
def test_any_layout_gives_the_run_of_one_device_and_goes_on_with_another(config, tmp_path):
    """1, 2 and 8 devices; jit, state sharded, and pmap."""
    layouts = {
        "sharded": (_with(config, train__shard_state=True), 8),
        "pmap": (_with(config, train__parallel="pmap"), 2),
    }
    sharded, pmapped = layouts["sharded"][0], layouts["pmap"][0]
    at = {name: tmp_path / name for name in ("one", *layouts)}
    _run(1, (config, at["one"]))
    _run(8, (sharded, at["sharded"]))
    onwards = _forget_the_second_epoch(at["sharded"], tmp_path / "8, on 2")
    _run(2, (pmapped, at["pmap"]), (config, onwards))

    one, losses = _results(at["one"])
    # The best is the first epoch's.
    moved = update(config, at["one"], "best")
    assert one["num_examples"] == 20
    for name in layouts:
        report, losses_here = _results(at[name])
        np.testing.assert_allclose(losses_here[:2], losses[:2], rtol=1e-3, err_msg=name)
        difference = np.linalg.norm(update(config, at[name], "best") - moved)
        assert 0 < difference < 0.05 * np.linalg.norm(moved), name
        np.testing.assert_allclose(report["loss"], one["loss"], rtol=1e-3, err_msg=name)
    _, losses_here = _results(tmp_path / "8, on 2")
    np.testing.assert_allclose(losses_here, losses, rtol=5e-3)


def test_long_arrays_are_spread_by_their_longest_axis():
    mesh = jax.sharding.AbstractMesh((2,), (AXIS,))
    specs = {
        shape: tuple(sharded(jax.ShapeDtypeStruct(shape, jnp.float32), mesh).spec)
        for shape in ((1024, 256), (256, 1024), (3, 3, 64, 1023), (1023, 1023), (8,))
    }
    assert specs == {
        (1024, 256): (AXIS, None),
        (256, 1024): (None, AXIS),
        (3, 3, 64, 1023): (None, None, AXIS, None),
        (1023, 1023): (),  # two devices do not divide it
        (8,): (),  # too short to be worth it
    }
