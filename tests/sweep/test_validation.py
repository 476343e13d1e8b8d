"""Judge: the rule by which a run keeps its best epoch."""

import math

from covid_flax.sweep.validation import best_of


def test_the_best_epoch():
    records = [
        {"epoch": e, "loss": loss, "accuracy": a}
        for e, loss, a in [(1, math.nan, 0.7), (2, 0.5, 0.8), (3, 0.4, 0.8), (4, 0.45, 0.6)]
    ]
    assert best_of(records, "val_loss")["best_epoch"] == 3
    assert best_of(records, "val_accuracy")["best_epoch"] == 2
    assert best_of(records, "val_loss")["epochs"] == 4
    assert best_of(records[:1], "val_loss") is None
    # As the run itself: what is no improvement by train.min_delta is not kept.
    assert best_of(records, "val_loss", 0.15)["best_epoch"] == 2
    assert best_of(records, "val_loss", start_from_epoch=3)["best_epoch"] == 4
