"""An allocator told to keep memory, and a process that restarts itself: judged from outside."""

import os
import re
import subprocess
import sys

import pytest

from covid_flax import host_memory

_RESTARTS = """
import os, sys
from pathlib import Path
from covid_flax import host_memory
host_memory._HUGE_PAGES = Path(sys.argv[1])
print("started", os.getpid(), flush=True)
host_memory.prepare_allocator()
print(os.environ.get("GLIBC_TUNABLES", "-"), sys.argv[2:], flush=True)
"""

# Takes and gives back 300 MB, as a step does; prints how many pages it was handed once more.
_TAKES_AGAIN = """
import resource, sys, threading
import numpy as np
from covid_flax import host_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=lambda: [np.ones(6_000_000, np.uint8) for _ in range(50)])
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

host_memory.prepare_allocator()
pages()
counts = [pages()]
with host_memory.KeptMemory() as memory:
    for room in map(int, sys.argv[1:]):
        if room:
            host_memory._room = lambda: room * host_memory._peak()
        memory.keep_if_room()
        pages()
        counts.append(pages())
pages()
print(*counts, pages())
"""

needs_glibc = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", os.confstr("CS_GNU_LIBC_VERSION") or "0"))) < (2, 35),
    reason="needs glibc 2.35",
)


def _run(tmp_path, program, *arguments, **env):
    (tmp_path / "covid_flax_probe.py").write_text(program)
    command = [sys.executable, "-X", "utf8", "-m", "covid_flax_probe", *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    clean["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _setting(tmp_path, text="always [madvise] never"):
    path = tmp_path / "enabled"
    path.write_text(text)
    return path


@needs_glibc
def test_it_restarts_once_as_the_same_process_with_the_same_arguments(tmp_path):
    first, second, last = _run(tmp_path, _RESTARTS, _setting(tmp_path), "a b", "--c")
    assert first == second
    assert last == "glibc.malloc.hugetlb=1 ['a b', '--c']"


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]"])
def test_it_does_not_where_that_would_change_nothing(tmp_path, setting):
    assert len(_run(tmp_path, _RESTARTS, _setting(tmp_path, setting))) == 2


@needs_glibc
def test_a_setting_of_the_user_s_stands(tmp_path):
    tunables = "glibc.malloc.hugetlb=0"
    lines = _run(tmp_path, _RESTARTS, _setting(tmp_path), "--c", GLIBC_TUNABLES=tunables)
    assert lines[1:] == [f"{tunables} ['--c']"]
    (counts,) = _run(tmp_path, _TAKES_AGAIN, 9, GLIBC_TUNABLES=tunables)
    before, after, _ = map(int, counts.split())
    assert after > before / 2


def test_another_program_that_runs_a_command_is_not_started_again(tmp_path):
    """A notebook, say."""
    program = "import runpy, sys; runpy.run_module('covid_flax_probe', run_name='__main__')"
    (tmp_path / "covid_flax_probe.py").write_text(_RESTARTS)
    command = [sys.executable, "-c", program, str(_setting(tmp_path))]
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("library", ["glibc 2.34", "musl 1.2", None])
def test_nor_where_the_allocator_has_no_such_setting(monkeypatch, library):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "confstr", lambda name: library)
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("restarted"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "covid_flax.main"])
    host_memory.prepare_allocator()


@needs_glibc
def test_memory_is_kept_while_there_is_room_for_it(tmp_path):
    """Pages are huge ones, where the kernel has them; 0 is the room of this machine."""
    (counts,) = _run(tmp_path, _TAKES_AGAIN, 0, 9, 2, 9)
    usual, kept, still, given_back, kept_again, afterwards = map(int, counts.split())
    assert min(usual, given_back, afterwards) > 10 * max(kept, still, kept_again, 1)


@pytest.mark.parametrize(
    "group, file",
    [
        ("0::/slice/job", "slice/job/memory.max"),
        ("0::/slice/job", "slice/memory.max"),
        ("0::/", "memory.max"),
        ("0::/../elsewhere", "memory.max"),
        ("5:cpu:/x\n4:hugetlb,memory:/slurm/job_1\n0::/", "memory/slurm/memory.limit_in_bytes"),
    ],
)
def test_the_room_is_the_machine_s_or_a_control_group_s(tmp_path, group, file):
    assert host_memory._room(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  4 kB\n")
    (tmp_path / "proc/self/status").write_text("VmHWM:  3 kB\nVmRSS:\t 2 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
    machine = 6 * 1024
    assert host_memory._room(tmp_path) == machine and host_memory._peak(tmp_path) == 3 * 1024
    limit = tmp_path / "sys/fs/cgroup" / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    for text, room in (("max\n", machine), ("3000\n", 3_000), ("999999999\n", machine)):
        limit.write_text(text)
        assert host_memory._room(tmp_path) == room
