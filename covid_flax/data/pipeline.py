"""The Grain input pipeline: order, batches, shards, prefetching.

Examples come from any random-access source of `{"image": ..., "label": ...}`: files that
are decoded, or arrays in memory or mapped from the disk, from which a batch is gathered in
one piece. The order depends on the seed alone, never on the source. No JAX here: the caller
hands in what moves a batch to the devices.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from covid_flax.data.decode import decode, resize

Element = dict[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]

# Of `grain.MapDataset.shuffle`, whose permutations these are.
_SHUFFLE_ROUNDS = 4


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Element: ...


@runtime_checkable
class Gatherable(Protocol):
    """A source that gives many examples at once, faster than one by one."""

    def gather(self, indices: np.ndarray) -> Batch: ...


class Records(Protocol):
    """Random access to stored files: `{"image": bytes, "file": name}`."""

    def __getitem__(self, i: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Decodes and resizes stored files.

    Attributes:
      records: the stored files.
      indices: which of them, in this source's order.
      labels: class index of each, `[len(indices)]`.
      image_size, interpolation, intermediate_size: see the configuration.
    """

    records: Records
    indices: Sequence[int]
    labels: np.ndarray
    image_size: int
    interpolation: str
    intermediate_size: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Element:
        """`image` uint8 `[size, size, 3]`, `label` int32."""
        record = self.records[self.indices[i]]
        image = decode(record["image"], record["file"])
        image = resize(image, self.image_size, self.interpolation, self.intermediate_size)
        return {"image": image, "label": np.int32(self.labels[i])}


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples that lie in memory: `images` `[N, ...]`, `labels` `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Element:
        return {"image": self.images[i], "label": np.int32(self.labels[i])}

    def gather(self, indices: np.ndarray) -> Batch:
        """The examples `indices` `[B]` as one batch, copied."""
        return {"image": self.images[indices], "label": self.labels[indices].astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class StoreSource:
    """Some images of a decoded store (see `store.py`).

    Attributes:
      images: the store, uint8 `[M, size, size, 1]` where all images are grey, else
        `[M, size, size, 3]`.
      rows: which of them, in this source's order, `[N]`.
      labels: class index of each, `[N]`.

    Grey images keep their one channel, of which the step makes three: that costs nothing on a
    device, but most of a batch's time here.
    """

    images: np.ndarray
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Element:
        """`image` uint8 `[size, size, 1 or 3]`, `label` int32."""
        return {k: v[0] for k, v in self.gather(np.array([i])).items()}

    def gather(self, indices: np.ndarray) -> Batch:
        """`image` uint8 `[B, size, size, 1 or 3]`, `label` int32 `[B]`."""
        return {
            "image": self.images[self.rows[indices]],
            "label": self.labels[indices].astype(np.int32),
        }


def usable_examples(n: int, batch_size: int, last_batch: str) -> int:
    """How many of `n` shuffled examples an epoch trains on.

    `keep` trains on the short last batch, as Keras does; `drop` leaves it out.
    """
    return n - n % batch_size if last_batch == "drop" else n


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    usable: int,
    seed: int,
    num_threads: int,
    prefetch: int,
    put: Callable[[Batch], Any],
    fill: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches, every epoch in a new seeded order; its state can be saved.

    Args:
      source: the examples.
      batch_size: of all processes together; each gets its share of every batch.
      usable: examples an epoch, see `usable_examples`.
      seed: of the order, 0 to 2**32 - 1.
      num_threads: that decode; 0 builds batches in the calling thread. A source that
        gathers uses one at most.
      prefetch: batches decoded ahead.
      put: moves a process's share of a batch to its devices.
      fill: a short last batch is filled up to a multiple of this, and has a `mask` `[B]`,
        False for what only fills it.
      process_index, process_count: of this process.

    Returns:
      A Grain iterator (`get_state`, `set_state`). Over all processes the batches hold
      the same examples whatever the number of processes. The state is the number of
      batches taken: it fits any source of as many examples, and `index_iterator`.
    """
    order = _order(len(source), batch_size, usable, seed, fill, process_index, process_count)
    threads = 0 if isinstance(source, Gatherable) else num_threads
    ds = (
        order.map(lambda batch: {**gather(source, batch.pop("index")), **batch})
        .to_iter_dataset(_read_options(threads, prefetch))
        .map(put)
    )
    if num_threads:
        # The next batches travel to the device while a step computes.
        ds = grain.experimental.ThreadPrefetchIterDataset(ds, prefetch_buffer_size=2)
    return iter(ds)


def index_iterator(
    n: int,
    *,
    batch_size: int,
    usable: int,
    seed: int,
    fill: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """The order alone: `index` int32 `[B]`, which of `n` examples `train_iterator` batches.

    For examples that lie on the device already. Arguments and state are those of
    `train_iterator`.
    """
    order = _order(n, batch_size, usable, seed, fill, process_index, process_count)
    ds = order.to_iter_dataset(grain.ReadOptions(num_threads=0))
    # Drawn while the device computes: some milliseconds for large batches.
    return iter(grain.experimental.ThreadPrefetchIterDataset(ds, prefetch_buffer_size=64))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    num_threads: int,
    prefetch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example once, in order, in batches of one size.

    The last batch is filled up with zeros whose `mask` is False; `index` is the
    example's place in the source. Of a batch, which must divide among them, a process has every
    `process_count`-th example.
    """

    def build(k: int) -> Batch:
        index = np.arange(k * batch_size + process_index, (k + 1) * batch_size, process_count)
        mask = index < len(source)
        real = int(mask.sum())  # they come first
        # At least one, for its shape.
        batch = gather(source, np.minimum(index, len(source) - 1)[: max(1, real)])
        if real < len(index):
            batch = {name: _fill_up(v[:real], len(index)) for name, v in batch.items()}
        return {**batch, "mask": mask, "index": index.astype(np.int32)}

    if isinstance(source, Gatherable):
        num_threads, prefetch = min(1, num_threads), 2
    ds = grain.MapDataset.range(-(-len(source) // batch_size)).map(build)
    return iter(ds.to_iter_dataset(_read_options(num_threads, prefetch)))


def _read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
    # Each thread makes one batch at a time: of more threads than batches some would idle.
    return grain.ReadOptions(num_threads, max(prefetch, num_threads))


def _order(
    n: int,
    batch_size: int,
    usable: int,
    seed: int,
    fill: int,
    process_index: int,
    process_count: int,
) -> grain.MapDataset:
    """The `index` of each batch: `range(n).shuffle(seed)[:usable]`, in shares, repeated.

    Grain's own chain of these costs 20 microseconds an example, ten times the gathering.
    """
    per_epoch = -(-usable // batch_size)

    def batch(k: int) -> Batch:
        epoch, k = divmod(k, per_epoch)
        start, stop = k * batch_size, min((k + 1) * batch_size, usable)
        full = stop - start == batch_size
        length = batch_size if full else -(-(stop - start) // fill) * fill
        # A process's share is a run of neighbours, so that an example has one place in a batch,
        # by which it is augmented, whatever the number of processes.
        first, end = (length * i // process_count for i in (process_index, process_index + 1))
        places = np.arange(start + first, start + end)
        mask = places < stop
        epoch_seed = (seed + epoch) % 2**32
        shuffle = grain.experimental.index_shuffle
        # What fills a batch up may be any example.
        chosen = np.minimum(places, stop - 1).tolist()
        index = [shuffle(i, n - 1, epoch_seed, _SHUFFLE_ROUNDS) for i in chosen]
        return {"index": np.array(index, np.int32)} | ({} if full else {"mask": mask})

    return grain.MapDataset.range(sys.maxsize if per_epoch else 0).map(batch)


def gather(source: Source, indices: np.ndarray) -> Batch:
    """The examples `indices` `[B]` of a source as one batch."""
    if isinstance(source, Gatherable):
        return source.gather(indices)
    elements = [source[i] for i in indices.tolist()]
    return {name: np.stack([e[name] for e in elements]) for name in elements[0]}


def _fill_up(values: np.ndarray, length: int) -> np.ndarray:
    filled = np.zeros((length, *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    return filled
