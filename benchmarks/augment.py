"""What augmentation costs: each change of a configuration alone, all together, and all fused.

    python benchmarks/augment.py [--config=configs/best.py] [--batch=32] [--rounds=20]

"Fused" leaves the geometry and what follows it to one computation, as XLA would have it;
`covid_flax.augment.augment` keeps them apart on CPUs. Grey images, the best of all rounds, in turn.
`style`, `mixup` and `cutmix`, which work on whole batches, are left out.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from covid_flax.augment import Augment, _appearance, _geometry, augment
from covid_flax.compiler.xla import compiler_options
from covid_flax.errors import run_script

GEOMETRY = ("flip", "shift", "rotate", "scale", "aspect")
APPEARANCE = ("brightness", "contrast", "gamma", "blur", "noise", "erase", "border")


def _fused(key: jax.Array, images: jax.Array, how: Augment) -> jax.Array:
    keys = jax.random.split(key, len(images))
    images = jax.vmap(lambda k, image: _geometry(k, image, how))(keys, images)
    return jax.vmap(lambda k, image: _appearance(k, image, how))(keys, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/best.py")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    config = runpy.run_path(args.config)["get_config"]()
    on = {k: v for k, v in config.augment.to_dict().items() if v and k in GEOMETRY + APPEARANCE}
    size = config.data.image_size
    pixels = np.random.default_rng(0).uniform(0, 255, (args.batch, size, size, 1))
    images = jnp.asarray(pixels, jnp.float32)

    def jitted(change: Callable[..., jax.Array], **how: float) -> Callable[..., jax.Array]:
        step = jax.jit(
            lambda key, x: change(key, x, Augment(**how)), compiler_options=compiler_options()
        )
        step(jax.random.key(0), images).block_until_ready()
        return step

    steps = {"geometry": jitted(augment, **{k: v for k, v in on.items() if k in GEOMETRY})}
    steps |= {k: jitted(augment, **{k: v}) for k, v in on.items() if k in APPEARANCE}
    steps |= {"together": jitted(augment, **on), "fused": jitted(_fused, **on)}
    best = dict.fromkeys(steps, float("inf"))
    for i in range(args.rounds):
        for name, step in steps.items():
            key = jax.block_until_ready(jax.random.key(i))
            start = time.perf_counter()
            step(key, images).block_until_ready()
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{args.config}, {args.batch} images of {size} px, {jax.devices()[0].device_kind}")
    for name, seconds in best.items():
        print(f"{name:12}{seconds * 1e3:8.2f} ms")


if __name__ == "__main__":
    run_script(main)
