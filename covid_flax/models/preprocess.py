"""Pixels to network input, in the graph.

`caffe`, `torch` and `tf` are the modes of Keras's `imagenet_utils.preprocess_input`; `unit` is
the paper's division by 255, `lite` what EfficientNet-Lite was trained with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Means of ImageNet's training set: B, G, R on 0..255; and R, G, B on 0..1 with deviations.
_CAFFE_MEAN = (103.939, 116.779, 123.68)
TORCH_MEAN = (0.485, 0.456, 0.406)
TORCH_STD = (0.229, 0.224, 0.225)

MODES = ("unit", "caffe", "torch", "tf", "lite", "standard")


def preprocess(images: jax.Array, mode: str) -> jax.Array:
    """Scales images for a network.

    Args:
      images: `[N, H, W, 3]`, RGB, 0..255, any real dtype; left as they are. One channel,
        grey, counts as three equal ones.
      mode: `unit` (/255), `caffe` (RGB to BGR, minus the mean, not divided), `torch` (/255,
        minus the mean, by the deviation), `tf` (to -1..1), `lite` ((x - 127) / 128) or
        `standard` (each image to mean 0 and deviation 1; an image of one grey becomes 0).

    Returns:
      float32 `[N, H, W, 3]`.
    """
    x = jnp.asarray(images, jnp.float32)
    x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
    if mode == "unit":
        return x / 255.0
    if mode == "caffe":
        return x[..., ::-1] - jnp.array(_CAFFE_MEAN, jnp.float32)
    if mode == "torch":
        return (x / 255.0 - jnp.array(TORCH_MEAN, jnp.float32)) / jnp.array(TORCH_STD, jnp.float32)
    if mode == "tf":
        return x / 127.5 - 1.0
    if mode == "lite":
        return (x - 127.0) / 128.0
    if mode == "standard":
        mean = jnp.mean(x, (1, 2, 3), keepdims=True)
        deviation = jnp.sqrt(jnp.mean((x - mean) ** 2, (1, 2, 3), keepdims=True))
        return (x - mean) / jnp.maximum(deviation, 1.0)  # a grey level: less is rounding
    raise ValueError(f"preprocessing {mode!r}: one of {', '.join(MODES)}")
