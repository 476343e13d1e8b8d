"""Judge: Keras's own callback, driven epoch by epoch on a dummy model."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import dataclasses
import json
import math

import numpy as np
import pytest

from covid_flax.early_stopping import EarlyStopping, best_epoch
from covid_flax.errors import UserError

keras = pytest.importorskip("keras")


class _Model:
    stop_training = False

    def get_weights(self):
        return []

    def set_weights(self, weights):
        pass


def _keras(series, mode, patience, min_delta, start=0):
    """Epoch of the stop (None if it ran through) and of the best weights, from 1, and the best."""
    callback = keras.callbacks.EarlyStopping(
        monitor="value",
        mode=mode,
        patience=patience,
        min_delta=min_delta,
        restore_best_weights=True,
        start_from_epoch=start,
    )
    model = _Model()
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(series):
        callback.on_epoch_end(epoch, {"value": value})
        if model.stop_training:
            return epoch + 1, callback.best_epoch + 1, callback.best
    return None, callback.best_epoch + 1, callback.best


def _ours(series, mode, patience, min_delta, start=0):
    stopping = EarlyStopping(mode, patience, min_delta, start)
    last_improved = 0
    for epoch, value in enumerate(series, 1):
        if stopping.update(value):
            last_improved = epoch
        assert stopping.best_epoch == last_improved
        if stopping.should_stop:
            return epoch, stopping.best_epoch, stopping.best
    return None, stopping.best_epoch, stopping.best


def _same(ours, keras_says):
    return ours[:2] == keras_says[:2] and np.array_equal(ours[2], keras_says[2], equal_nan=True)


def _series(rng):
    """Random walks, plateaus with exact ties, and differences near float32's resolution."""
    length = int(rng.integers(1, 30))
    kind = rng.integers(4)
    if kind == 0:
        values = np.cumsum(rng.normal(-0.02, 0.1, length)) + 1
    elif kind == 1:
        values = rng.integers(0, 4, length) * 0.1
    elif kind == 2:
        values = 0.7 + rng.integers(-3, 4, length) * 2e-8
    else:
        values = np.repeat(rng.random(length), rng.integers(1, 4, length))[:length]
    values = [float(v) for v in values]
    draw = rng.random()
    if draw < 0.1:
        values[0] = math.nan
    elif draw < 0.3:
        values[int(rng.integers(length))] = math.nan
    elif draw < 0.35:
        values[int(rng.integers(length))] = math.inf
    return values


@pytest.mark.parametrize("mode", ["min", "max"])
def test_agrees_with_keras_on_random_series(mode):
    rng = np.random.default_rng({"min": 0, "max": 1}[mode])
    stops = 0
    for _ in range(300):
        series = _series(rng)
        patience = int(rng.integers(1, 7))
        min_delta = float(rng.choice([0.0, 0.0, 0.1, 0.05, -0.1, 1e-8]))
        start = int(rng.integers(len(series))) if rng.random() < 0.3 else 0
        settings = (mode, patience, min_delta, start)
        expected = _keras(series, *settings)
        assert _same(_ours(series, *settings), expected), (series, settings)
        stops += expected[0] is not None
    assert 50 < stops < 290  # both outcomes were tried


def test_keras_takes_patience_0_as_1():
    for series in ([1.0, 1.0], [1.0, 0.5, 0.4, 0.45], [math.nan, 1.0]):
        assert _same(_ours(series, "min", 1, 0.0), _keras(series, "min", 0, 0.0))


def test_patience_none_never_stops_and_keeps_the_best():
    stopping = EarlyStopping(mode="max", patience=None)
    for value in [0.1, 0.9] + [0.2] * 500:
        stopping.update(value)
        assert not stopping.should_stop
    assert (stopping.best, stopping.best_epoch, stopping.wait) == (0.9, 2, 500)


def test_before_the_judging_begins_the_best_of_those_stands_in():
    stopping = EarlyStopping(patience=1, start_from_epoch=3)
    assert [stopping.update(value) for value in (0.3, 0.2, 0.4, 0.9, 0.8)] == [1, 1, 0, 1, 1]
    assert (stopping.best, stopping.best_epoch, stopping.should_stop) == (0.8, 5, False)
    assert not stopping.update(0.8) and stopping.should_stop


def test_of_a_finished_training_epochs_may_be_missing():
    losses = {1: 0.1, 2: 0.2, 4: 0.5, 5: 0.6}
    assert best_epoch(losses, "val_loss") == 1
    assert best_epoch(losses, "val_loss", start_from_epoch=2) == 4
    assert best_epoch(losses, "val_accuracy", start_from_epoch=2) == 5
    assert best_epoch({}, "val_loss", start_from_epoch=2) == 0


def test_state_survives_json_at_every_epoch():
    rng = np.random.default_rng(2)
    for _ in range(40):
        series = _series(rng)
        through = EarlyStopping(mode="min", patience=3, min_delta=0.1 + 0.2)
        resumed = dataclasses.replace(through)
        for value in series:
            text = json.dumps(resumed.state_dict(), allow_nan=False)
            resumed = EarlyStopping.from_state_dict(json.loads(text))
            assert resumed.update(value) == through.update(value)
            assert resumed.should_stop == through.should_stop
            # repr tells every float apart and, unlike ==, takes NaN for NaN.
            assert repr(resumed) == repr(through)


@pytest.mark.parametrize(
    "bad", [{"mode": "auto"}, {"patience": 0}, {"patience": -1}, {"min_delta": math.nan}]
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        EarlyStopping(**bad)
