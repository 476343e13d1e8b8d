"""What a feed tells the meter of steps that compile."""

import numpy as np
import pytest

from covid_flax.console import Meter
from covid_flax.feed import DeviceFeed


def test_of_several_processes_all_examples_are_left_out_of_the_rates():
    """The step's sums, from which rates are made, are of all processes."""
    mine = [{"index": np.arange(2)}, {"index": np.arange(2), "mask": np.array([True, True])}]
    feed = DeviceFeed(
        iter(mine),
        data={},
        steps=lambda state, *_: (state, 0.0),
        short_step=lambda state, *_: (state, 0.0),
        put=lambda x: x,
        chunk=1,
        batch_size=6,  # of three processes
        rest=5,
    )
    meter = Meter(1, 2, 0, {"elapsed": 0.0, "epoch_seconds": 0.0, "epoch_examples": 0.0})
    meter.first = False
    feed.advance(0, 2, meter)
    assert (meter.untimed_examples, meter.untimed_steps) == (11, 2)


@pytest.mark.parametrize(("counted", "timed"), [(8, 0), (16, 8)])
def test_skipped_examples_make_no_rate_negative(counted, timed):
    meter = Meter(1, 4, 0, {"elapsed": 0.0, "epoch_seconds": 0.0, "epoch_examples": 0.0})
    meter.interval(1, 8, 1.0, 0.5, 1e-3)
    with meter.compiling(8):
        pass
    meter.interval(3, counted, 1.0, 0.5, 1e-3)
    assert meter.epoch_examples == timed and meter.rate > 0
