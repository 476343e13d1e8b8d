"""The command on the small network: its figures against counts made by hand."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from covid_flax.compiler import aot
from covid_flax.errors import UserError
from covid_flax.models import create_model
from ml_collections_configs import base

ROOT = Path(__file__).parents[2]

needs_libtpu = pytest.mark.skipif(
    aot.tpu_compiler() is None and importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the TPU compiler: make tpu-compiler",
)


def run(*flags):
    script = ROOT / "scripts" / "aot_compile.py"
    command = [sys.executable, str(script), f"--config={ROOT}/configs/quickstart.py", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def macs_of_convolutions(size=32, width=16):
    """Of the small v1 network for one image: kernel positions times channels in and out."""
    side = size // 2
    macs = side**2 * 49 * 3 * width
    side, inputs = side // 2, width
    for stage in range(4):
        w = width * 2**stage
        side = side if stage == 0 else side // 2
        macs += side**2 * (inputs * w + 9 * w * w + 4 * w * w + 4 * w * inputs)
        inputs = 4 * w
    return macs


@pytest.mark.slow  # a minute; test_table.py has a smaller program compiled for TPUs
@needs_libtpu
def test_figures_of_the_small_network(tmp_path):
    done = run(
        "--topology=v5e:2x2",
        "--show=2",
        f"--output={tmp_path}/cost.json",
        "--config.data.image_size=32",
        "--config.model.dtype=bfloat16",
        "--config.augment.flip=False",
        "--config.augment.shift=0.0",
        "--config.train.batch_size=256",
    )
    assert done.returncode == 0, done.stderr
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert (cost["devices"], cost["per_device_batch"], cost["host_transfers"]) == (4, 64, 0)

    config = base.get_config().model
    config.name, config.hidden_units = "resnet14_small", 64
    _, params, _ = create_model(config, 4, seed=0)
    gradients = sum(x.size for x in jax.tree.leaves(params))
    # Forward, input gradient, kernel gradient: some are smaller (borders, the stem's absent
    # input gradient), and covariances and all that is no convolution come on top.
    flops = 2 * 3 * macs_of_convolutions()
    assert 0.6 * flops < cost["flops_per_example"] < 2 * flops
    # Every gradient once, in half or full precision, and the statistics.
    assert 2 * gradients < cost["collective_bytes_per_step"] < 6 * gradients
    assert set(cost["collectives"]) == {"all-reduce"}
    # Parameters and two moments, all donated.
    state = 3 * 4 * gradients
    assert state < cost["alias_bytes_per_device"] < cost["argument_bytes_per_device"] < 1.6 * state
    assert 0 < cost["hbm_only_bytes_per_example"] < cost["hbm_bytes_per_example"]
    assert cost["temp_bytes_per_device"] > 0 and cost["estimated_cycles"] > 0
    assert cost["bound_images_per_second"] > 0
    assert "GFLOP an image" in done.stdout and "MB an image: HBM" in done.stdout


@needs_libtpu
def test_an_impossible_shape_costs_one_line():
    done = run("--topology=v5e:3x7")
    lines = [s for s in done.stderr.splitlines() if s.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "v5e:3x7" in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_compiled_for_a_topology():
    config = base.get_config()
    mesh = AbstractMesh((8,), ("data",))
    config.train.batch_size = 12
    with pytest.raises(UserError, match="8 devices"):
        aot.lower_step(config, mesh, 4)
    config.train.parallel = "pmap"
    with pytest.raises(UserError, match="parallel=jit"):
        aot.lower_step(config, mesh, 4)


def test_unknown_generation_and_missing_compiler(monkeypatch):
    with pytest.raises(UserError, match="v5e:2x4"):
        aot.topology_mesh("v9:2x2")

    def missing(*args):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match="make tpu-compiler"):
        aot.topology_mesh("v5e:2x4")
