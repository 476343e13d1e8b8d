"""From a run to what its training needs: sources, step, and where they are placed."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from covid_flax.augment import Augment
from covid_flax.chips import peak_of
from covid_flax.data import dataset as dataset_lib
from covid_flax.data.pipeline import ArraySource, Source, usable_examples
from covid_flax.mesh import Layout, make_layout
from covid_flax.models import MODELS, preprocessing_of, stage_before, trained_stages
from covid_flax.optimizer import learning_rate_schedule, make_optimizer
from covid_flax.predict import compile_apply, predict
from covid_flax.report.console import say
from covid_flax.run import Run
from covid_flax.step import (
    StepConfig,
    Teacher,
    abstract_batch,
    create_state,
    make_eval_step,
    make_train_step,
)


@dataclasses.dataclass
class Job:
    """What `train` and `dry_run` share: the sources and the functions of a run.

    Attributes:
      start: the first stage that steps compute; what precedes it is cached. None: nothing is.
      usable: images an epoch trains on.
      fill: a short last batch is filled up to a multiple of this.
    """

    start: str | None
    train_source: Source
    val_source: Source
    layout: Layout
    tx: Any
    schedule: Any
    usable: int
    fill: int
    steps_per_epoch: int
    step_config: StepConfig


def make_job(run: Run) -> Job:
    config = run.config
    layout = make_layout(config.train.parallel, shard_state=config.train.shard_state)
    devices, batch_size = jax.device_count(), config.train.batch_size
    micro = config.train.micro_batch or batch_size
    labels = run.data.labels("train")
    usable = usable_examples(len(labels), batch_size, config.train.last_batch)
    steps_per_epoch = math.ceil(usable / batch_size)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, config.train.epochs)
    how = Augment(**config.augment.to_dict())
    start = _cached_from(run)
    weights = None
    if config.train.class_weights == "balanced":
        weights = dataset_lib.class_weights(labels, len(run.data.class_names))
    return Job(
        start=start,
        train_source=run.data.source("train", config.data),
        val_source=run.data.source("val", config.data),
        layout=layout,
        tx=make_optimizer(config.optimizer, schedule, MODELS[config.model.name].stages),
        schedule=schedule,
        usable=usable,
        fill=devices * max(1, math.ceil(usable % batch_size / micro)),
        steps_per_epoch=steps_per_epoch,
        step_config=StepConfig(
            preprocessing=preprocessing_of(config.model),
            batch_stats_in=run.batch_stats_in,
            start=start,
            class_weights=weights,
            label_smoothing=config.train.label_smoothing,
            augment=how,
            # Under pmap a step sees one device's share.
            micro_batch=config.train.micro_batch // (devices if layout.axis_name else 1),
            ema_decay=config.train.ema_decay,
            swa_after=config.train.swa_start * steps_per_epoch,
            teacher=_teacher(run),
            skip_non_finite=config.train.on_non_finite == "skip",
            axis_name=layout.axis_name,
        ),
    )


def _teacher(run: Run) -> Teacher | None:
    """The run that `train.teacher` names, which `setup` has found fit. Raises UserError."""
    config = run.config.train
    if not config.teacher:
        return None
    # It opens runs, with what training needs and more.
    from covid_flax.evaluation.trained import open_run

    folder = Path(config.teacher).expanduser()
    teacher = open_run(folder)
    say(f"teacher: {folder}, step {teacher.step:,}")
    return Teacher(teacher.logits, config.teacher_weight, config.teacher_temperature)


def batch_shapes(run: Run, start: str | None, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch of `size` examples as steps from `start` on take it, see `abstract_batch`."""
    config = run.config
    cached = None if start is None else stage_before(config.model, start)
    image_size = config.data.image_size
    return abstract_batch(run.graphdef, run.params, run.batch_stats, size, image_size, cached)


def peak_rate(run: Run, job: Job) -> float:
    """Images a second if all devices did nothing but a step's arithmetic, at their peak.

    0 where the chip's peak is not known. The arithmetic is the network's, forward and back,
    as lowered: with what rematerialisation repeats, where that is asked for.
    """
    peak = peak_of(jax.devices()[0].device_kind)
    if peak is None:
        return 0.0
    config = run.config
    trained = frozenset(run.trained)
    state = jax.eval_shape(
        lambda: create_state(run.params, run.batch_stats, trained, job.tx, config.seed)
    )
    batch = batch_shapes(run, job.start, config.train.batch_size)
    how = dataclasses.replace(
        job.step_config,
        axis_name=None,
        micro_batch=0,
        ema_decay=0.0,
        swa_after=0,
        teacher=None,
        skip_non_finite=False,
    )
    step = jax.jit(make_train_step(run.graphdef, job.tx, how))
    cost = step.lower(state, batch).cost_analysis()
    flops = float((cost or {}).get("flops", 0.0))
    return peak.flops * jax.device_count() * config.train.batch_size / flops if flops else 0.0


def cacheable(config: Any) -> str | None:
    """The last frozen stage, if its output of an image is the same every epoch; else None.

    It is where no image is augmented, seen in other views too, or shown to a teacher.
    """
    changed = Augment(**config.augment.to_dict()).active or config.eval.mirror or config.eval.aspect
    if changed or config.train.teacher:
        return None
    return stage_before(config.model, trained_stages(config.model)[0])


def _cached_from(run: Run) -> str | None:
    """The stage to start from with cached inputs; None where nothing is cached."""
    before = cacheable(run.config)
    if before is None:
        return None
    gigabytes = _feature_bytes(run) / 1e9
    place = _feature_place(run.config, gigabytes)
    if place is None:
        say(
            f"frozen stages: caching their output needs {gigabytes:.2f} GB, over "
            f"train.feature_cache_gb={run.config.train.feature_cache_gb:g} and "
            f"feature_disk_gb={run.config.train.feature_disk_gb:g}: computed anew every epoch"
        )
        return None
    say(
        f"frozen stages: those up to {before} give every image the same output each epoch: "
        f"computed once, {gigabytes:.2f} GB {place}"
    )
    return run.trained[0]


def _feature_bytes(run: Run) -> int:
    """Of the frozen stages' output for all training and validation images."""
    output = batch_shapes(run, run.trained[0], 1)["image"]
    images = len(run.data.files("train")) + len(run.data.files("val"))
    return images * output.size * output.dtype.itemsize


def _feature_place(config: Any, gigabytes: float) -> str | None:
    if gigabytes <= config.train.feature_cache_gb:
        return "in memory"
    return "on disk" if gigabytes <= config.train.feature_disk_gb else None


def cache_features(run: Run, job: Job, start: str, params: Any, batch_stats: Any) -> None:
    """Replaces the sources of images by the outputs of the frozen stages before `start`."""
    config = run.config
    preprocessing, stop = job.step_config.preprocessing, stage_before(config.model, start)
    apply = compile_apply(make_eval_step(run.graphdef, preprocessing, stop=stop))

    in_memory = _feature_place(config, _feature_bytes(run) / 1e9) == "in memory"
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
            allocate=np.empty if in_memory else partial(_on_disk, run.workdir),
        )
        setattr(job, f"{split}_source", ArraySource(features, run.data.labels(split)))


def _on_disk(directory: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in a nameless file, which goes when the process ends, however it ends."""
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here, not a crash when a page is written.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "w+", shape=shape)
