"""A depthwise convolution on CPU: covid_flax's, XLA's and PyTorch's, forward and with gradients.

    python benchmarks/depthwise.py [--batch 64] [--rounds 9] [--json FILE]

Channels-last float32, stride 1, all cores. PyTorch runs in a process of its own (skipped, with a
line, where it is not installed); turns are interleaved, so that other load falls on all alike. The
table gives the least milliseconds over the rounds, and ratios to PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Beside this folder, for an environment of another library that does not have it installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from covid_flax.errors import run_script  # noqa: E402
from covid_flax.files import result_file  # noqa: E402

# Side, channels and kernel: MobileNetV2's second block, EfficientNet-B0's last, three between.
SHAPES = ((56, 96, 3), (28, 144, 5), (14, 480, 5), (7, 1152, 5), (7, 1152, 3))


def jax_calls(how: str, batch: int, side: int, channels: int, size: int) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from covid_flax.compiler.xla import compiler_options
    from covid_flax.models import depthwise

    conv = depthwise.depthwise_conv2d if how == "covid_flax" else depthwise._forward_xla
    x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (size, size, channels, 1))
    options = compiler_options()  # those of training
    forward = jax.jit(lambda x, k: conv(x, k, 1), compiler_options=options)

    def loss(x, k):
        return jnp.sum(conv(x, k, 1) ** 2)

    both = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=options)
    return {
        "forward": lambda: jax.block_until_ready(forward(x, kernel)),
        "gradients": lambda: jax.block_until_ready(both(x, kernel)),
    }


def torch_calls(batch: int, side: int, channels: int, size: int) -> dict[str, Callable]:
    import torch

    x = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, 1, size, size)

    def conv(x, k):
        return torch.nn.functional.conv2d(x, k, padding=size // 2, groups=channels)

    def forward():
        with torch.no_grad():
            conv(x, kernel)

    def both():
        a, k = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        (conv(a, k) ** 2).sum().backward()

    return {"forward": forward, "gradients": both}


def serve(how: str, batch: int) -> None:
    """Reads `shape call` lines, answers each with the milliseconds that it took."""
    calls: dict[int, dict[str, Callable]] = {}
    for line in sys.stdin:
        shape, call = line.split()
        if int(shape) not in calls:
            arguments = (batch, *SHAPES[int(shape)])
            made = torch_calls(*arguments) if how == "pytorch" else jax_calls(how, *arguments)
            calls = {int(shape): made}
            for function in made.values():
                function()
        start = time.perf_counter()
        calls[int(shape)][call]()
        print(1000 * (time.perf_counter() - start), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--torch_python", default=sys.executable, help="one that has PyTorch")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.batch)
        return
    pythons = {"covid_flax": sys.executable, "xla": sys.executable, "pytorch": args.torch_python}
    probe = [args.torch_python, "-c", "import torch"]
    if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
        print("pytorch: not installed, skipped", file=sys.stderr)
        del pythons["pytorch"]
    servers = {
        name: subprocess.Popen(
            [python, __file__, f"--serve={name}", f"--batch={args.batch}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, python in pythons.items()
    }
    table = []
    for i, (side, channels, size) in enumerate(SHAPES):
        for call in ("forward", "gradients"):
            least: dict[str, float] = {}
            for _ in range(args.rounds):
                for name, server in servers.items():
                    assert server.stdin and server.stdout
                    print(i, call, file=server.stdin, flush=True)
                    took = float(server.stdout.readline())
                    least[name] = min(took, least.get(name, took))
            table.append(
                {"side": side, "channels": channels, "kernel": size, "call": call, **least}
            )
            parts = [f"{name} {ms:8.1f} ms" for name, ms in least.items()]
            if "pytorch" in least:
                parts.append(f"covid_flax / pytorch {least['covid_flax'] / least['pytorch']:.2f}")
            print(
                f"{side}x{side}x{channels}, {size}x{size}, {call:9}:", ", ".join(parts), flush=True
            )
    for server in servers.values():
        assert server.stdin
        server.stdin.close()
        server.wait()
    if args.json:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {**about, "batch": args.batch, "rounds": args.rounds, "least_ms": table}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
