"""From a run to what its training needs: sources, optimiser, step, and how all is placed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import ml_collections

from covid_flax.augment import Augment
from covid_flax.compiler.chips import peak_of
from covid_flax.console import say
from covid_flax.data import dataset as dataset_lib
from covid_flax.data.pipeline import Source, usable_examples
from covid_flax.feature_cache import features_from
from covid_flax.files import expanded
from covid_flax.mesh import Layout, make_layout
from covid_flax.models import MODELS, batch_stats_stages, preprocessing_of
from covid_flax.optimizer import learning_rate_schedule, make_optimizer
from covid_flax.recalibrate import follow, is_due
from covid_flax.run import Run
from covid_flax.step import (
    StepConfig,
    Teacher,
    create_state,
    make_train_step,
)
from covid_flax.teacher import refuse_other_teacher
from covid_flax.trained_run import Ensemble, open_run


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
    """The job of a run; says what it caches and who teaches it. Raises UserError."""
    config = run.config
    layout = make_layout(config.train.parallel, shard_state=config.train.shard_state)
    devices, batch_size = jax.device_count(), config.train.batch_size
    micro = config.train.micro_batch or batch_size
    labels = run.data.labels("train")
    usable = usable_examples(len(labels), batch_size, config.train.last_batch)
    steps_per_epoch = math.ceil(usable / batch_size)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, config.train.epochs)
    _note_warm_up(config)
    _note_averages(config)
    _note_batch_norm(run, steps_per_epoch)
    start = features_from(run)
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
        step_config=step_config_of(
            config,
            start=start,
            class_weights=weights,
            # Under pmap a step sees one device's share.
            micro_batch=config.train.micro_batch // (devices if layout.axis_name else 1),
            swa_after=config.train.swa_start * steps_per_epoch,
            teacher=_teacher(run),
            skip_non_finite=config.train.on_non_finite == "skip",
            axis_name=layout.axis_name,
        ),
    )


def _note_warm_up(config: ml_collections.ConfigDict) -> None:
    """Speaks of a rise that leaves nothing of the training, or ends after it."""
    rise, epochs = config.optimizer.warmup_epochs, config.train.epochs
    if rise > epochs:
        ends = f"ends at {epochs / rise:.0%} of optimizer.learning_rate"
    elif rise == epochs and config.optimizer.schedule == "cosine":
        ends = "never comes down from its peak"
    else:
        return
    say(
        f"note: optimizer.warmup_epochs={rise:g} is all of train.epochs={epochs}: the learning "
        f"rate {ends}"
    )


def _note_averages(config: ml_collections.ConfigDict) -> None:
    """Speaks of a mean of the weights that keeps what a schedule passes through."""
    if not config.train.swa_start:
        return
    if config.optimizer.warmup_epochs > config.train.swa_start:
        say("note: train.swa_start is before the warm-up's end: the mean keeps weights of the rise")
    if config.optimizer.schedule == "cosine":
        say(
            "note: train.swa_start means to average at a rate that stays up: set "
            "optimizer.schedule=constant, or train.ema_decay in its place"
        )


# Of images in a part of a step; fewer have statistics that say little of all.
_FEW_FOR_BATCH_NORM = 8
# Of what the running statistics were before an epoch; more, and an evaluation's are not its own.
_MOST_OF_BEFORE = 0.3


def _note_batch_norm(run: Run, steps_per_epoch: int) -> None:
    """Speaks of batch norm whose statistics cannot be good."""
    config = run.config
    if not follow(config, run.batch_stats):
        return
    part = config.train.micro_batch or config.train.batch_size
    key = "micro_batch" if config.train.micro_batch else "batch_size"
    if part < _FEW_FOR_BATCH_NORM:
        say(
            f"note: train.{key}={part}: batch norm takes its statistics from so few images: raise "
            "it" + ("" if config.model.weights == "none" else ", or set model.batch_norm=frozen")
        )
    left = config.model.bn_momentum ** (steps_per_epoch * (config.train.batch_size // part))
    if left > _MOST_OF_BEFORE and not is_due(config, run.batch_stats):
        say(
            f"note: model.bn_momentum={config.model.bn_momentum:g} over {steps_per_epoch:,} steps "
            f"an epoch leaves {left:.0%} of batch norm's statistics as they were before it: lower "
            "it for evaluations to have their own"
        )


def step_config_of(config: ml_collections.ConfigDict, **others: Any) -> StepConfig:
    """A step's fields as the configuration says them, and `others`, which it does not say alone."""
    return StepConfig(
        preprocessing=preprocessing_of(config.model),
        batch_stats_in=batch_stats_stages(config.model),
        label_smoothing=config.train.label_smoothing,
        augment=Augment(**config.augment.to_dict()),
        ema_decay=config.train.ema_decay,
        **others,
    )


def _teacher(run: Run) -> Teacher | None:
    """The run that `train.teacher` names, which `setup` has found fit. Raises UserError."""
    config = run.config.train
    if not config.teacher:
        return None
    if config.teacher_weight == 0:
        say("note: train.teacher_weight=0: nothing is learned from the teacher: leave it out")
    without_effect = [
        k for k in ("label_smoothing", "class_weights") if config[k] not in (0, "none")
    ]
    if config.teacher_weight == 1 and without_effect:
        named = ", ".join(f"train.{key}" for key in without_effect)
        say(f"note: train.teacher_weight=1: no label is learned from, so {named} has no effect")
    folder = expanded(config.teacher)
    teacher = open_run(folder)
    members = teacher.members if isinstance(teacher, Ensemble) else (teacher,)
    refuse_other_teacher(run.workdir, config.teacher, [member.step for member in members])
    say(f"teacher: {folder}, step {teacher.step:,}")
    return Teacher(teacher.logits, config.teacher_weight, config.teacher_temperature)


def peak_rate(run: Run, job: Job) -> float:
    """Images a second if all devices did nothing but a step's arithmetic, at their peak.

    0 where the chip's peak, or the arithmetic, is not known; see `step_flops`.
    """
    peak = peak_of(jax.devices()[0].device_kind)
    if peak is None:
        return 0.0
    flops = step_flops(run, job)
    return peak.flops * jax.device_count() * run.config.train.batch_size / flops if flops else 0.0


def step_flops(run: Run, job: Job) -> float:
    """Floating-point operations of a step of the whole batch; 0 where JAX cannot count them.

    The network's, forward and back, as lowered for an accelerator: with what rematerialisation
    repeats, where that is asked for; without augmentation and teacher.
    """
    config = run.config
    trained = frozenset(run.trained)
    state = jax.eval_shape(
        lambda: create_state(run.params, run.batch_stats, trained, job.tx, config.seed)
    )
    batch = run.batch_shapes(job.start, config.train.batch_size)
    how = dataclasses.replace(
        job.step_config,
        axis_name=None,
        augment=Augment(),
        micro_batch=0,  # a loop's body is counted once
        ema_decay=0.0,
        swa_after=0,
        teacher=None,
        skip_non_finite=False,
    )
    step = jax.jit(make_train_step(run.graphdef, job.tx, how))
    try:
        cpu = jax.local_devices(backend="cpu")[0]  # accelerators' plugins count compiled ones only
    except RuntimeError:  # JAX_PLATFORMS is without it
        return 0.0
    with jax.default_device(cpu):
        lowered = step.trace(state, batch).lower(lowering_platforms=("tpu",))
        return float((lowered.cost_analysis() or {}).get("flops", 0.0))
