"""Folds hold out every image once; a whole answers as its members together."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from covid_flax.baselines import baselines
from covid_flax.config import is_repeated
from covid_flax.controls import run_controls
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate, stored_calibration
from covid_flax.evaluation.members import mean_interval, members_report
from covid_flax.evaluation.predictions import read_predictions
from covid_flax.members import check_members, member_configs, train_members
from covid_flax.report.artefacts import read_artefacts
from covid_flax.report.statements import statements
from covid_flax.robustness import robustness
from covid_flax.run import setup
from covid_flax.run_folder import saved_run
from covid_flax.run_images import open_data
from covid_flax.train import train
from covid_flax.trained_run import open_run

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


@pytest.fixture(scope="module")
def folds(make_tiny_config, tmp_path_factory):
    config = make_tiny_config()
    config.data.split = "grouped"
    config.data.folds = 3
    config.data.test_fraction = 0.2
    config.train.epochs, config.train.last_batch = 2, "drop"  # one shape to compile
    assert is_repeated(config)
    workdir = tmp_path_factory.mktemp("folds")
    return config, workdir, train_members(config, workdir)


def test_every_image_is_held_out_once_and_test_is_the_same(folds):
    _, workdir, _ = folds
    rows = [read_split_csv(workdir / f"fold{i}" / "split.csv") for i in range(3)]
    tests = [{r.file for r in of if r.split == "test"} for of in rows]
    held = [{r.file for r in of if r.split == "val"} for of in rows]
    assert tests[0] == tests[1] == tests[2] and len(tests[0]) == 16
    assert set.union(*held) == {r.file for r in rows[0]} - tests[0]
    assert sum(map(len, held)) == 64 and max(map(len, held)) - min(map(len, held)) <= 4
    for i, of in enumerate(rows):
        for label in {r.label for r in of}:  # stratified
            assert 4 <= sum(r.label == label and r.split == "val" for r in of) <= 7, i


def test_the_whole_is_its_members_together(folds):
    _, workdir, summary = folds
    report = json.loads((workdir / "eval/test/report.json").read_text())
    assert set(report["checkpoint"]["runs"]) == {"fold0", "fold1", "fold2"}
    assert (
        "best checkpoints of 3 runs: fold0 step " in (workdir / "eval/test/report.html").read_text()
    )
    one = [read_predictions(workdir / f"fold{i}" / "eval/test/predictions.csv") for i in range(3)]
    whole = read_predictions(workdir / "eval/test/predictions.csv")
    np.testing.assert_allclose(
        whole.probabilities, np.mean([p.probabilities for p in one], 0), atol=1e-9
    )
    out_of_fold = read_predictions(workdir / "eval/val/predictions.csv")
    assert len(out_of_fold.files) == 64
    by_file = dict(zip(out_of_fold.files, out_of_fold.probabilities, strict=True))
    for i in range(3):
        part = read_predictions(workdir / f"fold{i}" / "eval/val/predictions.csv")
        for file, p in zip(part.files, part.probabilities, strict=True):
            np.testing.assert_allclose(by_file[file], p, atol=1e-6)
    assert json.loads((workdir / "members.json").read_text()) == summary
    accuracies = [of["test"]["accuracy"] for of in summary["members"].values()]
    assert summary["mean"]["test"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    again = evaluate(workdir, split="test")
    assert again["accuracy"] == summary["whole"]["test"]["accuracy"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_report_of_the_whole_tells_of_each_run_and_of_their_mean(folds, split):
    """What the runs' own evaluations say, and what members.json sums up."""
    _, workdir, summary = folds
    report = json.loads((workdir / "eval" / split / "report.json").read_text())
    for name, figures in report["members"]["figures"].items():
        for key, value in figures.items():
            assert value == pytest.approx(summary["members"][name][split][key], abs=1e-6)
    for key, mean in report["members"]["mean"].items():
        want = summary["mean"][split][key]
        np.testing.assert_allclose(mean["interval"], want["interval"], atol=1e-6)
    page = (workdir / "eval" / split / "report.html").read_text()
    mean = report["members"]["mean"]["accuracy"]
    low, high = (f"{100 * end:.1f}" for end in mean["interval"])
    section = page[page.index('<section id="members">') :]
    assert "fold2" in section and f"{100 * mean['mean']:.1f}" in section
    assert low in section and high in section
    assert 'id="members"' not in (workdir / "fold0" / "eval" / split / "report.html").read_text()


def test_the_mean_of_folds_has_no_temperature(folds, tmp_path):
    """That of the val images is of single runs' answers."""
    _, workdir, _ = folds
    stored = json.loads((workdir / "calibration.json").read_text())
    assert len(stored) == 1
    assert evaluate(workdir, split="val")["calibration"]
    report = evaluate(workdir, split="test")
    assert report["calibration"] is None and report["abstain"] is None
    with pytest.raises(UserError, match="not of their mean"):
        evaluate(workdir, split="test", calibrated=True)
    scaled = evaluate(workdir / "fold0", split="test", calibrated=True, output=tmp_path / "scaled")
    assert scaled["calibration"]["applied"]


@pytest.mark.slow
def test_trained_members_are_not_trained_again(folds, capsys):
    config, workdir, summary = folds
    assert train_members(config, workdir) == summary
    assert capsys.readouterr().out.count("training is complete") == 3
    other = config.copy_and_resolve_references()
    other.train.epochs = 3
    with pytest.raises(UserError, match=r"another configuration \(train\.epochs was 2, now 3\)"):
        train_members(other, workdir)
    other.train.epochs, other.data.num_threads = 2, 1  # what changes no figure may change
    assert train_members(other, workdir) == summary


def test_a_single_run_does_not_replace_several(folds, make_tiny_config):
    _, workdir, _ = folds
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds several runs .fold0, fold1.*choose another"):
        setup(make_tiny_config(), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_a_whole_teaches_the_mean_of_its_members_answers(folds):
    """Its logits, which a student learns from, are of the very probabilities it answers."""
    config, workdir, _ = folds
    whole = open_run(workdir)
    source = open_data(workdir, saved_run(workdir), "test").source("test", config.data)
    images = jnp.stack([jnp.asarray(source[i]["image"]) for i in range(4)])
    answers = jax.nn.softmax(jax.jit(whole.logits)(images))
    np.testing.assert_allclose(answers, whole.probabilities(source)[:4], atol=1e-5)


def test_a_whole_is_not_scored_on_what_its_members_learned(folds, tmp_path):
    config, workdir, _ = folds
    with pytest.raises(UserError, match=r"cross-validation.*give one of them, like .*fold0"):
        robustness(workdir, split="val")
    for split in ("val", "all"):
        with pytest.raises(UserError, match=r"cross-validation.*fold0"):
            run_controls(workdir, split=split)
    with pytest.raises(UserError, match=r"cross-validation.*fold0"):
        baselines(workdir)
    report = robustness(workdir, limit=4, output=tmp_path / "robustness")
    assert report["split"] == "test" and report["num_examples"] == 4
    report = run_controls(workdir, limit=4, output=tmp_path / "controls")
    assert report["split"] == "test"
    lessons = [c["simple_model"]["num_training"] for c in report["conditions"]]
    assert lessons[0] == 64  # all that any member learned from
    student = config.copy_and_resolve_references()
    student.data.folds, student.data.val_fraction = 0, 0.25
    student.train.teacher = ""
    run = setup(student, tmp_path / "alone")
    learned = {row.file for row in read_split_csv(workdir / "split.csv") if row.split != "test"}
    leaked = {row.file for row in run.data.rows if row.split != "train"} & learned
    assert len(leaked) >= 16
    student.train.teacher = str(workdir)
    with pytest.raises(UserError, match=f"was trained on {len(leaked)} images that this run hold"):
        setup(student, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_what_a_card_says_of_several_runs(folds):
    _, workdir, _ = folds
    said = statements(read_artefacts(workdir))
    assert said["ensemble"] == (
        "The mean of the probabilities of 3 runs, one a fold; a val image is scored by the run "
        "alone that held it out."
    )
    assert "seed 0, 3 folds, each val in turn, test share 0.2." in said["partition"]
    assert "val share" not in said["partition"] and "One training" not in said["limits"]
    assert "3 trainings, alike but for their images" in said["limits"]
    chosen = "In each run, the epoch with the best val_loss, of at most 2 epochs."
    assert said["selection"] == chosen
    said = statements(read_artefacts(workdir / "fold1"))
    assert "3 folds, number 1 (from 0) val, test share 0.2." in said["partition"]
    assert said["ensemble"] == "None: one network answers."
    assert "One training with one seed" in said["limits"]


def test_a_dry_run_does_not_stand_in_the_way_of_several(tiny_config, tmp_path):
    setup(tiny_config, tmp_path)
    assert (tmp_path / "config.json").exists()
    tiny_config.repeats = 2
    assert list(check_members(tiny_config, tmp_path)) == ["seed0", "seed1"]


def test_more_runs_than_anyone_makes_are_refused_at_once(tiny_config, tmp_path):
    tiny_config.repeats = 10**8
    with pytest.raises(UserError, match="config.repeats=100000000: set a value from 1 to 1000"):
        check_members(tiny_config, tmp_path / "run")


def test_folds_that_cannot_all_be_made_are_refused_before_the_first(tiny_config, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny_config.data.dir, root)
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    groups = [f"{i % (2 if file.startswith('COVID') else 5)}" for i, file in enumerate(files)]
    lines = "".join(f"{f},{f.split('/')[0]}{g}\n" for f, g in zip(files, groups, strict=True))
    (root / "groups.csv").write_text("file,group\n" + lines)
    tiny_config.data.dir, tiny_config.data.folds = str(root), 3
    with pytest.raises(UserError, match="data.split=grouped"):
        train_members(tiny_config, tmp_path / "run")
    tiny_config.data.split = "grouped"
    with pytest.raises(UserError, match="leaves class COVID"):
        train_members(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_seeds_share_a_split(tiny_config):
    tiny_config.repeats = 3
    tiny_config.seed = 5
    members = member_configs(tiny_config)
    assert list(members) == ["seed5", "seed6", "seed7"]
    assert {m.data.split_seed for m in members.values()} == {5}
    assert [m.seed for m in members.values()] == [5, 6, 7]
    assert not any(is_repeated(m) for m in members.values())


def test_a_split_that_changes_between_runs_is_refused(tiny_config, tmp_path, monkeypatch):
    whole = setup(tiny_config, tmp_path / "one")
    tiny_config.data.split, tiny_config.repeats, tiny_config.train.epochs = "file", 2, 1
    csv_file = tmp_path / "parts.csv"
    tiny_config.data.split_file = str(csv_file)
    write_split_csv(csv_file, whole.data.rows)

    def train_and_edit(run):
        train(run)
        swap = {"train": "val", "val": "train"}
        write_split_csv(
            csv_file, [dataclasses.replace(r, split=swap[r.split]) for r in run.data.rows]
        )

    monkeypatch.setattr("covid_flax.members.train", train_and_edit)
    with pytest.raises(UserError, match="seed1 parts the images otherwise than the first run"):
        train_members(tiny_config, tmp_path / "runs")


@pytest.mark.slow
def test_seeds_of_one_fold_are_no_cross_validation(tiny_config, tmp_path):
    tiny_config.data.split, tiny_config.data.folds, tiny_config.data.fold = "grouped", 3, 0
    tiny_config.repeats = 2
    tiny_config.train.epochs = 1
    summary = train_members(tiny_config, tmp_path)
    assert list(summary["members"]) == ["seed0", "seed1"]
    whole, member = (read_split_csv(d / "split.csv") for d in (tmp_path, tmp_path / "seed0"))
    assert whole == member
    assert robustness(tmp_path, split="val", limit=4)["num_examples"] == 4
    said = statements(read_artefacts(tmp_path))
    assert "with other seeds" in said["ensemble"]
    assert "2 trainings, alike but for their seed" in said["limits"]
    evaluate(tmp_path, split="val")
    assert evaluate(tmp_path, split="train", calibrated=True)["calibration"]["applied"]


def test_seeds_share_their_phantoms(tiny_config, tmp_path):
    tiny_config.repeats = 2
    tiny_config.data.dir, tiny_config.data.phantoms_per_class = "", 8
    images = []
    for name, member in member_configs(tiny_config).items():
        data = setup(member, tmp_path / name).data
        images.append({row.file: data.folder.read(row.file) for row in data.rows})
    assert images[0] == images[1] and len(images[0]) == 32


def test_the_interval_is_student_s():
    values = [0.91, 0.94, 0.90, 0.95, 0.92]
    got = mean_interval(values)
    want = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(got["interval"], [want.low, want.high], rtol=1e-9)
    assert mean_interval([0.5, 0.9], share=True)["interval"] == [0.0, 1.0]


def test_another_s_files_are_not_several_runs_to_lose(tiny_config, tmp_path):
    tiny_config.repeats = 2
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl is of no run .*another --workdir"):
        check_members(tiny_config, tmp_path)


def test_a_split_of_the_user_s_is_not_replaced_by_several_runs(make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.repeats, config.train.epochs = 2, 1
    setup(config, tmp_path / "seed0")
    (tmp_path / "seed0" / "split.csv").rename(tmp_path / "split.csv")
    shutil.rmtree(tmp_path / "seed0")
    rows = read_split_csv(tmp_path / "split.csv")
    other = [dataclasses.replace(row, split="val") for row in rows]
    write_split_csv(tmp_path / "split.csv", other)
    with pytest.raises(UserError, match="split.csv is not the split"):
        train_members(config, tmp_path)
    assert read_split_csv(tmp_path / "split.csv") == other
    assert not (tmp_path / "seed0" / "metrics.jsonl").exists()  # it was told before the training


def test_a_temperature_is_of_its_members_steps(folds, tmp_path):
    """Not of any that have the same sum."""
    _, workdir, _ = folds
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    saved, run = saved_run(copy), open_run(copy)
    found = stored_calibration(run, saved, "best", "val", True)
    assert found["runs"] == {member.workdir.name: member.step for member in run.members}
    one, two, *rest = run.members
    steps = (
        dataclasses.replace(one, step=one.step + 1),
        dataclasses.replace(two, step=two.step - 1),
    )
    other = dataclasses.replace(run, members=(*steps, *rest))
    assert stored_calibration(other, saved, "best", "val", False) is None
    with pytest.raises(UserError, match="has no temperature"):
        stored_calibration(other, saved, "best", "val", True)


def test_the_mean_of_each_figure_has_its_own_interval():
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    answers = [0.01 + 0.98 * rng.dirichlet([0.2, 0.2], 60) for _ in range(4)]
    each = {f"m{i}": (np.arange(60), p) for i, p in enumerate(answers)}
    got = members_report(labels, ("a", "b"), each)["mean"]
    judges = {
        "accuracy": lambda p: sklearn.metrics.accuracy_score(labels, p.argmax(1)),
        "balanced_accuracy": lambda p: sklearn.metrics.balanced_accuracy_score(labels, p.argmax(1)),
        "loss": lambda p: sklearn.metrics.log_loss(labels, p / p.sum(1, keepdims=True)),
    }
    for key, judge in judges.items():
        values = [judge(p) for p in answers]
        ends = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        want = list(ends) if key == "loss" else list(np.clip(ends, 0, 1))
        assert got[key]["mean"] == pytest.approx(np.mean(values), rel=0.02)
        np.testing.assert_allclose(got[key]["interval"], want, rtol=0.02)
    assert got["loss"]["interval"][1] > 1


def test_a_split_that_is_named_stays(tiny_config):
    tiny_config.repeats, tiny_config.seed, tiny_config.data.split_seed = 3, 5, 2
    assert {m.data.split_seed for m in member_configs(tiny_config).values()} == {2}


def test_no_teacher_can_teach_all_folds(tiny_config, tmp_path):
    tiny_config.data.split, tiny_config.data.folds = "grouped", 3
    tiny_config.train.teacher = str(tmp_path / "teacher")
    with pytest.raises(UserError, match="whatever taught one fold"):
        check_members(tiny_config, tmp_path / "whole")
