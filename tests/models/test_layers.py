"""Batch norm's corners and across devices; dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from covid_flax.models import layers

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


def test_dropout_keeps_its_share_and_the_expectation():
    x = jnp.ones((100, 1000))
    y = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(np.mean(y == 0) - 0.25) < 0.01
    assert layers.dropout(x, 0.25, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x
