"""95 % intervals of figures: Wilson's for a share, the cluster bootstrap for any figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
# Weights held at once. 2 MB in float64 stay in a core's cache: faster than all in one.
_CHUNK = 2**18


def wilson(hits: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of Wilson's score interval (Wilson 1927), which takes every trial as independent.

    Args:
      hits: successes, any shape.
      totals: trials, same shape.

    Returns:
      Lower and upper bounds, float64; NaN where there is no trial.
    """
    hits, totals = np.asarray(hits, np.float64), np.asarray(totals, np.float64)
    n = np.where(totals > 0, totals, np.nan)
    share = hits / n
    middle = share + _Z**2 / (2 * n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + _Z**2 / n), (middle + half) / (1 + _Z**2 / n)
    # Exactly 0 and 1 there; rounding would leave 1e-17 or so.
    return np.where(hits == 0, 0 * n, low), np.where(hits == totals, n / n, high)


def wilson_interval(hits: float, total: float) -> list[float] | None:
    """`[low, high]` of `wilson` for one share; None without a trial."""
    if total == 0:
        return None
    low, high = wilson(np.array(hits), np.array(total))
    return [float(low), float(high)]


def wilson_of_images(hits: np.ndarray, clusters: np.ndarray) -> list[float] | None:
    """`wilson_interval` of a share of images, which it takes as independent.

    Args:
      hits: of each image, bool `[N]`.
      clusters: group numbers `[N]`.

    Returns:
      None without an image, and for several that are all of one group: that says nothing of how
      groups differ.
    """
    if len(hits) > 1 and (clusters == clusters[0]).all():
        return None
    return wilson_interval(int(hits.sum()), len(hits))


def share_interval(
    hits: np.ndarray, clusters: np.ndarray, resamples: int = RESAMPLES
) -> list[float] | None:
    """`[low, high]` of a share of images: by groups where some share one, else Wilson's.

    `wilson_of_images` too where all resamples agree.

    Args:
      hits: of each image, bool `[N]`.
      clusters: group numbers `[N]`.
      resamples: of the bootstrap.
    """
    if 1 < len(np.unique(clusters)) < len(hits):
        counted = hits.astype(np.float64)
        drawn = [w @ counted / w.sum(1) for w in cluster_weights(clusters, resamples)]
        found = percentile_interval(np.concatenate(drawn))
        if has_width(found):
            return found
    return wilson_of_images(hits, clusters)


def student_interval(values: Sequence[float]) -> list[float]:
    """`[low, high]` of Student's interval for the mean of two independent values or more."""
    from scipy.stats import t  # half a second, which training need not wait for

    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    return [float(mean - half), float(mean + half)]


def has_width(interval: Sequence[float] | None) -> bool:
    """A bootstrap whose resamples all gave the same figure knows nothing of its spread."""
    return interval is not None and interval[1] - interval[0] > 1e-9


def resamples_groups(report: Mapping[str, Any]) -> bool:
    """Whether some of a report's images share a group, so that its bootstrap heeds groups."""
    clusters = (report.get("intervals") or {}).get("clusters") or math.inf
    return clusters < report["num_examples"]


def one_group(report: Mapping[str, Any]) -> bool:
    """Whether several images are all of one group, which says nothing of how groups differ."""
    return (report.get("intervals") or {}).get("clusters") == 1 < report["num_examples"]


def whole_interval(report: Mapping[str, Any], *keys: str) -> Sequence[float] | None:
    """Of a figure of all images in a report: by the bootstrap; None where there is none.

    Wilson's of accuracy where all resamples agree. None where all images are of one group.
    """
    if one_group(report):
        return None
    intervals = report.get("intervals") or {}
    found: Any = intervals.get("bootstrap")
    for key in keys:
        found = (found or {}).get(key)
    if keys == ("accuracy",) and not has_width(found):
        return (intervals.get("wilson") or {}).get("accuracy")
    return found


def class_interval(report: Mapping[str, Any], name: str, key: str) -> Sequence[float] | None:
    """Of a class's figure in a report: by groups where there are any, else Wilson's of a share.

    Where some images share a group, Wilson's interval, which takes all as independent, is too
    narrow; where none do, it is better for few images than the bootstrap. It stands in too where
    all resamples agree. None where all images are of one group.
    """
    if one_group(report):
        return None
    intervals = report.get("intervals") or {}

    def of(kind: str) -> Any:
        return (((intervals.get(kind) or {}).get("per_class") or {}).get(name) or {}).get(key)

    if resamples_groups(report) and has_width(of("bootstrap")):
        return of("bootstrap")
    return of("wilson") or (of("bootstrap") if has_width(of("bootstrap")) else None)


def cluster_weights(clusters: np.ndarray, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Resamples of the cluster bootstrap: whole clusters drawn with replacement.

    As many clusters are drawn as there are, so that a resample's number of images varies with
    their sizes (Davison & Hinkley 1997, section 3.8; Field & Welsh 2007). Same arguments, same
    draws: two models scored on the same images can be compared resample by resample.

    Args:
      clusters: cluster of each image, integers [N], N at least 1.
      resamples: how many in all.
      seed: of the draws.

    Yields:
      float64 [r, N], whole numbers: how often each image is in each of the next r resamples.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    g = int(cluster.max()) + 1
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(cluster))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = rng.integers(0, g, (r, g)) + g * np.arange(r)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=r * g).reshape(r, g)
        yield counts.astype(np.float64)[:, cluster]


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> list[float] | None:
    """`[low, high]`: percentiles of the resampled figures [R] that are defined (not NaN).

    Linear between order statistics, as numpy.percentile; None where none is defined.
    """
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return [float(low), float(high)]


def is_undefined(figures: Mapping[str, Any], key: str) -> bool:
    """Whether the 0 that a report gives for a class's figure stands for a division by 0."""
    support, claimed = figures["support"], figures.get("predicted")
    if key == "recall":
        return bool(support == 0)
    if key == "precision":
        return claimed == 0
    return key == "f1" and support == 0 and claimed == 0
