"""MobileNetV2 (Sandler et al. 2018) and V3 (Howard et al. 2019) as in `keras.applications`.

Of inverted bottlenecks, some of V3's with squeeze and excitation. Width 1.0. A layer's name in the
tree is Keras's, under its stage, a stage being the blocks of one number of outputs:
`block2/block_1_depthwise/kernel`. The head takes the pooled features, as after Keras's
`include_top=False, pooling="avg"`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from covid_flax.models.blocks import Activation, NamedConvBN, StagedNetwork, multiple_of_8
from covid_flax.models.inverted import Bottleneck, Gate, InvertedBottlenecks, Names


@dataclasses.dataclass(frozen=True)
class MobileNetSpec:
    """What distinguishes one MobileNet from another.

    Attributes:
      blocks: in order.
      stem, top: names of the convolution and its batch norm, outputs.
      activation: of stem and top.
      preprocessing: what its ImageNet weights expect, see `covid_flax.models.preprocess`.
      epsilon: batch norm's.
      native_size: side of the images it was designed for, pixels.
      smallest: side of the smallest image, pixels.
    """

    blocks: tuple[Bottleneck, ...]
    stem: tuple[str, str, int]
    top: tuple[str, str, int]
    activation: Activation
    preprocessing: ClassVar[str] = "tf"
    epsilon: ClassVar[float] = 1e-3
    native_size: ClassVar[int] = 224
    smallest: ClassVar[int] = 32

    def staged(self) -> dict[str, list[Bottleneck]]:
        """The blocks by stage, `block1` first."""
        groups = itertools.groupby(self.blocks, lambda b: b.outputs)
        return {f"block{i}": list(group) for i, (_, group) in enumerate(groups, 1)}

    @property
    def stages(self) -> tuple[str, ...]:
        """In order of computation; `pool` has no parameters."""
        return ("stem", *self.staged(), "top", "pool", "head")


def _v2() -> MobileNetSpec:
    blocks: list[Bottleneck] = []
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
            names = _names(f"block_{len(blocks)}_" if blocks else "expanded_conv_", "BN")
            step, wide = 1 if i else stride, inputs * expansion
            blocks.append(Bottleneck(names, inputs, wide, outputs, 3, step, nnx.relu6, None))
            inputs = outputs
    stem, top = ("Conv1", "bn_Conv1", 32), ("Conv_1", "Conv_1_bn", 1280)
    return MobileNetSpec(tuple(blocks), stem, top, nnx.relu6)


def _v3(rows: tuple[tuple[int, int, int, int, bool, Activation], ...]) -> MobileNetSpec:
    """Of (depthwise channels, outputs, size, stride, squeeze and excitation, activation)."""
    blocks: list[Bottleneck] = []
    inputs = 16
    for i, (wide, outputs, size, stride, excite, activation) in enumerate(rows):
        names = _names(f"expanded_conv_{i}_" if i else "expanded_conv_", "bn")
        gate = Gate(multiple_of_8(wide / 4), nnx.relu, nnx.hard_sigmoid) if excite else None
        blocks.append(Bottleneck(names, inputs, wide, outputs, size, stride, activation, gate))
        inputs = outputs
    stem, top = ("conv", "conv_bn", 16), ("conv_1", "conv_1_bn", 6 * inputs)
    return MobileNetSpec(tuple(blocks), stem, top, nnx.hard_swish)


def _names(start: str, bn: str) -> Names:
    """The layers' names of the block whose name this is, batch norms ending in `bn`."""
    return Names(
        expand=start + "expand",
        expand_bn=f"{start}expand_{bn}",
        depthwise=start + "depthwise",
        depthwise_bn=f"{start}depthwise_{bn}",
        squeeze=start + "squeeze_excite_conv",
        excite=start + "squeeze_excite_conv_1",
        project=start + "project",
        project_bn=f"{start}project_{bn}",
    )


_RE, _HS = nnx.relu, nnx.hard_swish


# Tables 1 and 2 of the V3 paper.
MOBILENETS = {
    "mobilenet_v2": _v2(),
    "mobilenet_v3_small": _v3(
        (
            (16, 16, 3, 2, True, _RE),
            (72, 24, 3, 2, False, _RE),
            (88, 24, 3, 1, False, _RE),
            (96, 40, 5, 2, True, _HS),
            (240, 40, 5, 1, True, _HS),
            (240, 40, 5, 1, True, _HS),
            (120, 48, 5, 1, True, _HS),
            (144, 48, 5, 1, True, _HS),
            (288, 96, 5, 2, True, _HS),
            (576, 96, 5, 1, True, _HS),
            (576, 96, 5, 1, True, _HS),
        )
    ),
    "mobilenet_v3_large": _v3(
        (
            (16, 16, 3, 1, False, _RE),
            (64, 24, 3, 2, False, _RE),
            (72, 24, 3, 1, False, _RE),
            (72, 40, 5, 2, True, _RE),
            (120, 40, 5, 1, True, _RE),
            (120, 40, 5, 1, True, _RE),
            (240, 80, 3, 2, False, _HS),
            (200, 80, 3, 1, False, _HS),
            (184, 80, 3, 1, False, _HS),
            (184, 80, 3, 1, False, _HS),
            (480, 112, 3, 1, True, _HS),
            (672, 112, 3, 1, True, _HS),
            (672, 160, 5, 2, True, _HS),
            (960, 160, 5, 1, True, _HS),
            (960, 160, 5, 1, True, _HS),
        )
    ),
}


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
        how: dict[str, Any] = {"activation": spec.activation, "rngs": rngs}
        conv, bn, outputs = spec.stem
        self.stem = NamedConvBN(3, outputs, 3, 2, conv=conv, bn=bn, **how)
        for name, blocks in spec.staged().items():
            setattr(self, name, InvertedBottlenecks(blocks, rngs=rngs))
        conv, bn, features = spec.top
        inputs = spec.blocks[-1].outputs
        self.top = NamedConvBN(inputs, features, 1, 1, conv=conv, bn=bn, **how)
        self.add_head(features, num_classes, hidden_units, dropout_rate, rngs)
