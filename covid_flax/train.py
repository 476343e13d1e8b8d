"""The training loop: from a run that is set up to its best checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from covid_flax import preemption
from covid_flax.checkpoint import Checkpoints
from covid_flax.config import keeps_averages, to_json
from covid_flax.console import Meter, say
from covid_flax.early_stopping import EarlyStopping
from covid_flax.errors import UserError, no_command
from covid_flax.feature_cache import cached_sources
from covid_flax.feed import Feed, make_feed
from covid_flax.host_memory import KeptMemory
from covid_flax.job import Job, make_job, peak_rate
from covid_flax.numerics import MOST_SKIPPED, all_finite, divergence, non_finite_error
from covid_flax.optimizer import updates_made
from covid_flax.outputs import compile_apply, mean_loss, predict, scoring_step
from covid_flax.profile import Profile
from covid_flax.recalibrate import do_not_fit, make_recalibration
from covid_flax.recalibrate import is_due as recalibration_is_due
from covid_flax.report.log import RunLog
from covid_flax.run import Run
from covid_flax.run_folder import has_figures, only_trainer, refuse_changes, saved_run
from covid_flax.step import TrainState, create_state, zero_skipped, zero_sums
from covid_flax.stragglers import find_straggler

# Adam's moments keep a NaN for good: this finds any bad gradient since it last looked.
_all_finite = jax.jit(all_finite)


def train(run: Run, profile: tuple[int, int] | None = None) -> None:
    """Trains from scratch or from the latest checkpoint, until the end or an early stop.

    Args:
      run: set up.
      profile: first and last step of which a trace is written to `profile/`, or None.
    """
    config = run.config
    job = make_job(run)
    directory = run.workdir / "checkpoints"
    first = jax.process_index() == 0
    alone = only_trainer(run.workdir) if first else contextlib.nullcontext()
    with alone, Checkpoints(directory, writing=True) as checkpoints:
        if first:  # another command may have come between
            saved = saved_run(run.workdir)["config"]
            refuse_changes(saved, to_json(config), run.workdir)
            if (run.workdir / "config.json").read_bytes() != run.written:
                raise UserError(
                    f"{run.workdir} was set up by another command meanwhile: give this one again, "
                    "or choose another --workdir"
                )
        state, stopping, loop = _start(run, job, checkpoints)
        step = int(state.step)
        if stopping.should_stop or step >= job.steps_per_epoch * config.train.epochs:
            if not stopping.best_epoch:
                raise UserError(
                    f"{run.workdir}: training is complete, but its best checkpoint is damaged: "
                    "evaluate --checkpoint=latest, or train anew in another --workdir"
                )
            say(f"training is complete at step {step:,}")
        else:
            if job.start is not None:
                params = {**state.frozen, **state.params}
                how = job.step_config.preprocessing
                job.train_source, job.val_source = cached_sources(
                    run, job.start, how, params, state.batch_stats
                )
                del params
            # The loop steps on a copy, beside which this one must not stay in memory.
            held = [state]
            del state
            _loop(run, job, held, stopping, loop, checkpoints, Profile(run.workdir, profile))
        if stopping.should_stop:
            say(
                f"early stop: {config.train.monitor} has not improved{_enough(config)} for "
                f"{config.train.patience} epoch{'s' if config.train.patience > 1 else ''}; best "
                f"epoch {stopping.best_epoch}"
            )
    if first:
        # Here, for matplotlib need not load before the first step.
        from covid_flax.report.plots import plot_curves

        path = run.workdir / "curves.png"
        plot_curves(run.workdir / "metrics.jsonl", path, best_epoch=stopping.best_epoch)


def _enough(config: ml_collections.ConfigDict) -> str:
    """What a gain must be, where not any will do."""
    return f" by more than {config.train.min_delta:g}" if config.train.min_delta else ""


def _start(
    run: Run, job: Job, checkpoints: Checkpoints
) -> tuple[TrainState, EarlyStopping, dict[str, Any]]:
    """The state, early stopping and loop JSON: new, or where the latest checkpoint left them."""
    config = run.config
    trained = frozenset(run.trained)
    average = keeps_averages(config)
    new = create_state(
        run.params,
        run.batch_stats,
        trained,
        job.tx,
        config.seed,
        average=average,
        start_share=config.train.start_share,
    )
    new = job.layout.place(new)
    found = checkpoints.resume(new)
    if found is None and run.resumed:
        raise UserError(
            f"{run.workdir}/checkpoints: no sound checkpoint is left: remove the folder"
        )
    if found is None:
        if has_figures(run.workdir):
            say(f"note: {run.workdir} has figures but no checkpoint: it begins anew")
        if jax.process_index() == 0:  # the steps' temperatures are not of the weights to come
            (run.workdir / "calibration.json").unlink(missing_ok=True)
        stopping = EarlyStopping(
            mode="min" if config.train.monitor == "val_loss" else "max",
            min_delta=config.train.min_delta,
            patience=config.train.patience or None,
            start_from_epoch=config.train.swa_start,
        )
        clocks = {"elapsed": 0.0, "epoch_seconds": 0.0, "epoch_examples": 0.0}
        return new, stopping, {**clocks, "metrics_bytes": 0}
    latest, state, loop, best_is_lost = found
    say(f"resume: from step {latest:,}, epoch {latest / job.steps_per_epoch:.2f}")
    stopping = EarlyStopping.from_state_dict(loop["early_stopping"])
    if best_is_lost:
        say(f"note: the best epoch so far, {stopping.best_epoch}, is lost: the best from here on")
        stopping = dataclasses.replace(stopping, best=None, best_epoch=0)
    return state, stopping, loop


def _loop(
    run: Run,
    job: Job,
    held: list[TrainState],
    stopping: EarlyStopping,
    loop: dict[str, Any],
    checkpoints: Checkpoints,
    profile: Profile,
) -> None:
    config, layout, state = run.config, job.layout, held.pop()
    step, total_steps = int(state.step), job.steps_per_epoch * config.train.epochs
    feed = make_feed(run, job)
    if step:
        feed.batches.set_state(loop["iterator"])
    validate = _make_validation(run, job)
    recalibrate = None
    if recalibration_is_due(config, run.batch_stats):
        recalibrate = make_recalibration(config, run.graphdef, job.train_source, job.start)
    elif do_not_fit(config, run.batch_stats):
        say(
            "note: train.recalibrate=0, but batch norm's statistics are of augmented images or "
            "other weights: expect less on plain images"
        )
    say(
        f"training: {total_steps:,} steps, {job.steps_per_epoch:,} an epoch, on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; compiling the step"
    )
    if job.step_config.skip_non_finite:
        counts = zero_skipped() | jax.tree.map(jnp.float32, loop.get("skipped", {}))
        state = dataclasses.replace(state, sums={**state.sums, **layout.place(counts)})
    sums = _host_sums(state.sums)
    state = layout.put_state(state)
    alone = jax.process_count() == 1
    with (
        contextlib.closing(feed.batches),
        RunLog(run.workdir, loop["metrics_bytes"], step) as log,
        profile,
        KeptMemory() as memory,
        preemption.deferred(),
    ):
        meter = Meter(config.train.epochs, job.steps_per_epoch, step, loop, peak_rate(run, job))
        at = _Training(
            run=run,
            job=job,
            feed=feed,
            validate=validate,
            recalibrate=recalibrate,
            checkpoints=checkpoints,
            log=log,
            meter=meter,
            stopping=stopping,
            step=step,
            state=state,
            sums=sums,
            losses=loop.get("train_losses", []),
        )
        del state
        every = config.train.checkpoint_every_steps
        # Steps after which something besides training is due.
        periods = [config.train.log_every_steps, job.steps_per_epoch, every or total_steps]
        while at.step < total_steps and not stopping.should_stop:
            due = min((at.step // period + 1) * period for period in periods)
            if meter.first:
                due = min(due, at.step + feed.first_steps)
            elif alone:
                rate = meter.rate / config.train.batch_size
                due = min(due, at.step + max(1, int(rate * preemption.LOOK_EVERY_S)))
            preemption.heed_interrupt()
            due = profile.before(at.step, due)
            at.state = feed.advance(at.state, due - at.step, meter)
            at.step = due
            profile.after(at.step, at.state)

            epoch_ends = at.step % job.steps_per_epoch == 0
            logged = meter.first or epoch_ends or at.step % config.train.log_every_steps == 0
            if logged:
                at.look()
            if epoch_ends:
                at.end_epoch()
                if jax.default_backend() == "cpu":
                    memory.keep_if_room()
            # Where epochs are short no other step is looked at.
            stop = preemption.noticed(together=logged) and at.step < total_steps
            if not epoch_ends and (stop or (every and at.step % every == 0)):
                at.save(layout.get_state(at.state), best=False)
            if stop:
                checkpoints.wait()
                raise preemption.Terminated(
                    f"SIGTERM: saved step {at.step:,}; the same command goes on from there"
                )
        checkpoints.wait()


@dataclasses.dataclass
class _Training:
    """How far a training is, and what is done to it besides steps.

    Attributes:
      validate: `state -> (loss, accuracy)`.
      recalibrate: `state -> state` with batch statistics of plain images, or None.
      state: after `step` steps, as `job.layout` has it for the next.
      sums: of that state when it was last looked at, on the host.
      losses: mean training loss of each epoch so far.
      learning_rate: of the last step before it was last looked at.
    """

    run: Run
    job: Job
    feed: Feed
    validate: Callable[[TrainState], tuple[float, float]]
    recalibrate: Callable[[TrainState], TrainState] | None
    checkpoints: Checkpoints
    log: RunLog
    meter: Meter
    stopping: EarlyStopping
    step: int
    state: TrainState
    sums: dict[str, float]
    losses: list[float]
    learning_rate: float = math.nan

    def look(self) -> None:
        """Says and logs the steps since the last look. Raises UserError where one went wrong."""
        job, since, before = self.job, self.meter.last_step, self.sums
        self.sums = _host_sums(job.layout.get_state(self.state.sums))
        count, loss, accuracy = _means(self.sums, before)
        if not job.step_config.skip_non_finite and not math.isfinite(loss):
            self._refuse(f"the loss is {loss}", since)
        if not _all_finite(self.state):
            self._refuse("a gradient or weight is not finite", since)
        row = int(self.sums.get("skipped_in_a_row", 0))
        if row >= min(MOST_SKIPPED, job.steps_per_epoch):
            self._refuse(f"{row:,} updates in a row were skipped, none finite", self.step - row)
        # A skipped update, of a run that skips or did so once, leaves the schedule where it was.
        # Under pmap each device has a count.
        updates = int(np.ravel(updates_made(self.state.opt_state))[0])
        self.learning_rate = float(job.schedule(max(0, updates - 1)))
        figures = self.meter.interval(self.step, count, loss, accuracy, self.learning_rate)
        self.log.interval(self.step, **figures)

    def end_epoch(self) -> None:
        """Logs the epoch that ends here, validates, judges and saves; looked at it is already."""
        job, layout = self.job, self.job.layout
        epoch = self.step // job.steps_per_epoch
        _, *train_figures = _means(self.sums)
        skipped = {"skipped": int(self.sums["skipped"])} if "skipped" in self.sums else {}
        self.log.epoch(
            self.step,
            epoch,
            "train",
            loss=train_figures[0],
            accuracy=train_figures[1],
            learning_rate=self.learning_rate,
            images_per_second=self.meter.epoch_rate,
            **skipped,
        )
        sums = layout.put_state(_next_sums(self.sums))
        self.state = dataclasses.replace(self.state, sums=sums)
        state = layout.get_state(self.state)
        if self.recalibrate is not None:
            # What is validated, saved and trained on is one and the same.
            state = self.recalibrate(state)
            self.state = layout.put_state(state)
        self.sums = _host_sums(state.sums)
        val_loss, val_accuracy = self.validate(state)
        if not math.isfinite(val_loss):
            self._refuse(f"the validation loss is {val_loss}", self.step - job.steps_per_epoch)
        self.log.epoch(self.step, epoch, "val", loss=val_loss, accuracy=val_accuracy)
        monitored = {"val_loss": val_loss, "val_accuracy": val_accuracy}
        improved = self.stopping.update(monitored[self.run.config.train.monitor])
        patience = f" of {self.stopping.patience}" if self.stopping.patience else ""
        wait = f"no better{_enough(self.run.config)} for {self.stopping.wait}{patience}"
        verdict = "best so far" if improved else wait
        if count := skipped.get("skipped"):
            verdict += f" | {count:,} update{'s' if count > 1 else ''} skipped"
        held_up = find_straggler(self.meter.epoch_waiting)
        self.meter.end_epoch(epoch, train_figures, (val_loss, val_accuracy), verdict)
        if held_up:
            say(f"note: {held_up}")
        self.losses.append(train_figures[0])
        chance = job.step_config.chance_loss(len(self.run.data.class_names))
        if note := divergence(self.losses, chance):
            say(f"note: {note}")
        self.save(state, best=improved)

    def save(self, state: TrainState, *, best: bool) -> None:
        """Saves the state, as it is outside of steps, with all that a resumed run needs."""
        if not _all_finite(state):
            # At an epoch's end it was when it was looked at: statistics were taken anew since.
            since = min(self.meter.last_step, self.step - 1)
            self._refuse("the loss, a gradient or a batch statistic is not finite", since)
        state, skipped = _without_skipped(state)
        loop = {
            "iterator": self.feed.batches.get_state(),
            "early_stopping": self.stopping.state_dict(),
            "metrics_bytes": self.log.metrics_bytes,
            "train_losses": list(self.losses),
            "skipped": skipped,
            "class_names": list(self.run.data.class_names),
            **self.meter.clocks,
        }
        self.checkpoints.save(self.step, state, loop, best=best)

    def _refuse(self, what: str, since: int) -> NoReturn:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step
        good = "no checkpoint yet"
        if last is not None:
            good = f"last good checkpoint: step {last:,} in {self.run.workdir / 'checkpoints'}"
        raise non_finite_error(what, since + 1, self.step, self.run.config, good)


def _make_validation(run: Run, job: Job) -> Callable[[TrainState], tuple[float, float]]:
    """`state -> (loss, accuracy)` of the validation images, by the weights that are evaluated."""
    config, labels = run.config, run.data.labels("val")
    preprocessing = job.step_config.preprocessing
    apply = compile_apply(scoring_step(config, run.graphdef, preprocessing, job.start))

    def validate(state: TrainState) -> tuple[float, float]:
        params, batch_stats = state.for_evaluation()
        logits = predict(apply, params, batch_stats, job.val_source, config)
        return mean_loss(logits, labels), float(np.mean(logits.argmax(-1) == labels))

    return validate


def _host_sums(sums: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(sums).items()}


def _means(sums: dict[str, float], before: dict[str, float] | None = None) -> tuple[float, ...]:
    """Examples, mean loss and accuracy of what `sums` has over `before`; NaN of no examples."""
    new = {name: value - (before[name] if before else 0.0) for name, value in sums.items()}
    per = new["count"] or math.nan
    return new["count"], new["loss"] / per, new["correct"] / per


def _next_sums(sums: dict[str, float]) -> dict[str, jax.Array]:
    """Of the next epoch's beginning: a row of skipped updates goes on."""
    if "skipped" not in sums:
        return zero_sums()
    row = jnp.float32(sums["skipped_in_a_row"])
    return {**zero_sums(), **zero_skipped(), "skipped_in_a_row": row}


def _without_skipped(state: TrainState) -> tuple[TrainState, dict[str, float]]:
    """The state as checkpoints have it, which is the same with and without skipping."""
    sums = dict(state.sums)
    skipped = {name: float(sums.pop(name)) for name in zero_skipped() if name in sums}
    return dataclasses.replace(state, sums=sums), skipped


if __name__ == "__main__":
    no_command("train", "python -m covid_flax.main --config=configs/FILE trains")
