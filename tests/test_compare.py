import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import forked
import numpy as np
import pytest
from report.browser import chromium, visit
from scipy.stats import binom, norm
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

from covid_flax.compare import (
    Evaluation,
    compare,
    holm,
    mcnemar,
    print_comparison,
    read_evaluations,
    write_comparison,
)
from covid_flax.data.splits import Row, read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.assess import assess
from covid_flax.evaluation.predictions import Predictions, predictions_csv
from covid_flax.files import write_atomically
from covid_flax.report.comparison import _pair_table, _verdict
from covid_flax.report.write import write_evaluation

NAMES = ("COVID", "Normal", "Viral Pneumonia")


def predict(labels, skill, seed, classes=3):
    """Probabilities [N, K] of a model that is right more often the greater its skill."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def images(n=150, group_size=3, seed=0):
    """Labels, alike within a group, and the groups' names."""
    groups = np.arange(n) // group_size
    labels = np.random.default_rng(seed).integers(0, 3, groups.max() + 1)[groups]
    return labels, tuple(f"g{g}" for g in groups)


def evaluation(name, labels, probabilities, groups=(), **known):
    files = tuple(f"{NAMES[k]}/{i}.png" for i, k in enumerate(labels))
    predictions = Predictions(NAMES, files, labels, probabilities, groups)
    return Evaluation(name, Path("/nowhere") / name, predictions, **known)


def write_run(folder, labels, probabilities, groups=(), *, names=NAMES, split="test", order=None):
    """A run's folder as main and evaluate leave it, as far as compare reads it."""
    files = [f"{names[k]}/{i}.png" for i, k in enumerate(labels)]
    rows = [
        Row(file, names[k], split, groups[i] if groups else "")
        for i, (file, k) in enumerate(zip(files, labels, strict=True))
    ]
    write_split_csv(folder / "split.csv", rows)
    order = range(len(files)) if order is None else order
    predictions = Predictions(
        tuple(names), tuple(files[i] for i in order), labels[order], probabilities[order]
    )
    write_atomically(folder / "eval" / split / "predictions.csv", predictions_csv(predictions))
    report = {"split": split, "checkpoint": {"which": "best", "step": 7}, "alarms": []}
    write_atomically(folder / "eval" / split / "report.json", json.dumps(report).encode())
    about = {"config": {"model": {"name": "resnet50"}}}
    write_atomically(folder / "config.json", json.dumps(about).encode())
    return folder


def test_the_figures_and_paired_intervals_are_those_of_a_slow_loop_with_scikit_learn():
    labels, groups = images(90)
    p, q = predict(labels, 1.5, 1), predict(labels, 1.0, 2)
    found = compare(
        [evaluation("a", labels, p, groups), evaluation("b", labels, q, groups)], resamples=40
    )

    cluster = np.array([int(g[1:]) for g in groups])
    members = [np.flatnonzero(cluster == g) for g in range(cluster.max() + 1)]

    def figures(index, probabilities):
        y, x = labels[index], probabilities[index]
        return {
            "accuracy": np.mean(x.argmax(1) == y),
            "balanced_accuracy": balanced_accuracy_score(y, x.argmax(1)),
            "macro_auroc": np.mean([roc_auc_score(y == k, x[:, k]) for k in range(3)]),
            "macro_f1": f1_score(y, x.argmax(1), average="macro", zero_division=0),
            "nll": log_loss(y, x, labels=range(3)),
        }

    rng = np.random.default_rng(0)  # the draws are documented: whole clusters, seed 0
    drawn = rng.integers(0, len(members), (40, len(members)))
    loops = [np.concatenate([members[g] for g in row]) for row in drawn]
    everything = np.arange(len(labels))
    for run, probabilities in zip(found["runs"], (p, q), strict=True):
        slow = [figures(index, probabilities) for index in loops]
        for name, value in figures(everything, probabilities).items():
            assert run["figures"][name]["value"] == pytest.approx(value, abs=1e-12), name
            ends = np.percentile([s[name] for s in slow], [2.5, 97.5])
            np.testing.assert_allclose(run["figures"][name]["interval"], ends, atol=1e-12)
    slow = [(figures(index, p), figures(index, q)) for index in loops]
    (pair,) = found["pairs"]
    for name, difference in pair["difference"].items():
        value = figures(everything, q)[name] - figures(everything, p)[name]
        assert difference["value"] == pytest.approx(value, abs=1e-12)
        ends = np.percentile([b[name] - a[name] for a, b in slow], [2.5, 97.5])
        np.testing.assert_allclose(difference["interval"], ends, atol=1e-12)


def test_paired_intervals_hold_the_true_difference_about_as_often_as_they_say():
    # Group effects that both models share, so that intervals for independent images would fail.
    truth, hits, trials = 0.1, 0, 60
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        groups = np.repeat(np.arange(60), 4)
        labels = np.zeros(240, int)
        labels[:4] = 1
        hard = rng.random(60)[groups]  # of a group: the share of all models that fail it
        luck = rng.random(240)
        rights = [
            np.where(luck < 0.3, rng.random(240), hard) < share for share in (0.8, 0.8 - truth)
        ]
        models = [
            evaluation(
                name,
                labels,
                np.eye(3)[np.where(right, labels, 2)] * 0.8 + 0.2 / 3,
                tuple(f"g{g}" for g in groups),
            )
            for name, right in zip("ab", rights, strict=True)
        ]
        low, high = compare(models, resamples=200)["pairs"][0]["difference"]["accuracy"]["interval"]
        hits += low <= -truth <= high
    assert binom.cdf(hits, trials, 0.95) > 0.001  # 60 of 60 is no fault: only too few is


def test_of_many_equal_runs_none_is_called_better():
    """By its own interval about every twentieth run would be; by the joint one, few sets of ten."""
    alone = jointly = 0
    for seed in range(12):
        labels, _ = images(200, 1, seed)
        runs = [evaluation(f"r{i}", labels, predict(labels, 1, 50 * seed + i)) for i in range(10)]
        against = compare(runs, resamples=400)["against_first"]
        differences = [entry["difference"]["accuracy"] for entry in against]
        for key in ("interval", "joint_interval"):
            outside = any(low > 0 or high < 0 for low, high in (d[key] for d in differences))
            alone += key == "interval" and outside
            jointly += key == "joint_interval" and outside
        assert all(d["joint_interval"][0] <= d["interval"][0] for d in differences)
    assert jointly <= 2 < alone
    two = compare(runs[:2], resamples=400)["against_first"][0]["difference"]["accuracy"]
    assert two["joint_interval"] == two["interval"]


def test_a_model_against_itself_shows_nothing():
    labels, groups = images()
    p = predict(labels, 1.0, 3)
    found = compare([evaluation(name, labels, p, groups) for name in ("a", "b", "c")], resamples=50)
    for entry in found["pairs"]:
        assert entry["mcnemar"] == {"only_first": 0, "only_second": 0, "p": 1.0, "p_holm": 1.0}
        for difference in entry["difference"].values():
            # Resamples that are all alike.
            assert difference["value"] == 0.0 and difference["interval"] is None


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 11), (40, 21), (0, 30)])
def test_mcnemar_is_the_binomial_sum_of_the_textbook(b, c):
    first = np.array([True] * b + [False] * c + [True] * 7 + [False] * 3)
    second = np.array([False] * b + [True] * c + [True] * 7 + [False] * 3)
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (b, c)
    n = b + c
    weights = [binom.pmf(k, n, 0.5) for k in range(n + 1)]
    p = sum(w for w in weights if w <= weights[b] * (1 + 1e-7)) if n else 1.0
    assert found.p == pytest.approx(p, rel=1e-9)
    assert found.p == pytest.approx(min(1, 2 * binom.cdf(min(b, c), n, 0.5)), rel=1e-9)


def test_holm_rejects_as_the_step_down_rule_does():
    # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.02, and 1 x 0.03 lifted to the one before.
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(rng.integers(1, 8)) ** 3
        adjusted = np.array(holm(p.tolist()))
        for level in (0.01, 0.05, 0.2):
            rejected = np.zeros(len(p), bool)
            for step, i in enumerate(np.argsort(p)):
                if p[i] > level / (len(p) - step):
                    break
                rejected[i] = True
            np.testing.assert_array_equal(adjusted <= level, rejected)


def test_images_and_classes_in_another_order_are_matched_by_name(tmp_path):
    labels, groups = images(60)
    p = predict(labels, 1.0, 4)
    a = write_run(tmp_path / "a", labels, p, groups)
    turned = [2, 0, 1]
    rank = np.argsort(turned)
    b = write_run(
        tmp_path / "b",
        rank[labels],
        p[:, turned],
        groups,
        names=[NAMES[k] for k in turned],
        order=np.random.default_rng(0).permutation(60),
    )
    found = compare(read_evaluations([a, b]), resamples=20)
    assert found["split"] == "test" and found["clusters"] == 20
    assert found["class_names"] == list(NAMES)
    assert found["runs"][0]["figures"] == found["runs"][1]["figures"]
    assert found["pairs"][0]["mcnemar"]["p"] == 1


def test_groups_come_from_whichever_run_knows_them(tmp_path):
    labels, groups = images(60)
    a = write_run(tmp_path / "a", labels, predict(labels, 1, 1))
    b = write_run(tmp_path / "b", labels, predict(labels, 1, 2), groups)
    found = compare(read_evaluations([a, b]), resamples=10)
    assert found["groups_known"] and found["clusters"] == 20
    assert not any(c["name"] == "groups-unknown" for c in found["cautions"])
    bare = [dataclasses.replace(e.predictions, groups=()) for e in read_evaluations([a, b])]
    found = compare([Evaluation(n, a, p) for n, p in zip("ab", bare, strict=True)], resamples=10)
    assert not found["groups_known"] and found["clusters"] == 60
    assert cautions(found, "groups-unknown") == [("caution", "groups-unknown", ["a", "b"])]


def test_evaluations_that_lie_elsewhere_keep_their_groups(tmp_path):
    labels, groups = images(60)
    for name, seed in (("a", 1), ("b", 2)):
        files = tuple(f"{NAMES[k]}/{i}.png" for i, k in enumerate(labels))
        p = Predictions(NAMES, files, labels, predict(labels, 1, seed), groups)
        write_evaluation(tmp_path / name, assess(p, split="all")[0], p)
    found = compare(read_evaluations([tmp_path / "a", tmp_path / "b"]), resamples=10)
    assert found["groups_known"] and found["clusters"] == 20
    assert cautions(found, "training-images-scored") == []


def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path):
    labels, _ = images(60)
    p = predict(labels, 1, 1)
    a = write_run(tmp_path / "a", labels, p)
    short = write_run(tmp_path / "short", labels[:-2], p[:-2])
    with pytest.raises(UserError, match=r"2 of 60 images only in a, first .+/58.png\)"):
        read_evaluations([a, short])

    other = write_run(tmp_path / "other", labels, p, names=("COVID", "Normal", "Flu"))
    with pytest.raises(UserError, match="other has COVID, Normal, Flu"):
        read_evaluations([a, other])

    wrong = write_run(tmp_path / "wrong", labels, p)
    table = wrong / "eval/test/predictions.csv"
    lines = table.read_text().splitlines()
    cells = lines[5].split(",")
    cells[1] = NAMES[(NAMES.index(cells[1]) + 1) % 3]
    table.write_text("\n".join([*lines[:5], ",".join(cells), *lines[6:]]))
    with pytest.raises(UserError, match=rf"1 images have one label .* first {cells[0]}"):
        read_evaluations([a, wrong])

    table.write_text("\n".join([*lines, lines[5]]))
    with pytest.raises(UserError, match="names an image twice"):
        read_evaluations([a, wrong])
    with pytest.raises(UserError, match="given twice"):
        read_evaluations([a, a / "eval/test"])
    with pytest.raises(UserError, match="no folder"):
        read_evaluations([a, tmp_path / "none"])
    with pytest.raises(UserError, match="two run folders or more"):
        read_evaluations([a])


def test_the_split_is_test_where_every_run_has_it_else_val(tmp_path):
    labels, _ = images(60)
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        write_run(folder, labels, predict(labels, 1, i), split="val")
    write_run(folders[0], labels, predict(labels, 1, 5), split="test")
    found = compare(read_evaluations(folders), resamples=5)
    assert found["split"] == "val"
    assert cautions(found)[0] == ("alarm", "stopping-split-scored", ["a", "b"])
    with pytest.raises(UserError, match="b has no eval/test/predictions.csv.*or compare on val"):
        read_evaluations(folders, "test")
    write_run(folders[1], labels, predict(labels, 1, 6), split="test")
    assert compare(read_evaluations(folders), resamples=5)["split"] == "test"
    assert compare(read_evaluations(folders, "val"), resamples=5)["split"] == "val"
    # A run on test alone and one on val alone share nothing.
    only = [
        write_run(tmp_path / f"only-{s}", labels, predict(labels, 1, 1), split=s)
        for s in ("test", "val")
    ]
    with pytest.raises(UserError, match="no scored split in common"):
        read_evaluations(only)


def test_names_are_as_short_as_they_can_be(tmp_path):
    labels, _ = images(60)
    folders = [tmp_path / p for p in ("x/run", "y/run", "y/run/baselines/svm")]
    for i, folder in enumerate(folders):
        write_run(folder, labels, predict(labels, 1, i))
    assert [e.name for e in read_evaluations(folders)] == ["x/run", "y/run", "baselines/svm"]
    assert [e.name for e in read_evaluations(folders[1:])] == ["run", "svm"]


def test_alarms_of_the_runs_are_told_once_and_mixed_scaling_too():
    labels, groups = images(60)
    alarm = {
        "name": "group-leak",
        "level": "alarm",
        "text": "3 groups on both sides.",
        "figures": {},
    }
    reports = [{"alarms": [alarm], "calibration": {"applied": True}}, {"alarms": [alarm]}]
    found = compare(
        [
            evaluation(n, labels, predict(labels, 1, i), groups, report=reports[i])
            for i, n in enumerate("ab")
        ],
        resamples=5,
    )
    assert cautions(found) == [
        ("alarm", "group-leak", ["a", "b"]),
        ("caution", "calibration-differs", ["a"]),
    ]


def cautions(found, *names):
    """Level, name and runs of those names, or of all but what so few images always raise."""
    return [
        (c["level"], c["name"], c["runs"])
        for c in found["cautions"]
        if (c["name"] in names if names else c["name"] != "small-class")
    ]


def test_predictions_that_left_their_labels_are_caught_though_the_report_is_silent(tmp_path):
    # The paper's own fault: the images in another order than their labels.
    labels, groups = images(600)
    p = predict(labels, 3.0, 1)
    folders = [write_run(tmp_path / name, labels, p, groups) for name in ("a", "b")]
    order = np.random.default_rng(0).permutation(600)
    shuffled = Predictions(
        NAMES, tuple(f"{NAMES[k]}/{i}.png" for i, k in enumerate(labels)), labels, p[order]
    )
    place = folders[1] / "eval/test"
    for folder in folders:  # both reports are of the predictions before that
        accuracy = float((p.argmax(1) == labels).mean())
        stale = {"name": "below-majority", "level": "alarm", "text": "As it was once."}
        leak = {"name": "duplicate-leak", "level": "alarm", "text": "2 identical files."}
        report = {"split": "test", "accuracy": accuracy, "alarms": [stale, leak]}
        (folder / "eval/test/report.json").write_text(json.dumps(report))
    write_atomically(place / "predictions.csv", predictions_csv(shuffled))
    found = compare(read_evaluations(folders), resamples=5)
    raised = {(name, *runs) for level, name, runs in cautions(found) if level == "alarm"}
    assert raised >= {
        ("independent-predictions", "b"),
        ("accuracy-mismatch", "b"),
        ("duplicate-leak", "a", "b"),
    }
    assert not any("a" in runs for name, *runs in raised if name != "duplicate-leak")
    assert "As it was once." not in [c["text"] for c in found["cautions"]]


def test_a_group_on_both_sides_is_found_with_the_groups_of_another_run(tmp_path):
    labels, groups = images(60)
    p = predict(labels, 3.0, 1)
    folders = [write_run(tmp_path / "a", labels, p), write_run(tmp_path / "b", labels, p, groups)]
    for folder, group in ((folders[0], ""), (folders[1], "g0")):
        rows = read_split_csv(folder / "split.csv")
        write_split_csv(folder / "split.csv", [*rows, Row("COVID/t.png", "COVID", "train", group)])
    found = compare(read_evaluations(folders), resamples=5)
    assert cautions(found, "group-leak") == [("alarm", "group-leak", ["a", "b"])]


def test_what_the_report_knows_of_groups_and_of_the_epoch_is_not_contradicted():
    """Groups that the folder named after the split; weights that no val image chose."""
    labels, groups = images(60)
    rows = [Row(f"{NAMES[k]}/{i}.png", NAMES[k], "val", "") for i, k in enumerate(labels)]
    rows.append(Row("COVID/t.png", "COVID", "train", ""))
    for report, said in (
        ({}, ["groups-unknown", "stopping-split-scored"]),
        ({"alarms_checked": ["groups-unknown"]}, ["stopping-split-scored"]),
        ({"alarms_checked": ["groups-unknown"], "stopped_on": None}, []),
        ({"stopped_on": None}, ["groups-unknown"]),
    ):
        report = {"split": "val", "alarms": [], **report}
        runs = [
            evaluation(n, labels, predict(labels, 3.0, i), groups, report=report, rows=rows)
            for i, n in enumerate("ab")
        ]
        found = compare(runs, resamples=5)
        told = {name for _, name, _ in cautions(found, "groups-unknown", "stopping-split-scored")}
        assert sorted(told) == said


def test_another_folder_of_the_same_names_is_told(tmp_path):
    labels, groups = images(60)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "x")

    def scored_in(*folders):
        reports = [{"split": "test", "data_dir": str(tmp_path / f)} for f in folders]
        models = [
            evaluation(n, labels, predict(labels, 3, i), groups, report=report)
            for i, (n, report) in enumerate(zip("ab", reports, strict=True))
        ]
        return cautions(compare(models, resamples=2), "folders-differ")

    assert scored_in("x", "link") == scored_in("x", "x") == []
    assert scored_in("x", "y") == [("caution", "folders-differ", ["a", "b"])]


def test_a_figure_that_no_resample_changes_has_wilsons_interval_or_none(tmp_path):
    labels, groups = images(60)
    sure = np.eye(3)[labels] * 0.7 + 0.1
    models = [evaluation("a", labels, sure, groups), evaluation("b", labels, sure, groups)]
    found = compare(models, resamples=50)
    low, high = wilson_by_roots(60, 60)
    figures = found["runs"][0]["figures"]
    assert figures["accuracy"]["interval"] == pytest.approx([low, high])
    covid = int((labels == 0).sum())
    assert figures["recall"]["COVID"]["interval"] == pytest.approx(wilson_by_roots(covid, covid))
    assert figures["balanced_accuracy"] == {"value": 1.0, "interval": None}
    assert figures["macro_auroc"]["interval"] is None
    write_comparison(tmp_path, found)
    page = " ".join((tmp_path / "compare.html").read_text().split())
    assert f"({100 * low:.1f}–100.0)" in page
    assert "(100.0–100.0)" not in page and "+0.0 to +0.0" not in page
    assert "right and wrong on the same images" in page


def wilson_by_roots(hits, n):
    """Wilson's bounds by the solver: the shares p with |hits/n - p| = z sqrt(p (1 - p) / n)."""
    z, share = norm.ppf(0.975), hits / n
    roots = np.roots([1 + z**2 / n, -(2 * share + z**2 / n), share**2])
    return sorted(roots.real)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("eval/test/report.json", {"alarms": 5}),
        ("eval/test/report.json", {"alarms": [{"name": "x"}]}),
        ("eval/test/report.json", {"accuracy": "high"}),
        ("eval/test/report.json", {"checkpoint": 3}),
        ("eval/test/report.json", {"calibration": [1]}),
        ("eval/test/report.json", [1]),
        ("config.json", {"config": 1}),
        ("config.json", {"config": {"model": []}}),
        ("config.json", {"data": {"root": 3}}),
    ],
)
def test_a_damaged_file_is_named_in_a_line(tmp_path, file, content):
    labels, _ = images(12)
    folders = [write_run(tmp_path / n, labels, predict(labels, 1, 1)) for n in "ab"]
    (folders[1] / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"b/{file} is damaged .*: .* the run anew"):
        read_evaluations(folders)


def test_a_class_without_images_and_a_single_group_leave_figures_undefined():
    labels = np.zeros(20, int)
    labels[:9] = 1
    models = [evaluation(n, labels, predict(labels, 1, i), ("g",) * 20) for i, n in enumerate("ab")]
    found = compare(models, resamples=10)
    figures = found["runs"][0]["figures"]
    assert figures["recall"]["Viral Pneumonia"] == {"value": None, "interval": None}
    assert figures["accuracy"]["interval"] is None  # one group, drawn again and again
    assert found["pairs"][0]["difference"]["accuracy"]["interval"] is None
    json.dumps(found, allow_nan=False)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_files_hold_what_was_found_and_hostile_names_are_text(tmp_path):
    labels, groups = images(60)
    evil = '<script>alert(1)</script>"'
    found = compare(
        [
            evaluation(n, labels, predict(labels, s, i), groups)
            for i, (n, s) in enumerate([("a", 1.0), (evil, 1.5), ("c", 0.2)])
        ],
        resamples=30,
    )
    write_comparison(tmp_path / "out", found)
    assert json.loads((tmp_path / "out/compare.json").read_text()) == found
    page = _Page()
    page.feed((tmp_path / "out/compare.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert "script" not in page.tags and evil in text
    assert page.tags.count("img") == 2
    for run in found["runs"]:
        assert f"{100 * run['figures']['accuracy']['value']:.1f} %" in text
    for entry in found["pairs"]:
        points = f"{100 * entry['difference']['accuracy']['value']:+.1f}".replace("-", "−")
        assert points in text and f"{entry['second']} less {entry['first']}" in text
    with (
        chromium() as browser,
        visit(browser, tmp_path / "out/compare.html", 360) as seen,
    ):
        assert seen.errors == [] and seen.requests == [] and seen.overflow <= 0
        assert all(shown["width"] for shown in seen.pictures)


def test_the_table_for_other_programs_has_a_row_for_each_figure(tmp_path):
    labels, groups = images(60)
    names = ["a", "b,\n", "c"]
    models = [evaluation(n, labels, predict(labels, 1, i), groups) for i, n in enumerate(names)]
    found = compare(models, resamples=20)
    write_comparison(tmp_path / "out", found)
    with open(tmp_path / "out/compare.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3 * (6 + 3)
    row = next(r for r in rows if (r["run"], r["figure"]) == ("b,\n", "recall Normal"))
    assert float(row["value"]) == found["runs"][1]["figures"]["recall"]["Normal"]["value"]


def test_every_list_of_tests_is_corrected_for_its_length():
    labels, _ = images(150, 1)
    skills = {"a": 2, "b": 1, "c": 0.3}
    runs = [
        evaluation(name, labels, predict(labels, skill, i))
        for i, (name, skill) in enumerate(skills.items())
    ]
    found = compare(runs, resamples=2)
    for family in ("against_first", "pairs"):
        tests = [entry["mcnemar"] for entry in found[family]]
        least = min(tests, key=lambda test: test["p"])
        assert least["p"] < 0.05
        assert least["p_holm"] == pytest.approx(min(1, len(tests) * least["p"]))


@pytest.mark.parametrize(
    ("joint", "shown"),
    [
        ([0.01, 0.2], "better"),
        ([-0.2, -0.01], "worse"),
        ([-0.1, 0.2], "no difference shown"),
    ],
)
def test_the_verdict_is_that_of_the_joint_interval(joint, shown):
    figure = {"value": 0.05, "interval": [0.01, 0.1], "joint_interval": joint}
    test = {"only_first": 1, "only_second": 2, "p": 0.01, "p_holm": 0.03}
    got = _verdict({"second": "b", "difference": {"accuracy": figure}, "mcnemar": test})
    assert (got["shown"], got["p"]) == (shown, "0.030")


def test_the_command_takes_folders_and_flags_in_any_order(tmp_path):
    labels, groups = images(60)
    a = write_run(tmp_path / "a", labels, predict(labels, 1, 1), groups)
    b = write_run(tmp_path / "b", labels, predict(labels, 2, 2), groups)
    report, _ = assess(read_evaluations([a, b])[1].predictions, split="test")

    done = forked.command("covid_flax.compare", a, "--split=test", b, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"b  {report['accuracy']:.4f} (" in done.stdout
    tables = [line for line in done.stdout.splitlines() if not line.startswith(("caution", "w"))]
    assert max(map(len, tables)) <= 100
    assert "written: compare-test/compare.html" in done.stdout
    elsewhere = forked.command(
        "covid_flax.compare", a, b, "--split=test", "--output=there/too", cwd=tmp_path
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    made = [tmp_path / place / "compare.json" for place in ("there/too", "compare-test")]
    assert made[0].read_bytes() == made[1].read_bytes()
    found = json.loads((tmp_path / "compare-test/compare.json").read_text())
    # The same draws as the run's own report.
    assert (
        found["runs"][1]["figures"]["macro_auroc"]["interval"]
        == report["intervals"]["bootstrap"]["macro"]["auroc"]
    )


def test_groups_of_one_run_follow_another_s_order_of_files(tmp_path):
    labels, groups = images(60)
    order = np.random.default_rng(0).permutation(60)
    a = write_run(tmp_path / "a", labels, predict(labels, 1, 1))
    b = write_run(tmp_path / "b", labels, predict(labels, 1, 2), groups, order=order)
    first = read_evaluations([a, b])[0].predictions
    wanted = [groups[int(Path(file).stem)] for file in first.files]
    assert list(first.groups) == wanted


def test_a_recall_s_interval_is_of_the_class_s_own_images():
    labels = np.repeat([0, 1], 30)
    answers = labels.copy()
    answers[30:33] = 0  # of class 0 the recall is 30 of 30, the precision 30 of 33
    files = tuple(map(str, range(60)))
    runs = [evaluation(name, labels, np.eye(3)[answers] * 0.7 + 0.1, files) for name in "ab"]
    figures = compare(runs, resamples=50)["runs"][0]["figures"]
    assert figures["recall"]["COVID"]["interval"] == pytest.approx(wilson_by_roots(30, 30))


def test_who_alone_is_right_is_told_of_the_right_run(tmp_path):
    labels, groups = images(60)
    a, b = labels.copy(), labels.copy()
    a[:9], b[9:13] = (labels[:9] + 1) % 3, (labels[9:13] + 1) % 3  # the first fails 9, the other 4
    runs = [
        evaluation(n, labels, np.eye(3)[x] * 0.7 + 0.1, groups) for n, x in (("a", a), ("b", b))
    ]
    found = compare(runs, resamples=5)
    test = found["pairs"][0]["mcnemar"]
    assert (test["only_first"], test["only_second"]) == (4, 9)
    write_comparison(tmp_path, found)
    text = " ".join((tmp_path / "compare.html").read_text().split())
    assert "Right where the other is wrong: on 9 images against 4;" in text
    assert "<td>9</td><td>4</td>" in text.replace(' class="figure"', "")  # alone right, alone wrong


def _failing(*parts):
    """Runs `a`, `b`, ... that fail these images of sixty, and have all others right."""
    labels, groups = images(60)
    for name, part in zip("abc", parts, strict=False):
        x = labels.copy()
        x[part] = (labels[part] + 1) % 3
        yield evaluation(name, labels, np.eye(3)[x] * 0.7 + 0.1, groups)


def test_the_greatest_accuracy_is_named(tmp_path):
    runs = [*_failing(slice(0, 9), slice(0, 4), slice(0, 1))]
    write_comparison(tmp_path, compare(runs, resamples=5))
    assert "Greatest accuracy: <b>c</b>." in (tmp_path / "compare.html").read_text()


def test_who_alone_is_right_in_every_pair_and_on_the_console(capsys):
    found = compare([*_failing(slice(0, 9), slice(9, 13), slice(13, 14))], resamples=5)
    table = _pair_table(found["pairs"], "Pair", both=True)
    row = dict(zip(table["head"], table["rows"][0], strict=True))
    assert row["Pair"] == "b less a"  # b has the 9 that a fails, a the 4 that b fails
    assert (row["Only the first right"], row["Only the second right"]) == ("4", "9")
    print_comparison(found)
    lines = capsys.readouterr().out.splitlines()
    i = next(i for i, line in enumerate(lines) if "right alone" in line)
    shown = dict(zip(re.split(" {2,}", lines[i]), re.split(" {2,}", lines[i + 1]), strict=True))
    assert (shown["right alone"], shown["wrong alone"]) == ("9", "4")


def test_the_table_s_calibration_error_and_bounds(tmp_path):
    labels, groups = images(90)
    p, q = predict(labels, 1.5, 1), predict(labels, 1, 2)
    runs = [evaluation("a", labels, p, groups), evaluation("b", labels, q, groups)]
    write_comparison(tmp_path / "out", compare(runs, resamples=40))
    top, right = p.max(1), p.argmax(1) == labels
    bins = np.ceil(15 * top) - 1
    ece = sum(abs((top - right)[bins == b].sum()) for b in range(15)) / 90
    with open(tmp_path / "out/compare.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    row = next(r for r in rows if (r["run"], r["figure"]) == ("a", "ece"))
    assert float(row["value"]) == pytest.approx(ece, abs=1e-9)
    bounds = [(float(r["low"]), float(r["high"])) for r in rows if r["low"]]
    assert bounds and all(low < high for low, high in bounds)
