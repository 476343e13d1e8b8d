"""Trains small networks at sane and at too high learning rates: which runs does the note find?

    python benchmarks/divergence.py [--seeds 5] [--epochs 12] [--json FILE]

The note is `covid_flax.numerics.divergence`'s, on the training loss of every epoch. The judge knows
nothing of it: a run has diverged where its numbers were not finite, or where its last epoch's
training loss is above the chance of ln(classes) and above that of its first epoch. Runs are on
synthetic X-rays, two networks, seven learning rates.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax

from covid_flax.data import phantoms
from covid_flax.errors import UserError, run_script
from covid_flax.files import result_file
from covid_flax.numerics import divergence
from covid_flax.run import setup
from covid_flax.train import train
from ml_collections_configs import base

RATES = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0, 100.0)
NETWORKS = ("lenet5", "resnet14_small")
CHANCE = math.log(4)


def losses_of(network: str, rate: float, seed: int, epochs: int, place: Path) -> list[float]:
    """Every epoch's training loss; those before it stopped, then NaN, of a run that stopped."""
    c = base.get_config()
    c.data.dir, c.data.cache_dir = str(place / "images"), str(place / "cache")
    c.seed, c.data.image_size, c.data.val_fraction = seed, 32, 0.25
    c.model.name, c.model.weights, c.model.hidden_units = network, "none", 32
    c.model.dropout, c.model.bn_momentum = 0.0, 0.9
    c.optimizer.learning_rate = rate
    c.train.epochs, c.train.patience, c.train.batch_size = epochs, 0, 16
    workdir = place / f"{network}-{rate:g}-{seed}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            train(setup(c, workdir))
            stopped = False
        except UserError:
            stopped = True
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    return losses + [math.nan] * stopped


def has_diverged(losses: list[float]) -> bool:
    last = losses[-1]
    return not math.isfinite(last) or (last > CHANCE and last > losses[0])


def first_note(losses: list[float]) -> int | None:
    """The epoch, from 1 on, after which the note comes first."""
    for epoch in range(1, len(losses) + 1):
        if divergence(losses[:epoch], CHANCE):
            return epoch
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", type=result_file)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    print(f"{'network':<16}{'rate':>8}  {'diverged':>8}  {'noted':>8}  last training losses")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        # The seeds of one setting share their programs.
        jax.config.update("jax_compilation_cache_dir", str(place / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        phantoms.write_dataset(place / "images", 60, seed=7, size=48)
        for network in NETWORKS:
            for rate in RATES:
                new = []
                for seed in range(args.seeds):
                    losses = losses_of(network, rate, seed, args.epochs, place)
                    verdict = {"diverged": has_diverged(losses), "noted": first_note(losses)}
                    new.append({"network": network, "rate": rate, "seed": seed, **verdict})
                    new[-1]["losses"] = [x if math.isfinite(x) else repr(x) for x in losses]
                runs += new
                diverged = sum(run["diverged"] for run in new)
                noted = sum(run["noted"] is not None for run in new)
                last = " ".join(f"{float(run['losses'][-1]):.3g}" for run in new)
                print(f"{network:<16}{rate:>8g}  {diverged:>8}  {noted:>8}  {last}", flush=True)
    false = sum(run["noted"] is not None and not run["diverged"] for run in runs)
    missed = sum(run["noted"] is None and run["diverged"] for run in runs)
    print(f"{len(runs)} runs: {false} false notes, {missed} diverged without a note")
    if args.json:
        args.json.write_text(json.dumps({"runs": runs, "false": false, "missed": missed}) + "\n")


if __name__ == "__main__":
    run_script(main)
