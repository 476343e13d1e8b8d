"""Judge: scikit-learn on the predictions that the binary wrote, and the folders themselves."""

import csv
import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from covid_flax import evaluate as evaluate_command
from covid_flax import run_images, trained_run
from covid_flax.data.splits import read_split_csv
from covid_flax.early_stopping import EarlyStopping
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate, parse_prevalence
from covid_flax.evaluation.metrics import check_prevalence
from covid_flax.run import setup
from covid_flax.run_folder import saved_run
from covid_flax.run_images import open_data, parse_class_map, say_what_is_replaced, what_they_chose
from covid_flax.train import train
from covid_flax.trained_run import open_run

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


@pytest.fixture(scope="module")
def trained(make_tiny_config, tmp_path_factory):
    """A run of one epoch with a three-way split."""
    c = make_tiny_config()
    c.data.split = "grouped"
    c.data.test_fraction = 0.25
    c.train.epochs, c.train.batch_size = 1, 20
    c.eval.batch_size = 12  # divides nothing
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(setup(c, workdir))
    return workdir


def _predictions(folder):
    with open(folder / "predictions.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("split", ["test", "all"])
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
    assert (folder / "confusion_matrix.png").exists()


def test_validation_is_called_optimistic_and_test_is_not(trained, tmp_path):
    report = evaluate(trained, split="val", output=tmp_path / "v")
    assert "optimistic" in report["note"]
    assert "stopping-split-scored" in [alarm["name"] for alarm in report["alarms"]]
    report = evaluate(trained, split="test", output=tmp_path / "t")
    assert "note" not in report
    assert not {"stopping-split-scored", "training-images-scored", "scored-counts"} & {
        alarm["name"] for alarm in report["alarms"]
    }


def test_a_run_that_has_not_ended_says_so(trained, tmp_path, capsys):
    open_run(trained)
    assert "epochs" not in capsys.readouterr().out
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["train"]["epochs"] = 3
    (copy / "config.json").write_text(json.dumps(saved))
    open_run(copy)
    assert "has trained 1 of 3 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stopping, ended",
    [
        (EarlyStopping(patience=2, epoch=4, best=0.5, best_epoch=2, wait=2), True),
        (EarlyStopping(patience=2, epoch=4, best=0.5, best_epoch=3, wait=1), False),
        (EarlyStopping(patience=None, epoch=4, best=0.5, best_epoch=1, wait=3), False),
        (EarlyStopping(patience=None, epoch=9, best=0.5, best_epoch=1, wait=8), True),
    ],
)
def test_a_run_has_ended_that_trained_all_epochs_or_stopped_early(stopping, ended, capsys):
    checkpoints = SimpleNamespace(latest_loop={"early_stopping": stopping.state_dict()})
    trained_run._say_if_unfinished(Path("run"), checkpoints, 9)
    assert ("run has trained 4 of 9 epochs" not in capsys.readouterr().out) == ended


@pytest.mark.parametrize("error", [UserError("it is gone"), OSError("stale")])
def test_a_latest_checkpoint_that_cannot_be_read_is_no_reason_to_refuse_another(error, capsys):
    class Unreadable:
        @property
        def latest_loop(self):
            raise error

    trained_run._say_if_unfinished(Path("run"), Unreadable(), 9)
    assert capsys.readouterr().out == ""


def test_the_temperature_of_validation_is_applied_when_asked(trained, phantom_dir, tmp_path):
    """Also: at a stated prevalence, and the probabilities written are those reported."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "calibration.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="--split=val"):
        evaluate(copy, split="test", calibrated=True)
    val = evaluate(copy, split="val")
    (stored,) = json.loads((copy / "calibration.json").read_text()).values()
    assert stored["num_examples"] == val["num_examples"]
    prevalence = {"COVID": 0.01}
    plain = evaluate(copy, split="test", prevalence=prevalence)
    assert plain["calibration"]["temperature"] == stored["temperature"]
    assert not plain["calibration"]["applied"]
    before = np.array([[float(r[f"p_{n}"]) for n in plain["class_names"]] for r in _rows(copy)])
    scaled = evaluate(copy, split="test", calibrated=True)
    after = np.array([[float(r[f"p_{n}"]) for n in plain["class_names"]] for r in _rows(copy)])
    judge = before ** (1 / stored["temperature"])
    np.testing.assert_allclose(after, judge / judge.sum(1, keepdims=True), rtol=1e-9)
    assert scaled["calibration"]["applied"] and scaled["accuracy"] == plain["accuracy"]
    assert scaled["loss"] == pytest.approx(plain["calibration"]["nll"]["after"], rel=1e-9)
    figures = plain["per_class"]["COVID"]
    true, false = figures["recall"] * 0.01, (1 - figures["specificity"]) * 0.99
    if true + false:
        assert figures["ppv_at"] == pytest.approx(true / (true + false), abs=1e-12)
    assert plain["prevalence"]["COVID"] == 0.01
    with pytest.raises(UserError, match="Flu"):
        evaluate(copy, split="test", prevalence={"Flu": 0.1})
    # Images from elsewhere, and a command that is refused, leave what was fitted alone.
    before = (copy / "calibration.json").read_bytes()
    darker = tmp_path / "darker"
    shutil.copytree(phantom_dir, darker)
    for image in darker.rglob("*.png"):
        with Image.open(image) as opened:
            opened.point(lambda value: value // 3).save(image)
    evaluate(copy, split="val", data_dir=str(darker), output=tmp_path / "out")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot write"):
        evaluate(copy, split="val", output=tmp_path / "file")
    assert (copy / "calibration.json").read_bytes() == before
    for damage in (
        "{",
        '{"3": {"temperature": "x"}}',
        before.decode().replace('ature": ', 'ature": -'),
    ):
        (copy / "calibration.json").write_text(damage)
        with pytest.raises(UserError, match=r"calibration\.json is damaged"):
            evaluate(copy, split="test")
    split = (copy / "split.csv").read_text()
    (copy / "split.csv").write_text(split.replace(",Normal,", ",Martian,", 1))
    with pytest.raises(UserError, match="Martian"):
        evaluate(copy, split="test")


def test_groups_told_in_training_are_known_again(tiny_config, phantom_dir, tmp_path):
    root, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(phantom_dir, root)
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    lines = "".join(f"{file},p{i // 2}\n" for i, file in enumerate(files))
    (root / "groups.csv").write_text("file,person\n" + lines)
    tiny_config.data.dir = str(root)
    with pytest.raises(UserError, match=r"no column group or .*config\.data\.group_column"):
        setup(tiny_config, workdir)
    tiny_config.data.split, tiny_config.data.group_column = "grouped", "person"
    tiny_config.train.epochs = 1
    train(setup(tiny_config, workdir))
    report = evaluate(workdir)
    assert report["intervals"]["clusters"] == report["num_examples"] / 2

    root.rename(tmp_path / "moved")  # the temperature can be fitted there too
    (workdir / "calibration.json").unlink()
    with pytest.raises(UserError, match="no longer at"):
        evaluate(workdir)
    evaluate(workdir, data_dir=str(tmp_path / "moved"))
    again = evaluate(workdir, split="train", data_dir=str(tmp_path / "moved"), calibrated=True)
    assert again["calibration"]["applied"]


def test_a_run_that_is_another_s_to_write_is_scored_elsewhere(
    trained, tmp_path, monkeypatch, capsys
):
    def read_only(*_):
        raise UserError("cannot write calibration.json (Read-only file system)")

    monkeypatch.setattr("covid_flax.evaluate._store_calibration", read_only)
    report = evaluate(trained, output=tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "report.json").read_text()) == report
    assert "note: the temperature is not kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="Read-only"):
        evaluate(trained)


def test_groups_that_the_folder_names_later_count(trained, phantom_dir, tmp_path):
    """As those of the audit, written after training."""
    other = tmp_path / "data"
    shutil.copytree(phantom_dir, other)
    with open(trained / "split.csv", newline="") as f:
        first = {row["split"]: row["file"] for row in csv.DictReader(f)}
    (other / "groups.csv").write_text(f"file,group\n{first['train']},g\n{first['test']},g\n")
    report = evaluate(trained, split="test", data_dir=str(other), output=tmp_path / "out")
    leak = {alarm["name"]: alarm["figures"] for alarm in report["alarms"]}["group-leak"]
    assert (leak["crossing"], leak["images"]) == (1, 1)


def test_groups_that_only_the_folder_names_count(trained, phantom_dir, tmp_path):
    """The split was made without any: they are still checked, and resampled together."""
    run, other = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained, run)
    shutil.copytree(phantom_dir, other)
    with open(run / "split.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    with open(run / "split.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(row | {"group": ""} for row in rows)
    report = evaluate(run, split="test", data_dir=str(other))
    assert "group-leak" not in report["alarms_checked"]
    assert "duplicate-leak" in report["alarms_checked"]
    assert report["intervals"]["clusters"] == report["num_examples"]
    test = [row["file"] for row in rows if row["split"] == "test"]
    train = [row["file"] for row in rows if row["split"] == "train"]
    groups = [(train[0], "a"), (test[0], "a"), (train[1], "b"), (test[1], "c"), (test[2], "c")]
    lines = "".join(f"{file},{group}\n" for file, group in groups)
    (other / "groups.csv").write_text("file,group\n" + lines)
    report = evaluate(run, split="test", data_dir=str(other))
    leak = {alarm["name"]: alarm["figures"] for alarm in report["alarms"]}["group-leak"]
    assert (leak["crossing"], leak["images"]) == (1, 1)
    assert report["intervals"]["clusters"] == report["num_examples"] - 1


def test_groups_told_later_replace_those_of_identical_bytes(trained, phantom_dir, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(phantom_dir, other)
    test = [row.file for row in read_split_csv(trained / "split.csv") if row.split == "test"]
    (other / "groups.csv").write_text(f"file,group\n{test[0]},p\n{test[1]},p\n")
    report = evaluate(trained, split="test", data_dir=str(other), output=tmp_path / "out")
    assert report["intervals"]["clusters"] == report["num_examples"] - 1


def test_what_is_unknown_of_another_folder_is_said(trained, phantom_dir, tmp_path, capsys):
    """Its groups, and files that are no images."""
    other = tmp_path / "data"
    shutil.copytree(phantom_dir, other)
    (other / "Normal" / "images" / "scan.dcm").touch()
    (other / "Flu").mkdir()
    (other / "Flu" / "scan.dcm").touch()
    report = evaluate(trained, split="all", data_dir=str(other), output=tmp_path / "out")
    alarm = {alarm["name"]: alarm for alarm in report["alarms"]}["groups-unknown"]
    assert alarm["level"] == "caution" and "intervals are too narrow" in alarm["text"]
    assert "groups-unknown" in report["alarms_checked"]
    assert "2 .dcm in the class folders, no images: not scored" in capsys.readouterr().out
    assert report["not_images"] == {".dcm": 2}
    assert "Images of data, scored by run" in (tmp_path / "out/report.html").read_text()
    groups = [f"{row['file']},p{i // 2}" for i, row in enumerate(_predictions(tmp_path / "out"))]
    (other / "groups.csv").write_text("\n".join(["file,group", *groups]) + "\n")
    report = evaluate(trained, split="all", data_dir=str(other), output=tmp_path / "out")
    assert "groups-unknown" not in {alarm["name"] for alarm in report["alarms"]}


def test_training_images_that_have_moved_are_doubted_by_their_names(trained, phantom_dir, tmp_path):
    run, other = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained, run)
    shutil.copytree(phantom_dir, other)
    config = json.loads((run / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    report = evaluate(run, split="all", data_dir=str(other), output=tmp_path / "out")
    doubt = {alarm["name"]: alarm for alarm in report["alarms"]}["duplicate-leak"]
    assert doubt["level"] == "caution" and "bear the name of one that was trained" in doubt["text"]
    for image in other.rglob("*.png"):
        image.rename(image.with_name(f"x{image.name}"))
    report = evaluate(run, split="all", data_dir=str(other), output=tmp_path / "out")
    assert "duplicate-leak" not in report["alarms_checked"]  # contents could not be compared
    data = open_data(run, saved_run(run), "all", str(other))
    assert what_they_chose(run, "all", data) is None
    (run / "split.csv").rename(tmp_path / "split.csv")  # a model that was passed on
    assert evaluate(run, split="all", data_dir=str(other), output=tmp_path / "out")["accuracy"]
    assert what_they_chose(run, "all", data) is None
    (tmp_path / "split.csv").rename(run / "split.csv")
    data = open_data(run, saved_run(run), "all", str(phantom_dir))
    assert "bear the name of one that was trained" in what_they_chose(run, "all", data)


def test_an_epoch_that_val_did_not_choose_is_not_called_optimistic(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    for patience, optimistic in ((0, False), (3, True)):
        config["config"]["train"]["patience"] = patience
        (run / "config.json").write_text(json.dumps(config))
        report = evaluate(run, checkpoint="latest", output=tmp_path / "out")
        raised = {alarm["name"] for alarm in report["alarms"]}
        assert ("stopping-split-scored" in raised) == optimistic == ("note" in report)
        assert ("stopping-split-scored" in report["alarms_checked"]) == optimistic
        data = open_data(run, saved_run(run), "val")
        by_val = report["stopped_on"] == "val"
        assert (what_they_chose(run, "val", data, by_val=by_val) is not None) == optimistic


def test_a_checkpoint_of_other_classes_is_refused(trained, tmp_path):
    """Its arrays have the same shapes."""
    shutil.copytree(trained, tmp_path / "run")
    about = json.loads((trained / "config.json").read_text())
    about["class_names"][0] = "Cats"
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"answers with the classes .*COVID.*Cats"):
        open_run(tmp_path / "run")


def test_a_network_of_another_version_is_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for *where, key in (
        ("config", "model", "name"),
        ("preprocessing",),
        ("config", "eval", "bn_own_until"),
    ):
        about = json.loads((trained / "config.json").read_text())
        functools.reduce(dict.__getitem__, where, about)[key] = "resnet51"
        (tmp_path / "run" / "config.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="'resnet51', which this version does not know"):
            open_run(tmp_path / "run")


def test_images_that_changed_since_training_are_told_of(trained, phantom_dir, capsys, tmp_path):
    """Under the same names, where they were: by size or time, as no pixel is compared."""
    image = next((phantom_dir / "COVID" / "images").iterdir())
    kept = image.stat()
    evaluate(trained, output=tmp_path / "a")
    assert "have changed since" not in capsys.readouterr().out
    os.utime(image, ns=(kept.st_atime_ns, kept.st_mtime_ns + 10**9))
    try:
        evaluate(trained, output=tmp_path / "b")
    finally:
        os.utime(image, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert "have changed since the run began" in capsys.readouterr().out


def test_every_flag_reaches_the_evaluation(trained, monkeypatch):
    given = {
        "workdir": str(trained),
        "checkpoint": "latest",
        "split": "all",
        "data_dir": "elsewhere",
        "class_map": ["theirs=COVID"],
        "calibrated": True,
        "prevalence": ["COVID=0.1", "Lung_Opacity=0.2", "Normal=0.3", "Viral Pneumonia=0.4"],
        "output": "out",
    }
    called = []
    monkeypatch.setattr(evaluate_command.flags, "FLAGS", SimpleNamespace(**given))
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *a, **k: called.append((a, k)))
    evaluate_command._main()
    ((place,), said) = called[0]
    assert place == trained and said.pop("prevalence") == pytest.approx(
        {"COVID": 0.1, "Lung_Opacity": 0.2, "Normal": 0.3, "Viral Pneumonia": 0.4}
    )
    assert said == {
        "checkpoint": "latest",
        "split": "all",
        "data_dir": "elsewhere",
        "class_map": {"theirs": "COVID"},
        "calibrated": True,
        "output": Path("out"),
    }


def test_a_class_that_is_left_out_need_not_be_readable(trained, phantom_dir, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(phantom_dir, other)
    (other / "noise").mkdir()
    (other / "noise" / "1.png").write_bytes(b"no image")
    given = {"split": "all", "data_dir": str(other), "output": tmp_path / "out"}
    assert evaluate(trained, class_map={"noise": "-"}, **given)["num_examples"] == 80
    with pytest.raises(UserError, match=r"noise/1\.png"):
        evaluate(trained, class_map={"noise": "Normal"}, **given)


def test_answers_that_are_not_finite_are_none(trained, phantom_dir, monkeypatch):
    run = open_run(trained)
    broken = dataclasses.replace(run, _params=jax.tree.map(lambda x: x * np.nan, run._params))
    source = open_data(trained, run.saved, "test").source("test", run.config.data)
    with pytest.raises(UserError, match="answers to .* are not finite"):
        broken.probabilities(source)


@pytest.mark.parametrize("table", ["file,patient\nCOVID/images/a.png,1\n", "group,x\n1,2\n"])
@pytest.mark.parametrize("place", ["data", "."])
def test_a_csv_that_tells_no_groups_of_another_folder_is_none(
    trained, phantom_dir, tmp_path, table, place
):
    shutil.copytree(phantom_dir, tmp_path / "data")
    (tmp_path / place / "groups.csv").write_text(table)
    (tmp_path / "data" / "Lung_Opacity" / "images").rename(tmp_path / "away")  # none left of it
    given = {"split": "all", "data_dir": str(tmp_path / "data"), "output": tmp_path / "out"}
    report = evaluate(trained, class_map={"Lung_Opacity": "-"}, **given)
    assert report["num_examples"] == 60 == report["intervals"]["clusters"]
    shutil.rmtree(tmp_path / "data" / "Lung_Opacity")
    with pytest.raises(UserError, match="lies in the data folder .*another --output"):
        evaluate(trained, **given | {"output": tmp_path / "data" / "scores"})
    assert not (tmp_path / "data" / "scores").exists()
    with pytest.raises(UserError, match="is the data folder.*another --output"):
        evaluate(trained, **given | {"output": tmp_path / "data"})


def test_a_run_s_phantoms_move_with_it(make_tiny_config, tmp_path):
    """Another run in its old place has others of the same names."""
    for seed, name in ((0, "first"), (7, "second")):
        c = make_tiny_config()
        c.seed = seed
        c.data.dir, c.data.phantoms_per_class, c.train.epochs = "", 8, 1
        c.train.batch_size = 12  # of 24: one shape to compile
        train(setup(c, tmp_path / "run"))
        if name == "first":
            (tmp_path / "run").rename(tmp_path / name)
    report = evaluate(tmp_path / "first")
    assert Path(report["data_dir"]) == (tmp_path / "first" / "phantoms")


def test_a_cache_that_cannot_be_made_is_another_machine_s(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    saved = json.loads((run / "config.json").read_text())
    (tmp_path / "file").touch()
    saved["config"]["data"]["cache_dir"] = str(tmp_path / "file" / "cache")
    (run / "config.json").write_text(json.dumps(saved))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert evaluate(run, split="test")["num_examples"] > 0
    assert "the run's own cache_dir cannot" in capsys.readouterr().out
    # One that can be read is enough, where the records are.
    shutil.copytree(tmp_path / "home" / "covid_flax", tmp_path / "kept")
    saved["config"]["data"]["cache_dir"] = str(tmp_path / "kept")
    (run / "config.json").write_text(json.dumps(saved))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(run_images, "_can_be_written", lambda folder: False)
    assert evaluate(run, split="test", output=tmp_path / "again")["num_examples"] > 0
    assert "cache_dir" not in capsys.readouterr().out


def test_another_s_groups_csv_is_not_lost(trained, phantom_dir, tmp_path):
    (tmp_path / "groups.csv").write_text("file,group\n")
    with pytest.raises(UserError, match=r"groups\.csv.*--output"):
        evaluate(trained, split="test", output=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["groups.csv"]


def test_a_place_is_no_other_for_being_said_otherwise(trained, phantom_dir, tmp_path, capsys):
    copy, link = tmp_path / "run", tmp_path / "link"
    shutil.copytree(trained, copy)
    (copy / "calibration.json").unlink(missing_ok=True)
    link.symlink_to(phantom_dir)
    evaluate(copy, data_dir=str(link))
    assert (copy / "calibration.json").exists()
    assert "no temperature is fitted" not in capsys.readouterr().out
    (copy / "calibration.json").unlink()
    shutil.copytree(phantom_dir, tmp_path / "data")
    evaluate(copy, data_dir=str(tmp_path / "data"), output=tmp_path / "out")
    assert "no temperature is fitted" in capsys.readouterr().out
    assert not (copy / "calibration.json").exists()


def test_titles_name_the_run_from_within_its_folder(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(trained)
    evaluate(Path("."), split="test", output=tmp_path)
    assert f"test images of {trained.name}" in (tmp_path / "report.html").read_text()


def _rows(workdir):
    return _predictions(workdir / "eval" / "test")


def test_a_folder_that_names_its_classes_otherwise(trained, phantom_dir, tmp_path):
    """Two map to one, one is left out; groups of that folder's own csv are kept."""
    other = tmp_path / "other"
    for theirs, ours in (
        ("healthy", "Normal"),
        ("sars", "COVID"),
        ("cov", "COVID"),
        ("x", "COVID"),
    ):
        shutil.copytree(phantom_dir / ours / "images", other / theirs)
        for image in (other / theirs).iterdir():
            image.rename(image.with_name(f"{theirs}{image.name.replace('-', '')}"))
    files = sorted(p.relative_to(other).as_posix() for p in other.rglob("*.png"))
    with open(other / "groups.csv", "w") as f:
        f.write("file,group\n" + "".join(f"{file},{i // 2}\n" for i, file in enumerate(files)))
    with pytest.raises(UserError, match="--class_map"):
        evaluate(trained, split="all", data_dir=str(other), output=tmp_path / "out")
    kinds = {"healthy": "Normal", "sars": "COVID", "cov": "COVID", "x": "-"}
    how = {"split": "all", "data_dir": str(other), "output": tmp_path / "out"}
    report = evaluate(trained, class_map=kinds, **how)
    support = {name: figures["support"] for name, figures in report["per_class"].items()}
    assert support == {"COVID": 40, "Lung_Opacity": 0, "Normal": 20, "Viral Pneumonia": 0}
    assert report["class_map"] == kinds
    assert report["intervals"]["clusters"] == 30
    labels = {r["file"].split("/")[0]: r["label"] for r in _predictions(tmp_path / "out")}
    assert labels == {"cov": "COVID", "healthy": "Normal", "sars": "COVID"}
    with pytest.raises(UserError, match="Flu"):
        evaluate(trained, class_map=kinds | {"x": "Flu"}, **how)
    with pytest.raises(UserError, match="--class_map=cov=COVD: the run knows COVID, .*: name one"):
        evaluate(trained, class_map=kinds | {"cov": "COVD"}, **how)
    with pytest.raises(UserError, match="nowhere"):
        evaluate(trained, class_map=kinds | {"nowhere": "COVID"}, **how)
    with pytest.raises(UserError, match="leaves no image"):
        evaluate(trained, class_map=dict.fromkeys(kinds, "-"), **how)
    with pytest.raises(UserError, match="--data_dir"):
        evaluate(trained, class_map=kinds)


@pytest.mark.parametrize(
    ("text", "word"),
    [(["a"], "a"), (["=b"], "=b"), (["a=b", "c="], "c="), (["a=b", "a=c"], "twice")],
)
def test_class_maps_said_wrong(text, word):
    with pytest.raises(UserError, match=word):
        parse_class_map(text)


def test_class_map_and_prevalence_as_said_on_the_command_line():
    assert parse_class_map(["a=b", "c d=e f", "g=-"]) == {"a": "b", "c d": "e f", "g": "-"}
    assert parse_prevalence([], ["a", "b"]) is None
    assert parse_prevalence(["0.1"], ["a", "b"]) == {"a": 0.1, "b": 0.1}
    assert parse_prevalence(["a=b=0.1"], ["a=b", "c"]) == {"a=b": 0.1}
    whole = ["a=0.01", "b=0.2", "c=0.68", "d=0.11"]  # 1.0000000000000002 in floating point
    assert parse_prevalence(whole, ["a", "b", "c", "d"])["c"] == 0.68
    for wrong in (["x"], ["a"], ["a=x"], ["0.1", "a=0.2"], ["a=0.1", "a=0.1"], ["a=0.6", "b=0.6"]):
        with pytest.raises(UserError, match="prevalence"):
            check_prevalence(parse_prevalence(wrong, ["a", "b"]), ["a", "b"])
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="prevalence"):
            check_prevalence({"a": share}, ["a", "b"])


def test_another_folder_is_scored_with_the_run_s_own_classes(
    trained, phantom_dir, tmp_path, capsys
):
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
        "report.html",
        "predictions.csv",
        "confusion_matrix.png",
    }
    shown = capsys.readouterr().out  # classes that it lacks have no recall
    assert re.search(r"Lung_Opacity( +\d+){4} +- ", shown)
    # All but the test images of that folder were trained on, or stopped by.
    leak = {alarm["name"]: alarm["figures"] for alarm in report["alarms"]}["duplicate-leak"]
    with open(trained / "split.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["label"] in ("Normal", "COVID")]
    assert leak["images"] == sum(r["split"] != "test" for r in rows)
    assert report["alarms_checked"] and "stopping-split-scored" not in report["alarms_checked"]


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


def test_that_another_checkpoint_s_figures_are_replaced_is_said(tmp_path, capsys):
    data = SimpleNamespace(folder=SimpleNamespace(root=tmp_path))
    before = {"data_dir": str(tmp_path.absolute()), "checkpoint": {"which": "best", "step": 55}}
    before["num_examples"] = 9
    (tmp_path / "report.json").write_text(json.dumps(before))
    say_what_is_replaced(tmp_path / "report.json", data, before)
    assert capsys.readouterr().out == ""
    later = before | {"checkpoint": {"which": "latest", "step": 66}}
    say_what_is_replaced(tmp_path / "report.json", data, later)
    assert "this replaces report.json of step 55 (best) in" in capsys.readouterr().out
