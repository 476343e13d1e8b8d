"""A trial's validation records, as its metrics.jsonl has them, and the best of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covid_flax.early_stopping import best_epoch
from covid_flax.errors import UserError


def read_val(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The validation records, epoch by epoch; a line under way is left out."""
    try:
        lines = metrics_jsonl.read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"{metrics_jsonl} is damaged ({e}): remove its folder") from e
    return [record for record in records if record["split"] == "val"]


def best_of(
    records: Sequence[Mapping[str, Any]],
    monitor: str,
    min_delta: float = 0.0,
    start_from_epoch: int = 0,
) -> dict[str, Any] | None:
    """The epoch that the run keeps as its best; None without one whose figure is finite.

    The settings of that rule are `EarlyStopping`'s.
    """
    figure = monitor.removeprefix("val_")
    finite = [r for r in records if math.isfinite(r[figure])]
    if not finite:
        return None
    number = best_epoch(
        {record["epoch"]: record[figure] for record in finite},
        monitor,
        min_delta=min_delta,
        start_from_epoch=start_from_epoch,
    )
    best = next(record for record in reversed(finite) if record["epoch"] == number)
    return {
        "val_accuracy": best["accuracy"],
        "val_loss": best["loss"],
        "best_epoch": best["epoch"],
        "epochs": records[-1]["epoch"],
    }
