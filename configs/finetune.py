"""ResNet50 as we would fine-tune it: what to start from for a result of your own.

Against the paper: the preprocessing the weights were trained with; a group split with a
test part that chooses nothing; a larger learning rate with warm-up and cosine; mild
augmentation; balanced class weights, for Viral Pneumonia is 6 % of the images. Batch norm
keeps its ImageNet statistics: augmentation resamples images and so smooths them, and
statistics that follow would not fit the plain images of the evaluation.

`finetune.py:conv5` is for a machine without an accelerator: conv5 and the head are trained,
nothing is augmented, so the frozen stages are computed once for all epochs. Batch norm in
conv5 follows the (plain) images.
"""

from ml_collections_configs import base


def get_config(variant: str = ""):
    c = base.get_config()
    c.data.split = "grouped"
    c.data.val_fraction = 0.1
    c.data.test_fraction = 0.2
    c.data.interpolation = "bilinear"
    c.model.hidden_units = 0
    c.model.dropout = 0.2
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 0.5
    c.optimizer.clip_norm = 1.0
    c.train.epochs = 12
    c.train.patience = 4
    c.train.class_weights = "balanced"
    c.train.label_smoothing = 0.05
    if variant == "conv5":
        c.model.trainable = "conv5"
        c.model.bn_momentum = 0.9
    elif variant:
        raise ValueError(f"finetune.py has no variant {variant!r}: conv5")
    else:
        c.model.batch_norm = "frozen"
        c.augment.flip = True
        c.augment.shift = 0.05
        c.augment.rotate = 7.0
        c.augment.scale = 0.08
        c.augment.brightness = 0.1
    return c
