"""The page is read back: its text by a parser, its looks and behaviour in real Chromium."""

import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import pytest
from markupsafe import Markup
from report.browser import chromium, visit

from covid_flax.errors import UserError
from covid_flax.evaluation.intervals import class_interval
from covid_flax.evaluation.metrics import classification_report
from covid_flax.evaluation.predictions import Predictions
from covid_flax.report import pictures
from covid_flax.report.page import (
    _average_table,
    figure3,
    percent,
    render,
    with_interval,
    write_report_page,
)
from covid_flax.report.summary import seeds_of

NAMES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
HOSTILE = (
    "<script>alert(1)</script>",
    "$x^{2",
    "\"><img src=x onerror='alert(2)'>",
    "</style></title><b>bold",
    "{{ 7 * 7 }}{% raw %}",
    "新冠肺炎",
    "w" * 150,
    "\x01\ttab",
    "\ud800 surrogate",
    "many words " * 12,
)
ALARMS = [
    {"name": "small-class", "level": "caution", "text": "Only 41 images.", "figures": {"n": 41}},
    {
        "name": "group-leak",
        "level": "alarm",
        "text": "17 groups are on both sides.",
        "figures": {"groups": 17, "share": 0.012345, "first": ["a.png", "b.png"]},
    },
]


def _predictions(names=NAMES, n=400, groups=()):
    random = np.random.default_rng(1)
    labels = random.integers(len(names), size=n)
    p = np.exp(random.normal(size=(n, len(names))) + 2.5 * np.eye(len(names))[labels])
    files = tuple(f"{i}.png" for i in range(n))
    return Predictions(tuple(names), files, labels, p / p.sum(1, keepdims=True), groups)


def _report(p, resamples=50, **more):
    report = classification_report(
        p.labels, p.probabilities, p.class_names, clusters=p.clusters, resamples=resamples
    )
    return report | {"split": "test", "data_dir": "/data/xrays"} | more


def _write(tmp_path, report, predictions, run=None, title="test images of a run"):
    path = tmp_path / "eval" / "report.html"
    write_report_page(path, report, predictions, title=title, run=run)
    return path


class _Text(html.parser.HTMLParser):
    """Visible text by section id, and the tags."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.tags, self._section, self._hidden = {"": ""}, [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._hidden = tag == "style"
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.sections[self._section] = ""

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            before = self.sections[self._section]
            self.sections[self._section] = " ".join(f"{before} {data}".split())


def _read(path):
    return _Text(path.read_text(encoding="utf-8")).sections


def test_figures_as_text():
    assert percent(0.9563) == "95.6\N{NO-BREAK SPACE}%" and figure3(-0.00723) == "−0.007"
    for undefined in (None, math.nan, math.inf):
        for shown in (percent(undefined), figure3(undefined), with_interval(undefined, [0, 1])):
            assert "–" in shown and "undefined on these images" in shown
    assert ">(75.4–86.0)<" in with_interval(0.81, [0.754, 0.86])
    assert ">(−0.005 to 0.013)<" in with_interval(0.003, [-0.005, 0.013], figure3)
    for without in (None, [0.5, None], [math.nan, 1.0], [1.0, 1.0]):
        assert "interval" not in with_interval(1.0, without)


@pytest.fixture
def no_pictures(monkeypatch):
    """Saves their seconds where the text alone is read; they have their own tests."""
    names = "confusion reliability roc precision_recall risk_coverage decision".split()
    made = dict.fromkeys(names, Markup("<img>"))
    monkeypatch.setattr(pictures, "evaluation_pictures", lambda report, predictions: made)


@pytest.mark.usefixtures("no_pictures")
def test_images_of_one_group_have_no_intervals(tmp_path):
    p = _predictions(groups=("g",) * 400)
    path = _write(tmp_path, _report(p), p)
    assert "all images are of one group" in _read(path)["averages"]
    assert (
        'class="interval"' not in path.read_text()
        and "percentile bootstrap" not in path.read_text()
    )


@pytest.mark.usefixtures("no_pictures")
def test_a_class_of_one_group_has_no_interval_and_the_class_map_is_told(tmp_path):
    p = _predictions()
    groups = tuple("g" if k == 0 else f"{i}" for i, k in enumerate(p.labels))
    p = dataclasses.replace(p, groups=groups)
    report = _report(p, split="all", class_map={"theirs": NAMES[1], "other": "-"})
    for name in NAMES[:2]:
        assert (class_interval(report, name, "recall") is None) == (name == NAMES[0])
        assert class_interval(report, name, "specificity") is not None
    scored = _read(_write(tmp_path, report, p))["scored"]
    assert "all of /data/xrays" in scored
    assert f"theirs as {NAMES[1]}; other left out" in " ".join(scored.split())


def test_seeds_are_those_of_all_runs():
    run = {"seed": 3, "config": {"repeats": 1}}
    assert seeds_of(run) == "3"
    assert seeds_of({"seed": 3, "members": ["seed3"], "config": {"repeats": 5}}) == "3 to 7"


@pytest.mark.usefixtures("no_pictures")
def test_verdict_comes_first_with_intervals(tmp_path):
    p = _predictions(groups=tuple(f"g{i // 2}" for i in range(400)))
    report = _report(p)
    report |= {"accuracy": 0.8123, "balanced_accuracy": 0.7234}
    report["per_class"]["Normal"]["recall"] = 0.4321
    report["intervals"]["bootstrap"] |= {"accuracy": [0.78, 0.84], "balanced_accuracy": [0.7, 0.75]}
    kinds = ("wilson", "bootstrap")
    of_class = {kind: report["intervals"][kind]["per_class"]["Normal"] for kind in kinds}
    of_class["wilson"]["recall"] = [0.3456, 0.5123]
    of_class["bootstrap"]["recall"] = [0.2346, 0.6234]
    path = _write(tmp_path, report, p)
    sections = _read(path)
    assert list(sections)[1:3] == ["verdict", "weakens"]
    verdict = sections["verdict"]
    assert "Of 400 test images (200 groups), 81.2 % (78.0–84.0) are classed rightly" in verdict
    assert "(balanced accuracy) is 72.3 % (70.0–75.0)" in verdict
    support = report["per_class"]["Normal"]["support"]
    assert f"weakest class is Normal: 43.2 % (23.5–62.3) of its {support} images" in verdict
    # Where no images share a group, or all resamples agree.
    for change in ({"clusters": 400}, {"clusters": 200}):
        report["intervals"] |= change
        if change["clusters"] == 200:
            of_class["bootstrap"]["recall"] = [0.4321, 0.4321]
        verdict = _read(_write(tmp_path, report, p))["verdict"]
        assert f"weakest class is Normal: 43.2 % (34.6–51.2) of its {support} images" in verdict
    largest = max(NAMES, key=lambda name: report["per_class"][name]["support"])
    share = report["per_class"][largest]["support"] / 4
    assert f"always answering {largest} would get {share:.1f} %" in verdict
    assert "No groups are known" not in verdict
    p = _predictions()
    assert "No groups are known" in _read(_write(tmp_path, _report(p), p))["verdict"]


@pytest.mark.usefixtures("no_pictures")
def test_accuracy_without_spread_takes_wilsons_interval(tmp_path):
    p = _predictions()
    p = Predictions(p.class_names, p.files, p.predicted, p.probabilities)
    text = _read(_write(tmp_path, _report(p), p))["verdict"]
    assert "100.0 % (99.0–100.0) are classed rightly" in text  # 400 / (400 + 1.96²)


@pytest.mark.usefixtures("no_pictures")
def test_tables_show_every_figure_with_the_right_interval(tmp_path):
    p = _predictions()
    report = _report(p)
    wilson = report["intervals"]["wilson"]["per_class"]["COVID"]
    bootstrap = report["intervals"]["bootstrap"]["per_class"]["COVID"]
    expected = [f"COVID {report['per_class']['COVID']['support']}"]
    for key in ("recall", "specificity", "precision", "ppv_at", "npv"):
        low, high = wilson.get(key) or bootstrap[key]
        x = report["per_class"]["COVID"][key]
        expected.append(f"{100 * x:.1f} % ({100 * low:.1f}–{100 * high:.1f})")
    for key in ("f1", "auroc", "auprc"):
        low, high = bootstrap[key]
        expected.append(f"{report['per_class']['COVID'][key]:.3f} ({low:.3f}–{high:.3f})")
    sections = _read(_write(tmp_path, report, p))
    assert " ".join(expected) in sections["classes"]
    assert "PPV at 5 %" in sections["classes"]
    for key in ("kappa", "mcc", "nll", "brier", "ece"):
        low, high = report["intervals"]["bootstrap"][key]
        assert f"{report[key]:.3f} ({low:.3f}–{high:.3f})" in sections["averages"]
    for kind in ("macro", "weighted"):
        low, high = report["intervals"]["bootstrap"][kind]["auroc"]
        assert f"{report[kind]['auroc']:.3f} ({low:.3f}–{high:.3f})" in sections["averages"]


@pytest.mark.usefixtures("no_pictures")
def test_prevalences_that_differ_stand_in_their_cells(tmp_path):
    p = _predictions()
    report = _report(p)
    report["prevalence"]["COVID"] = 0.123
    text = _read(_write(tmp_path, report, p))["classes"]
    assert "PPV at prevalence" in text and "at 12.3 %" in text and text.count("at 5 %") == 3


@pytest.mark.usefixtures("no_pictures")
def test_alarms_come_before_cautions_with_their_figures(tmp_path):
    p = _predictions()
    made = ["group-leak", "small-class", "below-majority"]
    sections = _read(_write(tmp_path, _report(p, alarms=ALARMS, alarms_checked=made), p))
    assert "1 alarm says" in sections["verdict"] and "1 caution limit" in sections["verdict"]
    text = sections["weakens"]
    alarm, caution = text.index("Alarm Group leak 17 groups"), text.index("Caution Small class")
    assert alarm < caution
    assert "groups: 17; share: 0.01235; first: a.png, b.png" in text
    assert "in order: always naming the commonest class would not be right more often." in text


@pytest.mark.usefixtures("no_pictures")
def test_silence_is_said(tmp_path):
    p = _predictions()
    none = _read(_write(tmp_path, _report(p, alarms=[], alarms_checked=["group-leak"]), p))
    assert "No alarm fired" in none["weakens"] and "no known group (patient" in none["weakens"]
    assert "were not run" in _read(_write(tmp_path, _report(p), p))["weakens"]


@pytest.mark.usefixtures("no_pictures")
def test_undefined_figures_are_dashes(tmp_path):
    """A class without images and one never answered: the report's zeros mean nothing there."""
    p = _predictions()
    probabilities = p.probabilities * [1, 1, 0, 1]
    probabilities /= probabilities.sum(1, keepdims=True)
    p = Predictions(NAMES, p.files, np.where(p.labels == 3, 0, p.labels), probabilities)
    text = _read(path := _write(tmp_path, _report(p), p))["classes"]
    absent = text[text.index("Viral Pneumonia 0 ") :]
    assert absent.startswith("Viral Pneumonia 0 – ")
    normal = re.search(r"Normal \d+ 0\.0 % \([^)]*\) 100\.0 % \([^)]*\) – ", text)
    assert normal
    whole = path.read_text()
    assert not re.search(r"\b(nan|None|inf)\b", re.sub(r'"data:[^"]*"', "", whole))
    assert "No images of: Viral Pneumonia" in _read(path)["verdict"]


def test_report_of_the_first_version_and_one_image(tmp_path):
    p = _predictions(n=1)
    keys = ["num_examples", "class_names", "loss", "accuracy", "balanced_accuracy"]
    full = _report(p)
    report = {key: full[key] for key in [*keys, "confusion_matrix", "per_class"]}
    for figures in report["per_class"].values():
        for key in set(figures) - {"precision", "recall", "f1", "support"}:
            del figures[key]
    sections = _read(_write(tmp_path, report, p))
    assert "Of 1 image, " in sections["verdict"]
    assert "Sensitivity" in sections["classes"] and "AUROC" not in sections["classes"]


@pytest.mark.usefixtures("no_pictures")
def test_calibration_abstention_and_what_was_scored(tmp_path):
    p = _predictions()
    calibration = {
        "applied": True,
        "temperature": 1.2134,
        "fitted_on": "val",
        "ece": {"before": 0.0312, "after": 0.0119},
        "nll": {"before": 0.1611, "after": 0.1489},
    }
    abstain = {
        "threshold": 0.9134,
        "coverage": 0.872,
        "accuracy": 0.9907,
        "accuracy_interval": [0.986, 0.9939],
        "target_accuracy": 0.99,
    }
    run = {
        "name": "finetune",
        "seed": 0,
        "config": {"model": {"name": "resnet50"}, "data": {"image_size": 128}},
        "weights": {"source": "imagenet", "sha256": "ab12"},
        "versions": {"jax": "0.10.2"},
    }
    report = _report(p, calibration=calibration, abstain=abstain, note="A planted note.")
    report["checkpoint"] = {"which": "best", "step": 1926}
    sections = _read(_write(tmp_path, report, p, run))
    for text in ("scaled by temperature 1.213", "0.031 0.012", "0.161 0.149"):
        assert text in sections["calibration"]
    assert (
        "reaches 0.913 keeps 87.2 % of the images, of which 99.1 % (98.6–99.4) are right"
        in (sections["pictures"])
    )
    assert "A planted note." in sections["weakens"]
    for text in (
        "finetune",
        "/data/xrays",
        "best checkpoint, step 1,926",
        "128 px",
        "ab12",
        "jax 0.10.2",
    ):
        assert text in sections["scored"]
    # It is one of scaled probabilities, whichever the page shows.
    report["calibration"] = calibration | {"applied": False}
    report["checkpoint"]["which"] = "1926"
    unscaled = _read(_write(tmp_path, report, p, run))
    assert "checkpoint of step 1,926" in unscaled["scored"]
    assert "top probability, scaled by the temperature, reaches 0.913" in unscaled["pictures"]
    assert "to which it was fitted" not in unscaled["calibration"]
    report["calibration"] = calibration | {"fitted_here": True}
    fitted = _read(_write(tmp_path, report, p, run))
    assert "to which it was fitted" in fitted["calibration"]
    assert "on these very images" in fitted["pictures"]
    report["abstain"] = abstain | {"threshold": None, "coverage": None, "accuracy": None}
    assert (
        "No threshold reached the accuracy asked for on these images"
        in _read(_write(tmp_path, report, p, run))["pictures"]
    )
    report["calibration"] = None
    assert "No temperature was applied" in _read(_write(tmp_path, report, p))["calibration"]


def test_hostile_text_stays_text(tmp_path):
    p = _predictions(HOSTILE)
    alarms = [dict(ALARMS[0], text=HOSTILE[0], name=HOSTILE[2], figures={HOSTILE[3]: HOSTILE[0]})]
    run = {"name": HOSTILE[2], "config": {"a": "</pre><script>alert(3)</script>"}}
    path = _write(tmp_path, _report(p, alarms=alarms), p, run, title=HOSTILE[3])
    read = _Text(path.read_text(encoding="utf-8"))
    assert "script" not in read.tags and read.tags.count("img") == 6
    for name in HOSTILE[:6]:
        assert name in read.sections["classes"]
    assert read.tags.count("title") == 1


def test_page_is_light_and_alone(tmp_path):
    p = _predictions(n=4233)
    run = {"config": json.loads(json.dumps({f"key{i}": "value" for i in range(200)}))}
    path = _write(tmp_path, _report(p, resamples=2, alarms=ALARMS), p, run)
    text = path.read_text()
    assert path.stat().st_size < 250_000
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", text)


def test_template_with_a_name_missing_fails():
    with pytest.raises(Exception, match="'title' is undefined"):
        render("base.html.j2")
    assert "&lt;b&gt;" in render("base.html.j2", title="<b>")


@pytest.mark.usefixtures("no_pictures")
def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "eval").write_text("a file, not a folder")
    p = _predictions(n=20)
    with pytest.raises(UserError, match="report.html"):
        _write(tmp_path, _report(p, resamples=0), p)


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize(
    "names",
    [pytest.param(NAMES, id="plain", marks=pytest.mark.slow), pytest.param(HOSTILE, id="hostile")],
)
def test_chromium_shows_it(tmp_path, browser, names):
    p = _predictions(names)
    alarms = [*ALARMS, dict(ALARMS[0], text=HOSTILE[0] + "w" * 200, name=HOSTILE[2])]
    run = {"config": {"a": "</pre><script>alert(3)</script>" + "w" * 300}}
    path = _write(tmp_path, _report(p, alarms=alarms), p, run)
    for width in (360, 1280):
        with visit(browser, path, width, 740) as seen:
            assert (seen.errors, seen.requests) == ([], [])
            assert seen.overflow <= 0
            assert len(seen.pictures) == 6
            assert all(image["width"] > 100 and image["alt"] for image in seen.pictures)
            lead = seen.page.locator("#verdict .lead").bounding_box()
            assert lead["y"] + lead["height"] < 740 or names is HOSTILE
            # Opened up, too.
            seen.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert seen.overflow <= 0
            tables = seen.page.locator(".scroll")
            for i in range(tables.count()):
                box = tables.nth(i).bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width
            if width == 1280:
                pdf = seen.page.pdf(format="A4")
                assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_chromium_refuses_what_the_page_may_not_do(tmp_path, browser):
    """The helper sees a fault, and the content policy stops a script that got in."""
    page = render("base.html.j2", title="t").replace(
        "<main>",
        "<main><script>document.title = 'ran'</script><img src='https://example.org/a.png' alt=''>"
        "<p style='width: 2000px'>wide</p>",
    )
    path = tmp_path / "bad.html"
    path.write_text(page)
    with visit(browser, path, 360) as seen:
        assert seen.page.title() == "t"
        assert len(seen.errors) >= 2
        assert seen.overflow > 300
        assert [image["width"] for image in seen.pictures] == [0]


@pytest.mark.usefixtures("no_pictures")
def test_the_matrix_s_table_has_true_rows(tmp_path):
    p = _predictions()
    text = _read(_write(tmp_path, _report(p), p))["pictures"]
    for i, name in enumerate(NAMES):
        row = np.bincount(p.predicted[p.labels == i], minlength=4)
        assert f"{name} {' '.join(map(str, row))}" in text


@pytest.mark.usefixtures("no_pictures")
def test_every_class_has_its_own_interval(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    p = _predictions()
    text = _read(_write(tmp_path, _report(p), p))["classes"]
    for k, name in enumerate(NAMES):
        right = (p.predicted == k)[p.labels == k]
        hits, of = int(right.sum()), len(right)
        low, high = stats.binomtest(hits, of).proportion_ci(method="wilson")
        ends = f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}"
        assert f"{name} {of} {100 * hits / of:.1f} % ({ends})" in text


def test_captions_stand_under_their_pictures(tmp_path, monkeypatch):
    said = {
        "confusion": "Confusion matrix",
        "reliability": "Reliability",
        "roc": "ROC",
        "precision_recall": "Precision and recall",
        "risk_coverage": "Risk and coverage",
        "decision": "Decision curves",
    }
    made = {name: Markup("<img alt='{}'>").format(name) for name in said}
    monkeypatch.setattr(pictures, "evaluation_pictures", lambda report, predictions: made)
    p = _predictions()
    text = _write(tmp_path, _report(p), p).read_text()
    found = re.findall(r"<figure><img alt='(\w+)'>\s*<figcaption><b>([^<]*)\.</b>", text)
    assert dict(found) == said


def test_averages_stand_under_their_kind():
    report = _report(_predictions())
    report["macro"]["recall"], report["weighted"]["recall"] = 0.111, 0.999
    table = _average_table(report)
    rows = (dict(zip(table["head"], row, strict=True)) for row in table["rows"])
    row = next(row for row in rows if row["Average"] == "Sensitivity")
    assert ">11.1\N{NO-BREAK SPACE}%<" in row["Unweighted"]
    assert ">99.9\N{NO-BREAK SPACE}%<" in row["By images"]
