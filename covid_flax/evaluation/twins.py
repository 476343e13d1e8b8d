"""The same radiographs put through another export: what becomes of a run's answers."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from covid_flax.data.folder import DataFolder
from covid_flax.data.splits import Row
from covid_flax.errors import UserError
from covid_flax.evaluation.intervals import share_interval


def refuse_itself(pairs: str, folder: DataFolder) -> None:
    """Where the folder of twins is that of the images, each its own twin. Raises UserError."""
    if os.path.realpath(pairs) == os.path.realpath(folder.root):
        raise UserError(
            f"--pairs={pairs} is the folder of the images themselves: give one of the same images "
            "put through another export"
        )


def find_twins(
    rows: Sequence[Row], pairs: DataFolder, learned: Collection[str]
) -> list[tuple[Row, str]]:
    """The rows that have a file of their class and name in `pairs`, with it; none trained on.

    Args:
      learned: files that the run learned from. Rows of another folder (of no split) may bear the
        same names.

    Raises:
      UserError: there are none, or names that fit several images.
    """
    wanted: dict[tuple[str, str], str] = {}
    for f in pairs.files:
        if wanted.setdefault(key := (f.label, PurePosixPath(f.file).name), f.file) != f.file:
            raise UserError(f"{pairs.root} holds two twins named {'/'.join(key)}: remove one")
    found = []
    for row in rows:
        file = wanted.get((row.label, PurePosixPath(row.file).name))
        if file is not None and not (row.split and row.file in learned):
            found.append((row, file))
    again = [file for file, n in Counter(file for _, file in found).items() if n > 1]
    if again:
        raise UserError(f"{pairs.root}/{again[0]} fits several images of the run by class and name")
    if not found:
        raise UserError(
            f"{pairs.root} holds no twin of a scored image that was not trained on: it needs files "
            "of the same class and name, suffix included, or take another --split"
        )
    return found


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """Files of a folder, as the records of an ImageSource."""

    folder: DataFolder
    files: Sequence[str]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.folder.read(self.files[i]), "file": self.files[i]}


def twin_figures(
    labels: np.ndarray,
    here: np.ndarray,
    there: np.ndarray,
    class_names: Sequence[str],
    clusters: np.ndarray,
) -> dict[str, Any]:
    """What becomes of the answers when images go through another export.

    Args:
      labels: class indices of the images, `[N]`.
      here, there: probabilities of the originals and of their twins, float64 `[N, K]`.
      class_names: K.
      clusters: group numbers of the originals, `[N]`.

    Returns:
      `num_pairs`; `flipped`, `flip_rate` and its `share_interval`; `matrix` (rows the original's
      answer, columns the twin's); `accuracy` of both; and for each class `answers`: how many
      originals and twins it was answered for, how many answers `became` it and `ceased` to be
      it, the exact two-sided McNemar `p` that both are equally likely, and the mean change of its
      `probability`; `from_class`: for each true class how many originals and twins were given
      each answer.
    """
    from scipy.stats import binomtest

    count = len(class_names)
    a, b = here.argmax(1), there.argmax(1)
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (a, b), 1)
    flips = a != b
    flipped = int(flips.sum())
    answers = {}
    for k, name in enumerate(class_names):
        became = int(matrix[:, k].sum() - matrix[k, k])
        ceased = int(matrix[k].sum() - matrix[k, k])
        moved = became + ceased
        answers[name] = {
            "originals": int(matrix[k].sum()),
            "twins": int(matrix[:, k].sum()),
            "became": became,
            "ceased": ceased,
            "p": float(binomtest(became, moved).pvalue) if moved else 1.0,
            "probability": float((there[:, k] - here[:, k]).mean()),
        }
    return {
        "num_pairs": len(labels),
        "flipped": flipped,
        "flip_rate": flipped / len(labels),
        "flip_interval": share_interval(flips, clusters),
        "matrix": matrix.tolist(),
        "accuracy": {
            "originals": float((a == labels).mean()),
            "twins": float((b == labels).mean()),
        },
        "answers": answers,
        "from_class": {
            class_names[k]: {
                "pairs": int((labels == k).sum()),
                "originals": count_answers(a[labels == k], class_names),
                "twins": count_answers(b[labels == k], class_names),
            }
            for k in np.unique(labels).tolist()
        },
    }


def count_answers(answers: np.ndarray, class_names: Sequence[str]) -> dict[str, int]:
    """How often each class is answered, of class indices `[N]`."""
    return dict(
        zip(class_names, np.bincount(answers, minlength=len(class_names)).tolist(), strict=True)
    )
