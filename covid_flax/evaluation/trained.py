"""A trained run opened to score images: its network, its data, and what they are called."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from covid_flax import config as config_lib
from covid_flax.checkpoint import Checkpoints, has_checkpoints, resolve_step
from covid_flax.data.dataset import Dataset, prepare_readable
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.data.pipeline import Source
from covid_flax.data.splits import Row, read_split_csv
from covid_flax.errors import UserError
from covid_flax.mesh import make_layout
from covid_flax.models import MODELS, create_model, trained_stages
from covid_flax.optimizer import make_optimizer
from covid_flax.predict import compile_apply, log_softmax, predict
from covid_flax.run import read_run
from covid_flax.step import create_state, make_eval_step

LEFT_OUT = "-"  # in a class map: images of that folder are not scored
CLASS_MAP_HELP = (
    f"for another folder: THEIRS=OURS,...; THEIRS={LEFT_OUT} leaves a class out; "
    """quote what has a comma: '"a, b=Normal"'"""
)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, ready to score.

    Attributes:
      workdir: the run's folder.
      saved: its config.json.
      config: the configuration in it.
      class_names: in the order of the class indices.
      which: `best`, `latest` or a step, as asked for.
      step: of the checkpoint.
    """

    workdir: Path
    saved: dict[str, Any]
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    which: str
    step: int
    _step: Callable[..., Any] = dataclasses.field(repr=False)
    _apply: Callable[..., Any] = dataclasses.field(repr=False)
    _params: Any = dataclasses.field(repr=False)
    _batch_stats: Any = dataclasses.field(repr=False)

    def logits(self, images: jax.Array) -> jax.Array:
        """Of images `[N, H, W, 1 or 3]`, 0..255, within a traced function: float32 `[N, K]`."""
        return self._step(self._params, self._batch_stats, images)

    def probabilities(self, source: Source, description: str = "") -> np.ndarray:
        """Of every image of `source`, in its order, float64 `[N, K]`; see `predict`."""
        logits = predict(
            self._apply,
            self._params,
            self._batch_stats,
            source,
            batch_size=self.config.eval.batch_size,
            num_threads=self.config.data.num_threads,
            prefetch=self.config.data.prefetch,
            description=description,
        )
        return np.exp(log_softmax(logits))


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Runs of one configuration that answer together; to a caller, a `TrainedRun`.

    Attributes:
      members: the runs.
    """

    workdir: Path
    saved: dict[str, Any]
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    which: str
    step: int
    members: tuple[TrainedRun, ...]

    def logits(self, images: jax.Array) -> jax.Array:
        """As `TrainedRun.logits`: logarithms of the mean probabilities."""
        answers = jnp.stack([jax.nn.softmax(member.logits(images)) for member in self.members])
        return jnp.log(jnp.maximum(jnp.mean(answers, 0), 1e-12))

    def probabilities(self, source: Source, description: str = "") -> np.ndarray:
        """The mean of the members', float64 `[N, K]`."""
        number = len(self.members)
        return np.mean(
            [
                member.probabilities(source, description and f"{description}, {i} of {number}")
                for i, member in enumerate(self.members, 1)
            ],
            0,
        )


def out_of_fold(run: Ensemble, data: Dataset) -> np.ndarray:
    """Of every val image of a cross-validation, by the member that held it out, `[N, K]`.

    Raises:
      RuntimeError: an image was not held out exactly once.
    """
    place = {row.file: i for i, row in enumerate(data.files("val"))}
    seen = np.zeros(len(place), np.int64)
    result = np.zeros((len(place), len(run.class_names)))
    for number, member in enumerate(run.members, 1):
        rows = [row for row in read_split_csv(member.workdir / "split.csv") if row.split == "val"]
        source = dataclasses.replace(data, rows=rows).source("val", run.config.data)
        index = [place[row.file] for row in rows]
        result[index] = member.probabilities(source, f"scoring fold {number}")
        np.add.at(seen, index, 1)
    if not np.all(seen == 1):
        raise RuntimeError("the folds did not hold out every image exactly once")
    return result


def learned_files(workdir: Path, saved: Mapping[str, Any]) -> set[str]:
    """The files that a run, or any member of a repeated one, was trained on. Raises UserError."""
    folders = [workdir / name for name in saved.get("members", ())] or [workdir]
    rows = [row for folder in folders for row in read_split_csv(folder / "split.csv")]
    return {row.file for row in rows if row.split == "train"}


def check_teacher(folder: Path, data: Dataset, image_size: int) -> None:
    """Refuses a run that cannot teach one of these images.

    Raises:
      UserError: no run, one of other classes or another size, or one that has learned from images
        that are held out here.
    """
    saved = read_run(folder)
    if saved is None:
        raise UserError(
            f"train.teacher={folder} holds no run (no config.json): give a run's folder"
        )
    if saved["class_names"] != list(data.class_names):
        raise UserError(
            f"train.teacher={folder} knows the classes {saved['class_names']}, the data has "
            f"{list(data.class_names)}: train it on the same classes"
        )
    size = config_lib.from_json(saved["config"]).data.image_size
    if size != image_size:
        raise UserError(
            f"train.teacher={folder} takes images of {size} pixels, this run has {image_size}: "
            f"set data.image_size={size}"
        )
    held_out = {row.file for row in data.rows if row.split != "train"}
    if leaked := len(learned_files(folder, saved) & held_out):
        raise UserError(
            f"train.teacher={folder} was trained on {leaked:,} images that this run holds out: "
            "its figures would be of images seen; give a teacher of the same split"
        )


def refuse_folds(workdir: Path, saved: Mapping[str, Any], what: str) -> None:
    """Where a run is a whole cross-validation, of which each image trained all runs but one.

    Args:
      what: the user wants that needs images held out by all runs.

    Raises:
      UserError: it is.
    """
    if "members" in saved and saved["config"]["data"]["folds"]:
        raise UserError(
            f"{workdir} is a cross-validation, where one run's held-out images trained the others: "
            f"for {what} give one of them, like {workdir / saved['members'][0]}"
        )


def saved_run(workdir: Path) -> dict[str, Any]:
    """The config.json of a run. Raises UserError where `workdir` holds none."""
    saved = read_run(workdir)
    if saved is None:
        raise UserError(
            f"{workdir} holds no run (no config.json): give a run's folder as --workdir"
        )
    return saved


def open_run(workdir: Path, checkpoint: str = "best") -> TrainedRun | Ensemble:
    """Loads a checkpoint (`best`, `latest` or a step), or those of all members of a repeated run.

    An ensemble's `step` is the sum of its members'. Raises UserError.
    """
    saved = saved_run(workdir)
    if "members" not in saved:
        return _open_one(workdir, saved, checkpoint)
    members = tuple(
        _open_one(workdir / name, saved_run(workdir / name), checkpoint)
        for name in saved["members"]
    )
    config, names = config_lib.from_json(saved["config"]), tuple(saved["class_names"])
    step = sum(member.step for member in members)
    return Ensemble(workdir, saved, config, names, checkpoint, step, members)


def _open_one(workdir: Path, saved: dict[str, Any], checkpoint: str) -> TrainedRun:
    config = config_lib.from_json(saved["config"])
    class_names = tuple(saved["class_names"])
    graphdef, params, batch_stats = create_model(config.model, len(class_names), config.seed)
    state = create_state(
        params,
        batch_stats,
        frozenset(trained_stages(config.model)),
        make_optimizer(config.optimizer, lambda _: 0.0, MODELS[config.model.name].stages),
        config.seed,
        average=config_lib.keeps_averages(config),
    )
    if not has_checkpoints(workdir / "checkpoints"):
        raise UserError(f"{workdir} has no checkpoint yet: train it first")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = resolve_step(checkpoints, checkpoint)
        state, _ = checkpoints.load(step, make_layout("jit").place(state))
    eval_step = make_eval_step(
        graphdef,
        saved["preprocessing"],
        mirror=config.eval.mirror,
        aspect=config.eval.aspect,
    )
    apply = compile_apply(eval_step)
    params, batch_stats = state.for_evaluation()
    return TrainedRun(
        workdir,
        saved,
        config,
        class_names,
        checkpoint,
        step,
        eval_step,
        apply,
        params,
        batch_stats,
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
    root = os.path.expanduser(data_dir) or saved["data"]["root"]
    if not data_dir and not Path(root).exists():
        raise UserError(f"the run's images are no longer at {root}: give --data_dir=DIR")
    if class_map and not (data_dir and split == "all"):
        raise UserError("--class_map is for another folder: give --data_dir=DIR --split=all too")
    elsewhere = bool(data_dir) and split == "all"
    folder = open_folder(root, require_two_classes=False) if elsewhere else _reopen(root, config)
    records = None
    if config.data.on_bad_image == "skip":  # else later: what is missing is told at once
        folder, records = prepare_readable(folder, config.data)
    class_names = tuple(saved["class_names"])
    if elsewhere:
        label = _labels_of(folder, class_names, class_map or {})
        rows = [
            Row(f.file, label[f.label], "", folder.groups[f.file] if folder.groups else "")
            for f in folder.files
            if label[f.label] != LEFT_OUT
        ]
        if not rows:
            raise UserError(f"--class_map leaves no image of {root}: name a class of the run")
    else:
        rows = read_split_csv(workdir / "split.csv")
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
        folder, records = prepare_readable(folder, config.data)
    return Dataset(folder, records, rows, class_names, bad_images=records.bad)


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
    if split == "val":
        refuse_folds(workdir, saved, "its val images")
    return split, open_data(workdir, saved, split, data_dir, class_map)


def parse_class_map(text: list[str]) -> dict[str, str]:
    """`THEIRS=OURS` of each; UserError for anything else."""
    found: dict[str, str] = {}
    for part in text:
        theirs, _, ours = (word.strip() for word in part.rpartition("="))
        if not theirs or not ours:
            raise UserError(f"--class_map={part}: give THEIRS=OURS,... (THEIRS=- leaves one out)")
        if theirs in found:
            raise UserError(f"--class_map names {theirs} twice: say once what it is")
        found[theirs] = ours
    return found


def own_images(workdir: Path, saved: Mapping[str, Any]) -> tuple[DataFolder, list[Row]] | None:
    """The folder a run was trained on, and its split; None where the images are gone."""
    try:
        folder = _reopen(saved["data"]["root"], config_lib.from_json(saved["config"]))
        return folder, read_split_csv(workdir / "split.csv")
    except UserError:
        return None


def _reopen(root: str, config: ml_collections.ConfigDict) -> DataFolder:
    """The folder that a run was trained on, with the groups that it was told, if they are there."""
    told = {"groups_file": config.data.groups_file, "group_column": config.data.group_column}
    if any(told.values()):
        try:
            return open_folder(root, require_two_classes=False, **told)
        except UserError:  # moved without that file: what the folder itself says
            pass
    return open_folder(root, require_two_classes=False)


def _labels_of(
    folder: DataFolder, class_names: tuple[str, ...], class_map: Mapping[str, str]
) -> dict[str, str]:
    """The run's class, or LEFT_OUT, for each class folder."""
    absent = sorted(set(class_map) - set(folder.class_names))
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
