"""All but training: the network's table and what a step will cost."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from covid_flax.config import keeps_averages
from covid_flax.console import say
from covid_flax.job import make_job
from covid_flax.models import MODELS
from covid_flax.run import Run
from covid_flax.step import create_state, make_train_step


def dry_run(run: Run) -> None:
    """Prints the network's table and what a step will cost; trains nothing."""
    job = make_job(run)
    say("")
    say(f"{'stage':<8}{'parameters':>14}{'statistics':>12}  trained  batch norm")
    totals = np.zeros(3, np.int64)
    for stage in MODELS[run.config.model.name].stages:
        params = sum(x.size for x in jax.tree.leaves(run.params.get(stage, {})))
        stats = sum(x.size for x in jax.tree.leaves(run.batch_stats.get(stage, {})))
        trained = stage in run.trained
        totals += np.array([params, stats, params * trained])
        if params:
            mode = ("batch" if stage in run.batch_stats_in else "running") if stats else "-"
            say(f"{stage:<8}{params:>14,}{stats:>12,}  {'yes' if trained else 'no':<7}  {mode}")
    say(f"{'total':<8}{totals[0]:>14,}{totals[1]:>12,}  trained {totals[2]:,}")

    config = run.config
    average = keeps_averages(config)
    stages = frozenset(run.trained)
    state = create_state(run.params, run.batch_stats, stages, job.tx, config.seed, average=average)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    batch = config.train.batch_size
    # A cost that skipping does not change.
    step_config = dataclasses.replace(
        job.step_config,
        axis_name=None,
        skip_non_finite=False,
        micro_batch=config.train.micro_batch,  # under pmap the job's is a device's
    )
    step = jax.jit(make_train_step(run.graphdef, job.tx, step_config), donate_argnums=0)
    compiled = step.lower(state, run.batch_shapes(job.start, batch)).compile()
    cost = compiled.cost_analysis() or {}
    if config.train.micro_batch:  # a loop's body is counted once
        whole = dataclasses.replace(step_config, micro_batch=0)
        plain = jax.jit(make_train_step(run.graphdef, job.tx, whole))
        cost = plain.lower(state, run.batch_shapes(job.start, batch)).cost_analysis() or {}
    memory = compiled.memory_analysis()
    say("")
    say(
        f"a step: {batch} images, {cost.get('flops', float('nan')) / 1e9:,.1f} GFLOP, "
        f"{getattr(memory, 'temp_size_in_bytes', 0) / 1e9:.2f} GB temporary, "
        f"{state_bytes / 1e9:.2f} GB state; {job.steps_per_epoch:,} steps an epoch, "
        f"at most {config.train.epochs} epochs"
    )
    say("dry run: nothing was trained")
