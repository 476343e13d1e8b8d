"""From the flags to a plan: the settings to try, and every trial with its configuration."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from covid_flax import config as config_lib
from covid_flax.errors import UserError
from covid_flax.sweep.axes import Axis, parse_axis

KINDS = ("grid", "random", "halving")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: its folder's name, its settings, its seed, and its fold of a cross-validation."""

    name: str
    setting: int
    settings: dict[str, Any]
    seed: int
    fold: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The configuration's keys that are the trial's own."""
        fold = {} if self.fold is None else {"data.fold": self.fold}
        return {**self.settings, **fold, "seed": self.seed}


@dataclasses.dataclass
class Plan:
    """All that a sweep does, known before its first trial."""

    config_file: str
    config: ml_collections.ConfigDict
    kind: str
    axes: list[Axis]
    seeds: list[int]
    fixed: dict[str, Any]
    draws: int
    sweep_seed: int
    trials: list[Trial]

    @property
    def spec(self) -> dict[str, Any]:
        """What has to be the same for a sweep to go on."""
        return {
            "sweep": self.kind,
            "set": {axis.key: axis.text for axis in self.axes},
            "seeds": self.seeds,
            "trials": self.draws,
            "sweep_seed": self.sweep_seed,
            "config": config_lib.flatten(config_lib.to_json(self.config)),
        }

    @property
    def monitor(self) -> str:
        return self.config.train.monitor


def parse_seeds(texts: Sequence[str], default: int) -> list[int]:
    """The seeds of --seeds, the configuration's own where none is given. Raises UserError."""
    try:
        seeds = [int(text) for text in texts] or [default]
    except ValueError:
        raise UserError(f"--seeds={','.join(texts)}: give whole numbers, like 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={','.join(texts)}: a seed is there twice: leave one out")
    return seeds


def make_plan(
    config_file: str,
    config: ml_collections.ConfigDict,
    kind: str,
    sets: Sequence[str],
    *,
    seeds: Sequence[str] = (),
    trials: int = 0,
    sweep_seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
) -> Plan:
    """Every trial of the sweep, each one's configuration checked. Raises UserError.

    Args:
      config_file: as given to --config.
      config: of it, with the fixed overrides.
      kind: of `KINDS`.
      sets: as given to --set.
      seeds: as given to --seeds.
      trials: settings to draw (random, halving).
      sweep_seed: of the draws.
      fixed: the overrides, which every trial gets.
    """
    config, fixed = config.copy_and_resolve_references(), dict(fixed or {})
    known = config_lib.flatten(config)
    if kind not in KINDS:
        raise UserError(f"--sweep={kind}: choose one of {', '.join(KINDS)}")
    if not sets:
        raise UserError("nothing to vary: give --set=KEY=VALUE,VALUE once or more")
    axes = [parse_axis(text, known) for text in sets]
    for i, axis in enumerate(axes):
        if axis.key in [other.key for other in axes[:i]]:
            raise UserError(f"--set={axis.key} is there twice: give all its values in one")
        if axis.key in fixed:
            raise UserError(f"{axis.key} is both in --set and in --config.{axis.key}: drop one")
    if seeds and "seed" in fixed:
        raise UserError("give --seeds or --config.seed, not both")
    if kind == "halving" and len(seeds) > 1:
        raise UserError(
            "--sweep=halving takes one seed: repeat its best settings with --sweep=grid --seeds=..."
        )
    found = parse_seeds(seeds, config.seed)
    fixed.pop("seed", None)
    folds: Sequence[int | None] = [None]
    if config_lib.is_cross_validation(config.data):
        if kind == "halving":
            raise UserError("--sweep=halving takes one fold: give --config.data.fold=0, or another")
        if len(found) > 1:
            raise UserError("--seeds and data.folds: give one, or --config.data.fold")
        folds = range(config.data.folds)
    if len(found) > 1 and config.data.split_seed < 0:
        # Else one trial's test images would choose the setting in the others.
        config.data.split_seed = fixed["data.split_seed"] = found[0]
    settings = _settings(kind, axes, trials, sweep_seed)
    all_trials = [
        Trial(_name(i, s, seed, fold), i, s, seed, fold)
        for i, s in enumerate(settings)
        for seed in found
        for fold in folds
    ]
    for trial in all_trials:
        of_trial = config_of(config, trial)
        config_lib.check(of_trial)
        if config_lib.is_repeated(of_trial):
            raise UserError("a trial is one run: give --seeds=0,1,... in place of config.repeats")
    return Plan(config_file, config, kind, axes, found, fixed, trials, sweep_seed, all_trials)


def _settings(kind: str, axes: Sequence[Axis], trials: int, seed: int) -> list[dict[str, Any]]:
    """The combinations to try."""
    ranges = [axis for axis in axes if axis.scale]
    if kind == "grid":
        if ranges:
            raise UserError(
                f"--set={ranges[0].key}={ranges[0].text}: a grid takes lists of values: "
                "give those, or --sweep=random"
            )
        if trials:
            raise UserError("--trials is for --sweep=random and halving: a grid takes all")
        product = itertools.product(*(axis.values for axis in axes))
        return [dict(zip([a.key for a in axes], values, strict=True)) for values in product]
    if trials < 1:
        raise UserError(f"--sweep={kind}: give --trials, how many settings to draw")
    rng = np.random.default_rng(seed)
    if not ranges:
        grid = _settings("grid", axes, 0, seed)
        if trials > len(grid):
            raise UserError(
                f"--trials={trials}: there are {len(grid)} combinations: give at most that many"
            )
        return [grid[i] for i in rng.permutation(len(grid))[:trials]]
    drawn: list[dict[str, Any]] = []
    for _ in range(1000 * trials):
        setting = {axis.key: axis.draw(rng) for axis in axes}
        if setting not in drawn:
            drawn.append(setting)
        if len(drawn) == trials:
            return drawn
    raise UserError(f"--trials={trials}: the ranges hold only {len(drawn)}: give fewer")


def _name(number: int, settings: Mapping[str, Any], seed: int, fold: int | None) -> str:
    """A folder's name: the number, for itself; the settings, for the reader."""
    text = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
    text = re.sub(r"[^\w.=+-]+", "_", text)[:120]
    return f"{number:03}-{text}-seed={seed}" + (f"-fold={fold}" if fold is not None else "")


def config_of(config: ml_collections.ConfigDict, trial: Trial) -> ml_collections.ConfigDict:
    """The configuration that the trial trains."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(trial.values)
    return changed
