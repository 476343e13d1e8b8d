"""What an evaluation leaves of each image, and its file `predictions.csv`."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from covid_flax.data.dataset import Dataset
from covid_flax.data.splits import Row
from covid_flax.errors import UserError
from covid_flax.files import csv_bytes

COLUMNS = ["file", "label", "predicted"]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Labels and predicted probabilities of some images.

    Attributes:
      class_names: K names.
      files: N files, relative to their data folder.
      labels: true class indices, int64 `[N]`.
      probabilities: float64 `[N, K]`, rows sum to 1.
      groups: group of each image, "" where unknown; empty where no group is known.
    """

    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    groups: tuple[str, ...] = ()

    @cached_property
    def predicted(self) -> np.ndarray:
        """Most probable class, the first of equals: int64 `[N]`."""
        return self.probabilities.argmax(1)

    @cached_property
    def clusters(self) -> np.ndarray:
        """Group numbers from 0, int64 `[N]`; an image of no known group is its own."""
        return cluster_numbers(self.files, self.groups or ("",) * len(self.files))


def cluster_numbers(files: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Group numbers from 0, int64 `[N]`; an image without a group ("") is its own."""
    names = [("group", g) if g else ("file", f) for g, f in zip(groups, files, strict=True)]
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def predictions_of(data: Dataset, split: str, probabilities: np.ndarray) -> Predictions:
    """The probabilities `[N, K]` of a split's images, with their labels and groups."""
    rows = data.files(split)
    groups = tuple(row.group for row in rows)
    return Predictions(
        class_names=data.class_names,
        files=tuple(row.file for row in rows),
        labels=data.labels(split).astype(np.int64),
        probabilities=probabilities,
        groups=groups if any(groups) else (),
    )


def predictions_csv(predictions: Predictions) -> bytes:
    """`file,label,predicted` and `p_<class>` for each class, with all digits (UTF-8)."""
    names = predictions.class_names
    labels = [names[k] for k in predictions.labels.tolist()]
    return answers_csv(
        {"file": predictions.files, "label": labels}, names, predictions.probabilities
    )


def answers_csv(
    known: Mapping[str, Sequence[str]], class_names: Sequence[str], probabilities: np.ndarray
) -> bytes:
    """The columns `known`, `predicted`, and `p_<class>` for each class, with all digits (UTF-8)."""
    rows: list[list[str]] = [[*known, "predicted", *(f"p_{name}" for name in class_names)]]
    predicted = probabilities.argmax(1).tolist()
    for *words, k, p in zip(*known.values(), predicted, probabilities.tolist(), strict=True):
        rows.append([*words, class_names[k], *map(repr, p)])
    return csv_bytes(rows)


def read_predictions(path: Path, rows: Sequence[Row] = ()) -> Predictions:
    """What `predictions_csv` wrote, and the groups.csv beside it.

    Args:
      path: of the csv.
      rows: of the run's split.csv, for the groups where there is no groups.csv.

    Raises:
      UserError: no such file, or not one of that form.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
            header, *lines = list(csv.reader(f, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {e}: evaluate the run first") from e
    names = tuple(column.removeprefix("p_") for column in header[3:])
    number = {name: i for i, name in enumerate(names)}
    try:
        if header[:3] != COLUMNS or not lines:
            raise ValueError
        labels = np.array([number[line[1]] for line in lines], np.int64)
        probabilities = np.array([line[3:] for line in lines], np.float64)
        if probabilities.shape != (len(lines), len(names)):
            raise ValueError
        # NaN fails these too.
        if not np.all((probabilities >= 0) & (abs(probabilities.sum(1, keepdims=True) - 1) < 1e-3)):
            raise ValueError
        if [number[line[2]] for line in lines] != probabilities.argmax(1).tolist():
            raise ValueError
    except (ValueError, KeyError, IndexError):
        raise UserError(
            f"{path} is no table of predictions ({','.join(COLUMNS)},p_<class>...): "
            "evaluate the run anew"
        ) from None
    group = _read_groups(path.with_name("groups.csv"))
    if group is None:
        group = {row.file: row.group for row in rows}
    files = tuple(line[0] for line in lines)
    groups = tuple(group.get(file, "") for file in files)
    return Predictions(names, files, labels, probabilities, groups if any(groups) else ())


def _read_groups(path: Path) -> dict[str, str] | None:
    """Group of each file; None without such a csv. Raises UserError."""
    if not path.exists():
        return None
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
            header, *lines = list(csv.reader(f, strict=True)) or [[]]
        if header != ["file", "group"]:
            raise ValueError("no columns file,group")
        return {file: group for file, group in lines}
    except (OSError, csv.Error, ValueError) as e:
        raise UserError(f"cannot read {path} ({e}): evaluate the run anew") from e
