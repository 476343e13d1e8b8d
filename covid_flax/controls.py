"""What a run still answers when it should not be able to: `python -m covid_flax.controls`.

Scores the same images whole and with something taken away (the centre, the lungs, all but the
border, brightness and contrast, all detail), twins that went through another export, and asks how
much the source of an image gives away. Writes `controls.json` and `controls.html`.

Images changed so are unlike any the network was trained on. A low score on them therefore shows
little; a score well above a fixed answer where no lung is shown shows that the run uses a
shortcut (Maguolo & Nanni 2021; DeGrave et al. 2021). Whether the images offer one at all is asked
of a simple model that is trained on images changed the same way.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from covid_flax.command import run_command
from covid_flax.console import say
from covid_flax.data.conditions import Condition, conditions, histogram
from covid_flax.data.dataset import Dataset
from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.data.masks import LungMasks, find_masks
from covid_flax.data.pipeline import Element, ImageSource, Source
from covid_flax.data.splits import PARTS, Row
from covid_flax.errors import UserError
from covid_flax.evaluation.condition_figures import (
    FALSE_FINDINGS,
    LEAST_GROUPS,
    LEAST_SURPLUS,
    PERMUTATIONS,
    SEED,
    condition_figures,
)
from covid_flax.evaluation.intervals import LEVEL, RESAMPLES
from covid_flax.evaluation.predictions import cluster_numbers
from covid_flax.evaluation.sampling import stratified_sample
from covid_flax.evaluation.source_probe import learn, probe_classes, probed_sources, source_only
from covid_flax.evaluation.twins import (
    FileRecords,
    count_answers,
    find_twins,
    refuse_itself,
    twin_figures,
)
from covid_flax.files import expanded, refuse_foreign, write_json
from covid_flax.run_folder import learned_files, saved_run
from covid_flax.run_images import (
    CLASS_MAP_HELP,
    make_output,
    open_held_out,
    parse_class_map,
    say_what_is_replaced,
    title_of,
    val_chose,
    what_they_chose,
)
from covid_flax.trained_run import Ensemble, TrainedRun, checkpoint_record, open_run

# Training images that give the histogram to match, and that the simple models learn from.
TRAINING_IMAGES = 2000
THUMBNAIL_SIDE = 28

_OF_SIMPLE_MODEL = (
    "accuracy",
    "accuracy_interval",
    "balanced_accuracy",
    "balanced_accuracy_interval",
    "p",
    "above_chance",
)


@dataclasses.dataclass(frozen=True)
class ChangedSource:
    """Some images of a source under a condition, always with three channels.

    Attributes:
      source: the images.
      files: name of each image of `source`.
      index: which of them, `[N]`.
      condition: what is done to them.
      masks: of their lungs.
    """

    source: Source
    files: Sequence[str]
    index: np.ndarray
    condition: Condition
    masks: LungMasks | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Element:
        place = int(self.index[i])
        element = self.source[place]
        pixels = np.asarray(element["image"])
        mask = None
        if self.condition.masked:
            assert self.masks is not None
            mask = self.masks.mask(self.files[place], pixels.shape[0])
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        return {"image": self.condition.change(pixels, mask), "label": element["label"]}


class JoinedSource:
    """Sources one after the other, so that all fill the batches of one program."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Element:
        part = bisect.bisect_right(self._ends, i)
        return self._parts[part][i - (self._ends[part] - len(self._parts[part]))]

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """`values` `[len(self), ...]` of each part."""
        return np.split(values, self._ends[:-1])


def score_conditions(
    run: TrainedRun | Ensemble,
    data: Dataset,
    *,
    training: Dataset | None = None,
    masks: LungMasks | None = None,
    pairs: DataFolder | None = None,
    trained_on: Collection[str] = (),
    limit: int = 0,
) -> tuple[dict[str, Any], list[tuple[Condition, dict[str, np.ndarray]]]]:
    """Scores every row of `data` under every condition.

    Args:
      run: scores images.
      data: the images; its rows are those to score.
      training: rows the run was trained on, where they are at hand: they give the histogram that
        all images are matched to (else the scored images do) and train the simple models.
      masks: of the lungs, where any image has one.
      pairs: twins of images of `data`, by class and file name.
      trained_on: files that the run learned from: their twins are left out.
      limit: at most so many images, and so many twins, drawn class by class; 0 takes all.

    Returns:
      What controls.json holds of them, and each condition with what it makes of one image of each
      class.

    Raises:
      UserError: a twin folder that holds none of the images, an unreadable image or mask.
    """
    rows = list(data.rows)
    chosen = [rows[i] for i in stratified_sample(data.labels("all"), limit)]
    twins = find_twins(rows, pairs, trained_on) if pairs is not None else []
    kept = stratified_sample(np.array([row.label for row, _ in twins]), limit)
    twins = [twins[i] for i in kept]

    scored = dataclasses.replace(data, rows=chosen)
    source, labels = scored.source("all", run.config.data), scored.labels("all").astype(np.int64)
    files = tuple(row.file for row in chosen)
    learned = _reduced(training) if training is not None else None
    known = source if learned is None else learned.source("all", run.config.data)
    reference = histogram(np.asarray(known[i]["image"]) for i in range(len(known)))
    if masks is not None:
        asked = {*files, *(row.file for row in (learned.rows if learned else ()))}
        given = len(asked & masks.files.keys())
        masks = masks.that_show_lung(asked)
        if len(masks.files) < given:
            say(f"note: {given - len(masks.files):,} masks show no lung: taken for none")
    reference_of = f"{len(known):,} {'scored' if learned is None else 'training'} images together"
    lit = np.array([masks is not None and file in masks.files for file in files])
    todo = conditions(reference, reference_of, masks=bool(lit.any()))
    changed = [_changed(source, files, c, masks) for c in todo]
    parts = list(changed)
    if twins:
        parts += _twin_sources(scored, twins, pairs, run.config.data, todo[0])
    joined = JoinedSource(parts)
    say(
        f"scoring {len(files):,} images under {len(todo)} conditions"
        + (f" and {len(twins):,} pairs of twins" if twins else "")
    )
    answers = joined.split(run.probabilities(joined, "controls"))

    clusters = cluster_numbers([row.file for row in chosen], [row.group for row in chosen])
    names = run.class_names
    tests = len(todo) * (1 if learned is None else 2)
    found = []
    bar = tqdm(changed, desc="simple models", unit=" conditions", leave=False)
    for part, probabilities in zip(bar, answers, strict=False):
        i, c = part.index, part.condition
        scored_part = (labels[i], answers[0][i], names, clusters[i])
        row = {"name": c.name, "title": c.title, "what": c.what, "shows": c.shows}
        row |= condition_figures(probabilities, *scored_part, tests) | {"simple_model": None}
        if learned is not None:
            lessons = _changed(known, [r.file for r in learned.rows], c, masks)
            simple = simple_model(lessons, learned.labels("all"), part, len(names))
            if simple is not None:
                figures = condition_figures(simple, *scored_part, tests)
                row["simple_model"] = {key: figures[key] for key in _OF_SIMPLE_MODEL}
                row["simple_model"]["num_training"] = len(lessons)
        found.append(row)
    report: dict[str, Any] = {
        "num_examples": len(files),
        "num_available": len(rows),
        "class_names": list(names),
        "support": count_answers(labels, names),
        "masks": int(lit.sum()),
        "intervals": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": SEED,
            "clusters": int(clusters.max()) + 1,
        },
        "tests": {
            "count": tests,
            "false_findings": FALSE_FINDINGS,
            "least_groups": LEAST_GROUPS,
            "least_surplus": LEAST_SURPLUS,
            "permutations": PERMUTATIONS,
        },
        "references": _references(labels, names),
        "conditions": found,
        "pairs": None,
        "sources": _sources(data.folder, chosen, rows, clusters, answers[0], source),
    }
    if twins:
        twin_labels = np.array([names.index(row.label) for row, _ in twins])
        here, there = answers[len(changed) :]
        of_twins = cluster_numbers([row.file for row, _ in twins], [row.group for row, _ in twins])
        report["pairs"] = twin_figures(twin_labels, here, there, names, of_twins)
    # Of each class the first image, if it can be one with a mask.
    firsts = {
        name: min(np.flatnonzero(labels == k).tolist(), key=lambda i: (not lit[i], i))
        for k, name in enumerate(names)
        if (labels == k).any()
    }
    return report, [(part.condition, _examples(part, firsts)) for part in changed]


def _reduced(training: Dataset) -> Dataset:
    places = stratified_sample(training.labels("all"), TRAINING_IMAGES)
    return dataclasses.replace(training, rows=[training.rows[i] for i in places])


def _changed(
    source: Source, files: Sequence[str], condition: Condition, masks: LungMasks | None
) -> ChangedSource:
    """All images of the source under the condition; where it needs masks, those that have one."""
    index = np.arange(len(files))
    if condition.masked:
        assert masks is not None
        index = np.flatnonzero([file in masks.files for file in files])
    return ChangedSource(source, files, index, condition, masks)


def simple_model(
    lessons: ChangedSource, labels: np.ndarray, scored: ChangedSource, count: int
) -> np.ndarray | None:
    """Probabilities of a linear probe on thumbnails, trained on images changed the same way.

    Args:
      lessons: training images under the condition.
      labels: class index of each image of `lessons.source`.
      scored: the images to answer, under the same condition.
      count: K, of classes.

    Returns:
      float64 `[len(scored), K]`; None where the training images are of fewer than two classes.
    """
    known = labels[lessons.index]
    if len(np.unique(known)) < 2:
        return None
    return learn(_thumbnails(lessons), known, _thumbnails(scored), count)


def _examples(part: ChangedSource, firsts: dict[str, int]) -> dict[str, np.ndarray]:
    """Of each class, what the condition makes of the image at that place, if it has one."""
    place = {int(i): k for k, i in enumerate(part.index)}
    return {name: np.asarray(part[place[i]]["image"]) for name, i in firsts.items() if i in place}


def _references(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Answers that look at no image: always the commonest class, and guessing at its share."""
    shares = np.bincount(labels, minlength=len(class_names)) / len(labels)
    fixed = float(1 / (shares > 0).sum())
    return {
        "majority": {
            "class": class_names[int(shares.argmax())],
            "accuracy": float(shares.max()),
            "balanced_accuracy": fixed,
        },
        "guessing": {"accuracy": float((shares**2).sum()), "balanced_accuracy": fixed},
    }


def _twin_sources(
    scored: Dataset,
    twins: Sequence[tuple[Row, str]],
    pairs: DataFolder | None,
    config: Any,
    whole: Condition,
) -> list[ChangedSource]:
    """The images that have twins, and their twins in the same order, both whole."""
    assert pairs is not None
    here = dataclasses.replace(scored, rows=[row for row, _ in twins])
    files = [file for _, file in twins]
    there = ImageSource(
        FileRecords(pairs, files),
        range(len(files)),
        here.labels("all"),
        config.image_size,
        config.interpolation,
        config.intermediate_size,
    )
    index = np.arange(len(files))
    names = [row.file for row, _ in twins]
    return [
        ChangedSource(here.source("all", config), names, index, whole),
        ChangedSource(there, files, index, whole),
    ]


def _sources(
    folder: DataFolder,
    chosen: Sequence[Row],
    rows: Sequence[Row],
    clusters: np.ndarray,
    probabilities: np.ndarray,
    images: Source,
) -> dict[str, Any]:
    """What the source gives away, or why that cannot be asked."""
    source = {f.file: f.source for f in folder.files}
    labels, sources = [row.label for row in chosen], [source[row.file] for row in chosen]
    split = {row.file for row in rows}
    # Another folder's are all scored, or left out for they are of no class of the run.
    ours = any(row.split for row in rows)
    others = [(f.label, f.source) for f in folder.files if ours and f.file not in split]
    found: dict[str, Any] = {
        "alone": source_only(list(zip(labels, sources, strict=True)), others),
        "within": {},
        "not_applicable": None,
    }
    if found["alone"] is None:
        found["not_applicable"] = "the data name no sources"
    elif not probed_sources(labels, sources, clusters):
        found["not_applicable"] = (
            "no class has two sources with enough of the scored images to tell them apart"
        )
    else:
        say("probing for the source")
        features = {
            "answers": np.log(np.maximum(probabilities, 1e-12)),
            "thumbnails": _thumbnails(images),
        }
        found["within"] = probe_classes(labels, sources, clusters, features)
    return found


def _thumbnails(source: Source) -> np.ndarray:
    """Greys of every image, box-shrunk: float64 `[N, THUMBNAIL_SIDE ** 2]`."""
    side = THUMBNAIL_SIDE
    thumbnails = np.empty((len(source), side * side))
    for i in range(len(source)):
        pixels = np.asarray(source[i]["image"])
        grey = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("L")
        thumbnails[i] = np.asarray(grey.resize((side, side), Image.Resampling.BOX)).ravel()
    return thumbnails


def run_controls(
    workdir: Path,
    *,
    checkpoint: str = "best",
    split: str = "",
    data_dir: str = "",
    class_map: Mapping[str, str] | None = None,
    masks: str = "",
    pairs: str = "",
    limit: int = 0,
    output: Path | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint under every condition, and writes controls.json and controls.html.

    Args:
      workdir: the run's folder.
      checkpoint: `best`, `latest` or a step.
      split: of the run's `split.csv`; "" takes test where there is one, else val.
      data_dir: where the images lie now, or with `split` all another folder; as in `evaluate`.
      class_map: the run's class for each class folder of `data_dir`, see `open_data`.
      masks: a folder of lung masks; "" looks beside the images.
      pairs: a folder of twins of the images, `<Class>/images/<same name>`.
      limit: at most so many images, and so many twins; 0 takes all.
      output: folder of the files, `workdir/controls/<split>` where None.

    Returns:
      What controls.json holds. Raises UserError.
    """
    pairs, masks = os.path.expanduser(pairs), os.path.expanduser(masks)
    if pairs and not Path(pairs).exists():
        raise UserError(f"--pairs={pairs} does not exist: give a folder of <Class>/images/<name>")
    split, data = open_held_out(workdir, split, data_dir, class_map)
    output = output or workdir / "controls" / split
    make_output(output, data)
    refuse_foreign(output, ("controls.json", "controls.html"), "conditions")
    training = None
    if split in ("test", "val"):  # the simple models must not be scored on what they learned from
        # A whole cross-validation trained on all that is val there.
        seen = data.files("train") or data.files("val")
        if {row.file for row in seen} <= {f.file for f in data.folder.files}:
            training = dataclasses.replace(data, rows=seen)
        else:
            say(f"note: {data.folder.root} lacks training images: no simple models are trained")
    data = dataclasses.replace(data, rows=data.files(split))
    twin_folder = open_folder(pairs, require_two_classes=False) if pairs else None
    if pairs:
        refuse_itself(pairs, data.folder)
    lungs = find_masks(data.folder, [*data.rows, *(training.rows if training else ())], masks)
    run = open_run(workdir, checkpoint, data_dir)
    report, examples = score_conditions(
        run,
        data,
        training=training,
        masks=lungs,
        pairs=twin_folder,
        trained_on=learned_files(workdir) if pairs else (),
        limit=limit,
    )

    # Slow to import.
    from covid_flax.report.controls_page import explain, write_controls_page

    report = {
        "split": split,
        "warning": what_they_chose(workdir, split, data, by_val=val_chose(checkpoint, run.config)),
        "elsewhere": data.elsewhere,
        "checkpoint": checkpoint_record(run, checkpoint),
        "data_dir": str(Path(data.folder.root).absolute()),
        "class_map": dict(class_map or {}),
        "pairs_dir": pairs or None,
        "masks_dir": masks or None,
        **report,
    }
    report["text"] = explain(report)
    say_what_is_replaced(output / "controls.json", data, report)
    write_json(output / "controls.json", report)
    write_controls_page(
        output / "controls.html",
        report,
        examples,
        title=f"Shortcut controls: {title_of(workdir, saved_run(workdir), split, data)}",
    )
    _print(report, output)
    return report


def _print(report: dict[str, Any], output: Path) -> None:
    say("")
    width = max(len(c["title"]) for c in report["conditions"])
    say(f"{'':<{width}}  images  accuracy  balanced  changed  confidence")
    for c in report["conditions"]:
        say(
            f"{c['title']:<{width}}  {c['num_examples']:6,}  {c['accuracy']:8.4f}  "
            f"{c['balanced_accuracy']:8.4f}  {c['changed']:7.4f}  {c['confidence']:10.4f}"
        )
    fixed = report["references"]["majority"]
    say(
        f"{'always ' + fixed['class']:<{width}}  {report['num_examples']:6,}  "
        f"{fixed['accuracy']:8.4f}  {fixed['balanced_accuracy']:8.4f}"
    )
    say("")
    for sentence in report["text"]:
        say(sentence)
    if report["warning"]:
        say(f"note: {report['warning']}")
    say(f"written: {output}/controls.html, controls.json")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step")
    flags.DEFINE_enum("split", "", ("", *PARTS, "all"), "which images; empty: test if there is one")
    flags.DEFINE_string("data_dir", "", "another place of the run's images, or another folder")
    flags.DEFINE_list("class_map", [], CLASS_MAP_HELP)
    flags.DEFINE_string("masks", "", "a folder of lung masks; empty: <Class>/masks of the images")
    flags.DEFINE_string("pairs", "", "a folder of twins: <Class>/images/<name of an image>")
    flags.DEFINE_integer("limit", 0, "at most so many images, class by class; 0: all", 0)
    flags.DEFINE_string("output", "", "folder to write to; empty: DIR/controls/<split>")


def _main() -> None:
    f = flags.FLAGS
    run_controls(
        expanded(f.workdir),
        checkpoint=f.checkpoint,
        split=f.split,
        data_dir=f.data_dir,
        class_map=parse_class_map(f.class_map),
        masks=f.masks,
        pairs=f.pairs,
        limit=f.limit,
        output=expanded(f.output) if f.output else None,
    )


if __name__ == "__main__":
    _define_flags()
    run_command(_main)
