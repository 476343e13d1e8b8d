"""What a run's files say in words: one statement for each thing that a reporting guideline asks."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from covid_flax.data.dataset import LEFT_OUT
from covid_flax.data.splits import PARTS, crossing
from covid_flax.early_stopping import best_epoch
from covid_flax.evaluation.intervals import (
    class_interval,
    has_width,
    is_undefined,
    one_group,
    resamples_groups,
    whole_interval,
)
from covid_flax.report.artefacts import Artefacts
from covid_flax.report.summary import checkpoint_of, seeds_of

NOT_KNOWN = "not known"
ECE_NOTE = (
    "The interval of the calibration error (ECE) lies high, since an image drawn twice adds noise "
    "to its bin: the figure can lie below it."
)
_NBSP = "\N{NO-BREAK SPACE}"


def statements(a: Artefacts) -> dict[str, str | None]:
    """What the artefacts say, by the key that `checklists` gives it; None: nothing."""
    return {
        "technique": _technique(a),
        "data": _data(a),
        "preprocessing": _preprocessing(a),
        "partition": _partition(a),
        "disjoint": _disjoint(a),
        "counts": _counts(a),
        "model": _model(a),
        "software": _software(a),
        "initialization": _initialization(a),
        "training": _training(a),
        "selection": _selection(a),
        "ensemble": _ensemble(a),
        "measures": _measures(a),
        "uncertainty": _uncertainty(a),
        "robustness": _robustness(a),
        "internal": _internal(a),
        "external": _external(a),
        "performance": _performance(a),
        "diagnostic": _diagnostic(a),
        "failures": _failures(a),
        "limits": " ".join(limits(a)),
        "availability": _availability(a),
        "outcome": _outcome(a),
        "predictors": _predictors(a),
        "recalibration": _recalibration(a),
        "prediction": _prediction(a),
        "imbalance": _imbalance(a),
        "output": _output(a),
        "same_data": _same_data(a),
        "specification": _specification(a),
    }


def fall_short(a: Artefacts) -> set[str]:
    """Keys of statements that are a part of what they could be, for want of a file or figure."""
    found = set()
    if not (a.reports.get(a.headline) or {}).get("intervals"):
        found |= {"performance", "diagnostic"}
    # A report that says not where its images lie is taken for one of the split.
    kept = [n for n in a.reports if a.split(n) == "test" and a.origin(n) in ("own", "unknown")]
    if not kept:
        found.add("internal")
    if all(a.origin(name) == "alike" for name in a.external):
        found.add("external")
    if not any(row.group for row in a.rows):
        found.add("disjoint")
    return found


def _technique(a: Artefacts) -> str | None:
    kind = a.saved.get("title") or a.config("model", "name")
    if not kind or not a.class_names:
        return None
    return f"Machine learning: {kind}, which sorts images into {_listed(a.class_names)}."


def _data(a: Artefacts) -> str | None:
    data = a.saved.get("data") or {}
    if "root" not in data:
        return None
    phantoms = a.config("data", "phantoms_per_class") or 0
    drawn = phantoms > 0 and not a.config("data", "dir")
    parts = [
        f"Synthetic images, drawn: {data['root']}"
        if drawn
        else f"The folder {os.path.normpath(data['root'])}"
    ]
    if "fingerprint" in data:
        parts.append(f"fingerprint {data['fingerprint']}")
    text = ", ".join(parts) + "."
    sources = alarm_text(a, "source-confounded")
    return f"{text} {sources}" if sources else text


def _preprocessing(a: Artefacts) -> str | None:
    size, how = a.config("data", "image_size"), a.config("data", "interpolation")
    if size is None:
        features = a.saved.get("features")
        return f"{features}." if features else None
    first = a.config("data", "intermediate_size")
    steps = f"{first} x {first}, then " if first else ""
    scaling = a.saved.get("preprocessing")
    text = f"Resized to {steps}{size} x {size} pixels"
    text += f" ({how})" if how else ""
    return text + (f"; pixel values scaled as '{scaling}'." if scaling else ".")


def _partition(a: Artefacts) -> str | None:
    rule = a.config("data", "split")
    if not rule:
        return None
    if rule == "file":
        left = at(a.saved, "data", "in_no_part")
        out = f", which leaves out {left:,} of the folder's images" if left else ""
        return f"As {a.config('data', 'split_file')} tells it{out}. {_counts(a) or ''}".strip()
    own, folds = a.config("data", "split_seed"), a.config("data", "folds")
    text = f"Rule '{rule}', seed {a.saved.get('seed') if own in (None, -1) else own}"
    if folds:
        fold = a.config("data", "fold")
        which = "each val in turn" if fold in (None, -1) else f"number {fold} (from 0) val"
        text += f", {folds} folds, {which}"
    for part in ("val", "test"):
        fraction = a.config("data", f"{part}_fraction")
        # paper-sorted and paper-random draw no test part.
        drawn = not folds if part == "val" else rule == "grouped"
        if fraction and drawn:
            text += f", {part} share {fraction:g}"
    nested = ""
    if a.config("data", "nested_test") and rule != "grouped":
        nested = ", val drawn from what is not test"
    return f"{text}{nested}. {_counts(a) or ''}".strip()


def _disjoint(a: Artefacts) -> str | None:
    if not a.rows:
        return None
    groups, crossing = _groups(a)
    unknown = sum(not row.group for row in a.rows)
    if not groups:
        return "Images: split.csv names no groups (patients, near-duplicates)."
    are = "is" if crossing == 1 else "are"
    said = f"{crossing:,} {are} in more than one split" if crossing else "none is in two splits"
    text = f"Groups of images: {groups:,} groups, {said}"
    have = "image has" if unknown == 1 else "images have"
    text += f"; {unknown:,} {have} no known group" if unknown else ""
    return f"{text}. Whether a group is a patient is not recorded."


def _groups(a: Artefacts) -> tuple[int, int]:
    """How many groups split.csv knows, and how many of them are in more than one split."""
    return len({row.group for row in a.rows if row.group}), crossing(a.rows)


def _counts(a: Artefacts) -> str | None:
    counts = split_counts(a)
    if not counts:
        return None
    parts = [
        f"{split} {sum(by_class.values()):,} ("
        + ", ".join(f"{name} {n:,}" for name, n in by_class.items())
        + ")"
        for split, by_class in counts.items()
    ]
    return f"Images used: {'; '.join(parts)}."


def split_counts(a: Artefacts) -> dict[str, dict[str, int]]:
    """Images by split and class, from split.csv."""
    found = collections.Counter((row.split, row.label) for row in a.rows)
    names = a.class_names or sorted({row.label for row in a.rows})
    return {
        split: {name: found[split, name] for name in names}
        for split in PARTS
        if any(row.split == split for row in a.rows)
    }


def _model(a: Artefacts) -> str | None:
    name = a.config("model", "name")
    if not name:
        title, setting = a.saved.get("title"), a.saved.get("setting") or {}
        chosen = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        return f"{title} of {a.saved.get('features')} ({chosen})." if title else None
    dtype, size = a.config("model", "dtype"), a.config("data", "image_size")
    parts = [f"{name} in {dtype}" if dtype else name]
    if not name.startswith(("lenet", "alexnet")):  # those fix their own head
        hidden, dropout = a.config("model", "hidden_units"), a.config("model", "dropout")
        if hidden is not None:
            parts.append(f"head with {hidden} hidden units" if hidden else "head of one layer")
        if dropout:
            parts.append(f"dropout {dropout:g}")
        statistics = {"train": "batch", "frozen": "fixed"}.get(a.config("model", "batch_norm"))
        if statistics:
            parts.append(f"batch norm of trained stages by {statistics} statistics")
    trained = a.config("model", "trainable")
    parts += [f"trained part: {trained}"] if trained else []
    parts += [f"input {size} x {size} pixels"] if size else []
    return f"{'; '.join(parts)}; {len(a.class_names)} outputs."


def _software(a: Artefacts) -> str | None:
    versions = a.saved.get("versions") or {}
    if not versions:
        return None
    return f"{_listed([f'{name} {version}' for name, version in versions.items()])}."


def _initialization(a: Artefacts) -> str | None:
    weights = a.saved.get("weights") or {}
    if a.config("model", "weights") == "none":
        return f"Random; {_seeds(a)}."
    if not weights.get("source"):
        return None
    parts = [str(weights["source"])]
    if weights.get("run"):
        parts = [f"the best epoch of the run {weights['run']}, step {weights.get('step')}"]
    parts += [f"SHA-256 {weights['sha256']}"] if weights.get("sha256") else []
    parts += [str(weights["report"])] if weights.get("report") else []
    return f"{'; '.join(parts)}; {_seeds(a)}."


def _seeds(a: Artefacts) -> str:
    said = seeds_of(a.saved)
    return f"seeds {said}" if " to " in said else f"seed {said}"


def _training(a: Artefacts) -> str | None:
    epochs = a.config("train", "epochs")
    if epochs is None:
        return None
    patience = a.config("train", "patience")
    settings = [
        ("learning rate", a.config("optimizer", "learning_rate")),
        ("schedule", a.config("optimizer", "schedule")),
        ("batches of", a.config("train", "batch_size")),
        ("at most", f"{epochs} epochs"),
        ("patience", "none (no early stop)" if patience == 0 else patience),
        ("class weights", a.config("train", "class_weights")),
        ("label smoothing", a.config("train", "label_smoothing")),
        ("weight decay", a.config("optimizer", "weight_decay")),
        ("warm-up, epochs", a.config("optimizer", "warmup_epochs") or None),
        ("gradients' norm at most", a.config("optimizer", "clip_norm") or None),
    ]
    decay = a.config("optimizer", "stage_decay")
    if decay not in (None, 1):
        settings.append(("each stage's rate, of the rate of the stage after it", decay))
    if a.config("train", "teacher"):
        settings += [
            ("learning too from the answers of", a.config("train", "teacher")),
            ("their share of the loss", a.config("train", "teacher_weight")),
            ("their temperature", a.config("train", "teacher_temperature")),
        ]
    parts = ["Adam", *(f"{name} {value}" for name, value in settings if value is not None)]
    augment = a.saved["config"].get("augment")
    if augment is not None:
        used = _listed([f"{key} {value}" for key, value in augment.items() if value])
        parts.append(f"augmentation: {used}" if used else "no augmentation")
    devices = a.saved.get("devices")
    return f"{'; '.join(parts)}" + (f"; on {', '.join(map(str, devices))}." if devices else ".")


def _selection(a: Artefacts) -> str | None:
    if a.saved.get("candidates"):
        return f"Of {len(a.saved['candidates'])} settings, the most accurate on the val images."
    report = a.reports.get(a.headline) or {}
    if "stopped_on" in report and report["stopped_on"] is None:
        return f"Not by their score on the val images: the {checkpoint_of(report)}."
    if at(report, "checkpoint", "which") not in (None, "best"):
        return f"By who evaluated it: the {checkpoint_of(report)}."
    monitor, lines = a.config("train", "monitor"), _epochs(a)
    if monitor and a.members:
        most = a.config("train", "epochs")
        return f"In each run, the epoch with the best {monitor}, of at most {most} epochs."
    if not monitor or not lines:
        return None
    best, least = _best_epoch(a), a.config("train", "min_delta")
    gains = f" (gains of {least:g} or less do not count)" if least else ""
    if start := a.config("train", "swa_start"):
        gains += f", of those after {start:g} where there are any"
    last = max(line["epoch"] for line in lines)
    return (
        f"The epoch with the best {monitor}{gains}: {best} of {last} "
        f"trained (at most {a.config('train', 'epochs')})."
    )


def _epochs(a: Artefacts) -> list[dict[str, Any]]:
    return [line for line in a.metrics if line.get("split") == "val" and "epoch" in line]


def _best_epoch(a: Artefacts) -> int:
    """By the rule that chose the best checkpoint."""
    monitor = a.config("train", "monitor")
    key = monitor.removeprefix("val_")
    return best_epoch(
        {line["epoch"]: line[key] for line in _epochs(a)},  # the last, where a run went on
        monitor,
        min_delta=a.config("train", "min_delta") or 0.0,
        start_from_epoch=a.config("train", "swa_start") or 0,
    )


def _is_cross_validation(a: Artefacts) -> bool:
    return (a.config("data", "folds") or 0) > 1 and a.config("data", "fold") in (None, -1)


def _ensemble(a: Artefacts) -> str | None:
    if not a.config("model", "name"):
        return None
    if a.members:
        text = f"The mean of the probabilities of {len(a.members)} runs"
        if _is_cross_validation(a):
            text += ", one a fold; a val image is scored by the run alone that held it out"
        else:
            text += " with other seeds"
    else:
        text = "None: one network answers"
    decay, start = a.config("train", "ema_decay"), a.config("train", "swa_start")
    if decay:
        text += f"; weights are moving averages (decay {decay:g})"
    if start:
        text += (
            f"; weights are means over all steps after epoch {start:g}, if the checkpoint is of "
            "later"
        )
    if share := a.config("train", "start_share"):
        text += f"; {share:g} of each weight is what it was before training"
    mirror, aspect = a.config("eval", "mirror"), a.config("eval", "aspect")
    views = ["its mirror image"] if mirror else []
    views += [f"other proportions (height times, width over exp(+-{aspect:g}))"] if aspect else []
    if views:
        text += f"; an image is seen as it is and as {' and '.join(views)}, logits averaged"
    if share := a.config("eval", "bn_own_share"):
        until = a.config("eval", "bn_own_until")
        text += f"; {share:g} of the moments that batch norm takes are the image's own"
        text += f", until {until}" if until else ""
    return f"{text}."


def _measures(a: Artefacts) -> str | None:
    report = a.reports.get(a.headline) or {}
    names = {
        "accuracy": "Accuracy",
        "balanced_accuracy": "balanced accuracy",
        "kappa": "Cohen's kappa",
        "mcc": "Matthews correlation",
        "nll": "negative log-likelihood",
        "brier": "Brier score",
        "ece": "calibration error (ECE)",
    }
    first: dict[str, Any] = next(iter((report.get("per_class") or {}).values()), {})
    of_class = {
        "recall": "sensitivity",
        "specificity": "specificity",
        "precision": "PPV",
        "npv": "NPV",
        "f1": "F1",
        "auroc": "AUROC",
        "auprc": "AUPRC",
    }
    listed = [said for key, said in names.items() if key in report]
    listed += [f"{said} of each class" for key, said in of_class.items() if key in first]
    return f"{_listed(listed)}." if listed else None


def _uncertainty(a: Artefacts) -> str | None:
    report = a.reports.get(a.headline) or {}
    intervals = report.get("intervals") or {}
    if not intervals:
        return None
    if one_group(report):
        return "No intervals: all images are of one group."
    text = f"{100 * intervals['level']:g}{_NBSP}% intervals: Wilson's of "
    if resamples_groups(report):
        text += "accuracy and of shares of a class where all resamples agree"
    else:
        text += "shares of a class, and of accuracy where all resamples agree"
    if intervals.get("bootstrap"):
        text += (
            f"; percentile bootstrap of {intervals['clusters']:,} groups of images (an image of no "
            f"known group is its own), {intervals['resamples']:,} resamples, seed "
            f"{intervals.get('seed')}"
        )
    return f"{text}. {ECE_NOTE}" if intervals.get("bootstrap") else f"{text}."


def _robustness(a: Artefacts) -> str | None:
    said = [
        f"{name}{a.of_folder(found)}: "
        f"{'; '.join(_condition(c) for c in found.get('conditions') or ())}."
        for name, found in a.controls.items()
        if found.get("conditions")
    ]
    if said:
        said.insert(0, "Shortcut controls, accuracy:")
    for name, found in a.corruptions.items():
        plain = at(found, "plain", "accuracy")
        said.append(
            f"Corruptions ({name}{a.of_folder(found)}): {plain:.1%} of the images plain are right, "
            f"{100 * found['mean_drop']:.1f} points fewer on average over "
            f"{len(found['corruptions'])} kinds at five strengths."
            + "".join(f" {text}" for text in sentences(found))
        )
    return " ".join(said) if said else None


def _condition(condition: Mapping[str, Any]) -> str:
    name = condition.get("title") or condition.get("name")
    return f"{name} {share(condition.get('accuracy'), condition.get('accuracy_interval'))}"


def _internal(a: Artefacts) -> str | None:
    said = [
        f"{name} {share_of(a.reports[name], 'accuracy')}{_elsewhere(a, name)}"
        for name in own_evaluations(a)
    ]
    return f"Evaluations and their accuracy: {_listed(said)}." if said else None


def own_evaluations(a: Artefacts) -> list[str]:
    """Evaluations of the folder that trained, as far as the files tell."""
    return [name for name in a.reports if a.origin(name) in ("own", "unsure", "unknown")]


def _elsewhere(a: Artefacts, name: str) -> str:
    """In brackets, the two folders of an evaluation of which it is not sure that they are one."""
    if a.origin(name) != "unsure":
        return ""
    return f" (scored in the folder {_scored_in(a, name)}, trained in the folder {_root(a)})"


def _scored_in(a: Artefacts, name: str) -> str:
    return os.path.normpath(a.reports[name]["data_dir"])


def _root(a: Artefacts) -> str:
    return os.path.normpath(a.saved["data"]["root"])


def _external(a: Artefacts) -> str | None:
    said = [
        f"{name}: {a.reports[name]['num_examples']:,} images of {a.reports[name]['data_dir']}, "
        f"accuracy {share_of(a.reports[name], 'accuracy')}{_left_out(a.reports[name])}"
        f"{_alike(a, name)}"
        for name in a.external
    ]
    if not said:
        return None
    return f"{'; '.join(said)}. Whether they come from another hospital is not recorded."


def _left_out(report: Mapping[str, Any]) -> str:
    """In brackets, what of a folder was not scored, or under another name."""
    said = [
        f"{theirs} left out" if ours == LEFT_OUT else f"{theirs} as {ours}"
        for theirs, ours in (report.get("class_map") or {}).items()
    ]
    if bad := report.get("bad_images"):
        said.append(f"{len(bad):,} unreadable image{'s' if len(bad) > 1 else ''} left out")
    if others := sum((report.get("not_images") or {}).values()):
        said.append(f"{others:,} file{'s' if others > 1 else ''} in class folders no images")
    return f" ({', '.join(said)})" if said else ""


def _alike(a: Artefacts, name: str) -> str:
    """In brackets, a doubt whether another folder is one of copies."""
    if a.origin(name) != "alike":
        return ""
    alike = a.named_alike.get(name, 0)
    many = f"{100 * alike:.0f}{_NBSP}%" if alike else "many"
    return (
        f" ({many} of the files bear the name of one that trained or chose the epoch: they may be "
        "copies)"
    )


def _performance(a: Artefacts) -> str | None:
    report = a.reports.get(a.headline)
    if not report:
        return None
    return (
        f"{a.headline}: {report['num_examples']:,} images, accuracy "
        f"{share_of(report, 'accuracy')}, balanced accuracy "
        f"{share_of(report, 'balanced_accuracy')}{_elsewhere(a, a.headline)}."
    )


def _diagnostic(a: Artefacts) -> str | None:
    report = a.reports.get(a.headline)
    if not report:
        return None
    parts = []
    for name in report["class_names"]:
        text = f"{name}: sensitivity {class_share(report, name, 'recall')}"
        if "specificity" in report["per_class"][name]:
            text += f", specificity {class_share(report, name, 'specificity')}"
        parts.append(text)
    return f"{a.headline}: {'; '.join(parts)}."


def _failures(a: Artefacts) -> str | None:
    report = a.reports.get(a.headline)
    if not report:
        return None
    names, matrix = report["class_names"], report["confusion_matrix"]
    wrong = sorted(
        ((n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n),
        key=lambda entry: -entry[0],
    )
    if not wrong:
        return f"{a.headline}: no wrong answer."
    said = [f"{names[i]} answered as {names[j]} {n:,} of {sum(matrix[i]):,}" for n, i, j in wrong]
    return f"{a.headline}, most often: {'; '.join(said[:3])}."


def _availability(a: Artefacts) -> str | None:
    version = (a.saved.get("versions") or {}).get("covid_flax")
    if not version:
        return None
    return f"Software: covid_flax {version}. Of the model and the data: {NOT_KNOWN}."


def _outcome(a: Artefacts) -> str | None:
    if not a.class_names:
        return None
    return f"The class that the data folder gives an image: {_listed(a.class_names)}."


def _predictors(a: Artefacts) -> str | None:
    return f"The pixels of one image. {_preprocessing(a)}" if _preprocessing(a) else None


def _recalibration(a: Artefacts) -> str | None:
    said = []
    for step, found in a.calibration.items():
        if "temperature" not in found or "split" not in found:
            continue
        # A whole's step is the sum of its members': no checkpoint's.
        of = "" if a.members else f"step {step}: "
        text = f"{of}temperature {found['temperature']:.3f} fitted on {found['split']}"
        if _is_cross_validation(a):
            text += ", to single runs' answers and not to their mean"
        ece = found.get("ece") or {}
        if "before" in ece and "after" in ece:
            text += f" (calibration error {ece['before']:.3f} before, {ece['after']:.3f} after)"
        said.append(text)
    report = a.reports.get(a.headline) or {}
    found = report.get("calibration") or {}
    if "ece" in found:
        ece = found["ece"]
        applied = "applied to" if found.get("applied") else "not applied to"
        said.append(
            f"{applied} the figures of {a.headline}, where the error is {ece['before']:.3f} "
            f"without and {ece['after']:.3f} with it"
        )
    return f"Temperature scaling; {'; '.join(said)}." if said else None


def _prediction(a: Artefacts) -> str | None:
    found = checkpoint_of(a.reports.get(a.headline) or {})
    return f"By the {found}." if found else None


def _imbalance(a: Artefacts) -> str | None:
    weights = a.config("train", "class_weights")
    if not weights:
        return None
    if weights == "none":
        return "No class weights."
    return f"Class weights '{weights}' in the loss."


def _output(a: Artefacts) -> str | None:
    if not a.class_names:
        return None
    text = "A probability of each class; the answer is the most probable one."
    report = a.reports.get(a.headline) or {}
    abstain = report.get("abstain") or {}
    if abstain.get("threshold") is not None:
        scaled = " scaled by the temperature" if at(report, "calibration", "ece") else ""
        text += (
            f" With an abstain threshold of {abstain['threshold']:.3f} on the top probability"
            f"{scaled} {share(abstain.get('coverage'))} of the {a.headline} images are answered"
        )
        if abstain.get("accuracy") is not None:
            right = share(abstain["accuracy"], abstain.get("accuracy_interval"))
            text += f", {right} of them rightly"
        if at(report, "calibration", "fitted_here"):
            text += " (the threshold was chosen on these very images)"
        text += "."
    return text


def _same_data(a: Artefacts) -> str | None:
    if not a.rows:
        return None
    own = [name for name in a.reports if a.origin(name) == "own"]
    said = [f"{_listed(own)}: images of the same folder as the training images"] if own else []
    said += [f"{name}:{_elsewhere(a, name)}" for name in a.reports if a.origin(name) == "unsure"]
    return f"{'; '.join(said)}." if said else None


def _specification(a: Artefacts) -> str | None:
    if not a.checkpoints:
        return None
    return "Configuration in the run's config.json, parameters in its checkpoints."


def limits(a: Artefacts) -> list[str]:
    """What the artefacts show that the figures do not prove, a sentence or two each."""
    said = ["For research: it is no medical device, and no decision on a patient may rest on it."]
    if not a.reports:
        said.append("No evaluation is among the run's files: nothing is known of how well it does.")
    elif a.split(a.headline) == a.reports[a.headline].get("stopped_on", "val"):
        said.append(
            f"Of the run's own images only some that chose the epoch or setting were scored "
            f"({a.headline}): those figures are optimistic."
        )
    for name in a.reports:
        if a.origin(name) == "unsure":
            said.append(
                f"{name}: scored in the folder {_scored_in(a, name)}, trained in the folder "
                f"{_root(a)}. Whether both hold the same images is not recorded."
            )
        elif a.origin(name) == "seen":
            said.append(f"{name}: another folder, but with images of the run: no external test.")
        elif a.origin(name) == "alike":
            said.append(
                f"{name}: an external test only if its files are no copies{_alike(a, name)}."
            )
    unsure = any(a.origin(name) == "unsure" for name in a.reports)
    if not a.external:
        known = "that are known to be others" if unsure else "of another folder without the run's"
        said.append(
            f"No evaluation on images {known} is among the run's files: nothing is known of other "
            "hospitals."
        )
    raised = collections.defaultdict(list)
    for name in sorted(a.reports, key=lambda name: name != a.headline):
        for alarm in a.reports[name].get("alarms") or ():
            raised[alarm["level"], alarm["name"], alarm["text"]].append(name)
    for (level, _, text), names in sorted(raised.items()):
        said.append(f"{level.capitalize()} of {_listed(names)}: {text}")
    own_names = list(own_evaluations(a))
    own = [a.reports[name] for name in own_names]
    checked = {name for report in own for name in report.get("alarms_checked") or ()}
    if a.reports and "source-confounded" not in checked:
        said.append(
            "Whether an image's source, as the data folder names it, gives its class away was not "
            "checked."
        )
    grouped = any(resamples_groups(report) for report in own)
    if a.rows and not grouped and not any(row.group for row in a.rows):
        said.append("No groups are known: images of one patient may be in two splits.")
    groups, crossing = _groups(a)
    if crossing:
        are = "is" if crossing == 1 else "are"
        said.append(
            f"By split.csv {crossing:,} of {groups:,} groups (patients, near-duplicates) {are} in "
            "more than one split: the figures are optimistic."
        )
    if any(a.split(name) == "test" for name in own_names):
        said.append(
            "How often the test images had been scored before, by this run or others, and whether "
            "a setting was chosen by them, is not recorded."
        )
    for name, found in a.controls.items():
        of = f"{name}{a.of_folder(found)}"
        said += [f"Shortcut controls ({of}): {text}" for text in sentences(found)]
    if not a.controls:
        said.append("No shortcut controls are among the run's files.")
    if a.members:
        said.append(
            f"{len(a.members)} trainings, alike but for their "
            f"{'images' if _is_cross_validation(a) else 'seed'}: members.json says how far they "
            "differ, not how far another set of them would."
        )
    else:
        said.append("One training with one seed: how far another would differ is not known.")
    return said


def alarm_text(a: Artefacts, name: str) -> str | None:
    """Of that alarm about the run's own images, as the evaluation that says most raised it."""
    for key in sorted(own_evaluations(a), key=lambda key: key != a.headline):
        for alarm in a.reports[key].get("alarms") or ():
            if alarm["name"] == name:
                return alarm["text"]
    return None


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What a controls.json, or a robustness.json, says in words."""
    warning = found.get("warning")
    if not warning:
        return list(found.get("text") or ())
    return [*(found.get("text") or ()), f"Mind: {warning}{'' if warning[-1] in '.?' else '.'}"]


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(map(str, parts))


def at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def bootstrap(report: Mapping[str, Any], *keys: str) -> Any:
    return at(report, "intervals", "bootstrap", *keys)


def share_of(report: Mapping[str, Any], key: str) -> str:
    """A share of the whole with its bootstrap interval; Wilson's of accuracy if that is a point."""
    return share(report.get(key), whole_interval(report, key))


def class_share(report: Mapping[str, Any], name: str, key: str) -> str:
    """A share of a class with its interval; none of a class without images."""
    figures = report["per_class"][name]
    if is_undefined(figures, key):
        return "–"
    return share(figures[key], class_interval(report, name, key))


def share(x: float | None, interval: Sequence[float] | None = None) -> str:
    """`95.6 % (94.8 to 96.3)`."""
    return _figure(x, interval, lambda v: f"{100 * v:.1f}", f"{_NBSP}%")


def number(x: float | None, interval: Sequence[float] | None = None) -> str:
    """`0.956 (0.948 to 0.963)`."""
    return _figure(x, interval, lambda v: f"{v:.3f}", "")


def _figure(
    x: float | None, interval: Sequence[float] | None, form: Callable[[float], str], unit: str
) -> str:
    if x is None:
        return "–"
    shown = interval if interval and has_width(interval) else None
    ends = f" ({form(shown[0])} to {form(shown[1])})" if shown else ""
    return f"{form(x)}{unit}{ends}"


def count(n: Any) -> str:
    return f"{n:,}" if isinstance(n, int) else NOT_KNOWN
