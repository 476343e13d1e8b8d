"""Times input paths on the same image files: covid_flax, tf.data, PyTorch's DataLoader.

    python benchmarks/input.py --data_dir=DIR [--images 4096] [--batch 32] [--size 128]
        [--seconds 2] [--rounds 3] [--step 30] [--tf_python PYTHON] [--json FILE]

Each path gives endless shuffled batches, uint8 [B, size, size, 3] and labels; covid_flax's
store gives grey images one channel, as its steps take them, and "to device" makes three of
it there. Each lives in its own process, and has decoded the images once before timing begins
where it keeps them. Their turns are interleaved, so that what else the machine does falls on
all alike. "waiting" is the time of `next(batches)` beside a step of `--step` milliseconds that
leaves the processor alone, as an accelerator's does.
TensorFlow is best installed apart:

    python -m venv tf && tf/bin/pip install tensorflow-cpu     # then --tf_python=tf/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from covid_flax.errors import run_script
from covid_flax.files import result_file

CONTESTANTS = (
    "covid_flax files",
    "covid_flax store",
    "covid_flax store to device",
    "tf.data files",
    "tf.data cache()",
    "torch files, 0 workers",
    "torch files, 2 workers",
    "torch memory, TensorDataset",
    "torch memory, BatchSampler",
)
ROOT = Path(__file__).resolve().parent.parent
HOW_TO_INSTALL = {
    "tf.data": "python -m venv tf && tf/bin/pip install tensorflow-cpu; --tf_python=tf/bin/python",
    "torch": "pip install torch",
}


def covid_flax_dataset(root: Path, cache: Path) -> Any:
    """All images of `root` as a training split, their records in `cache`."""
    from covid_flax.data.builder import prepare
    from covid_flax.data.dataset import Dataset
    from covid_flax.data.folder import open_folder
    from covid_flax.data.splits import Row

    folder = open_folder(str(root))
    rows = [Row(f.file, f.label, "train", "") for f in folder.files]
    return Dataset(folder, prepare(folder, cache), rows, folder.class_names)


def data_config(size: int, store: bool) -> Any:
    from ml_collections_configs import base

    config = base.get_config().data
    config.image_size = size
    config.store_gb = 1000.0 if store else 0.0
    return config


def covid_flax_batches(name: str, root: Path, cache: Path, size: int, batch_size: int) -> Iterator:
    from covid_flax.data.pipeline import train_iterator

    put: Callable[[Any], Any] = lambda b: b  # noqa: E731
    config = data_config(size, store="store" in name)
    source = covid_flax_dataset(root, cache).source("train", config)
    if name.endswith("to device"):
        import jax
        import jax.numpy as jnp

        @jax.jit
        def colour(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            image = jnp.broadcast_to(batch["image"], (batch_size, size, size, 3))
            return {**batch, "image": image}

        put = lambda b: jax.block_until_ready(colour(jax.device_put(b)))  # noqa: E731
    return train_iterator(
        source,
        batch_size=batch_size,
        usable=len(source) - len(source) % batch_size,
        seed=0,
        num_threads=config.num_threads,
        prefetch=config.prefetch,
        put=put,
    )


def listed(root: Path) -> tuple[list[str], list[int]]:
    """Paths and class indices of all images of `root`."""
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    names = sorted({p.parent.name for p in paths})
    return [str(p) for p in paths], [names.index(p.parent.name) for p in paths]


def tf_batches(name: str, root: Path, size: int, batch: int) -> Iterator:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    paths, labels = listed(root)

    def read(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_png(tf.io.read_file(path), channels=3)
        return tf.cast(tf.image.resize(image, (size, size), method="nearest"), tf.uint8), label

    ds = tf.data.Dataset.from_tensor_slices((paths, labels))
    if name.endswith("cache()"):
        ds = ds.map(read, tf.data.AUTOTUNE).cache().shuffle(len(paths))
    else:
        ds = ds.shuffle(len(paths)).map(read, tf.data.AUTOTUNE)
    ds = ds.batch(batch, drop_remainder=True).repeat().prefetch(tf.data.AUTOTUNE)
    return iter(ds.as_numpy_iterator())


def torch_batches(name: str, root: Path, size: int, batch: int) -> Iterator:
    import torch
    from PIL import Image
    from torch.utils.data import (
        BatchSampler,
        DataLoader,
        Dataset,
        RandomSampler,
        TensorDataset,
    )

    paths, labels = listed(root)

    class Files(Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, i: int) -> tuple[Any, int]:
            image = Image.open(paths[i]).convert("RGB").resize((size, size), Image.NEAREST)
            return torch.from_numpy(np.array(image)), labels[i]

    if name.startswith("torch files"):
        workers = int(name.split()[2])
        loader = DataLoader(
            Files(),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
    else:
        files = Files()
        images = torch.stack([files[i][0] for i in range(len(files))])
        data = TensorDataset(images, torch.tensor(labels))
        if name.endswith("BatchSampler"):
            sampler = BatchSampler(RandomSampler(data), batch, drop_last=True)
            loader = DataLoader(data, batch_size=None, sampler=sampler)
        else:
            loader = DataLoader(data, batch, shuffle=True, drop_last=True)
    while True:
        yield from loader


def serve(args: argparse.Namespace) -> None:
    """A contestant's process: for each `[seconds, step]` from stdin, batches for so long."""
    root, cache, name = args.data_dir, args.cache, args.serve
    if name == "build":
        return serve_build(root, cache, args.size)
    if name.startswith("tf.data"):
        batches = tf_batches(name, root, args.size, args.batch)
    elif name.startswith("torch"):
        batches = torch_batches(name, root, args.size, args.batch)
    else:
        batches = covid_flax_batches(name, root, cache, args.size, args.batch)
    # Whatever is kept is kept after an epoch.
    warm = len(listed(root)[0]) // args.batch + 1 if name.endswith("cache()") else 2
    for _ in range(warm):
        next(batches)
    for line in sys.stdin:
        seconds, step = json.loads(line)
        for _ in range(12):  # what was built ahead while others had their turn
            next(batches)
        count, waited, start = 0, 0.0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - before
            count += 1
            if step:
                time.sleep(step)
        print(json.dumps([count, waited, time.perf_counter() - start]), flush=True)


def serve_build(root: Path, cache: Path, size: int) -> None:
    """Builds the store anew at every turn."""
    from covid_flax.data.store import open_store  # noqa: F401  (imports are not timed)

    data = covid_flax_dataset(root, cache)
    for _ in sys.stdin:
        for path in data.records.place.glob("pixels-*"):
            path.unlink()
        data._stores.clear()
        start = time.perf_counter()
        source = data.source("train", data_config(size, store=True))
        seconds = time.perf_counter() - start
        print(json.dumps([len(source), source.images.nbytes, seconds]), flush=True)


class Contestant:
    """A process that serves turns."""

    def __init__(self, name: str, args: argparse.Namespace, root: Path, cache: Path):
        python = args.tf_python if name.startswith("tf.data") else sys.executable
        command = [python, __file__, f"--serve={name}", f"--data_dir={root}", f"--cache={cache}"]
        command += [f"--batch={args.batch}", f"--size={args.size}"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def turn(self, seconds: float, step: float = 0.0) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([seconds, step]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended early: {self.process.args}")
        return json.loads(line)


def version(python: str, module: str) -> str:
    """Of an installed module; empty where it is not."""
    code = f"import importlib.metadata as m; print(m.version({module!r}))"
    with contextlib.suppress(OSError):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        return done.stdout.strip()
    return ""


def tensorflow_version(python: str) -> str:
    return version(python, "tensorflow") or version(python, "tensorflow-cpu")


def sample(root: Path, count: int, into: Path) -> None:
    """Links to `count` images of the folder, 0 for all, chosen at random, by class."""
    sys.path.insert(0, str(ROOT))
    from covid_flax.data.folder import open_folder

    folder = open_folder(str(root))
    files = list(folder.files)
    random.Random(0).shuffle(files)
    for i, f in enumerate(files[: count or None]):
        link = into / f.label / f"{i}-{Path(f.file).name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((root / f.file).resolve())


def machine(tf_python: str) -> str:
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(
        f"{name} {number}"
        for name, number in (
            ("grain", version(sys.executable, "grain")),
            ("numpy", version(sys.executable, "numpy")),
            ("pillow", version(sys.executable, "pillow")),
            ("torch", version(sys.executable, "torch")),
            ("tensorflow", tensorflow_version(tf_python)),
        )
        if number
    )
    return f"{cpu}, {cores} cores, load {os.getloadavg()[0]:.1f} before; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder of labelled images")
    parser.add_argument("--images", type=int, default=4096, help="how many of them; 0 for all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--step", type=float, default=30.0, help="milliseconds of the feigned step")
    parser.add_argument("--tf_python", default=sys.executable, help="python that has TensorFlow")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--json", type=result_file, help="file to write the figures to")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)

    about = machine(args.tf_python)
    print(about)
    there = {
        "tf.data": tensorflow_version(args.tf_python),
        "torch": version(sys.executable, "torch"),
    }
    for peer, number in there.items():
        if not number:
            print(f"{peer}: not installed, left out ({HOW_TO_INSTALL[peer]})")
    names = [n for n in args.only if there.get(n.split()[0], "installed")]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        root, cache = Path(directory, "data"), Path(directory, "cache")
        sample(args.data_dir, args.images, root)
        contestants = {}
        for name in ("build", *names):
            place = cache / name if name == "build" else cache
            contestants[name] = Contestant(name, args, root, place)
            stack.callback(contestants[name].process.kill)
            contestants[name].turn(0.1)  # imported, opened, warm
        turns: dict[str, list[list[float]]] = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name, contestant in contestants.items():
                turns[name].append(contestant.turn(args.seconds))
        waits = {n: contestants[n].turn(args.seconds, args.step / 1e3) for n in names}

    built = turns.pop("build")
    images, size = int(built[0][0]), built[0][1]
    build = statistics.median(seconds for *_, seconds in built)
    print(f"store of {images:,} images: {size / 1e6:,.0f} MB, built in {build:.2f} s")
    speeds = {n: [args.batch * count / total for count, _, total in turns[n]] for n in names}
    speeds["covid_flax store, being built"] = [count / seconds for count, _, seconds in built]
    median = {name: statistics.median(values) for name, values in speeds.items()}
    rows = []
    for name, values in speeds.items():
        count, waited, total = waits.get(name, (0, 0.0, 0.0))
        rows.append(
            {
                "name": name,
                "images_per_second": median[name],
                "min": min(values),
                "max": max(values),
                "ratio_to_tf_data": median[name] / median.get("tf.data files", np.nan),
                "ratio_to_tf_data_cache": median[name] / median.get("tf.data cache()", np.nan),
                "milliseconds_per_batch": 1e3 * args.batch / median[name],
                "waiting_milliseconds": 1e3 * waited / count if count else np.nan,
                "waiting_share": waited / total if count else np.nan,
            }
        )
    print(
        f"{'batch ' + str(args.batch):30} {'images/s (min-max)':>28} {'to tf.data':>11} "
        f"{'to cache()':>11} {'ms/batch':>9} {f'waiting at {args.step:g} ms':>18}"
    )
    for r in rows:
        spread = f"({r['min']:,.0f}-{r['max']:,.0f})"
        waiting = f"{r['waiting_milliseconds']:.2f} ms {r['waiting_share']:6.2%}"
        print(
            f"{r['name']:30} {r['images_per_second']:10,.0f} {spread:>17} "
            f"{r['ratio_to_tf_data']:11.2f} {r['ratio_to_tf_data_cache']:11.2f} "
            f"{r['milliseconds_per_batch']:9.2f} "
            f"{'' if np.isnan(r['waiting_share']) else waiting:>18}"
        )
    if args.json:
        settings = {"batch": args.batch, "size": args.size, "images": images, "step_ms": args.step}
        build_figures = {"store_seconds": build, "store_bytes": size}
        figures = {"machine": about, **settings, **build_figures, "results": rows}
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_script(main)
