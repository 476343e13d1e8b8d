"""A trained run's answers to images without labels.

    python -m covid_flax.predict --workdir=RUN IMAGE_FOLDER_OR_ZIP ... [--output=answers.csv]

Images are processed as those that the run was trained on. Nothing is scored, for nothing is known
of them: with labels, `covid_flax.evaluate` says what the answers are worth.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from covid_flax.command import run_command
from covid_flax.console import say
from covid_flax.data.decode import FORMATS_BY_SUFFIX, is_image
from covid_flax.data.file_tree import Disk, FileTree, join, open_tree
from covid_flax.data.folder import refuse_inside, walk
from covid_flax.data.pipeline import Element, ImageSource
from covid_flax.errors import UserError
from covid_flax.evaluate import stored_calibration
from covid_flax.evaluation.calibration import temperature_scale
from covid_flax.evaluation.predictions import answers_csv
from covid_flax.files import expanded, make_writable, write_atomically
from covid_flax.run_folder import saved_run
from covid_flax.run_images import images_root
from covid_flax.trained_run import open_run


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a run says of some images.

    Attributes:
      class_names: K names.
      files: N images, as the paths given lead to them.
      probabilities: float64 `[N, K]`, rows sum to 1.
      bad: images that cannot be read, which are not among `files`: the reason by name.
    """

    class_names: tuple[str, ...]
    files: tuple[str, ...]
    probabilities: np.ndarray
    bad: dict[str, str]


def predict(
    workdir: Path, images: Sequence[str], *, checkpoint: str = "best", calibrated: bool = False
) -> Answers:
    """The answers of the run in `workdir` to images.

    Args:
      workdir: the run's folder; of a repeated run, all its members answer together.
      images: image files, folders of them at any depth (but folders of masks), zips.
      checkpoint: `best`, `latest` or a step.
      calibrated: whether probabilities are scaled by the temperature fitted on the val images.

    Raises:
      UserError: no image there, none that can be read, no run or no temperature.
    """
    records = _Files(_found(images))
    run = open_run(workdir, checkpoint)
    calibration = stored_calibration(run, run.saved, checkpoint, "all", calibrated)
    data = run.config.data
    source = _Readable(
        ImageSource(
            records,
            range(len(records.places)),
            np.zeros(len(records.places), np.int32),
            data.image_size,
            data.interpolation,
            data.intermediate_size,
        )
    )
    probabilities = run.probabilities(source, "images")
    names = [name for name, _, _ in records.places]
    bad = {names[i]: source.bad[i] for i in sorted(source.bad)}
    kept = [i for i in range(len(names)) if i not in source.bad]
    if not kept:
        raise UserError(f"no image can be read, first {next(iter(bad.values()))}")
    probabilities = probabilities[kept]
    if calibrated:
        assert calibration is not None
        probabilities = temperature_scale(probabilities, calibration["temperature"])
    return Answers(run.class_names, tuple(names[i] for i in kept), probabilities, bad)


def _found(images: Sequence[str]) -> list[tuple[str, FileTree, str]]:
    """Of every image its name, and the tree and the path there by which it is read."""
    found: list[tuple[str, FileTree, str]] = []
    for given in images:
        path = os.path.expanduser(given)
        folder, name = os.path.split(path)
        if not os.path.exists(path):
            raise UserError(f"{given} does not exist: give images, folders of them, or zips")
        if os.path.isfile(path) and is_image(name):
            found.append((path, Disk(folder or "."), name))
            continue
        if os.path.isfile(path) and not path.lower().endswith(".zip"):
            raise UserError(f"{given} is not read: give {', '.join(FORMATS_BY_SUFFIX)}, or a zip")
        tree = open_tree(path)
        everything = sorted(join(d, n) for d, n in walk(tree, ""))
        files = [file for file in everything if is_image(os.path.basename(file))]
        if others := len(everything) - len(files):
            files_are = "files are no images" if others > 1 else "file is no image"
            say(f"note: {given}: {others:,} {files_are}, or hidden: not read")
        if not files:
            raise UserError(f"no image found in {given}: give {', '.join(FORMATS_BY_SUFFIX)}")
        found += [(os.path.join(path, file), tree, file) for file in files]
    return found


@dataclasses.dataclass(frozen=True)
class _Files:
    """The pipeline's records of files where they lie."""

    places: Sequence[tuple[str, FileTree, str]]

    def __getitem__(self, i: int) -> dict[str, object]:
        name, tree, file = self.places[i]
        return {"image": tree.read(file), "file": name}


@dataclasses.dataclass(frozen=True)
class _Readable:
    """A source with black in place of what cannot be read, which `bad` then names by number."""

    source: ImageSource
    bad: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Element:
        try:
            return self.source[i]
        except UserError as e:
            self.bad[i] = str(e)
            side = self.source.image_size
            return {"image": np.zeros((side, side, 3), np.uint8), "label": np.int32(0)}


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step")
    flags.DEFINE_bool("calibrated", False, "scale probabilities by the temperature fitted on val")
    flags.DEFINE_string("output", "answers.csv", "csv to write; one that is there is not replaced")


def _refuse_there(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a csv as --output")
    if os.path.lexists(output):
        raise UserError(f"{output} is there: remove it, or name another --output")


def _main(arguments: list[str]) -> None:
    f = flags.FLAGS
    if not arguments:
        raise UserError("give images: python -m covid_flax.predict --workdir=RUN FOLDER")
    output, workdir = expanded(f.output), expanded(f.workdir)
    _refuse_there(output)
    root = images_root(workdir, saved_run(workdir))
    refuse_inside(output.parent, root, "--output", makes_folders=False)
    make_writable(output.parent)
    answers = predict(workdir, arguments, checkpoint=f.checkpoint, calibrated=f.calibrated)
    _refuse_there(output)
    names, files = answers.class_names, {"file": answers.files}
    write_atomically(output, answers_csv(files, names, answers.probabilities))
    counts = np.bincount(answers.probabilities.argmax(1), minlength=len(answers.class_names))
    listed = ", ".join(
        f"{name} {n:,}" for name, n in zip(answers.class_names, counts.tolist(), strict=True)
    )
    count = len(answers.files)
    say(f"{count:,} image{'s' * (count > 1)}: {listed}")
    for why in answers.bad.values():
        say(f"left out: {why}")
    say(
        "note: an image of anything else gets one of these answers too; what they are worth on "
        "such images is not known without labels"
    )
    say(f"written: {output}")


if __name__ == "__main__":
    _define_flags()
    run_command(_main, positional=True)
