"""A run's data: the folder, its stored records, the split, and sources to read from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covid_flax import distributed
from covid_flax.data import phantoms
from covid_flax.data.builder import Records, prepare
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.data.pipeline import ImageSource, StoreSource
from covid_flax.data.splits import Row, crossing, make_split
from covid_flax.data.store import NoStoreError, build_store, open_store
from covid_flax.errors import UserError, printable
from covid_flax.files import cache_dir

LEFT_OUT = "-"  # in a class map: images of that folder are not scored


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images in their splits, ready to be read.

    Attributes:
      folder: where the images lie.
      records: their bytes, by index.
      rows: the split, one row an image of it.
      class_names: in the order of the class indices.
      notes: what a person should know of the data, a line each.
      bad_images: images left out as they cannot be read: the reason by name.
    """

    folder: DataFolder
    records: Records
    rows: Sequence[Row]
    class_names: tuple[str, ...]
    notes: Sequence[str] = ()
    bad_images: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # By settings: the open store, or None where none could be had.
    _stores: dict[tuple[Any, ...], np.ndarray | None] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def elsewhere(self) -> bool:
        """Whether these are images of another folder than the run's, which are of no split."""
        return all(not row.split for row in self.rows)

    @property
    def held_out(self) -> list[str]:
        """The files that are not trained on."""
        return [row.file for row in self.rows if row.split != "train"]

    def files(self, split: str) -> list[Row]:
        """The rows of `split`, or every row for `all`."""
        return [row for row in self.rows if split in (row.split, "all")]

    def labels(self, split: str) -> np.ndarray:
        """Class index of each image of a split, int32 `[N]`."""
        names = {name: i for i, name in enumerate(self.class_names)}
        return np.array([names[row.label] for row in self.files(split)], np.int32)

    def source(self, split: str, config: Any) -> ImageSource | StoreSource:
        """The images of a split, as the configuration's `data` wants them.

        `train` decodes every image into a store the first time, where `store_gb` allows it,
        for training alone reads its images again and again. The other splits use the store
        where there is one. Without one, images are decoded whenever they are read.

        Raises:
          UserError: an image that cannot be decoded.
        """
        position = {file: i for i, file in enumerate(self.records.files)}
        rows = [position[row.file] for row in self.files(split)]
        labels = self.labels(split)
        everything = ImageSource(
            records=self.records,
            indices=range(len(self.records)),
            labels=np.zeros(len(self.records), np.int32),
            image_size=config.image_size,
            interpolation=config.interpolation,
            intermediate_size=config.intermediate_size,
        )
        images = self._store(everything, config.store_gb, build=split == "train")
        if images is None:
            return dataclasses.replace(everything, indices=rows, labels=labels)
        return StoreSource(images, np.array(rows), labels)

    def _store(self, source: ImageSource, budget_gb: float, *, build: bool) -> np.ndarray | None:
        wanted = budget_gb > 0
        key = (source.image_size, source.interpolation, source.intermediate_size, wanted)
        if key not in self._stores:
            images = open_store(source, self.records.place) if wanted else None
            error = None
            if images is None and wanted and build:
                try:
                    images = build_store(source, self.records.place, budget_gb)
                except NoStoreError as e:
                    print(f"note: every epoch decodes its images anew: {e}", file=sys.stderr)
                except UserError as e:  # told after all have asked each other
                    error = e
            # Images of a store may have one channel, decoded ones have three: all processes must
            # feed their parts of one program alike.
            if distributed.anywhere(images is None):
                images = None
            if error is not None:
                raise error
            if images is None and not build:
                return None
            self._stores[key] = images
        return self._stores[key]


def _open(config: Any, root: str) -> DataFolder:
    return open_folder(
        root,
        groups_file=config.groups_file,
        group_column=config.group_column,
        split_file=config.split_file,
    )


def _split_seed(config: Any, seed: int) -> int:
    return int(seed if config.split_seed < 0 else config.split_seed)


def _split(folder: DataFolder, config: Any, seed: int) -> list[Row]:
    return make_split(
        folder,
        split=config.split,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        nested_test=config.nested_test,
        folds=config.folds,
        fold=config.fold,
        seed=_split_seed(config, seed),
    )


def check_splits(configs: Sequence[Any], seed: int) -> list[Row]:
    """Refuses what one of several splits of the same images could not be made of. Raises UserError.

    Args:
      configs: each one's `data`, with its own `data.fold`.
      seed: of the run.

    Returns:
      The last split; empty of phantoms, which are drawn with each.
    """
    first, rows = configs[0], list[Row]()
    if not first.dir:
        return rows
    folder = _open(first, first.dir)
    if first.on_bad_image == "skip":
        folder, _ = prepare_readable(folder, first)
    for config in configs:
        rows = _split(folder, config, seed)
    return rows


def load_dataset(config: Any, seed: int, workdir: Path) -> Dataset:
    """Opens, checks, stores and splits the images that the configuration's `data` names."""
    root = config.dir
    if not root and config.phantoms_per_class:
        root = str(workdir / "phantoms")
        phantoms.write_dataset(
            Path(root),
            config.phantoms_per_class,
            seed=_split_seed(config, seed),
            size=config.image_size,
        )
    if not root:
        raise UserError(
            "config.data.dir is empty: give the image folder, --config.data.dir=DIR "
            "(Kaggle's COVID-19 Radiography Database, unpacked or its zip)"
        )
    folder = _open(config, root)
    records = None
    if config.on_bad_image == "skip":  # else later: what a split lacks is told at once
        folder, records = prepare_readable(folder, config)
    rows = _split(folder, config, seed)
    if records is None:
        folder, records = prepare_readable(folder, config)
    notes = _notes(folder, config, rows)
    if records.bad:
        notes.insert(0, f"{left_out(records.bad)} (all in config.json)")
    if records.dark:
        notes.append(dark_images(records.dark))
    return Dataset(folder, records, rows, folder.class_names, notes, records.bad)


def prepare_readable(folder: DataFolder, config: Any) -> tuple[DataFolder, Records]:
    """The images' records, and the folder without those that `data.on_bad_image` skips."""
    place = cache_dir(config.cache_dir)
    records = prepare(folder, place, on_bad_image=config.on_bad_image)
    return folder.without(records.bad), records


def left_out(bad_images: Collection[str]) -> str:
    """`3 images that cannot be read are left out: COVID/a.png, ...`."""
    named = ", ".join(map(printable, list(bad_images)[:5]))
    more = f" and {len(bad_images) - 5:,} more" if len(bad_images) > 5 else ""
    are = (
        "images that cannot be read are" if len(bad_images) > 1 else "image that cannot be read is"
    )
    return f"{len(bad_images):,} {are} left out: {named}{more}"


def dark_images(count: int) -> str:
    """`3 images have no grey above a quarter of white: ...`."""
    images = f"{count:,} image{'s have' if count > 1 else ' has'}"
    return (
        f"{images} no grey above a quarter of white: values of 10 or 12 bits in files of 16? scale "
        "them to the full range"
    )


def _notes(folder: DataFolder, config: Any, rows: Sequence[Row]) -> list[str]:
    split, notes = config.split, []
    if split in ("grouped", "file") and config.nested_test:
        notes.append("data.nested_test is for paper-sorted and paper-random: it does nothing here")
    if folder.told_split is not None:
        notes += _notes_of_told(folder, rows)
    elif split != "grouped" and config.test_fraction:
        notes.append(f"data.test_fraction is for data.split=grouped: {split} draws no test part")
    if others := folder.passed_over():
        notes.append(f"{others}: left out")
    notes += [f"{name} cannot be read: its sources are left out" for name in folder.unreadable]
    if folder.groups is None:
        known = "only files of identical bytes stay together"
        if split != "grouped":
            known = "near-duplicates and a patient's images may lie on both sides of the split"
        if folder.unused:
            notes.append(f"{folder.unused}: {known}")
        else:
            notes.append(
                f"no groups.csv or manifest.csv says which images belong together: {known}"
            )
    elif split not in ("grouped", "file"):
        notes.append("the split does not heed the known groups; data.split=grouped does")
    else:
        if folder.unused:
            notes.append(f"{folder.unused}: it is not heeded beside data.groups_file")
        if folder.ungrouped:
            notes.append(f"{len(folder.ungrouped):,} images are in no known group: each is its own")
    return notes


def _notes_of_told(folder: DataFolder, rows: Sequence[Row]) -> list[str]:
    """What a split that a csv tells leaves out, and what it parts."""
    told, notes = folder.told_split, []
    assert told is not None
    if left := len(folder.files) - len(rows):
        has = "images have" if left > 1 else "image has"
        notes.append(f"{left:,} {has} no part in {told.name}: left out")
    if told.strangers:
        are = "rows are" if told.strangers > 1 else "row is"
        notes.append(f"{told.strangers:,} {are} of no image here, in {told.name}")
    if parted := crossing(rows):
        lie = "groups of images lie" if parted > 1 else "group of images lies"
        notes.append(f"{parted:,} {lie} on both sides of the split, in {told.name}")
    return notes


def class_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """`n / (classes * n_class)`, scikit-learn's "balanced"."""
    counts = np.bincount(labels, minlength=classes)
    return tuple(float(len(labels) / (classes * n)) for n in counts)


def summary(data: Dataset) -> Mapping[str, Any]:
    """What `config.json` keeps of the data."""
    splits = sorted({row.split for row in data.rows})
    return {
        "root": str(Path(data.folder.root).absolute()),
        "fingerprint": data.folder.only({row.file for row in data.rows}).fingerprint(),
        "images": {
            split: {
                name: sum(row.label == name for row in data.files(split))
                for name in data.class_names
            }
            for split in splits
        },
        "bad_images": dict(data.bad_images),
        "not_images": dict(data.folder.ignored),
        "in_no_part": len(data.folder.files) - len(data.rows),
    }
