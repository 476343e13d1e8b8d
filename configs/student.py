"""A network of 1.4 million parameters that learns from a trained one's answers too.

Give the teacher, a run of the same split: `--config.train.teacher=runs/best`.
"""

from ml_collections_configs import base


def get_config():
    c = base.start_from("best.py", __file__)
    c.model.name = "efficientnet_lite0_small"
    c.train.label_smoothing = 0.0  # the teacher's answers are soft enough
    return c
