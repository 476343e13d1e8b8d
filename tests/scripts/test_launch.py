"""A dry run prints the commands that a real run runs: stand-ins for gcloud and Slurm say so."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
_STAND_IN = """#!{python}
import json, os, sys
with open({log!r}, "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit("fail" in sys.argv)
"""
_SHELL = (".sh", ".bash", ".sbatch")
_TPU = ["--name=my tpu", "--zone=us-west4-a"]
_TRAIN = ["--config=configs/paper.py:frozen", "--workdir=/nfs/a b", "--config.seed=$(touch x)"]


@pytest.fixture
def call(tmp_path):
    """Runs a script with stand-ins; gives its result and what the stand-ins were called with."""
    log = tmp_path / "calls"
    for name in ("gcloud", "git", "srun", "python"):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(_STAND_IN.format(python=sys.executable, log=str(log)))
        file.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHON": "python", "HOME": str(tmp_path)}

    def run(script, *args):
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", SCRIPTS / script, *args], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return done, calls

    return run


def _printed(done):
    lines = [x for x in done.stdout.splitlines() if not x.startswith("#SBATCH")]
    return [shlex.split(line.removesuffix(" &")) for line in lines]


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("multi_gpu.sh", ["--", *_TRAIN]),
        ("multi_gpu.sh", ["--processes=3", "--port=9999", "--", *_TRAIN]),
        ("slurm.sbatch", _TRAIN),
        ("tpu_vm.sh", [*_TPU, "--", *_TRAIN]),
        ("tpu_pod.sh", [*_TPU, "--project=p", "--type=v4-32", "--", *_TRAIN]),
        ("tpu_pod.sh", [*_TPU, "delete"]),
    ],
)
def test_a_dry_run_prints_what_a_run_runs(script, args, call, tmp_path):
    dry, calls = call(script, "--dry_run", *args)
    assert (dry.returncode, calls) == (0, []), dry.stderr
    done, calls = call(script, *args)
    assert done.returncode == 0, done.stderr
    assert sorted(_printed(dry)) == sorted(calls) != []
    assert not (tmp_path / "x").exists()  # nothing of the user's is run by a shell here


def test_the_commands_of_a_pod(call):
    done, _ = call("tpu_pod.sh", "--dry_run", *_TPU, "--", *_TRAIN)
    create, pack, copy, install, run = _printed(done)
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert create[:6] == [*tpu, "create", "my tpu"] and "--accelerator-type=v5litepod-16" in create
    assert pack[0] == "git" and copy[:5] == [*tpu, "scp"]
    assert all("--worker=all" in c and "--zone=us-west4-a" in c for c in (copy, install, run))
    assert "'.[tpu,lite0]'" in install[-1]
    stop = _printed(call("tpu_pod.sh", "--dry_run", *_TPU, "stop")[0])[0]
    assert "--worker=all" in stop and "-TERM" in stop[-1]


def _host(tmp_path, run, program, running=""):
    """A stand-in for the other host: how its shell is to be given the command of `run`."""
    home, tools = tmp_path / "host", tmp_path / "tools"
    python = home / "covid_flax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    tools.mkdir()
    for file, text in ((python, program), (tools / "pgrep", f"{running or 'exit 1'}\n")):
        file.write_text(f"#!/bin/sh\n{text}")
        file.chmod(0o755)
    command = ["bash", "-c", run[-1].removeprefix("--command=")]
    return command, {"cwd": home, "env": os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}}


def test_what_the_host_s_shell_makes_of_a_run(call, tmp_path):
    """It takes the command apart again and runs nothing inside it; the status comes back."""
    (run,) = _printed(call("tpu_vm.sh", "--dry_run", *_TPU, "run", "--", *_TRAIN)[0])
    program = 'for x; do echo "$x"; done\nsleep 0.2\necho end\nexit 143\n'
    command, where = _host(tmp_path, run, program)
    log = where["cwd"] / "covid_flax" / "run.log"
    log.write_text("of an earlier run\n")
    done = subprocess.run(command, **where, capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stdout.splitlines() == ["-m", "covid_flax.main", *_TRAIN, "end"]
    assert log.read_text() == "of an earlier run\n" + done.stdout
    assert not (where["cwd"] / "covid_flax" / "x").exists()


def test_a_run_that_is_still_there_is_followed_on(call, tmp_path):
    """As gcloud gives the command again where the connection broke."""
    (run,) = _printed(call("tpu_vm.sh", "--dry_run", *_TPU, "run", "--", *_TRAIN)[0])
    other = subprocess.Popen(
        [
            "sh",
            "-c",
            "until [ -d host/covid_flax ]; do sleep 0.05; done; sleep 0.5; "
            "echo 3 >host/covid_flax/run.status",
        ],
        cwd=tmp_path,
    )
    command, where = _host(tmp_path, run, "touch started\n", f"echo {other.pid}")
    log = where["cwd"] / "covid_flax" / "run.log"
    log.write_text("step 1\n")
    there = subprocess.Popen(command, **where, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    other.wait()
    out, said = there.communicate()
    assert out == b"step 1\n" and there.returncode == 3
    assert b"these arguments are not used" in said
    assert not (where["cwd"] / "covid_flax" / "started").exists()


def test_a_run_outlives_its_connection(call, tmp_path):
    (run,) = _printed(call("tpu_vm.sh", "--dry_run", *_TPU, "run", "--", *_TRAIN)[0])
    program = "echo begin\nsleep 1\necho more\ntouch finished\n"
    command, where = _host(tmp_path, run, program)
    there = subprocess.Popen(command, **where, stdout=subprocess.PIPE, start_new_session=True)
    assert there.stdout.readline() == b"begin\n"
    there.stdout.close()
    os.kill(there.pid, signal.SIGHUP)
    there.wait()
    folder = where["cwd"] / "covid_flax"
    for _ in range(100):
        if (folder / "finished").exists():
            break
        time.sleep(0.1)
    assert (folder / "run.log").read_text() == "begin\nmore\n"


def test_what_ends_a_run_is_not_the_shell_that_waits_for_it(call, tmp_path):
    (stop,) = _printed(call("tpu_vm.sh", "--dry_run", *_TPU, "stop")[0])
    (run,) = _printed(call("tpu_vm.sh", "--dry_run", *_TPU, "run", "--", *_TRAIN)[0])
    pattern = shlex.split(stop[-1])[-1]
    assert re.search(pattern, ".venv/bin/python -m covid_flax.main --config=x")
    assert not re.search(pattern, f"bash -c {run[-1].removeprefix('--command=')}")


def test_a_vm_is_one_worker(call):
    done, _ = call("tpu_vm.sh", "--dry_run", *_TPU, "run", "--", *_TRAIN)
    (run,) = _printed(done)
    assert "--worker=0" in run


def test_one_process_for_each_gpu(call):
    done, _ = call("multi_gpu.sh", "--dry_run", "--processes=2", "--", *_TRAIN)
    for i, command in enumerate(_printed(done)):
        assert command[:3] == ["python", "-m", "covid_flax.main"]
        assert command[3:6] == _TRAIN
        assert {"--num_processes=2", f"--process_id={i}", f"--local_devices={i}"} <= set(command)
    (alone,) = _printed(call("multi_gpu.sh", "--dry_run", "--", *_TRAIN)[0])
    assert alone == ["python", "-m", "covid_flax.main", *_TRAIN]


def test_a_signal_is_awaited_by_all_processes(tmp_path):
    """Else a new start meets the port and folder of the one that leaves last."""
    slow = tmp_path / "python"
    slow.write_text(
        "#!/bin/bash\ntrap 'sleep 1; touch ended.$$; exit 143' TERM\ntouch begun.$$\n"
        "while true; do sleep 0.1; done\n"
    )
    slow.chmod(0o755)
    command = ["bash", SCRIPTS / "multi_gpu.sh", "--processes=3", "--", "x"]
    script = subprocess.Popen(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": str(slow)}, cwd=tmp_path
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("begun.*"))) < 3:
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    script.terminate()
    assert script.wait(30) == 143
    assert len(list(tmp_path.glob("ended.*"))) == 3


def test_slurm_s_directives(call):
    done, _ = call("slurm.sbatch", "--dry_run", *_TRAIN)
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8" in done.stdout
    (run,) = _printed(done)
    assert run[0] == "srun" and "--cpus-per-task=8" in run and run[-3:] == _TRAIN


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("multi_gpu.sh", []),
        ("multi_gpu.sh", ["--processes=0", "--", *_TRAIN]),
        ("multi_gpu.sh", ["--gpus=2", "--", *_TRAIN]),
        ("slurm.sbatch", []),
        ("tpu_vm.sh", ["--zone=z", "--", *_TRAIN]),
        ("tpu_pod.sh", ["--name=n", "--", *_TRAIN]),
        ("tpu_pod.sh", [*_TPU, "run"]),
        ("tpu_pod.sh", [*_TPU, "destroy"]),
    ],
)
def test_what_is_missing_or_unknown_runs_nothing(script, args, call):
    done, calls = call(script, *args)
    assert (done.returncode, calls) == (2, [])
    assert script in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_is_passed_on(processes, call):
    done, calls = call("multi_gpu.sh", f"--processes={processes}", "--", "fail")
    assert done.returncode == 1 and len(calls) == processes


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.iterdir() if p.suffix in _SHELL))
def test_syntax(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)
    text = (SCRIPTS / script).read_text()
    assert "set -euo pipefail" in text or script == "tpu_steps.bash"
