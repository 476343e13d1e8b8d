"""A model card from a run's own files: `python -m covid_flax.model_card --workdir=RUN`.

Follows Mitchell et al. 2019 ("Model cards for model reporting"), and answers the items of CLAIM
and TRIPOD+AI (`covid_flax.report.checklists`) as far as the files tell. What they do not tell is
listed as not known; what only the authors can tell comes from a file of theirs, and is marked so.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from markupsafe import Markup, escape

from covid_flax.command import run_command
from covid_flax.errors import UserError
from covid_flax.files import expanded, parse_json, write_atomically
from covid_flax.report.artefacts import Artefacts, read_artefacts
from covid_flax.report.checklists import CLAIM, TRIPOD_AI, Item
from covid_flax.report.statements import (
    ECE_NOTE,
    NOT_KNOWN,
    alarm_text,
    at,
    bootstrap,
    class_share,
    count,
    fall_short,
    limits,
    number,
    own_evaluations,
    sentences,
    share,
    share_of,
    split_counts,
    statements,
)
from covid_flax.report.summary import checkpoint_of

GUIDELINES = {"claim": ("CLAIM 2024", CLAIM), "tripod": ("TRIPOD+AI", TRIPOD_AI)}
_SCALED = "temperature applied"
_STATUSES = ("reported", "partly", "stated by the authors", NOT_KNOWN)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts: `rows` have as many as `head`, the first of each a heading."""

    caption: str
    head: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the card, all plain text: the renderers escape it.

    Attributes:
      title: its heading.
      level: 2, or 3 for a part of the one before.
      paragraphs, bullets, facts (name and value), tables: shown in this order.
    """

    title: str
    level: int = 2
    paragraphs: list[str] = dataclasses.field(default_factory=list)
    bullets: list[str] = dataclasses.field(default_factory=list)
    facts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)


def read_facts(path: Path) -> dict[str, dict[str, str]]:
    """What the authors state: TOML (or JSON), tables `claim` and `tripod` of item = "text".

    Raises:
      UserError: unreadable, or an item that the guideline has not.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read --facts={path}: {e}") from e
    if not isinstance(found, dict):
        raise UserError(f"--facts={path} must have the tables {' and '.join(GUIDELINES)}")
    for name, items in found.items():
        if name not in GUIDELINES or not isinstance(items, dict):
            raise UserError(f"--facts={path}: {name} is no table of {' or '.join(GUIDELINES)}")
        known = {i.number for i in GUIDELINES[name][1]}
        for item, said in items.items():
            if item not in known or not isinstance(said, str) or not said.strip():
                raise UserError(
                    f'--facts={path}: {name}.{item} is no item with a text: write 13 = "..."'
                )
    return found


def card(a: Artefacts, facts: Mapping[str, Mapping[str, str]] | None = None) -> list[Section]:
    """The whole card.

    Args:
      a: of the run.
      facts: of `read_facts`, what its authors state.
    """
    known, short = statements(a), fall_short(a)

    def say(key: str) -> str:
        return known[key] or NOT_KNOWN

    def stated(*items: str) -> str:
        """What the authors state for items like `claim.13`."""
        named = [item.split(".") for item in items]
        said = [(facts or {}).get(table, {}).get(number, "").strip() for table, number in named]
        text = " ".join(dict.fromkeys(filter(None, said)))
        return f"The authors: {text}" if text else NOT_KNOWN

    sections = [
        Section(
            "Summary",
            paragraphs=[
                say("technique"),
                f"Performance: {say('performance')}",
                *_notes(a),
            ],
            tables=_evaluation_tables(a),
        ),
        Section("Limits", bullets=limits(a)),
        Section(
            "Model details",
            facts=[
                ("Model", say("model")),
                ("First parameters", say("initialization")),
                ("Training", say("training")),
                ("Choice of the final model", say("selection")),
                ("Output", say("output")),
                ("Software", say("software")),
                ("Whole model", say("specification")),
                ("Developed by", NOT_KNOWN),
                ("Date", NOT_KNOWN),
                ("Licence of the model", NOT_KNOWN),
                ("Contact", NOT_KNOWN),
            ],
        ),
        Section(
            "Intended use",
            facts=[
                ("Made for", limits(a)[0]),
                ("Intended use and users", stated("claim.3", "tripod.3b")),
                ("Uses ruled out by its authors", NOT_KNOWN),
            ],
        ),
        Section(
            "Factors",
            facts=[
                ("Patients (age, sex, severity, ethnicity)", stated("claim.36")),
                ("Devices and acquisition", stated("claim.13")),
                (
                    "Sources, as the data folder names them",
                    _sources(a),
                ),
            ],
        ),
        Section(
            "Metrics",
            facts=[
                ("Measures", say("measures")),
                ("Uncertainty", say("uncertainty")),
                ("Calibration", say("recalibration")),
            ],
        ),
        Section(
            "Training and evaluation data",
            facts=[
                ("Images", say("data")),
                ("Labels", say("outcome")),
                ("How labels were established", stated("claim.14", "tripod.8b")),
                ("Preprocessing", say("preprocessing")),
                ("Split", say("partition")),
                ("Disjoint at the level of", say("disjoint")),
            ],
            tables=_data_tables(a),
        ),
        Section(
            "Quantitative analyses", paragraphs=[] if a.reports else [f"Evaluations: {NOT_KNOWN}"]
        ),
        *(_evaluation(a, name) for name in a.reports),
        *(_controls(f"{n}{a.of_folder(found)}", found) for n, found in a.controls.items()),
        Section(
            "Ethical considerations",
            facts=[
                ("Ethical approval and consent", stated("tripod.17")),
                ("Personal data in the images", NOT_KNOWN),
                ("Fairness between groups of patients", stated("tripod.14")),
                ("Possible harm", NOT_KNOWN),
            ],
        ),
    ]
    counts = []
    for key, (title, items) in GUIDELINES.items():
        answered = [_answer(item, known, short, (facts or {}).get(key) or {}) for item in items]
        rows = [
            [f"{item.number} {item.name}", text, status]
            for item, (text, status) in zip(items, answered, strict=True)
        ]
        table = Table(title, ["Item", "What is known", "Status"], rows)
        sections.append(
            Section(
                f"Items of {title}",
                paragraphs=["Named in short; from the run's files unless the authors are named."],
                tables=[table],
            )
        )
        tally = collections.Counter(status for _, status in answered)
        counts.append([title, str(len(items)), *(str(tally[s]) for s in _STATUSES)])
    heads = ["Guideline", "Items", *(s.capitalize() for s in _STATUSES)]
    return [*sections, Section("Items reported", tables=[Table("Items reported", heads, counts)])]


def _answer(
    item: Item, known: Mapping[str, str | None], short: set[str], stated: Mapping[str, str]
) -> tuple[str, str]:
    """What is known of an item, and its status."""
    text = known[item.statement] if item.statement else None
    status = NOT_KNOWN
    if text:
        status = "reported" if item.whole and item.statement not in short else "partly"
    if item.number in stated:
        text = f"{text or ''} The authors: {stated[item.number].strip()}".strip()
        status = status if status == "reported" else "stated by the authors"
    return text or NOT_KNOWN, status


def _sources(a: Artefacts) -> str:
    """What is known of whether an image's source tells its class."""
    own = [a.reports[name] for name in own_evaluations(a)]
    made = {name for report in own for name in report.get("alarms_checked") or ()}
    silent = "Not shown to give the class away." if "source-confounded" in made else NOT_KNOWN
    return alarm_text(a, "source-confounded") or silent


def _notes(a: Artefacts) -> list[str]:
    """What the table of evaluations must not be read without."""
    reports = [*a.reports.values(), *a.baselines.values()]
    said = []
    if any(map(_scaled, reports)):
        said.append(
            f"Rows marked '{_SCALED}': probabilities scaled by the temperature. AUROC and ECE of "
            "the other rows are of unscaled probabilities (the svm baseline's are fitted on val)."
        )
    if any(bootstrap(report, "ece") for report in reports):
        said.append(ECE_NOTE)
    return said


def _scaled(report: Mapping[str, Any]) -> bool:
    return bool(at(report, "calibration", "applied"))


def _evaluation_tables(a: Artefacts) -> list[Table]:
    head = ["Scored", "Images", "Accuracy", "Balanced accuracy", "AUROC", "ECE", "Those images"]
    roles = {
        "test": "neither trained this run nor chose its epoch",
        "val": "chose the epoch or setting",
        "train": "trained",
        "all": "trained, chose and neither",
    }

    origins = {
        "external": "of another folder",
        "alike": "of another folder, may be copies of the training images",
        "seen": "of another folder, with training images",
    }

    def role(report: Mapping[str, Any], name: str = "") -> str:
        origin = a.origin(name) if name else ""
        if origin in origins:
            return origins[origin]
        if report.get("split") == "all" and origin == "unknown":
            return NOT_KNOWN
        known = roles.get(str(report.get("split")), NOT_KNOWN)
        if report.get("split") == "val" and report.get("stopped_on", "val") is None:
            known = roles["test"]  # the last epoch, where no patience ended it
        # The files of the split in another folder: it may be the same one, moved.
        moved = a.own_folder(report) is False
        return f"{known}, if the folder holds the images of the run" if moved else known

    def row(name: str, report: Mapping[str, Any], role: str) -> list[str]:
        return [
            f"{name} ({_SCALED})" if _scaled(report) else name,
            f"{report['num_examples']:,}",
            share_of(report, "accuracy"),
            share_of(report, "balanced_accuracy"),
            number(at(report, "macro", "auroc"), bootstrap(report, "macro", "auroc")),
            number(report.get("ece"), bootstrap(report, "ece")),
            role,
        ]

    rows = [row(name, report, role(report, name)) for name, report in a.reports.items()]
    rows += [row(f"{n}, {split} (baseline)", r, role(r)) for (n, split), r in a.baselines.items()]
    return [Table("Evaluations", head, rows)] if rows else []


def _data_tables(a: Artefacts) -> list[Table]:
    counts = split_counts(a)
    if not counts:
        return []
    names = list(next(iter(counts.values())))
    rows = [
        [
            split,
            *(f"{n:,}" for n in by_class.values()),
            f"{sum(by_class.values()):,}",
            f"{len({row.group for row in a.rows if row.split == split and row.group}):,}",
        ]
        for split, by_class in counts.items()
    ]
    return [Table("Images by split and class", ["Split", *names, "Images", "Known groups"], rows)]


def _evaluation(a: Artefacts, name: str) -> Section:
    report = a.reports[name]
    columns = {
        "recall": "Sensitivity",
        "specificity": "Specificity",
        "precision": "PPV",
        "npv": "NPV",
    }
    per_class = report["per_class"]
    shown = [key for key in columns if all(key in figures for figures in per_class.values())]
    head = ["Class", "Images", *(columns[key] for key in shown)]
    rows = [
        [c, f"{per_class[c]['support']:,}", *(class_share(report, c, key) for key in shown)]
        for c in report["class_names"]
    ]
    if all("auroc" in figures for figures in per_class.values()):
        head.append("AUROC")
        for row in rows:
            interval = bootstrap(report, "per_class", row[0], "auroc")
            row.append(number(per_class[row[0]]["auroc"], interval))
    matrix = [
        [c, *(f"{n:,}" for n in row)]
        for c, row in zip(report["class_names"], report["confusion_matrix"], strict=True)
    ]
    paragraphs = [str(report["note"])] if report.get("note") else []
    if scored := checkpoint_of(report):
        paragraphs.append(f"{scored}, images of {report.get('data_dir') or NOT_KNOWN}.")
    if _scaled(report):
        paragraphs.append("The probabilities are scaled by the temperature.")
    alarms = report.get("alarms")
    if alarms is None:
        paragraphs.append("The checks that raise alarms were not run.")
    bullets = [f"{alarm['level'].capitalize()}: {alarm['text']}" for alarm in alarms or ()]
    return Section(
        f"Evaluation: {name}",
        level=3,
        paragraphs=paragraphs,
        bullets=bullets,
        tables=[
            Table("Each class against all others", head, rows),
            Table(
                "Confusion matrix, rows true, columns answered",
                ["True class", *report["class_names"]],
                matrix,
            ),
        ],
    )


def _controls(name: str, found: Mapping[str, Any]) -> Section:
    rows = [
        [
            str(c.get("title") or c.get("name")),
            count(c.get("num_examples", c.get("images"))),
            share(c.get("accuracy"), c.get("accuracy_interval")),
            share(c.get("balanced_accuracy"), c.get("balanced_accuracy_interval")),
        ]
        for c in found.get("conditions") or ()
    ]
    head = ["Images shown", "Images", "Accuracy", "Balanced accuracy"]
    return Section(
        f"Shortcut controls: {name}",
        level=3,
        paragraphs=sentences(found),
        tables=[Table("Shortcut controls", head, rows)],
    )


def markdown(title: str, sections: Sequence[Section]) -> str:
    """model_card.md; every text is escaped, so that names are names and not markup."""
    from covid_flax.report.page import render

    return render("model_card.md.j2", title=title, sections=sections, text=_inline, block=_block)


def _inline(value: str) -> Markup:
    """A line that Markdown shows as it is, in a table's cell or after other text."""
    line = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", value)
    line = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", line)
    return Markup(re.sub("[<>&]", lambda found: str(escape(found[0])), line))


def _block(value: str) -> Markup:
    """The same at the start of a paragraph, where `1.` or `-` would begin a list."""
    line = re.sub(r"^(\s*\d*)([-+=.)])", r"\1\\\2", str(_inline(value)))
    return Markup(line.strip())


def _page_rows(table: Table) -> list[list[Markup]]:
    """Cells of the page, an interval on its own line."""
    return [[_cell(text) for text in row] for row in table.rows]


def _cell(text: str) -> Markup:
    interval = re.fullmatch(r"([\d.\s%]+) (\([\d.]+ to [\d.]+\))", text)
    if interval is None:
        return escape(text)
    return Markup('{} <span class="interval">{}</span>').format(*interval.groups())


def write_card(
    output: Path, a: Artefacts, facts: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[Path, list[Section]]:
    """Writes the card as Markdown and as a page.

    Args:
      output: a folder, for model_card.md and model_card.html, or a file that ends in .md or .html,
        for that and the other beside it.
      a: of the run.
      facts: of `read_facts`.

    Returns:
      The path of the one or the other, and what they hold.

    Raises:
      UserError: the files cannot be written, or are no cards.
    """
    # Slow to import.
    from covid_flax.report.page import render

    title, sections = f"Model card: {a.name}", card(a, facts)
    path = output if output.suffix in (".md", ".html") else output / "model_card.md"
    page = render(
        "model_card.html.j2", title=title, sections=sections, not_known=NOT_KNOWN, rows=_page_rows
    )
    texts = {".md": markdown(title, sections), ".html": page}
    for suffix in texts:
        _refuse_foreign(path.with_suffix(suffix))
    for suffix, text in texts.items():
        write_atomically(path.with_suffix(suffix), text.encode("utf-8", "replace"))
    return path, sections


def _refuse_foreign(path: Path) -> None:
    if path.exists():
        with open(path, "rb") as file:
            if b"Model card: " not in file.read(2000):
                raise UserError(f"{path} is no card and would be lost: name another --output")


def _main() -> None:
    f = flags.FLAGS
    workdir = expanded(f.workdir)
    artefacts = read_artefacts(workdir)
    facts = read_facts(expanded(f.facts)) if f.facts else None
    output = expanded(f.output) if f.output else workdir
    path, sections = write_card(output, artefacts, facts)
    for row in sections[-1].tables[0].rows:
        listed = (f"{n} {status}" for n, status in zip(row[2:], _STATUSES, strict=True))
        print(f"{row[0]}: of {row[1]} items {', '.join(listed)}")
    print(f"written: {path.with_suffix('.md')}, {path.with_suffix('.html')}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_string("facts", "", "TOML or JSON of what the authors state: claim.13 = 'text'")
    flags.DEFINE_string("output", "", "folder, or file of .md or .html; empty: the run's folder")
    run_command(_main)
