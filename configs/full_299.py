"""The whole database at its own 299 px: ResNet50 with Keras's weights, one GPU, half precision.

`full_299.py:tpu` is for the eight chips of a v5e TPU VM. docs/full_database.md says what either
needs.
"""

from ml_collections_configs import base


def get_config(variant: str = ""):
    if variant not in ("", "tpu"):
        raise ValueError(f"full_299.py has no variant {variant!r}: tpu")
    c = base.start_from("full_224.py", __file__, variant)
    c.data.image_size = 299
    c.model.name = "resnet50"
    # finetune.py's 1e-4 for 32 images, times the root of the batch's growth.
    c.optimizer.learning_rate = 1e-4 * (c.train.batch_size / 32) ** 0.5
    c.augment.blur = 1.0
    return c
