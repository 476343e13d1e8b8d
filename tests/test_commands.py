"""Commands in an interpreter of their own: `forked.py` starts them where much is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        "-m covid_flax.compare",
        "scripts/style_groups.py",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                "-m covid_flax.baselines",
                "-m covid_flax.controls",
                "-m covid_flax.data.audit",
                "-m covid_flax.evaluate",
                "-m covid_flax.model_card",
                "-m covid_flax.models",
                "-m covid_flax.paper_audit",
                "-m covid_flax.predict",
                "-m covid_flax.robustness",
                "scripts/convert_weights.py",
                "scripts/outside_images.py",
            )
        ),
    ],
)
def test_it_says_what_it_is_for(command):
    done = subprocess.run(
        [sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert "--" in done.stdout and done.returncode == 0


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying')"]
)
def test_out_of_memory_is_one_line(error):
    code = f"""
from covid_flax.command import run_command
def main():
    raise {error}
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: out of memory" in done.stderr and "train.batch_size" in done.stderr


def test_a_fault_of_ours_ends_with_1_and_a_traceback():
    code = """
from covid_flax.command import run_command
def main():
    raise KeyError("ours")
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'ours'" in done.stderr
