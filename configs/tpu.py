"""The paper's network on accelerators: half precision, 256 images on each of eight devices.

For another number of devices set `--config.train.batch_size` to 256 times it. Variants are
those of `paper.py`, as `--config=configs/tpu.py:caffe,nested`.
"""

from ml_collections_configs import base


def get_config(variants: str = ""):
    c = base.start_from("paper.py", __file__, variants)
    c.model.dtype = "bfloat16"
    c.train.batch_size = 2048
    c.model.bn_momentum = 0.5  # 0.99 to the power of 64, so over as many images
    # With the root of the batch's growth, as suits Adam (Malladi et al. 2022): 64 times 32.
    c.optimizer.learning_rate = 8e-5
    return c
