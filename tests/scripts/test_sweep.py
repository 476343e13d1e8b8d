"""The sweep: its plan, its going on, its figures; trials are a stand-in's, but for one grid."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import by_path
import numpy as np
import pytest
from scipy import stats

from covid_flax import config as config_lib
from covid_flax.data import dataset
from covid_flax.data.folder import open_folder
from covid_flax.errors import UserError
from ml_collections_configs import base

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "sweep.py"

sweep = by_path.load("scripts/sweep.py")

KNOWN = config_lib.flatten(base.get_config())
FOLDS = {"data.split": "grouped", "data.folds": 4}

# As much of covid_flax.main as the sweep sees. A higher rate is better, a seed shifts it a little;
# it goes on after the epochs that its metrics.jsonl has.
FAKE = """
import json, os, pathlib, sys, time
args = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(args["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir.parent / "calls", "a") as f:
    f.write(workdir.name + "\\n")
rate, seed = float(args["config.optimizer.learning_rate"]), int(args["config.seed"])
if rate > 1:
    print("noise\\nerror: the loss is nan: lower optimizer.learning_rate", file=sys.stderr)
    sys.exit(2)
path = workdir / "metrics.jsonl"
done = len(path.read_text().splitlines()) // 2 if path.exists() else 0
stop = workdir.parent / "die"
for epoch in range(done + 1, int(args.get("config.train.epochs", 3)) + 1):
    accuracy = rate * epoch / 10 + seed / 100
    with open(path, "a") as f:
        for split in ("train", "val"):
            line = {"step": epoch, "epoch": epoch, "split": split, "loss": 1 - accuracy,
                    "accuracy": accuracy}
            f.write(json.dumps(line) + "\\n")
    if stop.exists() and workdir.name.startswith(stop.read_text()):
        stop.unlink()
        sys.exit(130)
    time.sleep(float(args.get("config.optimizer.weight_decay", 0)))
"""


@pytest.fixture
def fake_main(tmp_path, monkeypatch):
    path = tmp_path / "fake_main.py"
    path.write_text(FAKE)
    monkeypatch.setattr(sweep, "MAIN", (sys.executable, str(path)))
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.05)


def plan(kind="grid", sets=("optimizer.learning_rate=0.1,0.5,0.2",), fixed=None, **options):
    config, fixed = base.get_config(), {"train.epochs": 3, **(fixed or {})}
    config.update_from_flattened_dict(fixed)
    return sweep.make_plan("a.py", config, kind, list(sets), fixed=fixed, **options)


def calls(workdir):
    path = workdir / "calls"
    return path.read_text().splitlines() if path.exists() else []


# ---- parsing ------------------------------------------------------------------------------------


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
    axis = sweep.parse_axis(text, KNOWN)
    assert axis.values == values and not axis.scale
    assert [type(v) for v in axis.values] == [type(KNOWN[axis.key])] * len(values)


def test_ranges():
    rng = np.random.default_rng(0)
    log = sweep.parse_axis("optimizer.learning_rate=log(1e-5, 1e-3)", KNOWN)
    drawn = np.array([log.draw(rng) for _ in range(2000)])
    assert drawn.min() >= 1e-5 and drawn.max() <= 1e-3
    # Uniform in the logarithm: Kolmogorov and Smirnov's test of it.
    assert stats.kstest((np.log10(drawn) + 5) / 2, "uniform").pvalue > 1e-3
    uniform = sweep.parse_axis("model.dropout=uniform(0.1,0.6)", KNOWN)
    drawn = np.array([uniform.draw(rng) for _ in range(2000)])
    assert stats.kstest((drawn - 0.1) / 0.5, "uniform").pvalue > 1e-3
    whole = sweep.parse_axis("train.batch_size=log(8,64)", KNOWN)
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
        sweep.parse_axis(text, KNOWN)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


# ---- plans --------------------------------------------------------------------------------------


def test_a_grid_is_the_product_with_every_seed():
    sets = ["optimizer.learning_rate=1e-4,3e-4,1e-3", "train.label_smoothing=0,0.1"]
    trials = plan(sets=sets, seeds=["0", "1", "2"]).trials
    assert len(trials) == 18 and len({t.name for t in trials}) == 18
    pairs = {(*t.settings.values(), t.seed) for t in trials}
    assert pairs == {(r, s, i) for r in (1e-4, 3e-4, 1e-3) for s in (0.0, 0.1) for i in (0, 1, 2)}
    assert trials[0].name == "000-learning_rate=0.0001-label_smoothing=0.0-seed=0"
    command = sweep.command_of(plan(sets=sets), trials[0], Path("d"))
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
            of_trial = sweep._config_of(made.config, trial)
            rows = dataset._split(folder, of_trial.data, of_trial.seed)
            yield tuple(row.file for row in rows if row.split == "test")

    several = plan(seeds=["3", "4", "5"], fixed=data)
    assert len(set(test_parts(several))) == 1
    assert len({dataset._split_seed(plan(seeds=[s]).config.data, int(s)) for s in "345"}) == 3
    commands = [sweep.command_of(several, trial, Path("d")) for trial in several.trials]
    assert all("--config.data.split_seed=3" in command for command in commands)
    assert several.spec["config"]["data.split_seed"] == 3
    named = plan(seeds=["3", "4"], fixed={**data, "data.split_seed": 1})
    assert "--config.data.split_seed=1" in sweep.command_of(named, named.trials[0], Path("d"))
    assert plan(fixed=data).config.data.split_seed == -1


def test_a_setting_is_trained_on_every_fold():
    trials = plan(fixed=FOLDS).trials
    assert [(t.setting, t.fold) for t in trials] == [(s, f) for s in range(3) for f in range(4)]
    assert trials[5].name.endswith("-seed=0-fold=1")
    command = sweep.command_of(plan(fixed=FOLDS), trials[5], Path("d"))
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


# ---- figures ------------------------------------------------------------------------------------


def test_the_interval_is_scipys():
    values = [0.91, 0.93, 0.9, 0.955]
    mean, interval = sweep.mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(values))
    assert interval == pytest.approx((expected.low, expected.high))
    assert sweep.mean_interval([0.5]) == sweep.mean_interval([0.5, 0.5]) == (0.5, None)


def test_the_best_epoch():
    records = [
        {"epoch": e, "loss": loss, "accuracy": a}
        for e, loss, a in [(1, math.nan, 0.7), (2, 0.5, 0.8), (3, 0.4, 0.8), (4, 0.45, 0.6)]
    ]
    assert sweep.best_of(records, "val_loss")["best_epoch"] == 3
    assert sweep.best_of(records, "val_accuracy")["best_epoch"] == 2
    assert sweep.best_of(records, "val_loss")["epochs"] == 4
    assert sweep.best_of(records[:1], "val_loss") is None
    # As the run itself: what is no improvement by train.min_delta is not kept.
    assert sweep.best_of(records, "val_loss", 0.15)["best_epoch"] == 2


def test_a_setting_with_a_failed_seed_ranks_last():
    def trial(setting, seed, loss, state="complete"):
        return dict(setting=setting, settings={}, seed=seed, state=state, val_loss=loss)

    trials = [trial(0, 0, 0.1), trial(0, 1, 0.0, "failed"), trial(1, 0, 0.5), trial(1, 1, 0.3)]
    trials += [trial(2, 0, 0.2), trial(2, 1, 0.3), trial(3, 0, 0.01, "pruned")]
    ranking = sweep.rank(trials, "val_loss")
    assert [r["setting"] for r in ranking] == [2, 1, 3, 0]
    assert ranking[3]["failed_seeds"] == [1] and ranking[3]["mean"] == 0.1
    assert "failed: seed 1" in sweep.table(ranking, [], "val_loss")[-1]


# ---- sweeps of the stand-in ---------------------------------------------------------------------


def test_a_grid_and_what_it_writes(fake_main, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    saved = sweep.sweep(plan(seeds=["0", "1", "2"]), workdir)
    assert len(calls(workdir)) == 9
    best = saved["ranking"][0]
    assert best["settings"] == {"optimizer.learning_rate": 0.5} and best["seeds"] == [0, 1, 2]
    expected = stats.ttest_1samp(best["values"], 0).confidence_interval(0.95)
    assert best["interval"] == pytest.approx([expected.low, expected.high])
    assert best["values"] == pytest.approx([0.85, 0.84, 0.83])
    assert json.loads((workdir / "sweep.json").read_text()) == saved
    with open(workdir / "sweep.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 9 and rows[0]["optimizer.learning_rate"] == "0.1"
    assert float(rows[0]["val_accuracy"]) == pytest.approx(0.03) and rows[8]["seed"] == "2"
    assert (workdir / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "trial 9/9" in out and "95 % interval" in out
    table = out[out.index("optimizer.learning_rate  val_loss") :].splitlines()
    assert [line.split()[1] for line in table[1:4]] == ["0.5", "0.2", "0.1"]
    # Again: nothing is left to train. A folder that is gone is.
    sweep.sweep(plan(seeds=["0", "1", "2"]), workdir)
    assert len(calls(workdir)) == 9
    (workdir / saved["trials"][4]["trial"] / "metrics.jsonl").unlink()
    sweep.sweep(plan(seeds=["0", "1", "2"]), workdir)
    assert calls(workdir)[9:] == [saved["trials"][4]["trial"]]


def test_folds_are_averaged(fake_main, tmp_path, capsys):
    saved = sweep.sweep(plan(fixed=FOLDS), tmp_path / "sweep")
    assert len(saved["ranking"]) == 3
    assert saved["ranking"][0]["folds"] == [0, 1, 2, 3] and len(saved["ranking"][0]["values"]) == 4
    assert "folds" in capsys.readouterr().out.rpartition("95 % interval")[2].splitlines()[0]
    with open(tmp_path / "sweep/sweep.csv", newline="") as f:
        assert [row["fold"] for row in csv.DictReader(f)] == list("0123") * 3


def test_a_configuration_edited_amid_the_sweep_is_told(fake_main, tmp_path):
    """Each trial reads the file anew."""
    made, workdir = plan(), tmp_path / "sweep"
    trial = made.trials[0]
    saved = config_lib.to_json(sweep._config_of(made.config, trial))
    (workdir / trial.name).mkdir(parents=True)
    config = workdir / trial.name / "config.json"
    config.write_text(json.dumps({"config": saved | {"data": {**saved["data"], "num_threads": 9}}}))
    sweep._refuse_changed(made, trial, workdir)
    saved["optimizer"]["weight_decay"] = 0.3
    config.write_text(json.dumps({"config": saved}))
    with pytest.raises(UserError, match=r"a\.py has changed .*weight_decay was 0\.3, now 0\.0\)"):
        sweep.sweep(made, workdir)


@pytest.mark.parametrize(
    ("monitor", "direction"), [("val_loss", "MINIMIZE"), ("val_accuracy", "MAXIMIZE")]
)
def test_halving_keeps_the_good_end_of_the_figure(tmp_path, monitor, direction):
    halving = sweep._Halving(plan("halving", trials=2, fixed={"train.monitor": monitor}), tmp_path)
    halving.open()
    assert halving._study.direction.name == direction


def test_the_time_left_is_told(fake_main, tmp_path, capsys):
    slow = plan(sets=["optimizer.learning_rate=0.1"], fixed={"optimizer.weight_decay": 0.4})
    sweep.sweep(slow, tmp_path / "sweep")
    out = capsys.readouterr().out
    assert re.search(r"epoch [12]/3 \| val loss 0\.9[89]00", out)
    assert "trial left" in out and "sweep left" in out


def test_a_trial_s_settings_are_its_own():
    made = plan(sets=["optimizer.learning_rate=0.1,0.5", "train.batch_size=2,4"])
    before = made.config.to_json()
    rates = [sweep._config_of(made.config, t).optimizer.learning_rate for t in made.trials]
    assert rates == [0.1, 0.1, 0.5, 0.5] and made.config.to_json() == before


def test_a_sweep_interrupted_in_its_second_trial_goes_on(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "die").write_text("001")
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(plan(), workdir)
    names = [t.name for t in plan().trials]
    assert calls(workdir) == names[:2]
    saved = sweep.sweep(plan(), workdir)
    assert calls(workdir) == [*names[:2], *names[1:]]
    assert [t["state"] for t in saved["trials"]] == ["complete"] * 3


def test_an_interrupted_sweep_goes_on(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "die").touch()
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(plan(), workdir)
    names = [t.name for t in plan().trials]
    assert calls(workdir) == names[:1] and not (workdir / "sweep.csv").exists()
    saved = sweep.sweep(plan(), workdir)
    assert calls(workdir) == [names[0], *names]
    assert [t["epochs"] for t in saved["trials"]] == [3, 3, 3]
    # The stand-in went on after its first epoch.
    assert len((workdir / names[0] / "metrics.jsonl").read_text().splitlines()) == 6


def test_another_sweeps_folder_is_refused(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    sweep.sweep(plan(), workdir)
    before = (workdir / "sweep.json").read_bytes()
    with pytest.raises(UserError, match=r"set.optimizer.learning_rate was .* another --workdir"):
        sweep.sweep(plan(sets=["optimizer.learning_rate=0.1,0.5"]), workdir)
    with pytest.raises(UserError, match=r"config.train.epochs was 3, now 4"):
        sweep.sweep(plan(fixed={"train.epochs": 4}), workdir)
    with pytest.raises(UserError, match=r"seeds was \[0\], now \[0, 1\]"):
        sweep.sweep(plan(seeds=["0", "1"]), workdir)
    assert (workdir / "sweep.json").read_bytes() == before
    old = json.loads(before)
    assert old["spec"]["config"].pop("augment.gamma") == 0.0  # a key that came since
    (workdir / "sweep.json").write_text(json.dumps(old))
    sweep.sweep(plan(), workdir)
    with pytest.raises(UserError, match=r"config.augment.gamma was 0.0, now 0.5"):
        (workdir / "sweep.json").write_text(json.dumps(old))
        sweep.sweep(plan(fixed={"augment.gamma": 0.5}), workdir)
    (workdir / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        sweep.sweep(plan(), workdir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(UserError, match="holds a run"):
        sweep.sweep(plan(), tmp_path / "run")


def test_failed_trials(fake_main, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    sets = ["optimizer.learning_rate=0.1,2"]
    saved = sweep.sweep(plan(sets=sets), workdir)
    assert [t["state"] for t in saved["trials"]] == ["complete", "failed"]
    assert saved["trials"][1]["error"] == "the loss is nan: lower optimizer.learning_rate"
    assert "failed: seed 0" in capsys.readouterr().out
    sweep.sweep(plan(sets=sets), workdir)
    assert calls(workdir)[2:] == [saved["trials"][1]["trial"]]  # tried again
    with pytest.raises(UserError, match="every trial failed .*: the loss is nan"):
        sweep.sweep(plan(sets=["optimizer.learning_rate=2,3"]), tmp_path / "other")


def test_halving_stops_the_worse_and_goes_on(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    rates = "optimizer.learning_rate=0.1,0.2,0.3,0.4,0.5"
    fixed = {"train.epochs": 9, "optimizer.weight_decay": 0.25, "train.monitor": "val_accuracy"}

    def halving():
        return plan("halving", [rates], trials=5, fixed=fixed)

    workdir.mkdir()
    (workdir / "die").touch()
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(halving(), workdir)
    saved = sweep.sweep(halving(), workdir)
    names = [t.name for t in halving().trials]
    assert calls(workdir) == [names[0], *names]
    states = [t["state"] for t in saved["trials"]]
    assert states[0] == "complete" and "pruned" in states  # the first has no rival
    best = saved["ranking"][0]
    assert best["settings"] == {"optimizer.learning_rate": 0.5} and best["state"] == "complete"
    pruned = [t for t in saved["trials"] if t["state"] == "pruned"]
    assert all(t["epochs"] < 9 for t in pruned)
    sweep.sweep(halving(), workdir)
    assert len(calls(workdir)) == 6
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = optuna.storages.JournalStorage(JournalFileBackend(str(workdir / "halving.journal")))
    study = optuna.load_study(study_name="sweep", storage=journal)
    assert len(study.trials) == 5  # the interrupted one is no rival of itself
    assert [t.state.name.lower() for t in study.trials] == states


def test_a_failed_trial_that_is_tried_again_is_no_rival_of_itself(fake_main, tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    failing = plan("halving", ["optimizer.learning_rate=0.1,2"], trials=2)
    for _ in range(2):
        sweep.sweep(failing, tmp_path / "sweep")
    journal = JournalFileBackend(str(tmp_path / "sweep" / "halving.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))
    assert sorted(t.state.name for t in study.trials) == ["COMPLETE", "RUNNING"]


def test_halving_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[sweep\]'"):
        sweep.sweep(plan("halving", trials=2), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


# ---- the command --------------------------------------------------------------------------------


def command(*args):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--config=configs/quickstart.py", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("--set=train.label_smooting=0", ["label_smooting", "train.label_smoothing"]),
        pytest.param("--config.train.epoch=3", ["epoch", "epochs"], marks=pytest.mark.slow),
    ],
)
def test_the_command_refuses_in_one_line(bad, words, tmp_path):
    done = command(f"--workdir={tmp_path / 'sweep'}", "--set=model.dropout=0,0.1", bad)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_grid_of_two_real_runs(tmp_path, phantom_dir, cache_dir):
    workdir = tmp_path / "sweep"
    done = command(
        f"--workdir={workdir}",
        "--set=optimizer.learning_rate=1e-3,3e-3",
        f"--config.data.dir={phantom_dir}",
        f"--config.data.cache_dir={cache_dir}",
        "--config.data.image_size=32",
        "--config.model.name=lenet5",
        "--config.train.epochs=2",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((workdir / "sweep.json").read_text())
    for trial in saved["trials"]:
        about = json.loads((workdir / trial["trial"] / "config.json").read_text())["config"]
        rate = trial["settings"]["optimizer.learning_rate"]
        assert about["optimizer"]["learning_rate"] == rate and about["train"]["epochs"] == 2
        assert trial["state"] == "complete" and trial["epochs"] == 2
        records = sweep.read_val(workdir / trial["trial"] / "metrics.jsonl")
        assert trial["val_loss"] == records[trial["best_epoch"] - 1]["loss"]
        # That of the checkpoint which the run keeps as its best, and has scored.
        report = json.loads((workdir / trial["trial"] / "eval/val/report.json").read_text())
        assert trial["val_loss"] == pytest.approx(report["loss"], rel=1e-5)
    assert (workdir / "sweep.png").exists() and (workdir / "sweep.csv").exists()
    done = command(f"--workdir={workdir}", "--set=optimizer.learning_rate=1e-3,1e-2")
    assert done.returncode == 2 and "another sweep" in done.stderr, done.stderr


def test_a_sweep_goes_on_where_its_trials_could(tmp_path):
    """Fewer threads decode; but trials are of one folder, and named by the order of --set."""
    sets = ("train.label_smoothing=0,0.1", "model.dropout=0,0.5")

    def opened(sets, **data):
        fixed = {f"data.{key}": value for key, value in data.items()}
        return sweep._open(plan("grid", sets, fixed), tmp_path)

    assert opened(sets, dir="here", num_threads=8) == {}
    assert opened(sets, dir="here", num_threads=2) == {}
    with pytest.raises(UserError, match=r"another sweep .*data\.dir was 'here', now 'there'"):
        opened(sets, dir="there")
    with pytest.raises(UserError, match=r"in the order train\.label_smoothing, model\.dropout"):
        opened(sets[::-1], dir="here")
    with pytest.raises(UserError, match=r"another sweep .*image_size was 128, now 64"):
        opened(sets, dir="here", image_size=64)


def test_shares_end_at_one():
    mean, interval = sweep.mean_interval([0.95, 0.99], share=True)
    assert mean == pytest.approx(0.97) and interval[1] == 1.0 and 0 < interval[0] < 0.95


def test_half_a_line_of_the_journal_is_cut(tmp_path):
    journal = tmp_path / "halving.journal"
    sweep._cut_half_a_line(journal)  # none yet
    journal.write_bytes(b'{"op_code": 0}\n{"op_co')
    sweep._cut_half_a_line(journal)
    assert journal.read_bytes() == b'{"op_code": 0}\n'
