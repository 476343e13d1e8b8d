"""EfficientNet (Tan and Le 2019) as in `keras.applications`, and EfficientNet-Lite0 to Lite2.

Of inverted bottlenecks with squeeze and excitation. The Lite form (TensorFlow's
`efficientnet/lite`) has ReLU6 for swish, no squeeze and excitation, and a stem and top of one
width. A layer's name in the tree is Keras's, under its stage: `block2/block2a_dwconv/kernel`.
Keras's dropping of whole blocks in training is left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from covid_flax.models.blocks import Activation, NamedConvBN, StagedNetwork, multiple_of_8
from covid_flax.models.inverted import Bottleneck, Gate, InvertedBottlenecks, Names

# Of each stage before scaling: kernel size, outputs, expansion, stride.
_STAGES = (
    (3, 16, 1, 1),
    (3, 24, 6, 2),
    (5, 40, 6, 2),
    (3, 80, 6, 2),
    (5, 112, 6, 1),
    (5, 192, 6, 2),
    (3, 320, 6, 1),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetSpec:
    """What distinguishes one EfficientNet from another.

    Attributes:
      width, depth: factors of channels and of repeats.
      lite: ReLU6, no squeeze and excitation; neither stem, top nor the repeats of the first and
        last stage are scaled.
      preprocessing: what its ImageNet weights expect, see `covid_flax.models.preprocess`.
      native_size: side of the images it was designed for, pixels.
      blocks: of each stage, before scaling.
      top: whether the last maps are widened to 1280 channels before they are averaged.
      beginning_of: the network whose first layers these are, whose weights it takes.
      epsilon: batch norm's.
      smallest: side of the smallest image, pixels.
    """

    width: float
    depth: float
    lite: bool
    preprocessing: str
    native_size: int
    blocks: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    top: bool = True
    beginning_of: str = ""
    epsilon: ClassVar[float] = 1e-3
    smallest: ClassVar[int] = 32

    @property
    def stages(self) -> tuple[str, ...]:
        """In order of computation; `pool` has no parameters."""
        numbers = range(1, len(self.blocks) + 1)
        top = ("top",) if self.top else ()
        return ("stem", *(f"block{i}" for i in numbers), *top, "pool", "head")

    def channels(self, base: int) -> int:
        """`base` channels, scaled."""
        return multiple_of_8(base * self.width)

    def outer_channels(self, base: int) -> int:
        """Those of stem and top."""
        return base if self.lite else self.channels(base)

    def repeats(self, base: int) -> int:
        return 1 if self.lite and base == 1 else math.ceil(base * self.depth)


EFFICIENTNETS = {
    "efficientnet_b0": EfficientNetSpec(1.0, 1.0, False, "torch", 224),
    "efficientnet_b1": EfficientNetSpec(1.0, 1.1, False, "torch", 240),
    "efficientnet_b2": EfficientNetSpec(1.1, 1.2, False, "torch", 260),
    "efficientnet_b3": EfficientNetSpec(1.2, 1.4, False, "torch", 300),
    "efficientnet_lite0": EfficientNetSpec(1.0, 1.0, True, "lite", 224),
    "efficientnet_lite1": EfficientNetSpec(1.0, 1.1, True, "lite", 240),
    "efficientnet_lite2": EfficientNetSpec(1.1, 1.2, True, "lite", 260),
    # Lite0's first 13 of 16 blocks: 1.4 of 3.4 million parameters, 3/4 of the arithmetic.
    "efficientnet_lite0_small": EfficientNetSpec(
        1.0, 1.0, True, "lite", 224, (1, 2, 2, 3, 3, 2), False, "efficientnet_lite0"
    ),
}


def _blocks(spec: EfficientNetSpec) -> dict[str, list[Bottleneck]]:
    """Those of each stage, `block1` to `block7`."""
    stages: dict[str, list[Bottleneck]] = {}
    inputs, activation = spec.outer_channels(32), _activation(spec)
    shapes = zip(spec.blocks, _STAGES, strict=False)
    for i, (repeats, (size, base, expansion, stride)) in enumerate(shapes, 1):
        stage, outputs = stages.setdefault(f"block{i}", []), spec.channels(base)
        for j in range(spec.repeats(repeats)):
            gate = None if spec.lite else Gate(max(1, inputs // 4), activation, nnx.sigmoid)
            stage.append(
                Bottleneck(
                    _names(f"block{i}{chr(ord('a') + j)}_"),
                    inputs,
                    inputs * expansion,
                    outputs,
                    size,
                    1 if j else stride,
                    activation,
                    gate,
                )
            )
            inputs = outputs
    return stages


def _activation(spec: EfficientNetSpec) -> Activation:
    return nnx.relu6 if spec.lite else nnx.swish


def _names(start: str) -> Names:
    """The layers' names of the block whose name this is."""
    return Names(
        expand=start + "expand_conv",
        expand_bn=start + "expand_bn",
        depthwise=start + "dwconv",
        depthwise_bn=start + "bn",
        squeeze=start + "se_reduce",
        excite=start + "se_expand",
        project=start + "project_conv",
        project_bn=start + "project_bn",
    )


class EfficientNet(StagedNetwork):
    """EfficientNet: preprocessed images to logits.

    Args:
      spec: which EfficientNet.
      num_classes: logits.
      hidden_units: width of the head's hidden layer, 0 for none (the ImageNet head).
      dropout_rate: of the head.
      momentum: of the running batch statistics (Keras's convention).
      dtype: in which the convolutions compute; the head is float32 always.
      rngs: with a `params` stream.
    """

    def __init__(
        self,
        spec: EfficientNetSpec,
        *,
        num_classes: int,
        hidden_units: int = 0,
        dropout_rate: float = 0.2,
        momentum: float = 0.99,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(spec, momentum=momentum, dtype=dtype)
        how: dict[str, Any] = {"activation": _activation(spec), "rngs": rngs}
        features = spec.outer_channels(32)
        self.stem = NamedConvBN(3, features, 3, 2, conv="stem_conv", bn="stem_bn", **how)
        for name, blocks in _blocks(spec).items():
            setattr(self, name, InvertedBottlenecks(blocks, rngs=rngs))
            features = blocks[-1].outputs
        if spec.top:
            wide = spec.outer_channels(1280)
            self.top = NamedConvBN(features, wide, 1, 1, conv="top_conv", bn="top_bn", **how)
            features = wide
        self.add_head(features, num_classes, hidden_units, dropout_rate, rngs)
