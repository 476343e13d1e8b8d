"""A trained run opened to score images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from covid_flax import config as config_lib
from covid_flax.checkpoint import Checkpoints, has_checkpoints, resolve_step
from covid_flax.console import say
from covid_flax.data.dataset import Dataset
from covid_flax.data.pipeline import Source
from covid_flax.data.splits import read_split_csv
from covid_flax.early_stopping import EarlyStopping
from covid_flax.errors import UserError
from covid_flax.evaluation.metrics import log_softmax
from covid_flax.mesh import make_layout
from covid_flax.models import MODELS, create_model, own_share_choices, trained_stages
from covid_flax.models.preprocess import MODES
from covid_flax.optimizer import make_optimizer
from covid_flax.outputs import compile_apply, predict, scoring_step
from covid_flax.pretrained.load import named_arrays
from covid_flax.recalibrate import do_not_fit, follow, make_recalibration
from covid_flax.recalibrate import is_due as recalibration_is_due
from covid_flax.run_folder import saved_run
from covid_flax.run_images import open_data
from covid_flax.step import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, ready to score.

    Attributes:
      workdir: the run's folder.
      saved: its config.json.
      config: the configuration in it.
      class_names: in the order of the class indices.
      step: of the checkpoint.
      statistics_fit: whether batch norm's statistics are of plain images and of these weights;
        None where none follow what is trained.
    """

    workdir: Path
    saved: dict[str, Any]
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    step: int
    statistics_fit: bool | None
    _step: Callable[..., Any] = dataclasses.field(repr=False)
    _apply: Callable[..., Any] = dataclasses.field(repr=False)
    _params: Any = dataclasses.field(repr=False)
    _batch_stats: Any = dataclasses.field(repr=False)

    def arrays(self) -> dict[str, jax.Array]:
        """What it answers with, by name; see `named_arrays`."""
        return named_arrays(self._params, self._batch_stats)

    def logits(self, images: jax.Array) -> jax.Array:
        """Of images `[N, H, W, 1 or 3]`, 0..255, within a traced function: float32 `[N, K]`."""
        return self._step(self._params, self._batch_stats, images)

    def probabilities(self, source: Source, description: str = "") -> np.ndarray:
        """Of every image of `source`, in its order, float64 `[N, K]`; see `predict`.

        Raises:
          UserError: one is not finite, so that it is no answer.
        """
        logits = predict(
            self._apply,
            self._params,
            self._batch_stats,
            source,
            self.config,
            description=description,
        )
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits).all(1)).sum())
            raise UserError(
                f"{self.workdir}, step {self.step:,}: the answers to {bad:,} of {len(logits):,} "
                "images are not finite: score another --checkpoint, or train in float32"
            )
        return np.exp(log_softmax(logits))


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Runs of one configuration that answer together; to a caller, a `TrainedRun`.

    Attributes:
      members: the runs.
    """

    workdir: Path
    saved: dict[str, Any]
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    step: int
    members: tuple[TrainedRun, ...]

    @property
    def statistics_fit(self) -> bool | None:
        """Whether those of all members do."""
        each = [member.statistics_fit for member in self.members]
        return None if each[0] is None else all(each)

    def logits(self, images: jax.Array) -> jax.Array:
        """As `TrainedRun.logits`: logarithms of the mean probabilities."""
        answers = jnp.stack([jax.nn.softmax(member.logits(images)) for member in self.members])
        return jnp.log(jnp.maximum(jnp.mean(answers, 0), 1e-12))

    def probabilities(self, source: Source, description: str = "") -> np.ndarray:
        """The mean of the members', float64 `[N, K]`."""
        return np.mean(self.of_each(source, description), 0)

    def of_each(self, source: Source, description: str = "") -> list[np.ndarray]:
        """As `TrainedRun.probabilities`, of every member."""
        number = len(self.members)
        return [
            member.probabilities(source, description and f"{description}, {i} of {number}")
            for i, member in enumerate(self.members, 1)
        ]


def checkpoint_record(run: TrainedRun | Ensemble, checkpoint: str) -> dict[str, Any]:
    """What a report says of the checkpoint it scored, named `best`, `latest` or by its step."""
    record: dict[str, Any] = {"which": checkpoint, "step": run.step}
    if isinstance(run, Ensemble):
        record["runs"] = {member.workdir.name: member.step for member in run.members}
    return record


def answers_of_members(
    run: Ensemble, data: Dataset, split: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By member, which of a split's images it scores, int [n], and their probabilities, [n, K].

    All of them; of a cross-validation's val images, those that it has held out.

    Raises:
      RuntimeError: a val image was not held out exactly once.
    """
    names = run.saved["members"]
    if split != "val" or not config_lib.is_cross_validation(run.config.data):
        each = run.of_each(data.source(split, run.config.data), f"scoring {split}")
        everything = np.arange(len(data.files(split)))
        return {name: (everything, of) for name, of in zip(names, each, strict=True)}
    place = {row.file: i for i, row in enumerate(data.files("val"))}
    seen = np.zeros(len(place), np.int64)
    answers = {}
    for number, (name, member) in enumerate(zip(names, run.members, strict=True), 1):
        rows = [row for row in read_split_csv(member.workdir / "split.csv") if row.split == "val"]
        source = dataclasses.replace(data, rows=rows).source("val", run.config.data)
        index = np.array([place[row.file] for row in rows])
        answers[name] = (index, member.probabilities(source, f"scoring fold {number}"))
        np.add.at(seen, index, 1)
    if not np.all(seen == 1):
        raise RuntimeError("the folds did not hold out every image exactly once")
    return answers


def together(answers: Mapping[str, tuple[np.ndarray, np.ndarray]], images: int) -> np.ndarray:
    """The mean probabilities of the members that scored each image, `[images, K]`."""
    classes = next(iter(answers.values()))[1].shape[1]
    total, count = np.zeros((images, classes)), np.zeros((images, 1))
    for index, probabilities in answers.values():
        total[index] += probabilities
        count[index] += 1
    return total / count


def open_run(workdir: Path, checkpoint: str = "best", data_dir: str = "") -> TrainedRun | Ensemble:
    """Loads a checkpoint (`best`, `latest` or a step), or those of all members of a repeated run.

    Where batch norm's statistics follow augmented images until an epoch ends, those of a checkpoint
    amid one are taken anew, if the training images are where they were or in `data_dir`. An
    ensemble's `step` is the sum of its members'. Raises UserError.
    """
    saved = saved_run(workdir)
    if "members" not in saved:
        return _open_one(workdir, saved, checkpoint, data_dir)
    members = tuple(
        _open_one(workdir / name, saved_run(workdir / name), checkpoint, data_dir)
        for name in saved["members"]
    )
    config, names = config_lib.from_json(saved["config"]), tuple(saved["class_names"])
    step = sum(member.step for member in members)
    return Ensemble(workdir, saved, config, names, step, members)


def _recalibrated(
    workdir: Path,
    saved: Mapping[str, Any],
    data_dir: str,
    step: int,
    graphdef: nnx.GraphDef,
    state: TrainState,
) -> TrainState | None:
    """The state with statistics of plain training images; None where those are not there."""
    config = config_lib.from_json(saved["config"])
    for place in dict.fromkeys(("", data_dir)):
        try:
            source = open_data(workdir, saved, "train", place).source("train", config.data)
        except UserError:
            continue
        say(f"step {step:,} is amid an epoch: batch statistics are taken anew from plain images")
        return make_recalibration(config, graphdef, source)(state)
    say(
        f"note: step {step:,} is amid an epoch, and the training images are not there to take "
        "batch norm's statistics anew: expect less than of an epoch's end"
    )
    return None


def _say_if_unfinished(workdir: Path, checkpoints: Checkpoints, epochs: int) -> None:
    try:
        latest = checkpoints.latest_loop
    except (UserError, OSError):  # then nobody knows, and the one asked for is sound
        return
    if latest is None:
        return
    stopping = EarlyStopping.from_state_dict(latest["early_stopping"])
    if stopping.epoch < epochs and not stopping.should_stop:
        say(
            f"note: {workdir} has trained {stopping.epoch} of {epochs} epochs: "
            "its training command goes on with it"
        )


def _open_one(workdir: Path, saved: dict[str, Any], checkpoint: str, data_dir: str) -> TrainedRun:
    config = config_lib.from_json(saved["config"])
    network = config.model.name
    for known, name in (
        (MODELS, network),
        (MODES, saved["preprocessing"]),
        (own_share_choices(network) if network in MODELS else (), config.eval.bn_own_until),
    ):
        if name not in known:
            raise UserError(
                f"{workdir}/config.json names {name!r}, which this version does not know: "
                f"it has {', '.join(known)}"
            )
    class_names = tuple(saved["class_names"])
    graphdef, params, batch_stats = create_model(config.model, len(class_names), config.seed)
    state = create_state(
        params,
        batch_stats,
        frozenset(trained_stages(config.model)),
        make_optimizer(config.optimizer, lambda _: 0.0, MODELS[config.model.name].stages),
        config.seed,
        average=config_lib.keeps_averages(config),
        start_share=config.train.start_share,
    )
    if not has_checkpoints(workdir / "checkpoints"):
        raise UserError(f"{workdir} has no checkpoint yet: train it first")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = resolve_step(checkpoints, checkpoint)
        state, loop = checkpoints.load(step, make_layout("jit").place(state))
        its = tuple(loop.get("class_names", class_names))
        if its != class_names:
            raise UserError(
                f"{workdir}/checkpoints/{step} answers with the classes {list(its)}, config.json "
                f"names {list(class_names)}: restore the run's own"
            )
        _say_if_unfinished(workdir, checkpoints, config.train.epochs)
    amid_an_epoch = float(state.sums["count"]) > 0
    fit: bool | None = None
    if follow(config, batch_stats):
        fit = not do_not_fit(config, batch_stats) or config.train.recalibrate > 0
        if not fit:
            say(
                f"note: {workdir} was trained with train.recalibrate=0: batch norm's statistics "
                "are of augmented images or other weights, and its answers may be far worse for it"
            )
        if amid_an_epoch and recalibration_is_due(config, batch_stats):
            anew = _recalibrated(workdir, saved, data_dir, step, graphdef, state)
            state, fit = anew or state, anew is not None
    eval_step = scoring_step(config, graphdef, saved["preprocessing"])
    apply = compile_apply(eval_step)
    params, batch_stats = state.for_evaluation()
    return TrainedRun(
        workdir,
        saved,
        config,
        class_names,
        step,
        fit,
        eval_step,
        apply,
        params,
        batch_stats,
    )
