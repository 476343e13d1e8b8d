"""The files that a run leaves in its folder, read for a report on it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from covid_flax.data.splits import Row, read_split_csv
from covid_flax.errors import UserError

_REPORT = ("num_examples", "class_names", "accuracy", "per_class", "confusion_matrix")


@dataclasses.dataclass(frozen=True)
class Artefacts:
    """What a run's folder holds; empty where a file is missing.

    Attributes:
      name: of the folder.
      saved: config.json.
      rows: split.csv.
      metrics: lines of metrics.jsonl.
      reports: eval/<name>/report.json by name.
      calibration: calibration.json, by the checkpoint's step.
      controls: controls/<name>/controls.json by name.
      baselines: baselines/<name>/eval/<split>/report.json by both names.
      checkpoints: whether there is a folder of them.
    """

    name: str
    saved: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    controls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    baselines: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    checkpoints: bool = False

    def config(self, part: str, key: str) -> Any:
        """A value of the configuration, None where it is not there."""
        return ((self.saved.get("config") or {}).get(part) or {}).get(key)

    @property
    def class_names(self) -> list[str]:
        return list(self.saved.get("class_names") or ())

    @property
    def external(self) -> list[str]:
        """Names of the evaluations on another folder than the run's."""
        root = (self.saved.get("data") or {}).get("root")
        return [
            name
            for name, report in self.reports.items()
            if report.get("split") == "all"
            and root
            and report.get("data_dir")
            and os.path.normpath(report["data_dir"]) != os.path.normpath(root)
        ]

    @property
    def headline(self) -> str:
        """The evaluation that says most: test, else val, else another; empty without any."""
        return next((s for s in ("test", "val", *self.reports) if s in self.reports), "")


def read_artefacts(workdir: Path) -> Artefacts:
    """Reads what a run left. Raises UserError: no run there, or a damaged file."""
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} holds no run (no config.json): give a run's folder as --workdir"
        )

    # Here, for matplotlib is slow to import.
    from covid_flax.report.plots import read_metrics

    def by_name(pattern: str, needs: Iterable[str], *places: int) -> dict[Any, dict[str, Any]]:
        """Objects by the names of the folders they lie in, at those places of the path."""
        found = {}
        for path in sorted(workdir.glob(pattern)):
            key = tuple(path.relative_to(workdir).parts[i] for i in places)
            found[key if len(key) > 1 else key[0]] = _read_object(path, needs)
        return found

    calibration, metrics = workdir / "calibration.json", workdir / "metrics.jsonl"
    return Artefacts(
        name=workdir.resolve().name,
        saved=_read_object(workdir / "config.json"),
        rows=read_split_csv(workdir / "split.csv") if (workdir / "split.csv").exists() else [],
        metrics=read_metrics(metrics) if metrics.exists() and metrics.stat().st_size else [],
        reports=by_name("eval/*/report.json", _REPORT, 1),
        calibration=_read_object(calibration) if calibration.exists() else {},
        controls=by_name("controls/*/controls.json", ["conditions"], 1),
        baselines=by_name("baselines/*/eval/*/report.json", _REPORT, 1, 3),
        checkpoints=(workdir / "checkpoints").is_dir(),
    )


def _read_object(path: Path, needs: Iterable[str] = ()) -> dict[str, Any]:
    """An object with the keys that it `needs`. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found.keys() >= set(needs):
            raise ValueError
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged: remove it, or make it anew") from e
    return found
