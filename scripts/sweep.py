"""Trains many settings of one configuration and ranks them by their validation figure.

    python scripts/sweep.py --config=configs/FILE.py[:variant] --workdir=DIR --sweep=grid
        --set=optimizer.learning_rate=1e-4,3e-4,1e-3 --set=train.label_smoothing=0,0.1
        [--seeds=0,1,2] [--config.data.folds=5] [--config.<key>=<value> ...]
    python scripts/sweep.py ... --sweep=random --trials=20
        --set='optimizer.learning_rate=log(1e-5,1e-3)' --set='model.dropout=uniform(0,0.6)'
    python scripts/sweep.py ... --sweep=halving --trials=20 --set=...

A trial is one run of `python -m covid_flax.main`, in DIR/<trial>, judged by the best value of
the configuration's `train.monitor`. `grid` takes every combination, `random` draws them, and
`halving` draws them too and stops those early that are behind the best third at the same epoch
(Optuna's asynchronous successive halving: `pip install -e '.[sweep]'`). A setting is trained with
each seed of --seeds, or on each fold of `data.folds`, and ranked by its mean. Seeds share one split
(that of the first, where `data.split_seed` names none), so that no trial learns from another's test
images. The same command goes on where an interrupted one was. Writes DIR/sweep.json, sweep.csv and
sweep.png; what the trials print is in DIR/logs/. A trial's `seconds` are those since it was last
begun or gone on with.
"""

from __future__ import annotations

import signal
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from covid_flax import config as config_lib
from covid_flax.command import no_such_config, run_command
from covid_flax.errors import UserError
from covid_flax.files import expanded
from covid_flax.sweep.plan import KINDS, make_plan
from covid_flax.sweep.run_all import sweep


def _main() -> None:
    given = flags.FLAGS
    name = config_flags.get_config_filename(given["config"])
    if not Path(name.partition(":")[0]).is_file():
        raise UserError(no_such_config(name))
    if not given.workdir:
        raise UserError("give --workdir=DIR, a folder for the sweep")
    config_lib.check_keys(given.config, name)
    plan = make_plan(
        name,
        given.config,
        given.sweep,
        given.set,
        seeds=given.seeds,
        trials=given.trials,
        sweep_seed=given.sweep_seed,
        fixed=config_flags.get_override_values(given["config"]),
    )
    sweep(plan, expanded(given.workdir))


def _define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "a file of configs/, with :variant where it has variants", lock_config=True
    )
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("workdir", "", "the sweep's folder")
    flags.DEFINE_string("sweep", "grid", f"which settings: {', '.join(KINDS)}")
    flags.DEFINE_multi_string("set", [], "KEY=V1,V2,... or KEY=log(A,B) or KEY=uniform(A,B)")
    flags.DEFINE_list(
        "seeds", [], "each setting is trained with each, all on one split; default: the config's"
    )
    flags.DEFINE_integer("trials", 0, "settings to draw (random, halving)")
    flags.DEFINE_integer("sweep_seed", 0, "of the draws", lower_bound=0)


if __name__ == "__main__":
    # The accelerator is the trials'.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _define_flags()
    run_command(_main)
