"""Compiles the training step for accelerators that need not be there, and sums up its cost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.lib import xla_client
from jax.experimental import topologies
from jax.sharding import Mesh

from covid_flax.compiler import hlo
from covid_flax.compiler.chips import PEAKS
from covid_flax.config import keeps_averages
from covid_flax.errors import UserError
from covid_flax.feature_cache import cacheable
from covid_flax.job import step_config_of
from covid_flax.mesh import AXIS, as_placed, jit_layout
from covid_flax.models import (
    MODELS,
    create_model,
    trained_stages,
)
from covid_flax.optimizer import learning_rate_schedule, make_optimizer
from covid_flax.run import check_division
from covid_flax.step import abstract_batch, create_state, make_train_step

_GENERATIONS = ("v4", "v5e", "v5p", "v6e", "h100")
# What XLA must know of a GPU that is not there; limits from NVIDIA's CUDA programming guide
# (compute capability 9.0) and the H100 data sheet.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def tpu_compiler() -> Path | None:
    """libtpu: where `TPU_LIBRARY_PATH` says, or where `make tpu-compiler` puts it."""
    made = Path(sys.prefix) / "tpu-compiler" / "libtpu" / "libtpu.so"
    named = os.environ.get("TPU_LIBRARY_PATH")
    return Path(named) if named else made if made.exists() else None


def topology_mesh(name: str) -> Mesh:
    """A mesh over devices that the installed compiler knows, there or not.

    Args:
      name: generation and shape: `v5e:2x4` (a TPU's chips), `h100:1x8` (hosts, GPUs of each).

    Raises:
      UserError: no compiler for them is installed, or it does not know the topology.
    """
    generation, _, shape = name.partition(":")
    if generation not in _GENERATIONS:
        raise UserError(f"--topology={name}: name one such as v5e:2x4 ({', '.join(_GENERATIONS)})")
    try:
        if generation == "h100":
            topology = topologies.get_topology_desc(
                "", "cuda", target_config=_H100, topology=f"1x{shape}"
            )
        else:
            library = tpu_compiler()
            if library is not None:
                os.environ["TPU_LIBRARY_PATH"] = str(library)
            topology = topologies.get_topology_desc(name, "tpu")
    except RuntimeError as e:  # NotImplementedError and JAX's own errors are of this kind
        if "not installed" in str(e):
            raise UserError(
                "no TPU compiler is installed: make tpu-compiler, or set TPU_LIBRARY_PATH to a "
                "libtpu.so"
            ) from e
        if isinstance(e, NotImplementedError):
            raise UserError(
                "no CUDA compiler is installed: python -m pip install 'jax[cuda12]'"
            ) from e
        raise UserError(f"--topology={name}: {' '.join(str(e).split())[:200]}") from e
    return Mesh(np.asarray(topology.devices), (AXIS,))


def lower_step(config: Any, mesh: Mesh, num_classes: int) -> jax.stages.Lowered:
    """The step that a run of this configuration trains with, lowered for a mesh.

    Where the run would cache the frozen stages' output, the step starts from that. Raises
    UserError where the batch does not divide among the devices, of a step with a teacher, and
    where train.parallel is not jit.
    """
    if config.train.parallel != "jit":
        raise UserError("a topology is compiled for train.parallel=jit only: set that")
    check_division(config.train, mesh.size)
    if config.train.teacher:
        raise UserError(
            "a teacher's part of the step is not compiled: give --config.train.teacher="
        )
    graphdef, params, batch_stats = create_model(config.model, num_classes, config.seed)
    trained = trained_stages(config.model)
    cached = cacheable(config)
    # The number of steps turns up in constants only.
    schedule = learning_rate_schedule(config.optimizer, 1000, 1)
    tx = make_optimizer(config.optimizer, schedule, MODELS[config.model.name].stages)
    weights = (1.0,) * num_classes if config.train.class_weights == "balanced" else None
    step_config = step_config_of(
        config,
        start=None if cached is None else trained[0],
        class_weights=weights,
        micro_batch=config.train.micro_batch,
        swa_after=config.train.swa_start,  # in epochs: the number is a constant, and costs nothing
    )
    average = keeps_averages(config)
    state = create_state(
        params,
        batch_stats,
        frozenset(trained),
        tx,
        config.seed,
        average=average,
        start_share=config.train.start_share,
    )

    batch, size = config.train.batch_size, config.data.image_size
    examples: Any = abstract_batch(graphdef, params, batch_stats, batch, size, cached)
    layout = jit_layout(mesh, shard_state=config.train.shard_state)
    step: Any = layout.compile_step(make_train_step(graphdef, tx, step_config))
    return step.lower(*as_placed(state, examples, mesh, shard_state=config.train.shard_state))


def cost(
    compiled: jax.stages.Compiled,
    lowered: jax.stages.Lowered,
    batch: int,
    devices: int,
    generation: str,
) -> dict[str, Any]:
    """What a step costs one device, ready for JSON.

    Args:
      compiled, lowered: the step.
      batch: examples of a step over all devices.
      devices: how many.
      generation: a key of `covid_flax.compiler.chips.PEAKS`.

    Returns:
      By the compiler's count (the CUDA one makes none: ours then): `flops_per_example` and
      `hbm_bytes_per_example` (its "bytes accessed": every read and write outside of fused
      code, of on-chip memory too). Read off its text: `hbm_only_bytes_per_example`,
      `on_chip_bytes_per_example`,
      `bytes_by_kind` (a step's, `[how many, HBM, on chip]`), `collectives` (a step's, `[how
      many, bytes]`), `collective_bytes_per_step`, `host_transfers`, `estimated_cycles` (its
      estimate for a step, 0 where it makes none). Memory in bytes: `temp_bytes_per_device`,
      `argument_`, `output_`, `alias_bytes_per_device`. `bound_seconds` by `flops`, `hbm` and
      `collectives`, were each alone at its peak; `bound_images_per_second` of all devices by
      the slowest of them.
    """
    share = batch // devices
    analysis = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text() or "")
    moved = hlo.traffic(module)
    collectives = hlo.collectives(module)
    exchanged = sum(size for _, size in collectives.values())
    hbm = sum(t.hbm for t in moved)
    if analysis is None:  # the CUDA compiler makes none: flops as written, bytes as read here
        analysis = {"flops": _flops(lowered) / devices, "bytes accessed": hbm}
    peak = PEAKS[generation]
    bounds = {
        "flops": analysis["flops"] / peak.flops,
        "hbm": hbm / peak.hbm,
        "collectives": _sent(collectives, devices) / peak.links,
    }
    return {
        "devices": devices,
        "per_device_batch": share,
        "flops_per_example": analysis["flops"] / share,
        "hbm_bytes_per_example": analysis["bytes accessed"] / share,
        "hbm_only_bytes_per_example": hbm / share,
        "on_chip_bytes_per_example": sum(t.on_chip for t in moved) / share,
        "bytes_by_kind": hlo.by_kind(moved),
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "output_bytes_per_device": memory.output_size_in_bytes,
        "alias_bytes_per_device": memory.alias_size_in_bytes,
        "collectives": collectives,
        "collective_bytes_per_step": exchanged,
        "host_transfers": len(hlo.host_transfers(module)),
        "estimated_cycles": sum(t.instruction.cycles for t in moved),
        "bound_seconds": bounds,
        "bound_images_per_second": batch / max(bounds.values()),
    }


def _sent(collectives: dict[str, tuple[int, int]], devices: int) -> float:
    """Bytes that a device sends in a ring (Patarasuk and Yuan 2009), by those of the outputs."""
    part = (devices - 1) / devices  # all but the device's own
    shares = {"all-reduce": 2 * part, "all-gather": part, "all-to-all": part}
    shares["reduce-scatter"] = devices - 1.0  # whose output is one of as many parts
    return sum(shares.get(kind, 1.0) * size for kind, (_, size) in collectives.items())


def of_micro_batches(parts: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """What a step in micro-batches costs: a loop's body, which compilers count once, counts whole.

    Args:
      parts: `cost` of that step, whose memory holds.
      whole: of the same step without micro-batches, whose counts hold.
    """
    return whole | {key: parts[key] for key in parts if key.endswith("_bytes_per_device")}


def _flops(lowered: jax.stages.Lowered) -> float:
    """Of the program before XLA's optimisations, over all devices."""
    program: Any = lowered.compiler_ir("hlo")
    client = jax.devices("cpu")[0].client
    return xla_client._xla.hlo_module_cost_analysis(client, program.as_hlo_module())["flops"]
