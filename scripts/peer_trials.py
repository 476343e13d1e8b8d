"""Kills one of two processes of a run at random instants, and times how soon the other ends.

    python scripts/peer_trials.py [--kills 20] [--seed 0] [--peer_timeout 5] [--json FILE]

The run of `kill_trials.py`, by two processes over loopback, is made once undisturbed. Then it is
made again and again: one of the two is killed (SIGKILL) at a random instant, the other must end by
itself, with a status that is not 0 and a line about its peer, within `--peer_timeout` and 40 s;
that is also longer than it is told to wait for a peer that never came (`--init_timeout`). Both are
then started again, and after three kills left alone: what the run leaves must be what the
undisturbed one left, as in `kill_trials.py`. A difference, a hang or a silent end is a failure;
exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_trials import LIMIT_S, command, differences, outcome

from covid_flax.errors import run_script
from covid_flax.files import result_file

KILLS_A_RUN = 3
# JAX's own patience with its coordinator beyond ours, and as much again for a loaded machine.
BEYOND_TIMEOUT_S = 40.0
INIT_TIMEOUT_S = 25


def start(home: Path, peer_timeout: int) -> list[subprocess.Popen]:
    """Both processes, their output added to log0 and log1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for i in (0, 1):
        meet = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        with open(home / f"log{i}", "ab") as out:
            processes.append(
                subprocess.Popen(
                    [
                        *command(home / "run", home / "cache"),
                        *meet,
                        f"--peer_timeout={peer_timeout}",
                        f"--init_timeout={INIT_TIMEOUT_S}",
                    ],
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
    return processes


def finish(home: Path, peer_timeout: int) -> str:
    """Empty where both end well."""
    processes = start(home, peer_timeout)
    try:
        statuses = [p.wait(LIMIT_S) for p in processes]
    except subprocess.TimeoutExpired:
        return "left alone, it hangs"
    finally:
        for p in processes:
            p.kill()
            p.wait()
    if statuses != [0, 0]:
        return f"left alone, it ended with {statuses}: {(home / 'log0').read_text()[-2000:]}"
    return ""


def kill_one(
    home: Path, rng: random.Random, usual_s: float, peer_timeout: int
) -> dict[str, Any] | None:
    """Starts both, kills one and watches the other; None where they had ended by themselves."""
    victim, delay = rng.randrange(2), rng.uniform(0, usual_s)
    before = len((home / f"log{1 - victim}").read_text()) if (home / "log0").exists() else 0
    processes = start(home, peer_timeout)
    other = processes[1 - victim]
    try:
        processes[victim].wait(delay)
        other.wait(LIMIT_S)
        return None
    except subprocess.TimeoutExpired:
        pass
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].wait()
    killed = time.monotonic()
    result: dict[str, Any] = {"victim": victim, "after_s": delay, "fault": ""}
    try:
        result["status"] = other.wait(peer_timeout + BEYOND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        other.kill()
        other.wait()
        result["fault"] = "the other hangs"
    result["ended_s"] = time.monotonic() - killed
    said = (home / f"log{1 - victim}").read_text()[before:]
    told = [line for line in said.splitlines() if "rror" in line or "distributed service" in line]
    if not result["fault"] and (result["status"] == 0 or not told):
        # Where all steps were made before the kill, the other may be through.
        result["fault"] = "" if "run: " in said else f"the other said nothing: {said[-500:]}"
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer_timeout", type=int, default=5)
    parser.add_argument("--json", type=result_file)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills: list[dict[str, Any]] = []
    faults: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla"
        home = Path(folder) / "undisturbed"
        home.mkdir()
        started = time.monotonic()
        if fault := finish(home, args.peer_timeout):
            print(fault, file=sys.stderr)
            return 1
        usual_s = time.monotonic() - started
        wanted = outcome(home / "run", one_device=False)
        print(f"undisturbed: {usual_s:.1f} s, {len(wanted)} things to compare", flush=True)
        while len(kills) < args.kills:
            home = Path(folder) / f"run-{runs}"
            home.mkdir()
            for _ in range(KILLS_A_RUN):
                kill = kill_one(home, rng, 0.8 * usual_s, args.peer_timeout)
                if kill is None:
                    break
                kills.append(kill)
            fault = finish(home, args.peer_timeout)
            found = (
                [fault] if fault else differences(outcome(home / "run", one_device=False), wanted)
            )
            faults += [f"run {runs}: {name}" for name in found]
            runs += 1
            print(f"{len(kills)} kills in {runs} runs, {len(faults)} differences", flush=True)
    faults += [k["fault"] for k in kills if k["fault"]]
    for victim in (0, 1):
        seconds = [k["ended_s"] for k in kills if k["victim"] == victim]
        if seconds:
            print(
                f"process {victim} killed {len(seconds)} times: the other ended after "
                f"{statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (most)"
            )
    print("\n".join(faults) or "nothing differs, nothing hangs")
    if args.json:
        args.json.write_text(json.dumps({"kills": kills, "faults": faults}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    run_script(main)
