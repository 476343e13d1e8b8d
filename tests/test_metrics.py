"""Judge: scikit-learn."""

import json

import numpy as np
import pytest

from covid_flax.metrics import classification_report

sklearn = pytest.importorskip("sklearn.metrics")


def _agrees(labels, probabilities, names):
    report = classification_report(labels, probabilities, names, loss=0.25)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    predicted = probabilities.argmax(1)
    indices = range(len(names))
    matrix = sklearn.confusion_matrix(labels, predicted, labels=indices)
    np.testing.assert_array_equal(report["confusion_matrix"], matrix)
    figures = sklearn.precision_recall_fscore_support(
        labels, predicted, labels=indices, zero_division=0
    )
    for key, values in zip(("precision", "recall", "f1", "support"), figures, strict=True):
        ours = [report["per_class"][name][key] for name in names]
        np.testing.assert_allclose(ours, values, rtol=0, atol=1e-9, err_msg=key)
    assert report["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted), abs=1e-9)
    balanced = sklearn.balanced_accuracy_score(labels, predicted)
    assert report["balanced_accuracy"] == pytest.approx(balanced, abs=1e-9)
    assert report["num_examples"] == len(labels)
    assert report["class_names"] == names
    assert report["loss"] == 0.25


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*classes not in y_true")
def test_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 15))
    n = int(rng.integers(1, 300))
    present = rng.permutation(k)[: rng.integers(1, k + 1)]  # some classes have no images
    labels = rng.choice(present, n)
    probabilities = rng.dirichlet(np.ones(k), n)
    probabilities[np.arange(n), labels] += rng.random(n) * 0.5
    probabilities[:, rng.integers(k)] *= 0.01  # one is hardly ever predicted
    _agrees(labels, probabilities, [f"class {i}" for i in range(k)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "labels, predicted",
    [
        ([0, 0, 0], [0, 0, 0]),  # one class, all right
        ([0, 0, 0], [2, 2, 2]),  # none right
        ([1], [1]),
        ([0, 1, 2], [1, 1, 1]),  # two never predicted
    ],
)
def test_agrees_with_scikit_learn_on_degenerate_input(labels, predicted):
    _agrees(np.array(labels), np.eye(3)[predicted], ["a", "b", "c"])


def test_rows_are_true_and_columns_predicted():
    report = classification_report(np.array([0, 0, 0, 1]), np.eye(2)[[1, 1, 0, 1]], ["x", "y"])
    assert report["confusion_matrix"] == [[1, 2], [0, 1]]
    assert report["loss"] is None


def test_of_equal_probabilities_the_first_counts():
    report = classification_report(np.array([0, 1]), np.full((2, 2), 0.5), ["x", "y"])
    assert report["confusion_matrix"] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    "labels, probabilities, names, message",
    [
        ([0, 1], np.ones((2, 3)), ["a", "b"], r"probabilities must be \[2, 2\].*\[2, 3\]"),
        ([0, 1], np.ones((3, 2)), ["a", "b"], "probabilities must be"),
        ([0, 2], np.ones((2, 2)), ["a", "b"], r"labels must lie in 0..1, got 0..2"),
        ([-1, 0], np.ones((2, 2)), ["a", "b"], "labels must lie"),
        ([0.0, 1.0], np.ones((2, 2)), ["a", "b"], "integers"),
        ([], np.ones((0, 2)), ["a", "b"], "labels must be integers"),
        ([0, 1], np.array([[1, 0], [np.nan, 0]]), ["a", "b"], "row 1"),
        ([0, 1], np.ones((2, 2)), ["a", "a"], "differ"),
    ],
)
def test_bad_input_is_refused(labels, probabilities, names, message):
    labels = np.array(labels, dtype=None if labels else np.int64)
    with pytest.raises(ValueError, match=message):
        classification_report(labels, probabilities, names)
