"""Judge: scikit-learn, on the images themselves and on each resample written out."""

import json
import warnings

import numpy as np
import pytest

from covid_flax.errors import UserError
from covid_flax.evaluation.intervals import cluster_weights
from covid_flax.evaluation.metrics import (
    classification_report,
    log_loss,
    resampled_figures,
)

sklearn = pytest.importorskip("sklearn.metrics")

NAN = float("nan")
PREVALENCE = 0.2


def _one_vs_rest(positive, called, score):
    """scikit-learn's figures of one class, NaN where the figure is 0/0."""
    positive, called = positive.astype(int), called.astype(int)
    n = len(positive)
    both = 0 < positive.sum() < n

    def at(prevalence, y, x):  # the predictive value where the class is as rare as stated
        weight = np.where(y == 1, prevalence / y.sum(), (1 - prevalence) / (n - y.sum()))
        return sklearn.precision_score(y, x, sample_weight=weight, zero_division=np.nan)

    return {
        "precision": sklearn.precision_score(positive, called, zero_division=np.nan),
        "recall": sklearn.recall_score(positive, called, zero_division=np.nan),
        "f1": sklearn.f1_score(positive, called, zero_division=np.nan),
        "specificity": sklearn.recall_score(1 - positive, 1 - called, zero_division=np.nan),
        "npv": sklearn.precision_score(1 - positive, 1 - called, zero_division=np.nan),
        "auroc": sklearn.roc_auc_score(positive, score) if both else NAN,
        "auprc": sklearn.average_precision_score(positive, score) if positive.any() else NAN,
        "brier": sklearn.brier_score_loss(positive, score, pos_label=1),
        "ppv_at": at(PREVALENCE, positive, called) if both else NAN,
        "npv_at": at(1 - PREVALENCE, 1 - positive, 1 - called) if both else NAN,
    }


def _averages(labels, predicted, per_class, average):
    present, support = np.unique(labels, return_counts=True)
    p, r, f, _ = sklearn.precision_recall_fscore_support(
        labels, predicted, labels=present, average=average, zero_division=0
    )
    averages = {"precision": p, "recall": r, "f1": f}
    weights = support if average == "weighted" else np.ones(len(present))
    for key in ("specificity", "npv", "auroc", "auprc"):
        values = np.array([list(per_class.values())[i][key] for i in present])
        known = ~np.isnan(values)
        averages[key] = np.average(values[known], weights=weights[known]) if known.any() else NAN
    return averages


def _judge(labels, probabilities, names):
    """What the report's figures should be, NaN where the figure is 0/0."""
    k = len(names)
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    per_class = {
        name: _one_vs_rest(labels == i, predicted == i, probabilities[:, i])
        for i, name in enumerate(names)
    }
    ece, edges = 0.0, np.linspace(0, 1, 16)
    for b in range(15):
        inside = (confidence > edges[b]) & (confidence <= edges[b + 1])
        if inside.any():
            gap = confidence[inside].mean() - (predicted == labels)[inside].mean()
            ece += inside.mean() * abs(gap)
    one = len(set(labels)) == 1 or len(set(predicted)) == 1
    return {
        "accuracy": sklearn.accuracy_score(labels, predicted),
        "balanced_accuracy": sklearn.balanced_accuracy_score(labels, predicted),
        "kappa": sklearn.cohen_kappa_score(labels, predicted, labels=range(k)),
        "mcc": NAN if one else sklearn.matthews_corrcoef(labels, predicted),
        "nll": sklearn.log_loss(labels, probabilities, labels=range(k)),
        "brier": ((probabilities - np.eye(k)[labels]) ** 2).sum(1).mean(),
        "ece": ece,
        "confidence": confidence.mean(),
        "macro": _averages(labels, predicted, per_class, "macro"),
        "weighted": _averages(labels, predicted, per_class, "weighted"),
        "per_class": per_class,
    }


def _flat(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _report(labels, probabilities, names, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return classification_report(labels, probabilities, names, loss=0.25, **options)


def _agrees(labels, probabilities, names):
    stated = dict.fromkeys(names, PREVALENCE)
    report = _report(labels, probabilities, names, resamples=20, prevalence=stated)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    predicted = probabilities.argmax(1)
    matrix = sklearn.confusion_matrix(labels, predicted, labels=range(len(names)))
    np.testing.assert_array_equal(report["confusion_matrix"], matrix)
    assert [report["per_class"][name]["support"] for name in names] == matrix.sum(1).tolist()
    assert [report["per_class"][name]["predicted"] for name in names] == matrix.sum(0).tolist()
    assert report["num_examples"] == len(labels)
    assert report["class_names"] == names
    assert report["loss"] == 0.25
    assert report["prevalence"] == stated

    expected = dict(_flat(_judge(labels, probabilities, names)))
    for path, value in expected.items():
        ours = _at(report, path)
        if not np.isnan(value):
            assert ours == pytest.approx(value, abs=1e-9), path
        elif path[-1] in ("precision", "recall", "f1", "mcc"):  # scikit-learn's zero_division=0
            assert ours == 0, path
        else:
            assert ours is None, path
    bootstrap = dict(_flat(report["intervals"]["bootstrap"]))
    assert bootstrap.keys() == expected.keys()
    if len(labels) > 1:
        undefined = {path for path, value in expected.items() if np.isnan(value)}
        assert undefined <= {path for path, interval in bootstrap.items() if interval is None}


def _random_case(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 15))
    n = int(rng.integers(1, 300))
    present = rng.permutation(k)[: rng.integers(1, k + 1)]  # some classes have no images
    labels = rng.choice(present, n)
    probabilities = rng.dirichlet(np.ones(k), n)
    probabilities[np.arange(n), labels] += rng.random(n) * 0.5
    probabilities[:, rng.integers(k)] *= 0.01  # one is hardly ever predicted
    if seed % 3 == 0:  # heavy ties
        probabilities = np.ceil(probabilities * 4)
    probabilities /= probabilities.sum(1, keepdims=True)
    return labels, probabilities, [f"class {i}" for i in range(k)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*")
def test_agrees_with_scikit_learn(seed):
    _agrees(*_random_case(seed))


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "labels, predicted",
    [
        ([0, 0, 0], [0, 0, 0]),  # one class, all right
        ([0, 0, 0], [2, 2, 2]),  # none right
        ([1], [1]),
        ([1], [2]),
        ([0, 1, 2], [1, 1, 1]),  # two never predicted
        ([0, 1, 2, 2], [0, 1, 2, 2]),  # perfect
        ([0, 1, 0, 1], [0, 2, 1, 1]),  # a class predicted but absent
    ],
)
def test_agrees_with_scikit_learn_on_degenerate_input(labels, predicted):
    labels = np.array(labels)
    _agrees(labels, np.eye(3)[predicted], ["a", "b", "c"])
    _agrees(labels, 0.1 + 0.7 * np.eye(3)[predicted], ["a", "b", "c"])


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("seed", range(4))
def test_two_classes_are_each_one_against_the_other(seed):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 11, 60) / 10
    labels = (rng.random(60) < p).astype(int)
    _agrees(labels, np.stack([1 - p, p], 1), ["no", "yes"])


@pytest.mark.filterwarnings("ignore:.*")
def test_averages_of_auroc_and_auprc_are_scikit_learn_s_own():
    rng = np.random.default_rng(1)
    labels = np.append(np.arange(4), rng.integers(0, 4, 80))
    probabilities = rng.dirichlet(np.ones(4), 84)
    report = _report(labels, probabilities, list("abcd"), resamples=0)
    for average in ("macro", "weighted"):
        auroc = sklearn.roc_auc_score(labels, probabilities, multi_class="ovr", average=average)
        auprc = sklearn.average_precision_score(np.eye(4)[labels], probabilities, average=average)
        assert report[average]["auroc"] == pytest.approx(auroc, abs=1e-9)
        assert report[average]["auprc"] == pytest.approx(auprc, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("ties", [pytest.param(False, marks=pytest.mark.slow), True])
def test_intervals_are_those_of_a_plain_loop_over_the_same_resamples(ties):
    """A class of two images is missing from some resamples, one of none from all."""
    rng = np.random.default_rng(7)
    labels = np.repeat([0, 1, 2], [26, 12, 2])
    probabilities = rng.dirichlet(np.ones(4), 40) + 0.5 * np.eye(4)[labels]
    if ties:
        probabilities = np.ceil(probabilities * 3)
    probabilities /= probabilities.sum(1, keepdims=True)
    names, clusters, resamples = list("abcd"), rng.integers(0, 25, 40), 15
    options = {
        "clusters": clusters,
        "resamples": resamples,
        "seed": 3,
        "prevalence": dict.fromkeys(names, PREVALENCE),
    }
    report = _report(labels, probabilities, names, **options)
    drawn = resampled_figures(labels, probabilities, names, **options)

    loop = []
    for weights in np.concatenate(list(cluster_weights(clusters, resamples, seed=3))):
        index = np.repeat(np.arange(40), weights.astype(int))
        loop.append(dict(_flat(_judge(labels[index], probabilities[index], names))))
    point = dict(_flat(_judge(labels, probabilities, names)))
    left_out = 0
    for path, value in point.items():
        values = np.array([figures[path] for figures in loop])
        np.testing.assert_allclose(_at(drawn, path), values, rtol=0, atol=1e-9, err_msg=str(path))
        interval = _at(report["intervals"]["bootstrap"], path)
        if np.isnan(value):
            assert interval is None
        else:
            expected = np.nanpercentile(values, [2.5, 97.5])
            np.testing.assert_allclose(interval, expected, rtol=0, atol=1e-9, err_msg=str(path))
            left_out += np.isnan(values).any()
    assert left_out >= 4  # the class of two images: recall, AUROC, AUPRC, ...
    assert report["intervals"]["bootstrap"]["per_class"]["d"]["auroc"] is None


def test_intervals_say_what_they_are_of():
    labels, probabilities, names = _random_case(1)
    clusters = np.arange(len(labels)) // 2 * 10
    intervals = _report(labels, probabilities, names, clusters=clusters, seed=4)["intervals"]
    assert intervals["level"] == 0.95
    assert intervals["resamples"] == 2000
    assert intervals["clusters"] == -(-len(labels) // 2)
    assert intervals["seed"] == 4
    alone = _report(labels, probabilities, names, resamples=0)["intervals"]
    assert "bootstrap" not in alone
    assert alone["clusters"] == len(labels)


@pytest.mark.filterwarnings("ignore:.*")
def test_wilson_s_intervals_are_scipy_s():
    stats = pytest.importorskip("scipy.stats")

    def judge(hits, total):
        return list(stats.binomtest(hits, total).proportion_ci(method="wilson")) if total else None

    for seed in range(6):
        labels, probabilities, names = _random_case(seed)
        predicted = probabilities.argmax(1)
        wilson = _report(labels, probabilities, names, resamples=0)["intervals"]["wilson"]
        expected = judge(int((labels == predicted).sum()), len(labels))
        assert wilson["accuracy"] == pytest.approx(expected, abs=1e-9)
        for i, name in enumerate(names):
            is_, called = labels == i, predicted == i
            for key, hit, of in [
                ("recall", is_ & called, is_),
                ("precision", is_ & called, called),
                ("specificity", ~is_ & ~called, ~is_),
                ("npv", ~is_ & ~called, ~called),
            ]:
                expected = judge(int(hit.sum()), int(of.sum()))
                ours = wilson["per_class"][name][key]
                assert ours == (expected and pytest.approx(expected, abs=1e-9)), (name, key)


@pytest.mark.parametrize("n, k", [(1, 1), (5, 1), (1, 2), (1, 4)])
def test_one_image_one_class_one_cluster(n, k):
    names = [str(i) for i in range(k)]
    report = _report(np.zeros(n, int), np.eye(k)[np.zeros(n, int)], names)
    assert report["accuracy"] == 1
    assert report["per_class"]["0"]["auroc"] is None
    assert report["per_class"]["0"]["specificity"] is None
    assert report["kappa"] is None
    interval = report["intervals"]["bootstrap"]["accuracy"]
    assert interval == (None if n == 1 else [1, 1])


def test_one_cluster_gives_no_bootstrap_interval():
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    report = _report(labels, p, ["a", "b", "c"], clusters=np.zeros(50, int))
    assert {v for _, v in _flat(report["intervals"]["bootstrap"])} == {None}


def test_prevalence_is_a_twentieth_where_not_stated():
    labels, p = np.array([0, 0, 1, 1, 1]), np.eye(2)[[0, 1, 1, 1, 0]]
    report = _report(labels, p, ["x", "y"], prevalence={"y": 0.5})
    assert report["prevalence"] == {"x": 0.05, "y": 0.5}
    # By hand: recall 1/2, specificity 2/3.
    assert report["per_class"]["x"]["ppv_at"] == pytest.approx(0.025 / (0.025 + 0.95 / 3))
    for wrong, message in [({"z": 0.1}, "prevalence of 'z'"), ({"x": 5}, "between 0 and 1")]:
        with pytest.raises(UserError, match=message):
            classification_report(labels, p, ["x", "y"], prevalence=wrong)


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


@pytest.mark.parametrize("clusters", [np.zeros(3, int), np.zeros(2), np.zeros((2, 1), int)])
def test_bad_clusters_are_refused(clusters):
    with pytest.raises(ValueError, match=r"clusters must be integers \[2\]"):
        classification_report(np.array([0, 1]), np.eye(2), ["a", "b"], clusters=clusters)


def test_the_loss_of_an_answer_that_is_certain_and_wrong_is_finite():
    p = np.array([[0.0, 1.0], [1e-12, 1.0]])
    want = -np.log([np.finfo(np.float64).tiny, 1e-12]).mean()
    assert log_loss(np.array([0, 0]), p) == pytest.approx(want)
