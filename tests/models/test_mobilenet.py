"""Judges: `keras.applications`' MobileNetV2, V3Small and V3Large, every array random, by stage."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from keras_judge import keras

from covid_flax.models import MODELS, create_model
from covid_flax.pretrained.load import load_weights
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")

# By our stage, the layer of Keras whose output it is; where a stage ends in no addition, its
# last batch norm.
KERAS_STAGES = {
    "mobilenet_v2": {
        "stem": "Conv1_relu",
        "block1": "expanded_conv_project_BN",
        "block2": "block_2_add",
        "block3": "block_5_add",
        "block4": "block_9_add",
        "block5": "block_12_add",
        "block6": "block_15_add",
        "block7": "block_16_project_BN",
        "top": "out_relu",
    },
    "mobilenet_v3_small": {
        "block1": "expanded_conv_project_bn",
        "block2": "expanded_conv_2_add",
        "block3": "expanded_conv_5_add",
        "block4": "expanded_conv_7_add",
        "block5": "expanded_conv_10_add",
    },
    "mobilenet_v3_large": {
        "block1": "expanded_conv_add",
        "block2": "expanded_conv_2_add",
        "block3": "expanded_conv_5_add",
        "block4": "expanded_conv_9_add",
        "block5": "expanded_conv_11_add",
        "block6": "expanded_conv_14_add",
    },
}
KERAS = {
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_small": "MobileNetV3Small",
    "mobilenet_v3_large": "MobileNetV3Large",
}


def random_arrays(network, seed=0):
    """Fills Keras's network, returns its arrays by name."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for layer in network.layers:
        for variable in layer.weights:
            shape, name = variable.shape, variable.name
            if "kernel" in name:
                fan_in = np.prod(shape[:2] if layer.name.endswith("depthwise") else shape[:-1])
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


@jax.jit
def by_stage(graph_state, x):
    """Every stage's output, each computed from the one before; and the whole network's."""
    model = nnx.merge(*graph_state)
    outputs, y = {}, x
    for stage in model.spec.stages:
        outputs[stage] = y = model(y, start=stage, stop=stage)
    return outputs, model(x)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        "mobilenet_v3_small",
        pytest.param("mobilenet_v3_large", marks=pytest.mark.slow),
    ],
)
def test_every_stage_is_keras_s(name):
    network = getattr(keras.applications, KERAS[name])(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    arrays = random_arrays(network)
    config = base.get_config().model
    with config.unlocked():
        config.update(name=name, hidden_units=0)
    graph, params, stats = create_model(config, 4, 0)
    params, stats, report = load_weights(arrays, params, stats, source="keras")
    assert len(report.loaded) == len(arrays)
    count = sum(x.size for x in jax.tree.leaves((params, stats)))
    assert count - 4 * (network.output.shape[-1] + 1) == network.count_params()
    assert set(report.initialised) == {"predictions/kernel", "predictions/bias"}

    rng = np.random.default_rng(1)
    images = rng.uniform(0, 255, (2, 64, 64, 3)).astype(np.float32) * (1.0, 0.5, 0.8)
    scaled = (images / 127.5 - 1).astype(np.float32)
    # V3 scales pixels itself.
    layers = KERAS_STAGES[name]
    outputs = [network.get_layer(layer).output for layer in layers.values()]
    judge = keras.Model(network.input, [*outputs, network.output])
    *want, last = judge.predict_on_batch(scaled if name == "mobilenet_v2" else images)
    got, whole = by_stage((graph, params, stats), scaled)
    for stage, judged in [*zip(layers, want, strict=True), ("top", last)]:
        scale = np.abs(judged).max()
        assert 0 < scale < 1e6
        assert np.abs(got[stage] - judged).max() <= 1e-5 * scale, stage
    np.testing.assert_allclose(whole, got["head"], rtol=1e-5, atol=1e-6)
    assert set(MODELS[name].stages) == set(got)


@pytest.mark.slow
def test_training_uses_and_moves_batch_statistics_as_keras_does():
    name = "mobilenet_v3_small"
    network = keras.applications.MobileNetV3Small(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    arrays = random_arrays(network)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5  # nearer to one, rounding hides what the batch adds
    config = base.get_config().model
    with config.unlocked():
        config.update(name=name, hidden_units=0, bn_momentum=0.5)
    graph, params, stats = create_model(config, 4, 0)
    params, stats, _ = load_weights(arrays, params, stats, source="keras")

    images = np.random.default_rng(1).uniform(0, 255, (4, 64, 64, 3)).astype(np.float32)
    trainable = [v.value for v in network.trainable_variables]
    fixed = [v.value for v in network.non_trainable_variables]

    @jax.jit
    def judge(trainable, fixed, images):
        return network.stateless_call(trainable, fixed, images, training=True)

    @jax.jit
    def train(params, stats, images):
        model = nnx.merge(graph, params, stats, copy=True)
        output = model(images, stop="top", batch_stats_in=MODELS[name].stages)
        return output, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    want, fixed = judge(trainable, fixed, images)
    got, moved = train(params, stats, images / np.float32(127.5) - 1)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    layers = {layer: new for stage in moved.values() for layer, new in stage.items()}
    ends = {"moving_mean": "mean", "moving_variance": "var"}
    checked = 0
    for variable, new in zip(network.non_trainable_variables, fixed, strict=True):
        layer, end = variable.path.split("/")
        value = layers[layer][ends[end]]
        assert not np.array_equal(value, variable.value), variable.path
        assert np.abs(value - new).max() <= 1e-5 * np.abs(new).max(), variable.path
        checked += 1
    assert checked == len(jax.tree.leaves(stats))
