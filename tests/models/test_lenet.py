"""Judges: the network in Keras with the same arrays, and the paper's own counts."""

import json
import re

import by_path
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from keras import layers as kl
from keras_judge import keras

from covid_flax import config as config_lib
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.models import MODELS, LeNet, create_model
from covid_flax.pretrained.load import load_weights
from covid_flax.run import setup
from covid_flax.train import train
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")

STAGES = ("conv1", "conv2", "pool", "head")


def keras_lenet(size, classes):
    """The modern form, its layers named by our attribute paths."""
    model = keras.Sequential(
        [
            keras.Input((size, size, 1)),
            kl.Conv2D(6, 5, activation="tanh", name="conv1"),
            kl.AveragePooling2D(2, name="conv1_out"),
            kl.Conv2D(16, 5, activation="tanh", name="conv2"),
            kl.AveragePooling2D(2, name="conv2_out"),
            kl.AdaptiveAveragePooling2D(5),
            kl.Flatten(name="pool_out"),
            kl.Dense(120, activation="tanh", name="head.hidden1"),
            kl.Dense(84, activation="tanh", name="head.hidden2"),
            kl.Dense(classes, name="head.predictions"),
        ]
    )
    rng = np.random.default_rng(0)
    for layer in model.layers:
        for variable in layer.variables:
            scale = np.sqrt(1 / max(1, np.prod(variable.shape[:-1])))
            variable.assign(rng.normal(size=variable.shape) * scale)
    return model


def copied(keras_model, **kw):
    model = LeNet(MODELS["lenet5"], rngs=nnx.Rngs(0), **kw)
    for layer in keras_model.layers:
        for variable in layer.variables:
            target = model
            for part in layer.name.split("."):
                target = getattr(target, part)
            target = getattr(target, variable.name)
            assert target[...].shape == variable.shape
            target[...] = jnp.asarray(variable.value)
    return model


@pytest.mark.parametrize("size", [32, 47])
def test_every_stage_is_keras_s(size):
    judge = keras_lenet(size, 4)
    names = ["conv1_out", "conv2_out", "pool_out", "head.predictions"]
    judge_stages = keras.Model(judge.inputs[0], [judge.get_layer(n).output for n in names])
    grey = np.random.default_rng(1).normal(size=(3, size, size, 1)).astype(np.float32)
    want = judge_stages.predict_on_batch(grey)
    model = copied(judge, num_classes=4)
    # Three channels whose mean is the grey image.
    x = grey + np.array([-0.3, 0.1, 0.2], np.float32)
    for i, stage in enumerate(STAGES):
        whole = model(x, stop=stage)
        np.testing.assert_allclose(whole, want[i], rtol=0, atol=1e-5 * np.abs(want[i]).max())
        if i:  # from the stage before, as cached
            rest = model(jnp.asarray(want[i - 1]), start=stage)
            np.testing.assert_allclose(rest, want[-1], atol=1e-5 * np.abs(want[-1]).max())


def test_parameters_are_the_paper_s():
    config = base.get_config().model
    config.name = "lenet5"
    _, params, batch_stats = create_model(config, 10, seed=0)
    count = {
        "/".join(p.key for p in path[:-1]): 0
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        count["/".join(p.key for p in path[:-1])] += x.size
    # LeCun et al. 1998, section II.B: C1, C5 and F6. C3 sees all maps, 16 (25 * 6 + 1).
    assert count.pop("conv1") == 156
    assert count.pop("head/hidden1") == 48_120
    assert count.pop("head/hidden2") == 10_164
    assert count == {"conv2": 2_416, "head/predictions": 850}
    assert batch_stats == {}


def test_half_precision_and_dropout():
    judge = keras_lenet(32, 4)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 32, 32, 3)), jnp.float32)
    model = copied(judge, num_classes=4)
    plain = model(x, dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(plain, model(x))  # no dropout is set
    half = copied(judge, num_classes=4, dtype=jnp.bfloat16)
    maps = half(x, stop="conv2")
    assert maps.dtype == jnp.bfloat16
    logits = half(maps, start="pool")
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - plain).max() < 0.05 * np.abs(plain).max()
    dropped = copied(judge, num_classes=4, dropout_rate=0.5)
    np.testing.assert_array_equal(dropped(x), plain)
    # Dropout keeps the mean of what it drops, and the last layer is linear.
    keys = jax.random.split(jax.random.key(1), 4000)
    features = dropped(x, stop="pool")
    run = jax.jit(jax.vmap(lambda key: dropped(features, start="head", dropout_key=key)))
    many = run(keys)
    spread = many.std(0)
    assert (spread > 0).all()
    np.testing.assert_array_less(np.abs(many.mean(0) - plain), 6 * spread / np.sqrt(4000))


def _records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_it_trains_and_cached_stages_change_nothing(tiny_config, tmp_path):
    """The configuration's whole way: train, checkpoint, evaluate; frozen stages cached or not."""
    c = tiny_config
    c.model.name, c.model.dropout, c.model.trainable = "lenet5", 0.0, "all"
    c.train.epochs, c.optimizer.learning_rate = 8, 2e-3
    train(setup(c, tmp_path / "all"))
    losses = [r["loss"] for r in _records(tmp_path / "all") if r["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0], losses
    val = [r for r in _records(tmp_path / "all") if r["split"] == "val"]
    best = min(val, key=lambda r: r["loss"])
    assert evaluate(tmp_path / "all")["accuracy"] == pytest.approx(best["accuracy"])

    c.model.trainable, c.train.epochs = "head", 2
    c.train.feature_cache_gb = 1.0
    train(setup(c, tmp_path / "cached"))
    c.train.feature_cache_gb = c.train.feature_disk_gb = 0.0
    train(setup(c, tmp_path / "anew"))
    cached, anew = _records(tmp_path / "cached"), _records(tmp_path / "anew")
    assert len(cached) == len(anew) > 0
    for a, b in zip(cached, anew, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_configuration_file_and_what_is_refused():
    config = by_path.load("configs/lenet.py").get_config()
    config_lib.check(config)
    for key, value, known in [
        ("trainable", "conv5", "'conv2', 'head', of lenet5"),
        ("trainable", "pool", "'conv2', 'head', of lenet5"),
        ("remat", "block", "lenet5 has no blocks"),
    ]:
        wrong = config.copy_and_resolve_references()
        wrong.model[key] = value
        with pytest.raises(UserError, match=re.escape(f"config.model.{key}={value!r}: ")) as e:
            config_lib.check(wrong)
        assert known in str(e.value)
    _, params, batch_stats = create_model(config.model, 4, seed=0)
    with pytest.raises(UserError, match="w.npz: files are loaded into networks of Keras's only"):
        load_weights({}, params, batch_stats, source="w.npz")
