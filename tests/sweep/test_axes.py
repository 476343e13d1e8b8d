"""What --set takes, and what it says of the rest."""

import numpy as np
import pytest
from scipy import stats

from covid_flax import config as config_lib
from covid_flax.errors import UserError
from covid_flax.sweep.axes import parse_axis
from ml_collections_configs import base

KNOWN = config_lib.flatten(base.get_config())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.learning_rate=1e-4, 3e-4,1", (1e-4, 3e-4, 1.0)),
        ("config.train.batch_size=8,16", (8, 16)),
        ("augment.flip=True,false", (True, False)),
        ("model.trainable=head,conv5", ("head", "conv5")),
        ("model.weights_may_miss=('conv4','conv5'),()", (("conv4", "conv5"), ())),
    ],
)
def test_lists_take_the_type_of_their_key(text, values):
    axis = parse_axis(text, KNOWN)
    assert axis.values == values and not axis.scale
    assert [type(v) for v in axis.values] == [type(KNOWN[axis.key])] * len(values)


def test_ranges():
    rng = np.random.default_rng(0)
    log = parse_axis("optimizer.learning_rate=log(1e-5, 1e-3)", KNOWN)
    drawn = np.array([log.draw(rng) for _ in range(2000)])
    assert drawn.min() >= 1e-5 and drawn.max() <= 1e-3
    # Uniform in the logarithm: Kolmogorov and Smirnov's test of it.
    assert stats.kstest((np.log10(drawn) + 5) / 2, "uniform").pvalue > 1e-3
    uniform = parse_axis("model.dropout=uniform(0.1,0.6)", KNOWN)
    drawn = np.array([uniform.draw(rng) for _ in range(2000)])
    assert stats.kstest((drawn - 0.1) / 0.5, "uniform").pvalue > 1e-3
    whole = parse_axis("train.batch_size=log(8,64)", KNOWN)
    assert {type(whole.draw(rng)) for _ in range(9)} == {int}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer.learning_rat=1", ["learning_rat'", "optimizer.learning_rate"]),
        ("learning_rate=1", ["optimizer.learning_rate"]),
        ("model.label_smoothing=0", ["train.label_smoothing"]),
        ("train.epochs", ["train.epochs"]),
        ("train.epochs=1.5", ["1.5", "whole"]),
        ("train.epochs=1,,2", ["empty"]),
        ("optimizer.learning_rate=fast", ["fast", "number"]),
        ("optimizer.learning_rate=nan", ["nan", "number"]),
        ("optimizer.learning_rate=0.1,1e-1", ["twice"]),
        ("augment.flip=maybe", ["maybe", "True"]),
        ("optimizer.learning_rate=log(0,1)", ["above 0"]),
        ("optimizer.learning_rate=uniform(2,1)", ["low end"]),
        ("optimizer.learning_rate=uniform(a,1)", ["numbers"]),
        ("optimizer.learning_rate=normal(0,1)", ["log(LOW,HIGH)"]),
        ("model.name=log(1,2)", ["no number"]),
        ("seed=0,1", ["--seeds"]),
        ("train.monitor=val_loss", ["--config.train.monitor"]),
        ("data.split_seed=0,1", ["judged by other images", "--config.data.split_seed"]),
    ],
)
def test_what_cannot_be_set(text, words):
    with pytest.raises(UserError) as e:
        parse_axis(text, KNOWN)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)
