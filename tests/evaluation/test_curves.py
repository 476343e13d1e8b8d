"""Judges: scikit-learn's curves, and plain loops for those it lacks."""

import numpy as np
import pytest

from covid_flax.evaluation.curves import (
    decision_curve,
    precision_recall,
    reliability,
    risk_coverage,
    roc,
)
from covid_flax.evaluation.metrics import classification_report, expected_calibration_error

metrics = pytest.importorskip("sklearn.metrics")
calibration = pytest.importorskip("sklearn.calibration")
stats = pytest.importorskip("scipy.stats")

pytestmark = pytest.mark.filterwarnings("error")


def _case(seed, n=80, k=3):
    """Labels that the probabilities tell something about; with ties where the seed is odd."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), n)
    if seed % 2:
        p = np.ceil(p * 4)
        p /= p.sum(1, keepdims=True)
    return (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=k - 1), p


@pytest.mark.parametrize("seed", range(6))
def test_roc_is_scikit_learn_s(seed):
    labels, p = _case(seed)
    curve = roc(labels == 1, p[:, 1])
    fpr, tpr, thresholds = metrics.roc_curve(labels == 1, p[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive_rate, fpr, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.true_positive_rate, tpr, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    auroc = classification_report(labels, p, "abc", resamples=0)["per_class"]["b"]["auroc"]
    area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    assert area == pytest.approx(auroc, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_precision_recall_is_scikit_learn_s(seed):
    labels, p = _case(seed)
    curve = precision_recall(labels == 1, p[:, 1])
    precision, recall, thresholds = metrics.precision_recall_curve(labels == 1, p[:, 1])
    np.testing.assert_allclose(curve.precision, precision[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.recall, recall[::-1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(curve.thresholds[1:], thresholds[::-1])
    assert curve.thresholds[0] == np.inf
    auprc = classification_report(labels, p, "abc", resamples=0)["per_class"]["b"]["auprc"]
    area = (np.diff(curve.recall) * curve.precision[1:]).sum()
    assert area == pytest.approx(auprc, abs=1e-12)


def test_curves_of_one_class_alone_are_undefined():
    score = np.array([0.1, 0.2])
    for positive in ([True, True], [False, False]):
        assert roc(np.array(positive), score) is None
    assert precision_recall(np.array([False, False]), score) is None
    assert precision_recall(np.array([True, True]), score).precision.tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_is_scikit_learn_s(seed, bins):
    labels, p = _case(seed)
    curve = reliability(labels, p, bins)
    confidence, hits = p.max(1), p.argmax(1) == labels
    accuracy, mean = calibration.calibration_curve(hits, confidence, n_bins=bins)
    filled = curve.count > 0
    np.testing.assert_allclose(curve.accuracy[filled], accuracy, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.confidence[filled], mean, rtol=0, atol=1e-12)
    assert np.isnan(curve.accuracy[~filled]).all() and np.isnan(curve.low[~filled]).all()
    assert not filled.all()  # no top probability of three is under 1/3
    np.testing.assert_array_equal(curve.edges, np.linspace(0, 1, bins + 1))
    for b in range(bins):
        inside = (confidence > curve.edges[b]) & (confidence <= curve.edges[b + 1])
        assert curve.count[b] == inside.sum()
        if inside.any():
            test = stats.binomtest(int(hits[inside].sum()), int(inside.sum()))
            expected = tuple(test.proportion_ci(method="wilson"))
            assert (curve.low[b], curve.high[b]) == pytest.approx(expected, abs=1e-12)
    if bins == 15:
        gaps = np.abs(curve.accuracy - curve.confidence) * curve.count
        ece = expected_calibration_error(labels, p)
        assert ece == pytest.approx(np.nansum(gaps) / len(labels), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_decision_curve_is_the_plain_count(seed):
    labels, p = _case(seed)
    positive, score = labels == 0, p[:, 0]
    thresholds = np.append([0, 0.25, 0.5], np.linspace(0.01, 0.99, 20))  # ties with scores
    curve = decision_curve(positive, score, thresholds)
    for t, model, treat_all in zip(thresholds, curve.model, curve.treat_all, strict=True):
        for act, benefit in [(score >= t, model), (score >= 0, treat_all)]:
            true = sum(bool(a and y) for a, y in zip(act, positive, strict=True))
            false = sum(bool(a and not y) for a, y in zip(act, positive, strict=True))
            assert benefit == pytest.approx(true / 80 - false / 80 * t / (1 - t), abs=1e-12)
    np.testing.assert_array_equal(curve.thresholds, thresholds)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_decision_thresholds_are_odds(threshold):
    with pytest.raises(ValueError, match="under 1"):
        decision_curve(np.array([True]), np.array([0.5]), np.array([threshold]))


@pytest.mark.parametrize("seed", range(6))
def test_risk_coverage_is_the_plain_count(seed):
    labels, p = _case(seed)
    curve = risk_coverage(labels, p)
    confidence, wrong = p.max(1), p.argmax(1) != labels
    expected, area = [], 0.0
    for t in sorted(set(confidence), reverse=True):
        kept = confidence >= t
        expected.append((kept.mean(), wrong[kept].mean(), t))
        area += wrong[kept].mean() * (confidence == t).mean()
    ours = list(zip(curve.coverage, curve.risk, curve.thresholds, strict=True))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    assert curve.aurc == pytest.approx(area, abs=1e-12)
    assert curve.coverage[-1] == 1
    assert curve.risk[-1] == pytest.approx(wrong.mean())


def test_one_image_has_curves():
    curve = risk_coverage(np.array([0]), np.array([[0.3, 0.7]]))
    assert (curve.coverage.tolist(), curve.risk.tolist(), curve.aurc) == ([1], [1], 1)
    assert reliability(np.array([1]), np.array([[0.0, 1.0]])).count.tolist() == [0] * 14 + [1]
    assert decision_curve(np.array([True]), np.array([0.7]), np.array([0.5])).model.tolist() == [1]
