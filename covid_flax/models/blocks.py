"""Layers of the light networks, which stand under Keras's own layer names.

There a convolution and its batch norm are layers apart (`block1a_dwconv`, `block1a_bn`), padded
as TensorFlow's 'SAME'. Arrays are NHWC; parameters and statistics float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from covid_flax.models.conv import conv2d
from covid_flax.models.depthwise import depthwise_conv2d, same_padding
from covid_flax.models.expand import conv1x1_batch_norm, widens
from covid_flax.models.layers import (
    BatchNorm,
    Conv,
    Head,
    batch_statistics,
    glorot_uniform,
    stages_between,
)

Array = jax.Array
Activation = Callable[[Array], Array]


class DepthwiseConv(nnx.Module):
    """The array of a depthwise convolution: `kernel` `[K, K, C, 1]`."""

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(glorot_uniform(rngs, (size, size, channels, 1)))

    def __call__(self, x: Array, *, stride: int = 1) -> Array:
        """Applies it to `[N, H, W, C]`, in its dtype, padded 'SAME'."""
        return depthwise_conv2d(x, self.kernel[...].astype(x.dtype), stride)


def conv_same(conv: Conv, x: Array, stride: int = 1) -> Array:
    """A convolution of `[N, H, W, C]`, in its dtype, padded 'SAME', with its bias if any."""
    kernel = conv.kernel[...].astype(x.dtype)
    y = conv2d(x, kernel, stride, same_padding(x.shape[1:3], len(kernel), stride))
    return y if conv.bias is None else y + conv.bias[...].astype(x.dtype)


def batch_norm(
    bn: BatchNorm,
    y: Array,
    *,
    epsilon: float,
    momentum: float,
    use_batch_stats: bool,
    example_weights: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Batch norm of `[N, H, W, C]`, in its dtype; the statistics in float32.

    The arguments after `momentum` are those of `ConvBN`. With batch statistics the running ones
    move.
    """
    mean, var = bn.mean[...], bn.var[...]
    if use_batch_stats:
        shift = lax.stop_gradient(mean)
        mean, var = batch_statistics(y, shift, example_weights, axis_name)
        bn.follow(mean, var, momentum)
    mean, var = bn.mixed(y, mean, var)
    return bn.normalise(y, mean, var, epsilon).astype(y.dtype)


def conv_batch_norm(conv: Conv, bn: BatchNorm, x: Array, stride: int = 1, **norm: Any) -> Array:
    """`conv_same` and `batch_norm`; `norm` is the latter's keyword arguments.

    In float32 a 1x1 convolution that widens six times goes another way, see `expand`.
    """
    wide = x.dtype == jnp.float32 and conv.bias is None and widens(conv.kernel.shape, 6)
    unweighted = norm.get("example_weights") is None
    if wide and norm["use_batch_stats"] and unweighted and not bn.own_share:
        kernel, scale, bias = conv.kernel[...][0, 0], bn.scale[...], bn.bias[...]
        x = x[:, ::stride, ::stride]
        y, mean, var = conv1x1_batch_norm(
            x, kernel, scale, bias, norm["epsilon"], 1, norm.get("axis_name")
        )
        bn.follow(mean, var, norm["momentum"])
        return y
    return batch_norm(bn, conv_same(conv, x, stride), **norm)


def multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, from 8 on, but no more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def global_average(x: Array) -> Array:
    """Means over rows and columns of `[N, H, W, C]`: float32 `[N, C]`."""
    return jnp.mean(x.astype(jnp.float32), (1, 2))


def add_named(module: nnx.Module, layers: dict[str, Any]) -> None:
    """Sets layers as attributes: their names, Keras's, are those of the parameter tree."""
    for name, layer in layers.items():
        setattr(module, name, layer)


class NamedConvBN(nnx.Module):
    """A convolution, its batch norm and an activation, the first two under names of Keras's.

    Args:
      inputs, outputs: channels.
      size, stride: of the kernel.
      conv, bn: the layers' names.
      activation: what follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int,
        *,
        conv: str,
        bn: str,
        activation: Activation,
        rngs: nnx.Rngs,
    ):
        self.stride, self.activation = stride, activation
        self.conv_name, self.bn_name = conv, bn
        layer = Conv(inputs, outputs, size, use_bias=False, rngs=rngs)
        add_named(self, {conv: layer, bn: BatchNorm(outputs)})

    def __call__(self, x: Array, **norm: Any) -> Array:
        """Of `[N, H, W, C]`; see `batch_norm` for the rest."""
        conv, bn = getattr(self, self.conv_name), getattr(self, self.bn_name)
        return self.activation(conv_batch_norm(conv, bn, x, self.stride, **norm))


class StagedNetwork(nnx.Module):
    """Stages one after the other, global average pooling, a head: preprocessed images to logits.

    A family adds its stages, by name, and calls `add_head`.

    Args:
      spec: of the family: `stages` and `epsilon` are read here.
      momentum: of the running batch statistics (Keras's convention).
      dtype: in which the convolutions compute; the head is float32 always.
    """

    def __init__(self, spec: Any, *, momentum: float, dtype: Any):
        self.spec, self.momentum, self.dtype = spec, momentum, dtype

    def add_head(
        self, features: int, classes: int, hidden_units: int, dropout_rate: float, rngs: nnx.Rngs
    ) -> None:
        self.head = Head(
            features, classes, hidden_units=hidden_units, dropout_rate=dropout_rate, rngs=rngs
        )

    def __call__(
        self,
        x: Array,
        *,
        batch_stats_in: Collection[str] = (),
        example_weights: Array | None = None,
        dropout_key: Array | None = None,
        axis_name: str | None = None,
        start: str | None = None,
        stop: str | None = None,
    ) -> Array:
        """Runs the stages from `start` to `stop`, both included; the arguments are `ResNet`'s.

        Args:
          x: what `start` takes: for the first stage preprocessed images `[N, H, W, 3]`.

        Returns:
          The output of `stop`; of `head`, logits `[N, classes]` in float32.
        """
        for name in stages_between(self.spec.stages, start, stop):
            if name == "pool":
                x = global_average(x)
            elif name == "head":
                x = self.head(x, dropout_key)
            else:
                x = getattr(self, name)(
                    x.astype(self.dtype),
                    epsilon=self.spec.epsilon,
                    momentum=self.momentum,
                    use_batch_stats=name in batch_stats_in,
                    example_weights=example_weights,
                    axis_name=axis_name,
                )
        return x
