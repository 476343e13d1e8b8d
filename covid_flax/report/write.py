"""The files of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covid_flax.data.groups import groups_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.predictions import COLUMNS, Predictions, predictions_csv
from covid_flax.files import refuse_foreign, write_atomically, write_json, written_together

# report.json last, so that a script that waits for it finds the others; predictions.csv before
# groups.csv, which is an evaluation's where there is one.
_FILES = ("predictions.csv", "groups.csv", "confusion_matrix.png", "report.html", "report.json")


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
      UserError: the folder cannot be written, or holds such files of something else.
    """
    # Here, for matplotlib need not load before training's first step.
    from covid_flax.report.page import write_report_page
    from covid_flax.report.plots import plot_confusion_matrix

    output = Path(output)
    refuse_foreign_files(output)
    n = report["num_examples"]
    if len(predictions.files) != n or list(predictions.class_names) != report["class_names"]:
        raise ValueError(f"{len(predictions.files)} predictions for a report on {n} images")
    with written_together(output, _FILES) as part:
        write_atomically(part / "predictions.csv", predictions_csv(predictions))
        if predictions.groups:
            listed = groups_csv(predictions.files, predictions.groups)
            write_atomically(part / "groups.csv", listed)
        plot_confusion_matrix(report, part / "confusion_matrix.png", title)
        write_report_page(part / "report.html", report, predictions, title=title, run=run)
        write_json(part / "report.json", report)


def refuse_foreign_files(output: Path) -> None:
    """Where files would be lost that no evaluation wrote. Raises UserError."""
    table, listed = output / "predictions.csv", output / "groups.csv"
    foreign = listed if listed.exists() and not table.exists() else None
    if table.exists():
        with open(table, "rb") as file:
            if not file.readline().startswith(",".join([*COLUMNS, ""]).encode()):
                foreign = table
    if not table.exists() and foreign is None:
        rest = [name for name in reversed(_FILES) if name not in (table.name, listed.name)]
        refuse_foreign(output, rest, "num_examples")
    if foreign:
        raise UserError(f"{foreign} is of no evaluation and would be lost: choose another --output")
