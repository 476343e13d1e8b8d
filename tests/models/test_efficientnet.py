"""Judges: `keras.applications.EfficientNetB0` and B1, every array random, stage by stage."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from keras_judge import keras

from covid_flax.models import MODELS, EfficientNet, create_model
from covid_flax.pretrained.load import load_weights
from ml_collections_configs import base

# By our stage, the layer of Keras whose output it is.
KERAS_STAGES = {
    "stem": "stem_activation",
    "block1": "block1a_project_bn",
    "block2": "block2b_add",
    "block5": "block5c_add",
    "block6": "block6d_add",
    "block7": "block7a_project_bn",
    "top": "top_activation",
}
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


@pytest.mark.parametrize(
    "name, kind",
    [
        ("efficientnet_b0", "B0"),
        pytest.param("efficientnet_b2", "B2", marks=pytest.mark.slow),
    ],
)
def test_every_stage_is_keras_s(name, kind):
    network = getattr(keras.applications, f"EfficientNet{kind}")(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    arrays = random_arrays(network)
    graph, params, stats = ours(name, arrays)
    head = 4 * (params["head"]["predictions"]["kernel"].shape[0] + 1)
    count = sum(x.size for x in jax.tree.leaves((params, stats)))
    assert count - head == network.count_params() - 7  # its normalisation of pixels

    rng = np.random.default_rng(1)
    images = rng.uniform(0, 255, (2, 64, 64, 3)).astype(np.float32) * (1.0, 0.5, 0.8)
    x = images / 255.0  # an untrained `Normalization` leaves pixels as they are
    last = {"block2": "b", "block3": "b", "block4": "c", "block5": "c", "block6": "d"}
    if kind == "B2":
        last = {"block2": "c", "block3": "c", "block4": "d", "block5": "d", "block6": "e"}
    outputs = {
        stage: f"{stage}{last[stage]}_add" if stage in last else layer
        for stage, layer in KERAS_STAGES.items()
        if not (kind == "B2" and stage in ("block1", "block7"))
    }
    judge = keras.Model(network.input, [network.get_layer(n).output for n in outputs.values()])
    want = dict(zip(outputs, judge.predict_on_batch(images), strict=True))
    got, whole = by_stage((graph, params, stats), x.astype(np.float32))
    for stage, judged in want.items():
        scale = np.abs(judged).max()
        assert 0 < scale < 1e6
        assert np.abs(got[stage] - judged).max() <= 1e-5 * scale, stage
    np.testing.assert_allclose(whole, got["head"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["B1", "B3"])
def test_as_many_parameters_as_keras_s(kind):
    network = getattr(keras.applications, f"EfficientNet{kind}")(weights=None, include_top=False)
    spec = MODELS[f"efficientnet_{kind.lower()}"]
    model = nnx.eval_shape(lambda: EfficientNet(spec, num_classes=4, rngs=nnx.Rngs(0)))
    named = {p: v.shape for p, v in nnx.to_flat_state(nnx.state(model)) if p[0] != "head"}
    want = {
        (layer.name, w.name): w.shape
        for layer in network.layers
        for w in layer.weights
        if not layer.name.startswith(SKIPPED)
    }
    assert len(named) == len(want)
    assert {p[1]: None for p in named} == {layer: None for layer, _ in want}
    assert sum(map(np.prod, named.values())) == sum(map(np.prod, want.values()))


def test_training_uses_and_moves_batch_statistics_as_keras_does():
    network = keras.applications.EfficientNetB0(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    graph, params, stats = ours("efficientnet_b0", random_arrays(network))
    images = np.random.default_rng(2).uniform(0, 1, (4, 64, 64, 3)).astype(np.float32)
    stem = keras.Model(
        network.get_layer("stem_conv_pad").input, network.get_layer("block1a_activation").output
    )
    want = stem(images, training=True)
    model = nnx.merge(graph, params, stats)
    block1 = model(
        model(images, stop="stem", batch_stats_in=("stem",)),
        start="block1",
        stop="block1",
        batch_stats_in=("block1",),
    )
    assert np.isfinite(block1).all() and np.isfinite(np.asarray(want)).all()
    for place, layer in (("stem", "stem_bn"), ("block1", "block1a_bn")):
        bn, judge = getattr(getattr(model, place), layer), network.get_layer(layer)
        np.testing.assert_allclose(bn.mean[...], np.asarray(judge.moving_mean), atol=1e-5)
        np.testing.assert_allclose(bn.var[...], np.asarray(judge.moving_variance), rtol=1e-5)
