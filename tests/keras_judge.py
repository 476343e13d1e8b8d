"""Keras on JAX, the judge of many tests; conftest.py chooses the backend.

The random values its layers start from come from NumPy here. JAX would compile a program for every
shape of an array, half of the time of a whole network's test, and the tests overwrite them anyway.
"""

import keras
import numpy as np
from keras.src.backend import random


def _truncated_normal(shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
    values = np.clip(_rng.standard_normal(shape, np.float32), -2, 2) * stddev + mean
    return keras.ops.convert_to_tensor(values, dtype or keras.config.floatx())


def _uniform(shape, minval=0.0, maxval=1.0, dtype=None, seed=None):
    values = _rng.random(shape, np.float32) * (maxval - minval) + minval
    return keras.ops.convert_to_tensor(values, dtype or keras.config.floatx())


_rng = np.random.default_rng(0)
random.truncated_normal, random.uniform = _truncated_normal, _uniform

__all__ = ["keras"]
