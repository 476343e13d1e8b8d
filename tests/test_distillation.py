"""Learning from another network's answers: the loss by NumPy, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.special

from covid_flax.errors import UserError
from covid_flax.job import make_job
from covid_flax.run import setup
from covid_flax.step import distillation_loss
from covid_flax.train import train
from covid_flax.trained_run import open_run


@pytest.fixture(scope="module")
def teacher(make_tiny_config, tmp_path_factory):
    config = make_tiny_config()
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


def test_a_student_comes_to_answer_as_its_teacher_does(tiny_config, teacher, tmp_path):
    """It starts elsewhere and sees no label: what it knows, it has from there."""
    config = _student(tiny_config, teacher, teacher_weight=1.0, teacher_temperature=1.0)
    config.model.dropout = 0.0
    config.train.epochs = 12
    config.seed = 1
    config.data.split = "paper-sorted"
    with pytest.raises(UserError, match="images that this run holds out"):
        make_job(setup(config, tmp_path / "leaks"))
    config = config.copy_and_resolve_references()
    config.data.split = "paper-random"
    config.seed = 0
    run = setup(config, tmp_path / "student")
    job = make_job(run)
    train(run)
    student, taught = open_run(tmp_path / "student", "latest"), open_run(teacher)
    p, q = (net.probabilities(job.train_source) for net in (student, taught))
    assert np.abs(p - q).mean() < 0.12
    first = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    entropy = -np.mean(np.sum(q * np.log(np.maximum(q, 1e-12)), -1))
    assert first["loss"] > entropy  # a cross-entropy to q is never less than q's own


def test_a_teacher_of_other_images_is_refused(tiny_config, teacher, tmp_path):
    config = _student(tiny_config, teacher)
    config.data.image_size = 48
    with pytest.raises(UserError, match="takes images of 32 pixels"):
        make_job(setup(config, tmp_path))
    with pytest.raises(UserError, match="holds no run"):
        config.data.image_size = 32
        config.train.teacher = str(tmp_path / "none")
        make_job(setup(config, tmp_path / "other"))
