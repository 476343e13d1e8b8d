"""Which of several processes holds the others up.

Steps are collective: all processes are as slow as the slowest, and the rate on the console does
not tell whose fault it is. Two things do, compared once an epoch: the share of the time in which a
process waited for its own images (its disk, its decoding), and how long the same arithmetic takes
it alone (a throttled chip, a host that others use).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# What makes a process stand out from the median of the others.
MORE_WAITING = 0.1  # of the epoch
TIMES_SLOWER = 2.0

_SIDE = 1024


@jax.jit
def _product(x: jax.Array) -> jax.Array:
    return x @ x


def probe_seconds() -> float:
    """Of a product of two float32 matrices of 1,024 on this process's first device; best of 5."""
    x = jax.device_put(np.ones((_SIDE, _SIDE), np.float32), jax.local_devices()[0])
    jax.block_until_ready(_product(x))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(_product(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def straggler(waiting: Sequence[float], probes: Sequence[float]) -> str:
    """A line about the process that stands out; empty where none does.

    Args:
      waiting: by process, the share of an epoch's time spent waiting for images.
      probes: by process, `probe_seconds`.
    """
    said = []
    process = int(np.argmax(waiting))
    others = float(np.median(np.delete(waiting, process)))
    if waiting[process] - others > MORE_WAITING:
        said.append(
            f"process {process} waited for its images {waiting[process]:.0%} of the epoch, the "
            f"others {others:.0%}: all wait for it; look at its disk, or raise data.num_threads"
        )
    process = int(np.argmax(probes))
    others = float(np.median(np.delete(probes, process)))
    if probes[process] > TIMES_SLOWER * others:
        said.append(
            f"process {process} takes {probes[process] / others:.1f} times as long as the others "
            "for the same arithmetic: its device is throttled or shared"
        )
    return "; ".join(said)


def find_straggler(waiting: float) -> str:
    """The line, of figures that all processes send each other; all must call it.

    Args:
      waiting: this process's share of the epoch's time.
    """
    if jax.process_count() == 1:
        return ""
    from jax.experimental import multihost_utils

    mine = jnp.asarray([waiting, probe_seconds()], jnp.float32)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    return straggler(everyone[:, 0].tolist(), everyone[:, 1].tolist())
