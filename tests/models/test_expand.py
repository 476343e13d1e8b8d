"""Judges: NumPy in float64 for values, JAX's own derivative of the definition for gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from covid_flax.models import MODELS, ResNet
from covid_flax.models.blocks import batch_norm, conv_batch_norm, conv_same
from covid_flax.models.expand import conv1x1_batch_norm
from covid_flax.models.layers import BatchNorm, Conv, ConvBN
from covid_flax.models.resnet import STAGES

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPSILON = 1e-3


def definition(x, kernel, scale, bias, every, xp=np):
    y = xp.einsum("nhwi,io->nhwo", x, kernel)
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    z = (y - mean) / xp.sqrt(var + EPSILON) * scale + bias
    return z[:, ::every, ::every], mean, var


@pytest.fixture
def arrays():
    """As after a ReLU, one channel dead; scales of both signs."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(6, 5, 7, 8)) * rng.uniform(0.1, 3, 8) + 0.5, 0)
    x[..., 3] = 0
    kernel, scale, bias = rng.normal(size=(8, 32)), rng.normal(size=32), rng.normal(size=32)
    return [a.astype(np.float32) for a in (x, kernel, scale, bias)]


@pytest.mark.parametrize("every", [1, 2])
def test_values_equal_numpy(arrays, every):
    got = conv1x1_batch_norm(*arrays, EPSILON, every)
    want = definition(*(a.astype(np.float64) for a in arrays), every)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_no_digit_is_lost_where_the_mean_is_large(arrays):
    """In float32; the square of the mean is ten thousand times the variance here."""
    x, *rest = arrays
    x = x + 100 * x.std((0, 1, 2))
    got = conv1x1_batch_norm(x, *rest, EPSILON)
    want = definition(*(a.astype(np.float64) for a in (x, *rest)), 1)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6 * np.abs(want[1]).max())
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5)
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)


def test_a_rounded_kernel_leaves_no_offset(arrays):
    """Folding rounds the kernel to half precision; the mean subtracted is that of the result."""
    x, *rest = arrays
    x = jnp.asarray(x + 100 * x.std((0, 1, 2)), jnp.bfloat16)
    y, _, _ = conv1x1_batch_norm(x, *rest, EPSILON)
    means = np.asarray(y, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(means, rest[2], atol=0.02)


def test_half_precision_keeps_float32_statistics(arrays):
    x, *rest = arrays
    x = jnp.asarray(x, jnp.bfloat16)
    y, mean, var = conv1x1_batch_norm(x, *rest, EPSILON)
    want = definition(np.asarray(x, np.float64), *(a.astype(np.float64) for a in rest), 1)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, want[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(var, want[2], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want[0], atol=0.05)


def test_rounded_matrices_leave_the_gradient_no_mean(arrays):
    """Batch norm takes the mean out of what it is given: a constant there changes nothing."""
    x, *rest = arrays
    x = jnp.asarray(x + 100 * x.std((0, 1, 2)), jnp.bfloat16)
    weights = jnp.sin(jnp.arange(x.size * 4.0)).reshape(*x.shape[:3], 32) + 1

    def loss(x):
        z = conv1x1_batch_norm(x, *rest, EPSILON)[0].astype(jnp.float32)
        return jnp.sum(weights * z**2)

    g = np.asarray(jax.grad(loss)(x), np.float64)
    assert np.all(abs(g.mean((0, 1, 2))) <= 0.006 * np.sqrt((g**2).mean((0, 1, 2))) + 1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_gradients_equal_those_of_the_definition(arrays, every):
    def loss(function, xp, *arrays):
        z = function(*arrays)[0]
        return xp.sum(z**3 * xp.sin(xp.arange(z.size).reshape(z.shape)))

    args = (0, 1, 2, 3)
    ours = jax.grad(
        lambda *a: loss(lambda *a: conv1x1_batch_norm(*a, EPSILON, every), jnp, *a), args
    )
    got = jax.jit(ours)(*map(jnp.asarray, arrays))
    with jax.enable_x64(True):
        doubles = [jnp.asarray(a, jnp.float64) for a in arrays]
        judge = jax.grad(lambda *a: loss(lambda *a: definition(*a, every, jnp), jnp, *a), args)
        want = jax.jit(judge)(*doubles)
        want = [np.asarray(w) for w in want]
    for name, g, w in zip(("x", "kernel", "scale", "bias"), got, want, strict=True):
        assert g.dtype == jnp.float32 and w.dtype == np.float64
        np.testing.assert_allclose(g, w, atol=2e-5 * np.abs(w).max(), err_msg=name)


def test_parts_of_a_batch_with_shared_statistics_equal_the_whole(arrays):
    x, *rest = map(jnp.asarray, arrays)
    weights = jnp.sin(jnp.arange(x.size * 4.0)).reshape(*x.shape[:3], 32)

    def loss(x, weights, *rest, axis_name=None):
        return jnp.sum(conv1x1_batch_norm(x, *rest, EPSILON, 1, axis_name)[0] ** 2 * weights)

    grad = jax.value_and_grad(loss, (0, 2, 3, 4))
    value, (g_x, *g_rest) = jax.jit(grad)(x, weights, *rest)
    halves = [a.reshape(2, 3, *a.shape[1:]) for a in (x, weights)]
    of_parts = jax.vmap(lambda x, w: grad(x, w, *rest, axis_name="parts"), axis_name="parts")
    values, (parts_x, *parts_rest) = jax.jit(of_parts)(*halves)
    got = [jnp.sum(values), parts_x.reshape(x.shape), *(jnp.sum(g, 0) for g in parts_rest)]
    for g, w in zip(got, (value, g_x, *g_rest), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * float(jnp.abs(w).max()))


def test_light_networks_go_this_way_too():
    """In float32, mapped over parts of a batch: as the convolution and batch norm one by one."""
    rng = np.random.default_rng(4)
    layers = nnx.split((Conv(16, 96, 1, use_bias=False, rngs=nnx.Rngs(0)), BatchNorm(96)))
    how = {"epsilon": EPSILON, "momentum": 0.5, "use_batch_stats": True, "axis_name": "parts"}
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 4, 16)) + 2, jnp.float32)

    def at_once(x):
        conv, bn = nnx.merge(*layers, copy=True)
        return conv_batch_norm(conv, bn, x, **how), bn.mean[...], bn.var[...]

    def one_by_one(x):
        conv, bn = nnx.merge(*layers, copy=True)
        return batch_norm(bn, conv_same(conv, x), **how), bn.mean[...], bn.var[...]

    got, want = (jax.vmap(f, axis_name="parts")(x) for f in (at_once, one_by_one))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.any(got[0] != want[0])  # they did go two ways


@pytest.mark.parametrize("fill", [0.0, 50.0])
def test_what_fills_a_batch_up_is_in_no_statistics(fill):
    """Where a light network's widening layer would else take the covariance of all its input."""
    rng = np.random.default_rng(5)
    conv, bn = Conv(16, 96, 1, use_bias=False, rngs=nnx.Rngs(0)), BatchNorm(96)
    x = rng.normal(size=(8, 3, 4, 16)).astype(np.float32)
    x[5:] = fill
    weights = jnp.asarray([0.2] * 5 + [0.0] * 3, jnp.float32)
    how = {"epsilon": EPSILON, "momentum": 0.5, "use_batch_stats": True}
    z = conv_batch_norm(conv, bn, jnp.asarray(x), **how, example_weights=weights)
    kernel = np.asarray(conv.kernel[...][0, 0], np.float64)
    want = definition(x[:5].astype(np.float64), kernel, np.ones(96), np.zeros(96), 1)
    np.testing.assert_allclose(z[:5], want[0], atol=1e-4)
    np.testing.assert_allclose(bn.mean[...], 0.5 * want[1], atol=1e-5)
    np.testing.assert_allclose(bn.var[...], 0.5 + 0.5 * want[2], rtol=1e-5)


def build(dtype):
    small = MODELS["resnet14_small"]
    return ResNet(small, num_classes=4, hidden_units=0, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def half_model():
    model = build(jnp.bfloat16)
    rng = np.random.default_rng(1)
    model.conv1.bn.scale[...] = jnp.asarray(rng.normal(size=16), jnp.float32)
    return model


def test_the_stem_pools_first_and_gives_the_same(half_model):
    images = np.random.default_rng(2).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    assert np.any(np.asarray(half_model.conv1.bn.scale[...]) < 0)
    z = half_model.conv1(images, use_batch_stats=True)
    z = np.maximum(np.asarray(z, np.float32), 0)
    padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    windows = [padded[:, i : i + 15 : 2, j : j + 15 : 2] for i, j in taps]
    got = half_model(images, stop="conv1", batch_stats_in=STAGES)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.max(windows, 0), rtol=2**-7)


def test_what_fills_a_batch_up_is_in_no_statistics_of_half_precision(half_model):
    graph, params, stats = nnx.split(half_model, nnx.Param, nnx.BatchStat)
    images = np.random.default_rng(6).uniform(size=(8, 32, 32, 3)).astype(np.float32)
    weights = jnp.asarray([0.2] * 5 + [0.0] * 3, jnp.float32)

    @jax.jit
    def statistics(images, weights):
        model = nnx.merge(graph, params, stats, copy=True)
        model(images, batch_stats_in=STAGES, example_weights=weights)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    other = images.copy()
    other[5:] = 0.5
    got, want, moved = (
        jax.tree_util.tree_leaves_with_path(tree)
        for tree in (
            statistics(images, weights),
            statistics(other, weights),
            statistics(images, jnp.full(8, 0.125)),
        )
    )
    assert {path[0].key for path, _ in got} >= {"conv1", "conv2", "conv3", "conv4", "conv5"}
    for (path, g), (_, w), (_, m) in zip(got, want, moved, strict=True):
        np.testing.assert_array_equal(g, w, err_msg=jax.tree_util.keystr(path))
        assert np.any(g != m), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_the_network_trains_the_same_either_way(half_model, monkeypatch):
    """In float32, so that only the formulas differ: loss, statistics and all gradients."""
    model = build(jnp.float32)
    nnx.update(model, nnx.state(half_model))
    images = np.random.default_rng(3).uniform(size=(8, 48, 48, 3)).astype(np.float32)
    labels = jnp.arange(8) % 4
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params):
        model = nnx.merge(graph, params, stats, copy=True)
        logits = model(images, batch_stats_in=STAGES)
        value = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])
        return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def run():
        (value, stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return {"loss": value, "stats": stats, "grads": nnx.to_pure_dict(grads)}

    want = run()
    monkeypatch.setattr(ConvBN, "spares_traffic", True)
    got = run()
    different = 0
    for (path, g), w in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        error = np.linalg.norm(g - w)
        assert error <= 2e-3 * np.linalg.norm(w), (jax.tree_util.keystr(path), error)
        different += bool(error)
    assert different > 20  # they did go two ways
