"""Judge: `keras.applications.DenseNet121`, every array random, stage by stage."""

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

KERAS_STAGES = {
    "stem": "pool1",
    "block1": "pool2_pool",
    "block2": "pool3_pool",
    "block3": "pool4_pool",
    "block4": "conv5_block16_concat",
    "top": "relu",
}


@jax.jit
def by_stage(graph_state, x):
    """Every stage's output, each computed from the one before; and the whole network's."""
    model = nnx.merge(*graph_state)
    outputs, y = {}, x
    for stage in model.spec.stages:
        outputs[stage] = y = model(y, start=stage, stop=stage)
    return outputs, model(x)


def test_every_stage_is_keras_s():
    network = keras.applications.DenseNet121(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    epsilons = {layer.epsilon for layer in network.layers if hasattr(layer, "epsilon")}
    assert epsilons == {MODELS["densenet121"].epsilon}
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in network.layers:
        for variable in layer.weights:
            shape, name = variable.shape, variable.name
            if name == "kernel":
                value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
            elif name in ("gamma", "moving_variance"):
                value = rng.uniform(0.6, 1.4, shape)
            else:
                value = 0.3 * rng.normal(size=shape)
            variable.assign(value.astype(np.float32))
            arrays[f"{layer.name}/{name}"] = value.astype(np.float32)
    config = base.get_config().model
    with config.unlocked():
        config.update(name="densenet121", hidden_units=0)
    graph, params, stats = create_model(config, 4, 0)
    params, stats, report = load_weights(arrays, params, stats, source="keras")
    assert len(report.loaded) == len(arrays)
    count = sum(x.size for x in jax.tree.leaves((params, stats)))
    assert count - 4 * (1024 + 1) == network.count_params()
    assert set(report.initialised) == {"predictions/kernel", "predictions/bias"}

    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32) * (1.0, 0.5, 2.0)
    images = images.astype(np.float32)
    outputs = [network.get_layer(layer).output for layer in KERAS_STAGES.values()]
    want = keras.Model(network.input, outputs).predict_on_batch(images)
    got, whole = by_stage((graph, params, stats), images)
    for stage, judged in zip(KERAS_STAGES, want, strict=True):
        scale = np.abs(judged).max()
        assert 0 < scale < 1e6
        assert np.abs(got[stage] - judged).max() <= 1e-5 * scale, stage
    np.testing.assert_allclose(whole, got["head"], rtol=1e-5, atol=1e-6)
