"""A part of the images that stands for all."""

from __future__ import annotations

import numpy as np

_SEED = 0


def stratified_sample(labels: np.ndarray, limit: int) -> np.ndarray:
    """`limit` images (all for 0), the classes as common as in `labels` `[N]`, but one of each.

    Returns:
      Their places in ascending order, int64.
    """
    if not 0 < limit < len(labels):
        return np.arange(len(labels))
    names, counts = np.unique(labels, return_counts=True)
    exact = limit * counts / len(labels)
    share = np.maximum(1, np.floor(exact)).astype(int)
    for k in np.argsort(share - exact, kind="stable")[: max(0, limit - share.sum())]:
        share[k] += 1
    while share.sum() > max(limit, len(names)):  # for the rare classes' one
        share[share.argmax()] -= 1
    rng = np.random.default_rng(_SEED)
    drawn = [
        rng.permutation(np.flatnonzero(labels == name))[:n]
        for name, n in zip(names, share, strict=True)
    ]
    return np.sort(np.concatenate(drawn))
