"""Keys' cubic as he writes it, an independent judge of `covid_flax.augment`."""

import numpy as np


def kernel(at, first, last):
    """Weights of the pixels `first` to `last` at the places `at`, float64 `[..., pixels]`.

    R. Keys, Cubic convolution interpolation for digital image processing (1981), a = -1/2.
    """
    away = np.abs(np.asarray(at, np.float64)[..., None] - np.arange(first, last + 1))
    near = 1.5 * away**3 - 2.5 * away**2 + 1
    far = -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    return np.where(away < 1, near, np.where(away < 2, far, 0))
