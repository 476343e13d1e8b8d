"""Batch statistics taken anew are those of the plain images; an evaluation so gets them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small_resnet import with_batch_norm

from covid_flax import preemption, recalibrate
from covid_flax.data.pipeline import ArraySource
from covid_flax.evaluate import evaluate
from covid_flax.job import make_job
from covid_flax.models import MODELS, create_model, own_shares, preprocessing_of
from covid_flax.models.layers import set_own_shares
from covid_flax.models.preprocess import preprocess
from covid_flax.outputs import mean_loss
from covid_flax.recalibrate import is_due, make_recalibration
from covid_flax.run import setup
from covid_flax.step import create_state, make_eval_step
from covid_flax.train import train
from covid_flax.trained_run import open_run
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


@pytest.fixture
def config(tiny_config):
    c = with_batch_norm(tiny_config)
    c.augment.rotate = 20.0
    c.train.batch_size = 12
    c.train.recalibrate = 48
    return c


def _state(run, job):
    return create_state(run.params, run.batch_stats, frozenset(run.trained), job.tx, 0)


def test_batches_of_unequal_means_add_to_the_variance():
    """Of 0 and 2, each with a variance of 1: together 1 and 2."""
    batches = [{"bn": {"mean": np.full(3, m), "var": np.ones(3)}} for m in (0.0, 2.0)]
    totals = jax.tree.map(np.add, *map(recalibrate._sums, batches))
    got = recalibrate._moments(totals, 2)["bn"]
    np.testing.assert_array_equal(got["mean"], np.ones(3))
    np.testing.assert_array_equal(got["var"], np.full(3, 2.0))


@pytest.mark.parametrize(
    ("batch", "share"),
    [
        pytest.param(0, 0.0, marks=pytest.mark.slow),
        pytest.param(4096, 0.0, marks=pytest.mark.slow),
        (4096, 0.5),
    ],
)
def test_they_are_the_moments_of_the_plain_images(config, tmp_path, batch, share):
    """As a network makes them which takes that share of an image's own moments."""
    config.eval.bn_own_share = share
    run = setup(config, tmp_path)
    job = make_job(run)
    if batch:  # all of them, once each
        config.train.batch_size = config.train.recalibrate = batch
    assert is_due(config, run.batch_stats)
    state = _state(run, job)
    got = make_recalibration(config, run.graphdef, job.train_source)(state).batch_stats

    # The first trained batch norm, conv5's first 1x1, from its inputs in float64.
    order = np.random.default_rng(config.seed).permutation(len(job.train_source))
    order = order if batch else order[:48]
    images = np.stack([job.train_source[int(i)]["image"] for i in order])
    model = nnx.merge(run.graphdef, run.params, run.batch_stats)
    set_own_shares(model, own_shares(config))
    x = np.asarray(model(preprocess(images, "unit"), stop="conv4"), np.float64)[:, ::2, ::2]
    unit = run.params["conv5"]["block1"]["unit1"]["conv"]
    y = x @ np.asarray(unit["kernel"], np.float64)[0, 0] + np.asarray(unit["bias"], np.float64)
    bn = got["conv5"]["block1"]["unit1"]["bn"]
    np.testing.assert_allclose(bn["mean"], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bn["var"], y.var((0, 1, 2)), rtol=1e-4, atol=1e-6)
    # Frozen stages keep theirs.
    for stage in ("conv1", "conv4"):
        for a, b in zip(
            jax.tree.leaves(got[stage]), jax.tree.leaves(run.batch_stats[stage]), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "resnet14_small",
        pytest.param("efficientnet_lite0_small", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", marks=pytest.mark.slow),
    ],
)
def test_nothing_of_the_former_statistics_is_left(config, name):
    """So that it does not matter how far from right, or how slow, they were."""
    config.model.name, config.model.bn_momentum, config.model.trainable = name, 0.999, "all"
    config.train.batch_size = config.train.recalibrate = 8
    graphdef, params, stats = create_model(config.model, 4, 0)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    recalibrate = make_recalibration(config, graphdef, ArraySource(images, np.zeros(8, np.int32)))
    got = []
    for scale in (1.0, 5.0):
        wrong = jax.tree.map(lambda x, s=scale: x * s, stats)
        state = create_state(params, wrong, MODELS[name].stages, optax.sgd(0.1), 0)
        got.append(jax.tree.leaves(recalibrate(state).batch_stats))
    for a, b in zip(*got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_where_nothing_is_augmented_or_followed_none_is_due(config, tmp_path):
    for key, value in (("augment.rotate", 0.0), ("model.batch_norm", "frozen")):
        other = config.copy_and_resolve_references()
        section, name = key.split(".")
        other[section][name] = value
        run = setup(other, tmp_path / name)
        assert not is_due(other, run.batch_stats)
    config.eval.bn_own_share = 0.1
    config.augment.rotate = 0.0
    assert is_due(config, run.batch_stats)  # statistics of other activations
    config.augment.rotate = 20.0
    config.model.trainable = "head"  # which has no batch norm
    assert not is_due(config, run.batch_stats)


def test_a_share_of_the_first_weights_needs_statistics_of_its_own(config, tmp_path):
    config.augment.rotate = 0.0
    run = setup(config, tmp_path)
    config.train.ema_decay = 0.9
    assert not is_due(config, run.batch_stats)  # the averages follow with the weights
    config.train.start_share = 0.5
    assert is_due(config, run.batch_stats)


def test_a_mean_of_weights_has_its_own_statistics(config, tmp_path):
    """Those of the weights that it is of are not: without augmentation too."""
    config.augment.rotate = 0.0
    config.train.epochs, config.train.swa_start = 2, 1
    run = setup(config, tmp_path)
    assert is_due(config, run.batch_stats)
    train(run)
    _assert_statistics_of_plain_images(config, run, open_run(tmp_path, "latest"))


@pytest.mark.parametrize(
    ("ema", "share"), [pytest.param(0.0, 0.0, marks=pytest.mark.slow), (0.9, 0.5)]
)
def test_the_checkpoint_that_is_evaluated_has_them(config, tmp_path, ema, share):
    """With a share of own moments too, which validation and evaluation take alike."""
    config.train.ema_decay, config.eval.bn_own_share = ema, share
    config.train.epochs = 1
    run = setup(config, tmp_path)
    train(run)
    trained = open_run(tmp_path)
    _assert_statistics_of_plain_images(config, run, trained)
    images, labels = run.data.source("val", config.data), run.data.labels("val")
    x = np.stack([images[i]["image"] for i in range(len(labels))])
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert mean_loss(np.asarray(trained.logits(x)), labels) == pytest.approx(last["loss"], rel=1e-5)
    without = make_eval_step(run.graphdef, preprocessing_of(config.model))
    logits = without(trained._params, trained._batch_stats, x)
    assert (np.abs(logits - trained.logits(x)).max() > 1e-3) == (share > 0)


def test_a_checkpoint_amid_an_epoch_gets_them_when_it_is_opened(
    config, tmp_path, capsys, monkeypatch
):
    config.train.log_every_steps = 1
    run = setup(config, tmp_path)
    with monkeypatch.context() as m, pytest.raises(preemption.Terminated):
        m.setattr(preemption, "noticed", lambda **_: True)
        train(run)
    amid = open_run(tmp_path, "latest")
    assert "is amid an epoch: batch statistics are taken anew" in capsys.readouterr().out
    _assert_statistics_of_plain_images(config, run, amid)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["data"]["root"] = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    there = open_run(tmp_path, "latest", config.data.dir)
    for a, b in zip(
        jax.tree.leaves(there._batch_stats), jax.tree.leaves(amid._batch_stats), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    capsys.readouterr()
    assert amid.statistics_fit and there.statistics_fit
    assert open_run(tmp_path, "latest").statistics_fit is False
    assert "the training images are not there" in capsys.readouterr().out


def test_statistics_that_do_not_fit_are_an_alarm_of_every_evaluation(config, tmp_path, capsys):
    config.train.epochs, config.train.recalibrate = 1, 0
    run = setup(config, tmp_path)
    train(run)
    report = evaluate(tmp_path, data=run.data)
    assert "batch-statistics" in [a["name"] for a in report["alarms"] if a["level"] == "alarm"]
    assert "train.recalibrate=0" in capsys.readouterr().out


def _assert_statistics_of_plain_images(config, run, trained):
    job = make_job(run)
    state = dataclasses.replace(
        _state(run, job),
        params={k: trained._params[k] for k in run.trained if k in trained._params},
        batch_stats=trained._batch_stats,
    )
    anew = make_recalibration(config, run.graphdef, job.train_source)(state).batch_stats
    for a, b in zip(jax.tree.leaves(anew), jax.tree.leaves(trained._batch_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_from_cached_features_it_is_as_from_the_images():
    config = with_batch_norm(base.get_config())
    config.train.batch_size = config.train.recalibrate = 8
    graphdef, params, stats = create_model(config.model, 4, 0)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    prefix = make_eval_step(graphdef, preprocessing_of(config.model), stop="conv4")
    features = np.asarray(prefix(params, stats, images))
    state = create_state(params, stats, frozenset(("conv5", "pool", "head")), optax.sgd(0.1), 0)
    of_images, of_features = (
        make_recalibration(config, graphdef, ArraySource(x, np.zeros(8, np.int32)), start)(state)
        for x, start in ((images, None), (features, "conv5"))
    )
    for x, y in zip(
        jax.tree.leaves(of_images.batch_stats["conv5"]),
        jax.tree.leaves(of_features.batch_stats["conv5"]),
        strict=True,
    ):
        np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-5)
