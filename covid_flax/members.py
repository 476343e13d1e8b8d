"""One configuration trained several times: on every fold, or with several seeds.

Each member is a run in a folder of its own below the whole's. The whole is a run too: scored, its
answers are the mean of its members'; its validation images, in a cross-validation, are all
that are not test, each scored by the member that held it out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from covid_flax import config as config_lib
from covid_flax import distributed
from covid_flax.checkpoint import has_checkpoints
from covid_flax.console import say
from covid_flax.data.dataset import check_splits
from covid_flax.data.splits import Row, read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.evaluation.members import FIGURES
from covid_flax.files import expanded, write_json
from covid_flax.run import setup
from covid_flax.run_folder import (
    has_figures,
    learned_of,
    read_run,
    refuse_another_split,
    refuse_changes,
    refuse_foreign_files,
    saved_run,
)
from covid_flax.train import train


def member_configs(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configurations of the runs, by the names of their folders.

    All of a cross-validation's folds have one seed; runs of several seeds have one split, that
    of the first seed.
    """
    folds = range(config.data.folds) if config_lib.is_cross_validation(config.data) else (None,)
    members = {}
    for seed in range(config.seed, config.seed + config.repeats):
        for fold in folds:
            member = config.copy_and_resolve_references()
            member.repeats = 1
            member.seed = seed
            if config.data.split_seed < 0:
                member.data.split_seed = config.seed
            name = [f"seed{seed}"] if config.repeats > 1 else []
            if fold is not None:
                member.data.fold = fold
                name.append(f"fold{fold}")
            members["-".join(name)] = member
    return members


def check_members(
    config: ml_collections.ConfigDict, workdir: Path
) -> dict[str, ml_collections.ConfigDict]:
    """`member_configs`, if the runs can be made in that folder. Raises UserError."""
    config_lib.check(config)
    if config.repeats > 1 and config_lib.is_cross_validation(config.data):
        raise UserError("repeats and data.folds: set one, or data.fold to one of the folds")
    if config.train.teacher and config_lib.is_cross_validation(config.data):
        raise UserError(
            "train.teacher and data.folds: whatever taught one fold has learned from what another "
            "holds out: train each fold by itself (data.fold=0, ...), with a teacher of that fold"
        )
    if has_checkpoints(workdir / "checkpoints"):
        raise UserError(f"{workdir} holds a single run: choose another --workdir")
    saved = read_run(workdir)
    if saved is not None and ("members" in saved or has_figures(workdir)):  # else a dry run's
        refuse_changes(saved["config"], config_lib.to_json(config), workdir)
    if saved is None:
        refuse_foreign_files(workdir)
    configs = member_configs(config)
    for member in configs.values():
        config_lib.check(member)
    _refuse_seen(config, check_splits([m.data for m in configs.values()], config.seed))
    return configs


def train_members(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains what is not trained yet, scores each and the whole, and writes `members.json`.

    Returns:
      What members.json holds: `members`, by name the figures of each on its own validation
      images (and test images, where there are any); `mean`, of each figure with its interval;
      `whole`, those of the runs together. Empty in other processes than the first. Raises
      UserError.
    """
    configs = check_members(config, workdir)
    reports: dict[str, dict[str, Any]] = {}
    data = None
    for number, (name, member) in enumerate(configs.items(), 1):
        say(f"run {number} of {len(configs)}: {name}")
        run = setup(member, workdir / name)
        rows = _of_whole(config, run.data.rows)
        if data is None:
            refuse_another_split(workdir, rows)
            data = run.data
        elif rows != _of_whole(config, data.rows):
            raise UserError(
                f"{workdir / name} parts the images otherwise than the first run: restore the "
                "data and the csv of their groups or split"
            )
        train(run)
        reports[name] = {"val": evaluate(workdir / name, data=run.data)}
        if run.data.files("test"):
            reports[name]["test"] = evaluate(workdir / name, split="test", data=run.data)
        # Its programs, some 20 MB, serve no other member; those find theirs on the disk.
        jax.clear_caches()
    if has_checkpoints(workdir / "checkpoints") or has_figures(workdir):
        raise UserError(f"{workdir} has become another run's meanwhile: train in another --workdir")
    if jax.process_index() == 0:
        _write_whole(config, workdir, list(configs))
    distributed.barrier("members")
    assert data is not None
    data = dataclasses.replace(data, rows=read_split_csv(workdir / "split.csv"))
    splits = list(next(iter(reports.values())))
    whole = {split: evaluate(workdir, split=split, data=data) for split in splits}
    if jax.process_index() != 0:
        return {}
    summary = {
        "members": {name: _figures(of) for name, of in reports.items()},
        "mean": {split: report["members"]["mean"] for split, report in whole.items()},
        "whole": _figures(whole),
    }
    write_json(workdir / "members.json", summary, allow_nan=True)
    _print(summary)
    return summary


def _refuse_seen(config: ml_collections.ConfigDict, rows: Sequence[Row]) -> None:
    """Where folds begin with a run that has learned from what one holds out. Raises UserError."""
    folder = expanded(config.model.weights)
    if config_lib.is_cross_validation(config.data) and folder.is_dir():
        files, class_names = [row.file for row in rows], {row.label for row in rows}
        if seen := learned_of(folder, files, class_names):
            raise UserError(
                f"model.weights={folder} has learned from {seen:,} of these images, and each is "
                "held out by a fold: begin with a run of other images, or train each fold by "
                "itself (data.fold=0, ...), with a run of that fold"
            )


def _figures(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {split: {f: report[f] for f in FIGURES} for split, report in reports.items()}


def _of_whole(config: ml_collections.ConfigDict, rows: Sequence[Row]) -> list[Row]:
    """Of all runs together, from one's: all that is not test is val in a fold."""
    if not config_lib.is_cross_validation(config.data):
        return list(rows)
    return [row if row.split == "test" else dataclasses.replace(row, split="val") for row in rows]


def _write_whole(config: ml_collections.ConfigDict, workdir: Path, names: Sequence[str]) -> None:
    """The files that make the folder a run, from its first member's."""
    first = saved_run(workdir / names[0])
    rows = read_split_csv(workdir / names[0] / "split.csv")
    write_split_csv(workdir / "split.csv", _of_whole(config, rows))
    about = first | {"config": config_lib.to_json(config), "members": list(names)}
    if config_lib.is_cross_validation(config.data):
        images = dict(first["data"]["images"])
        parts = [images.pop("train"), images.pop("val")]
        images["val"] = {name: sum(part[name] for part in parts) for name in parts[0]}
        about["data"] = first["data"] | {"images": images}
    write_json(workdir / "config.json", about, allow_nan=True)


def _print(summary: Mapping[str, Any]) -> None:
    say("")
    for split, figures in summary["mean"].items():
        accuracy = figures["accuracy"]
        low, high = accuracy["interval"]
        over_runs = (
            f"95 % interval of the mean {low:.4f} to {high:.4f}" if high > low else "all alike"
        )
        say(
            f"{split}: {accuracy['runs']} runs, accuracy {accuracy['mean']:.4f} "
            f"({over_runs}); together {summary['whole'][split]['accuracy']:.4f}"
        )
