"""Depthwise convolution against NumPy in float64, and its gradients against XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covid_flax.models.depthwise import _forward_xla, depthwise_conv2d

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _by_loops(x, kernel, stride):
    n, h, w, c = x.shape
    size = len(kernel)
    out = np.zeros((n, -(-h // stride), -(-w // stride), c))
    # TensorFlow's "SAME": what the last window lacks, the odd pixel below and to the right.
    top, left = (max((-(-n // stride) - 1) * stride + size - n, 0) // 2 for n in (h, w))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            for i in range(size):
                for j in range(size):
                    y, z = row * stride + i - top, column * stride + j - left
                    if 0 <= y < h and 0 <= z < w:
                        out[:, row, column] += x[:, y, z] * kernel[i, j, :, 0]
    return out


def _with_gradients(function, stride):
    """Its value, and its gradients in both arguments along a third."""

    @jax.jit
    def run(x, kernel, g):
        value, pullback = jax.vjp(lambda x, k: function(x, k, stride), x, kernel)
        return value, pullback(g)

    return run


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 8, 8), marks=pytest.mark.slow),
        (3, 7, 9),
        (12, 2, 3),
        (3, 1, 1),
        (2, 19, 4),
        pytest.param((4, 15, 16), marks=pytest.mark.slow),
    ],
)
def test_it_is_the_sum_and_its_gradients_are_exact(size, stride, shape):
    rng = np.random.default_rng(size * 10 + stride)
    x = rng.normal(size=(*shape, 5))
    kernel = rng.normal(size=(size, size, 5, 1))
    want = _by_loops(x, kernel, stride)
    x32, k32 = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    g = rng.normal(size=want.shape)
    got, (dx, dk) = _with_gradients(depthwise_conv2d, stride)(x32, k32, jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)

    # A linear map's gradient is its transpose: <A x, g> = <x, A' g>, in both arguments.
    for direction in range(3):
        rng = np.random.default_rng(direction)
        v, u = rng.normal(size=x.shape), rng.normal(size=kernel.shape)
        np.testing.assert_allclose(
            np.sum(np.asarray(dx, np.float64) * v),
            np.sum(_by_loops(v, kernel, stride) * g),
            rtol=1e-4,
            atol=1e-4,
        )
        np.testing.assert_allclose(
            np.sum(np.asarray(dk, np.float64) * u),
            np.sum(_by_loops(x, u, stride) * g),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("stride", [1, 2])
def test_what_accelerators_compute_is_the_same(stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 8, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 5, 6, 1)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(2, -(-9 // stride), 8 // stride, 6)), jnp.float32)
    ours, gradients = _with_gradients(depthwise_conv2d, stride)(x, kernel, g)
    xla, xla_gradients = _with_gradients(_forward_xla, stride)(x, kernel, g)
    np.testing.assert_allclose(ours, xla, atol=1e-5)
    for a, b in zip(gradients, xla_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision_rounds_once():
    """Sums are taken in float32: as near to the exact ones as XLA's own convolution."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 9, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(5, 5, 8, 1)), jnp.bfloat16)
    exact = _by_loops(np.asarray(x, np.float64), np.asarray(kernel, np.float64), 1)
    ours = np.asarray(jax.jit(depthwise_conv2d)(x, kernel), np.float64)
    np.testing.assert_allclose(ours, exact, rtol=2**-8, atol=1e-4)
    sums = jax.jit(jax.grad(lambda x: jnp.sum(depthwise_conv2d(x, kernel).astype(jnp.float32))))
    gradient = sums(x)
    kernel_gradient = jax.jit(jax.grad(lambda k: jnp.sum(depthwise_conv2d(x, k) * 1.0)))(kernel)
    assert (gradient.dtype, kernel_gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    turned = np.asarray(kernel, np.float64)[::-1, ::-1]
    exact = _by_loops(np.ones(x.shape), turned, 1)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), exact, rtol=2**-8, atol=1e-4)
    one, exact = np.zeros((5, 5, 8, 1)), np.zeros((5, 5, 8, 1))
    for place in np.ndindex(5, 5):
        one[:] = 0
        one[place] = 1
        exact[place][:, 0] = _by_loops(np.asarray(x, np.float64), one, 1).sum((0, 1, 2))
    got = np.asarray(kernel_gradient, np.float64)
    np.testing.assert_allclose(got, exact, rtol=2**-8, atol=1e-4)


def test_rows_that_a_cache_would_keep_in_one_place():
    """32 channels of 32 columns make rows of 4 KiB."""
    rng = np.random.default_rng(3)
    x, g = (jnp.asarray(rng.normal(size=(2, 9, 32, 32)), jnp.float32) for _ in range(2))
    kernel = jnp.zeros((3, 3, 32, 1))
    got, want = (
        _with_gradients(f, 1)(x, kernel, g)[1][1] for f in (depthwise_conv2d, _forward_xla)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
