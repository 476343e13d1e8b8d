"""The images that a trained run is scored on: its own splits, or another folder's."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from covid_flax import config as config_lib
from covid_flax.console import say
from covid_flax.data.builder import Records
from covid_flax.data.dataset import LEFT_OUT, Dataset, dark_images, prepare_readable
from covid_flax.data.folder import DataFolder, open_folder, refuse_inside
from covid_flax.data.splits import (
    MANY_ALIKE,
    Row,
    groups_told,
    named_alike,
    read_split_csv,
    regrouped,
)
from covid_flax.errors import UserError
from covid_flax.files import cache_dir, make_writable, peek
from covid_flax.run_folder import fitted_rows, refuse_folds, saved_run

CLASS_MAP_HELP = (
    f"for another folder: THEIRS=OURS,...; THEIRS={LEFT_OUT} leaves a class out; "
    """quote what has a comma: '"a, b=Normal"'"""
)


def open_data(
    workdir: Path,
    saved: Mapping[str, Any],
    split: str = "all",
    data_dir: str = "",
    class_map: Mapping[str, str] | None = None,
) -> Dataset:
    """The images to score: a run's own, or another folder's under the run's class names.

    Args:
      workdir: the run's folder.
      saved: its config.json.
      split: of its split.csv; with `data_dir`, `all` takes every image there.
      data_dir: where the images lie now; empty for where they lay in training.
      class_map: the run's class for a class folder of `data_dir`, `LEFT_OUT` for none; folders
        it does not name keep their names.

    Returns:
      With rows of every split, or those of another folder, which are of no split ("").

    Raises:
      UserError: no such folder, images that are missing, a class the run does not know.
    """
    config = config_lib.from_json(saved["config"])
    root = os.path.expanduser(data_dir) or str(images_root(workdir, saved))
    if not data_dir and not os.path.exists(root):
        raise UserError(f"the run's images are no longer at {root}: give --data_dir=DIR")
    if class_map and not (data_dir and split == "all"):
        raise UserError("--class_map is for another folder: give --data_dir=DIR --split=all too")
    elsewhere = bool(data_dir) and split == "all"
    class_names = tuple(saved["class_names"])
    if elsewhere:
        known = {*class_names, *(class_map or {})}
        folder = open_folder(root, require_two_classes=False, classes=known)
        label = _labels_of(folder, class_names, class_map or {})
        # What is left out need not be readable.
        left_out = [name for name, ours in (class_map or {}).items() if ours == LEFT_OUT]
        folder = folder.without_classes(left_out)
        if not folder.files:
            raise UserError(f"--class_map leaves no image of {root}: name a class of the run")
        if others := folder.passed_over():
            say(f"note: {others}: not scored")
        if folder.unused and folder.groups is None:
            say(f"note: {folder.unused}: each image counts as its own group")
    else:
        folder = _reopen(root, config, class_names)
    records = None
    if config.data.on_bad_image == "skip":  # else later: what is missing is told at once
        folder, records = _prepared(folder, config.data)
    if elsewhere:
        groups = _told(folder)
        rows = [Row(f.file, label[f.label], "", groups.get(f.file, "")) for f in folder.files]
    else:
        rows = read_split_csv(workdir / "split.csv")
        if folder.groups and not groups_told(rows):  # told since
            rows = regrouped(rows, _told(folder))
        strange = sorted({row.label for row in rows} - set(class_names))
        if strange:
            raise UserError(
                f"{workdir}/split.csv names the class {strange[0]}, which the run has not: "
                "restore it"
            )
        wanted = [row for row in rows if split in (row.split, "all")]
        if not wanted:
            present = collections.Counter(row.split for row in rows)
            raise UserError(
                f"the run has no {split} split: choose one of {', '.join(sorted(present))}, all"
            )
        _refuse_missing(wanted, folder, records.bad if records else {})
    if records is None:
        folder, records = _prepared(folder, config.data)
    unmoved = saved["data"]["root"] == str(Path(root).absolute())
    before = saved["data"].get("fingerprint")
    if not elsewhere and unmoved and before:
        now = folder.only({row.file for row in rows}).fingerprint()
        if now != before:
            _say_changed(root, now)
    if elsewhere and records.dark:
        say(f"note: {dark_images(records.dark)}")
    return Dataset(folder, records, rows, class_names, bad_images=records.bad)


def _told(folder: DataFolder) -> dict[str, str]:
    """Groups that a csv tells, by file, without those that are but the image itself."""
    return {f: g for f, g in (folder.groups or {}).items() if f not in folder.ungrouped}


@functools.cache
def _say_changed(root: str, fingerprint: str) -> None:
    """Once for each `fingerprint`."""
    say(
        f"note: the images in {root}, or the sources named for them, have changed since the run "
        "began, by sizes and times: do they show the same pixels?"
    )


def images_root(workdir: Path, saved: Mapping[str, Any]) -> Path:
    """Where a run's images lie; its phantoms may have moved with its folder."""
    own = workdir / (saved["members"][0] if "members" in saved else "") / "phantoms"
    drawn = not saved["config"].get("data", {}).get("dir")
    return own if drawn and own.exists() else Path(saved["data"]["root"])


def open_held_out(
    workdir: Path, split: str, data_dir: str, class_map: Mapping[str, str] | None
) -> tuple[str, Dataset]:
    """A split's images, to be scored under changes, and its name. Arguments as of `open_data`.

    Args:
      split: "" takes test where there is one, else val.

    Raises:
      UserError: as `open_data`, and of a whole cross-validation, whose runs learned from its val
        images.
    """
    saved = saved_run(workdir)
    split = split or ("test" if "test" in saved["data"]["images"] else "val")
    if split == "val" or (split == "all" and not data_dir):
        refuse_folds(workdir, saved, f"its {split} images")
    return split, open_data(workdir, saved, split, data_dir, class_map)


def make_output(output: Path, data: Dataset) -> None:
    """The folder that --output names, made. UserError: in the images' folder, or not writable."""
    refuse_inside(output, data.folder.root, "--output")
    make_writable(output)


def title_of(workdir: Path, saved: Mapping[str, Any], split: str, data: Dataset) -> str:
    """Whose images are scored, for titles: a split's of a run, or another folder's."""
    name, folder = workdir.resolve().name, Path(data.folder.root).absolute()
    if data.elsewhere:
        return f"Images of {folder.name}, scored by {name}"
    moved = os.path.realpath(folder) != os.path.realpath(images_root(workdir, saved))
    return f"{split} images of {name}" + (f", in {folder}" if moved else "")


def say_what_is_replaced(path: Path, data: Dataset, report: Mapping[str, Any]) -> None:
    """A note where what is at `path` is of another folder, checkpoint or number of images."""
    was = peek(path)
    before, scored, count = was.get("data_dir"), was.get("checkpoint"), was.get("num_examples")
    of = ""
    if isinstance(before, str) and before != str(Path(data.folder.root).absolute()):
        of = before
    elif isinstance(scored, dict) and scored.get("step") != report["checkpoint"]["step"]:
        of = f"step {scored.get('step')} ({scored.get('which')})"
    elif isinstance(count, int) and count > report["num_examples"]:
        of = f"{count:,} images, of which these are {report['num_examples']:,},"
    if of:
        say(f"note: this replaces {path.name} of {of} in {path.parent}: give --output")


def val_chose(checkpoint: str, config: ml_collections.ConfigDict) -> bool:
    """Whether the val images had a say in which weights a checkpoint's name stands for.

    Without patience the last epoch was fixed before; who names a step has looked at val's curve.
    """
    return checkpoint != "latest" or bool(config.train.patience)


def what_they_chose(workdir: Path, split: str, data: Dataset, *, by_val: bool = True) -> str | None:
    """What scores of a split are not, in a sentence; None of images that nothing was chosen by.

    `by_val` is what `val_chose` says.
    """
    if data.elsewhere:
        files = [row.file for row in data.rows]
        alike = named_alike(files, fitted_rows(workdir))
        if alike < MANY_ALIKE * len(files):
            return None
        return (
            f"{alike:,} of {len(files):,} files bear the name of one that was trained on or chose "
            "the epoch: are they copies?"
        )
    if split == "test" or (split == "val" and not by_val):
        return None
    if split == "val":
        return "these images chose the epoch, so that the figures flatter"
    return "these are, or include, images that were trained on: the figures say nothing of others"


def _prepared(folder: DataFolder, data: ml_collections.ConfigDict) -> tuple[DataFolder, Records]:
    """As `prepare_readable`, in the usual cache where the run's own is another machine's."""
    try:
        return prepare_readable(folder, data)
    except UserError:
        if not data.cache_dir or _can_be_written(cache_dir(data.cache_dir)):
            raise
    say(f"note: {cache_dir('')} keeps the records, for the run's own cache_dir cannot be written")
    data.cache_dir = ""
    return prepare_readable(folder, data)


def _can_be_written(folder: Path) -> bool:
    try:
        make_writable(folder)
    except UserError:
        return False
    return True


def parse_class_map(text: list[str]) -> dict[str, str]:
    """`THEIRS=OURS` of each; UserError for anything else."""
    found: dict[str, str] = {}
    for part in text:
        theirs, _, ours = (word.strip() for word in part.rpartition("="))
        if not theirs or not ours:
            raise UserError(
                f"--class_map={part}: give THEIRS=OURS,... (THEIRS={LEFT_OUT} leaves one out)"
            )
        if theirs in found:
            raise UserError(f"--class_map names {theirs} twice: say once what it is")
        found[theirs] = ours
    return found


def own_images(workdir: Path, saved: Mapping[str, Any]) -> tuple[DataFolder | None, list[Row]]:
    """The folder a run was trained on, None where the images are gone, and its `fitted_rows`."""
    rows = fitted_rows(workdir)
    config = config_lib.from_json(saved["config"])
    try:
        return _reopen(str(images_root(workdir, saved)), config, saved["class_names"]), rows
    except UserError:
        return None, rows


def _reopen(root: str, config: ml_collections.ConfigDict, classes: Collection[str]) -> DataFolder:
    """The folder that a run was trained on, with the groups that it was told, if they are there."""
    told = {key: config.data[key] for key in ("groups_file", "group_column", "split_file")}
    if any(told.values()):
        try:
            return open_folder(root, require_two_classes=False, classes=classes, **told)
        except UserError:  # moved without that file: what the folder itself says
            pass
    return open_folder(root, require_two_classes=False, classes=classes)


def _labels_of(
    folder: DataFolder, class_names: tuple[str, ...], class_map: Mapping[str, str]
) -> dict[str, str]:
    """The run's class, or LEFT_OUT, for each class folder."""
    absent = sorted(set(class_map) - {*folder.class_names, *folder.empty})
    if absent:
        raise UserError(
            f"--class_map names {absent[0]}, but {folder.root} has the classes "
            f"{', '.join(folder.class_names)}: name one of them"
        )
    for theirs, ours in class_map.items():
        if ours not in (*class_names, LEFT_OUT):
            raise UserError(
                f"--class_map={theirs}={ours}: the run knows {', '.join(class_names)}: name one of "
                f"them, or {LEFT_OUT}"
            )
    label = {name: class_map.get(name, name) for name in folder.class_names}
    unknown = sorted(set(label.values()) - {*class_names, LEFT_OUT})
    if unknown:
        raise UserError(
            f"{folder.root} has the classes {unknown}, the run knows {list(class_names)}: say "
            f"which is which with --class_map=THEIRS=OURS,... (THEIRS={LEFT_OUT} leaves one out)"
        )
    return label


def _refuse_missing(rows: list[Row], folder: DataFolder, bad: Mapping[str, str]) -> None:
    there = {f.file for f in folder.files}
    missing = [row.file for row in rows if row.file not in there]
    unread = [bad[file] for file in missing if file in bad]
    if unread:
        raise UserError(
            f"{len(unread)} images of the run's split.csv can no longer be read, first {unread[0]}"
        )
    if missing:
        raise UserError(
            f"{folder.root} lacks {len(missing)} images of the run's split.csv, first "
            f"{missing[0]}: restore them, or score another folder whole with --split=all"
        )
