"""Judges: scipy for Wilson's interval, and simulated sets whose truth is known."""

import numpy as np
import pytest

from covid_flax.evaluation.intervals import (
    cluster_weights,
    percentile_interval,
    share_interval,
    wilson,
    wilson_interval,
)


def _all(clusters, resamples, seed=0):
    return np.concatenate(list(cluster_weights(clusters, resamples, seed)))


def test_wilson_s_interval_is_scipy_s():
    stats = pytest.importorskip("scipy.stats")
    cases = [(k, n) for n in (1, 2, 7, 262, 4232) for k in {0, 1, n // 3, n - 1, n}]
    hits, totals = np.array(cases).T
    ours = np.stack(wilson(hits, totals), axis=1)
    theirs = [tuple(stats.binomtest(k, n).proportion_ci(method="wilson")) for k, n in cases]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    for (k, n), interval in zip(cases, ours.tolist(), strict=True):
        assert wilson_interval(k, n) == interval


@pytest.mark.filterwarnings("error")
def test_wilson_s_interval_without_trials_is_undefined():
    low, high = wilson(np.array([0, 3]), np.array([0, 4]))
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False]
    assert wilson_interval(0, 0) is None


def test_clusters_are_drawn_whole_and_as_many_as_there_are():
    clusters = np.array([7, 7, 3, -1, 3, 3, 100])
    weights = _all(clusters, 500)
    assert weights.shape == (500, 7)
    assert weights.dtype == np.float64
    firsts = [0, 2, 3, 6]
    for first in firsts:
        for i in np.flatnonzero(clusters == clusters[first]):
            np.testing.assert_array_equal(weights[:, i], weights[:, first])
    counts = weights[:, firsts]
    np.testing.assert_array_equal(counts.sum(1), 4)
    np.testing.assert_array_equal(counts, counts.round())
    # Multinomial: mean 1, variance 1 - 1/4; four standard errors.
    np.testing.assert_allclose(counts.mean(0), 1, atol=4 * (0.75 / 500) ** 0.5)
    np.testing.assert_allclose(counts.var(0), 0.75, atol=0.25)
    assert len(np.unique(weights, axis=0)) > 20


def test_the_same_seed_draws_the_same_and_another_does_not():
    clusters = np.arange(30)
    np.testing.assert_array_equal(_all(clusters, 9, seed=5), _all(clusters, 9, seed=5))
    assert (_all(clusters, 9, seed=5) != _all(clusters, 9, seed=6)).any()


def test_a_share_s_interval_is_by_groups_where_some_share_one():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 12, 60)
    hits = clusters % 3 > 0
    groups = [hits[clusters == c] for c in range(12)]
    drawn = [
        np.concatenate([groups[i] for i in np.random.default_rng(n).integers(0, 12, 12)]).mean()
        for n in range(4000)
    ]
    np.testing.assert_allclose(
        share_interval(hits, clusters), np.percentile(drawn, [2.5, 97.5]), atol=0.03
    )
    # No two share one, or no resample differs: Wilson's. All share one: nobody knows.
    assert share_interval(hits, np.arange(60)) == wilson_interval(int(hits.sum()), 60)
    assert share_interval(np.ones(60, bool), clusters) == wilson_interval(60, 60)
    assert share_interval(hits, np.zeros(60, int)) is None
    assert share_interval(hits[:1], clusters[:1]) == wilson_interval(int(hits[0]), 1)
    assert share_interval(hits[:0], clusters[:0]) is None


def test_many_images_come_in_pieces():
    pieces = list(cluster_weights(np.arange(100_000), 7))
    assert sum(len(piece) for piece in pieces) == 7
    assert max(piece.nbytes for piece in pieces) <= 2**21
    assert len({piece.tobytes() for piece in pieces}) == len(pieces)


def test_percentiles_are_of_the_defined_values():
    values = np.array([3.0, np.nan, 1.0, 2.0, np.nan, 5.0])
    assert percentile_interval(values) == pytest.approx(np.nanpercentile(values, [2.5, 97.5]))
    assert percentile_interval(np.full(3, np.nan)) is None


def test_coverage_of_clustered_accuracy():
    """150 patients of 1 to 12 images, who differ in how hard they are: true accuracy 0.8."""
    rng = np.random.default_rng(0)
    covered = {"clusters": 0, "images": 0}
    trials = 300
    for trial in range(trials):
        sizes = rng.integers(1, 13, 150)
        patient = np.repeat(np.arange(150), sizes)
        hits = rng.random(len(patient)) < rng.beta(2.4, 0.6, 150)[patient]
        for kind, clusters in [("clusters", patient), ("images", np.arange(len(patient)))]:
            weights = _all(clusters, 200, seed=trial)
            low, high = percentile_interval(weights @ hits / weights.sum(1))
            covered[kind] += low <= 0.8 <= high
    assert 0.91 <= covered["clusters"] / trials <= 0.98
    assert covered["images"] / trials < 0.85
