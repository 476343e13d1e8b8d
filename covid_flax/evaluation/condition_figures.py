"""What is left of an accuracy when the images are changed, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from covid_flax.evaluation.intervals import (
    RESAMPLES,
    cluster_weights,
    percentile_interval,
    share_interval,
)

SEED = 0
# What counts as a finding: a balanced accuracy this much above chance, of so many groups of each
# class, unless chance alone makes any such finding of the whole report in more than this share.
LEAST_SURPLUS = 0.05
LEAST_GROUPS = 10
FALSE_FINDINGS = 0.05
PERMUTATIONS = 2000


def condition_figures(
    probabilities: np.ndarray,
    labels: np.ndarray,
    whole: np.ndarray,
    class_names: Sequence[str],
    clusters: np.ndarray,
    tests: int = 1,
) -> dict[str, Any]:
    """The table's row of one condition.

    Args:
      probabilities: float64 `[N, K]`, of the changed images.
      labels: class indices, int64 `[N]`.
      whole: probabilities of the same images whole, `[N, K]`.
      class_names: K.
      clusters: group numbers `[N]`.
      tests: how many figures the report tests in all; each must pass at its share of
        `FALSE_FINDINGS` (Bonferroni).

    Returns:
      `num_examples`, `accuracy`, `balanced_accuracy` (over the classes that have images) and
      `changed` (share whose answer is another than for the whole image), each with
      `<name>_interval` (percentile cluster bootstrap), `recall` and `recall_interval` by class
      (`share_interval`), `predicted` by class, `confidence` (mean top probability),
      `confusion_matrix` (rows true), `majority` (accuracy of always answering the commonest
      class), `chance` (balanced accuracy of any fixed answer), `whole_balanced_accuracy` (of the
      same images, whole), `kept` (of the whole images'
      balanced accuracy above chance, the share that is left; None where there was none), `p` (of
      `chance_p_value`, not corrected), `fewest_groups` (of any class that has images) and
      `above_chance`, whether all that shows more than a fixed answer.
    """
    count = len(class_names)
    answers, before = probabilities.argmax(1), whole.argmax(1)
    of_class = labels[:, None] == np.arange(count)
    right = of_class & (answers == labels)[:, None]
    moved = (answers != before)[:, None]
    support, hits = of_class.sum(0), right.sum(0)
    present = support > 0
    chance, majority = float(1 / present.sum()), float(support.max() / len(labels))

    columns = np.concatenate([of_class, right, moved], 1).astype(np.float64)
    drawn = np.concatenate([w @ columns for w in cluster_weights(clusters, RESAMPLES, SEED)])
    sizes, drawn_hits = drawn[:, :count], drawn[:, count : 2 * count]
    with np.errstate(invalid="ignore"):
        recalls = (drawn_hits / sizes)[:, present]
    drawn_n = sizes.sum(1)
    intervals = {
        "accuracy": percentile_interval(drawn_hits.sum(1) / drawn_n),
        # A class that a resample lacks is left out of its mean.
        "balanced_accuracy": percentile_interval(_row_means(recalls)),
        "changed": percentile_interval(drawn[:, -1] / drawn_n),
    }
    balanced = float((hits[present] / support[present]).mean())
    whole_right = of_class & (before == labels)[:, None]
    whole_balanced = float((whole_right.sum(0)[present] / support[present]).mean())
    accuracy = float(hits.sum() / len(labels))
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (labels, answers), 1)
    p = chance_p_value(answers, labels, clusters, count)
    fewest = min(len(np.unique(clusters[labels == k])) for k in np.flatnonzero(present))
    return {
        "num_examples": len(labels),
        "accuracy": accuracy,
        "accuracy_interval": intervals["accuracy"],
        "balanced_accuracy": balanced,
        "balanced_accuracy_interval": intervals["balanced_accuracy"],
        "recall": {
            name: float(hits[k] / support[k]) if present[k] else None
            for k, name in enumerate(class_names)
        },
        "recall_interval": {
            name: share_interval(answers[labels == k] == k, clusters[labels == k])
            for k, name in enumerate(class_names)
        },
        "predicted": dict(zip(class_names, matrix.sum(0).tolist(), strict=True)),
        "changed": float(moved.mean()),
        "changed_interval": intervals["changed"],
        "confidence": float(probabilities.max(1).mean()),
        "confusion_matrix": matrix.tolist(),
        "majority": majority,
        "chance": chance,
        "whole_balanced_accuracy": whole_balanced,
        "kept": (
            (balanced - chance) / (whole_balanced - chance) if whole_balanced > chance else None
        ),
        "p": p,
        "fewest_groups": fewest,
        "above_chance": bool(
            p is not None
            and p * tests <= FALSE_FINDINGS
            and fewest >= LEAST_GROUPS
            and balanced - chance >= LEAST_SURPLUS
        ),
    }


def chance_p_value(
    answers: np.ndarray, labels: np.ndarray, clusters: np.ndarray, count: int
) -> float | None:
    """How often answers that know nothing of the classes reach this balanced accuracy.

    A permutation test, one-sided (Phipson & Smyth 2010: the data count as one permutation). The
    classes of a group's images move together, and only to a group of as many images, so that every
    class keeps its size and the test is exact whatever the sizes; a group of several classes
    counts as one for each. Of two classes without groups it is Fisher's exact test.

    Args:
      answers: class indices, integers `[N]`.
      labels: the true ones, `[N]`.
      clusters: group numbers `[N]`.
      count: K, of classes.

    Returns:
      The share of `PERMUTATIONS`; None where the images are of fewer than two classes.
    """
    support = np.bincount(labels, minlength=count)
    if (support > 0).sum() < 2:
        return None
    groups, group = np.unique(np.stack([clusters, labels], 1), axis=0, return_inverse=True)
    answered = np.zeros((len(groups), count))
    np.add.at(answered, (group.ravel(), answers), 1)
    classes, sizes = groups[:, 1], answered.sum(1)
    # What a group adds to the sum of the recalls if its class is k.
    worth = answered / np.maximum(support, 1)
    observed = worth[np.arange(len(groups)), classes].sum()
    rng = np.random.default_rng(SEED)
    reached = np.zeros(PERMUTATIONS)
    for size in np.unique(sizes):
        (alike,) = np.nonzero(sizes == size)
        rows = max(1, 2**18 // len(alike))
        for start in range(0, PERMUTATIONS, rows):
            r = min(rows, PERMUTATIONS - start)
            moved = rng.permuted(np.tile(classes[alike], (r, 1)), axis=1)
            reached[start : start + r] += worth[alike, moved].sum(1)
    return float((1 + (reached >= observed - 1e-9).sum()) / (1 + PERMUTATIONS))


def _row_means(values: np.ndarray) -> np.ndarray:
    """Mean of each row over what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(1) / defined.sum(1)
