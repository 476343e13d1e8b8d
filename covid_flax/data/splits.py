"""Which images train, which choose the epoch, which are kept for the end."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from covid_flax.data.folder import DataFolder, ImageFile
from covid_flax.data.groups import joined
from covid_flax.data.tables import PARTS as PARTS
from covid_flax.errors import UserError
from covid_flax.files import csv_bytes, write_atomically

RULES = ("paper-sorted", "paper-random", "grouped", "file")

_COLUMNS = ["file", "label", "split", "group"]
_OF_BYTES = re.compile("[0-9a-f]{16}")  # what `DataFolder.same_bytes` calls them


@dataclasses.dataclass(frozen=True)
class Row:
    """One image's place.

    Attributes:
      file: relative to the data folder.
      label: class name.
      split: train, val or test; "" of images of another folder.
      group: what never crosses splits under `grouped`; "" where groups are unknown.
    """

    file: str
    label: str
    split: str
    group: str


def regrouped(rows: Sequence[Row], groups: Mapping[str, str]) -> list[Row]:
    """The rows with these groups of their files, "" where there is none."""
    return [dataclasses.replace(row, group=groups.get(row.file, "")) for row in rows]


def groups_told(rows: Sequence[Row]) -> bool:
    """Whether a csv told the rows' groups; else they are of identical bytes, or unknown."""
    return any(row.group and not _OF_BYTES.fullmatch(row.group) for row in rows)


MANY_ALIKE = 0.5  # share of files so named from which on they may be copies


def crossing(rows: Sequence[Row]) -> int:
    """How many groups are in more than one part."""
    parts = defaultdict(set)
    for row in rows:
        if row.group:
            parts[row.group].add(row.split)
    return sum(len(found) > 1 for found in parts.values())


def named_alike(files: Sequence[str], rows: Sequence[Row]) -> int:
    """How many of `files` bear the name of one of `rows` that trained or chose the epoch."""
    fitted = {PurePosixPath(row.file).name for row in rows if row.split != "test"}
    return sum(PurePosixPath(file).name in fitted for file in files)


def make_split(
    folder: DataFolder,
    *,
    split: str,
    val_fraction: float,
    test_fraction: float = 0.0,
    nested_test: bool = False,
    folds: int = 0,
    fold: int = 0,
    seed: int = 0,
) -> list[Row]:
    """Assigns every image of `folder` to train, val or test.

    `paper-sorted`: of each class's n images in Keras's order the first
    int(val_fraction * n) are val, as `ImageDataGenerator(validation_split=val_fraction)`
    has it. `paper-random`: that many drawn at random in each class. `grouped`: whole groups
    only, each class's shares as near to the fractions as the groups allow; files of identical
    bytes stay together, whether groups are known or not. `file`: as the csv tells it that the
    folder was opened with (`folder.told_split`); nothing else counts.

    Args:
      folder: the images, in Keras's order.
      split: one of `RULES`.
      val_fraction: share of each class for val, strictly between 0 and 1.
      test_fraction: share of each class for test (`grouped`; the others do not use it).
      nested_test: `paper-*` only: the paper's val becomes test, and val is drawn at random
        (`val_fraction`, rounded down) from each class's remaining images.
      folds: `grouped` only, > 1: what is not test is dealt into so many parts alike, of which
        `fold` (from 0) is val; over all folds every such image is val once. `val_fraction` is
        not used then.
      fold: which part is val.
      seed: of what is drawn at random. The result depends on it, the file names and the
        groups alone.

    Returns:
      One row an image, in the order of `folder.files`; under `file` of those alone that have a
      part.

    Raises:
      UserError: unknown split, fractions out of range, or a class left without an image in
        one of the parts.
    """
    if split not in RULES:
        raise UserError(f"data.split={split} is unknown: take one of {', '.join(RULES)}")
    if folds and (split != "grouped" or folds < 2 or not 0 <= fold < folds):
        raise UserError(
            f"data.folds={folds}, data.fold={fold}: two folds or more, counted from 0, and "
            "data.split=grouped"
        )
    if split != "file":
        if folds:
            val_fraction = (1 - test_fraction) / folds
        elif not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction={val_fraction} must lie between 0 and 1")
        if not 0 <= test_fraction < 1 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.test_fraction={test_fraction} must be 0 or more, and less than 1 together "
                f"with data.val_fraction={val_fraction}"
            )
    groups = folder.groups or {}
    if split in ("grouped", "file"):
        groups = joined(groups, folder.same_bytes) if groups else folder.same_bytes
    if split == "grouped":
        if folds:
            fractions = [(1 - test_fraction) / folds] * folds
            names = ["val" if i == fold else "train" for i in range(folds)]
        else:
            fractions, names = [1 - val_fraction - test_fraction, val_fraction], ["train", "val"]
        if test_fraction:
            fractions, names = [*fractions, test_fraction], [*names, "test"]
        parts = _grouped(folder.files, groups, fractions, names, seed)
        wanted = PARTS if test_fraction > 0 else PARTS[:2]
    elif split == "file":
        if folder.told_split is None:
            raise UserError("data.split=file needs data.split_file: name a csv of file and split")
        parts = dict(folder.told_split.parts)
        wanted = PARTS if "test" in parts.values() else PARTS[:2]
    else:  # paper-sorted or paper-random
        parts = _by_class(folder, split, val_fraction, nested_test, seed)
        wanted = PARTS if nested_test else PARTS[:2]
    groups = _known(groups, folder)
    rows = [
        Row(f.file, f.label, parts[f.file], groups.get(f.file, ""))
        for f in folder.files
        if f.file in parts
    ]
    _check_classes(rows, Counter(f.label for f in folder.files), wanted, split)
    return rows


def _known(groups: Mapping[str, str], folder: DataFolder) -> dict[str, str]:
    """Without those that nobody told and no other image shares: each is but the image itself."""
    size = Counter(groups.values())
    told = set() if folder.groups is None else folder.groups.keys() - folder.ungrouped
    return {file: name for file, name in groups.items() if file in told or size[name] > 1}


def write_split_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes `file,label,split,group` (UTF-8), all or nothing. UserError on a failed write."""
    write_atomically(Path(path), csv_bytes([_COLUMNS, *map(dataclasses.astuple, rows)]))


def read_split_csv(path: str | os.PathLike[str]) -> list[Row]:
    """The rows that `write_split_csv` wrote. UserError where `path` is no such file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
            reader = csv.reader(f, strict=True)
            header = next(reader, None)
            listed = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    if header != _COLUMNS or any(len(r) != 4 or r[2] not in PARTS for r in listed):
        raise UserError(f"{path} is not a split file: it must have {','.join(_COLUMNS)}")
    if len({r[0] for r in listed}) < len(listed):
        raise UserError(f"{path} lists an image twice: restore it")
    return [Row(*r) for r in listed]


def _by_class(
    folder: DataFolder, split: str, val_fraction: float, nested_test: bool, seed: int
) -> dict[str, str]:
    parts = {f.file: "train" for f in folder.files}
    for index, label in enumerate(folder.class_names):
        files = [f.file for f in folder.files if f.label == label]
        rng = np.random.default_rng([seed, index])
        if split == "paper-random":
            files = [files[i] for i in rng.permutation(len(files))]
        held = int(val_fraction * len(files))
        for file in files[:held]:
            parts[file] = "test" if nested_test else "val"
        if nested_test:
            rest = files[held:]
            drawn = rng.permutation(len(rest))[: int(val_fraction * len(rest))]
            for i in drawn:
                parts[rest[i]] = "val"
    return parts


def _grouped(
    files: Sequence[ImageFile],
    groups: dict[str, str],
    shares_of_parts: Sequence[float],
    part_names: Sequence[str],
    seed: int,
) -> dict[str, str]:
    """Part of every file; `shares_of_parts` sum to 1.

    Groups go, large ones first, to the part that is least full.
    """
    labels = sorted({f.label for f in files})
    column = {label: k for k, label in enumerate(labels)}
    names = sorted(set(groups[f.file] for f in files))
    place = {name: g for g, name in enumerate(names)}
    counts = np.zeros((len(names), len(labels)))  # images by group and class
    for f in files:
        counts[place[groups[f.file]], column[f.label]] += 1

    fractions = np.array(shares_of_parts)
    shares = counts / counts.sum(0)  # of each class's images
    quotas = fractions[:, None]
    filled = np.zeros((len(fractions), len(labels)))
    chosen = np.zeros(len(names), int)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    for g in sorted(shuffled, key=lambda g: -shares[g].max()):
        # Sainte-Lague's rule: proportional at every moment, so that groups of every size
        # are spread over the parts. A class weighs by the group's share of it.
        fullness = (filled + shares[g] / 2) / quotas
        part = int(np.argmin((fullness * shares[g]).sum(1)))
        chosen[g] = part
        filled[part] += shares[g]
    _fill_empty(chosen, counts, len(fractions))
    return {f.file: part_names[chosen[place[groups[f.file]]]] for f in files}


def _fill_empty(chosen: np.ndarray, counts: np.ndarray, num_parts: int) -> None:
    """Gives a part that lacks a class its smallest group from a part with two or more.

    Only tiny classes come to this: their share of val rounds to nothing.
    """
    for part in range(num_parts):
        for k in range(counts.shape[1]):
            having = counts[:, k] > 0
            in_part = np.bincount(chosen[having], minlength=num_parts)
            if in_part[part] or in_part.max() < 2:
                continue
            donors = np.flatnonzero(having & (chosen == in_part.argmax()))
            chosen[donors[counts[donors].sum(1).argmin()]] = part


def _check_classes(
    rows: Sequence[Row], of_class: Mapping[str, int], wanted: Sequence[str], split: str
) -> None:
    found: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        found[row.label, row.split] += 1
    for part in wanted:
        for label, total in of_class.items():
            if not found[label, part]:
                unit = "images or groups" if split == "grouped" else "images"
                mend = f"add {unit} of it, or change the fractions"
                if split == "file":
                    mend = "give one in data.split_file"
                raise UserError(
                    f"data.split={split} leaves class {label} ({total} images) without a {part} "
                    f"image: {mend}"
                )
