"""Damages a run's checkpoints in many ways, and sees whether anyone is deceived.

    python scripts/checkpoint_trials.py [--trials 400] [--seed 0] [--place DIR] [--json FILE]

Trains a small network on synthetic X-rays, then, for every trial, damages a copy of its best
checkpoint, its latest or both, and opens the copy three ways: to evaluate the best, to evaluate the
latest, and to go on training. Each may refuse with one line, or give exactly what was saved.
Anything else (other values without a word, another step under the name of the best, a traceback,
a crash, a hang) is a failure, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from covid_flax.errors import run_script
from covid_flax.files import result_file

KINDS = (
    "a bit flipped",
    "a byte of the JSON changed",
    "cut short",
    "emptied",
    "overwritten with noise",
    "a file missing",
    "the folder missing",
    "files of the other step",
    "half written",
)
CONFIG = (
    "--config=configs/lenet.py",
    "--config.data.phantoms_per_class=12",
    "--config.train.epochs=6",
    "--config.train.patience=0",
    "--config.train.monitor=val_accuracy",
    "--config.train.batch_size=16",
)
HANG_S = 120


def damage(kind: str, step: Path, other: Path, rng: random.Random) -> None:
    """Does `kind` to the checkpoint in the folder `step`."""
    files = sorted(p for p in step.rglob("*") if p.is_file())
    # By size too, or the arrays, which are few files, would seldom be hit.
    file = rng.choice(files + sorted(files, key=lambda p: -p.stat().st_size)[:2] * 3)
    data = bytearray(file.read_bytes())
    if kind == "a byte of the JSON changed":
        file = step / "_CHECKPOINT_METADATA"
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "a bit flipped" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut short":
        del data[rng.randrange(max(1, len(data))) :]
    elif kind == "emptied":
        data.clear()
    elif kind == "overwritten with noise":
        start = rng.randrange(max(1, len(data)))
        noise = rng.randbytes(min(len(data) - start, rng.choice((1, 16, 4096))))
        data[start : start + len(noise)] = noise
    elif kind == "a file missing":
        file.unlink()
        return
    elif kind == "the folder missing":
        shutil.rmtree(step)
        return
    elif kind == "files of the other step":
        names = [p.relative_to(step) for p in files if (other / p.relative_to(step)).exists()]
        for name in rng.sample(names, rng.randint(1, len(names))):
            shutil.copyfile(other / name, step / name)
        return
    elif kind == "half written":
        (step / "commit_success.txt").unlink(missing_ok=True)
        kept = rng.randrange(len(files))
        for p in rng.sample(files, len(files) - kept):
            p.unlink(missing_ok=True)
        if rng.random() < 0.5:
            step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp"))
        return
    file.write_bytes(bytes(data))


def digest(tree: Any) -> str:
    """Of all leaves' bytes, on its own: not by what is tried here."""
    import jax
    import numpy as np

    parts = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        parts.update(np.asarray(leaf).tobytes())
    return parts.hexdigest()


class Trials:
    """Opens damaged copies of the run in `original`, in this process."""

    def __init__(self, original: Path):
        from covid_flax import config as config_lib
        from covid_flax.checkpoint import Checkpoints
        from covid_flax.mesh import make_layout
        from covid_flax.models import MODELS, create_model, trained_stages
        from covid_flax.optimizer import make_optimizer
        from covid_flax.run_folder import saved_run
        from covid_flax.step import create_state
        from covid_flax.trained_run import open_run

        self.original, self.open_run, self.checkpoints = original, open_run, Checkpoints
        saved = saved_run(original)
        config = config_lib.from_json(saved["config"])
        _, params, stats = create_model(config.model, len(saved["class_names"]), config.seed)
        tx = make_optimizer(config.optimizer, lambda _: 0.0, MODELS[config.model.name].stages)
        trained = frozenset(trained_stages(config.model))
        state = create_state(params, stats, trained, tx, config.seed)
        self.like = make_layout("jit").place(state)
        with Checkpoints(original / "checkpoints") as c:
            self.best, self.latest = c.best_step, c.latest_step
            loaded = {step: c.load(step, self.like) for step in c.steps}
        self.states = {step: (digest(state), loop) for step, (state, loop) in loaded.items()}
        runs = {step: open_run(original, str(step)) for step in self.states}
        self.params = {step: self._weights(run) for step, run in runs.items()}
        assert self.best != self.latest, "the last epoch is the best: another seed, please"

    def one(self, number: int, seed: int, place: Path) -> dict[str, Any]:
        rng = random.Random(f"{seed} {number}")
        kind = KINDS[number % len(KINDS)]
        whom = ("best", "latest", "both")[number // len(KINDS) % 3]
        copy = place / f"trial-{number}"
        shutil.copytree(self.original, copy)
        folders = {"best": copy / f"checkpoints/{self.best}"}
        folders["latest"] = copy / f"checkpoints/{self.latest}"
        pairs = {"best": ("best", "latest"), "latest": ("latest", "best")}
        for name in ("best", "latest") if whom == "both" else (whom,):
            step, other = (self.original / f"checkpoints/{folders[n].name}" for n in pairs[name])
            damage(kind, folders[name], other, rng)
        result = {"number": number, "kind": kind, "whom": whom}
        result["evaluate best"] = self._judged(lambda: self._read(copy, "best"))
        result["evaluate latest"] = self._judged(lambda: self._read(copy, "latest"))
        result["resume"] = self._judged(lambda: self._resume(copy / "checkpoints"))
        shutil.rmtree(copy)
        return result

    def _judged(self, act: Callable[[], str]) -> str:
        from covid_flax.errors import UserError

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return act()
        except UserError as e:
            return "refused" if "\n" not in str(e) else f"FAILED: several lines: {e}"
        except BaseException as e:
            return f"FAILED: {type(e).__name__}: {e}"

    def _read(self, copy: Path, which: str) -> str:
        run = self.open_run(copy, which)
        wanted = self.best if which == "best" else self.latest
        if self._weights(run) != self.params.get(run.step):
            return "FAILED: other values"
        if run.step == wanted:
            return "as saved"
        # A latest whose folder is gone is as one that was never saved.
        gone = not (copy / f"checkpoints/{self.latest}").exists()
        return "an older one" if which == "latest" and gone else f"FAILED: step {run.step}"

    @staticmethod
    def _weights(run: Any) -> str:
        return digest([run._params, run._batch_stats])

    def _resume(self, directory: Path) -> str:
        with self.checkpoints(directory, writing=True) as c:
            found = c.resume(self.like)
            if found is None:
                return "from the start" if not c.steps else "FAILED: none found"
            step, state, loop, lost = found
            if (digest(state), loop) != self.states[step]:
                return "FAILED: other values"
            if lost:
                return f"{'went on' if step == self.latest else 'fell back'}, best lost"
            if c.best_step != self.best:
                return f"FAILED: takes {c.best_step} for the best"
        return "as saved" if step == self.latest else "fell back"


def work(original: Path, place: Path, first: int, last: int, seed: int) -> None:
    trials = Trials(original)
    for number in range(first, last):
        print(json.dumps(trials.one(number, seed, place)), flush=True)


def _collect(worker: subprocess.Popen, lines: queue.Queue) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def run_all(original: Path, place: Path, trials: int, seed: int) -> list[dict[str, Any]]:
    """In processes of their own, so that one that dies is counted and the next goes on."""
    results: list[dict[str, Any]] = []
    while len(results) < trials:
        command = [sys.executable, __file__, f"--work={original}", f"--place={place}"]
        command += [f"--first={len(results)}", f"--trials={trials}", f"--seed={seed}"]
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_collect, args=(worker, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=HANG_S)) is not None:
                results.append(json.loads(line))
                if len(results) % 20 == 0:
                    print(f"{len(results)} of {trials} trials", flush=True)
        except queue.Empty:
            worker.kill()
        worker.wait()
        if len(results) < trials:
            number = len(results)
            how = f"FAILED: the process ended with {worker.returncode}"
            results.append({"number": number, "kind": KINDS[number % len(KINDS)], "whom": "?"})
            results[-1] |= dict.fromkeys(("evaluate best", "evaluate latest", "resume"), how)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, help="folder for the copies (a temporary one)")
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.place, args.first, args.trials, args.seed)
        return 0
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        original = Path(place) / "run"
        command = [sys.executable, "-m", "covid_flax.main", *CONFIG, f"--workdir={original}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        results = run_all(original, Path(place), args.trials, args.seed)
    ways = ("evaluate best", "evaluate latest", "resume")
    print(f"\n{'damage':28} {'to':7} {'trials':>6}  outcomes")
    for kind in KINDS:
        for whom in ("best", "latest", "both", "?"):
            those = [r for r in results if (r["kind"], r["whom"]) == (kind, whom)]
            if those:
                counts = {way: collections.Counter(r[way] for r in those) for way in ways}
                told = "; ".join(
                    f"{way}: " + ", ".join(f"{n} {what}" for what, n in counts[way].most_common())
                    for way in ways
                )
                print(f"{kind:28} {whom:7} {len(those):6}  {told}")
    failed = [r for r in results if any(r[way].startswith("FAILED") for way in ways)]
    print(f"\n{len(results)} trials, {len(failed)} failures")
    for r in failed[:20]:
        print(r)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
