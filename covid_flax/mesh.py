"""Where arrays live: one program over a mesh of devices (jit), or one a device (pmap).

The training loop sees only `Layout`; the step function is the same under both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the state and the batches are placed, and the step compiled.

    Attributes:
      axis_name: the mapped axis that the step must average over, None under jit.
      compile_step: wraps `step(state, batch) -> (state, metrics)`; the state is donated.
      put_state, get_state: host or single-copy pytree to the layout's form, and back.
      put_batch: a process's share of a batch (NumPy) to the devices.
    """

    axis_name: str | None
    compile_step: Callable[[Callable], Callable]
    put_state: Callable[[Any], Any]
    get_state: Callable[[Any], Any]
    put_batch: Callable[[Any], Any]


def make_mesh() -> Mesh:
    """All devices of all processes, along one data axis."""
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits a batch's leading axis over the mesh; each process gives its own share."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def jit_layout(mesh: Mesh) -> Layout:
    """Data parallelism by sharding: batch norm sees the global batch, XLA adds the sums."""
    whole = replicated(mesh)
    return Layout(
        axis_name=None,
        compile_step=lambda step: jax.jit(step, donate_argnums=0, out_shardings=(whole, whole)),
        # A copy, for the caller's own arrays must outlive the first donating step.
        put_state=lambda state: jax.device_put(state, whole, may_alias=False),
        # A copy, for the next step will donate the original's buffers.
        get_state=lambda state: jax.tree.map(jnp.copy, state),
        put_batch=lambda batch: put_batch(batch, mesh),
    )


def pmap_layout() -> Layout:
    """The step mapped over the local devices, averages over all of them by name."""
    devices = jax.local_device_count()
    mesh = make_mesh()

    def put_state(state: Any) -> Any:
        host = jax.tree.map(np.asarray, state)
        stacked = jax.tree.map(lambda x: np.broadcast_to(x, (devices, *x.shape)), host)
        return jax.pmap(lambda x: x)(stacked)

    def get_state(state: Any) -> Any:
        # Onto the mesh: a checkpoint then looks the same whichever layout wrote it.
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x[0]), replicated(mesh)), state)

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

    return Layout(
        axis_name=AXIS,
        compile_step=lambda step: jax.pmap(step, axis_name=AXIS, donate_argnums=0),
        put_state=put_state,
        get_state=get_state,
        put_batch=lambda batch: jax.tree.map(split, batch),
    )


def make_layout(parallel: str) -> Layout:
    """`jit` or `pmap`, over every device there is."""
    return pmap_layout() if parallel == "pmap" else jit_layout(make_mesh())
