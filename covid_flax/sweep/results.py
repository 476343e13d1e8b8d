"""What a finished sweep shows: sweep.csv, sweep.png, and the table on the console."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covid_flax.console import say
from covid_flax.files import write_atomically
from covid_flax.sweep.plan import Plan
from covid_flax.sweep.ranking import repeated_by

_PLOTTED = 40  # settings in sweep.png, at most


def write(plan: Plan, workdir: Path, saved: Mapping[str, Any]) -> None:
    """sweep.csv, sweep.png, and the table on the console."""
    keys = [axis.key for axis in plan.axes]
    write_atomically(workdir / "sweep.csv", _csv(saved["trials"], keys))
    write_atomically(workdir / "sweep.png", _png(saved["ranking"], plan.monitor))
    for line in table(saved["ranking"], keys, plan.monitor):
        say(line)
    if len(saved["ranking"]) > 1:
        say(
            "note: the best of many on the validation images is partly luck: its figure is too "
            "good; score images that chose nothing, once: --split=test (data.test_fraction of "
            "grouped splits, data.nested_test of the paper's, or data.split_file)"
        )
    say(f"sweep: {workdir} (sweep.csv, sweep.json, sweep.png, logs/)")


def _csv(trials: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> bytes:
    """One row a trial; its settings by their keys."""
    figures = ["val_accuracy", "val_loss", "best_epoch", "epochs", "seconds", "error"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fold = ["fold"] if repeated_by(trials) == "fold" else []
    writer.writerow(["trial", "seed", *fold, *keys, "state", *figures])
    for t in trials:
        settings = [t["settings"][key] for key in keys]
        cells = [t.get(figure, "") for figure in figures]
        of_fold = [t[key] for key in fold]
        writer.writerow([t["trial"], t["seed"], *of_fold, *settings, t["state"], *cells])
    return text.getvalue().encode()


def table(ranking: Sequence[Mapping[str, Any]], keys: Sequence[str], monitor: str) -> list[str]:
    """The console's lines, best first."""
    kind = repeated_by(ranking)
    rows = [["", *keys, monitor, "95 % interval", f"{kind}s", ""]]
    for place, r in enumerate(ranking, 1):
        low_high = "-" if r["interval"] is None else "{:.4f} to {:.4f}".format(*r["interval"])
        remark = "" if r["state"] == "complete" else r["state"]
        if failed := r[f"failed_{kind}s"]:
            remark += f": {kind} {', '.join(map(str, failed))}"
        mean = "-" if r["mean"] is None else f"{r['mean']:.4f}"
        settings = [str(r["settings"][key]) for key in keys]
        rows.append([str(place), *settings, mean, low_high, str(len(r[f"{kind}s"])), remark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row[:-1], widths)) + f"  {row[-1]}".rstrip() for row in rows]


def _png(ranking: Sequence[Mapping[str, Any]], monitor: str) -> bytes:
    """A line a setting, best on top: each seed, the mean and its interval."""
    # Here, for matplotlib is slow to import.
    from matplotlib.figure import Figure

    shown = [r for r in ranking if r["mean"] is not None][:_PLOTTED]
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for y, r in enumerate(shown):
        color = "#0072B2" if r["state"] == "complete" else "#999999"
        if r["interval"] is not None:
            axes.plot(r["interval"], [y, y], color=color, linewidth=2)
        axes.plot(r["values"], [y] * len(r["values"]), "|", color="#D55E00", markersize=9)
        axes.plot(r["mean"], y, "o", color=color, markersize=6)
    labels = [
        ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in r["settings"].items())
        + ("" if r["state"] == "complete" else f" ({r['state']})")
        for r in shown
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    kind = repeated_by(ranking)
    axes.set_xlabel(f"best {monitor}: {kind}s (|), mean (o), 95 % t-interval of the mean (line)")
    axes.grid(axis="x", alpha=0.3)
    more = len([r for r in ranking if r["mean"] is not None]) - len(shown)
    axes.set_title("Settings, best first" + (f"; {more} more in sweep.csv" if more else ""))
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=150)
    return output.getvalue()
