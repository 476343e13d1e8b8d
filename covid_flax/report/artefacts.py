"""The files that a run leaves in its folder, read for a report on it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from covid_flax.data.splits import MANY_ALIKE, Row, named_alike, read_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.predictions import read_predictions
from covid_flax.files import parse_json

# What `fault` compares a file with: a type, the list of one shape, or an object's shapes by key,
# of which a name that ends in ! must be there and "*" stands for every key.
Shape = type | list[Any] | dict[str, Any] | Literal["interval"]

_INTERVALS: dict[str, Any] = {
    "accuracy": "interval",
    "balanced_accuracy": "interval",
    "ece": "interval",
    "macro": {"auroc": "interval"},
    "per_class": {"*": {"*": "interval"}},
}
RUN: dict[str, Any] = {
    "config": {
        "repeats": int,
        "data": {
            "val_fraction": float,
            "test_fraction": float,
            "phantoms_per_class": int,
            "split_seed": int,
            "folds": int,
            "fold": int,
        },
        "model": {"name": str, "dropout": float},
        "optimizer": {},
        "train": {
            "monitor": str,
            "ema_decay": float,
            "swa_start": float,
            "start_share": float,
            "min_delta": float,
            "teacher": str,
            "teacher_weight": float,
            "teacher_temperature": float,
        },
        "augment": {},
        "eval": {"mirror": bool, "aspect": float, "bn_own_share": float, "bn_own_until": str},
    },
    "members": [str],
    "class_names": [str],
    "data": {"root": str, "in_no_part": int},
    "weights": {},
    "versions": {},
    "devices": list,
    "candidates": list,
    "setting": {"*": float},
}
"""Shape of config.json, as far as reports read it."""
EVALUATION: dict[str, Any] = {
    "accuracy": float,
    "split": str,
    "stopped_on": str,
    "data_dir": str,
    "bad_images": {"*": str},
    "not_images": {"*": int},
    "class_map": {"*": str},
    "checkpoint": {"runs": {"*": int}},
    "calibration": {"ece": {"before!": float, "after!": float}},
    "alarms": [{"name!": str, "level!": str, "text!": str}],
    "alarms_checked": [str],
}
"""Of report.json, as far as any report reads it."""
_WHOLE_EVALUATION: dict[str, Any] = EVALUATION | {
    "num_examples!": int,
    "class_names!": [str],
    "accuracy!": float,
    "balanced_accuracy": float,
    "ece": float,
    "macro": {"auroc": float},
    "per_class!": {"*": {"support!": int, "recall!": float, "*": float}},
    "confusion_matrix!": [[int]],
    "abstain": {
        "threshold": float,
        "coverage": float,
        "accuracy": float,
        "accuracy_interval": "interval",
    },
    "intervals": {
        "level!": float,
        "clusters": int,
        "resamples": int,
        "wilson": _INTERVALS,
        "bootstrap": _INTERVALS,
    },
}
_CALIBRATION: dict[str, Any] = {
    "*": {"temperature": float, "split": str, "ece": {"before": float, "after": float}}
}
_CONTROLS: dict[str, Any] = {
    "conditions!": [
        {
            "accuracy": float,
            "accuracy_interval": "interval",
            "balanced_accuracy": float,
            "balanced_accuracy_interval": "interval",
        }
    ],
    "text": [str],
    "warning": str,
    "data_dir": str,
}
_CORRUPTIONS: dict[str, Any] = {
    "plain!": {"accuracy!": float},
    "mean_drop!": float,
    "corruptions!": [{"name!": str}],
    "data_dir": str,
    "warning": str,
}

Origin = Literal["own", "unsure", "external", "alike", "seen", "unknown"]


def own_folder(saved: Mapping[str, Any], report: Mapping[str, Any]) -> bool | None:
    """Whether images were scored in the folder that trained; None where a file tells not.

    Args:
      saved: config.json of the run.
      report: report.json of the evaluation.
    """
    root, scored = (saved.get("data") or {}).get("root"), report.get("data_dir")
    if not root or not scored:
        return None
    return os.path.realpath(root) == os.path.realpath(scored)


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
      corruptions: robustness/<name>/robustness.json by name.
      baselines: baselines/<name>/eval/<split>/report.json by both names.
      checkpoints: whether there is a folder of them.
      named_alike: of an evaluation of all images of a folder, by its name, the share of files with
        the name of one that trained or chose the epoch.
    """

    name: str
    saved: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    controls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    corruptions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    baselines: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    checkpoints: bool = False
    named_alike: dict[str, float] = dataclasses.field(default_factory=dict)

    def config(self, part: str, key: str) -> Any:
        """A value of the configuration, None where it is not there."""
        return ((self.saved.get("config") or {}).get(part) or {}).get(key)

    @property
    def class_names(self) -> list[str]:
        return list(self.saved.get("class_names") or ())

    @property
    def members(self) -> list[str]:
        """Of a run of several, their folders' names."""
        return list(self.saved.get("members") or ())

    def split(self, name: str) -> str:
        """What an evaluation scored: train, val, test, or all of a folder."""
        return str(self.reports[name].get("split") or name)

    def own_folder(self, report: Mapping[str, Any]) -> bool | None:
        """See the function `own_folder`."""
        return own_folder(self.saved, report)

    def of_folder(self, report: Mapping[str, Any]) -> str:
        """`, images of DIR` where that is not the folder that trained, else ""."""
        elsewhere = self.own_folder(report) is False
        return f", images of {os.path.normpath(report['data_dir'])}" if elsewhere else ""

    def origin(self, name: str) -> Origin:
        """Where the images of an evaluation come from.

        Returns:
          own: the folder that trained. unsure: the split's files in another folder, which may be
          the same one, moved. external: another folder; alike: one with the names of the training
          files; seen: one with training images. unknown: a file tells not.
        """
        own, report = self.own_folder(self.reports[name]), self.reports[name]
        if own is None:
            return "unknown"
        if own:
            return "own"
        if report.get("split") != "all":
            return "unsure"
        raised = {(alarm["name"], alarm["level"]) for alarm in report.get("alarms") or ()}
        if raised & {("duplicate-leak", "alarm"), ("training-images-scored", "alarm")}:
            return "seen"
        alike = (
            self.named_alike.get(name, 0) >= MANY_ALIKE or ("duplicate-leak", "caution") in raised
        )
        return "alike" if alike else "external"

    @property
    def external(self) -> list[str]:
        """Names of the evaluations on another folder, as far as the files tell."""
        return [name for name in self.reports if self.origin(name) in ("external", "alike")]

    @property
    def headline(self) -> str:
        """The evaluation that says most: test, else val, else another; empty without any."""

        def rank(name: str) -> tuple[int, bool]:
            split = self.split(name)
            return {"test": 0, "val": 1}.get(split, 2), name != split

        return min(self.reports, key=rank, default="")


def read_artefacts(workdir: Path) -> Artefacts:
    """Reads what a run left. Raises UserError: no run there, or a damaged file."""
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} holds no run (no config.json): give a run's folder as --workdir"
        )

    # Here, for matplotlib is slow to import.
    from covid_flax.report.plots import read_metrics
    from covid_flax.run_folder import fitted_rows

    def by_name(pattern: str, *places: int) -> dict[Any, Path]:
        """Files by the names of the folders they lie in, at those places of the path."""
        found = {}
        for path in sorted(workdir.glob(pattern)):
            key = tuple(path.relative_to(workdir).parts[i] for i in places)
            found[key if len(key) > 1 else key[0]] = path
        return found

    metrics = workdir / "metrics.jsonl"
    rows = read_split_csv(workdir / "split.csv") if (workdir / "split.csv").exists() else []
    reports = {name: _read_report(p) for name, p in by_name("eval/*/report.json", 1).items()}
    outside = [name for name, report in reports.items() if report.get("split") == "all"]
    fitted = fitted_rows(workdir) if outside else []
    controls = by_name("controls/*/controls.json", 1)
    corruptions = by_name("robustness/*/robustness.json", 1)
    baselines = by_name("baselines/*/eval/*/report.json", 1, 3)
    return Artefacts(
        name=workdir.resolve().name,
        saved=read_object(workdir / "config.json", RUN),
        rows=rows,
        metrics=read_metrics(metrics) if metrics.exists() and metrics.stat().st_size else [],
        reports=reports,
        calibration=read_object(workdir / "calibration.json", _CALIBRATION),
        controls={name: read_object(path, _CONTROLS) for name, path in controls.items()},
        corruptions={name: read_object(path, _CORRUPTIONS) for name, path in corruptions.items()},
        baselines={names: _read_report(path) for names, path in baselines.items()},
        checkpoints=(workdir / "checkpoints").is_dir(),
        named_alike={
            name: _alike(workdir / "eval" / name / "predictions.csv", fitted) for name in outside
        },
    )


def _alike(path: Path, rows: Sequence[Row]) -> float:
    """Share of a predictions.csv's files with the name of one trained on or stopped by."""
    if not path.exists():
        return 0.0
    files = read_predictions(path).files
    return named_alike(files, rows) / len(files)


def read_object(
    path: Path, shape: Shape, mend: str = "remove it, or make it anew"
) -> dict[str, Any]:
    """A JSON object of a shape, see `fault`; empty where there is no such file.

    Raises:
      UserError: damaged, with the first fault and the mend.
    """
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged: {mend}") from e
    wrong = fault(found, shape) if isinstance(found, dict) else "no object"
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}): {mend}")
    return found


def fault(value: Any, shape: Shape, where: str = "") -> str | None:
    """The first fault of a JSON value against a shape; None where it fits.

    Keys that the shape does not name may hold anything, and what need not be there may be null.
    """
    if shape == "interval":
        ends = value if isinstance(value, list) and len(value) == 2 else [None]
        wrong = any(fault(end, float) for end in ends)
        return f"{where} is no interval" if wrong else None
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is no object"
        places = {key: shape["*"] for key in value} if "*" in shape else {}
        places |= {key.rstrip("!"): s for key, s in shape.items() if key != "*"}
        for key, inner in places.items():
            inside = f"{where}.{key}".lstrip(".")
            if value.get(key) is not None:
                found = fault(value[key], inner, inside)
            else:
                found = f"{inside} is missing" if f"{key}!" in shape else None
            if found:
                return found
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        each = (fault(v, shape[0], f"{where}[{i}]") for i, v in enumerate(value))
        return next((found for found in each if found), None)
    fits = isinstance(value, (int, float) if shape is float else shape)
    if shape in (int, float):
        fits = fits and not isinstance(value, bool) and math.isfinite(value)
    return None if fits else f"{where} is {str(value)[:20]!r}"


def _read_report(path: Path) -> dict[str, Any]:
    """A report.json, with what it says of each of its classes. Raises UserError."""
    report = read_object(path, _WHOLE_EVALUATION)
    names, intervals = report["class_names"], report.get("intervals") or {}
    absent = [name for name in names if report["per_class"].get(name) is None]
    counted = [intervals.get(key) for key in ("clusters", "resamples")]
    wrong = None
    if absent:
        wrong = f"per_class.{absent[0]} is missing"
    elif not names or [len(row) for row in report["confusion_matrix"]] != [len(names)] * len(names):
        wrong = "confusion_matrix does not fit class_names"
    elif intervals.get("bootstrap") and None in counted:
        wrong = "intervals lacks clusters or resamples"
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}): remove it, or evaluate the run anew")
    return report
