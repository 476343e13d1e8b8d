"""What makes an evaluation hard to believe, found from its confusion matrix and its split.

Each check is a small function of plain counts that returns an `Alarm` or None, so that the
figures of any publication can be checked as well as a run's own. `find_alarms` makes every
check that the evidence allows. No file is read.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from covid_flax.data.splits import Row
from covid_flax.evaluation.intervals import wilson_interval

_SMALL_CLASS = 50  # images

CHECKS = {
    "independent-predictions": "predictions depend on the labels (chi-squared)",
    "below-majority": "always naming the commonest class would not be right more often",
    "class-never-predicted": "every class with images is predicted at least once",
    "swapped-axes": "the rows, not the columns, have the true class counts",
    "accuracy-mismatch": "the stated accuracy is the matrix's",
    "scored-counts": "every image that should be scored is, once",
    "stopping-split-scored": "the images scored did not choose the epoch or the settings",
    "batch-statistics": "batch norm's statistics are of plain images, as those scored are",
    "training-images-scored": "the images scored were not trained on",
    "group-leak": "no known group (patient, near-duplicates) is both trained on and scored",
    "duplicate-leak": "no identical file is both trained on and scored",
    "groups-unknown": "most images share a known group with another, as a patient's images do",
    "small-class": f"every class has at least {_SMALL_CLASS} scored images",
    "source-confounded": (
        "an image's source, as the data name it, is not shown to give its class away"
    ),
}
"""Every check by the name of its alarm, with what its silence says."""

LEVEL = 0.01
"""Of the tests of independence: p above it is what chance would give."""

# A matrix with this Cramer's V is hardly useful: of balanced classes with even errors it has
# kappa 0.3, 47.5 % accuracy on four classes. Too few images to show even that prove nothing.
_LEAST_V = 0.3
_POWER = 0.99
# A class with recall of one half stays unpredicted over 7 images less than once in 100 times.
_LEAST_IMAGES_TO_MISS = 7
_TABLES = 9999
_CELLS_AT_ONCE = 2**22  # of random tables, 32 MB


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A reason for doubt.

    Attributes:
      name: one of `CHECKS`.
      level: "alarm", the figures are wrong or say nothing; or "caution", they say less than
        they seem to.
      text: one or two sentences with the figure that raised it.
      figures: the same figures, as plain JSON values.
    """

    name: str
    level: Literal["alarm", "caution"]
    text: str
    figures: dict[str, Any]


_STATISTICS = Alarm(
    "batch-statistics",
    "alarm",
    "Batch norm's statistics are of augmented images, or of other weights than those scored: the "
    "figures may be many points too low (train.recalibrate=0, or a checkpoint amid an epoch whose "
    "training images were not there).",
    {},
)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of an evaluation. Checks whose input is missing are not made.

    Attributes:
      matrix: counts `[K, K]`, rows true and columns predicted.
      class_names: K names; "class 0"... where empty.
      stated_accuracy: a fraction, as published.
      stated_decimals: decimals of that fraction (82.33 % has 4); None for an exact one.
      class_counts: how many images of each class should be scored; where None, taken from
        `rows`.
      rows: the split's rows of all images.
      scored: the split of `rows` that is scored, "all" for all of them; None for images outside
        the split.
      stopped_on: the split that chose the epoch; None where none did.
      files: the scored files, one for each row of predictions.
      hashes: content hash by file, of some or all of `rows`.
      source_counts: images by source, then by class.
      statistics_fit: whether batch norm's statistics are of images as those scored are; None
        where none are kept, or nobody knows.
    """

    matrix: Any
    class_names: Sequence[str] = ()
    stated_accuracy: float | None = None
    stated_decimals: int | None = None
    class_counts: Mapping[str, int] | None = None
    rows: Sequence[Row] = ()
    scored: str | None = None
    stopped_on: str | None = None
    files: Sequence[str] | None = None
    hashes: Mapping[str, str] | None = None
    source_counts: Mapping[str, Mapping[str, int]] | None = None
    statistics_fit: bool | None = None


def find_alarms(evidence: Evidence) -> list[Alarm]:
    """Alarms, then cautions, each in the order of `CHECKS`.

    Raises:
      ValueError: `matrix` is no square table of counts, or does not fit `class_names`.
    """
    found = [alarm for alarm in _check_all(evidence).values() if alarm is not None]
    return sorted(found, key=lambda a: (a.level != "alarm", list(CHECKS).index(a.name)))


def checks_made(evidence: Evidence) -> list[str]:
    """Names of the checks for which there is evidence, whether or not they raise an alarm.

    Raises:
      ValueError: as `find_alarms`.
    """
    made = _check_all(evidence)
    return [name for name in CHECKS if name in made]


def _check_all(e: Evidence) -> dict[str, Alarm | None]:
    matrix = _counts(e.matrix)
    names = tuple(e.class_names) or tuple(f"class {k}" for k in range(len(matrix)))
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} class names for a {len(matrix)} x {len(matrix)} matrix")
    scored_rows = [row for row in e.rows if e.scored in (row.split, "all")]
    class_counts = e.class_counts
    if class_counts is None and scored_rows:
        class_counts = collections.Counter(row.label for row in scored_rows)

    made: dict[str, Alarm | None] = {
        "class-never-predicted": class_never_predicted(matrix, names),
        "small-class": small_class(matrix, names),
    }
    if (matrix.sum(1) > 0).sum() >= 2:
        made["independent-predictions"] = independent_predictions(matrix, names)
        made["below-majority"] = below_majority(matrix, names, class_counts)
    if e.stated_accuracy is not None:
        made["accuracy-mismatch"] = accuracy_mismatch(matrix, e.stated_accuracy, e.stated_decimals)
    if class_counts is not None:
        swapped = made["swapped-axes"] = swapped_axes(matrix, names, class_counts)
        # Swapped axes explain the counts of the rows.
        made["scored-counts"] = None if swapped else scored_counts(matrix, names, class_counts)
        if made["scored-counts"] is None and scored_rows and e.files is not None:
            made["scored-counts"] = scored_files(e.files, [row.file for row in scored_rows])
    if e.scored is not None:
        n = int(matrix.sum())
        if e.stopped_on is not None:
            made["stopping-split-scored"] = stopping_split_scored(e.scored, e.stopped_on, n)
        made["training-images-scored"] = training_images_scored(e.scored, n)
    if scored_rows and e.scored not in ("train", "all"):
        fitted_rows = [row for row in e.rows if row.split in ("train", e.stopped_on)]
        fitted_rows = [row for row in fitted_rows if row.split != e.scored]
        if any(row.group for row in fitted_rows) and any(row.group for row in scored_rows):
            made["group-leak"] = group_leak(fitted_rows, scored_rows)
        same = duplicate_leak(fitted_rows, scored_rows, e.hashes or {})
        # Without hashes only a file listed twice is found.
        if same or (fitted_rows and e.hashes is not None):
            made["duplicate-leak"] = same
        made["groups-unknown"] = groups_unknown([*fitted_rows, *scored_rows])
    if e.source_counts is not None and _sources_can_tell(e.source_counts):
        made["source-confounded"] = source_confounded(e.source_counts)
    if e.statistics_fit is not None:
        made["batch-statistics"] = None if e.statistics_fit else _STATISTICS
    return made


@dataclasses.dataclass(frozen=True)
class Independence:
    """Pearson's test that the rows and columns of a table are independent.

    Attributes:
      chi2: of the table without its empty rows and columns.
      df: degrees of freedom; 0 for a single row or column, where `p` is 1 and `cramers_v` 0.
      p: from the chi-squared distribution; where an expected count is below 5 (Cochran 1954 lets
        a fifth of them be), from 9,999 random tables of the same margins.
      cramers_v: 0 independent, 1 the one determines the other.
      simulated: whether `p` is from random tables.
    """

    chi2: float
    df: int
    p: float
    cramers_v: float
    simulated: bool


def independence(table: Any) -> Independence:
    """Pearson's chi-squared test on a table of counts `[R, C]`; seeded, so always the same."""
    import scipy.stats

    table = np.asarray(table, np.int64)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    df = (table.shape[0] - 1) * (table.shape[1] - 1)
    if df <= 0:
        return Independence(0.0, 0, 1.0, 0.0, False)
    n = table.sum()
    expected = np.outer(table.sum(1), table.sum(0)) / n
    chi2 = float(((table - expected) ** 2 / expected).sum())
    simulated = bool((expected < 5).any())
    if simulated:
        random = scipy.stats.random_table(table.sum(1), table.sum(0))
        rng = np.random.RandomState(0)
        as_far, at_once = 0, max(1, _CELLS_AT_ONCE // table.size)
        for start in range(0, _TABLES, at_once):
            draws = random.rvs(min(at_once, _TABLES - start), random_state=rng)
            far = ((draws - expected) ** 2 / expected).sum((1, 2)) >= chi2 * (1 - 1e-9)
            as_far += int(far.sum())
        p = float((1 + as_far) / (1 + _TABLES))
    else:
        p = float(scipy.stats.chi2.sf(chi2, df))
    v = float(np.sqrt(chi2 / (n * (min(table.shape) - 1))))
    return Independence(chi2, df, p, v, simulated)


def chance_accuracy(matrix: Any) -> float:
    """Expected accuracy of predictions drawn with the matrix's margins, whatever the image."""
    matrix = _counts(matrix)
    n = int(matrix.sum())
    return int(matrix.sum(0) @ matrix.sum(1)) / n**2


def kappa(matrix: Any) -> float | None:
    """Cohen's kappa (1960) of counts `[K, K]`; None where chance alone is always right."""
    chance = chance_accuracy(matrix)
    return None if chance == 1 else (_accuracy(_counts(matrix)) - chance) / (1 - chance)


def independent_predictions(matrix: Any, class_names: Sequence[str]) -> Alarm | None:
    """Fires where p > `LEVEL`: the labels might as well have been drawn at random.

    A caution where there are too few images to tell: the test must have had power 0.99 to find
    Cramer's V of 0.3 (some 145 images of four classes, 270 of two); where one class is all that
    is answered, 7 images must be of others. Nothing to test with one true class alone.
    """
    matrix = _counts(matrix)
    if (matrix.sum(1) > 0).sum() < 2:
        return None
    test = independence(matrix)
    if test.p <= LEVEL:
        return None
    n, chance, agreement = int(matrix.sum()), chance_accuracy(matrix), kappa(matrix)
    accuracy = _accuracy(matrix)
    if test.df == 0:
        column = int(matrix.sum(0).argmax())
        name = class_names[column]
        enough = n - int(matrix[column].sum()) >= _LEAST_IMAGES_TO_MISS
        said = f"All {n:,} images were called {name}, whatever their label: accuracy"
    else:
        enough = _power(n, matrix, test.df) >= _POWER
        said = (
            "No dependence of the predictions on the labels is shown"
            if enough
            else f"{n:,} images are too few to tell these predictions from chance"
        )
        said += (
            f": chi-squared {test.chi2:.3f}, {test.df} degrees of freedom, p = {test.p:.3f}"
            f"{' (simulated)' if test.simulated else ''}, Cramer's V {test.cramers_v:.3f}, "
            f"kappa {agreement:.3f}; accuracy"
        )
    return Alarm(
        "independent-predictions",
        "alarm" if enough else "caution",
        f"{said} {percent(accuracy)}, chance for these margins {percent(chance)}.",
        {
            **dataclasses.asdict(test),
            "kappa": agreement,
            "accuracy": accuracy,
            "chance": chance,
            "num_examples": n,
        },
    )


def _power(n: int, matrix: np.ndarray, df: int) -> float:
    import scipy.stats

    rank = min((matrix.sum(1) > 0).sum(), (matrix.sum(0) > 0).sum()) - 1
    critical = scipy.stats.chi2.isf(LEVEL, df)
    return float(scipy.stats.ncx2.sf(critical, df, n * rank * _LEAST_V**2))


def below_majority(
    matrix: Any, class_names: Sequence[str], class_counts: Mapping[str, int] | None = None
) -> Alarm | None:
    """Fires where always naming the commonest class would have been right more often.

    The class counts are the rows' sums, unless `class_counts` tells the true ones. With images of
    one class alone there is nothing to compare.
    """
    matrix = _counts(matrix)
    counts = class_counts or dict(zip(class_names, matrix.sum(1).tolist(), strict=True))
    name, most = max(counts.items(), key=lambda item: item[1])
    accuracy, majority = _accuracy(matrix), int(most) / sum(map(int, counts.values()))
    if accuracy >= majority or majority == 1:
        return None
    return Alarm(
        "below-majority",
        "alarm",
        f"Accuracy {percent(accuracy)} is below the {percent(majority)} of always saying {name}.",
        {"accuracy": accuracy, "majority": majority, "class": str(name)},
    )


def class_never_predicted(matrix: Any, class_names: Sequence[str]) -> Alarm | None:
    """Fires where a class has images but no prediction; a caution where it has fewer than 7."""
    matrix = _counts(matrix)
    unseen = {
        class_names[k]: int(matrix[k].sum())
        for k in range(len(matrix))
        if matrix[k].sum() > 0 and matrix[:, k].sum() == 0
    }
    if not unseen:
        return None
    listed = ", ".join(f"{name} ({n:,} image{'s' * (n != 1)})" for name, n in unseen.items())
    level: Literal["alarm", "caution"] = (
        "alarm" if max(unseen.values()) >= _LEAST_IMAGES_TO_MISS else "caution"
    )
    return Alarm("class-never-predicted", level, f"Never predicted: {listed}.", {"images": unseen})


def swapped_axes(
    matrix: Any, class_names: Sequence[str], class_counts: Mapping[str, int]
) -> Alarm | None:
    """Fires where the columns' sums are the known class counts and the rows' sums are not."""
    matrix = _counts(matrix)
    known = [int(class_counts.get(name, 0)) for name in class_names]
    rows, columns = matrix.sum(1).tolist(), matrix.sum(0).tolist()
    if columns != known or rows == known:
        return None
    return Alarm(
        "swapped-axes",
        "alarm",
        f"The columns sum to the class counts {_list(columns)}, the rows to {_list(rows)}: columns "
        "are the truth, so recall and precision have changed places.",
        {"class_counts": known, "rows": rows, "columns": columns},
    )


def accuracy_mismatch(
    matrix: Any, stated_accuracy: float, decimals: int | None = None
) -> Alarm | None:
    """Fires where the diagonal's share is not the stated accuracy, to its last digit.

    Args:
      matrix: counts.
      stated_accuracy: a fraction.
      decimals: of the fraction; None for a figure that was not rounded (then to 1e-9).
    """
    matrix = _counts(matrix)
    accuracy, n = _accuracy(matrix), int(matrix.sum())
    # Rounding half up or half to even are both right.
    tolerance = 1e-9 if decimals is None else 0.5 * 10.0**-decimals + 1e-12
    if abs(accuracy - stated_accuracy) <= tolerance:
        return None
    stated, right = round(stated_accuracy * n), int(np.trace(matrix))
    return Alarm(
        "accuracy-mismatch",
        "alarm",
        f"Stated accuracy {percent(stated_accuracy)} would be {stated:,} of {n:,} right; the "
        f"matrix has {right:,}, {percent(accuracy)}.",
        {
            "stated": float(stated_accuracy),
            "accuracy": accuracy,
            "stated_right": stated,
            "right": right,
            "num_examples": n,
        },
    )


def scored_counts(
    matrix: Any, class_names: Sequence[str], class_counts: Mapping[str, int]
) -> Alarm | None:
    """Fires where a class has more or fewer scored images than it should."""
    rows = _counts(matrix).sum(1).tolist()
    wrong = {
        str(name): {"scored": n, "expected": int(class_counts.get(name, 0))}
        for name, n in zip(class_names, rows, strict=True)
        if n != int(class_counts.get(name, 0))
    }
    wrong |= {
        str(name): {"scored": 0, "expected": int(n)}
        for name, n in class_counts.items()
        if name not in class_names and n
    }
    if not wrong:
        return None
    listed = ", ".join(f"{name} {c['scored']:,} of {c['expected']:,}" for name, c in wrong.items())
    return Alarm(
        "scored-counts",
        "alarm",
        f"The images scored are not those that should be: {listed}.",
        {"classes": wrong},
    )


def scored_files(files: Sequence[str], expected: Sequence[str]) -> Alarm | None:
    """Fires where a file is missing, scored twice or none of the split's, though counts agree."""
    times, due = collections.Counter(files), set(expected)
    missing, foreign = sorted(due - set(times)), sorted(set(times) - due)
    repeated = sorted(file for file, n in times.items() if n > 1)
    if not (missing or foreign or repeated):
        return None
    first = (missing or repeated or foreign)[0]
    return Alarm(
        "scored-counts",
        "alarm",
        f"Of {len(due):,} images to score {len(missing):,} are missing and {len(repeated):,} are "
        f"scored more than once; {len(foreign):,} others are scored (first: {first}).",
        {"missing": len(missing), "repeated": len(repeated), "foreign": len(foreign)},
    )


def stopping_split_scored(scored: str, stopped_on: str, num_examples: int) -> Alarm | None:
    """Fires where the scored images also chose the epoch."""
    if scored not in (stopped_on, "all"):
        return None
    return Alarm(
        "stopping-split-scored",
        "alarm",
        f"The {stopped_on} images chose the epoch or the settings and are among the "
        f"{num_examples:,} scored: the figures are optimistic.",
        {"scored": scored, "stopped_on": stopped_on, "num_examples": num_examples},
    )


def training_images_scored(scored: str, num_examples: int) -> Alarm | None:
    """Fires where training images are scored, by themselves or among all."""
    if scored not in ("train", "all"):
        return None
    return Alarm(
        "training-images-scored",
        "alarm",
        f"The {num_examples:,} images scored are, or include, those trained on: the figures say "
        "nothing of unseen images.",
        {"scored": scored, "num_examples": num_examples},
    )


def group_leak(fitted: Sequence[Row], scored: Sequence[Row]) -> Alarm | None:
    """Fires where a known group has rows both among `fitted` (trained or stopped on) and scored."""
    return _leak(
        "group-leak",
        "group(s) (patients, near-duplicates)",
        [(row.group, row.file) for row in fitted if row.group],
        [(row.group, row.file) for row in scored if row.group],
        len(scored),
    )


def duplicate_leak(
    fitted: Sequence[Row], scored: Sequence[Row], hashes: Mapping[str, str]
) -> Alarm | None:
    """Fires where a file, or another of the same content hash, is both fitted and scored."""

    def keyed(rows: Sequence[Row]) -> list[tuple[str, str]]:
        return [(hashes.get(row.file, f"name {row.file}"), row.file) for row in rows]

    return _leak("duplicate-leak", "identical file(s)", keyed(fitted), keyed(scored), len(scored))


def _leak(
    name: str,
    what: str,
    fitted: Iterable[tuple[str, str]],
    scored: Sequence[tuple[str, str]],
    num_examples: int,
) -> Alarm | None:
    """`fitted` and `scored` pair a key with its file; an alarm where a key is in both."""
    fitted_file = dict(fitted)
    crossing = [(key, file) for key, file in scored if key in fitted_file]
    if not crossing:
        return None
    keys, files = {key for key, _ in crossing}, {file for _, file in crossing}
    key, file = crossing[0]
    share = len(files) / num_examples
    return Alarm(
        name,
        "alarm",
        f"{len(keys):,} {what} on both sides of the split: {len(files):,} of {num_examples:,} "
        f"scored images ({percent(share)}), first {file}, fitted as {fitted_file[key]}.",
        {
            "crossing": len(keys),
            "images": len(files),
            "share": share,
            "example": [file, fitted_file[key]],
        },
    )


def groups_unknown(rows: Sequence[Row], *, of_a_split: bool = True) -> Alarm | None:
    """A caution where groups are unknown, or too small to be patients'.

    Files of identical bytes, or near-duplicates, make groups too; most images are alone then.

    Args:
      rows: the images, with their groups.
      of_a_split: whether others of their collection were trained on.
    """
    n, unknown = len(rows), sum(not row.group for row in rows)
    sizes = collections.Counter(row.group for row in rows if row.group)
    shared = sum(size for size in sizes.values() if size > 1)
    if unknown:
        text = f"The group (patient, near-duplicates) of {unknown:,} of {n:,} images is unknown"
    elif shared < n / 2:
        text = (
            f"Only {shared:,} of {n:,} images share a group with another: unless patients have one "
            "image each, groups are not patients here"
        )
    else:
        return None
    return Alarm(
        "groups-unknown",
        "caution",
        f"{text}; "
        + (
            "a patient may be on both sides of the split."
            if of_a_split
            else "where a patient has several, the intervals are too narrow."
        ),
        {"unknown": unknown, "shared": shared, "images": n},
    )


def small_class(matrix: Any, class_names: Sequence[str]) -> Alarm | None:
    """A caution where a class has fewer than 50 scored images, with its recall's interval."""
    matrix = _counts(matrix)
    small: dict[str, dict[str, Any]] = {}
    said = []
    for k, name in enumerate(class_names):
        right, n = int(matrix[k, k]), int(matrix[k].sum())
        if n >= _SMALL_CLASS:
            continue
        interval = wilson_interval(right, n)
        small[name] = {
            "images": n,
            "recall": right / n if n else None,
            "interval": interval,
        }
        if interval is None:
            said.append(f"{name} none")
        else:
            low, high = interval
            said.append(f"{name} {n} (recall {low * 100:.0f} to {high * 100:.0f} %)")
    if not small:
        return None
    return Alarm(
        "small-class",
        "caution",
        f"Classes with fewer than {_SMALL_CLASS} scored images tell little: {', '.join(said)}"
        + (", if images are independent." if any(of["interval"] for of in small.values()) else "."),
        {"classes": small},
    )


def _sources_can_tell(source_counts: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether sources of more than one image are known of two classes, and there are two of them.

    One that holds all images is enough: it cannot tell them apart.
    """
    shared = [counts for counts in source_counts.values() if sum(counts.values()) > 1]
    classes = {name for counts in shared for name, n in counts.items() if n}
    return len(classes) > 1 and (len(shared) > 1 or len(source_counts) == 1)


def source_confounded(source_counts: Mapping[str, Mapping[str, int]]) -> Alarm | None:
    """A caution where the source of an image tells its class.

    Fires where source and class are dependent (p <= `LEVEL`), and either a class shares no source
    with another or knowing the source alone adds 5 points to naming the commonest class.

    Args:
      source_counts: images by source, then by class; images of unknown source left out.
    """
    classes = sorted({name for counts in source_counts.values() for name in counts})
    table = np.array(
        [[int(counts.get(name, 0)) for name in classes] for counts in source_counts.values()],
        np.int64,
    ).reshape(len(source_counts), len(classes))
    # A source of one image (its own address, say) is no more than that image.
    table = table[table.sum(1) > 1]
    n = int(table.sum())
    if len(table) < 2 or len(classes) < 2:
        return None
    test = independence(table)
    source_only, majority = int(table.max(1).sum()) / n, int(table.sum(0).max()) / n
    shared = (table > 0) & ((table > 0).sum(1) > 1)[:, None]
    alone = [name for k, name in enumerate(classes) if table[:, k].any() and not shared[:, k].any()]
    if test.p > LEVEL or not (alone or source_only - majority >= 0.05):
        return None
    text = (
        f"Class goes with the source that the data folder names (Cramer's V {test.cramers_v:.2f}): "
        f"the source alone gives {percent(source_only)} accuracy (learned from these very images), "
        f"the commonest class {percent(majority)}."
    )
    if alone:
        text += f" None of them holds {' or '.join(alone)} beside another class."
    return Alarm(
        "source-confounded",
        "caution",
        text,
        {
            "cramers_v": test.cramers_v,
            "source_only_accuracy": source_only,
            "majority": majority,
            "classes_alone": alone,
            "num_examples": n,
        },
    )


def count_sources(labels: Iterable[str], sources: Iterable[str]) -> dict[str, dict[str, int]]:
    """Images by source, then by class, of a label and a source for each image ("" left out)."""
    counts: dict[str, dict[str, int]] = {}
    for label, source in zip(labels, sources, strict=True):
        if source:
            by_class = counts.setdefault(source, {})
            by_class[label] = by_class.get(label, 0) + 1
    return counts


def _counts(matrix: Any) -> np.ndarray:
    """The matrix as int64 `[K, K]`. ValueError for anything that is no table of counts."""
    given = np.asarray(matrix)
    if given.ndim != 2 or given.shape[0] != given.shape[1]:
        raise ValueError(f"a confusion matrix is square, got {list(given.shape)}")
    counts = given.astype(np.int64)
    if (counts != given).any() or (counts < 0).any() or counts.sum() == 0:
        raise ValueError("a confusion matrix holds counts, not all 0")
    return counts


def _accuracy(matrix: np.ndarray) -> float:
    return int(np.trace(matrix)) / int(matrix.sum())


def percent(fraction: float) -> str:
    """`95.63 %`."""
    return f"{fraction * 100:.2f} %"


def _list(counts: Iterable[int]) -> str:
    return "/".join(f"{n:,}" for n in counts)
