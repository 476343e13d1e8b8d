"""ResNet with bottleneck blocks: Keras's ResNet50 (v1), the v1.5 form, and a small one.

Every attribute path has a Keras layer name: `conv2/block1/unit3/bn/scale` is
`conv2_block1_3_bn/gamma`; unit 0 is the projection shortcut. The table is in
`covid_flax.pretrained.names`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from covid_flax.models.conv import max_pool_3x3_s2
from covid_flax.models.layers import ConvBN, Head, relu_kept, stages_between

Array = jax.Array

# In order of computation. A run may train "from a named stage on", and cache what
# comes before it. `pool` (global average) has no parameters.
STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5", "pool", "head")
_STRIDING = ("conv3", "conv4", "conv5")


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """What distinguishes one ResNet from another.

    Attributes:
      depths: blocks in conv2..conv5.
      width: channels of the stem and of conv2's inner convolutions; doubled at each stage.
      stride_on_3x3: False is v1 (Keras: stride on the first 1x1), True v1.5 (torchvision).
      use_bias: whether convolutions carry a bias (Keras's do, torchvision's do not).
      epsilon: batch norm's.
      preprocessing: what its ImageNet weights expect, see `covid_flax.models.preprocess`.
      stages: of every ResNet.
      native_size: side of the images it was designed for, pixels.
      smallest: side of the smallest image, pixels.
    """

    stages: ClassVar[tuple[str, ...]] = STAGES
    native_size: ClassVar[int] = 224
    smallest: ClassVar[int] = 32
    depths: tuple[int, int, int, int]
    width: int
    stride_on_3x3: bool
    use_bias: bool
    epsilon: float
    preprocessing: str


RESNET50 = ResNetSpec((3, 4, 6, 3), 64, False, True, 1.001e-5, "caffe")
RESNET50_V1_5 = ResNetSpec((3, 4, 6, 3), 64, True, False, 1e-5, "torch")
RESNET14_SMALL = ResNetSpec((1, 1, 1, 1), 16, False, True, 1.001e-5, "unit")
RESNETS = {
    "resnet50": RESNET50,
    "resnet50_v1_5": RESNET50_V1_5,
    "resnet14_small": RESNET14_SMALL,
}


class Bottleneck(nnx.Module):
    """1x1 reduce, 3x3, 1x1 expand, added to a shortcut that is projected where shapes change."""

    def __init__(
        self, inputs: int, width: int, *, stride: int, project: bool, stride_on_3x3: bool, **kw: Any
    ):
        # v1 takes the stride off the block's input: both its 1x1 convolutions skip the rest.
        self.stride, second = (1, stride) if stride_on_3x3 else (stride, 1)
        shortcut = stride if stride_on_3x3 else 1
        self.unit0 = ConvBN(inputs, 4 * width, 1, stride=shortcut, **kw) if project else None
        self.unit1 = ConvBN(inputs, width, 1, **kw)
        self.unit2 = ConvBN(width, width, 3, stride=second, **kw)
        self.unit3 = ConvBN(width, 4 * width, 1, **kw)

    def __call__(self, x: Array, *, thinned: bool = False, every: int = 1, **mode: Any) -> Array:
        """Applies it to `[N, H, W, C]`.

        Args:
          x: input; where `thinned`, only the rows and columns that the stride would keep.
          every: return only every so-many-th row and column.
          **mode: see `ConvBN`.
        """
        if not thinned:
            x = x[:, :: self.stride, :: self.stride]
        y = nnx.relu(self.unit1(x, **mode))
        y = nnx.relu(self.unit2(y, **mode))
        y = self.unit3(y, every=every, **mode)
        if self.unit0 is None:
            shortcut = x[:, ::every, ::every]
        else:
            shortcut = self.unit0(x, every=every, **mode)
        return relu_kept(shortcut + y) if self.unit3.spares_traffic else nnx.relu(shortcut + y)


class Stage(nnx.Module):
    """`depth` bottleneck blocks, `block1`..; the first strides and projects.

    With `remat` the gradient computes each block's activations again from its input.
    """

    def __init__(self, inputs: int, width: int, *, depth: int, stride: int, remat: bool, **kw: Any):
        self.depth, self.remat = depth, remat
        for i in range(1, depth + 1):
            block = Bottleneck(inputs, width, stride=stride if i == 1 else 1, project=i == 1, **kw)
            setattr(self, f"block{i}", block)
            inputs = 4 * width

    def __call__(self, x: Array, *, thinned: bool = False, every: int = 1, **mode: Any) -> Array:
        """See `Bottleneck`: `thinned` tells of the stage's input, `every` of its output."""
        for i in range(1, self.depth + 1):
            how = {**mode, "thinned": thinned and i == 1, "every": every if i == self.depth else 1}
            apply = _applied(how)
            x = (nnx.remat(apply) if self.remat else apply)(getattr(self, f"block{i}"), x)
        return x


def _applied(how: dict[str, Any]) -> Callable[[Bottleneck, Array], Array]:
    return lambda block, x: block(x, **how)


class ResNet(nnx.Module):
    """Bottleneck ResNet: preprocessed images to logits.

    Args:
      spec: which ResNet.
      num_classes: logits.
      hidden_units: width of the head's hidden layer, 0 for none (the ImageNet head).
      dropout_rate: of the head.
      momentum: of the running batch statistics (Keras's convention and default, 0.99).
      dtype: in which the convolutions compute; the head is float32 always.
      remat: whether gradients compute a block's activations again instead of keeping them.
      rngs: with a `params` stream.
    """

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        num_classes: int,
        hidden_units: int = 1024,
        dropout_rate: float = 0.5,
        momentum: float = 0.99,
        dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {
            "use_bias": spec.use_bias,
            "epsilon": spec.epsilon,
            "momentum": momentum,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.spec = spec
        self.conv1 = ConvBN(3, spec.width, 7, stride=2, **kw)
        inputs = spec.width
        for i, depth in enumerate(spec.depths):
            width, stride = spec.width * 2**i, 1 if i == 0 else 2
            stage = Stage(
                inputs,
                width,
                depth=depth,
                stride=stride,
                remat=remat,
                stride_on_3x3=spec.stride_on_3x3,
                **kw,
            )
            setattr(self, f"conv{i + 2}", stage)
            inputs = 4 * width
        self.head = Head(
            inputs, num_classes, hidden_units=hidden_units, dropout_rate=dropout_rate, rngs=rngs
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
          x: what `start` takes: for `conv1` preprocessed images `[N, H, W, 3]`.
          batch_stats_in: stages whose batch norm uses and updates batch statistics;
            the others use their running statistics.
          example_weights: `[N]`, of each example in batch statistics; see `ConvBN`.
          dropout_key: None switches dropout off.
          axis_name: see `ConvBN`.
          start, stop: names of `STAGES`; None is the first, the last.

        Returns:
          The output of `stop`; of `head`, logits `[N, num_classes]` in float32.
        """
        names = stages_between(STAGES, start, stop)
        thinned = False
        for name, following in zip(names, (*names[1:], ""), strict=True):
            mode: dict[str, Any] = {
                "use_batch_stats": name in batch_stats_in,
                "example_weights": example_weights,
                "axis_name": axis_name,
            }
            if name == "pool":
                x = jnp.mean(x.astype(jnp.float32), (1, 2))
            elif name == "head":
                x = self.head(x, dropout_key)
            elif name == "conv1":
                x = self._stem(x, **mode)
            else:
                # What the next stage's stride skips need not be computed.
                every = getattr(self, following).block1.stride if following in _STRIDING else 1
                x = getattr(self, name)(x, thinned=thinned, every=every, **mode)
                thinned = every > 1
        return x

    def _stem(self, x: Array, *, use_batch_stats: bool, **mode: Any) -> Array:
        if use_batch_stats and self.conv1.spares_traffic and not self.conv1.bn.own_share:
            return self.conv1.max_pooled(x, **mode)
        x = self.conv1(x, use_batch_stats=use_batch_stats, **mode)
        return max_pool_3x3_s2(nnx.relu(x))
