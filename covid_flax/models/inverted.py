"""Inverted bottlenecks (Sandler et al. 2018), of which MobileNets and EfficientNets are made.

1x1 expand, depthwise, perhaps squeeze and excitation (Hu et al. 2018), 1x1 project, added to the
input where shapes agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from covid_flax.models.blocks import (
    Activation,
    DepthwiseConv,
    add_named,
    batch_norm,
    conv_batch_norm,
    conv_same,
    global_average,
)
from covid_flax.models.layers import BatchNorm, Conv

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Gate:
    """Squeeze and excitation: channels between, and what follows either convolution."""

    channels: int
    squeezed: Activation
    excited: Activation


@dataclasses.dataclass(frozen=True)
class Names:
    """Of a bottleneck's layers in the parameter tree: Keras's."""

    expand: str
    expand_bn: str
    depthwise: str
    depthwise_bn: str
    squeeze: str
    excite: str
    project: str
    project_bn: str


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """The shape of one.

    Attributes:
      names: of its layers.
      inputs, outputs: channels.
      wide: channels of the depthwise convolution; those of the input: nothing is expanded.
      size, stride: of the depthwise kernel.
      activation: what follows expanding and the depthwise convolution.
      gate: after the depthwise convolution; None where there is none.
    """

    names: Names
    inputs: int
    wide: int
    outputs: int
    size: int
    stride: int
    activation: Activation
    gate: Gate | None


class InvertedBottlenecks(nnx.Module):
    """Bottlenecks one after the other, their layers side by side: a stage."""

    def __init__(self, blocks: Sequence[Bottleneck], *, rngs: nnx.Rngs):
        self.blocks = tuple(blocks)

        def conv(inputs: int, outputs: int, use_bias: bool = False) -> Conv:
            return Conv(inputs, outputs, 1, use_bias=use_bias, rngs=rngs)

        for b in blocks:
            n, layers = b.names, dict[str, Any]()
            if b.wide != b.inputs:
                layers |= {n.expand: conv(b.inputs, b.wide), n.expand_bn: BatchNorm(b.wide)}
            layers[n.depthwise] = DepthwiseConv(b.wide, b.size, rngs=rngs)
            layers[n.depthwise_bn] = BatchNorm(b.wide)
            if b.gate is not None:
                layers[n.squeeze] = conv(b.wide, b.gate.channels, use_bias=True)
                layers[n.excite] = conv(b.gate.channels, b.wide, use_bias=True)
            layers |= {n.project: conv(b.wide, b.outputs), n.project_bn: BatchNorm(b.outputs)}
            add_named(self, layers)

    def __call__(self, x: Array, **norm: Any) -> Array:
        """Of `[N, H, W, C]`; see `batch_norm` for the rest."""

        def layer(name: str) -> Any:
            return getattr(self, name)

        for b in self.blocks:
            n, y = b.names, x
            if b.wide != b.inputs:
                y = conv_batch_norm(layer(n.expand), layer(n.expand_bn), y, **norm)
                y = b.activation(y)
            y = layer(n.depthwise)(y, stride=b.stride)
            y = b.activation(batch_norm(layer(n.depthwise_bn), y, **norm))
            if b.gate is not None:
                share = global_average(y)[:, None, None]
                share = b.gate.squeezed(conv_same(layer(n.squeeze), share))
                share = b.gate.excited(conv_same(layer(n.excite), share))
                y = y * share.astype(y.dtype)
            y = conv_batch_norm(layer(n.project), layer(n.project_bn), y, **norm)
            x = x + y if b.stride == 1 and b.inputs == b.outputs else y
        return x
