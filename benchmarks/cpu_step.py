"""Times one training step of the paper's model: covid_flax, PyTorch, Keras 3 on JAX.

    python benchmarks/cpu_step.py [--batch 32] [--size 128] [--steps 5] [--rounds 3] [--json FILE]

The model is ResNet50 v1, global average pooling, Dense 1024, ReLU, dropout 0.5, Dense 4;
everything is trained, batch norm in training mode, by Adam, in float32, on one fixed batch.
Each contestant lives in its own process. Their turns are interleaved, so that what else the
machine does falls on all alike. PyTorch runs in both its memory layouts; the ratio is to
the faster one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CLASSES = 4
LEARNING_RATE = 1e-5
CONTESTANTS = ("covid_flax", "pytorch", "pytorch channels_last", "keras")


def fixed_batch(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, H, W, 3]` float32 and labels `[N]` int32."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, batch).astype(np.int32)


def covid_flax_step(images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A function that trains one step and returns the loss."""

    from covid_flax.mesh import make_layout
    from covid_flax.models import STAGES, create_model
    from covid_flax.optimizer import make_optimizer
    from covid_flax.step import StepConfig, create_state, make_train_step
    from ml_collections_configs import base

    config = base.get_config()
    graphdef, params, batch_stats = create_model(config.model, CLASSES, seed=0)
    tx = make_optimizer(config.optimizer, lambda _: LEARNING_RATE)
    layout = make_layout("jit")
    how = StepConfig(preprocessing="unit", batch_stats_in=frozenset(STAGES))
    train_step = layout.compile_step(make_train_step(graphdef, tx, how))
    state = layout.put_state(create_state(params, batch_stats, frozenset(STAGES), tx, seed=0))
    batch = layout.put_batch({"image": images, "label": labels})

    def step() -> float:
        nonlocal state
        state, loss = train_step(state, batch)
        return float(loss)

    return step


def pytorch_step(
    images: np.ndarray, labels: np.ndarray, channels_last: bool = False
) -> Callable[[], float]:
    """As `covid_flax_step`."""
    import torch
    from torch import nn

    def conv_bn(inputs, outputs, size, stride=1):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, size // 2),
            nn.BatchNorm2d(outputs, eps=1.001e-5, momentum=0.01),
        )

    class Bottleneck(nn.Module):
        def __init__(self, inputs, width, stride, project):
            super().__init__()
            self.shortcut = conv_bn(inputs, 4 * width, 1, stride) if project else nn.Identity()
            self.body = nn.Sequential(
                conv_bn(inputs, width, 1, stride),
                nn.ReLU(inplace=True),
                conv_bn(width, width, 3),
                nn.ReLU(inplace=True),
                conv_bn(width, 4 * width, 1),
            )

        def forward(self, x):
            return torch.relu_(self.body(x) + self.shortcut(x))

    layers = [conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for i, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**i
        for j in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if i and j == 0 else 1, j == 0))
            inputs = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Linear(inputs, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, CLASSES)]
    model = nn.Sequential(*layers).train()
    x, y = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels).long()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def keras_step(images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """As `covid_flax_step`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    base = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=images.shape[1:], pooling="avg"
    )
    x = keras.layers.Dense(1024, activation="relu")(base.output)
    x = keras.layers.Dropout(0.5)(x)
    model = keras.Model(base.input, keras.layers.Dense(CLASSES, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(LEARNING_RATE), "sparse_categorical_crossentropy")
    return lambda: float(model.train_on_batch(images, labels))


def serve(name: str, batch: int, size: int) -> None:
    """A contestant's process: for each number read from stdin, times that many steps."""
    images, labels = fixed_batch(batch, size)
    if name == "covid_flax":
        step = covid_flax_step(images, labels)
    elif name == "keras":
        step = keras_step(images, labels)
    else:
        step = pytorch_step(images, labels, channels_last=name.endswith("channels_last"))
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        seconds = time.perf_counter() - start
        assert np.isfinite(loss)
        print(json.dumps(seconds), flush=True)


def turn(process: subprocess.Popen[str], steps: int) -> float:
    """Seconds that the contestant takes for `steps` steps."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a contestant ended early: {process.args}")
    return json.loads(line)


def machine() -> str:
    """One line: processor, cores, load, versions."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch", "keras")
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {cores} cores, load {os.getloadavg()[0]:.1f} before; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.batch, args.size)

    about = machine()
    print(about)
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    speeds: dict[str, list[float]] = {name: [] for name in args.only}
    processes = {}
    try:
        for name in args.only:
            command = [sys.executable, __file__, "--serve", name]
            command += ["--batch", str(args.batch), "--size", str(args.size)]
            processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            )
            turn(processes[name], 2)  # compiles, and warms the allocator
        for _ in range(args.rounds):
            for name in args.only:
                seconds = turn(processes[name], args.steps)
                speeds[name].append(args.batch * args.steps / seconds)
    finally:
        for process in processes.values():
            process.kill()

    median = {name: statistics.median(values) for name, values in speeds.items()}
    torch_best = max((v for k, v in median.items() if k.startswith("pytorch")), default=np.nan)
    rows = [
        {
            "name": name,
            "images_per_second": median[name],
            "min": min(values),
            "max": max(values),
            "ratio_to_pytorch": median[name] / torch_best,
            "ratio_to_keras": median[name] / median.get("keras", np.nan),
        }
        for name, values in speeds.items()
    ]
    print(f"{'':22}  images/s (min-max)      to PyTorch  to Keras")
    for r in rows:
        spread = f"({r['min']:.1f}-{r['max']:.1f})"
        print(
            f"{r['name']:22}  {r['images_per_second']:8.1f} {spread:14}"
            f"  {r['ratio_to_pytorch']:9.2f}  {r['ratio_to_keras']:8.2f}"
        )
    if args.json:
        settings = {"batch": args.batch, "size": args.size, "steps": args.steps}
        args.json.write_text(json.dumps({"machine": about, **settings, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
