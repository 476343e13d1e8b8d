"""Judge: the study that Optuna reads back."""

import sys

import pytest
from small_sweep import calls, plan

from covid_flax.errors import UserError
from covid_flax.sweep.halving import Halving, _cut_half_a_line
from covid_flax.sweep.run_all import sweep


@pytest.mark.parametrize(
    ("monitor", "direction"), [("val_loss", "MINIMIZE"), ("val_accuracy", "MAXIMIZE")]
)
def test_halving_keeps_the_good_end_of_the_figure(tmp_path, monitor, direction):
    halving = Halving(plan("halving", trials=2, fixed={"train.monitor": monitor}), tmp_path)
    halving.open()
    assert halving._study.direction.name == direction


def test_halving_stops_the_worse_and_goes_on(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    rates = "optimizer.learning_rate=0.1,0.2,0.3,0.4,0.5"
    fixed = {"train.epochs": 9, "optimizer.weight_decay": 0.25, "train.monitor": "val_accuracy"}

    def halving():
        return plan("halving", [rates], trials=5, fixed=fixed)

    workdir.mkdir()
    (workdir / "die").touch()
    with pytest.raises(KeyboardInterrupt):
        sweep(halving(), workdir)
    saved = sweep(halving(), workdir)
    names = [t.name for t in halving().trials]
    assert calls(workdir) == [names[0], *names]
    states = [t["state"] for t in saved["trials"]]
    assert states[0] == "complete" and "pruned" in states  # the first has no rival
    best = saved["ranking"][0]
    assert best["settings"] == {"optimizer.learning_rate": 0.5} and best["state"] == "complete"
    pruned = [t for t in saved["trials"] if t["state"] == "pruned"]
    assert all(t["epochs"] < 9 for t in pruned)
    sweep(halving(), workdir)
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
        sweep(failing, tmp_path / "sweep")
    journal = JournalFileBackend(str(tmp_path / "sweep" / "halving.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))
    assert sorted(t.state.name for t in study.trials) == ["COMPLETE", "RUNNING"]


def test_halving_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[sweep\]'"):
        sweep(plan("halving", trials=2), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_half_a_line_of_the_journal_is_cut(tmp_path):
    journal = tmp_path / "halving.journal"
    _cut_half_a_line(journal)  # none yet
    journal.write_bytes(b'{"op_code": 0}\n{"op_co')
    _cut_half_a_line(journal)
    assert journal.read_bytes() == b'{"op_code": 0}\n'
