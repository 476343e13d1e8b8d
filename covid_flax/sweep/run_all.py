"""Runs a plan: every trial that has no result yet, one after another."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from covid_flax.console import duration, say
from covid_flax.data.folder import refuse_inside
from covid_flax.errors import UserError
from covid_flax.run_folder import only_trainer
from covid_flax.sweep.halving import Halving
from covid_flax.sweep.plan import Plan, config_of
from covid_flax.sweep.process import command_of, run_trial
from covid_flax.sweep.progress import Progress
from covid_flax.sweep.results import write
from covid_flax.sweep.sweep_folder import open_sweep, refuse_changed, save
from covid_flax.sweep.validation import best_of, read_val


def sweep(plan: Plan, workdir: Path) -> dict[str, Any]:
    """Runs what is left of the plan; returns, and writes, what sweep.json holds.

    Raises:
      UserError: the folder is another sweep's, or no trial came to an end.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: give a folder as --workdir")
    if plan.config.data.dir:
        refuse_inside(workdir, plan.config.data.dir, "--workdir")
    halving = Halving(plan, workdir) if plan.kind == "halving" else None
    results = open_sweep(plan, workdir)
    with only_trainer(workdir):
        if halving is not None:
            halving.open()
        _run_all(plan, workdir, results, halving)
    saved = save(plan, workdir, results)
    if all(result["state"] == "failed" for result in results.values()):
        error = next(iter(results.values()))["error"]
        raise UserError(f"every trial failed ({workdir}/logs has all): {error}")
    write(plan, workdir, saved)
    return saved


def _run_all(
    plan: Plan, workdir: Path, results: dict[str, dict[str, Any]], halving: Halving | None
) -> None:
    """Runs each trial that has no result yet, and adds its result."""
    total = len(plan.trials)
    left = [trial for trial in plan.trials if trial.name not in results]
    before = f", {total - len(left)} of them done before" if len(left) < total else ""
    say(f"sweep: {total} trials{before}, judged by {plan.monitor}; {workdir}")
    seconds = [r["seconds"] for r in results.values()]
    for done, trial in enumerate(left):
        number, started = plan.trials.index(trial) + 1, time.monotonic()
        metrics = workdir / trial.name / "metrics.jsonl"
        head = f"trial {number}/{total} {trial.name}"
        say(head)
        train = config_of(plan.config, trial).train
        progress = Progress(
            head=head,
            epochs=train.epochs,
            already=len(read_val(metrics)),
            started=started,
            waiting=len(left) - done - 1,
            usual=statistics.mean(seconds) if seconds else None,
            judge=halving.judge(trial) if halving is not None else None,
        )
        log = workdir / "logs" / f"{trial.name}.log"
        state, error = run_trial(command_of(plan, trial, workdir), log, metrics, progress.tell)
        refuse_changed(plan, trial, workdir)
        records = read_val(metrics)
        best = best_of(records, plan.monitor, train.min_delta, train.swa_start)
        if state != "failed" and best is None:
            state, error = "failed", f"{metrics}: no finite {plan.monitor}"
        passed = time.monotonic() - started
        if halving is not None:
            halving.tell(trial, state, records)
        results[trial.name] = {
            "trial": trial.name,
            "setting": trial.setting,
            "seed": trial.seed,
            **({} if trial.fold is None else {"fold": trial.fold}),
            "settings": trial.settings,
            "state": state,
            **(best or {}),
            "seconds": round(passed, 2),
            "error": error,
        }
        if state != "failed":
            seconds.append(passed)
        save(plan, workdir, results)
        verdict = f"failed: {error}" if best is None or state == "failed" else ""
        if not verdict and best is not None:
            verdict = f"{state} | best {plan.monitor} {best[plan.monitor]:.4f}, epoch "
            verdict += f"{best['best_epoch']}"
        say(f"{head} | {verdict} | {duration(passed)}")
