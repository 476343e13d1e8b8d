"""Does a run's accuracy survive another scanner, export or crop: `python -m covid_flax.robustness`.

    python -m covid_flax.robustness RUN_DIR [--split=test] [--output=DIR]

Scores the same images plain and changed in twelve ways at five strengths (see
`covid_flax.data.corruptions`). Writes `robustness.json` and `robustness.png`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from covid_flax.command import run_command
from covid_flax.console import say
from covid_flax.data.corruptions import CORRUPTIONS, STRENGTHS, Corruption
from covid_flax.data.pipeline import Element, Source
from covid_flax.data.splits import PARTS
from covid_flax.errors import UserError
from covid_flax.evaluation.intervals import share_interval
from covid_flax.evaluation.predictions import cluster_numbers
from covid_flax.evaluation.sampling import stratified_sample
from covid_flax.files import expanded, refuse_foreign, write_json
from covid_flax.run_folder import saved_run
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

_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class CorruptedSource:
    """Some images of a source, changed; always with three channels.

    Attributes:
      source: the images.
      index: which of them, `[N]`.
      corruption: what is done to them, None for nothing.
      strength: from 1 to 5.
    """

    source: Source
    index: np.ndarray
    corruption: Corruption | None = None
    strength: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Element:
        place = int(self.index[i])
        element = self.source[place]
        pixels = np.asarray(element["image"])
        if self.corruption is not None:
            # An image's noise is its own, whatever the batch; stronger, the same draw.
            rng = np.random.default_rng(place)
            pixels = self.corruption(pixels, self.strength, rng)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        return {"image": pixels, "label": element["label"]}


def score_corruptions(
    run: TrainedRun | Ensemble,
    source: Source,
    labels: np.ndarray,
    limit: int = 0,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracy under every corruption and strength.

    Args:
      run: a trained run.
      source: the images.
      labels: class indices, `[N]`.
      limit: at most so many images, class by class; 0 takes all.
      clusters: group numbers, `[N]`; None where every image is its own.

    Returns:
      `num_examples`; `clusters`, how many groups; `plain`: figures, with a 95 % `share_interval`;
      `corruptions`: name, unit,
      values, `strengths` (figures of each), mean accuracy and mean drop; `mean_drop` and
      `mean_balanced_drop` over all.
    """
    index = stratified_sample(labels, limit)
    truth = labels[index]
    cluster = np.arange(len(labels)) if clusters is None else clusters
    cluster = cluster[index]

    def figures(corruption: Corruption | None = None, strength: int = 0) -> dict[str, Any]:
        changed = CorruptedSource(source, index, corruption, strength)
        right = run.probabilities(changed).argmax(1) == truth
        recalls = [right[truth == k].mean() for k in np.unique(truth)]
        return {
            "accuracy": float(right.mean()),
            "accuracy_interval": share_interval(right, cluster, _RESAMPLES),
            "balanced_accuracy": float(np.mean(recalls)),
        }

    plain = figures()
    rows = []
    with tqdm(total=len(CORRUPTIONS) * len(STRENGTHS), unit=" scorings", leave=False) as bar:
        for corruption in CORRUPTIONS:
            bar.set_description(corruption.name)
            strengths = []
            for strength in STRENGTHS:
                strengths.append(figures(corruption, strength))
                bar.update()
            accuracy = float(np.mean([s["accuracy"] for s in strengths]))
            balanced = float(np.mean([s["balanced_accuracy"] for s in strengths]))
            rows.append(
                {
                    "name": corruption.name,
                    "unit": corruption.unit,
                    "values": list(corruption.values),
                    "strengths": strengths,
                    "mean_accuracy": accuracy,
                    "mean_drop": plain["accuracy"] - accuracy,
                    "mean_balanced_drop": plain["balanced_accuracy"] - balanced,
                }
            )
    return {
        "num_examples": len(index),
        "clusters": len(np.unique(cluster)),
        "plain": plain,
        "corruptions": rows,
        "mean_drop": float(np.mean([row["mean_drop"] for row in rows])),
        "mean_balanced_drop": float(np.mean([row["mean_balanced_drop"] for row in rows])),
    }


def robustness(
    workdir: Path,
    *,
    checkpoint: str = "best",
    split: str = "",
    data_dir: str = "",
    class_map: Mapping[str, str] | None = None,
    limit: int = 0,
    output: Path | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint under every corruption, and writes robustness.json and its plot.

    Args:
      workdir: the run's folder.
      checkpoint: `best`, `latest` or a step.
      split: of the run's `split.csv`; "" takes test where there is one, else val.
      data_dir: where the images lie now, or with `split` all another folder; as in `evaluate`.
      class_map: the run's class for each class folder of `data_dir`, see `open_data`.
      limit: at most so many images, class by class; 0 takes all.
      output: folder of the files, `workdir/robustness/<split>` where None.

    Returns:
      What robustness.json holds. Raises UserError.
    """
    split, data = open_held_out(workdir, split, data_dir, class_map)
    run = open_run(workdir, checkpoint, data_dir)
    output = output or workdir / "robustness" / split
    make_output(output, data)
    refuse_foreign(output, ("robustness.json", "robustness.png"), "corruptions")
    source, rows = data.source(split, run.config.data), data.files(split)
    clusters = cluster_numbers([row.file for row in rows], [row.group for row in rows])
    report = {
        "split": split,
        "warning": what_they_chose(workdir, split, data, by_val=val_chose(checkpoint, run.config)),
        "checkpoint": checkpoint_record(run, checkpoint),
        "data_dir": str(Path(data.folder.root).absolute()),
        "class_map": dict(class_map or {}),
        **score_corruptions(run, source, data.labels(split), limit, clusters),
    }
    # Slow to import.
    from covid_flax.report.robustness_plot import plot_robustness

    say_what_is_replaced(output / "robustness.json", data, report)
    write_json(output / "robustness.json", report)
    title = title_of(workdir, saved_run(workdir), split, data)
    some = f" ({report['num_examples']:,} of them)" if report["num_examples"] < len(rows) else ""
    plot_robustness(report, output / "robustness.png", title + some)
    _print(report, output)
    return report


def _print(report: dict[str, Any], output: Path) -> None:
    plain = report["plain"]["accuracy"]
    say(f"{report['num_examples']:,} images, plain accuracy {plain:.4f}; accuracy by strength:")
    say(f"{'':<14}{''.join(f'{s:>8}' for s in STRENGTHS)}    mean    drop")
    for row in report["corruptions"]:
        by_strength = "".join(f"{s['accuracy']:8.4f}" for s in row["strengths"])
        say(f"{row['name']:<14}{by_strength}{row['mean_accuracy']:8.4f}{row['mean_drop']:8.4f}")
    say(f"mean drop {report['mean_drop']:.4f}, balanced {report['mean_balanced_drop']:.4f}")
    if report["warning"]:
        say(f"note: {report['warning']}")
    say(f"written: {output}/robustness.json, robustness.png")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "", "the run's folder, in place of the argument")
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step")
    flags.DEFINE_enum("split", "", ("", *PARTS, "all"), "which images; empty: test if there is one")
    flags.DEFINE_string("data_dir", "", "another place of the run's images, or another folder")
    flags.DEFINE_list("class_map", [], CLASS_MAP_HELP)
    flags.DEFINE_integer("limit", 0, "at most so many images, class by class; 0: all", 0)
    flags.DEFINE_string("output", "", "folder to write to; empty: RUN_DIR/robustness/<split>")


def _main(arguments: list[str]) -> None:
    f = flags.FLAGS
    folders = [*arguments, *([f.workdir] if f.workdir else [])]
    if len(folders) != 1:
        raise UserError("give one run's folder: python -m covid_flax.robustness RUN_DIR")
    robustness(
        expanded(folders[0]),
        checkpoint=f.checkpoint,
        split=f.split,
        data_dir=f.data_dir,
        class_map=parse_class_map(f.class_map),
        limit=f.limit,
        output=expanded(f.output) if f.output else None,
    )


if __name__ == "__main__":
    _define_flags()
    run_command(_main, positional=True)
