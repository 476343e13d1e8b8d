"""The page of a run's shortcut controls, and what their figures say in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from covid_flax.data.conditions import Condition
from covid_flax.files import write_atomically
from covid_flax.report.page import count, figure3, percent, render, with_interval
from covid_flax.report.pictures import picture, short_names
from covid_flax.report.summary import checkpoint_of

# Of the balanced accuracy above chance, what counts as nearly all of it.
_NEARLY_ALL = 0.8
_FEW = 0.2  # of the answers
_LEVEL = 0.05  # of a family of tests
_BALANCED = "balanced_accuracy"


def explain(report: Mapping[str, Any]) -> list[str]:
    """The paragraph that sums up controls.json, a sentence or two an item."""
    by_name = {c["name"]: c for c in report["conditions"]}
    whole = by_name["whole"]
    fixed = report["references"]["majority"]
    said = [
        f"Whole, the run classes {_percent(whole['accuracy'])} of {whole['num_examples']:,} images "
        f"rightly (balanced accuracy {_percent(whole['balanced_accuracy'])}); always answering "
        f"{fixed['class']} would get {_percent(fixed['accuracy'])} (balanced "
        f"{_percent(fixed['balanced_accuracy'])})."
    ]
    if whole["above_chance"]:
        said += _hidden(report["conditions"])
        said.append(_coarse(by_name["coarse"]))
        said.append(_lungs_only(by_name["lungs_only"], whole))
        said.append(_matched(by_name["histogram_matched"], whole))
    else:
        said.append(_nothing_shown(report))
    said += _offered(report["conditions"])
    if report["pairs"]:
        said.append(_twins(report["pairs"]))
    said += _sources(report["sources"])
    return said


def verdict(report: Mapping[str, Any]) -> str:
    """`untested` (whole images are not shown to be classed above chance), else `shortcut` (it
    answers where hardly any lung is shown), `suspicion` (little) or `none`."""
    if not report["conditions"][0]["above_chance"]:
        return "untested"
    above = {c["shows"] for c in report["conditions"] if c["above_chance"]}
    if "no lung" in above:
        return "shortcut"
    return "suspicion" if "little lung" in above else "none"


def _nothing_shown(report: Mapping[str, Any]) -> str:
    # Reports of before the permutation test have neither.
    fewest = report["conditions"][0].get("fewest_groups")
    least = report.get("tests", {}).get("least_groups", 0)
    said = "Even on whole images the run is not shown to do better than a fixed answer"
    if fewest is not None and fewest < least:
        said += (
            f" (a class has {fewest:,} independent image{'s' if fewest != 1 else ''}, and no "
            f"finding rests on under {least})"
        )
    return f"{said}, so the changed images can show nothing of it."


def _hidden(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is left of the answers where the lungs are hidden."""
    none = [c for c in conditions if c["shows"] == "no lung" and c["above_chance"]]
    little = [c for c in conditions if c["shows"] == "little lung" and c["above_chance"]]
    silent = [c for c in conditions if c["shows"].endswith(" lung") and not c["above_chance"]]
    # Where masks are of one class alone there is nothing to tell apart.
    untold = [c for c in silent if c["p"] is None]
    silent = [c for c in silent if c["p"] is not None]
    fixed = f"any fixed answer has a balanced accuracy of {_percent(conditions[0]['chance'])}"
    others = [c for c in [*none, *little, *silent] if c["chance"] != conditions[0]["chance"]]
    if others:
        fixed += f" ({_percent(others[0]['chance'])} where only images with masks are asked about)"
    said = []
    if none:
        said.append(
            f"With hardly any lung in sight it still answers: {_and(map(_score, none))}; {fixed}. "
            "So what is not lung gives the class away, and the run reads it: a shortcut."
        )
    if little:
        said.append(
            f"With little lung in sight it still answers: {_and(map(_score, little))}; {fixed}. "
            "What is left there is what surrounds the lungs, with their edge or outline"
            + ("." if none else ": suspicious, but it shows no shortcut yet.")
        )
    if untold:
        said.append(
            f"Nothing can be told {_and(map(_with, untold))}: all images with masks are of one "
            "class."
        )
    if silent:
        said.append(
            f"It was not shown to do better than a fixed answer here: {_and(map(_score, silent))}. "
            "That does not show that it reads the lungs: such images are unlike any it was trained "
            f"on, and the commonest of its answers to them is {_commonest(silent)}."
        )
    return said


def _offered(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a simple model learns from images without lungs."""
    asked = [c for c in conditions if c["shows"] == "no lung" and c["simple_model"]]
    if not asked:
        return []
    c = max(asked, key=lambda c: [c["simple_model"][k] for k in ("above_chance", _BALANCED)])
    simple, whole = c["simple_model"], conditions[0]["simple_model"]
    start = (
        f"A simple model trained on {simple['num_training']:,} images {_with(c)} reaches a "
        f"balanced accuracy of {_percent(simple[_BALANCED])} (on whole ones "
        f"{_percent(whole[_BALANCED])}, any fixed answer {_percent(c['chance'])})"
    )
    if simple["above_chance"]:
        return [f"{start}: these data offer a shortcut to whoever learns from them."]
    if whole["above_chance"]:
        return [f"{start}: it was not shown to learn the class from what is not lung."]
    return [f"{start}: it was not shown to learn the class, not even from whole images."]


def _coarse(c: Mapping[str, Any]) -> str:
    start = f"Of images of {c['title']}, where no fine detail is left, it classes {_score(c)}"
    if not c["above_chance"]:
        return f"{start}: not shown to be better than a fixed answer."
    return (
        f"{start}: the mere spread of light and dark gives it {_percent(c['kept'])} of its lead in "
        "balanced accuracy over a fixed answer."
    )


def _lungs_only(c: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    start = f"Of the images {_with(c)} it classes {_score(c, where=False)}"
    if _keeps(c):
        return f"{start}: it hardly needs what surrounds the lungs, though it may use it."
    if _loses(c, whole):
        return (
            f"{start}: either it needs the surroundings, or the black frame is too strange to it."
        )
    return f"{start}."


def _matched(c: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    start = (
        f"With the greys of every image matched to one histogram it classes "
        f"{_score(c, where=False)}, and {_percent(c['changed'])} of its answers change"
    )
    if _keeps(c) and c["changed_interval"][1] <= _FEW:
        return f"{start}: brightness and contrast carry little of them."
    if _loses(c, whole):
        return (
            f"{start}: they lean on brightness and contrast, or such images are too strange to it."
        )
    return f"{start}."


def _keeps(c: Mapping[str, Any]) -> bool:
    """Whether nearly all of the whole images' lead over a fixed answer is left."""
    return bool(c["above_chance"] and c["kept"] is not None and c["kept"] >= _NEARLY_ALL)


def _loses(c: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether much of that lead is gone, and more than the interval allows for."""
    high = c["balanced_accuracy_interval"][1]
    before = c.get("whole_balanced_accuracy", whole[_BALANCED])  # of the same images
    return bool(c["kept"] is not None and c["kept"] < _NEARLY_ALL and high < before)


def _twins(pairs: Mapping[str, Any]) -> str:
    said = (
        f"Of {pairs['num_pairs']:,} images that were scored again after another export, "
        f"{pairs['flipped']:,} ({_percent(pairs['flip_rate'])}) are answered differently"
    )
    answers = pairs["answers"]
    drawn = [
        (figures["became"] - figures["ceased"], name, figures)
        for name, figures in answers.items()
        if figures["became"] > figures["ceased"] and figures["p"] * len(answers) <= _LEVEL
    ]
    if drawn:
        _, name, figures = max(drawn, key=lambda found: found[:2])
        return (
            f"{said}: {figures['became']:,} become {name}, {figures['ceased']:,} cease to be it. "
            "The same radiograph; only the export can have drawn the answer there."
        )
    if not pairs["flipped"]:
        return f"{said}."
    return f"{said}; they were not shown to be drawn towards any class."


def _of_itself(alone: Mapping[str, Any]) -> bool:
    return alone.get("learned_from") == "the same images"


def _sources(sources: Mapping[str, Any]) -> list[str]:
    said = []
    alone = sources["alone"]
    if alone:
        said.append(
            f"Knowing only the source of an image, as the data folder names it (perhaps only where "
            f"the copies were downloaded; here {alone['num_sources']:,}), gives "
            f"{_percent(alone['accuracy'])} accuracy (the commonest class "
            f"{_percent(alone['majority'])})"
            + (", learned from these very images." if _of_itself(alone) else ".")
        )
    for label, probes in sources["within"].items():
        answers = probes["answers"]
        told = answers["interval"] and answers["interval"][0] > answers["chance"]
        said.append(
            f"Within {label} a simple probe names that source from the run's probabilities with a "
            f"balanced accuracy of {_percent(answers['balanced_accuracy'])} (chance "
            f"{_percent(answers['chance'])}): "
            + (
                "its answers carry the source beside the class."
                if told
                else "its answers were not shown to carry the source."
            )
        )
    if sources["not_applicable"]:
        said.append(f"A probe for the source within a class: {sources['not_applicable']}.")
    return said


def _commonest(conditions: Sequence[Mapping[str, Any]]) -> str:
    answers: Counter[str] = Counter()
    for c in conditions:
        answers.update(c["predicted"])
    name, n = answers.most_common(1)[0]
    return f"{name} ({_percent(n / answers.total())})"


def _with(c: Mapping[str, Any]) -> str:
    return f"with the {c['title']}"


def _score(c: Mapping[str, Any], *, where: bool = True) -> str:
    placed = f" {_with(c)}" if where and c["name"] != "coarse" else ""
    return (
        f"{_percent(c['accuracy'])} rightly{placed} (balanced {_percent(c['balanced_accuracy'])})"
    )


def _and(parts: Iterable[str]) -> str:
    items = list(parts)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def write_controls_page(
    path: Path,
    report: Mapping[str, Any],
    examples: Sequence[tuple[Condition, Mapping[str, np.ndarray]]],
    *,
    title: str,
) -> None:
    """Writes controls.html, whole or not at all.

    Args:
      path: of the page.
      report: as in controls.json.
      examples: each condition, and what it makes of an image of each class, uint8 `[H, W, 3]`.
      title: of the page.

    Raises:
      UserError: the file cannot be written.
    """
    whole, *changed = report["conditions"]
    # What shows a little lung is beside the point where something shows none.
    hidden = [c for c in changed if c["shows"] == "no lung"]
    hidden = hidden or [c for c in changed if c["shows"] == "little lung"]
    strongest = max(hidden, key=lambda c: c["balanced_accuracy"] - c["chance"])
    text = render(
        "controls.html.j2",
        title=title,
        report=report,
        whole=whole,
        strongest=strongest,
        verdict=verdict(report),
        table=_table(report),
        conditions=[(c["title"], c["what"]) for c in report["conditions"]],
        strip=picture(_strip(report["class_names"], examples), _strip_in_words(examples)),
        twins=_twin_tables(report),
        probes=_probe_table(report["sources"]),
        facts=_facts(report),
    )
    write_atomically(Path(path), text.encode("utf-8", "replace"))


def _table(report: Mapping[str, Any]) -> dict[str, Any]:
    names = report["class_names"]
    head = ["Images", "Scored", "Accuracy", "Balanced accuracy", "p", "Simple model"]
    head += ["Answers changed", "Confidence", "Commonest answer"]
    head += [f"Sensitivity {name}" for name in names]
    rows: list[list[Any]] = []
    for c in report["conditions"]:
        changed = with_interval(c["changed"], c["changed_interval"])
        commonest, answered = max(c["predicted"].items(), key=lambda item: item[1])
        rows.append(
            [
                c["title"],
                count(c["num_examples"]),
                with_interval(c["accuracy"], c["accuracy_interval"]),
                with_interval(c["balanced_accuracy"], c["balanced_accuracy_interval"]),
                _p_value(c["p"]),
                _simple(c["simple_model"]),
                "" if c["name"] == "whole" else changed,
                figure3(c["confidence"]),
                f"{commonest} {percent(answered / c['num_examples'])}",
                *(with_interval(c["recall"][n], c["recall_interval"][n]) for n in names),
            ]
        )
    fixed, guess = (report["references"][key] for key in ("majority", "guessing"))
    for label, reference in (
        (f"always {fixed['class']}", fixed),
        ("guessing at the classes' shares", guess),
    ):
        heading = Markup('<span class="soft">{}</span>').format(label)
        figures = [percent(reference["accuracy"]), percent(reference["balanced_accuracy"])]
        rows.append([heading, "", *figures, *[""] * (len(names) + 5)])
    return {"head": head, "rows": rows}


def _p_value(p: float | None) -> Any:
    return "below 0.001" if p is not None and p < 0.001 else figure3(p)


def _simple(figures: Mapping[str, Any] | None) -> Markup:
    if figures is None:
        return with_interval(None, None)
    return with_interval(figures["balanced_accuracy"], figures["balanced_accuracy_interval"])


def _strip(
    names: Sequence[str], examples: Sequence[tuple[Condition, Mapping[str, np.ndarray]]]
) -> Figure:
    """A row for each condition, a column for each class."""
    shown = [name for name in names if any(name in images for _, images in examples)]
    short = dict(zip(shown, short_names(shown, 16), strict=True))
    figure = Figure(figsize=(1.05 * len(shown), 1.05 * len(examples)))
    axes = figure.subplots(len(examples), len(shown), squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.04, hspace=0.04)
    for row, (condition, images) in zip(axes, examples, strict=True):
        for ax, name in zip(row, shown, strict=True):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            if name in images:
                ax.imshow(images[name], interpolation="none")
        row[0].set_ylabel(condition.title, rotation=0, ha="right", va="center", fontsize=9)
    for ax, name in zip(axes[0], shown, strict=True):
        ax.set_title(short[name], fontsize=9, parse_math=False)
    return figure


def _strip_in_words(examples: Sequence[tuple[Condition, Mapping[str, np.ndarray]]]) -> str:
    return "One image of each class under each condition: " + ", ".join(
        condition.title for condition, _ in examples
    )


def _twin_tables(report: Mapping[str, Any]) -> dict[str, Any] | None:
    pairs, names = report["pairs"], report["class_names"]
    if not pairs:
        return None
    matrix = [[name, *map(count, row)] for name, row in zip(names, pairs["matrix"], strict=True)]
    answers = [
        [
            name,
            count(a["originals"]),
            count(a["twins"]),
            count(a["became"]),
            count(a["ceased"]),
            _p_value(a["p"]),
            f"{a['probability']:+.3f}".replace("-", "−"),
        ]
        for name, a in pairs["answers"].items()
    ]
    return {
        "rate": with_interval(pairs["flip_rate"], pairs["flip_interval"]),
        "matrix": {"head": ["Original's answer", *names], "rows": matrix},
        "answers": {
            "head": ["Answer", "Originals", "Twins", "Became", "Ceased", "p", "Probability"],
            "rows": answers,
        },
    }


def _probe_table(sources: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = [
        [
            label,
            count(p["answers"]["num_examples"]),
            ", ".join(f"{name} ({n:,})" for name, n in p["answers"]["sources"].items()),
            with_interval(p["answers"]["balanced_accuracy"], p["answers"]["interval"]),
            with_interval(p["thumbnails"]["balanced_accuracy"], p["thumbnails"]["interval"]),
            percent(p["answers"]["chance"]),
        ]
        for label, p in sources["within"].items()
    ]
    head = ["Within", "Images", "Sources", "From the run's answers", "From thumbnails", "Chance"]
    return {"head": head, "rows": rows} if rows else None


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    scored, available = report["num_examples"], report["num_available"]
    of_split = "" if report["split"] == "all" else f"the {report['split']} split of "
    images = f"{scored:,} of {of_split}{report['data_dir']}"
    if scored < available:
        images += f", drawn class by class from {available:,}"
    masks = report["masks"]
    pairs = [
        ("Images", images),
        ("By class", ", ".join(f"{name} {n:,}" for name, n in report["support"].items())),
        ("Checkpoint", checkpoint_of(report)),
        ("Lungs", f"masks of {masks:,} images" if masks else "a fixed box, for there are no masks"),
        ("Twins", report["pairs_dir"] or "none given"),
    ]
    return [(name, value) for name, value in pairs if value]
