"""Which part of an export a run answers from.

    python scripts/pair_cues.py --workdir=RUN --pairs=DIR [--data_dir=DIR]

DIR of `--pairs` holds images of the run's put through another export, as for
`python -m covid_flax.controls --pairs`. Where the run answers otherwise to such a twin, this tells
what it answers from: coarse and fine detail of original and twin are exchanged, the twin's mean
grey is set right, or what the export added to another image, or white noise of that strength, is
added to the original. Images trained on are left out. It prints how many images get which answer,
and by what the odds of the class that twins gain most are multiplied.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from scipy import ndimage

from covid_flax.data.dataset import Dataset
from covid_flax.data.decode import decode, resize
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.errors import UserError, run_script
from covid_flax.evaluation.twins import find_twins, refuse_itself
from covid_flax.files import expanded
from covid_flax.run_folder import learned_files
from covid_flax.run_images import open_data
from covid_flax.trained_run import Ensemble, TrainedRun, open_run, saved_run

SIGMAS = (0.8, 1.5, 3.0)  # pixels of the files, between what is called fine and coarse


@dataclasses.dataclass(frozen=True)
class _Images:
    """Grey images `[N, H, W]`, 0..255, as a run's source."""

    images: np.ndarray
    config: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        grey = np.clip(np.round(self.images[i]), 0, 255).astype(np.uint8)
        size, how = self.config.image_size, self.config.interpolation
        pixels = np.repeat(grey[..., None], 3, -1)
        return {"image": resize(pixels, size, how, self.config.intermediate_size), "label": 0}


def changes(
    originals: np.ndarray, twins: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """What is shown to the run, and its name: float64 `[N, H, W]`, as originals and twins."""
    yield "original", originals
    yield "twin", twins
    for sigma in SIGMAS:
        coarse, its_coarse = (
            ndimage.gaussian_filter(x, (0, sigma, sigma)) for x in (originals, twins)
        )
        yield f"twin's detail finer than {sigma:g} pixels", coarse + twins - its_coarse
        yield f"twin's detail coarser than {sigma:g} pixels", its_coarse + originals - coarse
    means = [x.mean((1, 2), keepdims=True) for x in (originals, twins)]
    yield "twin, original's mean grey", twins - means[1] + means[0]
    added = twins - originals
    added -= added.mean((1, 2), keepdims=True)
    if len(added) > 1:
        yield "original, what was added to another", originals + np.roll(added, 1, 0)
    white = rng.normal(0, added.std(), originals.shape)
    yield f"original, white noise of {added.std():.2f} greys", originals + white


def answers(
    run: TrainedRun | Ensemble, originals: np.ndarray, twins: np.ndarray, truth: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What is shown, how many images get which answer `[K]`, and by what their odds are multiplied.

    The odds are those of each class against the true one, `truth`, int `[N]`: the geometric mean
    of how they change against the originals, `[K]`.
    """
    before = None
    for name, images in changes(originals, twins, np.random.default_rng(0)):
        p = run.probabilities(_Images(images, run.config.data), name)
        odds = np.log(np.maximum(p, 1e-12))
        odds = odds - odds[np.arange(len(truth)), truth][:, None]
        before = odds if before is None else before
        counts = np.bincount(p.argmax(1), minlength=p.shape[1])
        yield name, counts, np.exp((odds - before).mean(0))


def _read(
    data: Dataset, pairs: DataFolder, learned: Collection[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of originals and twins, float64 `[N, H, W]`, and classes `[N]`."""
    found = find_twins(data.rows, pairs, learned)
    originals: list[np.ndarray] = []
    twins: list[np.ndarray] = []
    for row, file in found:
        one = decode(data.folder.read(row.file), row.file).mean(-1)
        other = decode(pairs.read(file), file).mean(-1)
        if one.shape != other.shape or originals and one.shape != originals[0].shape:
            raise UserError(f"{row.file}: the images and their twins must all be of one size")
        originals.append(one)
        twins.append(other)
    truth = np.array([data.class_names.index(row.label) for row, _ in found])
    return np.stack(originals), np.stack(twins), truth


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument("--pairs", required=True, help="twins: <Class>/images/<name of an image>")
    parser.add_argument("--data_dir", default="", help="where the run's images lie now")
    args = parser.parse_args(arguments)
    workdir, twin_folder = expanded(args.workdir), os.path.expanduser(args.pairs)
    run = open_run(workdir, data_dir=args.data_dir)
    # Not "all": a folder given with that is another's, and has no split.
    data = open_data(workdir, saved_run(workdir), "val", args.data_dir)
    refuse_itself(twin_folder, data.folder)
    pairs = open_folder(twin_folder, require_two_classes=False)
    originals, twins, truth = _read(data, pairs, learned_files(workdir))
    print(f"{len(truth):,} pairs, none trained on; answers: {', '.join(run.class_names)}")
    moved = None
    for name, counts, factor in answers(run, originals, twins, truth):
        if name == "twin":
            moved = int(factor.argmax())
        line = f"{name:40}" + "".join(f"{n:6,}" for n in counts)
        if moved is not None:
            line += f"   odds of {run.class_names[moved]} x {factor[moved]:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    run_script(main)
