"""The whole path in minutes on two cores: synthetic X-rays, a small ResNet from scratch."""

from ml_collections_configs import base


def get_config():
    c = base.get_config()
    c.data.phantoms_per_class = 250
    c.data.image_size = 96
    c.data.interpolation = "bilinear"
    c.data.split = "paper-random"
    c.model.name = "resnet14_small"
    c.model.weights = "none"
    c.model.hidden_units = 64
    c.model.dropout = 0.2
    c.model.bn_momentum = 0.9  # few steps: statistics must follow quickly
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 1.0
    c.train.epochs = 30
    c.train.batch_size = 16
    c.train.patience = 6
    c.train.min_delta = 0.01  # the last epochs' small gains are not worth their time
    c.train.log_every_steps = 25
    c.augment.flip = True
    c.augment.shift = 0.05
    return c
