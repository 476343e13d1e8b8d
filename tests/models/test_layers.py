"""Batch norm's corners and across devices; dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from keras_judge import keras

from covid_flax import augment
from covid_flax.models import MODELS, blocks, create_model, expand, layers, own_shares
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")


def conv_bn(size=3, epsilon=1e-5):
    layer = layers.ConvBN(
        3,
        4,
        size,
        use_bias=True,
        epsilon=epsilon,
        momentum=0.9,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    layer.conv.bias[...] = jnp.arange(4.0)
    return nnx.split(layer)


def test_batch_statistics_survive_a_mean_far_above_the_deviation():
    layer = nnx.merge(*conv_bn(size=1, epsilon=1e-9))
    x = 1.0 + 1e-3 * np.random.default_rng(3).normal(size=(8, 6, 6, 3)).astype(np.float32)
    y = x.astype(np.float64) @ np.asarray(layer.conv.kernel[0, 0], np.float64)
    layer.bn.mean[...] = jnp.asarray(y.mean((0, 1, 2)) + np.arange(4) + 0.01, jnp.float32)
    got = layer(jnp.asarray(x), use_batch_stats=True)
    want = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-9)
    np.testing.assert_allclose(got, want, atol=3e-3)  # float32 holds y itself to 1e-4 of it


def test_the_bias_before_batch_statistics_has_exactly_no_gradient():
    graph, state = conv_bn()
    x = jax.random.normal(jax.random.key(1), (4, 5, 5, 3))

    def loss(params, rest, x):
        return jnp.sum(nnx.merge(graph, params, rest, copy=True)(x, use_batch_stats=True) ** 3)

    params, rest = state.split(nnx.Param, ...)
    grads = jax.jit(jax.grad(loss))(params, rest, x)
    assert not np.any(grads["conv"]["bias"][...])
    assert np.any(grads["conv"]["kernel"][...])


def test_statistics_over_a_mapped_axis_equal_those_of_the_whole_batch():
    graph, state = conv_bn()
    x = jax.random.normal(jax.random.key(2), (6, 5, 5, 3)) * jnp.arange(1, 7)[:, None, None, None]

    def apply(x, axis_name=None):
        layer = nnx.merge(graph, state, copy=True)
        y = layer(x, use_batch_stats=True, axis_name=axis_name)
        return y, layer.bn.mean[...], layer.bn.var[...]

    y, mean, var = jax.jit(apply)(x)
    mapped = jax.vmap(lambda x: apply(x, "devices"), axis_name="devices")
    parts = jax.jit(mapped)(x.reshape(3, 2, 5, 5, 3))
    np.testing.assert_allclose(parts[0].reshape(y.shape), y, atol=1e-5)
    for part in range(3):
        np.testing.assert_allclose(parts[1][part], mean, atol=1e-6)
        np.testing.assert_allclose(parts[2][part], var, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "tolerance"),
    [((2048, 1024), 0.01), ((1024, 4), 0.03), ((7, 7, 3, 64), 0.03), ((3, 3, 128, 1), 0.06)],
)
def test_kernels_are_drawn_as_keras_draws_them(shape, tolerance):
    keras = pytest.importorskip("keras")
    want = np.asarray(keras.initializers.GlorotUniform(seed=0)(shape))
    got = np.asarray(layers.glorot_uniform(nnx.Rngs(0), shape))
    assert got.dtype == np.float32 and abs(got.mean()) < tolerance * got.std()
    assert got.std() == pytest.approx(want.std(), rel=tolerance)
    assert np.abs(got).max() == pytest.approx(np.abs(want).max(), rel=tolerance)


def test_drawing_needs_no_device_of_the_host_s(monkeypatch):
    """JAX has none where JAX_PLATFORMS names the accelerator alone; callbacks want one."""

    def none(*args, **kwargs):
        raise RuntimeError("failed to find a local CPU device")

    monkeypatch.setattr(jax, "pure_callback", none)
    drawn = layers.Dense(3, 4, rngs=nnx.Rngs(0)).kernel[...]
    monkeypatch.undo()
    alike = jax.eval_shape(lambda: layers.Dense(3, 4, rngs=nnx.Rngs(0)).kernel[...])
    assert (alike.shape, alike.dtype) == (drawn.shape, drawn.dtype)


def test_layers_of_no_weights_begin_at_keras_s_values():
    layer = layers.ConvBN(
        3, 4, 3, use_bias=True, epsilon=1e-3, momentum=0.9, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    dense = layers.Dense(3, 4, rngs=nnx.Rngs(0))
    for zero in (layer.conv.bias, layer.bn.bias, layer.bn.mean, dense.bias):
        assert not np.any(zero[...])
    for one in (layer.bn.scale, layer.bn.var):
        assert np.all(one[...] == 1)


@pytest.mark.parametrize("epsilon", [1e-3, 1.001e-5])
def test_a_channel_without_variance_shows_the_epsilon(epsilon):
    """At variances of about one a wrong epsilon is lost among rounding errors."""
    layer = nnx.merge(*conv_bn(size=1, epsilon=epsilon))
    layer.bn.var[...] = jnp.zeros(4)
    x = np.random.default_rng(4).normal(size=(2, 3, 3, 3)).astype(np.float32)
    y = x.astype(np.float64) @ np.asarray(layer.conv.kernel[0, 0], np.float64) + np.arange(4)
    got = layer(jnp.asarray(x), use_batch_stats=False)
    np.testing.assert_allclose(got, y / np.sqrt(epsilon), rtol=1e-4, atol=1e-3)


def test_statistics_of_unequal_shares_are_those_of_the_real_examples():
    """Four on one device and one on the other, weighted as a step weighs them."""
    graph, state = conv_bn()
    x = jax.random.normal(jax.random.key(3), (8, 5, 5, 3)) * jnp.arange(1, 9)[:, None, None, None]
    weights = jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0]], jnp.float32) / 2.5  # of a mean of 2.5

    def apply(x, weights=None, axis_name=None):
        layer = nnx.merge(graph, state, copy=True)
        layer(x, use_batch_stats=True, example_weights=weights, axis_name=axis_name)
        return layer.bn.mean[...], layer.bn.var[...]

    want = apply(x[:5])
    mapped = jax.vmap(lambda x, w: apply(x, w, "devices"), axis_name="devices")
    got = mapped(x.reshape(2, 4, 5, 5, 3), weights)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, np.broadcast_to(w, g.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 64])
def test_a_head_drops_out_before_its_last_layer_alone(hidden):
    """As Dense, ReLU, Dropout, Dense of the paper: by units that the last layer passes on."""
    head = layers.Head(64, 64, hidden_units=hidden, dropout_rate=0.4, rngs=nnx.Rngs(0))
    for dense in filter(None, (head.hidden, head.predictions)):
        dense.kernel[...] = jnp.eye(64)
    x = jnp.linspace(-1, 2, 64)[None].repeat(500, 0)
    want = jnp.maximum(x, 0) if hidden else x
    np.testing.assert_allclose(head(x, None), want, atol=1e-6)
    kept = np.asarray(head(x, jax.random.key(0))) / np.where(want == 0, 1, want)
    kept = kept[np.asarray(want) != 0]
    assert set(np.unique(kept.round(4))) == {0, np.float32(1 / 0.6).round(4)}
    assert (kept > 0).mean() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("name", ["efficientnet_lite0_small", "mobilenet_v3_small", "densenet121"])
def test_a_light_network_drops_out(name):
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = name, 0, 0.4
    graph, params, stats = create_model(config, 4, 0)
    model = nnx.merge(graph, params, stats)
    kernel = np.asarray(params["head"]["predictions"]["kernel"], np.float64)
    x = np.random.default_rng(0).normal(size=(1, len(kernel))).astype(np.float32)
    run = jax.jit(jax.vmap(lambda key: model(x, start="head", dropout_key=key)[0]))
    got = np.asarray(run(jax.random.split(jax.random.key(0), 4000)))
    deviation = np.sqrt(0.4 / 0.6 * (x[0] ** 2 @ kernel**2))
    np.testing.assert_allclose(got.std(0), deviation, rtol=0.1)
    assert np.all(abs(got.mean(0) - x[0] @ kernel) < 5 * deviation / np.sqrt(4000))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_operands_are_not_rounded_on_accelerators(platform):
    def exact(f, *shapes):
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert dots and all("[HIGHEST, HIGHEST]" in line for line in dots)

    head = layers.Dense(8, 4, rngs=nnx.Rngs(0))
    exact(head, (2, 8))
    exact(expand._dot, (4, 4), (4, 4))
    exact(lambda x: expand._moments(x, None)[1], (2, 3, 3, 4))
    narrow, wide = (2, 3, 3, 4), (24,)
    exact(lambda *a: expand.conv1x1_batch_norm(*a, 1e-3)[0], narrow, (4, 24), wide, wide)
    key = jax.random.key(0)
    exact(lambda x: augment._blur_or_sharpen(key, x, 0.5), (8, 8, 1))
    exact(lambda x: augment.stretched(x, 1.2), (2, 8, 8, 1))


def test_dropout_keeps_its_share_and_the_expectation():
    x = jnp.ones((100, 1000))
    y = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(np.mean(y == 0) - 0.25) < 0.01
    assert layers.dropout(x, 0.25, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("use_batch_stats", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_of_an_image_s_own_moments_are_keras_s_instance_norm(use_batch_stats, dtype):
    layer = layers.ConvBN(
        3, 8, 1, use_bias=True, epsilon=1e-3, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    layer.conv.bias[...], layer.bn.mean[...] = jnp.arange(8.0), jnp.full(8, 3.0)
    layer.bn.scale[...], layer.bn.bias[...] = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    layer.bn.own_share = 1.0
    x = rng.normal(size=(5, 6, 6, 3)).astype(np.float32) * np.arange(1, 6)[:, None, None, None]
    judge = keras.layers.GroupNormalization(groups=-1, epsilon=1e-3)
    y = x @ np.asarray(layer.conv.kernel[0, 0]) + np.arange(8, dtype=np.float32)
    judge.build(y.shape)
    judge.set_weights([np.asarray(layer.bn.scale[...]), np.asarray(layer.bn.bias[...])])
    got = layer(jnp.asarray(x), use_batch_stats=use_batch_stats)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.asarray(got, np.float32), judge(y), atol=tolerance)
    few = layer(jnp.asarray(x), use_batch_stats=use_batch_stats, every=2)
    np.testing.assert_allclose(few, got[:, ::2, ::2], rtol=1e-2, atol=1e-5)  # shifts moved


def test_a_share_of_own_moments_is_that_of_so_many_pixels():
    """In float64, by weights: a quarter of the pixels the image's, the others all images'."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=(3, 5, 5, 2)) * [[[[1.0]]], [[[2.0]]], [[[5.0]]]] + [30.0, -2.0]
    bn = layers.BatchNorm(2)
    bn.own_share = 0.25
    given = jnp.asarray(y, jnp.float32)
    got = bn.normalise(given, *bn.mixed(given, y.mean((0, 1, 2)), y.var((0, 1, 2))), 1e-3)
    for image, its in zip(y, got, strict=True):
        pixels = np.concatenate([image.reshape(-1, 2), y.reshape(-1, 2)])
        weights = np.repeat([0.25 / 25, 0.75 / 75], [25, 75])
        mean = np.average(pixels, 0, weights)
        var = np.average((pixels - mean) ** 2, 0, weights)
        np.testing.assert_allclose(its, (image - mean) / np.sqrt(var + 1e-3), atol=2e-4)


@pytest.mark.parametrize("use_batch_stats", [False, True])
def test_own_moments_reach_a_convolution_that_widens(use_batch_stats):
    """Which in training goes another way."""
    conv, bn = layers.Conv(2, 12, 1, use_bias=False, rngs=nnx.Rngs(0)), layers.BatchNorm(12)
    bn.own_share = 1.0
    x = np.random.default_rng(2).normal(size=(4, 8, 8, 2)) * np.arange(1, 5)[:, None, None, None]
    how = {"epsilon": 1e-6, "momentum": 0.9, "use_batch_stats": use_batch_stats}
    y = np.asarray(blocks.conv_batch_norm(conv, bn, jnp.asarray(x, jnp.float32), **how))
    np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        ("resnet14_small", "evaluation", "float32"),
        ("resnet14_small", "batch statistics", "bfloat16"),
        ("efficientnet_lite0_small", "batch statistics", "float32"),
        ("densenet121", "evaluation", "bfloat16"),
    ],
)
def test_own_moments_reach_a_network_s_first_layers(name, mode, dtype):
    """With all of them its own, what an image becomes depends on no other and no statistics."""
    config = base.get_config().model
    config.name, config.dtype = name, dtype
    graph, params, stats = create_model(config, 4, 0)
    stem = MODELS[name].stages[0]
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    x *= np.arange(1, 5)[:, None, None, None]
    batch_stats_in = (stem,) if mode == "batch statistics" else ()

    def output(share, scale):
        model = nnx.merge(graph, params, jax.tree.map(lambda s: s * scale, stats))
        layers.set_own_shares(model, {stem: share})
        return np.asarray(model(x, stop=stem, batch_stats_in=batch_stats_in), np.float32)

    np.testing.assert_allclose(output(1.0, 4.0), output(1.0, 1.0), atol=0.05)
    assert np.abs(output(1.0, 1.0) - output(0.0, 1.0)).max() > 0.5


def test_own_moments_reach_the_stages_named_alone():
    config = base.get_config()
    config.model.name, config.eval.bn_own_until = "efficientnet_lite0", "block2"
    assert own_shares(config) == {}
    config.eval.bn_own_share = 0.3
    assert own_shares(config) == {"stem": 0.3, "block1": 0.3, "block2": 0.3}
    model = nnx.merge(*create_model(config.model, 4, 0))
    layers.set_own_shares(model, own_shares(config))
    found = {
        path[0]: module.own_share
        for path, module in nnx.iter_modules(model)
        if isinstance(module, layers.BatchNorm)
    }
    rest = dict.fromkeys(("block3", "block4", "block5", "block6", "block7", "top"), 0.0)
    assert found == own_shares(config) | rest
    config.eval.bn_own_until = ""
    assert own_shares(config) == dict.fromkeys(found, 0.3)


LIGHT = ["efficientnet_lite0_small", "mobilenet_v3_small", "densenet121"]


def _light(name, **changes):
    config = base.get_config().model
    config.name, config.hidden_units = name, 0
    config.update(changes)
    return create_model(config, 4, 0)


@pytest.mark.parametrize("name", LIGHT)
def test_only_the_named_stages_of_a_light_network_use_batch_statistics(name):
    graph, params, stats = _light(name)
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    stem, stage, *_ = MODELS[name].stages
    plain = nnx.merge(graph, params, stats)(x, stop=stem)
    model = nnx.merge(graph, params, stats)
    np.testing.assert_array_equal(model(x, stop=stem, batch_stats_in=(stage,)), plain)
    model(x, stop=stage, batch_stats_in=(stage,))
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    for other in stats:
        pairs = zip(jax.tree.leaves(after[other]), jax.tree.leaves(stats[other]), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == (other != stage), other


@pytest.mark.parametrize("name", [*LIGHT, "efficientnet_b0"])
def test_half_precision_reaches_every_stage(name):
    graph, params, stats = _light(name, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    for stage in MODELS[name].stages:
        made = jax.eval_shape(lambda x, s=stage: nnx.merge(graph, params, stats)(x, stop=s), x)
        assert made.dtype == (jnp.float32 if stage in ("pool", "head") else jnp.bfloat16), stage


@pytest.mark.parametrize("name", LIGHT)
def test_statistics_move_by_the_configuration_s_momentum(name):
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    stem, moved = MODELS[name].stages[0], {}
    for momentum in (0.0, 0.25):
        graph, params, stats = _light(name, bn_momentum=momentum)
        model = nnx.merge(graph, params, stats)
        model(x, stop=stem, batch_stats_in=(stem,))
        moved[momentum] = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))[stem])
    old = jax.tree.leaves(stats[stem])
    for o, batch, got in zip(old, moved[0.0], moved[0.25], strict=True):
        np.testing.assert_allclose(got, 0.25 * o + 0.75 * batch, rtol=1e-4, atol=1e-6)
