"""The networks side by side: `python -m covid_flax.models [--names=...] [--image_size=...]`.

Of the network for four classes, forward, an image of the size it was designed for: parameters,
arithmetic as XLA counts it, memory traffic of the program that a TPU v5e would run (where `make
tpu-compiler` has put its compiler), and the images a second that this machine's processor scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import covid_flax.compiler.no_accelerator  # noqa: F401  what it does, it does when imported
from covid_flax.command import run_command
from covid_flax.compiler import aot, hlo
from covid_flax.compiler.xla import compiler_options
from covid_flax.console import say
from covid_flax.errors import UserError
from covid_flax.mesh import as_placed
from covid_flax.models import MODELS, create_model
from covid_flax.step import make_eval_step
from ml_collections_configs import base

_CLASSES = 4
_CPU_BATCH = 32
_TPU_BATCH = 64
_TOPOLOGY = "v5e:2x2"


def figures(name: str, image_size: int, *, speed: bool, traffic: bool) -> dict[str, Any]:
    """What the table says of one network.

    Args:
      name: a key of `MODELS`.
      image_size: side of the images, pixels.
      speed: whether to measure the images a second here.
      traffic: whether to compile for a TPU.

    Returns:
      `parameters`; an image's `gflop` (twice its multiply-adds and what little else there is, of
      plain convolutions) and `hbm_mb`; `images_per_second`; `preprocessing`. None for what was not
      asked for.
    """
    config = base.get_config().model
    config.name, config.hidden_units = name, 0
    spec = MODELS[name]
    graphdef, params, batch_stats = create_model(config, _CLASSES, 0)
    step = make_eval_step(graphdef, spec.preprocessing)
    one = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    # As for an accelerator: on CPU some convolutions are formulas with fewer products.
    plain = jax.jit(step).trace(params, batch_stats, one).lower(lowering_platforms=("tpu",))
    cost = plain.cost_analysis() or {}
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "gflop": float(cost.get("flops", 0.0)) / 1e9,
        "hbm_mb": _hbm_bytes(step, params, batch_stats, image_size) / 1e6 if traffic else None,
        "images_per_second": _speed(step, params, batch_stats, image_size) if speed else None,
        "preprocessing": spec.preprocessing,
    }


def _speed(step: Callable[..., Any], params: Any, batch_stats: Any, image_size: int) -> float:
    """Images a second, the best of five batches."""
    shape = (_CPU_BATCH, image_size, image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    apply = jax.jit(step, compiler_options=compiler_options())
    jax.block_until_ready(apply(params, batch_stats, images))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(apply(params, batch_stats, images))
        times.append(time.perf_counter() - start)
    return _CPU_BATCH / min(times)


def _hbm_bytes(step: Callable[..., Any], params: Any, batch_stats: Any, image_size: int) -> float:
    """Bytes an image that the TPU's program moves to and from its memory, off its text."""
    mesh = aot.topology_mesh(_TOPOLOGY)
    shape = (_TPU_BATCH * mesh.size, image_size, image_size, 3)
    arrays, images = as_placed((params, batch_stats), jax.ShapeDtypeStruct(shape, jnp.uint8), mesh)
    compiled = jax.jit(step).lower(*arrays, images).compile()
    moved = hlo.traffic(hlo.parse(compiled.as_text() or ""))
    return sum(t.hbm for t in moved) / _TPU_BATCH


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _main() -> None:
    f = flags.FLAGS
    unknown = [name for name in f.names if name not in MODELS]
    if unknown:
        raise UserError(f"--names={','.join(unknown)}: name some of {', '.join(MODELS)}")
    names = f.names or list(MODELS)
    traffic = f.traffic and aot.tpu_compiler() is not None
    # A program compiled for a TPU that is not there cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    say(f"{_CLASSES} classes, an image, forward, float32")
    say(
        f"{'model.name':<26}{'parameters':>12}{'GFLOP':>8}{'HBM MB':>8}{'images/s':>10}"
        f"{'pixels':>8}{'smallest':>10}  preprocessing"
    )
    for name in names:
        spec = MODELS[name]
        size = f.image_size or spec.native_size
        if size < spec.smallest:
            say(f"{name:<26} takes images of {spec.smallest} pixels or more")
            continue
        row = figures(name, size, speed=f.speed, traffic=traffic)
        say(
            f"{name:<26}{row['parameters']:>12,}{row['gflop']:>8.2f}{_shown(row['hbm_mb'], 2):>8}"
            f"{_shown(row['images_per_second'], 1):>10}{size:>8}{spec.smallest:>10}  "
            f"{row['preprocessing']}"
        )
    if f.traffic and not traffic:
        say("HBM traffic needs the TPU's compiler: make tpu-compiler")


if __name__ == "__main__":
    flags.DEFINE_list("names", [], "networks; empty: all")
    flags.DEFINE_integer("image_size", 0, "side of the images, pixels; 0: each network's own", 0)
    flags.DEFINE_bool("speed", True, "measure the images a second here")
    flags.DEFINE_bool("traffic", True, "compile for a TPU, for its memory traffic")
    run_command(_main)
