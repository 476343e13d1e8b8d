"""Where a sweep may go on, and which folder is another's."""

import json

import pytest
from small_sweep import plan

from covid_flax import config as config_lib
from covid_flax.errors import UserError
from covid_flax.sweep.plan import config_of
from covid_flax.sweep.run_all import sweep
from covid_flax.sweep.sweep_folder import open_sweep, refuse_changed


def test_a_configuration_edited_amid_the_sweep_is_told(fake_main, tmp_path):
    """Each trial reads the file anew."""
    made, workdir = plan(), tmp_path / "sweep"
    trial = made.trials[0]
    saved = config_lib.to_json(config_of(made.config, trial))
    (workdir / trial.name).mkdir(parents=True)
    config = workdir / trial.name / "config.json"
    config.write_text(json.dumps({"config": saved | {"data": {**saved["data"], "num_threads": 9}}}))
    refuse_changed(made, trial, workdir)
    saved["optimizer"]["weight_decay"] = 0.3
    config.write_text(json.dumps({"config": saved}))
    with pytest.raises(UserError, match=r"a\.py has changed .*weight_decay was 0\.3, now 0\.0\)"):
        sweep(made, workdir)


def test_another_sweeps_folder_is_refused(fake_main, tmp_path):
    workdir = tmp_path / "sweep"
    sweep(plan(), workdir)
    before = (workdir / "sweep.json").read_bytes()
    with pytest.raises(UserError, match=r"set.optimizer.learning_rate was .* another --workdir"):
        sweep(plan(sets=["optimizer.learning_rate=0.1,0.5"]), workdir)
    with pytest.raises(UserError, match=r"config.train.epochs was 3, now 4"):
        sweep(plan(fixed={"train.epochs": 4}), workdir)
    with pytest.raises(UserError, match=r"seeds was \[0\], now \[0, 1\]"):
        sweep(plan(seeds=["0", "1"]), workdir)
    assert (workdir / "sweep.json").read_bytes() == before
    old = json.loads(before)
    assert old["spec"]["config"].pop("augment.gamma") == 0.0  # a key that came since
    (workdir / "sweep.json").write_text(json.dumps(old))
    sweep(plan(), workdir)
    with pytest.raises(UserError, match=r"config.augment.gamma was 0.0, now 0.5"):
        (workdir / "sweep.json").write_text(json.dumps(old))
        sweep(plan(fixed={"augment.gamma": 0.5}), workdir)
    (workdir / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        sweep(plan(), workdir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(UserError, match="holds a run"):
        sweep(plan(), tmp_path / "run")


def test_a_sweep_goes_on_where_its_trials_could(tmp_path):
    """Fewer threads decode; but trials are of one folder, and named by the order of --set."""
    sets = ("train.label_smoothing=0,0.1", "model.dropout=0,0.5")

    def opened(sets, **data):
        fixed = {f"data.{key}": value for key, value in data.items()}
        return open_sweep(plan("grid", sets, fixed), tmp_path)

    assert opened(sets, dir="here", num_threads=8) == {}
    assert opened(sets, dir="here", num_threads=2) == {}
    with pytest.raises(UserError, match=r"another sweep .*data\.dir was 'here', now 'there'"):
        opened(sets, dir="there")
    with pytest.raises(UserError, match=r"in the order train\.label_smoothing, model\.dropout"):
        opened(sets[::-1], dir="here")
    with pytest.raises(UserError, match=r"another sweep .*image_size was 128, now 64"):
        opened(sets, dir="here", image_size=64)
