"""How the members of a repeated run differ: figures of each, and their mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covid_flax.evaluation.intervals import student_interval
from covid_flax.evaluation.metrics import classification_report, log_loss

FIGURES = ("accuracy", "balanced_accuracy", "loss")


def mean_interval(values: Sequence[float], *, share: bool = False) -> dict[str, Any]:
    """Mean, and Student's 95 % interval for it, of runs that are taken as independent.

    Folds share training images, so that theirs is too narrow (Bengio and Grandvalet 2004). That of
    a share is cut off at 0 and 1, which that of two runs commonly exceeds.
    """
    ends = student_interval(values)
    if share:
        ends = [max(ends[0], 0.0), min(ends[1], 1.0)]
    return {"mean": float(np.mean(values)), "interval": ends, "runs": len(values)}


def members_report(
    labels: np.ndarray,
    class_names: Sequence[str],
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """What report.json holds of a repeated run's members.

    Args:
      labels: of all images, integers [N].
      class_names: K names.
      answers: by member, which images it scored, integers [n], and its probabilities, [n, K].

    Returns:
      `figures`, by member; `mean`, of each figure.
    """
    figures = {}
    for name, (index, probabilities) in answers.items():
        of = classification_report(labels[index], probabilities, class_names, resamples=0)
        figures[name] = {
            "accuracy": of["accuracy"],
            "balanced_accuracy": of["balanced_accuracy"],
            "loss": log_loss(labels[index], probabilities),
        }
    mean = {
        f: mean_interval([one[f] for one in figures.values()], share=f != "loss") for f in FIGURES
    }
    return {"figures": figures, "mean": mean}
