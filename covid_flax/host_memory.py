"""The memory that XLA takes anew at every step on a CPU: in large pages, and kept.

A step's temporary arrays, gigabytes for a ResNet50, are taken and given back at every step. glibc
returns them to the kernel, which has to clear each page before it hands it out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY = Path("/proc/meminfo")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_USUAL = {_M_MMAP_MAX: 65_536, _M_TRIM_THRESHOLD: 128 << 10}
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}


def prepare_allocator() -> None:
    """One arena for all threads, and huge pages, for which the process starts itself again.

    glibc (2.35 and newer) asks for huge pages only where it is told so before a process starts;
    in pages of 4 KiB the kernel spends a tenth of a step on handing them out. It does not start
    again where `GLIBC_TUNABLES` is set already, the kernel gives huge pages to all or to none, or
    the process is no command of this package's (but a notebook that runs one). To be called
    before there are other threads, and before JAX is imported.
    """
    version = _glibc()
    if version:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    if not version or "GLIBC_TUNABLES" in os.environ:
        return
    with contextlib.suppress(OSError):
        unasked = "[madvise]" in _HUGE_PAGES.read_text()
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        if unasked and module.startswith("covid_flax") and version >= (2, 35):
            tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | tunables)


def keep_memory() -> None:
    """Has glibc keep what is given back from now on, while there is room for three times the peak.

    It saves a sixth of a step of EfficientNet-Lite0 (docs/performance.md). The room is for arrays
    that do not fit the gaps which others leave. Where there is no longer enough all is given
    back, as before the first call. Nothing happens without glibc, or where `GLIBC_TUNABLES` says
    something else of it.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if not _glibc() or asked != "glibc.malloc.hugetlb=1":
        return
    libc = ctypes.CDLL(None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    enough = 3 * peak < _room(peak)
    for option, value in (_KEPT if enough else _USUAL).items():
        libc.mallopt(option, value)
    if not enough:
        libc.malloc_trim(0)


def _room(used: int) -> int:
    """Bytes that this process, which uses `used` of them, can have; 0 where that is unknown."""
    try:
        lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
        room = used + int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return 0
    with contextlib.suppress(OSError, ValueError):  # "max" where there is none
        room = min(room, int(_CGROUP_LIMIT.read_text()))
    return room


def _glibc() -> tuple[int, ...]:
    """glibc's version; empty where another library allocates."""
    if sys.platform != "linux":
        return ()
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else ()
    except (OSError, ValueError):
        return ()
