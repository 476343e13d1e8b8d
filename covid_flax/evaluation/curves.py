"""The curves of an evaluation, as arrays for the pictures."""

from __future__ import annotations

import dataclasses

import numpy as np

from covid_flax.evaluation.intervals import wilson
from covid_flax.evaluation.metrics import BINS, confidence_bins


@dataclasses.dataclass(frozen=True)
class Roc:
    """Receiver operating characteristic: a point for each threshold, falling from infinity.

    Attributes:
      false_positive_rate: rising from 0 to 1 [P].
      true_positive_rate: rising from 0 to 1 [P].
      thresholds: an image is called positive from this score on [P].
    """

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    thresholds: np.ndarray


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall: a point for each threshold, falling; precision of none called is 1.

    Attributes:
      precision: starts at 1 [P].
      recall: rising from 0 to 1 [P].
      thresholds: an image is called positive from this score on, the first infinite [P].
    """

    precision: np.ndarray
    recall: np.ndarray
    thresholds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Top probability against accuracy, in equal bins of the top probability (Guo et al. 2017).

    Attributes:
      edges: of the bins [B + 1], each without its lower and with its upper edge.
      confidence: mean top probability [B], NaN in an empty bin.
      accuracy: [B], NaN in an empty bin.
      count: images, integers [B].
      low: bound of Wilson's 95 % interval of the accuracy [B], NaN in an empty bin.
      high: likewise.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecisionCurve:
    """Net benefit of acting on a score (Vickers & Elkin 2006), in true positives per image.

    Acting on none has the net benefit 0.

    Attributes:
      thresholds: probability from which on one would act [T].
      model: acting on the images whose score is at least the threshold [T].
      treat_all: acting on every image [T].
    """

    thresholds: np.ndarray
    model: np.ndarray
    treat_all: np.ndarray


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """Error of the images kept against their share, most confident first (Geifman & El-Yaniv 2017).

    Attributes:
      coverage: share of the images kept, rising to 1 [P].
      risk: share of wrong ones among those kept [P].
      thresholds: images are kept from this top probability on, falling [P].
      aurc: area: the mean of the risk over the images in that order, equal ones at once.
    """

    coverage: np.ndarray
    risk: np.ndarray
    thresholds: np.ndarray
    aurc: float


def roc(positive: np.ndarray, score: np.ndarray) -> Roc | None:
    """The curve of one class against the others.

    Args:
      positive: bool [N].
      score: floats [N].

    Returns:
      All thresholds, as scikit-learn's roc_curve without drop_intermediate; None where all or no
      images are positive.
    """
    found, called, thresholds = _steps(positive, score)
    positives, negatives = found[-1], called[-1] - found[-1]
    if positives == 0 or negatives == 0:
        return None
    return Roc((called - found) / negatives, found / positives, thresholds)


def precision_recall(positive: np.ndarray, score: np.ndarray) -> PrecisionRecall | None:
    """The curve of one class against the others.

    Args:
      positive: bool [N].
      score: floats [N].

    Returns:
      All thresholds, as scikit-learn's precision_recall_curve in falling order; None where no
      image is positive.
    """
    found, called, thresholds = _steps(positive, score)
    if found[-1] == 0:
        return None
    precision = np.append(1.0, found[1:] / called[1:])
    return PrecisionRecall(precision, found / found[-1], thresholds)


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """The reliability diagram; the expected calibration error is its gaps weighed by count.

    Args:
      labels: integers [N].
      probabilities: floats [N, K].
      bins: how many.
    """
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)
    bin_of = confidence_bins(confidence, bins)
    count = np.bincount(bin_of, minlength=bins)
    hits = np.bincount(bin_of, probabilities.argmax(axis=1) == labels, minlength=bins)
    n = np.where(count > 0, count, np.nan)
    low, high = wilson(hits, count)
    return Reliability(
        edges=np.linspace(0, 1, bins + 1),
        confidence=np.bincount(bin_of, confidence, minlength=bins) / n,
        accuracy=hits / n,
        count=count,
        low=low,
        high=high,
    )


def decision_curve(
    positive: np.ndarray, score: np.ndarray, thresholds: np.ndarray
) -> DecisionCurve:
    """The decision curve of one class against the others.

    Args:
      positive: bool [N].
      score: probabilities of the class, floats [N].
      thresholds: floats [T], at least 0 and under 1.

    Raises:
      ValueError: a threshold outside.
    """
    positive = np.asarray(positive, bool)
    score = np.asarray(score, np.float64)
    thresholds = np.asarray(thresholds, np.float64)
    if not ((thresholds >= 0) & (thresholds < 1)).all():
        raise ValueError("thresholds must be at least 0 and under 1")
    n = len(positive)
    odds = thresholds / (1 - thresholds)
    # How many of the sorted scores are at least the threshold.
    true = positive.sum() - np.searchsorted(np.sort(score[positive]), thresholds)
    false = (~positive).sum() - np.searchsorted(np.sort(score[~positive]), thresholds)
    prevalence = positive.mean()
    return DecisionCurve(
        thresholds=thresholds,
        model=true / n - false / n * odds,
        treat_all=prevalence - (1 - prevalence) * odds,
    )


def risk_coverage(labels: np.ndarray, probabilities: np.ndarray) -> RiskCoverage:
    """The risk-coverage curve of the top probability; equal ones are kept or dropped together.

    Args:
      labels: integers [N], N at least 1.
      probabilities: floats [N, K].
    """
    probabilities = np.asarray(probabilities, np.float64)
    wrong = probabilities.argmax(axis=1) != labels
    errors, kept, thresholds = (x[1:] for x in _steps(wrong, probabilities.max(axis=1)))
    risk = errors / kept
    n = kept[-1]
    aurc = float((risk * np.diff(kept, prepend=0)).sum() / n)
    return RiskCoverage(coverage=kept / n, risk=risk, thresholds=thresholds, aurc=aurc)


def _steps(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positives and images whose score is at least each threshold, falling from infinity (0, 0)."""
    score = np.asarray(score, np.float64)
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=-np.inf))
    found = np.asarray(positive, bool)[order].cumsum()[ends]
    return (
        np.append(0, found),
        np.append(0, ends + 1),
        np.append(np.inf, score[order][ends]),
    )
