"""`best.py`, trained against what classes differ in for no medical reason.

Every image is standardised by itself, so that brightness and contrast are gone; greys, sharpness,
noise, borders and single places are varied more than one hospital does.
"""

from ml_collections_configs import base


def get_config():
    c = base.start_from("best.py", __file__)
    c.model.preprocessing = "standard"
    c.augment.shift = 0.08
    c.augment.rotate = 12.0
    c.augment.scale = 0.15
    c.augment.contrast = 0.4
    c.augment.gamma = 0.4
    c.augment.blur = 1.2
    c.augment.noise = 0.03
    c.augment.erase = 0.3
    c.augment.border = 0.12
    return c
