"""A network of 1.4 million parameters that learns from a trained one's answers too.

Train `best.py` first, on the same images and split: its run, in `runs/best`, is the teacher.
Another one is given by `--config.train.teacher=RUN`, none by `--config.train.teacher=`.
"""

from ml_collections_configs import base


def get_config():
    c = base.start_from("best.py", __file__)
    c.model.name = "efficientnet_lite0_small"
    c.train.teacher = "runs/best"
    c.train.epochs = 14  # with these it was measured
    c.train.label_smoothing = 0.0  # the teacher's answers are soft enough
    return c
