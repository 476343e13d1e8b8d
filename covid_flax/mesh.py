"""Where arrays live: one program over a mesh of devices (jit), or one a device (pmap).

`Layout` is what differs between them; the step function is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from covid_flax.compiler.xla import compiler_options

AXIS = "data"
# Arrays of fewer elements are not worth a collective of their own.
_SHARD_FROM = 2**14


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the state and the batches are placed, and the step compiled.

    Attributes:
      axis_name: the mapped axis that the step must average over, None under jit.
      place: a host or single-copy state to the form that checkpoints have.
      put_state, get_state: from that form to the one that steps take, and back: copies.
      compile_step: compiles `step(state, ...) -> (state, metrics)`; the state is donated.
      put_batch: a process's share of a batch (NumPy) to the devices.
    """

    axis_name: str | None
    place: Callable[[Any], Any]
    put_state: Callable[[Any], Any]
    get_state: Callable[[Any], Any]
    compile_step: Callable[[Callable], Callable]
    put_batch: Callable[[Any], Any]


def make_mesh() -> Mesh:
    """All devices of all processes, along one data axis: a process's stand side by side."""
    # Of a TPU slice the numbers of two hosts' devices may alternate.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.asarray(devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits a batch's leading axis over the mesh; each process gives its own share."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_indices(tree: Any, mesh: Mesh) -> Any:
    """As `put_batch`, but splits the last axis."""

    def put(x: np.ndarray) -> jax.Array:
        spec = PartitionSpec(*[None] * (x.ndim - 1), AXIS)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(put, tree)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """A copy of host arrays, the same in every process, on each device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def sharded(x: Any, mesh: Mesh) -> NamedSharding:
    """Of an array spread over the devices by its longest axis that divides among them."""
    axes = [i for i, n in enumerate(x.shape) if n % mesh.size == 0]
    if x.size < _SHARD_FROM or not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda i: x.shape[i])
    return NamedSharding(
        mesh, PartitionSpec(*(AXIS if i == longest else None for i in range(x.ndim)))
    )


def as_placed(state: Any, batch: Any, mesh: Mesh, *, shard_state: bool = False) -> tuple[Any, Any]:
    """Shapes of a state and a batch that need not be there, placed as `jit_layout` places them."""

    def like(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    split = NamedSharding(mesh, PartitionSpec(AXIS))
    return (
        jax.tree.map(
            lambda x: like(x, sharded(x, mesh) if shard_state else replicated(mesh)), state
        ),
        jax.tree.map(lambda x: like(x, split), batch),
    )


def jit_layout(mesh: Mesh, *, shard_state: bool = False) -> Layout:
    """Data parallelism by sharding: batch norm sees the global batch, XLA adds the sums.

    Args:
      mesh: the devices.
      shard_state: whether the state is spread over the devices too, each array where it is
        long enough, and gathered where a step needs it (ZeRO, Rajbhandari et al. 2020).
    """

    def shardings(state: Any) -> Any:
        return jax.tree.map(lambda x: sharded(x, mesh) if shard_state else replicated(mesh), state)

    def place(state: Any) -> Any:
        # A copy, for the caller's own arrays must outlive the first donating step. (Of an array of
        # one device spread over several, JAX may share that device's part; `put_state` copies it.)
        return jax.device_put(state, shardings(state), may_alias=False)

    def compile_step(step: Callable) -> Callable:
        def placed(state: Any, *args: Any) -> tuple[Any, Any]:
            state, metrics = step(state, *args)
            where = (shardings(state), jax.tree.map(lambda _: replicated(mesh), metrics))
            return jax.lax.with_sharding_constraint((state, metrics), where)

        # For a mesh of another platform the step is only lowered: it has no such options here.
        here = mesh.devices.flat[0].platform == jax.default_backend()
        options = compiler_options() if here else {}
        return jax.jit(placed, donate_argnums=0, compiler_options=options)

    return Layout(
        axis_name=None,
        place=place,
        put_state=place,
        # A copy, for the next step will donate the original's buffers.
        get_state=lambda state: jax.tree.map(jnp.copy, state),
        compile_step=compile_step,
        put_batch=lambda batch: put_batch(batch, mesh),
    )


def pmap_layout() -> Layout:
    """The step mapped over the local devices, averages over all of them by name."""
    devices = jax.local_device_count()
    mesh = make_mesh()
    spread = jax.pmap(lambda x: x)  # one function, so that it is compiled once

    def place(state: Any) -> Any:
        return jax.device_put(state, replicated(mesh), may_alias=False)

    def put_state(state: Any) -> Any:
        host = jax.device_get(state)
        stacked = jax.tree.map(lambda x: np.broadcast_to(x, (devices, *x.shape)), host)
        return spread(stacked)

    def get_state(state: Any) -> Any:
        # Onto the mesh: a checkpoint then looks the same whichever layout wrote it. Not by
        # `device_put`, by which hosts compare arrays, and no NaN is equal to itself.
        return put_whole(jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], state), mesh)

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

    return Layout(
        axis_name=AXIS,
        place=place,
        put_state=put_state,
        get_state=get_state,
        compile_step=lambda step: jax.pmap(step, axis_name=AXIS, donate_argnums=0),
        put_batch=lambda batch: jax.tree.map(split, batch),
    )


def make_layout(parallel: str, *, shard_state: bool = False) -> Layout:
    """`jit` or `pmap`, over every device there is."""
    return pmap_layout() if parallel == "pmap" else jit_layout(make_mesh(), shard_state=shard_state)
