"""The Grain input pipeline: shuffle, decode, resize, batch, shard, prefetch.

Elements come from any random-access source of `{"image": ..., "label": ...}`: decoded
images, or the cached outputs of frozen stages. No JAX here: the caller hands in what
moves a batch to the devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from covid_flax.data.decode import decode, resize

Element = dict[str, np.ndarray | np.generic]


class Source(Protocol):
    """Random access to examples, as `grain.MapDataset.source` takes it."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Element: ...


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


@dataclasses.dataclass(frozen=True)
class _Padded:
    """A source lengthened with zeros, `mask` telling which elements are real."""

    source: Source
    length: int
    blank: Element

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Element:
        real = i < len(self.source)
        element = self.source[i] if real else self.blank
        return {**element, "mask": np.bool_(real), "index": np.int32(i)}


def usable_examples(n: int, batch_size: int, devices: int, last_batch: str) -> int:
    """How many of `n` shuffled examples an epoch trains on.

    `drop` leaves out the short last batch. `keep` trains on it as Keras does, less the
    few images that do not divide among the devices.
    """
    rest = n % batch_size
    return n - rest if last_batch == "drop" else n - rest % devices


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    usable: int,
    seed: int,
    num_threads: int,
    prefetch: int,
    put: Callable[[Element], Any],
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches, every epoch in a new seeded order; its state can be saved.

    Args:
      source: the examples.
      batch_size: of all processes together; each gets its share of every batch.
      usable: examples an epoch, see `usable_examples`.
      seed: of the order, 0 to 2**32 - 1.
      num_threads: that build batches; 0 builds them in the calling thread.
      prefetch: batches built ahead.
      put: moves a process's share of a batch to its devices.
      process_index, process_count: of this process.

    Returns:
      A Grain iterator (`get_state`, `set_state`). Over all processes the batches hold
      the same examples whatever the number of processes.
    """
    order = grain.MapDataset.range(len(source)).shuffle(seed=seed)[:usable]
    ds = (
        order[process_index::process_count]
        .map(lambda i: source[int(i)])
        .batch(batch_size // process_count)
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads, prefetch))
        .map(put)
    )
    if num_threads:
        # The next batches travel to the device while a step computes.
        ds = grain.experimental.ThreadPrefetchIterDataset(ds, prefetch_buffer_size=2)
    return iter(ds)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    num_threads: int,
    prefetch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Element]:
    """Every example once, in order, in batches of one size.

    The last batch is filled up with zeros whose `mask` is False; `index` is the
    example's place in the source.
    """
    length = -(-len(source) // batch_size) * batch_size
    blank: Element = {k: np.zeros_like(v) for k, v in source[0].items()}
    ds = grain.MapDataset.source(_Padded(source, length, blank))[process_index::process_count]
    batches = ds.batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads, prefetch)))
