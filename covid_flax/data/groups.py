"""Which images belong together, and must stand on one side of a split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from covid_flax.files import csv_bytes

# Columns of a csv that tell groups: our audit's, near-duplicates, patients, papers.
GROUP_COLUMNS = ("group", "near_dup_group", "patient_id", "group_from_name")


def connected(num: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Group of each of `num` things that the pairs link: int64 `[num]`, the group's least index."""
    group = list(range(num))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        group[high] = low
    return np.array([root(i) for i in range(num)], np.int64)


def joined(groups: Mapping[str, str], *others: Mapping[str, str]) -> dict[str, str]:
    """Groups by file, made one where one of `others` gives their files one name.

    A joined group bears its least name. "" of `others` tells nothing, nor does a file that they
    lack.
    """
    names = sorted(set(groups.values()))
    place = {name: i for i, name in enumerate(names)}
    pairs = []
    for told in others:
        first: dict[str, str] = {}
        for file in groups.keys() & told.keys():
            if name := told[file]:
                other = first.setdefault(name, file)
                pairs.append((place[groups[other]], place[groups[file]]))
    of = connected(len(names), pairs)
    return {file: names[of[place[name]]] for file, name in groups.items()}


def groups_csv(files: Iterable[str], groups: Iterable[str]) -> bytes:
    """`file,group` of every image, as `open_folder` reads it; "" is no known group (UTF-8)."""
    return csv_bytes([("file", "group"), *zip(files, groups, strict=True)])
