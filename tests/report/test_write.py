import csv
import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from covid_flax.data.splits import Row
from covid_flax.errors import UserError
from covid_flax.evaluation.metrics import classification_report
from covid_flax.evaluation.predictions import Predictions, read_predictions
from covid_flax.files import write_atomically
from covid_flax.report.summary import print_report
from covid_flax.report.write import write_evaluation

NAMES = ['Lung, "opaque"', "Größe 肺", "plain"]
FILES = ["a,b.png", "q\"uote's.png", "zeile\nzwei.png", "ünï 肺.png", " blank ends ", "x/y.png"]


def _evaluation():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, len(FILES))
    predictions = Predictions(tuple(NAMES), tuple(FILES), labels, rng.dirichlet(np.ones(3), 6))
    report = classification_report(
        labels, predictions.probabilities, NAMES, loss=0.1 + 0.2, resamples=10
    )
    return report, predictions


def test_files_give_back_what_was_written(tmp_path):
    report, predictions = _evaluation()
    output = tmp_path / "eval" / "val"
    write_evaluation(output, report, predictions)
    expected = ["confusion_matrix.png", "predictions.csv", "report.html", "report.json"]
    assert sorted(p.name for p in output.iterdir()) == expected

    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == report
    with open(output / "predictions.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        read = list(reader)
    assert reader.fieldnames == ["file", "label", "predicted", *(f"p_{n}" for n in NAMES)]
    assert [r["file"] for r in read] == FILES
    assert [r["label"] for r in read] == [NAMES[i] for i in predictions.labels]
    assert [r["predicted"] for r in read] == [NAMES[i] for i in predictions.probabilities.argmax(1)]
    again = np.array([[float(r[f"p_{n}"]) for n in NAMES] for r in read])
    np.testing.assert_array_equal(again, predictions.probabilities)
    with Image.open(output / "confusion_matrix.png") as image:
        image.load()


@pytest.fixture
def no_page(monkeypatch):
    """For tests of tables alone: it takes longest."""
    monkeypatch.setattr("covid_flax.report.page.write_report_page", lambda *_, **__: None)


def test_predictions_come_back_with_their_groups(tmp_path, no_page):
    report, predictions = _evaluation()
    write_evaluation(tmp_path, report, predictions)
    rows = [Row(file, "", "test", group) for file, group in zip(FILES, "aab", strict=False)]
    read = read_predictions(tmp_path / "predictions.csv", rows)
    assert (read.class_names, read.files) == (tuple(NAMES), tuple(FILES))
    np.testing.assert_array_equal(read.labels, predictions.labels)
    np.testing.assert_array_equal(read.probabilities, predictions.probabilities)
    assert read.groups == ("a", "a", "b", "", "", "")
    assert read.clusters.tolist() == [0, 0, 1, 2, 3, 4]
    assert not (tmp_path / "groups.csv").exists()

    groups = ("p", "p", "q, r", "", "ü", "ü")  # what an evaluation knew comes first
    write_evaluation(tmp_path, report, dataclasses.replace(predictions, groups=groups))
    assert read_predictions(tmp_path / "predictions.csv", rows).groups == groups
    (tmp_path / "groups.csv").write_text("file,patient\n")
    with pytest.raises(UserError, match=r"groups\.csv.*file,group"):
        read_predictions(tmp_path / "predictions.csv")
    write_evaluation(tmp_path, report, predictions)
    assert not (tmp_path / "groups.csv").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "file,label\n",
        "file,label,predicted,p_a\n",
        "file,label,predicted,p_a\nx,b,a,1\n",
        "file,label,predicted,p_a\nx,a,a,much\n",
        "file,label,predicted,p_a,p_b\nx,a,a,nan,1\n",
        "file,label,predicted,p_a,p_b\nx,a,a,5,-4\n",
        "file,label,predicted,p_a,p_b\nx,a,a,0.5,0.4\n",
        "file,label,predicted,p_a,p_b\nx,a,a,0.4,0.6\n",
    ],
)
def test_another_file_is_no_table_of_predictions(text, tmp_path):
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(UserError, match=r"predictions\.csv"):
        read_predictions(tmp_path / "predictions.csv")


def test_a_file_name_that_is_not_utf8_keeps_its_bytes(tmp_path, no_page):
    report, predictions = _evaluation()
    files = (os.fsdecode(b"caf\xe9.png"), *FILES[1:])
    write_evaluation(tmp_path, report, dataclasses.replace(predictions, files=files))
    assert b"\ncaf\xe9.png," in (tmp_path / "predictions.csv").read_bytes()
    assert read_predictions(tmp_path / "predictions.csv").files == files


def test_predictions_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    report, predictions = _evaluation()
    with pytest.raises(ValueError, match="5 predictions"):
        write_evaluation(tmp_path, report, dataclasses.replace(predictions, files=FILES[1:]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report.html", "report.json", "confusion_matrix.png"])
def test_pages_of_something_else_are_not_replaced(tmp_path, name):
    report, predictions = _evaluation()
    (tmp_path / name).write_text('{"name": "coverage"}')
    with pytest.raises(UserError, match=f"{name} is of something else.*another --output"):
        write_evaluation(tmp_path, report, predictions)
    assert [p.read_text() for p in tmp_path.iterdir()] == ['{"name": "coverage"}']


def test_a_table_of_something_else_is_not_replaced(tmp_path):
    report, predictions = _evaluation()
    (tmp_path / "predictions.csv").write_text("patient,risk\n1,0.5\n")
    with pytest.raises(UserError, match=r"predictions\.csv is of no evaluation.*another --output"):
        write_evaluation(tmp_path, report, predictions)
    assert (tmp_path / "predictions.csv").read_text() == "patient,risk\n1,0.5\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_evaluation_that_fails_half_way_leaves_the_old_one_whole(tmp_path, monkeypatch):
    report, predictions = _evaluation()
    write_evaluation(tmp_path, report, predictions)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("covid_flax.report.page.write_report_page", interrupted)
    groups = dataclasses.replace(predictions, groups=tuple("abcdef"))
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(tmp_path, {**report, "loss": 9.0}, groups)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_never_lies_beside_another_s_predictions(tmp_path, monkeypatch):
    """Killed amid the renaming, the old report is gone and the new one not there yet."""
    report, predictions = _evaluation()
    write_evaluation(tmp_path, report, predictions)
    renamed, replace = [], os.replace

    def killed(source, target):
        # What each file is written by has its own renaming, in the part's folder.
        if os.path.dirname(target) == str(tmp_path):
            assert not (tmp_path / "report.json").exists()
            renamed.append(os.path.basename(target))
            if len(renamed) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(tmp_path, report, predictions)
    assert len(renamed) == 2 and not (tmp_path / "report.json").exists()


def test_output_that_cannot_be_written_is_named(tmp_path):
    report, predictions = _evaluation()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        write_evaluation(tmp_path / "file", report, predictions)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, b"old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="report.json.*No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_console_s_table_holds_recall_then_precision(tmp_path, capsys):
    labels, answers = np.repeat([0, 1], 4), np.array([0, 0, 0, 1, 0, 0, 1, 1])
    report = classification_report(labels, np.eye(2)[answers], ["a", "b"], loss=0.5, resamples=0)
    print_report(report | {"split": "test", "alarms": []}, tmp_path)
    rows = [x.split() for x in capsys.readouterr().out.splitlines() if x[:2] in ("a ", "b ")]
    assert rows == [["a", "3", "1", "0.7500", "0.6000"], ["b", "2", "2", "0.5000", "0.6667"]]
