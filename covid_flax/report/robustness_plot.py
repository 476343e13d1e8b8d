"""The picture of `covid_flax.robustness`: accuracy by strength, a panel a corruption."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from covid_flax.files import write_atomically

_COLUMNS = 4


def robustness_figure(report: Mapping[str, Any], title: str) -> Figure:
    """One panel a corruption; the dashed line is the accuracy on plain images."""
    rows = -(-len(report["corruptions"]) // _COLUMNS)
    figure = Figure(figsize=(2.6 * _COLUMNS, 2.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False).ravel()
    plain = report["plain"]["accuracy"]
    for ax, row in zip(axes, report["corruptions"], strict=False):
        strengths = range(1, len(row["strengths"]) + 1)
        accuracy = [s["accuracy"] for s in row["strengths"]]
        # Images all of one group have no interval.
        bands = [s["accuracy_interval"] or (math.nan, math.nan) for s in row["strengths"]]
        low, high = zip(*bands, strict=True)
        ax.axhline(plain, color="0.5", linestyle="--", linewidth=1)
        ax.fill_between(strengths, low, high, color="#0072B2", alpha=0.2, linewidth=0)
        ax.plot(strengths, accuracy, color="#0072B2", marker="o", markersize=3)
        ax.set_title(f"{row['name'].replace('_', ' ')}\n({row['unit']})", fontsize=8)
        ax.set_xticks(list(strengths), [f"{v:g}" for v in row["values"]], fontsize=7)
        ax.tick_params(axis="y", labelsize=7)
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
    for ax in axes[len(report["corruptions"]) :]:
        ax.set_axis_off()
    figure.supylabel("accuracy", fontsize=9)
    figure.suptitle(
        f"{title}: {100 * plain:.1f} % plain (dashed), mean drop "
        f"{100 * report['mean_drop']:.1f} points; bands: 95 %",
        fontsize=10,
        parse_math=False,  # a $ in a name starts no formula
    )
    return figure


def plot_robustness(report: Mapping[str, Any], path: Path, title: str) -> None:
    """Writes `robustness_figure` to `path` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    robustness_figure(report, title).savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
