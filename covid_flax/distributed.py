"""Several processes, one run: JAX's distributed runtime, started, watched and ended.

A command that finds no sign of others is a run of one process: nothing is started. Else all
processes meet at the coordinator (process 0), and each of them watches a key of JAX's own
key-value store: a process that fails says so there, and all end with its line instead of
waiting in a collective for one that will not come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax._src import cloud_tpu_init
from jax._src import distributed as jax_distributed

from covid_flax.errors import UserError

_OVER = "covid_flax/over"  # why the run ends: of whoever says it first
_HEARD = "covid_flax/heard/"  # who has read it
_ALIVE = "covid_flax/alive/"  # counters, by process
_DAY_MS = 24 * 3600 * 1000
_GRACE_S = 5.0  # for the others to read why process 0, which holds the store, ends


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where this process stands; what is None the launcher tells JAX.

    Attributes:
      coordinator: `host:port` of process 0.
      num_processes, process_id: of the run, and of this process in it.
      local_devices: ids of the GPUs that are this process's; None leaves it to JAX.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: Sequence[int] | None = None


def define_flags() -> None:
    """The flags of a command that several processes may run together."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where several processes meet")
    flags.DEFINE_integer("num_processes", None, "how many processes train together")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    flags.DEFINE_list("local_devices", [], "ids of this process's GPUs; empty: JAX chooses")
    flags.DEFINE_integer("init_timeout", 300, "seconds that processes wait for each other at first")
    flags.DEFINE_integer("peer_timeout", 60, "seconds of silence after which a process is lost")


def from_flags(values: Any, environ: Mapping[str, str]) -> Cluster | None:
    """What flags, then the environment, say of other processes; None for a run of one.

    Args:
      values: of `define_flags`.
      environ: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID and
        JAX_LOCAL_DEVICE_IDS stand for the flags; Slurm's and Open MPI's variables are read.

    Raises:
      UserError: what is said is wrong, or not all of it is.
    """
    coordinator = values.coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None
    count = _number(values.num_processes, "num_processes", environ, "JAX_NUM_PROCESSES")
    process = _number(values.process_id, "process_id", environ, "JAX_PROCESS_ID")
    ids = values.local_devices or environ.get("JAX_LOCAL_DEVICE_IDS", "").split(",")
    try:
        devices = [int(i) for i in ids if i] or None
    except ValueError:
        raise UserError(f"--local_devices={','.join(ids)}: give numbers, like 0,1") from None
    for name in ("init_timeout", "peer_timeout"):
        if getattr(values, name) < 1:
            raise UserError(f"--{name}={getattr(values, name)}: give at least 1 second")

    if coordinator is None and count is None and process is None:
        if _launched(environ):
            return Cluster(local_devices=devices)
        if devices:
            raise UserError("--local_devices is for one of several processes: give --coordinator")
        return None
    if coordinator is not None:
        _check_address(coordinator)
        # A launcher that does not say where process 0 is still counts its processes.
        count = _launcher_number(count, environ, "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
        process = _launcher_number(process, environ, "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    said = {"coordinator": coordinator, "num_processes": count, "process_id": process}
    missing = [f"--{name}" for name, value in said.items() if value is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing: give all of --coordinator=HOST:PORT, "
            "--num_processes=N and --process_id=I, or none"
        )
    assert count is not None and process is not None
    if count < 1 or not 0 <= process < count:
        raise UserError(
            f"--process_id={process} of --num_processes={count}: processes count from 0 to "
            "num_processes - 1"
        )
    return Cluster(coordinator, count, process, devices)


def _number(flag: int | None, name: str, environ: Mapping[str, str], variable: str) -> int | None:
    if flag is not None or not environ.get(variable):
        return flag
    try:
        return int(environ[variable])
    except ValueError:
        raise UserError(
            f"{variable}={environ[variable]}: not a number; --{name} overrides it"
        ) from None


def _launcher_number(said: int | None, environ: Mapping[str, str], *names: str) -> int | None:
    there = [environ[name] for name in names if environ.get(name, "").isdecimal()]
    return said if said is not None or not there else int(there[0])


def _check_address(address: str) -> None:
    match = re.fullmatch(r"(?:[^\s:/\[\]]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", address)
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise UserError(f"--coordinator={address}: give HOST:PORT, like 10.0.0.1:8476")


def _check_port(coordinator: str) -> None:
    """Refuses a port that cannot be had: JAX may crash on it."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as e:
        raise UserError(
            f"process 0 cannot listen at --coordinator={coordinator} ({e.strerror}): choose "
            "another port"
        ) from e


def _launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows started several processes. Asks nobody."""
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UserError(
                "this Open MPI does not tell JAX where process 0 runs: give --coordinator=HOST:PORT"
            )
        return True
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm) and environ.get("SLURM_NTASKS", "1") != "1":
        return True
    return cloud_tpu_init.running_in_cloud_tpu_vm and environ.get("JAX_PLATFORMS", "") != "cpu"


class Watch:
    """One process's eyes on the others, by a thread of its own.

    Args:
      client: of JAX's coordination service.
      process_id, num_processes: of this process and of the run.
      timeout: seconds of silence after which process 0 calls a process lost.
    """

    def __init__(self, client: Any, process_id: int, num_processes: int, timeout: float):
        self.client, self.process_id, self.num_processes = client, process_id, num_processes
        self._timeout = timeout
        self.speaking = threading.Lock()  # held by the thread that ends the process
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def announce(self, status: int, line: str, absent: int = 0) -> None:
        """Tells the others, less the absent, that this process ends; the first is heard."""
        said = json.dumps({"process": self.process_id, "status": status, "line": line})
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another spoke first
            self.client.key_value_set(_OVER, said)
        self._heard(absent)

    def finish(self) -> None:
        """Waits for all processes to be done, and ends the thread."""
        self.client.wait_at_barrier("covid_flax/done", _DAY_MS)
        if self.process_id == 0:
            self.client.key_value_set(_OVER, "")
        self._thread.join()

    def _heard(self, absent: int = 0) -> None:
        """Says that this process knows; process 0 then waits until all but the absent do.

        For JAX aborts the others as soon as process 0, which holds the store, is gone.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{_HEARD}{self.process_id}", "", True)
            if self.process_id == 0:
                expected, deadline = self.num_processes - absent, time.monotonic() + _GRACE_S
                while len(self.client.key_value_dir_get(_HEARD)) < expected:
                    if time.monotonic() > deadline:
                        return
                    time.sleep(0.05)
                time.sleep(0.3)

    def _watch(self) -> None:
        period = min(1.0, self._timeout / 5)
        beats, last = 0, dict.fromkeys(range(1, self.num_processes), ("", time.monotonic()))
        while True:
            try:
                self.client.key_value_set(f"{_ALIVE}{self.process_id}", str(beats), True)
                over = self.client.blocking_key_value_get(_OVER, int(1000 * period))
            except jax.errors.JaxRuntimeError as e:
                if "DEADLINE_EXCEEDED" in str(e):
                    beats += 1
                    if self.process_id == 0:
                        self._judge(last)
                    continue
                end("process 0 cannot be reached any more: it was killed, or the network broke", 1)
            if over:
                why = json.loads(over)
                if why["process"] != self.process_id and self.speaking.acquire(blocking=False):
                    self._heard()
                    end(f"process {why['process']}: {why['line']}", why["status"])
            return

    def _judge(self, last: dict[int, tuple[str, float]]) -> None:
        """Ends the run where a process has been silent for too long."""
        now = time.monotonic()
        for key, beat in self.client.key_value_dir_get(_ALIVE):
            process = int(key.rpartition("/")[2])
            if process and last[process][0] != beat:
                last[process] = beat, now
        silent = [p for p, (_, since) in last.items() if now - since > self._timeout]
        if silent:
            line = (
                f"process {', '.join(map(str, silent))} of {self.num_processes} was killed or lost "
                f"(silent for {self._timeout:g} s): start all again, the run goes on from its "
                "last checkpoint"
            )
            print(f"error: {line}", file=sys.stderr, flush=True)
            self.announce(1, line, absent=len(silent))
            os._exit(1)


_watch: Watch | None = None


def initialize() -> None:
    """Joins the other processes that flags, environment or launcher tell of, if any.

    Call once, after the flags are parsed and before JAX makes a device. Waits at most
    `--init_timeout` seconds for all processes to come, and then ends the process with status
    2 and a line; JAX itself would abort.

    Raises:
      UserError: as `from_flags`, or the port of process 0 cannot be had.
    """
    global _watch
    values = flags.FLAGS
    cluster = from_flags(values, os.environ)
    if cluster is None:
        return
    if cluster.coordinator and cluster.process_id == 0:
        _check_port(cluster.coordinator)
    # JAX would otherwise catch SIGTERM, to save at preemption: we then could not be ended.
    jax.config.update("jax_enable_preemption_service", False)
    with _time_limit(values.init_timeout, cluster):
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.num_processes,
                cluster.process_id,
                cluster.local_devices,
                cluster_detection_method="deactivate" if cluster.coordinator else None,
                # Behind ours, which end with a line where JAX's abort.
                initialization_timeout=values.init_timeout + 60,
                heartbeat_timeout_seconds=values.peer_timeout + 30,
            )
        except (RuntimeError, ValueError) as e:
            if cluster.coordinator is None and "should be defined" in str(e):
                return  # a TPU of one host, with nobody to ask
            raise UserError(
                f"the processes cannot meet ({' '.join(str(e).split())}): give --coordinator, "
                "--num_processes and --process_id"
            ) from e
    state = jax_distributed.global_state
    if state.num_processes > 1:
        _watch = Watch(state.client, state.process_id, state.num_processes, values.peer_timeout)
        if jax.default_backend() == "gpu":
            # XLA shares the search for the fastest kernels among the processes: one that finds its
            # program compiled shares nothing, and another, which does not, would wait for it.
            jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def _time_limit(seconds: int, cluster: Cluster) -> Iterator[None]:
    if cluster.process_id == 0:
        who = f"not all of the {cluster.num_processes} processes came to {cluster.coordinator}"
    else:
        who = f"cannot meet the other processes at {cluster.coordinator or 'the coordinator'}"
    line = f"{who} within {seconds} s: start all, open the port, or raise --init_timeout"
    timer = threading.Timer(seconds, end, (line, 2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def barrier(name: str) -> None:
    """Waits until every process has come here; nothing in a run of one."""
    if _watch is not None:
        _watch.client.wait_at_barrier(f"covid_flax/{name}", _DAY_MS)


def anywhere(here: bool) -> bool:
    """Whether it is so in any process of the run; all must ask."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


def of_first(numbers: Sequence[int]) -> list[int]:
    """Process 0's numbers, below 2^31, in every process of the run; all must ask."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array([*numbers, 0], np.int32), count)  # of another length, of no meaning
    return [int(n) for n in multihost_utils.broadcast_one_to_all(mine)] if count else []


def shutdown() -> None:
    """Leaves the run in good order: waits for the others, for process 0 may still write."""
    global _watch
    if _watch is not None:
        _watch.finish()
        _watch = None
        jax.distributed.shutdown()


def fail(line: str, status: int, *, printed: bool = False) -> None:
    """Where there are other processes: says why this one ends, tells them, and ends it.

    Not by way of `sys.exit`: JAX would wait there for the others. `printed` says that the
    user has been told already.
    """
    if _watch is not None:
        _watch.speaking.acquire()
        if not printed:
            print(f"error: {line}", file=sys.stderr)
        _watch.announce(status, line)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective or a barrier failed, as it does where another process ended."""
    if _watch is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    signs = r"gloo|nccl|connection (closed|reset|refused)|socket|barrier|heartbeat|UNAVAILABLE"
    if not re.search(signs, str(error), re.IGNORECASE):
        return False
    time.sleep(2 * min(1.0, _watch._timeout / 5))  # the one that ended may have said why
    return True


def end(line: str, status: int) -> NoReturn:
    """Ends the process from any of its threads."""
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    os._exit(status)
