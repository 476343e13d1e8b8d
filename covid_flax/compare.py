"""Runs side by side on the same images: `python -m covid_flax.compare RUN RUN ...`.

Every figure has an interval, and every difference has a paired one: all runs are scored on the
same resamples of the same groups of images, so that what makes an image hard cancels out. Writes
`compare.json`, `compare.csv` and `compare.html`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from covid_flax.command import run_command
from covid_flax.data.splits import PARTS, Row, read_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.alarms import Evidence, checks_made, find_alarms
from covid_flax.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    has_width,
    percentile_interval,
    wilson_of_images,
)
from covid_flax.evaluation.metrics import classification_report, resampled_figures
from covid_flax.evaluation.predictions import Predictions, read_predictions
from covid_flax.files import (
    csv_bytes,
    expanded,
    peek,
    refuse_foreign,
    write_atomically,
    write_json,
)
from covid_flax.report.artefacts import EVALUATION, RUN, own_folder, read_object

SCORED = ("test", "val")  # in the order of preference
# Where `classification_report` keeps each figure.
FIGURES = {
    "accuracy": ("accuracy",),
    "balanced_accuracy": ("balanced_accuracy",),
    "macro_f1": ("macro", "f1"),
    "macro_auroc": ("macro", "auroc"),
    "ece": ("ece",),
    "nll": ("nll",),
}
DIFFERENCES = ("accuracy", "balanced_accuracy", "macro_auroc")
# Alarms that take the images themselves, or the folder's own groups: only the report knows them.
_OF_THE_FOLDER = {"duplicate-leak", "group-leak", "source-confounded"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A run's predictions of some images, and what is known of them.

    Attributes:
      name: of the run, as short as it can be beside the others.
      folder: where its predictions.csv lies.
      predictions: with groups: of the groups.csv beside them, else of the run's split.csv; as
        `read_evaluations` returns them, those of the first evaluation that knows any.
      report: its report.json; empty where there is none.
      about: its run's config.json; empty where there is none.
      rows: its run's split.csv; empty where there is none.
    """

    name: str
    folder: Path
    predictions: Predictions
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: Sequence[Row] = ()


@dataclasses.dataclass(frozen=True)
class McNemar:
    """McNemar's test of two classifiers on the same images (McNemar 1947), exact at any size.

    It takes images as independent: with groups its p is too small.

    Attributes:
      only_first: images that the first alone has right.
      only_second: images that the second alone has right.
      p: two-sided, of a fair coin thrown once for each such image; 1 without any.
    """

    only_first: int
    only_second: int
    p: float


def read_evaluations(folders: Sequence[Path], split: str = "") -> list[Evaluation]:
    """Opens runs, or evaluations, that scored the same images.

    Args:
      folders: of runs (or baselines), or what `evaluate` wrote of one; at least two.
      split: `test` or `val`, of the runs; empty takes test where every run has scored it, else
        val. An evaluation's folder is taken as it is.

    Returns:
      In the order given: images and classes in the order of the first, and all with the groups
      of the first that knows any; a run's own rows keep what groups they have.

    Raises:
      UserError: fewer than two, one given twice, a file is missing or damaged, or they did not
        score the same images with the same labels of the same classes.
    """
    if len(folders) < 2:
        raise UserError("give two run folders or more: compare RUN RUN ... [--split=val|test]")
    places = _places(folders, split)
    names = _names(places)
    found = [_read(name, place) for name, place in zip(names, places, strict=True)]
    first = found[0]
    for other in found[1:]:
        _refuse_other_images(first, other)
    aligned = [dataclasses.replace(e, predictions=_align(e, first)) for e in found]
    groups = next((e.predictions.groups for e in aligned if e.predictions.groups), ())
    known = next((e.rows for e in aligned if e.predictions.groups), ())
    group = {row.file: row.group for row in known}
    return [
        dataclasses.replace(
            e,
            predictions=dataclasses.replace(e.predictions, groups=groups),
            rows=[dataclasses.replace(r, group=r.group or group.get(r.file, "")) for r in e.rows],
        )
        for e in aligned
    ]


def compare(
    evaluations: Sequence[Evaluation], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Figures of each, and of each pair the differences.

    A difference is the second's figure less the first's. Its interval is the percentiles of the
    differences within each resample of the cluster bootstrap (Davison & Hinkley 1997). Resamples
    that all give the same figure know nothing of its spread: an accuracy or recall then has
    Wilson's interval, any other figure none.

    Args:
      evaluations: of `read_evaluations`.
      resamples: of the bootstrap, at least 1.
      seed: of its draws.

    Returns:
      Plain Python values, as in compare.json: num_examples, clusters, groups_known, class_names,
      split, level, resamples, seed; runs, with figures (`{"value", "interval"}` by the names of
      `FIGURES`, and recall by class); against_first, the first with each other; and pairs, any
      two. Those hold first and second (names), difference (of accuracy also `joint_interval`, at
      the level that holds for all of against_first together, by Bonferroni), and mcnemar, in which
      p_holm is Holm's p among its list (Holm 1979); and cautions, as
      `covid_flax.evaluation.alarms.Alarm`.
    """
    p = evaluations[0].predictions
    clusters = len(np.unique(p.clusters))
    scored = [_score(e.predictions, resamples, seed) for e in evaluations]

    def interval(values: np.ndarray, level: float = LEVEL) -> list[float] | None:
        # One group, drawn again and again, says nothing of how groups differ.
        found = percentile_interval(values, level) if clusters > 1 else None
        return found if has_width(found) else None

    def wilson(e: Evaluation, key: tuple[str, ...]) -> list[float] | None:
        if clusters == 1 or key[0] not in ("accuracy", "recall"):
            return None
        right, of = e.predictions.predicted == p.labels, np.full(len(p.labels), True)
        if key[0] == "recall":
            of = p.labels == p.class_names.index(key[1])
        return wilson_of_images(right[of], p.clusters[of])

    runs = []
    for e, (values, drawn) in zip(evaluations, scored, strict=True):
        figures: dict[str, Any] = {"recall": {}}
        for key, value in values.items():
            figure = {
                "value": value,
                "interval": (interval(drawn[key]) or wilson(e, key)) if value is not None else None,
            }
            if len(key) == 2:
                figures["recall"][key[1]] = figure
            else:
                figures[key[0]] = figure
        runs.append(_about(e) | {"figures": figures})

    def pair(i: int, j: int) -> dict[str, Any]:
        difference = {}
        for name in DIFFERENCES:
            a, b = scored[i][0][name,], scored[j][0][name,]
            difference[name] = {
                "value": None if a is None or b is None else b - a,
                "interval": interval(scored[j][1][name,] - scored[i][1][name,]),
            }
        difference["accuracy"]["joint_interval"] = interval(
            scored[j][1]["accuracy",] - scored[i][1]["accuracy",],
            1 - (1 - LEVEL) / (len(evaluations) - 1),
        )
        right = [e.predictions.predicted == p.labels for e in (evaluations[i], evaluations[j])]
        return {
            "first": evaluations[i].name,
            "second": evaluations[j].name,
            "difference": difference,
            "mcnemar": dataclasses.asdict(mcnemar(*right)),
        }

    against_first = [pair(0, j) for j in range(1, len(evaluations))]
    pairs = [pair(i, j) for i, j in itertools.combinations(range(len(evaluations)), 2)]
    for family in (against_first, pairs):
        adjusted = holm([entry["mcnemar"]["p"] for entry in family])
        for entry, p_holm in zip(family, adjusted, strict=True):
            entry["mcnemar"]["p_holm"] = p_holm
    return {
        "num_examples": len(p.files),
        "clusters": clusters,
        "groups_known": bool(p.groups),
        "class_names": list(p.class_names),
        "split": _split(evaluations),
        "level": LEVEL,
        "resamples": resamples,
        "seed": seed,
        "runs": runs,
        "against_first": against_first,
        "pairs": pairs,
        "cautions": _cautions(evaluations),
    }


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """The exact test on which images two classifiers have right, bool [N] each."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    p = float(binomtest(only_first, n, 0.5).pvalue) if n else 1.0
    return McNemar(only_first, only_second, p)


def holm(p: Sequence[float]) -> list[float]:
    """Each p after Holm's step-down correction for how many there are (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    found = np.empty(len(p))
    found[order] = np.minimum(np.maximum.accumulate(adjusted), 1)
    return found.tolist()


_FILES = ("compare.json", "compare.csv", "compare.html")


def write_comparison(output: Path, comparison: Mapping[str, Any]) -> None:
    """Writes compare.html, compare.csv (run,figure,value,low,high) and compare.json.

    Raises:
      UserError: the folder cannot be written, or such files of something else lie in it.
    """
    # Here, for matplotlib is slow to import.
    from covid_flax.report.comparison import comparison_page

    refuse_foreign(output, _FILES, "against_first")
    page = comparison_page(comparison)
    # First, for it tells that the others are a comparison's.
    write_json(output / "compare.json", comparison)
    write_atomically(output / "compare.csv", _csv(comparison))
    write_atomically(output / "compare.html", page.encode("utf-8", "replace"))


def _places(folders: Sequence[Path], split: str) -> list[Path]:
    """The folder of each one's predictions.csv."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give the folder of a run, or of an evaluation")
    runs = [f for f in folders if not (f / "predictions.csv").exists()]
    scored = {s: [f for f in runs if (f / "eval" / s / "predictions.csv").exists()] for s in SCORED}
    if not split:
        split = next((s for s in SCORED if len(scored[s]) == len(runs)), "")
    for folder in runs:
        has = [s for s in SCORED if folder in scored[s]]
        if split and folder not in scored[split]:
            raise UserError(
                f"{folder} has no eval/{split}/predictions.csv: evaluate it with --split={split}"
                + (f", or compare on {has[0]}" if has else "")
            )
        if not has:
            raise UserError(f"{folder} has no eval/test or eval/val: evaluate it first")
    if runs and not split:
        listed = ", ".join(f"{f} ({'test' if f in scored['test'] else 'val'})" for f in runs)
        raise UserError(f"the runs have no scored split in common: {listed}: evaluate one more")
    places = [f / "eval" / split if f in runs else f for f in folders]
    real = [place.resolve() for place in places]
    twice = [folder for folder, place in zip(folders, real, strict=True) if real.count(place) > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice: name each run once")
    return places


def _run_folder(place: Path) -> Path | None:
    """Of RUN/eval/<split>; None for an evaluation that lies elsewhere."""
    place = place.resolve()
    return place.parent.parent if place.parent.name == "eval" else None


def _names(places: Sequence[Path]) -> list[str]:
    """Last parts of the folders' names, as many as tell all apart."""
    whole = [place.resolve().parts for place in places]
    parts = [(_run_folder(place) or place.resolve()).parts for place in places]
    if len(set(parts)) < len(parts):
        parts = whole
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(p) for p in whole]


def _read(name: str, place: Path) -> Evaluation:
    run = _run_folder(place)
    rows = []
    if run is not None and (run / "split.csv").exists():
        rows = read_split_csv(run / "split.csv")
    predictions = read_predictions(place / "predictions.csv", rows)
    seen = set(predictions.files)
    if len(seen) < len(predictions.files):
        raise UserError(f"{place}/predictions.csv names an image twice: evaluate the run anew")
    report = read_object(place / "report.json", EVALUATION, "evaluate the run anew")
    about = read_object(run / "config.json", RUN, "train the run anew") if run is not None else {}
    return Evaluation(name, place, predictions, report, about, rows)


def _refuse_other_images(first: Evaluation, other: Evaluation) -> None:
    a, b = first.predictions, other.predictions
    if set(a.class_names) != set(b.class_names):
        raise UserError(
            f"{first.name} has the classes {', '.join(a.class_names)}, {other.name} has "
            f"{', '.join(b.class_names)}: compare runs of the same classes"
        )
    in_a, in_b = set(a.files), set(b.files)
    lacks = [file for file in a.files if file not in in_b]
    more = [file for file in b.files if file not in in_a]
    if lacks or more:
        parts = [
            f"{len(files)} of {len(e.predictions.files)} images only in {e.name}, first {files[0]}"
            for e, files in ((first, lacks), (other, more))
            if files
        ]
        raise UserError(
            f"{first.name} and {other.name} scored different images ({'; '.join(parts)}): compare "
            "runs that share a split"
        )
    label = {f: b.class_names[k] for f, k in zip(b.files, b.labels, strict=True)}
    differ = [f for f, k in zip(a.files, a.labels, strict=True) if label[f] != a.class_names[k]]
    if differ:
        raise UserError(
            f"{len(differ)} images have one label in {first.name} and another in {other.name}, "
            f"first {differ[0]}: compare runs on the same labels"
        )


def _align(e: Evaluation, first: Evaluation) -> Predictions:
    """Its predictions with the images and classes in the order of the first."""
    p, names, files = e.predictions, first.predictions.class_names, first.predictions.files
    place = {file: i for i, file in enumerate(p.files)}
    rows = np.array([place[file] for file in files])
    columns = [p.class_names.index(name) for name in names]
    return Predictions(
        class_names=names,
        files=files,
        labels=first.predictions.labels,
        probabilities=p.probabilities[rows][:, columns],
        groups=tuple(p.groups[i] for i in rows) if p.groups else (),
    )


def _score(
    p: Predictions, resamples: int, seed: int
) -> tuple[dict[tuple[str, ...], float | None], dict[tuple[str, ...], np.ndarray]]:
    """Figures, and each in every resample: by (name,), or ("recall", class)."""
    report = classification_report(p.labels, p.probabilities, p.class_names, resamples=0)
    drawn = resampled_figures(
        p.labels,
        p.probabilities,
        p.class_names,
        clusters=p.clusters,
        resamples=resamples,
        seed=seed,
    )
    values: dict[tuple[str, ...], float | None] = {}
    resampled: dict[tuple[str, ...], np.ndarray] = {}
    for name, path in FIGURES.items():
        values[name,], resampled[name,] = _at(report, path), _at(drawn, path)
    for name in p.class_names:
        figures = report["per_class"][name]
        values["recall", name] = figures["recall"] if figures["support"] else None
        resampled["recall", name] = drawn["per_class"][name]["recall"]
    return values, resampled


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _about(e: Evaluation) -> dict[str, Any]:
    model = ((e.about.get("config") or {}).get("model") or {}).get("name")
    return {
        "name": e.name,
        "folder": str(e.folder.absolute()),
        "model": e.about.get("title") or e.about.get("baseline") or model,
        "split": e.report.get("split"),
        "checkpoint": e.report.get("checkpoint"),
        "calibrated": bool((e.report.get("calibration") or {}).get("applied")),
    }


def _split(evaluations: Sequence[Evaluation]) -> str:
    """What all say that they scored; empty where they do not agree."""
    splits = {str(e.report.get("split") or "") for e in evaluations}
    return splits.pop() if len(splits) == 1 else ""


def _cautions(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """What weakens the comparison: the alarms of all, equal ones once, and what the pair adds."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for e in evaluations:
        for level, name, text in _alarms(e):
            said.setdefault((level, name, text), []).append(e.name)
    everyone = [e.name for e in evaluations]
    folders = {e.name: e.report["data_dir"] for e in evaluations if e.report.get("data_dir")}
    if len(set(map(os.path.realpath, folders.values()))) > 1:
        listed = "; ".join(f"{name} in {folder}" for name, folder in folders.items())
        text = f"Scored in different folders: {listed}. The files have the same names; whether "
        said["caution", "folders-differ", text + "they are the same images is not known."] = list(
            folders
        )
    calibrated = [e.name for e in evaluations if _about(e)["calibrated"]]
    if calibrated and calibrated != everyone:
        text = "Probabilities are scaled by a temperature here, not in the others: ECE, NLL and "
        text += "AUROC (of three classes or more) show that too."
        said["caution", "calibration-differs", text] = calibrated
    if not evaluations[0].predictions.groups and not any(n == "groups-unknown" for _, n, _ in said):
        text = "No groups are known (patients, near-duplicates): the intervals take images as "
        said["caution", "groups-unknown", text + "independent."] = everyone
    found = [
        {"name": name, "level": level, "text": text, "runs": runs}
        for (level, name, text), runs in said.items()
    ]
    return sorted(found, key=lambda item: item["level"] != "alarm")


def _alarms(e: Evaluation) -> list[tuple[str, str, str]]:
    """Level, name and text of each alarm that the predictions as they are now raise.

    The report's own are of the predictions as they were: of those only such as cannot be found
    from predictions and split.csv.
    """
    p = e.predictions
    k = len(p.class_names)
    split = e.report.get("split") or e.folder.name
    elsewhere = split == "all" and not own_folder(e.about, e.report)
    evidence = Evidence(
        matrix=np.bincount(p.labels * k + p.predicted, minlength=k * k).reshape(k, k),
        class_names=p.class_names,
        stated_accuracy=e.report.get("accuracy"),
        rows=() if elsewhere else e.rows,
        scored=split if split in (*PARTS, "all") and not elsewhere else None,
        stopped_on=e.report.get("stopped_on", "val"),
        files=p.files,
    )
    alarms, told = find_alarms(evidence), e.report.get("alarms") or ()
    # The folder may name groups by now that split.csv does not know.
    checked = {*(e.report.get("alarms_checked") or ())} - {alarm["name"] for alarm in told}
    if "groups-unknown" in checked:
        alarms = [alarm for alarm in alarms if alarm.name != "groups-unknown"]
    found = [(alarm.level, alarm.name, alarm.text) for alarm in alarms]
    raised, made = {name for _, name, _ in found}, set(checks_made(evidence)) - _OF_THE_FOLDER
    kept = [a for a in told if a["name"] not in raised | made]
    return found + [(a["level"], a["name"], a["text"]) for a in kept]


def _csv(comparison: Mapping[str, Any]) -> bytes:
    rows: list[list[Any]] = [["run", "figure", "value", "low", "high"]]
    for run in comparison["runs"]:
        figures = run["figures"]
        listed = [(name, figures[name]) for name in FIGURES]
        listed += [(f"recall {name}", figure) for name, figure in figures["recall"].items()]
        for name, figure in listed:
            rows.append([run["name"], name, figure["value"], *(figure["interval"] or ("", ""))])
    return csv_bytes(rows)


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """The figures, and the differences from the first, on the console."""
    runs, against = comparison["runs"], comparison["against_first"]
    groups = f" in {comparison['clusters']:,} groups" if comparison["groups_known"] else ""
    kind = f"{comparison['split']} " if comparison["split"] not in ("", "all") else ""
    print(f"{comparison['num_examples']:,} {kind}images{groups}, 95 % intervals in brackets")
    rows = {run["name"]: run["figures"] for run in runs}
    _print_table("", {_words(n): [_figure(row[n]) for row in rows.values()] for n in FIGURES}, rows)
    recall = {
        name: [_figure(row["recall"][name]) for row in rows.values()]
        for name in comparison["class_names"]
    }
    _print_table("recall", recall, rows)
    columns = {
        _words(n): [_figure(entry["difference"][n], "+") for entry in against] for n in DIFFERENCES
    }
    tests = [entry["mcnemar"] for entry in against]
    columns["right alone"] = [f"{test['only_second']:,}" for test in tests]
    columns["wrong alone"] = [f"{test['only_first']:,}" for test in tests]
    columns["McNemar p"] = [f"{test['p']:.2g}" for test in tests]
    if len(against) > 1:
        columns["after Holm"] = [f"{test['p_holm']:.2g}" for test in tests]
    _print_table(f"less {runs[0]['name']}", columns, [entry["second"] for entry in against])
    for item in comparison["cautions"]:
        print(f"{item['level']}: {', '.join(item['runs'])}: {item['text']}")


def _print_table(
    corner: str, columns: Mapping[str, Sequence[str]], rows: Iterable[str], most: int = 100
) -> None:
    """Columns of texts, in as many tables as keep lines below `most` characters."""
    shown = [[corner, *rows]]
    for name, column in columns.items():
        cells = [name, *column]
        if sum(max(map(len, c)) + 2 for c in [*shown, cells]) > most and len(shown) > 1:
            _print_columns(shown)
            shown = shown[:1]
        shown.append(cells)
    _print_columns(shown)


def _print_columns(columns: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(figure: Mapping[str, Any], sign: str = "") -> str:
    value, interval = figure["value"], figure["interval"]
    if value is None:
        return "-"
    text = f"{value:{sign}.4f}"
    return text + (f" ({interval[0]:{sign}.4f} to {interval[1]:{sign}.4f})" if interval else "")


def _compared_in(output: Path) -> list[str] | None:
    """The runs that the comparison in `output` is of; None without one."""
    runs = peek(output / "compare.json").get("runs")
    if not isinstance(runs, list):
        return None
    return [str(run.get("name")) for run in runs if isinstance(run, dict)]


def _main(arguments: list[str]) -> None:
    f = flags.FLAGS
    evaluations = read_evaluations([expanded(a) for a in arguments], f.split)
    if f.output:  # before the work
        refuse_foreign(expanded(f.output), _FILES, "against_first")
    comparison = compare(evaluations)
    split = comparison["split"]
    output = expanded(f.output) if f.output else Path(f"compare-{split}".rstrip("-"))
    before, now = _compared_in(output), [run["name"] for run in comparison["runs"]]
    if before is not None and before != now:
        print(
            f"note: this replaces the comparison of {', '.join(before)}: give --output to keep it"
        )
    write_comparison(output, comparison)
    print_comparison(comparison)
    print(f"written: {output}/compare.html, compare.json, compare.csv")


if __name__ == "__main__":
    flags.DEFINE_enum(
        "split", "", ("", *SCORED), "of the runs; empty: test where all have it, else val"
    )
    flags.DEFINE_string("output", "", "folder to write to; empty: ./compare-<split>")
    run_command(_main, positional=True)
