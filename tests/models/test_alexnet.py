"""Judges: the network in Keras with the same arrays, and published counts."""

import dataclasses
import math

import by_path
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from keras import layers as kl
from keras_judge import keras

from covid_flax import config as config_lib
from covid_flax.data import phantoms
from covid_flax.errors import UserError
from covid_flax.models import MODELS, AlexNet
from covid_flax.step import StepConfig, create_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5", "pool", "head")
# The convolutions are all there; the dense layers are narrow, for the test's time.
NARROW = dataclasses.replace(MODELS["alexnet"], hidden_units=(24, 20))


def keras_alexnet(size, grid, classes=4):
    """One tower, its layers named by our attribute paths; `<stage>_out` ends a stage."""

    def conv(name, channels, kernel, pooled, **kw):
        layer = kl.Conv2D(channels, kernel, activation="relu", name=name, **kw)
        last = kl.MaxPooling2D(3, 2) if pooled else kl.Activation("linear")
        last.name = f"{name}_out"
        return [layer, last]

    model = keras.Sequential(
        [
            keras.Input((size, size, 3)),
            kl.ZeroPadding2D(2),
            *conv("conv1", 64, 11, True, strides=4),
            *conv("conv2", 192, 5, True, padding="same"),
            *conv("conv3", 384, 3, False, padding="same"),
            *conv("conv4", 256, 3, False, padding="same"),
            *conv("conv5", 256, 3, True, padding="same"),
            kl.AdaptiveAveragePooling2D(grid),
            kl.Flatten(name="pool_out"),
            kl.Dense(24, activation="relu", name="head.hidden1"),
            kl.Dropout(0.5),
            kl.Dense(20, activation="relu", name="head.hidden2"),
            kl.Dropout(0.5),
            kl.Dense(classes, name="head.predictions"),
        ]
    )
    rng = np.random.default_rng(0)
    for layer in model.layers:
        for variable in layer.variables:
            if variable.name in ("kernel", "bias"):
                fan_in = math.prod(variable.shape[:-1]) or 100
                value = rng.normal(size=variable.shape) * math.sqrt(2 / fan_in)
                variable.assign(value.astype(np.float32))
    return model


def copied(keras_model, spec, **kw):
    model = AlexNet(spec, num_classes=4, rngs=nnx.Rngs(0), **kw)
    for layer in keras_model.layers:
        for variable in layer.variables:
            if variable.name in ("kernel", "bias"):
                target = model
                for part in (*layer.name.split("."), variable.name):
                    target = getattr(target, part)
                assert target[...].shape == variable.shape
                target[...] = jnp.asarray(variable.value)
    return model


@pytest.mark.parametrize(("size", "grid"), [pytest.param(63, 6, marks=pytest.mark.slow), (130, 2)])
def test_every_stage_is_keras_s(size, grid):
    judge = keras_alexnet(size, grid)
    names = [f"{s}_out" for s in STAGES[:-1]] + ["head.predictions"]
    judge_stages = keras.Model(judge.inputs[0], [judge.get_layer(n).output for n in names])
    x = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    want = judge_stages.predict_on_batch(x)
    model = copied(judge, dataclasses.replace(NARROW, grid=grid))
    got = every_stage(nnx.split(model), jnp.asarray(x))
    for stage, ours, theirs in zip(STAGES, got, want, strict=True):
        scale = np.abs(theirs).max()
        assert 0.01 < scale < 1000, f"{stage}: a poor judge, largest {scale}"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale, err_msg=stage)


@jax.jit
def every_stage(graph_state, x):
    """Each computed from the one before; the last the logits in one go."""
    model = nnx.merge(*graph_state)
    outputs, given = [], x
    for stage in STAGES[:-1]:
        given = model(given, start=stage, stop=stage)
        outputs.append(given)
    return [*outputs, model(x)]


def test_dropout_is_keras_s_in_both_places():
    """Mean and spread of the logits over many draws, and both layers' own dropout."""
    judge = keras_alexnet(63, 6)
    model = copied(judge, NARROW)
    features = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9216)), jnp.float32)
    n = 4000
    keys = jax.random.split(jax.random.key(0), n)
    run = jax.jit(jax.vmap(lambda key: model(features, start="head", dropout_key=key)[0]))
    ours = run(keys)
    x = jnp.broadcast_to(features, (n, 9216))
    after = [layer.name for layer in judge.layers].index("pool_out") + 1
    for layer in judge.layers[after:]:
        x = layer(x, training=True) if isinstance(layer, kl.Dropout) else layer(x)
    error = np.sqrt(np.var(ours, 0) / n + np.var(x, 0) / n)
    np.testing.assert_array_less(np.abs(np.mean(ours, 0) - np.mean(x, 0)), 5 * error)
    np.testing.assert_allclose(np.std(ours, 0), np.std(x, 0), rtol=0.1)
    none = copied(judge, NARROW, dropout_rate=0.0)(features, start="head", dropout_key=keys[0])
    np.testing.assert_array_equal(none, model(features, start="head"))


def test_parameter_counts():
    def count(name, classes):
        make = lambda: AlexNet(MODELS[name], num_classes=classes, rngs=nnx.Rngs(0))  # noqa: E731
        leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param))
        return sum(math.prod(x.shape) for x in leaves)

    assert count("alexnet", 1000) == 61_100_840  # as torchvision states for its AlexNet
    # 33,554,432 fewer: the first dense layer takes 2 x 2 x 256, not 6 x 6 x 256.
    assert count("alexnet_small", 1000) == 27_546_408


def test_half_precision():
    spec = dataclasses.replace(NARROW, channels=(8, 8, 8, 8, 8), hidden_units=(16, 16), grid=1)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 63, 63, 3)), jnp.float32)

    def run(dtype, stop):
        model = AlexNet(spec, num_classes=4, dtype=dtype, rngs=nnx.Rngs(0))
        return jax.jit(lambda x: model(x, stop=stop))(x)

    assert run(jnp.bfloat16, "conv5").dtype == jnp.bfloat16
    want, got = run(jnp.float32, "head"), run(jnp.bfloat16, "head")
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.slow
def test_loss_falls_on_phantoms():
    spec = dataclasses.replace(NARROW, channels=(8, 16, 16, 16, 16), hidden_units=(64, 64), grid=2)
    images, labels = phantoms_array(6, 64)
    model = AlexNet(spec, num_classes=4, dropout_rate=0.2, rngs=nnx.Rngs(0))
    graphdef, params, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    tx = optax.adam(2e-3)
    state = create_state(nnx.to_pure_dict(params), {}, frozenset(STAGES), tx, seed=0)
    step = jax.jit(make_train_step(graphdef, tx, StepConfig("torch")))
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    losses = []
    for _ in range(60):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(4), abs=0.3)
    assert np.mean(losses[-5:]) < 0.6 * losses[0], losses


def phantoms_array(per_class, size):
    images, labels = [], []
    for label, name in enumerate(phantoms.CLASSES):
        for i in range(per_class):
            grey = phantoms.draw(name, seed=i, size=size)
            images.append(np.repeat(grey[..., None], 3, -1))
            labels.append(label)
    return np.stack(images), np.array(labels, np.int32)


def test_the_configuration_file_and_what_is_refused():
    config = by_path.load("configs/alexnet.py").get_config()
    config_lib.check(config)
    for stage in STAGES[1:5]:
        config.model.trainable = stage
        config_lib.check(config)
    config.data.image_size = 62
    with pytest.raises(UserError, match="config.data.image_size=62: alexnet_small takes .* 63"):
        config_lib.check(config)
