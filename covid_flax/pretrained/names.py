"""Keras's array names and the paths of this package's parameter trees, each from the other.

    conv1_conv/kernel                     conv1/conv/kernel
    conv2_block1_0_conv/bias              conv2/block1/unit0/conv/bias
    conv2_block1_3_bn/gamma               conv2/block1/unit3/bn/scale
    conv2_block1_3_bn/moving_variance     conv2/block1/unit3/bn/var
    hidden/kernel                         head/hidden/kernel
    predictions/bias                      head/predictions/bias

Layer names are those of `keras.applications.ResNet50`; `hidden`, the head's inner layer,
is this package's addition.
"""

from __future__ import annotations

import re

TreePath = tuple[str, ...]

# By kind of layer: this package's array name, Keras's.
_ARRAYS = {
    "conv": {"kernel": "kernel", "bias": "bias"},
    "bn": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
}
_FROM_KERAS = {kind: {k: ours for ours, k in pairs.items()} for kind, pairs in _ARRAYS.items()}

_HEAD_PATH = re.compile(r"head/(hidden|predictions)/(kernel|bias)")
_STEM_PATH = re.compile(r"(conv1)/(conv|bn)/([a-z]+)")
_BLOCK_PATH = re.compile(r"(conv[2-5])/block([1-9]\d*)/unit([0-3])/(conv|bn)/([a-z]+)")

_HEAD_NAME = re.compile(r"(hidden|predictions)/(kernel|bias)")
_STEM_NAME = re.compile(r"(conv1)_(conv|bn)/([a-z_]+)")
_BLOCK_NAME = re.compile(r"(conv[2-5])_block([1-9]\d*)_([0-3])_(conv|bn)/([a-z_]+)")


def keras_name(path: TreePath) -> str:
    """Keras's name, `layer/array`, of the array at `path`.

    Raises:
      KeyError: no such path in a ResNet.
    """
    text = "/".join(path)
    if m := _HEAD_PATH.fullmatch(text):
        return f"{m[1]}/{m[2]}"
    if m := _STEM_PATH.fullmatch(text):
        return f"{m[1]}_{m[2]}/{_ARRAYS[m[2]][m[3]]}"
    if m := _BLOCK_PATH.fullmatch(text):
        return f"{m[1]}_block{m[2]}_{m[3]}_{m[4]}/{_ARRAYS[m[4]][m[5]]}"
    raise KeyError(text)


def tree_path(name: str) -> TreePath:
    """The path, from the stage down, of the array that Keras names `name`.

    Raises:
      KeyError: no such name in a ResNet.
    """
    if m := _HEAD_NAME.fullmatch(name):
        return ("head", m[1], m[2])
    if m := _STEM_NAME.fullmatch(name):
        return (m[1], m[2], _FROM_KERAS[m[2]][m[3]])
    if m := _BLOCK_NAME.fullmatch(name):
        return (m[1], f"block{m[2]}", f"unit{m[3]}", m[4], _FROM_KERAS[m[4]][m[5]])
    raise KeyError(name)
