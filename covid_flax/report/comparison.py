"""The page that `covid_flax.compare` writes, in the house style of covid_flax.report.page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from covid_flax.report.page import count, figure3, percent, render, with_interval
from covid_flax.report.pictures import STYLE, picture, short_names
from covid_flax.report.summary import checkpoint_of

_COLUMNS = (
    ("accuracy", "Accuracy", percent),
    ("balanced_accuracy", "Balanced accuracy", percent),
    ("macro_f1", "F1", figure3),
    ("macro_auroc", "AUROC", figure3),
    ("ece", "ECE", figure3),
    ("nll", "NLL", figure3),
)
_SHOWN = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"}
_MARKS = (("o", "#0072B2"), ("s", "#D55E00"))  # Okabe and Ito's colours


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The HTML of compare.html, from what `covid_flax.compare.compare` returned."""
    runs, against = comparison["runs"], comparison["against_first"]
    names, classes = [run["name"] for run in runs], comparison["class_names"]
    first = names[0]
    return render(
        "compare.html.j2",
        title=f"{first} and {names[1]}" if len(names) == 2 else f"{len(names)} runs compared",
        first=first,
        best=_best(runs),
        images=comparison["num_examples"],
        split=comparison["split"],
        clusters=comparison["clusters"] if comparison["groups_known"] else None,
        resamples=comparison["resamples"],
        verdicts=[_verdict(entry) for entry in against],
        cautions=[
            {
                "name": f"{item['name'].replace('-', ' ').capitalize()}: {', '.join(item['runs'])}",
                "level": item["level"],
                "text": item["text"],
                "figures": [],
            }
            for item in comparison["cautions"]
        ],
        figures={
            "head": ["Run", *(label for _, label, _ in _COLUMNS)],
            "rows": [
                [_heading(run), *(_cell(run["figures"][key], form) for key, _, form in _COLUMNS)]
                for run in runs
            ],
        },
        recall={
            "head": ["Run", *classes],
            "rows": [
                [run["name"], *(_cell(run["figures"]["recall"][c], percent) for c in classes)]
                for run in runs
            ],
        },
        against=_pair_table(against, f"Less {first}", both=False),
        pairs=_pair_table(comparison["pairs"], "Pair", both=True) if len(runs) > 2 else None,
        pictures=_pictures(comparison),
        facts=[(run["name"], _origin(run)) for run in runs],
    )


def _heading(run: Mapping[str, Any]) -> Markup:
    model = Markup('<br><span class="soft">{}</span>').format(run["model"]) if run["model"] else ""
    return Markup("{}{}").format(run["name"], model)


def _cell(figure: Mapping[str, Any], form: Any) -> Markup:
    return with_interval(figure["value"], figure["interval"], form)


def _origin(run: Mapping[str, Any]) -> str:
    """Where the figures of a run come from."""
    parts = [run["folder"]]
    if scored := checkpoint_of(run):
        parts.append(scored)
    if run["calibrated"]:
        parts.append("probabilities scaled by the temperature fitted on val")
    return ", ".join(parts)


def _points(x: float | None) -> str:
    """A difference of shares as `+1.2`, in percentage points."""
    return "–" if x is None else f"{100 * x:+.1f}".replace("-", "−")


def _thousandths(x: float | None) -> str:
    """A difference of figures as `+0.012`."""
    return "–" if x is None else f"{x:+.3f}".replace("-", "−")


def _difference(figure: Mapping[str, Any], form: Any = _points) -> Markup:
    text = Markup('<span class="figure">{}</span>').format(form(figure["value"]))
    if not figure["interval"]:
        return text
    low, high = map(form, figure["interval"])
    return text + Markup(' <span class="interval">({} to {})</span>').format(low, high)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _best(runs: Sequence[Mapping[str, Any]]) -> str:
    """Whose accuracy is greatest; all that tie."""
    accuracy = {run["name"]: run["figures"]["accuracy"]["value"] for run in runs}
    return ", ".join(name for name, a in accuracy.items() if a == max(accuracy.values()))


def _verdict(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What one run's accuracy against the first's shows, in words that the template joins."""
    accuracy, test = entry["difference"]["accuracy"], entry["mcnemar"]
    # Of many equally good runs some differ from the first by their own intervals.
    interval = accuracy["joint_interval"]
    shown = "no interval"
    if test["only_first"] == test["only_second"] == 0:
        shown = "right and wrong on the same images"
    elif interval:
        shown = "no difference shown"
        if interval[0] > 0:
            shown = "better"
        if interval[1] < 0:
            shown = "worse"
    return {
        "name": entry["second"],
        "shown": shown,
        "difference": _difference(accuracy),
        "p": _p(test["p_holm"]),
        "only_first": test["only_first"],
        "only_second": test["only_second"],
    }


def _pair_table(entries: Sequence[Mapping[str, Any]], corner: str, *, both: bool) -> dict[str, Any]:
    several = len(entries) > 1
    head = [corner, "Accuracy", "Balanced accuracy", "AUROC"]
    head += (
        ["Only the first right", "Only the second right"]
        if both
        else ["Alone right", "Alone wrong"]
    )
    head += ["McNemar p", "after Holm"][: 2 if several else 1]
    rows = []
    for entry in entries:
        difference, test = entry["difference"], entry["mcnemar"]
        alone = [count(test["only_second"]), count(test["only_first"])]
        rows.append(
            [
                f"{entry['second']} less {entry['first']}" if both else entry["second"],
                _difference(difference["accuracy"]),
                _difference(difference["balanced_accuracy"]),
                _difference(difference["macro_auroc"], _thousandths),
                *(alone[::-1] if both else alone),
                _p(test["p"]),
                *([_p(test["p_holm"])] if several else []),
            ]
        )
    return {"head": head, "rows": rows}


def _pictures(comparison: Mapping[str, Any]) -> dict[str, Markup]:
    runs, against = comparison["runs"], comparison["against_first"]
    first, *others = short_names([run["name"] for run in runs], ends=True)
    values = {key: [run["figures"][key] for run in runs] for key in _SHOWN}
    differences = {key: [entry["difference"][key] for entry in against] for key in _SHOWN}
    with rc_context(STYLE):
        return {
            "each": picture(
                forest_figure([first, *others], values, "%"),
                "Accuracy and balanced accuracy of each run with 95 % intervals; the same as in "
                "the table above.",
            ),
            "less": picture(
                forest_figure(others, differences, f"points more than {first}", zero=True),
                f"Differences of accuracy and balanced accuracy from {first} with paired 95 % "
                "intervals; the same as in the table above.",
            ),
        }


def forest_figure(
    names: Sequence[str],
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    unit: str,
    *,
    zero: bool = False,
) -> Figure:
    """A row a name, and in it a dot with its interval for each of one or two figures.

    Args:
      names: of the rows, from above.
      figures: by a key of accuracy and balanced_accuracy, `value` and `interval` of each row, as
        shares.
      unit: label of the axis, in percent or points.
      zero: draw a line there.
    """
    figure = Figure(figsize=(5.0, 1.3 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    if zero:
        axes.axvline(0, color="0.4", linewidth=1.2)
    for i, (key, row) in enumerate(figures.items()):
        (mark, color), offset = _MARKS[i], 0.16 * (2 * i - len(figures) + 1)
        for y, entry in enumerate(row):
            if entry["value"] is None:
                continue
            if entry["interval"]:
                ends = [100 * x for x in entry["interval"]]
                axes.plot(ends, [y + offset] * 2, color=color, linewidth=1.8)
            label = _SHOWN[key] if y == 0 else None
            x = 100 * entry["value"]
            axes.plot([x], [y + offset], mark, color=color, markersize=6, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(unit)
    axes.grid(False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure
