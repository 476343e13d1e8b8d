"""Scores a run's checkpoint: `python -m covid_flax.evaluate --workdir=DIR`.

Writes `report.json`, `report.html`, `predictions.csv` and `confusion_matrix.png`; every image is
counted exactly once.
"""

from __future__ import annotations

if __name__ == "__main__":
    from covid_flax.errors import die_of_interrupts
    from covid_flax.host_memory import prepare_allocator

    die_of_interrupts()
    prepare_allocator()

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from covid_flax.command import run_command
from covid_flax.config import is_cross_validation
from covid_flax.console import say
from covid_flax.data.dataset import Dataset
from covid_flax.data.splits import PARTS
from covid_flax.errors import UserError
from covid_flax.evaluation.metrics import check_prevalence
from covid_flax.evaluation.predictions import Predictions, predictions_of
from covid_flax.files import expanded, locked, parse_json, write_json
from covid_flax.report.summary import print_report
from covid_flax.report.write import refuse_foreign_files
from covid_flax.run_folder import saved_run
from covid_flax.run_images import (
    CLASS_MAP_HELP,
    images_root,
    make_output,
    open_data,
    own_images,
    parse_class_map,
    say_what_is_replaced,
    title_of,
    val_chose,
)
from covid_flax.trained_run import (
    Ensemble,
    TrainedRun,
    answers_of_members,
    checkpoint_record,
    open_run,
    together,
)


def evaluate(
    workdir: Path,
    *,
    checkpoint: str = "best",
    split: str = "val",
    data_dir: str = "",
    class_map: Mapping[str, str] | None = None,
    calibrated: bool = False,
    prevalence: Mapping[str, float] | None = None,
    output: Path | None = None,
    data: Dataset | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint on a split of the run's data, or on another folder.

    Scoring the run's own validation images also fits the temperature and the abstain threshold of
    that checkpoint, and keeps them in the run's `calibration.json`.

    Args:
      workdir: the run's folder.
      checkpoint: `best`, `latest` or a step.
      split: of the run's `split.csv`; with `data_dir`, `all` takes every image there.
      data_dir: where the images lie now; empty for where they lay in training.
      class_map: the run's class for each class folder of `data_dir`, see `open_data`.
      calibrated: scale the probabilities by the fitted temperature.
      prevalence: share of each class where the test would be used, for `ppv_at`.
      output: folder of the files, `workdir/eval/<split>` where None.
      data: the run's data, where they are open already.

    Returns:
      The report, as written; empty in other processes than the first. Raises UserError.
    """
    saved = saved_run(workdir)
    check_prevalence(prevalence or {}, saved["class_names"])
    if data is None:
        data = open_data(workdir, saved, split, data_dir, class_map)
    run = open_run(workdir, checkpoint, data_dir)
    calibration = stored_calibration(run, saved, checkpoint, split, calibrated)
    output = output or workdir / "eval" / split
    make_output(output, data)
    refuse_foreign_files(output)
    answers = None
    if isinstance(run, Ensemble):
        answers = answers_of_members(run, data, split)
        probabilities = together(answers, len(data.files(split)))
    else:
        source = data.source(split, run.config.data)
        probabilities = run.probabilities(source, f"scoring {split}")
    if jax.process_index() != 0:
        return {}
    predictions = predictions_of(data, split, probabilities)
    # Elsewhere they are the images that training held out only if they were moved there.
    root = images_root(workdir, saved)
    own = not data_dir or not os.path.exists(root) or root.samefile(data.folder.root)
    fits = split == "val" and own
    if fits:
        calibration = fitted = _fit_calibration(predictions)
    elif split == "val":
        say(f"note: no temperature is fitted, for the run's own val images are still in {root}")

    # Slow to import, and training's first step need not wait for it.
    from covid_flax.evaluation.assess import assess
    from covid_flax.evaluation.members import members_report
    from covid_flax.report.write import write_evaluation

    chosen_by_val = val_chose(checkpoint, run.config)
    report, predictions = assess(
        predictions,
        split=split,
        rows=() if data.elsewhere else data.rows,
        stopped_on="val" if chosen_by_val else None,
        folder=data.folder,
        trained_on=own_images(workdir, saved) if data.elsewhere else None,
        calibration=calibration,
        calibrated=calibrated,
        fitted_here=fits,
        prevalence=prevalence,
        statistics_fit=run.statistics_fit,
    )
    if answers is not None:
        report["members"] = members_report(predictions.labels, predictions.class_names, answers)
    report["checkpoint"] = checkpoint_record(run, checkpoint)
    report["data_dir"] = str(Path(data.folder.root).absolute())
    report["bad_images"] = dict(data.bad_images)
    report["not_images"] = dict(data.folder.ignored)
    if class_map:
        report["class_map"] = dict(class_map)
    if split == "val" and chosen_by_val:
        kept = sum(saved["data"]["images"].get("test", {}).values())
        report["note"] = "These images chose the epoch, so the figures are optimistic; " + (
            f"the run's {kept:,} test image{'s' if kept > 1 else ''} chose nothing (--split=test, "
            "once, at the end)."
            if kept
            else "a test split (data.nested_test, data.split_file, or grouped with "
            "data.test_fraction) is not."
        )
    say_what_is_replaced(output / "report.json", data, report)
    title = title_of(workdir, saved, split, data)
    about = saved | {"name": workdir.resolve().name}
    write_evaluation(output, report, predictions, title=title, run=about)
    if fits:
        try:
            of = report["checkpoint"]
            runs = {"runs": of["runs"]} if "runs" in of else {}
            _store_calibration(workdir, run.step, fitted | runs)
        except UserError as e:
            if output == workdir / "eval" / split:
                raise
            # Of a run that is another's to write.
            say(f"note: the temperature is not kept for --calibrated: {e}")
    print_report(report, output)
    return report


def stored_calibration(
    run: TrainedRun | Ensemble, saved: Mapping[str, Any], checkpoint: str, split: str, asked: bool
) -> dict[str, Any] | None:
    """What was fitted of that checkpoint's answers; None where nothing was, or it does not fit.

    Raises:
      UserError: there is none, and it was asked for; or calibration.json is damaged.
    """
    found = _read_calibrations(run.workdir / "calibration.json").get(str(run.step))
    if found is not None and found.get("runs") != checkpoint_record(run, checkpoint).get("runs"):
        found = None  # other steps of the members, with the same sum
    # Its val images were each answered by one run, all others by all of them together.
    if split != "val" and "members" in saved and is_cross_validation(run.config.data):
        if asked:
            raise UserError(
                f"{run.workdir} is a cross-validation: the temperature of its val images is of "
                "single runs' answers, not of their mean: leave --calibrated out"
            )
        return None
    if asked and found is None:
        raise UserError(
            f"{run.workdir} has no temperature for step {run.step}: score its validation split "
            f"first (--split=val --checkpoint={checkpoint})"
        )
    return found


def _read_calibrations(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        for entry in found.values():
            threshold = entry["abstain"]["threshold"]
            if not (
                entry["temperature"] > 0
                and isinstance(entry["split"], str)
                and (threshold is None or 0 <= threshold <= 1)
            ):
                raise ValueError(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: remove it, and score the validation split") from None
    return found


def _fit_calibration(predictions: Predictions) -> dict[str, Any]:
    from covid_flax.evaluation.calibration import fit_calibration

    return {"split": "val"} | fit_calibration(predictions.labels, predictions.probabilities)


def _store_calibration(workdir: Path, step: int, calibration: Mapping[str, Any]) -> None:
    path = workdir / "calibration.json"
    with locked(workdir):  # another evaluation may add its own
        write_json(path, _read_calibrations(path) | {str(step): calibration}, allow_nan=True)


def parse_prevalence(text: list[str], class_names: list[str]) -> dict[str, float] | None:
    """`CLASS=SHARE` of each, or one share for every class; None for nothing. UserError."""
    try:
        if len(text) == 1 and "=" not in text[0]:
            return {name: float(text[0]) for name in class_names}
        pairs = [part.rpartition("=") for part in text]
        shares = {name.strip(): float(share) for name, _, share in pairs}
        if len(shares) < len(pairs) or sum(shares.values()) > 1 + 1e-9:
            raise UserError(f"--prevalence={','.join(text)}: name a class once; together at most 1")
        return shares or None
    except ValueError:
        raise UserError(
            f"--prevalence={','.join(text)}: give a share for every class, or CLASS=SHARE,..."
        ) from None


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step")
    flags.DEFINE_enum("split", "val", (*PARTS, "all"), "which images")
    flags.DEFINE_string("data_dir", "", "another place of the run's images, or another folder")
    flags.DEFINE_list("class_map", [], CLASS_MAP_HELP)
    flags.DEFINE_bool("calibrated", False, "scale probabilities by the temperature fitted on val")
    flags.DEFINE_list(
        "prevalence", [], "a share for every class, or CLASS=SHARE,...: PPV and NPV there"
    )
    flags.DEFINE_string("output", "", "folder to write to; empty: DIR/eval/<split>")


def _main() -> None:
    f = flags.FLAGS
    workdir = expanded(f.workdir)
    evaluate(
        workdir,
        checkpoint=f.checkpoint,
        split=f.split,
        data_dir=f.data_dir,
        class_map=parse_class_map(f.class_map),
        calibrated=f.calibrated,
        prevalence=parse_prevalence(f.prevalence, saved_run(workdir)["class_names"]),
        output=expanded(f.output) if f.output else None,
    )


if __name__ == "__main__":
    _define_flags()
    run_command(_main, together=True)
