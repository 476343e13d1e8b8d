"""Times a model on CPU: covid_flax beside PyTorch and Keras 3 on JAX and TensorFlow.

    python benchmarks/cpu_step.py [--network resnet50|efficientnet_lite0]
        [--mode train|inference] [--batch N] [--size 128] [--steps 5] [--rounds 3]
        [--only NAME ...] [--tensorflow_python FILE] [--json FILE]

The model is the paper's, ResNet50 v1, global average pooling, Dense 1024, ReLU, dropout 0.5,
Dense 4, or that of `configs/best.py`, EfficientNet-Lite0, dropout 0.2, Dense 4 (beside PyTorch
alone, by `pip install efficientnet-lite-pytorch`); in float32, on one fixed batch. `train` times a
step: everything is trained, batch norm in training mode, by Adam. `inference` times the forward
pass in evaluation mode.
Each contestant lives in its own process. Their turns are interleaved, so that what else the
machine does falls on all alike. PyTorch runs in its memory layouts and compiled, on as many threads
as there are cores, with a fused Adam and without what a practised user spares it: biases before
batch norm, copies that only pad, new memory for activations. The ratio is to the fastest as it
comes.

covid_flax's training has glibc keep memory that is given back (see
`covid_flax/host_memory.py`); "covid_flax" here does so too, "... kept memory" are peers with the
same help (PyTorch channels_last, where it is not compiled), "covid_flax usual memory" ours without.

TensorFlow wants an environment of its own, for it pins versions of what it shares with JAX:

    python -m venv tf && tf/bin/pip install tensorflow-cpu keras
    python benchmarks/cpu_step.py --tensorflow_python tf/bin/python

A contestant that is not installed is skipped, and a line says so.
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
from typing import Any

import numpy as np

from covid_flax.errors import run_script
from covid_flax.files import result_file
from covid_flax.host_memory import KeptMemory, prepare_allocator

CLASSES = 4
LEARNING_RATE = 1e-5
# Name to the package that it needs.
CONTESTANTS = {
    "covid_flax": "jax",
    "covid_flax usual memory": "jax",
    "pytorch": "torch",
    "pytorch kept memory": "torch",
    "pytorch channels_last": "torch",
    "pytorch compiled": "torch",
    "pytorch compiled kept memory": "torch",
    "keras jax": "keras",
    "keras jax kept memory": "keras",
    "keras tensorflow": "tensorflow",
    "keras tensorflow kept memory": "tensorflow",
}
NETWORKS = {"resnet50": (1024, 0.5), "efficientnet_lite0": (0, 0.2)}  # hidden units, dropout
BATCH = {"train": 32, "inference": 64}


def fixed_batch(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, H, W, 3]` float32 and labels `[N]` int32."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, batch).astype(np.int32)


def covid_flax_model(network: str) -> Any:
    """The configuration's `model`."""
    from ml_collections_configs import base

    model = base.get_config().model
    model.name = network
    model.hidden_units, model.dropout = NETWORKS[network]
    return model


def covid_flax_step(network: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A function that trains one step and returns the loss."""
    from covid_flax.mesh import make_layout
    from covid_flax.models import MODELS, create_model
    from covid_flax.optimizer import make_optimizer
    from covid_flax.step import StepConfig, create_state, make_train_step
    from ml_collections_configs import base

    graphdef, params, batch_stats = create_model(covid_flax_model(network), CLASSES, seed=0)
    tx = make_optimizer(base.get_config().optimizer, lambda _: LEARNING_RATE)
    layout = make_layout("jit")
    stages = frozenset(MODELS[network].stages)
    how = StepConfig(preprocessing="unit", batch_stats_in=stages)
    train_step = layout.compile_step(make_train_step(graphdef, tx, how))
    state = layout.put_state(create_state(params, batch_stats, stages, tx, seed=0))
    batch = layout.put_batch({"image": images, "label": labels})

    def step() -> float:
        nonlocal state
        state, loss = train_step(state, batch)
        return float(loss)

    return step


def covid_flax_inference(network: str, images: np.ndarray) -> Callable[[], float]:
    """A function that computes the logits and returns the first."""
    from covid_flax.mesh import make_mesh, put_batch
    from covid_flax.models import create_model
    from covid_flax.outputs import compile_apply
    from covid_flax.step import make_eval_step

    graphdef, params, batch_stats = create_model(covid_flax_model(network), CLASSES, seed=0)
    apply = compile_apply(make_eval_step(graphdef, "unit"))
    n = len(images)
    batch = {"image": images, "index": np.arange(n), "mask": np.ones(n, bool)}
    batch = put_batch(batch, make_mesh())
    return lambda: float(np.asarray(apply(params, batch_stats, batch)["output"])[0, 0])


def pytorch_model(network: str, size: int) -> Any:
    """The model, a `torch.nn.Module`."""
    import torch
    from torch import nn

    if network == "efficientnet_lite0":
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name(
            "efficientnet-lite0", image_size=size, num_classes=CLASSES, drop_connect_rate=0.0
        )
        for module in model.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True
            if isinstance(module, nn.Conv2d) and module.stride == (1, 1):
                # The package pads by a copy; where the stride is 1 the convolution can do it.
                module.padding = (module.kernel_size[0] // 2,) * 2
                module.static_padding = nn.Identity()
        return model

    def conv_bn(inputs, outputs, size, stride=1):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
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
    return nn.Sequential(*layers)


def pytorch_images(images: np.ndarray, model: Any, channels_last: bool) -> tuple[Any, Any]:
    """The images and the model in a memory layout."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if not channels_last:
        return x, model
    layout = torch.channels_last
    return x.to(memory_format=layout), model.to(memory_format=layout)


def pytorch_step(
    network: str, images: np.ndarray, labels: np.ndarray, channels_last: bool, compiled: bool
) -> Callable[[], float]:
    """As `covid_flax_step`."""
    import torch
    from torch import nn

    x, model = pytorch_images(
        images, pytorch_model(network, images.shape[1]).train(), channels_last
    )
    y = torch.from_numpy(labels).long()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    if compiled:
        model = torch.compile(model)
    loss_fn = nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def pytorch_inference(
    network: str, images: np.ndarray, channels_last: bool, compiled: bool = False
) -> Callable[[], float]:
    """As `covid_flax_inference`."""
    import torch

    x, model = pytorch_images(images, pytorch_model(network, images.shape[1]).eval(), channels_last)
    if compiled:
        model = torch.compile(model, options={"freezing": True})

    def step() -> float:
        with torch.inference_mode():
            return model(x)[0, 0].item()

    return step


def keras_function(mode: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """As `covid_flax_step` or `covid_flax_inference`, on the backend that is set."""
    import keras

    base = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=images.shape[1:], pooling="avg"
    )
    x = keras.layers.Dense(1024, activation="relu")(base.output)
    x = keras.layers.Dropout(0.5)(x)
    model = keras.Model(base.input, keras.layers.Dense(CLASSES, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(LEARNING_RATE), "sparse_categorical_crossentropy")
    if mode == "inference":
        return lambda: float(model.predict_on_batch(images)[0, 0])
    return lambda: float(model.train_on_batch(images, labels))


def make_step(name: str, network: str, mode: str, batch: int, size: int) -> Callable[[], float]:
    """A contestant's function to time."""
    images, labels = fixed_batch(batch, size)
    if name.startswith("keras"):
        return keras_function(mode, images, labels)
    if name.startswith("covid_flax"):
        if mode == "train":
            return covid_flax_step(network, images, labels)
        return covid_flax_inference(network, images)
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    channels_last, compiled = name != "pytorch", "compiled" in name
    if mode == "train":
        return pytorch_step(network, images, labels, channels_last, compiled)
    return pytorch_inference(network, images, channels_last, compiled)


def keeps_memory(name: str) -> bool:
    return name == "covid_flax" or name.endswith("kept memory")


def serve(name: str, network: str, mode: str, batch: int, size: int) -> None:
    """A contestant's process: for each number read from stdin, times that many steps."""
    if keeps_memory(name):
        prepare_allocator()
    step = make_step(name, network, mode, batch, size)
    memory = KeptMemory()
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            result = step()
        seconds = time.perf_counter() - start
        assert np.isfinite(result)
        if keeps_memory(name) and mode == "train":  # as covid_flax's commands do
            memory.keep_if_room()
        print("seconds", seconds, flush=True)


def turn(process: subprocess.Popen[str], steps: int) -> float:
    """Seconds that the contestant takes for `steps` steps."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    for line in process.stdout:  # Keras prints lines of its own
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RuntimeError(f"a contestant ended early: {process.args}")


def installed(package: str, python: str) -> bool:
    """Whether that interpreter finds the package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def machine() -> str:
    """One line: processor, cores, load, versions."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "keras"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {cores} cores, load {os.getloadavg()[0]:.1f} before; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--mode", choices=BATCH, default="train")
    parser.add_argument("--batch", type=int, help="default: 32 to train, 64 for inference")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--tensorflow_python",
        default=sys.executable,
        help="interpreter of an environment with TensorFlow and Keras",
    )
    parser.add_argument("--json", type=result_file, help="file to write the figures to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or BATCH[args.mode]
    if args.serve:
        return serve(args.serve, args.network, args.mode, args.batch, args.size)

    about = machine()
    print(about)
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    speeds: dict[str, list[float]] = {}
    processes = {}
    try:
        for name in args.only:
            if args.network != "resnet50" and name.startswith("keras"):
                print(f"{name}: skipped, it has no {args.network}")
                continue
            python = (
                args.tensorflow_python if name.startswith("keras tensorflow") else sys.executable
            )
            needed = [CONTESTANTS[name]]
            if args.network == "efficientnet_lite0" and name.startswith("pytorch"):
                needed.append("efficientnet_lite_pytorch")
            if missing := [package for package in needed if not installed(package, python)]:
                print(f"{name}: skipped, {python} has no {missing[0]} (see this file's beginning)")
                continue
            command = [python, __file__, "--serve", name, "--network", args.network]
            command += ["--mode", args.mode]
            command += ["--batch", str(args.batch), "--size", str(args.size)]
            environment = {
                **os.environ,
                "PYTHONPATH": path,
                "JAX_PLATFORMS": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "KERAS_BACKEND": name.split()[1] if name.startswith("keras") else "jax",
            }
            if keeps_memory(name):
                environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            processes[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            try:
                turn(processes[name], 2)  # compiles, and warms the allocator
            except RuntimeError:
                print(f"{name}: skipped, it failed (see above)")
                continue
            speeds[name] = []
        for _ in range(args.rounds):
            for name in list(speeds):
                try:
                    seconds = turn(processes[name], args.steps)
                except (RuntimeError, BrokenPipeError):
                    print(f"{name}: left out, it ended early")
                    del speeds[name]
                else:
                    speeds[name].append(args.batch * args.steps / seconds)
    finally:
        for process in processes.values():
            process.kill()

    median = {name: statistics.median(values) for name, values in speeds.items()}
    tensorflow = median.get("keras tensorflow", np.nan)
    peers = [k for k in median if k.startswith("pytorch") and "memory" not in k]
    torch_best = max((median[k] for k in peers), default=np.nan)
    rows = [
        {
            "name": name,
            "images_per_second": median[name],
            "min": min(values),
            "max": max(values),
            "ratio_to_pytorch": median[name] / torch_best,
            "ratio_to_keras_tensorflow": median[name] / tensorflow,
            "ratio_to_keras_jax": median[name] / median.get("keras jax", np.nan),
        }
        for name, values in speeds.items()
    ]
    print(f"{'':22}  images/s (min-max)      to PyTorch  to Keras-TF  to Keras-JAX")
    for r in rows:
        spread = f"({r['min']:.1f}-{r['max']:.1f})"
        print(
            f"{r['name']:22}  {r['images_per_second']:8.1f} {spread:14}"
            f"  {r['ratio_to_pytorch']:9.2f}  {r['ratio_to_keras_tensorflow']:10.2f}"
            f"  {r['ratio_to_keras_jax']:11.2f}"
        )
    if args.json:
        settings = {
            "network": args.network,
            "mode": args.mode,
            "batch": args.batch,
            "size": args.size,
            "steps": args.steps,
        }
        args.json.write_text(json.dumps({"machine": about, **settings, "results": rows}, indent=2))


if __name__ == "__main__":
    run_script(main)
