"""A good Keras fine-tune of EfficientNet-Lite0 on a run's split: a peer of `configs/best.py`.

    python benchmarks/peer_keras.py --run=RUN_DIR --weights=lite0.npz --output=peer.json \
        [--epochs=4] [--minutes=45] [--pairs=DIR]

Needs Keras with TensorFlow (an environment of its own). `lite0.npz` holds the starting weights
under Keras's names; where this package is installed,

    python -c "import numpy as np; from covid_flax.pretrained.read import read_weights as read; \
      np.savez('lite0.npz', **read('efficientnet-lite0-57934424.pth'))"

writes it. The same images, split, size, cores and weights. As a practised user does it: `fit` with
AdamW at 1e-3 on a cosine, label smoothing, Keras's random flips, rotations, zooms, shifts and
brightness, running batch statistics taken anew from 2,560 plain images before every validation (as
the PyTorch peer does; `--no_recalibrate` leaves it out), and the epoch of the best validation loss.
Take as many epochs as fit --minutes: a run that is cut has not come down its cosine. The test
images are scored once, at the end; what it says of them is written beside the output in the form
of a `predictions.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from keras.src.applications import efficientnet
from peer_images import (
    labelled_files,
    read_images,
    read_twins,
    side_of,
    write_predictions,
)

# Beside this folder, for an environment of another library that does not have it installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from covid_flax.errors import run_script  # noqa: E402


def lite0(side: int, classes: int, weights: Path) -> tuple[keras.Model, keras.Model]:
    """Keras's EfficientNet without squeeze and excitation and with ReLU6: Lite0.

    And the same layers up to the features, without augmentation.
    """
    blocks = [dict(block, se_ratio=0) for block in efficientnet.DEFAULT_BLOCKS_ARGS]
    body = efficientnet.EfficientNet(
        1.0,
        1.0,
        224,
        activation=keras.ops.relu6,
        blocks_args=blocks,
        include_top=False,
        weights=None,
        pooling="avg",
        input_shape=(side, side, 3),
    )
    with np.load(weights) as arrays:
        for layer in body.layers:
            for variable in layer.weights:
                name = f"{layer.name}/{variable.name}"
                if isinstance(layer, layers.DepthwiseConv2D):
                    name = f"{layer.name}/kernel"
                if not isinstance(layer, layers.Normalization):
                    variable.assign(arrays[name])
    after = [
        layers.Rescaling(255 / 128, -127 * 255 / 128),  # the body divides by 255
        layers.Lambda(lambda x: keras.ops.repeat(x, 3, -1)),
        body,
    ]
    plain = keras.Sequential([keras.Input((side, side, 1)), layers.Rescaling(1.0), *after])
    model = keras.Sequential(
        [
            keras.Input((side, side, 1)),
            layers.Rescaling(1.0),  # uint8 to float32
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(10 / 360, fill_mode="nearest"),
            layers.RandomZoom((-0.1, 0.1), fill_mode="nearest"),
            layers.RandomTranslation(0.05, 0.05, fill_mode="nearest"),
            layers.RandomBrightness(0.1, value_range=(0, 255)),
            *after,
            layers.Dropout(0.2),
            layers.Dense(classes),
        ]
    )
    return model, plain


def report(logits: np.ndarray, labels: np.ndarray, names: list) -> dict:
    right = logits.argmax(1) == labels
    return {
        "accuracy": float(right.mean()),
        "recall": {n: float(right[labels == k].mean()) for k, n in enumerate(names)},
    }


class Clock(keras.callbacks.Callback):
    """Notes each epoch's minutes, and stops after `minutes` of them."""

    def __init__(self, minutes: float):
        super().__init__()
        self.minutes, self.start, self.lines = minutes, time.monotonic(), []

    def on_epoch_end(self, epoch, logs=None):
        passed = (time.monotonic() - self.start) / 60
        self.lines.append({"epoch": epoch + 1, "minutes": passed, **(logs or {})})
        self.model.stop_training = passed > self.minutes


class Recalibrate(keras.callbacks.Callback):
    """Running batch statistics: before each validation the mean over batches of plain images."""

    def __init__(self, plain: keras.Model, images: np.ndarray):
        super().__init__()
        self.plain, self.batches = plain, np.split(images, len(images) // 64)

    def on_test_begin(self, logs=None):
        body = self.plain.layers[-1]
        norms = [x for x in body.layers if isinstance(x, layers.BatchNormalization)]
        usual = [norm.momentum for norm in norms]
        for i, batch in enumerate(self.batches):
            for norm in norms:
                norm.momentum = i / (i + 1)
            self.plain(batch, training=True)
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="whose split.csv to train on")
    parser.add_argument("--weights", type=Path, required=True, help="npz under Keras's names")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=45.0, help="stop after the epoch by then")
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: the run's")
    parser.add_argument("--no_recalibrate", action="store_true", help="batch statistics as `fit`")
    parser.add_argument("--pairs", type=Path, help="folder of twins, <Class>/images/<name>")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.side = args.side or side_of(args.run)
    arrays, names = read_images(args.run, args.side)
    twins = read_twins(args.run, args.pairs, args.side)[..., None] if args.pairs else None
    splits = {name: (x[..., None], y) for name, (x, y) in arrays.items()}
    eye = np.eye(len(names), dtype=np.float32)
    images, labels = splits["train"]

    model, plain = lite0(args.side, len(names), args.weights)
    steps = args.epochs * -(-len(images) // 32)
    warm_up = steps // 8
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=1e-3, warmup_steps=warm_up
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.02, global_clipnorm=1.0),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.05),
        metrics=["accuracy"],
    )
    clock = Clock(args.minutes)
    best = args.output.with_suffix(".weights.h5")
    keep = keras.callbacks.ModelCheckpoint(
        best, monitor="val_loss", save_best_only=True, save_weights_only=True
    )
    held_out, answers = splits["val"]
    callbacks = [clock, keep]
    if not args.no_recalibrate:
        some = np.random.default_rng(args.seed).permutation(len(images))[
            : min(2560, len(images) // 64 * 64)
        ]
        callbacks.append(Recalibrate(plain, images[some]))
    model.fit(
        images,
        eye[labels],
        batch_size=32,
        epochs=args.epochs,
        validation_data=(held_out, eye[answers]),
        callbacks=callbacks,
        verbose=2,
    )
    model.load_weights(best)
    result = {"epochs": clock.lines, "keras": keras.__version__, "backend": keras.backend.backend()}
    for split in ("val", "test"):
        if split in splits:
            x, y = splits[split]
            logits = model.predict(x, batch_size=64, verbose=0)
            result[split] = report(logits, y, names)
            print(split, result[split])
            answers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
            answers /= answers.sum(1, keepdims=True)
            path = args.output.with_name(f"{args.output.stem}-{split}.csv")
            write_predictions(path, *labelled_files(args.run, split), names, answers)
    if twins is not None:
        answers = model.predict(twins, batch_size=64, verbose=0).argmax(1)
        counts = np.bincount(answers, minlength=len(names)).tolist()
        result["twins"] = dict(zip(names, counts, strict=True))
        print("twins are called", result["twins"])
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
