"""Numbers that are not finite: the step that leaves them out, the run that stops at them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from covid_flax import feed as feed_lib
from covid_flax import step as step_lib
from covid_flax.checkpoint import Checkpoints
from covid_flax.errors import UserError
from covid_flax.numerics import all_finite, divergence
from covid_flax.run import setup
from covid_flax.step import (
    StepConfig,
    Teacher,
    create_state,
    distillation_loss,
    make_train_step,
    zero_skipped,
)
from covid_flax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


class Root(nnx.Module):
    """Logits whose gradient is not finite where an image is black, though the loss is."""

    def __init__(self):
        values = np.random.default_rng(0).uniform(0.5, 1.0, (3, 4))
        self.head = nnx.Dict(kernel=nnx.Param(jnp.asarray(values, jnp.float32)))

    def __call__(self, x, **kwargs):
        return jnp.sqrt(x.mean((1, 2)) @ self.head["kernel"][...])


TX = optax.adam(0.1)
GOOD, BLACK, NAN = 200.0, 0.0, np.nan


def _step_and_state(**config):
    graphdef, params, stats = nnx.split(Root(), nnx.Param, nnx.BatchStat)
    config = StepConfig("unit", skip_non_finite=True, **config)
    step = make_train_step(graphdef, TX, config)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    average = bool(config.ema_decay or config.swa_after)
    state = create_state(params, stats, frozenset({"head"}), TX, 0, average=average)
    return step, dataclasses.replace(state, sums={**state.sums, **zero_skipped()})


def _batch(grey, size=4):
    """Two kinds of images, the last one of this grey."""
    images = np.random.default_rng(1).uniform(50, 255, (size, 2, 2, 3)).astype(np.float32)
    images[-1] = grey
    return {"image": jnp.asarray(images), "label": jnp.arange(size) % 4}


def _same(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert np.array_equal(x, y), jax.tree_util.keystr(path)


@pytest.mark.parametrize("grey", [BLACK, NAN])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_skipped_update_changes_nothing_but_its_counts(grey, micro_batch):
    step, start = _step_and_state(micro_batch=micro_batch, ema_decay=0.9)
    step = jax.jit(step)
    before, loss = step(start, _batch(GOOD))
    assert np.isfinite(loss) and int(before.sums["skipped"]) == 0
    after, loss = step(before, _batch(grey))
    assert np.isfinite(loss) == (grey == BLACK)  # a bad gradient does not show in the loss
    assert int(after.step) == int(before.step) + 1
    assert [int(after.sums[name]) for name in zero_skipped()] == [1, 1]
    counts = ("skipped", "skipped_in_a_row")
    _same(
        dataclasses.replace(after, step=before.step, sums={}),
        dataclasses.replace(before, sums={}),
    )
    for name in before.sums.keys() - set(counts):
        assert float(after.sums[name]) == float(before.sums[name])
    # And goes on as though the batch had not been.
    again, _ = step(after, _batch(GOOD))
    straight, _ = step(dataclasses.replace(before, step=after.step), _batch(GOOD))
    _same(again.params, straight.params)
    assert [int(again.sums[name]) for name in counts] == [1, 0]
    assert float(again.sums["count"]) == 8


def test_a_mean_of_weights_counts_no_skipped_update():
    step, state = _step_and_state(swa_after=1)
    step, weights = jax.jit(step), []
    for grey in (GOOD, NAN, GOOD, NAN, NAN, GOOD):
        state, _ = step(state, _batch(grey))
        weights.append(np.asarray(state.params["head"]["kernel"], np.float64))
    mean = (weights[2] + weights[5]) / 2  # after the second and the third update
    np.testing.assert_allclose(state.average["params"]["head"]["kernel"], mean, rtol=1e-6)
    assert np.abs(weights[5] - weights[2]).max() > 1e-2


def test_without_a_bad_batch_skipping_is_the_plain_update():
    step, state = _step_and_state()
    got, _ = jax.jit(step)(state, _batch(GOOD))
    graphdef = nnx.split(Root(), nnx.Param, nnx.BatchStat)[0]
    plain = create_state(state.params, {}, frozenset({"head"}), TX, 0)
    want, _ = jax.jit(make_train_step(graphdef, TX, StepConfig("unit")))(plain, _batch(GOOD))
    np.testing.assert_allclose(
        got.params["head"]["kernel"], want.params["head"]["kernel"], rtol=1e-6
    )
    assert want.sums.keys() == {"loss", "correct", "count"}


def test_every_device_skips_what_one_finds():
    """Mapped as pmap maps it; the batch of one of the two devices is bad."""
    step, state = _step_and_state(axis_name="data")
    parts = [_batch(GOOD), _batch(BLACK)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    mapped = jax.jit(jax.vmap(step, axis_name="data", in_axes=(None, 0)))
    after, _ = mapped(state, batch)
    for device in range(2):
        _same(jax.tree.map(lambda x: x[device], after.params), state.params)  # noqa: B023
    assert after.sums["skipped"].tolist() == [1, 1]


def test_all_finite_sees_every_array_and_counts_no_integers():
    tree = {"a": jnp.ones(3), "b": (jnp.ones((), jnp.bfloat16), jnp.array([2**31 - 1]))}
    assert all_finite(tree)
    for bad in (np.nan, np.inf, -np.inf):
        assert not all_finite({**tree, "c": jnp.array([1.0, bad])})
        assert not all_finite({**tree, "c": jnp.array(bad, jnp.bfloat16)})


# ---- the loop: 60 images, batches of 15, 4 steps an epoch ----------------------------------------


def _train_lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


@pytest.fixture
def one_bad_image(tiny_config, phantom_dir, tmp_path, monkeypatch):
    """Black, and of the training images; as a preprocessing without care would, NaN."""
    data = tmp_path / "images"
    shutil.copytree(phantom_dir, data)
    tiny_config.data.dir = str(data)
    rows = setup(tiny_config, tmp_path / "look").data.rows
    file = data / next(row.file for row in rows if row.split == "train")
    Image.fromarray(np.zeros_like(Image.open(file))).save(file)
    real = step_lib.preprocess

    def preprocess(images, mode):
        brightest = jnp.max(jnp.asarray(images, jnp.float32), (1, 2, 3), keepdims=True)
        return real(images, mode) * (brightest / brightest)

    monkeypatch.setattr(step_lib, "preprocess", preprocess)
    tiny_config.train.checkpoint_every_steps = 3
    return tiny_config


def test_a_bad_image_stops_the_run_which_may_go_on_skipping_it(one_bad_image, tmp_path, capsys):
    config, workdir = one_bad_image, tmp_path / "run"
    with pytest.raises(UserError, match=r"loss .*between steps.*learning_rate") as stopped:
        train(setup(config, workdir))
    with Checkpoints(workdir / "checkpoints") as c:
        last = c.latest_step
    assert (f"step {last:,} in {workdir}" if last else "no checkpoint yet") in str(stopped.value)
    config.train.on_non_finite = "skip"
    train(setup(config, workdir))
    lines = _train_lines(workdir)
    assert [line["skipped"] for line in lines] == [1, 1, 1]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "1 update skipped" in capsys.readouterr().out
    config.train.on_non_finite = "stop"  # a finished run is a run like any other
    train(setup(config, workdir))
    # The same from the beginning, with a row of figures before each of its checkpoints.
    config.train.on_non_finite, config.train.log_every_steps = "skip", 1
    train(setup(config, tmp_path / "straight"))
    straight = _train_lines(tmp_path / "straight")
    for a, b in zip(lines, straight, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_nothing_but_bad_batches_stops_a_run_that_skips(tiny_config, tmp_path, monkeypatch):
    real = step_lib.preprocess
    monkeypatch.setattr(step_lib, "preprocess", lambda x, mode: real(x, mode) * jnp.nan)
    tiny_config.train.on_non_finite = "skip"
    with pytest.raises(UserError, match="4 updates in a row were skipped.*between steps 1 and 4"):
        train(setup(tiny_config, tmp_path / "run"))
    with Checkpoints(tmp_path / "run" / "checkpoints") as c:
        assert c.steps == []


@pytest.mark.parametrize("logged", [20, 2])
def test_a_bad_gradient_is_never_saved(logged, tiny_config, tmp_path, monkeypatch):
    """At step 6, whose loss is fine; a checkpoint is due, console lines before it or not."""
    real = feed_lib.make_train_step

    def make_train_step(graphdef, tx, config):
        def update(grads, state, params):
            count = state[0].step
            bad = jnp.where(count == 5, jnp.nan, 0.0)
            return tx.update(jax.tree.map(lambda g: g + bad, grads), state, params)

        return real(graphdef, optax.GradientTransformation(tx.init, update), config)

    monkeypatch.setattr(feed_lib, "make_train_step", make_train_step)
    tiny_config.train.checkpoint_every_steps = 6
    tiny_config.train.log_every_steps = logged
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"between steps 5 and 6.*step 4 in .*learning_rate"):
        train(setup(tiny_config, workdir))
    with Checkpoints(workdir / "checkpoints") as c:
        assert c.steps == [4]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(c._orbax.load(4)))


def test_a_distilled_run_s_chance_is_its_own_loss_of_equal_answers():
    assert "twice the best epoch's 0.5" in divergence([1.9, 0.5, 2.0], 1.386)
    how = StepConfig("unit", teacher=Teacher(lambda x: x, 0.7, 2.0))
    soft = distillation_loss(np.zeros((1, 4)), np.array([[3.0, 1, 0, 0]]), 2.0)[0]
    assert how.chance_loss(4) == pytest.approx(0.3 * np.log(4) + 0.7 * float(soft), rel=1e-5)


def test_the_note_of_a_diverging_run():
    assert divergence([1.4], 1.386) is None
    assert divergence([1.4, 1.1, 0.2, 0.9], 1.386) is None  # up, but better than chance
    assert divergence([1.4, 1.1, 1.5], 1.386) is None  # noise about chance
    assert divergence([40.0], 1.386) is None  # the first epoch may begin anywhere
    assert "diverges" in divergence([1.4, 1.1, 5.0], 1.386)
    assert "diverges" in divergence([2240.0, 1360.0], 1.386)  # falling, from nowhere
