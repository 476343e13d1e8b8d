"""Light networks in training: exact gradients, and batch statistics of what is real alone.

Judge: the loss itself, by central differences along its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covid_flax.models import MODELS, create_model
from covid_flax.models.efficientnet import EfficientNetSpec
from covid_flax.step import StepConfig, create_state, make_train_step
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


# The first three of Lite0's blocks, without and with expansion and addition.
SHORT = EfficientNetSpec(1.0, 1.0, True, "lite", 224, (1, 2), False)


@pytest.fixture(
    scope="module",
    params=[
        "short",
        _slow("efficientnet_lite0_small"),
        _slow("mobilenet_v3_small"),
        _slow("densenet121"),
    ],
)
def network(request):
    MODELS["short"] = SHORT
    yield _network(request)
    del MODELS["short"]


def _network(request):
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = request.param, 0, 0.0
    return request.param, *create_model(config, 4, seed=0)


@pytest.fixture(scope="module")
def batch(network):
    # Few pixels in the last of 121 layers would make their statistics, and rounding, large.
    side = 96 if network[0] == "densenet121" else 40
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3)).astype(np.uint8)
    images[::2] //= 2  # so that images differ in more than noise
    return {"image": jnp.asarray(images), "label": jnp.asarray(np.arange(8) % 4)}


def _step(network, **config):
    name, graphdef, params, batch_stats = network
    stages = frozenset(MODELS[name].stages)
    tx = optax.sgd(1.0)
    how = StepConfig("unit", batch_stats_in=stages, **config)
    return make_train_step(graphdef, tx, how), create_state(params, batch_stats, stages, tx, 0)


def _close(got, want):
    """To some parts in a hundred of each array's norm: rounding is large where gradients cancel."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        error, norm = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= 0.03 * norm + 1e-5, (jax.tree_util.keystr(path), error, norm)


@pytest.mark.slow  # test_depthwise.py and test_expand.py have what is hand-written of it
def test_the_gradient_is_that_of_the_loss(network, batch):
    step, state = _step(network)
    step = jax.jit(step)
    after, _ = step(state, batch)
    gradient = jax.tree.map(lambda a, b: a - b, state.params, after.params)  # at a rate of 1
    norm = float(optax.global_norm(gradient))

    def loss_at(distance):
        moved = jax.tree.map(lambda p, g: p + distance / norm * g, state.params, gradient)
        placed = create_state(
            moved, state.batch_stats, frozenset(MODELS[network[0]].stages), optax.sgd(1.0), 0
        )
        return float(step(placed, batch)[1])

    # A hundredth of the loss each way: far above rounding, too short to meet a bend.
    distance = 1e-2 / norm
    slope = (loss_at(distance) - loss_at(-distance)) / (2 * distance)
    assert slope == pytest.approx(norm, rel=0.02)


def test_what_fills_a_batch_up_touches_nothing(network, batch):
    step, state = _step(network)
    five, loss = jax.jit(step)(state, {name: x[:5] for name, x in batch.items()})
    other = batch["image"].at[5:].set(255)
    filled = {**batch, "image": other, "mask": jnp.arange(8) < 5}
    got, again = jax.jit(step)(state, filled)
    assert float(again) == pytest.approx(float(loss), rel=1e-4)
    _close(got.batch_stats, five.batch_stats)
    _close(
        jax.tree.map(lambda a, b: a - b, got.params, state.params),
        jax.tree.map(lambda a, b: a - b, five.params, state.params),
    )


@pytest.mark.slow
def test_mapped_devices_have_the_statistics_of_the_whole_batch(network, batch):
    step, state = _step(network)
    want, loss = jax.jit(step)(state, batch)
    step, _ = _step(network, axis_name="data")
    shares = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    got, losses = jax.jit(jax.vmap(step, axis_name="data", in_axes=(None, 0)))(state, shares)
    assert float(losses[1]) == pytest.approx(float(loss), rel=1e-4)
    one = jax.tree.map(lambda x: x[1], (got.params, got.batch_stats))
    _close(one[1], want.batch_stats)
    _close(
        jax.tree.map(lambda a, b: a - b, one[0], state.params),
        jax.tree.map(lambda a, b: a - b, want.params, state.params),
    )
