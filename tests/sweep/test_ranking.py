"""Judge: SciPy's intervals."""

import numpy as np
import pytest
from scipy import stats

from covid_flax.sweep.ranking import mean_interval, rank
from covid_flax.sweep.results import table


def test_the_interval_is_scipys():
    values = [0.91, 0.93, 0.9, 0.955]
    mean, interval = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(values))
    assert interval == pytest.approx((expected.low, expected.high))
    assert mean_interval([0.5]) == mean_interval([0.5, 0.5]) == (0.5, None)


def test_shares_end_at_one():
    mean, interval = mean_interval([0.95, 0.99], share=True)
    assert mean == pytest.approx(0.97) and interval[1] == 1.0 and 0 < interval[0] < 0.95


def test_a_setting_with_a_failed_seed_ranks_last():
    def trial(setting, seed, loss, state="complete"):
        return dict(setting=setting, settings={}, seed=seed, state=state, val_loss=loss)

    trials = [trial(0, 0, 0.1), trial(0, 1, 0.0, "failed"), trial(1, 0, 0.5), trial(1, 1, 0.3)]
    trials += [trial(2, 0, 0.2), trial(2, 1, 0.3), trial(3, 0, 0.01, "pruned")]
    ranking = rank(trials, "val_loss")
    assert [r["setting"] for r in ranking] == [2, 1, 3, 0]
    assert ranking[3]["failed_seeds"] == [1] and ranking[3]["mean"] == 0.1
    assert "failed: seed 1" in table(ranking, [], "val_loss")[-1]
