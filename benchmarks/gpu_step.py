"""Training on a GPU: parity with the CPU, images a second, memory, a trace; peers beside it.

    benchmarks/gpu.sh [--data_dir=DIR] [--sizes 128 224] [--batch 512] [--json FILE]
        [--output DIR] [--smoke]

The model is that of `cpu_step.py` (ResNet50 v1 and the paper's head, all trained by Adam) in
bfloat16; PyTorch's runs channels_last under bfloat16 autocast and `torch.compile`; the plain
step is Flax's own layers with SGD, see `tpu_bytes.py`. "step" repeats steps on one batch that
lies on the device. "training" is `covid_flax.main` whole on the images of DIR, or on synthetic
ones: its rate of the last epoch. Every contestant has a process of its own, and a time limit;
turns are interleaved. `--smoke` runs all of it in small, on a CPU too.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from covid_flax.errors import run_script
from covid_flax.files import result_file

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 4
LEARNING_RATE = 1e-5
TURN_LIMIT_S = 240  # compiling takes minutes
CONTESTANTS = {"covid_flax": "jax", "plain Flax": "jax", "pytorch": "torch"}
Step = Callable[[int], None]


def fixed_batch(batch: int, size: int) -> dict[str, np.ndarray]:
    """`image` uint8 `[N, size, size, 3]` and `label` int32 `[N]`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, CLASSES, batch).astype(np.int32)}


def _model(dtype: str, smoke: bool) -> tuple[Any, Any, Any]:
    from covid_flax.models import create_model
    from ml_collections_configs import base

    config = base.get_config()
    config.model.dtype = dtype
    if smoke:
        config.model.name = "resnet14_small"
    return create_model(config.model, CLASSES, seed=0)


def covid_flax_steps(args: argparse.Namespace, size: int) -> Step:
    """A function that trains so many steps, and waits for them."""
    import jax

    from covid_flax.mesh import make_layout
    from covid_flax.models.resnet import STAGES
    from covid_flax.optimizer import make_optimizer
    from covid_flax.step import StepConfig, create_state, make_train_step
    from ml_collections_configs import base

    graphdef, params, batch_stats = _model("bfloat16", args.smoke)
    tx = make_optimizer(base.get_config().optimizer, lambda _: LEARNING_RATE)
    layout = make_layout("jit")
    how = StepConfig(preprocessing="unit", batch_stats_in=frozenset(STAGES))
    train_step = layout.compile_step(make_train_step(graphdef, tx, how))
    state = layout.put_state(create_state(params, batch_stats, frozenset(STAGES), tx, seed=0))
    batch = layout.put_batch(fixed_batch(args.batch, size))

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, loss = train_step(state, batch)
        assert np.isfinite(float(jax.block_until_ready(loss)))

    return steps


def plain_flax_steps(args: argparse.Namespace, size: int) -> Step:
    """As `covid_flax_steps`."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    jax.devices()  # before `tpu_bytes` asks for the CPU
    from tpu_bytes import PlainResNet50

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES)(nn.BatchNorm(False)(nn.Conv(8, (3, 3))(x)).mean((1, 2)))

    model = Small() if args.smoke else PlainResNet50()
    numpy_batch = fixed_batch(args.batch, size)
    images = jnp.asarray(numpy_batch["image"] / 255, jnp.bfloat16)
    labels = jnp.asarray(numpy_batch["label"])
    variables = jax.jit(model.init)(jax.random.key(0), images)
    tx = optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True)
    state = variables["params"], variables["batch_stats"], tx.init(variables["params"])

    def step(state):
        params, stats, opt_state = state

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, images, mutable=["batch_stats"])
            decay = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean() + 5e-5 * decay, new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    compiled = jax.jit(step, donate_argnums=0)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, loss = compiled(state)
        assert np.isfinite(float(jax.block_until_ready(loss)))

    return steps


def pytorch_steps(args: argparse.Namespace, size: int) -> Step:
    """As `covid_flax_steps`."""
    import torch
    from cpu_step import pytorch_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    numpy_batch = fixed_batch(args.batch, size)
    x = torch.from_numpy(numpy_batch["image"].transpose(0, 3, 1, 2).copy()).to(device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.from_numpy(numpy_batch["label"]).long().to(device)
    if args.smoke:
        model: Any = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(8, CLASSES),
        )  # fmt: skip
    else:
        model = pytorch_model("resnet50", size).train()
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=device == "cuda")
    loss_fn = torch.nn.CrossEntropyLoss()

    # The division too is compiled, with what follows it.
    @functools.partial(torch.compile, disable=device == "cpu")
    def forward(images: Any) -> Any:
        return model(images / 255)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_fn(forward(x), y)
            loss.backward()
            optimizer.step()
        assert np.isfinite(loss.item())

    return steps


def peak_memory(name: str) -> float:
    """Greatest memory of the device so far, in 1e9 bytes; NaN where it is not told."""
    if name == "pytorch":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else np.nan
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", np.nan) / 1e9


def serve(args: argparse.Namespace) -> None:
    """A contestant's process: for each number read, so many steps; for a path, a trace there."""
    make = {
        "covid_flax": covid_flax_steps,
        "plain Flax": plain_flax_steps,
        "pytorch": pytorch_steps,
    }[args.serve]
    steps = make(args, args.sizes[0])
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip().isdecimal():
            steps(int(line))
        else:
            import jax

            with jax.profiler.trace(line.strip(), create_perfetto_trace=True):
                steps(3)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, peak_memory(args.serve)]), flush=True)


def parity(args: argparse.Namespace) -> dict[str, Any]:
    """The model on this device against the CPU's float32: logits and gradients.

    Returns:
      The device, and by precision the norm of the difference over that of the CPU's values.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from covid_flax.models.resnet import STAGES
    from covid_flax.step import cross_entropy

    batch = fixed_batch(8, 64)

    def compute(dtype: str, device: jax.Device) -> list[np.ndarray]:
        graphdef, params, batch_stats = _model(dtype, args.smoke)
        x, labels, params, batch_stats = jax.device_put(
            (batch["image"] / np.float32(255), batch["label"], params, batch_stats), device
        )

        def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params, batch_stats)
            logits = model(x, batch_stats_in=frozenset(STAGES), dropout_key=None)
            return jnp.mean(cross_entropy(logits, labels)), logits

        # The platform is read when functions are traced: a new one for each.
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            grads, logits = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
        flat = np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in jax.tree.leaves(grads)])
        return [np.asarray(logits, np.float64), flat]

    device = jax.devices()[0]
    judge = compute("float32", jax.devices("cpu")[0])
    result: dict[str, Any] = {"device": f"{device.device_kind} ({device.platform})"}
    for dtype in ("float32", "bfloat16"):
        for what, ours, theirs in zip(
            ("logits", "gradients"), compute(dtype, device), judge, strict=True
        ):
            distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            result[f"{dtype} {what}"] = float(distance)
    return result


def training(args: argparse.Namespace, size: int, directory: Path, env: dict[str, str]) -> float:
    """Images a second of the last of three epochs of `covid_flax.main`."""
    workdir = directory / f"run-{size}"
    shutil.rmtree(workdir, ignore_errors=True)  # an earlier measurement's
    data = args.data_dir or str(directory / "phantoms")
    command = [sys.executable, "-m", "covid_flax.main", "--config=configs/paper.py"]
    command += [f"--workdir={workdir}", f"--config.data.dir={data}"]
    for key, value in {
        "data.cache_dir": directory / "cache",
        "data.image_size": size,
        "model.weights": "none",
        "model.dtype": "bfloat16",
        "train.batch_size": args.batch,
        "train.epochs": 3,
        "eval.batch_size": args.batch,
    }.items():
        command.append(f"--config.{key}={value}")
    if args.smoke:
        command.append("--config.model.name=resnet14_small")
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, timeout=200)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["images_per_second"] for line in lines if line["split"] == "train"][-1]


def turn(process: subprocess.Popen[str], what: str) -> tuple[float, float]:
    """Seconds that a contestant takes, and its peak memory so far; RuntimeError of a lost one."""
    assert process.stdin is not None and process.stdout is not None
    limit = threading.Timer(TURN_LIMIT_S, process.kill)
    limit.start()
    try:
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        for line in process.stdout:  # libraries print too
            if line.startswith("["):
                seconds, peak = json.loads(line)
                return seconds, peak
    except OSError:
        pass
    finally:
        limit.cancel()
    raise RuntimeError(f"it ended (its error stands above), or took more than {TURN_LIMIT_S} s")


def time_steps(
    args: argparse.Namespace, size: int, directory: Path, env: dict[str, str]
) -> list[dict[str, Any]]:
    """Interleaved turns of all that are installed, and a trace of ours."""
    processes: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, list[tuple[float, float]]] = {}

    def ask(name: str, what: str) -> tuple[float, float] | None:
        try:
            return turn(processes[name], what)
        except RuntimeError as e:
            print(f"{name}: left out at {what}, {e}")
            return None

    try:
        for name, package in CONTESTANTS.items():
            if importlib.util.find_spec(package) is None:
                print(f"{name}: left out, {package} is not installed")
                continue
            command = [sys.executable, __file__, "--serve", name, "--sizes", str(size)]
            command += ["--batch", str(args.batch)] + ["--smoke"] * args.smoke
            processes[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
            results[name] = []
        # The first turn compiles, and warms the allocator.
        for what in ("3", *[str(args.steps)] * args.rounds):
            for name in list(results):
                if figures := ask(name, what):
                    results[name].append(figures)
                else:
                    del results[name]
        if "covid_flax" in results:
            ask("covid_flax", str(directory / f"trace-{size}"))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return [
        {
            "name": name,
            "size": size,
            "images_per_second": args.batch
            * args.steps
            / statistics.median(seconds for seconds, _ in turns[1:]),
            "peak_memory_gb": turns[-1][1],
        }
        for name, turns in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="labelled images; empty: synthetic ones")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224], help="in pixels")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--json", type=result_file, default=None, help="default: OUTPUT/gpu.json")
    parser.add_argument("--output", type=Path, default=None, help="for the traces and the runs")
    parser.add_argument("--smoke", action="store_true", help="all of it in small")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--parity", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    if args.parity:
        return print(json.dumps(parity(args)))
    if args.smoke:
        args.sizes, args.batch, args.steps, args.rounds = [32], 16, 2, 2

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Memory as it is needed: contestants share the device.
    env = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    directory = args.output or Path(tempfile.mkdtemp(prefix="covid_flax-gpu-"))
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    command = [sys.executable, __file__, "--parity"] + ["--smoke"] * args.smoke
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    same = json.loads(done.stdout.splitlines()[-1])
    device = same.pop("device")
    print(f"parity on {device}, distance to the CPU's float32:")
    for what, distance in same.items():
        print(f"  {what:20} {distance:.1e}")
    if not same["float32 logits"] <= 1e-3:  # NaN is not the CPU's either
        sys.exit("the network on this device is not the CPU's: no figure below would mean anything")

    if not args.data_dir:
        per_class = 40 if args.smoke else 1024
        command = [sys.executable, "-m", "covid_flax.data.phantoms", f"--per_class={per_class}"]
        command += [f"--output={directory / 'phantoms'}", f"--size={max(args.sizes)}"]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    rows: list[dict[str, Any]] = []
    file = args.json or directory / "gpu.json"
    settings = {"device": device, "batch": args.batch, "steps": args.steps, "smoke": args.smoke}

    def save() -> None:  # as it goes: what is measured is not lost with what comes after
        # NaN is no JSON: what was not measured is null.
        known = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        file.write_text(json.dumps({**settings, "parity": same, "results": known}, indent=2) + "\n")

    for size in args.sizes:
        rows += time_steps(args, size, directory, env)
        save()
        try:
            rate = training(args, size, directory, env)
            rows.append({"name": "covid_flax training", "size": size, "images_per_second": rate})
            save()
        except (subprocess.SubprocessError, OSError) as e:
            print(f"covid_flax training at {size} px: left out, {e}")

    print("\nsmoke: small networks, the figures mean nothing" if args.smoke else "")
    print(f"{'':22}{'px':>5}{'images/s':>11}{'peak GB':>9}{'to PyTorch':>12}")
    for row in rows:
        torch = [r for r in rows if r["name"] == "pytorch" and r["size"] == row["size"]]
        ratio = row["images_per_second"] / torch[0]["images_per_second"] if torch else np.nan
        print(
            f"{row['name']:22}{row['size']:5}{row['images_per_second']:11,.0f}"
            f"{row.get('peak_memory_gb', np.nan):9.2f}{ratio:12.2f}"
        )
    print(f"\n{time.monotonic() - start:.0f} s; written: {file}; traces: {directory}/trace-*")


if __name__ == "__main__":
    run_script(main)
