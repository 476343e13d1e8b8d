"""A self-contained page of an evaluation, and the house style other pages share.

A page is one HTML file that loads nothing and runs nothing: a content policy forbids both, and
every value a template shows is escaped.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

from covid_flax import __version__
from covid_flax.data.dataset import LEFT_OUT, left_out
from covid_flax.evaluation.alarms import CHECKS
from covid_flax.evaluation.intervals import (
    class_interval,
    has_width,
    is_undefined,
    one_group,
    whole_interval,
)
from covid_flax.evaluation.metrics import BINS
from covid_flax.evaluation.predictions import Predictions
from covid_flax.files import write_atomically
from covid_flax.report import pictures
from covid_flax.report.summary import checkpoint_of, seeds_of

_UNDEFINED = Markup('<span class="undefined" title="undefined on these images">–</span>')
_SPACE = "\N{NO-BREAK SPACE}"

# Columns of the table by class, after the number of images.
_CLASS_COLUMNS = (
    ("recall", "Sensitivity"),
    ("specificity", "Specificity"),
    ("precision", "PPV"),
    ("ppv_at", "PPV at prevalence"),
    ("npv", "NPV"),
    ("f1", "F1"),
    ("auroc", "AUROC"),
    ("auprc", "AUPRC"),
)
_AVERAGED = ("recall", "specificity", "precision", "npv", "f1", "auroc", "auprc")
_SHARES = {"recall", "specificity", "precision", "ppv_at", "npv"}
_WHOLE = (
    ("accuracy", "Accuracy", "share of images classed rightly"),
    ("balanced_accuracy", "Balanced accuracy", "mean sensitivity of the classes"),
    ("kappa", "Cohen's kappa", "agreement beyond chance; 0 is chance, 1 perfect"),
    ("mcc", "Matthews correlation", "0 is chance, 1 perfect"),
    ("nll", "Negative log-likelihood", "0 is best"),
    ("brier", "Brier score", "0 is best, 2 worst"),
    ("ece", "Calibration error (ECE)", "0 is best"),
)


def render(template: str, **context: Any) -> str:
    """The text of `templates/<template>`, every value escaped that is not Markup.

    Raises:
      jinja2.UndefinedError: the template uses a name that `context` lacks.
    """
    return _environment().get_template(template).render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, figure3=figure3, with_interval=with_interval, count=count
    )
    environment.globals["version"] = __version__
    return environment


def percent(x: float | None) -> str:
    """`95.6 %`; a dash where `x` is undefined (None, NaN or infinite)."""
    return f"{100 * x:.1f}{_SPACE}%".replace("-", "−") if _defined(x) else _UNDEFINED


def figure3(x: float | None) -> str:
    """`0.956`; a dash where `x` is undefined (None, NaN or infinite)."""
    return f"{x:.3f}".replace("-", "−") if _defined(x) else _UNDEFINED


def count(n: int) -> str:
    """`2,929`."""
    return f"{n:,}"


def with_interval(
    x: float | None,
    interval: Sequence[float | None] | None,
    form: Callable[[float | None], str] = percent,
) -> Markup:
    """`95.6 % (94.8–96.3)`, the interval left out where it is unknown or has no width."""
    text = Markup('<span class="figure">{}</span>').format(form(x))
    if not _defined(x) or not interval:
        return text
    low, high = interval
    if not _defined(low) or not _defined(high) or not has_width((low, high)):
        return text
    ends = [form(bound).removesuffix(f"{_SPACE}%") for bound in (low, high)]
    joined = (" to " if low < 0 else "–").join(ends)
    return text + Markup(' <span class="interval">({})</span>').format(joined)


def _defined(x: Any) -> TypeGuard[float]:
    return x is not None and math.isfinite(x)


def write_report_page(
    path: Path,
    report: Mapping[str, Any],
    predictions: Predictions,
    *,
    title: str,
    run: Mapping[str, Any] | None,
) -> None:
    """Writes report.html, whole or not at all.

    Args:
      path: of the page.
      report: as in report.json; every key that is not of `classification_report`'s first
        version may be missing, and what needs it is left out.
      predictions: of the same images, as they were scored.
      title: of the page.
      run: of the run's config.json; None where it is unknown.

    Raises:
      UserError: the file cannot be written.
    """
    alarms = report.get("alarms")
    text = render(
        "report.html.j2",
        title=title,
        verdict=_verdict(report, predictions),
        alarms=None if alarms is None else _findings(alarms),
        checked=_in_order(report),
        note=report.get("note"),
        classes=_class_table(report),
        averages=_average_table(report),
        whole=_whole_table(report),
        members=_members_table(report),
        intervals=report.get("intervals") or {},
        one_group=one_group(report),
        bins=BINS,
        unanswered=any(of.get("predicted") == 0 for of in report["per_class"].values()),
        matrix=_matrix_table(report),
        pictures=pictures.evaluation_pictures(report, predictions),
        calibration=report.get("calibration"),
        abstain=report.get("abstain"),
        facts=_facts(report, run),
        config=_json(run["config"]) if run and "config" in run else "",
        split=str(report.get("split") or ""),
    )
    write_atomically(Path(path), text.encode("utf-8", "replace"))


def _verdict(report: Mapping[str, Any], predictions: Predictions) -> dict[str, Any]:
    """The figures of the opening sentences, each with its interval."""
    per_class, n = report["per_class"], report["num_examples"]
    present = [name for name in report["class_names"] if per_class[name]["support"]]
    weakest = min(present, key=lambda name: per_class[name]["recall"])
    largest = max(present, key=lambda name: per_class[name]["support"])
    intervals = report.get("intervals") or {}
    known = bool(predictions.groups)
    clusters = intervals.get("clusters") if known else None
    if known and clusters is None:
        clusters = len(set(predictions.clusters.tolist()))
    levels = [alarm["level"] for alarm in report.get("alarms") or ()]
    return {
        "images": n,
        "groups": clusters,
        "accuracy": with_interval(report["accuracy"], whole_interval(report, "accuracy")),
        "balanced": with_interval(
            report["balanced_accuracy"], whole_interval(report, "balanced_accuracy")
        ),
        "weakest": weakest,
        "weakest_images": per_class[weakest]["support"],
        "weakest_recall": with_interval(
            per_class[weakest]["recall"], class_interval(report, weakest, "recall")
        ),
        "largest": largest,
        "largest_share": per_class[largest]["support"] / n,
        "absent": [name for name in report["class_names"] if not per_class[name]["support"]],
        "alarms": levels.count("alarm"),
        "cautions": len(levels) - levels.count("alarm"),
    }


def _class_table(report: Mapping[str, Any]) -> dict[str, Any]:
    per_class, names = report["per_class"], report["class_names"]
    prevalence = report.get("prevalence") or {}
    stated = {round(p, 6) for p in prevalence.values()}
    columns = [c for c in _CLASS_COLUMNS if all(c[0] in per_class[name] for name in names)]
    head = ["Class", "Images"]
    for key, label in columns:
        one = key == "ppv_at" and len(stated) == 1
        head.append(f"PPV at {100 * stated.copy().pop():g}{_SPACE}%" if one else label)
    rows = []
    for name in names:
        row: list[Any] = [name, count(per_class[name]["support"])]
        for key, _ in columns:
            x = None if is_undefined(per_class[name], key) else per_class[name][key]
            form = percent if key in _SHARES else figure3
            cell = with_interval(x, class_interval(report, name, key), form)
            if key == "ppv_at" and len(stated) > 1 and name in prevalence:
                cell += Markup('<span class="interval">at {}</span>').format(
                    f"{100 * prevalence[name]:g}{_SPACE}%"
                )
            row.append(cell)
        rows.append(row)
    return {"head": head, "rows": rows}


def _average_table(report: Mapping[str, Any]) -> dict[str, Any] | None:
    kinds = [kind for kind in ("macro", "weighted") if kind in report]
    if not kinds:
        return None
    labels = dict(_CLASS_COLUMNS)
    rows = [
        [
            labels[key],
            *(
                with_interval(
                    report[kind][key],
                    whole_interval(report, kind, key),
                    percent if key in _SHARES else figure3,
                )
                for kind in kinds
            ),
        ]
        for key in _AVERAGED
        if all(key in report[kind] for kind in kinds)
    ]
    head = {"macro": "Unweighted", "weighted": "By images"}
    return {"head": ["Average", *(head[kind] for kind in kinds)], "rows": rows}


def _whole_table(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for key, label, meaning in _WHOLE:
        if key in report:
            form = percent if "accuracy" in key else figure3
            heading = Markup('{}<br><span class="soft">{}</span>').format(label, meaning)
            undefined = key == "mcc" and _one_class(report["confusion_matrix"])
            value = None if undefined else report[key]
            rows.append([heading, with_interval(value, whole_interval(report, key), form)])
    return {"head": ["All images", "Figure"], "rows": rows}


def _one_class(matrix: Sequence[Sequence[int]]) -> bool:
    """Whether all images are of one class, or all answers: no correlation is defined then."""
    return sum(map(any, matrix)) < 2 or sum(map(any, zip(*matrix, strict=True))) < 2


def _members_table(report: Mapping[str, Any]) -> dict[str, Any] | None:
    if "members" not in report:
        return None
    form = {"accuracy": percent, "balanced_accuracy": percent, "loss": figure3}
    figures, mean = report["members"]["figures"], report["members"]["mean"]
    rows = [[name, *(form[key](of[key]) for key in form)] for name, of in figures.items()]
    last = [with_interval(mean[key]["mean"], mean[key]["interval"], form[key]) for key in form]
    head = ["Run", "Accuracy", "Balanced accuracy", "Negative log-likelihood"]
    return {"head": head, "rows": [*rows, ["Mean", *last]]}


def _matrix_table(report: Mapping[str, Any]) -> dict[str, Any]:
    names = report["class_names"]
    rows = [
        [name, *map(count, row)]
        for name, row in zip(names, report["confusion_matrix"], strict=True)
    ]
    return {"head": ["True class", *names], "rows": rows}


def _findings(alarms: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [
        {
            "name": str(alarm["name"]).replace("-", " ").capitalize(),
            "level": alarm["level"],
            "text": alarm["text"],
            "figures": [
                (key.replace("_", " "), text)
                for key, value in (alarm.get("figures") or {}).items()
                if (text := _plain(value))
            ],
        }
        for alarm in alarms
    ]
    return sorted(found, key=lambda item: item["level"] != "alarm")


def _in_order(report: Mapping[str, Any]) -> list[str]:
    """What the silence of the checks that were made says."""
    raised = {alarm["name"] for alarm in report.get("alarms") or ()}
    made = [name for name in report.get("alarms_checked") or () if name not in raised]
    return [CHECKS.get(name, name) for name in made]


def _plain(value: Any, most: int = 160) -> str:
    """A figure of an alarm as text, cut short where it is long."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = [f"{key} {_plain(item)}" for key, item in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(_plain, value))
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _facts(report: Mapping[str, Any], run: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Name and value of what was scored."""
    run = run or {}
    config = run.get("config") or {}
    weights = run.get("weights") or {}
    data, model = config.get("data") or {}, config.get("model") or {}
    train, optimizer = config.get("train") or {}, config.get("optimizer") or {}
    bad = report.get("bad_images")
    which = "all" if report.get("split") == "all" else f"{report.get('split') or ''} split"
    mapping = report.get("class_map") or {}

    def mapped(ours: str) -> str:
        return "left out" if ours == LEFT_OUT else f"as {ours}"

    pairs = [
        ("Run", run.get("name")),
        ("Baseline", run.get("baseline")),
        ("Images", f"{which} of {report.get('data_dir') or 'unknown'}"),
        ("Classes", "; ".join(f"{theirs} {mapped(ours)}" for theirs, ours in mapping.items())),
        ("Not scored", bad and f"{left_out(bad)} (all in report.json)"),
        ("Checkpoint", checkpoint_of(report)),
        ("Network", model.get("name")),
        ("Trained part", model.get("trainable")),
        ("Input", f"{data['image_size']} px" if "image_size" in data else None),
        ("Split rule", data.get("split")),
        (
            "Training",
            train
            and f"at most {_plain(train.get('epochs'))} epochs of batches of "
            f"{_plain(train.get('batch_size'))}, learning rate "
            f"{_plain(optimizer.get('learning_rate'))}",
        ),
        ("Seed", seeds_of(run) if "seed" in run else None),
        ("First weights", weights.get("source")),
        ("Their step", weights.get("step")),
        ("Their SHA-256", weights.get("sha256")),
        ("How they fitted", weights.get("report")),
        ("Devices", ", ".join(map(str, run.get("devices") or ()))),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items())),
    ]
    return [(name, str(value)) for name, value in pairs if value]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
