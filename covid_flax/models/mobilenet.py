"""MobileNetV2 (Sandler et al. 2018) and V3 (Howard et al. 2019) as in `keras.applications`.

Inverted bottlenecks: 1x1 expand, depthwise, in V3 squeeze and excitation, 1x1 project, added to the
input where shapes agree. Width 1.0. A layer's name in the tree is Keras's, under its stage, a
stage being the blocks of one number of outputs: `block2/block_1_depthwise/kernel`. The head
takes the pooled features, as after Keras's `include_top=False, pooling="avg"`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from covid_flax.models.blocks import (
    Activation,
    DepthwiseConv,
    NamedConvBN,
    StagedNetwork,
    add_named,
    batch_norm,
    conv_batch_norm,
    conv_same,
    global_average,
    multiple_of_8,
)
from covid_flax.models.layers import BatchNorm, Conv

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Block:
    """One inverted bottleneck: the start of its layers' names, and its shape.

    Attributes:
      wide: channels of the depthwise convolution; those of the input: nothing is expanded.
      excite: squeeze and excitation after the depthwise convolution.
      activation: a name in `_ACTIVATIONS`.
    """

    prefix: str
    inputs: int
    wide: int
    outputs: int
    size: int
    stride: int
    excite: bool
    activation: str


@dataclasses.dataclass(frozen=True)
class MobileNetSpec:
    """What distinguishes one MobileNet from another.

    Attributes:
      blocks: in order.
      bn: the end of a batch norm's name.
      stem, top: names of the convolution and its batch norm, outputs.
      activation: of stem and top.
      preprocessing: what its ImageNet weights expect, see `covid_flax.models.preprocess`.
      epsilon: batch norm's.
      native_size: side of the images it was designed for, pixels.
      smallest: side of the smallest image, pixels.
    """

    blocks: tuple[_Block, ...]
    bn: str
    stem: tuple[str, str, int]
    top: tuple[str, str, int]
    activation: str
    preprocessing: ClassVar[str] = "tf"
    epsilon: ClassVar[float] = 1e-3
    native_size: ClassVar[int] = 224
    smallest: ClassVar[int] = 32

    def staged(self) -> dict[str, list[_Block]]:
        """The blocks by stage, `block1` first."""
        groups = itertools.groupby(self.blocks, lambda b: b.outputs)
        return {f"block{i}": list(group) for i, (_, group) in enumerate(groups, 1)}

    @property
    def stages(self) -> tuple[str, ...]:
        """In order of computation; `pool` has no parameters."""
        return ("stem", *self.staged(), "top", "pool", "head")


def _v2() -> MobileNetSpec:
    blocks: list[_Block] = []
    inputs = 32
    # Expansion, outputs, blocks, stride of the first: table 2 of the paper.
    for expansion, outputs, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(repeats):
            prefix = f"block_{len(blocks)}_" if blocks else "expanded_conv_"
            step, wide = 1 if i else stride, inputs * expansion
            blocks.append(_Block(prefix, inputs, wide, outputs, 3, step, False, "relu6"))
            inputs = outputs
    stem, top = ("Conv1", "bn_Conv1", 32), ("Conv_1", "Conv_1_bn", 1280)
    return MobileNetSpec(tuple(blocks), "BN", stem, top, "relu6")


def _v3(rows: tuple[tuple[int, int, int, int, bool, str], ...]) -> MobileNetSpec:
    """Of (depthwise channels, outputs, size, stride, squeeze and excitation, activation)."""
    blocks: list[_Block] = []
    inputs = 16
    for i, (wide, outputs, *rest) in enumerate(rows):
        prefix = f"expanded_conv_{i}_" if i else "expanded_conv_"
        blocks.append(_Block(prefix, inputs, wide, outputs, *rest))  # type: ignore[arg-type]
        inputs = outputs
    stem, top = ("conv", "conv_bn", 16), ("conv_1", "conv_1_bn", 6 * inputs)
    return MobileNetSpec(tuple(blocks), "bn", stem, top, "hard_swish")


# Tables 1 and 2 of the V3 paper.
MOBILENETS = {
    "mobilenet_v2": _v2(),
    "mobilenet_v3_small": _v3(
        (
            (16, 16, 3, 2, True, "relu"),
            (72, 24, 3, 2, False, "relu"),
            (88, 24, 3, 1, False, "relu"),
            (96, 40, 5, 2, True, "hard_swish"),
            (240, 40, 5, 1, True, "hard_swish"),
            (240, 40, 5, 1, True, "hard_swish"),
            (120, 48, 5, 1, True, "hard_swish"),
            (144, 48, 5, 1, True, "hard_swish"),
            (288, 96, 5, 2, True, "hard_swish"),
            (576, 96, 5, 1, True, "hard_swish"),
            (576, 96, 5, 1, True, "hard_swish"),
        )
    ),
    "mobilenet_v3_large": _v3(
        (
            (16, 16, 3, 1, False, "relu"),
            (64, 24, 3, 2, False, "relu"),
            (72, 24, 3, 1, False, "relu"),
            (72, 40, 5, 2, True, "relu"),
            (120, 40, 5, 1, True, "relu"),
            (120, 40, 5, 1, True, "relu"),
            (240, 80, 3, 2, False, "hard_swish"),
            (200, 80, 3, 1, False, "hard_swish"),
            (184, 80, 3, 1, False, "hard_swish"),
            (184, 80, 3, 1, False, "hard_swish"),
            (480, 112, 3, 1, True, "hard_swish"),
            (672, 112, 3, 1, True, "hard_swish"),
            (672, 160, 5, 2, True, "hard_swish"),
            (960, 160, 5, 1, True, "hard_swish"),
            (960, 160, 5, 1, True, "hard_swish"),
        )
    ),
}

_ACTIVATIONS: dict[str, Activation] = {
    "relu": nnx.relu,
    "relu6": nnx.relu6,
    "hard_swish": nnx.hard_swish,
}


class _Stage(nnx.Module):
    """The blocks of one stage, their layers side by side."""

    def __init__(self, blocks: list[_Block], bn: str, *, rngs: nnx.Rngs):
        self.blocks, self.bn = tuple(blocks), bn

        def conv(inputs: int, outputs: int, use_bias: bool = False) -> Conv:
            return Conv(inputs, outputs, 1, use_bias=use_bias, rngs=rngs)

        for b in blocks:
            layers: dict[str, Any] = {}
            if b.wide != b.inputs:
                layers = {"expand": conv(b.inputs, b.wide), f"expand_{bn}": BatchNorm(b.wide)}
            layers["depthwise"] = DepthwiseConv(b.wide, b.size, rngs=rngs)
            layers[f"depthwise_{bn}"] = BatchNorm(b.wide)
            if b.excite:
                narrow = multiple_of_8(b.wide / 4)
                layers["squeeze_excite_conv"] = conv(b.wide, narrow, use_bias=True)
                layers["squeeze_excite_conv_1"] = conv(narrow, b.wide, use_bias=True)
            layers |= {"project": conv(b.wide, b.outputs), f"project_{bn}": BatchNorm(b.outputs)}
            add_named(self, {b.prefix + name: layer for name, layer in layers.items()})

    def __call__(self, x: Array, **bn: Any) -> Array:
        for b in self.blocks:
            activate = _ACTIVATIONS[b.activation]

            def layer(name: str, prefix: str = b.prefix) -> Any:
                return getattr(self, prefix + name)

            y = x
            if b.wide != b.inputs:
                y = conv_batch_norm(layer("expand"), layer(f"expand_{self.bn}"), y, **bn)
                y = activate(y)
            y = layer("depthwise")(y, stride=b.stride)
            y = activate(batch_norm(layer(f"depthwise_{self.bn}"), y, **bn))
            if b.excite:
                gate = global_average(y)[:, None, None]
                gate = nnx.relu(conv_same(layer("squeeze_excite_conv"), gate))
                gate = nnx.hard_sigmoid(conv_same(layer("squeeze_excite_conv_1"), gate))
                y = y * gate.astype(y.dtype)
            y = conv_batch_norm(layer("project"), layer(f"project_{self.bn}"), y, **bn)
            x = x + y if b.stride == 1 and b.inputs == b.outputs else y
        return x


class MobileNet(StagedNetwork):
    """MobileNet: preprocessed images to logits; the arguments are those of `EfficientNet`."""

    def __init__(
        self,
        spec: MobileNetSpec,
        *,
        num_classes: int,
        hidden_units: int = 0,
        dropout_rate: float = 0.2,
        momentum: float = 0.99,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(spec, momentum=momentum, dtype=dtype)
        how: dict[str, Any] = {"activation": _ACTIVATIONS[spec.activation], "rngs": rngs}
        conv, bn, outputs = spec.stem
        self.stem = NamedConvBN(3, outputs, 3, 2, conv=conv, bn=bn, **how)
        for name, blocks in spec.staged().items():
            setattr(self, name, _Stage(blocks, spec.bn, rngs=rngs))
        conv, bn, features = spec.top
        inputs = spec.blocks[-1].outputs
        self.top = NamedConvBN(inputs, features, 1, 1, conv=conv, bn=bn, **how)
        self.add_head(features, num_classes, hidden_units, dropout_rate, rngs)
