"""Convolution and pooling against NumPy; their hand-written gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from covid_flax.models import conv

pytestmark = pytest.mark.usefixtures("quick_compilation")


def plain_pool(x):
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


def gradient(function, g, *args):
    return jax.jit(lambda *args: jax.vjp(function, *args)[1](g))(*args)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5), (1, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_gradient_equals_select_and_scatter(size, ties):
    rng = np.random.default_rng(0)
    shape = (2, *size, 3)
    x = rng.integers(-2, 3, shape).astype(float) if ties else rng.normal(size=shape)
    with jax.enable_x64(True):
        x = jnp.asarray(x)
        y = jax.jit(plain_pool)(x)
        g = jnp.asarray(rng.normal(size=y.shape))
        assert x.dtype == jnp.float64
        (want,) = gradient(plain_pool, g, x)
        ours = jax.jit(conv._max_pool_gradient_cpu)(x, y, g)
        np.testing.assert_allclose(ours, want, rtol=1e-12)
        (got,) = gradient(conv.max_pool_3x3_s2, g, x)
        np.testing.assert_allclose(got, want, rtol=1e-12)
        np.testing.assert_array_equal(jax.jit(conv.max_pool_3x3_s2)(x), y)


def taps(padded, size, stride, out_shape):
    """For each offset of the kernel, what of the padded input every output sees there."""
    rows, columns = out_shape
    for i in range(size):
        for j in range(size):
            at = (slice(i, i + stride * rows, stride), slice(j, j + stride * columns, stride))
            yield i, j, (slice(None), *at)


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_max_pool_is_numpy_s_and_its_gradient_goes_to_the_first_maximum(size):
    rng = np.random.default_rng(1)
    x = rng.integers(1, 4, (2, *size, 3)).astype(np.float32)  # many ties, all above the padding
    padded = np.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    shape = tuple(-(-n // 2) for n in size)
    places = [at for _, _, at in taps(padded, 3, 2, shape)]
    windows = np.stack([padded[at] for at in places])
    first = windows.argmax(0)  # of equals the first
    g = rng.normal(size=first.shape).astype(np.float32)
    expected = np.zeros(padded.shape, np.float64)
    for k, at in enumerate(places):
        expected[at] += np.where(first == k, g, 0)
    got = conv.max_pool_3x3_s2(jnp.asarray(x))
    np.testing.assert_array_equal(got, windows.max(0))
    (got,) = gradient(conv.max_pool_3x3_s2, jnp.asarray(g), jnp.asarray(x))
    np.testing.assert_allclose(got, expected[:, 1:-2, 1:-2], rtol=1e-6, atol=1e-6)


def test_max_pool_gradient_under_vmap_and_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (3, 2, 7, 6, 4), jnp.bfloat16)

    def loss_gradient(pool):
        return jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(pool(x) ** 2))))(x)

    got = loss_gradient(conv.max_pool_3x3_s2)
    assert got.dtype == jnp.bfloat16
    # A pixel in four windows gets a sum of four, rounded in another order.
    np.testing.assert_allclose(
        got.astype(np.float32), loss_gradient(plain_pool).astype(np.float32), rtol=2e-2, atol=1e-2
    )


# The last two are wide enough for Winograd's filtering.
@pytest.mark.parametrize(
    "size,inputs,outputs",
    [(1, 3, 5), (1, 5, 3), (3, 3, 5), (7, 3, 4), (3, 128, 130), (3, 257, 256)],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_and_its_gradients_equal_numpy_s_in_float64(size, inputs, outputs, stride):
    rng = np.random.default_rng(2)
    x, k = rng.normal(size=(2, 9, 8, inputs)), rng.normal(size=(size, size, inputs, outputs))
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad + stride), (pad, pad + stride), (0, 0)))
    shape = (-(-9 // stride), -(-8 // stride))
    g = rng.normal(size=(2, *shape, outputs))
    y, dx, dk = np.zeros_like(g), np.zeros_like(padded), np.zeros_like(k)
    for i, j, at in taps(padded, size, stride, shape):
        y += padded[at] @ k[i, j]
        dk[i, j] = np.einsum("nhwi,nhwo->io", padded[at], g)
        dx[at] += g @ k[i, j].T
    dx = dx[:, pad : pad + 9, pad : pad + 8]
    with jax.enable_x64(True):
        ours = jax.jit(conv.conv2d, static_argnums=2)(jnp.asarray(x), jnp.asarray(k), stride)
        gradients = gradient(lambda x, k: conv.conv2d(x, k, stride), *map(jnp.asarray, (g, x, k)))
    assert ours.dtype == np.float64
    for got, want in zip((ours, *gradients), (y, dx, dk), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 2, ((0, 1), (2, 0))])
def test_the_gradients_are_those_of_the_plain_convolution_at_any_padding(padding):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, k = (
            jnp.asarray(rng.normal(size=(2, 9, 8, 3))),
            jnp.asarray(rng.normal(size=(3, 3, 3, 4))),
        )
        pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        y = conv._plain_conv(x, k, 2, pads)
        ours = gradient(lambda x, k: conv.conv2d(x, k, 2, padding), y, x, k)
        plain = gradient(lambda x, k: conv._plain_conv(x, k, 2, pads), y, x, k)
        np.testing.assert_array_equal(conv.conv2d(x, k, 2, padding), y)
    for got, want in zip(ours, plain, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)


def wide(height, width, channels=256):
    x = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    return x, jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)


def lowered(platform, channels=256):
    """A 3x3 convolution and both its gradients, as StableHLO for that platform."""
    function = jax.grad(lambda x, k: jnp.sum(conv.conv2d(x, k) ** 2), (0, 1))
    traced = jax.jit(function).trace(*wide(8, 8, channels))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_narrow_one_s_kernel_gradient_is_products_on_cpu_and_plain_elsewhere():
    for platform, products in (("tpu", 0), ("cuda", 0), ("cpu", 3)):
        text = lowered(platform, 64)
        assert text.count("stablehlo.convolution") == (2 if products else 3)
        assert text.count("stablehlo.dot_general") == products


def test_wide_3x3_convolution_is_winograd_s_on_cpu_and_plain_elsewhere():
    for platform in ("tpu", "cuda"):
        text = lowered(platform)
        assert text.count("stablehlo.convolution") == 3
        assert "stablehlo.dot_general" not in text
    text = lowered("cpu")
    assert "stablehlo.convolution" not in text
    assert text.count("stablehlo.dot_general") == 3 * 16


@pytest.mark.parametrize("height,width", [(8, 8), (7, 7), (1, 3)])
def test_winograd_rounds_about_as_little_as_the_plain_sum(height, width):
    rng = np.random.default_rng(3)
    # All positive, as after a ReLU: sums of one sign hide nothing behind cancellation.
    x, k = (rng.normal(size=s.shape) for s in wide(height, width))
    x = np.maximum(x, 0).astype(np.float32)
    k, g = k.astype(np.float32), rng.normal(size=x.shape).astype(np.float32)

    def all_three(function, *args):
        return function(*args[:2]), *jax.vjp(function, *args[:2])[1](args[2])

    ours = jax.jit(lambda *args: all_three(conv.conv2d, *args))(x, k, g)
    with jax.enable_x64(True):
        args = [jnp.asarray(a, jnp.float64) for a in (x, k, g)]
        exact = jax.jit(lambda *args: all_three(conv._plain_conv_3x3, *args))(*args)
    for got, want in zip(ours, map(np.asarray, exact), strict=True):
        assert (got.dtype, want.dtype) == (np.float32, np.float64)
        error = np.asarray(got, np.float64) - want
        assert np.sqrt(np.mean(error**2) / np.mean(np.square(want))) < 1.5e-6
