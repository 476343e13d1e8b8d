"""LeNet-5 (LeCun, Bottou, Bengio and Haffner 1998), in the form in which it is taught today.

Grey image; 5x5 convolution to 6 maps, tanh, 2x2 average pooling; 5x5 convolution to 16 maps,
tanh, 2x2 average pooling; dense 120, 84 and one a class, tanh between. Against the paper: the
tanh is plain; pooling has no weights of its own; the second convolution sees all 6 maps (the
paper cut some connections: 1,516 weights, here 2,416); the output is a softmax, not radial
basis functions. Its input is 32x32; at a larger one the last maps are averaged to the 5x5
that the dense layers take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from covid_flax.models.layers import Conv, Dense, adaptive_average_pool, dropout, stages_between

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LeNetSpec:
    """What distinguishes one LeNet from another.

    Attributes:
      channels: of the two convolutions.
      hidden_units: of the two hidden dense layers.
      grid: side of the maps that the dense layers take.
      preprocessing: `torch` gives X-rays a mean near 0 and a deviation near 1, as the paper
        advises.
      stages: of every LeNet; `pool` has no parameters, `head` is all dense layers.
      native_size: side of the images it was designed for, pixels.
      smallest: side of the smallest image, pixels.
    """

    channels: tuple[int, int]
    hidden_units: tuple[int, int]
    grid: int
    preprocessing: str
    native_size: ClassVar[int] = 32
    stages: ClassVar[tuple[str, ...]] = ("conv1", "conv2", "pool", "head")
    smallest: ClassVar[int] = 32


LENET5 = LeNetSpec((6, 16), (120, 84), 5, "torch")


class LeNetHead(nnx.Module):
    """Dense, tanh, dense, tanh, dropout, dense. Float32."""

    def __init__(
        self,
        inputs: int,
        hidden_units: tuple[int, int],
        classes: int,
        *,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.hidden1 = Dense(inputs, hidden_units[0], rngs=rngs)
        self.hidden2 = Dense(*hidden_units, rngs=rngs)
        self.predictions = Dense(hidden_units[1], classes, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, x: Array, dropout_key: Array | None) -> Array:
        x = jnp.tanh(self.hidden2(jnp.tanh(self.hidden1(x))))
        return self.predictions(dropout(x, self.dropout_rate, dropout_key))


class LeNet(nnx.Module):
    """LeNet: preprocessed images to logits.

    Args:
      spec: which LeNet.
      num_classes: logits.
      dropout_rate: before the last layer; the paper has none.
      dtype: in which the convolutions compute; the head is float32 always.
      rngs: with a `params` stream.
    """

    def __init__(
        self,
        spec: LeNetSpec,
        *,
        num_classes: int,
        dropout_rate: float = 0.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.spec, self.dtype = spec, dtype
        first, second = spec.channels
        self.conv1 = Conv(1, first, 5, use_bias=True, rngs=rngs)
        self.conv2 = Conv(first, second, 5, use_bias=True, rngs=rngs)
        self.head = LeNetHead(
            spec.grid**2 * second,
            spec.hidden_units,
            num_classes,
            dropout_rate=dropout_rate,
            rngs=rngs,
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
        """Runs the stages from `start` to `stop`, both included.

        Args:
          x: what `start` takes: for `conv1` preprocessed images `[N, H, W, C]`, whose
            channels are averaged: grey.
          batch_stats_in, example_weights, axis_name: as of the other networks; there is no
            batch norm here that would use them.
          dropout_key: None switches dropout off.
          start, stop: names of `LeNetSpec.stages`; None is the first, the last.

        Returns:
          The output of `stop`; of `head`, logits `[N, num_classes]` in float32.
        """
        for name in stages_between(LeNetSpec.stages, start, stop):
            if name == "conv1":
                x = jnp.mean(x, -1, keepdims=True).astype(self.dtype)
            if name == "pool":
                x = adaptive_average_pool(x, self.spec.grid)
                x = x.reshape(len(x), -1)
            elif name == "head":
                x = self.head(x, dropout_key)
            else:
                x = jnp.tanh(getattr(self, name)(x, padding=0))
                x = nnx.avg_pool(x, (2, 2), (2, 2))
        return x
