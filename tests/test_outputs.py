"""Judge: NumPy. Every example once and in order, or an error."""

import jax.numpy as jnp
import numpy as np
import pytest

from covid_flax import outputs
from covid_flax.data.pipeline import ArraySource, eval_batches
from covid_flax.evaluation.metrics import log_softmax
from covid_flax.outputs import compile_apply, mean_loss, predict
from ml_collections_configs import base


def _config(batch_size):
    config = base.get_config()
    config.eval.batch_size = batch_size
    return config


def _apply():
    return compile_apply(
        lambda scale, stats, x: jnp.stack([x.sum(-1) * scale, stats + 0 * x[:, 0]], 1)
    )


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (8, 4), (3, 16), (1, 1)])
def test_outputs_come_in_order(n, batch):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, 5)).astype(np.float32)
    source = ArraySource(images, np.zeros(n, np.int32))
    out = predict(_apply(), 2.0, 7.0, source, _config(batch))
    np.testing.assert_allclose(out[:, 0], 2 * images.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(out[:, 1], 7)


@pytest.mark.parametrize("fault", ["lost", "double"])
def test_a_lost_or_doubled_example_is_an_error(fault, monkeypatch):
    def faulty(*args, **kwargs):
        for i, batch in enumerate(eval_batches(*args, **kwargs)):
            if fault == "lost" and i == 1:
                batch["mask"][0] = False
            if fault == "double" and i == 1:
                batch["index"][0] = 0
            yield batch

    monkeypatch.setattr(outputs, "eval_batches", faulty)
    source = ArraySource(np.ones((9, 5), np.float32), np.zeros(9, np.int32))
    with pytest.raises(RuntimeError, match="of 9 examples"):
        predict(_apply(), 1.0, 0.0, source, _config(4))


def test_loss_of_extreme_logits_is_finite_and_exact():
    logits = np.array([[1000.0, 0, 0], [0, -1000.0, 0], [1, 2, 3]], np.float32)
    expected = np.array([1000.0, np.log(2), 3 - 1 + np.log(1 + np.exp(-1) + np.exp(-2))])
    labels = np.array([1, 2, 0])
    np.testing.assert_allclose(mean_loss(logits, labels), expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(1), 1, rtol=1e-12)
