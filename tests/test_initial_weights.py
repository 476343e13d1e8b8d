"""A training that begins with another run's weights: what is taken, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest

from covid_flax.checkpoint import Checkpoints
from covid_flax.data.phantoms import write_dataset
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.members import train_members
from covid_flax.run import setup
from covid_flax.run_folder import learned_files, learned_of
from covid_flax.train import train
from covid_flax.trained_run import open_run
from tests.small_resnet import with_batch_norm

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


def _configured(config, network):
    config.data.split_seed = 0
    config.train.epochs = 1
    return with_batch_norm(config) if network == "resnet14_small" else config


@pytest.fixture(scope="module")
def trained(make_tiny_config, tmp_path_factory):
    """By network, a run that is evaluated with averages."""
    runs = {}
    for network in ("lenet5", "resnet14_small"):
        config = _configured(make_tiny_config(), network)
        config.train.ema_decay = 0.9
        runs[network] = tmp_path_factory.mktemp(network)
        train(setup(config, runs[network]))
    return runs


def _other_split(config):
    config = config.copy_and_resolve_references()
    config.data.split_seed, config.model.weights = 9, "none"
    return config


def _begin(config, folder, workdir):
    config.model.weights, config.seed = str(folder), 5
    return setup(config, workdir)


def _equal(a, b):
    a, b = map(jax.tree.leaves, (a, b))
    return [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("network", ["lenet5", "resnet14_small"])
def test_it_begins_with_what_the_run_is_evaluated_with(
    network, tiny_config, trained, tmp_path, capsys
):
    """Head and batch statistics too; of a network that Keras does not have as well."""
    before = open_run(trained[network])
    run = _begin(_configured(tiny_config, network), trained[network], tmp_path / "next")
    assert all(_equal(run.params, before._params))
    assert all(_equal(run.batch_stats, before._batch_stats))
    count = len(jax.tree.leaves((run.params, run.batch_stats)))
    assert re.search(rf"weights: {network}\d+: loaded {count} arrays\n", capsys.readouterr().out)
    about = json.loads((tmp_path / "next" / "config.json").read_text())["weights"]
    assert (about["run"], about["step"]) == (str(trained[network]), before.step)
    with Checkpoints(trained[network] / "checkpoints") as checkpoints:
        assert about["sha256"] == checkpoints.digest(before.step)
    train(run)
    assert not all(_equal(open_run(tmp_path / "next", "latest")._params, before._params))


def test_a_run_of_other_classes_lends_all_but_its_head(
    tiny_config, trained, phantom_dir, tmp_path, capsys
):
    shutil.copytree(phantom_dir, tmp_path / "data")
    (tmp_path / "data" / "Normal").rename(tmp_path / "data" / "Healthy")
    for row in read_split_csv(trained["lenet5"] / "split.csv"):
        if row.split == "train":  # of these none may be held out
            path = tmp_path / "data" / row.file.replace("Normal/", "Healthy/")
            path.rename(path.with_stem(f"{path.stem}-other"))
    tiny_config.data.dir = str(tmp_path / "data")
    before = open_run(trained["lenet5"])
    run = _begin(tiny_config, trained["lenet5"], tmp_path / "next")
    assert "knows other classes (COVID, Lung_Opacity, Normal" in capsys.readouterr().out
    lent = {stage: _equal(run.params[stage], before._params[stage]) for stage in run.params}
    head = lent.pop("head")
    assert all(map(all, lent.values())) and not all(head)


def test_what_learned_from_images_held_out_here_is_refused(tiny_config, trained, tmp_path, capsys):
    """By itself, or by what it began with; and what that was cannot always be told."""
    folder = tmp_path / "middle"
    _begin(_configured(tiny_config, "lenet5"), trained["lenet5"], folder)
    rows = read_split_csv(trained["lenet5"] / "split.csv")
    learned = {row.file for row in rows if row.split == "train"}
    write_split_csv(folder / "split.csv", [row for row in rows if row.split != "train"])
    assert learned_files(folder) == learned
    about = json.loads((folder / "config.json").read_text())
    about["weights"]["run"] = about["config"]["model"]["weights"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(about))
    assert learned_files(folder) == set()
    assert "gone, which a run began with, is gone" in capsys.readouterr().out
    about["weights"]["run"] = str(trained["lenet5"])
    (folder / "config.json").write_text(json.dumps(about))
    other = setup(_other_split(tiny_config), tmp_path / "other").data
    assert learned_of(folder, other.held_out, other.class_names)
    tiny_config.data.split_seed = 9
    with pytest.raises(UserError, match=r"was trained on [\d,]+ images that this run holds out"):
        _begin(tiny_config, trained["lenet5"], tmp_path / "next")
    assert not (tmp_path / "next" / "config.json").exists()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (None, r"holds no run \(no config.json\)"),
        ("{}", "a baseline, or a run whose config.json is damaged"),
        ("members", "holds several runs: give one, like .*seed0"),
        ("untrained", "has no checkpoint yet: train it first"),
    ],
)
def test_a_folder_without_weights_is_refused(about, message, tiny_config, trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    saved = json.loads((trained["lenet5"] / "config.json").read_text())
    texts = {
        "members": json.dumps(saved | {"members": ["seed0", "seed1"]}),
        "untrained": json.dumps(saved),
    }
    if about is not None:
        (folder / "config.json").write_text(texts.get(about, about))
    with pytest.raises(UserError, match=f"model.weights=.*run.* {message}"):
        _begin(tiny_config, folder, tmp_path / "next")


def test_a_run_that_does_not_say_what_it_learned_from_is_refused(tiny_config, trained, tmp_path):
    shutil.copytree(trained["lenet5"], tmp_path / "passed-on")
    (tmp_path / "passed-on" / "split.csv").unlink()
    with pytest.raises(UserError, match=r"passed-on has no split\.csv: .*: restore the file"):
        _begin(tiny_config, tmp_path / "passed-on", tmp_path / "next")


def test_its_weights_may_share_in_what_is_evaluated(tiny_config, trained, tmp_path):
    """The training is the same one; the share is that of the run it began with."""
    tiny_config.train.ema_decay = 0.5
    tiny_config.train.epochs = 1
    tiny_config.data.split_seed = 0
    train(_begin(tiny_config, trained["lenet5"], tmp_path / "plain"))
    tiny_config.train.start_share = 0.25
    train(_begin(tiny_config, trained["lenet5"], tmp_path / "shared"))
    first, plain, shared = (
        open_run(run)._params
        for run in (trained["lenet5"], tmp_path / "plain", tmp_path / "shared")
    )
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(0.25 * a + 0.75 * b, c, rtol=1e-5, atol=1e-7),
        *(first, plain, shared),
    )
    assert not all(_equal(plain, shared))
    tiny_config.model.weights = "none"
    with pytest.raises(UserError, match="head would begin at random: give model.weights=RUN"):
        setup(tiny_config, tmp_path / "drawn")


def test_another_network_is_refused_before_images_are_read(tiny_config, trained, tmp_path):
    tiny_config.data.dir = str(tmp_path / "none")
    with pytest.raises(UserError, match="is of resnet14_small, this run of lenet5"):
        _begin(tiny_config, trained["resnet14_small"], tmp_path)


def test_folds_that_begin_with_one_of_their_images_are_refused(tiny_config, trained, tmp_path):
    tiny_config.model.weights = str(trained["lenet5"])
    tiny_config.data.split, tiny_config.data.folds = "grouped", 2
    with pytest.raises(UserError, match=r"has learned from 60 of these images, and each"):
        train_members(tiny_config, tmp_path)
    assert not (tmp_path / "fold0" / "checkpoints").exists()


def test_what_the_first_run_learned_from_is_no_external_test(tiny_config, trained, tmp_path):
    """Scored again on that run's images, by names: they lie elsewhere."""
    write_dataset(tmp_path / "theirs", 4, seed=8, size=48)
    for path in list((tmp_path / "theirs").rglob("*.png")):
        path.rename(path.with_stem(f"theirs-{path.stem}"))
    of_first = tiny_config.data.dir
    tiny_config.data.dir = str(tmp_path / "theirs")
    tiny_config.train.epochs = 1
    train(_begin(tiny_config, trained["lenet5"], tmp_path / "next"))
    report = evaluate(tmp_path / "next", split="all", data_dir=of_first)
    leak = next(alarm for alarm in report["alarms"] if alarm["name"] == "duplicate-leak")
    assert leak["level"] == "caution" and leak["figures"]["images"] == 60
