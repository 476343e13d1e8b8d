"""The files of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covid_flax.data.groups import groups_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.predictions import Predictions, predictions_csv
from covid_flax.files import write_atomically, write_json


def write_evaluation(
    output: Path,
    report: Mapping[str, Any],
    predictions: Predictions,
    *,
    title: str = "Confusion matrix",
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes report.json, report.html, predictions.csv and confusion_matrix.png into `output`.

    And groups.csv, where the images' groups are known: what is compared later is resampled alike.
    Each file is written whole or not at all; the folder is made if it is not there.

    Args:
      output: the folder.
      report: of covid_flax.evaluation.assess.assess.
      predictions: of the same images.
      title: of the picture and the page.
      run: config.json of the run, for the page.

    Raises:
      ValueError: the predictions do not fit the report.
      UserError: the folder cannot be written, or holds a groups.csv of something else.
    """
    # Here, for matplotlib need not load before training's first step.
    from covid_flax.report.page import write_report_page
    from covid_flax.report.plots import plot_confusion_matrix

    output = Path(output)
    refuse_foreign_groups(output)
    n = report["num_examples"]
    if len(predictions.files) != n or list(predictions.class_names) != report["class_names"]:
        raise ValueError(f"{len(predictions.files)} predictions for a report on {n} images")
    write_atomically(output / "predictions.csv", predictions_csv(predictions))
    if predictions.groups:
        listed = groups_csv(predictions.files, predictions.groups)
        write_atomically(output / "groups.csv", listed)
    else:
        (output / "groups.csv").unlink(missing_ok=True)  # of an earlier evaluation
    plot_confusion_matrix(report, output / "confusion_matrix.png", title)
    write_report_page(output / "report.html", report, predictions, title=title, run=run)
    # Last, so that a script that waits for it finds the others.
    write_json(output / "report.json", report)


def refuse_foreign_groups(output: Path) -> None:
    """Where a groups.csv would be lost that no evaluation wrote. Raises UserError."""
    listed = output / "groups.csv"
    if listed.exists() and not (output / "predictions.csv").exists():
        raise UserError(f"{listed} is of no evaluation and would be lost: choose another --output")
