"""CT slices of COVID-19 and other findings: another modality, two classes, few images.

Made for COVID-CT (Zhao et al. 2020: 349 and 397 slices cut from preprints' figures), as
`<Class>/*.png` with a `labels.csv` whose `group_from_name` is the paper a figure came from:
figures of one paper stay on one side of the split. For another set of CT slices in class folders
set `--config.data.groups_file=` and `--config.data.group_column=`.

With so few images only conv5 and the head are trained, without augmentation, so that the frozen
stages are computed once; batch norm keeps its ImageNet statistics.
"""

from ml_collections_configs import base


def get_config():
    c = base.get_config()
    c.data.split = "grouped"
    c.data.groups_file = "labels.csv"
    c.data.val_fraction = 0.15
    c.data.test_fraction = 0.25
    c.data.image_size = 224  # the slices' longest side
    c.data.interpolation = "bilinear"
    c.model.hidden_units = 0
    c.model.trainable = "conv5"
    c.model.batch_norm = "frozen"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 1.0
    c.optimizer.clip_norm = 1.0
    c.train.epochs = 15
    c.train.batch_size = 16
    c.train.patience = 5
    c.train.class_weights = "balanced"
    c.train.label_smoothing = 0.05
    return c
