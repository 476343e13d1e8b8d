"""Groups images by how they were taken and exported, to hold whole styles out.

    python scripts/style_groups.py --data_dir=DIR --output=styles.csv [--styles=4]
        [--groups_file=CSV]

Within each class, images are clustered by what is no anatomy: quantiles of their greys, the greys
of borders and corners, and the power of coarse to fine detail. Each class's styles then are its
groups, and

    python -m covid_flax.main ... --config.data.split=grouped --config.data.groups_file=styles.csv \
      --config.data.group_column=group \
      --config.data.folds=4 --config.data.test_fraction=0

trains, in turn, without one style of every class and scores the images of just these. It is no
other hospital, but the nearest to one that a single collection offers: an accuracy that falls far
below that of the usual split was owed to the styles. Images of one class that the folder's
own groups hold together go to one style.
"""

from __future__ import annotations

import argparse
import collections
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from covid_flax.data.decode import decode, resize
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.data.groups import groups_csv
from covid_flax.errors import UserError, run_script
from covid_flax.files import expanded, make_writable, write_atomically

SIDE = 112  # pixels at which images are compared
_QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_RINGS = (2, 4, 7, 11, 17, 25, 36, 50)  # cycles an image, between which power is summed


def style(image: np.ndarray) -> np.ndarray:
    """Figures of a square grey image of `SIDE` pixels, 0..255: float64 `[23]`."""
    x = np.asarray(image, np.float64)
    edge, corner = SIDE // 18, SIDE // 9
    places = [x[:edge], x[-edge:], x[:, :edge], x[:, -edge:]]
    places += [
        x[:corner, :corner],
        x[:corner, -corner:],
        x[-corner:, :corner],
        x[-corner:, -corner:],
    ]
    window = np.hanning(SIDE)
    plain = (x - x.mean()) / max(x.std(), 1.0) * window[:, None] * window
    power = np.abs(np.fft.fftshift(np.fft.fft2(plain))) ** 2
    radius = np.hypot(*(np.indices(power.shape) - SIDE // 2))
    rings = [
        np.log(power[(radius >= low) & (radius < high)].mean() + 1e-6)
        for low, high in zip(_RINGS[:-1], _RINGS[1:], strict=True)
    ]
    return np.array(
        [*np.quantile(x, _QUANTILES), *(p.mean() for p in places), *rings, (x < 5).mean()]
    )


def style_groups(folder: DataFolder, figures: np.ndarray, styles: int) -> dict[str, str]:
    """The style of every file, `<class>-<number>`, as many for each class.

    Args:
      folder: the images.
      figures: `style` of each, in the order of `folder.files`.
      styles: of each class.

    Raises:
      UserError: a class has too few images.
    """
    labels = np.array([f.label for f in folder.files])
    result: dict[str, str] = {}
    for name in folder.class_names:
        index = np.flatnonzero(labels == name)
        if len(index) < 2 * styles:
            raise UserError(f"{name} has {len(index)} images: give fewer --styles")
        scaled = StandardScaler().fit_transform(figures[index])
        found = KMeans(styles, n_init=10, random_state=0).fit_predict(scaled)
        files = [folder.files[i].file for i in index]
        held = [folder.groups[file] if folder.groups else file for file in files]
        votes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        for group, number in zip(held, found, strict=True):
            votes[group][int(number)] += 1
        for file, group in zip(files, held, strict=True):
            result[file] = f"{name}-{votes[group].most_common(1)[0][0]}"
        left = len({result[file] for file in files})
        if left < styles:
            raise UserError(
                f"{name} has {left} styles where its groups hold together: give fewer --styles"
            )
    return result


def _figures(folder: DataFolder, threads: int) -> np.ndarray:
    def one(file: str) -> np.ndarray:
        return style(resize(decode(folder.read(file), file), SIDE, "box").mean(-1))

    files = [f.file for f in folder.files]
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(
            list(tqdm(pool.map(one, files), total=len(files), unit=" images", leave=False))
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="the image folder, or its zip")
    parser.add_argument("--output", type=Path, required=True, help="csv to write")
    parser.add_argument("--styles", type=int, default=4, help="of each class")
    parser.add_argument("--groups_file", default="", help="csv of images that belong together")
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args(arguments)
    if args.styles < 2:
        raise UserError(f"--styles={args.styles}: give at least 2")
    if args.threads < 1:
        raise UserError(f"--threads={args.threads}: give at least 1")
    output = expanded(args.output)
    if output.exists():
        raise UserError(f"{output} exists: give another --output, or remove it")
    make_writable(output.parent)
    folder = open_folder(args.data_dir, groups_file=args.groups_file)
    groups = style_groups(folder, _figures(folder, args.threads), args.styles)
    write_atomically(output, groups_csv(groups.keys(), groups.values()))
    for group, number in sorted(collections.Counter(groups.values()).items()):
        print(f"{group:24}{number:8,}")
    print(f"written: {output}")


if __name__ == "__main__":
    run_script(main)
