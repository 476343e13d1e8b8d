"""Batch norm's running statistics, taken anew from plain training images.

Augmentation resamples images and so smooths their noise; running statistics that followed it do
not fit the plain images of an evaluation, which can cost a network many points of accuracy and
none of its training figures. Computed anew, as for averaged weights (Izmailov et al. 2018),
they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from covid_flax.augment import Augment
from covid_flax.compiler.xla import compiler_options
from covid_flax.data.pipeline import Source, gather
from covid_flax.mesh import make_mesh, put_batch, replicated
from covid_flax.models import MODELS, batch_stats_stages, own_shares, preprocessing_of
from covid_flax.models.layers import set_own_shares
from covid_flax.models.preprocess import preprocess
from covid_flax.step import TrainState

Tree = Any


def follow(config: ml_collections.ConfigDict, batch_stats: Tree) -> bool:
    """Whether there are running statistics that follow what is trained."""
    stages = batch_stats_stages(config.model)
    return any(jax.tree.leaves(batch_stats.get(stage, {})) for stage in stages)


def do_not_fit(config: ml_collections.ConfigDict, batch_stats: Tree) -> bool:
    """Whether those are not of what is evaluated.

    They follow augmented images, (of a mean of the weights) other weights, or networks that take
    no image's own moments.
    """
    augmented = Augment(**config.augment.to_dict()).active
    other = config.train.swa_start > 0 or config.train.start_share > 0
    own = config.eval.bn_own_share > 0
    return follow(config, batch_stats) and (augmented or other or own)


def is_due(config: ml_collections.ConfigDict, batch_stats: Tree) -> bool:
    """Whether they do not, and are to be taken anew."""
    return config.train.recalibrate > 0 and do_not_fit(config, batch_stats)


def make_recalibration(
    config: ml_collections.ConfigDict,
    graphdef: nnx.GraphDef,
    source: Source,
    start: str | None = None,
) -> Callable[[TrainState], TrainState]:
    """`state -> state` with the statistics of the configuration's `train.recalibrate` images.

    The images are drawn once, by the seed, and taken in whole batches, as many at once as in
    training. Where averages of the weights are kept, theirs are the statistics that change: an
    evaluation uses those.

    Args:
      config: of the run.
      graphdef: of its network.
      source: of its training images, or of the cached output of the stage before `start`.
      start: first stage to compute; None: all.
    """
    mesh = make_mesh()
    size = config.train.micro_batch or config.train.batch_size
    size = min(size, len(source)) // mesh.size * mesh.size or mesh.size  # no image twice
    count = max(1, min(config.train.recalibrate, len(source)) // size)
    order = np.random.default_rng(config.seed).permutation(len(source))
    batches = np.resize(order, count * size).reshape(count, jax.process_count(), -1)
    stages = batch_stats_stages(config.model)
    last = max(stages, key=MODELS[config.model.name].stages.index)
    preprocessing = preprocessing_of(config.model)

    def statistics(params: Tree, batch_stats: Tree, images: jax.Array) -> Tree:
        """Of this batch: the running ones, where these forget all that was before."""
        model = nnx.merge(graphdef, params, batch_stats)
        set_own_shares(model, own_shares(config))
        for _, module in nnx.iter_modules(model):
            if hasattr(module, "momentum"):
                module.momentum = 0.0
        x = images if start is not None else preprocess(images, preprocessing)
        model(x, batch_stats_in=stages, start=start, stop=last)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    apply = jax.jit(statistics, out_shardings=replicated(mesh), compiler_options=compiler_options())

    def like(old: jax.Array, x: np.ndarray) -> jax.Array:
        # Not `device_put`, by which hosts compare arrays, and no NaN is equal to itself.
        x = np.asarray(x, old.dtype)
        return jax.make_array_from_callback(x.shape, old.sharding, lambda index: x[index])

    def recalibrate(state: TrainState) -> TrainState:
        params, batch_stats = state.for_evaluation()
        totals = pending = None
        for batch in [*batches, None]:
            of_batch = None
            if batch is not None:
                images = gather(source, batch[jax.process_index()])["image"]
                of_batch = apply(params, batch_stats, put_batch(images, mesh))
            if pending is not None:  # the one before, while the device works on this one
                sums = _sums(jax.device_get(pending))
                totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
            pending = of_batch
        new = jax.tree.map(like, batch_stats, _moments(totals, count))
        if state.average:
            return dataclasses.replace(state, average={**state.average, "batch_stats": new})
        return dataclasses.replace(state, batch_stats=new)

    return recalibrate


def _sums(stats: Tree) -> Tree:
    """Float64, the second moment in place of the variance: these add up over batches."""
    if "var" not in stats:
        return {name: _sums(part) for name, part in stats.items()}
    mean, var = (stats[name].astype(np.float64) for name in ("mean", "var"))
    return {"mean": mean, "var": var + mean**2}


def _moments(totals: Tree, count: int) -> Tree:
    if "var" not in totals:
        return {name: _moments(part, count) for name, part in totals.items()}
    mean = totals["mean"] / count
    return {"mean": mean, "var": np.maximum(totals["var"] / count - mean**2, 0)}
