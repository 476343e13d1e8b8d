"""Kills a run at random instants, lets it go on, and compares what it leaves.

    python scripts/kill_trials.py [--kills 200] [--seed 0] [--sigterm 0.2] [--jobs 1] [--json FILE]

A small real run is made once undisturbed: synthetic X-rays, records, training with a checkpoint
every few steps, evaluation, plots. Then runs of the same command are killed, each several times: by
SIGKILL, or by SIGTERM for a share of them, after a time drawn at random, or as soon as something is
seen (records being written, a checkpoint under way, a line of metrics, an evaluation). Each goes on
by the same command until it ends by itself. What it leaves must be what the undisturbed one left:
every array of its checkpoints bit for bit, and its files byte for byte but for clocks (images a
second, elapsed time), the folder's own name and TensorBoard's events, which are left out. Any
difference is a failure; exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from covid_flax.errors import run_script
from covid_flax.files import result_file

COMMAND = (
    "--config=configs/lenet.py",
    "--config.data.phantoms_per_class=24",
    "--config.train.epochs=5",
    "--config.train.patience=0",
    "--config.train.batch_size=8",
    "--config.train.checkpoint_every_steps=3",
    "--config.train.log_every_steps=2",
    "--config.augment.flip=True",
)
KILLS_A_RUN = 6
LIMIT_S = 600  # of one start, after which it hangs

# What is waited for before a kill, by what the run's folder (and cache) shows.
SEEN: dict[str, Callable[[Path, Path], bool]] = {
    "phantoms being drawn": lambda run, cache: any(run.glob(".phantoms.*/*/*/*")),
    "phantoms drawn": lambda run, cache: any(run.glob("phantoms/*/*")),
    "records written": lambda run, cache: any(cache.glob(".*.part")),
    "images stored": lambda run, cache: any(cache.glob("*/.*.part")),
    "run set up": lambda run, cache: (run / "config.json").exists(),
    "training": lambda run, cache: (run / "metrics.jsonl").exists(),
    "checkpoint under way": lambda run, cache: any(run.glob("checkpoints/*tmp*")),
    "checkpoint written": lambda run, cache: len(list(run.glob("checkpoints/*"))) > 1,
    "curves drawn": lambda run, cache: any(run.glob("*curves.png*")),
    "evaluation": lambda run, cache: (run / "eval").exists(),
    "evaluation written": lambda run, cache: any(run.glob("eval/val/*")),
}
_BEFORE_SET_UP = ("phantoms being drawn", "phantoms drawn", "records written", "images stored")


def command(run: Path, cache: Path) -> list[str]:
    python = [sys.executable, "-m", "covid_flax.main"]
    return [*python, *COMMAND, f"--config.data.cache_dir={cache}", f"--workdir={run}"]


def start(run: Path, cache: Path, log: Path) -> subprocess.Popen:
    with open(log, "ab") as out:
        return subprocess.Popen(command(run, cache), stdout=out, stderr=out, start_new_session=True)


def kill_once(
    run: Path, cache: Path, log: Path, rng: random.Random, usual_s: float, term: bool
) -> tuple[str, int | None]:
    """Starts the command and kills it: what for, and the status; None where it had ended."""
    # Of a run that goes on, only what is not there yet tells that it has come so far.
    ready = (run / "config.json").exists()
    ahead = [name for name, is_seen in SEEN.items() if not is_seen(run, cache)]
    ahead = [name for name in ahead if not (ready and name in _BEFORE_SET_UP)]
    if (run / "phantoms").exists() and "phantoms being drawn" in ahead:
        ahead.remove("phantoms being drawn")
    seen = rng.choice([*ahead, "any time", "any time"])
    delay = rng.uniform(0, 0.7 * usual_s) if seen == "any time" else rng.choice((0, 0.05, 0.3))
    process = start(run, cache, log)
    deadline = time.monotonic() + LIMIT_S
    while seen != "any time" and process.poll() is None and not SEEN[seen](run, cache):
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
    try:
        process.wait(delay)
        return seen, None
    except subprocess.TimeoutExpired:
        pass
    process.send_signal(signal.SIGTERM if term else signal.SIGKILL)
    try:
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"SIGTERM was not heeded within 60 s ({seen})") from None
    return seen, status


def finish(run: Path, cache: Path, log: Path) -> int:
    try:
        return start(run, cache, log).wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return -1


def outcome(run: Path, *, one_device: bool = True) -> dict[str, Any]:
    """What a finished run left, clocks and its own name taken out.

    Arrays that lay on several devices count as the digest that was saved with them.
    """
    import hashlib

    import jax
    import numpy as np

    from covid_flax.checkpoint import Checkpoints

    found: dict[str, Any] = {}
    with Checkpoints(run / "checkpoints") as c:
        found["best and latest"] = (c.best_step, c.latest_step, c.steps)
        for step in c.steps:
            contents = c._orbax.metadata(step).custom_metadata or {}
            found[f"step {step} digest"] = contents["record"]["arrays"]
            saved = c._orbax.load(step) if one_device else {}
            for path, leaf in jax.tree_util.tree_leaves_with_path(saved):
                array = np.asarray(leaf)
                name = f"step {step} {jax.tree_util.keystr(path)}"
                found[name] = hashlib.sha256(array.tobytes()).hexdigest()
            loop = dict(contents["loop"])
            for clock in ("elapsed", "epoch_seconds", "epoch_examples", "metrics_bytes"):
                loop.pop(clock)
            found[f"step {step} loop"] = loop
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{**line, "images_per_second": 0} for line in lines]
    for file in sorted(p for p in run.rglob("*") if p.is_file()):
        name = file.relative_to(run).as_posix()
        if name.startswith(("checkpoints/", "tensorboard/")) or name in (".lock", "metrics.jsonl"):
            continue
        content = file.read_bytes()
        if file.suffix in (".json", ".csv", ".html"):
            content = re.sub(re.escape(str(run.parent)).encode(), b"", content)
            content = re.sub(rb'"fingerprint": "\w+"', b"", content)  # of the files' times
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def trial(number: int, args: argparse.Namespace, place: Path, usual_s: float) -> dict[str, Any]:
    rng = random.Random(f"{args.seed} {number}")
    home = place / f"trial-{number}"
    run, cache, log = home / "run", home / "cache", home / "log"
    home.mkdir()
    kills: list[tuple[str, str]] = []
    faults: list[str] = []
    while len(kills) < KILLS_A_RUN:
        term = rng.random() < args.sigterm
        try:
            seen, status = kill_once(run, cache, log, rng, usual_s, term)
        except RuntimeError as e:
            faults.append(str(e))
            break
        if status is None:
            if len(kills) >= 2:
                break  # it has ended by itself
            continue
        # Before Python has set its handler SIGTERM ends it as it ends anything.
        allowed = (143, -signal.SIGTERM) if term else (-signal.SIGKILL,)
        if status not in allowed and status != 0:
            faults.append(f"status {status} after {'SIGTERM' if term else 'SIGKILL'} ({seen})")
        kills.append((seen, "SIGTERM" if term else "SIGKILL"))
    status = finish(run, cache, log)
    if status:
        faults.append(f"the last start ended with {status}: {log.read_text()[-2000:]}")
    return {"number": number, "kills": kills, "faults": faults, "home": str(home)}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = sorted(found.keys() | wanted.keys(), key=str)
    return [name for name in names if found.get(name) != wanted.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigterm", type=float, default=0.2, help="share of the kills")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--place", type=Path, help="folder for the runs (a temporary one)")
    parser.add_argument("--json", type=result_file)
    args = parser.parse_args()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failed, trials = [], []
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        place = Path(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "xla")  # of all runs, as is usual
        home = place / "undisturbed"
        home.mkdir()
        started = time.monotonic()
        if finish(home / "run", home / "cache", home / "log"):
            print((home / "log").read_text(), file=sys.stderr)
            return 1
        usual_s = time.monotonic() - started
        wanted = outcome(home / "run")
        print(f"undisturbed: {usual_s:.1f} s, {len(wanted)} things to compare", flush=True)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            number = 0
            while sum(counts.values()) < args.kills:
                batch = range(number, number + args.jobs)
                number += args.jobs
                for result in pool.map(lambda n: trial(n, args, place, usual_s), batch):
                    home = Path(result.pop("home"))
                    if not result["faults"]:
                        found = outcome(home / "run")
                        result["faults"] = differences(found, wanted)
                    leftovers = [
                        p.name for p in home.rglob("*") if re.search(r"\.part\b|tmp", p.name)
                    ]
                    result["faults"] += [f"left over: {name}" for name in leftovers]
                    counts.update(map(tuple, result["kills"]))
                    trials.append(result)
                    if result["faults"]:
                        failed.append(result)
                        print(f"FAILED: {result}", flush=True)
                    shutil.rmtree(home)
                print(f"{sum(counts.values())} kills in {len(trials)} runs", flush=True)
    print(f"\n{'killed at':24} {'SIGKILL':>8} {'SIGTERM':>8}")
    for seen in ("any time", *SEEN):
        print(f"{seen:24} {counts[seen, 'SIGKILL']:8} {counts[seen, 'SIGTERM']:8}")
    print(f"\n{sum(counts.values())} kills, {len(trials)} runs, {len(failed)} differ")
    if args.json:
        table = [{"at": at, "by": by, "kills": n} for (at, by), n in sorted(counts.items())]
        result = {"kills": table, "runs": trials, "failed": len(failed)}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
