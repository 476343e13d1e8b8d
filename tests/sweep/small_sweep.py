"""Plans of a few trials, and which of these the stand-in was called for."""

from covid_flax.sweep.plan import make_plan
from ml_collections_configs import base

FOLDS = {"data.split": "grouped", "data.folds": 4}


def plan(kind="grid", sets=("optimizer.learning_rate=0.1,0.5,0.2",), fixed=None, **options):
    config, fixed = base.get_config(), {"train.epochs": 3, **(fixed or {})}
    config.update_from_flattened_dict(fixed)
    return make_plan("a.py", config, kind, list(sets), fixed=fixed, **options)


def calls(workdir):
    path = workdir / "calls"
    return path.read_text().splitlines() if path.exists() else []
