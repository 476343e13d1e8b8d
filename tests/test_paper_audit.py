"""Judges: the audit's figures as computed elsewhere, scipy, scikit-learn, and Keras's generator."""

import json
import os
import re
from pathlib import Path

import forked
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import sklearn.model_selection
from keras.src.legacy.preprocessing.image import ImageDataGenerator
from keras_judge import keras
from PIL import Image

from covid_flax.evaluation.alarms import LEVEL, find_alarms, independence
from covid_flax.evaluation.predictions import Predictions, predictions_csv
from covid_flax.paper_audit import (
    CLASS_COUNTS,
    CLASSES,
    MATRIX,
    SOURCE_COUNTS,
    count_parameters,
    paper_evidence,
    paper_findings,
    shuffle_predictions,
)

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("COVID_FLAX_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="module")
def findings():
    return paper_findings()


def text(findings, start):
    (found,) = [f for f in findings if f.claim.startswith(start)]
    return f"{found.recomputed} [{found.verdict}]"


def test_every_figure_of_the_audit(findings):
    """The figures of a separate audit of the same paper, typed in."""
    for start, words in {
        "Accuracy 82.33": ("1,489", "4,232", "35.18 %", "33.8 to 36.6", "3,484", "contradicted"),
        "Figure 2's rows": ("613, 1,161, 2,196, 262", "723, 1,202, 2,038, 269", "wrong"),
        "Figure 2 shows": ("5.411", "df 9", "0.797", "0.021", "-0.0072", "1,508.66", "35.65 %"),
        "COVID is told": ("24.65 %",),
        "Normal does": ("48.16 %",),
        "Split 80:20": ("4,232", "4,233"),
        "Dense 1024: 1,049,600": ("2,098,176", "wrong"),
        "ResNet50": ("23,587,712", "holds"),
        "Output layer: 4,100": ("4,100", "holds"),
        "Together 24,641,412": ("25,689,988", "wrong"),
        "Images tell": ("65.26 %",),
    }.items():
        for word in words:
            assert word in text(findings, start), (start, word)


def test_figures_against_scipy_and_scikit_learn(findings):
    by_claim = {f.claim.split(" (")[0]: f.figures for f in findings}
    truth = np.repeat(np.arange(4), MATRIX.sum(0))
    said = np.concatenate([np.repeat(np.arange(4), column) for column in MATRIX.T])
    np.testing.assert_array_equal(sklearn.metrics.confusion_matrix(truth, said), MATRIX.T)
    shows = by_claim["Figure 2 shows what the model confuses"]
    judge = scipy.stats.chi2_contingency(MATRIX, correction=False)
    assert shows["chi2"] == pytest.approx(judge.statistic) and shows["df"] == judge.dof
    assert shows["p"] == pytest.approx(judge.pvalue)
    assert shows["cramers_v"] == pytest.approx(scipy.stats.contingency.association(MATRIX))
    assert shows["kappa"] == pytest.approx(sklearn.metrics.cohen_kappa_score(truth, said))
    accuracy = next(f.figures for f in findings if f.claim.startswith("Accuracy 82.33"))
    wilson = scipy.stats.binomtest(1489, 4232).proportion_ci(method="wilson")
    assert accuracy["wilson"] == pytest.approx([wilson.low, wilson.high])
    told = by_claim["COVID is told from the other classes"]
    balanced = sklearn.metrics.balanced_accuracy_score
    assert told["balanced_accuracy"] == pytest.approx(balanced(truth, said))
    assert told["balanced_accuracy_as_read"] == pytest.approx(balanced(said, truth))


def test_split_rules_of_scikit_learn(findings):
    n = sum(CLASS_COUNTS.values())
    _, held = sklearn.model_selection.train_test_split(np.arange(n), test_size=0.2)
    figures = next(f.figures for f in findings if f.claim.startswith("Split"))
    assert (len(held), n) == (figures["floor_of_all"], 21165)
    assert figures["scored"] == sum(figures["floors"]) == 4232


def test_parameters_of_keras_s_head():
    ours = count_parameters()
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2048)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )
    assert model.count_params() == ours["Dense 1024"] + ours["Output"]
    assert sum(ours.values()) == 25_689_988


def test_sources_add_up_to_the_classes():
    totals = {
        name: sum(by_class.get(name, 0) for by_class in SOURCE_COUNTS.values())
        for name in CLASS_COUNTS
    }
    assert totals == CLASS_COUNTS


def test_numbers_stand_in_the_paper():
    paper = SHARED / "paper.txt"
    if not paper.exists():
        pytest.skip(f"no {paper}: set COVID_FLAX_SHARED")
    numbers = re.findall(r"\d[\d,.]*\d|\d", paper.read_text())
    found = {number.replace(",", "") for number in numbers}
    assert {str(n) for n in MATRIX.ravel()} <= found
    assert {str(n) for n in CLASS_COUNTS.values()} <= found
    assert {"23587712", "1049600", "4100", "82.33"} <= found


def test_alarms_that_the_paper_raises():
    found = find_alarms(paper_evidence())
    assert [a.name for a in found if a.level == "alarm"] == [
        "independent-predictions",
        "below-majority",
        "swapped-axes",
        "accuracy-mismatch",
        "stopping-split-scored",
    ]
    assert [a.name for a in found if a.level == "caution"] == ["source-confounded"]


# --- the shuffled generator ---


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [200, 300, 500, 100])
    p = rng.random((1100, 4)) + 1.2 * np.eye(4)[labels] * (rng.random((1100, 1)) < 0.9)
    p /= p.sum(1, keepdims=True)
    files = tuple(f"{k}/{i}.png" for i, k in enumerate(labels))
    return Predictions(CLASSES, files, labels, p)


def test_shuffled_order_keeps_margins_and_loses_the_pairs(predictions):
    run = shuffle_predictions(predictions)
    judge = sklearn.metrics.confusion_matrix(predictions.labels, predictions.predicted)
    np.testing.assert_array_equal(run.before, judge)
    assert np.trace(run.before) > 900
    np.testing.assert_array_equal(run.after.sum(0), run.before.sum(0))
    np.testing.assert_array_equal(run.after.sum(1), run.before.sum(1))
    assert independence(run.before).p < 1e-100 and independence(run.after).p > LEVEL
    expected = scipy.stats.contingency.expected_freq(run.before)
    low, high = run.accuracies
    assert low < np.trace(expected) / expected.sum() < high


def test_keras_s_own_generator_does_it(tmp_path):
    """Images whose grey is their class, a model that reads it: right in order, chance shuffled."""
    counts = {"COVID": 40, "Lung": 60, "Normal": 90, "Viral": 20}
    for k, (name, n) in enumerate(counts.items()):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("L", (4, 4), 40 + 50 * k).save(tmp_path / name / f"{name}-{i}.png")
    generator = ImageDataGenerator(rescale=1 / 255)
    options = {"target_size": (4, 4), "color_mode": "grayscale", "batch_size": 30}
    levels = (40 + 50 * np.arange(4)) / 255
    dense = keras.layers.Dense(4)
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.GlobalAveragePooling2D(), dense])
    # -(x - level)^2 without its x^2, which is the same for all classes.
    dense.set_weights([2 * levels[None], -(levels**2)])

    def matrix(**more):
        flow = generator.flow_from_directory(tmp_path, **options, **more)
        said = model.predict(flow, verbose=0).argmax(1)
        return sklearn.metrics.confusion_matrix(flow.classes, said)

    np.testing.assert_array_equal(matrix(shuffle=False), np.diag(list(counts.values())))
    shuffled = matrix(seed=1)  # shuffle=True is the default
    np.testing.assert_array_equal(shuffled.sum(1), list(counts.values()))
    np.testing.assert_array_equal(shuffled.sum(0), list(counts.values()))
    assert np.trace(shuffled) < 105 and independence(shuffled).p > LEVEL


# --- the command ---


def test_command(tmp_path, predictions):
    folder = tmp_path / "run" / "eval" / "test"
    folder.mkdir(parents=True)
    (folder / "predictions.csv").write_bytes(predictions_csv(predictions))
    args = [f"--workdir={tmp_path / 'run'}", "--split=test", f"--output={tmp_path}"]
    done = forked.command("covid_flax.paper_audit", *args, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for said in ("contradicted", "swapped-axes", "5.411", "run, test images", "group-leak"):
        assert said in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 105
    written = json.loads((tmp_path / "paper_audit.json").read_text())
    assert len(written["findings"]) == len(paper_findings())
    assert written["shuffled"]["before"] == shuffle_predictions(predictions).before.tolist()
    assert {a["level"] for a in written["alarms"]} == {"alarm", "caution"}


def test_recalls_are_along_the_columns(findings):
    truth = np.repeat(np.arange(4), MATRIX.sum(0))
    said = np.concatenate([np.repeat(np.arange(4), column) for column in MATRIX.T])
    recall, as_read = (
        sklearn.metrics.recall_score(a, b, average=None) for a, b in ((truth, said), (said, truth))
    )
    told = next(f for f in findings if f.claim.startswith("COVID is told"))
    np.testing.assert_allclose(list(told.figures["recall"].values()), recall)
    np.testing.assert_allclose(list(told.figures["recall_as_read"].values()), as_read)
    assert told.recomputed.startswith(
        f"recall of COVID is {100 * recall[0]:.2f} % (as the text reads the axes "
        f"{100 * as_read[0]:.2f} %)"
    )
    normal = text(findings, "Normal does")
    assert "47.77 % of the row Normal" in normal and "takes 48.16 % of all images" in normal
    assert "up to 96.27 %" in text(findings, "82.33 % and")
