"""The output of stages that are frozen, computed once for all images and kept."""

from __future__ import annotations

import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from covid_flax.console import say
from covid_flax.data.pipeline import ArraySource
from covid_flax.models import stage_before, trained_stages
from covid_flax.outputs import compile_apply, predict
from covid_flax.run import Run
from covid_flax.step import make_eval_step


def cacheable(config: Any) -> str | None:
    """The last frozen stage, if its output of an image is the same every epoch; else None.

    It is where no image is augmented, seen in other views too, or shown to a teacher.
    """
    return None if _changing(config) else _last_frozen(config)


def _last_frozen(config: Any) -> str | None:
    return stage_before(config.model, trained_stages(config.model)[0])


def _changing(config: Any) -> list[str]:
    """The keys for which the frozen stages' output has to be computed anew every epoch."""
    keys = [f"augment.{k}" for k, v in config.augment.to_dict().items() if v]
    keys += [f"eval.{k}" for k in ("mirror", "aspect", "bn_own_share") if config.eval[k]]
    return keys + (["train.teacher"] if config.train.teacher else [])


def features_from(run: Run) -> str | None:
    """The stage to start from with cached inputs; None where nothing is cached. Says which."""
    before = cacheable(run.config)
    if before is None:
        if _last_frozen(run.config) is not None:
            keys = ", ".join(_changing(run.config))
            say(f"frozen stages: computed anew every epoch because of {keys}")
        return None
    gigabytes = _feature_bytes(run) / 1e9
    in_memory = _in_memory(run.config, gigabytes)
    if in_memory is None:
        say(
            f"frozen stages: caching their output needs {gigabytes:.2f} GB, over "
            f"train.feature_cache_gb={run.config.train.feature_cache_gb:g} and "
            f"feature_disk_gb={run.config.train.feature_disk_gb:g}: computed anew every epoch"
        )
        return None
    say(
        f"frozen stages: those up to {before} give every image the same output each epoch: "
        f"computed once, {gigabytes:.2f} GB {'in memory' if in_memory else 'on disk'}"
    )
    return run.trained[0]


def _feature_bytes(run: Run) -> int:
    """Of the frozen stages' output for all training and validation images."""
    output = run.batch_shapes(run.trained[0], 1)["image"]
    images = len(run.data.files("train")) + len(run.data.files("val"))
    return images * output.size * output.dtype.itemsize


def _in_memory(config: Any, gigabytes: float) -> bool | None:
    """Whether they are kept there or on disk; None: they do not fit in either."""
    if gigabytes <= config.train.feature_cache_gb:
        return True
    return False if gigabytes <= config.train.feature_disk_gb else None


def cached_sources(
    run: Run, start: str, preprocessing: str, params: Any, batch_stats: Any
) -> tuple[ArraySource, ArraySource]:
    """The outputs of the frozen stages before `start` for the training and validation images.

    Args:
      run: as `features_from` took it.
      start: what `features_from` returned.
      preprocessing: mode of `covid_flax.models.preprocess`.
      params, batch_stats: of the frozen stages at least.
    """
    config = run.config
    stop = stage_before(config.model, start)
    in_memory = _in_memory(config, _feature_bytes(run) / 1e9)
    apply = compile_apply(make_eval_step(run.graphdef, preprocessing, stop=stop))

    def source(split: str) -> ArraySource:
        features = predict(
            apply,
            params,
            batch_stats,
            run.data.source(split, config.data),
            config,
            description=f"frozen stages, {split}",
            allocate=np.empty if in_memory else partial(_on_disk, run.workdir),
        )
        return ArraySource(features, run.data.labels(split))

    return source("train"), source("val")


def _on_disk(directory: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in a nameless file, which goes when the process ends, however it ends."""
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here, not a crash when a page is written.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "w+", shape=shape)
