"""Judge: scikit-learn on thumbnails that Pillow makes of the very files."""

import csv
import json
import os
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from covid_flax.baselines import GRIDS, Images, baselines, fit_baseline, fit_components
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.run import setup

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")

ROOT = Path(__file__).parent.parent


def _config(make_tiny_config, directory):
    c = make_tiny_config()
    c.data.dir = str(directory)
    c.data.split = "grouped"
    c.data.test_fraction = 0.25
    return c


@pytest.fixture(scope="module")
def run(make_tiny_config, phantom_dir, tmp_path_factory):
    """Set up, not trained."""
    workdir = tmp_path_factory.mktemp("baselines") / "run"
    setup(_config(make_tiny_config, phantom_dir), workdir)
    return workdir


@pytest.fixture(scope="module")
def reports(run):
    return baselines(run)


def _rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def _thumbnails(run, root):
    """Pixels and labels of each split, by Pillow alone."""
    names = json.loads((run / "config.json").read_text())["class_names"]
    parts = {}
    for split in ("train", "val", "test"):
        rows = [r for r in _rows(run / "split.csv") if r["split"] == split]
        pixels = []
        for row in rows:
            with Image.open(root / row["file"]) as image:
                small = image.convert("RGB").resize((28, 28), Image.Resampling.BOX)
            pixels.append(np.asarray(small, np.float64).mean(-1).ravel() / 255)
        parts[split] = np.array(pixels), np.array([names.index(r["label"]) for r in rows])
    return parts


@pytest.mark.parametrize("name", GRIDS)
def test_figures_are_scikit_learn_s_on_the_run_s_split(run, reports, phantom_dir, name):
    assert (run / "baselines" / name / "split.csv").read_bytes() == (run / "split.csv").read_bytes()
    about = json.loads((run / "baselines" / name / "config.json").read_text())
    assert about["baseline"] == name

    parts = _thumbnails(run, phantom_dir)
    pca = PCA(min(64, len(parts["train"][0]) - 1)).fit(parts["train"][0])
    x = {s: pca.transform(p) for s, (p, _) in parts.items()}
    y = {s: labels for s, (_, labels) in parts.items()}
    make = {
        "logistic": lambda v: make_pipeline(StandardScaler(), LogisticRegression(C=v, tol=1e-6)),
        "svm": lambda v: SVC(C=v),
        "tree": lambda v: DecisionTreeClassifier(min_samples_leaf=v, random_state=0),
        "naive_bayes": lambda v: GaussianNB(var_smoothing=v),
    }[name]
    key = GRIDS[name][0]
    judges = [make(c[key]).fit(x["train"], y["train"]) for c in about["candidates"]]
    want = [accuracy_score(y["val"], judge.predict(x["val"])) for judge in judges]
    got = [c["val_accuracy"] for c in about["candidates"]]
    np.testing.assert_allclose(got, want, atol=1.01 / len(y["val"]))  # an even choice may flip
    chosen = about["setting"][key]
    assert chosen == about["candidates"][int(np.argmax(got))][key]

    judge = make(chosen).fit(x["train"], y["train"])
    for split in ("val", "test"):
        folder = run / "baselines" / name / "eval" / split
        rows = _rows(folder / "predictions.csv")
        assert [r["file"] for r in rows] == [
            r["file"] for r in _rows(run / "split.csv") if r["split"] == split
        ]
        p = np.array([[float(v) for k, v in r.items() if k.startswith("p_")] for r in rows])
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-9)
        if name == "svm":  # its probabilities may overrule its votes
            platt = LogisticRegression(max_iter=1000)
            judge.decision_function_shape = "ovo"
            platt.fit(judge.decision_function(x["val"]), y["val"])
            theirs = platt.predict_proba(judge.decision_function(x[split]))
        else:
            theirs = judge.predict_proba(x[split])
        if name != "tree":  # whose cuts follow rounding
            np.testing.assert_allclose(p, theirs, atol=0.02)
        report = json.loads((folder / "report.json").read_text())
        assert report["accuracy"] == pytest.approx(accuracy_score(y[split], p.argmax(1)))
        assert report["nll"] == pytest.approx(log_loss(y[split], p), rel=1e-6)
        assert report["accuracy"] == reports[name][split]["accuracy"]
        assert ("optimistic" in report.get("note", "")) == (split == "val")
        raised = {alarm["name"] for alarm in report["alarms"]}
        assert ("stopping-split-scored" in raised) == (split == "val")
        assert report["stopped_on"] == "val"


def test_test_images_change_nothing_that_is_fitted(
    run, reports, make_tiny_config, phantom_dir, tmp_path
):
    """The test images are all replaced by noise: val's predictions stay bit for bit."""
    other = tmp_path / "data"
    rng = np.random.default_rng(0)
    for row in _rows(run / "split.csv"):
        (other / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        if row["split"] == "test":
            noise = Image.fromarray(rng.integers(0, 256, (48, 48), np.uint8))
            noise.save(other / row["file"])
        else:
            (other / row["file"]).write_bytes((phantom_dir / row["file"]).read_bytes())
    names = ("svm",)
    again = baselines(run, models=names, data_dir=str(other), output=tmp_path / "out")
    for name in names:
        val, test = (
            [
                (folder / name / "eval" / split / "predictions.csv").read_bytes()
                for folder in (run / "baselines", tmp_path / "out")
            ]
            for split in ("val", "test")
        )
        assert val[0] == val[1]
        assert test[0] != test[1]
        assert again[name]["val"]["accuracy"] == reports[name]["val"]["accuracy"]


def test_two_classes_and_what_validation_may_choose():
    """Labels that only a weak tree gets right: the choice is validation's, not training's."""
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(400, 784))
    pixels[:, :20] *= 4
    true = (pixels[:, 0] > 0).astype(np.int64)
    noisy = np.where(rng.random(400) < 0.3, 1 - true, true)
    train, val = Images(pixels[:200], noisy[:200]), Images(pixels[200:], true[200:])
    components = fit_components(train.pixels)
    for name in GRIDS:
        fitted = fit_baseline(name, components, train, val, num_classes=2, seed=0)
        p = fitted.probabilities(val.pixels)
        assert p.shape == (200, 2) and np.allclose(p.sum(1), 1)
        best = max(accuracy for _, accuracy in fitted.candidates)
        assert dict(fitted.candidates)[fitted.setting] == best
        if name != "svm":
            assert np.mean(p.argmax(1) == val.labels) == pytest.approx(best)
        if name == "tree":
            assert fitted.setting > 1


def test_refusals_and_the_command(run, tmp_path):
    with pytest.raises(UserError, match="forest.* name some of logistic, svm"):
        baselines(run, models=("forest",))
    with pytest.raises(UserError, match="no config.json"):
        baselines(tmp_path)
    data = json.loads((run / "config.json").read_text())["data"]["root"]
    with pytest.raises(UserError, match="lies in the data folder .*another --output"):
        baselines(run, output=Path(data) / "baselines")
    (tmp_path / "svm").mkdir()
    (tmp_path / "svm" / "config.json").write_text('{"baseline": "svm", "class_names": ["a"]}')
    with pytest.raises(UserError, match="svm is a classical baseline of a run"):
        evaluate(tmp_path / "svm")
    args = (f"--workdir={run}", "--models=naive_bayes", f"--output={tmp_path / 'out'}")
    done = forked.command("covid_flax.baselines", *args, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Gaussian naive Bayes: var_smoothing" in done.stdout
    assert os.listdir(tmp_path / "out") == ["naive_bayes"]


def test_a_run_is_not_replaced(run, tmp_path):
    """As where --output=runs, and a run is called `tree`."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/config.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match=r"tree/config\.json is of something else"):
        baselines(run, models=["tree"], output=tmp_path)
    assert (tmp_path / "tree/config.json").read_text() == '{"config": {}}'
