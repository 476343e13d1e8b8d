"""The loop as a whole: it learns, stops, resumes bit for bit, refuses another run's folder."""

import csv
import dataclasses
import errno
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_resnet import with_batch_norm

from covid_flax import feed as feed_lib
from covid_flax import preemption
from covid_flax.checkpoint import Checkpoints
from covid_flax.data import dataset
from covid_flax.data.folder import open_folder
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.dry_run import dry_run
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.feed import make_feed
from covid_flax.job import make_job
from covid_flax.models import MODELS, create_model
from covid_flax.pretrained.names import keras_name
from covid_flax.report import plots
from covid_flax.report.artefacts import read_artefacts
from covid_flax.report.log import RunLog
from covid_flax.report.statements import _best_epoch
from covid_flax.run import _appears, _refuse_other_split, setup
from covid_flax.run_folder import only_trainer, read_run
from covid_flax.train import _start, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)  # a clock's
    return lines


def _final(workdir):
    """Arrays and loop state of the latest checkpoint, less the clocks."""
    with Checkpoints(workdir / "checkpoints") as c:
        step, best = c.latest_step, c.best_step
        tree = c._orbax.load(step)
        loop = dict(c._orbax.metadata(step).custom_metadata["loop"])
    for clock in ("elapsed", "epoch_seconds", "epoch_examples", "metrics_bytes"):
        loop.pop(clock)
    return step, best, tree, loop


def _assert_same_run(a, b):
    assert _lines(a) == _lines(b)
    (step, best, tree, loop), (step_b, best_b, tree_b, loop_b) = _final(a), _final(b)
    assert (step, best, loop) == (step_b, best_b, loop_b)
    leaves, leaves_b = jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(tree_b)
    assert len(leaves) == len(leaves_b) > 20
    for (path, x), y in zip(leaves, leaves_b, strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y)), jax.tree_util.keystr(path)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def _train_killed_at(config, workdir, step, monkeypatch):
    """Trains until `step` updates are made, then dies as by a kill."""
    real = feed_lib.train_iterator

    class Dying:
        def __init__(self, *args, **kwargs):
            self.batches, self.made = real(*args, **kwargs), 0

        def __next__(self):
            if self.made == step:
                raise Killed
            self.made += 1
            return next(self.batches)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    monkeypatch.setattr(feed_lib, "train_iterator", Dying)
    with pytest.raises(Killed):
        train(setup(config, workdir))
    monkeypatch.undo()


def _train_killed_at_save(config, workdir, step, monkeypatch):
    """The same, amid the save of that step."""
    real = Checkpoints.save

    def save(self, at, *args, **kwargs):
        if at == step:
            raise Killed
        real(self, at, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Killed):
        train(setup(config, workdir))
    monkeypatch.undo()


@pytest.fixture(scope="module")
def straight(request, tmp_path_factory):
    """A run that nothing disturbed: 60 images, batches of 16, 4 steps an epoch, 3 epochs."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    made = []

    def run(config):
        if not made:
            train(setup(config, workdir))
            made.append(workdir)
        return workdir

    return run


@pytest.fixture
def resumable(tiny_config):
    with_batch_norm(tiny_config)
    tiny_config.train.batch_size = 16
    tiny_config.train.checkpoint_every_steps = 3
    tiny_config.augment.flip = True
    tiny_config.train.swa_start = 1  # a mean goes on too
    tiny_config.optimizer.warmup_epochs = 2.0
    return tiny_config


# Checkpoints fall on steps 3, 4 (epoch), 6, 8 (epoch), 9, 12 (epoch).
@pytest.mark.slow  # the kill between metrics and checkpoint, below, goes on from step 6 too
@pytest.mark.parametrize("kill", [3, 7])
def test_killed_and_resumed_equals_undisturbed(kill, resumable, straight, tmp_path, monkeypatch):
    whole = straight(resumable)
    workdir = tmp_path / "run"
    _train_killed_at(resumable, workdir, kill, monkeypatch)
    assert _lines(workdir) != _lines(whole)
    train(setup(resumable, workdir))
    _assert_same_run(workdir, whole)


def _preempt(monkeypatch, at_batch):
    """SIGTERM comes when the training iterator is asked for that batch, counted from 1."""
    real = feed_lib.train_iterator

    class Preempted:
        def __init__(self, *args, **kwargs):
            self.batches, self.made = real(*args, **kwargs), 0

        def __next__(self):
            self.made += 1
            if self.made == at_batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.batches)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    monkeypatch.setattr(feed_lib, "train_iterator", Preempted)


# Amid an epoch, at an epoch's last step, and amid one that is over before anything is looked at.
@pytest.mark.parametrize(
    ("made", "log_every", "saved"),
    [
        pytest.param(2, 1, 2, marks=pytest.mark.slow),
        pytest.param(8, 1, 8, marks=pytest.mark.slow),
        (7, 20, 8),
    ],
)
def test_sigterm_saves_and_the_run_goes_on(
    made, log_every, saved, resumable, straight, tmp_path, monkeypatch
):
    whole = straight(resumable)
    workdir = tmp_path / "run"
    resumable.train.log_every_steps = log_every
    monkeypatch.setattr(preemption, "LOOK_EVERY_S", 1e6)  # fast, however slow this machine is
    _preempt(monkeypatch, at_batch=made)
    with pytest.raises(preemption.Terminated, match="saved step"):
        train(setup(resumable, workdir))
    monkeypatch.undo()
    with Checkpoints(workdir / "checkpoints") as c:
        assert c.latest_step == saved
    train(setup(resumable, workdir))
    _assert_same_run(workdir, whole)


def test_a_kill_between_metrics_and_checkpoint_leaves_no_double_line(
    resumable, straight, tmp_path, monkeypatch
):
    whole = straight(resumable)
    workdir = tmp_path / "run"
    # The end of epoch 2, its lines are written.
    _train_killed_at_save(resumable, workdir, 8, monkeypatch)
    assert _lines(workdir) == _lines(whole)[:4]
    train(setup(resumable, workdir))
    _assert_same_run(workdir, whole)


def _damage(step_folder):
    files = [p for p in step_folder.rglob("d/*") if p.is_file()]
    data = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(bytes(content))


def test_the_best_from_there_on_takes_the_place_of_a_damaged_one(
    tiny_config, tmp_path, monkeypatch, capsys
):
    """4 steps an epoch; nothing would ever be better than the first."""
    workdir = tmp_path / "run"
    tiny_config.train.epochs, tiny_config.train.min_delta = 3, 100.0
    _train_killed_at_save(tiny_config, workdir, 12, monkeypatch)
    _damage(workdir / "checkpoints/4")
    about = json.loads((workdir / "config.json").read_text())
    about["versions"]["grain"] = "0.0.1"
    (workdir / "config.json").write_text(json.dumps(about))
    train(setup(tiny_config, workdir))
    told = capsys.readouterr().out
    assert "note: the best epoch so far, 1, is lost" in told
    assert "note: the run began under Grain 0.0.1, this is " in told
    with Checkpoints(workdir / "checkpoints") as c:
        assert c.best_step == 12
    assert evaluate(workdir)["checkpoint"] == {"which": "best", "step": 12}


@pytest.mark.slow
def test_a_damaged_latest_checkpoint_costs_time_alone(
    resumable, straight, tmp_path, monkeypatch, capsys
):
    whole = straight(resumable)
    workdir = tmp_path / "run"
    _train_killed_at(resumable, workdir, 7, monkeypatch)
    _damage(workdir / "checkpoints/6")
    train(setup(resumable, workdir))
    told = capsys.readouterr().out
    assert "checkpoints/6 is damaged" in told and "resume: from step 4" in told
    assert (workdir / "checkpoints_damaged/6").is_dir()
    _assert_same_run(workdir, whole)


def test_a_complete_run_is_left_as_it_is(resumable, straight):
    workdir = straight(resumable)
    before = (workdir / "metrics.jsonl").read_bytes()
    train(setup(resumable, workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_metrics_lines_and_files_are_the_contract_s(resumable, straight):
    workdir = straight(resumable)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(x["epoch"], x["split"]) for x in lines] == [
        (e, s) for e in (1, 2, 3) for s in ("train", "val")
    ]
    assert [x["step"] for x in lines if x["split"] == "val"] == [4, 8, 12]
    for line in lines:
        assert {"step", "epoch", "split", "loss", "accuracy"} <= set(line)
        if line["split"] == "train":
            assert {"learning_rate", "images_per_second"} <= set(line)
    # Of an epoch's last update, from zero in eight steps.
    rates = [line["learning_rate"] for line in lines if line["split"] == "train"]
    assert rates == pytest.approx([3e-3 * share for share in (3 / 8, 7 / 8, 1)])
    assert (workdir / "curves.png").exists()
    assert list((workdir / "tensorboard").glob("events*"))
    about = json.loads((workdir / "config.json").read_text())
    assert {"config", "versions", "seed", "devices", "class_names"} <= set(about)
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        assert about["versions"][package] == importlib.metadata.version(package)
    assert about["devices"] == [d.device_kind for d in jax.devices()]
    with open(workdir / "split.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 80
    assert sum(r["split"] == "val" for r in rows) == 20


def test_logged_validation_equals_evaluation_of_that_checkpoint(resumable, straight, tmp_path):
    """The loop's figures and the eval binary's are of the same images and weights."""
    workdir = straight(resumable)
    last = _lines(workdir)[-1]
    report = evaluate(workdir, checkpoint="latest", output=tmp_path / "out")
    assert report["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert report["accuracy"] == pytest.approx(last["accuracy"], rel=1e-12)


def test_training_stops_early_and_keeps_the_best(tiny_config, tmp_path):
    tiny_config.optimizer.learning_rate = 0.0  # nothing improves after the first epoch
    tiny_config.model.batch_norm = "frozen"
    tiny_config.train.epochs = 9
    tiny_config.train.patience = 2
    train(setup(tiny_config, tmp_path / "run"))
    assert [x["epoch"] for x in _lines(tmp_path / "run")][-1] == 3
    with Checkpoints(tmp_path / "run" / "checkpoints") as c:
        assert (c.best_step, c.latest_step) == (4, 12)


@pytest.mark.parametrize("trainable", ["conv2"])
def test_cached_frozen_stages_change_no_result(trainable, tiny_config, tmp_path, capsys):
    tiny_config.model.trainable = trainable
    tiny_config.train.epochs = 2
    tiny_config.train.feature_cache_gb = tiny_config.train.feature_disk_gb = 1.0
    train(setup(tiny_config, tmp_path / "cached"))
    assert "GB in memory" in capsys.readouterr().out
    tiny_config.train.feature_cache_gb = 0.0
    train(setup(tiny_config, tmp_path / "on disk"))
    assert "GB on disk" in capsys.readouterr().out
    for a, b in zip(_lines(tmp_path / "cached"), _lines(tmp_path / "on disk"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    tiny_config.train.feature_disk_gb = 0.0
    train(setup(tiny_config, tmp_path / "plain"))
    assert "computed anew every epoch" in capsys.readouterr().out
    for a, b in zip(_lines(tmp_path / "cached"), _lines(tmp_path / "plain"), strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_images_on_the_device_change_no_result(tiny_config, tmp_path):
    """Many steps a dispatch, gathered on the device; and a run may go on the other way."""
    tiny_config.train.epochs, tiny_config.train.batch_size = 2, 16
    tiny_config.optimizer.epsilon = 1.0  # small updates: rounding stays rounding
    tiny_config.optimizer.learning_rate = 0.01
    train(setup(tiny_config, tmp_path / "host"))
    tiny_config.data.on_device = "always"
    tiny_config.train.log_every_steps = 3  # dispatches of 3 steps, and the short last batch
    tiny_config.train.checkpoint_every_steps = 2
    train(setup(tiny_config, tmp_path / "device"))
    lines, lines_device = _lines(tmp_path / "host"), _lines(tmp_path / "device")
    for a, b, tolerance in zip(lines, lines_device, (1e-4, 1e-4, 1e-2, 1e-2), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    a, b = (_final(tmp_path / name)[3]["iterator"] for name in ("host", "device"))
    assert a == b


@pytest.mark.slow
def test_how_many_steps_a_dispatch_makes_changes_no_bit(tiny_config, tmp_path):
    tiny_config.train.epochs, tiny_config.train.batch_size = 2, 16
    tiny_config.data.on_device = "always"
    for steps in (1, 3):
        tiny_config.train.log_every_steps = steps
        train(setup(tiny_config, tmp_path / str(steps)))
    _assert_same_run(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("layout", [{"parallel": "pmap"}, {"shard_state": True}])
def test_on_one_device_every_layout_gives_the_same_run(tiny_config, tmp_path, layout):
    """test_mesh.py has several devices."""
    tiny_config.model.dropout, tiny_config.train.epochs = 0.0, 1
    tiny_config.optimizer.epsilon, tiny_config.optimizer.learning_rate = 1.0, 0.01
    train(setup(tiny_config, tmp_path / "jit"))
    tiny_config.train.update(layout)
    train(setup(tiny_config, tmp_path / "other"))
    for a, b in zip(_lines(tmp_path / "jit"), _lines(tmp_path / "other"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value"), [pytest.param("ema_decay", 0.5, marks=pytest.mark.slow), ("swa_start", 1)]
)
def test_averaged_weights_are_what_is_evaluated(tiny_config, tmp_path, key, value):
    tiny_config.model.trainable = "head"
    tiny_config.train.feature_cache_gb = 1.0
    tiny_config.train[key] = value
    tiny_config.train.epochs = 2
    tiny_config.train.last_batch = "drop"
    train(setup(tiny_config, tmp_path / "run"))
    report = evaluate(tmp_path / "run", checkpoint="latest")
    assert report["loss"] == pytest.approx(_lines(tmp_path / "run")[-1]["loss"], rel=1e-6)
    tiny_config.train[key] = 0
    train(setup(tiny_config, tmp_path / "plain"))
    *lines, val_line = _lines(tmp_path / "plain")
    for line in (line for line in lines if line["split"] == "train"):
        assert line in _lines(tmp_path / "run")  # training itself is the same
    assert abs(val_line["loss"] - report["loss"]) > 1e-5  # rounding would be 1e-7


def test_a_trace_of_chosen_steps_is_written(tiny_config, tmp_path, capsys):
    tiny_config.train.epochs = 1
    tiny_config.model.trainable = "head"
    tiny_config.data.on_device = "never"
    train(setup(tiny_config, tmp_path / "run"), profile=(2, 3))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert "steps 2 to 3 traced" in capsys.readouterr().out
    tiny_config.train.epochs = 2
    train(setup(tiny_config, tmp_path / "more"), profile=(100, 103))
    assert not (tmp_path / "more" / "profile").exists()
    assert "note: steps 100 to 103 were not made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"), [("micro_batch", 5), ("parallel", "pmap"), ("batch_size", 1000)]
)
def test_settings_that_do_not_go_together_are_named(key, value, tiny_config, tmp_path):
    tiny_config.train.shard_state, tiny_config.train.batch_size = True, 16
    tiny_config.train.last_batch = "drop"
    tiny_config.train[key] = value
    with pytest.raises(UserError, match=key):
        train(setup(tiny_config, tmp_path / "run"))


def _with_weights(config, file):
    """Sets a network with batch norm, whose arrays have Keras names, and writes it weights."""
    with_batch_norm(config)
    _, params, batch_stats = create_model(config.model, 4, seed=99)
    arrays = {}
    for tree in (params, batch_stats):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[keras_name(tuple(k.key for k in path))] = np.asarray(leaf)
    np.savez(file, **arrays)
    config.model.weights = str(file)


def test_weights_that_expect_other_pixels_are_spoken_of(tiny_config, tmp_path, capsys):
    _with_weights(tiny_config, tmp_path / "weights.npz")
    expects = MODELS[tiny_config.model.name].preprocessing
    tiny_config.model.preprocessing = "unit" if expects != "unit" else "tf"
    setup(tiny_config, tmp_path / "one")
    said = capsys.readouterr().out
    assert f"note: these weights expect {expects!r} preprocessing and get" in said
    assert "frozen batch norm" not in said
    tiny_config.model.trainable = "head"
    setup(tiny_config, tmp_path / "two")
    assert "frozen batch norm never makes up for it" in capsys.readouterr().out
    tiny_config.model.preprocessing = ""
    setup(tiny_config, tmp_path / "three")
    assert "note: these weights" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_first_changes_nothing(tiny_config, tmp_path):
    """The weights are loaded again, not left at random: there is no checkpoint yet."""
    _with_weights(tiny_config, tmp_path / "weights.npz")
    tiny_config.train.epochs = 1
    train(setup(tiny_config, tmp_path / "plain"))
    setup(tiny_config, tmp_path / "after")
    train(setup(tiny_config, tmp_path / "after"))
    _assert_same_run(tmp_path / "plain", tmp_path / "after")
    tiny_config.model.weights = "none"
    train(setup(tiny_config, tmp_path / "random"))
    assert _lines(tmp_path / "random") != _lines(tmp_path / "plain")


def test_without_a_checkpoint_a_folder_can_be_set_up_anew(tiny_config, tmp_path):
    tiny_config.train.batch_size = 1000
    tiny_config.train.last_batch = "drop"
    with pytest.raises(UserError, match="batch_size"):
        train(setup(tiny_config, tmp_path / "run"))
    tiny_config.train.batch_size = 16
    run = setup(tiny_config, tmp_path / "run")
    assert not run.resumed
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["train"]["batch_size"] == 16
    for key, value in (("micro_batch", 7), ("batch_size", 1000)):  # nothing is written over
        other = tiny_config.copy_and_resolve_references()
        other.train[key] = value
        with pytest.raises(UserError, match=key):
            setup(other, tmp_path / "run")
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == saved


def test_figures_whose_checkpoints_are_gone_are_not_written_over(tiny_config, tmp_path):
    workdir = tmp_path / "run"
    setup(tiny_config, workdir)
    (workdir / "metrics.jsonl").write_text('{"step": 4, "split": "val", "epoch": 1}\n')
    before = {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
    other = tiny_config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was"):
        setup(other, workdir)
    assert before == {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
    assert not setup(tiny_config, workdir).resumed


def test_a_second_trainer_is_refused(resumable, straight):
    workdir = straight(resumable)
    with only_trainer(workdir), pytest.raises(UserError, match="another process"):
        train(setup(resumable, workdir))


def test_a_run_in_training_keeps_its_files(tiny_config, tmp_path):
    """Its first checkpoint may be tens of minutes away."""
    workdir = tmp_path / "run"
    run = setup(tiny_config, workdir)
    before = {name: (workdir / name).read_bytes() for name in ("config.json", "split.csv")}
    other = tiny_config.copy_and_resolve_references()
    other.optimizer.learning_rate, other.data.split_seed = 0.5, 9
    with only_trainer(workdir), pytest.raises(UserError, match="another process"):
        setup(other, workdir)
    assert before == {name: (workdir / name).read_bytes() for name in before}
    setup(other, workdir)  # between the first one's set-up and its training
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 0\.5"):
        train(run)


def test_what_another_command_set_up_meanwhile_is_not_trained(tiny_config, phantom_dir, tmp_path):
    """What a configuration leaves free must be what it was too: where the images lie."""
    tiny_config.data.dir = str(phantom_dir)
    run = setup(tiny_config, tmp_path / "run")
    shutil.copytree(phantom_dir, tmp_path / "other")
    tiny_config.data.dir = str(tmp_path / "other")
    setup(tiny_config, tmp_path / "run")
    with pytest.raises(UserError, match="set up by another command meanwhile"):
        train(run)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_that_came_while_images_were_read_is_kept(tiny_config, tmp_path, monkeypatch):
    tiny_config.train.epochs = 1
    workdir, load = tmp_path / "run", dataset.load_dataset

    def load_slowly(*args):
        monkeypatch.setattr(dataset, "load_dataset", load)
        train(setup(tiny_config, workdir))
        return load(*args)

    monkeypatch.setattr(dataset, "load_dataset", load_slowly)
    other = tiny_config.copy_and_resolve_references()
    other.data.split_seed = 9
    with pytest.raises(UserError, match="another run's meanwhile"):
        setup(other, workdir)
    assert read_run(workdir)["config"]["data"]["split_seed"] == -1


def test_epochs_before_the_mean_are_not_the_best(tiny_config, tmp_path):
    tiny_config.model.trainable = "head"
    tiny_config.train.epochs, tiny_config.train.swa_start = 3, 1
    tiny_config.train.min_delta = 100.0  # so that the first that counts stays the best
    tiny_config.train.patience = 2
    train(setup(tiny_config, tmp_path))
    steps = [line["step"] for line in _lines(tmp_path) if line["split"] == "val"]
    assert evaluate(tmp_path)["checkpoint"]["step"] == steps[1]
    assert _best_epoch(read_artefacts(tmp_path)) == 2  # so says the model card


def test_seeds_have_no_order_of_examples_in_common(tiny_config, tmp_path):
    tiny_config.data.on_device = "always"
    orders = []
    for seed in (3, 4):
        tiny_config.seed, tiny_config.data.split_seed = seed, 0
        run = setup(tiny_config, tmp_path / str(seed))
        job = make_job(run)
        batches = make_feed(run, job).batches
        for _ in range(3):
            epoch = [next(batches) for _ in range(job.steps_per_epoch)]
            index = np.concatenate([b["index"][b.get("mask", slice(None))] for b in epoch])
            assert sorted(index) == list(range(len(run.data.files("train"))))
            orders.append(tuple(index.tolist()))
    assert len(set(orders)) == 6


def test_the_main_command_follows_moved_data(tiny_config, phantom_dir, tmp_path, capsys):
    shutil.copytree(phantom_dir, tmp_path / "before")
    tiny_config.data.dir = str(tmp_path / "before")
    tiny_config.train.epochs = 1
    train(setup(tiny_config, tmp_path / "run"))
    (tmp_path / "before").rename(tmp_path / "after")
    tiny_config.data.dir = str(tmp_path / "after")
    run = setup(tiny_config, tmp_path / "run")
    report = evaluate(tmp_path / "run", data=run.data)
    assert report["num_examples"] == 20 and "note" in report
    assert evaluate(tmp_path / "run")["accuracy"] == report["accuracy"]  # where they lie now
    capsys.readouterr()
    setup(tiny_config, tmp_path / "run")
    assert "note: the image files" not in capsys.readouterr().out
    image = "COVID/images/COVID-1.png"
    os.utime(tmp_path / "after" / image, (1, 1))
    setup(tiny_config, tmp_path / "run")
    assert f"note: the image files in {tmp_path / 'after'}, or" in capsys.readouterr().out
    shutil.copytree(tmp_path / "after", tmp_path / "copy")  # with the times they have
    tiny_config.data.dir = str(tmp_path / "copy")
    was = json.loads((tmp_path / "run/config.json").read_text())["data"]["fingerprint"]
    assert open_folder(str(tmp_path / "copy")).fingerprint() != was  # the touched file's
    capsys.readouterr()
    setup(tiny_config, tmp_path / "run")
    assert f"note: the image files in {tmp_path / 'copy'}, or" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["null", '{"config": 5}', '{"config": {}, "data": {}}', "{"])
def test_a_damaged_config_json_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_run(tmp_path)


def test_another_configuration_is_refused_by_name(resumable, straight):
    workdir = straight(resumable)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    resumable.train.batch_size = 8
    resumable.data.split = "paper-sorted"
    with pytest.raises(UserError, match=r"data\.split.*train\.batch_size was 16, now 8"):
        setup(resumable, workdir)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_changed_images_are_refused(resumable, straight, phantom_dir, tmp_path):
    workdir = straight(resumable)
    moved = tmp_path / "moved"
    shutil.copytree(phantom_dir, moved)
    resumable.data.dir = str(moved)
    setup(resumable, workdir)  # the same images elsewhere are the same run
    next((moved / "COVID" / "images").iterdir()).unlink()
    with pytest.raises(UserError, match=r"split\.csv"):
        setup(resumable, workdir)
    (moved / "Normal").rename(moved / "Healthy")
    for image in (moved / "Healthy").rglob("Normal-*"):
        image.rename(image.with_name(image.name.replace("Normal", "Healthy")))
    with pytest.raises(UserError, match="Healthy"):
        setup(resumable, workdir)


def test_groups_that_are_told_later_stop_no_run(resumable, straight, phantom_dir, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight(resumable), workdir)
    shutil.copytree(phantom_dir, tmp_path / "data")
    resumable.data.dir = str(tmp_path / "data")
    rows = read_split_csv(workdir / "split.csv")
    lines = "".join(f"{row.file},patient{i // 2}\n" for i, row in enumerate(rows))
    (tmp_path / "data" / "groups.csv").write_text("file,group\n" + lines)
    run = setup(resumable, workdir)
    assert run.resumed and len({row.group for row in run.data.rows}) == len(rows) // 2


@pytest.mark.slow  # test_numerics.py has runs that are not finite
def test_a_diverging_run_says_so(tiny_config, tmp_path):
    with_batch_norm(tiny_config)  # and with ReLU, which does not saturate
    tiny_config.optimizer.learning_rate = 1e30
    with pytest.raises(UserError, match=r"loss is .* between steps .*learning_rate"):
        train(setup(tiny_config, tmp_path / "run"))


def test_training_leaves_the_caller_s_arrays_alone(tiny_config, tmp_path):
    """Steps donate their state; what `setup` gave must not be part of it."""
    tiny_config.train.epochs = 1
    run = setup(tiny_config, tmp_path / "run")
    before = jax.tree.map(np.array, run.params)
    train(run)
    jax.tree.map(np.testing.assert_array_equal, before, run.params)
    train(run)  # complete: says so


def test_a_dry_run_counts_all_micro_batches(tiny_config, tmp_path, capsys):
    counted = []
    for micro in (0, 4):
        tiny_config.train.micro_batch = micro
        tiny_config.train.batch_size = 64
        dry_run(setup(tiny_config, tmp_path / str(micro)))
        (gflop,) = re.findall(r"([0-9.]+) GFLOP of the network", capsys.readouterr().out)
        counted.append(float(gflop))
    assert counted[0] > 0.1 and counted[1] == counted[0]


_DRY = """
import sys
from pathlib import Path
import jax
from covid_flax import config as config_lib
from covid_flax.dry_run import dry_run
from covid_flax.files import parse_json
from covid_flax.run import setup
dry_run(setup(config_lib.from_json(parse_json(sys.argv[1])), Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_dry_run_tells_of_each_device(tiny_config, tmp_path, capsys):
    """Of eight, each has an eighth of the batch: together they compute what one alone does."""
    tiny_config.train.batch_size = 40
    tiny_config.data.image_size = 224
    dry_run(setup(tiny_config, tmp_path / "one"))
    done = subprocess.run(
        [sys.executable, "-c", _DRY, tiny_config.to_json(), tmp_path / "eight"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for said, where in ((capsys.readouterr().out, ""), (done.stdout, " on each of 8 devices")):
        line = re.search(
            r"([0-9.]+) GFLOP of the network, ([0-9.]+) GB temporary, .* GB state(.*);", said
        )
        assert line[3] == where
        found.append((float(line[1]), float(line[2])))
    (flops, temporary), (flops_of_8, temporary_of_8) = found
    assert flops_of_8 == pytest.approx(flops, rel=0.1) and temporary_of_8 < temporary / 3


def test_notes_of_what_cannot_come_to_anything(tiny_config, tmp_path, capsys):
    with_batch_norm(tiny_config)
    tiny_config.optimizer.warmup_epochs, tiny_config.optimizer.schedule = 3.0, "cosine"
    dry_run(setup(tiny_config, tmp_path / "a"))
    out = capsys.readouterr().out
    assert "conv1, conv2, conv3, conv4 begin at random and are never trained" in out
    assert out.count("begin at random") == 1
    assert "warmup_epochs=3 is all of train.epochs=3: the learning rate never comes" in out
    tiny_config.model.trainable = "all"
    tiny_config.optimizer.warmup_epochs = 6.0
    make_job(setup(tiny_config, tmp_path / "b"))
    out = capsys.readouterr().out
    assert "begin at random" not in out
    assert "the learning rate ends at 50% of optimizer.learning_rate" in out
    tiny_config.optimizer.warmup_epochs = 2.0
    make_job(setup(tiny_config, tmp_path / "b"))
    assert "warmup_epochs" not in capsys.readouterr().out


def test_what_needs_no_images_is_refused_before_they_are_read(tiny_config, tmp_path, monkeypatch):
    def read(*args):
        raise AssertionError("the images were read")

    monkeypatch.setattr("covid_flax.data.dataset.load_dataset", read)
    (tmp_path / "file").touch()
    for changed, words in (
        ({"train.teacher": str(tmp_path / "none")}, "train.teacher=.*holds no run"),
        ({"train.teacher": str(tmp_path / "file")}, "train.teacher=.*is a file"),
        ({"model.weights": "imagenet"}, "lenet5"),
        ({"model.weights": "/nowhere.h5"}, "/nowhere.h5"),
        ({"model.weights_may_miss": ("conv2",)}, "weights_may_miss"),
        ({"train.micro_batch": 4}, "micro_batch=4 does not divide"),
        ({"augment.mixup": 0.2, "train.batch_size": 1}, "augment.mixup takes of another image"),
        ({"data.folds": 3}, "data.folds=3 needs data.split=grouped"),
        ({"data.intermediate_size": 1}, "intermediate_size=1: set a side .*at least 32"),
    ):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changed)
        with pytest.raises(UserError, match=words):
            setup(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_s_files_are_not_a_run_s_to_lose(tiny_config, tmp_path):
    for name, text in (
        ("split.csv", "patient,part\n1,a\n"),
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("calibration.json", '{"camera": [1, 2]}\n'),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is of no run .*another --workdir"):
            setup(tiny_config, folder)
        assert [p.read_text() for p in folder.iterdir()] == [text]


def test_temperatures_go_with_the_checkpoints_alone(tiny_config, tmp_path):
    """A dry run in a run whose checkpoints were removed keeps them; a training of it does not."""
    tiny_config.train.epochs = 1
    run = setup(tiny_config, tmp_path)
    train(run)
    evaluate(tmp_path, data=run.data)
    shutil.rmtree(tmp_path / "checkpoints")
    again = setup(tiny_config, tmp_path)
    assert (tmp_path / "calibration.json").exists()
    train(again)
    assert not (tmp_path / "calibration.json").exists()


def test_a_split_of_the_user_s_is_not_replaced(tiny_config, tmp_path):
    """It would have been given in vain. That of a run that was killed is the same."""
    setup(tiny_config, tmp_path)
    (tmp_path / "config.json").unlink()
    setup(tiny_config, tmp_path)
    (tmp_path / "config.json").unlink()
    rows = read_split_csv(tmp_path / "split.csv")
    other = [
        dataclasses.replace(row, split="train" if row.split == "val" else "val") for row in rows
    ]
    write_split_csv(tmp_path / "split.csv", other)
    with pytest.raises(UserError, match=r"split\.csv is not the split .*would be lost"):
        setup(tiny_config, tmp_path)
    assert read_split_csv(tmp_path / "split.csv") == other


def test_a_seed_is_of_the_first_weights_and_of_what_steps_draw(tiny_config, tmp_path):
    firsts = []
    for seed in (3, 4):
        tiny_config.seed, tiny_config.data.split_seed = seed, 0
        run = setup(tiny_config, tmp_path / str(seed))
        want = create_model(tiny_config.model, 4, seed)[1]
        jax.tree.map(np.testing.assert_array_equal, run.params, want)
        with Checkpoints(tmp_path / str(seed) / "checkpoints", writing=True) as c:
            state, _, _ = _start(run, make_job(run), c)
        np.testing.assert_array_equal(state.rng, jax.random.key_data(jax.random.key(seed)))
        firsts.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(run.params)]))
    assert np.abs(firsts[0] - firsts[1]).max() > 1e-3


def test_a_validation_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("covid_flax.train.mean_loss", lambda logits, labels: float("nan"))
    with pytest.raises(UserError, match=r"validation loss is nan between steps 1 and 4"):
        train(setup(tiny_config, tmp_path / "run"))
    assert [line["split"] for line in _lines(tmp_path / "run")] == ["train"]
    with Checkpoints(tmp_path / "run" / "checkpoints") as c:
        assert c.steps == []


def test_sigterm_is_noticed_between_lines_where_steps_are_slow(tiny_config, tmp_path, monkeypatch):
    tiny_config.train.log_every_steps = 20  # an epoch has four steps
    monkeypatch.setattr(preemption, "LOOK_EVERY_S", 1e-9)
    _preempt(monkeypatch, at_batch=2)
    with pytest.raises(preemption.Terminated, match="saved step 2;"):
        train(setup(tiny_config, tmp_path / "run"))


def test_logged_training_figures_are_of_the_training_images(tiny_config, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(RunLog, "interval", lambda self, step, **f: steps.append(f))
    tiny_config.model.dropout, tiny_config.optimizer.learning_rate = 0.0, 0.0
    tiny_config.train.epochs, tiny_config.train.log_every_steps = 1, 1
    train(setup(tiny_config, tmp_path))
    line = _lines(tmp_path)[0]
    judge = evaluate(tmp_path, split="train")
    for key in ("loss", "accuracy"):
        assert line[key] == pytest.approx(judge[key], rel=1e-4)
        assert np.mean([f[key] for f in steps]) == pytest.approx(line[key], rel=1e-5)  # 4 x 15


def test_the_epoch_that_is_kept_is_marked_and_named(tiny_config, tmp_path, monkeypatch, capsys):
    marked, real = [], plots.curves_figure

    def curves(records, **how):
        marked.append(how)
        return real(records, **how)

    monkeypatch.setattr(plots, "curves_figure", curves)
    tiny_config.train.epochs, tiny_config.train.patience = 9, 2
    tiny_config.train.min_delta = 100.0  # the first stays the best, whatever the losses
    train(setup(tiny_config, tmp_path / "run"))
    assert marked == [{"best_epoch": 1}]
    said = "early stop: val_loss has not improved by more than 100 for 2 epochs; best epoch 1"
    assert said in capsys.readouterr().out


def test_divergence_is_judged_of_every_epoch_and_said(tiny_config, tmp_path, monkeypatch, capsys):
    seen = []

    def judge(losses, chance):
        seen.append((list(losses), chance))
        return "it diverges"

    monkeypatch.setattr("covid_flax.train.divergence", judge)
    tiny_config.train.epochs = 2
    train(setup(tiny_config, tmp_path))
    losses = [line["loss"] for line in _lines(tmp_path) if line["split"] == "train"]
    assert [s for s, _ in seen] == [losses[:1], losses] and seen[0][1] == pytest.approx(np.log(4))
    assert capsys.readouterr().out.count("note: it diverges") == 2


def test_clocks_and_events_go_on_after_a_kill(tiny_config, tmp_path, monkeypatch):
    _train_killed_at(tiny_config, tmp_path, 5, monkeypatch)  # the checkpoint is of step 4
    resume, begun, opened = Checkpoints.resume, RunLog.__init__, []

    def later(self, like):
        step, state, loop, lost = resume(self, like)
        return step, state, loop | {"elapsed": 1e6}, lost

    def begin(self, workdir, length=0, step=0):
        opened.append(step)
        begun(self, workdir, length, step)

    monkeypatch.setattr(Checkpoints, "resume", later)
    monkeypatch.setattr(RunLog, "__init__", begin)
    train(setup(tiny_config, tmp_path))
    with Checkpoints(tmp_path / "checkpoints") as c:
        assert c.latest_loop["elapsed"] > 1e6 and opened == [4]


def test_a_process_that_splits_otherwise_is_refused(tiny_config, tmp_path):
    run = setup(tiny_config, tmp_path / "run")
    other = dataclasses.replace(run.data, rows=run.data.rows[::-1])
    with pytest.raises(UserError, match="process 0 has other images, or another split"):
        _refuse_other_split(tmp_path / "run", other)


def test_a_file_of_another_host_may_appear_late(tmp_path, monkeypatch):
    """Until the folder is read again, NFS says that it is not there."""
    path, listed = tmp_path / "run" / "config.json", []
    path.parent.mkdir()
    path.touch()
    real = Path.exists
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or [])
    monkeypatch.setattr(Path, "exists", lambda p: real(p) and (p != path or bool(listed)))
    assert _appears(path) and listed == [tmp_path, path.parent]
    monkeypatch.setattr("covid_flax.run._NETWORK_DELAY_S", 0.0)
    assert not _appears(tmp_path / "run" / "other.json")


def test_a_file_system_without_locks_is_told_of(tiny_config, tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("covid_flax.run_folder.fcntl.flock", flock)
    setup(tiny_config, tmp_path / "run")
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").exists()


def test_a_folder_below_the_classes_is_no_workdir(tiny_config, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir, tmp_path / "data")
    tiny_config.data.dir = str(tmp_path / "data")
    with pytest.raises(UserError, match="lies in the data folder .*another --workdir"):
        setup(tiny_config, tmp_path / "data" / "runs" / "a")
    with pytest.raises(UserError, match="is the data folder.*another --workdir"):
        setup(tiny_config, tmp_path / "data")
    (tmp_path / "data" / "COVID-19_Radiography_Dataset").mkdir()
    for label in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        source = tmp_path / "data" / label
        source.rename(tmp_path / "data" / "COVID-19_Radiography_Dataset" / label)
    setup(tiny_config, tmp_path / "data" / "runs" / "a")  # beside them


def test_dry_run_trains_nothing(tiny_config, tmp_path, capsys):
    with_batch_norm(tiny_config)
    tiny_config.train.ema_decay = 0.9  # the state that the step takes has averages then
    dry_run(setup(tiny_config, tmp_path / "run"))
    out = capsys.readouterr().out
    assert "GFLOP" in out and "conv5" in out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "config.json").exists()
    assert (tmp_path / "run" / "split.csv").exists()
