"""A run: set it up, train it, keep its best."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from covid_flax import __version__
from covid_flax import config as config_lib
from covid_flax.augment import Augment
from covid_flax.checkpoint import Checkpoints
from covid_flax.data import dataset as dataset_lib
from covid_flax.data.dataset import Dataset
from covid_flax.data.pipeline import ArraySource, Source, train_iterator, usable_examples
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.early_stopping import EarlyStopping
from covid_flax.errors import UserError
from covid_flax.mesh import Layout, make_layout
from covid_flax.models import STAGES, create_model, preprocessing_of, trained_stages
from covid_flax.optimizer import learning_rate_schedule, make_optimizer
from covid_flax.predict import compile_apply, mean_loss, predict
from covid_flax.pretrained.fetch import resolve, sha256
from covid_flax.pretrained.load import load_weights
from covid_flax.pretrained.read import read_weights
from covid_flax.report.files import write_atomically
from covid_flax.report.log import RunLog, duration
from covid_flax.report.plots import plot_curves
from covid_flax.step import (
    StepConfig,
    create_state,
    make_eval_step,
    make_train_step,
    zero_sums,
)

# What may differ when a run goes on: nothing here changes a figure.
_FREE_ON_RESUME = (
    "data.dir",
    "data.cache_dir",
    "data.num_threads",
    "data.prefetch",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.feature_cache_gb",
)
_PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets ml_collections numpy pillow"
).split()


@dataclasses.dataclass
class Run:
    """A run that is set up: its folder, its data and its untrained network."""

    config: ml_collections.ConfigDict
    workdir: Path
    data: Dataset
    graphdef: nnx.GraphDef
    params: dict[str, Any]
    batch_stats: dict[str, Any]

    @property
    def trained(self) -> tuple[str, ...]:
        return trained_stages(self.config.model)

    @property
    def batch_stats_in(self) -> frozenset[str]:
        """Frozen stages run as in inference, as Keras's `trainable=False` layers do."""
        return frozenset(self.trained if self.config.model.batch_norm == "train" else ())


def setup(config: ml_collections.ConfigDict, workdir: Path) -> Run:
    """Data, network and initial weights; writes `config.json` and `split.csv`.

    Where the folder holds a run already, checks that it is one of this configuration,
    split and class list, and leaves its files as they are. Raises UserError.
    """
    config_lib.check(config)
    saved = read_run(workdir)
    if saved is not None:
        _refuse_changes(saved["config"], config_lib.to_json(config), workdir)
    say(f"data: reading {config.data.dir or 'synthetic phantoms'}")
    data = dataset_lib.load_dataset(config.data, config.seed, workdir)
    _describe_data(data)
    graphdef, params, batch_stats = create_model(config.model, len(data.class_names), config.seed)

    if saved is not None:
        if saved["class_names"] != list(data.class_names):
            raise UserError(
                f"{workdir} was trained on the classes {saved['class_names']}, the data has "
                f"{list(data.class_names)}: choose another --workdir"
            )
        if read_split_csv(workdir / "split.csv") != list(data.rows):
            raise UserError(
                f"the images or their split differ from {workdir}/split.csv: "
                "restore the data, or choose another --workdir"
            )
        return Run(config, workdir, data, graphdef, params, batch_stats)

    weights: dict[str, Any] = {"source": config.model.weights}
    weights_cache = dataset_lib.cache_dir(config.data.cache_dir) / "weights"
    path = resolve(config.model.weights, config.model.name, weights_cache)
    if path is not None:
        params, batch_stats, report = load_weights(
            read_weights(path),
            params,
            batch_stats,
            source=str(path),
            may_miss=tuple(config.model.weights_may_miss),
        )
        say(f"weights: {path.name}: {report.summary()}")
        weights.update(file=str(path), sha256=sha256(path), report=report.summary())
    else:
        say("weights: none, everything starts at random")

    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_split_csv(workdir / "split.csv", list(data.rows))
        about = {
            "config": config_lib.to_json(config),
            "class_names": list(data.class_names),
            "seed": config.seed,
            "preprocessing": preprocessing_of(config.model),
            "data": dataset_lib.summary(data),
            "weights": weights,
            "versions": {"covid_flax": __version__, "python": platform.python_version()}
            | {p: importlib.metadata.version(p) for p in _PACKAGES},
            "devices": [str(d.device_kind) for d in jax.devices()],
        }
        # Last: a folder with a config.json is a run.
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        write_atomically(workdir / "config.json", text.encode())
    return Run(config, workdir, data, graphdef, params, batch_stats)


def read_run(workdir: Path) -> dict[str, Any] | None:
    """The `config.json` of a run's folder, None where there is none. Raises UserError."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: give a folder as --workdir")
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        missing = {"config", "class_names", "data"} - set(saved)
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): restore it, or choose another --workdir") from e
    if missing:
        raise UserError(f"{path} lacks {sorted(missing)}: choose another --workdir")
    return saved


def _refuse_changes(saved: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    before, after = config_lib.flatten(saved), config_lib.flatten(now)
    changed = [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in _FREE_ON_RESUME
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}): "
            "choose another --workdir"
        )


def say(line: str) -> None:
    """A line on the console, from one process alone."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _describe_data(data: Dataset) -> None:
    images = dataset_lib.summary(data)["images"]
    parts = [f"{split} {sum(counts.values()):,}" for split, counts in images.items()]
    say(
        f"data: {len(data.rows):,} images, {len(data.class_names)} classes "
        f"({', '.join(data.class_names)}): {', '.join(parts)}"
    )
    for note in data.notes:
        say(f"note: {note}")


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


def _job(run: Run) -> Job:
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
    apply = make_eval_step(run.graphdef, "unit", stop=STAGES[STAGES.index(first) - 1])
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
        f"frozen stages: {STAGES[0]} to {STAGES[STAGES.index(first) - 1]} give every image the "
        f"same output each epoch: computed once, {gigabytes:.2f} GB in memory"
    )
    return first


def _cache_features(run: Run, job: Job, params: Any, batch_stats: Any) -> None:
    """Replaces the sources of images by their frozen stages' outputs."""
    stop = STAGES[STAGES.index(job.start) - 1]
    apply = compile_apply(make_eval_step(run.graphdef, job.step_config.preprocessing, stop=stop))
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
    job = _job(run)
    layout, total_steps = job.layout, job.steps_per_epoch * config.train.epochs

    # ---- state: new, or where the latest checkpoint left it -----------------------------
    stopping = EarlyStopping(
        mode="min" if config.train.monitor == "val_loss" else "max",
        min_delta=config.train.min_delta,
        patience=config.train.patience or None,
    )
    fresh = create_state(run.params, run.batch_stats, frozenset(run.trained), job.tx, config.seed)
    fresh = make_layout("jit").put_state(fresh)
    loop: dict[str, Any] = {"elapsed": 0.0, "metrics_bytes": 0, "epoch_seconds": 0.0}
    with Checkpoints(run.workdir / "checkpoints") as checkpoints:
        latest = checkpoints.latest_step
        if latest is not None:
            fresh, loop = checkpoints.load(latest, fresh)
            stopping = EarlyStopping.from_state_dict(loop["early_stopping"])
            say(f"resume: from step {latest:,}, epoch {latest / job.steps_per_epoch:.2f}")
        step = latest or 0
        if stopping.should_stop or step >= total_steps:
            say(f"training is complete at step {step:,}")
            return

        if job.start != STAGES[0]:
            _cache_features(run, job, {**fresh.frozen, **fresh.params}, fresh.batch_stats)
        in_memory = isinstance(job.train_source, ArraySource)
        batches = train_iterator(
            job.train_source,
            batch_size=config.train.batch_size,
            usable=job.usable,
            seed=config.seed,
            num_threads=0 if in_memory else config.data.num_threads,
            prefetch=config.data.prefetch,
            put=layout.put_batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if latest is not None:
            batches.set_state(loop["iterator"])
        state = layout.put_state(fresh)
        del fresh

        # ---- functions ------------------------------------------------------------------
        train_step = layout.compile_step(make_train_step(run.graphdef, job.tx, job.step_config))
        apply = compile_apply(
            make_eval_step(run.graphdef, job.step_config.preprocessing, start=job.start)
        )

        def validate(params: Any, batch_stats: Any) -> tuple[float, float]:
            logits = predict(
                apply,
                params,
                batch_stats,
                job.val_source,
                batch_size=config.eval.batch_size,
                num_threads=0 if in_memory else config.data.num_threads,
                prefetch=config.data.prefetch,
            )
            labels = run.data.labels("val")
            return mean_loss(logits, labels), float(np.mean(logits.argmax(-1) == labels))

        # ---- loop -----------------------------------------------------------------------
        with RunLog(run.workdir, loop["metrics_bytes"], step) as log:
            meter = _Meter(config, job, step, loop["elapsed"], loop["epoch_seconds"])
            say(
                f"training: {total_steps:,} steps, {job.steps_per_epoch:,} an epoch, on "
                f"{jax.device_count()} x {jax.devices()[0].device_kind}; compiling the step"
            )
            sums = _host_sums(layout.get_state(state.sums))
            while step < total_steps and not stopping.should_stop:
                state, _ = train_step(state, next(batches))
                step += 1
                epoch_ends = step % job.steps_per_epoch == 0

                if epoch_ends or step % config.train.log_every_steps == 0 or meter.first:
                    before, sums = sums, _host_sums(layout.get_state(state.sums))
                    figures = meter.interval(step, before, sums)
                    log.interval(step, **figures)

                save_now = config.train.checkpoint_every_steps
                if not epoch_ends and save_now and step % save_now == 0:
                    checkpoints.save(
                        step,
                        layout.get_state(state),
                        meter.loop(log, stopping, batches),
                        best=False,
                    )
                if not epoch_ends:
                    continue

                epoch = step // job.steps_per_epoch
                log.epoch(
                    step,
                    epoch,
                    "train",
                    loss=sums["loss"] / sums["count"],
                    accuracy=sums["correct"] / sums["count"],
                    learning_rate=float(job.schedule(step - 1)),
                    images_per_second=meter.epoch_rate(sums["count"]),
                )
                state = dataclasses.replace(state, sums=layout.put_state(zero_sums()))
                copy = layout.get_state(state)
                val_loss, val_accuracy = validate({**copy.frozen, **copy.params}, copy.batch_stats)
                log.epoch(step, epoch, "val", loss=val_loss, accuracy=val_accuracy)
                monitored = val_loss if config.train.monitor == "val_loss" else val_accuracy
                improved = stopping.update(monitored)
                meter.end_epoch(epoch, sums, val_loss, val_accuracy, improved, stopping)
                sums = _host_sums(zero_sums())
                checkpoints.save(step, copy, meter.loop(log, stopping, batches), best=improved)
                del copy
            checkpoints.wait()
        if stopping.should_stop:
            say(
                f"early stop: {config.train.monitor} has not improved for {config.train.patience} "
                f"epochs; best epoch {stopping.best_epoch}"
            )
    if jax.process_index() == 0:
        plot_curves(run.workdir / "metrics.jsonl", run.workdir / "curves.png")


def _host_sums(sums: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(sums).items()}


class _Meter:
    """Clocks and console lines of the training loop."""

    def __init__(self, config: Any, job: Job, step: int, elapsed: float, epoch_seconds: float):
        self.config, self.job, self.first = config, job, True
        self.total_steps = job.steps_per_epoch * config.train.epochs
        self.first_step = self.last_step = step
        self.started = self.last = time.monotonic()
        self.elapsed_before = elapsed
        # Time in training steps of the running epoch, and in all steps since this start.
        self.epoch_seconds, self.step_seconds, self.timed_steps = epoch_seconds, 0.0, 0

    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def interval(
        self, step: int, before: dict[str, float], sums: dict[str, float]
    ) -> dict[str, float]:
        """Prints the steps since the last call; `sums` are the running epoch's totals."""
        now = time.monotonic()
        seconds, steps = now - self.last, step - self.last_step
        count = sums["count"] - before["count"]
        loss = (sums["loss"] - before["loss"]) / count
        accuracy = (sums["correct"] - before["correct"]) / count
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} between steps {self.last_step + 1} and {step}: lower "
                "optimizer.learning_rate or set optimizer.clip_norm; the last checkpoint is sound"
            )
        rate, learning_rate = count / seconds, float(self.job.schedule(step - 1))
        self.epoch_seconds += seconds
        self.last, self.last_step = now, step
        if self.first:
            # The first step's time is the compiler's: it is in no rate.
            self.first, self.epoch_seconds = False, 0.0
            say(f"first step after {duration(seconds)}: loss {loss:.4f}")
            return {"loss": loss, "accuracy": accuracy}
        self.step_seconds += seconds
        self.timed_steps += steps
        left = (self.total_steps - step) * self.step_seconds / self.timed_steps
        epoch = (step - 1) // self.job.steps_per_epoch
        done = (step - epoch * self.job.steps_per_epoch) / self.job.steps_per_epoch
        say(
            f"epoch {epoch + 1}/{self.config.train.epochs} {done:4.0%} | step {step:,} | "
            f"loss {loss:.4f} | accuracy {accuracy:.4f} | lr {learning_rate:.2e} | "
            f"{rate:,.1f} images/s | left {duration(left)}"
        )
        return {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": learning_rate,
            "images_per_second": rate,
        }

    def epoch_rate(self, count: float) -> float:
        return count / self.epoch_seconds if self.epoch_seconds else 0.0

    def end_epoch(
        self,
        epoch: int,
        sums: dict[str, float],
        val_loss: float,
        val_accuracy: float,
        improved: bool,
        stopping: EarlyStopping,
    ) -> None:
        """Prints the epoch; evaluation and saving then stay out of the next rates."""
        patience = f"{stopping.wait}/{self.config.train.patience}"
        say(
            f"epoch {epoch}/{self.config.train.epochs} done | train loss "
            f"{sums['loss'] / sums['count']:.4f} accuracy {sums['correct'] / sums['count']:.4f} | "
            f"val loss {val_loss:.4f} accuracy {val_accuracy:.4f} | "
            f"{'best so far' if improved else f'no better, {patience}'} | "
            f"{duration(self.elapsed())}"
        )
        self.epoch_seconds, self.last = 0.0, time.monotonic()

    def loop(self, log: RunLog, stopping: EarlyStopping, batches: Any) -> dict[str, Any]:
        """What a checkpoint keeps of the loop, as JSON."""
        return {
            "iterator": batches.get_state(),
            "early_stopping": stopping.state_dict(),
            "elapsed": self.elapsed(),
            "epoch_seconds": self.epoch_seconds,
            "metrics_bytes": log.metrics_bytes,
        }


def dry_run(run: Run) -> None:
    """Prints the network's table and what a step will cost; trains nothing."""
    job = _job(run)
    say("")
    say(f"{'stage':<8}{'parameters':>14}{'statistics':>12}  trained  batch norm")
    totals = np.zeros(3, np.int64)
    for stage in STAGES:
        params = sum(x.size for x in jax.tree.leaves(run.params.get(stage, {})))
        stats = sum(x.size for x in jax.tree.leaves(run.batch_stats.get(stage, {})))
        trained = stage in run.trained
        totals += np.array([params, stats, params * trained])
        if params:
            mode = ("batch" if stage in run.batch_stats_in else "running") if stats else "-"
            say(f"{stage:<8}{params:>14,}{stats:>12,}  {'yes' if trained else 'no':<7}  {mode}")
    say(f"{'total':<8}{totals[0]:>14,}{totals[1]:>12,}  trained {totals[2]:,}")

    config = run.config
    state = create_state(run.params, run.batch_stats, frozenset(run.trained), job.tx, config.seed)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    batch = config.train.batch_size
    x: Any = jax.ShapeDtypeStruct(
        (batch, config.data.image_size, config.data.image_size, 3), "uint8"
    )
    if job.start != STAGES[0]:
        stop = STAGES[STAGES.index(job.start) - 1]
        prefix = make_eval_step(run.graphdef, job.step_config.preprocessing, stop=stop)
        x = jax.eval_shape(prefix, run.params, run.batch_stats, x)
    step_config = dataclasses.replace(job.step_config, axis_name=None)
    step = jax.jit(make_train_step(run.graphdef, job.tx, step_config), donate_argnums=0)
    labels = jax.ShapeDtypeStruct((batch,), np.int32)
    compiled = step.lower(state, {"image": x, "label": labels}).compile()
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    say("")
    say(
        f"a step: {batch} images, {cost.get('flops', float('nan')) / 1e9:,.1f} GFLOP, "
        f"{getattr(memory, 'temp_size_in_bytes', 0) / 1e9:.2f} GB temporary, "
        f"{state_bytes / 1e9:.2f} GB state; {job.steps_per_epoch:,} steps an epoch, "
        f"at most {config.train.epochs} epochs"
    )
    say("dry run: nothing was trained")


def default_workdir(config_file: str) -> Path:
    """`runs/paper-frozen` for `configs/paper.py:frozen`."""
    path, _, variant = config_file.partition(":")
    return Path("runs") / "-".join(
        filter(None, [os.path.splitext(os.path.basename(path))[0], variant])
    )
