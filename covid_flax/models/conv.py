"""Convolution and max pooling as functions of arrays, written so that XLA computes them well.

Arrays are NHWC, kernels HWIO. Where the CPU wants another formulation than accelerators do,
both stand here, behind one function: the same mathematics, gradients included.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Padding = tuple[tuple[int, int], tuple[int, int]]


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


def _plain_conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """`_plain_conv`, whose kernel gradient is matrix products on CPU."""
    return _plain_conv(x, kernel, stride, padding)


def _conv_forward(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _plain_conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(
    stride: int, padding: Padding, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    conv = functools.partial(_plain_conv, stride=stride, padding=padding)

    def plain(x: Array, kernel: Array, g: Array) -> Array:
        return jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](g)[0]

    def by_rows(x: Array, kernel: Array, g: Array) -> Array:
        return _kernel_gradient_by_rows(x, g, kernel.shape[0], stride, padding)

    dx = jax.vjp(lambda x: conv(x, kernel), x)[1](g)[0]
    return dx, lax.platform_dependent(x, kernel, g, cpu=by_rows, default=plain)


_conv.defvjp(_conv_forward, _conv_backward)


def _kernel_gradient_by_rows(x: Array, g: Array, size: int, stride: int, padding: Padding) -> Array:
    """The kernel gradient as a matrix product for each row of the kernel.

    XLA's CPU backend has it as a convolution by the output's gradient, which without AVX-512
    took up to ten times as long, and as long as all else together in ResNet50.
    """
    h, w, outputs = g.shape[1:]
    inputs = x.shape[-1]
    x = jnp.pad(jnp.moveaxis(x, 3, 0), ((0, 0), (0, 0), *padding))
    g = g.reshape(-1, outputs)

    def tap(i: int, j: int) -> Array:
        rows, columns = (slice(k, k + stride * (n - 1) + 1, stride) for k, n in ((i, h), (j, w)))
        return x[:, :, rows, columns].reshape(inputs, -1)

    taps = [jnp.concatenate([tap(i, j) for j in range(size)]) for i in range(size)]
    return jnp.stack([jnp.dot(row, g) for row in taps]).reshape(size, size, inputs, outputs)


# Winograd's minimal filtering F(2 x 2, 3 x 3): a tile of 2 x 2 outputs is
# `AT [(G k G^T) * (BT d BT^T)] AT^T` of its 4 x 4 inputs d and the kernel k (Lavin and Gray
# 2016, "Fast Algorithms for Convolutional Neural Networks"). It takes 4/9 of the products and
# rounds about as little as the plain sum; F(4 x 4) takes 1/4 and rounds ten times worse.
_BT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))
_AT = ((1, 1, 1, 0), (0, 1, -1, -1))

Grid = list[list[Array]]
Matrix = tuple[tuple[float, ...], ...]


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _transform(matrix: Matrix, d: Sequence[Sequence[Array]]) -> Grid:
    """`matrix d matrix^T`, d a square of arrays."""

    def combine(weights: tuple[float, ...], arrays: Sequence[Array]) -> Array:
        terms = [a if w == 1 else w * a for w, a in zip(weights, arrays, strict=True) if w]
        return functools.reduce(jnp.add, terms)

    rows = [[combine(w, column) for column in zip(*d, strict=True)] for w in matrix]
    return [[combine(w, row) for w in matrix] for row in rows]


def _input_tiles(x: Array) -> Grid:
    """`BT d BT^T` of every tile of `[N, H, W, C]`: 4 x 4 arrays `[tiles, C]`."""
    h, w, channels = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))
    h, w = h + h % 2, w + w % 2
    d = [[x[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for j in range(4)] for i in range(4)]
    return [[v.reshape(-1, channels) for v in row] for row in _transform(_BT, d)]


def _kernel_tiles(kernel: Array) -> Grid:
    """`G k G^T`: 4 x 4 arrays `[I, O]`."""
    return _transform(_G, [list(row) for row in kernel])


def _products(a: Grid, b: Grid, contract: tuple[int, int]) -> Grid:
    """Each of `a` times its partner in `b`, summed over the axes `contract`.

    One by one, for XLA computes a batched product of them at a third of the rate.
    """

    def dot(left: Array, right: Array) -> Array:
        return lax.dot_general(left, right, (((contract[0],), (contract[1],)), ((), ())))

    return [[dot(*pair) for pair in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _output(products: Grid, shape: tuple[int, ...]) -> Array:
    """`AT m AT^T` of every tile, put together: `[N, H, W, C]` of that shape."""
    n, h, w, channels = shape
    rows, columns = -(-h // 2), -(-w // 2)
    tiles = [
        [y.reshape(n, rows, columns, channels) for y in row] for row in _transform(_AT, products)
    ]
    woven = jnp.stack([jnp.stack(row, 3) for row in tiles], 2)
    return woven.reshape(n, 2 * rows, 2 * columns, channels)[:, :h, :w]


def _winograd(x: Array, kernel: Array) -> Array:
    products = _products(_input_tiles(x), _kernel_tiles(kernel), (1, 0))
    return _output(products, (*x.shape[:3], kernel.shape[-1]))


def _winograd_input_gradient(g: Array, kernel: Array) -> Array:
    # A kernel turned by 180 degrees has the same tiles with the first and last exchanged.
    turned = [[row[j] for j in (3, 1, 2, 0)] for row in _kernel_tiles(kernel)]
    turned = [turned[i] for i in (3, 1, 2, 0)]
    return _output(_products(_input_tiles(g), turned, (1, 1)), (*g.shape[:3], kernel.shape[2]))


def _winograd_kernel_gradient(x: Array, g: Array) -> Array:
    h, w, outputs = g.shape[1:]
    g = jnp.pad(g, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    tiles = _transform(_transposed(_AT), [[g[:, i::2, j::2] for j in range(2)] for i in range(2)])
    g_tiles = [[tile.reshape(-1, outputs) for tile in row] for row in tiles]
    gradient = _transform(_transposed(_G), _products(_input_tiles(x), g_tiles, (0, 0)))
    return jnp.stack([jnp.stack(row) for row in gradient])


_plain_conv_3x3 = functools.partial(_plain_conv, stride=1, padding=((1, 1), (1, 1)))


@jax.custom_vjp
def _conv_3x3(x: Array, kernel: Array) -> Array:
    """3x3 convolution, stride 1; on CPU by Winograd's filtering, gradients too."""
    return lax.platform_dependent(x, kernel, cpu=_winograd, default=_plain_conv_3x3)


def _conv_3x3_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_3x3(x, kernel), (x, kernel)


def _conv_3x3_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def plain(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(_plain_conv_3x3, x, kernel)[1](g)

    def winograd(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return _winograd_input_gradient(g, kernel), _winograd_kernel_gradient(x, g)

    return lax.platform_dependent(*residuals, g, cpu=winograd, default=plain)


_conv_3x3.defvjp(_conv_3x3_forward, _conv_3x3_backward)


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: int | Padding | None = None) -> Array:
    """2-D convolution, padded by `(size - 1) // 2` all around unless told otherwise, as Keras's
    ResNet does.

    A 1x1 kernel becomes a matrix product over channels: the same mathematics, and
    on CPU far faster than XLA's general convolution. So do, on CPU, Winograd's form
    of a 3x3 kernel where there are channels enough to pay for its transforms, and the
    kernel gradient of any other; 16-bit numbers have XLA's own convolution.

    Args:
      x: `[N, H, W, I]`.
      kernel: `[K, K, I, O]`, K odd, same dtype as `x`.
      stride: step in both directions.
      padding: pixels of zeros on each side, one number for all or
        `((top, bottom), (left, right))`; None is `(K - 1) // 2`.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), O]` where `padding` is None.
    """
    size, _, inputs, outputs = kernel.shape
    usual = (((size - 1) // 2,) * 2,) * 2
    if padding is None:
        padding = usual
    elif isinstance(padding, int):
        padding = ((padding,) * 2,) * 2
    if size == 1 and padding == usual:
        return _matmul(x[:, ::stride, ::stride, :], kernel[0, 0])
    if x.dtype.itemsize < 4:  # those forms would round once more
        return _plain_conv(x, kernel, stride, padding)
    if size == 3 and stride == 1 and padding == usual and min(inputs, outputs) >= 128:
        return _conv_3x3(x, kernel)
    return _conv(x, kernel, stride, padding)


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
