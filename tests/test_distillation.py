"""Learning from another network's answers: the loss by NumPy, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import scipy.special

from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.job import make_job
from covid_flax.run import setup
from covid_flax.run_folder import learned_files
from covid_flax.step import distillation_loss
from covid_flax.train import train
from covid_flax.trained_run import open_run

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


@pytest.fixture(scope="module")
def teacher(make_tiny_config, tmp_path_factory):
    config = make_tiny_config()
    config.train.epochs = 10  # so that it answers one thing rather than another
    workdir = tmp_path_factory.mktemp("teacher")
    train(setup(config, workdir))
    return workdir


def _student(config, teacher, **changes):
    config.train.teacher = str(teacher)
    for key, value in changes.items():
        config.train[key] = value
    return config


def test_the_loss_is_hinton_s():
    rng = np.random.default_rng(0)
    logits, answers = rng.normal(size=(2, 7, 4)) * 3
    p = scipy.special.softmax(answers / 2.5, -1)
    want = -(2.5**2) * np.sum(p * scipy.special.log_softmax(logits / 2.5, -1), -1)
    np.testing.assert_allclose(distillation_loss(logits, answers, 2.5), want, rtol=1e-5)


def test_a_student_comes_to_answer_as_its_teacher_does(tiny_config, teacher, tmp_path, capsys):
    """It starts elsewhere and sees no label: what it knows, it has from there."""
    config = _student(tiny_config, teacher, teacher_weight=1.0, teacher_temperature=1.0)
    config.model.dropout = 0.0
    config.train.epochs = 12
    config.seed = 1
    config.data.split = "paper-sorted"
    with pytest.raises(UserError, match="images that this run holds out"):
        setup(config, tmp_path / "leaks")
    config = config.copy_and_resolve_references()
    config.data.split = "paper-random"
    config.data.split_seed = 0  # the teacher's
    run = setup(config, tmp_path / "student")
    job = make_job(run)
    train(run)
    student, taught = open_run(tmp_path / "student", "latest"), open_run(teacher)
    p, q = (net.probabilities(job.train_source) for net in (student, taught))
    # A teacher that always answered alike would teach to do so: 1 on the right.
    assert np.abs(p - q).mean() < 0.5 * np.abs(q - 0.25).mean()
    capsys.readouterr()
    train(setup(config, tmp_path / "student"))  # the same teacher, so it is complete
    assert "training is complete" in capsys.readouterr().out
    alone = config.copy_and_resolve_references()
    alone.train.teacher = ""
    with pytest.raises(UserError, match="is not the network that .*student has learned from"):
        setup(alone, tmp_path / "student")
    about = json.loads((tmp_path / "student" / "config.json").read_text())
    about["teacher"] = ["0" * 64]
    (tmp_path / "student" / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="is not the network that .*student has learned from"):
        setup(config, tmp_path / "student")


def test_what_is_said_of_the_teacher_reaches_the_step(tiny_config, teacher, tmp_path):
    config = _student(tiny_config, teacher, teacher_weight=0.7, teacher_temperature=2.0)
    taught_by = make_job(setup(config, tmp_path)).step_config.teacher
    assert (taught_by.weight, taught_by.temperature) == (0.7, 2.0)


def test_a_teacher_that_grew_better_since_it_was_written_down_is_refused(
    tiny_config, teacher, tmp_path
):
    run = setup(_student(tiny_config, teacher), tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"teacher": ["0" * 64]}))
    with pytest.raises(UserError, match="is still being trained, and has a better epoch by now"):
        make_job(run)


def test_a_teacher_of_other_images_is_refused(tiny_config, teacher, tmp_path):
    config = _student(tiny_config, teacher)
    for key, other in (("image_size", 48), ("interpolation", "lanczos"), ("intermediate_size", 40)):
        with config.unlocked():
            its, config.data[key] = config.data[key], other
        with pytest.raises(
            UserError, match=f"takes images of data.{key}={its}, this run has {other}"
        ):
            setup(config, tmp_path)
        config.data[key] = its
    with pytest.raises(UserError, match="holds no run"):
        config.train.teacher = str(tmp_path / "none")
        setup(config, tmp_path / "other")


def test_a_teacher_of_the_same_images_elsewhere_is_refused(
    tiny_config, teacher, phantom_dir, tmp_path
):
    """The folder of the classes, or the one that holds it: their files' names differ."""
    shutil.copytree(phantom_dir, tmp_path / "archive" / "COVID-19_Radiography_Dataset")
    tiny_config.data.dir = str(tmp_path / "archive")
    tiny_config.data.split_seed = 9
    with pytest.raises(UserError, match=r"was trained on [\d,]+ images that this run holds out"):
        setup(_student(tiny_config, teacher), tmp_path / "student")
    tiny_config.data.split_seed = 0
    setup(_student(tiny_config, teacher), tmp_path / "student")


def test_a_teacher_whose_own_teacher_saw_what_is_held_out_is_refused(
    tiny_config, teacher, tmp_path, capsys
):
    """Only through its own teacher did this one learn of all the images."""
    middle = tmp_path / "middle"
    shutil.copytree(teacher, middle)
    rows = read_split_csv(teacher / "split.csv")
    learned = {row.file for row in rows if row.split == "train"}
    write_split_csv(middle / "split.csv", [row for row in rows if row.split != "train"])
    about = json.loads((middle / "config.json").read_text())
    about["config"]["train"]["teacher"] = str(teacher)
    (middle / "config.json").write_text(json.dumps(about))
    assert learned_files(middle) == learned
    # Given from another folder, as a later command may be; and gone.
    about["config"]["train"]["teacher"] = "runs/nobody-s"
    for folder, of in ((str(teacher), learned), (str(tmp_path / "gone"), set())):
        about["teacher_folder"] = folder
        (middle / "config.json").write_text(json.dumps(about))
        assert learned_files(middle) == of
    assert "gone, a teacher, is gone" in capsys.readouterr().out
    about["teacher_folder"] = str(teacher)
    (middle / "config.json").write_text(json.dumps(about))
    tiny_config.data.split_seed = 9
    with pytest.raises(UserError, match="or a run that its weights come from"):
        setup(_student(tiny_config, middle), tmp_path / "student")
