"""Judges: NumPy, Pillow, scikit-image, scikit-learn; planted shortcuts that must be found."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import skimage.exposure
import sklearn.metrics
from PIL import Image

from covid_flax import controls
from covid_flax.data import phantoms
from covid_flax.data.conditions import (
    CENTRE,
    INSIDE_BORDER,
    LUNG_BOX,
    bounding_mask,
    box_mask,
    coarsen,
    conditions,
    hide,
    histogram,
    match_histogram,
)
from covid_flax.data.dataset import Dataset
from covid_flax.data.folder import open_folder
from covid_flax.data.masks import find_masks
from covid_flax.data.pipeline import ArraySource
from covid_flax.data.splits import Row, read_split_csv
from covid_flax.errors import UserError
from covid_flax.evaluation import condition_figures as figures
from covid_flax.evaluation import source_probe
from covid_flax.evaluation.metrics import classification_report
from covid_flax.evaluation.sampling import stratified_sample
from covid_flax.evaluation.twins import find_twins
from covid_flax.report.controls_page import _table, explain, verdict, write_controls_page
from covid_flax.run import setup
from covid_flax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")

NAMES = phantoms.CLASSES
SIZE = 40


# What is done to the pixels.


@pytest.mark.parametrize("box", [CENTRE, INSIDE_BORDER, LUNG_BOX])
@pytest.mark.parametrize("shape", [(128, 128, 1), (97, 131, 3)])
def test_a_box_is_filled_and_nothing_else_touched(box, shape):
    image = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    top, left, bottom, right = (
        round(share * side) for share, side in zip(box, shape[:2] * 2, strict=True)
    )
    expected = image.copy()
    expected[top:bottom, left:right] = 0
    np.testing.assert_array_equal(hide(image, box_mask(shape, box)), expected)
    outside = np.zeros_like(image)
    outside[top:bottom, left:right] = image[top:bottom, left:right]
    np.testing.assert_array_equal(hide(image, ~box_mask(shape, box)), outside)


def test_the_grey_fill_knows_nothing_of_what_it_hides():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (50, 50, 3), np.uint8)
    where = box_mask(image.shape, CENTRE)
    filled = hide(image, where, mean=True)
    for channel in range(3):
        shown = np.ma.array(image[..., channel], mask=where).mean()
        assert (filled[where][:, channel] == round(float(shown))).all()
    np.testing.assert_array_equal(filled[~where], image[~where])
    other = image.copy()
    other[where] = 255 - other[where]
    np.testing.assert_array_equal(hide(other, where, mean=True), filled)


def test_greys_are_matched_as_scikit_image_does():
    rng = np.random.default_rng(2)
    image = rng.normal(90, 30, (61, 64, 1)).clip(0, 255).astype(np.uint8)
    image[:9] = 0  # a black margin: many ties
    reference = rng.gamma(3, 30, (61, 64, 1)).clip(0, 255).astype(np.uint8)
    ours = match_histogram(image, histogram([reference]))
    theirs = skimage.exposure.match_histograms(image.astype(float), reference.astype(float))
    assert np.abs(ours - theirs).max() <= 0.5 + 1e-9
    colours = np.concatenate([image, 255 - image, image], 2)
    matched = match_histogram(colours, histogram([reference]))
    np.testing.assert_array_equal(matched[..., :1], ours)
    np.testing.assert_array_equal(
        matched[..., 1:2], match_histogram(255 - image, histogram([reference]))
    )


def test_brightness_and_contrast_are_gone_once_greys_are_matched():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 120, (64, 64, 1), np.uint8)
    brighter = (2 * image + 10).astype(np.uint8)
    reference = histogram([rng.integers(0, 256, (64, 64, 1), np.uint8)])
    np.testing.assert_array_equal(
        match_histogram(image, reference), match_histogram(brighter, reference)
    )


def test_coarse_images_are_box_means_and_hold_nothing_more():
    image = np.random.default_rng(4).integers(0, 256, (64, 64, 1), np.uint8)
    blocks = image.reshape(8, 8, 8, 8).astype(float).mean((1, 3))
    coarse = coarsen(image)
    expected = Image.fromarray(np.floor(blocks + 0.5).astype(np.uint8)).resize(
        (64, 64), Image.Resampling.BILINEAR
    )
    assert np.abs(coarse[..., 0].astype(int) - np.asarray(expected)).max() <= 1
    shuffled = image.reshape(8, 8, 8, 8)[:, ::-1, :, ::-1].reshape(64, 64, 1)
    np.testing.assert_array_equal(coarsen(shuffled), coarse)  # the same means


def test_the_rectangle_around_a_mask():
    mask = np.zeros((9, 12), bool)
    mask[2, 4] = mask[6, 10] = True
    expected = np.zeros_like(mask)
    expected[2:7, 4:11] = True
    np.testing.assert_array_equal(bounding_mask(mask), expected)
    assert not bounding_mask(np.zeros((3, 3), bool)).any()


# Masks and samples.


def _dataset(folder, rows, images):
    """A Dataset whose pixels are `images`, by file."""

    @dataclasses.dataclass(frozen=True)
    class Held(Dataset):
        def source(self, split, config):
            files = [row.file for row in self.files(split)]
            return ArraySource(np.stack([images[f] for f in files]), self.labels(split))

    return Held(folder, None, rows, NAMES)


def _write_kaggle(directory: Path, per_class: int = 3) -> None:
    rng = np.random.default_rng(5)
    for name in NAMES:
        for kind in ("images", "masks"):
            (directory / name / kind).mkdir(parents=True)
        for k in range(per_class):
            pixels = rng.integers(60, 200, (SIZE, SIZE), np.uint8)
            Image.fromarray(pixels).save(directory / name / "images" / f"{name}-{k}.png")
            mask = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)  # another size than the image
            mask[20:60, 10 + 2 * k : 30] = 255
            Image.fromarray(mask).save(directory / name / "masks" / f"{name}-{k}.png")


def test_kaggle_s_masks_are_found_read_and_never_taken_for_images(tmp_path):
    _write_kaggle(tmp_path / "data")
    folder = open_folder(str(tmp_path / "data"))
    assert len(folder.files) == 12 and not any("masks" in f.file for f in folder.files)
    rows = [Row(f.file, f.label, "test", "") for f in folder.files]
    masks = find_masks(folder, rows)
    assert len(masks.files) == 12
    expected = np.zeros((SIZE, SIZE), bool)
    expected[10:30, 6:15] = True
    np.testing.assert_array_equal(masks.mask("COVID/images/COVID-1.png", SIZE), expected)

    shutil.copytree(tmp_path / "data", tmp_path / "bare", ignore=shutil.ignore_patterns("masks"))
    bare = open_folder(str(tmp_path / "bare"))
    assert not find_masks(bare, rows).files
    elsewhere = find_masks(bare, rows, str(tmp_path / "data"))
    np.testing.assert_array_equal(elsewhere.mask("COVID/images/COVID-1.png", SIZE), expected)
    # Scored as other classes (--class_map), images keep the masks of their own folders.
    mapped = [dataclasses.replace(row, label="theirs") for row in rows]
    assert find_masks(bare, mapped, str(tmp_path / "data")).files == elsewhere.files
    with pytest.raises(UserError, match="holds no mask"):
        find_masks(bare, rows, str(tmp_path / "bare"))
    (tmp_path / "data/COVID/masks").rename(tmp_path / "data/COVID/lung masks")
    assert len(find_masks(folder, rows).files) == 12


def test_no_image_is_its_own_mask_and_no_mask_is_two_images(tmp_path):
    pixels = Image.fromarray(np.full((SIZE, SIZE), 200, np.uint8))
    names = ("A/a.png", "A/b.png", "B/c.png", "A/masks/a.png", "far/A/deep/a.png", "far/B/c.png")
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(tmp_path / "data" / name)
    (tmp_path / "data/far").rename(tmp_path / "far")
    folder = open_folder(str(tmp_path / "data"))
    rows = [Row(f.file, f.label, "test", "") for f in folder.files]
    # `b.png` lies where its mask would, beside `masks`.
    assert find_masks(folder, rows, str(tmp_path / "data")).files == {"A/a.png": "A/masks/a.png"}
    (tmp_path / "far/A/late").mkdir()
    pixels.save(tmp_path / "far/A/late/a.png")
    folder = open_folder(str(tmp_path / "far"))
    rows = [Row(f.file, f.label, "test", "") for f in folder.files]
    with pytest.raises(UserError, match=r"A/masks/a.png fits several images, A/deep/a.png and A/l"):
        find_masks(folder, rows, str(tmp_path / "data"))
    # Of masks that nobody asked for such a one is left out.
    pixels.save(tmp_path / "data/A/a.jpg")
    (tmp_path / "data/A/masks/b.png").write_bytes((tmp_path / "data/A/b.png").read_bytes())
    folder = open_folder(str(tmp_path / "data"))
    rows = [Row(f.file, f.label, "test", "") for f in folder.files]
    assert len(rows) == 4 and find_masks(folder, rows).files == {"A/b.png": "A/masks/b.png"}


def test_thumbnails_of_coloured_images_are_their_greys():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (2, 56, 56, 1), np.uint8)
    alike, tinted = grey.repeat(3, -1), grey.repeat(3, -1)
    tinted[..., 2] = 0
    of_grey, of_alike, of_tinted = (
        controls._thumbnails(ArraySource(x, np.zeros(2, int))) for x in (grey, alike, tinted)
    )
    np.testing.assert_array_equal(of_grey, of_alike)
    assert (of_tinted < of_grey).all()


def test_a_mask_is_read_in_any_colour_and_none_where_it_shows_no_lung(tmp_path):
    _write_kaggle(tmp_path / "data")
    folder = open_folder(str(tmp_path / "data"))
    masks = find_masks(folder, [Row(f.file, f.label, "test", "") for f in folder.files])
    path, image = tmp_path / "data/COVID/masks/COVID-1.png", "COVID/images/COVID-1.png"
    grey = np.asarray(Image.open(path))
    before = masks.mask(image, SIZE)
    green = np.zeros((*grey.shape, 3), np.uint8)
    green[..., 1] = grey
    Image.fromarray(green).save(path)
    np.testing.assert_array_equal(masks.mask(image, SIZE), before)
    assert masks.that_show_lung(masks.files).files == masks.files
    for blind in (grey // 255, np.zeros_like(grey)):  # 0 and 1; empty
        Image.fromarray(blind).save(path)
        assert masks.that_show_lung(masks.files).files.keys() == masks.files.keys() - {image}
        with pytest.raises(UserError, match="no mask shows a lung, such as .*COVID-1.png"):
            masks.that_show_lung([image])


def test_masked_conditions_show_the_mask_and_score_only_what_has_one(tmp_path):
    _write_kaggle(tmp_path / "data")
    (tmp_path / "data/COVID/masks/COVID-0.png").unlink()
    folder = open_folder(str(tmp_path / "data"))
    rows = [Row(f.file, f.label, "test", "") for f in folder.files]
    images = {
        f.file: np.asarray(Image.open(tmp_path / "data" / f.file))[..., None] for f in folder.files
    }
    seen = {}

    def probabilities(source, description=""):
        stacked = np.stack([source[i]["image"] for i in range(len(source))])
        seen["all"] = stacked
        return np.full((len(source), 4), 0.25)

    run = SimpleNamespace(
        class_names=NAMES, config=SimpleNamespace(data=None), probabilities=probabilities
    )
    masks = find_masks(folder, rows)
    report, examples = controls.score_conditions(run, _dataset(folder, rows, images), masks=masks)
    by_name = {c["name"]: c for c in report["conditions"]}
    assert report["masks"] == 11 and by_name["whole"]["num_examples"] == 12
    for name in ("lungs_only", "lungs_hidden", "lung_box_hidden"):
        assert by_name[name]["num_examples"] == 11
        assert by_name[name]["majority"] == pytest.approx(3 / 11)
    shown = {condition.name: pictures for condition, pictures in examples}
    whole, mask = (
        images["Normal/images/Normal-0.png"],
        masks.mask("Normal/images/Normal-0.png", SIZE),
    )
    np.testing.assert_array_equal(
        shown["lungs_only"]["Normal"], whole.repeat(3, 2) * mask[..., None]
    )
    np.testing.assert_array_equal(
        shown["lungs_hidden"]["Normal"], whole.repeat(3, 2) * ~mask[..., None]
    )
    # The first of COVID has no mask: the second is shown, under every condition.
    second = images["COVID/images/COVID-1.png"].repeat(3, 2)
    np.testing.assert_array_equal(shown["whole"]["COVID"], second)
    assert shown["lungs_only"]["COVID"].any()
    assert len(seen["all"]) == sum(c["num_examples"] for c in report["conditions"])


def test_findings_are_corrected_for_every_test_of_the_page(marked):
    """22 of 60 right where chance gives 15: p is about 0.03, of eighteen tests."""
    data, training = marked

    def probabilities(source, description=""):
        labels = np.array([source[i]["label"] for i in range(len(source))])
        right = np.arange(len(labels)) % 15 < np.where(labels < 2, 6, 5)
        return np.eye(4)[np.where(right, labels, (labels + 1) % 4)]

    run = SimpleNamespace(
        class_names=NAMES, config=SimpleNamespace(data=None), probabilities=probabilities
    )
    report, _ = controls.score_conditions(run, data, training=training)
    assert report["tests"]["count"] == 2 * len(report["conditions"]) == 18
    for c in report["conditions"]:
        assert 0.05 / 18 < c["p"] < 0.05 and not c["above_chance"]


def test_a_probe_s_interval_is_by_groups():
    rng, of_group = np.random.default_rng(0), np.arange(40) % 2
    features = np.repeat(rng.normal(1.5 * of_group, 1.0)[:, None], 10, 0)  # ten copies each
    sources = np.repeat(np.array(["a", "b"])[of_group], 10).tolist()
    got = source_probe.probe(features, sources, np.repeat(np.arange(40), 10))
    (low, high), p = got["interval"], got["balanced_accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 40), rel=0.35)


@pytest.mark.parametrize(("share", "found"), [(0.27, False), (0.31, True)])
def test_a_surplus_of_two_points_is_no_finding_however_sure(share, found):
    labels = np.repeat(np.arange(4), 1500)
    right = np.arange(6000) % 1500 < round(1500 * share)
    p = np.eye(4)[np.where(right, labels, (labels + 1) % 4)]
    got = figures.condition_figures(p, labels, p, NAMES, np.arange(6000))
    assert got["p"] < 0.05 and got["above_chance"] is found


def test_the_page_s_tile_is_of_the_strongest_condition(marked, tmp_path):
    report, examples = controls.score_conditions(_reading(_border), marked[0], training=marked[1])
    found = next(c for c in report["conditions"] if c["name"] == "lungs_hidden_grey")
    found["balanced_accuracy"] = 0.3
    report |= {"warning": None, "split": "test", "data_dir": "d", "elsewhere": False}
    report |= {"checkpoint": {}, "pairs_dir": None, "text": []}
    write_controls_page(tmp_path / "p.html", report, examples, title="t")
    text = " ".join(re.sub("<[^>]*>", " ", (tmp_path / "p.html").read_text()).split())
    tile = text[text.index("Highest with no lung shown") :][:90]
    assert "100.0" in tile and "30.0" not in tile, tile


def test_conditions_hide_what_they_say():
    image = np.random.default_rng(0).integers(1, 256, (9, 12, 1), np.uint8)
    mask = np.zeros((9, 12), bool)
    mask[2, 4] = mask[6, 10] = True
    box = np.zeros((9, 12), bool)
    box[2:7, 4:11] = True
    masked, plain = (
        {c.name: c.change for c in conditions(np.ones(256), "x", masks=m)} for m in (True, False)
    )
    for change, where in (
        (masked["lung_box_hidden"], box),
        (masked["lung_box_hidden_grey"], box),
        (plain["centre_hidden_grey"], box_mask((9, 12), CENTRE)),
        (plain["lungs_hidden_grey"], box_mask((9, 12), LUNG_BOX)),
    ):
        grey = 0 if change is masked["lung_box_hidden"] else round(float(image[~where].mean()))
        want = np.where(where[..., None], grey, image)
        np.testing.assert_array_equal(change(image, mask), want)


@pytest.mark.parametrize("limit", [0, 7, 100, 999, 5000])
def test_a_sample_keeps_the_classes_shares(limit):
    labels = np.repeat([0, 1, 2, 3], [700, 250, 45, 5])
    places = stratified_sample(labels, limit)
    assert len(places) == (1000 if limit in (0, 5000) else limit)
    assert (np.diff(places) > 0).all()
    counts = np.bincount(labels[places], minlength=4)
    assert (counts >= 1).all()
    exact = len(places) * np.array([0.7, 0.25, 0.045, 0.005])
    assert (np.abs(counts - exact) <= 1.5).all()
    np.testing.assert_array_equal(places, stratified_sample(labels, limit))


def test_a_sample_of_rare_classes_is_no_larger():
    labels = np.repeat([0, 1, 2], [10_000, 50, 50])
    assert np.bincount(labels[stratified_sample(labels, 100)]).tolist() == [98, 1, 1]
    assert np.bincount(labels[stratified_sample(labels, 2)]).tolist() == [1, 1, 1]
    # The one image that stands for its class is not rounded up once more.
    labels = np.repeat([0, 1, 2, 3], [1, 5, 5, 5])
    assert sorted(np.bincount(labels[stratified_sample(labels, 11)])) == [1, 3, 3, 4]


# Figures.


def test_figures_are_scikit_learn_s_and_intervals_the_report_s():
    rng = np.random.default_rng(6)
    n = 240
    labels = rng.choice(4, n, p=[0.2, 0.1, 0.6, 0.1])
    whole, changed = rng.dirichlet(np.ones(4), n), rng.dirichlet(np.ones(4), n)
    changed[: n // 2] += 2 * np.eye(4)[labels[: n // 2]]
    changed /= changed.sum(1, keepdims=True)
    clusters = np.arange(n) // 2
    got = figures.condition_figures(changed, labels, whole, NAMES, clusters)
    answers = changed.argmax(1)
    assert got["accuracy"] == sklearn.metrics.accuracy_score(labels, answers)
    balanced = sklearn.metrics.balanced_accuracy_score(labels, answers)
    assert got["balanced_accuracy"] == pytest.approx(balanced, abs=1e-12)
    recalls = sklearn.metrics.recall_score(labels, answers, average=None)
    np.testing.assert_allclose(list(got["recall"].values()), recalls, atol=1e-12)
    np.testing.assert_array_equal(
        got["confusion_matrix"], sklearn.metrics.confusion_matrix(labels, answers)
    )
    assert got["changed"] == np.mean(answers != whole.argmax(1))
    assert got["confidence"] == pytest.approx(np.mean([max(p) for p in changed.tolist()]))
    report = classification_report(labels, changed, NAMES, clusters=clusters)
    for key in ("accuracy", "balanced_accuracy"):
        np.testing.assert_allclose(
            got[f"{key}_interval"], report["intervals"]["bootstrap"][key], atol=1e-12
        )


def test_a_fixed_answer_is_never_above_chance():
    labels = np.repeat([0, 1, 2, 3], [5, 10, 80, 5])
    for k in range(4):
        fixed = np.tile(np.eye(4)[k], (100, 1))
        got = figures.condition_figures(fixed, labels, fixed, NAMES, np.arange(100))
        assert not got["above_chance"] and got["balanced_accuracy"] == 0.25 and got["p"] == 1
        assert got["kept"] is None
    one = figures.condition_figures(fixed[:5], labels[:5], fixed[:5], NAMES, np.arange(5))
    assert not one["above_chance"] and one["p"] is None  # one class alone shows nothing
    json.dumps(one, allow_nan=False)


@pytest.mark.parametrize("answers", [(9, 3, 4, 8), (40, 20, 25, 35), (12, 1, 30, 3)])
def test_p_of_two_classes_is_fisher_s(answers):
    table = np.reshape(answers, (2, 2))
    labels, answered = np.repeat([0, 0, 1, 1], answers), np.repeat([0, 1, 0, 1], answers)
    exact = scipy.stats.fisher_exact(table, alternative="greater").pvalue
    got = figures.chance_p_value(answered, labels, np.arange(len(labels)), 4)
    assert abs(got - exact) <= 4 * np.sqrt(exact * (1 - exact) / 2000) + 1 / 2000


def test_copies_of_an_image_show_no_more_than_the_image():
    rng = np.random.default_rng(12)
    labels = np.repeat(np.arange(4), 12)
    answers = np.where(rng.random(48) < 0.15, labels, rng.integers(0, 4, 48))
    alone = figures.chance_p_value(answers, labels, np.arange(48), 4)
    copies, copied = np.repeat(np.arange(48), 9), np.repeat(answers, 9)
    assert figures.chance_p_value(copied, np.repeat(labels, 9), copies, 4) == alone > 0.01
    fooled = figures.chance_p_value(copied, np.repeat(labels, 9), np.arange(48 * 9), 4)
    assert fooled < alone / 5
    p = np.eye(4)[np.repeat(labels[::6], 20)]
    few = figures.condition_figures(p, p.argmax(1), p, NAMES, np.arange(160) // 20)
    assert few["p"] < 0.01 and few["fewest_groups"] == 2 and not few["above_chance"]


def test_one_large_group_in_a_small_class_is_no_evidence(monkeypatch):
    """Guessed alike for all its images, it makes or breaks its class: one time in four."""
    monkeypatch.setattr(figures, "PERMUTATIONS", 200)
    rng = np.random.default_rng(13)
    group = np.concatenate([np.zeros(50, int), np.arange(1, 610)])
    labels = np.repeat(np.arange(4), [59, 200, 200, 200])
    p = [
        figures.chance_p_value(rng.integers(0, 4, 610)[group], labels, group, 4) for _ in range(150)
    ]
    assert np.sum(np.array(p) <= 0.05) <= scipy.stats.binom.ppf(0.99, 150, 0.05)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (12, 12, 12, 12), (12, 20, 30, 60)])
def test_guessing_makes_a_finding_in_one_report_of_twenty_at_most(sizes, monkeypatch):
    monkeypatch.setattr(figures, "RESAMPLES", 10)  # the intervals decide nothing
    monkeypatch.setattr(figures, "PERMUTATIONS", 400)
    rng = np.random.default_rng(7)
    labels = np.repeat(np.arange(4), sizes)
    n, trials, called, uncorrected = len(labels), 300, 0, 0
    for _ in range(trials):
        tilt = rng.dirichlet(np.full(4, 2.0))
        guesses = [np.eye(4)[rng.choice(4, n, p=tilt)] for _ in range(3)]
        got = [
            figures.condition_figures(g, labels, g, NAMES, np.arange(n), tests=3) for g in guesses
        ]
        called += any(c["above_chance"] for c in got)
        uncorrected += any(c["p"] <= 0.05 for c in got)
    assert called <= scipy.stats.binom.ppf(0.95, trials, 0.05)
    if min(sizes) >= figures.LEAST_GROUPS:  # else the test would pass whatever was done
        assert uncorrected > scipy.stats.binom.ppf(0.95, trials, 0.05)


# What is said of the figures.


def _told(per_class, shares, *, simple=(), wrong=()):
    """A report in which a share of every class is answered rightly under each condition.

    `shares` and `simple` by condition, else `whole`'s; `wrong` says how far off wrong answers are.
    """
    labels = np.repeat(np.arange(4), per_class)
    n = len(labels)

    def answers(share, off=1):
        right = np.arange(n) % per_class < round(share * per_class)
        return np.eye(4)[np.where(right, labels, (labels + off) % 4)]

    whole, found = answers(shares["whole"]), []
    for c in conditions(np.ones(256), "images", masks=False):
        share = shares.get(c.name, shares["whole"])
        p = answers(share, dict(wrong).get(c.name, 1))
        row = figures.condition_figures(p, labels, whole, NAMES, np.arange(n), tests=18)
        row |= {"name": c.name, "title": c.title, "shows": c.shows, "simple_model": None}
        if simple:
            q = answers(dict(simple).get(c.name, dict(simple)["whole"]))
            learned = figures.condition_figures(q, labels, q, NAMES, np.arange(n), tests=18)
            row["simple_model"] = learned | {"num_training": 99}
        found.append(row)
    report = {
        "references": {"majority": {"class": "COVID", "accuracy": 0.25, "balanced_accuracy": 0.25}},
        "tests": {"least_groups": figures.LEAST_GROUPS},
        "conditions": found,
        "pairs": None,
        "sources": {"alone": None, "within": {}, "not_applicable": "none"},
    }
    return report, " ".join(explain(report))


INTERPRETED = (
    "carry little",
    "they lean",
    "needs",
    "it reads the lungs",
    "still answers",
    "spread of light",
)


@pytest.mark.parametrize(
    ("per_class", "shares"),
    [(16, {"whole": 0.31}), (2, {"whole": 0.5}), (20, {"whole": 0.25, "lungs_hidden": 0.7})],
)
def test_nothing_is_read_into_a_run_that_is_not_above_chance(per_class, shares):
    report, text = _told(per_class, shares)
    assert not any(words in text for words in INTERPRETED)
    assert text.count("the run is not shown to do better than a fixed answer") == 1
    assert ("a class has 2 independent images" in text) is (per_class == 2)
    assert verdict(report) == "untested"


def test_what_was_not_shown_is_not_said_to_be_absent():
    hidden = {"centre_hidden_grey": 0.42, "border_only": 0.25, "lungs_hidden": 0.25}
    shares = {"whole": 1.0, "lungs_hidden_grey": 0.25, "lungs_only": 0.25, **hidden}
    report, text = _told(12, shares, simple={"whole": 1.0, **hidden, "lungs_hidden_grey": 0.4})
    got = {c["name"]: c for c in report["conditions"]}
    assert not got["centre_hidden_grey"]["above_chance"]  # 20 of 48
    assert got["centre_hidden_grey"]["p"] < 0.05
    assert "It was not shown to do better than a fixed answer here: 41.7 % rightly" in text
    assert "it was not shown to learn the class from what is not lung" in text
    assert "does no better" not in text and "nothing of the class" not in text
    assert "either it needs the surroundings" in text
    _, text = _told(12, shares, simple={"whole": 0.25})
    assert "not even from whole images" in text


def test_masks_of_some_classes_are_measured_by_those_classes_chance():
    """Two of four classes have masks, then one: there a fixed answer gets 50 and 100 %."""
    hidden = ("centre_hidden", "centre_hidden_grey", "border_only")
    report, _ = _told(40, {"whole": 0.9} | dict.fromkeys(hidden, 0.25))
    labels = np.repeat(np.arange(4), 40)
    whole = np.eye(4)[np.where(np.arange(160) % 40 < 36, labels, (labels + 1) % 4)]
    for classes in (2, 1):
        part = labels < classes
        n = int(part.sum())
        fixed = np.eye(4)[np.zeros(n, int)]
        found = figures.condition_figures(
            fixed, labels[part], whole[part], NAMES, np.arange(n), tests=18
        )
        assert found["chance"] == 1 / classes and found["whole_balanced_accuracy"] == 0.9
        for c in report["conditions"]:
            if c["name"].startswith("lungs_hidden"):
                c.update(found)
        text = " ".join(explain(report))
        assert verdict(report) == "none"
        told = "50.0 % rightly with the lung box hidden" if classes == 2 else "Nothing can be told"
        assert told in text and "100.0 % rightly with the lung box" not in text
    right = labels[labels < 2]
    found = figures.condition_figures(
        np.eye(4)[right], right, whole[labels < 2], NAMES, np.arange(80), tests=18
    )
    report["conditions"][4].update(found)
    assert report["conditions"][4]["shows"] == "lung"
    report["conditions"][5].update(found)
    assert verdict(report) == "shortcut"
    assert "25.0 % (50.0 % where only images with masks are asked about)" in " ".join(
        explain(report)
    )


def test_what_greys_carry_is_told_by_the_answers_that_change():
    few, lean = "brightness and contrast carry little", "they lean on brightness"
    _, text = _told(50, {"whole": 0.6})
    assert few in text and lean not in text
    # As many right as before, but all that were wrong are answered otherwise.
    _, text = _told(50, {"whole": 0.6}, wrong={"histogram_matched": 2})
    assert "and 40.0 % of its answers change." in text and few not in text and lean not in text
    _, text = _told(50, {"whole": 0.6, "histogram_matched": 0.4})
    assert lean in text and few not in text
    # A fall that the interval allows for.
    _, text = _told(10, {"whole": 0.7, "histogram_matched": 0.6})
    assert few not in text and lean not in text


# Planted shortcuts: what a run reads is known, and the controls must say it.


@pytest.fixture(scope="module")
def marked():
    """Phantoms with a bright mark in the outermost border, at a place that names the class."""
    rng = np.random.default_rng(8)
    folder = SimpleNamespace(files=[], root="phantoms")
    rows, images = [], {}
    for k, name in enumerate(NAMES):
        for i in range(30):
            image = phantoms.draw(name, 100 * k + i, SIZE)[..., None].copy()
            image[:2, :] = rng.integers(0, 40)
            image[:2, 10 * k : 10 * k + 8] = 255
            # And a patch in the very centre that names the class too.
            image[18:22, 18:22] = 60 * k + 10
            file = f"{name}/images/{name}-{i}.png"
            images[file] = image
            rows.append(Row(file, name, "train" if i < 15 else "test", ""))
            folder.files.append(SimpleNamespace(file=file, label=name, source=""))
    test = [row for row in rows if row.split == "test"]
    fit = [row for row in rows if row.split == "train"]
    return _dataset(folder, test, images), _dataset(folder, fit, images)


def _reading(score):
    """A run whose scores `[4]` are a function of the pixels `[H, W]`."""

    def probabilities(source, description=""):
        scores = np.array(
            [score(source[i]["image"][..., 0].astype(float)) for i in range(len(source))]
        )
        p = np.exp(scores - scores.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    return SimpleNamespace(
        class_names=NAMES, config=SimpleNamespace(data=None), probabilities=probabilities
    )


def _border(pixels):
    return [pixels[:2, 10 * k : 10 * k + 8].mean() / 20 for k in range(4)]


def _middle(pixels):
    patch = pixels[18:22, 18:22].mean()
    return [-abs(patch - 60 * k - 10) for k in range(4)]


def test_a_run_that_reads_the_border_is_found_out(marked):
    data, training = marked
    report, _ = controls.score_conditions(_reading(_border), data, training=training)
    got = {c["name"]: c for c in report["conditions"]}
    for name in ("whole", "centre_hidden", "centre_hidden_grey", "border_only", "lungs_hidden"):
        assert got[name]["accuracy"] == 1 and got[name]["changed"] == 0, name
    assert got["lungs_only"]["accuracy"] == 0.25 and not got["lungs_only"]["above_chance"]
    assert verdict(report) == "shortcut"
    text = " ".join(explain(report))
    assert "the run reads it: a shortcut" in text
    assert "100.0 % rightly with the border only" in text
    # And the images offer it to others.
    assert got["lungs_hidden"]["simple_model"]["above_chance"]
    assert "offer a shortcut" in text


def test_a_run_that_reads_the_centre_is_not_accused(marked):
    data, training = marked
    report, _ = controls.score_conditions(_reading(_middle), data, training=training)
    got = {c["name"]: c for c in report["conditions"]}
    assert got["whole"]["accuracy"] == got["lungs_only"]["accuracy"] == 1
    for c in report["conditions"]:
        if c["shows"] in ("no lung", "little lung"):
            assert c["accuracy"] < 0.35 and not c["above_chance"], c["name"]
    assert verdict(report) == "none"
    text = " ".join(explain(report))
    assert "the run reads it" not in text and "still answers" not in text
    assert "does not show that it reads the lungs" in text
    assert "hardly needs what surrounds the lungs" in text


def test_where_only_the_edge_of_the_lungs_tells_it_is_a_suspicion(marked):
    data, _ = marked
    edge = slice(round(0.08 * SIZE) + 1, round(0.15 * SIZE))  # in the lung box, outside the centre
    images = {}
    for k, row in enumerate(data.rows):
        image = np.full((SIZE, SIZE, 1), 100, np.uint8)
        image[edge, 10:30] = 60 * (k // 15) + 10
        images[row.file] = image
    data = _dataset(data.folder, data.rows, images)
    score = lambda pixels: [-abs(pixels[edge, 10:30].mean() - 60 * k - 10) for k in range(4)]  # noqa: E731
    report, _ = controls.score_conditions(_reading(score), data)
    assert verdict(report) == "suspicion"
    assert "suspicious, but it shows no shortcut yet" in " ".join(explain(report))
    assert all(c["simple_model"] is None for c in report["conditions"])


# Twins.


def _twin_folder(directory, files, export):
    for file in files:
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(export(file)).save(path)
    return open_folder(str(directory), require_two_classes=False)


def test_twins_that_the_export_moves_are_counted(marked, tmp_path):
    data, training = marked
    both = dataclasses.replace(data, rows=[*training.rows, *data.rows])
    images = {r.file: both.source("all", None)[i]["image"] for i, r in enumerate(both.rows)}
    normal = [row for row in both.rows if row.label == "Normal"]

    def export(file):
        image = images[file][..., 0].copy()
        if int(file.rsplit("-", 1)[1][:-4]) % 3 == 0:  # 5 of the 15 test images
            image[:2, 10:18] = 255
            image[:2, 20:28] = 0
        return image

    pairs = _twin_folder(tmp_path / "pairs", [row.file for row in normal], export)
    run = _reading(_border)
    run.config = SimpleNamespace(
        data=SimpleNamespace(image_size=SIZE, interpolation="nearest", intermediate_size=0)
    )
    learned = {row.file for row in training.rows}
    report, _ = controls.score_conditions(run, both, pairs=pairs, trained_on=learned)
    got = report["pairs"]
    assert got["num_pairs"] == 15  # none that was trained on
    assert got["flipped"] == 5 and got["flip_rate"] == pytest.approx(1 / 3)
    assert got["matrix"] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 5, 10, 0], [0, 0, 0, 0]]
    moved = got["answers"]["Lung_Opacity"]
    assert (moved["became"], moved["ceased"]) == (5, 0)
    assert moved["p"] == pytest.approx(2 * 0.5**5)  # five of five
    assert got["accuracy"] == {"originals": 1.0, "twins": pytest.approx(2 / 3)}
    assert got["from_class"]["Normal"]["twins"]["Lung_Opacity"] == 5
    text = " ".join(explain(report))
    assert "5 (33.3 %) are answered differently; they were not shown to be drawn" in text
    for p, drawn in ((0.013, False), (0.012, True)):  # of four classes
        got["answers"]["Lung_Opacity"]["p"] = p
        said = " ".join(explain(report))
        assert ("5 become Lung_Opacity, 0 cease to be it" in said) is drawn


def test_twins_must_fit_images_that_were_not_trained_on(marked, tmp_path):
    data, training = marked
    blank = np.zeros((SIZE, SIZE), np.uint8)
    seen = _twin_folder(tmp_path / "a", [training.rows[0].file], lambda _: blank)
    with pytest.raises(UserError, match="no twin of a scored image"):
        find_twins([*training.rows, *data.rows], seen, {row.file for row in training.rows})
    # A folds' member has it as val, and another member learned from it.
    as_val = [dataclasses.replace(training.rows[0], split="val")]
    assert len(find_twins(as_val, seen, ())) == 1
    with pytest.raises(UserError, match="no twin of a scored image"):
        find_twins(as_val, seen, {training.rows[0].file})
    # Another folder's file, of no split, may bear the name of one.
    elsewhere = [dataclasses.replace(training.rows[0], split="")]
    assert len(find_twins(elsewhere, seen, {training.rows[0].file})) == 1
    double = data.rows[0].file
    again = double.replace("images/", "images/more/")
    two = _twin_folder(tmp_path / "b", [double, again], lambda _: blank)
    with pytest.raises(UserError, match="two twins named"):
        find_twins(data.rows, two, ())
    one = _twin_folder(tmp_path / "c", [double], lambda _: blank)
    copies = [data.rows[0], dataclasses.replace(data.rows[0], file=again)]
    with pytest.raises(UserError, match="fits several images"):
        find_twins(copies, one, ())


# Sources.


def test_the_source_is_told_where_it_shows_and_not_where_it_does_not():
    rng = np.random.default_rng(9)
    n = 200
    sources = ["a" if i % 2 else "b" for i in range(n)]
    labels = ["COVID"] * n
    clusters = np.arange(n) // 2 * 2 + np.arange(n) % 2
    shows = rng.normal(0, 1, (n, 3))
    hides = shows.copy()
    shows[:, 1] += np.array([2.0 * (s == "a") for s in sources])
    got = source_probe.probe_classes(labels, sources, clusters, {"x": shows, "y": hides})["COVID"]
    assert got["x"]["sources"] == {"a": 100, "b": 100} and got["x"]["chance"] == 0.5
    # Two normals two deviations apart: the best threshold gets 84 %.
    assert abs(got["x"]["balanced_accuracy"] - 0.84) < 0.06
    assert got["x"]["interval"][0] > 0.5
    assert abs(got["y"]["balanced_accuracy"] - 0.5) < 0.12


def test_a_probe_cannot_know_a_group_again():
    """Features that name the group, not the source: only a leak between folds would help."""
    rng = np.random.default_rng(10)
    clusters = np.repeat(np.arange(20), 20)
    group_features = rng.normal(0, 1, (20, 40))
    features = group_features[clusters] + rng.normal(0, 0.01, (400, 40))
    sources = ["a" if c % 2 else "b" for c in clusters]
    got = source_probe.probe(features, sources, clusters)
    assert got["balanced_accuracy"] < 0.85
    alone = source_probe.probe(features, sources, np.arange(400))
    assert alone["balanced_accuracy"] > 0.99


def test_a_probe_has_no_more_components_than_the_smallest_fold_has_images():
    """One group holds most images, so that the fold without it is small."""
    sources = ["a"] * 100 + ["b"] * 20
    clusters = np.concatenate([np.zeros(80, int), np.arange(1, 41)])
    features = np.random.default_rng(0).normal(size=(120, 784))
    got = source_probe.probe(features, sources, clusters)
    assert got["num_examples"] == 120 and 0 <= got["balanced_accuracy"] <= 1


def test_only_classes_of_two_well_filled_sources_are_probed():
    labels = ["A"] * 60 + ["B"] * 60 + ["C"] * 60
    sources = ["x"] * 30 + ["y"] * 30 + ["x"] * 55 + ["y"] * 5 + ["x"] * 30 + ["y"] * 30
    clusters = np.arange(180)
    clusters[150:] = 150  # all of C's second source is one group
    assert source_probe.probed_sources(labels, sources, clusters) == {"A": ["x", "y"]}


def test_the_source_alone():
    others = [("A", "x")] * 9 + [("B", "x")] + [("B", "y")] * 5
    scored = [("A", "x"), ("B", "x"), ("B", "y"), ("A", "new"), ("B", "")]
    got = source_probe.source_only(scored, others)
    # x says A, y says B, an unknown source the commonest class, A.
    assert got == {
        "num_examples": 4,
        "num_sources": 3,
        "accuracy": 0.75,
        "majority": 0.5,
        "learned_from": "other images",
    }
    assert source_probe.source_only([("A", "")], others) is None
    assert source_probe.source_only(scored, [])["learned_from"] == "the same images"


def test_what_the_source_tells_is_learned_from_images_that_are_not_scored():
    """Source and class go together the other way round there: every answer is wrong."""
    told = [("A", "y"), ("A", "y"), ("B", "x"), ("B", "x")] + [("A", "x")] * 4 + [("B", "y")] * 4
    files = [SimpleNamespace(file=str(i), label=c, source=s) for i, (c, s) in enumerate(told)]
    rows = [Row(str(i), told[i][0], "test", "") for i in range(4, 12)]
    folder, answers = SimpleNamespace(files=files), np.full((8, 2), 0.5)
    found = controls._sources(folder, rows, rows, np.arange(8), answers, None)
    assert found["alone"]["accuracy"] == 0 and found["alone"]["learned_from"] == "other images"


def test_of_some_images_groups_and_chances_are_their_own():
    rng = np.random.default_rng(0)
    rows = [Row(f"{n}/{i}.png", n, "test", f"{n}{i // 2}") for n in NAMES for i in range(10)]
    images = {row.file: rng.integers(0, 256, (40, 40, 1), np.uint8) for row in rows}
    files = [SimpleNamespace(file=row.file, label=row.label, source="") for row in rows]
    data = _dataset(SimpleNamespace(files=files, root="x"), rows, images)
    report, _ = controls.score_conditions(_reading(_border), data, limit=12)
    assert report["support"] == dict.fromkeys(NAMES, 3)
    at = stratified_sample(np.repeat(np.arange(4), 10), 12)
    assert report["intervals"]["clusters"] == len({rows[i].group for i in at}) < 12
    assert report["references"]["guessing"]["accuracy"] == 0.25


# The command over a real, tiny run.


def test_a_run_s_controls_are_written_and_agree_with_its_evaluation(
    make_tiny_config, tmp_path, capsys
):
    c = make_tiny_config()
    c.data.split = "grouped"
    c.data.test_fraction = 0.25
    c.train.epochs = 1
    c.eval.batch_size = 12
    workdir = tmp_path / "run"
    train(setup(c, workdir))
    rows = [row for row in read_split_csv(workdir / "split.csv") if row.label == "Normal"]
    root = Path(json.loads((workdir / "config.json").read_text())["data"]["root"])
    originals = {row.file: np.asarray(Image.open(root / row.file)) for row in rows}
    _twin_folder(tmp_path / "pairs", list(originals), originals.__getitem__)

    report = controls.run_controls(workdir, pairs=str(tmp_path / "pairs"))
    written = json.loads((workdir / "controls/test/controls.json").read_text())
    assert written == json.loads(json.dumps(report))
    learned = [row for row in read_split_csv(workdir / "split.csv") if row.split == "train"]
    assert report["conditions"][0]["simple_model"]["num_training"] == len(learned)
    again = controls.run_controls(workdir, pairs=str(tmp_path / "pairs"), output=tmp_path / "again")
    assert again == report  # to the last digit
    # The twins are the same pixels, so nothing may move.
    held = [row for row in rows if row.split != "train"]
    assert report["split"] == "test"
    assert report["pairs"]["num_pairs"] == sum(row.split == "test" for row in held)
    assert report["pairs"]["flipped"] == 0

    from covid_flax.evaluate import evaluate

    whole = report["conditions"][0]
    evaluated = evaluate(workdir, split="test")
    assert whole["accuracy"] == evaluated["accuracy"]
    assert whole["confusion_matrix"] == evaluated["confusion_matrix"]
    page = (workdir / "controls/test/controls.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    for condition in report["conditions"]:
        assert condition["title"].replace("'", "&#39;") in page
    of_all = controls.run_controls(workdir, split="all", limit=8, output=tmp_path / "all")
    assert all(c["simple_model"] is None for c in of_all["conditions"])  # which learned from some
    with pytest.raises(UserError, match="no twin"):
        controls.run_controls(workdir, split="train", pairs=str(tmp_path / "pairs"))
    with pytest.raises(UserError, match="--pairs=.*does not exist"):
        controls.run_controls(workdir, pairs=str(tmp_path / "nothing"))
    own = report["data_dir"]
    with pytest.raises(UserError, match="is the folder of the images themselves"):
        controls.run_controls(workdir, pairs=own, output=tmp_path / "own")
    capsys.readouterr()
    controls.run_controls(workdir, limit=4)
    whole = f"{report['num_examples']:,} images, of which these are 4,"
    assert f"note: this replaces controls.json of {whole}" in capsys.readouterr().out


@pytest.mark.parametrize(("low", "told"), [(0.51, True), (0.49, False)])
def test_a_source_is_carried_where_the_whole_interval_is_above_chance(low, told):
    report, _ = _told(20, {"whole": 0.9})
    probe = {"balanced_accuracy": 0.6, "interval": [low, 0.7], "chance": 0.5}
    report["sources"] = {
        "alone": {"num_sources": 3, "accuracy": 0.8, "majority": 0.4},
        "within": {"COVID": {"answers": probe}},
        "not_applicable": None,
    }
    text = " ".join(explain(report))
    assert ("carry the source beside" in text) is told
    assert "gives 80.0 % accuracy (the commonest class 40.0 %)" in text


def test_greys_and_detail_are_what_these_two_conditions_change():
    rng = np.random.default_rng(0)
    image, other = (rng.integers(0, top, (64, 64, 1), np.uint8) for top in (120, 256))
    changes = {c.name: c.change for c in conditions(histogram([other]), "x", masks=False)}
    want = skimage.exposure.match_histograms(image.astype(float), other.astype(float))
    assert np.abs(changes["histogram_matched"](image, None) - want).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(changes["coarse"](image, None), coarsen(image))
    assert (coarsen(image) != image).any()


def test_each_column_of_the_page_holds_its_own_figure():
    report, _ = _told(20, {"whole": 0.9})
    report["class_names"] = NAMES
    report["references"]["guessing"] = {"accuracy": 0.31, "balanced_accuracy": 0.25}
    report["conditions"][1] |= {
        "accuracy": 0.11,
        "accuracy_interval": [0.1, 0.12],
        "changed": 0.33,
        "balanced_accuracy": 0.22,
        "balanced_accuracy_interval": [0.2, 0.24],
        "changed_interval": [0.3, 0.36],
        "recall_interval": dict.fromkeys(NAMES),
        "recall": dict(zip(NAMES, (0.51, 0.52, 0.53, 0.54), strict=True)),
    }
    table = _table(report)
    texts = [re.sub("<[^>]*>", "", str(x)).replace("\xa0", " ") for x in table["rows"][1]]
    got = dict(zip(table["head"], texts, strict=True))
    assert got["Accuracy"] == "11.0 % (10.0\N{EN DASH}12.0)"
    assert got["Balanced accuracy"] == "22.0 % (20.0\N{EN DASH}24.0)"
    assert got["Answers changed"] == "33.0 % (30.0\N{EN DASH}36.0)"
    assert [got[f"Sensitivity {n}"][:2] for n in NAMES] == ["51", "52", "53", "54"]


def test_what_is_answered_and_each_recall_s_interval():
    rng = np.random.default_rng(6)
    labels, p = rng.choice(4, 240, p=[0.2, 0.1, 0.6, 0.1]), rng.dirichlet(np.ones(4), 240)
    got = figures.condition_figures(p, labels, p, NAMES, np.arange(240))
    answers = p.argmax(1)
    assert list(got["predicted"].values()) == np.bincount(answers, minlength=4).tolist()
    for k, name in enumerate(NAMES):
        right = (answers == k)[labels == k]
        want = scipy.stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        assert got["recall_interval"][name] == pytest.approx([want.low, want.high])
