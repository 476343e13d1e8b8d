"""What an evaluation says on the console."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covid_flax.console import say
from covid_flax.data.dataset import left_out
from covid_flax.evaluation.intervals import has_width, whole_interval


def print_report(report: Mapping[str, Any], output: Path) -> None:
    """The figures a person looks for first, on the console."""
    names, matrix = report["class_names"], report["confusion_matrix"]
    width = max(map(len, names))
    say("")
    say(
        f"{report['split']}: {report['num_examples']:,} images, accuracy "
        f"{_with_interval(report, 'accuracy')}, balanced "
        f"{_with_interval(report, 'balanced_accuracy')}, "
        f"loss {report['loss']:.4f}" + (f" ({said})" if (said := checkpoint_of(report)) else "")
    )
    say("confusion matrix, rows true, columns predicted:")
    # Numbered where the beginnings of two are alike.
    heads = [n[:15] for n in names]
    if len(set(heads)) < len(heads):
        heads = [f"{i}. {n}"[:15] for i, n in enumerate(names, 1)]
    say(f"{'':<{width}}  " + " ".join(f"{n:>15}" for n in heads) + "    recall precision")
    for name, row in zip(names, matrix, strict=True):
        figures = report["per_class"][name]
        recall = f"{figures['recall']:.4f}" if figures["support"] else "-"
        precision = f"{figures['precision']:.4f}" if figures["predicted"] else "-"
        counts = " ".join(f"{n:>15,}" for n in row)
        say(f"{name:<{width}}  {counts}    {recall:>6} {precision:>9}")
    for alarm in report["alarms"]:
        say(f"{alarm['level']}: {alarm['text']}")
    if report.get("bad_images"):
        say(f"{left_out(report['bad_images'])} (all in report.json)")
    if "note" in report:
        say(report["note"])
    say(f"written: {output}/report.html, report.json, predictions.csv, confusion_matrix.png")


def checkpoint_of(report: Mapping[str, Any]) -> str:
    """`best checkpoint, step 44`, or `checkpoint of step 44` where that was asked for.

    Of a repeated run its members'; "" where none was scored.
    """
    found = report.get("checkpoint") or {}
    if not found:
        return ""
    which, step, runs = found.get("which"), found.get("step"), found.get("runs")
    if runs:
        steps = ", ".join(f"{name} step {step:,}" for name, step in runs.items())
        kind = f"checkpoints of step {which}" if str(which).isdigit() else f"{which} checkpoints"
        return f"{kind} of {len(runs)} runs: {steps}"
    known = f"{step:,}" if isinstance(step, int) else "not known"
    return (
        f"checkpoint of step {known}" if which == str(step) else f"{which} checkpoint, step {known}"
    )


def seeds_of(run: Mapping[str, Any]) -> str:
    """`0`, or `0 to 4` of a run of several seeds, by what its config.json holds."""
    first, repeats = run.get("seed"), (run.get("config") or {}).get("repeats") or 1
    if "members" in run and repeats > 1 and isinstance(first, int):
        return f"{first} to {first + repeats - 1}"
    return str(first)


def _with_interval(report: Mapping[str, Any], key: str) -> str:
    interval = whole_interval(report, key)
    shown = interval if interval and has_width(interval) else None
    return f"{report[key]:.4f}" + (f" ({shown[0]:.4f} to {shown[1]:.4f})" if shown else "")
