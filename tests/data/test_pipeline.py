"""Judges: sets and counts, NumPy; that every image is seen as often as said."""

import subprocess
import sys

import numpy as np
import pytest

from covid_flax.data.pipeline import ArraySource, eval_batches, train_iterator, usable_examples


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
    usable = usable_examples(23, 5, 1, "drop")
    assert usable == 20
    assert [len(b) for b in _take(_train(23, 5, usable=usable), 5)] == [5] * 5


def test_the_kept_last_batch_divides_among_devices():
    assert usable_examples(23, 8, 4, "keep") == 20  # 2 x 8 + 4 of the 7 left
    assert usable_examples(23, 8, 1, "keep") == 23
    assert usable_examples(16, 8, 4, "keep") == 16
    assert usable_examples(3, 8, 4, "keep") == 0


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


def test_the_pipeline_imports_no_other_framework():
    """Grain itself imports JAX where it is installed."""
    code = (
        "import sys, covid_flax.data.pipeline;"
        "print([m for m in ('tensorflow', 'torch', 'keras') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
