"""The two pictures of a run: curves by epoch (the paper's Figure 1) and the confusion matrix.

Each comes as a function that builds the figure and one that writes it as PNG. The figures are
made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from covid_flax.errors import UserError
from covid_flax.files import parse_json, write_atomically

# Okabe and Ito's colours, told apart by all common kinds of colour vision; the line styles differ
# as well, for grey prints.
_LINES = {
    "train": {"label": "training", "color": "#0072B2", "linestyle": "-"},
    "val": {"label": "validation", "color": "#D55E00", "linestyle": "--"},
}
_DPI = 150
_LINE = 22  # characters of a class name
_MANY = 20  # classes: their cells hold no more than a number


def plot_confusion_matrix(
    report: Mapping[str, Any], path: Path, title: str = "Confusion matrix"
) -> None:
    """Writes `confusion_matrix_figure` to `path` as PNG, whole or not at all."""
    names = report["class_names"]
    font = get_font(findfont(FontProperties()))
    if not all(font.get_char_index(ord(c)) for c in "".join(map(str, names)) if c.isprintable()):
        # The font has no letters for them (the page's pictures use the reader's fonts).
        names = [f"class {i} of report.json" for i in range(1, len(names) + 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the title's
        _save(confusion_matrix_figure({**report, "class_names": names}, title), path)


def plot_curves(metrics_jsonl: Path, path: Path, *, best_epoch: int | None = None) -> None:
    """Writes `curves_figure` of a run's metrics.jsonl to `path` as PNG, whole or not at all.

    Raises:
      UserError: the file is missing, damaged or without a record.
    """
    _save(curves_figure(read_metrics(metrics_jsonl), best_epoch=best_epoch), path)


def read_metrics(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
      UserError: the file is missing, damaged or without a record.
    """
    try:
        lines = Path(metrics_jsonl).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {metrics_jsonl}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            record["split"], record["epoch"], record["loss"], record["accuracy"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{metrics_jsonl}, line {number} is no record of metrics: remove the line"
            ) from error
        records.append(record)
    if not records:
        raise UserError(f"{metrics_jsonl} holds no metrics: train at least one epoch first")
    return records


def confusion_matrix_figure(report: Mapping[str, Any], title: str = "Confusion matrix") -> Figure:
    """Counts and row percentages of a report (of `metrics.classification_report`).

    Rows are the true classes and columns the predicted ones, as the axes say; the percentage is
    of the images of that true class, and the shade follows it. A class without images has none.
    Of more than 20 classes only counts above 0 are written.
    """
    matrix = np.asarray(report["confusion_matrix"], np.int64)
    k = len(report["class_names"])
    lines = 3 if k <= 12 else 2 if k <= 18 else 1  # of a name, in a cell's height

    def wrapped(names: Sequence[str]) -> list[str]:
        return [textwrap.fill(n, _LINE, max_lines=lines, placeholder=" …") for n in names]

    names = wrapped([str(name) for name in report["class_names"]])
    if len(set(names)) < k:  # cut alike
        names = wrapped([f"{i}. {name}" for i, name in enumerate(report["class_names"], 1)])
    support = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, support, out=np.zeros(matrix.shape), where=support > 0)

    figure = Figure(figsize=(8, 7.4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    cmap = colormaps["Blues"]
    axes.imshow(share, cmap=cmap, vmin=0, vmax=1)
    size = float(np.clip(100 / k, 6, 14))
    percent = ".1f" if k <= 8 else ".0f"
    for i in range(k):
        for j in range(k):
            if k > _MANY and not matrix[i, j]:
                continue
            text = f"{matrix[i, j]:,}"
            if support[i, 0] and k <= _MANY:
                text += f"\n{100 * share[i, j]:{percent}} %"
            red, green, blue, _ = cmap(share[i, j])
            bright = 0.299 * red + 0.587 * green + 0.114 * blue
            axes.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=size,
                color="black" if bright > 0.5 else "white",
            )
    slanted = k > 4 or max(len(line) for name in names for line in name.split("\n")) > 16
    label_size = float(np.clip(80 / k, 8, 12))
    # Names are shown as they are: a $ in one must not start a formula.
    axes.set_xticks(
        range(k),
        names,
        fontsize=label_size,
        parse_math=False,
    )
    if slanted:
        for tick in axes.get_xticklabels():
            tick.set(rotation=45, horizontalalignment="right", rotation_mode="anchor")
    axes.set_yticks(range(k), names, fontsize=label_size, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=13)
    axes.set_ylabel("true class", fontsize=13)
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.8", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    images = f"{report['num_examples']:,} image{'s' * (report['num_examples'] != 1)}"
    axes.set_title(
        f"{title}\naccuracy {100 * report['accuracy']:.2f} % of {images}",
        fontsize=13,
        parse_math=False,
    )
    return figure


def curves_figure(records: Iterable[Mapping[str, Any]], *, best_epoch: int | None = None) -> Figure:
    """Accuracy and loss by epoch, side by side, training and validation lines in both.

    Args:
      records: of metrics.jsonl: `epoch`, `split` (train or val), `loss`, `accuracy`. Of several
        records of one split and epoch, as a resumed run may leave them, the last counts.
      best_epoch: the epoch to mark; None marks the lowest validation loss, the first of equals.
    """
    by_split: dict[str, dict[int, Mapping[str, Any]]] = {split: {} for split in _LINES}
    for record in records:
        if record["split"] in by_split:
            by_split[record["split"]][record["epoch"]] = record
    validation = by_split["val"]
    if best_epoch is None:
        losses = {e: validation[e]["loss"] for e in sorted(validation)}
        losses = {e: loss for e, loss in losses.items() if not math.isnan(loss)}
        best_epoch = min(losses, key=losses.__getitem__) if losses else None

    figure = Figure(figsize=(10, 4.3), dpi=_DPI, layout="constrained")
    epochs = sorted({epoch for split in by_split.values() for epoch in split})
    for axes, key in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for split, style in _LINES.items():
            shown = sorted(by_split[split])
            if shown:
                values = [by_split[split][epoch][key] for epoch in shown]
                marker = "o" if len(epochs) <= 30 else None
                axes.plot(shown, values, marker=marker, markersize=4, linewidth=1.8, **style)
        if best_epoch in epochs:
            label = f"best epoch ({best_epoch})"
            axes.axvline(best_epoch, color="0.35", linestyle=":", linewidth=1.5, label=label)
            if best_epoch in validation:
                axes.plot(
                    [best_epoch],
                    [validation[best_epoch][key]],
                    linestyle="none",
                    marker="o",
                    markersize=10,
                    markerfacecolor="none",
                    markeredgecolor="black",
                    markeredgewidth=1.5,
                )
        axes.set_xlabel("epoch", fontsize=13)
        axes.set_ylabel(key, fontsize=13)
        axes.set_title(f"{key.capitalize()} by epoch", fontsize=14)
        axes.tick_params(labelsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.grid(color="0.9")
        axes.legend(fontsize=11)
    return figure


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    # Tight: a constrained layout may leave a label over the edge beside an image of equal aspect.
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    write_atomically(path, buffer.getvalue())
