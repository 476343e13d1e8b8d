"""The memory that XLA takes anew at every step on a CPU: in large pages, and kept.

A step's temporary arrays, gigabytes for a ResNet50, are taken and given back at every step. glibc
returns them to the kernel, which has to clear each page before it hands it out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "glibc.malloc.hugetlb=1"
# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
# The ends of the range in which glibc sets its thresholds itself, until a call sets one.
_USUAL = {_M_MMAP_MAX: 65_536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}


def prepare_allocator() -> None:
    """One arena for all threads, and huge pages, for which the process starts itself again.

    glibc (2.35 and newer) asks for huge pages only where it is told so before a process starts;
    in pages of 4 KiB the kernel spends a tenth of a step on handing them out. It does not start
    again where the kernel gives huge pages to all or to none, or the process is no command of this
    package's (but a notebook that runs one). Nothing happens where `GLIBC_TUNABLES` is the user's.
    To be called before there are other threads, and before JAX is imported.
    """
    version, tunables = _glibc(), os.environ.get("GLIBC_TUNABLES")
    if not version or tunables not in (None, _TUNABLES):
        return
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    if tunables is not None:
        return
    with contextlib.suppress(OSError):
        unasked = "[madvise]" in _HUGE_PAGES.read_text()
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        if unasked and module.startswith("covid_flax") and version >= (2, 35):
            environment = os.environ | {"GLIBC_TUNABLES": _TUNABLES}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


class KeptMemory:
    """A context in which glibc can be told to keep what is given back to it.

    That saves an eighth of a step of EfficientNet-Lite0 (docs/performance.md), and takes room: an
    array that does not fit the gaps which others leave is put behind them. Nothing happens without
    glibc, or where `GLIBC_TUNABLES` is the user's.
    """

    def __init__(self) -> None:
        ours = os.environ.get("GLIBC_TUNABLES") in (None, _TUNABLES)
        self._libc = ctypes.CDLL(None) if _glibc() and ours else None
        self._kept = False

    def __enter__(self) -> KeptMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep(False)

    def keep_if_room(self) -> None:
        """From now on, where three times the process's peak would fit the machine; else no more."""
        self._keep(0 < 3 * _peak() < _room())

    def _keep(self, wanted: bool) -> None:
        if self._libc is None or wanted == self._kept:
            return
        for option, value in (_KEPT if wanted else _USUAL).items():
            self._libc.mallopt(option, value)
        if not wanted:
            self._libc.malloc_trim(0)
        self._kept = wanted


def _peak(root: Path = Path("/")) -> int:
    """Bytes that this process had at most; 0 where that is unknown.

    `getrusage` would count what the process was copied from.
    """
    return _kilobytes(root / "proc/self/status", "VmHWM:")


def _kilobytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
    except (OSError, ValueError, StopIteration):
        return 0


def _room(root: Path = Path("/")) -> int:
    """Bytes that this process can have, those it uses among them; 0 where that is unknown."""
    free = _kilobytes(root / "proc/meminfo", "MemAvailable:")
    used = _kilobytes(root / "proc/self/status", "VmRSS:")
    return min([free + used, *_limits(root)]) if free else 0


def _limits(root: Path) -> Iterator[int]:
    """Of the control groups that the process is in (a container's, a batch job's), in bytes."""
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, name = groups, "memory.max"
            if controllers:  # of version 1
                top, name = groups / "memory", "memory.limit_in_bytes"
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = top / path.lstrip("/")
            for place in [folder, *folder.parents]:
                with contextlib.suppress(OSError, ValueError):  # "max" where there is none
                    yield int((place / name).read_text())
                if place == top:
                    break


def _glibc() -> tuple[int, ...]:
    """glibc's version; empty where another library allocates."""
    if sys.platform != "linux":
        return ()
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else ()
    except (OSError, ValueError):
        return ()
