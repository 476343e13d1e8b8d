"""Plants altered copies among the images of a folder and counts what the audit finds of them.

    python benchmarks/audit_recall.py --data_dir=DIR [--copies 200] [--total 0] [--seed 0]
        [--json FILE]

A temporary folder gets links to the images of DIR and, for each kind and strength of change,
`--copies` altered copies, each of another image, spread over the classes. The audit runs on it.
DIR itself is only read.

recall: the copies that end up in the group of their original.
precision: of the pairs found that have a copy of that kind in them, those that join it to its
original, or to an image that the audit of DIR alone (or DIR's own csv) groups with the original.

`--total` adds unaltered copies until there are that many images, to time the audit.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import math
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from covid_flax.data.audit import Audit, audit
from covid_flax.data.decode import decode
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.errors import run_script
from covid_flax.files import result_file

# Beyond the strengths that the audit is meant for, to show where it ends.
KINDS: dict[str, tuple[float, ...]] = {
    "exact": (0,),
    "resize": (0.35, 0.5, 0.75, 1.5, 2.0),
    "jpeg": (10, 20, 30, 60, 90),
    "brightness": (0.1, 0.2, 0.3, 0.4),
    "contrast": (0.1, 0.2, 0.3, 0.4),
    "both": (0.2, 0.3),
    "gamma": (1.3, 1.7, 2.2),
    "crop": (0.02, 0.05, 0.1, 0.13),
    "shift": (0.02, 0.05, 0.08, 0.11),
    "rotate": (1, 2, 4),
    "mirror": (0,),
}
MEANING = {
    "resize": "sides times",
    "jpeg": "quality",
    "brightness": "times 1 + or -",
    "contrast": "times 1 + or -",
    "both": "brightness and contrast, each times 1 + or -",
    "rotate": "degrees",
    "gamma": "exponent, or one over it",
    "crop": "at most of each side, half of it at least",
    "shift": "of a side along x and y, filled black or with the edge",
}


def alter(pixels: np.ndarray, kind: str, strength: float, rng: np.random.Generator) -> bytes:
    """The altered image as a file: JPEG for `jpeg`, else PNG."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if kind == "resize":
        size = round(width * strength), round(height * strength)
        image = image.resize(size, Image.Resampling.BICUBIC)
    elif kind in ("brightness", "contrast", "both"):
        if kind != "contrast":
            image = ImageEnhance.Brightness(image).enhance(1 + rng.choice([-strength, strength]))
        if kind != "brightness":
            image = ImageEnhance.Contrast(image).enhance(1 + rng.choice([-strength, strength]))
    elif kind == "gamma":
        exponent = strength if rng.random() < 0.5 else 1 / strength
        image = image.point([round(255 * (v / 255) ** exponent) for v in range(256)] * 3)
    elif kind == "crop":
        cut = strength * rng.uniform(0.5, 1, 4)
        cut[rng.integers(4)] = strength
        left, top, right, bottom = cut * [width, height, width, height]
        box = round(left), round(top), round(width - right), round(height - bottom)
        image = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    elif kind == "shift":
        share = rng.choice([-1, 1], 2) * strength * rng.permutation([1, rng.uniform(0.5, 1)])
        dx, dy = round(share[0] * width), round(share[1] * height)
        border = max(abs(dx), abs(dy))
        padded = np.pad(
            pixels, ((border,) * 2, (border,) * 2, (0, 0)), rng.choice(["edge", "constant"])
        )
        shifted = padded[border - dy : border - dy + height, border - dx : border - dx + width]
        image = Image.fromarray(shifted)
    elif kind == "rotate":
        angle = strength * rng.choice([-1, 1])
        image = image.rotate(angle, resample=Image.Resampling.BICUBIC)
    elif kind == "mirror":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    image = image.convert("L")
    if kind == "jpeg":
        image.save(file, "JPEG", quality=int(strength))
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def plant(
    folder: DataFolder, root: Path, copies: int, total: int, seed: int
) -> dict[str, tuple[str, float, str]]:
    """Fills `root`. Kind, strength and original of each copy; all named by their place there."""
    if not Path(folder.root).is_dir():
        raise SystemExit("--data_dir must be a folder, not a zip")
    rng = np.random.default_rng(seed)
    names = {}
    for i, f in enumerate(folder.files):
        names[f.file] = f"{f.label}/{i:06}{Path(f.file).suffix}"
        link = root / names[f.file]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(folder.root).absolute() / f.file)
    wanted = [(kind, s) for kind, strengths in KINDS.items() for s in strengths]
    order = rng.permutation(len(folder.files))
    copies = min(copies, len(order) // len(wanted))  # no image is altered twice
    planted = {}
    for k, i in enumerate(order):
        f = folder.files[i]
        if k < copies * len(wanted):
            kind, strength = wanted[k % len(wanted)]
        elif len(names) + len(planted) < total:
            kind, strength = "filler", 0.0
        else:
            break
        data = alter(decode(folder.read(f.file), f.file), kind, strength, rng)
        file = f"{f.label}/{kind}-{strength:g}-{i:06}.{'jpg' if kind == 'jpeg' else 'png'}"
        (root / file).write_bytes(data)
        planted[file] = kind, strength, names[f.file]
    return planted


def count(
    result: Audit, planted: dict[str, tuple[str, float, str]], relatives: dict[str, str]
) -> dict[tuple[str, float], dict[str, float]]:
    """Copies, recall and precision by kind and strength."""
    group = dict(zip(result.files, result.groups, strict=True))
    tallies: dict[tuple[str, float], collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for file, (kind, strength, original) in planted.items():
        tallies[kind, strength]["copies"] += 1
        tallies[kind, strength]["found"] += group[file] == group[original]

    def origin(file: str) -> str:
        return relatives[planted[file][2] if file in planted else file]

    for pair in result.pairs:
        files = [result.files[pair.first], result.files[pair.second]]
        for kind_strength in {planted[f][:2] for f in files if f in planted}:
            tallies[kind_strength]["pairs"] += 1
            tallies[kind_strength]["right"] += origin(files[0]) == origin(files[1])
    return {
        key: {
            "copies": t["copies"],
            "recall": t["found"] / t["copies"],
            "precision": t["right"] / t["pairs"] if t["pairs"] else math.nan,
        }
        for key, t in tallies.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--total", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=result_file)
    args = parser.parse_args()

    folder = open_folder(args.data_dir, require_two_classes=False)
    alone = audit(folder, progress=True)
    with tempfile.TemporaryDirectory() as temporary:
        planted = plant(folder, Path(temporary), args.copies, args.total, args.seed)
        crowded = open_folder(temporary, require_two_classes=False)
        cpu, wall = time.process_time(), time.perf_counter()
        result = audit(crowded, progress=True)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    # Group of the originals under their names in the temporary folder.
    names = {f.file: i for i, f in enumerate(folder.files)}
    relatives = {
        f"{label}/{names[file]:06}{Path(file).suffix}": group
        for file, label, group in zip(alone.files, alone.labels, alone.groups, strict=True)
    }
    figures = count(result, planted, relatives)
    print(f"{'kind':12}{'strength':>9}{'copies':>8}{'recall':>8}{'precision':>11}")
    for (kind, strength), row in figures.items():
        if kind != "filler":
            print(
                f"{kind:12}{strength:9g}{row['copies']:8}{row['recall']:8.3f}{row['precision']:11.3f}"
            )
    for kind, meaning in MEANING.items():
        print(f"  {kind}: {meaning}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{len(result.files):,} images in {wall:.0f} s, {cpu:.0f} s of processor time; "
        f"at most {memory:.2f} GB of memory"
    )
    if args.json:
        rows = [{"kind": k, "strength": s, **row} for (k, s), row in figures.items()]
        args.json.write_text(
            json.dumps({"seed": args.seed, "rows": rows, "seconds": wall, "cpu": cpu}, indent=1)
        )


if __name__ == "__main__":
    run_script(main)
