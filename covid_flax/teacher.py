"""The run that `train.teacher` names: whether it may teach, and that it stays the same one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from covid_flax import config as config_lib
from covid_flax.checkpoint import Checkpoints, has_checkpoints, resolve_step
from covid_flax.data.dataset import Dataset
from covid_flax.errors import UserError
from covid_flax.files import expanded
from covid_flax.run_folder import learned_of, named_run, read_run, saved_run


def saved_teacher(folder: Path) -> dict[str, Any]:
    """The config.json of a teacher. Raises UserError."""
    mend = "train the teacher first, or give the folder of one, or none: --config.train.teacher="
    return named_run("train.teacher", folder, mend)


def check_teacher(folder: Path, data: Dataset, config: ml_collections.ConfigDict) -> None:
    """Refuses a run that cannot teach one of these images.

    Raises:
      UserError: no run, one of other classes, one whose images are made otherwise (size or
        interpolation), or one that has learned from images that are held out here.
    """
    saved = saved_teacher(folder)
    if saved["class_names"] != list(data.class_names):
        raise UserError(
            f"train.teacher={folder} knows the classes {saved['class_names']}, the data has "
            f"{list(data.class_names)}: train it on the same classes"
        )
    its = config_lib.from_json(saved["config"]).data
    for key in ("image_size", "interpolation", "intermediate_size"):
        if its[key] != config.data[key]:
            raise UserError(
                f"train.teacher={folder} takes images of data.{key}={its[key]}, this run has "
                f"{config.data[key]}: set it to the teacher's"
            )
    if leaked := learned_of(folder, data.held_out, data.class_names):
        raise UserError(
            f"train.teacher={folder}, or a run that its weights come from, was trained on "
            f"{leaked:,} images that this run holds out: its figures would be of images seen; give "
            "a teacher of the same split, or none: --config.train.teacher="
        )


def teacher_arrays(folder: str, steps: Sequence[int] = ()) -> list[str]:
    """Digests of the checkpoint that a teacher answers with, or of its members'; [] without one.

    To be called in all processes alike, as Orbax opens checkpoints. Of the best ones, or of those
    of `steps`.
    """
    if not folder:
        return []
    teacher = expanded(folder)
    names = saved_run(teacher).get("members", [""])
    digests = []
    for i, directory in enumerate(teacher / name / "checkpoints" for name in names):
        if not has_checkpoints(directory):
            raise UserError(f"{directory.parent} has no checkpoint yet: train it first")
        with Checkpoints(directory) as checkpoints:
            step = steps[i] if steps else resolve_step(checkpoints, "best")
            digests.append(checkpoints.digest(step))
    return digests


def refuse_other_teacher(workdir: Path, folder: str, steps: Sequence[int]) -> None:
    """Where a run's teacher, whose checkpoints of `steps` are loaded, is not what it wrote down.

    Raises:
      UserError: its training has a better epoch since the run was set up.
    """
    saved = read_run(workdir) or {}
    if saved.get("teacher", []) != teacher_arrays(folder, steps):
        raise UserError(
            f"train.teacher={folder!r} is still being trained, and has a better epoch by now: wait "
            f"until it has ended, remove {workdir}, and give the command again"
        )
