"""Compiles a configuration's training step for TPUs or GPUs, on a machine that has none.

    python scripts/aot_compile.py --config=configs/tpu.py --topology=v5e:2x4 [--output=FILE.json]
                                  [--show=N] [--num_classes=4] [--config.<key>=<value> ...]

The compiler is libtpu's own (`make tpu-compiler`), so the figures are those of the program
that the accelerator would run. `--topology=h100:1x8` takes CUDA's (`jax[cuda12]`).
docs/performance.md says how to read them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import covid_flax.compiler.no_accelerator  # noqa: F401  what it does, it does when imported

# isort: split
import jax
from absl import flags
from ml_collections import config_flags

from covid_flax import config as config_lib
from covid_flax.command import no_such_config, run_command
from covid_flax.compiler import aot, hlo
from covid_flax.console import say
from covid_flax.errors import UserError
from covid_flax.files import write_atomically, write_json

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, with :variant where it has variants", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "generation and shape of the slice")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write the figures to")
_HLO = flags.DEFINE_string("hlo", "", "file to write the compiler's text to")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 4, "classes of the data", lower_bound=2)
_SHOW = flags.DEFINE_integer("show", 0, "list so many instructions that move most bytes")


def _main() -> None:
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(name.partition(":")[0]).is_file():
        raise UserError(no_such_config(name))
    config = _CONFIG.value
    config_lib.check_keys(config, name)
    config_lib.check(config)
    for path in filter(None, (_OUTPUT.value, _HLO.value)):
        if not Path(path).parent.is_dir():
            raise UserError(f"{path}: its folder does not exist: make it, or name another")
    mesh = aot.topology_mesh(_TOPOLOGY.value)
    say(f"compiling for {mesh.size} devices of {_TOPOLOGY.value}: minutes, for a ResNet50")
    jax.config.update("jax_enable_compilation_cache", False)  # what is measured is compiled
    try:
        compiled, seconds, costs = _compile(config, mesh)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(
            f"the step does not compile for {_TOPOLOGY.value} ({str(e).splitlines()[0]}): if it "
            "does not fit, lower train.batch_size or set train.micro_batch"
        ) from e
    of_program = costs["per_device_batch"]
    if config.train.micro_batch:
        say("and once more without micro-batches, for what a step costs in all")
        config.train.micro_batch = 0
        try:
            costs = aot.of_micro_batches(costs, _compile(config, mesh)[2])
        except jax.errors.JaxRuntimeError as e:  # it may not fit, which is why there are parts
            say(f"that failed ({str(e).splitlines()[0]}): all but the memory is of one part")
    figures = {"config": name, "topology": _TOPOLOGY.value, "compile_seconds": round(seconds, 1)}
    figures |= costs
    _print(figures)
    if _SHOW.value:
        _print_largest(compiled.as_text() or "", of_program, _SHOW.value)
    if _HLO.value:
        write_atomically(Path(_HLO.value), (compiled.as_text() or "").encode())
    if _OUTPUT.value:
        write_json(Path(_OUTPUT.value), figures, allow_nan=True)
        say(f"written: {_OUTPUT.value}")


def _compile(config: Any, mesh: Any) -> tuple[Any, float, dict[str, Any]]:
    """The program, the seconds it took, and what it costs."""
    lowered = aot.lower_step(config, mesh, _NUM_CLASSES.value)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    generation = _TOPOLOGY.value.partition(":")[0]
    batch = config.train.micro_batch or config.train.batch_size  # a loop's body is counted once
    return compiled, seconds, aot.cost(compiled, lowered, batch, mesh.size, generation)


def _print(figures: dict) -> None:
    share = figures["per_device_batch"]
    say(f"a step of {figures['devices'] * share:,} images, on each device {share:,}:")
    say(f"  {figures['flops_per_example'] / 1e9:10.2f} GFLOP an image")
    say(f"  {figures['hbm_bytes_per_example'] / 1e6:10.1f} MB an image, by the compiler's count")
    say(f"  {figures['hbm_only_bytes_per_example'] / 1e6:10.1f} MB of them in HBM")
    say(f"  {figures['temp_bytes_per_device'] / 1e9:10.2f} GB temporary memory")
    say(f"  {figures['argument_bytes_per_device'] / 1e9:10.2f} GB arguments")
    for kind, (count, size) in figures["collectives"].items():
        say(f"  {size / 1e6:10.1f} MB in {count} {kind} a step")
    say(f"  {figures['host_transfers']:10} transfers to or from the host")
    if figures["estimated_cycles"]:
        say(f"  {figures['estimated_cycles'] / 1e6:10.1f} million cycles, the compiler's estimate")
    for what, seconds in figures["bound_seconds"].items():
        say(f"  {seconds * 1e3:10.2f} ms by {what} alone at its peak")
    say(f"  {figures['bound_images_per_second']:10,.0f} images/s at most, on all devices")
    say("")
    say(f"{'':36}{'count':>6}  MB an image: HBM  on chip")
    for kind, (count, hbm, on_chip) in list(figures["bytes_by_kind"].items())[:12]:
        say(f"{kind:36}{count:6}{hbm / share / 1e6:18.2f}{on_chip / share / 1e6:9.2f}")


def _print_largest(text: str, share: int, count: int) -> None:
    say("")
    say("MB an image: HBM  on chip  cycles/1000  instruction")
    moved = hlo.traffic(hlo.parse(text))
    for t in sorted(moved, key=lambda t: -t.hbm - t.on_chip)[:count]:
        i = t.instruction
        say(
            f"{t.hbm / share / 1e6:16.2f}{t.on_chip / share / 1e6:9.2f}{i.cycles / 1e3:13,.0f}"
            f"  {t.kind} {i.name}: {hlo.plain(i.shape)} {i.op_name}"
        )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_command(_main)
