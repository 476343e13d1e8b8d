"""The whole database at its own 299 px: ResNet50 with Keras's weights, one GPU, half precision.

`full_299.py:tpu` is for the eight chips of a v5e TPU VM. docs/full_database.md says what either
needs.
"""

import runpy
from pathlib import Path

# By path: configuration files are no package.
_FULL = runpy.run_path(str(Path(__file__).with_name("full_224.py")))


def get_config(variant: str = ""):
    c = _FULL["get_config"](variant)
    c.data.image_size = 299
    c.model.name = "resnet50"
    c.model.bn_momentum = 0.9
    # finetune.py's 1e-4 for 32 images, times the root of the batch's growth.
    c.optimizer.learning_rate = 1e-4 * (c.train.batch_size / 32) ** 0.5
    c.augment.blur = 1.6
    return c
