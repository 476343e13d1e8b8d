"""Trains and evaluates: `python -m covid_flax.main --config=configs/paper.py`."""

from __future__ import annotations

if __name__ == "__main__":
    from covid_flax.errors import die_of_interrupts
    from covid_flax.host_memory import prepare_allocator

    die_of_interrupts()
    prepare_allocator()

import re
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from covid_flax.command import no_such_config, run_command
from covid_flax.config import check_keys, is_repeated
from covid_flax.console import say
from covid_flax.dry_run import dry_run
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.files import expanded
from covid_flax.members import check_members, train_members
from covid_flax.run import setup
from covid_flax.run_folder import default_workdir
from covid_flax.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, with :variant where it has variants", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; empty: runs/<config>")
_PROFILE = flags.DEFINE_string("profile", "", "trace these steps: FIRST:LAST, to DIR/profile")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "do all but train, and say what a step costs")


def _main() -> None:
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(name.partition(":")[0]).is_file():
        raise UserError(no_such_config(name))
    check_keys(_CONFIG.value, name)
    profiled = _profiled_steps(_PROFILE.value)
    workdir = expanded(_WORKDIR.value) if _WORKDIR.value else default_workdir(name)
    if is_repeated(_CONFIG.value):
        if profiled:
            raise UserError("--profile is for one run: set repeats=1, data.fold=0")
        if _DRY_RUN.value:
            name, member = next(iter(check_members(_CONFIG.value, workdir).items()))
            say(f"the first of the runs, {name}:")
            dry_run(setup(member, workdir / name))
            return
        train_members(_CONFIG.value, workdir)
        say(f"runs: {workdir} (members.json, eval/, and a folder for each)")
        return
    run = setup(_CONFIG.value, workdir)
    if _DRY_RUN.value:
        dry_run(run)
        return
    train(run, profiled)
    evaluate(workdir, data=run.data)
    say(f"run: {workdir} (curves.png, metrics.jsonl, checkpoints/, eval/val/)")


def _profiled_steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile={text}: give the first and the last step, like 10:12")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_command(_main, together=True, resumes=True)
