"""The settings, the trials and their command lines; what is refused before the first trial."""

from pathlib import Path

import pytest
from small_sweep import FOLDS, plan

from covid_flax.data import dataset
from covid_flax.data.folder import open_folder
from covid_flax.errors import UserError
from covid_flax.sweep.plan import config_of
from covid_flax.sweep.process import command_of


def test_a_grid_is_the_product_with_every_seed():
    sets = ["optimizer.learning_rate=1e-4,3e-4,1e-3", "train.label_smoothing=0,0.1"]
    trials = plan(sets=sets, seeds=["0", "1", "2"]).trials
    assert len(trials) == 18 and len({t.name for t in trials}) == 18
    pairs = {(*t.settings.values(), t.seed) for t in trials}
    assert pairs == {(r, s, i) for r in (1e-4, 3e-4, 1e-3) for s in (0.0, 0.1) for i in (0, 1, 2)}
    assert trials[0].name == "000-learning_rate=0.0001-label_smoothing=0.0-seed=0"
    command = command_of(plan(sets=sets), trials[0], Path("d"))
    assert f"--workdir=d/{trials[0].name}" in command and "--config.train.epochs=3" in command
    assert "--config.optimizer.learning_rate=0.0001" in command and "--config.seed=0" in command


def test_no_trial_learns_from_the_test_images_of_another(tmp_path):
    """Seeds share one split; a split that the user names stays, and one seed keeps its own."""
    data = {"data.split": "grouped", "data.test_fraction": 0.3}
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        for i in range(30):
            (tmp_path / name / f"{i}.png").write_bytes(b"")
    folder = open_folder(tmp_path)

    def test_parts(made):
        for trial in made.trials:
            of_trial = config_of(made.config, trial)
            rows = dataset._split(folder, of_trial.data, of_trial.seed)
            yield tuple(row.file for row in rows if row.split == "test")

    several = plan(seeds=["3", "4", "5"], fixed=data)
    assert len(set(test_parts(several))) == 1
    assert len({dataset._split_seed(plan(seeds=[s]).config.data, int(s)) for s in "345"}) == 3
    commands = [command_of(several, trial, Path("d")) for trial in several.trials]
    assert all("--config.data.split_seed=3" in command for command in commands)
    assert several.spec["config"]["data.split_seed"] == 3
    named = plan(seeds=["3", "4"], fixed={**data, "data.split_seed": 1})
    assert "--config.data.split_seed=1" in command_of(named, named.trials[0], Path("d"))
    assert plan(fixed=data).config.data.split_seed == -1


def test_a_setting_is_trained_on_every_fold():
    trials = plan(fixed=FOLDS).trials
    assert [(t.setting, t.fold) for t in trials] == [(s, f) for s in range(3) for f in range(4)]
    assert trials[5].name.endswith("-seed=0-fold=1")
    command = command_of(plan(fixed=FOLDS), trials[5], Path("d"))
    assert "--config.data.fold=1" in command and "--config.data.folds=4" in command
    one = plan(fixed={**FOLDS, "data.fold": 2}).trials
    assert [t.fold for t in one] == [None] * 3


def test_draws_are_of_their_seed():
    sets = ["optimizer.learning_rate=log(1e-5,1e-3)", "train.batch_size=8,16"]

    def drawn(seed, trials=6):
        return [t.settings for t in plan("random", sets, trials=trials, sweep_seed=seed).trials]

    assert drawn(0) == drawn(0) != drawn(1) and len(drawn(0)) == 6
    lists = ["optimizer.learning_rate=1,2,3", "train.batch_size=8,16"]
    whole = plan("random", lists, trials=6).trials  # without replacement
    assert len({tuple(t.settings.values()) for t in whole}) == 6


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gird", {}, ["gird", "grid"]),
        ("grid", {"sets": []}, ["--set"]),
        ("grid", {"sets": ["model.dropout=uniform(0,1)"]}, ["random"]),
        ("grid", {"sets": ["model.dropout=0", "model.dropout=0.1"]}, ["twice"]),
        ("grid", {"sets": ["model.dropout=0,3"]}, ["model.dropout=3"]),
        ("grid", {"sets": ["train.epochs=1,2"]}, ["train.epochs", "drop one"]),
        ("grid", {"trials": 3}, ["--trials"]),
        ("grid", {"seeds": ["0", "x"]}, ["0,x"]),
        ("grid", {"seeds": ["1", "1"]}, ["twice"]),
        ("grid", {"seeds": ["1"], "fixed": {"seed": 1}}, ["not both"]),
        ("random", {}, ["--trials"]),
        ("random", {"trials": 4}, ["3 combinations"]),
        ("random", {"sets": ["train.batch_size=uniform(8,9)"], "trials": 3}, ["only 2"]),
        ("halving", {"trials": 2, "seeds": ["0", "1"]}, ["one seed"]),
        ("grid", {"sets": ["repeats=1,3"]}, ["--seeds"]),
        ("grid", {"sets": ["data.folds=0,5"]}, ["--config.data.folds=N"]),
        ("grid", {"sets": ["data.fold=0,1"], "fixed": FOLDS}, ["--config.data.folds=N"]),
        ("grid", {"seeds": ["0", "1"], "fixed": FOLDS}, ["--seeds and data.folds"]),
        ("halving", {"trials": 2, "fixed": FOLDS}, ["--config.data.fold=0"]),
    ],
)
def test_plans_that_are_refused(kind, options, words):
    with pytest.raises(UserError) as e:
        plan(kind, **options)
    for word in words:
        assert word in str(e.value)


def test_a_trial_s_settings_are_its_own():
    made = plan(sets=["optimizer.learning_rate=0.1,0.5", "train.batch_size=2,4"])
    before = made.config.to_json()
    rates = [config_of(made.config, t).optimizer.learning_rate for t in made.trials]
    assert rates == [0.1, 0.1, 0.5, 0.5] and made.config.to_json() == before
