"""The table of networks: figures by hand, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from covid_flax.compiler.aot import tpu_compiler


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "covid_flax.models", *flags],
        capture_output=True,
        text=True,
    )


def test_no_accelerator_is_opened():
    code = "import covid_flax.models.__main__, jax; print(jax.config.jax_platforms)"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout == "cpu\n", out.stderr


def test_lenet_s_row_is_what_a_hand_counts():
    out = run("--names=lenet5,alexnet", "--image_size=32")
    assert out.returncode == 0, out.stderr
    row = next(line for line in out.stdout.splitlines() if line.startswith("lenet5")).split()
    # Two convolutions on grey images, three dense layers, four classes.
    weights = (25 + 1) * 6 + (25 * 6 + 1) * 16 + (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 4
    assert row[1] == f"{weights:,}"
    products = 25 * 6 * 28**2 + 25 * 6 * 16 * 10**2 + 400 * 120 + 120 * 84 + 84 * 4
    assert float(row[2]) == pytest.approx(2 * products / 1e9, abs=0.006)
    if tpu_compiler() is None:  # make tpu-compiler
        assert row[3] == "-"
    else:
        assert float(row[3]) >= 32 * 32 * 3 / 1e6  # traffic is at least the image's
    assert float(row[4].replace(",", "")) > 0
    assert row[5:7] == ["32", "32"]
    assert "alexnet                    takes images of 63 pixels or more" in out.stdout


@pytest.mark.parametrize(
    ("name", "billions"),
    [pytest.param("resnet50", 3.86, marks=pytest.mark.slow), ("resnet50_v1_5", 4.09)],
)
def test_arithmetic_is_of_plain_convolutions(name, billions):
    """Multiply-adds of a 224 px image as torchvision and others count them: fvcore, thop."""
    out = run(f"--names={name}", "--nospeed", "--notraffic")
    row = next(line for line in out.stdout.splitlines() if line.startswith(name)).split()
    got = float(row[2])
    # XLA leaves out the products with padding's zeros, which those count.
    assert 0.9 * 2 * billions < got < 2 * billions * 1.02


def test_an_unknown_name_is_one_line():
    out = forked.command("covid_flax.models", "--names=resnet51", cwd=Path.cwd())
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.startswith("error: --names=resnet51: name some of resnet50,")
    assert out.stderr.count("\n") == 1
