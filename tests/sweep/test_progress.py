"""What is said while a trial trains."""

import re

from small_sweep import plan

from covid_flax.sweep.run_all import sweep


def test_the_time_left_is_told(fake_main, tmp_path, capsys):
    slow = plan(sets=["optimizer.learning_rate=0.1"], fixed={"optimizer.weight_decay": 0.4})
    sweep(slow, tmp_path / "sweep")
    out = capsys.readouterr().out
    assert re.search(r"epoch [12]/3 \| val loss 0\.9[89]00", out)
    assert "trial left" in out and "sweep left" in out
