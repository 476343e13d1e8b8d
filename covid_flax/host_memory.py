"""The memory that XLA takes anew at every step on a CPU: kept, and in large pages."""

from __future__ import annotations

import os
import sys

# One arena that grows and never shrinks, and huge pages where the kernel gives them on request.
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.arena_max=1",
        "glibc.malloc.mmap_max=0",
        f"glibc.malloc.trim_threshold={1 << 40}",
    )
)


def restart_with_kept_memory() -> None:
    """Starts the process again, its allocator keeping what is given back.

    A step's temporary arrays, gigabytes for a ResNet50, are taken and given back at every step.
    glibc returns them to the kernel, which must clear each page before handing it out again:
    a sixth of the time of a step of EfficientNet-Lite0. Its tunables (glibc's manual, "Memory
    Allocation Tunables"; 2.35 and newer has them all) are read only before a process starts.
    The process does not shrink then, which costs no more than its peak. Nothing happens where
    `GLIBC_TUNABLES` is set already, or there is no such glibc. To be called before JAX is
    imported.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        new_enough = tuple(map(int, version.split("."))) >= (2, 35)
    except (OSError, ValueError):
        return
    if name == "glibc" and new_enough:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
