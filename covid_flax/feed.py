"""Drives steps over batches: built on the host one by one, or gathered on the device.

The loop asks for so many steps and gets the new state; which of the two does it, it need
not know. Both take the examples in the same order, and an iterator's state from one
continues in the other.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Protocol

import grain
import jax
import numpy as np

from covid_flax import distributed
from covid_flax.console import Meter, say
from covid_flax.data.pipeline import (
    ArraySource,
    StoreSource,
    index_iterator,
    train_iterator,
)
from covid_flax.errors import UserError
from covid_flax.job import Job
from covid_flax.mesh import make_mesh, put_indices, put_whole
from covid_flax.run import Run
from covid_flax.step import TrainState, make_steps_on_device, make_train_step, take

Step = Callable[..., tuple[TrainState, jax.Array]]
_AHEAD = 2  # steps of which the host may not know yet that they are done
# Of a device's memory, the share that training images may take unasked.
_SHARE_OF_MEMORY = 0.25
# Of the host's, where that is the device, what cached outputs of frozen stages may take twice.
_OF_HOST_MEMORY = 2e9


class Feed(Protocol):
    """Attributes:
    batches: where the examples come from; its state says how far the run is.
    first_steps: steps of the first dispatch, which compiles.
    """

    batches: grain.DatasetIterator
    first_steps: int

    def advance(self, state: TrainState, steps: int, meter: Meter) -> TrainState:
        """The state after `steps` more steps, none beyond the end of an epoch."""


class HostFeed:
    """One dispatch a step.

    Args:
      batches: endless, on the devices already, see `train_iterator`.
      step: compiled, `step(state, batch)`.
      batch_size: examples of a batch, over all processes.
      rest: those of an epoch's short last batch, which has a mask.
    """

    def __init__(self, batches: grain.DatasetIterator, step: Step, batch_size: int, rest: int):
        self.batches, self._step = batches, _Compiling(step)
        self._batch_size, self._rest = batch_size, rest
        self.first_steps = 1
        self._ahead: collections.deque[jax.Array] = collections.deque()

    def advance(self, state: TrainState, steps: int, meter: Meter) -> TrainState:
        for _ in range(steps):
            # No further ahead of the device: what the host waits for then are images.
            if len(self._ahead) == _AHEAD:
                jax.block_until_ready(self._ahead.popleft())
            with meter.waiting():
                batch = next(self.batches)
            examples = self._rest if "mask" in batch else self._batch_size
            state, loss = self._step(meter, examples, 1, state, batch)
            self._ahead.append(loss)
        return state


class DeviceFeed:
    """Many steps a dispatch, on data that lie on the device; the host sends indices.

    Args:
      batches: endless, of `index` int32 `[N]`, with `mask` where a batch is filled up.
      data: `image` and `label` of all examples, on every device.
      steps: compiled `make_steps_on_device`.
      short_step: compiled `step(state, data, batch)` for batches with a mask.
      put: moves indices `[S, N]` or `[N]` to the devices, their last axis spread.
      chunk: most steps a dispatch.
      batch_size: examples of a batch, over all processes; `batches` has this one's.
      rest: those of an epoch's short last batch.
    """

    def __init__(
        self,
        batches: grain.DatasetIterator,
        data: dict[str, jax.Array],
        steps: Step,
        short_step: Step,
        put: Callable[[Any], Any],
        chunk: int,
        batch_size: int,
        rest: int,
    ):
        self.batches, self._data, self._put, self._chunk = batches, data, put, chunk
        self._batch_size, self._rest = batch_size, rest
        self._steps, self._short_step = _Compiling(steps), _Compiling(short_step)
        self.first_steps = chunk

    def advance(self, state: TrainState, steps: int, meter: Meter) -> TrainState:
        while steps:
            rows: list[np.ndarray] = []
            short = None
            with meter.waiting():
                while len(rows) < min(steps, self._chunk) and short is None:
                    batch = next(self.batches)
                    if "mask" in batch:
                        short = batch
                    else:
                        rows.append(batch["index"])
            if rows:
                # As many rows whatever their number, so that one program does for all.
                indices = np.zeros((self._chunk, len(rows[0])), np.int32)
                indices[: len(rows)] = rows
                state, _ = self._steps(
                    meter,
                    len(rows) * self._batch_size,
                    len(rows),
                    state,
                    self._data,
                    self._put(indices),
                    np.int32(len(rows)),
                )
            if short is not None:
                short = self._put(short)
                state, _ = self._short_step(meter, self._rest, 1, state, self._data, short)
            steps -= len(rows) + (short is not None)
        return state


class _Compiling:
    """Calls a jitted step; tells the meter which calls compile, for those are no rate."""

    def __init__(self, step: Step):
        self._step, self._seen = step, set[tuple]()

    def __call__(
        self, meter: Meter, examples: int, steps: int, state: TrainState, *args: Any
    ) -> tuple[TrainState, jax.Array]:
        shapes = tuple(x.shape for x in jax.tree.leaves(args))
        if shapes in self._seen:
            return self._step(state, *args)
        self._seen.add(shapes)
        jax.block_until_ready(state)
        with meter.compiling(examples, steps):
            return jax.block_until_ready(self._step(state, *args))


def make_feed(run: Run, job: Job) -> Feed:
    """From the device where the configuration's `data.on_device` says so, else from the host."""
    config, layout = run.config, job.layout
    order: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "usable": job.usable,
        # An epoch shuffles by this plus its number: those of neighbouring seeds must not meet.
        "seed": int(np.random.SeedSequence(config.seed).generate_state(1)[0]),
        "fill": job.fill,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    step = make_train_step(run.graphdef, job.tx, job.step_config)
    rest = job.usable % config.train.batch_size
    images = _images_for_device(run, job)
    # All processes must run one program, however much memory each has.
    if distributed.anywhere(images is None):
        batches = train_iterator(
            job.train_source,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            put=layout.put_batch,
            **order,
        )
        return HostFeed(batches, layout.compile_step(step), config.train.batch_size, rest)

    assert images is not None
    mesh = make_mesh()
    labels = run.data.labels("train")

    def short_step(
        state: TrainState, data: dict[str, jax.Array], batch: dict[str, jax.Array]
    ) -> tuple[TrainState, jax.Array]:
        return step(state, {**take(data, batch["index"]), "mask": batch["mask"]})

    if jax.default_backend() != "cpu":
        say(f"input: {len(images):,} images, {images.nbytes / 1e9:.2f} GB, lie on each device")
    return DeviceFeed(
        index_iterator(len(labels), **order),
        put_whole({"image": images, "label": labels}, mesh),
        layout.compile_step(make_steps_on_device(step)),
        layout.compile_step(short_step),
        lambda indices: put_indices(indices, mesh),
        chunk=min(config.train.log_every_steps, job.steps_per_epoch),
        batch_size=config.train.batch_size,
        rest=rest,
    )


def bytes_on_device(run: Run, job: Job) -> int:
    """What all training images take on each device; 0 where they are not put there.

    Raises UserError where they cannot be, and shall.
    """
    how, source = run.config.data.on_device, job.train_source
    if how == "never" or job.layout.axis_name:
        return 0
    flat = isinstance(source, ArraySource) and source.images.ndim == 2
    # In a loop XLA's convolutions take up to nine times as long on CPU; dense layers do not.
    if how == "auto" and jax.default_backend() == "cpu" and not flat:
        return 0
    if isinstance(source, ArraySource):
        size = source.images.nbytes
    elif isinstance(source, StoreSource):
        size = source.images[:1].nbytes * len(source.rows)
    elif how == "always":
        raise UserError(
            "data.on_device=always needs the decoded images in a store: raise data.store_gb"
        )
    else:
        return 0
    return size if how == "always" or _fits(size) else 0


def _images_for_device(run: Run, job: Job) -> np.ndarray | None:
    """All training images as they would lie on the device, None where they shall not."""
    source = job.train_source
    if not bytes_on_device(run, job):
        return None
    if isinstance(source, StoreSource):
        return source.images[source.rows]
    assert isinstance(source, ArraySource)
    return source.images


def _fits(size: int) -> bool:
    if jax.default_backend() == "cpu":
        return size <= _OF_HOST_MEMORY
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return size <= _SHARE_OF_MEMORY * limit
