"""Judges: Keras's losses, NumPy in float64, and what must not change."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import dataclasses

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from covid_flax.augment import Augment
from covid_flax.models import STAGES, create_model, trained_stages
from covid_flax.step import (
    StepConfig,
    create_state,
    cross_entropy,
    make_eval_step,
    make_train_step,
)
from ml_collections_configs import base


@pytest.fixture(scope="module")
def model():
    config = base.get_config().model
    config.name, config.hidden_units, config.bn_momentum = "resnet14_small", 8, 0.9
    return create_model(config, 4, seed=0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.asarray(np.arange(8) % 4, jnp.int32)}


def _state(model, trainable, tx=None):
    _, params, batch_stats = model
    return create_state(params, batch_stats, frozenset(trainable), tx or optax.adam(1e-2), seed=0)


def _step(model, **config):
    config = StepConfig(preprocessing="unit", **config)
    return jax.jit(make_train_step(model[0], optax.adam(1e-2), config))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_keras_s(smoothing, weighted):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 4)).astype(np.float32) * 2
    labels = rng.integers(0, 4, 40)
    weights = (0.5, 2.0, 1.0, 3.5) if weighted else None
    ours = cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing, class_weights=weights
    )
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=smoothing)
    sample_weight = None if weights is None else np.array(weights)[labels]
    theirs = loss(np.eye(4)[labels], keras.ops.softmax(logits), sample_weight)
    np.testing.assert_allclose(np.mean(ours), float(theirs), rtol=1e-5)


def test_loss_and_sums_match_a_forward_pass_in_numpy(model, batch):
    state, loss = _step(model)(_state(model, STAGES), batch)
    logits = make_eval_step(model[0], "unit")(model[1], model[2], batch["image"])
    # No stage takes batch statistics here and dropout is the only difference.
    assert float(state.sums["count"]) == 8
    np.testing.assert_allclose(float(state.sums["loss"]) / 8, float(loss), rtol=1e-6)
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = "resnet14_small", 8, 0.0
    plain = create_model(config, 4, seed=0)
    state, loss = _step(plain)(_state(plain, STAGES), batch)
    z = np.asarray(logits, np.float64)
    z -= z.max(1, keepdims=True)
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(8), np.asarray(batch["label"])]
    np.testing.assert_allclose(float(loss), expected.mean(), rtol=1e-5)
    correct = np.sum(z.argmax(1) == np.asarray(batch["label"]))
    assert float(state.sums["correct"]) == correct


@pytest.mark.parametrize("trainable", ["all", "conv5", "head"])
def test_only_what_is_trained_changes(model, batch, trainable):
    config = base.get_config().model
    config.trainable = trainable
    stages = trained_stages(config)
    before = _state(model, stages)
    after, _ = _step(model, batch_stats_in=frozenset(stages))(before, batch)
    params_before = {**before.frozen, **before.params}
    params_after = {**after.frozen, **after.params}
    for stage in params_before:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(params_before[stage]),
                jax.tree.leaves(params_after[stage]),
                strict=True,
            )
        )
        assert same == (stage not in stages), stage
    for stage in before.batch_stats:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(before.batch_stats[stage]),
                jax.tree.leaves(after.batch_stats[stage]),
                strict=True,
            )
        )
        assert same == (stage not in stages), stage
    moments = jax.tree_util.tree_leaves_with_path(after.opt_state)
    touched = {k.key for path, _ in moments for k in path if hasattr(k, "key")} & set(STAGES)
    assert touched == set(stages) - {"pool"}


def test_a_conv_bias_under_batch_statistics_stays_exactly_put(model, batch):
    """It cancels; Keras's rounding noise, which Adam turns into steps, is not there."""
    after, _ = _step(model, batch_stats_in=frozenset(STAGES))(_state(model, STAGES), batch)
    bias = after.params["conv2"]["block1"]["unit1"]["conv"]["bias"]
    np.testing.assert_array_equal(bias, 0.0)


@pytest.mark.parametrize(("trainable", "stop"), [("head", "pool"), ("conv5", "conv4")])
def test_cached_inputs_give_the_same_step(model, batch, trainable, stop):
    config = base.get_config().model
    config.trainable = trainable
    stages = trained_stages(config)
    kwargs = {"batch_stats_in": frozenset(stages)}
    whole, loss = _step(model, **kwargs)(_state(model, stages), batch)
    features = make_eval_step(model[0], "unit", stop=stop)(model[1], model[2], batch["image"])
    cached, cached_loss = _step(model, start=stages[0], **kwargs)(
        _state(model, stages), {**batch, "image": features}
    )
    np.testing.assert_allclose(float(loss), float(cached_loss), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_dropout_and_augmentation_follow_seed_and_step(model, batch):
    step = _step(model, augment=Augment(flip=True, shift=0.1))
    start = _state(model, STAGES)
    _, loss = step(start, batch)
    assert float(step(start, batch)[1]) == float(loss)
    later = dataclasses.replace(start, step=start.step + 1)
    assert float(step(later, batch)[1]) != float(loss)


def test_training_learns(batch):
    """Eight images, forty steps, no dropout: anything but a broken gradient fits them."""
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = "resnet14_small", 64, 0.0
    model = create_model(config, 4, seed=0)
    step = _step(model, batch_stats_in=frozenset(STAGES))
    state = _state(model, STAGES)
    losses = []
    for _ in range(40):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
