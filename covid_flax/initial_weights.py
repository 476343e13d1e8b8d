"""The weights that a training begins with: drawn, a file's, or another run's."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_collections

from covid_flax.checkpoint import Checkpoints, has_checkpoints
from covid_flax.console import say
from covid_flax.data.dataset import Dataset
from covid_flax.data.splits import MANY_ALIKE, named_alike
from covid_flax.errors import UserError
from covid_flax.files import cache_dir
from covid_flax.models import (
    MODELS,
    RESNETS,
    batch_stats_stages,
    beginning_of,
    preprocessing_of,
    trained_stages,
)
from covid_flax.pretrained.fetch import resolve, sha256
from covid_flax.pretrained.load import (
    arrays_of_the_whole,
    load_weights,
    name_in_runs,
    stage_of,
)
from covid_flax.pretrained.names import keras_name
from covid_flax.pretrained.read import read_weights
from covid_flax.run_folder import fitted_rows, learned_of, named_run
from covid_flax.trained_run import TrainedRun, open_run

Tree = dict[str, Any]


def find_weights(config: ml_collections.ConfigDict) -> Path | None:
    """The file, downloaded if need be, or the run's folder; None: they are drawn.

    Raises:
      UserError: there is none, or the folder holds no trained run, or several.
    """
    if config.model.weights_may_miss and config.model.name not in RESNETS:
        raise UserError(
            f"model.weights_may_miss names stages of ResNets: set it to () for {config.model.name}"
        )
    if config.model.weights in ("none", "imagenet"):
        _refuse_random_share(config, ["head"])
    cache = cache_dir(config.data.cache_dir) / "weights"
    path = resolve(config.model.weights, config.model.name, cache)
    if path is None or not path.is_dir():
        return path
    named = f"model.weights={path}"
    saved = named_run("model.weights", path, "give the folder of a trained run, or a file")
    if "members" in saved:
        raise UserError(f"{named} holds several runs: give one, like {path / saved['members'][0]}")
    if not has_checkpoints(path / "checkpoints"):
        raise UserError(f"{named} has no checkpoint yet: train it first")
    its, whole = saved["config"]["model"]["name"], beginning_of(config.model)
    if its not in (config.model.name, None if whole is None else whole.name):
        raise UserError(
            f"{named} is of {its}, this run of {config.model.name}: set model.name, or give another"
        )
    return path


def initial_weights(
    config: ml_collections.ConfigDict,
    data: Dataset,
    params: Tree,
    batch_stats: Tree,
    path: Path | None,
) -> tuple[Tree, Tree, dict[str, Any]]:
    """Parameters and batch statistics to begin with, and what config.json says of them.

    Args:
      config, data: of the run that begins.
      params, batch_stats: as drawn, by stage.
      path: as `find_weights` found it. Of a run the best epoch's weights are taken, as it is
        evaluated with them; its head only where it knows the same classes.

    Raises:
      UserError: they do not fit the network, or have learned from images that are held out here.
    """
    about: dict[str, Any] = {"source": config.model.weights}
    if path is None:
        say("weights: none, everything starts at random")
        fixed = [s for s in params if params[s] and s not in trained_stages(config.model)]
        _note_frozen_norms(config, set(batch_stats) - set(fixed))
        if fixed:
            say(
                f"note: {', '.join(fixed)} begin at random and are never trained: set "
                "model.trainable=all, or load weights"
            )
        return params, batch_stats, about
    if path.is_dir():
        arrays, expects, of = _of_run(path, data)
    else:
        arrays, expects = read_weights(path), MODELS[config.model.name].preprocessing
        of = {"file": str(path), "sha256": sha256(path)}
    params, batch_stats, report = load_weights(
        arrays,
        params,
        batch_stats,
        source=str(path),
        may_miss=tuple(config.model.weights_may_miss),
        may_spare=arrays_of_the_whole(config.model),
        name_of=name_in_runs if path.is_dir() else keras_name,
    )
    say(f"weights: {path.name}: {report.summary()}")
    _refuse_random_share(config, {stage_of(name) for name in report.initialised})
    _note_frozen_norms(config, {stage_of(name) for name in report.initialised} & set(batch_stats))
    gets = preprocessing_of(config.model)
    if gets != expects:
        still = config.model.trainable == "head" or config.model.batch_norm == "frozen"
        say(
            f"note: these weights expect {expects!r} preprocessing and get {gets!r}"
            + ("; frozen batch norm never makes up for it" if still else "")
        )
    return params, batch_stats, about | of | {"report": report.summary()}


def _of_run(folder: Path, data: Dataset) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A run's arrays by name, its preprocessing, and what config.json says of it."""
    if leaked := learned_of(folder, data.held_out, data.class_names):
        raise UserError(
            f"model.weights={folder}, or a run that its weights come from, was trained on "
            f"{leaked:,} images that this run holds out: its figures would be of images seen; take "
            f"its split, data.split=file data.split_file={folder / 'split.csv'}, or another run"
        )
    try:
        run = open_run(folder)
        assert isinstance(run, TrainedRun)  # `find_weights` refuses several
        with Checkpoints(folder / "checkpoints") as checkpoints:
            digest = checkpoints.digest(run.step)
    except UserError as e:
        raise UserError(f"model.weights={folder}: {e}") from e
    arrays = run.arrays()
    if run.class_names != tuple(data.class_names):
        say(f"weights: {folder} knows other classes ({', '.join(run.class_names)})")
        held_out = len(data.held_out)
        if (alike := named_alike(data.held_out, fitted_rows(folder))) >= MANY_ALIKE * held_out:
            say(
                f"note: {alike:,} of {held_out:,} images held out here bear the name of one "
                "that it was trained on or stopped by: if they are copies, the figures flatter"
            )
        arrays = {name: x for name, x in arrays.items() if stage_of(name) != "head"}
    of = {"run": os.path.realpath(folder), "step": run.step, "sha256": digest}
    return arrays, run.saved["preprocessing"], of


def _refuse_random_share(config: ml_collections.ConfigDict, at_random: Collection[str]) -> None:
    """What is drawn is no weight to average with. Raises UserError."""
    if config.train.start_share and at_random:
        raise UserError(
            "train.start_share keeps a share of the weights that training begins with, and "
            f"{', '.join(sorted(at_random))} would begin at random: give model.weights=RUN, a run "
            "of the same classes and head, or train.start_share=0"
        )


def _note_frozen_norms(config: ml_collections.ConfigDict, at_random: set[str]) -> None:
    """Speaks of stages whose kernels are drawn and whose batch norm never follows them."""
    stages = sorted(at_random - batch_stats_stages(config.model))
    if stages:
        say(
            f"note: {', '.join(stages)} begin at random, and their batch norm keeps statistics "
            "that are not theirs: little can be learned from them; train them with "
            "model.batch_norm=train, or load their weights"
        )
