"""The whole database at 224 px: `best.py`'s network and recipe in half precision on one GPU.

`full_224.py:tpu` is for the eight chips of a v5e TPU VM. docs/full_database.md says what either
needs.
"""

from ml_collections_configs import base


def get_config(variant: str = ""):
    c = base.start_from("best.py", __file__)
    c.data.image_size = 224
    c.model.dtype = "bfloat16"
    c.train.batch_size = 128
    # With the root of the batch's growth, as suits Adam (Malladi et al. 2022): twice.
    c.optimizer.learning_rate = 2e-3
    c.train.epochs = 30
    # More than best.py's blur, which is 0.6 in these finer pixels; the noise is best.py's.
    c.augment.blur = 0.8
    c.augment.noise = 0.012
    c.eval.batch_size = 256
    if variant == "tpu":
        c.train.batch_size = 1024
        c.optimizer.learning_rate = 5e-3
        c.optimizer.warmup_epochs = 3.0
        c.eval.batch_size = 1024
    elif variant:
        raise ValueError(f"full_224.py has no variant {variant!r}: tpu")
    return c
