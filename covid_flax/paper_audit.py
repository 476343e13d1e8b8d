"""Recomputes the paper's figures from what it publishes: `python -m covid_flax.paper_audit`.

Sun, S. (2024), "Pretrained-ResNet-based COVID-19 CT image classification", Theoretical and
Natural Science 62, 190-196. Prints what the paper claims, what its own numbers give, and the
alarms of `covid_flax.evaluation.alarms` that they raise. With `--workdir=RUN` it also repeats, on
a run's predictions, the fault that would explain the paper's confusion matrix.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from covid_flax.command import run_command
from covid_flax.evaluation.alarms import (
    CHECKS,
    LEVEL,
    Alarm,
    Evidence,
    chance_accuracy,
    checks_made,
    find_alarms,
    independence,
    kappa,
    percent,
)
from covid_flax.evaluation.intervals import wilson
from covid_flax.evaluation.predictions import Predictions, read_predictions
from covid_flax.files import expanded, refuse_foreign, write_json
from covid_flax.models import create_model
from ml_collections_configs import base

CLASSES = ("COVID", "Lung Opacity", "Normal", "Viral Pneumonia")

MATRIX = np.array(
    [
        [102, 174, 288, 49],
        [201, 321, 576, 63],
        [376, 631, 1049, 140],
        [44, 76, 125, 17],
    ]
)
"""Figure 2, each number also in section 5's text; rows are what the text calls the true class."""

CLASS_COUNTS = {"COVID": 3616, "Lung Opacity": 6012, "Normal": 10192, "Viral Pneumonia": 1345}
"""Section 3."""

ACCURACY = 0.8233
"""Sections 5 and 6."""

VAL_FRACTION = 0.2
"""Section 3: 80:20."""

TABLE_1 = {"ResNet50": 23_587_712, "Dense 1024": 1_049_600, "Output": 4_100}
"""Parameters by layer; the pooling and the dropout have none."""

SOURCE_COUNTS = {
    "BIMCV PadChest": {"COVID": 2473},
    "SIRM, GitHub, Kaggle, Twitter": {"COVID": 559},
    "GitHub (COVID-CXNet)": {"COVID": 400},
    "Hannover Medical School": {"COVID": 183},
    "unstated": {"COVID": 1},
    "RSNA": {"Normal": 8851, "Lung Opacity": 6012},
    "Kermany (children)": {"Normal": 1341, "Viral Pneumonia": 1345},
}
"""Not in the paper: the README of the COVID-19 Radiography Database (Kaggle). Its sources of COVID
add up to 3,615 of the 3,616 images."""

_ORDERS = 200


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the audit.

    Attributes:
      claim: what the paper says, and where.
      recomputed: what follows from the published numbers.
      verdict: "holds"; "wrong"; "contradicted" by Figure 2, of which one must be wrong; "inferred",
        from the paper with an assumption; or "context", a figure to judge the claim by.
      figures: the recomputed figures, as plain JSON values.
    """

    claim: str
    recomputed: str
    verdict: str
    figures: dict[str, Any]


def paper_findings() -> list[Finding]:
    """The audit of the paper, in the paper's order. Builds no array of a network."""
    return [*_data(), *_network(), *_results()]


def paper_evidence() -> Evidence:
    """The paper's numbers as `covid_flax.evaluation.alarms` takes them.

    The images that stop training are taken to be the 20 %: the paper names no other held-out
    images, and calls them validation and test set by turns.
    """
    return Evidence(
        MATRIX,
        CLASSES,
        stated_accuracy=ACCURACY,
        stated_decimals=4,
        class_counts={name: int(VAL_FRACTION * n) for name, n in CLASS_COUNTS.items()},
        scored="val",
        stopped_on="val",
        source_counts=SOURCE_COUNTS,
    )


def _data() -> list[Finding]:
    n, scored = sum(CLASS_COUNTS.values()), int(MATRIX.sum())
    by_class = [int(VAL_FRACTION * count) for count in CLASS_COUNTS.values()]
    whole = int(VAL_FRACTION * n)
    confounded = _alarm("source-confounded").figures
    return [
        Finding(
            "CT images (title, abstract, sections 1 and 6)",
            "section 3 names a database of chest X-rays, and it holds nothing else",
            "wrong",
            {},
        ),
        Finding(
            "Split 80:20 (section 3)",
            f"int(0.2 n) of each class: {_join(by_class)}, together {sum(by_class):,}, as Figure "
            f"2's {scored:,}. ImageDataGenerator(validation_split=0.2) rounds down by class so; "
            "train_test_split and image_dataset_from_directory would hold out "
            f"{whole:,}. That generator takes the first fifth of each class's sorted file names "
            "(data.split=paper-sorted)",
            "inferred",
            {"scored": scored, "floors": by_class, "floor_of_all": whole},
        ),
        Finding(
            "Images tell the disease (sections 1 and 6)",
            f"knowing an image's source alone gives {percent(confounded['source_only_accuracy'])} "
            f"on the whole database; no source holds {', '.join(confounded['classes_alone'])} "
            "beside another class (source counts: the database's README, not the paper)",
            "context",
            confounded,
        ),
    ]


def _network() -> list[Finding]:
    ours = count_parameters()
    stated = sum(TABLE_1.values())
    total = sum(ours.values())
    wide = 2048 * 1024 + 1024
    return [
        Finding(
            f"ResNet50 without top: {TABLE_1['ResNet50']:,} parameters (Table 1)",
            f"{ours['ResNet50']:,}, running statistics included",
            _verdict(ours["ResNet50"] == TABLE_1["ResNet50"]),
            {"parameters": ours["ResNet50"]},
        ),
        Finding(
            f"Dense 1024: {TABLE_1['Dense 1024']:,} parameters (Table 1)",
            f"{ours['Dense 1024']:,} = 2048 x 1024 + 1024 for ResNet50's 2,048 channels; the "
            "stated number fits 1,024",
            _verdict(ours["Dense 1024"] == TABLE_1["Dense 1024"]),
            {"parameters": ours["Dense 1024"], "formula": wide, "fits": 1024 * 1024 + 1024},
        ),
        Finding(
            f"Output layer: {TABLE_1['Output']:,} parameters (Table 1)",
            f"{ours['Output']:,}",
            _verdict(ours["Output"] == TABLE_1["Output"]),
            {"parameters": ours["Output"]},
        ),
        Finding(
            f"Together {stated:,} (sum of Table 1)",
            f"{total:,}",
            _verdict(total == stated),
            {"parameters": total, "stated": stated},
        ),
    ]


def count_parameters() -> dict[str, int]:
    """Parameters and running statistics of the paper's network, by the layers of `TABLE_1`.

    Counted on this package's network, of which only the shapes are made.
    """
    config = base.get_config().model
    config.name, config.hidden_units = "resnet50", 1024
    params, statistics = jax.eval_shape(lambda: create_model(config, len(CLASSES), 0)[1:])
    sizes = {stage: _size(params[stage]) + _size(statistics.get(stage, {})) for stage in params}
    head = sizes.pop("head")
    output = next(
        _size(layer) for layer in params["head"].values() if layer["bias"].shape == (len(CLASSES),)
    )
    return {"ResNet50": sum(sizes.values()), "Dense 1024": head - output, "Output": output}


def _size(tree: Any) -> int:
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def _results() -> list[Finding]:
    n, right = int(MATRIX.sum()), int(np.trace(MATRIX))
    rows, columns = MATRIX.sum(1), MATRIX.sum(0)
    counts = [int(VAL_FRACTION * count) for count in CLASS_COUNTS.values()]
    (low,), (high,) = wilson(np.array([right]), np.array([n]))
    test, agreement, chance = independence(MATRIX), kappa(MATRIX), chance_accuracy(MATRIX)
    along_rows, along_columns = MATRIX.diagonal() / rows, MATRIX.diagonal() / columns
    most = int(np.minimum(rows, columns).sum())
    called_normal, normal_called = columns[2] / n, along_rows[2]
    stated = round(ACCURACY * n)
    return [
        Finding(
            f"Accuracy {percent(ACCURACY)} (sections 5 and 6)",
            f"Figure 2 has {right:,} of {n:,} right, {percent(right / n)} (Wilson 95 % "
            f"{low * 100:.1f} to {high * 100:.1f}); {percent(ACCURACY)} would be {stated:,}",
            _verdict(stated == right, "contradicted"),
            {
                "right": right,
                "num_examples": n,
                "accuracy": right / n,
                "wilson": [float(low), float(high)],
                "stated_right": stated,
            },
        ),
        Finding(
            "Figure 2's rows are the true classes (section 5)",
            f"rows sum to {_join(rows)}, columns to {_join(columns)}; the classes have "
            f"{_join(counts)} images to score: columns are the truth, the text transposes them",
            _verdict(rows.tolist() == counts),
            {"rows": rows.tolist(), "columns": columns.tolist(), "class_counts": counts},
        ),
        Finding(
            "Figure 2 shows what the model confuses (section 5)",
            f"rows and columns are independent: chi-squared {test.chi2:.3f}, df {test.df}, p = "
            f"{test.p:.3f}, Cramer's V {test.cramers_v:.3f}, kappa {agreement:.4f}. Chance for "
            f"these margins is {chance * n:,.2f} right, {percent(chance)}",
            _verdict(test.p <= LEVEL, "contradicted"),
            {
                "chi2": test.chi2,
                "df": test.df,
                "p": test.p,
                "cramers_v": test.cramers_v,
                "kappa": agreement,
                "chance_right": chance * n,
                "chance": chance,
            },
        ),
        Finding(
            "COVID is told from the other classes (section 6)",
            f"recall of COVID is {percent(along_columns[0])} (as the text reads the axes "
            f"{percent(along_rows[0])}); balanced accuracy {percent(along_columns.mean())} "
            f"({percent(along_rows.mean())}), chance 25 %",
            "contradicted",
            {
                "recall": dict(zip(CLASSES, along_columns.tolist(), strict=True)),
                "recall_as_read": dict(zip(CLASSES, along_rows.tolist(), strict=True)),
                "balanced_accuracy": float(along_columns.mean()),
                "balanced_accuracy_as_read": float(along_rows.mean()),
            },
        ),
        Finding(
            "Normal does relatively well (section 5)",
            f"{percent(normal_called)} of the row Normal fall in the column Normal, which takes "
            f"{percent(called_normal)} of all images; always saying Normal is right for "
            f"{percent(max(counts) / n)}",
            "contradicted",
            {
                "row_normal_in_column_normal": float(normal_called),
                "column_normal": float(called_normal),
                "majority": max(counts) / n,
            },
        ),
        Finding(
            "Accuracy on the test set (section 6), on the validation set (section 5)",
            "the paper has one held-out part, so it also stops training: the figure is optimistic",
            "inferred",
            {},
        ),
        Finding(
            f"{percent(ACCURACY)} and Figure 2 are of one model (section 5)",
            "possible if predict() ran over a shuffled generator and generator.classes are in file "
            f"order: both margins stay right (with them up to {percent(most / n)} accuracy is "
            "possible), the pairs become chance. Then only Figure 2 is wrong. --workdir=RUN shows "
            "it on a run",
            "inferred",
            {"highest_accuracy_for_margins": most / n},
        ),
    ]


@dataclasses.dataclass(frozen=True)
class ShuffledRun:
    """A run's confusion matrix, and what a shuffled generator would have made of it.

    Attributes:
      before: counts `[K, K]` of the run, rows true and columns predicted.
      after: the same labels, the predictions in a shuffled order.
      accuracies: lowest and highest accuracy over `orders` shuffled orders.
      orders: how many were drawn; `after` is the first.
    """

    before: np.ndarray
    after: np.ndarray
    accuracies: tuple[float, float]
    orders: int


def shuffle_predictions(predictions: Predictions, seed: int = 0) -> ShuffledRun:
    """Pairs labels in file order with predictions in a shuffled one.

    So does `model.predict(generator)` of a Keras generator with shuffle=True, its default, when
    compared with `generator.classes`, which stay in file order.
    """
    k = len(predictions.class_names)

    def count(predicted: np.ndarray) -> np.ndarray:
        return np.bincount(predictions.labels * k + predicted, minlength=k * k).reshape(k, k)

    rng = np.random.default_rng(seed)
    drawn = [count(rng.permutation(predictions.predicted)) for _ in range(_ORDERS)]
    accuracies = [float(np.trace(m) / m.sum()) for m in drawn]
    ends = (min(accuracies), max(accuracies))
    return ShuffledRun(count(predictions.predicted), drawn[0], ends, _ORDERS)


def _print_audit(findings: Sequence[Finding], evidence: Evidence, alarms: Sequence[Alarm]) -> None:
    print("Sun (2024), Theoretical and Natural Science 62, 190-196, from its own numbers\n")
    _print_table(
        ("claim", "recomputed", "verdict"),
        [(f.claim, f.recomputed, f.verdict) for f in findings],
    )
    print("\nAlarms that the paper's numbers raise:\n")
    _print_table(("level", "name", "why"), [(a.level, a.name, a.text) for a in alarms], (8, 24, 66))
    made = checks_made(evidence)
    silent = set(made) - {a.name for a in alarms}
    print(f"\nChecked and silent: {_join(name for name in CHECKS if name in silent)}.")
    print(f"Not to be checked from the paper: {_join(n for n in CHECKS if n not in made)}.")


def _print_shuffled(run: ShuffledRun, names: Sequence[str], title: str) -> None:
    print(f"\nThe shuffled generator, repeated on {title} (rows true, columns predicted):\n")
    for said, matrix in (("as it is", run.before), ("labels in file order", run.after)):
        test, chance = independence(matrix), chance_accuracy(matrix)
        line = (
            f"{said}: {int(np.trace(matrix)):,} of {int(matrix.sum()):,} right, "
            f"{percent(np.trace(matrix) / matrix.sum())} (chance for these margins "
            f"{percent(chance)}); chi-squared {test.chi2:,.3f}, df {test.df}, {_p(test.p)}, "
            f"Cramer's V {test.cramers_v:.3f}"
        )
        print(textwrap.fill(line, 100))
        width = max(map(len, names))
        rows = [*matrix.tolist(), matrix.sum(0).tolist()]
        for name, row in zip([*names, "sum"], rows, strict=True):
            print(f"  {name:<{width}} " + " ".join(f"{n:>7,}" for n in [*row, sum(row)]))
        print()
    as_it_is, raised = (
        [f"{a.name} ({a.level})" for a in find_alarms(Evidence(matrix, names))]
        for matrix in (run.before, run.after)
    )
    low, high = run.accuracies
    print(
        textwrap.fill(
            f"The margins stay, the pairs are chance: accuracy lies from {percent(low)} to "
            f"{percent(high)} over {run.orders} shuffled orders. Raised by the matrix as it is: "
            f"{_join(as_it_is) or 'nothing'}; by the shuffled one: {_join(raised) or 'nothing'}. "
            "The paper's Figure 2 has this signature: the margin of "
            "the truth is exact, the other is near it, and the two are independent.",
            100,
        )
    )


def _print_table(
    header: tuple[str, ...],
    rows: Iterable[tuple[str, ...]],
    widths: tuple[int, ...] = (32, 54, 12),
) -> None:
    for row in (header, tuple("-" * w for w in widths), *rows):
        cells = [textwrap.wrap(cell, w) for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            line = "  ".join(
                f"{cell[i] if i < len(cell) else '':<{w}}"
                for cell, w in zip(cells, widths, strict=True)
            )
            print(line.rstrip())


def _alarm(name: str) -> Alarm:
    return next(a for a in find_alarms(paper_evidence()) if a.name == name)


def _verdict(holds: bool, otherwise: str = "wrong") -> str:
    return "holds" if holds else otherwise


def _p(p: float) -> str:
    return f"p = {p:.3g}" if p >= 1e-300 else "p < 1e-300"


def _join(items: Iterable[Any]) -> str:
    return ", ".join(item if isinstance(item, str) else f"{item:,}" for item in items)


def _main() -> None:
    f = flags.FLAGS
    shuffled, title = None, ""
    if f.workdir:
        workdir = expanded(f.workdir)
        predictions = read_predictions(workdir / "eval" / f.split / "predictions.csv")
        shuffled, title = shuffle_predictions(predictions), f"{workdir.name}, {f.split} images"
    findings, evidence = paper_findings(), paper_evidence()
    alarms = find_alarms(evidence)
    _print_audit(findings, evidence, alarms)
    if shuffled is not None:
        _print_shuffled(shuffled, predictions.class_names, title)
    if f.output:
        path = expanded(f.output) / "paper_audit.json"
        document: dict[str, Any] = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "alarms": [dataclasses.asdict(alarm) for alarm in alarms],
        }
        if shuffled is not None:
            run = dataclasses.asdict(shuffled)
            run |= {"before": shuffled.before.tolist(), "after": shuffled.after.tolist()}
            document["shuffled"] = {"class_names": list(predictions.class_names), **run}
        refuse_foreign(path.parent, (path.name,), "findings")
        write_json(path, document, allow_nan=True)
        print(f"\nwritten: {path}")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "", "a scored run on whose predictions to repeat the fault")
    flags.DEFINE_enum("split", "val", ("val", "test", "train", "all"), "which of its images")
    flags.DEFINE_string("output", "", "folder for paper_audit.json; empty: none is written")


if __name__ == "__main__":
    _define_flags()
    run_command(_main)
