"""Judges: Keras's own Adam, Optax's, and arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from keras_judge import keras

from covid_flax.optimizer import learning_rate_schedule, make_optimizer
from ml_collections_configs import base


def _config(**changes):
    config = base.get_config().optimizer
    for key, value in changes.items():
        config[key] = value
    return config


def _run(tx, start, grads):
    params, state = start, tx.init(start)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    start = {"kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
    # From tiny to large: where gradients are near epsilon its meaning shows.
    grads = [
        {"kernel": jnp.asarray(rng.normal(size=(5, 3)) * 10.0 ** rng.uniform(-8, 0), jnp.float32)}
        for _ in range(30)
    ]
    return start, grads


def _keras_adam(start, grads, learning_rate):
    variable = keras.Variable(np.asarray(start["kernel"]))
    adam = keras.optimizers.Adam(learning_rate)
    for g in grads:
        adam.apply([g["kernel"]], [variable])
    return np.asarray(variable.value)


def test_keras_mode_is_keras_adam(problem):
    start, grads = problem
    tx = make_optimizer(_config(epsilon_mode="keras"), lambda _: 1e-2)
    ours = np.asarray(_run(tx, start, grads)["kernel"])
    theirs = _keras_adam(start, grads, 1e-2)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_optax_mode_differs_from_keras(problem):
    """With the same 1e-7 the two rules part where gradients are tiny."""
    start, grads = problem
    tx = make_optimizer(_config(epsilon_mode="optax"), lambda _: 1e-2)
    ours = np.asarray(_run(tx, start, grads)["kernel"])
    expected = np.asarray(_run(optax.adam(1e-2, eps=1e-7), start, grads)["kernel"])
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(ours - _keras_adam(start, grads, 1e-2)).max() > 1e-4


def test_weight_decay_spares_all_but_kernels():
    params = {"conv": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "bn": {"scale": jnp.ones(3)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = make_optimizer(_config(weight_decay=0.1), lambda _: 0.5)
    after = _run(tx, params, [zeros])
    np.testing.assert_allclose(after["conv"]["kernel"], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["conv"]["bias"], 1.0)
    np.testing.assert_array_equal(after["bn"]["scale"], 1.0)


def test_clip_norm_bounds_the_gradient():
    start = {"kernel": jnp.zeros(4)}
    big = {"kernel": jnp.full(4, 1e3)}
    unit = {"kernel": jnp.full(4, 0.5)}  # norm 1
    tx = make_optimizer(_config(clip_norm=1.0, epsilon=1.0), lambda _: 1.0)
    plain = make_optimizer(_config(epsilon=1.0), lambda _: 1.0)
    clipped, expected = _run(tx, start, [big]), _run(plain, start, [unit])
    np.testing.assert_allclose(clipped["kernel"], expected["kernel"], rtol=1e-6)


def test_schedules():
    warm = learning_rate_schedule(_config(learning_rate=1.0, warmup_epochs=2.0), 10, 5)
    np.testing.assert_allclose([warm(0), warm(10), warm(20), warm(49)], [0, 0.5, 1, 1], atol=1e-6)
    cosine = learning_rate_schedule(
        _config(learning_rate=1.0, warmup_epochs=1.0, schedule="cosine"), 10, 5
    )
    expected = [0.5, 1.0, 0.5 * (1 + np.cos(np.pi * 20 / 40)), 0.0]
    np.testing.assert_allclose([cosine(5), cosine(10), cosine(30), cosine(50)], expected, atol=1e-6)
    constant = learning_rate_schedule(_config(learning_rate=3e-4), 10, 5)
    assert float(constant(0)) == float(constant(10**6)) == pytest.approx(3e-4)


def test_a_stage_learns_at_a_share_of_the_next_one_s_rate():
    stages = ("stem", "block1", "pool", "head")
    start = {s: {"kernel": jnp.ones((2, 2))} for s in stages if s != "pool"}
    grads = [jax.tree.map(lambda x: 0.3 * x, start)] * 3
    plain = _run(make_optimizer(_config(), lambda _: 1e-2, stages), start, grads)
    decayed = _run(make_optimizer(_config(stage_decay=0.5), lambda _: 1e-2, stages), start, grads)
    for stage, factor in (("head", 1.0), ("block1", 0.5), ("stem", 0.25)):
        moved = np.asarray(decayed[stage]["kernel"]) - 1
        whole = np.asarray(plain[stage]["kernel"]) - 1
        assert abs(whole).min() > 0.02
        np.testing.assert_allclose(moved, factor * whole, rtol=1e-4)


def test_weights_decay_at_their_stage_s_rate():
    start = {stage: {"kernel": jnp.ones((2, 2))} for stage in ("stem", "block1", "head")}
    tx = make_optimizer(_config(weight_decay=0.1, stage_decay=0.5), lambda _: 0.5, tuple(start))
    moved = _run(tx, start, [jax.tree.map(jnp.zeros_like, start)])
    for stage, factor in (("head", 1.0), ("block1", 0.5), ("stem", 0.25)):
        np.testing.assert_allclose(moved[stage]["kernel"], 1 - 0.05 * factor, rtol=1e-6)


def test_gradients_are_clipped_by_the_norm_of_all_arrays_together():
    start = {"a": {"kernel": jnp.zeros(4)}, "b": {"kernel": jnp.zeros(2)}}
    large = {"a": {"kernel": jnp.full(4, 3.0)}, "b": {"kernel": jnp.full(2, 4.0)}}
    unit = jax.tree.map(lambda g: g / np.sqrt(4 * 9 + 2 * 16), large)
    clipping, plain = (
        make_optimizer(_config(clip_norm=clip, epsilon=1.0), lambda _: 1.0) for clip in (1.0, 0.0)
    )
    for x, y in zip(
        jax.tree.leaves(_run(clipping, start, [large])),
        jax.tree.leaves(_run(plain, start, [unit])),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_a_warm_up_of_half_an_epoch():
    schedule = learning_rate_schedule(_config(learning_rate=1.0, warmup_epochs=0.5), 10, 5)
    np.testing.assert_allclose([schedule(0), schedule(2), schedule(5)], [0, 0.4, 1], atol=1e-6)


@pytest.mark.parametrize("mode", ["keras", "optax"])
def test_the_moments_decay_as_configured(problem, mode):
    start, grads = problem
    tx = make_optimizer(_config(epsilon_mode=mode, b1=0.5, b2=0.9), lambda _: 1e-2)
    ours = np.asarray(_run(tx, start, grads)["kernel"])
    if mode == "optax":
        want = _run(optax.adam(1e-2, b1=0.5, b2=0.9, eps=1e-7), start, grads)["kernel"]
    else:
        variable = keras.Variable(np.asarray(start["kernel"]))
        adam = keras.optimizers.Adam(1e-2, beta_1=0.5, beta_2=0.9)
        for g in grads:
            adam.apply([g["kernel"]], [variable])
        want = variable.value
    np.testing.assert_allclose(ours, np.asarray(want), rtol=0, atol=5e-6)
