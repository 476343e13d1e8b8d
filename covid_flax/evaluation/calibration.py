"""Temperature scaling and an abstain threshold, fitted on images the model did not train on."""

from __future__ import annotations

from typing import Any

import numpy as np

from covid_flax.evaluation.metrics import (
    expected_calibration_error,
    log_softmax,
    negative_log_likelihood,
)

_BOUNDS = (0.05, 20.0)


def temperature_scale(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) (Guo et al. 2017): of a softmax, the softmax of its logits / T.

    Over 1 the probabilities move together, under 1 apart; their order stays.

    Args:
      probabilities: floats [N, K], at least 0; an exact 0 is taken as the smallest normal float64.
      temperature: T, over 0.

    Returns:
      float64 [N, K], rows sum to 1.

    Raises:
      ValueError: T is not over 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be over 0, got {temperature}")
    return np.exp(log_softmax(_log(probabilities) / temperature))


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature of least mean negative log-likelihood, between 0.05 and 20.

    That has one minimum in T. Where no temperature betters it, exactly 1 is returned; and
    where all predictions are right, for it lies at 0 then, and no error tells how unsure to be.

    Args:
      labels: integers [N], N at least 1.
      probabilities: floats [N, K].
    """
    # Here, for scipy.optimize is slow to load.
    from scipy.optimize import minimize_scalar

    labels = np.asarray(labels)
    logs = _log(probabilities)
    if (np.asarray(probabilities).argmax(1) == labels).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logs / float(np.exp(log_temperature)))
        return -float(scaled[np.arange(len(labels)), labels].mean())

    bounds = tuple(np.log(_BOUNDS))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    temperature = float(np.exp(found.x))
    # The report's figure, clipped, must not grow either.
    better = _nll(labels, np.exp(log_softmax(logs / temperature))) < _nll(labels, np.exp(logs))
    return temperature if better else 1.0


def abstain_threshold(
    labels: np.ndarray, probabilities: np.ndarray, accuracy: float = 0.99
) -> float | None:
    """The lowest top probability from which on the images kept reach an accuracy.

    Images whose top probability is at least the threshold are kept. Reached on these images, the
    accuracy is not promised on others.

    Args:
      labels: integers [N], N at least 1.
      probabilities: floats [N, K].
      accuracy: to be reached, 0 to 1.

    Returns:
      One of the N top probabilities, or None where no threshold reaches the accuracy.
    """
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    hits = (probabilities.argmax(axis=1) == labels)[order].cumsum()
    # Equal probabilities are kept or dropped together.
    ends = np.flatnonzero(np.diff(confidence[order], append=-np.inf))
    reached = ends[hits[ends] / (ends + 1) >= accuracy]
    return float(confidence[order][reached[-1]]) if len(reached) else None


def fit_calibration(
    labels: np.ndarray, probabilities: np.ndarray, *, target_accuracy: float = 0.99
) -> dict[str, Any]:
    """Temperature and abstain threshold of a run, and what the temperature changes.

    Args:
      labels: integers [N], N at least 1.
      probabilities: floats [N, K], unscaled.
      target_accuracy: of the images kept.

    Returns:
      Plain Python values: temperature, num_examples, nll and ece (each before and after, on these
      images), abstain (target_accuracy, threshold on the scaled probabilities or None).
    """
    labels = np.asarray(labels)
    temperature = fit_temperature(labels, probabilities)
    scaled = temperature_scale(probabilities, temperature)
    return {
        "temperature": temperature,
        "num_examples": len(labels),
        "nll": {"before": _nll(labels, probabilities), "after": _nll(labels, scaled)},
        "ece": {
            "before": expected_calibration_error(labels, probabilities),
            "after": expected_calibration_error(labels, scaled),
        },
        "abstain": {
            "target_accuracy": target_accuracy,
            "threshold": abstain_threshold(labels, scaled, target_accuracy),
        },
    }


def _nll(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(negative_log_likelihood(labels, probabilities).mean())


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float64).tiny))
