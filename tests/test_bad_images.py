"""`data.on_bad_image`. Judge of skipping: a run on a folder that never had the bad files."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from covid_flax.data import builder
from covid_flax.data.dataset import check_splits, load_dataset
from covid_flax.data.folder import open_folder
from covid_flax.errors import UserError
from covid_flax.evaluate import evaluate
from covid_flax.run import setup
from covid_flax.train import train
from ml_collections_configs import base

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_drawing")


def _spoil(data):
    """Bad files of different kinds among the good ones."""
    bad = {
        "COVID/images/COVID-3.png": "truncated",
        "Normal/images/Normal-0.png": "empty",
        "Normal/images/extra.png": "not a readable image",
        "Viral Pneumonia/images/a\nb.png": "mislabelled",
        "Viral Pneumonia/images/gone.png": "No such file",
        "Viral Pneumonia/images/pipe.png": "no regular file",
    }
    cut, empty, text, mislabelled, link, pipe = (data / file for file in bad)
    cut.write_bytes(cut.read_bytes()[:-40])
    empty.write_bytes(b"")
    text.write_text("<b>no image</b>")
    Image.new("L", (20, 20)).save(mislabelled, "JPEG")
    link.symlink_to(data / "nowhere.png")
    os.mkfifo(pipe)
    return bad


def _outcome(make_tiny_config, data, workdir, on_bad_image):
    c = make_tiny_config()
    c.data.dir, c.data.cache_dir = str(data), str(workdir.parent / "cache")
    c.data.on_bad_image = on_bad_image
    c.train.epochs = 1
    run = setup(c, workdir)
    train(run)
    return c, evaluate(workdir, data=run.data)


def _predictions(workdir):
    with open(workdir / "eval" / "val" / "predictions.csv", newline="") as f:
        return list(csv.reader(f))


def test_skipped_images_leave_no_trace_on_the_figures(
    make_tiny_config, phantom_dir, tmp_path, monkeypatch, capfd
):
    skipping, without = tmp_path / "skipping", tmp_path / "without"
    shutil.copytree(phantom_dir, skipping)
    shutil.copytree(phantom_dir, without)
    bad = _spoil(skipping)
    for file in bad:
        (without / file).unlink(missing_ok=True)
    run = tmp_path / "run"
    config, report = _outcome(make_tiny_config, skipping, run, "skip")
    out = capfd.readouterr()[0]
    assert "6 images that cannot be read are left out: COVID/images/COVID-3.png" in out, out
    _, expected = _outcome(make_tiny_config, without, tmp_path / "clean", "refuse")

    assert (run / "split.csv").read_bytes() == (tmp_path / "clean" / "split.csv").read_bytes()
    assert _predictions(run) == _predictions(tmp_path / "clean")
    assert report["confusion_matrix"] == expected["confusion_matrix"]

    saved = json.loads((run / "config.json").read_text())["data"]
    clean = json.loads((tmp_path / "clean" / "config.json").read_text())["data"]
    for named in (saved["bad_images"], report["bad_images"]):
        assert named.keys() == bad.keys()
        assert all(reason in named[file] for file, reason in bad.items())
    assert clean["bad_images"] == expected["bad_images"] == {}
    assert saved["images"] == clean["images"]
    page = (run / "eval" / "val" / "report.html").read_text()
    assert "6 images that cannot be read are left out: COVID/images/COVID-3.png" in page
    assert "<b>no" not in page

    # A second start, and an evaluation, look at the bad images alone.
    read = []
    decode = builder.decode
    monkeypatch.setattr(builder, "decode", lambda data, f: read.append(f) or decode(data, f))
    assert setup(config, run).resumed
    again = evaluate(run)
    assert again["bad_images"] == report["bad_images"]
    assert again["confusion_matrix"] == report["confusion_matrix"]
    assert set(read) <= bad.keys()

    # The same folder, and the same records, under the other setting.
    config.data.on_bad_image = "refuse"
    with pytest.raises(UserError, match="6 of 85 images in .* cannot be used") as e:
        setup(config, tmp_path / "other")
    assert all(reason in str(e.value) for reason in bad.values())
    assert not (tmp_path / "other").exists()

    # An image of the split that goes bad is no longer skipped in silence.
    gone = saved["images"]["val"] and next(r for r in _predictions(run)[1:])[0]
    (skipping / gone).write_bytes(b"")
    config.data.on_bad_image = "skip"
    with pytest.raises(UserError, match=f"1 images of the run's split.csv can no .* {gone}"):
        evaluate(run)
    with pytest.raises(UserError, match="the images or their split differ"):
        setup(config, run)


def _folder(root, per_class):
    for label in ("A", "B"):
        (root / label).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(root / label / f"{i}.png")
    return root


def test_every_bad_image_is_named_however_many(tmp_path):
    root = _folder(tmp_path / "data", 30)
    for label in ("A", "B"):
        for i in range(25):
            (root / label / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="50 of 60 images .* 30 more, all listed in (.*txt)") as e:
        builder.prepare(open_folder(str(root)), tmp_path / "cache")
    listed = next(tmp_path.glob("cache/bad-images-*.txt"))
    assert str(listed) in str(e.value)
    names = [line.split(" is an empty file")[0] for line in listed.read_text().splitlines()]
    assert sorted(names) == sorted(f"{label}/{i}.png" for label in "AB" for i in range(25))


def test_files_that_cannot_be_read_are_named_or_skipped_before_the_split(tmp_path):
    """The grouped split reads the files, to keep those of identical bytes together."""
    root = _folder(tmp_path / "data", 12)
    for name in ("A/3.png", "B/5.png"):
        (root / name).unlink()
        (root / name).symlink_to("nothing")
    c = base.get_config().data
    with c.unlocked():
        c.update(dir=str(root), split="grouped", folds=3, fold=0, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="2 of 24 images") as e:
        load_dataset(c, 0, tmp_path)
    assert "A/3.png" in str(e.value) and "B/5.png" in str(e.value)
    c.on_bad_image = "skip"
    check_splits([c], 0)
    assert len(load_dataset(c, 0, tmp_path).rows) == 22


def test_a_class_that_skipping_empties_is_refused(tmp_path):
    root = _folder(tmp_path / "data", 3)
    for i in range(3):
        (root / "B" / f"{i}.png").write_bytes(b"\0")
    with pytest.raises(UserError, match="no image of class B in .* can be read: replace"):
        builder.prepare(open_folder(str(root)), tmp_path / "cache", on_bad_image="skip")
    assert not any(p.is_dir() for p in (tmp_path / "cache").iterdir())


def test_an_image_mended_without_a_trace_is_taken_again(tmp_path):
    root = _folder(tmp_path / "data", 3)
    torn, whole = root / "B" / "1.png", (root / "B" / "1.png").read_bytes()
    torn.write_bytes(bytes(len(whole)))
    os.utime(torn, (1, 1))
    folder = open_folder(str(root))
    records = builder.prepare(folder, tmp_path / "cache", on_bad_image="skip")
    assert list(records.bad) == ["B/1.png"] and "B/1.png" not in records.files
    torn.write_bytes(whole)
    os.utime(torn, (1, 1))
    records = builder.prepare(folder, tmp_path / "cache", on_bad_image="skip")
    assert records.bad == {} and records[4]["image"] == whole
