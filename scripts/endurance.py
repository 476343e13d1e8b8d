"""Whether long runs, large folders and many runs in one process stay within bounds (Linux).

    python scripts/endurance.py steps  [--steps 50000]    one long run of a tiny network
    python scripts/endurance.py images [--images 200000]  a large folder, prepared and trained on
    python scripts/endurance.py runs   [--runs 200]       whole runs, one after the other

Each prints a table, says which bounds hold and exits with 1 where one does not; `--json=FILE` also
writes all samples, and `--plot=FILE.png` draws them (steps, runs). Everything is drawn from
`--seed` in a temporary folder (`--place=DIR` puts it elsewhere), which is deleted afterwards.

Memory is what the process alone holds (RssAnon): pages of mapped files, which the system takes back
when it needs them, are not in it, nor (steps, runs) what was freed and is kept for later. Growth is
the slope of a least-squares line, after the first fifth, over the whole length. Step time is the
processor's, so that what else the machine does is not in it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from covid_flax import train as train_lib
from covid_flax.config import check
from covid_flax.console import Meter
from covid_flax.data import phantoms
from covid_flax.errors import run_script
from covid_flax.evaluate import evaluate
from covid_flax.files import result_file, write_atomically
from covid_flax.run import setup
from ml_collections_configs import base

Sample = dict[str, float]

# The bounds. Growth is over the whole length, warm-up left out.
MOST_MEGABYTES = 50.0  # of a long run
MOST_SLOWER = 0.10  # of a step
MOST_BYTES_AN_IMAGE = 2_000.0
MOST_MEGABYTES_A_RUN = 0.5
MOST_HANDLES = 2.0
_WINDOWS = 10


def sample() -> Sample:
    """Memory in MB, open files and threads of this process."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    return {
        "anonymous_mb": int(status["RssAnon"].split()[0]) / 1024,
        "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


def give_back() -> None:
    """To the system what glibc keeps of freed memory, which is no leak."""
    ctypes.CDLL(None).malloc_trim(0)


def growth(values: Sequence[float]) -> float:
    """Of a line through evenly spaced values after the first fifth, from end to end of all."""
    kept = np.asarray(values[len(values) // 5 :], np.float64)
    slope = np.polyfit(np.arange(len(kept)), kept, 1)[0]
    return float(slope * (len(values) - 1))


def windows(samples: Sequence[Sample], key: str, of: Callable = min) -> list[float]:
    """One value for each of ten equal parts of the samples; of fewer samples, each one's own.

    The least, for a checkpoint that is being written holds memory, files and threads a while.
    """
    parts = np.array_split(np.arange(len(samples)), min(_WINDOWS, len(samples)))
    return [float(of(samples[i][key] for i in part)) for part in parts]


def _config(place: Path) -> Any:
    c = base.get_config()
    c.data.dir, c.data.cache_dir = str(place / "images"), str(place / "cache")
    c.data.image_size, c.data.split, c.data.num_threads = 32, "paper-random", 2
    c.model.name, c.model.weights = "lenet5", "none"
    c.train.patience = 0
    c.train.feature_cache_gb = c.train.feature_disk_gb = 0.0
    c.optimizer.learning_rate = 1e-3
    return c


# ---- one long run -------------------------------------------------------------------------------


def steps(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    phantoms.write_dataset(place / "images", 50, seed=args.seed, size=48)
    c = _config(place)
    c.train.batch_size, c.train.log_every_steps = 2, 40
    c.train.checkpoint_every_steps = 100
    c.train.epochs = -(-args.steps // 80)  # 160 of the 200 images are trained on
    c.seed = args.seed
    check(c)
    samples: list[Sample] = []

    class Sampling(Meter):
        """The loop's own clock, which also looks at the process whenever it prints."""

        processor = time.process_time()

        def interval(self, step: int, *figures: float) -> dict[str, float]:
            made, wall = step - self.last_step, time.monotonic() - self.last
            processor = (time.process_time() - self.processor) / made
            printed = super().interval(step, *figures)
            times = {"processor_ms": 1e3 * processor, "wall_ms": 1e3 * wall / made}
            give_back()
            samples.append({"step": step, **times, **sample()})
            self.processor = time.process_time()
            return printed

        def end_epoch(self, *figures: Any) -> None:
            super().end_epoch(*figures)
            self.processor = time.process_time()

    setattr(train_lib, "Meter", Sampling)  # noqa: B010
    started = time.monotonic()
    with _quiet():
        train_lib.train(setup(c, place / "run"))
    del samples[0]  # the compiler's
    table = {
        "last step": windows(samples, "step", max),
        "memory (MB)": windows(samples, "anonymous_mb"),
        "files": windows(samples, "files"),
        "threads": windows(samples, "threads"),
        "processor ms a step": windows(samples, "processor_ms", statistics.median),
        "wall ms a step": windows(samples, "wall_ms", statistics.median),
    }
    times = table["processor ms a step"]
    bounds = {
        "memory grew, MB": (growth(table["memory (MB)"]), MOST_MEGABYTES),
        "files grew": (growth(table["files"]), MOST_HANDLES),
        "threads grew": (growth(table["threads"]), MOST_HANDLES),
        "a step grew slower by": (growth(times) / statistics.median(times), MOST_SLOWER),
    }
    about = {"steps": samples[-1]["step"], "epochs": c.train.epochs}
    return _result(about, started, table, bounds, samples)


# ---- a large folder -----------------------------------------------------------------------------


def images(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    started = time.monotonic()
    if args.images < 20:
        raise SystemExit(f"--images={args.images}: give 20 or more")
    counts = [args.images // 10, args.images]
    found = []
    for count in counts:
        context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=_images, args=(count, args.seed, place, sending))
        child.start()
        sending.close()
        found.append(receiving.recv())
        child.join()
    few, many = found
    table = {key: [few[key], many[key]] for key in few}
    more = (many["peak memory (MB)"] - few["peak memory (MB)"]) * 2**20
    bounds = {"bytes an image": (more / (counts[1] - counts[0]), MOST_BYTES_AN_IMAGE)}
    return _result({"images": counts}, started, table, bounds, [])


def _images(count: int, seed: int, place: Path, sending: Any) -> None:
    """Draws, prepares and trains on so many images; the peak of each part is of its own."""
    place = place / str(count)
    clock = [time.monotonic()]
    peak = [0.0]

    def look() -> None:
        while True:
            peak[0] = max(peak[0], sample()["anonymous_mb"])
            time.sleep(0.05)

    def lap() -> float:
        clock.append(time.monotonic())
        return clock[-1] - clock[-2]

    rng = np.random.default_rng(seed)
    for i in range(count):
        folder = place / "images" / ("dark", "light")[i % 2]
        if i < 2:
            folder.mkdir(parents=True)
        grey = rng.integers(0, 160, (16, 16), np.uint8) + np.uint8(90 * (i % 2))
        Image.fromarray(grey).save(folder / f"{i:07}.png", compress_level=1)
    drawn = lap()
    threading.Thread(target=look, daemon=True).start()
    c = _config(place)
    c.train.epochs, c.train.batch_size, c.eval.batch_size = 1, 256, 256
    c.seed = seed
    with _quiet():
        run = setup(c, place / "run")
        prepared, held = lap(), peak[0]
        train_lib.train(run)
    trained = lap()
    metrics = (place / "run" / "metrics.jsonl").read_text().splitlines()
    sending.send(
        {
            "images": count,
            "drawn in (s)": drawn,
            "prepared in (s)": prepared,
            "trained in (s)": trained,
            "peak memory, prepared (MB)": held,
            "peak memory (MB)": peak[0],
            "validation accuracy": json.loads(metrics[-1])["accuracy"],
        }
    )
    shutil.rmtree(place)


# ---- many runs ----------------------------------------------------------------------------------


def runs(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    phantoms.write_dataset(place / "images", 20, seed=args.seed, size=48)
    samples: list[Sample] = []
    started = time.monotonic()
    for i in range(args.runs):
        c = _config(place)
        c.seed = args.seed + i
        # As in a sweep, every run's programs differ.
        c.optimizer.learning_rate = 1e-3 * (1 + i / args.runs)
        c.train.epochs, c.train.batch_size = 2, 16
        workdir = place / "run"
        began = time.process_time()
        with _quiet():
            run = setup(c, workdir)
            train_lib.train(run)
            evaluate(workdir, data=run.data)
        del run
        shutil.rmtree(workdir)
        jax.clear_caches()  # as between the members of a repeated run
        gc.collect()
        give_back()
        counts = {"arrays": len(jax.live_arrays()), "objects": len(gc.get_objects())}
        seconds = time.process_time() - began
        samples.append({"run": i + 1, "processor_s": seconds, **sample(), **counts})
        last = samples[-1]
        if (i + 1) % max(1, args.runs // 20) == 0:
            print(
                f"run {i + 1}: {last['anonymous_mb']:.0f} MB, {last['files']} files, "
                f"{last['threads']} threads, {last['arrays']} arrays",
                flush=True,
            )
    table = {
        "last run": windows(samples, "run", max),
        "memory (MB)": windows(samples, "anonymous_mb"),
        "files": windows(samples, "files"),
        "threads": windows(samples, "threads"),
        "JAX arrays": windows(samples, "arrays"),
        "Python objects": windows(samples, "objects"),
        "processor s a run": windows(samples, "processor_s", statistics.median),
    }
    bounds = {
        "memory grew, MB a run": (
            growth(table["memory (MB)"]) / args.runs,
            MOST_MEGABYTES_A_RUN,
        ),
        "files grew": (growth(table["files"]), MOST_HANDLES),
        "threads grew": (growth(table["threads"]), MOST_HANDLES),
        "JAX arrays grew": (growth(table["JAX arrays"]), MOST_HANDLES),
    }
    return _result({"runs": args.runs}, started, table, bounds, samples)


# ---- results ------------------------------------------------------------------------------------


class _quiet:
    """Keeps what runs say off the console; their errors still come out."""

    def __enter__(self) -> None:
        self._kept = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = open(os.devnull, "w")

    def __exit__(self, *exc: object) -> None:
        sys.stdout.close()
        sys.stdout, sys.stderr = self._kept


def _result(
    about: dict[str, Any],
    started: float,
    table: dict[str, list[float]],
    bounds: dict[str, tuple[float, float]],
    samples: list[Sample],
) -> dict[str, Any]:
    return {
        **about,
        "seconds": time.monotonic() - started,
        "table": table,
        "bounds": {k: {"found": x, "most": y, "holds": x <= y} for k, (x, y) in bounds.items()},
        "samples": samples,
    }


def _print(result: dict[str, Any]) -> bool:
    for name, values in result["table"].items():
        shown = (f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.2f}" for x in values)
        print(f"{name:<28}" + " ".join(f"{x:>9}" for x in shown))
    for name, bound in result["bounds"].items():
        verdict = "" if bound["holds"] else "   TOO MUCH"
        print(f"{name:<28}{bound['found']:.3f}, at most {bound['most']:g}{verdict}")
    print(f"took {result['seconds']:.0f} s")
    return all(bound["holds"] for bound in result["bounds"].values())


def _plot(samples: list[Sample], path: Path) -> None:
    from matplotlib.figure import Figure

    first, *keys = samples[0]
    figure = Figure((7, 1.3 * len(keys)), layout="constrained")
    axes = figure.subplots(len(keys), 1, sharex=True)
    for axis, key in zip(axes, keys, strict=True):
        axis.plot([s[first] for s in samples], [s[key] for s in samples], linewidth=0.8)
        axis.set_ylabel(key, fontsize=7)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel(first)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("steps", "images", "runs"))
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=200_000, help="20 or more")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.place) as directory:
        result = {"steps": steps, "images": images, "runs": runs}[args.mode](args, Path(directory))
    holds = _print(result)
    if args.json:
        write_atomically(args.json, (json.dumps(result) + "\n").encode())
    if args.plot and result["samples"]:
        _plot(result["samples"], args.plot)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    run_script(main)
