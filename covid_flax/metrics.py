"""The figures of an evaluation, from labels and predicted probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_report(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    loss: float | None = None,
) -> dict[str, Any]:
    """What report.json holds: accuracy, balanced accuracy, confusion matrix, figures per class.

    The predicted class is the most probable one, the first of equals. The definitions are
    scikit-learn's with zero_division=0: precision of a class never predicted, recall of a class
    without images, and an F1 with neither are 0. Balanced accuracy is the mean recall of the
    classes that have images.

    Args:
      labels: integers [N], 0 to K - 1, N at least 1.
      probabilities: floats [N, K], finite.
      class_names: K different names, in the order of the labels.
      loss: the mean loss of the same images, or None if unknown; kept as it is.

    Returns:
      A dict of plain Python values: num_examples, class_names, loss, accuracy, balanced_accuracy,
      confusion_matrix ([K][K] counts, rows true and columns predicted), per_class (by name:
      precision, recall, f1, support).

    Raises:
      ValueError: shapes, types or values are not as above.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    names = [str(name) for name in class_names]
    _check(labels, probabilities, names)
    k = len(names)
    predicted = probabilities.argmax(axis=1)
    matrix = np.bincount(labels.astype(np.int64) * k + predicted, minlength=k * k).reshape(k, k)

    hits = matrix.diagonal().astype(np.float64)
    support, claimed = matrix.sum(axis=1), matrix.sum(axis=0)
    precision = _ratio(hits, claimed)
    recall = _ratio(hits, support)
    f1 = _ratio(2 * hits, support + claimed)
    return {
        "num_examples": len(labels),
        "class_names": names,
        "loss": None if loss is None else float(loss),
        "accuracy": float(hits.sum() / len(labels)),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "confusion_matrix": matrix.tolist(),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(names)
        },
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


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
