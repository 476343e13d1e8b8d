"""Building blocks shared by the model families: convolution, batch norm, pooling.

Arrays are NHWC, kernels HWIO (Keras's own layout, so weights load without a
transpose). Parameters and batch statistics are float32; `dtype` is the type in
which activations are computed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

Array = jax.Array


def glorot_uniform(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Keras's default for Conv2D and Dense kernels (Glorot and Bengio 2010), float32.

    NumPy draws it, for JAX would compile a program for every shape: seconds, for a ResNet50.
    """
    limit = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))

    def draw(seed: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(np.asarray(seed))
        return rng.uniform(-limit, limit, shape).astype(np.float32)

    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.pure_callback(draw, result, jax.random.key_data(rngs.params()))


def _filled(value: float, size: int) -> Array:
    return jnp.asarray(np.full(size, value, np.float32))


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
    """`[..., I] @ [I, O]`, whose kernel gradient XLA computes well on CPU.

    That gradient contracts the long leading axes, and XLA's CPU backend then transposes
    its left operand in memory. The narrower operand goes there; automatic differentiation
    would always put the output's gradient, the wider one by four in half of the layers.
    """
    return jnp.dot(x, kernel)


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.dot(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    leading = tuple(range(x.ndim - 1))

    def contract(a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, ((leading, leading), ((), ())))

    narrow_input = kernel.shape[0] <= kernel.shape[1]
    return jnp.dot(g, kernel.T), contract(x, g) if narrow_input else contract(g, x).T


_matmul.defvjp(_matmul_forward, _matmul_backward)


def conv2d(x: Array, kernel: Array, stride: int = 1) -> Array:
    """2-D convolution, padded symmetrically by `(size - 1) // 2` as Keras's ResNet does.

    A 1x1 kernel becomes a matrix product over channels: the same mathematics, and
    on CPU far faster than XLA's general convolution.

    Args:
      x: `[N, H, W, I]`.
      kernel: `[K, K, I, O]`, K odd, same dtype as `x`.
      stride: step in both directions.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), O]`.
    """
    size = kernel.shape[0]
    if size == 1:
        return _matmul(x[:, ::stride, ::stride, :], kernel[0, 0])
    pad = (size - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _max_pool(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


@jax.custom_vjp
def max_pool_3x3_s2(x: Array) -> Array:
    """3x3 max pooling, stride 2, one pixel of zeros around: Keras's `pool1_pad`, `pool1_pool`.

    Zeros, not minus infinity, are what Keras pads with; after a ReLU they are the same.
    Of equal maxima the first, row by row, receives the gradient.

    Args:
      x: `[N, H, W, C]`.

    Returns:
      `[N, ceil(H / 2), ceil(W / 2), C]`.
    """
    return _max_pool(x)


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _max_pool(x)
    return y, (x, y)


def _max_pool_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array]:
    def plain(x: Array, y: Array, g: Array) -> Array:
        return jax.vjp(_max_pool, x)[1](g)[0]

    return (lax.platform_dependent(*residuals, g, cpu=_max_pool_gradient_cpu, default=plain),)


def _max_pool_gradient_cpu(x: Array, y: Array, g: Array) -> Array:
    """The gradient without XLA's select-and-scatter, seven times as fast on CPU."""
    n, h, w, c = x.shape
    rows, columns = y.shape[1:3]
    padding = ((0, 0), (1, 2 * rows + 1 - h), (1, 2 * columns + 1 - w), (0, 0))
    x = jnp.pad(x, padding)
    taps = [(i, j) for i in range(3) for j in range(3)]
    # Which of its nine pixels each window took; walked backwards, so that the first stays.
    taken = jnp.full(y.shape, len(taps), jnp.int8)
    for k, (i, j) in reversed(list(enumerate(taps))):
        tap = x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        taken = jnp.where(tap == y, jnp.int8(k), taken)
    # Pixels of equal row and column parity make a plane, in which windows are one apart.
    planes = [[jnp.zeros((n, rows + 1, columns + 1, c), g.dtype)] * 2 for _ in range(2)]
    for k, (i, j) in enumerate(taps):
        below, right = i // 2, j // 2
        place = ((0, 0), (below, 1 - below), (right, 1 - right), (0, 0))
        planes[i % 2][j % 2] += jnp.pad(jnp.where(taken == k, g, 0), place)
    woven = jnp.stack([jnp.stack(plane, 3) for plane in planes], 2)
    return woven.reshape(x.shape)[:, 1 : h + 1, 1 : w + 1]


max_pool_3x3_s2.defvjp(_max_pool_forward, _max_pool_backward)


class Conv(nnx.Module):
    """The arrays of a convolution: `kernel`, and `bias` or None."""

    def __init__(self, inputs: int, outputs: int, size: int, *, use_bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(glorot_uniform(rngs, (size, size, inputs, outputs)))
        self.bias = nnx.Param(_filled(0, outputs)) if use_bias else None


class BatchNorm(nnx.Module):
    """The arrays of a batch norm: `scale`, `bias`, and the running `mean`, `var`."""

    def __init__(self, features: int):
        self.scale = nnx.Param(_filled(1, features))
        self.bias = nnx.Param(_filled(0, features))
        self.mean = nnx.BatchStat(_filled(0, features))
        self.var = nnx.BatchStat(_filled(1, features))


class ConvBN(nnx.Module):
    """Convolution and batch norm as one operation.

    The convolution's bias never touches an activation. With batch statistics it
    cancels, so only the running mean takes it in; with running statistics it joins
    the shift. This is exact, and leaves the bias's gradient exactly zero in the first
    case, where computing it gives rounding noise that Adam would blow up.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        use_bias: bool,
        epsilon: float,
        momentum: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(inputs, outputs, size, use_bias=use_bias, rngs=rngs)
        self.bn = BatchNorm(outputs)
        self.stride, self.epsilon, self.momentum, self.dtype = stride, epsilon, momentum, dtype

    def __call__(self, x: Array, *, use_batch_stats: bool, axis_name: str | None = None) -> Array:
        """Applies it to `[N, H, W, C]`.

        Args:
          x: input, cast to the layer's dtype.
          use_batch_stats: normalise by this batch and update the running statistics
            (Keras: `training=True`); else by the running statistics, left as they are.
          axis_name: mapped axis over which the statistics are averaged (pmap only;
            under jit the batch is global already).
        """
        y = conv2d(x.astype(self.dtype), self.conv.kernel[...].astype(self.dtype), self.stride)
        bn = self.bn
        bias = 0.0 if self.conv.bias is None else self.conv.bias[...]
        if use_batch_stats:
            # One pass, shifted by the running mean: without a shift E[y^2] - E[y]^2
            # cancels badly where the mean is large against the deviation.
            shift = lax.stop_gradient(bn.mean[...] - bias)
            d = y.astype(jnp.float32) - shift
            mean_d, mean_d2 = jnp.mean(d, (0, 1, 2)), jnp.mean(d * d, (0, 1, 2))
            if axis_name is not None:
                mean_d, mean_d2 = lax.pmean((mean_d, mean_d2), axis_name)
            var = jnp.maximum(mean_d2 - mean_d * mean_d, 0.0)
            mean = mean_d + shift
            keep = self.momentum
            # Biased variance in the running average, as Keras 3.
            bn.mean[...] = keep * bn.mean[...] + (1 - keep) * lax.stop_gradient(mean + bias)
            bn.var[...] = keep * bn.var[...] + (1 - keep) * lax.stop_gradient(var)
        else:
            mean, var = bn.mean[...] - bias, bn.var[...]
        scale = bn.scale[...] * lax.rsqrt(var + self.epsilon)
        offset = bn.bias[...] - mean * scale
        return y * scale.astype(self.dtype) + offset.astype(self.dtype)


class Dense(nnx.Module):
    """Fully connected layer in float32: `[N, I] -> [N, O]`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(glorot_uniform(rngs, (inputs, outputs)))
        self.bias = nnx.Param(_filled(0, outputs))

    def __call__(self, x: Array) -> Array:
        return jnp.dot(x, self.kernel[...]) + self.bias[...]


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout, as Keras's; the identity where `key` is None or `rate` 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
