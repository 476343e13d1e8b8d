"""Judge: scikit-learn on the predictions that the binary wrote, and the folders themselves."""

import csv
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics

from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.run import setup
from covid_flax.train import train


@pytest.fixture(scope="module")
def trained(make_tiny_config, tmp_path_factory):
    """A run of one epoch with a three-way split."""
    c = make_tiny_config()
    c.data.split = "grouped"
    c.data.test_fraction = 0.25
    c.train.epochs = 1
    c.eval.batch_size = 12  # divides nothing
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(setup(c, workdir))
    return workdir


def _predictions(folder):
    with open(folder / "predictions.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("split", ["val", "test", "train", "all"])
def test_figures_are_scikit_learn_s_on_the_written_predictions(trained, split):
    evaluate(trained, split=split)
    folder = trained / "eval" / split
    report = json.loads((folder / "report.json").read_text())
    rows = _predictions(folder)
    with open(trained / "split.csv", newline="") as f:
        listed = [r for r in csv.DictReader(f) if split in (r["split"], "all")]
    assert [(r["file"], r["label"]) for r in rows] == [(r["file"], r["label"]) for r in listed]
    assert report["num_examples"] == len(listed)

    names = report["class_names"]
    labels = [r["label"] for r in rows]
    predicted = [r["predicted"] for r in rows]
    p = np.array([[float(r[f"p_{n}"]) for n in names] for r in rows])
    assert [names[i] for i in p.argmax(1)] == predicted
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    assert report["accuracy"] == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predicted), abs=1e-12
    )
    np.testing.assert_array_equal(
        report["confusion_matrix"],
        sklearn.metrics.confusion_matrix(labels, predicted, labels=names),
    )
    assert report["loss"] == pytest.approx(
        sklearn.metrics.log_loss(labels, p, labels=names), rel=1e-6
    )
    judge = sklearn.metrics.classification_report(
        labels, predicted, labels=names, output_dict=True, zero_division=0
    )
    for name in names:
        ours, theirs = report["per_class"][name], judge[name]
        for key, name_there in [("precision",) * 2, ("recall",) * 2, ("f1", "f1-score")]:
            assert ours[key] == pytest.approx(theirs[name_there], abs=1e-9)
        assert ours["support"] == theirs["support"]
    assert (folder / "confusion_matrix.png").read_bytes()[:4] == b"\x89PNG"


def test_validation_is_called_optimistic_and_test_is_not(trained, tmp_path):
    assert "optimistic" in evaluate(trained, split="val", output=tmp_path / "v")["note"]
    assert "note" not in evaluate(trained, split="test", output=tmp_path / "t")


def test_another_folder_is_scored_with_the_run_s_own_classes(trained, phantom_dir, tmp_path):
    """Two of the four classes, plain layout: same images, same probabilities as in the run."""
    other = tmp_path / "other"
    for name in ("Normal", "COVID"):
        shutil.copytree(phantom_dir / name / "images", other / name)
    report = evaluate(trained, split="all", data_dir=str(other), output=tmp_path / "out")
    assert report["num_examples"] == 40
    assert report["class_names"] == ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]
    assert report["per_class"]["Lung_Opacity"]["support"] == 0
    evaluate(trained, split="all")
    inside = {r["file"].rsplit("/", 1)[1]: r for r in _predictions(trained / "eval" / "all")}
    for row in _predictions(tmp_path / "out"):
        there = inside[row["file"].rsplit("/", 1)[1]]
        assert row["predicted"] == there["predicted"]
        assert float(row["p_COVID"]) == pytest.approx(float(there["p_COVID"]), abs=1e-5)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "report.json",
        "predictions.csv",
        "confusion_matrix.png",
    }


def test_one_class_alone_can_be_scored(trained, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir / "Normal", tmp_path / "one" / "Normal")
    report = evaluate(trained, split="all", data_dir=str(tmp_path / "one"), output=tmp_path / "out")
    assert report["num_examples"] == 20


def test_errors_name_the_thing(trained, phantom_dir, tmp_path):
    with pytest.raises(UserError, match="no run"):
        evaluate(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate(trained, checkpoint="999")
    (tmp_path / "strange" / "Flu").mkdir(parents=True)
    shutil.copy(phantom_dir / "Normal" / "images" / "Normal-1.png", tmp_path / "strange" / "Flu")
    with pytest.raises(UserError, match="Flu"):
        evaluate(trained, split="all", data_dir=str(tmp_path / "strange"))
    with pytest.raises(UserError, match=r"lacks \d+ images.*--split=all"):
        other = tmp_path / "part"
        shutil.copytree(phantom_dir, other)
        for image in list((other / "Normal" / "images").iterdir())[:15]:
            image.unlink()
        evaluate(trained, split="train", data_dir=str(other))
    with pytest.raises(UserError, match=r"config\.json"):
        broken = tmp_path / "broken"
        shutil.copytree(trained, broken)
        (broken / "config.json").write_text('{"config": ')
        evaluate(broken)


def test_a_split_the_run_has_not(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    text = (copy / "split.csv").read_text().replace(",test,", ",train,")
    (copy / "split.csv").write_text(text)
    with pytest.raises(UserError, match="no test split.*train, val"):
        evaluate(copy, split="test")
