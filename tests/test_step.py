"""Judges: Keras's losses, NumPy in float64, and what must not change."""

import dataclasses

import jax
import jax.numpy as jnp
import keys_cubic
import numpy as np
import optax
import pytest
from keras_judge import keras

from covid_flax.augment import Augment
from covid_flax.models import create_model, trained_stages
from covid_flax.models.resnet import STAGES
from covid_flax.step import (
    _MIX,
    _STYLE,
    StepConfig,
    Teacher,
    create_state,
    cross_entropy,
    make_eval_step,
    make_steps_on_device,
    make_train_step,
)
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation")

# What most tests train: the rest only takes time to compile.
LAST = frozenset(("conv5", "pool", "head"))
HEAD = frozenset(("pool", "head"))


@pytest.fixture(scope="module")
def model():
    config = base.get_config().model
    config.name, config.hidden_units, config.bn_momentum = "resnet14_small", 8, 0.9
    return create_model(config, 4, seed=0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.asarray(np.arange(8) % 4, jnp.int32)}


def _state(model, trainable, tx=None):
    _, params, batch_stats = model
    return create_state(params, batch_stats, frozenset(trainable), tx or optax.adam(1e-2), seed=0)


def _step(model, **config):
    config = StepConfig(preprocessing="unit", **config)
    return jax.jit(make_train_step(model[0], optax.adam(1e-2), config))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_keras_s(smoothing, weighted):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 4)).astype(np.float32) * 2
    labels = rng.integers(0, 4, 40)
    weights = (0.5, 2.0, 1.0, 3.5) if weighted else None
    ours = cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing, class_weights=weights
    )
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=smoothing)
    sample_weight = None if weights is None else np.array(weights)[labels]
    theirs = loss(np.eye(4)[labels], keras.ops.softmax(logits), sample_weight)
    np.testing.assert_allclose(np.mean(ours), float(theirs), rtol=1e-5)


def test_loss_and_sums_match_a_forward_pass_in_numpy(batch):
    plain = _without_dropout("lenet5")
    logits = jax.jit(make_eval_step(plain[0], "unit"))(*plain[1:], batch["image"])
    state, loss = _step(plain)(_state(plain, HEAD), batch)
    assert float(state.sums["count"]) == 8
    np.testing.assert_allclose(float(state.sums["loss"]) / 8, float(loss), rtol=1e-6)
    z = np.asarray(logits, np.float64)
    z -= z.max(1, keepdims=True)
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(8), np.asarray(batch["label"])]
    np.testing.assert_allclose(float(loss), expected.mean(), rtol=1e-5)
    correct = np.sum(z.argmax(1) == np.asarray(batch["label"]))
    assert float(state.sums["correct"]) == correct


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_mixed_images_answer_for_both_labels(batch, weighted, monkeypatch):
    """The loss is Keras's of the mixed targets."""
    share = np.linspace(0.5, 1, 8, dtype=np.float32)
    monkeypatch.setattr("covid_flax.step.mix", lambda key, x, how, real: (x, jnp.asarray(share)))
    model = _without_dropout("lenet5")
    weights = (0.5, 2.0, 1.0, 3.5) if weighted else None
    how = {"label_smoothing": 0.1, "class_weights": weights, "augment": Augment(mixup=0.2)}
    _, loss = _step(model, **how)(_state(model, HEAD), batch)
    logits = jax.jit(make_eval_step(model[0], "unit"))(*model[1:], batch["image"])
    answers = keras.ops.softmax(logits)
    labels, loss_of = np.asarray(batch["label"]), keras.losses.CategoricalCrossentropy
    onehot, weight = np.eye(4), np.array(weights or [1] * 4)
    judge = loss_of(label_smoothing=0.1, reduction=None)
    if weighted:
        other = np.roll(labels, 1)
        expected = share * judge(onehot[labels], answers) * weight[labels]
        expected += (1 - share) * judge(onehot[other], answers) * weight[other]
    else:
        targets = (
            share[:, None] * onehot[labels] + (1 - share[:, None]) * onehot[np.roll(labels, 1)]
        )
        expected = judge(targets, answers)
    np.testing.assert_allclose(float(loss), np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("how", [{"mixup": 0.4, "cutmix": 1.0, "style": 1.0}])
def test_mixing_leaves_no_trace_of_what_fills_a_batch_up(batch, how):
    step, state = _plain_step(_without_dropout("lenet5"), HEAD, augment=Augment(**how))
    mask = {"mask": jnp.arange(8) < 5}
    a, loss = jax.jit(step)(state, {**batch, **mask})
    other = batch["image"].at[5:].set(0)
    b, again = jax.jit(step)(state, {**batch, **mask, "image": other})
    assert float(loss) == float(again)
    _assert_close(a.params, b.params, rtol=0, atol=0)


def test_a_batch_s_draws_are_no_image_s():
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), 512)).tolist()
    of_batch = [jax.random.fold_in(jax.random.key(3), n) for n in (1, _STYLE, _MIX)]
    shared = [jax.random.key_data(key).tolist() in keys for key in of_batch]
    assert shared == [True, False, False]


@pytest.mark.parametrize(
    "trainable", [pytest.param("all", marks=pytest.mark.slow), "conv5", "head"]
)
def test_only_what_is_trained_changes(model, batch, trainable):
    config = base.get_config().model
    config.trainable = trainable
    stages = trained_stages(config)
    before = _state(model, stages)
    after, _ = _step(model, batch_stats_in=frozenset(stages))(before, batch)
    params_before = {**before.frozen, **before.params}
    params_after = {**after.frozen, **after.params}
    for stage in params_before:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(params_before[stage]),
                jax.tree.leaves(params_after[stage]),
                strict=True,
            )
        )
        assert same == (stage not in stages), stage
    for stage in before.batch_stats:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(before.batch_stats[stage]),
                jax.tree.leaves(after.batch_stats[stage]),
                strict=True,
            )
        )
        assert same == (stage not in stages), stage
    moments = jax.tree_util.tree_leaves_with_path(after.opt_state)
    touched = {k.key for path, _ in moments for k in path if hasattr(k, "key")} & set(STAGES)
    assert touched == set(stages) - {"pool"}


def test_a_conv_bias_under_batch_statistics_stays_exactly_put(model, batch):
    """It cancels; Keras's rounding noise, which Adam turns into steps, is not there."""
    after, _ = _step(model, batch_stats_in=LAST)(_state(model, LAST), batch)
    bias = after.params["conv5"]["block1"]["unit1"]["conv"]["bias"]
    np.testing.assert_array_equal(bias, 0.0)


@pytest.mark.parametrize(
    ("trainable", "stop"),
    [("head", "pool"), pytest.param("conv5", "conv4", marks=pytest.mark.slow)],
)
def test_cached_inputs_give_the_same_step(model, batch, trainable, stop):
    config = base.get_config().model
    config.trainable = trainable
    stages = trained_stages(config)
    how = StepConfig(preprocessing="unit", batch_stats_in=frozenset(stages))
    tx = optax.sgd(0.1)  # Adam makes whole steps of gradients that are but rounding

    def step(how, batch):
        return jax.jit(make_train_step(model[0], tx, how))(_state(model, stages, tx), batch)

    whole, loss = step(how, batch)
    prefix = jax.jit(make_eval_step(model[0], "unit", stop=stop))
    features = prefix(model[1], model[2], batch["image"])
    cached, cached_loss = step(
        dataclasses.replace(how, start=stages[0]), {**batch, "image": features}
    )
    np.testing.assert_allclose(float(loss), float(cached_loss), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_dropout_and_augmentation_follow_seed_and_step(batch):
    model = _network("lenet5", dropout=0.5)
    step = _step(model, augment=Augment(flip=True, shift=0.1))
    start = _state(model, HEAD)
    _, loss = step(start, batch)
    assert float(step(start, batch)[1]) == float(loss)
    later = dataclasses.replace(start, step=start.step + 1)
    assert float(step(later, batch)[1]) != float(loss)


def test_augmentation_alone_follows_step_seed_and_device(batch):
    model, how = _without_dropout("lenet5"), Augment(flip=True, shift=0.1)
    step, start = _step(model, augment=how), _state(model, HEAD)
    later = dataclasses.replace(start, step=start.step + 1)
    other = create_state(*model[1:], HEAD, optax.adam(1e-2), seed=1)
    assert len({float(step(s, batch)[1]) for s in (start, later, other)}) == 3
    config = StepConfig("unit", augment=how, axis_name="data")
    mapped = make_train_step(model[0], optax.adam(1e-2), config)
    mapped = jax.jit(jax.vmap(mapped, axis_name="data", in_axes=(None, 0)))

    def devices(n):
        return float(mapped(start, jax.tree.map(lambda x: jnp.repeat(x[None], n, 0), batch))[1][0])

    assert abs(devices(2) - devices(1)) > 1e-5


@pytest.mark.slow
def test_training_learns(batch):
    """Eight images, forty steps, no dropout: anything but a broken gradient fits them."""
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = "resnet14_small", 64, 0.0
    model = create_model(config, 4, seed=0)
    tx = optax.adam(2e-3)  # at 1e-2 it may leap about, by the rounding of the day
    config = StepConfig(preprocessing="unit", batch_stats_in=frozenset(STAGES))
    step, state = jax.jit(make_train_step(model[0], tx, config)), _state(model, STAGES, tx)
    losses = []
    for _ in range(40):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def _network(name, dropout):
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = name, 8, dropout
    return create_model(config, 4, seed=0)


def _without_dropout(name="resnet14_small"):
    return _network(name, 0.0)


def _plain_step(model, trained=LAST, **config):
    """Updates that are near to the gradients themselves."""
    tx = optax.sgd(0.1)
    step = make_train_step(model[0], tx, StepConfig(preprocessing="unit", **config))
    return step, _state(model, trained, tx)


def _assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_of_parts_add_up_to_those_of_the_batch(batch, weighted):
    """Exact where batch norm keeps its statistics; the parts are uneven under a mask."""
    model = _without_dropout("lenet5" if weighted else "resnet14_small")
    trained = HEAD if weighted else LAST
    how = {"class_weights": (0.5, 2.0, 1.0, 3.5) if weighted else None, "label_smoothing": 0.1}
    how["teacher"] = Teacher(lambda x: jnp.mean(x, (1, 2))[:, :1] / 64 - jnp.arange(4), 0.5, 2.0)
    if weighted:
        batch = {**batch, "mask": jnp.arange(8) < 5}
    step, state = _plain_step(model, trained, **how)
    whole, loss = jax.jit(step)(state, batch)
    step, state = _plain_step(model, trained, micro_batch=2, **how)
    parts, loss_of_parts = jax.jit(step)(state, batch)
    np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: a - b, whole.params, state.params)
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-3
    _assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_every_part_moves_the_running_statistics(batch):
    """Part by part, in order: what batches of that size would do, less the update."""
    model = _without_dropout()
    step, state = _plain_step(model, HEAD, micro_batch=4, batch_stats_in=LAST)
    after, _ = jax.jit(step)(state, batch)
    step, _ = _plain_step(model, HEAD, batch_stats_in=LAST)
    one_by_one = state
    for part in (slice(0, None, 2), slice(1, None, 2)):
        moved, _ = jax.jit(step)(one_by_one, jax.tree.map(lambda x: x[part], batch))  # noqa: B023
        one_by_one = dataclasses.replace(state, batch_stats=moved.batch_stats)
    _assert_close(after.batch_stats, one_by_one.batch_stats, rtol=1e-4, atol=1e-6)


def test_what_only_fills_a_batch_up_leaves_no_trace(batch):
    model = _without_dropout()
    step, state = _plain_step(model, batch_stats_in=LAST)
    five = jax.tree.map(lambda x: x[:5], batch)
    want, loss = jax.jit(step)(state, five)
    got, loss_of_filled = jax.jit(step)(state, {**batch, "mask": jnp.arange(8) < 5})
    np.testing.assert_allclose(loss_of_filled, loss, rtol=1e-5)
    assert float(got.sums["count"]) == 5
    _assert_close(got.batch_stats, want.batch_stats, rtol=1e-4, atol=1e-6)
    _assert_close(got.params, want.params, rtol=1e-3, atol=1e-5)


def test_moving_averages_follow_tensorflow_s_rule(batch):
    """Judged in float64 from the parameters of every step."""
    model = _without_dropout()
    _, params, batch_stats = model
    tx = optax.sgd(lambda _: 0.1)  # of a schedule, for updates are counted
    how = StepConfig(preprocessing="unit", batch_stats_in=LAST, ema_decay=0.25)
    step = jax.jit(make_train_step(model[0], tx, how))
    state = create_state(params, batch_stats, LAST, tx, seed=0, average=True)
    trained = {name: params[name] for name in state.params}
    want = jax.tree.map(lambda x: np.asarray(x, np.float64), (trained, batch_stats))
    for t in (1, 2, 3):
        state, _ = step(state, batch)
        decay = min(0.25, (1 + t) / (10 + t))
        now = (state.params, state.batch_stats)
        want = jax.tree.map(lambda a, x: decay * a + (1 - decay) * np.float64(x), want, now)  # noqa: B023
    got_params, got_stats = state.for_evaluation()
    assert set(got_params) == set(params)
    _assert_close({k: got_params[k] for k in trained}, want[0], rtol=1e-5, atol=1e-7)
    _assert_close(got_stats, want[1], rtol=1e-5, atol=1e-7)
    assert np.any(
        got_params["conv5"]["block1"]["unit1"]["conv"]["kernel"]
        != state.params["conv5"]["block1"]["unit1"]["conv"]["kernel"]
    )


def test_swa_evaluates_the_plain_mean_of_the_weights(batch):
    """Judged in float64: the weights themselves at first, then their mean."""
    model = _without_dropout()
    tx = optax.sgd(lambda _: 0.1)  # of a schedule, for updates are counted
    how = StepConfig(preprocessing="unit", batch_stats_in=LAST, swa_after=2)
    step = jax.jit(make_train_step(model[0], tx, how))
    state = create_state(*model[1:], LAST, tx, seed=0, average=True)
    seen = []
    for t in range(1, 6):
        state, _ = step(state, batch)
        seen.append(jax.tree.map(np.float64, (state.params, state.batch_stats)))
        params, stats = state.for_evaluation()
        got = ({k: params[k] for k in state.params}, stats)
        want = jax.tree.map(lambda *x: np.mean(x, 0), *(seen[2:] or seen[-1:]))
        for a, b in zip(got, want, strict=True):
            _assert_close(a, b, rtol=1e-5, atol=1e-7)
        if t == 2:
            _assert_close(params, {**params, **state.params}, rtol=0, atol=0)
    kernels = [p["conv5"]["block1"]["unit1"]["conv"]["kernel"] for p, _ in seen[2:]]
    assert np.ptp(kernels, 0).max() > 1e-4  # there was something to average


def test_the_first_weights_share_in_what_is_evaluated(batch):
    """Judged in float64: of the mean after two steps, and of what was there before them."""
    model = _without_dropout()
    tx = optax.sgd(lambda _: 0.1)  # of a schedule, for updates are counted
    how = StepConfig(preprocessing="unit", batch_stats_in=LAST, swa_after=2)
    step = jax.jit(make_train_step(model[0], tx, how))
    state = create_state(*model[1:], LAST, tx, seed=0, average=True, start_share=0.3)
    seen = []
    for _ in range(4):
        state, _ = step(state, batch)
        seen.append(jax.tree.map(np.float64, state.params))
    want = jax.tree.map(
        lambda first, *x: 0.3 * np.float64(first) + 0.7 * np.mean(x, 0),
        {name: model[1][name] for name in state.params},
        *seen[2:],
    )
    got, _ = state.for_evaluation()
    _assert_close({name: got[name] for name in want}, want, rtol=1e-5, atol=1e-7)
    kernel, before = (p["conv5"]["block1"]["unit1"]["conv"]["kernel"] for p in (got, model[1]))
    assert np.abs(kernel - before).max() > 1e-3


@pytest.mark.parametrize(
    ("network", "trained"),
    [("lenet5", HEAD), pytest.param("resnet14_small", LAST, marks=pytest.mark.slow)],
)
def test_steps_on_the_device_are_the_same_steps(batch, network, trained):
    in_training = trained if network == "resnet14_small" else frozenset()
    step, state = _plain_step(_without_dropout(network), trained, batch_stats_in=in_training)
    grey = batch["image"][..., :1]
    indices = np.array([[0, 3, 5, 6], [7, 1, 2, 4], [9, 9, 9, 9]], np.int32)  # the last unused
    want = state
    for row in indices[:2]:
        images = np.repeat(np.asarray(grey)[row], 3, axis=-1)
        want, loss = jax.jit(step)(want, {"image": images, "label": batch["label"][row]})
    data = {"image": grey, "label": batch["label"]}
    got, last = jax.jit(make_steps_on_device(step))(state, data, indices, 2)
    assert int(got.step) == 2
    np.testing.assert_allclose(last, loss, rtol=1e-4)
    _assert_close(got.params, want.params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [pytest.param("micro", marks=pytest.mark.slow), "masked"])
def test_rematerialised_blocks_give_the_same_step(batch, how):
    config = base.get_config().model
    config.name, config.hidden_units, config.dropout = "resnet14_small", 8, 0.0
    kept = create_model(config, 4, seed=0)
    config.remat = "block"
    again = create_model(config, 4, seed=0)
    settings = {"batch_stats_in": LAST, "micro_batch": 4 if how == "micro" else 0}
    if how == "masked":
        batch = {**batch, "mask": jnp.arange(8) < 5}
    results = []
    for model in (kept, again):
        step, state = _plain_step(model, **settings)
        results.append(jax.jit(step)(state, batch)[0])
        recomputed = "remat" in str(jax.make_jaxpr(step)(state, batch))
        assert recomputed == (model is again)
    _assert_close(results[1].params, results[0].params, rtol=1e-4, atol=1e-6)
    _assert_close(results[1].batch_stats, results[0].batch_stats, rtol=1e-5, atol=1e-6)


def test_a_mirrored_evaluation_is_the_mean_of_both(tiny_config, tmp_path):
    config = tiny_config.model
    graphdef, params, stats = create_model(config, 4, 0)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    plain = make_eval_step(graphdef, "unit")
    mirrored = make_eval_step(graphdef, "unit", mirror=True)
    a, b = plain(params, stats, images), plain(params, stats, images[:, :, ::-1])
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_allclose(mirrored(params, stats, images), (a + b) / 2, atol=1e-6)


@pytest.mark.parametrize("mirror", [False, True])
def test_an_evaluation_at_other_proportions_is_the_mean_of_them(tiny_config, mirror):
    """Judged by the kernel of Keys (1981) as he writes it, at every distance."""
    graphdef, params, stats = create_model(tiny_config.model, 4, 0)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    plain = make_eval_step(graphdef, "unit")
    views = [np.float32(images)]
    for stretch in (np.exp(0.2), np.exp(-0.2)):
        view = np.pad(views[0].astype(np.float64), ((0, 0), (9, 9), (9, 9), (0, 0)), mode="edge")
        for axis, zoom in ((1, stretch), (2, 1 / stretch)):
            at = (np.arange(32) - 15.5) / zoom + 15.5
            weights = keys_cubic.kernel(at, -9, 40)
            view = np.moveaxis(np.tensordot(weights, view, (1, axis)), 0, axis)
        views.append(np.float32(np.clip(view, 0, 255)))
    views += [x[:, :, ::-1] for x in views] if mirror else []
    want = np.stack([plain(params, stats, x) for x in views])
    assert np.ptp(want, 0).max() > 1e-3
    got = make_eval_step(graphdef, "unit", mirror=mirror, aspect=0.2)(params, stats, images)
    np.testing.assert_allclose(got, want.mean(0), atol=1e-5)
