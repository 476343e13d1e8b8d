"""A run's images for the peers, whose environments need not have this package."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def read_images(run: Path, side: int) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """By split: images `[N, side, side]` uint8 and labels `[N]`; and the class names."""
    config = json.loads((run / "config.json").read_text())
    root, names = Path(config["data"]["root"]), config["class_names"]
    if not root.is_dir():
        raise SystemExit(f"{root} is no folder: unpack the images, and train the run on that")
    splits: dict[str, list[tuple[np.ndarray, int]]] = {}
    for row in _rows(run):
        image = _read(root / row["file"], side)
        splits.setdefault(row["split"], []).append((image, names.index(row["label"])))
    return {
        name: (np.stack([image for image, _ in of]), np.array([label for _, label in of]))
        for name, of in splits.items()
    }, names


def side_of(run: Path) -> int:
    """Of the images that the run's network sees, pixels."""
    return int(json.loads((run / "config.json").read_text())["config"]["data"]["image_size"])


def read_twins(run: Path, pairs: Path, side: int) -> np.ndarray:
    """Of the run's images outside the training part, those that `pairs` has under their names.

    Returns:
      `[N, side, side]` uint8.
    """
    paths = [
        pairs / row["label"] / "images" / Path(row["file"]).name
        for row in _rows(run)
        if row["split"] != "train"
    ]
    there = [path for path in paths if path.exists()]
    if not there:
        raise SystemExit(f"{pairs} has none of the run's images as <Class>/images/<name>")
    return np.stack([_read(path, side) for path in there])


def read_folder(folder: Path, side: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Of <Class>/images/<name>: images `[N, side, side]` uint8, files and classes."""
    paths = sorted(folder.glob("*/images/*.png"))
    if not paths:
        raise SystemExit(f"{folder} has no <Class>/images/*.png: give such a folder")
    images = np.stack([_read(path, side) for path in paths])
    files = [path.relative_to(folder).as_posix() for path in paths]
    return images, files, [path.parts[-3] for path in paths]


def labelled_files(run: Path, split: str) -> tuple[list[str], list[str]]:
    """Files and class names of a split, in the order of `read_images`."""
    rows = [row for row in _rows(run) if row["split"] == split]
    return [row["file"] for row in rows], [row["label"] for row in rows]


def write_predictions(
    path: Path, files: list[str], labels: list[str], names: list[str], probabilities: np.ndarray
) -> None:
    """A `predictions.csv` of `[N, K]` probabilities."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["file", "label", "predicted", *(f"p_{name}" for name in names)])
        for file, label, p in zip(files, labels, probabilities, strict=True):
            writer.writerow([file, label, names[int(p.argmax())], *map(float, p)])


def _rows(run: Path) -> list[dict[str, str]]:
    with open(run / "split.csv", newline="") as f:
        return list(csv.DictReader(f))


def _read(path: Path, side: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise SystemExit(f"error: {path} is of mode {image.mode}, which the peers' code would clip")
    image = image.convert("L")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
