"""DenseNet121 (Huang et al. 2017) as in `keras.applications`.

Every layer takes the outputs of all layers before it in its stage: batch norm, ReLU, 1x1 to 128
channels, batch norm, ReLU, 3x3 to 32, put beside its input. A stage but the last ends with a
transition that halves channels and sides. A layer's name in the tree is Keras's, under its
stage: `block2/conv3_block1_1_conv/kernel`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from covid_flax.models.blocks import StagedNetwork, add_named, batch_norm, conv_same
from covid_flax.models.conv import max_pool_3x3_s2
from covid_flax.models.layers import BatchNorm, Conv

Array = jax.Array
_STEM = 64
_GROWTH = 32


@dataclasses.dataclass(frozen=True)
class DenseNetSpec:
    """What distinguishes one DenseNet from another.

    Attributes:
      depths: dense layers of each of the four stages.
      preprocessing: what its ImageNet weights expect, see `covid_flax.models.preprocess`.
      epsilon: batch norm's.
      stages: of every DenseNet; `top` is the last batch norm, `pool` has no parameters.
      native_size: side of the images it was designed for, pixels.
      smallest: side of the smallest image, pixels.
    """

    depths: tuple[int, int, int, int]
    preprocessing: ClassVar[str] = "torch"
    epsilon: ClassVar[float] = 1.001e-5
    native_size: ClassVar[int] = 224
    smallest: ClassVar[int] = 32
    stages: ClassVar[tuple[str, ...]] = (
        "stem",
        "block1",
        "block2",
        "block3",
        "block4",
        "top",
        "pool",
        "head",
    )


DENSENETS = {"densenet121": DenseNetSpec((6, 12, 24, 16))}


class _Stem(nnx.Module):
    """7x7 of stride 2, batch norm, ReLU, 3x3 max pooling of stride 2."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1_conv = Conv(3, _STEM, 7, use_bias=False, rngs=rngs)
        self.conv1_bn = BatchNorm(_STEM)

    def __call__(self, x: Array, **bn: Any) -> Array:
        y = self.conv1_conv(x, stride=2)
        return max_pool_3x3_s2(nnx.relu(batch_norm(self.conv1_bn, y, **bn)))


class _Stage(nnx.Module):
    """`depth` dense layers, and the transition where there is one; `number` as Keras counts."""

    def __init__(self, number: int, inputs: int, depth: int, transition: bool, *, rngs: nnx.Rngs):
        self.number, self.depth, self.transition = number, depth, transition

        def conv(inputs: int, outputs: int, size: int = 1) -> Conv:
            return Conv(inputs, outputs, size, use_bias=False, rngs=rngs)

        for i in range(1, depth + 1):
            layers = {
                "0_bn": BatchNorm(inputs),
                "1_conv": conv(inputs, 4 * _GROWTH),
                "1_bn": BatchNorm(4 * _GROWTH),
                "2_conv": conv(4 * _GROWTH, _GROWTH, 3),
            }
            add_named(self, {f"conv{number}_block{i}_{k}": v for k, v in layers.items()})
            inputs += _GROWTH
        if transition:
            layers = {"bn": BatchNorm(inputs), "conv": conv(inputs, inputs // 2)}
            add_named(self, {f"pool{number}_{k}": v for k, v in layers.items()})

    def __call__(self, x: Array, **bn: Any) -> Array:
        def normalised(name: str, x: Array) -> Array:
            return nnx.relu(batch_norm(getattr(self, name), x, **bn))

        for i in range(1, self.depth + 1):
            name = f"conv{self.number}_block{i}_"
            y = conv_same(getattr(self, f"{name}1_conv"), normalised(f"{name}0_bn", x))
            y = conv_same(getattr(self, f"{name}2_conv"), normalised(f"{name}1_bn", y))
            x = jnp.concatenate([x, y], -1)
        if self.transition:
            name = f"pool{self.number}_"
            x = conv_same(getattr(self, f"{name}conv"), normalised(f"{name}bn", x))
            x = nnx.avg_pool(x, (2, 2), (2, 2))
        return x


class _Top(nnx.Module):
    def __init__(self, features: int):
        self.bn = BatchNorm(features)

    def __call__(self, x: Array, **bn: Any) -> Array:
        return nnx.relu(batch_norm(self.bn, x, **bn))


class DenseNet(StagedNetwork):
    """DenseNet: preprocessed images to logits; the arguments are those of `EfficientNet`."""

    def __init__(
        self,
        spec: DenseNetSpec,
        *,
        num_classes: int,
        hidden_units: int = 0,
        dropout_rate: float = 0.2,
        momentum: float = 0.99,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(spec, momentum=momentum, dtype=dtype)
        self.stem = _Stem(rngs=rngs)
        features = _STEM
        for i, depth in enumerate(spec.depths, 1):
            transition = i < len(spec.depths)
            setattr(self, f"block{i}", _Stage(i + 1, features, depth, transition, rngs=rngs))
            features = (features + depth * _GROWTH) // (2 if transition else 1)
        self.top = _Top(features)
        self.add_head(features, num_classes, hidden_units, dropout_rate, rngs)
