import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from covid_flax.data import phantoms
from covid_flax.data.phantoms import CLASSES, draw, write_dataset
from covid_flax.errors import UserError


@pytest.fixture(scope="module")
def patients():
    """{label: [24, 64, 64]}: the same 24 patients in every class; and their lung masks."""
    pictures = {label: np.stack([draw(label, s, 64) for s in range(24)]) for label in CLASSES}
    masks = np.stack([phantoms._draw("Normal", s, 64)[1] for s in range(24)])
    return pictures, masks


@pytest.mark.parametrize("size", [32, 96, 128])
def test_is_a_grey_square_that_follows_from_the_seed(size):
    for label in CLASSES:
        picture = draw(label, 5, size)
        assert picture.shape == (size, size) and picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, draw(label, 5, size))
        assert np.abs(picture.astype(int) - draw(label, 6, size)).mean() > 3


def test_lungs_are_dark_between_a_bright_centre_and_a_chest_wall(patients):
    pictures, masks = patients
    for picture, mask in zip(pictures["Normal"], masks, strict=True):
        assert 0.1 < (mask > 0).mean() < 0.45
        lungs = picture[mask > 0].mean()
        assert picture[20:50, 30:34].mean() > lungs + 40
        columns = np.flatnonzero((mask > 0).any(0))
        assert columns[0] < 28 and columns[-1] > 36  # one on each side


def test_classes_differ_in_the_lungs_and_nowhere_else(patients):
    pictures, masks = patients
    # The lungs fade out under the heart's soft edge, up to five pixels beyond the mask.
    near = np.stack(
        [np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(11))) > 0 for mask in masks]
    )
    for label in set(CLASSES) - {"Normal"}:
        added = pictures[label].astype(int) - pictures["Normal"]
        assert not added[~near].any()
        assert (added >= -1).all()  # an opacity only brightens
        assert (added.max((1, 2)) > 10).all()  # and every patient of the class has one


def test_opacities_lie_where_the_disease_puts_them(patients):
    pictures, masks = patients
    columns = np.arange(64)
    one_sided, lateral, low, area = {}, {}, {}, {}
    for label in set(CLASSES) - {"Normal"}:
        added = np.clip(pictures[label].astype(float) - pictures["Normal"], 0, None)
        total = added.sum((1, 2))
        right = added[:, :, :32].sum((1, 2)) / total
        one_sided[label] = np.maximum(right, 1 - right)
        weight = added.sum(1) / total[:, None]
        lateral[label] = (weight * np.abs(columns - 31.5)).sum(1).mean()
        low[label] = (added.sum(2) / total[:, None] * columns).sum(1).mean()
        strong = added > 0.3 * added.max((1, 2), keepdims=True)
        area[label] = (strong & (masks > 0)).sum((1, 2)) / (masks > 0).sum((1, 2))
    assert (one_sided["Lung_Opacity"] > 0.9).all()
    assert (one_sided["Viral Pneumonia"] < 0.75).all()
    assert (one_sided["COVID"] < 0.9).mean() > 0.7
    assert lateral["COVID"] > lateral["Viral Pneumonia"] + 1  # peripheral against perihilar
    assert low["COVID"] > low["Viral Pneumonia"] + 1
    assert area["Lung_Opacity"].mean() < area["Viral Pneumonia"].mean()  # a lobe against both lungs


def test_a_linear_model_on_thumbnails_does_not_solve_them():
    linear_model = pytest.importorskip("sklearn.linear_model")
    pictures, labels = [], []
    for k, label in enumerate(CLASSES):
        for n in range(50):
            picture = Image.fromarray(draw(label, 1000 * k + n, 48))
            pictures.append(np.asarray(picture.reduce(4), float).ravel() / 64)
            labels.append(k)
    test = np.arange(len(labels)) % 5 == 0
    x, y = np.stack(pictures), np.array(labels)
    model = linear_model.LogisticRegression(C=0.1, max_iter=500).fit(x[~test], y[~test])
    assert model.score(x[test], y[test]) < 0.85


def test_writes_kaggles_layout(tmp_path):
    folder = tmp_path / "new" / "phantoms"
    write_dataset(folder, 3, seed=4, size=32)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    expected = {
        f"{label}/{kind}/{label}-{n}.png"
        for label in CLASSES
        for kind in ("images", "masks")
        for n in (1, 2, 3)
    }
    assert files == expected | {"phantoms.json"}
    pixels = set()
    for name in expected:
        with Image.open(folder / name) as image:
            assert (image.mode, image.size, image.format) == ("L", (32, 32), "PNG")
            array = np.asarray(image)
        if "/masks/" in name:
            assert set(np.unique(array)) == {0, 255}
        else:
            pixels.add(array.tobytes())
    assert len(pixels) == 3 * len(CLASSES)  # all are different patients
    assert [p.name for p in folder.parent.iterdir()] == ["phantoms"]  # no leftovers


def test_same_settings_give_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(tmp_path / name, 1, seed=seed, size=32)
    a, b, c = ((tmp_path / x / "COVID/images/COVID-1.png").read_bytes() for x in "abc")
    assert a == b != c


def _state(folder: Path):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*")}


def test_reuses_its_own_folder_and_touches_no_other(tmp_path):
    folder = tmp_path / "phantoms"
    folder.mkdir()  # an empty folder may be used
    write_dataset(folder, 1, size=32)
    before = _state(folder)
    write_dataset(folder, 1, size=32)
    assert _state(folder) == before
    for settings in ({"per_class": 2}, {"seed": 1}, {"size": 40}):
        with pytest.raises(UserError, match="phantoms"):
            write_dataset(folder, **{"per_class": 1, "size": 32} | settings)
    assert _state(folder) == before

    (folder / "Normal/images/Normal-1.png").unlink()
    with pytest.raises(UserError, match="not a complete set"):
        write_dataset(folder, 1, size=32)

    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other"):
        write_dataset(other, 1, size=32)
    assert [p.name for p in other.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    original, calls = phantoms._draw, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return original(*arguments)

    monkeypatch.setattr(phantoms, "_draw", failing)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is UserError else None):
        write_dataset(tmp_path / "phantoms", 2, size=32)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(UserError, match="Pneumonia"):
        draw("pneumonia", 0)
    with pytest.raises(UserError, match="at least 32"):
        draw("COVID", 0, 16)
    for bad in ({"per_class": 0}, {"per_class": 1, "seed": -1}, {"per_class": 1, "size": 8}):
        with pytest.raises(UserError):
            write_dataset(tmp_path / "x", **bad)
    assert not (tmp_path / "x").exists()


def test_command(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "covid_flax.data.phantoms", f"--output={folder}"]
    done = subprocess.run([*command, "--per_class=1", "--size=32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "Viral Pneumonia/images/Viral Pneumonia-1.png").is_file()
    assert str(folder) in done.stdout

    done = subprocess.run([*command, "--per_class=2", "--size=32"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and str(folder) in done.stderr


def test_needs_no_jax():
    code = "import sys, covid_flax.data.phantoms; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
