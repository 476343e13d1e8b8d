"""How much of an image's class, and of a run's answers, its source gives away."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covid_flax.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    cluster_weights,
    percentile_interval,
)

FOLDS = 5
# With fewer images of a class, or in fewer groups than FOLDS, a source is left out of its probe.
LEAST_IMAGES = 20
COMPONENTS = 50

_Known = Sequence[tuple[str, str]]  # class and source of images


def source_only(scored: _Known, others: _Known) -> dict[str, Any] | None:
    """What knowing an image's source alone gives for its class.

    Args:
      scored: class and source ("" where unknown) of the images.
      others: of other images of the same data, from which each source's commonest class is
        learned; where they name no source, it is learned from `scored` itself, of sources that
        have two images or more there.

    Returns:
      `num_examples` (of known source), `num_sources`, `accuracy`, `majority` (of always answering
      the commonest class), `learned_from` (`other images` or `the same images`); None where no
      source is known.
    """
    known = [(label, source) for label, source in scored if source]
    elsewhere = [(label, source) for label, source in others if source]
    if not elsewhere:  # of a single image, a source would tell that image's class
        images = Counter(source for _, source in known)
        known = [(label, source) for label, source in known if images[source] > 1]
    if not known:
        return None
    by_source: dict[str, Counter[str]] = defaultdict(Counter)
    for label, source in elsewhere or known:
        by_source[source][label] += 1
    commonest = Counter(label for label, _ in elsewhere or known).most_common(1)[0][0]
    answers = {source: counts.most_common(1)[0][0] for source, counts in by_source.items()}
    right = sum(answers.get(source, commonest) == label for label, source in known)
    return {
        "num_examples": len(known),
        "num_sources": len({source for _, source in known}),
        "accuracy": right / len(known),
        "majority": max(Counter(label for label, _ in known).values()) / len(known),
        "learned_from": "other images" if elsewhere else "the same images",
    }


def probed_sources(
    labels: Sequence[str], sources: Sequence[str], clusters: np.ndarray
) -> dict[str, list[str]]:
    """The sources that can be told apart within each class, two or more; other classes left out.

    Within one class the class itself gives nothing of the source away.
    """
    images: dict[str, Counter[str]] = defaultdict(Counter)
    groups: dict[tuple[str, str], set[int]] = defaultdict(set)
    for label, source, cluster in zip(labels, sources, clusters.tolist(), strict=True):
        if source:
            images[label][source] += 1
            groups[label, source].add(cluster)
    found = {
        label: sorted(
            source
            for source, n in counts.items()
            if n >= LEAST_IMAGES and len(groups[label, source]) >= FOLDS
        )
        for label, counts in sorted(images.items())
    }
    return {label: names for label, names in found.items() if len(names) >= 2}


def learn(features: np.ndarray, labels: np.ndarray, asked: np.ndarray, count: int) -> np.ndarray:
    """Probabilities of a linear probe for `asked` `[M, D]`, learned from `features` `[N, D]`.

    Args:
      labels: class indices below `count`, `[N]`, two different ones at least.

    Returns:
      float64 `[M, count]`, 0 for a class that `labels` lacks.
    """
    with _one_thread():
        model = _linear_probe(features, len(features)).fit(features, labels)
        probabilities = np.zeros((len(asked), count))
        probabilities[:, model.classes_] = model.predict_proba(asked)
    return probabilities


def _one_thread() -> Any:
    """For matrices this small several threads of BLAS mostly wait for each other."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def _linear_probe(features: np.ndarray, learned_from: int) -> Any:
    """Logistic regression, the classes weighted equally, on the standardised features, their first
    `COMPONENTS` principal components where there are more; unfitted.

    `learned_from` is the least number of images it will be fitted to: components are at most half
    as many.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps: list[Any] = [StandardScaler()]
    if features.shape[1] > COMPONENTS:
        steps.append(PCA(min(COMPONENTS, learned_from // 2), random_state=0))
    steps.append(LogisticRegression(class_weight="balanced", max_iter=1000))
    return make_pipeline(*steps)


def probe(features: np.ndarray, sources: Sequence[str], clusters: np.ndarray) -> dict[str, Any]:
    """How well a linear probe tells the source of images of one class.

    Logistic regression (scikit-learn, the sources weighted equally) on standardised features, their
    first principal components where there are many. Each image is answered by a probe that saw none
    of its group (stratified 5-fold cross-validation by group).

    Args:
      features: float `[N, D]`.
      sources: of each image, two or more different ones of `LEAST_IMAGES` images.
      clusters: group numbers `[N]`.

    Returns:
      `num_examples`, `sources` (images by name), `balanced_accuracy` (mean over the sources),
      `interval` (95 %, cluster bootstrap), its `level`, and `chance`.
    """
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    names, wanted = np.unique(np.asarray(sources), return_inverse=True)
    by_group = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    folds = list(by_group.split(features, wanted, clusters))
    with _one_thread():
        model = _linear_probe(features, min(len(learned) for learned, _ in folds))
        answers = cross_val_predict(model, features, wanted, cv=folds)
    of_source = wanted[:, None] == np.arange(len(names))
    right = of_source & (answers == wanted)[:, None]
    columns = np.concatenate([of_source, right], 1).astype(np.float64)
    drawn = np.concatenate([w @ columns for w in cluster_weights(clusters, RESAMPLES)])
    with np.errstate(invalid="ignore"):
        resampled = (drawn[:, len(names) :] / drawn[:, : len(names)]).mean(1)
    return {
        "num_examples": len(wanted),
        "sources": dict(zip(names.tolist(), of_source.sum(0).tolist(), strict=True)),
        "balanced_accuracy": float((right.sum(0) / of_source.sum(0)).mean()),
        "interval": percentile_interval(resampled),
        "level": LEVEL,
        "chance": 1 / len(names),
    }


def probe_classes(
    labels: Sequence[str],
    sources: Sequence[str],
    clusters: np.ndarray,
    features: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """`probe` of each kind of features within each class that `probed_sources` names.

    Args:
      labels, sources: of each image, N.
      clusters: group numbers `[N]`.
      features: `[N, D]` by name.

    Returns:
      By class, then by name of the features.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, names in probed_sources(labels, sources, clusters).items():
        where = np.array(
            [a == label and s in names for a, s in zip(labels, sources, strict=True)], bool
        )
        told = [s for s, here in zip(sources, where.tolist(), strict=True) if here]
        found[label] = {
            name: probe(values[where], told, clusters[where]) for name, values in features.items()
        }
    return found
