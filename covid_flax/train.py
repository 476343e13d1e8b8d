"""The training loop: from a run that is set up to its best checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from covid_flax.augment import Augment
from covid_flax.checkpoint import Checkpoints
from covid_flax.data import dataset as dataset_lib
from covid_flax.data.pipeline import ArraySource, Source, train_iterator, usable_examples
from covid_flax.early_stopping import EarlyStopping
from covid_flax.errors import UserError
from covid_flax.mesh import Layout, make_layout
from covid_flax.models import STAGES, preprocessing_of, stage_before
from covid_flax.optimizer import learning_rate_schedule, make_optimizer
from covid_flax.predict import compile_apply, mean_loss, predict
from covid_flax.report.console import Meter, say
from covid_flax.report.log import RunLog
from covid_flax.report.plots import plot_curves
from covid_flax.run import Run, only_trainer
from covid_flax.step import (
    StepConfig,
    TrainState,
    create_state,
    make_eval_step,
    make_train_step,
    zero_sums,
)


@dataclasses.dataclass
class Job:
    """What `train` and `dry_run` share: the sources and the functions of a run."""

    start: str
    train_source: Source
    val_source: Source
    layout: Layout
    tx: Any
    schedule: Any
    usable: int
    steps_per_epoch: int
    step_config: StepConfig


def make_job(run: Run) -> Job:
    config = run.config
    layout = make_layout(config.train.parallel)
    devices = jax.device_count()
    if config.train.batch_size % devices:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} does not divide among "
            f"{devices} devices: choose a multiple of {devices}"
        )
    labels = run.data.labels("train")
    usable = usable_examples(len(labels), config.train.batch_size, devices, config.train.last_batch)
    if not usable:
        raise UserError(
            f"{len(labels)} training images do not fill a batch of {config.train.batch_size}: "
            "lower config.train.batch_size"
        )
    steps_per_epoch = math.ceil(usable / config.train.batch_size)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, config.train.epochs)
    how = Augment(**config.augment.to_dict())
    start = _cached_from(run, how)
    weights = None
    if config.train.class_weights == "balanced":
        weights = dataset_lib.class_weights(labels, len(run.data.class_names))
    return Job(
        start=start,
        train_source=run.data.source("train", config.data),
        val_source=run.data.source("val", config.data),
        layout=layout,
        tx=make_optimizer(config.optimizer, schedule),
        schedule=schedule,
        usable=usable,
        steps_per_epoch=steps_per_epoch,
        step_config=StepConfig(
            preprocessing=preprocessing_of(config.model),
            batch_stats_in=run.batch_stats_in,
            start=start,
            class_weights=weights,
            label_smoothing=config.train.label_smoothing,
            augment=how,
            axis_name=layout.axis_name,
        ),
    )


def _cached_from(run: Run, how: Augment) -> str:
    """The stage to start from with cached inputs; the first stage where nothing is cached.

    Frozen stages give an image the same output every epoch, unless it is augmented: then
    computing it once is exact.
    """
    first = run.trained[0]
    if first == STAGES[0] or how.active or jax.process_count() > 1:
        return STAGES[0]
    size = run.config.data.image_size
    apply = make_eval_step(run.graphdef, "unit", stop=stage_before(first))
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    output = jax.eval_shape(apply, run.params, run.batch_stats, image)
    images = len(run.data.files("train")) + len(run.data.files("val"))
    gigabytes = images * output.size * output.dtype.itemsize / 1e9
    budget = run.config.train.feature_cache_gb
    if gigabytes > budget:
        say(
            f"frozen stages: caching their output needs {gigabytes:.2f} GB, over "
            f"train.feature_cache_gb={budget:g}: computed anew every epoch"
        )
        return STAGES[0]
    say(
        f"frozen stages: {STAGES[0]} to {stage_before(first)} give every image the "
        f"same output each epoch: computed once, {gigabytes:.2f} GB in memory"
    )
    return first


def _cache_features(run: Run, job: Job, params: Any, batch_stats: Any) -> None:
    """Replaces the sources of images by their frozen stages' outputs."""
    preprocessing, stop = job.step_config.preprocessing, stage_before(job.start)
    apply = compile_apply(make_eval_step(run.graphdef, preprocessing, stop=stop))
    config = run.config
    for split in ("train", "val"):
        source = run.data.source(split, config.data)
        features = predict(
            apply,
            params,
            batch_stats,
            source,
            batch_size=config.eval.batch_size,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            description=f"frozen stages, {split}",
        )
        setattr(job, f"{split}_source", ArraySource(features, run.data.labels(split)))


def train(run: Run) -> None:
    """Trains from scratch or from the latest checkpoint, until the end or an early stop."""
    config = run.config
    job = make_job(run)
    directory = run.workdir / "checkpoints"
    first = jax.process_index() == 0
    alone = only_trainer(run.workdir) if first else contextlib.nullcontext()
    with alone, Checkpoints(directory, writing=True) as checkpoints:
        state, stopping, loop = _start(run, job, checkpoints)
        step = int(state.step)
        if stopping.should_stop or step >= job.steps_per_epoch * config.train.epochs:
            say(f"training is complete at step {step:,}")
        else:
            if job.start != STAGES[0]:
                _cache_features(run, job, {**state.frozen, **state.params}, state.batch_stats)
            _loop(run, job, state, stopping, loop, checkpoints)
        if stopping.should_stop:
            say(
                f"early stop: {config.train.monitor} has not improved for {config.train.patience} "
                f"epochs; best epoch {stopping.best_epoch}"
            )
    if first:
        path = run.workdir / "curves.png"
        plot_curves(run.workdir / "metrics.jsonl", path, best_epoch=stopping.best_epoch)


def _start(
    run: Run, job: Job, checkpoints: Checkpoints
) -> tuple[TrainState, EarlyStopping, dict[str, Any]]:
    """The state, early stopping and loop JSON: new, or where the latest checkpoint left them."""
    config = run.config
    trained = frozenset(run.trained)
    new = create_state(run.params, run.batch_stats, trained, job.tx, config.seed)
    new = make_layout("jit").put_state(new)
    latest = checkpoints.latest_step
    if latest is None and run.resumed:
        raise UserError(
            f"{run.workdir}/checkpoints: no sound checkpoint is left: remove the folder"
        )
    if latest is None:
        stopping = EarlyStopping(
            mode="min" if config.train.monitor == "val_loss" else "max",
            min_delta=config.train.min_delta,
            patience=config.train.patience or None,
        )
        clocks = {"elapsed": 0.0, "epoch_seconds": 0.0, "epoch_examples": 0.0}
        return new, stopping, {**clocks, "metrics_bytes": 0}
    state, loop = checkpoints.load(latest, new)
    if loop["usable"] != job.usable:
        raise UserError(
            f"{run.workdir} trained on {loop['usable']:,} images an epoch, on these "
            f"{jax.device_count()} devices it would be {job.usable:,}: go on with as many devices "
            "as before, or choose another --workdir"
        )
    say(f"resume: from step {latest:,}, epoch {latest / job.steps_per_epoch:.2f}")
    return state, EarlyStopping.from_state_dict(loop["early_stopping"]), loop


def _loop(
    run: Run,
    job: Job,
    state: TrainState,
    stopping: EarlyStopping,
    loop: dict[str, Any],
    checkpoints: Checkpoints,
) -> None:
    config, layout = run.config, job.layout
    step, total_steps = int(state.step), job.steps_per_epoch * config.train.epochs
    in_memory = isinstance(job.train_source, ArraySource)
    num_threads = 0 if in_memory else config.data.num_threads

    # ---- batches and functions --------------------------------------------------------------
    batches = train_iterator(
        job.train_source,
        batch_size=config.train.batch_size,
        usable=job.usable,
        seed=config.seed,
        num_threads=num_threads,
        prefetch=config.data.prefetch,
        put=layout.put_batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if step:
        batches.set_state(loop["iterator"])
    train_step = layout.compile_step(make_train_step(run.graphdef, job.tx, job.step_config))
    eval_step = make_eval_step(run.graphdef, job.step_config.preprocessing, start=job.start)
    apply = compile_apply(eval_step)
    val_labels = run.data.labels("val")

    def validate(state: TrainState) -> tuple[float, float]:
        logits = predict(
            apply,
            {**state.frozen, **state.params},
            state.batch_stats,
            job.val_source,
            batch_size=config.eval.batch_size,
            num_threads=num_threads,
            prefetch=config.data.prefetch,
        )
        return mean_loss(logits, val_labels), float(np.mean(logits.argmax(-1) == val_labels))

    def save(state: TrainState, *, best: bool) -> None:
        loop = {
            "iterator": batches.get_state(),
            "early_stopping": stopping.state_dict(),
            "metrics_bytes": log.metrics_bytes,
            "usable": job.usable,
            **meter.clocks,
        }
        checkpoints.save(step, state, loop, best=best)

    # ---- steps ------------------------------------------------------------------------------
    say(
        f"training: {total_steps:,} steps, {job.steps_per_epoch:,} an epoch, on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; compiling the step"
    )
    sums = _host_sums(state.sums)
    state = layout.put_state(state)
    compiled: set[tuple[int, ...]] = set()
    with RunLog(run.workdir, loop["metrics_bytes"], step) as log:
        meter = Meter(config.train.epochs, job.steps_per_epoch, step, loop)
        while step < total_steps and not stopping.should_stop:
            batch = next(batches)
            if batch["label"].shape in compiled:
                state, _ = train_step(state, batch)
            else:
                # A full batch, and the short last one, compile once each: that is no rate.
                jax.block_until_ready(state)
                with meter.compiling(batch["label"].size):
                    state, _ = jax.block_until_ready(train_step(state, batch))
                compiled.add(batch["label"].shape)
            step += 1
            epoch_ends = step % job.steps_per_epoch == 0

            if epoch_ends or meter.first or step % config.train.log_every_steps == 0:
                before, since = sums, meter.last_step
                sums = _host_sums(layout.get_state(state.sums))
                count, loss, accuracy = _means(sums, before)
                _refuse_non_finite(loss, since, step)
                rate = float(job.schedule(step - 1))
                log.interval(step, **meter.interval(step, count, loss, accuracy, rate))
            every = config.train.checkpoint_every_steps
            if every and step % every == 0 and not epoch_ends:
                save(layout.get_state(state), best=False)
            if not epoch_ends:
                continue

            # ---- end of an epoch: log, validate, judge, save --------------------------------
            epoch = step // job.steps_per_epoch
            _, *train_figures = _means(sums)
            log.epoch(
                step,
                epoch,
                "train",
                loss=train_figures[0],
                accuracy=train_figures[1],
                learning_rate=rate,
                images_per_second=meter.epoch_rate,
            )
            state = dataclasses.replace(state, sums=layout.put_state(zero_sums()))
            copy = layout.get_state(state)
            sums = _host_sums(copy.sums)
            val_loss, val_accuracy = validate(copy)
            log.epoch(step, epoch, "val", loss=val_loss, accuracy=val_accuracy)
            improved = stopping.update(
                val_loss if config.train.monitor == "val_loss" else val_accuracy
            )
            patience = f" of {stopping.patience}" if stopping.patience else ""
            verdict = f"no better for {stopping.wait}{patience}"
            verdict = "best so far" if improved else verdict
            meter.end_epoch(epoch, train_figures, (val_loss, val_accuracy), verdict)
            save(copy, best=improved)
            del copy
        checkpoints.wait()


def _host_sums(sums: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(sums).items()}


def _means(sums: dict[str, float], before: dict[str, float] | None = None) -> tuple[float, ...]:
    """Examples, mean loss and accuracy of what `sums` has over `before`."""
    new = {name: value - (before[name] if before else 0.0) for name, value in sums.items()}
    return new["count"], new["loss"] / new["count"], new["correct"] / new["count"]


def _refuse_non_finite(loss: float, since: int, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} between steps {since + 1} and {step}: lower "
            "optimizer.learning_rate or set optimizer.clip_norm, in a new --workdir"
        )
