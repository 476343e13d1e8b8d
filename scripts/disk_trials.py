"""A run whose disk fills up, turns read-only or is slow, while it trains.

    python scripts/disk_trials.py [--trials 5] [--kinds slow] [--seed 0] [--json FILE]

The run of `kill_trials.py` is made once undisturbed, then again, and once its first checkpoint is
there, after a random time:

- "full": the process may write no file of more than a few bytes (its limit on file size is
  lowered; a full disk fails the same calls).
- "read-only": the run's folders may no longer be written to. Root's training gives up root's right
  to write there all the same (by setpriv).
- "slow": every renaming and flushing of a file takes two seconds (by strace).

Under the first two the run must end with status 2 and one line, its last checkpoint sound. Then the
disk is well again, and the same command must end with just what the undisturbed run left. The slow
run must end so at once, and say that it waited. Anything else is a failure; exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kill_trials import LIMIT_S, command, differences, finish, outcome

from covid_flax.errors import run_script
from covid_flax.files import result_file

AS_ANY_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
KINDS = ("full", "read-only", "slow")
_CALLS = "fsync,fdatasync,rename,renameat,renameat2"
_STRACE = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={_CALLS}")
_SLOW = (*_STRACE, "-e", f"inject={_CALLS}:delay_exit=2000000")


def start(home: Path, before: Sequence[str] = ()) -> tuple[subprocess.Popen, subprocess.Popen]:
    """The training, and what copies its output to `home/log`."""
    as_root = AS_ANY_USER if os.geteuid() == 0 else ()
    process = subprocess.Popen(
        [*as_root, *before, *command(home / "run", home / "cache")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    # Not its own file: what it prints is no part of the trial.
    with open(home / "log", "ab") as out:
        copying = subprocess.Popen(["cat"], stdin=process.stdout, stdout=out)
    return process, copying


def ended(process: subprocess.Popen, copying: subprocess.Popen) -> int:
    """The training's exit status, once all that it said is in the log."""
    status = process.wait(LIMIT_S)
    copying.wait(LIMIT_S)
    return status


def fill_up(process: subprocess.Popen, run: Path) -> Callable[[], None]:
    """Returns what mends it; here the limit goes with the process."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64, 64))
    return lambda: None


def forbid(process: subprocess.Popen, run: Path) -> Callable[[], None]:
    """As `fill_up`."""
    folders = [run, run / "checkpoints"]
    for folder in folders:
        folder.chmod(0o555)

    def mend() -> None:
        for folder in folders:
            folder.chmod(0o755)

    return mend


def trial(kind: str, home: Path, rng: random.Random, wanted: dict[str, Any]) -> dict[str, Any]:
    run, log = home / "run", home / "log"
    home.mkdir()
    result: dict[str, Any] = {"kind": kind, "line": "", "faults": []}
    if kind == "slow":
        status = ended(*start(home, _SLOW))
        notes = [line for line in log.read_text().splitlines() if "training waited" in line]
        result["line"] = notes[0] if notes else "(no note)"
        if not notes:
            result["faults"].append("it was not slow, or not a word was said of it")
    else:
        process, copying = start(home)
        while process.poll() is None and not any(run.glob("checkpoints/[0-9]*")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0))
        mend = {"full": fill_up, "read-only": forbid}[kind](process, run)
        status = ended(process, copying)
        said = log.read_text()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        result["line"] = errors[0] if errors else "(none)"
        if status != 2 or len(errors) != 1 or "Traceback" in said:
            result["faults"].append(f"status {status}: {said[-1500:]}")
        mend()
        status = ended(*start(home))
    if status:
        result["faults"].append(f"it ended with {status}: {log.read_text()[-1500:]}")
    else:
        result["faults"] += differences(outcome(run), wanted)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=result_file)
    args = parser.parse_args()
    if "slow" in args.kinds and not shutil.which("strace"):
        print("error: --kinds slow needs strace: install it, or give --kinds full read-only")
        return 2
    rng, trials = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "xla")
        home = place / "undisturbed"
        home.mkdir()
        if finish(home / "run", home / "cache", home / "log"):
            print((home / "log").read_text(), file=sys.stderr)
            return 1
        wanted = outcome(home / "run")
        for number in range(args.trials):
            for kind in args.kinds:
                result = trial(kind, place / f"{kind}-{number}", rng, wanted)
                trials.append(result)
                print(f"{kind:10} {result['line']}", flush=True)
                for fault in result["faults"]:
                    print(f"FAILED: {fault}", flush=True)
    failed = sum(bool(t["faults"]) for t in trials)
    print(f"{len(trials)} trials, {failed} failed")
    if args.json:
        args.json.write_text(json.dumps(trials, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
