"""Several processes are one run: real ones, over loopback, two with two devices each.

The judge is the run of one process with one device.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from run_update import update
from small_resnet import with_batch_norm
from tensorboardX.proto.event_pb2 import Event

from covid_flax import distributed
from covid_flax.checkpoint import Checkpoints
from covid_flax.distributed import Cluster, from_flags
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.run import setup
from covid_flax.train import train
from covid_flax.trained_run import open_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent
_CONFIG = """
import json
from covid_flax import config
def get_config():
    return config.from_json(json.loads({text!r}))
"""
# `main`, which ends with a user's error once the checkpoint of a step is on the disk.
_UNTIL = """
import sys
from absl import flags
from covid_flax import main
from covid_flax.checkpoint import Checkpoints
from covid_flax.command import run_command
from covid_flax.errors import UserError
last, save = int(sys.argv.pop(1)), Checkpoints.save
def save_and_stop(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    if step == last:
        self.wait()
        raise UserError("stopped here")
Checkpoints.save = save_and_stop
flags.mark_flag_as_required("config")
run_command(main._main, together=True)
"""
# `main`, in which process 1 takes long over its batches.
_SLOW = """
import sys, time
import jax
from absl import flags
from covid_flax import feed, main
from covid_flax.command import run_command
advance = feed.HostFeed.advance
def slow(self, state, steps, meter):
    if jax.process_index() == 1:
        with meter.waiting():
            time.sleep(1)
    return advance(self, state, steps, meter)
feed.HostFeed.advance = slow
flags.mark_flag_as_required("config")
run_command(main._main, together=True)
"""
# `main`, in which process 1 reads other arrays from the checkpoint of a step than were saved.
_MISREADS = """
import sys
import jax
from absl import flags
from covid_flax import checkpoint, main
from covid_flax.command import run_command
last, load = int(sys.argv.pop(1)), checkpoint.Checkpoints.load
def misread(self, step, like):
    found = load(self, step, like)
    if step == last and jax.process_index() == 1:
        raise self._damaged(step, "its arrays are not those that were saved")
    return found
checkpoint.Checkpoints.load = misread
flags.mark_flag_as_required("config")
run_command(main._main, together=True)
"""
# `main`, in which process 1 does not see the checkpoint of a step.
_OVERLOOKS = """
import sys
import jax
from absl import flags
from covid_flax import checkpoint, main
from covid_flax.command import run_command
last, steps = int(sys.argv.pop(1)), checkpoint.Checkpoints.steps.fget
def some(self):
    return [s for s in steps(self) if s != last or jax.process_index() == 0]
checkpoint.Checkpoints.steps = property(some)
flags.mark_flag_as_required("config")
run_command(main._main, together=True)
"""
# A command that waits, but for the process that is told to fail.
_WAITS = """
import sys, time
from covid_flax import distributed
from covid_flax.command import run_command
from covid_flax.errors import UserError
what = sys.argv.pop(1)
def main():
    print("here", flush=True)
    if what == "fail":
        raise UserError("this one fails")
    if what == "crash":
        raise KeyError("this one crashes")
    distributed.barrier(f"a place where no other comes: {sys.argv}")
run_command(main, together=True)
"""


def _port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class _Processes:
    """Processes of one run, their output in files."""

    def __init__(self, directory, commands, devices=2, flags=()):
        directory.mkdir()
        self.directory, count = directory, len(commands)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        xla = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        meet = [f"--coordinator=127.0.0.1:{_port()}", f"--num_processes={count}"]
        self.popen = []
        for i, command in enumerate(commands):
            where = [*meet, f"--process_id={i}"] if count > 1 else []
            with open(directory / f"out{i}", "w") as out, open(directory / f"err{i}", "w") as err:
                self.popen.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command), *where, *flags],
                        env=env,
                        cwd=ROOT,
                        stdout=out,
                        stderr=err,
                    )
                )

    def out(self, i):
        return (self.directory / f"out{i}").read_text()

    def err(self, i):
        return (self.directory / f"err{i}").read_text()

    def wait(self, *statuses):
        """Until all have ended; a hanging process fails the test."""
        try:
            ended = tuple(p.wait(timeout=120) for p in self.popen)
        finally:
            for p in self.popen:
                p.kill()
                p.wait()
        assert ended == statuses, [self.err(i)[-2000:] for i in range(len(ended))]
        return self

    def wait_for(self, i, text):
        deadline = time.monotonic() + 120
        while text not in self.out(i):
            alive = all(p.poll() is None for p in self.popen)
            if not alive or time.monotonic() > deadline:
                for p in self.popen:
                    p.kill()
                pytest.fail(f"no {text!r}: {[self.err(k)[-2000:] for k in range(2)]}")
            time.sleep(0.05)

    def the_error(self, i):
        """The one line that tells the user, with no traceback."""
        err = self.err(i)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in err, err[-3000:]
        return lines[0]


@pytest.fixture
def config(tiny_config):
    """Five steps whose updates are near to the gradients themselves, see test_mesh.py."""
    tiny_config.train.batch_size = 12
    tiny_config.train.epochs = 1
    tiny_config.train.log_every_steps = 1
    tiny_config.train.checkpoint_every_steps = 1
    tiny_config.optimizer.epsilon = 1.0
    tiny_config.optimizer.learning_rate = 0.01
    tiny_config.model.dropout = 0.0
    return tiny_config


def _main(config, directory, workdir, *args):
    """The arguments of a `main` that runs `config`."""
    file = directory / "tiny.py"
    file.write_text(_CONFIG.format(text=config.to_json()))
    return [f"--config={file}", f"--workdir={workdir}", *args]


def _losses(workdir):
    """The loss of each step, from TensorBoard's files."""
    losses = {}
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                if value.tag == "steps/loss":
                    losses[event.step] = value.simple_value
            data = data[16 + size :]
    return [losses[step] for step in sorted(losses)]


def _assert_run_of(config, workdir, judge):
    """The losses, the update and the lines of the one-device run `judge`."""
    losses = _losses(workdir)
    assert len(losses) == 5
    np.testing.assert_allclose(losses[:3], _losses(judge)[:3], rtol=1e-4)
    np.testing.assert_allclose(losses, _losses(judge), rtol=1e-3)
    moved = update(config, judge, "latest")
    assert np.linalg.norm(update(config, workdir, "latest") - moved) < 0.01 * np.linalg.norm(moved)
    lines, judges = (
        [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (workdir, judge)
    )
    assert [(x["step"], x["epoch"], x["split"]) for x in lines] == [(5, 1, "train"), (5, 1, "val")]
    for line, one in zip(lines, judges, strict=True):
        np.testing.assert_allclose(line["loss"], one["loss"], rtol=1e-3)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The judge; the first test that asks trains it."""
    workdir = tmp_path_factory.mktemp("one") / "run"

    def run(config):
        if not workdir.exists():
            train(setup(config, workdir))
        return workdir

    return run


def test_two_processes_train_and_evaluate_as_one(config, one_device, tmp_path):
    """Also: a cache that nobody has filled yet is filled once."""
    config.data.cache_dir = str(tmp_path / "cache")
    config.train.checkpoint_every_steps = 2
    command = ["-m", "covid_flax.main", *_main(config, tmp_path, tmp_path / "run")]
    done = _Processes(tmp_path / "main", [command, command]).wait(0, 0)
    judge = one_device(config)
    _assert_run_of(config, tmp_path / "run", judge)
    assert "accuracy" in done.out(0) and "accuracy" not in done.out(1)
    for bar in ("Preparing images: 100%", "Decoding images: 100%"):
        assert sum(done.err(i).count(bar) for i in (0, 1)) == 1
    events = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(events) == 1
    assert (tmp_path / "run" / "curves.png").exists()
    alone = evaluate(tmp_path / "run", output=tmp_path / "alone")
    report = json.loads((tmp_path / "run" / "eval" / "val" / "report.json").read_text())
    _assert_same_report(report, alone)


@pytest.mark.slow
def test_two_processes_recalibrate_batch_norm_and_ask_a_teacher(config, tmp_path):
    """Each opens the teacher's checkpoint, and what is saved is what one process computes."""
    with_batch_norm(config)
    config.augment.rotate, config.train.recalibrate = 20.0, 24
    config.train.checkpoint_every_steps = 0
    teacher = tmp_path / "teacher"
    train(setup(config, teacher))
    config.train.teacher = str(teacher)
    command = ["-m", "covid_flax.main", *_main(config, tmp_path, tmp_path / "run")]
    _Processes(tmp_path / "main", [command, command], devices=1).wait(0, 0)
    train(setup(config, tmp_path / "alone"))
    (a, b) = (open_run(tmp_path / name, "latest") for name in ("run", "alone"))
    for x, y in zip(jax.tree.leaves(a._batch_stats), jax.tree.leaves(b._batch_stats), strict=True):
        assert np.linalg.norm(x - y) <= 0.05 * np.linalg.norm(y)
    report = json.loads((tmp_path / "run" / "eval" / "val" / "report.json").read_text())
    _assert_same_report(report, evaluate(tmp_path / "run", output=tmp_path / "again"))


def _assert_same_report(report, other):
    assert report["confusion_matrix"] == other["confusion_matrix"]
    assert report["num_examples"] == other["num_examples"]
    np.testing.assert_allclose(report["loss"], other["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes(config, one_device, tmp_path):
    """From one process with four devices to two with two each; the test above goes back."""
    workdir = tmp_path / "run"
    for until, processes, devices in ((2, 1, 4), (5, 2, 2)):
        command = ["-c", _UNTIL, until, *_main(config, tmp_path, workdir)]
        directory = tmp_path / f"until{until}"
        done = _Processes(directory, [command] * processes, devices).wait(*[2] * processes)
        assert "stopped here" in done.the_error(0)
        assert ("resume: from step 2" in done.out(0)) == (until > 2)
        assert f"on {processes * devices} x cpu" in done.out(0)
    _assert_run_of(config, workdir, one_device(config))


@pytest.mark.slow
def test_who_holds_the_others_up_is_named(config, tmp_path):
    command = ["-c", _SLOW, *_main(config, tmp_path, tmp_path / "run")]
    done = _Processes(tmp_path / "both", [command, command]).wait(0, 0)
    assert re.search(r"note: process 1 waited for its images \d+% of the epoch", done.out(0))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_MISREADS, _OVERLOOKS], ids=["misreads", "overlooks"])
def test_a_checkpoint_that_one_process_misreads_is_given_up_by_all(
    fault, config, one_device, tmp_path
):
    workdir = tmp_path / "run"
    command = ["-c", _UNTIL, 3, *_main(config, tmp_path, workdir)]
    _Processes(tmp_path / "until3", [command, command]).wait(2, 2)
    with Checkpoints(workdir / "checkpoints") as c:
        before = max(step for step in c.steps if step < 3) if len(c.steps) > 1 else None
    command = ["-c", fault, 3, *_main(config, tmp_path, workdir)]
    run = _Processes(tmp_path / "again", [command, command])
    if before is None:
        run.wait(2, 2)
        assert "every checkpoint is damaged (3)" in run.err(0)
        assert (workdir / "checkpoints" / "3").exists()
    else:
        run.wait(0, 0)
        assert f"resume: from step {before}" in run.out(0)


def test_a_user_error_ends_all(config, tmp_path):
    """Whichever meets it first, both end with it."""
    wrong = _main(config, tmp_path, tmp_path / "run", "--config.data.dir=/nowhere")
    command = ["-m", "covid_flax.main", *wrong]
    done = _Processes(tmp_path / "both", [command, command]).wait(2, 2)
    assert all("/nowhere" in done.the_error(i) for i in (0, 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("what", "status", "who"), [("fail", 2, 1), ("crash", 1, 0)])
def test_all_end_with_the_line_of_the_first_that_fails(what, status, who, tmp_path):
    commands = [["-c", _WAITS, what if i == who else "wait"] for i in (0, 1)]
    done = _Processes(tmp_path / "run", commands).wait(status, status)
    assert f"error: process {who}: " in done.err(1 - who)
    assert f"this one {what}" in done.the_error(1 - who)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(config, tmp_path):
    """Within --peer_timeout: on TPU and GPU a collective would wait for ever."""
    config.train.epochs, config.train.patience = 10_000, 0
    command = ["-m", "covid_flax.main", *_main(config, tmp_path, tmp_path / "run")]
    run = _Processes(tmp_path / "main", [command, command], flags=["--peer_timeout=5"])
    run.wait_for(0, "first step")
    run.popen[1].kill()
    run.wait(1, -signal.SIGKILL)
    assert "process" in run.the_error(0)


@pytest.mark.slow
def test_sigterm_to_one_saves_the_same_step_of_all(config, tmp_path):
    config.train.epochs, config.train.patience, config.train.log_every_steps = 10_000, 0, 1
    workdir = tmp_path / "run"
    command = ["-m", "covid_flax.main", *_main(config, tmp_path, workdir)]
    run = _Processes(tmp_path / "main", [command, command])
    run.wait_for(0, "epoch 1/10000 done")
    run.popen[1].terminate()
    run.wait(143, 143)
    # The one that says so first may end the other before it does.
    told = {n for i in (0, 1) for n in re.findall(r"SIGTERM: saved step ([\d,]+);", run.err(i))}
    assert len(told) == 1
    with Checkpoints(workdir / "checkpoints") as c:
        assert c.latest_step == int(told.pop().replace(",", ""))


def test_sigterm_ends_a_process_that_waits_and_then_the_others(tmp_path):
    """JAX's preemption service would swallow it, and no handler of ours would come to run."""
    run = _Processes(tmp_path / "run", [["-c", _WAITS, "wait"]] * 2, flags=["--peer_timeout=2"])
    run.wait_for(0, "here")
    run.wait_for(1, "here")
    run.popen[1].terminate()
    run.wait(1, -signal.SIGTERM)
    assert "process 1 of 2 was killed or lost" in run.the_error(0)


def test_the_loss_of_process_0_ends_the_others(tmp_path):
    """It holds the coordination service: JAX may abort before our line, with one of its own."""
    run = _Processes(tmp_path / "run", [["-c", _WAITS, "wait"]] * 2, flags=["--peer_timeout=2"])
    run.wait_for(0, "here")
    run.wait_for(1, "here")
    run.popen[0].kill()
    status = run.popen[1].wait(timeout=60)
    run.wait(-signal.SIGKILL, status)
    ours = status == 1 and "error: " in run.err(1)
    assert ours or (status == -signal.SIGABRT and "JAX distributed service" in run.err(1))


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_others_that_do_not_come(process, tmp_path):
    args = [f"--coordinator=127.0.0.1:{_port()}", "--num_processes=2", f"--process_id={process}"]
    command = ["-c", _WAITS, "wait", *args, "--init_timeout=1"]
    done = _Processes(tmp_path / "run", [command]).wait(2)
    assert "within 1 s" in done.the_error(0) and "here" not in done.out(0)


def test_a_port_that_is_taken(tmp_path):
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["-c", _WAITS, "wait", f"--coordinator={address}", "--num_processes=2"]
        done = _Processes(tmp_path / "run", [[*command, "--process_id=0"]]).wait(2)
    assert address in done.the_error(0)


def _flags(**said):
    values = {"coordinator": "", "num_processes": None, "process_id": None, "local_devices": []}
    return SimpleNamespace(**values | {"init_timeout": 300, "peer_timeout": 60} | said)


_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
_JAX = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("said", "environ", "cluster"),
    [
        ({}, {}, None),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # a batch script, no srun
        ({}, _SLURM | {"SLURM_NTASKS": "1"}, None),
        ({}, _SLURM, Cluster()),
        ({"local_devices": ["0", "1"]}, _SLURM, Cluster(local_devices=[0, 1])),
        ({}, _MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, Cluster()),
        ({"coordinator": "h:1"}, _MPI, Cluster("h:1", 4, 3)),
        ({"coordinator": "h:1"}, _SLURM, Cluster("h:1", 2, 1)),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 0}, {}, Cluster("h:1", 2, 0)),
        ({"process_id": 0}, _JAX, Cluster("h:1", 2, 0)),
        ({}, _JAX | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, Cluster("h:1", 2, 1, [2, 3])),
        ({"coordinator": "[::1]:80", "num_processes": 1, "process_id": 0}, {},
         Cluster("[::1]:80", 1, 0)),
    ],
)  # fmt: skip
def test_who_is_there(said, environ, cluster):
    assert from_flags(_flags(**said), environ) == cluster


@pytest.mark.parametrize(
    ("said", "environ", "word"),
    [
        ({"coordinator": "h:1"}, {}, "--num_processes, --process_id missing"),
        ({"num_processes": 2}, {}, "--coordinator, --process_id missing"),
        ({"coordinator": "host"}, {}, "--coordinator=host"),
        ({"coordinator": "http://h:1"}, {}, "--coordinator=http"),
        ({"coordinator": "h:70000"}, {}, "h:70000"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, {}, "--process_id=2"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, {}, "--num_processes=0"),
        ({}, _JAX | {"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID=two"),
        ({"local_devices": ["gpu"]}, {}, "--local_devices=gpu"),
        ({"local_devices": ["0"]}, {}, "--local_devices"),
        ({"init_timeout": 0}, {}, "--init_timeout=0"),
        ({}, _MPI, "--coordinator"),
    ],
)
def test_what_is_said_wrong_or_in_part(said, environ, word):
    with pytest.raises(UserError, match=word):
        from_flags(_flags(**said), environ)


def test_a_run_of_one_process_starts_nothing(tmp_path):
    """No service, no thread: the network is made to fail."""
    code = (
        "import socket, threading; from covid_flax import distributed;"
        "from covid_flax.command import run_command;"
        "socket.socket.connect = socket.socket.bind = None;"
        "run_command(lambda: print(threading.active_count(), distributed._watch), together=True)"
    )
    done = _Processes(tmp_path / "run", [["-c", code]]).wait(0)
    assert done.out(0) == "1 None\n"
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(("said", "found"), [([True, False], True), ([False, False], False)])
def test_what_one_process_meets_all_know(said, found, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda here: np.array(said))
    assert distributed.anywhere(False) is found
