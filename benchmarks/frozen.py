"""A finished frozen-backbone run of covid_flax beside the same job in Keras, extrapolated.

    python benchmarks/frozen.py --run=RUN_DIR [--batches 12] [--tensorflow_python FILE]

RUN_DIR is one of `configs/paper.py:frozen`; its time is the whole of it, from the written
configuration to the last figure, epochs' evaluations and checkpoints in it. Keras's `fit` computes
the frozen ResNet50 anew every epoch, so its time follows from a batch's: this script times
`train_on_batch` and `test_on_batch` at 32 images (without data loading, checkpoints or
callbacks) and multiplies. A practised Keras user has the features predicted once and fits the head
to them, as covid_flax does by itself: that is timed and multiplied likewise.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# Beside this folder, for an environment of another library that does not have it installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from covid_flax.errors import run_script  # noqa: E402


def keras_seconds(size: int, batches: int) -> dict[str, float]:
    """Median seconds of a batch of 32: trained and tested whole; features; the head alone."""
    import keras

    def with_head(inputs, features):
        x = keras.layers.Dense(1024, activation="relu")(features)
        x = keras.layers.Dropout(0.5)(x)
        model = keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(x))
        loss = "sparse_categorical_crossentropy"
        model.compile(keras.optimizers.Adam(1e-5), loss, metrics=["accuracy"])
        return model

    base = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg"
    )
    base.trainable = False
    inputs = keras.Input((2048,))
    model, head = with_head(base.input, base.output), with_head(inputs, inputs)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(32, size, size, 3)).astype(np.float32)
    features, labels = rng.normal(size=(32, 2048)).astype(np.float32), rng.integers(0, 4, 32)
    medians = {}
    for name, function, data in (
        ("train", model.train_on_batch, (images, labels)),
        ("test", model.test_on_batch, (images, labels)),
        ("features", base.predict_on_batch, (images,)),
        ("train_head", head.train_on_batch, (features, labels)),
        ("test_head", head.test_on_batch, (features, labels)),
    ):
        seconds = []
        for _ in range(batches + 2):
            start = time.perf_counter()
            function(*data)
            seconds.append(time.perf_counter() - start)
        medians[name] = float(np.median(seconds[2:]))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--batches", type=int, default=12, help="timed of each kind")
    parser.add_argument("--tensorflow_python", help="environment with TensorFlow and Keras")
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.size:
        print("seconds", json.dumps(keras_seconds(args.size, args.batches)))
        return
    if args.run is None:
        parser.error("--run: name the folder of a finished run")
    about = json.loads((args.run / "config.json").read_text())
    epochs = len((args.run / "metrics.jsonl").read_text().splitlines()) // 2
    with open(args.run / "split.csv", newline="") as f:
        splits = [row["split"] for row in csv.DictReader(f)]
    train, val = (-(-splits.count(s) // 32) for s in ("train", "val"))
    # The last line of the figures: a command that is given again draws the curves anew.
    begun, ended = ((args.run / f).stat().st_mtime for f in ("config.json", "metrics.jsonl"))
    ours = ended - begun
    if ours <= 0:
        parser.error(f"--run={args.run}: its files have no times of their own: no copy, please")
    print(f"covid_flax: {epochs} epochs of {len(splits):,} images in {ours:,.0f} s")
    for backend, python in (("jax", sys.executable), ("tensorflow", args.tensorflow_python)):
        if python is None:
            continue
        env = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
        command = [python, __file__, "--size", str(about["config"]["data"]["image_size"])]
        command += ["--batches", str(args.batches)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"keras {backend}: skipped, it failed (see above)")
            continue
        out = done.stdout
        line = next(x for x in out.splitlines() if x.startswith("seconds "))
        batch = json.loads(line.removeprefix("seconds "))
        whole = epochs * (train * batch["train"] + val * batch["test"])
        once = (train + val) * batch["features"]
        once += epochs * (train * batch["train_head"] + val * batch["test_head"])
        print(
            f"keras {backend}: {batch['train']:.3f} s a training batch, {batch['test']:.3f} a test "
            f"batch: {whole:,.0f} s, {whole / ours:.1f} times as long; features once, "
            f"{batch['features']:.3f} s a batch, then {1000 * batch['train_head']:.1f} ms a step "
            f"of the head: {once:,.0f} s, {once / ours:.1f} times as long"
        )


if __name__ == "__main__":
    run_script(main)
