"""Classical classifiers on a run's split: `python -m covid_flax.baselines --workdir=RUN`.

What a network has to beat: logistic regression, an RBF support vector machine, a decision tree
and Gaussian naive Bayes (scikit-learn), on the principal components of grey thumbnails. The
components and the classifiers are fitted on the training images. Each classifier has one
setting, which the validation images choose (greatest accuracy, the first of equals). The
support vector machine gives no probabilities: a logistic regression of its decision values
does, fitted on the validation images (Platt 1999, with one class against another as inputs and
all classes as output). The test images only score. The run need not be trained: `main
--dry_run` leaves all that is needed here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from covid_flax import __version__
from covid_flax import config as config_lib
from covid_flax.command import run_command
from covid_flax.console import say
from covid_flax.data.dataset import Dataset
from covid_flax.data.pipeline import eval_batches
from covid_flax.data.splits import write_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluation.predictions import Predictions, predictions_of
from covid_flax.files import expanded, refuse_foreign, write_json
from covid_flax.report.summary import print_report
from covid_flax.run_folder import refuse_another_split, refuse_folds, saved_run
from covid_flax.run_images import make_output, open_data

SIDE = 28  # of a thumbnail, pixels
COMPONENTS = 64  # 95 % of the variance of chest X-rays
# The setting that the validation images choose, and what they choose it from.
GRIDS: dict[str, tuple[str, tuple[float, ...]]] = {
    "logistic": ("C", (0.01, 1.0, 100.0)),
    "svm": ("C", (1.0, 10.0, 100.0)),
    "tree": ("min_samples_leaf", (1, 10, 30, 100, 300)),
    "naive_bayes": ("var_smoothing", (1e-9, 1e-3, 1e-2, 1e-1)),
}
TITLES = {
    "logistic": "logistic regression",
    "svm": "RBF support vector machine",
    "tree": "decision tree",
    "naive_bayes": "Gaussian naive Bayes",
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Thumbnails and their classes.

    Attributes:
      pixels: float64 `[N, SIDE * SIDE]`, grey, 0..1.
      labels: class indices, int64 `[N]`.
    """

    pixels: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A fitted classifier.

    Attributes:
      name: a key of `GRIDS`.
      setting: the chosen value of its setting.
      candidates: each value that was tried, and its accuracy on the validation images.
    """

    name: str
    setting: float
    candidates: tuple[tuple[float, float], ...]
    _components: Any = dataclasses.field(repr=False)
    _classifier: Any = dataclasses.field(repr=False)
    _platt: Any = dataclasses.field(repr=False)
    _num_classes: int = dataclasses.field(repr=False)

    @property
    def calibrated(self) -> bool:
        """Whether its probabilities were fitted on the validation images."""
        return self._platt is not None

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Of each class, for thumbnails `[N, SIDE * SIDE]`: float64 `[N, K]`."""
        x, model = self._components.transform(pixels), self._classifier
        if self._platt is not None:
            x, model = _decision_values(model, x), self._platt
        probabilities = np.zeros((len(pixels), self._num_classes))
        probabilities[:, model.classes_] = model.predict_proba(x)
        return probabilities


def baselines(
    workdir: Path,
    *,
    models: Sequence[str] = tuple(GRIDS),
    data_dir: str = "",
    output: Path | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Fits classifiers on a run's training images, scores them on its others, writes both.

    Args:
      workdir: the run's folder: its split.csv and config.json are read.
      models: keys of `GRIDS`.
      data_dir: where the images lie now; empty for where the run found them.
      output: folder of one folder a classifier, `workdir/baselines` where None.

    Returns:
      Reports as written, by classifier and split.

    Raises:
      UserError: no run, unknown classifiers, or images that are missing or unreadable.
    """
    unknown = [name for name in models if name not in GRIDS]
    if unknown or not models:
        raise UserError(f"--models={','.join(models)}: name some of {', '.join(GRIDS)}")
    saved = saved_run(workdir)
    refuse_folds(workdir, saved, "classical models")
    config = config_lib.from_json(saved["config"])
    if data_dir:  # the same images, elsewhere
        there = {"root": os.path.expanduser(data_dir), "fingerprint": ""}
        saved = saved | {"data": saved["data"] | there}
    data = open_data(workdir, saved)
    output = output or workdir / "baselines"
    make_output(output, data)
    for name in models:
        refuse_foreign(output / name, ("config.json", "metrics.jsonl"), "baseline")
        refuse_another_split(output / name, data.rows)
    started = time.monotonic()
    splits = [s for s in ("train", "val", "test") if data.files(s)]
    images = {split: read_images(data, split, config.data) for split in splits}
    components = fit_components(images["train"].pixels)
    read_seconds = time.monotonic() - started
    say(f"baselines: {len(data.rows):,} thumbnails of {SIDE} px read in {read_seconds:.0f} s")

    reports: dict[str, dict[str, dict[str, Any]]] = {}
    for name in models:
        folder = output / name
        started = time.monotonic()
        baseline = fit_baseline(
            name,
            components,
            images["train"],
            images["val"],
            num_classes=len(data.class_names),
            seed=config.seed,
        )
        fitted = time.monotonic()
        predictions = {
            split: predictions_of(data, split, baseline.probabilities(images[split].pixels))
            for split in splits
            if split != "train"
        }
        scored = time.monotonic()
        say(
            f"{TITLES[name]}: {GRIDS[name][0]}={baseline.setting:g} of "
            f"{', '.join(f'{v:g} ({a:.4f})' for v, a in baseline.candidates)}, "
            f"fitted in {fitted - started:.1f} s, scored in {scored - fitted:.1f} s"
        )
        about = _about(baseline, components, data) | {
            "seconds": {"read": read_seconds, "fit": fitted - started, "score": scored - fitted},
            "seed": config.seed,
            "data": saved["data"],
        }
        write_split_csv(folder / "split.csv", data.rows)
        reports[name] = {
            split: _write_report(baseline, scores, split, data, about, folder / "eval" / split)
            for split, scores in predictions.items()
        }
        # Last: a folder with a config.json is whole.
        write_json(folder / "config.json", about, allow_nan=True)
    return reports


def _about(baseline: Baseline, components: Any, data: Dataset) -> dict[str, Any]:
    """What config.json says of the classifier."""
    key = GRIDS[baseline.name][0]
    return {
        "baseline": baseline.name,
        "title": TITLES[baseline.name],
        "features": f"{components.n_components_} principal components of {SIDE} x {SIDE} "
        "grey thumbnails",
        "setting": {key: baseline.setting},
        "candidates": [
            {key: value, "val_accuracy": accuracy} for value, accuracy in baseline.candidates
        ],
        "probabilities": "logistic regression of the decision values, fitted on val"
        if baseline.calibrated
        else "the classifier's own",
        "class_names": list(data.class_names),
        "versions": {
            "covid_flax": __version__,
            "numpy": np.__version__,
            "scikit-learn": importlib.metadata.version("scikit-learn"),
        },
    }


def _write_report(
    baseline: Baseline,
    predictions: Predictions,
    split: str,
    data: Dataset,
    about: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    # Slow to import, and a wrong flag need not wait for it.
    from covid_flax.evaluation.assess import assess
    from covid_flax.report.write import write_evaluation

    report, predictions = assess(
        predictions, split=split, rows=data.rows, stopped_on="val", folder=data.folder
    )
    report["data_dir"] = str(Path(data.folder.root).absolute())
    if split == "val":
        report["note"] = (
            f"These images chose {GRIDS[baseline.name][0]}"
            + (" and fitted the probabilities" if baseline.calibrated else "")
            + ", so the figures are optimistic; those of a test split are not."
        )
    write_evaluation(
        output,
        report,
        predictions,
        title=f"{split} images, {TITLES[baseline.name]}",
        run=about | {"name": baseline.name},
    )
    print_report(report, output)
    return report


def read_images(data: Dataset, split: str, config: Any) -> Images:
    """A split's images as thumbnails: shrunk by averaging, channels averaged.

    Args:
      data: a run's.
      split: train, val or test.
      config: the run's `data`; how it resizes for its network has no say here.

    Raises:
      UserError: an image that cannot be decoded.
    """
    config = config.copy_and_resolve_references()
    config.image_size, config.intermediate_size, config.interpolation = SIDE, 0, "box"
    source = data.source(split, config)
    pixels = np.zeros((len(source), SIDE * SIDE))
    batches = eval_batches(
        source,
        batch_size=min(512, len(source)),
        num_threads=config.num_threads,
        prefetch=2,
    )
    for batch in tqdm(
        batches,
        desc=f"reading {split}",
        total=-(-len(source) // min(512, len(source))),
        unit=" batches",
        leave=False,
    ):
        grey = batch["image"].mean(-1) / 255
        pixels[batch["index"][batch["mask"]]] = grey[batch["mask"]].reshape(-1, SIDE * SIDE)
    return Images(pixels, data.labels(split).astype(np.int64))


def fit_components(pixels: np.ndarray) -> Any:
    """scikit-learn's PCA of the training thumbnails `[N, SIDE * SIDE]`, without whitening."""
    from sklearn.decomposition import PCA

    # N images differ from their mean in N - 1 directions at most.
    return PCA(min(COMPONENTS, len(pixels) - 1), svd_solver="covariance_eigh").fit(pixels)


def fit_baseline(
    name: str, components: Any, train: Images, val: Images, *, num_classes: int, seed: int
) -> Baseline:
    """Fits a classifier for each setting of its grid, and keeps the best on `val`.

    Args:
      name: a key of `GRIDS`.
      components: of `fit_components`, of `train`.
      train: what is fitted to.
      val: what chooses; for `svm` also what the probabilities are fitted to.
      num_classes: K.
      seed: of the tree's choice between equal cuts.
    """
    x, x_val = components.transform(train.pixels), components.transform(val.pixels)
    fitted = []
    for value in tqdm(GRIDS[name][1], desc=f"fitting {name}", leave=False):
        classifier = _classifier(name, value, seed).fit(x, train.labels)
        fitted.append((float(classifier.score(x_val, val.labels)), value, classifier))
    # `max` keeps the first of equals.
    _, setting, classifier = max(fitted, key=lambda f: f[0])
    platt = None
    if name == "svm":
        from sklearn.linear_model import LogisticRegression

        values = _decision_values(classifier, x_val)
        platt = LogisticRegression(max_iter=5000).fit(values, val.labels)
    return Baseline(
        name=name,
        setting=setting,
        candidates=tuple((value, accuracy) for accuracy, value, _ in fitted),
        _components=components,
        _classifier=classifier,
        _platt=platt,
        _num_classes=num_classes,
    )


def _classifier(name: str, value: float, seed: int) -> Any:
    # Here, for scikit-learn is slow to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    from sklearn.tree import DecisionTreeClassifier

    setting: dict[str, Any] = {GRIDS[name][0]: value}
    if name == "logistic":
        # Its penalty, and its solver's speed, depend on the scale of the inputs.
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, **setting))
    if name == "svm":
        # Unscaled: a distance of components is then a distance of thumbnails.
        return SVC(decision_function_shape="ovo", cache_size=500, **setting)
    if name == "tree":
        return DecisionTreeClassifier(random_state=seed, **setting)
    return GaussianNB(**setting)


def _decision_values(classifier: Any, x: np.ndarray) -> np.ndarray:
    """Of each pair of classes, `[N, K (K - 1) / 2]`."""
    return classifier.decision_function(x).reshape(len(x), -1)


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    flags.DEFINE_list("models", list(GRIDS), "which classifiers, separated by commas")
    flags.DEFINE_string("data_dir", "", "where the run's images lie now")
    flags.DEFINE_string("output", "", "folder to write to; empty: DIR/baselines")


def _main() -> None:
    f = flags.FLAGS
    baselines(
        expanded(f.workdir),
        models=tuple(f.models),
        data_dir=f.data_dir,
        output=expanded(f.output) if f.output else None,
    )


if __name__ == "__main__":
    _define_flags()
    run_command(_main)
