"""Keras's array names from the paths of this package's parameter trees.

    conv1_conv/kernel                     conv1/conv/kernel
    conv2_block1_0_conv/bias              conv2/block1/unit0/conv/bias
    conv2_block1_3_bn/gamma               conv2/block1/unit3/bn/scale
    conv2_block1_3_bn/moving_variance     conv2/block1/unit3/bn/var
    hidden/kernel                         head/hidden/kernel
    predictions/bias                      head/predictions/bias

The light networks name their layers as Keras does, below the stage:

    block2a_dwconv/kernel                 block2/block2a_dwconv/kernel
    block2a_bn/gamma                      block2/block2a_bn/scale

Layer names are those of `keras.applications`; `hidden`, the head's inner layer,
is this package's addition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

TreePath = tuple[str, ...]

# By kind of layer: this package's array name, Keras's.
_ARRAYS = {
    "conv": {"kernel": "kernel", "bias": "bias"},
    "bn": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
}

_HEAD_PATH = re.compile(r"head/(hidden|predictions)/(kernel|bias)")
_STEM_PATH = re.compile(r"(conv1)/(conv|bn)/([a-z]+)")
_BLOCK_PATH = re.compile(r"(conv[2-5])/block([1-9]\d*)/unit([0-3])/(conv|bn)/([a-z]+)")

# A layer under Keras's own name. `conv` is MobileNetV3's first, `bn` DenseNet's last; elsewhere
# these are parts of a ResNet's units.
_NAMED_PATH = re.compile(r"(?:stem/|top/|\w+/(?!(?:conv|bn)/))(\w+)/(kernel|bias|scale|mean|var)")
_IS_BATCH_NORM = re.compile(r"(?i)(?:^|.*_)bn(?:_.*|$)")

# `efficientnet_lite_pytorch`'s layers of a block, and Keras's.
_LITE_BLOCK = {
    "_expand_conv": "expand_conv",
    "_bn0": "expand_bn",
    "_depthwise_conv": "dwconv",
    "_bn1": "bn",
    "_project_conv": "project_conv",
    "_bn2": "project_bn",
}
_LITE_OUTER = {
    "_conv_stem": "stem_conv",
    "_bn0": "stem_bn",
    "_conv_head": "top_conv",
    "_bn1": "top_bn",
    "_fc": "predictions",
}
# By the number of blocks, those of each stage: Lite0, and Lite1 and Lite2.
_LITE_REPEATS = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}

_LITE_NAME = re.compile(r"(?:_blocks\.([0-9]+)\.)?(\w+)\.(\w+)")


def keras_name(path: TreePath) -> str:
    """Keras's name, `layer/array`, of the array at `path`.

    Raises:
      KeyError: a network whose layers have no Keras names.
    """
    text = "/".join(path)
    if m := _HEAD_PATH.fullmatch(text):
        return f"{m[1]}/{m[2]}"
    if m := _STEM_PATH.fullmatch(text):
        return f"{m[1]}_{m[2]}/{_ARRAYS[m[2]][m[3]]}"
    if m := _BLOCK_PATH.fullmatch(text):
        return f"{m[1]}_block{m[2]}_{m[3]}_{m[4]}/{_ARRAYS[m[4]][m[5]]}"
    if path[0] != "head" and (m := _NAMED_PATH.fullmatch(text)):
        kind = "bn" if _IS_BATCH_NORM.fullmatch(m[1]) else "conv"
        return f"{m[1]}/{_ARRAYS[kind][m[2]]}"
    raise KeyError(text)


def from_lite_pytorch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of `efficientnet_lite_pytorch`'s Lite0 to Lite2 under Keras's names and in its layout.

    Convolutions from OIHW to HWIO, depthwise from `[C, 1, K, K]` to `[K, K, C, 1]`, dense
    transposed. Counters of batches are left out.

    Raises:
      KeyError: a name, or a number of blocks, that these networks have not.
    """
    parts = {}
    for name in arrays:
        found = _LITE_NAME.fullmatch(name)
        if found is None:
            raise KeyError(name)
        parts[name] = found.groups()
    numbers = {number for number, _, _ in parts.values()} - {None}
    if len(numbers) not in _LITE_REPEATS:
        raise KeyError(f"{len(numbers)} blocks")
    prefixes = [
        f"block{i}{chr(ord('a') + j)}_"
        for i, repeats in enumerate(_LITE_REPEATS[len(numbers)], 1)
        for j in range(repeats)
    ]
    named = {}
    for name, value in arrays.items():
        number, layer, array = parts[name]
        if array == "num_batches_tracked":
            continue
        if number is None:
            keras = _LITE_OUTER[layer]
        elif int(number) < len(prefixes):
            keras = prefixes[int(number)] + _LITE_BLOCK[layer]
        else:
            raise KeyError(name)
        if _IS_BATCH_NORM.fullmatch(keras):
            ours = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean"}
            named[f"{keras}/{(ours | {'running_var': 'moving_variance'})[array]}"] = value
            continue
        if value.ndim == 4:
            axes = (2, 3, 0, 1) if keras.endswith("dwconv") else (2, 3, 1, 0)
            value = value.transpose(axes)
        elif value.ndim == 2:
            value = value.T
        named[f"{keras}/{({'weight': 'kernel', 'bias': 'bias'})[array]}"] = value
    return named
