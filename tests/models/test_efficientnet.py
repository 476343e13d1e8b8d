"""Judges: `keras.applications.EfficientNetB0` to B3; Lite0 and Lite2 of Keras's layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from keras_judge import keras

from covid_flax.models import MODELS, create_model
from covid_flax.pretrained.load import load_weights
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")

SKIPPED = ("rescaling", "normalization")


def random_arrays(network, seed=0):
    """Fills Keras's network, returns its arrays by name."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for layer in network.layers:
        if not layer.weights or layer.name.startswith(SKIPPED):
            continue
        for variable in layer.weights:
            shape, name = variable.shape, variable.name
            if "kernel" in name:
                fan_in = np.prod(shape[:2] if "dwconv" in layer.name else shape[:-1])
                value = rng.normal(size=shape) * np.sqrt(2 / fan_in)
            elif name in ("gamma", "moving_variance"):
                value = rng.uniform(0.6, 1.4, shape)
                if name == "gamma" and "project" in layer.name:
                    value *= 0.3  # else sums grow from block to block, and ReLU6 hides most
            else:
                value = 0.3 * rng.normal(size=shape)
            variable.assign(value.astype(np.float32))
            arrays[f"{layer.name}/{name}"] = value.astype(np.float32)
    return arrays


def ours(name, arrays):
    config = base.get_config().model
    with config.unlocked():
        config.update(name=name, hidden_units=0)
    graph, params, stats = create_model(config, 4, 0)
    params, stats, report = load_weights(arrays, params, stats, source="keras")
    assert len(report.loaded) == len(arrays)
    assert set(report.initialised) == {"predictions/kernel", "predictions/bias"}
    return graph, params, stats


@jax.jit
def by_stage(graph_state, x):
    """Every stage's output, each computed from the one before; and the whole network's."""
    model = nnx.merge(*graph_state)
    outputs, y = {}, x
    for stage in model.spec.stages:
        outputs[stage] = y = model(y, start=stage, stop=stage)
    return outputs, model(x)


LITE = {  # repeats and outputs of every stage
    "Lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "Lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


def lite(kind, size):
    """EfficientNet-Lite (TensorFlow's `efficientnet_lite_builder`): no squeeze, no swish."""
    layers = keras.layers

    def bn_relu6(x, name):
        return layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3, name=name)(x))

    def conv(x, filters, kernel, stride, name):
        return layers.Conv2D(filters, kernel, stride, "same", use_bias=False, name=name)(x)

    x = inputs = keras.Input((size, size, 3))
    x = bn_relu6(conv(x, 32, 3, 2, "stem_conv"), "stem_bn")
    shapes = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
    stages = zip(*LITE[kind], shapes, strict=True)
    for i, (repeats, filters, (kernel, stride, expand)) in enumerate(stages, 1):
        for letter in "abcde"[:repeats]:
            name, stride = f"block{i}{letter}", stride if letter == "a" else 1
            y = x
            if expand != 1:
                y = conv(y, expand * x.shape[-1], 1, 1, f"{name}_expand_conv")
                y = bn_relu6(y, f"{name}_expand_bn")
            y = layers.DepthwiseConv2D(
                kernel, stride, "same", use_bias=False, name=f"{name}_dwconv"
            )(y)
            y = conv(bn_relu6(y, f"{name}_bn"), filters, 1, 1, f"{name}_project_conv")
            y = layers.BatchNormalization(epsilon=1e-3, name=f"{name}_project_bn")(y)
            x = layers.Add(name=f"{name}_add")([x, y]) if letter != "a" else y
    x = bn_relu6(conv(x, 1280, 1, 1, "top_conv"), "top_bn")
    return keras.Model(inputs, x)


def keras_s(kind, size):
    network = getattr(keras.applications, f"EfficientNet{kind}")
    return network(weights=None, include_top=False, input_shape=(size, size, 3))


@pytest.mark.parametrize(
    "name, kind, make",
    [
        ("efficientnet_b0", "B0", keras_s),
        pytest.param("efficientnet_b1", "B1", keras_s, marks=pytest.mark.slow),
        pytest.param("efficientnet_b2", "B2", keras_s, marks=pytest.mark.slow),
        pytest.param("efficientnet_b3", "B3", keras_s, marks=pytest.mark.slow),
        # Its package's own network judges it in test_lite.py.
        pytest.param("efficientnet_lite0", "Lite0", lite, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite2", "Lite2", lite, marks=pytest.mark.slow),
    ],
)
def test_every_stage_is_keras_s(name, kind, make):
    network = make(kind, 64)
    arrays = random_arrays(network)
    graph, params, stats = ours(name, arrays)
    head = 4 * (params["head"]["predictions"]["kernel"].shape[0] + 1)
    count = sum(x.size for x in jax.tree.leaves((params, stats)))
    normalisation = 0 if make is lite else 7  # Keras's of pixels
    assert count - head == network.count_params() - normalisation

    rng = np.random.default_rng(1)
    images = rng.uniform(0, 255, (2, 64, 64, 3)).astype(np.float32) * (1.0, 0.5, 0.8)
    x = (images / 255.0).astype(np.float32)
    # An untrained `Normalization` leaves pixels as they are.
    judged_input = x if make is lite else images
    stages = [stage for stage in MODELS[name].stages if stage not in ("stem", "pool", "head")]
    ends = {stage: [n.name for n in network.layers if n.name.startswith(stage)] for stage in stages}
    outputs = [network.get_layer(ends[stage][-1]).output for stage in stages[:-1]]
    judge = keras.Model(network.input, [*outputs, network.output])
    want = dict(zip(stages, judge.predict_on_batch(judged_input), strict=True))
    got, whole = by_stage((graph, params, stats), x)
    assert set(got) == {"stem", *stages, "pool", "head"}
    for stage, judged in want.items():
        scale = np.abs(judged).max()
        assert 0 < scale < 1e6
        assert np.abs(got[stage] - judged).max() <= 1e-5 * scale, stage
    np.testing.assert_allclose(whole, got["head"], rtol=1e-5, atol=1e-6)


def test_training_is_keras_s():
    """Lite0's first blocks by batch statistics: output, running statistics and all gradients."""
    whole = lite("Lite0", 48)
    graph, params, stats = ours("efficientnet_lite0", random_arrays(whole))
    judge = keras.Model(whole.input, whole.get_layer("block2b_add").output)
    rng = np.random.default_rng(2)
    images = rng.uniform(0, 1, (4, 48, 48, 3)).astype(np.float32)
    stages = ("stem", "block1", "block2")

    def keras_loss(trainable, fixed, direction):
        y, fixed = judge.stateless_call(trainable, fixed, images, training=True)
        return jnp.sum(y * direction), (y, fixed)

    def our_loss(params, direction):
        model = nnx.merge(graph, params, stats, copy=True)
        y = model(images, stop="block2", batch_stats_in=stages)
        return jnp.sum(y * direction), (y, nnx.state(model, nnx.BatchStat))

    direction = rng.normal(size=(4, 12, 12, 24)).astype(np.float32)
    trainable, fixed = ([v.value for v in v] for v in variables(judge))
    grad = jax.jit(jax.value_and_grad(keras_loss, has_aux=True))
    (_, (want, moved)), slopes = grad(trainable, fixed, direction)
    (_, (got, our_stats)), our_slopes = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(
        params, direction
    )
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

    names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    compared = 0
    ways = (slopes, our_slopes, 1e-4), (moved, our_stats, 1e-5)
    for judged, (values, tree, tolerance) in zip(variables(judge), ways, strict=True):
        for variable, value in zip(judged, values, strict=True):
            layer, name = variable.path.split("/")
            place = tree[layer.split("_")[0].rstrip("ab")][layer][names.get(name, name)]
            error = np.abs(np.asarray(place[...]) - value).max()
            # At least 1: what the next batch norm subtracts has a gradient of rounding alone.
            assert error <= tolerance * max(np.abs(value).max(), 1), variable.path
            compared += 1
    assert compared == 9 * (3 + 2)  # nine convolutions, and as many batch norms


def variables(network):
    return network.trainable_variables, network.non_trainable_variables
