"""Answers to images without labels are those that an evaluation gives to the same images."""

import csv
import shutil
import zipfile

import forked
import numpy as np
import pytest

from covid_flax import predict as predict_command
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.evaluation.predictions import answers_csv
from covid_flax.predict import predict
from covid_flax.robustness import robustness
from covid_flax.run import setup
from covid_flax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


@pytest.fixture(scope="module")
def trained(make_tiny_config, tmp_path_factory):
    config = make_tiny_config()
    config.train.epochs = 1
    workdir = tmp_path_factory.mktemp("predict") / "run"
    train(setup(config, workdir))
    evaluate(workdir)
    return workdir


def _evaluated(workdir, output, **how):
    """Probabilities by file, as an evaluation of all images writes them."""
    evaluate(workdir, split="all", output=output, **how)
    with open(output / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [key for key in rows[0] if key.startswith("p_")]
    return {row["file"]: [float(row[name]) for name in names] for row in rows}


@pytest.mark.parametrize("calibrated", [False, True])
def test_they_are_those_of_an_evaluation(trained, phantom_dir, tmp_path, calibrated):
    answers = predict(trained, [str(phantom_dir)], calibrated=calibrated)
    want = _evaluated(trained, tmp_path / "all", calibrated=calibrated)
    assert len(answers.files) == len(want) == 80 and not answers.bad
    for file, p in zip(answers.files, answers.probabilities, strict=True):
        np.testing.assert_allclose(p, want[file.removeprefix(f"{phantom_dir}/")], atol=1e-6)
    assert answers.class_names == ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")


def test_files_folders_and_zips(trained, phantom_dir, tmp_path, capsys):
    covid = phantom_dir / "COVID" / "images"
    one = sorted(covid.iterdir())[0]
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as z:
        z.write(one, "deep/down/x.png")
        z.writestr("notes.txt", "no image")
    answers = predict(trained, [str(one), str(tmp_path / "more.zip"), str(covid)])
    assert "more.zip: 1 file is no image, or hidden: not read" in capsys.readouterr().out
    assert answers.files[:2] == (str(one), f"{tmp_path}/more.zip/deep/down/x.png")
    assert answers.files[2:] == tuple(str(path) for path in sorted(covid.iterdir()))
    np.testing.assert_allclose(answers.probabilities[1], answers.probabilities[0], atol=1e-6)
    np.testing.assert_allclose(answers.probabilities[2], answers.probabilities[0], atol=1e-6)


def test_what_cannot_be_read_is_left_out_and_named(trained, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir / "Normal" / "images", tmp_path / "images")
    good = predict(trained, [str(tmp_path / "images")])
    bad = tmp_path / "images" / "Normal-0.png"
    bad.write_bytes(b"no image")
    answers = predict(trained, [str(tmp_path / "images")])
    assert list(answers.bad) == [str(bad)] and "Normal-0.png" in answers.bad[str(bad)]
    assert answers.files == tuple(sorted(good.files))
    np.testing.assert_allclose(answers.probabilities, good.probabilities, atol=1e-6)
    with pytest.raises(UserError, match=r"no image can be read, first .*Normal-0\.png"):
        predict(trained, [str(bad)])


def test_what_is_asked_in_vain_is_refused(trained, tmp_path):
    (tmp_path / "x.dcm").touch()
    (tmp_path / "empty").mkdir()
    for given, words in (
        ("x.dcm", r"x\.dcm is not read: give \.png"),
        ("empty", "no image found in .*empty"),
        ("nothing", "nothing does not exist: give images"),
    ):
        with pytest.raises(UserError, match=words):
            predict(trained, [str(tmp_path / given)])


def test_the_command_writes_a_table_and_replaces_none(trained, phantom_dir, tmp_path):
    images = phantom_dir / "Normal" / "images"
    given = (f"--workdir={trained}", str(images), "--output=there/new.csv")
    done = forked.command("covid_flax.predict", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 images: COVID " in done.stdout and "written: there/new.csv" in done.stdout
    answers = predict(trained, [str(images)])
    written = (tmp_path / "there" / "new.csv").read_bytes()
    files = {"file": answers.files}
    assert written == answers_csv(files, answers.class_names, answers.probabilities)
    header, *rows = csv.reader(written.decode().splitlines())
    assert header == ["file", "predicted", *(f"p_{name}" for name in answers.class_names)]
    for row, p in zip(rows, answers.probabilities, strict=True):
        assert row[1] == answers.class_names[p.argmax()]
    again = forked.command("covid_flax.predict", *given, cwd=tmp_path)
    assert again.returncode == 2 and "new.csv is there" in again.stderr
    assert (tmp_path / "there" / "new.csv").read_bytes() == written
    folder = forked.command("covid_flax.predict", *given[:2], "--output=there", cwd=tmp_path)
    assert folder.returncode == 2 and "there is a folder: name a csv" in folder.stderr
    inside = f"--output={phantom_dir / 'new' / 'a.csv'}"
    inside = forked.command("covid_flax.predict", *given[:2], inside, cwd=tmp_path)
    assert inside.returncode == 2 and "lies in the data folder" in inside.stderr
    assert not (phantom_dir / "new").exists()
    none = forked.command("covid_flax.predict", f"--workdir={trained}", cwd=tmp_path)
    assert none.returncode == 2 and "give images: python -m covid_flax.predict" in none.stderr


def test_every_flag_reaches_the_answers(trained, monkeypatch, tmp_path):
    called = []

    def answer(*args, **kwargs):
        called.append((args, kwargs))
        raise UserError("seen")

    given = {"workdir": str(trained), "checkpoint": "latest", "calibrated": True}
    flags = type("Flags", (), given | {"output": str(tmp_path / "a.csv")})
    monkeypatch.setattr(predict_command.flags, "FLAGS", flags)
    monkeypatch.setattr(predict_command, "predict", answer)
    with pytest.raises(UserError, match="seen"):
        predict_command._main(["x", "y"])
    ((where, images), how) = called[0]
    assert (where, images) == (trained, ["x", "y"])
    assert how == {"checkpoint": "latest", "calibrated": True}


def test_answers_are_of_the_checkpoint_asked_for(make_tiny_config, phantom_dir, tmp_path):
    config, run = make_tiny_config(), tmp_path / "run"
    config.train.epochs, config.train.min_delta = 2, 100.0  # best is step 4 of 8
    train(setup(config, run))
    seen = []
    for which in ("best", "latest"):
        got = predict(run, [str(phantom_dir)], checkpoint=which)
        want = _evaluated(run, tmp_path / which, checkpoint=which)
        for file, p in zip(got.files, got.probabilities, strict=True):
            np.testing.assert_allclose(p, want[file.removeprefix(f"{phantom_dir}/")], atol=1e-6)
        seen.append(got.probabilities)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    report = robustness(run, checkpoint="latest", limit=4, output=tmp_path / "r")
    assert report["checkpoint"] == {"which": "latest", "step": 8}
