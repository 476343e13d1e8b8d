"""A widening 1x1 convolution and its batch norm as one product.

Training spends its memory traffic on the wide output of a bottleneck's last convolution:
written, read for its statistics' sake, normalised, and read twice more on the way back. Linear
algebra spares all of that. With `y = x K` over all positions, the batch mean of `y` is
`mean(x) K` and its variance the diagonal of `K' cov(x) K`, so statistics of the narrow input
suffice: batch norm becomes part of the kernel, and `y` itself is never made. Backward, the
sums that batch norm needs come out of the kernel's gradient, and what they contribute to the
input's gradient is again a product with the narrow `x`. The same mathematics, summed in
another order, always in float32.

It pays where reading is dearer than arithmetic: in ResNets in half precision, and in float32 where
the input is a sixth as wide, as in most of the light networks' blocks (measured on CPU alone). In
ResNets, a quarter as wide and of more arithmetic, it made float32 on CPU a tenth slower.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
_Residuals = tuple[Array, ...]


def widens(shape: tuple[int, ...], times: int) -> bool:
    """Whether a kernel `[K, K, I, O]` is 1x1 and has at least so many times the outputs."""
    size, _, inputs, outputs = shape
    return size == 1 and outputs >= times * inputs


def _dot(a: Array, b: Array) -> Array:
    """Of float32 arrays, whose operands accelerators would round to half precision."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _product(x: Array, matrix: Array) -> Array:
    """`[..., I]`, `[I, O]` to float32 `[..., O]`: of the very numbers whose mean is subtracted."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, matrix, precision=exact, preferred_element_type=jnp.float32)


def _over_positions(a: Array, b: Array, precision: lax.Precision | None = None) -> Array:
    """`[N, H, W, I]`, `[N, H, W, O]` to float32 `[I, O]`, summed over all positions."""
    axes = ((0, 1, 2), (0, 1, 2))
    return lax.dot_general(
        a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _sum(x: Array) -> Array:
    return jnp.sum(x.astype(jnp.float32), (0, 1, 2))


def _moments(x: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Mean `[I]` and biased covariance `[I, I]` over all positions of `[N, H, W, I]`."""

    def mean(value: Array) -> Array:
        value = value / math.prod(x.shape[:3])
        return value if axis_name is None else lax.pmean(value, axis_name)

    mean_x = mean(_sum(x))
    if x.dtype == jnp.float32:
        # For another pass over the narrow input a large mean costs no digits.
        centred = x - mean_x
        return mean_x, mean(_over_positions(centred, centred, lax.Precision.HIGHEST))
    return mean_x, mean(_over_positions(x, x)) - mean_x[:, None] * mean_x


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def conv1x1_batch_norm(
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    epsilon: float,
    every: int = 1,
    axis_name: str | None = None,
) -> tuple[Array, Array, Array]:
    """Batch norm by batch statistics of a 1x1 convolution.

    Args:
      x: `[N, H, W, I]`, half precision or float32.
      kernel: `[I, O]`, float32.
      scale, bias: batch norm's, `[O]`, float32.
      epsilon: batch norm's.
      every: compute the output at every so-many-th row and column only; the statistics are
        of all positions.
      axis_name: mapped axis over which the statistics are averaged.

    Returns:
      The output `[N, ceil(H / every), ceil(W / every), O]`, of x's dtype; the mean and biased
      variance `[O]` of the convolution, float32, whose gradients are not propagated.
    """
    return _forward(x, kernel, scale, bias, epsilon, every, axis_name)[0]


def _forward(
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    epsilon: float,
    every: int,
    axis_name: str | None,
) -> tuple[tuple[Array, Array, Array], _Residuals]:
    mean_x, covariance = _moments(x, axis_name)
    cov_kernel = _dot(covariance, kernel)
    mean, var = _dot(mean_x, kernel), jnp.maximum(jnp.sum(kernel * cov_kernel, 0), 0.0)
    deviation = lax.rsqrt(var + epsilon)
    folded = (kernel * (scale * deviation)).astype(x.dtype)
    y = _product(x[:, ::every, ::every], folded)
    # The mean of what was computed: folding rounds the kernel.
    y = (y + (bias - _dot(mean_x, folded.astype(jnp.float32)))).astype(x.dtype)
    return (y, mean, var), (x, kernel, scale, folded, mean_x, cov_kernel, mean, deviation)


def _backward(
    epsilon: float,
    every: int,
    axis_name: str | None,
    residuals: _Residuals,
    gradients: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
    x, kernel, scale, folded, mean_x, cov_kernel, mean, deviation = residuals
    g = gradients[0]
    n = math.prod(x.shape[:3])
    product = _over_positions(x[:, ::every, ::every], g)
    g_bias = _sum(g)
    g_scale = deviation * (jnp.sum(kernel * product, 0) - mean * g_bias)
    slope = scale * deviation
    g_kernel = slope * (product - mean_x[:, None] * g_bias - cov_kernel * (deviation * g_scale))

    # Batch norm's own share of y's gradient is -(slope sum_g / n + b (y - mean)) everywhere.
    sum_g, sum_gy = (
        (g_bias, g_scale) if axis_name is None else lax.pmean((g_bias, g_scale), axis_name)
    )
    b = slope * deviation * sum_gy / n
    matrix = _dot(kernel * b, kernel.T).astype(x.dtype)
    share = _product(x, matrix)
    # Of what is computed: rounded matrices would leave the gradient a mean, which it has not.
    offset = _dot(folded.astype(jnp.float32), sum_g / n)
    share = (share + offset - _dot(mean_x, matrix.astype(jnp.float32))).astype(x.dtype)
    g_x = jnp.dot(g, folded.T)
    if every > 1:
        (_, h, w, _), (_, rows, columns, _) = x.shape, g.shape
        edges = (
            (0, 0, 0),
            (0, h - 1 - every * (rows - 1), every - 1),
            (0, w - 1 - every * (columns - 1), every - 1),
            (0, 0, 0),
        )
        g_x = lax.pad(g_x, jnp.zeros((), g_x.dtype), edges)
    return g_x - share, g_kernel, g_scale, g_bias


conv1x1_batch_norm.defvjp(_forward, _backward)
