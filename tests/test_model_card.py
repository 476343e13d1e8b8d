import copy
import functools
import json
import re
import shutil
from html.parser import HTMLParser

import forked
import numpy as np
import pytest
from report.browser import chromium, visit
from scipy.stats import norm

from covid_flax.data.splits import Row, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.assess import assess
from covid_flax.evaluation.metrics import classification_report
from covid_flax.evaluation.predictions import Predictions, predictions_csv
from covid_flax.model_card import card, markdown, read_facts, write_card
from covid_flax.report.artefacts import read_artefacts
from covid_flax.report.checklists import CLAIM, TRIPOD_AI
from covid_flax.report.statements import statements

NAMES = ["COVID", "Normal"]
CONFIG = {
    "config": {
        "seed": 5,
        "data": {
            "dir": "xrays",
            "split": "grouped",
            "val_fraction": 0.125,
            "test_fraction": 0.375,
            "image_size": 96,
            "interpolation": "bicubic",
        },
        "model": {
            "name": "resnet50",
            "hidden_units": 321,
            "dropout": 0.25,
            "trainable": "conv4",
            "batch_norm": "train",
            "dtype": "float32",
        },
        "optimizer": {"learning_rate": 0.0123, "schedule": "cosine", "weight_decay": 0.0007},
        "train": {
            "epochs": 77,
            "batch_size": 13,
            "patience": 6,
            "monitor": "val_accuracy",
            "min_delta": 0.0,
            "class_weights": "balanced",
            "label_smoothing": 0.03,
            "ema_decay": 0.0,
            "swa_start": 0,
        },
        "augment": {"flip": False, "shift": 0.0375},
    },
    "class_names": NAMES,
    "seed": 5,
    "preprocessing": "torch",
    "data": {"root": "/data/xrays", "fingerprint": "f1f2f3"},
    "weights": {"source": "net.npz", "sha256": "a1b2c3", "report": "loaded 320 arrays"},
    "versions": {"covid_flax": "0.1.0", "jax": "0.9.9"},
    "devices": ["TPU v5e"],
}


@functools.cache
def make_report(split, seed, n, names):
    """report.json as evaluate writes it, of random answers."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    p = rng.beta(2, 2, n)
    p = np.where(labels == 1, np.maximum(p, rng.random(n)), np.minimum(p, rng.random(n)))
    files = tuple(f"{names[k]}/{i}.png" for i, k in enumerate(labels))
    predictions = Predictions(names, files, labels, np.stack([1 - p, p], 1))
    calibration = {
        "split": "val",
        "temperature": 1.375,
        "abstain": {"target_accuracy": 0.99, "threshold": 0.625},
    }
    report, _ = assess(predictions, split=split, stopped_on="val", calibration=calibration)
    report["checkpoint"] = {"which": "best", "step": 4321}
    report["data_dir"] = "/data/xrays"
    return report


def write_run(folder, *, names=NAMES, leak=False):
    """A run's folder with every file that a card reads."""
    config = copy.deepcopy(CONFIG) | {"class_names": list(names)}
    rows = []
    for split, groups in (("train", range(10)), ("val", range(10, 13)), ("test", range(13, 20))):
        rows += [Row(f"{k}/{g}.png", names[k], split, f"g{g}") for g in groups for k in (0, 1)]
    if leak:
        rows.append(Row("0/x.png", names[0], "test", "g0"))
    epochs = [(1, 0.6), (2, 0.8), (3, 0.7)]
    names = tuple(names)
    val, test = make_report("val", 0, 80, names), make_report("test", 1, 80, names)
    alarm = {"name": "stopping-split-scored", "level": "alarm", "text": "The val images chose."}
    external = make_report("all", 2, 60, names) | {"data_dir": "/data/elsewhere"}
    conditions = [
        {
            "title": "border only",
            "num_examples": 42,
            "accuracy": 0.712,
            "accuracy_interval": [0.613, 0.813],
        }
    ]
    files = {
        "config.json": config,
        "calibration.json": {
            "4321": {"split": "val", "temperature": 1.375, "ece": {"before": 0.111, "after": 0.055}}
        },
        "eval/val/report.json": val | {"alarms": [alarm]},
        "eval/test/report.json": test,
        "eval/elsewhere/report.json": external,
        "controls/test/controls.json": {"conditions": conditions, "text": ["The border tells."]},
        "baselines/svm/eval/test/report.json": make_report("test", 7, 80, names),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "checkpoints").mkdir()
    write_split_csv(folder / "split.csv", rows)
    lines = [{"step": e, "epoch": e, "split": "val", "accuracy": a, "loss": 1.0} for e, a in epochs]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def text_of(folder, facts=None):
    """The card as one plain text, without the escapes of Markdown."""
    return re.sub(r"\\(.)", r"\1", markdown("card", card(read_artefacts(folder), facts)))


def test_what_the_card_says_is_in_the_files(tmp_path):
    folder = write_run(tmp_path / "run")
    text = text_of(folder)
    report = json.loads((folder / "eval/test/report.json").read_text())

    def share(x, interval):
        low, high = (f"{100 * end:.1f}" for end in interval)
        return f"{100 * x:.1f}\N{NO-BREAK SPACE}% ({low} to {high})"

    boot, wilson = report["intervals"]["bootstrap"], report["intervals"]["wilson"]["per_class"]
    expected = [
        share(report["accuracy"], boot["accuracy"]),
        share(report["balanced_accuracy"], boot["balanced_accuracy"]),
        *(share(report["per_class"][n][k], wilson[n][k]) for n in NAMES for k in ("recall", "npv")),
        "The epoch with the best val_accuracy: 2 of 3 trained (at most 77).",
        "Resized to 96 x 96 pixels (bicubic); pixel values scaled as 'torch'.",
        "learning rate 0.0123; schedule cosine; batches of 13; at most 77 epochs; patience 6",
        "label smoothing 0.03; weight decay 0.0007; augmentation: shift 0.0375; on TPU v5e",
        "head with 321 hidden units; dropout 0.25; batch norm of trained stages by batch stat",
        "net.npz; SHA-256 a1b2c3; loaded 320 arrays; seed 5",
        "The folder /data/xrays, fingerprint f1f2f3.",
        "Rule 'grouped', seed 5, val share 0.125, test share 0.375.",
        "train 20 (COVID 10, Normal 10); val 6 (COVID 3, Normal 3); test 14 (COVID 7, Normal 7)",
        "20 groups, none is in two splits",
        "temperature 1.375 fitted on val (calibration error 0.111 before, 0.055 after)",
        "abstain threshold of 0.625",
        f"elsewhere: 60 images of /data/elsewhere, accuracy {share(*_whole(folder, 'elsewhere'))}",
        "border only 71.2\N{NO-BREAK SPACE}% (61.3 to 81.3)",
        "Shortcut controls (test): The border tells.",
        "| svm, test (baseline) | 80 |",
        "Alarm of val: The val images chose.",
    ]
    for said in expected:
        assert said in text, said
    matrix = report["confusion_matrix"]
    assert f"| COVID | {matrix[0][0]} | {matrix[0][1]} |" in text
    assert "No evaluation on images of another folder" not in text


def _whole(folder, name):
    report = json.loads((folder / f"eval/{name}/report.json").read_text())
    return report["accuracy"], report["intervals"]["bootstrap"]["accuracy"]


@pytest.mark.parametrize(
    ("file", "path", "value", "said"),
    [
        ("config.json", ("config", "train", "epochs"), 78, "(at most 78)"),
        ("config.json", ("config", "train", "class_weights"), "none", "No class weights."),
        ("config.json", ("config", "train", "ema_decay"), 0.875, "moving averages (decay 0.875)"),
        ("config.json", ("config", "train", "swa_start"), 3, "means over all steps after epoch 3"),
        ("config.json", ("config", "train", "start_share"), 0.375, "0.375 of each weight is what"),
        ("config.json", ("weights", "sha256"), "d4d4", "SHA-256 d4d4"),
        ("config.json", ("weights", "run"), "/runs/a", "the best epoch of the run /runs/a, step"),
        ("config.json", ("config", "model", "weights"), "none", "Random; seed 5."),
        ("config.json", ("data", "root"), "/other", "The folder /other"),
        ("calibration.json", ("4321", "temperature"), 2.625, "temperature 2.625"),
        ("eval/test/report.json", ("accuracy",), 0.1234, "accuracy 12.3\N{NO-BREAK SPACE}%"),
        ("eval/test/report.json", ("checkpoint", "step"), 9876, "best checkpoint, step 9,876"),
        ("eval/val/report.json", ("note",), "Only val.", "\nOnly val.\n"),
        ("controls/test/controls.json", ("conditions", 0, "accuracy"), 0.3141, "border only 31.4"),
        ("controls/test/controls.json", ("text",), ["Now that."], "(test): Now that."),
        ("baselines/svm/eval/test/report.json", ("num_examples",), 91, "(baseline) | 91 |"),
    ],
)
def test_another_value_in_a_file_is_another_on_the_card(tmp_path, file, path, value, said):
    folder = write_run(tmp_path / "run")
    assert said not in text_of(folder)
    content = json.loads((folder / file).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / file).write_text(json.dumps(content))
    assert said in text_of(folder)


def test_teachers_views_and_the_splits_own_seed_are_told(tmp_path):
    folder = write_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["data"]["split_seed"] = 3
    saved["config"]["train"] |= {"teacher": "/runs/best", "teacher_weight": 0.7}
    saved["config"]["eval"] = {"mirror": True, "aspect": 0.1, "bn_own_share": 0.3}
    change(folder / "config.json", config=saved["config"])
    text = text_of(folder)
    assert "Rule 'grouped', seed 3, val share" in text
    assert "the answers of /runs/best; their share of the loss 0.7;" in text
    assert "as it is and as its mirror image and other proportions (height times" in text
    assert "; 0.3 of the moments that batch norm takes are the image's own." in text
    change(folder / "config.json", members=["seed5", "seed6"])
    assert "The mean of the probabilities of 2 runs with other seeds;" in text_of(folder)


def test_a_leak_of_groups_is_told(tmp_path):
    folder = write_run(tmp_path / "run", leak=True)
    change(folder / "eval/test/report.json", alarms=None)  # as reports were before they had any
    text = text_of(folder)
    assert "20 groups, 1 is in more than one split" in text
    said = "By split.csv 1 of 20 groups (patients, near-duplicates) is in more than one split"
    assert said in section(text, "Limits")
    (folder / "split.csv").unlink()
    assert "By split.csv" not in text_of(folder)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def item(text, name):
    """What is known of an item of a guideline, and its status."""
    return next(re.finditer(rf"^\| {re.escape(name)} \| (.*) \| ([^|]+) \|$", text, re.M)).groups()


def test_a_split_scored_in_another_folder_is_called_neither_the_same_nor_external(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "eval/elsewhere").rename(tmp_path / "away")
    change(folder / "eval/test/report.json", data_dir="/data/darkened")
    text = text_of(folder)
    both = "scored in the folder /data/darkened, trained in the folder /data/xrays"
    assert both in section(text, "Summary") and both in section(text, "Limits")
    assert "val: images of the same folder as the training images; test:" in text
    assert item(text, "33 Testing on external data") == ("not known", "not known")
    assert item(text, "32 Evaluation on internal data")[1] == "partly"
    assert "No evaluation on images of another folder is" not in text
    role = "neither trained this run nor chose its epoch, if the folder holds the images of the run"
    assert f"| {role} |" in text


def test_what_another_folder_shows_is_said_of_that_folder(tmp_path):
    """Its sources, and controls on its images."""
    folder = write_run(tmp_path / "run")
    alarm = {"name": "source-confounded", "level": "caution", "text": "Class goes with theirs."}
    small = {"name": "small-class", "level": "caution"}
    change(
        folder / "eval/elsewhere/report.json",
        alarms=[alarm, small | {"text": "Few: 12."}],
        alarms_checked=["source-confounded"],
    )
    for name in ("val", "test"):
        change(folder / f"eval/{name}/report.json", alarms=[small | {"text": f"Few of {name}."}])
        change(folder / f"eval/{name}/report.json", alarms_checked=["small-class"])
    change(folder / "controls/test/controls.json", data_dir="/data/elsewhere")
    text = text_of(folder)
    assert "Class goes" not in section(text, "Training and evaluation data")
    limits = section(text, "Limits")
    assert "Caution of elsewhere: Class goes with theirs." in limits
    assert "gives its class away was not checked" in limits
    for name, said in (("elsewhere", "Few: 12."), ("val", "Few of val."), ("test", "Few of test.")):
        assert f"Caution of {name}: {said}" in limits
    assert "Shortcut controls (test, images of /data/elsewhere):" in limits


def test_a_link_to_the_training_images_is_the_same_folder(tmp_path):
    folder, own, link = write_run(tmp_path / "run"), tmp_path / "own", tmp_path / "link"
    own.mkdir()
    link.symlink_to(own)
    change(folder / "config.json", data={"root": str(own)})
    for name in ("val", "test", "elsewhere"):
        change(folder / f"eval/{name}/report.json", data_dir=str(link))
    text = text_of(folder)
    assert item(text, "33 Testing on external data") == ("not known", "not known")
    none = "No evaluation on images of another folder without the run's is among"
    assert none in section(text, "Limits")
    assert "elsewhere, test, val: images of the same folder" in text
    assert "scored in the folder" not in text


@pytest.mark.parametrize("name", ["duplicate-leak", "training-images-scored"])
def test_a_copy_of_the_training_images_is_no_external_test(tmp_path, name):
    folder = write_run(tmp_path / "run")
    alarm = {"name": name, "level": "alarm", "text": "60 identical files."}
    change(folder / "eval/elsewhere/report.json", alarms=[alarm])
    text = text_of(folder)
    assert item(text, "33 Testing on external data") == ("not known", "not known")
    none = "No evaluation on images of another folder without the run's is among"
    assert none in section(text, "Limits")
    assert "elsewhere: another folder, but with images of the run" in section(text, "Limits")


def test_another_folder_with_the_names_of_the_training_images_is_doubted(tmp_path):
    folder = write_run(tmp_path / "run")
    train = [f"there/{k}/{g}.png" for g in range(10) for k in (0, 1)]

    def status(files):
        n = len(files)
        predictions = Predictions(tuple(NAMES), tuple(files), np.zeros(n, int), np.eye(2)[[0] * n])
        (folder / "eval/elsewhere/predictions.csv").write_bytes(predictions_csv(predictions))
        text = text_of(folder)
        return item(text, "33 Testing on external data")[1], "may be copies" in text

    assert status([f"x{i}.png" for i in range(20)] + train[:4]) == ("reported", False)
    assert status(["other.png", *train]) == ("partly", True)


def test_an_interval_without_width_is_wilsons_or_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    labels = np.arange(80) % 2
    report = classification_report(labels, np.eye(2)[labels] * 0.8 + 0.1, tuple(NAMES), loss=0.5)
    (folder / "eval/test/report.json").write_text(json.dumps(report))
    assert report["intervals"]["bootstrap"]["accuracy"] == [1, 1]
    text = text_of(folder).replace("\N{NO-BREAK SPACE}", " ")
    z2 = norm.ppf(0.975) ** 2
    assert f"accuracy 100.0 % ({100 * 80 / (80 + z2):.1f} to 100.0)" in text
    assert "balanced accuracy 100.0 %." in text
    assert "(100.0 to 100.0)" not in text and "(1.000 to 1.000)" not in text


def test_scaled_figures_are_marked_and_the_bias_of_the_calibration_errors_interval_told(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "temperature applied" not in text_of(folder)
    assert "The interval of the calibration error (ECE) lies high" in text_of(folder)
    path = folder / "eval/test/report.json"
    change(path, calibration=json.loads(path.read_text())["calibration"] | {"applied": True})
    text = section(text_of(folder), "Summary")
    assert "| test (temperature applied) | 80 |" in text and "| val | 80 |" in text
    assert "Rows marked 'temperature applied'" in text


OPTIONAL = {
    "split.csv": ("disjoint", "counts"),
    "metrics.jsonl": ("selection",),
    "calibration.json": (),
    "eval/val": (),
    "eval/test": (),
    "eval/elsewhere": ("external",),
    "controls": ("robustness",),
    "baselines": (),
    "checkpoints": ("specification",),
}


@pytest.mark.parametrize("missing", OPTIONAL)
def test_a_file_that_is_missing_makes_things_not_known(tmp_path, missing):
    folder = write_run(tmp_path / "run")
    (folder / missing).rename(tmp_path / "away")
    known = statements(read_artefacts(folder))
    assert [key for key in OPTIONAL[missing] if known[key] is not None] == []
    assert len(text_of(folder)) > 1000


def test_a_run_of_nothing_but_an_empty_config_claims_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    a = read_artefacts(tmp_path)
    known = statements(a)
    assert {key for key, said in known.items() if said is not None} == {"limits"}
    sections = card(a)
    counts = {row[0]: row[1:] for row in sections[-1].tables[0].rows}
    assert counts == {
        "CLAIM 2024": ["44", "0", "1", "0", "43"],
        "TRIPOD+AI": ["52", "0", "1", "0", "51"],
    }
    assert "nothing is known of how well it does" in " ".join(known["limits"].split())


def test_only_val_is_called_optimistic_and_a_part(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("test", "elsewhere"):
        (folder / "eval" / name).rename(tmp_path / name)
    text = text_of(folder)
    assert "own images only some that chose the epoch or setting were scored (val)" in text
    assert "No evaluation on images of another folder" in text
    assert re.search(r"\| 32 Evaluation on internal data \| .* \| partly \|", text)


def test_a_figure_without_an_interval_is_a_part(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "eval/test/report.json"
    labels = np.array([0, 1, 1, 0])
    old = classification_report(labels, np.eye(2)[[0, 1, 0, 0]], NAMES, loss=0.5, resamples=0)
    old = {k: old[k] for k in ("num_examples", "class_names", "accuracy", "confusion_matrix")} | {
        "balanced_accuracy": 0.75,
        "per_class": {
            n: {k: old["per_class"][n][k] for k in ("precision", "recall", "f1", "support")}
            for n in NAMES
        },
    }
    path.write_text(json.dumps(old))  # as reports were before they had intervals
    text = text_of(folder)
    assert re.search(r"\| 37 .* accuracy 75\.0.%, balanced accuracy 75\.0.%\. \| partly \|", text)
    assert re.search(r"\| 29 [^|]* \| not known \| not known \|", text)


def test_the_lists_are_whole_and_only_what_no_file_tells_is_never_known():
    assert [i.number for i in CLAIM] == [str(n) for n in range(1, 45)]
    parts = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg"}
    parts |= {18: "abcdef", 20: "abc", 23: "ab", 27: "abc"}
    expected = [f"{n}{p}" for n in range(1, 28) for p in parts.get(n, [""])]
    assert [i.number for i in TRIPOD_AI] == expected and len(expected) == 52
    never = {i.number for i in CLAIM if not i.statement}
    # Use, aims, patients, acquisition, reference standard, annotators, trial, protocol, funding.
    assert {"3", "4", "5", "8", "11", "13", "14", "16", "18", "34", "36", "42", "44"} <= never
    never = {i.number for i in TRIPOD_AI if not i.statement}
    assert {"3b", "6b", "8b", "14", "17", "18a", "18b", "19", "20b"} <= never


def test_what_authors_state_is_marked_as_theirs(tmp_path):
    folder = write_run(tmp_path / "run")
    facts = tmp_path / "facts.toml"
    stated = '[claim]\n13 = "Portable units."\n23 = "On Linux."\n[tripod]\n17 = "Waived."'
    facts.write_text(stated)
    text = text_of(folder, read_facts(facts))
    assert "| The authors: Portable units. | stated by the authors |" in text
    assert "| covid_flax 0.1.0, jax 0.9.9. The authors: On Linux. | reported |" in text
    # The lines of the card itself say no other.
    assert re.search(r"Devices and acquisition.{0,6} not known", text_of(folder))
    assert re.search(r"Devices and acquisition.{0,6} The authors: Portable units\.", text)
    assert re.search(r"Ethical approval and consent.{0,6} The authors: Waived\.", text)
    assert re.search(r"How labels were established.{0,6} not known", text)
    tables = card(read_artefacts(folder), read_facts(facts))[-1].tables[0].rows
    assert [row[4] for row in tables] == ["1", "1"]
    for bad in ('[claim]\n45 = "x"', "[claim]\n13 = 4", "[clam]\n1 = 'x'", "[claim"):
        facts.write_text(bad)
        with pytest.raises(UserError, match="--facts="):
            read_facts(facts)


def test_a_damaged_file_is_named_in_a_line(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("config.json", "calibration.json", "eval/val/report.json"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            read_artefacts(folder)
        (folder / name).write_text(whole)
    (folder / "eval/strange").mkdir()
    (folder / "eval/strange/report.json").write_text("{}")
    with pytest.raises(UserError, match="strange/report.json is damaged"):
        read_artefacts(folder)
    with pytest.raises(UserError, match="holds no run"):
        read_artefacts(tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("eval/test/report.json", {"per_class": {}}, "per_class.COVID is missing"),
        ("eval/test/report.json", {"per_class": {"COVID": 1}}, "per_class.COVID is no object"),
        ("eval/test/report.json", {"alarms": 5}, "alarms is no list"),
        ("eval/test/report.json", {"alarms": [{"name": "a"}]}, r"alarms\[0\].level is missing"),
        ("eval/test/report.json", {"accuracy": "high"}, "accuracy is 'high'"),
        ("eval/test/report.json", {"accuracy": None}, "accuracy is missing"),
        ("eval/test/report.json", {"confusion_matrix": [[1]]}, "does not fit class_names"),
        ("eval/test/report.json", {"intervals": {"level": 0.95, "bootstrap": {"ece": 1}}}, "ece"),
        ("eval/test/report.json", {"calibration": {"ece": {}}}, "ece.before is missing"),
        ("eval/test/report.json", {"checkpoint": 7}, "checkpoint is no object"),
        ("baselines/svm/eval/test/report.json", {"per_class": {}}, "per_class.COVID is missing"),
        ("controls/test/controls.json", {"conditions": [1]}, r"conditions\[0\] is no object"),
        ("controls/test/controls.json", {"text": [4]}, "text"),
        ("calibration.json", {"4321": 2}, "4321 is no object"),
        ("calibration.json", {"4321": {"temperature": "x"}}, "4321.temperature is 'x'"),
        ("config.json", {"config": 5}, "config is no object"),
        ("config.json", {"config": {"data": 5}}, "config.data is no object"),
        ("config.json", {"class_names": "COVID"}, "class_names is no list"),
    ],
)
def test_a_value_that_cannot_be_is_named_in_a_line(tmp_path, file, values, named):
    folder = write_run(tmp_path / "run")
    change(folder / file, **values)
    with pytest.raises(UserError, match=rf"{file} is damaged \(.*{named}.*\): remove it, or"):
        read_artefacts(folder)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


EVIL = ["<script>alert(1)</script>", "a|b *c* [d](http://e) `f` \\_ # &amp;\n- g"]


def test_hostile_class_names_stay_text(tmp_path):
    folder = write_run(tmp_path / "run", names=EVIL)
    write_card(tmp_path / "out", read_artefacts(folder))
    page = _Page()
    page.feed((tmp_path / "out/model_card.html").read_text())
    assert not {"script", "a"} & set(page.tags)
    assert any(EVIL[0] in text for text in page.text)

    text = (tmp_path / "out/model_card.md").read_text()
    markdown_it = pytest.importorskip("markdown_it")
    page = _Page()
    page.feed(markdown_it.MarkdownIt("commonmark").enable("table").render(text))
    assert not {"script", "a", "em", "code"} & set(page.tags)
    assert any(text.strip() == EVIL[0] for text in page.text)
    shown = EVIL[1].replace("\n", " ")
    assert any(text.strip() == shown for text in page.text)
    assert page.tags.count("table") == text.count("| --- |\n")


def test_paragraphs_that_begin_like_lists_are_paragraphs():
    markdown_it = pytest.importorskip("markdown_it")
    from covid_flax.model_card import Section

    said = ["1. one", "- two", "+ three", "# four", "> five", "=== six", "2) seven", "1.5 eight"]
    page = _Page()
    rendered = markdown("t", [Section("s", paragraphs=said)])
    page.feed(markdown_it.MarkdownIt("commonmark").render(rendered))
    assert set(page.tags) == {"h1", "h2", "p"}
    assert [text for text in page.text if text.strip()][2:] == said


def test_chromium_shows_the_page(tmp_path):
    write_card(tmp_path, read_artefacts(write_run(tmp_path / "run")))
    with chromium() as browser:
        for width in (360, 1280):
            with visit(browser, tmp_path / "model_card.html", width) as seen:
                assert seen.errors == [] and seen.requests == []
                assert seen.overflow <= 0
                assert "not known" in seen.page.inner_text("body")


def test_the_command_writes_both_files_and_says_where(tmp_path):
    folder = write_run(tmp_path / "run")
    where = (f"--workdir={folder}", f"--output={tmp_path}/my.md")
    done = forked.command("covid_flax.model_card", *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my.md").exists() and (tmp_path / "my.html").exists()
    assert re.search(r"CLAIM 2024: of 44 items \d+ reported", done.stdout)
    assert not (folder / "model_card.md").exists()


@pytest.mark.parametrize("name", ["README.md", "README.html"])
def test_a_card_replaces_cards_alone(tmp_path, name):
    artefacts = read_artefacts(write_run(tmp_path / "run"))
    (tmp_path / name).write_text("# My project\n")
    with pytest.raises(UserError, match=f"{name} is no card and would be lost"):
        write_card(tmp_path / "README.md", artefacts)
    assert (tmp_path / name).read_text() == "# My project\n"
    for _ in range(2):
        write_card(tmp_path / "card.md", artefacts)


def test_wrong_answers_name_the_true_class_first(tmp_path):
    folder = write_run(tmp_path / "run")
    change(folder / "eval/test/report.json", confusion_matrix=[[30, 10], [3, 37]])
    assert statements(read_artefacts(folder))["failures"] == (
        "test, most often: COVID answered as Normal 10 of 40; Normal answered as COVID 3 of 40."
    )


def test_the_best_epoch_by_loss_has_the_least(tmp_path):
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())["config"]
    config["train"]["monitor"] = "val_loss"
    change(folder / "config.json", config=config)
    losses = {1: 0.9, 2: 0.7, 3: 0.8}
    lines = [
        {"step": e, "epoch": e, "split": "val", "loss": x, "accuracy": 0.5}
        for e, x in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "best val_loss: 2 of 3 trained" in text_of(folder)


def test_a_split_that_a_csv_told_is_named_by_it(tmp_path):
    folder = write_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["data"] |= {"split": "file", "split_file": "theirs/split.csv"}
    (folder / "config.json").write_text(json.dumps(saved))
    said = statements(read_artefacts(folder))["partition"]
    assert said.startswith("As theirs/split.csv tells it. Images used: train ")


def test_what_else_the_training_was_like_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["optimizer"] |= {"stage_decay": 0.75, "clip_norm": 1.0, "warmup_epochs": 0.5}
    saved["config"]["train"]["patience"] = 0
    (folder / "config.json").write_text(json.dumps(saved))
    said = statements(read_artefacts(folder))["training"]
    for words in (
        "stage after it 0.75",
        "norm at most 1.0",
        "warm-up, epochs 0.5",
        "no early stop",
    ):
        assert words in said


def test_what_was_left_out_of_an_external_folder_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    shutil.copytree(folder / "eval/test", folder / "eval/other", dirs_exist_ok=True)
    change(
        folder / "eval/other/report.json",
        split="all",
        data_dir="/elsewhere",
        class_map={"portable": "-", "pneumonia": "COVID"},
        bad_images={"a.png": "is no image"},
        not_images={".dcm": 3},
        alarms=[],
    )
    said = statements(read_artefacts(folder))["external"]
    assert (
        "(portable left out, pneumonia as COVID, 1 unreadable image left out, "
        "3 files in class folders no images)"
    ) in said


def test_images_that_stopped_nothing_chose_nothing(tmp_path):
    """Those of val, where the last epoch is scored and no patience ended the training."""
    folder = write_run(tmp_path / "run")
    shutil.copytree(folder / "eval/test", folder / "eval/val", dirs_exist_ok=True)
    roles = {None: "neither trained this run nor", "val": "chose the epoch or setting"}
    for stopped_on, said in roles.items():
        change(folder / "eval/val/report.json", split="val", stopped_on=stopped_on)
        rows = [line for line in text_of(folder).splitlines() if line.startswith("| val | 80 |")]
        assert rows and all(said in row for row in rows)


def test_corruptions_and_warnings_of_controls_are_told(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "robustness" / "test").mkdir(parents=True)
    found = {"plain": {"accuracy": 0.9}, "mean_drop": 0.123, "corruptions": [{"name": "blur"}] * 12}
    (folder / "robustness" / "test" / "robustness.json").write_text(json.dumps(found))
    (folder / "controls" / "val").mkdir(parents=True, exist_ok=True)
    mind = {"conditions": [], "text": [], "warning": "these images chose the epoch"}
    (folder / "controls" / "val" / "controls.json").write_text(json.dumps(mind))
    text = text_of(folder)
    assert "90.0% of the images plain are right, 12.3 points fewer on average over 12 kinds" in text
    assert "Shortcut controls (val): Mind: these images chose the epoch." in text


def test_the_card_s_sentences_hold_the_right_figure(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "eval/test/report.json"
    abstain = {"threshold": 0.625, "coverage": 0.75, "accuracy": 0.9, "accuracy_interval": None}
    change(path, abstain=abstain)
    said, of = (
        statements(read_artefacts(folder)),
        json.loads(path.read_text())["per_class"]["COVID"],
    )
    s = "\N{NO-BREAK SPACE}"
    assert f"75.0{s}% of the test images are answered, 90.0{s}% of them rightly" in said["output"]
    assert of["recall"] != of["specificity"]
    covid = said["diagnostic"].split(";")[0]
    assert f"COVID: sensitivity {100 * of['recall']:.1f}" in covid
    assert f"specificity {100 * of['specificity']:.1f}" in covid
    change(path, abstain=abstain | {"coverage": 0.0, "accuracy": None})
    assert (
        f" 0.0{s}% of the test images are answered." in statements(read_artefacts(folder))["output"]
    )


def test_whether_the_temperature_was_applied_and_what_it_did(tmp_path):
    folder = write_run(tmp_path / "run")
    found = {"temperature": 1.375, "ece": {"before": 0.321, "after": 0.123}}
    for applied, word in ((True, "applied"), (False, "not applied")):
        change(folder / "eval/test/report.json", calibration=found | {"applied": applied})
        said = statements(read_artefacts(folder))["recalibration"]
        assert (
            f"; {word} to the figures of test, where the error is 0.321 without and 0.123 with it"
        ) in said


def test_the_card_s_tables_have_each_figure_under_its_head(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "eval/test/report.json"
    report = json.loads(path.read_text())
    report |= {"balanced_accuracy": 0.333, "ece": 0.055, "accuracy": 0.444}
    report["macro"]["auroc"] = 0.777
    figures = {"recall": 0.11, "specificity": 0.22, "precision": 0.33, "npv": 0.44}
    report["per_class"]["COVID"] |= figures
    path.write_text(json.dumps(report))
    sections = {s.title: s for s in card(read_artefacts(folder))}
    table = sections["Summary"].tables[0]
    row = dict(zip(table.head, next(r for r in table.rows if r[0] == "test"), strict=True))
    for head, x in (("Accuracy", "44.4"), ("Balanced accuracy", "33.3"), ("AUROC", "0.777")):
        assert row[head].startswith(x), head
    assert row["ECE"].startswith("0.055")
    table = sections["Evaluation: test"].tables[0]
    row = dict(zip(table.head, table.rows[0], strict=True))
    for head, x in zip(
        ("Sensitivity", "Specificity", "PPV", "NPV"), ("11", "22", "33", "44"), strict=True
    ):
        assert row[head].startswith(f"{x}.0"), head
