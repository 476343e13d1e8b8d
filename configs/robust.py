"""`best.py`, trained on against what classes differ in for no medical reason.

Train `best.py` first, on the same images and split: this begins with its run, in `runs/best`
(another is given by `--config.model.weights=RUN`).

For X-rays of other hospitals than those it learns from: greys, sharpness and proportions are no
longer a class's own, every image is standardised by itself, places and borders are hidden. The
mean of the weights travels better than what one cycle ends on; a fifth of `best.py`'s own weights
in it serves home, and in the first stages, where hospitals differ, a share of each image's own
statistics serves elsewhere. What it scored there and at home is in docs/results.md.
"""

from ml_collections_configs import base


def get_config():
    c = base.start_from("best.py", __file__)
    c.model.weights = "runs/best"
    c.model.preprocessing = "standard"
    # The rate stays up, and the mean of the weights after the second epoch is evaluated.
    c.optimizer.learning_rate = 5e-4
    c.optimizer.schedule = "constant"
    c.train.ema_decay = 0.0
    c.train.swa_start = 2
    c.train.start_share = 0.2
    c.train.epochs = 6
    c.augment.shift = 0.07
    c.augment.rotate = 8.0
    c.augment.scale = 0.15
    c.augment.aspect = 0.25
    c.augment.style = 0.9
    c.augment.contrast = 0.0  # standardising undoes it
    c.augment.gamma = 0.2
    c.augment.blur = 0.7
    c.augment.noise = 0.018
    c.augment.erase = 0.3
    c.augment.border = 0.15
    c.eval.aspect = 0.1
    c.eval.bn_own_share = 0.3
    c.eval.bn_own_until = "block2"
    return c
