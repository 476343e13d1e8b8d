"""LeNet-5 from scratch, at its own 32x32: a baseline of 61,000 parameters.

The split is that of `finetune.py`, with a test part that chooses nothing.
"""

from ml_collections_configs import base


def get_config():
    c = base.get_config()
    c.data.split = "grouped"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.2
    c.data.image_size = 32
    c.data.interpolation = "bilinear"
    c.model.name = "lenet5"
    c.model.weights = "none"
    c.model.dropout = 0.0  # 1998 had none
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 1.0
    c.train.epochs = 40
    c.train.patience = 8
    return c
