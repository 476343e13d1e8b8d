"""The pictures of an evaluation's page, each an SVG inside an `<img>` that loads nothing.

Made without pyplot, as in covid_flax.report.plots. Text stays text: it is drawn by the reader's
own fonts, so names of any script show, and the file is small.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covid_flax.evaluation import curves
from covid_flax.evaluation.predictions import Predictions
from covid_flax.report.plots import confusion_matrix_figure

# Okabe and Ito's colours, told apart by all common kinds of colour vision; the line styles differ
# as well, for grey prints.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
# For `matplotlib.rc_context`, around the making of a figure as well as its drawing.
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a class name must not start a formula
    "svg.fonttype": "none",
    "svg.hashsalt": "covid_flax",
}
_WIDTH = 5.0  # inches
_NAME_LENGTH = 22


def picture(figure: Figure, alt: str) -> Markup:
    """The figure as an `<img>` that holds its own SVG; `alt` says what it shows, in words.

    Make the figure in `rc_context(STYLE)`, for the looks of the other pictures.
    """
    buffer = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # The reader's fonts draw the text; ours only measure it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.08, metadata=none)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r">\s+<", "><", re.sub(r' d="[^"]*"', _shorten, text))
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    assert size is not None
    return Markup(
        '<img src="data:image/svg+xml;base64,{}" alt="{}" width="{}" height="{}">'
    ).format(
        base64.b64encode(text.encode("utf-8", "replace")).decode(),
        alt,
        *(round(float(x) * 4 / 3) for x in size.groups()),
    )


def _shorten(path: re.Match[str]) -> str:
    """One decimal of a point is a tenth of a pixel."""
    return re.sub(r"\d+\.\d{2,}", lambda n: f"{float(n[0]):.1f}", path[0]).replace("\n", "")


def evaluation_pictures(report: Mapping[str, Any], predictions: Predictions) -> dict[str, Markup]:
    """Every picture of the page by name: confusion, reliability, roc, precision_recall,
    risk_coverage, decision.

    Args:
      report: of covid_flax.evaluation.metrics.classification_report, perhaps with `abstain`.
      predictions: of the same images.
    """
    names = short_names(report["class_names"])
    auroc, auprc = (_areas(report, key) for key in ("auroc", "auprc"))
    listed = ", ".join(names)
    right = f"accuracy {100 * report['accuracy']:.1f} %"
    with rc_context(STYLE):
        return {
            "confusion": picture(
                _confusion(report, names),
                f"Confusion matrix of {listed}; {right}. The same as a table stands below.",
            ),
            "reliability": picture(
                reliability_figure(predictions),
                "Reliability diagram: accuracy by top probability, with the number of images of "
                "each bin.",
            ),
            "roc": picture(
                roc_figure(predictions, names, auroc),
                f"ROC curves, one class against the rest; areas: {_listed(names, auroc)}.",
            ),
            "precision_recall": picture(
                precision_recall_figure(predictions, names, auprc),
                "Precision-recall curves, one class against the rest; areas: "
                f"{_listed(names, auprc)}.",
            ),
            "risk_coverage": picture(
                risk_coverage_figure(predictions, _abstain(report)),
                "Error rate of the images kept, by the share of images kept.",
            ),
            "decision": picture(
                decision_figure(predictions, names),
                f"Decision curves of {listed}: net benefit by threshold probability.",
            ),
        }


def _abstain(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The threshold, where it is of the probabilities shown: it is one of scaled ones."""
    calibration = report.get("calibration")
    applied = calibration is None or calibration.get("applied")
    return report.get("abstain") if applied else None


def _areas(report: Mapping[str, Any], key: str) -> list[str]:
    values = [report["per_class"][name].get(key) for name in report["class_names"]]
    return ["undefined" if x is None else f"{x:.3f}" for x in values]


def _listed(names: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def short_names(
    names: Sequence[str], length: int = _NAME_LENGTH, *, ends: bool = False
) -> list[str]:
    """Names that fit a picture, still different, without what no XML may hold.

    Args:
      names: of classes or runs.
      length: at most so many characters of a name, and its number where that leaves two alike.
      ends: keep the end of a long name, not its beginning.
    """
    clean = [
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in n) for n in names
    ]
    cut = [f"…{n[1 - length :]}" if ends else f"{n[: length - 1]}…" for n in clean]
    short = [n if len(n) <= length else c for n, c in zip(clean, cut, strict=True)]
    if len(set(short)) < len(short):
        short = [f"{i}. {n}" for i, n in enumerate(short, 1)]
    return short


def _confusion(report: Mapping[str, Any], names: Sequence[str]) -> Figure:
    figure = confusion_matrix_figure({**report, "class_names": names}, "Confusion matrix")
    (axes,) = figure.axes
    axes.grid(False, which="major")
    if len(names) <= 4 and max(map(len, names)) <= 16:
        figure.set_size_inches(_WIDTH, _WIDTH)  # the same letters on less paper, for phones
        if sum(map(len, names)) > 24:
            for label in axes.get_xticklabels():
                label.set(rotation=35, horizontalalignment="right", rotation_mode="anchor")
    return figure


def reliability_figure(predictions: Predictions) -> Figure:
    """Accuracy against top probability by bin with Wilson intervals, and the images of each bin."""
    bins = curves.reliability(predictions.labels, predictions.probabilities)
    figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    upper.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1.2)
    some = bins.count > 0
    x, y = bins.confidence[some], bins.accuracy[some]
    errors = np.clip([y - bins.low[some], bins.high[some] - y], 0, None)
    style = {"fmt": "o-", "color": _COLORS[0], "markersize": 4.5, "linewidth": 1.4}
    upper.errorbar(x, y, errors, capsize=2.5, **style)
    upper.set(ylabel="share right", xlim=(0, 1.01), ylim=(0, 1.02))
    widths = np.diff(bins.edges)
    lower.bar(bins.edges[:-1], bins.count, widths, align="edge", color=_COLORS[0], alpha=0.75)
    # Linear below ten, so that a bin of one image shows and an empty one does not.
    lower.set_yscale("symlog", linthresh=10)
    most = max(int(bins.count.max()), 10)
    lower.set_yticks([0, *(10**i for i in range(1, len(str(most))))])
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.minorticks_off()
    lower.set(xlabel="top probability", ylabel="images")
    lower.set_ylim(bottom=0)
    return figure


def roc_figure(predictions: Predictions, names: Sequence[str], areas: Sequence[str]) -> Figure:
    """One curve a class against the rest; a class without both kinds of images has none.

    `areas` are the texts of the AUROC of each, for the legend.
    """
    figure, axes = _square()
    axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1.2)
    for i, name in enumerate(names):
        curve = curves.roc(predictions.labels == i, predictions.probabilities[:, i])
        if curve is not None:
            x, y = curve.false_positive_rate, curve.true_positive_rate
            axes.plot(*thin(x, y), label=_label(name, areas[i]), **_line(i))
    axes.set(xlabel="false positive rate", ylabel="sensitivity")
    _legend(figure, axes)
    return figure


def precision_recall_figure(
    predictions: Predictions, names: Sequence[str], areas: Sequence[str]
) -> Figure:
    """One curve a class against the rest; a mark at the left is the share of the class.

    `areas` are the texts of the AUPRC of each, for the legend.
    """
    figure, axes = _square()
    for i, name in enumerate(names):
        positive = predictions.labels == i
        curve = curves.precision_recall(positive, predictions.probabilities[:, i])
        if curve is not None:
            style = _line(i)
            # In steps, so that the area under the line is the one in the legend.
            x, y = np.repeat(curve.recall, 2)[:-1], np.repeat(curve.precision, 2)[1:]
            axes.plot(*thin(x, y), label=_label(name, areas[i]), **style)
            axes.plot([-0.02, 0.03], [positive.mean()] * 2, color=style["color"], linewidth=2.5)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    _legend(figure, axes)
    return figure


def decision_figure(predictions: Predictions, names: Sequence[str]) -> Figure:
    """Net benefit of the model, of acting on all and on none, in a small picture for each class."""
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(_WIDTH, 0.6 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    thresholds = np.linspace(0.01, 0.99, 99)
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.set_visible(False)
            continue
        positive = predictions.labels == i
        curve = curves.decision_curve(positive, predictions.probabilities[:, i], thresholds)
        axes.axhline(0, color="0.35", linestyle=":", linewidth=1.2, label="act on none")
        every = {"color": "0.5", "linestyle": "--", "linewidth": 1.2, "label": "act on all"}
        axes.plot(thresholds, curve.treat_all, **every)
        axes.plot(thresholds, curve.model, color=_COLORS[0], linewidth=1.8, label="model")
        top = max(positive.mean(), 0.01)
        axes.set(xlim=(0, 1), ylim=(-0.25 * top, 1.12 * top))
        axes.set_title(names[i])
        axes.tick_params(labelsize=10)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.locator_params(axis="y", nbins=4)
    figure.supxlabel("threshold probability", fontsize=12)
    figure.supylabel("net benefit", fontsize=12)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def risk_coverage_figure(
    predictions: Predictions, abstain: Mapping[str, Any] | None = None
) -> Figure:
    """Error among the images kept by the share kept; the abstain threshold marked if known."""
    curve = curves.risk_coverage(predictions.labels, predictions.probabilities)
    figure, axes = _square()
    top = max(100 * float(np.max(curve.risk)), 1.0)
    x, y = thin(curve.coverage, 100 * curve.risk / top)
    axes.plot(100 * x, top * y, color=_COLORS[0], linewidth=1.8)
    if abstain and abstain.get("threshold") is not None and abstain.get("accuracy") is not None:
        x, y = 100 * abstain["coverage"], 100 * (1 - abstain["accuracy"])
        axes.axvline(x, color=_COLORS[1], linestyle="--", linewidth=1.2)
        label = f"threshold {abstain['threshold']:.3f}"
        axes.plot([x], [y], "o", color=_COLORS[1], markersize=7, label=label)
        axes.legend(loc="upper left")
    axes.set(xlabel="images kept (%)", ylabel="error among them (%)")
    axes.set(xlim=(0, 101), ylim=(-0.02 * top, 1.15 * top))
    return figure


def thin(x: np.ndarray, y: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points of a line in the unit square, so that it looks the same.

    Ramer's and Douglas & Peucker's rule: a point stays if the line without it would pass it by
    more than a thousandth, or what else it takes.

    Args:
      x, y: floats [P].
      most: points left, at least 2.

    Returns:
      Some of `x` and the same of `y`, the ends among them.
    """
    points = np.column_stack([x, y]).astype(np.float64)
    tolerance = 1e-3
    while True:
        kept, parts = {0, len(points) - 1}, [(0, len(points) - 1)]
        while parts and len(kept) <= most:
            first, last = parts.pop()
            if last - first < 2:
                continue
            chord, between = points[last] - points[first], points[first + 1 : last] - points[first]
            length = np.hypot(*chord)
            away = (
                np.abs(between @ [chord[1], -chord[0]]) / length
                if length > 0
                else np.hypot(*between.T)
            )
            if away.max() > tolerance:
                middle = first + 1 + int(away.argmax())
                kept.add(middle)
                parts += [(first, middle), (middle, last)]
        if len(kept) <= most:
            indices = sorted(kept)
            return points[indices, 0], points[indices, 1]
        tolerance *= 1.5


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return figure, axes


def _line(i: int) -> dict[str, Any]:
    return {
        "color": _COLORS[i % len(_COLORS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "linewidth": 1.7,
    }


def _label(name: str, area: str) -> str:
    """Of a curve. Matplotlib's legends leave out what begins with `_`."""
    return f"{' ' * name.startswith('_')}{name} {area}"


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where no curve runs."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 24 else 1
        rows = -(-len(labels) // columns)
        figure.set_size_inches(_WIDTH, _WIDTH + 0.2 * max(rows - 2, 0))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
