"""Looks for leaks in a data folder: copies, and images that are no chest X-rays.

    python -m covid_flax.data.audit --data_dir=DIR [--output=DIR] [--split_csv=RUN/split.csv]
        [--groups_file=CSV [--group_column=NAME]]

Writes `groups.csv` (`file,group`, every image), which `data.split=grouped` uses, and `audit.json`.
Never writes into the data folder unless `--output` names it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from covid_flax.command import run_command
from covid_flax.data import duplicates
from covid_flax.data.decode import decode, is_dark
from covid_flax.data.duplicates import Pair, find_duplicates, thumbnail
from covid_flax.data.folder import DataFolder, open_folder, refuse_inside
from covid_flax.data.groups import connected, groups_csv
from covid_flax.data.splits import Row, read_split_csv
from covid_flax.errors import UserError
from covid_flax.files import (
    expanded,
    make_writable,
    peek,
    refuse_foreign,
    write_atomically,
    write_json,
)

# Below it a pair may also be two exposures of one patient.
_SURELY_COPIED = 0.95
# What makes an image suspicious; docs/audit.md has the figures behind the limits.
_BLANK_RANGE = 8  # grey levels between the 1st and 99th percentile
_TWO_VALUED_SHARE = 0.9  # of the pixels, in two bands of 16 grey levels
_COLOUR_CHROMA, _COLOUR_SHARE = 40, 0.1
_INVERTED, _UNLIKE = -0.4, 0.1  # correlation with the folder's median image
_FEWEST_FOR_MEDIAN = 20

_MENDS = {
    "unreadable": "replace or remove them",
    "dark": "values of 10 or 12 bits in files of 16? scale them to the full range",
    "blank": "remove them",
    "two-valued": "a mask or a page of text? remove them",
    "colour": "a photograph or a coloured picture? look at them, remove what is no X-ray",
    "inverted": "negatives of the others: invert or remove them",
    "unlike": "turned, framed, or no chest X-ray? look at them",
}


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """An image that may be no chest X-ray.

    Attributes:
      file: relative to the data folder.
      label: its class.
      kind: `unreadable`, `dark`, `blank`, `two-valued`, `colour`, `inverted` or `unlike`.
      reason: a phrase with the figure that raised it.
    """

    file: str
    label: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the audit of a folder found.

    Attributes:
      files: every image, relative to the data folder, in the folder's order.
      labels: class of each.
      groups: group of each: the name of its group's first file. Images found to be copies of each
        other, and those that the folder's csv puts into one group, share theirs.
      pairs: the copies found, by index into `files`.
      known_groups: how many groups of two images or more the folder's csv tells; None without one.
      suspicions: in the order of `files`.
      splits: `train`, `val`, `test` or "" (not listed) of each image; () without a split file.
      seconds: time that the audit took.
    """

    files: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    pairs: tuple[Pair, ...]
    known_groups: int | None
    suspicions: tuple[Suspicion, ...]
    splits: tuple[str, ...]
    seconds: float

    def members(self) -> dict[str, list[int]]:
        """Indices of the images of each group that has two or more, by its name."""
        found = collections.defaultdict(list)
        for i, group in enumerate(self.groups):
            found[group].append(i)
        return {group: images for group, images in found.items() if len(images) > 1}

    def across_classes(self) -> list[Pair]:
        """Copies that have different labels."""
        return [p for p in self.pairs if self.labels[p.first] != self.labels[p.second]]

    def across_splits(self) -> list[Pair]:
        """Copies that lie in different splits."""
        if not self.splits:
            return []
        return [p for p in self.pairs if len(self._splits(p) - {""}) == 2]

    def shared(self) -> dict[str, dict[str, int]]:
        """`[split][other]`: images of `split` with one of their group in `other`."""
        counts: dict[str, dict[str, int]] = {}
        for images in self.members().values() if self.splits else ():
            held = collections.Counter(self.splits[i] for i in images if self.splits[i])
            for split, count in held.items():
                for other in held.keys() - {split}:
                    row = counts.setdefault(split, {})
                    row[other] = row.get(other, 0) + count
        return {split: dict(sorted(row.items())) for split, row in sorted(counts.items())}

    def _splits(self, pair: Pair) -> set[str]:
        return {self.splits[pair.first], self.splits[pair.second]}


def audit(folder: DataFolder, rows: Sequence[Row] = (), *, progress: bool = False) -> Audit:
    """Compares and inspects all images of `folder`; decodes each once.

    An image that cannot be decoded is suspicious, and a group of its own unless a csv says more.

    Args:
      folder: the images, and the groups that its csv tells.
      rows: a run's split of these images.
      progress: whether to show progress bars.

    Raises:
      UserError: none of `rows` is an image of `folder`.
    """
    start = time.monotonic()
    files = [f.file for f in folder.files]
    labels = [f.label for f in folder.files]
    place = {row.file: row.split for row in rows}
    splits = tuple(place.get(file, "") for file in files) if rows else ()
    if rows and not any(splits):
        raise UserError(
            f"the split file lists none of the images of {folder.root}: give its run's data folder"
        )

    images, digests, oddities = _read(folder, files, progress)
    readable = np.array([i for i in range(len(files)) if digests[i] is not None], np.int64)
    found = find_duplicates(
        images[readable], digests=[digests[i] or b"" for i in readable], progress=progress
    )
    at = readable.tolist()
    pairs = [dataclasses.replace(p, first=at[p.first], second=at[p.second]) for p in found]

    links = [(p.first, p.second) for p in pairs]
    known = None
    if folder.groups is not None:
        together = collections.defaultdict(list)
        for i, file in enumerate(files):
            together[folder.groups[file]].append(i)
        links += [(group[0], i) for group in together.values() for i in group[1:]]
        known = sum(len(group) > 1 for group in together.values())
    groups = connected(len(files), links)

    for i, oddity in _unlike(images, [i for i in at if oddities[i] is None]).items():
        oddities[i] = oddity
    suspicions = [
        Suspicion(files[i], labels[i], *oddity) for i, oddity in enumerate(oddities) if oddity
    ]
    return Audit(
        files=tuple(files),
        labels=tuple(labels),
        groups=tuple(files[g] for g in groups),
        pairs=tuple(pairs),
        known_groups=known,
        suspicions=tuple(suspicions),
        splits=splits,
        seconds=time.monotonic() - start,
    )


def write_audit(result: Audit, folder: DataFolder, output: Path) -> None:
    """Writes `groups.csv` and `audit.json` into `output`. UserError where it cannot."""
    # First, for it tells that the other is an audit's.
    write_json(output / "audit.json", _as_dict(result, folder))
    write_atomically(output / "groups.csv", groups_csv(result.files, result.groups))


def _refuse_to_lose(output: Path, folder: DataFolder) -> None:
    """Where a groups.csv would be lost that no audit wrote, or one of other images."""
    listed = output / "groups.csv"
    if not listed.exists():
        refuse_foreign(output, ("audit.json",), "data_dir")
        return
    before, ours = peek(output / "audit.json").get("data_dir"), False
    with contextlib.suppress(OSError), listed.open("rb") as f:
        ours = f.readline(20).rstrip() == groups_csv((), ()).rstrip()
    if not isinstance(before, str) or not ours:
        raise UserError(f"{listed} is of no audit and would be lost: choose another --output")
    same = os.path.realpath(before) == os.path.realpath(folder.root)
    if not same and os.path.realpath(output) != os.path.realpath(folder.root):
        raise UserError(
            f"{listed} is of the images of {before}, and runs may use it: choose another --output"
        )


def summary(result: Audit) -> str:
    """The findings in a few lines, each with its mend."""
    total = len(result.files)
    by_class = collections.Counter(result.labels)
    lines = [f"{total:,} images: " + ", ".join(f"{c} {n:,}" for c, n in sorted(by_class.items()))]

    members = result.members().values()
    exact = sum(p.exact for p in result.pairs)
    altered = sum(p.similarity >= _SURELY_COPIED for p in result.pairs) - exact
    mirrored = sum(p.mirrored for p in result.pairs)
    lines.append(
        f"copies: {exact:,} pairs are equal, {altered:,} altered"
        + (f", {mirrored:,} mirrored" if mirrored else "")
        + f"; {len(result.pairs) - exact - altered:,} strongly altered, or another exposure of "
        "the same patient"
    )
    if members:
        known = "" if result.known_groups is None else f", {result.known_groups:,} told by the csv"
        lines.append(
            f"groups: {len(members):,} of {sum(map(len, members)):,} images, the largest of "
            f"{max(map(len, members))}{known}\n"
            "    split by them: data.split=grouped, see below"
        )
    across = result.across_classes()
    if across:
        first = max(across, key=lambda p: p.similarity)
        lines.append(
            f"across classes: {len(across):,} pairs, such as {result.files[first.first]} and "
            f"{result.files[first.second]} (similarity {first.similarity:.2f})\n"
            "    is one of the labels wrong? look at them, correct or remove"
        )
    if result.splits:
        lines.append(_split_lines(result))
    by_kind = collections.Counter(s.kind for s in result.suspicions)
    for kind, mend in _MENDS.items():
        if by_kind[kind]:
            example = next(s for s in result.suspicions if s.kind == kind)
            lines.append(
                f"{kind}: {by_kind[kind]:,} images, such as {example.file} ({example.reason})\n"
                f"    {mend}"
            )
    return "\n".join(lines)


def _split_lines(result: Audit) -> str:
    shared = result.shared()
    sizes = collections.Counter(result.splits)
    unlisted = f"; {sizes['']:,} images are in no split" if sizes[""] else ""
    if not shared:
        return f"across splits: no group{unlisted}"
    counts = [
        f"{n:,} of {sizes[split]:,} {split} images have one of their group in {other}"
        for split, row in shared.items()
        for other, n in row.items()
        if (split, other) in (("val", "train"), ("test", "train"), ("test", "val"))
    ]
    return (
        f"across splits: {', '.join(counts)}{unlisted}\n"
        "    scores on such a split flatter: train anew with data.split=grouped"
    )


def _as_dict(result: Audit, folder: DataFolder) -> dict[str, Any]:
    def listed(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        return [
            {
                "files": [result.files[i] for i in (p.first, p.second)],
                "labels": [result.labels[i] for i in (p.first, p.second)],
                "similarity": round(p.similarity, 4),
                "exact": p.exact,
                "mirrored": p.mirrored,
            }
            | (
                {"splits": [result.splits[p.first], result.splits[p.second]]}
                if result.splits
                else {}
            )
            for p in pairs
        ]

    members = result.members()
    across_classes, across_splits = result.across_classes(), result.across_splits()
    return {
        "data_dir": str(Path(folder.root).absolute()),
        "num_images": len(result.files),
        "class_names": list(folder.class_names),
        "counts": {
            "pairs": len(result.pairs),
            "exact_pairs": sum(p.exact for p in result.pairs),
            "mirrored_pairs": sum(p.mirrored for p in result.pairs),
            "groups": len(members),
            "images_in_groups": sum(map(len, members.values())),
            "largest_group": max(map(len, members.values()), default=1),
            "known_groups": result.known_groups,
            "cross_class_pairs": len(across_classes),
            "cross_split_pairs": len(across_splits) if result.splits else None,
            "suspicious": dict(collections.Counter(s.kind for s in result.suspicions)),
        },
        "groups": [
            {
                "group": group,
                "files": [result.files[i] for i in images],
                "labels": sorted({result.labels[i] for i in images}),
            }
            for group, images in members.items()
        ],
        "pairs": listed(result.pairs),
        "cross_class_pairs": listed(across_classes),
        "cross_split_pairs": listed(across_splits) if result.splits else None,
        "images_sharing_a_group_with_another_split": result.shared() if result.splits else None,
        "suspicious": [dataclasses.asdict(s) for s in result.suspicions],
        "settings": {
            "thumbnail_side": duplicates.SIDE,
            "similarity_threshold": duplicates.THRESHOLD,
            "blank_range": _BLANK_RANGE,
            "two_valued_share": _TWO_VALUED_SHARE,
            "colour_chroma": _COLOUR_CHROMA,
            "colour_share": _COLOUR_SHARE,
            "inverted_correlation": _INVERTED,
            "unlike_correlation": _UNLIKE,
        },
        "seconds": round(result.seconds, 1),
    }


_Oddity = tuple[str, str]  # kind and reason


def _read(
    folder: DataFolder, files: Sequence[str], progress: bool
) -> tuple[np.ndarray, list[bytes | None], list[_Oddity | None]]:
    """Thumbnails uint8 `[N, SIDE, SIDE]`, digests (None: unreadable), and oddities."""
    images = np.zeros((len(files), duplicates.SIDE, duplicates.SIDE), np.uint8)
    digests: list[bytes | None] = [None] * len(files)
    oddities: list[_Oddity | None] = [None] * len(files)

    def look(i: int) -> None:
        try:
            pixels = decode(folder.read(files[i]), files[i])
        except UserError as e:
            oddities[i] = "unreadable", str(e)
            return
        images[i] = thumbnail(pixels)
        digests[i] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        oddities[i] = _odd(pixels)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = pool.map(look, range(len(files)))
        for _ in tqdm(
            done,
            total=len(files),
            desc="Reading images",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            disable=not progress,
        ):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images, digests, oddities


def _odd(pixels: np.ndarray) -> _Oddity | None:
    """What shows that an image, uint8 `[height, width, 3]`, is no X-ray by itself."""
    height, width = pixels.shape[:2]
    some = pixels[:: max(1, height // 64), :: max(1, width // 64)]
    coloured = float((some.max(2) - some.min(2) > _COLOUR_CHROMA).mean())
    if coloured > _COLOUR_SHARE:
        return "colour", f"{coloured:.0%} of its pixels are coloured"
    counts = np.bincount(some[:, :, 1].ravel(), minlength=256)
    low, high = np.searchsorted(counts.cumsum(), [0.01 * counts.sum(), 0.99 * counts.sum()])
    if is_dark(pixels):
        return "dark", f"no grey above {pixels.max()} of 255"
    if high - low < _BLANK_RANGE:
        return "blank", f"grey levels from {low} to {high} only"
    band = np.convolve(counts, np.ones(16, np.int64), "valid")
    first = int(band.argmax())
    rest = np.concatenate([band[: max(0, first - 15)], band[first + 16 :]])
    share = float((band[first] + rest.max(initial=0)) / counts.sum())
    if share > _TWO_VALUED_SHARE:
        return "two-valued", f"{share:.0%} of its pixels have one of two values"
    return None


def _unlike(images: np.ndarray, which: Sequence[int]) -> dict[int, _Oddity]:
    """Images that do not look like the folder's median image."""
    if len(which) < _FEWEST_FOR_MEDIAN:
        return {}
    chosen = images[np.asarray(which)].reshape(len(which), -1)
    # A few thousand make the median; they are spread over all classes.
    median = np.median(chosen[:: max(1, len(which) // 4000)], axis=0)
    median = (median - median.mean()) / (median.std() * median.size + 1e-6)
    correlation = chosen @ median.astype(np.float32) / (chosen.std(1) + 1e-6)
    found: dict[int, _Oddity] = {}
    for i, r in zip(which, correlation.tolist(), strict=True):
        if r < _UNLIKE:
            kind = "inverted" if r < _INVERTED else "unlike"
            found[i] = kind, f"correlation {r:.2f} with the folder's median image"
    return found


def _define_flags() -> None:
    flags.DEFINE_string("data_dir", None, "folder of labelled images, or its zip", required=True)
    flags.DEFINE_string("output", "audit", "folder to write groups.csv and audit.json to")
    flags.DEFINE_string(
        "groups_file", "", "csv of groups that are known, as of patients, beside the folder's own"
    )
    flags.DEFINE_string("group_column", "", "its column of groups; empty: one that is known")
    flags.DEFINE_string(
        "split_csv", "", "a run's split.csv: also look for copies across its splits"
    )


def _main() -> None:
    f = flags.FLAGS
    data_dir, output = os.path.expanduser(f.data_dir), expanded(f.output)
    rows = read_split_csv(os.path.expanduser(f.split_csv)) if f.split_csv else []
    folder = open_folder(
        data_dir,
        groups_file=f.groups_file,
        group_column=f.group_column,
        require_two_classes=False,
    )
    refuse_inside(output, data_dir, "--output", makes_folders=False)
    make_writable(output)
    _refuse_to_lose(output, folder)
    if others := folder.passed_over():
        print(f"note: {others}: not looked at")
    absent = {row.file for row in rows} - {file.file for file in folder.files}
    if rows and len(absent) == len(rows):
        raise UserError(f"{data_dir} has no image of {f.split_csv}: give the folder of that run")
    if absent:
        print(f"note: {len(absent):,} of the {len(rows):,} images of {f.split_csv} are not there")
    result = audit(folder, rows, progress=True)
    write_audit(result, folder, output)
    print(summary(result))
    print(f"wrote {output / 'groups.csv'} and {output / 'audit.json'} in {result.seconds:.0f} s")
    if output.resolve() == Path(data_dir).resolve():
        print("training finds these groups by itself: --config.data.split=grouped")
    else:
        print(
            "to train with these groups: --config.data.split=grouped "
            f"--config.data.groups_file={output.resolve() / 'groups.csv'}"
        )


if __name__ == "__main__":
    _define_flags()
    run_command(_main)
