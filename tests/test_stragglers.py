import pytest

from covid_flax.stragglers import find_straggler, probe_seconds, straggler


@pytest.mark.parametrize(
    ("waiting", "probes"),
    [
        ([0.0, 0.0], [0.1, 0.1]),
        ([0.5, 0.5, 0.55, 0.5], [0.1, 0.11, 0.09, 0.1]),  # all are slow: nobody's fault
        ([0.02, 0.1], [0.1, 0.19]),
    ],
)
def test_nobody_stands_out(waiting, probes):
    assert straggler(waiting, probes) == ""


def test_the_one_that_waits_is_named():
    line = straggler([0.02, 0.01, 0.34, 0.03], [0.1] * 4)
    assert line.startswith("process 2 waited for its images 34% of the epoch, the others 2%")
    assert "arithmetic" not in line


def test_the_one_that_computes_slowly_is_named():
    line = straggler([0.0] * 3, [0.1, 0.1, 0.42])
    assert line.startswith("process 2 takes 4.2 times as long")


def test_a_run_of_one_process_has_none():
    assert find_straggler(1.0) == ""


def test_the_probe_takes_time():
    assert probe_seconds() > 0
