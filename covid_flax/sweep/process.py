"""A trial's process: its command line, and how it is started, watched and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from covid_flax.sweep.plan import Plan, Trial
from covid_flax.sweep.validation import read_val

MAIN = (sys.executable, "-m", "covid_flax.main")
ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.5


def command_of(plan: Plan, trial: Trial, workdir: Path) -> list[str]:
    """The command line of a trial."""
    values = {**plan.fixed, **trial.values}
    return [
        *MAIN,
        f"--config={plan.config_file}",
        f"--workdir={workdir / trial.name}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def run_trial(
    command: Sequence[str],
    log: Path,
    metrics_jsonl: Path,
    on_epoch: Callable[[list[dict[str, Any]]], bool],
) -> tuple[str, str]:
    """Runs a trial to its end. Returns its state, and what it said if that is `failed`.

    Args:
      command: of the trial.
      log: file to which its output is appended.
      metrics_jsonl: that it writes.
      on_epoch: given the validation records when one has come; true stops the trial.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
        )
        seen = len(read_val(metrics_jsonl))
        try:
            while process.poll() is None:
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
                records = read_val(metrics_jsonl)
                if len(records) > seen and process.poll() is None and on_epoch(records):
                    return "pruned", ""
                seen = len(records)
        finally:
            _stop(process)
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if process.returncode == 0:
        return "complete", ""
    said = log.read_bytes()[start:].decode(errors="replace").splitlines()
    said = [line.strip() for line in said if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if process.returncode < 0 and not errors:
        return "failed", f"ended by signal {-process.returncode} (9 where memory ran out)"
    return "failed", (errors or said or [f"exit status {process.returncode}"])[-1]


def _stop(process: subprocess.Popen) -> None:
    """Ends the trial's process, where it has not ended; its checkpoints stay whole."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
