"""A sweep's folder: what sweep.json holds, and whether a plan may go on there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covid_flax import config as config_lib
from covid_flax.errors import UserError
from covid_flax.evaluation.intervals import LEVEL
from covid_flax.files import peek, write_json
from covid_flax.run_folder import WITHOUT_EFFECT
from covid_flax.sweep.plan import Plan, Trial, config_of
from covid_flax.sweep.ranking import rank
from ml_collections_configs import base


def open_sweep(plan: Plan, workdir: Path) -> dict[str, dict[str, Any]]:
    """The results that the folder has, by trial; takes the folder, if it is new."""
    path = workdir / "sweep.json"
    if not path.exists():
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir} holds a run: choose another --workdir")
        write_json(path, _document(plan, {}), allow_nan=True)
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        spec, trials = saved["spec"], {t["trial"]: t for t in saved["trials"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged: restore it, or choose another --workdir") from e
    # Keys that came after the sweep was begun had their defaults.
    defaults = {"config": config_lib.to_json(base.get_config())}
    now = json.loads(json.dumps(plan.spec))
    free = {f"config.{key}" for key in WITHOUT_EFFECT}
    changed = {k: v for k, v in config_lib.changes(spec, now, defaults).items() if k not in free}
    if not changed and list(spec["set"]) != list(now["set"]):  # trials are named by that order
        changed = {"set": f"its --set were in the order {', '.join(spec['set'])}"}
    older = len(spec["seeds"]) > 1 and spec["config"].get("data.split_seed") == -1
    if older and list(changed) == ["config.data.split_seed"]:
        raise UserError(
            f"{workdir} holds a sweep of an older kind, in which each seed had its own split, so "
            "that test images chose settings: begin it anew in another --workdir"
        )
    if changed:
        raise UserError(
            f"{workdir} holds another sweep ({'; '.join(changed.values())}): "
            "choose another --workdir"
        )
    # A folder that is gone is trained anew, and what failed is tried again.
    return {
        name: trial
        for name, trial in trials.items()
        if trial["state"] != "failed" and (workdir / name / "metrics.jsonl").exists()
    }


def refuse_changed(plan: Plan, trial: Trial, workdir: Path) -> None:
    """Where a trial trained by a file that was edited since the sweep was begun."""
    saved = peek(workdir / trial.name / "config.json").get("config")
    if not isinstance(saved, dict):
        return
    wanted = config_lib.to_json(config_of(plan.config, trial))
    changed = config_lib.changes(saved, wanted, config_lib.to_json(base.get_config()))
    if said := [line for key, line in changed.items() if key not in WITHOUT_EFFECT]:
        raise UserError(
            f"{plan.config_file} has changed since the sweep was begun ({'; '.join(said)}): "
            f"restore it, and remove {workdir / trial.name}"
        )


def save(plan: Plan, workdir: Path, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    document = _document(plan, results)
    write_json(workdir / "sweep.json", document, allow_nan=True)
    return document


def _document(plan: Plan, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What sweep.json holds."""
    trials = [results[t.name] for t in plan.trials if t.name in results]
    return {
        "config_file": plan.config_file,
        "spec": plan.spec,
        "monitor": plan.monitor,
        "level": LEVEL,
        "planned": len(plan.trials),
        "ranking": rank(trials, plan.monitor),
        "trials": trials,
    }
