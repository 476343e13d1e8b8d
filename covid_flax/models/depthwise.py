"""Depthwise convolution: each channel by a kernel of its own.

XLA's CPU backend computes it, and its gradients above all, far below what the machine can do.
There it is a sum of shifted products; other platforms keep XLA's convolution.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from covid_flax.models.conv import Padding

Array = jax.Array


def same_padding(sides: Sequence[int], size: int, stride: int) -> Padding:
    """TensorFlow's 'SAME' for an image of these `sides`: as much as
    `ceil(side / stride)` outputs need, the odd pixel last.

    It is also what Keras's applications pad by hand (`imagenet_utils.correct_pad`), if they are
    given the image's size; else they pad all as if sides were even.
    """

    def one(side: int) -> tuple[int, int]:
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        return total // 2, total - total // 2

    height, width = sides
    return one(height), one(width)


def _taps(x: Array, size: int, stride: int, height: int, width: int) -> list[Array]:
    """What each of the kernel's `size` x `size` weights is multiplied by, row by row."""
    n, _, _, channels = x.shape
    end = (stride * (height - 1) + 1, stride * (width - 1) + 1)
    return [
        lax.slice(x, (0, i, j, 0), (n, i + end[0], j + end[1], channels), (1, stride, stride, 1))
        for i in range(size)
        for j in range(size)
    ]


def _padded(x: Array, size: int, stride: int) -> Array:
    return jnp.pad(x, ((0, 0), *same_padding(x.shape[1:3], size, stride), (0, 0)))


def _shifted_products(x: Array, kernel: Array, stride: int, height: int, width: int) -> Array:
    # Sums of so many products, rounded to half precision one by one, would be far off.
    taps = _taps(x.astype(jnp.float32), kernel.shape[0], stride, height, width)
    weights = kernel.astype(jnp.float32).reshape(-1, kernel.shape[2])
    products = [tap * w for tap, w in zip(taps, weights, strict=True)]
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _forward_cpu(x: Array, kernel: Array, stride: int) -> Array:
    height, width = (-(-side // stride) for side in x.shape[1:3])
    # Else each product looks for itself whether it is beyond the edge.
    x = lax.optimization_barrier(_padded(x, len(kernel), stride))
    return _shifted_products(x, kernel, stride, height, width)


def _input_gradient_cpu(g: Array, kernel: Array, stride: int, height: int, width: int) -> Array:
    """The same sum over the output's gradient, with the kernel turned.

    Under a stride a row of the input meets every so-many-th row of the kernel alone: rows and
    columns are summed for each remainder by the stride, and woven together.
    """
    size, dtype = len(kernel), g.dtype
    sides = -(-height // stride), -(-width // stride)
    taps = [
        [
            [
                ((place + before - i) // stride, i)
                for i in range(size)
                if (place + before - i) % stride == 0
            ]
            for place in range(stride)
        ]
        for before, _ in same_padding((height, width), size, stride)
    ]
    pads = []  # of zeros, where a tap looks beyond the gradient
    for of_axis, side, given in zip(taps, sides, g.shape[1:3], strict=True):
        offsets = [offset for of_place in of_axis for offset, _ in of_place]
        pads.append((max(0, -min(offsets)), max(0, max(offsets) + side - given)))
    g = jnp.pad(g.astype(jnp.float32), ((0, 0), *pads, (0, 0)))
    weights, (top, left) = kernel[..., 0].astype(jnp.float32), (before for before, _ in pads)
    total = jnp.zeros((), jnp.float32)
    for (row, rows), (column, columns) in itertools.product(*map(enumerate, taps)):
        products = [
            g[:, top + y :][:, : sides[0], left + x :][:, :, : sides[1]] * weights[i, j]
            for (y, i), (x, j) in itertools.product(rows, columns)
        ]
        if products:
            woven = [(place, stride - 1 - place, stride - 1) for place in (row, column)]
            plane = functools.reduce(jnp.add, products)
            total = total + lax.pad(plane, jnp.float32(0), ((0, 0, 0), *woven, (0, 0, 0)))
    return total[:, :height, :width].astype(dtype)


# Rows summed in one expression, of all images of a part and of one: more are compiled slowly and
# read from more places at once than a processor follows, fewer are computed slowly.
_ROWS, _ROWS_OF_AN_IMAGE = 16, 8


def _kernel_gradient_cpu(x: Array, g: Array, size: int, stride: int) -> Array:
    """A few images at a time, so that all weights' sums read what is in the cache.

    Rows are added up one by one, columns and images last: XLA's own reduction over all of them
    would not use the processor's vectors.
    """
    images, height, width, channels = g.shape
    part = 1
    while images % (2 * part) == 0 and 2 * part * height <= _ROWS:
        part *= 2
    rows, (left, right) = same_padding(x.shape[1:3], size, stride)
    right += _columns_apart(x.shape[2] + left + right, channels)
    apart = _columns_apart(width, channels)

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        some = (lax.dynamic_slice_in_dim(a, i * part, part).astype(jnp.float32) for a in (x, g))
        padding = (rows, (left, right)), ((0, 0), (0, apart))
        x_part, g_part = lax.optimization_barrier(
            [jnp.pad(a, ((0, 0), *pad, (0, 0))) for a, pad in zip(some, padding, strict=True)]
        )
        for first in range(0, height, _ROWS_OF_AN_IMAGE):
            g_rows = g_part[:, first : first + _ROWS_OF_AN_IMAGE, :width]
            taps = _taps(x_part[:, first * stride :], size, stride, g_rows.shape[1], width)
            new = []
            for tap, total in zip(taps, sums, strict=True):
                places = itertools.product(range(part), range(g_rows.shape[1]))
                products = [tap[place] * g_rows[place] for place in places]
                new.append(total + functools.reduce(jnp.add, products))
            # One group of rows after the other, while it is in the cache.
            sums = lax.optimization_barrier(tuple(new))
        return sums

    zeros = (jnp.zeros((width, channels), jnp.float32),) * size**2
    sums = lax.fori_loop(0, images // part, add, zeros)
    return jnp.sum(jnp.stack(sums), 1).reshape(size, size, -1, 1).astype(x.dtype)


def _columns_apart(width: int, channels: int) -> int:
    """Columns to add to float32 `[..., width, channels]`, so that a cache can hold many rows.

    It keeps what is a multiple of 4 KiB apart in the same few places.
    """

    def shared(added: int) -> int:
        return max(math.gcd(4 * (width + added) * channels, 4096), 64)

    return min(range(4), key=shared)


def _forward_xla(x: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(
        x,
        jnp.swapaxes(kernel, 2, 3),
        (stride, stride),
        same_padding(x.shape[1:3], len(kernel), stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv2d(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Depthwise 2-D convolution with 'SAME' padding, see `same_padding`.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[K, K, C, 1]`, same dtype as `x` (Keras's `DepthwiseConv2D`).
      stride: step in both directions.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C]`.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_forward_cpu, stride=stride),
        default=functools.partial(_forward_xla, stride=stride),
    )


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_conv2d(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def on_cpu(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        dx = _input_gradient_cpu(g, kernel, stride, *x.shape[1:3])
        return dx, _kernel_gradient_cpu(x, g, len(kernel), stride)

    def plain(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(_forward_xla, stride=stride), x, kernel)[1](g)

    return lax.platform_dependent(*residuals, g, cpu=on_cpu, default=plain)


depthwise_conv2d.defvjp(_forward, _backward)
