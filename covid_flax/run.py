"""Setting a run up: its folder, data, network and initial weights, before a step is made."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import nnx

from covid_flax import __version__, distributed
from covid_flax import config as config_lib
from covid_flax.checkpoint import has_checkpoints
from covid_flax.console import say
from covid_flax.data import dataset as dataset_lib
from covid_flax.data.dataset import Dataset
from covid_flax.data.folder import refuse_inside
from covid_flax.data.pipeline import usable_examples
from covid_flax.data.splits import read_split_csv, write_split_csv
from covid_flax.errors import UserError
from covid_flax.files import cache_dir, expanded, write_json
from covid_flax.initial_weights import find_weights, initial_weights
from covid_flax.models import (
    batch_stats_stages,
    create_model,
    preprocessing_of,
    stage_before,
    trained_stages,
)
from covid_flax.run_folder import (
    has_figures,
    only_trainer,
    read_run,
    refuse_another_split,
    refuse_changes,
    refuse_file,
    refuse_foreign_files,
)
from covid_flax.step import abstract_batch
from covid_flax.teacher import check_teacher, saved_teacher, teacher_arrays

# Until what one host wrote is seen by another, where they share a disk.
_NETWORK_DELAY_S = 5.0
_PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets ml_collections numpy pillow"
).split()


@dataclasses.dataclass
class Run:
    """A run that is set up: its folder, its data and its untrained network."""

    config: ml_collections.ConfigDict
    workdir: Path
    data: Dataset
    graphdef: nnx.GraphDef
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    written: bytes  # config.json, as process 0 left it
    resumed: bool = False  # a checkpoint is there, and the arrays here mean nothing

    @property
    def trained(self) -> tuple[str, ...]:
        return trained_stages(self.config.model)

    @property
    def batch_stats_in(self) -> frozenset[str]:
        return batch_stats_stages(self.config.model)

    def batch_shapes(self, start: str | None, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a batch of `size` examples as steps from `start` on take it, see `abstract_batch`."""
        cached = None if start is None else stage_before(self.config.model, start)
        side = self.config.data.image_size
        return abstract_batch(self.graphdef, self.params, self.batch_stats, size, side, cached)


def setup(config: ml_collections.ConfigDict, workdir: Path) -> Run:
    """Data, network and initial weights; writes `config.json` and `split.csv`.

    Where the folder holds a run with a checkpoint, checks that it is one of this
    configuration, split, class list and teacher, and leaves its files as they are, but for the
    places of images and of a teacher that were moved; the weights are the checkpoint's then. One
    with figures but without a checkpoint must be of this configuration too.

    Raises:
      UserError: nothing is written then but the folder's phantoms, where the data are those; and
        `config.json` and `split.csv`, where another process has other images or splits.
    """
    config_lib.check(config)
    refuse_file(workdir)
    if config.data.dir:
        refuse_inside(workdir, config.data.dir, "--workdir")
        refuse_inside(cache_dir(config.data.cache_dir), config.data.dir, "data.cache_dir")
    resumed = has_checkpoints(workdir / "checkpoints")
    saved = read_run(workdir)
    if saved is not None and "members" in saved:
        raise UserError(
            f"{workdir} holds several runs ({', '.join(saved['members'])}): choose another "
            "--workdir"
        )
    if saved is None and not resumed:
        refuse_foreign_files(workdir)
    if not resumed and not has_figures(workdir):
        saved = None  # a dry run's, or of a training that never took a step
    if resumed and saved is None:
        raise UserError(
            f"{workdir} holds checkpoints but no config.json: restore it, or choose another "
            "--workdir"
        )
    if saved is not None:
        refuse_changes(saved["config"], config_lib.to_json(config), workdir)
    # Before the images are read, which may take long, what can be told without them.
    check_devices(config)
    if config.train.teacher:
        saved_teacher(expanded(config.train.teacher))
    weights_path = None if resumed else find_weights(config)
    say(f"data: reading {config.data.dir or 'synthetic phantoms'}")
    data = dataset_lib.load_dataset(config.data, config.seed, workdir)
    _describe_data(data)
    check_batches(config, len(data.files("train")))
    if config.train.teacher:
        check_teacher(expanded(config.train.teacher), data, config)
    graphdef, params, batch_stats = create_model(config.model, len(data.class_names), config.seed)

    if resumed:
        assert saved is not None
        _check_resumed(workdir, saved, config, data)
        written = b""  # of process 0 alone, which looks whether it changes
        if jax.process_index() == 0:
            written = _write_moved(config, workdir, saved, data)
        _meet(workdir)
        return Run(config, workdir, data, graphdef, params, batch_stats, written, resumed=True)
    params, batch_stats, weights = initial_weights(config, data, params, batch_stats, weights_path)
    taught_by = teacher_arrays(config.train.teacher)
    written = b""
    if jax.process_index() == 0:
        written = _write_run(config, workdir, data, weights, taught_by)
    _meet(workdir)
    if jax.process_index() != 0:
        _refuse_other_split(workdir, data)
    return Run(config, workdir, data, graphdef, params, batch_stats, written)


def _write_moved(
    config: ml_collections.ConfigDict, workdir: Path, saved: Mapping[str, Any], data: Dataset
) -> bytes:
    """Where the images, or the teacher, are no longer where config.json says, says where.

    Returns config.json as it is then.
    """
    path, now = workdir / "config.json", dict(saved)
    if not os.path.exists(saved["data"]["root"]):
        moved = {key: dataset_lib.summary(data)[key] for key in ("root", "fingerprint")}
        now["data"] = saved["data"] | moved
    if saved.get("teacher_folder") and not os.path.exists(saved["teacher_folder"]):
        now["teacher_folder"] = os.path.realpath(expanded(config.train.teacher))
    if now == saved:
        return path.read_bytes()
    with only_trainer(workdir):
        write_json(path, now, allow_nan=True)
        return path.read_bytes()


def _check_resumed(
    workdir: Path, saved: Mapping[str, Any], config: ml_collections.ConfigDict, data: Dataset
) -> None:
    """Refuses to go on with other classes, images, split or teacher. Raises UserError."""
    if saved["class_names"] != list(data.class_names):
        raise UserError(
            f"{workdir} was trained on the classes {saved['class_names']}, the data has "
            f"{list(data.class_names)}: choose another --workdir"
        )
    before, now = (
        [dataclasses.replace(row, group="") for row in rows]
        for rows in (read_split_csv(workdir / "split.csv"), data.rows)
    )
    if before != now:
        raise UserError(
            f"the images or their split differ from {workdir}/split.csv: restore the data "
            "and the csv of their groups or split, or choose another --workdir"
        )
    summary = dataset_lib.summary(data)
    if saved["data"].get("fingerprint") != summary["fingerprint"]:
        say(
            f"note: the image files in {summary['root']}, or the sources named for them, are not "
            "those of the run's beginning, by sizes and times: if they show other pixels, choose "
            "another --workdir"
        )
    grain = saved.get("versions", {}).get("grain"), importlib.metadata.version("grain")
    if grain[0] != grain[1]:
        say(
            f"note: the run began under Grain {grain[0]}, this is {grain[1]}: if it shuffles "
            "otherwise, an epoch that was interrupted takes some images twice and others not at all"
        )
    if saved.get("teacher", []) != teacher_arrays(config.train.teacher):
        its = saved["config"].get("train", {}).get("teacher") or "none"
        raise UserError(
            f"train.teacher={config.train.teacher!r} is not the network that {workdir} has learned "
            f"from: give that one ({its}, as it was), or choose another --workdir"
        )


def _write_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    data: Dataset,
    weights: dict[str, Any],
    teacher: list[str],
) -> bytes:
    """Writes split.csv and config.json, and returns what the latter holds."""
    teacher_dir = config.train.teacher
    about = {
        "config": config_lib.to_json(config),
        "class_names": list(data.class_names),
        "seed": config.seed,
        "preprocessing": preprocessing_of(config.model),
        "data": dataset_lib.summary(data),
        "weights": weights,
        "versions": {"covid_flax": __version__, "python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "devices": [str(d.device_kind) for d in jax.devices()],
        "teacher": teacher,
        # From wherever a later command is given.
        "teacher_folder": os.path.realpath(expanded(teacher_dir)) if teacher_dir else "",
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make {workdir} ({e.strerror}): choose another --workdir") from e
    with only_trainer(workdir):
        if has_checkpoints(workdir / "checkpoints"):  # while the images were read
            raise UserError(f"{workdir} has become another run's meanwhile: give another --workdir")
        refuse_another_split(workdir, data.rows)
        write_split_csv(workdir / "split.csv", list(data.rows))
        # Last: a folder with a config.json is a run.
        write_json(workdir / "config.json", about, allow_nan=True)
        return (workdir / "config.json").read_bytes()


def check_devices(config: ml_collections.ConfigDict) -> None:
    """Refuses batches that cannot be made on these devices. Raises UserError."""
    train = config.train
    check_division(train, jax.device_count())
    if train.parallel == "pmap" and (train.shard_state or config.data.on_device == "always"):
        raise UserError(
            "train.shard_state and data.on_device=always need train.parallel=jit: set that"
        )
    in_a_step = train.batch_size // (jax.device_count() if train.parallel == "pmap" else 1)
    for key in ("mixup", "cutmix", "style"):
        if config.augment[key] and in_a_step < 2:
            raise UserError(
                f"config.augment.{key} takes of another image in the step: raise "
                "config.train.batch_size"
            )


def check_batches(config: ml_collections.ConfigDict, num_train: int) -> None:
    """Refuses batches that cannot be made of these images. Raises UserError."""
    train = config.train
    if not usable_examples(num_train, train.batch_size, train.last_batch):
        raise UserError(
            f"{num_train} training images do not fill a batch of {train.batch_size}: "
            "lower config.train.batch_size"
        )


def check_division(train: ml_collections.ConfigDict, devices: int) -> None:
    """Refuses a batch that micro-batches or so many devices cannot share. Raises UserError."""
    micro = train.micro_batch or train.batch_size
    if train.batch_size % micro:
        raise UserError(
            f"config.train.micro_batch={micro} does not divide train.batch_size="
            f"{train.batch_size}: choose a divisor, or 0"
        )
    if micro % devices:
        key = "micro_batch" if train.micro_batch else "batch_size"
        raise UserError(
            f"config.train.{key}={micro} does not divide among {devices} devices: "
            f"choose a multiple of {devices}"
        )


def _meet(workdir: Path) -> None:
    """Where all processes have what they need, and process 0's files are there."""
    distributed.barrier("set up")
    if not _appears(workdir / "config.json"):
        raise UserError(
            f"process {jax.process_index()} does not see the {workdir} that process 0 wrote: "
            "give a --workdir on a file system that all hosts share"
        )


def _appears(path: Path) -> bool:
    """Whether another host's file is there.

    NFS remembers for a minute that a file was missing, until its folder is read again.
    """
    end = time.monotonic() + _NETWORK_DELAY_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.5)
    return True


def _refuse_other_split(workdir: Path, data: Dataset) -> None:
    """Where process 0, which wrote its split down, has another. Raises UserError."""
    if read_split_csv(workdir / "split.csv") != list(data.rows):
        raise UserError(
            f"process {jax.process_index()} has other images, or another split of them, than "
            f"process 0: give all hosts the same {data.folder.root}, and the same csv of groups "
            "or split"
        )


def _describe_data(data: Dataset) -> None:
    images = dataset_lib.summary(data)["images"]
    parts = [f"{split} {sum(counts.values()):,}" for split, counts in images.items()]
    say(
        f"data: {len(data.rows):,} images, {len(data.class_names)} classes "
        f"({', '.join(data.class_names)}): {', '.join(parts)}"
    )
    for note in data.notes:
        say(f"note: {note}")
