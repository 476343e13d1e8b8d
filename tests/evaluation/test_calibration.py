"""Judges: planted temperatures, a grid of temperatures, scikit-learn, every threshold tried."""

import json

import numpy as np
import pytest

from covid_flax.evaluation.assess import assess
from covid_flax.evaluation.calibration import (
    abstain_threshold,
    fit_calibration,
    fit_temperature,
    temperature_scale,
)
from covid_flax.evaluation.predictions import Predictions

special = pytest.importorskip("scipy.special")


def _planted(temperature, n=20_000, k=4, seed=0):
    """Labels drawn from the softmax of logits, and what a model says who multiplies those."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * 2
    truth = special.softmax(logits, axis=1)
    labels = (truth.cumsum(1) < rng.random((n, 1))).sum(1)
    return labels, special.softmax(logits * temperature, axis=1), truth


def _nll(labels, probabilities):
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


def test_scaling_is_the_softmax_of_the_divided_logits():
    logits = np.random.default_rng(0).normal(size=(50, 5)) * 10
    for t in (0.3, 1.0, 7.0):
        ours = temperature_scale(special.softmax(logits, axis=1), t)
        np.testing.assert_allclose(ours, special.softmax(logits / t, axis=1), rtol=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("t", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_the_predicted_class_stays(t):
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(4, 0.05), 500)
    p[:100] = np.eye(4)[rng.integers(0, 4, 100)]  # exact zeros
    p[100] = 0.25
    scaled = temperature_scale(p, t)
    np.testing.assert_array_equal(scaled.argmax(1), p.argmax(1))
    np.testing.assert_allclose(scaled.sum(1), 1, rtol=1e-12)
    assert np.isfinite(scaled).all()


@pytest.mark.parametrize("planted", [0.4, 1.0, 2.5])
def test_a_planted_temperature_is_found(planted):
    labels, p, truth = _planted(planted)
    fitted = fit_temperature(labels, p)
    assert fitted == pytest.approx(planted, rel=0.05)
    np.testing.assert_allclose(temperature_scale(p, fitted), truth, atol=0.02)
    best = min(_nll(labels, temperature_scale(p, t)) for t in np.geomspace(0.05, 20, 200))
    assert _nll(labels, temperature_scale(p, fitted)) <= best + 1e-9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(10))
def test_the_likelihood_is_never_worse_than_unscaled(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 40)), int(rng.integers(2, 6))
    labels = rng.integers(0, k, n)
    p = rng.dirichlet(np.full(k, 0.01), n) if seed % 2 else rng.dirichlet(np.ones(k), n)
    result = fit_calibration(labels, p)
    assert 0.05 <= result["temperature"] <= 20
    assert result["nll"]["after"] <= result["nll"]["before"] + 1e-12


@pytest.mark.filterwarnings("error")
def test_perfect_and_hopeless_predictions_have_a_temperature():
    labels = np.array([0, 1, 2])
    assert fit_temperature(labels, np.eye(3)) == 1  # nothing to better
    assert fit_temperature(labels, 0.1 + 0.7 * np.eye(3)) == 1  # no error tells how unsure to be
    assert fit_temperature(labels, np.eye(3)[[1, 2, 0]]) == pytest.approx(20, rel=1e-3)
    assert fit_temperature(labels, np.full((3, 3), 1 / 3)) == 1
    assert fit_temperature(np.array([0]), np.ones((1, 1))) == 1


def test_fit_calibration_reports_before_and_after():
    metrics = pytest.importorskip("sklearn.metrics")
    labels, p, _ = _planted(3.0, n=3000)
    result = fit_calibration(labels, p, target_accuracy=0.9)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["num_examples"] == 3000
    scaled = temperature_scale(p, result["temperature"])
    assert result["nll"]["before"] == pytest.approx(metrics.log_loss(labels, p), abs=1e-9)
    assert result["nll"]["after"] == pytest.approx(metrics.log_loss(labels, scaled), abs=1e-9)
    assert result["ece"]["before"] > 0.1 > 0.03 > result["ece"]["after"]
    threshold = result["abstain"]["threshold"]
    assert result["abstain"]["target_accuracy"] == 0.9
    assert threshold == abstain_threshold(labels, scaled, 0.9)
    kept = scaled.max(1) >= threshold
    assert 0 < kept.mean() < 1
    assert (scaled.argmax(1) == labels)[kept].mean() >= 0.9


@pytest.mark.parametrize("seed", range(8))
def test_the_abstain_threshold_is_the_lowest_that_will_do(seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), 60)
    if seed % 2:  # ties
        p = np.ceil(p * 5)
        p /= p.sum(1, keepdims=True)
    labels = (p.cumsum(1) < rng.random((60, 1))).sum(1)
    hits, confidence = p.argmax(1) == labels, p.max(1)
    for target in (0.5, 0.8, 0.95, 1.0):
        fit = [t for t in confidence if hits[confidence >= t].mean() >= target]
        assert abstain_threshold(labels, p, target) == (min(fit) if fit else None)


def test_no_threshold_where_the_surest_image_is_wrong():
    p = np.array([[0.9, 0.1], [0.6, 0.4]])
    assert abstain_threshold(np.array([1, 0]), p, 0.99) is None
    assert abstain_threshold(np.array([0, 0]), p, 0.99) == 0.6
    assert abstain_threshold(np.array([0] * 99 + [1]), np.tile(p[:1], (100, 1)), 0.99) == 0.9


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="over 0"):
        temperature_scale(np.eye(2), temperature)


def test_what_is_withheld_goes_by_the_scaled_probability():
    labels, p, truth = _planted(3.0, n=500)
    chosen = {
        "split": "val",
        "temperature": 3.0,
        "abstain": {"target_accuracy": 0.9, "threshold": 0.6},
    }
    predictions = Predictions(tuple("abcd"), tuple(map(str, range(500))), labels, p)
    got = assess(predictions, split="test", calibration=chosen)[0]["abstain"]
    kept = truth.max(1) >= 0.6
    assert got["coverage"] == kept.mean()
    assert got["accuracy"] == (truth.argmax(1) == labels)[kept].mean()


def test_copies_make_what_is_answered_no_surer():
    labels, p, truth = _planted(3.0, n=200)
    groups = tuple(f"g{i // 4}" for i in range(800))
    abstain = {"target_accuracy": 0.9, "threshold": 0.6}
    chosen = {"split": "val", "temperature": 3.0, "abstain": abstain}
    names, files = tuple("abcd")[: p.shape[1]], tuple(map(str, range(800)))
    copies = Predictions(names, files, np.repeat(labels, 4), np.repeat(p, 4, 0), groups)
    got = assess(copies, split="test", calibration=chosen)[0]["abstain"]
    n, a = int((truth.max(1) >= 0.6).sum()), got["accuracy"]  # of images, not of copies
    low, high = got["accuracy_interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(a * (1 - a) / n), rel=0.25)
