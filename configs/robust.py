"""`best.py`, trained against what classes differ in for no medical reason.

Every image is standardised by itself, so that brightness and contrast are gone; greys, sharpness,
noise, borders and single places are varied more than one hospital does.
"""

from ml_collections_configs import base


def get_config():
    c = base.start_from("best.py", __file__)
    c.model.preprocessing = "standard"
    c.augment.rotate = 8.0
    c.augment.scale = 0.1
    c.augment.contrast = 0.35
    c.augment.gamma = 0.35
    c.augment.blur = 0.75
    c.augment.noise = 0.02
    c.augment.erase = 0.2
    c.augment.border = 0.1
    return c
