"""From predictions to a report: figures with intervals, calibration, and what weakens them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from covid_flax.data.folder import DataFolder
from covid_flax.data.splits import MANY_ALIKE, Row, named_alike, regrouped
from covid_flax.evaluation.alarms import (
    Alarm,
    Evidence,
    checks_made,
    count_sources,
    duplicate_leak,
    find_alarms,
    group_leak,
    groups_unknown,
)
from covid_flax.evaluation.calibration import temperature_scale
from covid_flax.evaluation.intervals import share_interval
from covid_flax.evaluation.metrics import (
    classification_report,
    expected_calibration_error,
    log_loss,
    negative_log_likelihood,
)
from covid_flax.evaluation.predictions import Predictions


def assess(
    predictions: Predictions,
    *,
    split: str,
    rows: Sequence[Row] = (),
    stopped_on: str | None = None,
    folder: DataFolder | None = None,
    trained_on: tuple[DataFolder | None, Sequence[Row]] | None = None,
    calibration: Mapping[str, Any] | None = None,
    calibrated: bool = False,
    fitted_here: bool = False,
    prevalence: Mapping[str, float] | None = None,
    statistics_fit: bool | None = None,
) -> tuple[dict[str, Any], Predictions]:
    """All that `report.json` says of predictions, whoever made them.

    Args:
      predictions: of the images scored.
      split: their name.
      rows: the split they belong to, all of its images; empty for images of another folder.
      stopped_on: the split that chose the epoch or the settings, if one did.
      folder: where the images lie, for their sources and for files of the same content.
      trained_on: for images of another folder: the run's own folder, None where it is gone, and
        its split.
      calibration: of `calibration.fit_calibration`.
      calibrated: whether to scale the probabilities by it.
      fitted_here: whether it was fitted to these predictions.
      prevalence: share of each class where the test would be used, see
        `classification_report`.
      statistics_fit: see `TrainedRun`.

    Returns:
      The report, and the predictions it is of (scaled, where asked).
    """
    before = predictions
    if calibration is not None:
        after = dataclasses.replace(
            predictions,
            probabilities=temperature_scale(predictions.probabilities, calibration["temperature"]),
        )
        if calibrated:
            predictions = after
    report = classification_report(
        predictions.labels,
        predictions.probabilities,
        predictions.class_names,
        loss=log_loss(predictions.labels, predictions.probabilities),
        clusters=predictions.clusters,
        prevalence=prevalence,
    )
    report["split"], report["stopped_on"] = split, stopped_on
    report["calibration"] = report["abstain"] = None
    if calibration is not None:
        both = {"before": before, "after": after}
        report["calibration"] = {
            "applied": calibrated,
            "fitted_here": fitted_here,
            "temperature": calibration["temperature"],
            "fitted_on": calibration["split"],
            "ece": {
                when: expected_calibration_error(p.labels, p.probabilities)
                for when, p in both.items()
            },
            "nll": {
                when: float(negative_log_likelihood(p.labels, p.probabilities).mean())
                for when, p in both.items()
            },
        }
        report["abstain"] = _abstain(after, calibration["abstain"])

    evidence = _evidence(report, predictions, split, rows, stopped_on, folder)
    evidence = dataclasses.replace(evidence, statistics_fit=statistics_fit)
    alarms = find_alarms(evidence)
    # Rows are the truth here by construction, so that check could not fail.
    checked = [name for name in checks_made(evidence) if name != "swapped-axes"]
    found: Alarm | None = None
    if trained_on is not None and folder is not None:
        found = _trained_on_these(folder, predictions, *trained_on)
        if found is not None or (trained_on[0] is not None and trained_on[1]):
            checked.append("duplicate-leak")
    elif split not in ("train", "all") and "group-leak" not in [alarm.name for alarm in alarms]:
        found = _leak_by_the_folder_s_groups(folder, rows, split)
        if found is not None and "group-leak" not in checked:
            checked.append("group-leak")
    if found is not None:
        alarms.insert(0 if found.level == "alarm" else len(alarms), found)
    if not rows:
        named = predictions.groups or [""] * len(predictions.files)
        listed = [Row(file, "", "", g) for file, g in zip(predictions.files, named, strict=True)]
        checked.append("groups-unknown")
        if (unknown := groups_unknown(listed, of_a_split=False)) is not None:
            alarms.append(unknown)
    report["alarms"] = [dataclasses.asdict(alarm) for alarm in alarms]
    report["alarms_checked"] = checked
    return report, predictions


def _abstain(predictions: Predictions, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What is left, and how right it is, where less certain predictions are withheld."""
    threshold = chosen["threshold"]
    found: dict[str, Any] = {**chosen, "coverage": None, "accuracy": None}
    found["accuracy_interval"] = None
    if threshold is None:
        return found
    kept = predictions.probabilities.max(1) >= threshold
    right = (predictions.predicted == predictions.labels)[kept]
    found["coverage"] = float(kept.mean())
    if len(right):
        found["accuracy"] = float(right.mean())
        found["accuracy_interval"] = share_interval(right, predictions.clusters[kept])
    return found


def _evidence(
    report: Mapping[str, Any],
    predictions: Predictions,
    split: str,
    rows: Sequence[Row],
    stopped_on: str | None,
    folder: DataFolder | None,
) -> Evidence:
    labels = [predictions.class_names[i] for i in predictions.labels]
    hashes = sources = None
    if folder is not None:
        source = {f.file: f.source for f in folder.files}
        sources = count_sources(labels, [source.get(file, "") for file in predictions.files])
        if rows:
            scored = {row.file: row.file for row in rows if row.split == split}
            others = {row.file: row.file for row in rows if row.split != split}
            hashes = _hashes_of_equal_sizes(folder, scored, folder, others)
    return Evidence(
        matrix=report["confusion_matrix"],
        class_names=predictions.class_names,
        rows=rows,
        scored=split if rows else None,
        stopped_on=stopped_on,
        files=predictions.files,
        hashes=hashes,
        source_counts=sources or None,
    )


def _trained_on_these(
    folder: DataFolder, predictions: Predictions, own: DataFolder | None, rows: Sequence[Row]
) -> Alarm | None:
    """Whether files of another folder are ones that the run trained on or stopped by.

    A caution where only their names are.
    """
    scored = {f"{folder.root}/{file}": file for file in predictions.files}
    same = None
    if own is not None:
        # Without a label: of another folder.
        here = [row.file for row in rows if row.split != "test" and row.label]
        fitted = {f"{own.root}/{file}": file for file in here}
        same = duplicate_leak(
            [Row(file, "", "", "") for file in fitted],
            [Row(file, "", "", "") for file in scored],
            _hashes_of_equal_sizes(folder, scored, own, fitted),
        )
    alike = named_alike(predictions.files, rows)
    if same is not None or alike < MANY_ALIKE * len(scored):
        return same
    return Alarm(
        "duplicate-leak",
        "caution",
        f"{alike:,} of {len(scored):,} scored files bear the name of one that was trained on or "
        "chose the epoch: are they copies, re-encoded?",
        {"images": alike, "share": alike / len(scored)},
    )


def _leak_by_the_folder_s_groups(
    folder: DataFolder | None, rows: Sequence[Row], split: str
) -> Alarm | None:
    """What the folder says now, which may be more than when the split was made."""
    if folder is None or folder.groups is None:
        return None
    known = regrouped(rows, folder.groups)
    return group_leak(
        [row for row in known if row.split not in (split, "test")],
        [row for row in known if row.split == split],
    )


def _hashes_of_equal_sizes(
    folder: DataFolder, scored: Mapping[str, str], own: DataFolder, others: Mapping[str, str]
) -> dict[str, str]:
    """Content hashes, by key, of the files that have the size of one on the other side.

    Files of different size differ, so only some need to be read.
    """
    sides = []
    for tree, files in ((folder, scored), (own, others)):
        there = {f.file for f in tree.files}
        sides.append({k: tree.num_bytes(f) for k, f in files.items() if f in there})
    both = set(sides[0].values()) & set(sides[1].values())
    return {
        key: hashlib.sha256(tree.read(files[key])).hexdigest()
        for (tree, files), sizes in zip(((folder, scored), (own, others)), sides, strict=True)
        for key, size in sizes.items()
        if size in both
    }
