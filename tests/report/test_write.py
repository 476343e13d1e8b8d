import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

from covid_flax.errors import UserError
from covid_flax.files import write_atomically
from covid_flax.metrics import classification_report
from covid_flax.report.write import write_evaluation

NAMES = ['Lung, "opaque"', "Größe 肺", "plain"]
FILES = ["a,b.png", "q\"uote's.png", "zeile\nzwei.png", "ünï 肺.png", " blank ends ", "x/y.png"]


def _evaluation(dtype=np.float32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, len(FILES))
    probabilities = rng.dirichlet(np.ones(3), len(FILES)).astype(dtype)
    report = classification_report(labels, probabilities, NAMES, loss=0.1 + 0.2)
    rows = [
        (file, NAMES[label], NAMES[p.argmax()], p)
        for file, label, p in zip(FILES, labels, probabilities, strict=True)
    ]
    return report, rows, probabilities


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_files_give_back_what_was_written(tmp_path, dtype):
    report, rows, probabilities = _evaluation(dtype)
    output = tmp_path / "eval" / "val"
    write_evaluation(output, report, iter(rows))
    expected = ["confusion_matrix.png", "predictions.csv", "report.json"]
    assert sorted(p.name for p in output.iterdir()) == expected

    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == report
    with open(output / "predictions.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        read = list(reader)
    assert reader.fieldnames == ["file", "label", "predicted", *(f"p_{n}" for n in NAMES)]
    assert [r["file"] for r in read] == FILES
    assert [(r["label"], r["predicted"]) for r in read] == [row[1:3] for row in rows]
    again = np.array([[dtype(r[f"p_{n}"]) for n in NAMES] for r in read], dtype)
    np.testing.assert_array_equal(again, probabilities)
    with Image.open(output / "confusion_matrix.png") as image:
        image.load()


def test_a_file_name_that_is_not_utf8_keeps_its_bytes(tmp_path):
    report, rows, _ = _evaluation()
    rows[0] = (os.fsdecode(b"caf\xe9.png"), *rows[0][1:])
    write_evaluation(tmp_path, report, rows)
    assert b"\ncaf\xe9.png," in (tmp_path / "predictions.csv").read_bytes()


def test_rows_that_do_not_fit_the_report_are_refused_before_anything_is_written(tmp_path):
    report, rows, _ = _evaluation()
    with pytest.raises(ValueError, match="5 rows"):
        write_evaluation(tmp_path, report, rows[1:])
    with pytest.raises(ValueError, match="x/y.png: 2 probabilities"):
        write_evaluation(tmp_path, report, [*rows[:-1], (*rows[-1][:3], [0.5, 0.5])])
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_named(tmp_path):
    report, rows, _ = _evaluation()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        write_evaluation(tmp_path / "file", report, rows)
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
