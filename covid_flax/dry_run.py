"""All but training: the network's table and what a step will cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from covid_flax.config import keeps_averages
from covid_flax.console import say
from covid_flax.feed import bytes_on_device
from covid_flax.job import Job, make_job, step_flops
from covid_flax.mesh import as_placed, jit_layout, make_mesh
from covid_flax.models import MODELS
from covid_flax.run import Run
from covid_flax.step import create_state, make_train_step


def _images(run: Run, job: Job) -> str:
    """What the images take that lie on the device, where they do."""
    size = bytes_on_device(run, job) if job.start is None else 0  # else what a cache holds
    return f", {size / 1e9:.2f} GB images on each device" if size else ""


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

    config, mesh = run.config, make_mesh()
    batch, shard_state = config.train.batch_size, config.train.shard_state
    state, examples = as_placed(
        jax.eval_shape(
            lambda: create_state(
                run.params,
                run.batch_stats,
                frozenset(run.trained),
                job.tx,
                config.seed,
                average=keeps_averages(config),
                start_share=config.train.start_share,
            )
        ),
        run.batch_shapes(job.start, batch),
        mesh,
        shard_state=shard_state,
    )
    state_bytes = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    # A cost that skipping does not change.
    step_config = dataclasses.replace(
        job.step_config,
        axis_name=None,
        skip_non_finite=False,
        micro_batch=config.train.micro_batch,  # under pmap the job's is a device's
    )
    say("compiling the step, for what it computes and holds")
    layout = jit_layout(mesh, shard_state=shard_state)  # under pmap a step costs as much
    step: Any = layout.compile_step(make_train_step(run.graphdef, job.tx, step_config))
    compiled = step.lower(state, examples).compile()
    flops = step_flops(run, job) or math.nan
    memory = compiled.memory_analysis()
    each = f" on each of {mesh.size} devices" if mesh.size > 1 else ""
    say("")
    say(
        f"a step: {batch} images, {flops / 1e9:,.1f} GFLOP of the network, "
        f"{getattr(memory, 'temp_size_in_bytes', 0) / 1e9:.2f} GB temporary, "
        f"{state_bytes / 1e9:.2f} GB state{each}{_images(run, job)}; "
        f"{job.steps_per_epoch:,} steps an epoch, "
        f"at most {config.train.epochs} epochs"
    )
    say("dry run: nothing was trained")
