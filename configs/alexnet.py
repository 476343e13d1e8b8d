"""AlexNet from scratch, on images of 96 pixels: a baseline of 23 million parameters.

At 224 pixels (`--config.model.name=alexnet --config.data.image_size=224`) it is the
original's geometry, for an accelerator. Here the last maps are 2x2, the dense layers as much
smaller, and a step of 64 takes about a second on two cores, the whole run some twenty minutes.
The split is that of `finetune.py`, with a test part that chooses nothing.
"""

from ml_collections_configs import base


def get_config():
    c = base.get_config()
    c.data.split = "grouped"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.2
    c.data.image_size = 96
    c.data.interpolation = "bilinear"
    c.model.name = "alexnet_small"
    c.model.weights = "none"
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 1.0
    c.optimizer.clip_norm = 1.0
    c.train.epochs = 8
    c.train.batch_size = 64
    c.train.patience = 4
    return c
