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

import ast
import csv
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from covid_flax import config as config_lib
from covid_flax.command import no_such_config, run_command
from covid_flax.console import duration, say
from covid_flax.data.folder import refuse_inside
from covid_flax.early_stopping import EarlyStopping
from covid_flax.errors import UserError
from covid_flax.evaluation import members
from covid_flax.evaluation.intervals import LEVEL
from covid_flax.files import expanded, peek, write_atomically, write_json
from covid_flax.run_folder import WITHOUT_EFFECT, only_trainer
from ml_collections_configs import base

KINDS = ("grid", "random", "halving")
MAIN = (sys.executable, "-m", "covid_flax.main")
ROOT = Path(__file__).resolve().parents[1]
_RANGE = re.compile(r"(log|uniform)\(([^,()]+),([^,()]+)\)")
# Keys by which other images are held out.
_IMAGES = tuple(
    f"data.{key}"
    for key in (
        "dir",
        "phantoms_per_class",
        "split",
        "split_file",
        "split_seed",
        "val_fraction",
        "test_fraction",
        "nested_test",
        "groups_file",
        "group_column",
    )
)
_POLL_SECONDS = 0.5
_REDUCTION = 3  # of successive halving: one trial in so many goes on from a rung
_PLOTTED = 40  # settings in sweep.png, at most


@dataclasses.dataclass(frozen=True)
class Axis:
    """What one key may be: a list of values, or a range to draw from.

    Attributes:
      key: of the configuration, without `config.`.
      text: what the user gave.
      values: of the list; empty for a range.
      scale: `log` or `uniform` of a range, else empty.
      low, high: of the range.
      whole: whether the key takes whole numbers.
    """

    key: str
    text: str
    values: tuple[Any, ...] = ()
    scale: str = ""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def draw(self, rng: np.random.Generator) -> Any:
        """One value: of the list, or of the range."""
        if not self.scale:
            return self.values[int(rng.integers(len(self.values)))]
        if self.scale == "uniform":
            value = float(rng.uniform(self.low, self.high))
        else:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        if self.whole:
            return round(value)
        # Four digits are what a reader wants, and what the folder's name shows.
        return min(max(float(f"{value:.4g}"), self.low), self.high)


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


# ---- from the flags to a plan -------------------------------------------------------------------


def parse_axis(text: str, known: Mapping[str, Any]) -> Axis:
    """`KEY=V1,V2,...`, `KEY=log(A,B)` or `KEY=uniform(A,B)`. Raises UserError.

    Args:
      text: as given to --set.
      known: the configuration's keys and values, flat.
    """
    key, equals, given = text.partition("=")
    key, given = key.strip().removeprefix("config."), given.strip()
    if not equals or not given:
        raise UserError(f"--set={text}: give a key and its values, like train.label_smoothing=0,.1")
    if key not in known:
        raise UserError(f"unknown config key {key!r}: the nearest known one is {_near(key, known)}")
    if key == "seed":
        raise UserError("--set=seed: give the seeds as --seeds=0,1,2")
    if key in ("data.folds", "data.fold"):
        raise UserError(
            f"--set={key}: give --config.data.folds=N: a setting is trained on each fold"
        )
    if key in _IMAGES:
        raise UserError(f"--set={key}: trials would be judged by other images: set --config.{key}")
    if key == "train.monitor":
        raise UserError("--set=train.monitor: trials are judged by it: set --config.train.monitor")
    like = known[key]
    match = _RANGE.fullmatch(given.replace(" ", ""))
    if match is None and re.match(r"\w+\(", given):
        raise UserError(f"--set={text}: a range is log(LOW,HIGH) or uniform(LOW,HIGH)")
    if match is None:
        values = tuple(_value(key, part, like) for part in _split(given))
        for i, value in enumerate(values):
            if value in values[:i]:
                raise UserError(f"--set={text}: {value!r} is there twice: leave one out")
        return Axis(key, given, values)
    if isinstance(like, bool) or not isinstance(like, int | float):
        raise UserError(f"--set={text}: {key} is no number: give its values, with commas")
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError:
        raise UserError(f"--set={text}: the ends of a range are numbers") from None
    least = 0.0 if match[1] == "log" else -math.inf
    if not (least < low < high < math.inf):
        above = ", the low one above 0" if match[1] == "log" else ""
        raise UserError(f"--set={text}: give the low end, then the high one{above}")
    return Axis(key, given, (), match[1], low, high, isinstance(like, int))


def _near(key: str, known: Mapping[str, Any]) -> str:
    """The known key most like this one, by its whole name or by its last part."""
    last = key.rpartition(".")[2]
    named = {name.rpartition(".")[2]: name for name in known}

    def alike(name: str) -> float:
        parts = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return difflib.SequenceMatcher(None, key, name).ratio() + parts

    return named[last] if last in named else max(known, key=alike)


def _split(text: str) -> list[str]:
    """At the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (not quote) * ((c in "([") - (c in ")]"))
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _value(key: str, text: str, like: Any) -> Any:
    """The text as a value of the type that the key has."""
    if text == "" and not isinstance(like, str):
        raise UserError(f"--set={key}: an empty value: see its commas")
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(like, int):
            return int(text)
        if isinstance(like, float):
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        if isinstance(like, tuple):
            value = ast.literal_eval(text)
            return value if isinstance(value, tuple) else (value,)
    except (ValueError, KeyError, SyntaxError):
        kinds = {bool: "True or False", int: "a whole number", float: "a number"}
        kind = kinds.get(type(like), "a tuple, like ('conv5',)")
        raise UserError(f"--set={key}: {text!r} is not {kind}") from None
    return text.strip("'\"")


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
        of_trial = _config_of(config, trial)
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


def _config_of(config: ml_collections.ConfigDict, trial: Trial) -> ml_collections.ConfigDict:
    """The configuration that the trial trains."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(trial.values)
    return changed


# ---- one trial ----------------------------------------------------------------------------------


def command_of(plan: Plan, trial: Trial, workdir: Path) -> list[str]:
    """The command line of a trial."""
    values = {**plan.fixed, **trial.values}
    return [
        *MAIN,
        f"--config={plan.config_file}",
        f"--workdir={workdir / trial.name}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def read_val(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The validation records, epoch by epoch; a line under way is left out."""
    try:
        lines = metrics_jsonl.read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"{metrics_jsonl} is damaged ({e}): remove its folder") from e
    return [record for record in records if record["split"] == "val"]


def best_of(
    records: Sequence[Mapping[str, Any]], monitor: str, min_delta: float = 0.0
) -> dict[str, Any] | None:
    """The epoch that the run keeps as its best; None without one whose figure is finite."""
    figure = monitor.removeprefix("val_")
    finite = [r for r in records if math.isfinite(r[figure])]
    if not finite:
        return None
    stopping = EarlyStopping(mode="min" if monitor == "val_loss" else "max", min_delta=min_delta)
    best = [record for record in finite if stopping.update(record[figure])][-1]
    return {
        "val_accuracy": best["accuracy"],
        "val_loss": best["loss"],
        "best_epoch": best["epoch"],
        "epochs": records[-1]["epoch"],
    }


def run_trial(
    command: Sequence[str],
    log: Path,
    metrics_jsonl: Path,
    on_epoch: Callable[[list[dict[str, Any]]], bool],
) -> tuple[str, str]:
    """Runs a trial to its end. Returns its state, and what it said if that is `failed`.

    Args:
      command: of the trial.
      log: file to which its output is appended.
      metrics_jsonl: that it writes.
      on_epoch: given the validation records when one has come; true stops the trial.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
        )
        seen = len(read_val(metrics_jsonl))
        try:
            while process.poll() is None:
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
                records = read_val(metrics_jsonl)
                if len(records) > seen and process.poll() is None and on_epoch(records):
                    return "pruned", ""
                seen = len(records)
        finally:
            _stop(process)
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if process.returncode == 0:
        return "complete", ""
    said = log.read_bytes()[start:].decode(errors="replace").splitlines()
    said = [line.strip() for line in said if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if process.returncode < 0 and not errors:
        return "failed", f"ended by signal {-process.returncode} (9 where memory ran out)"
    return "failed", (errors or said or [f"exit status {process.returncode}"])[-1]


def _cut_half_a_line(journal: Path) -> None:
    """What a full disk left of a line would spoil the next one, which Optuna writes behind it."""
    if journal.exists():
        with open(journal, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _stop(process: subprocess.Popen) -> None:
    """Ends the trial's process, where it has not ended; its checkpoints stay whole."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---- the sweep ----------------------------------------------------------------------------------


def sweep(plan: Plan, workdir: Path) -> dict[str, Any]:
    """Runs what is left of the plan; returns, and writes, what sweep.json holds.

    Raises:
      UserError: the folder is another sweep's, or no trial came to an end.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: give a folder as --workdir")
    if plan.config.data.dir:
        refuse_inside(workdir, plan.config.data.dir, "--workdir")
    halving = _Halving(plan, workdir) if plan.kind == "halving" else None
    results = _open(plan, workdir)
    with only_trainer(workdir):
        if halving is not None:
            halving.open()
        _run_all(plan, workdir, results, halving)
    saved = _save(plan, workdir, results)
    if all(result["state"] == "failed" for result in results.values()):
        error = next(iter(results.values()))["error"]
        raise UserError(f"every trial failed ({workdir}/logs has all): {error}")
    _write(plan, workdir, saved)
    return saved


def _open(plan: Plan, workdir: Path) -> dict[str, dict[str, Any]]:
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


def _run_all(
    plan: Plan, workdir: Path, results: dict[str, dict[str, Any]], halving: _Halving | None
) -> None:
    """Runs each trial that has no result yet, and adds its result."""
    total = len(plan.trials)
    left = [trial for trial in plan.trials if trial.name not in results]
    before = f", {total - len(left)} of them done before" if len(left) < total else ""
    say(f"sweep: {total} trials{before}, judged by {plan.monitor}; {workdir}")
    seconds = [r["seconds"] for r in results.values()]
    for done, trial in enumerate(left):
        number, started = plan.trials.index(trial) + 1, time.monotonic()
        metrics = workdir / trial.name / "metrics.jsonl"
        head = f"trial {number}/{total} {trial.name}"
        say(head)
        train = _config_of(plan.config, trial).train
        progress = _Progress(
            head=head,
            epochs=train.epochs,
            already=len(read_val(metrics)),
            started=started,
            waiting=len(left) - done - 1,
            usual=statistics.mean(seconds) if seconds else None,
            judge=halving.judge(trial) if halving is not None else None,
        )
        log = workdir / "logs" / f"{trial.name}.log"
        state, error = run_trial(command_of(plan, trial, workdir), log, metrics, progress.tell)
        _refuse_changed(plan, trial, workdir)
        records = read_val(metrics)
        best = best_of(records, plan.monitor, train.min_delta)
        if state != "failed" and best is None:
            state, error = "failed", f"{metrics}: no finite {plan.monitor}"
        passed = time.monotonic() - started
        if halving is not None:
            halving.tell(trial, state, records)
        results[trial.name] = {
            "trial": trial.name,
            "setting": trial.setting,
            "seed": trial.seed,
            **({} if trial.fold is None else {"fold": trial.fold}),
            "settings": trial.settings,
            "state": state,
            **(best or {}),
            "seconds": round(passed, 2),
            "error": error,
        }
        if state != "failed":
            seconds.append(passed)
        _save(plan, workdir, results)
        verdict = f"failed: {error}" if best is None or state == "failed" else ""
        if not verdict and best is not None:
            verdict = f"{state} | best {plan.monitor} {best[plan.monitor]:.4f}, epoch "
            verdict += f"{best['best_epoch']}"
        say(f"{head} | {verdict} | {duration(passed)}")


def _refuse_changed(plan: Plan, trial: Trial, workdir: Path) -> None:
    """Where a trial trained by a file that was edited since the sweep was begun."""
    saved = peek(workdir / trial.name / "config.json").get("config")
    if not isinstance(saved, dict):
        return
    wanted = config_lib.to_json(_config_of(plan.config, trial))
    changed = config_lib.changes(saved, wanted, config_lib.to_json(base.get_config()))
    if said := [line for key, line in changed.items() if key not in WITHOUT_EFFECT]:
        raise UserError(
            f"{plan.config_file} has changed since the sweep was begun ({'; '.join(said)}): "
            f"restore it, and remove {workdir / trial.name}"
        )


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a trial under way says after each epoch.

    Attributes:
      head: its number and name.
      epochs: that it trains at most.
      already: validation records that it had when it was started.
      started: when, by the monotonic clock.
      waiting: trials that come after it.
      usual: seconds that one of those before took, None for the first.
      judge: given the records, whether to stop it; None never does.
    """

    head: str
    epochs: int
    already: int
    started: float
    waiting: int
    usual: float | None
    judge: Callable[[list[dict[str, Any]]], bool] | None

    def tell(self, records: list[dict[str, Any]]) -> bool:
        """Says it; true stops the trial. One that has trained to the end is never stopped."""
        last, passed = records[-1], time.monotonic() - self.started
        rest = max(0, self.epochs - last["epoch"]) * passed / max(1, len(records) - self.already)
        usual = passed + rest if self.usual is None else self.usual
        say(
            f"{self.head} | epoch {last['epoch']}/{self.epochs} | val loss {last['loss']:.4f} "
            f"accuracy {last['accuracy']:.4f} | trial left {duration(rest)} at most | sweep left "
            f"about {duration(rest + self.waiting * usual)}"
        )
        return self.judge is not None and last["epoch"] < self.epochs and self.judge(records)


class _Halving:
    """Optuna's successive halving, kept in DIR/halving.journal: which trials are worth going on.

    It is asynchronous (Li et al. 2020): a trial that reaches a rung goes on if it is among the
    best third of those that reached it so far, so the first trials run longer than they would
    if all waited for each other.
    """

    def __init__(self, plan: Plan, workdir: Path):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "--sweep=halving needs Optuna: pip install -e '.[sweep]', or take --sweep=random"
            ) from None
        self._optuna, self._plan, self._workdir = optuna, plan, workdir
        self._trials: dict[str, Any] = {}

    def open(self) -> None:
        """The folder's study, begun or gone on with."""
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna, plan = self._optuna, self._plan
        journal = self._workdir / "halving.journal"
        _cut_half_a_line(journal)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = max(1, plan.config.train.epochs // _REDUCTION**2)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            load_if_exists=True,
            direction="minimize" if plan.monitor == "val_loss" else "maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=_REDUCTION
            ),
        )
        for old in self._study.get_trials(deepcopy=False):
            if old.state == optuna.trial.TrialState.RUNNING and "trial" in old.user_attrs:
                # Interrupted, or failed: it goes on as what it was, not as its own rival.
                name = old.user_attrs["trial"]
                self._trials[name] = optuna.trial.Trial(self._study, old._trial_id)

    def _trial(self, trial: Trial) -> Any:
        if trial.name not in self._trials:
            self._trials[trial.name] = self._study.ask()
            self._trials[trial.name].set_user_attr("trial", trial.name)
            self._trials[trial.name].set_user_attr("settings", trial.settings)
        return self._trials[trial.name]

    def _best(self, trial: Trial, records: list[dict[str, Any]]) -> dict[str, Any] | None:
        min_delta = trial.settings.get("train.min_delta", self._plan.config.train.min_delta)
        return best_of(records, self._plan.monitor, min_delta)

    def judge(self, trial: Trial) -> Callable[[list[dict[str, Any]]], bool]:
        """Of the trial: whether its records so far say to stop it."""
        of = self._trial(trial)
        reported = set(self._study.get_trials(deepcopy=False)[of.number].intermediate_values)

        def stops(records: list[dict[str, Any]]) -> bool:
            for i, record in enumerate(records):
                best = self._best(trial, records[: i + 1])
                if record["epoch"] in reported or best is None:
                    continue
                reported.add(record["epoch"])
                of.report(best[self._plan.monitor], record["epoch"])
                if of.should_prune():
                    return True
            return False

        return stops

    def tell(self, trial: Trial, state: str, records: list[dict[str, Any]]) -> None:
        """Ends the trial in the study. One that failed stays open there until it is tried again."""
        states, of = self._optuna.trial.TrialState, self._trial(trial)
        best = self._best(trial, records)
        if state == "complete" and best is not None:
            self.judge(trial)(records)  # the epochs since it was last looked at
            self._study.tell(of, best[self._plan.monitor], states.COMPLETE)
        elif state == "pruned":
            self._study.tell(of, state=states.PRUNED)
        del self._trials[trial.name]


# ---- what it writes -----------------------------------------------------------------------------


def mean_interval(
    values: Sequence[float], *, share: bool = False
) -> tuple[float, list[float] | None]:
    """The mean and its 95 % t-interval; None for that where the values have no spread.

    That of a `share` ends at 0 and 1.
    """
    if len(set(values)) < 2:
        return statistics.fmean(values), None
    found = members.mean_interval(values, share=share)
    return found["mean"], found["interval"]


def _repeated_by(rows: Iterable[Mapping[str, Any]]) -> str:
    """What tells the runs of a setting apart: "fold" or "seed", of trials or of a ranking."""
    return "fold" if any("fold" in row or "folds" in row for row in rows) else "seed"


def rank(trials: Sequence[Mapping[str, Any]], monitor: str) -> list[dict[str, Any]]:
    """The settings, best mean first; those with a failed or stopped trial after all others.

    A mean without the runs that failed would favour the setting that fails. Of a cross-validation
    a setting's runs are its folds, which share training images: their interval is too narrow.
    """
    ranked = []
    groups = itertools.groupby(sorted(trials, key=lambda t: t["setting"]), lambda t: t["setting"])
    for setting, group in groups:
        of_setting = list(group)
        kind = _repeated_by(of_setting)
        values = [m[monitor] for m in of_setting if m["state"] != "failed"]
        share = monitor == "val_accuracy"
        mean, interval = mean_interval(values, share=share) if values else (None, None)
        states = [m["state"] for m in of_setting]
        state = next((s for s in ("failed", "pruned") if s in states), "complete")
        ranked.append(
            {
                "setting": setting,
                "settings": of_setting[0]["settings"],
                "state": state,
                f"{kind}s": [m[kind] for m in of_setting if m["state"] != "failed"],
                f"failed_{kind}s": [m[kind] for m in of_setting if m["state"] == "failed"],
                "values": values,
                "mean": mean,
                "interval": interval,
            }
        )
    sign = 1 if monitor == "val_loss" else -1
    order = ("complete", "pruned", "failed")
    return sorted(
        ranked,
        key=lambda r: (
            order.index(r["state"]),
            math.inf if r["mean"] is None else sign * r["mean"],
        ),
    )


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


def _save(plan: Plan, workdir: Path, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    document = _document(plan, results)
    write_json(workdir / "sweep.json", document, allow_nan=True)
    return document


def _write(plan: Plan, workdir: Path, saved: Mapping[str, Any]) -> None:
    """sweep.csv, sweep.png, and the table on the console."""
    keys = [axis.key for axis in plan.axes]
    write_atomically(workdir / "sweep.csv", _csv(saved["trials"], keys))
    write_atomically(workdir / "sweep.png", _png(saved["ranking"], plan.monitor))
    for line in table(saved["ranking"], keys, plan.monitor):
        say(line)
    if len(saved["ranking"]) > 1:
        say(
            "note: the best of many on the validation images is partly luck: its figure is too "
            "good; score images that chose nothing, once: --split=test (data.test_fraction of "
            "grouped splits, data.nested_test of the paper's, or data.split_file)"
        )
    say(f"sweep: {workdir} (sweep.csv, sweep.json, sweep.png, logs/)")


def _csv(trials: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> bytes:
    """One row a trial; its settings by their keys."""
    figures = ["val_accuracy", "val_loss", "best_epoch", "epochs", "seconds", "error"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fold = ["fold"] if _repeated_by(trials) == "fold" else []
    writer.writerow(["trial", "seed", *fold, *keys, "state", *figures])
    for t in trials:
        settings = [t["settings"][key] for key in keys]
        cells = [t.get(figure, "") for figure in figures]
        of_fold = [t[key] for key in fold]
        writer.writerow([t["trial"], t["seed"], *of_fold, *settings, t["state"], *cells])
    return text.getvalue().encode()


def table(ranking: Sequence[Mapping[str, Any]], keys: Sequence[str], monitor: str) -> list[str]:
    """The console's lines, best first."""
    kind = _repeated_by(ranking)
    rows = [["", *keys, monitor, "95 % interval", f"{kind}s", ""]]
    for place, r in enumerate(ranking, 1):
        low_high = "-" if r["interval"] is None else "{:.4f} to {:.4f}".format(*r["interval"])
        remark = "" if r["state"] == "complete" else r["state"]
        if failed := r[f"failed_{kind}s"]:
            remark += f": {kind} {', '.join(map(str, failed))}"
        mean = "-" if r["mean"] is None else f"{r['mean']:.4f}"
        settings = [str(r["settings"][key]) for key in keys]
        rows.append([str(place), *settings, mean, low_high, str(len(r[f"{kind}s"])), remark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row[:-1], widths)) + f"  {row[-1]}".rstrip() for row in rows]


def _png(ranking: Sequence[Mapping[str, Any]], monitor: str) -> bytes:
    """A line a setting, best on top: each seed, the mean and its interval."""
    # Here, for matplotlib is slow to import.
    from matplotlib.figure import Figure

    shown = [r for r in ranking if r["mean"] is not None][:_PLOTTED]
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for y, r in enumerate(shown):
        color = "#0072B2" if r["state"] == "complete" else "#999999"
        if r["interval"] is not None:
            axes.plot(r["interval"], [y, y], color=color, linewidth=2)
        axes.plot(r["values"], [y] * len(r["values"]), "|", color="#D55E00", markersize=9)
        axes.plot(r["mean"], y, "o", color=color, markersize=6)
    labels = [
        ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in r["settings"].items())
        + ("" if r["state"] == "complete" else f" ({r['state']})")
        for r in shown
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    kind = _repeated_by(ranking)
    axes.set_xlabel(f"best {monitor}: {kind}s (|), mean (o), 95 % t-interval of the mean (line)")
    axes.grid(axis="x", alpha=0.3)
    more = len([r for r in ranking if r["mean"] is not None]) - len(shown)
    axes.set_title("Settings, best first" + (f"; {more} more in sweep.csv" if more else ""))
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=150)
    return output.getvalue()


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
    """Here, so that tests can load this file beside `covid_flax.main`, which has a --config."""
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
