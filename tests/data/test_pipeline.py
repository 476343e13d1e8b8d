"""Judges: sets and counts, NumPy, Grain's own datasets; every image is seen as often as said."""

import ast
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest

from covid_flax.data import pipeline
from covid_flax.data.pipeline import (
    ArraySource,
    StoreSource,
    eval_batches,
    index_iterator,
    train_iterator,
    usable_examples,
)


def _source(n):
    return ArraySource(np.arange(n, dtype=np.float32)[:, None], np.arange(n, dtype=np.int32))


def _train(n, batch, *, seed=0, threads=0, index=0, count=1, usable=None):
    return train_iterator(
        _source(n),
        batch_size=batch,
        usable=n if usable is None else usable,
        seed=seed,
        num_threads=threads,
        prefetch=4,
        put=lambda b: b,
        process_index=index,
        process_count=count,
    )


def _take(iterator, k):
    return [next(iterator)["label"] for _ in range(k)]


@pytest.mark.parametrize("count", [2, 4])
def test_an_example_has_one_place_in_a_batch_whatever_the_number_of_processes(count):
    """It is augmented by that place, the short last batch's filling behind."""
    how = {"batch_size": 8, "usable": 22, "seed": 3, "fill": 4}
    whole = index_iterator(22, **how)
    parts = [index_iterator(22, **how, process_index=i, process_count=count) for i in range(count)]
    for _ in range(6):
        batch, shares = next(whole), [next(part) for part in parts]
        for key, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([s[key] for s in shares]), values)


@pytest.mark.parametrize("threads", [0, 3])
def test_every_epoch_sees_each_image_once_in_a_new_order(threads):
    n, batch = 23, 5
    it = _train(n, batch, threads=threads)
    epochs = [np.concatenate(_take(it, 5)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert list(epochs[0]) != list(epochs[1]) != list(epochs[2])
    again = np.concatenate(_take(_train(n, batch), 5))
    np.testing.assert_array_equal(epochs[0], again)
    other = np.concatenate(_take(_train(n, batch, seed=1), 5))
    assert list(other) != list(again)


def test_the_last_batch_is_short_or_dropped():
    assert [len(b) for b in _take(_train(23, 5), 6)] == [5, 5, 5, 5, 3, 5]
    usable = usable_examples(23, 5, "drop")
    assert usable == 20
    assert [len(b) for b in _take(_train(23, 5, usable=usable), 5)] == [5] * 5


@pytest.mark.parametrize("count", [1, 2])
def test_a_kept_short_batch_is_filled_up_behind_a_mask(count):
    """23 examples, batches of 8, a multiple of 4: the last holds 7 and one that fills it."""
    assert usable_examples(23, 8, "keep") == 23
    how = {"batch_size": 8, "usable": 23, "seed": 0, "fill": 4, "process_count": count}
    seen = []
    for process in range(count):
        batches = index_iterator(23, process_index=process, **how)
        full, _, short, after = (next(batches) for _ in range(4))
        assert set(full) == set(after) == {"index"} and set(short) == {"index", "mask"}
        assert len(full["index"]) == len(short["index"]) == 8 // count
        seen += [short["index"][short["mask"]]]
        batches = index_iterator(23, process_index=process, **how)
        seen += [next(batches)["index"] for _ in range(2)]
    assert sorted(np.concatenate(seen)) == list(range(23))


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_a_restored_iterator_goes_on_where_it_was(threads, k):
    it = _train(23, 5, threads=threads)
    _take(it, k)
    state = it.get_state()
    expected = _take(it, 9)
    restored = _train(23, 5, threads=threads)
    restored.set_state(state)
    for a, b in zip(expected, _take(restored, 9), strict=True):
        np.testing.assert_array_equal(a, b)


def test_processes_share_each_batch():
    """Two processes together see the very batches that one process sees, epoch after epoch."""
    one = _train(22, 4, usable=20)
    pair = [_train(22, 4, usable=20, index=i, count=2) for i in range(2)]
    for _ in range(12):
        whole = next(one)["label"]
        halves = [next(p)["label"] for p in pair]
        assert [len(h) for h in halves] == [2, 2]
        assert sorted(np.concatenate(halves)) == sorted(whole)


@pytest.mark.parametrize(("n", "batch", "count"), [(10, 4, 1), (8, 4, 1), (10, 4, 2), (1, 8, 2)])
def test_evaluation_sees_each_image_exactly_once(n, batch, count):
    seen = []
    for index in range(count):
        batches = eval_batches(
            _source(n),
            batch_size=batch,
            num_threads=2,
            prefetch=2,
            process_index=index,
            process_count=count,
        )
        for b in batches:
            assert len(b["mask"]) == batch // count
            seen += list(b["index"][b["mask"]])
            np.testing.assert_array_equal(b["label"][b["mask"]], b["index"][b["mask"]])
            assert not b["image"][~b["mask"]].any()
    assert sorted(seen) == list(range(n))


class OneByOne:
    """A source that cannot gather, as decoded files are."""

    def __init__(self, n):
        self._whole = _source(n)

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, i):
        return self._whole[i]


def _by_grain(n, batch, usable, seed, index, count):
    """The order in Grain's own datasets; a process has neighbours of each batch."""
    order = grain.MapDataset.range(n).shuffle(seed=seed)[:usable]
    ds = order.batch(batch).map(lambda b: np.array_split(b, count)[index]).repeat()
    return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=0)))


ORDERS = [  # n, batch, usable, seed, process index, process count
    (23, 5, 23, 0, 0, 1),
    (23, 5, 20, 2**32 - 2, 0, 1),  # the seeds of later epochs wrap around
    (22, 4, 20, 1, 0, 2),
    (22, 4, 20, 1, 1, 2),
    (23, 6, 21, 3, 2, 3),
    (7, 16, 7, 4, 0, 1),
    (1, 1, 1, 5, 0, 1),
    (70_000, 256, 70_000, 6, 0, 1),
]


@pytest.mark.parametrize(("n", "batch", "usable", "seed", "index", "count"), ORDERS)
def test_the_order_is_grains(n, batch, usable, seed, index, count):
    where = {"process_index": index, "process_count": count}
    how = {"batch_size": batch, "usable": usable, "seed": seed, **where}
    threads = {"num_threads": 2, "prefetch": 2, "put": lambda b: b}
    contestants = [
        train_iterator(_source(n), **how, **threads),
        train_iterator(OneByOne(n), **how, **threads),
    ]
    expected, indices = _by_grain(n, batch, usable, seed, index, count), index_iterator(n, **how)
    for _ in range(14):
        wanted = next(expected)
        for taken in (next(indices), *map(next, contestants)):
            label = taken.get("label", taken.get("index"))
            np.testing.assert_array_equal(label, wanted.astype(np.int32), strict=True)
            if "image" in taken:
                images = wanted[:, None].astype(np.float32)
                np.testing.assert_array_equal(taken["image"], images, strict=True)
            # Only a short batch has a mask, here with nothing to leave out.
            assert ("mask" in taken) == (len(wanted) < batch // count)
            assert np.all(taken.get("mask", True))


def test_the_order_is_that_of_earlier_versions():
    """Of this package and of Grain's: a run goes on in the order in which it began."""
    batches = index_iterator(10, batch_size=10, usable=10, seed=0)
    assert [next(batches)["index"].tolist() for _ in range(2)] == [
        [0, 4, 6, 7, 8, 3, 1, 9, 5, 2],
        [5, 7, 6, 0, 4, 8, 9, 2, 1, 3],
    ]


@pytest.mark.parametrize(("usable", "fill", "length"), [(23, 4, 4), (21, 4, 4), (22, 2, 2)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_short_batch_is_filled_up(usable, fill, length, count):
    """Its real examples are those of the plain order, and `mask` is True for them alone."""
    how = {"batch_size": 10, "usable": usable, "seed": 2}
    threads = {"num_threads": 0, "prefetch": 2, "put": lambda b: b}
    plain = _by_grain(30, 10, usable, 2, 0, 1)
    filled = [
        train_iterator(s, **how, **threads, fill=fill, process_index=i, process_count=count)
        for i in range(count)
        for s in (_source(30), OneByOne(30))
    ]
    for k in range(9):
        wanted = next(plain)
        taken = [next(it) for it in filled]
        for x, y in zip(taken[::2], taken[1::2], strict=True):
            np.testing.assert_array_equal(x["label"], y["label"])
        shares = taken[::2]
        assert all(("mask" in share) == (k % 3 == 2) for share in shares)
        rows = length if k % 3 == 2 else 10
        assert [len(share["label"]) for share in shares] == [rows // count] * count
        real = [share["label"][share.get("mask", np.full(rows // count, True))] for share in shares]
        assert sorted(np.concatenate(real)) == sorted(wanted)


@pytest.mark.parametrize("k", [*(pytest.param(k, marks=pytest.mark.slow) for k in (0, 3, 5)), 7])
def test_states_fit_every_source(k):
    """A run begun one way goes on in another: the state of each is put into all."""
    how = {"batch_size": 5, "usable": 23, "seed": 9}

    def make():
        put = {"put": lambda b: b, "prefetch": 3}
        return [
            train_iterator(_source(23), num_threads=0, **how, **put),
            train_iterator(_source(23), num_threads=3, **how, **put),
            train_iterator(OneByOne(23), num_threads=0, **how, **put),
            train_iterator(OneByOne(23), num_threads=3, **how, **put),
            index_iterator(23, **how),
            _by_grain(23, 5, 23, 9, 0, 1),
        ]

    def examples(batch):
        return batch.get("label", batch.get("index")) if isinstance(batch, dict) else batch

    for taken in make():
        for _ in range(k):
            next(taken)
        state = taken.get_state()
        expected = [examples(next(taken)) for _ in range(8)]
        for restored in make():
            restored.set_state(state)
            for batch in expected:
                np.testing.assert_array_equal(examples(next(restored)), batch)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_store_gathers_as_numpy_does(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 6, 5, channels), np.uint8)
    rows, labels = rng.permutation(40)[:30], rng.integers(0, 4, 30).astype(np.int32)
    source = StoreSource(images, rows, labels)
    assert len(source) == 30
    for indices in (np.array([29, 0, 0, 7]), np.array([3]), np.zeros(0, np.int32)):
        batch = source.gather(indices)
        expected = np.stack([images[r] for r in [*rows[indices], 0]])[:-1]
        np.testing.assert_array_equal(batch["image"], expected, strict=True)
        np.testing.assert_array_equal(batch["label"], labels[indices], strict=True)
        assert batch["image"].flags.c_contiguous
    one = source[4]
    np.testing.assert_array_equal(one["image"], images[rows[4]])
    assert one["label"] == labels[4] and one["label"].dtype == np.int32


def test_a_batch_is_no_view_of_the_source():
    """Devices may keep a batch's memory: the next batch must not write there."""
    source = _source(8)
    first = source.gather(np.arange(4))["image"]
    first[:] = -1
    assert source.images.min() == 0


@pytest.mark.parametrize(("n", "batch", "count"), [(10, 4, 1), (8, 4, 2), (1, 8, 2), (11, 6, 2)])
def test_evaluation_is_the_same_from_every_source(n, batch, count):
    for index in range(count):
        where = {"process_index": index, "process_count": count}
        a, b = (
            list(eval_batches(s, batch_size=batch, num_threads=2, prefetch=2, **where))
            for s in (_source(n), OneByOne(n))
        )
        # By hand: the padded examples, every `count`-th, cut into shares.
        total = -(-n // batch) * batch
        places = list(range(total))[index::count]
        shares = [places[i : i + batch // count] for i in range(0, len(places), batch // count)]
        assert len(a) == len(b) == len(shares)
        for x, y, share in zip(a, b, shares, strict=True):
            assert x.keys() == y.keys() == {"image", "label", "mask", "index"}
            for name in x:
                np.testing.assert_array_equal(x[name], y[name], strict=True)
            np.testing.assert_array_equal(x["index"], np.array(share, np.int32), strict=True)
            np.testing.assert_array_equal(x["mask"], np.array(share) < n)
            values = np.where(x["mask"], share, 0)
            np.testing.assert_array_equal(x["label"], values)
            np.testing.assert_array_equal(x["image"], values[:, None])


def test_padding_decodes_nothing():
    seen = []

    class Counted(OneByOne):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    list(eval_batches(Counted(9), batch_size=8, num_threads=0, prefetch=1))
    assert seen == list(range(9))


def test_the_pipeline_imports_no_other_framework():
    """Grain itself imports JAX where it is installed."""
    code = (
        "import sys, covid_flax.data.pipeline;"
        "print([m for m in ('tensorflow', 'torch', 'keras') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_data_modules_do_not_import_jax_themselves():
    for path in Path(pipeline.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("jax", "flax")], path.name
