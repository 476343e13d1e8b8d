"""Runs a whole source through a compiled function, each example exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from covid_flax.compiler.xla import compiler_options
from covid_flax.data.pipeline import Source, eval_batches
from covid_flax.evaluation.metrics import log_softmax
from covid_flax.mesh import make_mesh, put_batch, replicated
from covid_flax.models import own_shares
from covid_flax.step import make_eval_step


def scoring_step(
    config: ml_collections.ConfigDict,
    graphdef: nnx.GraphDef,
    preprocessing: str,
    start: str | None = None,
) -> Callable[..., Any]:
    """The step by which images are scored, in validation and evaluation alike.

    Args:
      config: of the run; its `eval` says by which views and statistics.
      graphdef, preprocessing, start: as `make_eval_step` takes them.
    """
    return make_eval_step(
        graphdef,
        preprocessing,
        start=start,
        mirror=config.eval.mirror,
        aspect=config.eval.aspect,
        own_shares=own_shares(config),
    )


def compile_apply(step: Callable[..., Any]) -> Callable[..., Any]:
    """Jits `step(params, batch_stats, images)`; its output comes back whole to every process."""
    whole = replicated(make_mesh())

    def apply(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        output = step(params, batch_stats, batch["image"])
        return {"output": output, "index": batch["index"], "mask": batch["mask"]}

    return jax.jit(apply, out_shardings=whole, compiler_options=compiler_options())


def predict(
    apply: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    source: Source,
    config: ml_collections.ConfigDict,
    *,
    description: str = "",
    allocate: Callable[..., np.ndarray] = np.empty,
) -> np.ndarray:
    """The output for every example of `source`, in its order: `[N, ...]`.

    Args:
      apply: from `compile_apply`.
      params, batch_stats: the network's arrays.
      source: the examples.
      config: says the batch's size over all devices (`eval.batch_size`, made a multiple of their
        number), and `data.num_threads` and `data.prefetch`.
      description: shows a progress bar by this name; none where empty.
      allocate: `(shape, dtype)` to the array that takes the output.

    Raises:
      RuntimeError: an example was not seen exactly once.
    """
    mesh = make_mesh()
    batch_size = -(-min(config.eval.batch_size, len(source)) // mesh.size) * mesh.size
    batches = eval_batches(
        source,
        batch_size=batch_size,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    seen = np.zeros(len(source), np.int64)
    outputs: np.ndarray | None = None

    def collect(result: dict[str, jax.Array]) -> None:
        nonlocal outputs
        host = jax.device_get(result)
        index = host["index"][host["mask"]]
        if outputs is None:
            outputs = allocate((len(source), *host["output"].shape[1:]), host["output"].dtype)
        outputs[index] = host["output"][host["mask"]]
        np.add.at(seen, index, 1)
        bar.update(len(index))

    pending: dict[str, jax.Array] | None = None
    quiet = not description or jax.process_index() != 0
    with tqdm(
        total=len(source), desc=description, unit=" images", disable=quiet, leave=False
    ) as bar:
        for batch in batches:
            inputs = {k: batch[k] for k in ("image", "index", "mask")}
            result = apply(params, batch_stats, put_batch(inputs, mesh))
            if pending is not None:  # fetched while the next batch computes
                collect(pending)
            pending = result
        if pending is not None:
            collect(pending)
    if outputs is None or not np.all(seen == 1):
        raise RuntimeError(f"evaluation did not see each of {len(source)} examples exactly once")
    return outputs


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean categorical cross-entropy over the examples, unweighted, unsmoothed."""
    return float(-np.mean(log_softmax(logits)[np.arange(len(labels)), labels]))
