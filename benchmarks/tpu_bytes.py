"""Memory traffic of a training step, ours against a plain one, by the TPU compiler's count.

    python benchmarks/tpu_bytes.py [--topology v5e:2x4] [--size 128] [--batch 256] [--json FILE]

Needs libtpu and no TPU; each of the two programs takes minutes to compile. The plain step is
what one writes with Flax's own layers: ResNet50 as in Flax's ImageNet example (the v1.5 form,
`nn.Conv` and `nn.BatchNorm` in bfloat16, `nn.max_pool`), half precision images in, SGD with
momentum, weight decay in the loss, one jit over a data-parallel mesh with donated state. Ours
is `configs/tpu.py`.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import covid_flax.compiler.no_accelerator  # noqa: F401  what it does, it does when imported

# isort: split
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from covid_flax.compiler import aot
from covid_flax.errors import run_script
from covid_flax.files import result_file

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 4
KEYS = (
    ("flops_per_example", 1e9, "GFLOP an image"),
    ("hbm_bytes_per_example", 1e6, "MB an image, compiler's count"),
    ("hbm_only_bytes_per_example", 1e6, "MB of them in HBM"),
    ("temp_bytes_per_device", 1e9, "GB temporary"),
    ("collective_bytes_per_step", 1e6, "MB in collectives a step"),
    ("estimated_cycles", 1e6, "million cycles, estimated"),
)


class Block(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = partial(
            nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=jnp.bfloat16
        )
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


class PlainResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), [(3, 3), (3, 3)], use_bias=False, dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, dtype=jnp.bfloat16)(x)
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                x = Block(64 * 2**stage, 2 if stage and not block else 1)(x)
        x = nn.Dense(CLASSES, dtype=jnp.bfloat16)(jnp.mean(x, (1, 2)))
        return x.astype(jnp.float32)


def lower_plain(mesh: Mesh, batch: int, size: int) -> jax.stages.Lowered:
    """The plain step, lowered for a mesh; `batch` is over all devices."""
    model = PlainResNet50()
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
    state = (*(variables[k] for k in ("params", "batch_stats")), {})
    state = (*state[:2], jax.eval_shape(tx.init, state[0]))

    def step(state, images, labels):
        params, stats, opt_state = state

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, images, mutable=["batch_stats"])
            onehot = jax.nn.one_hot(labels, CLASSES)
            decay = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
            loss = optax.softmax_cross_entropy(logits, onehot).mean() + 5e-5 * decay
            return loss, (new["batch_stats"], logits)

        (loss, (stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return (optax.apply_updates(params, updates), stats, opt_state), (loss, accuracy)

    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    step = jax.jit(
        step, donate_argnums=0, in_shardings=(whole, split, split), out_shardings=(whole, whole)
    )
    return step.lower(state, images, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=256, help="images a device")
    parser.add_argument("--json", type=result_file, help="file to write the figures to")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = aot.topology_mesh(args.topology)
    batch = args.batch * mesh.size
    config = runpy.run_path(str(ROOT / "configs" / "tpu.py"))["get_config"]()
    config.train.batch_size, config.data.image_size = batch, args.size
    lowered = {
        "plain": lower_plain(mesh, batch, args.size),
        "ours": aot.lower_step(config, mesh, CLASSES),
    }
    generation = args.topology.partition(":")[0]
    costs = {
        name: aot.cost(program.compile(), program, batch, mesh.size, generation)
        for name, program in lowered.items()
    }
    print(f"{args.topology}, {args.batch} images of {args.size} px a device")
    print(f"{'':32}{'plain':>9}{'ours':>9}{'ratio':>8}")
    for key, unit, what in KEYS:
        plain, ours = costs["plain"][key], costs["ours"][key]
        if not plain:  # no estimate for GPUs
            continue
        print(f"{what:32}{plain / unit:9.2f}{ours / unit:9.2f}{ours / plain:8.2f}")
    print(f"{'transfers with the host':32}", *(f"{c['host_transfers']:9}" for c in costs.values()))
    if args.json:
        args.json.write_text(json.dumps(costs, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
