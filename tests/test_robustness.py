"""Figures judged by NumPy on a run whose answers are known; the command on a real small run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from covid_flax.data.corruptions import CORRUPTIONS, STRENGTHS
from covid_flax.data.pipeline import ArraySource
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.evaluation.sampling import stratified_sample
from covid_flax.report import robustness_plot
from covid_flax.robustness import CorruptedSource, robustness, score_corruptions
from covid_flax.run import setup
from covid_flax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


class ByBrightness:
    """Stands for a run: class 1 where the mean grey is over 128."""

    def probabilities(self, source):
        means = np.array([source[i]["image"].mean() for i in range(len(source))])
        return np.stack([means <= 128, means > 128], 1).astype(float)


def test_figures_are_those_of_the_changed_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    images = rng.integers(0, 256, (80, 16, 16, 1)) * 0.4 + 76 * labels[:, None, None, None]
    source = ArraySource(images.clip(0, 255).astype(np.uint8), labels)
    report = score_corruptions(ByBrightness(), source, labels)
    assert report["num_examples"] == 80
    for corruption, row in zip(CORRUPTIONS, report["corruptions"], strict=True):
        for strength, got in zip(STRENGTHS, row["strengths"], strict=True):
            answers = np.array(
                [
                    corruption(image, strength, np.random.default_rng(i)).mean() > 128
                    for i, image in enumerate(source.images)
                ]
            )
            assert got["accuracy"] == pytest.approx(np.mean(answers == labels))
            recalls = [np.mean(answers[labels == k] == k) for k in (0, 1)]
            assert got["balanced_accuracy"] == pytest.approx(np.mean(recalls))
        drops = [report["plain"]["accuracy"] - s["accuracy"] for s in row["strengths"]]
        assert row["mean_drop"] == pytest.approx(np.mean(drops))
    drops = [row["mean_drop"] for row in report["corruptions"]]
    assert report["mean_drop"] == pytest.approx(np.mean(drops)) and report["mean_drop"] != 0


def test_images_of_one_patient_count_as_one():
    """Twenty patients of four images alike: the intervals are those of twenty."""
    rng = np.random.default_rng(1)
    right = rng.random(20) < 0.7
    labels = np.repeat(np.arange(20) % 2, 4)
    greys = np.repeat(np.where(right, np.arange(20) % 2, 1 - np.arange(20) % 2), 4) * 200 + 20
    images = np.broadcast_to(greys[:, None, None, None], (80, 8, 8, 1)).astype(np.uint8)
    source, patients = ArraySource(images, labels), np.repeat(np.arange(20), 4)
    grouped = score_corruptions(ByBrightness(), source, labels, clusters=patients)
    alone = score_corruptions(ByBrightness(), source, labels)
    assert (grouped["clusters"], alone["clusters"]) == (20, 80)
    share = right.mean()
    assert grouped["plain"]["accuracy"] == share == alone["plain"]["accuracy"]

    def width(report):
        low, high = report["plain"]["accuracy_interval"]
        return high - low

    assert width(grouped) == pytest.approx(2 * 1.96 * (share * (1 - share) / 20) ** 0.5, rel=0.15)
    assert width(alone) == pytest.approx(2 * 1.96 * (share * (1 - share) / 80) ** 0.5, rel=0.15)


def test_an_image_is_changed_alike_wherever_it_stands():
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 1), np.uint8)
    source = ArraySource(images, np.zeros(6, int))
    noise = next(c for c in CORRUPTIONS if c.name == "noise")
    whole = CorruptedSource(source, np.arange(6), noise, 3)
    part = CorruptedSource(source, np.array([4, 1]), noise, 3)
    np.testing.assert_array_equal(part[0]["image"], whole[4]["image"])
    np.testing.assert_array_equal(part[1]["image"], whole[1]["image"])
    assert whole[0]["image"].shape == (12, 12, 3)


def test_a_run_s_table_and_plot(tiny_config, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    tiny_config.train.epochs = 1
    train(setup(tiny_config, workdir))
    report = robustness(workdir)
    folder = workdir / "robustness" / "val"
    assert json.loads((folder / "robustness.json").read_text()) == report
    assert (folder / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert report["plain"]["accuracy"] == evaluate(workdir)["accuracy"]
    assert "chose the epoch" in report["warning"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        robustness(workdir, output=tmp_path / "file")
    limited = robustness(workdir, limit=8, output=tmp_path / "few")
    assert limited["num_examples"] == 8
    titles = []
    monkeypatch.setattr(robustness_plot, "plot_robustness", lambda *a: titles.append(a[2]))
    other = tmp_path / "other"
    shutil.copytree(tiny_config.data.dir, other)
    elsewhere = robustness(workdir, split="all", data_dir=str(other), limit=8)
    assert titles == ["Images of other, scored by run (8 of them)"]
    assert "bear the name of one that was trained on" in elsewhere["warning"]
    robustness(workdir, split="val", data_dir=str(other), limit=8)
    assert titles[1:] == [f"val images of run, in {other} (8 of them)"]
    assert f"replaces robustness.json of {Path(report['data_dir'])}" in capsys.readouterr().out
    rows = [dataclasses.replace(r, group=r.label) for r in read_split_csv(workdir / "split.csv")]
    write_split_csv(workdir / "split.csv", rows)
    assert robustness(workdir, limit=8, output=tmp_path / "grouped")["clusters"] == 4
    with pytest.raises(UserError, match="the run has no test split"):
        robustness(workdir, split="test")
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        robustness(workdir)


def test_of_some_images_the_figures_are_of_their_own_labels_and_groups():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [48, 16]))
    answers = np.where(rng.random(64) < 0.75, labels, 1 - labels)
    greys = (answers * 200 + 20).astype(np.uint8)
    images = np.broadcast_to(greys[:, None, None, None], (64, 8, 8, 1))
    groups = np.arange(64) // 4
    source = ArraySource(images, labels)
    report = score_corruptions(ByBrightness(), source, labels, limit=20, clusters=groups)
    at = stratified_sample(labels, 20)
    right = (answers == labels)[at]
    assert report["plain"]["accuracy"] == right.mean()
    assert report["clusters"] == len(np.unique(groups[at]))
    balanced = np.mean([right[labels[at] == k].mean() for k in (0, 1)])
    for row in report["corruptions"]:
        under = np.mean([strength["balanced_accuracy"] for strength in row["strengths"]])
        assert row["mean_balanced_drop"] == pytest.approx(balanced - under)


def test_the_picture_is_of_the_report():
    strengths = [
        {"accuracy": a, "balanced_accuracy": 0.1, "accuracy_interval": [a - 0.1, a + 0.05]}
        for a in (0.8, 0.6)
    ]
    row = {"name": "low_contrast", "unit": "x", "values": [2, 3], "strengths": strengths}
    report = {"plain": {"accuracy": 0.9}, "mean_drop": 0.2, "corruptions": [row]}
    figure = robustness_plot.robustness_figure(report, "t")
    axes = figure.axes[0]
    plain, curve = axes.lines
    assert set(plain.get_ydata()) == {0.9}
    np.testing.assert_allclose(curve.get_xydata(), [[1, 0.8], [2, 0.6]])
    y = axes.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([y.min(), y.max()], [0.5, 0.85])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "3"]
    assert "90.0 % plain (dashed), mean drop 20.0 points" in figure.get_suptitle()
