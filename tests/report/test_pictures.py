"""The pictures are compared with scikit-learn's figures, and read back from their SVG."""

import base64
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from covid_flax.evaluation.curves import reliability
from covid_flax.evaluation.metrics import classification_report
from covid_flax.evaluation.predictions import Predictions
from covid_flax.report.pictures import (
    decision_figure,
    evaluation_pictures,
    picture,
    precision_recall_figure,
    reliability_figure,
    risk_coverage_figure,
    roc_figure,
    thin,
)

NAMES = ("COVID", "Lung_Opacity", "Normal")
AREAS = ("0.9", "0.8", "0.7")


def _predictions(n=600, names=NAMES, seed=0, skill=1.5):
    random = np.random.default_rng(seed)
    labels = random.integers(len(names), size=n)
    logits = random.normal(size=(n, len(names))) + skill * np.eye(len(names))[labels]
    p = np.exp(logits)
    return Predictions(names, tuple(f"{i}.png" for i in range(n)), labels, p / p.sum(1)[:, None])


def _svg(markup):
    """The picture's SVG, parsed, and its text."""
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', markup)
    text = base64.b64decode(data).decode()
    return ET.fromstring(text), text


def _lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_roc_area_is_scikit_learns():
    p = _predictions()
    (axes,) = roc_figure(p, NAMES, AREAS).axes
    for i, name in enumerate(NAMES):
        x, y = _lines(axes)[f"{name} {AREAS[i]}"].T
        expected = roc_auc_score(p.labels == i, p.probabilities[:, i])
        assert np.trapezoid(y, x) == pytest.approx(expected, abs=5e-4)


def test_precision_recall_steps_hold_scikit_learns_area():
    p = _predictions(90)
    (axes,) = precision_recall_figure(p, NAMES, AREAS).axes
    for i, name in enumerate(NAMES):
        recall, precision = _lines(axes)[f"{name} {AREAS[i]}"].T
        expected = average_precision_score(p.labels == i, p.probabilities[:, i])
        assert np.trapezoid(precision, recall) == pytest.approx(expected, abs=5e-4)


def test_a_class_whose_name_begins_with_an_underscore_is_in_the_legend():
    names = ("_other", *NAMES[1:])
    for figure in (roc_figure, precision_recall_figure):
        (legend,) = figure(_predictions(), names, AREAS).legends
        assert len(legend.get_texts()) == len(names)


def test_class_without_images_has_no_curve():
    p = _predictions()
    labels = np.where(p.labels == 1, 0, p.labels)
    p = Predictions(p.class_names, p.files, labels, p.probabilities)
    for figure in (roc_figure(p, NAMES, AREAS), precision_recall_figure(p, NAMES, AREAS)):
        (legend,) = figure.legends
        assert [t.get_text().split()[0] for t in legend.get_texts()] == ["COVID", "Normal"]


def test_reliability_is_scikit_learns_with_counts():
    p = _predictions(2000)
    upper, lower = reliability_figure(p).axes
    top, right = p.probabilities.max(1), p.predicted == p.labels
    accuracy, confidence = calibration_curve(right, top, n_bins=15)
    points = upper.containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, np.column_stack([confidence, accuracy]), atol=1e-12)
    heights = [bar.get_height() for bar in lower.patches]
    np.testing.assert_array_equal(heights, np.histogram(top, 15, (0, 1))[0])


def test_decision_curve_is_its_definition():
    p = _predictions()
    figure = decision_figure(p, NAMES)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(NAMES)
    for i, axes in enumerate(shown):
        positive = p.labels == i
        for t, net in _lines(axes)["model"][[4, 49, 90]]:
            called = p.probabilities[:, i] >= t
            hits, misses = (called & positive).mean(), (called & ~positive).mean()
            assert net == pytest.approx(hits - misses * t / (1 - t), abs=1e-12)
        t, net = _lines(axes)["act on all"][30]
        assert net == pytest.approx(positive.mean() - (~positive).mean() * t / (1 - t), abs=1e-12)


def test_risk_coverage_ends_at_the_error_and_marks_the_threshold():
    p = _predictions()
    (axes,) = risk_coverage_figure(p).axes
    error = (p.predicted != p.labels).mean()
    np.testing.assert_allclose(axes.lines[0].get_xydata()[-1], [100, 100 * error])
    assert axes.get_legend() is None

    abstain = {"threshold": 0.9134, "coverage": 0.4, "accuracy": 0.95}
    (axes,) = risk_coverage_figure(p, abstain).axes
    np.testing.assert_allclose(_lines(axes)["threshold 0.913"], [[40, 5]])
    (axes,) = risk_coverage_figure(p, abstain | {"threshold": None}).axes
    assert axes.get_legend() is None


@pytest.mark.parametrize("skill", [0, 0.7, 3])
def test_thinned_curve_looks_the_same(skill):
    """4,233 images: no point of either line is further from the other than a pixel."""
    p = _predictions(4233, skill=skill)
    x, y, _ = roc_curve(p.labels == 0, p.probabilities[:, 0], drop_intermediate=False)
    thinned = thin(x, y)
    assert 10 < len(thinned[0]) <= 300 < len(x)
    # Turned by 45 degrees both are functions, however steep; `size` pixels are the whole picture.
    gap = np.interp(x + y, thinned[0] + thinned[1], thinned[0] - thinned[1]) - (x - y)
    size = 400
    assert np.abs(gap).max() / np.sqrt(2) * size < 1


def test_thinning_keeps_corners_ends_and_loops():
    x = np.array([0, 0, 0, 0.5, 1, 1, 0, 0])
    y = np.array([0, 0.5, 1, 1, 1, 0, 0, 0])
    corners = [[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]]
    np.testing.assert_array_equal(np.column_stack(thin(x, y)), corners)
    np.testing.assert_array_equal(thin(np.array([0.3]), np.array([0.4])), [[0.3], [0.4]])


def test_picture_is_a_closed_image():
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().set_title('<b>"&')
    markup = picture(figure, 'said "so" <now>')
    assert re.fullmatch(r'<img [^<>]*alt="said &#34;so&#34; &lt;now&gt;"[^<>]*>', markup)
    root, text = _svg(markup)
    assert root.tag.endswith("svg")
    assert '<b>"&' in {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "<b>" not in text and "DOCTYPE" not in text
    assert picture(figure, "a") == picture(figure, "a")  # no date, no random name


def test_odd_names_stay_text_apart_and_drawable():
    names = ("$x^{2", "<script>alert(1)</script>", "\x01\ud800", "新冠", "a" * 99 + "b", "a" * 99)
    p = _predictions(60, names)
    report = classification_report(p.labels, p.probabilities, names, resamples=0)
    markups = evaluation_pictures(report, p)
    assert len(markups) == 6
    for name, markup in markups.items():
        root, text = _svg(markup)  # no character that XML forbids
        assert "<script" not in text
        shown = " ".join("".join(e.itertext()) for e in root.iter())
        if name in ("roc", "precision_recall", "decision", "confusion"):
            assert "$x^{2" in shown and "新冠" in shown
            assert "5. aaaa" in shown and "6. aaaa" in shown


def test_each_picture_names_its_own_area():
    p = _predictions()
    report = classification_report(p.labels, p.probabilities, NAMES, resamples=0)
    made = evaluation_pictures(report, p)
    for key, area in (("roc", roc_auc_score), ("precision_recall", average_precision_score)):
        assert f"COVID {area(p.labels == 0, p.probabilities[:, 0]):.3f}" in made[key]


def test_axes_bars_and_the_threshold_are_of_what_is_shown():
    p = _predictions()
    report = classification_report(p.labels, p.probabilities, NAMES, resamples=0)
    report |= {"abstain": {"threshold": 0.9, "coverage": 0.4, "accuracy": 0.95}}
    for calibration, shown in (
        (None, True),
        ({"applied": False}, False),
        ({"applied": True}, True),
    ):
        made = evaluation_pictures(report | {"calibration": calibration}, p)
        assert ("threshold 0.900" in _svg(made["risk_coverage"])[1]) == shown
    for figure, labels in (
        (roc_figure(p, NAMES, AREAS), ("false positive rate", "sensitivity")),
        (precision_recall_figure(p, NAMES, AREAS), ("recall (sensitivity)", "precision (PPV)")),
        (risk_coverage_figure(p), ("images kept (%)", "error among them (%)")),
    ):
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == labels
    bins = reliability(p.labels, p.probabilities)
    bars = reliability_figure(p).axes[0].containers[0].lines[2][0].get_segments()
    want = np.column_stack([bins.low, bins.high])[bins.count > 0]
    np.testing.assert_allclose([bar[:, 1] for bar in bars], want, atol=1e-12)


def test_the_legend_holds_the_picture_s_own_areas():
    p = _predictions()
    report = classification_report(p.labels, p.probabilities, NAMES, resamples=0)
    made = evaluation_pictures(report, p)
    for key, area in (("roc", roc_auc_score), ("precision_recall", average_precision_score)):
        for i, name in enumerate(NAMES):
            assert f"{name} {area(p.labels == i, p.probabilities[:, i]):.3f}" in _svg(made[key])[1]
