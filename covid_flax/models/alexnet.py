"""AlexNet (Krizhevsky, Sutskever and Hinton 2012), in one tower as Krizhevsky (2014) drew it.

Convolutions 11x11 of stride 4, 5x5, and three 3x3 (64, 192, 384, 256, 256 channels), each
with ReLU, 3x3 max pooling of stride 2 after the first, second and fifth; dense 4096, 4096
and one a class. As torchvision's: no groups, no response normalisation, and the last maps
averaged to 6x6 before the dense layers, so that images of every size fit. Of dropout the
2012 paper's places: after both hidden layers.
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
class AlexNetSpec:
    """What distinguishes one AlexNet from another.

    Attributes:
      channels: of the five convolutions.
      hidden_units: of the two hidden dense layers.
      grid: side of the maps that the dense layers take.
      preprocessing: see `covid_flax.models.preprocess`.
      stages: of every AlexNet; `pool` has no parameters, `head` is all dense layers.
      native_size: side of the images it was designed for, pixels.
      smallest: side of the smallest image, pixels.
    """

    channels: tuple[int, int, int, int, int]
    hidden_units: tuple[int, int]
    grid: int
    native_size: int
    preprocessing: str
    stages: ClassVar[tuple[str, ...]] = (
        "conv1",
        "conv2",
        "conv3",
        "conv4",
        "conv5",
        "pool",
        "head",
    )
    smallest: ClassVar[int] = 63


_CHANNELS = (64, 192, 384, 256, 256)
# For the original's 224 pixels, whose last maps are 6x6: 61.1 million parameters for ImageNet.
ALEXNET = AlexNetSpec(_CHANNELS, (4096, 4096), 6, 224, "torch")
# For 95 to 126 pixels, whose last maps are 2x2: above, the dense layers would see each pixel
# of them nine times, through 33.6 million parameters more.
ALEXNET_SMALL = AlexNetSpec(_CHANNELS, (4096, 4096), 2, 112, "torch")

_SIZES = (11, 5, 3, 3, 3)
_MAX_POOLED = ("conv1", "conv2", "conv5")


class AlexNetHead(nnx.Module):
    """Twice dense, ReLU, dropout; then dense. Float32."""

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
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        for hidden, key in zip((self.hidden1, self.hidden2), keys, strict=True):
            x = dropout(nnx.relu(hidden(x)), self.dropout_rate, key)
        return self.predictions(x)


class AlexNet(nnx.Module):
    """AlexNet: preprocessed images to logits.

    Args:
      spec: which AlexNet.
      num_classes: logits.
      dropout_rate: after both hidden layers.
      dtype: in which the convolutions compute; the head is float32 always.
      rngs: with a `params` stream.
    """

    def __init__(
        self,
        spec: AlexNetSpec,
        *,
        num_classes: int,
        dropout_rate: float = 0.5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.spec, self.dtype = spec, dtype
        inputs = 3
        for i, (size, channels) in enumerate(zip(_SIZES, spec.channels, strict=True), 1):
            setattr(self, f"conv{i}", Conv(inputs, channels, size, use_bias=True, rngs=rngs))
            inputs = channels
        self.head = AlexNetHead(
            spec.grid**2 * inputs,
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
          x: what `start` takes: for `conv1` preprocessed images `[N, H, W, 3]`.
          batch_stats_in, example_weights, axis_name: as of the other networks; there is no
            batch norm here that would use them.
          dropout_key: None switches dropout off.
          start, stop: names of `AlexNetSpec.stages`; None is the first, the last.

        Returns:
          The output of `stop`; of `head`, logits `[N, num_classes]` in float32.
        """
        for name in stages_between(AlexNetSpec.stages, start, stop):
            if name == "pool":
                x = adaptive_average_pool(x, self.spec.grid)
                x = x.reshape(len(x), -1)
            elif name == "head":
                x = self.head(x, dropout_key)
            else:
                how = {"stride": 4, "padding": 2} if name == "conv1" else {}
                x = nnx.relu(getattr(self, name)(x.astype(self.dtype), **how))
                if name in _MAX_POOLED:
                    x = nnx.max_pool(x, (3, 3), (2, 2))
        return x
