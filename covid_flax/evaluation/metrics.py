"""The figures of an evaluation, from labels and predicted probabilities.

Each figure is computed from a weight for every image: all ones for the figure itself, and for a
resample of the bootstrap how often each image was drawn. One code serves both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from covid_flax.errors import UserError
from covid_flax.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    cluster_weights,
    percentile_interval,
    wilson_of_images,
)

BINS = 15
PREVALENCE = 0.05
_AVERAGED = ("precision", "recall", "f1", "specificity", "npv", "auroc", "auprc")
# scikit-learn reports these as 0 where they are undefined.
_ZERO_IF_UNDEFINED = ("precision", "recall", "f1", "mcc")


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean categorical cross-entropy; a probability of 0 counts as the smallest float.

    Args:
      labels: integers [N].
      probabilities: floats [N, K].
    """
    p = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(p, np.finfo(np.float64).tiny)).mean())


def classification_report(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    loss: float | None = None,
    *,
    clusters: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    prevalence: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What report.json holds: all figures of the predictions, and their 95 % intervals.

    The predicted class is the most probable one, the first of equals. Figures of a class take it
    against all others, with two classes too. The definitions are scikit-learn's, with these rules
    where a figure is 0/0:

    - precision of a class never predicted, recall of a class without images, F1 with neither, and
      Matthews' coefficient of one true or one predicted class are 0, as in scikit-learn with
      zero_division=0, but have no interval;
    - all others are None: specificity (every image is of the class), negative predictive value
      (every image is called so), AUROC (no image of the class or none of another), AUPRC (no image
      of the class), kappa (one class, always predicted).

    Balanced accuracy, `macro` and `weighted` run over the classes that have images; a class
    without specificity, NPV or AUROC is left out of that mean. `weighted` weighs by images.

    Args:
      labels: integers [N], 0 to K - 1, N at least 1.
      probabilities: floats [N, K], finite. Figures other than the matrix's take them as
        probabilities: between 0 and 1, rows that sum to 1.
      class_names: K different names, in the order of the labels.
      loss: the mean loss of the same images, or None if unknown; kept as it is.
      clusters: cluster of each image, integers [N]: patients, or groups of near-duplicates. Images
        of one cluster are drawn together by the bootstrap. None: every image is its own.
      resamples: of the bootstrap; 0 leaves it out.
      prevalence: share of a class among those examined, for ppv_at and npv_at; 0.05 for a class
        that is not named.
      seed: of the bootstrap.

    Returns:
      A dict of plain Python values, None for what is undefined: num_examples, class_names, loss,
      accuracy, balanced_accuracy, kappa (Cohen), mcc (Matthews), nll (mean, nats, clipped as
      scikit-learn's log_loss), brier (mean over images of the squared error summed over classes),
      ece (`BINS` equal bins of the top probability), confidence (mean top probability),
      confusion_matrix ([K][K] counts, rows true and columns predicted), per_class by name
      (precision, recall, f1, support, predicted, specificity, npv, auroc, auprc, brier, ppv_at,
      npv_at), macro and weighted (precision, recall, f1, specificity, npv, auroc, auprc),
      prevalence by name, and intervals: level, resamples, clusters (how many), seed, wilson and
      bootstrap, where `[low, high]` or None stands in the place of a figure. Wilson's interval
      takes images as independent; a share of several images that are all of one group has none.
      The bootstrap's are percentiles of the resamples in which the figure is defined; with one
      cluster there are none. Those of ece lie high, since drawing an image twice adds noise to
      every bin.

    Raises:
      ValueError: shapes, types or values are not as above.
      UserError: a prevalence of an unknown class, or not between 0 and 1.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    names = [str(name) for name in class_names]
    _check(labels, probabilities, names)
    clusters = _check_clusters(clusters, len(labels))
    sample = _prepare(labels, probabilities, names, prevalence)
    point = _figures(sample, np.ones((1, len(labels))))
    values = _map(lambda x: None if np.isnan(x[0]) else float(x[0]), point)

    matrix = _confusion(sample, np.ones((1, len(labels))))[0].astype(np.int64)
    support, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    for tree in (values, *values["per_class"].values()):
        tree |= {key: tree[key] or 0.0 for key in _ZERO_IF_UNDEFINED if key in tree}
    intervals: dict[str, Any] = {
        "level": LEVEL,
        "resamples": resamples,
        "clusters": len(np.unique(clusters)),
        "seed": seed,
        "wilson": _wilson(labels, probabilities.argmax(1), clusters, names),
    }
    if resamples:
        drawn = _resample(sample, clusters, resamples, seed)
        # One cluster, drawn again and again, says nothing of how clusters differ.
        alone = intervals["clusters"] == 1
        intervals["bootstrap"] = _map(lambda x: None if alone else percentile_interval(x), drawn)
    return {
        "num_examples": len(labels),
        "class_names": names,
        "loss": None if loss is None else float(loss),
        **{key: value for key, value in values.items() if not isinstance(value, dict)},
        "confusion_matrix": matrix.tolist(),
        "per_class": {
            name: values["per_class"][name]
            | {"support": int(support[i]), "predicted": int(predicted[i])}
            for i, name in enumerate(names)
        },
        "macro": values["macro"],
        "weighted": values["weighted"],
        "prevalence": dict(zip(names, sample.prevalence.tolist(), strict=True)),
        "intervals": intervals,
    }


def resampled_figures(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    *,
    clusters: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    prevalence: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures in each resample of the cluster bootstrap.

    Two models' figures on the same images, clusters and seed come from the same resamples, so
    that their differences give a paired interval (`intervals.percentile_interval`).

    Args:
      All as for `classification_report`.

    Returns:
      float64 [resamples] in the place of each figure of the report's intervals.bootstrap (by
      name, under macro, weighted and per_class too); NaN where the figure is undefined.

    Raises:
      ValueError, UserError: as `classification_report`.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    names = [str(name) for name in class_names]
    _check(labels, probabilities, names)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    clusters = _check_clusters(clusters, len(labels))
    return _resample(_prepare(labels, probabilities, names, prevalence), clusters, resamples, seed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def negative_log_likelihood(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """-log of the true class's probability, clipped as scikit-learn's log_loss: nats, float64 [N].

    Args:
      labels: integers [N].
      probabilities: floats [N, K].
    """
    eps = np.finfo(np.float64).eps
    true = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return -np.log(np.clip(true, eps, 1 - eps))


def confidence_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Which of the equal bins (0, 1/bins], ..., (1 - 1/bins, 1] holds each value: integers [N].

    As in Guo et al. 2017; 0 is in the first bin.
    """
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Gap between top probability and accuracy, mean over images of `BINS` bins (Guo et al. 2017).

    Args:
      labels: integers [N].
      probabilities: floats [N, K].
    """
    gaps = _gaps(np.asarray(labels), np.asarray(probabilities, np.float64))
    return float(np.abs(gaps.sum(axis=0)).sum() / len(labels))


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """Images in falling order of one class's probability, for AUROC and AUPRC.

    Equal probabilities form a tie. Only ties that hold an image of the class (U of them) are
    kept: the others add nothing to either figure.

    Attributes:
      order: all images [N].
      before: how many of `order` come before each tie [U].
      through: how many of them come before its end [U].
      positives: images of the class, in the same order [P].
      firsts: where in `positives` each tie begins [U].
    """

    order: np.ndarray
    before: np.ndarray
    through: np.ndarray
    positives: np.ndarray
    firsts: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What the figures need of the images, computed once for all weights.

    Attributes:
      names: K classes.
      by_cell: images in order of their cell of the confusion matrix [N].
      cells: cells that hold images, numbered true * K + predicted [C].
      cell_starts: where in `by_cell` each begins [C].
      sums: what is averaged [N, 2 + K + BINS]: NLL, top probability, squared error of each class,
        and top probability less hit in the column of the bin.
      rankings: K.
      prevalence: float64 [K].
    """

    names: list[str]
    by_cell: np.ndarray
    cells: np.ndarray
    cell_starts: np.ndarray
    sums: np.ndarray
    rankings: list[_Ranking]
    prevalence: np.ndarray


def _prepare(
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: list[str],
    prevalence: Mapping[str, float] | None,
) -> _Sample:
    check_prevalence(prevalence or {}, names)
    probabilities = probabilities.astype(np.float64)
    k = len(names)
    cell = labels.astype(np.int64) * k + probabilities.argmax(axis=1)
    by_cell = np.argsort(cell, kind="stable")
    cells, cell_starts = np.unique(cell[by_cell], return_index=True)
    is_class = labels[:, None] == np.arange(k)
    sums = [
        negative_log_likelihood(labels, probabilities)[:, None],
        probabilities.max(axis=1, keepdims=True),
        (probabilities - is_class) ** 2,
        _gaps(labels, probabilities),
    ]
    return _Sample(
        names=names,
        by_cell=by_cell,
        cells=cells,
        cell_starts=cell_starts,
        sums=np.concatenate(sums, axis=1),
        rankings=[_rank(is_class[:, i], probabilities[:, i]) for i in range(k)],
        prevalence=np.array([float((prevalence or {}).get(name, PREVALENCE)) for name in names]),
    )


def _gaps(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Top probability less hit (1 or 0), in the column of its bin: [N, BINS]."""
    confidence = probabilities.max(axis=1)
    gaps = np.zeros((len(labels), BINS))
    hit = probabilities.argmax(axis=1) == labels
    gaps[np.arange(len(labels)), confidence_bins(confidence)] = confidence - hit
    return gaps


def _rank(positive: np.ndarray, score: np.ndarray) -> _Ranking:
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    ends = np.append(starts[1:], len(score))
    places = np.flatnonzero(positive[order])
    tie = np.searchsorted(starts, places, side="right") - 1
    ties, firsts = np.unique(tie, return_index=True)
    return _Ranking(order, starts[ties], ends[ties], order[places], firsts)


def _figures(sample: _Sample, weights: np.ndarray) -> dict[str, Any]:
    """The figures for each row of weights [R, N]: float64 [R] each, NaN where undefined."""
    matrix = _confusion(sample, weights)
    hits = matrix.diagonal(axis1=1, axis2=2)
    support, claimed = matrix.sum(axis=2), matrix.sum(axis=1)
    n = support.sum(axis=1, keepdims=True)
    true_negatives = n - support - claimed + hits
    ranked = [_ranked(ranking, weights, n[:, 0]) for ranking in sample.rankings]
    k = len(sample.names)
    means = weights @ sample.sums / n
    squared = means[:, 2 : 2 + k]

    recall = _ratio(hits, support)
    specificity = _ratio(true_negatives, n - support)
    p = sample.prevalence
    per_class = {
        "precision": _ratio(hits, claimed),
        "recall": recall,
        "f1": _ratio(2 * hits, support + claimed),
        "specificity": specificity,
        "npv": _ratio(true_negatives, n - claimed),
        "auroc": np.stack([auroc for auroc, _ in ranked], axis=1),
        "auprc": np.stack([auprc for _, auprc in ranked], axis=1),
        "brier": squared,
        # Bayes' rule: what the two rates give where the class is as rare as stated.
        "ppv_at": _ratio(p * recall, p * recall + (1 - p) * (1 - specificity)),
        "npv_at": _ratio((1 - p) * specificity, (1 - p) * specificity + p * (1 - recall)),
    }
    return {
        "accuracy": hits.sum(axis=1) / n[:, 0],
        "balanced_accuracy": _average(recall, support > 0),
        "kappa": _kappa(hits.sum(axis=1), support, claimed),
        "mcc": _mcc(hits.sum(axis=1), support, claimed),
        "nll": means[:, 0],
        "brier": squared.sum(axis=1),
        "ece": np.abs(means[:, 2 + k :]).sum(axis=1),
        "confidence": means[:, 1],
        "macro": _averages(per_class, support, support > 0),
        "weighted": _averages(per_class, support, support),
        "per_class": {
            name: {key: value[:, i] for key, value in per_class.items()}
            for i, name in enumerate(sample.names)
        },
    }


def _confusion(sample: _Sample, weights: np.ndarray) -> np.ndarray:
    """Weighted counts [R, K, K], rows true and columns predicted."""
    k = len(sample.names)
    matrix = np.zeros((len(weights), k * k))
    matrix[:, sample.cells] = np.add.reduceat(
        weights[:, sample.by_cell], sample.cell_starts, axis=1
    )
    return matrix.reshape(-1, k, k)


def _ranked(ranking: _Ranking, weights: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (Mann-Whitney, a tie counts half) and average precision (a tie is one step): [R]."""
    if len(ranking.positives) == 0:
        return np.full(len(n), np.nan), np.full(len(n), np.nan)
    # Whole numbers, so the sums are exact.
    passed = np.zeros((len(n), weights.shape[1] + 1))
    np.cumsum(weights[:, ranking.order], axis=1, out=passed[:, 1:])
    before, through = passed[:, ranking.before], passed[:, ranking.through]
    in_tie = np.add.reduceat(weights[:, ranking.positives], ranking.firsts, axis=1)
    found = in_tie.cumsum(axis=1)
    positives = found[:, -1]
    negatives = n - positives
    # Negatives passed when half of the tie is passed.
    passed_negatives = (before + through + in_tie) / 2 - found
    beaten = in_tie * (negatives[:, None] - passed_negatives)
    steps = in_tie * np.divide(found, through, out=np.zeros_like(found), where=through > 0)
    return _ratio(beaten.sum(axis=1), positives * negatives), _ratio(steps.sum(axis=1), positives)


def _kappa(hits: np.ndarray, support: np.ndarray, claimed: np.ndarray) -> np.ndarray:
    n = support.sum(axis=1)
    return 1 - _ratio((n - hits) * n, n**2 - (support * claimed).sum(axis=1))


def _mcc(hits: np.ndarray, support: np.ndarray, claimed: np.ndarray) -> np.ndarray:
    """The multi-class coefficient of Gorodkin 2004."""
    n = support.sum(axis=1)
    spread = np.sqrt(n**2 - (support**2).sum(axis=1)) * np.sqrt(n**2 - (claimed**2).sum(axis=1))
    return _ratio(hits * n - (support * claimed).sum(axis=1), spread)


def _averages(
    per_class: dict[str, np.ndarray], support: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    zeros = {"precision": np.where(support > 0, np.nan_to_num(per_class["precision"]), np.nan)}
    return {key: _average((per_class | zeros)[key], weights) for key in _AVERAGED}


def _average(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over the defined values of each row [R, K]."""
    weights = weights * ~np.isnan(values)
    return _ratio((np.nan_to_num(values) * weights).sum(axis=1), weights.sum(axis=1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0 or NaN."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _resample(sample: _Sample, clusters: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    parts = [_figures(sample, w) for w in cluster_weights(clusters, resamples, seed)]
    return _map(lambda *x: np.concatenate(x), *parts)


def _map(function: Callable[..., Any], *trees: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _map(function, *(tree[key] for tree in trees))
        if isinstance(value, dict)
        else function(*(tree[key] for tree in trees))
        for key, value in trees[0].items()
    }


def _wilson(
    labels: np.ndarray, predicted: np.ndarray, clusters: np.ndarray, names: list[str]
) -> dict[str, Any]:
    right = labels == predicted

    def share(hits: np.ndarray, of: np.ndarray) -> list[float] | None:
        return wilson_of_images(hits[of], clusters[of])

    return {
        "accuracy": share(right, np.full(len(labels), True)),
        "per_class": {
            name: {
                "recall": share(right, labels == i),
                "specificity": share(predicted != i, labels != i),
                "precision": share(right, predicted == i),
                "npv": share(labels != i, predicted != i),
            }
            for i, name in enumerate(names)
        },
    }


def _check(labels: np.ndarray, probabilities: np.ndarray, names: list[str]) -> None:
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers [N], N > 0, got {labels.dtype} {list(labels.shape)}"
        )
    if probabilities.shape != (len(labels), len(names)):
        raise ValueError(
            f"probabilities must be [{len(labels)}, {len(names)}] for {len(labels)} labels and "
            f"{len(names)} classes, got {list(probabilities.shape)}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"class names must differ, got {names}")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"labels must lie in 0..{len(names) - 1}, got {labels.min()}..{labels.max()}"
        )
    if not np.isfinite(probabilities).all():
        row = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0])
        raise ValueError(f"probabilities must be finite; row {row} is not")


def _check_clusters(clusters: np.ndarray | None, n: int) -> np.ndarray:
    if clusters is None:
        return np.arange(n)
    clusters = np.asarray(clusters)
    if clusters.shape != (n,) or clusters.dtype.kind not in "iu":
        raise ValueError(
            f"clusters must be integers [{n}], got {clusters.dtype} {list(clusters.shape)}"
        )
    return clusters


def check_prevalence(prevalence: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuses a class that there is not, and shares outside 0 to 1. Raises UserError."""
    for name, share in prevalence.items():
        if name not in names:
            raise UserError(
                f"prevalence of {name!r}, no such class: name one of {', '.join(names)}"
            )
        if not 0 < share < 1:
            raise UserError(f"prevalence of {name} is {share}: give a share between 0 and 1")
