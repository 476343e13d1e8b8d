"""Building blocks shared by the model families: convolution with batch norm, dense, dropout.

Arrays are NHWC, kernels HWIO (Keras's own layout, so weights load without a
transpose). Parameters and batch statistics are float32; `dtype` is the type in
which activations are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from covid_flax.models.conv import conv2d
from covid_flax.models.expand import conv1x1_batch_norm, widens

Array = jax.Array


def glorot_uniform(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Keras's default for Conv2D and Dense kernels (Glorot and Bengio 2010), float32.

    NumPy draws it, for JAX would compile a program for every shape: seconds, for a ResNet50. Where
    shapes alone are asked for (`jax.eval_shape`) nothing is drawn.
    """
    limit = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))

    def draw(seed: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(np.asarray(seed))
        return rng.uniform(-limit, limit, shape).astype(np.float32)

    seed = jax.random.key_data(rngs.params())
    if isinstance(seed, jax.core.Tracer):
        return jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, jnp.float32), seed)
    return jnp.asarray(draw(np.asarray(seed)))


def _filled(value: float, size: int) -> Array:
    return jnp.asarray(np.full(size, value, np.float32))


def stages_between(stages: Sequence[str], start: str | None, stop: str | None) -> tuple[str, ...]:
    """Those from `start` to `stop`, both included; None is the first, the last."""
    first = 0 if start is None else stages.index(start)
    last = len(stages) - 1 if stop is None else stages.index(stop)
    return tuple(stages[first : last + 1])


class Conv(nnx.Module):
    """The arrays of a convolution: `kernel`, and `bias` or None."""

    def __init__(self, inputs: int, outputs: int, size: int, *, use_bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(glorot_uniform(rngs, (size, size, inputs, outputs)))
        self.bias = nnx.Param(_filled(0, outputs)) if use_bias else None

    def __call__(self, x: Array, *, stride: int = 1, padding: int | None = None) -> Array:
        """Applies it to `[N, H, W, C]`, in its dtype; see `conv2d`."""
        y = conv2d(x, self.kernel[...].astype(x.dtype), stride, padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class BatchNorm(nnx.Module):
    """The arrays of a batch norm: `scale`, `bias`, and the running `mean`, `var`.

    `own_share` is the share that an image's own moments have in those it is normalised by.
    """

    own_share: float = 0.0

    def __init__(self, features: int):
        self.scale = nnx.Param(_filled(1, features))
        self.bias = nnx.Param(_filled(0, features))
        self.mean = nnx.BatchStat(_filled(0, features))
        self.var = nnx.BatchStat(_filled(1, features))

    def normalise(self, y: Array, mean: Array, var: Array, epsilon: float) -> Array:
        """`[N, H, W, C]` by these statistics, scaled and shifted, in float32."""
        scale = self.scale[...] * lax.rsqrt(var + epsilon)
        return y * scale + (self.bias[...] - mean * scale)

    def mixed(self, y: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """These statistics, `[C]`, as if `own_share` of all pixels were each image's own.

        Between batch normalisation and the instance normalisation of Ulyanov et al. 2016.

        Returns:
          Each image's, `[N, 1, 1, C]`; where its share is nothing, the statistics given.
        """
        if not self.own_share:
            return mean, var
        own_mean, own_var = jax.vmap(lambda image: batch_statistics(image, mean))(y[:, None])
        share, off = self.own_share, own_mean - mean
        mean = mean + share * off
        var = var + share * (own_var - var) + share * (1 - share) * off * off
        return mean[:, None, None], var[:, None, None]

    def follow(self, mean: Array, var: Array, momentum: float) -> None:
        """Moves the running statistics; with the biased variance, as Keras 3."""
        for running, new in ((self.mean, mean), (self.var, var)):
            kept = momentum * running[...]
            running[...] = kept + (1 - momentum) * lax.stop_gradient(new)


def set_own_shares(model: nnx.Module, shares: Mapping[str, float]) -> None:
    """Of an image's own moments in the batch norms of a network, by stage; see `BatchNorm`."""
    for stage, share in shares.items():
        for _, module in nnx.iter_modules(getattr(model, stage)):
            if isinstance(module, BatchNorm):
                module.own_share = share


def batch_statistics(
    y: Array,
    shift: Array,
    example_weights: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """Mean and biased variance of `[N, H, W, C]` over all but channels, `[C]`, float32.

    One pass, shifted by about the mean: without a shift E[y^2] - E[y]^2 cancels badly where
    the mean is large against the deviation. The other arguments are those of `ConvBN`. Under
    `jax.checkpoint` its sums have the name `statistics`.
    """
    d = y.astype(jnp.float32) - shift
    if example_weights is None:
        sums = jnp.mean(d, (0, 1, 2)), jnp.mean(d * d, (0, 1, 2))
    else:
        weights = (example_weights / math.prod(y.shape[1:3]))[:, None, None, None]
        sums = jnp.sum(d * weights, (0, 1, 2)), jnp.sum(d * d * weights, (0, 1, 2))
    if axis_name is not None:
        sums = lax.pmean(sums, axis_name)
    mean_d, mean_d2 = checkpoint_name(sums, "statistics")
    return mean_d + shift, jnp.maximum(mean_d2 - mean_d * mean_d, 0.0)


class ConvBN(nnx.Module):
    """Convolution and batch norm as one operation.

    The convolution's bias never touches an activation. With batch statistics it
    cancels, so only the running mean takes it in; with running statistics it joins
    the shift. This is exact, and leaves the bias's gradient exactly zero in the first
    case, where computing it gives rounding noise that Adam would blow up.

    In half precision with batch statistics, a 1x1 convolution that widens enough goes another
    way, see `covid_flax.models.expand`.
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

    def __call__(
        self,
        x: Array,
        *,
        use_batch_stats: bool,
        example_weights: Array | None = None,
        axis_name: str | None = None,
        every: int = 1,
    ) -> Array:
        """Applies it to `[N, H, W, C]`.

        Args:
          x: input, cast to the layer's dtype.
          use_batch_stats: normalise by this batch and update the running statistics
            (Keras: `training=True`); else by the running statistics, left as they are.
          example_weights: float32 `[N]` that sums to one, of each example in the batch
            statistics: zero for those that only fill a batch up. None weighs all alike.
          axis_name: mapped axis over which the statistics are averaged (pmap only;
            under jit the batch is global already).
          every: return only every so-many-th row and column; batch statistics are of all.
        """
        # From twice as wide on the covariance costs less than it saves.
        wide = self.spares_traffic and widens(self.conv.kernel.shape, 2)
        own = self.bn.own_share > 0
        if wide and use_batch_stats and example_weights is None and not own:
            y, mean, var = conv1x1_batch_norm(
                x[:, :: self.stride, :: self.stride].astype(self.dtype),
                self.conv.kernel[...][0, 0],
                self.bn.scale[...],
                self.bn.bias[...],
                self.epsilon,
                every,
                axis_name,
            )
            self._follow(mean, var)
            return y
        whole = use_batch_stats or own  # moments are of all positions
        stride = self.stride if whole else self.stride * every
        y = conv2d(x.astype(self.dtype), self.conv.kernel[...].astype(self.dtype), stride)
        bn, bias = self.bn, self._bias
        if use_batch_stats:
            shift = lax.stop_gradient(bn.mean[...] - bias)
            mean, var = batch_statistics(y, shift, example_weights, axis_name)
            self._follow(mean, var)
        else:
            mean, var = bn.mean[...] - bias, bn.var[...]
        mean, var = bn.mixed(y, mean, var)
        if whole:
            y = y[:, ::every, ::every]
        return bn.normalise(y, mean, var, self.epsilon).astype(self.dtype)

    def max_pooled(
        self, x: Array, *, example_weights: Array | None = None, axis_name: str | None = None
    ) -> Array:
        """`__call__` by batch statistics, ReLU and 3x3 max pooling of stride 2, in other order.

        Pooling first is the same where batch norm's scale is not negative; the kernels of
        channels where it is are turned round. A quarter of the pixels is then left to
        normalise, and the convolution is computed again for the gradient, not kept.
        """
        bn, bias = self.bn, self._bias
        sign = jnp.where(bn.scale[...] < 0, -1.0, 1.0)

        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names("statistics"),
        )
        def convolve(x: Array, kernel: Array, shift: Array) -> tuple[Array, Array, Array]:
            y = conv2d(x, kernel, self.stride)
            mean, var = batch_statistics(y, shift, example_weights, axis_name)
            # Minus infinity around: before batch norm, zeros would count.
            padding = ((0, 0), (1, 1), (1, 1), (0, 0))
            y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
            return y, mean, var

        kernel = (self.conv.kernel[...] * sign).astype(self.dtype)
        shift = lax.stop_gradient(bn.mean[...] - bias) * sign
        y, mean, var = convolve(x.astype(self.dtype), kernel, shift)
        self._follow(mean * sign, var)
        scale = bn.scale[...] * sign * lax.rsqrt(var + self.epsilon)
        return nnx.relu(y * scale + (bn.bias[...] - mean * scale)).astype(self.dtype)

    @property
    def spares_traffic(self) -> bool:
        """Whether formulas that move less memory for more arithmetic are taken.

        In half precision, which is for accelerators: they compute faster than they read.
        """
        return self.dtype == jnp.bfloat16

    def _follow(self, mean: Array, var: Array) -> None:
        self.bn.follow(mean + self._bias, var, self.momentum)

    @property
    def _bias(self) -> Array | float:
        return 0.0 if self.conv.bias is None else self.conv.bias[...]


@jax.custom_vjp
def relu_kept(x: Array) -> Array:
    """`max(x, 0)` whose output is kept for the gradient in any case, so that `x` need not be."""
    return jnp.maximum(x, 0)


def _relu_forward(x: Array) -> tuple[Array, Array]:
    # Without the barrier XLA reads the sign off x after all, and keeps both.
    y = lax.optimization_barrier(jnp.maximum(x, 0))
    return y, y


def _relu_backward(y: Array, g: Array) -> tuple[Array]:
    return (jnp.where(y > 0, g, 0),)


relu_kept.defvjp(_relu_forward, _relu_backward)


class Dense(nnx.Module):
    """Fully connected layer in float32: `[N, I] -> [N, O]`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(glorot_uniform(rngs, (inputs, outputs)))
        self.bias = nnx.Param(_filled(0, outputs))

    def __call__(self, x: Array) -> Array:
        # Accelerators would round the operands to 10 bits or fewer.
        product = jnp.dot(x, self.kernel[...], precision=lax.Precision.HIGHEST)
        return product + self.bias[...]


def adaptive_average_pool(x: Array, size: int) -> Array:
    """Means of `size` x `size` cells, as PyTorch's `adaptive_avg_pool2d`, in float32.

    Cell i of a side of n pixels spans floor(i n / size) to ceil((i + 1) n / size): a map of
    that size stays as it is, cells of a smaller one repeat its pixels. A network's dense
    layers so fit images of every size.

    Args:
      x: `[N, H, W, C]`.

    Returns:
      float32 `[N, size, size, C]`.
    """
    x = x.astype(jnp.float32)
    for axis in (1, 2):
        n = x.shape[axis]
        cells = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        means = [jnp.mean(lax.slice_in_dim(x, a, b, axis=axis), axis) for a, b in cells]
        x = jnp.stack(means, axis)
    return x


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout, as Keras's; the identity where `key` is None or `rate` 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


class Head(nnx.Module):
    """Dense, ReLU, dropout, dense; without the first two where `hidden_units` is 0. Float32."""

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        hidden_units: int,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.hidden = Dense(inputs, hidden_units, rngs=rngs) if hidden_units else None
        self.predictions = Dense(hidden_units or inputs, classes, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, x: Array, dropout_key: Array | None) -> Array:
        if self.hidden is not None:
            x = nnx.relu(self.hidden(x))
        return self.predictions(dropout(x, self.dropout_rate, dropout_key))
