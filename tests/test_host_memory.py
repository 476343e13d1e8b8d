"""A process that restarts itself: judged from outside."""

import os
import re
import subprocess
import sys

import pytest

from covid_flax import host_memory

_RESTARTS = """
import os, sys
from covid_flax import host_memory
print("started", os.getpid(), flush=True)
host_memory.restart_with_kept_memory()
print(os.environ.get("GLIBC_TUNABLES", "-"), sys.argv[1:], flush=True)
"""

# Takes and gives back 90 MB, as a step does; prints how many pages it was handed the second time.
_TAKES_AGAIN = """
import resource, threading
import numpy as np
from covid_flax import host_memory
host_memory.restart_with_kept_memory()

def take_in_a_thread():
    thread = threading.Thread(target=lambda: [np.ones(3_000_000, np.uint8) for _ in range(30)])
    thread.start()
    thread.join()

take_in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take_in_a_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", os.confstr("CS_GNU_LIBC_VERSION") or "0"))) < (2, 35),
    reason="needs glibc 2.35",
)


def _run(program, *arguments, **env):
    command = [sys.executable, "-X", "utf8", "-c", program, *arguments]
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@needs_glibc
def test_it_restarts_once_as_the_same_process_with_the_same_arguments():
    first, second, last = _run(_RESTARTS, "a b", "--c")
    assert first == second
    assert last.startswith("glibc.malloc.") and last.endswith(" ['a b', '--c']")


@needs_glibc
def test_memory_given_back_is_not_asked_of_the_kernel_again():
    (kept,) = _run(_TAKES_AGAIN)
    (without,) = _run(_TAKES_AGAIN, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert int(kept) < 1_000
    assert int(without) > 10 * int(kept)


def test_a_setting_of_the_user_s_stands():
    lines = _run(_RESTARTS, "--c", GLIBC_TUNABLES="glibc.malloc.arena_max=1")
    assert lines[1:] == ["glibc.malloc.arena_max=1 ['--c']"]


@pytest.mark.parametrize("library", ["glibc 2.34", "musl 1.2", None])
def test_nor_where_the_allocator_has_no_such_settings(monkeypatch, library):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "confstr", lambda name: library)
    monkeypatch.setattr(os, "execv", lambda *args: pytest.fail("restarted"))
    host_memory.restart_with_kept_memory()
