"""The settings in order of their means, each with its interval."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from covid_flax.evaluation import members


def mean_interval(
    values: Sequence[float], *, share: bool = False
) -> tuple[float, list[float] | None]:
    """The mean and its 95 % t-interval; None for that where the values have no spread.

    That of a `share` ends at 0 and 1.
    """
    if len(set(values)) < 2:
        return statistics.fmean(values), None
    found = members.mean_interval(values, share=share)
    return found["mean"], found["interval"]


def repeated_by(rows: Iterable[Mapping[str, Any]]) -> str:
    """What tells the runs of a setting apart: "fold" or "seed", of trials or of a ranking."""
    return "fold" if any("fold" in row or "folds" in row for row in rows) else "seed"


def rank(trials: Sequence[Mapping[str, Any]], monitor: str) -> list[dict[str, Any]]:
    """The settings, best mean first; those with a failed or stopped trial after all others.

    A mean without the runs that failed would favour the setting that fails. Of a cross-validation
    a setting's runs are its folds, which share training images: their interval is too narrow.
    """
    ranked = []
    groups = itertools.groupby(sorted(trials, key=lambda t: t["setting"]), lambda t: t["setting"])
    for setting, group in groups:
        of_setting = list(group)
        kind = repeated_by(of_setting)
        values = [m[monitor] for m in of_setting if m["state"] != "failed"]
        share = monitor == "val_accuracy"
        mean, interval = mean_interval(values, share=share) if values else (None, None)
        states = [m["state"] for m in of_setting]
        state = next((s for s in ("failed", "pruned") if s in states), "complete")
        ranked.append(
            {
                "setting": setting,
                "settings": of_setting[0]["settings"],
                "state": state,
                f"{kind}s": [m[kind] for m in of_setting if m["state"] != "failed"],
                f"failed_{kind}s": [m[kind] for m in of_setting if m["state"] == "failed"],
                "values": values,
                "mean": mean,
                "interval": interval,
            }
        )
    sign = 1 if monitor == "val_loss" else -1
    order = ("complete", "pruned", "failed")
    return sorted(
        ranked,
        key=lambda r: (
            order.index(r["state"]),
            math.inf if r["mean"] is None else sign * r["mean"],
        ),
    )
