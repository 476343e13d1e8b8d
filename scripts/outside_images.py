"""Puts X-rays of other hospitals, from public repositories, into folders to score networks on.

    python scripts/outside_images.py --clones=DIR --data_dir=RADIOGRAPHY --output=outside
    python -m covid_flax.evaluate --workdir=RUN --split=all --data_dir=outside/held_back
    python scripts/outside_images.py --score RUN/eval/all/predictions.csv ...

DIR holds clones of (a repository that is not there is left out, and said so)

    armiro/COVID-CXNet  pi-null-mezon/OpenIST                                       -> choosing
    agchung/Actualmed-COVID-chestxray-dataset  agchung/Figure1-COVID-chestxray-dataset
    venkatasai3005/lung-segmentation-unet (copies of the JSRT set)                  -> held_back

each under its own name. Two folders come of them, `choosing`, by which a recipe may be chosen, and
`held_back`, which should choose nothing, both in the layout of the radiography database with the
classes COVID and Normal. Images are made like the database's shared copies: squeezed to 112 x 112,
grey, black to white. What the leak check finds to be a copy of an image of RADIOGRAPHY, or another
exposure of the same patient, is left out: the database was collected from some of these. So is
from `choosing` what is a copy of an image held back.

`--score` tells apart COVID from Normal by the odds p_COVID / p_Normal of a `predictions.csv`.
"""

from __future__ import annotations

import argparse
import collections
import csv
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from covid_flax.data.audit import audit
from covid_flax.data.folder import open_folder
from covid_flax.data.groups import groups_csv
from covid_flax.errors import UserError, run_script
from covid_flax.evaluation.intervals import cluster_weights, percentile_interval
from covid_flax.evaluation.predictions import read_predictions
from covid_flax.files import expanded, write_atomically

SIDE = 112
_RESAMPLES = 1000
_FINDINGS = {"COVID-19": "COVID", "No finding": "Normal"}
_Found = Iterator[tuple[Path, str]]


def _metadata(clone: Path, *columns: str) -> list[dict[str, str]]:
    path = clone / "metadata.csv"
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="latin-1")), restval="")
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): clone the repository anew") from e
    if not set(columns) <= set(table.fieldnames or ()):
        raise UserError(f"{path} lacks {' or '.join(columns)}: clone the repository anew")
    return list(table)


def _actualmed(clone: Path) -> _Found:
    for row in _metadata(clone, "finding", "imagename"):
        if row["finding"] in _FINDINGS:
            yield clone / "images" / row["imagename"], _FINDINGS[row["finding"]]


def _figure1(clone: Path) -> _Found:
    for row in _metadata(clone, "finding", "patientid"):
        for path in sorted((clone / "images").glob(row["patientid"] + ".*")):
            if row["finding"] in _FINDINGS:
                yield path, _FINDINGS[row["finding"]]


def _cxnet(clone: Path) -> _Found:
    for path in sorted((clone / "chest_xray_images" / "covid19").glob("*.*")):
        if "p" not in path.stem:  # a child
            yield path, "COVID"


def _openist(clone: Path) -> _Found:
    for path in sorted((clone / "Datasets" / "Chest_x-ray").glob("*.jpg")):
        if "@" not in path.stem:  # a mask
            yield path, "Normal"


def _jsrt(clone: Path) -> _Found:
    for path in sorted((clone / "dataset" / "images").glob("JPCNN*.png")):
        yield path, "Normal"


# folder -> repository -> its images and their classes
SOURCES: dict[str, dict[str, Callable[[Path], _Found]]] = {
    "choosing": {"COVID-CXNet": _cxnet, "OpenIST": _openist},
    "held_back": {
        "Actualmed-COVID-chestxray-dataset": _actualmed,
        "Figure1-COVID-chestxray-dataset": _figure1,
        "lung-segmentation-unet": _jsrt,
    },
}


def like_the_database(path: Path) -> Image.Image:
    """The file as a grey image of 112 x 112 pixels, stretched to 0..255. OSError: no image."""
    with Image.open(path) as file:
        image: Image.Image = file
        if file.mode.startswith("I"):  # 16 bits: `convert` would clip them
            deep = np.asarray(file, np.float64)
            image = Image.fromarray(np.uint8(255 * deep / max(deep.max(), 1)))
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = np.asarray(small, np.float64)
    grey = (grey - grey.min()) / max(grey.max() - grey.min(), 1) * 255
    return Image.fromarray(np.uint8(np.rint(grey)))


def build(clones: Path, data_dir: str, output: Path) -> None:
    """Writes the two folders, and says what became of each source's images."""
    for folder in SOURCES:
        if (output / folder).exists():
            raise UserError(f"{output / folder} is there already: choose another --output")
    known = open_folder(os.path.expanduser(data_dir))
    counts: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # One folder of the database's images and the others, so that all are compared with all.
        both = Path(scratch)
        for i, file in enumerate(known.files):  # numbered, for names may come twice
            place = both / file.label / "images" / f"known~{i}~{Path(file.file).name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(known.read(file.file))
        for folder, sources in SOURCES.items():
            for name, images in sources.items():
                if not (clones / name).is_dir():
                    print(f"{name}: no clone in {clones}, left out", file=sys.stderr)
                    continue
                count = counts[name] = collections.Counter()
                for source, label in images(clones / name):
                    try:
                        image = like_the_database(source)
                    except Exception:  # Pillow's many, of a damaged file
                        count["missing or unreadable"] += 1
                        continue
                    place = both / label / "images" / f"{folder}~{name}~{source.stem}.png"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    image.save(place)
        if not counts:
            raise UserError(f"{clones} holds none of the clones: see --help")
        result = audit(open_folder(str(both)), progress=True)
        groups_of = collections.defaultdict(set)
        kept = collections.defaultdict(list)
        for path, group in zip(result.files, result.groups, strict=True):
            groups_of[Path(path).name.split("~")[0]].add(group)
        for path, label, group in zip(result.files, result.labels, result.groups, strict=True):
            folder, name, *rest = Path(path).name.split("~")
            if folder == "known":
                continue
            if group in groups_of["known"]:
                counts[name]["in the database"] += 1
                continue
            if folder == "choosing" and group in groups_of["held_back"]:
                counts[name]["held back in another source"] += 1
                continue
            counts[name][label] += 1
            place = output / folder / label / "images" / f"{name}~{'~'.join(rest)}"
            write_atomically(place, (both / path).read_bytes())
            kept[folder].append((f"{label}/images/{place.name}", group))
    for folder, files in kept.items():  # of copies, or exposures of one patient
        write_atomically(output / folder / "groups.csv", groups_csv(*zip(*files, strict=True)))
    for name, count in counts.items():
        print(f"{name}: " + ", ".join(f"{what} {n:,}" for what, n in sorted(count.items())))


def score(path: Path) -> str:
    """Of a `predictions.csv`: AUROC, resampling groups, and what each source's are called.

    Groups are those of the `groups.csv` beside it; without one every image is its own.
    """
    rows = read_predictions(path)
    names = rows.class_names
    if not {"COVID", "Normal"} <= {names[label] for label in rows.labels}:
        raise UserError(f"{path} has no image of COVID or none of Normal: score a folder of both")
    both = [names.index("COVID"), names.index("Normal")]
    asked = np.isin(rows.labels, both)
    p = rows.probabilities[asked][:, both] + 1e-12
    covid = rows.labels[asked] == both[0]
    odds = np.log(p[:, 0] / p[:, 1])
    called: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for file, label, predicted in zip(rows.files, rows.labels, rows.predicted, strict=True):
        source = Path(file).name.split("~")[0]
        called[f"{source} {names[label]}"][names[predicted]] += 1
    resampled = [
        roc_auc_score(covid, odds, sample_weight=w) if 0 < w @ covid < w.sum() else np.nan
        for weights in cluster_weights(rows.clusters[asked], _RESAMPLES)
        for w in weights
    ]
    low, high = percentile_interval(np.array(resampled)) or (np.nan, np.nan)
    auroc = f"AUROC {roc_auc_score(covid, odds):.3f} (95 %: {low:.3f} to {high:.3f})"
    lines = [f"{path}: {len(covid)} images of COVID and Normal, {auroc}"]
    for source, count in sorted(called.items()):
        answers = ", ".join(f"{label} {n}" for label, n in sorted(count.items()))
        lines.append(f"  {source} called {answers}")
    return "\n".join(lines)


def _path(text: str) -> Path:
    return expanded(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clones", type=_path, help="folder of the repositories' clones")
    parser.add_argument("--data_dir", help="images that networks were trained on")
    parser.add_argument("--output", type=_path, default=Path("outside"), help="default: outside")
    parser.add_argument("--score", type=_path, nargs="+", metavar="CSV", help="predictions.csv")
    args = parser.parse_args()
    if args.score:
        print("\n".join(score(path) for path in args.score))
    elif args.clones and args.data_dir:
        build(args.clones, args.data_dir, args.output)
    else:
        parser.error("give --clones and --data_dir, or --score")


if __name__ == "__main__":
    run_script(main)
